"""Certification of examples into a table: the same bytes straight, killed and resumed, on one worker or many."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from deepzero_core.data import prepare
from deepzero_core.errors import RequestError, WorkError
from deepzero_core.smoothing import ABSTAIN, Certificate, Certification, certify_many
from deepzero_core.training.sources import step_generator
from infra import certification
from infra.certificates import Certificates
from infra.certification import Examples, Task, certify_examples
from infra.classifiers import Recipe, files_of, moved
from infra.cluster import connect
from infra.shipping import Shipment

ROOT = Path(__file__).resolve().parents[2]
MODEL = {"name": "cnn", "in_channels": 1, "num_classes": 10, "image_size": [8, 8], "depth": 1, "width": 4, "seed": 0}
SETTINGS = {"sigma": 0.25, "n0": 40, "n": 300, "alpha": 0.01, "batch_size": 128, "radii": (0.25, 0.5)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare("digits", home=tmp_path_factory.mktemp("digits")).path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from deepzero_core.models import build_model

    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save(build_model(**{**MODEL, "seed": 5}).state_dict(), path)
    return path


def task(store: Path, weights: Path, *, adaptive: bool = True, count: int = 60, **settings: object) -> Task:
    recipe = Recipe("infra.classifiers:trained", {"model": MODEL, "weights": str(weights), "mean": [0.3], "std": [0.4]})
    examples = Examples(store, "test", tuple(range(0, 3 * count, 3)))
    return Task(examples, recipe, Certification(**{**SETTINGS, **settings}, adaptive=adaptive), seed=7)


class Killed(BaseException):
    """Stands for a kill that comes right after a certificate was kept."""


@pytest.mark.parametrize("adaptive", [False, True], ids=["fixed", "adaptive"])
def test_interrupted_anywhere_it_ends_with_the_same_table(
    store: Path, weights: Path, tmp_path: Path, adaptive: bool
) -> None:
    wanted = task(store, weights, adaptive=adaptive, count=20)
    table, certificates = certify_examples(wanted, tmp_path / "whole")
    for stop in (1, 7, 11):
        new = 0

        def advanced(_: Certificate, stop: int = stop) -> None:
            nonlocal new
            new += 1
            if new == stop:
                raise Killed

        with pytest.raises(Killed):
            certify_examples(wanted, tmp_path / "cut", advanced=advanced)
    told: list[Certificate] = []
    again, resumed = certify_examples(wanted, tmp_path / "cut", advanced=told.append)
    assert (resumed, len(told)) == (certificates, 1)
    assert again.read_bytes() == table.read_bytes()
    # And once more: nothing is left to do.
    assert certify_examples(wanted, tmp_path / "cut", advanced=told.append) == (again, certificates)
    assert len(told) == 1 and [path.name for path in (tmp_path / "cut").iterdir()] == [again.name]
    one_by_one = [next(wanted.certificates(wanted.build(), [number])) for number in range(20)]
    assert one_by_one == certificates


def test_workers_one_of_which_dies_make_the_table_of_this_process(store: Path, weights: Path, tmp_path: Path) -> None:
    wanted = task(store, weights, count=48, adaptive=False, n=3_000)
    here, _ = certify_examples(wanted, tmp_path / "here")
    killed: list[int] = []

    with connect(2, None, 60) as client:

        def advanced(_: Certificate) -> None:
            if not killed:
                victim = next(iter(client.run(os.getpid).values()))
                killed.append(victim)
                os.kill(victim, signal.SIGKILL)

        there, _ = certify_examples(wanted, tmp_path / "there", client=client, advanced=advanced)
        assert killed
        assert there.read_bytes() == here.read_bytes()

        def forget(_: Certificate) -> None:
            for name in list(client.cluster.scheduler.worker_plugins):
                if name.startswith("deepzero-certification"):
                    client.unregister_worker_plugin(name)

        # Workers that know nothing of it have another scheduler; what is certified stays.
        with pytest.raises(WorkError, match=r"^the Dask scheduler was lost in the middle of a certification$"):
            certify_examples(wanted, tmp_path / "lost", client=client, advanced=forget)
        # A mistake on a worker is told as it would be here.
        wrong = Task(wanted.examples, Recipe("infra.classifiers:train", {}), wanted.settings, 0)
        with pytest.raises(RequestError, match=r"'infra.classifiers:train' does not name a callable"):
            certify_examples(wrong, tmp_path / "wrong", client=client)


def test_workers_that_do_not_see_images_and_weights_are_sent_them(
    store: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, copied = tmp_path / "store", tmp_path / "weights.pt"
    shutil.copytree(store, own)
    shutil.copy(weights, copied)
    wanted = task(own, copied, count=8)
    here, _ = certify_examples(wanted, tmp_path / "here")
    monkeypatch.setattr(certification, "shares_disk", lambda client: False)
    packed = certification.Luggage.of

    def pack(task: Task, shipment: Shipment) -> certification.Luggage:
        luggage = packed(task, shipment)
        own.rename(tmp_path / "store elsewhere")
        copied.unlink()
        return luggage

    monkeypatch.setattr(certification.Luggage, "of", pack)
    labels = wanted.examples.labels()
    monkeypatch.setattr(Examples, "labels", lambda _: labels)
    with connect(1, None, 60) as client:
        there, _ = certify_examples(wanted, tmp_path / "there", client=client)
    assert there.read_bytes() == here.read_bytes()


def test_what_a_black_box_is_asked_is_not_counted_on_several_machines(store: Path) -> None:
    settings = {"path": "box.onnx"}
    victim = {"kind": "onnx", "settings": settings, "cache": None, "account": ["account.sqlite", "images"]}
    recipe = Recipe("infra.classifiers:defended", {"victim": victim, "purifier": None, "weights": None})
    with pytest.raises(RequestError, match=r"counted in a file of this machine: certify it with workers of this"):
        files_of(recipe)
    free = Recipe(recipe.factory, {**recipe.arguments, "victim": {**victim, "account": None}})
    assert files_of(free) == ["box.onnx"]
    assert moved(free, {"box.onnx": "there"}).arguments["victim"]["settings"] == {"path": "there"}


def test_killed_for_good_it_goes_on_from_what_is_on_disk(store: Path, weights: Path, tmp_path: Path) -> None:
    """A real SIGKILL, in a process of its own."""
    wanted = task(store, weights, adaptive=False, n=20_000)
    code = (
        "from pathlib import Path\n"
        "from deepzero_core.smoothing import Certification\n"
        "from infra.certification import Examples, Task, certify_examples\n"
        "from infra.classifiers import Recipe\n"
        "PosixPath = WindowsPath = Path\n"
        f"certify_examples({wanted!r}, Path({str(tmp_path / 'cut')!r}))\n"
    )
    parts = tmp_path / "cut" / "parts"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
        deadline = time.monotonic() + 120
        while len(list(parts.glob("0*.parquet"))) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    kept = Certificates(tmp_path / "cut", wanted.examples.labels()).found
    assert 3 <= len(kept) < len(wanted.examples.positions)
    straight = list(wanted.certificates(wanted.build(), sorted(kept)))
    assert straight == [kept[number] for number in sorted(kept)]


def test_what_is_damaged_or_strange_is_made_again(store: Path, weights: Path, tmp_path: Path) -> None:
    wanted = task(store, weights, count=5)
    table, certificates = certify_examples(wanted, tmp_path)
    content = table.read_bytes()
    damaged = bytearray(content)
    damaged[len(damaged) // 8] ^= 0x10
    pq.write_table(pq.read_table(table).select(["label"]), tmp_path / "other.parquet")
    for wrong in (bytes(damaged), content[:100], b"", (tmp_path / "other.parquet").read_bytes()):
        table.write_bytes(wrong)
        assert certify_examples(wanted, tmp_path) == (table, certificates)
        assert table.read_bytes() == content


def by_brightness(example: Tensor, *, threshold: float) -> object:
    """A classifier of two classes that is no module."""
    assert example.shape == (1, 8, 8)

    def classifier(images: Tensor) -> Tensor:
        bright = images.flatten(1).mean(1) - threshold
        return torch.stack([-bright, bright], 1)

    return classifier


def test_any_classifier_of_ones_own_is_certified(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its radius is known: the mean of 64 pixels is a projection on a vector of length 1/8."""
    monkeypatch.setitem(sys.modules, "own", sys.modules[__name__])
    examples = Examples(store, "test", (0, 5, 9))
    wanted = Task(
        examples, Recipe("own:by_brightness", {"threshold": 0.25}), Certification(0.25, 40, 4_000, 0.01, 500), 1
    )
    table, certificates = certify_examples(wanted, tmp_path)
    for certificate, image in zip(certificates, examples.images([0, 1, 2]), strict=True):
        true = abs(float(image.mean()) - 0.25) * 8
        assert certificate.radius <= true and certificate.label in (ABSTAIN, int(image.mean() > 0.25))
        assert certificate.radius > 0.8 * min(true, 0.5) - 0.05
    rows = pq.read_table(table).to_pylist()
    assert [row["label"] for row in rows] == examples.labels()
    assert list(rows[0]) == ["example", "label", "predicted", "radius", "p_lower", "samples", "saved"]
    assert [row["radius"] for row in rows] == [certificate.radius for certificate in certificates]


def test_the_noise_of_an_example_is_a_function_of_seed_and_number(store: Path, weights: Path) -> None:
    wanted = task(store, weights, count=4)
    (certificate,) = certify_many(
        wanted.build(), wanted.examples.images([2]), wanted.settings, generators=[step_generator(7, 3, 2)]
    )
    assert list(wanted.certificates(wanted.build(), [1, 2]))[1] == certificate


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        ("infra.nowhere:f", {}, "does not name a callable"),
        ("infra.classifiers", {}, "does not name a callable"),
        ("infra.classifiers:trained", {"x": object()}, "plain values, as JSON has them"),
        ("infra.classifiers:trained", {"x": float("nan")}, "plain values"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(factory: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Recipe(factory, arguments).build(torch.zeros(1, 8, 8))
