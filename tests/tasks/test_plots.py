"""Every picture is drawn from records and files, without pyplot, and says what the numbers say."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure
from PIL import Image

from deepzero_core.errors import WorkError
from tasks import plots
from tasks.plots import certified_steps, read_history, smooth
from tasks.records import Certified, Evaluated, MethodResult, Pruned, Trained

METHODS = ("cge", "first-order", "first-order-sparse-gradients", "rge")


def result(
    folder: Path, method: str, *, steps: int = 60, sparsity: float | None = 0.9, worst: float = 1.0
) -> MethodResult:
    path = folder / f"{method}.jsonl"
    cost = 480 if method == "cge" else 1
    with path.open("w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            common = {"step": step, "epoch": step // 10, "queries": cost * step, "seconds": 0.1 * step}
            loss = worst * 2.3 * math.exp(-step / 20)
            file.write(json.dumps({"kind": "step", "loss": loss, "accuracy": 0.5, **common}) + "\n")
            if step % 10 == 0:
                line = {"kind": "evaluation", "test_accuracy": 1 - math.exp(-step / 20), "test_loss": loss, **common}
                file.write(json.dumps(line) + "\n")
    trained = Trained(
        method=method,
        folder=folder,
        history=path,
        weights=folder / "weights",
        weights_digest="0" * 64,
        sparse=sparsity is not None,
        steps=steps,
        queries=cost * steps,
        seconds=0.1 * steps,
    )
    evaluated = Evaluated(accuracy=0.9, loss=0.3, confusion=((9, 1), (1, 9)))
    return MethodResult(method=method, sparsity=sparsity, trained=trained, evaluated=evaluated)


def certified(folder: Path, radii: list[float], predicted: list[int], labels: list[int]) -> Certified:
    table = folder / "certificates.parquet"
    pq.write_table(pa.table({"label": labels, "predicted": predicted, "radius": pa.array(radii, pa.float64())}), table)
    return Certified(
        table=table,
        examples=len(radii),
        accuracy_at={0.0: 0.5, 0.25: 0.25},
        average_radius=0.2,
        abstained=predicted.count(-1),
        sigma=0.25,
        alpha=0.001,
        samples=100,
        seconds=1.0,
    )


def pruned(folder: Path, layers: int = 3) -> Pruned:
    names = [f"block{number}.conv.weight" for number in range(layers)]
    return Pruned(
        folder=folder,
        method="zo-grasp",
        sparsity=0.9,
        ratios={name: 1 - 1 / (number + 2) for number, name in enumerate(names)},
        sizes=dict.fromkeys(names, 1000),
        coordinates=480,
        queries=386,
        seconds=1.0,
    )


Draw = Callable[[Path, Path], None]
PICTURES: dict[str, Draw] = {
    "learning_curves": lambda data, path: plots.learning_curves([result(data, name) for name in METHODS], path),
    "learning_curves_of_one": lambda data, path: plots.learning_curves([result(data, "cge")], path),
    "learning_curves_of_one_step": lambda data, path: plots.learning_curves([result(data, "cge", steps=1)], path),
    "learning_curves_at_zero_loss": lambda data, path: plots.learning_curves([result(data, "cge", worst=0.0)], path),
    "layer_ratios": lambda data, path: plots.layer_ratios(pruned(data), path),
    "layer_ratios_of_many": lambda data, path: plots.layer_ratios(pruned(data, 60), path),
    "confusion_matrix": lambda data, path: plots.confusion_matrix(
        Evaluated(accuracy=0.5, loss=1, confusion=((1, 1), (0, 0))), ("$5 bill", "ship & <sail>"), path
    ),
    "confusion_matrix_of_many": lambda data, path: plots.confusion_matrix(
        Evaluated(accuracy=1, loss=0, confusion=tuple(map(tuple, np.eye(100, dtype=int).tolist()))),
        [f"class {number}" for number in range(100)],
        path,
    ),
    "accuracy_against_queries": lambda data, path: plots.accuracy_against_queries(
        [result(data, name) for name in METHODS], path
    ),
    "certified_accuracy": lambda data, path: plots.certified_accuracy(
        certified(data, [0.3, 0.1, 0.7, 0.0], [1, 2, 3, -1], [1, 2, 0, 1]), path
    ),
    "certified_accuracy_of_nothing": lambda data, path: plots.certified_accuracy(
        certified(data, [0.0], [-1], [1]), path
    ),
    "loss_overlay": lambda data, path: plots.loss_overlay(
        result(data, "cge", worst=1.01), result(data, "first-order-sparse-gradients", steps=50), path
    ),
    "loss_overlay_of_equal_runs": lambda data, path: plots.loss_overlay(result(data, "cge"), result(data, "rge"), path),
}


@contextmanager
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """Figures as they are when they are saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *arguments: object, **options: object) -> None:
        saved.append(self)
        save(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        yield saved


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_is_complete(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    with figures(monkeypatch) as saved:
        PICTURES[name](tmp_path, path)
    with Image.open(path) as image:
        assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        assert min(image.size) > 300
        grey = np.asarray(image.convert("L"))
    # Something is drawn, and nothing touches the edge, where it would be cut off.
    assert (grey < 128).mean() > 0.002
    assert (np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]]) > 200).all()

    (figure,) = saved
    data_axes = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    for axes in data_axes:
        assert axes.get_title(loc="left")
        assert axes.get_xlabel() or len(data_axes) > 1  # a shared axis is named once
        assert axes.get_ylabel() or name.startswith("layer_ratios")  # whose rows carry names
        assert axes.get_legend() is None
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert not any(box.overlaps(axes.get_window_extent()) for axes in data_axes)


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        PICTURES["learning_curves"](tmp_path, tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_methods_are_named_for_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with figures(monkeypatch) as saved:
        plots.learning_curves(
            [result(tmp_path, "cge"), result(tmp_path, "first-order", sparsity=None)], tmp_path / "a.png"
        )
    names = [text.get_text() for text in saved[0].legends[0].get_texts()]
    assert names == ["CGE (90% sparse)", "First order"]


def test_the_certified_curve_falls_where_certificates_end(tmp_path: Path) -> None:
    record = certified(tmp_path, [0.3, 0.1, 0.7, 0.0, 0.3], [1, 2, 3, -1, 0], [1, 2, 0, 1, 0])
    radii, shares = certified_steps(record.table)
    # 0.7 is a wrong answer, and one example abstained.
    assert radii.tolist() == [0.0, 0.1, 0.3]
    assert shares.tolist() == pytest.approx([0.6, 0.6, 0.4])


def test_smoothing_keeps_lines_straight() -> None:
    line = np.linspace(2.0, 5.0, 50)
    np.testing.assert_allclose(smooth(line, 7), line, rtol=1e-12)
    np.testing.assert_array_equal(smooth(line, 1), line)
    assert len(smooth(np.array([]), 5)) == 0
    noise = np.random.default_rng(0).normal(size=400)
    assert smooth(noise, 21)[50:-50].std() < 0.35 * noise.std()


def test_a_history_that_is_missing_or_strange_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=r"training history .*gone\.jsonl cannot be read"):
        read_history(tmp_path / "gone.jsonl")
    (tmp_path / "strange.jsonl").write_text('{"kind": "step", "step": 1}\n')
    with pytest.raises(WorkError, match=r"training history .*strange\.jsonl cannot be read: KeyError\('loss'\)"):
        read_history(tmp_path / "strange.jsonl")


def test_a_table_of_certificates_that_is_missing_or_strange_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=r"table of certificates .*gone\.parquet cannot be read"):
        certified_steps(tmp_path / "gone.parquet")
    (tmp_path / "strange.parquet").write_text("no table")
    with pytest.raises(WorkError, match=r"table of certificates .*strange\.parquet cannot be read"):
        certified_steps(tmp_path / "strange.parquet")


def test_pyplot_is_not_used() -> None:
    import subprocess

    code = "import sys, tasks.plots; print('matplotlib.pyplot' in sys.modules)"
    root = Path(plots.__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root, timeout=60
    )
    assert done.stdout.strip() == "False"
