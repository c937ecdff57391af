"""What is known of the named data sets before a file of theirs is read: enough to refuse the impossible early."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataFacts:
    """image_size: side in pixels; classes, train: counts. None where only the files of the user can tell.

    embedded: comes with a dependency, so that there is nothing a `source` could point at.
    from_source: made from the user's own files below `source`.
    """

    image_size: int | None = None
    classes: int | None = None
    train: int | None = None
    embedded: bool = False
    from_source: bool = False


DATA_SETS: dict[str, DataFacts] = {
    "digits": DataFacts(image_size=8, classes=10, train=1437, embedded=True),
    "cifar10": DataFacts(image_size=32, classes=10, train=50_000),
    "cifar100": DataFacts(image_size=32, classes=100, train=50_000),
    "mnist": DataFacts(image_size=28, classes=10, train=60_000),
    "fashion_mnist": DataFacts(image_size=28, classes=10, train=60_000),
    "svhn": DataFacts(image_size=32, classes=10, train=73_257),
    "stl10": DataFacts(image_size=96, classes=10, train=5_000),
    "image_folder": DataFacts(from_source=True),
    "npz": DataFacts(from_source=True),
}

MODELS = ("cnn", "resnet20", "resnet32", "resnet44", "resnet56")

_SERVER = (
    "template",
    "answer_at",
    "headers",
    "token_env",
    "token_file",
    "token_header",
    "plain_token",
    "timeout",
    "connect_timeout",
    "patience",
    "max_answer_bytes",
    "concurrency",
    "name",
    "version",
)
BLACK_BOXES: dict[str, tuple[str, tuple[str, ...]]] = {
    "module": ("module", ("name",)),
    "function": ("function", ("takes", "name", "version")),
    "onnx": ("path", ("input", "output", "name")),
    "http": ("url", _SERVER),
    "mlflow": ("url", _SERVER),
}
"""By kind of classifier that may only be queried: the setting that it needs, and those that it may have."""

CORRECTORS = ("plain", "residual", "small")

LOWEST_REYNOLDS = 97.7

_OF_BOTH = ("param_shapes", "limit", "batch_size")
SIMULATORS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "external": (("command", "state_shapes"), (*_OF_BOTH, "protocol", "timeout", "retries", "environment")),
    "function": (("function", "state_shapes"), (*_OF_BOTH, "differentiable")),
}
"""By kind of one's own simulator: the settings that it needs, and those that it may have."""
