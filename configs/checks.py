"""What one value alone cannot show: combinations of an experiment that cannot run.

Each check yields (dotted key, reason). All of them are reported at once, as pydantic errors at their keys, so that the
same answer is given on the command line and wherever else an Experiment is validated.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from configs import optimizers
from configs.clusters import FILES, KINDS
from configs.facts import DATA_SETS, MODELS
from configs.messages import reasons
from configs.schema import SPARSE_METHODS
from deepzero_core.errors import suggest

if TYPE_CHECKING:
    from configs.schema import DataConfig, Experiment, ModelConfig

Problem = tuple[str, str]

_SCHEMES = ("tcp", "tls", "ucx", "ws", "wss")
_ADDRESS = re.compile(
    r"(?:(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://)?(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):(?P<port>[0-9]{1,5})"
)
CALLABLE = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*")


def raise_problems(experiment: Any, checks: "Sequence[Callable[[Any], Iterator[Problem]]] | None" = None) -> None:
    """Raise pydantic's ValidationError with one error per problem; do nothing when there is none."""
    found = [problem for check in checks or _CHECKS for problem in check(experiment)]
    if found:
        raise ValidationError.from_exception_data(
            type(experiment).__name__,
            [
                InitErrorDetails(
                    # The reason goes in as a value: braces in it are text, not a template.
                    type=PydanticCustomError("impossible", "{reason}", {"reason": reason}),
                    loc=tuple(key.split(".")),
                    input=None,
                )
                for key, reason in found
            ],
        )


def steps_per_epoch(experiment: "Experiment") -> int | None:
    """Full batches per epoch where the size of the data set is known; for own data, an upper bound or None."""
    examples = _train_examples(experiment)
    return None if examples is None else examples // experiment.data.batch_size


def _train_examples(experiment: "Experiment") -> int | None:
    facts, limit = DATA_SETS.get(experiment.data.name), experiment.data.train_limit
    known = [count for count in (facts.train if facts else None, limit) if count is not None]
    return min(known) if known else None


def data_set(experiment: Any) -> Iterator[Problem]:
    """Of the section `data`."""
    data = experiment.data
    facts = DATA_SETS.get(data.name)
    if facts is None:
        yield "data.name", f"there is no data set {data.name!r}; {suggest(data.name, DATA_SETS)}"
        return
    if "\0" in str(data.source or ""):
        yield "data.source", "a path cannot contain a null character"
    if facts.from_source and data.source is None:
        what = "the folder that holds train/ and test/" if data.name == "image_folder" else "the .npz file"
        yield "data.source", f"data set {data.name!r} is made from your own files: name {what}"
    if facts.embedded and data.source is not None:
        yield "data.source", f"data set {data.name!r} is embedded and reads no files: leave it out"
    if data.name != "image_folder" and data.image_size is not None:
        yield "data.image_size", f"the images of {data.name!r} have a size of their own: only image_folder is resized"
    examples = _train_examples(experiment)
    if examples is not None and data.batch_size > examples:
        yield "data.batch_size", f"a batch of {data.batch_size} cannot be filled from {examples} training examples"
    side = data.image_size or facts.image_size
    if side is not None and data.crop_padding >= side:
        yield (
            "data.crop_padding",
            f"{data.crop_padding} pixels of padding can push images of {side} pixels out of sight",
        )


def _model(experiment: "Experiment") -> Iterator[Problem]:
    for key, reason in network(experiment.model, experiment.data):
        yield f"model.{key}", reason


def network(model: "ModelConfig", data: "DataConfig") -> Iterator[Problem]:
    """Of a classifier for the data set, keys below its own."""
    facts = DATA_SETS.get(data.name)
    if ":" in model.name:
        if not CALLABLE.fullmatch(model.name):
            yield "name", f"{model.name!r} does not have the form package.module:callable"
        return
    if model.name not in MODELS:
        hint = suggest(model.name, MODELS)
        yield "name", f"there is no model {model.name!r}; {hint} (your own is named package.module:callable)"
        return
    if model.arguments:
        yield "arguments", f"model {model.name!r} takes none; they are for your own package.module:callable"
    side = data.image_size or (facts.image_size if facts else None)
    if model.name == "cnn" and side is not None and 2**model.depth > side:
        yield (
            "depth",
            f"every block halves the image, so that {model.depth} blocks are too many for {side}x{side} pixels; "
            f"at most {max(side.bit_length() - 1, 0)} are possible",
        )


def _pruning(experiment: "Experiment") -> Iterator[Problem]:
    pruning, facts = experiment.pruning, DATA_SETS.get(experiment.data.name)
    if pruning.method == "none":
        reason = "needs masks, but pruning.method is 'none'; choose random, magnitude, grasp or zo-grasp"
        if experiment.training.method in SPARSE_METHODS:
            yield "training.method", f"{experiment.training.method!r} {reason}"
        for index, method in enumerate(experiment.baselines):
            if method in SPARSE_METHODS:
                yield f"baselines.{index}", f"{method!r} {reason}"
    examples = _train_examples(experiment)
    if pruning.method in ("grasp", "zo-grasp") and facts and facts.classes and examples is not None:
        wanted = pruning.samples_per_class * facts.classes
        if wanted > examples:
            yield (
                "pruning.samples_per_class",
                f"{pruning.samples_per_class} samples of {facts.classes} classes are more than the {examples} "
                "training examples",
            )


def _training(experiment: "Experiment") -> Iterator[Problem]:
    training, schedule = experiment.training, experiment.training.schedule
    per_epoch = steps_per_epoch(experiment)
    if schedule.warmup_epochs > training.epochs:
        yield (
            "training.schedule.warmup_epochs",
            f"a warm-up of {schedule.warmup_epochs} epochs is longer than the run of {training.epochs}",
        )
    elif training.steps is not None and per_epoch and schedule.warmup_epochs * per_epoch > training.steps:
        yield (
            "training.schedule.warmup_epochs",
            f"a warm-up of {schedule.warmup_epochs} epochs, {schedule.warmup_epochs * per_epoch} steps, "
            f"is longer than the run of training.steps={training.steps}",
        )
    if training.steps is not None and per_epoch and training.steps > per_epoch * training.epochs:
        yield (
            "training.steps",
            f"{training.steps} steps are more than the {per_epoch * training.epochs} of {training.epochs} epochs; "
            f"training.epochs={math.ceil(training.steps / per_epoch)} makes room for them",
        )
    evaluations = experiment.estimator.queries * (1 if experiment.estimator.difference == "forward" else 2)
    if training.method == "rge" and training.query_budget is not None and training.query_budget < evaluations:
        yield (
            "training.query_budget",
            f"{training.query_budget} queries do not pay for one step of rge, which spends {evaluations} on "
            f"estimator.queries={experiment.estimator.queries} directions",
        )
    for key, reason in optimizers.problems(
        training.optimizer.name, training.optimizer.lr, training.optimizer.arguments
    ):
        yield f"training.optimizer.{key}", reason


def baselines(experiment: Any) -> Iterator[Problem]:
    """Of the methods to compare `training.method` with."""
    for index, method in enumerate(experiment.baselines):
        if method in experiment.baselines[:index]:
            yield f"baselines.{index}", f"{method!r} stands there twice"
        elif method == experiment.training.method:
            yield f"baselines.{index}", f"{method!r} is what is trained already (training.method)"


def comparison(experiment: Any) -> Iterator[Problem]:
    """Of several methods with several seeds, each zeroth-order one within the same queries."""
    training = experiment.training
    yield from baselines(experiment)
    for method in training.lr:
        if method not in experiment.methods:
            yield f"training.lr.{method}", "this method is not trained (training.method, baselines)"
    if len(set(experiment.seeds)) < len(experiment.seeds):
        yield "seeds", "a seed stands there twice"
    if training.queries < 2:
        yield "training.queries", "a step needs at least 2 queries: the loss as it is, and moved"
    optimizer = training.optimizer
    for key, reason in optimizers.problems(optimizer.name, optimizer.lr, optimizer.arguments):
        yield f"training.optimizer.{key}", reason


def certification(experiment: Any) -> Iterator[Problem]:
    """Of the section `certification`."""
    settings = experiment.certification
    if len(set(settings.radii)) < len(settings.radii):
        yield "certification.radii", "a radius stands there twice"
    # With every sample of one class the Clopper-Pearson lower bound is α^(1/n); a certificate needs it above one half.
    # Adaptive mode has half of α left for it.
    alpha = settings.alpha / 2 if settings.adaptive else settings.alpha
    if alpha ** (1 / settings.n) <= 0.5:
        needed = math.floor(math.log(alpha) / math.log(0.5)) + 1
        yield (
            "certification.n",
            f"{settings.n} samples cannot certify anything at alpha={settings.alpha:g}, even if all agree; "
            f"at least {needed} are needed",
        )


def cluster(experiment: Any) -> Iterator[Problem]:
    """Of the section `cluster`."""
    settings = experiment.cluster
    yield from _cluster_spec(settings)
    if settings.address is None:
        return
    if settings.workers == 0:
        yield (
            "cluster.workers",
            "0 evaluates in this process, but cluster.address names a running cluster: leave one of them out",
        )
    match = _ADDRESS.fullmatch(settings.address)
    if match is None or not 0 < int(match["port"]) < 65_536:
        yield "cluster.address", f"{settings.address!r} does not have the form tcp://host:port"
    elif match["scheme"] and match["scheme"] not in _SCHEMES:
        yield "cluster.address", f"Dask has no transport {match['scheme']!r}; {suggest(match['scheme'], _SCHEMES)}"


def _cluster_spec(settings: Any) -> Iterator[Problem]:
    """What can be said before the file is read; `infra.specs` reads it."""
    spec, options = settings.spec, settings.options
    if spec is None:
        if options:
            yield "cluster.options", "they are keys of a cluster file: name it by cluster.spec"
        return
    if settings.workers == 0:
        yield "cluster.workers", "0 evaluates in this process, but cluster.spec names a cluster: leave one of them out"
    if spec not in FILES:
        if not spec.endswith((".yaml", ".yml")):
            yield (
                "cluster.spec",
                f"there is no cluster {spec!r}; {suggest(spec, FILES)} (a file of your own ends in .yaml)",
            )
        return
    kind = FILES[spec]
    if settings.address is not None and kind != "scheduler":
        yield "cluster.address", f"cluster.spec {spec!r} starts a scheduler of its own: leave the address out"
    if "kind" in options:
        yield "cluster.options", f"kind is what the file says, {kind!r}"
        return
    try:
        KINDS[kind].model_validate(options)
    except ValidationError as error:
        for reason in reasons(KINDS[kind], error):
            yield "cluster.options", reason


_CHECKS: tuple[Callable[["Experiment"], Iterator[Problem]], ...] = (
    data_set,
    _model,
    _pruning,
    _training,
    baselines,
    certification,
    cluster,
)
