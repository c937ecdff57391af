"""Certification against a plain loop over examples, as Cohen et al. 2019 published it, timed in the same run.

    published     one example after the other, `randn_like` for a whole batch, the network as it was trained
    shared        `certify_many` with the same network: batches filled across examples
    inference     the same with `Inference`: BatchNorm folded, channels last, slices that stay in the caches
    adaptive      the same, stopped where the radii are settled; its ratio is one of samples as well as of speed

digits: the network of the demo, trained here by backpropagation for a few epochs, on its test images.
resnet20: at its initialisation, on random images; what it answers decides nothing but the samples of adaptive mode.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.stats import beta
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.bars import CERTIFICATION, SAVED
from benchmarks.measure import Report
from benchmarks.ratios import resnet20
from deepzero_core.data import BatchSource, ImageStore, prepare, to_tensor
from deepzero_core.models import Normalised, build_model
from deepzero_core.smoothing import Certificate, Certification, Inference, certify_many
from deepzero_core.smoothing.bounds import radius_of

RADII = (0.0, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Case:
    """A network for images in [0, 1], and what is certified of it."""

    about: str
    build: Callable[[int], tuple[nn.Module, Tensor]]
    examples: int
    settings: Certification


@dataclass(frozen=True)
class Measured:
    """By contender: seconds of every turn, by the clock and of the processor, samples, examples certified at 0.25."""

    case: str
    about: str
    examples: int
    seconds: dict[str, tuple[float, ...]]
    processor_seconds: dict[str, tuple[float, ...]]
    samples: dict[str, int]
    certified: dict[str, int]

    @property
    def ratios(self) -> dict[str, float]:
        """How many times longer the published loop takes, by the medians."""
        return _ratios(self.seconds)

    @property
    def processor_ratios(self) -> dict[str, float]:
        """The same of the processor's time, which waits for nobody on a machine that is shared."""
        return _ratios(self.processor_seconds)

    @property
    def saved(self) -> float:
        """Share of the samples that adaptive mode did without."""
        return 1 - self.samples["adaptive"] / self.samples["inference"]


def _ratios(seconds: dict[str, tuple[float, ...]]) -> dict[str, float]:
    medians = {name: statistics.median(turns) for name, turns in seconds.items()}
    return {name: medians["published"] / median for name, median in medians.items()}


def measure(cases: Sequence[str], repeats: int, report: Report) -> list[Measured]:
    """All contenders in turns, so that what disturbs the machine disturbs them all."""
    return [_measured(name, CASES[name], repeats, report) for name in cases]


def _measured(name: str, case: Case, repeats: int, report: Report) -> Measured:
    report(f"{name}: {case.about}")
    network, images = case.build(case.examples)
    contenders = _contenders(network.eval(), images, case.settings)
    for contender in contenders.values():
        contender(1)  # a first call has more to do than the others
    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    processor: dict[str, list[float]] = {contender: [] for contender in contenders}
    answers: dict[str, list[Certificate]] = {}
    for repeat in range(repeats):
        for contender, run in contenders.items():
            report(f"{name}: {contender}, repeat {repeat + 1} of {repeats}")
            started, busy = time.perf_counter(), time.process_time()
            answers[contender] = run(len(images))
            seconds[contender].append(time.perf_counter() - started)
            processor[contender].append(time.process_time() - busy)
    return Measured(
        name,
        case.about,
        len(images),
        {contender: tuple(turns) for contender, turns in seconds.items()},
        {contender: tuple(turns) for contender, turns in processor.items()},
        {contender: sum(c.samples for c in found) for contender, found in answers.items()},
        {contender: sum(c.radius >= 0.25 for c in found) for contender, found in answers.items()},
    )


def _contenders(
    network: nn.Module, images: Tensor, settings: Certification
) -> dict[str, Callable[[int], list[Certificate]]]:
    fast = Inference(network, images[0])

    def ours(classifier: nn.Module, wanted: Certification) -> Callable[[int], list[Certificate]]:
        def run(count: int) -> list[Certificate]:
            generators = (torch.Generator().manual_seed(number) for number in range(count))
            return list(certify_many(classifier, images[:count], wanted, generators=generators))

        return run

    return {
        "published": lambda count: [published(network, x, settings) for x in images[:count]],
        "shared": ours(network, settings),
        "inference": ours(fast, settings),
        "adaptive": ours(fast, replace(settings, adaptive=True, radii=RADII)),
    }


def published(network: nn.Module, x: Tensor, settings: Certification) -> Certificate:
    """CERTIFY as in the code of Cohen et al. 2019, in their steps."""
    selected = _sample_noise(network, x, settings.n0, settings)
    chosen = int(selected.argmax())
    hits = int(_sample_noise(network, x, settings.n, settings)[chosen])
    p_lower = float(beta.ppf(settings.alpha, hits, settings.n - hits + 1)) if hits else 0.0
    label = chosen if p_lower >= 0.5 else -1
    return Certificate(label, radius_of(p_lower, settings.sigma), settings.n0 + settings.n, p_lower)


def _sample_noise(network: nn.Module, x: Tensor, left: int, settings: Certification) -> Tensor:
    counts: Tensor | int = 0
    with torch.no_grad():
        while left:
            size = min(settings.batch_size, left)
            left -= size
            batch = x.repeat((size, *[1] * x.ndim))
            scores = network(batch + torch.randn_like(batch) * settings.sigma)
            counts = torch.bincount(scores.argmax(1), minlength=scores.shape[1]) + counts
    assert isinstance(counts, Tensor)
    return counts


def show(found: Sequence[Measured]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for title in (
        "case",
        "contender",
        "seconds",
        "published takes",
        "of the processor",
        "samples",
        "certified at 0.25",
    ):
        table.add_column(title, justify="left" if title in ("case", "contender") else "right")
    for one in found:
        for name, turns in one.seconds.items():
            first = name == "published"
            table.add_row(
                f"{one.about}, {one.examples} examples" if first else "",
                name,
                f"{statistics.median(turns):.3g}",
                "" if first else f"{one.ratios[name]:.2f}×",
                "" if first else f"{one.processor_ratios[name]:.2f}×",
                f"{one.samples[name]:,}",
                str(one.certified[name]),
            )
    console = Console(width=150)
    console.print(table)
    for one in found:
        console.print(f"{one.case}, fixed number of samples: {CERTIFICATION.verdict(one.ratios['inference'])}")
        if one.case == "digits":
            console.print(f"{one.case}, adaptive: {one.saved:.0%} of the samples saved, {SAVED.verdict(one.saved)}")


def documents(found: Sequence[Measured]) -> list[dict[str, object]]:
    """What was measured, and what follows from it, as JSON's types."""
    return [
        {**vars(one), "ratios": one.ratios, "processor_ratios": one.processor_ratios, "saved": one.saved}
        for one in found
    ]


def _digits(examples: int) -> tuple[nn.Module, Tensor]:
    with tempfile.TemporaryDirectory() as home:
        store = ImageStore.open(prepare("digits", home=Path(home)).path)
        manifest, test = store.manifest, store.split("test")
        images = to_tensor(test.images[[i * len(test) // examples for i in range(examples)]])
        batches = BatchSource(store.split("train"), batch_size=64, seed=0, mean=manifest.mean, std=manifest.std)
        network = build_model("cnn", in_channels=1, num_classes=10, image_size=8, depth=2, width=18, seed=0)
        optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        for epoch in range(25):
            for index in range(batches.steps_per_epoch):
                inputs, targets = batches.batch(epoch, index)
                optimiser.zero_grad()
                F.cross_entropy(network(inputs), targets).backward()
                optimiser.step()
    return Normalised(network, manifest.mean, manifest.std).eval(), images


def _resnet20(examples: int) -> tuple[nn.Module, Tensor]:
    images = torch.rand(examples, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Normalised(resnet20(), (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)).eval(), images


CASES = {
    "digits": Case("CNN of the demo, 8×8", _digits, 50, Certification(0.25, 100, 1_000, 0.001, 1_000)),
    "resnet20": Case("ResNet-20, 32×32", _resnet20, 3, Certification(0.25, 100, 1_000, 0.001, 1_000)),
}
