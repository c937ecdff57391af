"""Put a denoiser in front of a classifier that may only be queried, and certify what comes of it."""

from collections.abc import Iterator

from prefect import flow

from configs.defence import Defence
from flows.experiment import recorded, tidied
from tasks.certify import certify_defended
from tasks.defence_publish import report_defence
from tasks.defend import defend as train_defence
from tasks.defend import share_out, undefended
from tasks.prepare import prepare
from tasks.pretrain import pretrain
from tasks.records import DefenceResult, Defended, Prepared, Reported, Victim
from tasks.stage import Tracking
from tasks.victim import examine


@flow(name="defend", flow_run_name="{experiment.name}", on_cancellation=[tidied], on_crashed=[tidied])
def defend(experiment: Defence) -> Reported:
    """Prepare the data, ask the classifier, pre-train, train by every method, certify, report."""
    with recorded("defend", experiment) as tracking:
        prepared = prepare(tracking, experiment.data)
        victim = examine(tracking, experiment, prepared)
        results = [
            DefenceResult(
                defended=defended, certified=certify_defended(tracking, experiment, prepared, victim, defended)
            )
            for seed in experiment.seeds
            for defended in defended_by_all(tracking, experiment, prepared, victim, seed)
        ]
        return report_defence(tracking, experiment, prepared, victim, results)


def defended_by_all(
    tracking: Tracking, experiment: Defence, prepared: Prepared, victim: Victim, seed: int
) -> Iterator[Defended]:
    """What each of the experiment's methods makes of the same pre-trained denoiser."""
    methods = experiment.methods
    given = tracking, experiment, prepared
    if set(methods) != {"none"}:
        denoiser = pretrain(*given, "denoiser", seed)
    for method in methods:
        if method == "none":
            yield undefended(seed)
            continue
        autoencoder = pretrain(*given, "autoencoder", seed) if method == "zo-ae-ds" else None
        shares = share_out(*given, victim, denoiser, seed) if method == "deepzero" else None
        yield train_defence(*given, victim, method, seed, denoiser=denoiser, autoencoder=autoencoder, shares=shares)
