"""What `deepzero run defend` would do, from the real data and the real networks: what cannot be built is refused."""

from pathlib import Path

from rich.table import Table

from configs.defence import Defence
from deepzero_core.errors import RequestError
from infra.specs import described


def defence_plan(flow_name: str, experiment: Defence, base: Path) -> Table:
    """Data, classifier, denoiser and costs.

    Raises:
        RequestError: the data or a network of the experiment is not what it says; nothing has been asked or created.
    """
    from deepzero_core.data import prepare
    from deepzero_core.models import build_denoiser, build_model
    from tasks.problem import model_of, network_of
    from tasks.records import Prepared

    data, victim, training = experiment.data, experiment.victim, experiment.training
    path = prepare(data.name, home=base, source=data.source, image_size=data.image_size).path
    prepared = Prepared.of_store(path)
    train = min(data.train_limit or prepared.counts["train"], prepared.counts["train"])
    if data.batch_size > train:
        raise RequestError(f"data.batch_size={data.batch_size} cannot be filled from {train} training images")
    denoiser = build_denoiser(**network_of(experiment, prepared, "denoiser", 0))
    parameters = sum(p.numel() for p in denoiser.parameters())
    if victim.kind == "trained":
        network = build_model(**model_of(victim.model, prepared, 0))
        classifier = f"{victim.model.name}, trained here: {sum(p.numel() for p in network.parameters()):,} parameters"
    else:
        classifier = f"{victim.kind}: {next(iter(victim.settings.values()))}"
    asking = [method for method in experiment.methods if method not in ("none", "fo-ds")]
    images = training.queries * data.batch_size
    total = images * training.steps * len(asking) * len(experiment.seeds)
    certified = experiment.certification
    copies = certified.examples * (certified.n0 + certified.n) * len(experiment.methods) * len(experiment.seeds)
    rows = {
        "flow": flow_name,
        "data": f"{data.name}: " + ", ".join(f"{count:,} {split}" for split, count in prepared.counts.items()),
        "classifier": classifier,
        "denoiser": f"{experiment.denoiser.name}: {parameters:,} parameters",
        "methods": ", ".join(experiment.methods) + f"; seeds {', '.join(map(str, experiment.seeds))}",
        "training": f"{training.steps:,} steps of {data.batch_size} images",
        "queries": f"at most {training.queries:,} per step, {images:,} images; {total:,} images for all methods",
        "certification": f"{certified.examples:,} images, at most {copies:,} noisy copies for all methods",
        "workers": described(experiment.cluster),
    }
    if victim.budget is not None:
        rows["budget"] = f"{victim.budget:,} images"
    if victim.price_per_thousand is not None:
        rows["cost"] = f"at most {(total + copies) / 1000 * victim.price_per_thousand:,.2f}"
    table = Table(show_header=False, box=None, title=f"{experiment.name}: what would be done", title_justify="left")
    for label, text in rows.items():
        table.add_row(f"[bold]{label}", text)
    return table
