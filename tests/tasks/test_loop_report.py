"""The report of a solver in the loop: its table, what it says of the order and of losses, and its pictures."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from deepzero_core.errors import WorkError
from tasks.loop_order import order_notes
from tasks.loop_report import loop_table, share_of_the_way, write_loop_report
from tasks.records import Cases, Corrected, LoopResult, Reported, RolledOut
from tasks.roll_out import errors_of, read_images, write_images
from tasks.seeds import by_method

ERRORS = {"sol-zo": 0.12, "src": 0.2, "non": 0.16, "sol-fo": 0.1}
FRAMES = 5


def result(folder: Path, method: str, seed: int, error: float, *, lost: bool = False) -> LoopResult:
    stem = folder / f"{method}-{seed}"
    table, images, history = (stem.with_suffix(suffix) for suffix in (".parquet", ".arrow", ".jsonl"))
    values = [error * (0.5 + number / 4) for number in range(FRAMES)]
    second = [*values[:-1], None] if lost else values
    names = [name for name in ("seed 100", "seed 101") for _ in range(FRAMES)]
    pq.write_table(pa.table({"case": names, "frame": [*range(1, FRAMES + 1)] * 2, "mae": values + second}), table)
    write_images(images, torch.rand(FRAMES, 2, 6, 6, generator=torch.Generator().manual_seed(seed)))
    history.write_text("".join(json.dumps({"kind": "step", "step": k, "loss": 1 / k}) + "\n" for k in (1, 2, 3)))
    trained = method != "src"
    corrected = Corrected(
        method=method,
        seed=seed,
        folder=folder,
        history=history if trained else None,
        weights=folder / "weights" if trained else None,
        weights_digest="0" * 64,
        parameters=606 if trained else 0,
        steps=3,
        kept_step=3,
        validation_mae=None,
        queries=48,
        solver_steps=1_000,
        diverged=2 if lost else 0,
        crashed=0,
        restarts=1 if lost else 0,
        seconds=12.5,
    )
    rolled = RolledOut(
        table=table,
        images=images,
        cases=("seed 100", "seed 101"),
        mae=(error, error),
        relative_error=(error / 2, error / 2),
        spectrum_error=(0.1, 0.2),
        diverged=int(lost),
        steps_per_second=1e4,
        seconds=1.0,
    )
    return LoopResult(corrected=corrected, rolled=rolled)


@pytest.fixture
def results(tmp_path: Path) -> list[LoopResult]:
    return [
        result(tmp_path, method, seed, error + (0.002 * seed if method != "src" else 0))
        for seed in (0, 1)
        for method, error in ERRORS.items()
        if method != "src" or seed == 0
    ]


def write(folder: Path, results: list[LoopResult]) -> Reported:
    cases = Cases(
        store=folder, digest="d" * 64, name="burgers 6×6 of 24×24", counts={"train": 20, "test": 2}, frames=6,
        numbers=72, seconds=1.0,
    )  # fmt: skip
    return write_loop_report(
        folder / "report",
        experiment_yaml="name: demo\n",
        title="demo",
        results=results,
        cases=cases,
        queries_per_step=16,
        reference=torch.rand(FRAMES, 2, 6, 6, generator=torch.Generator().manual_seed(9)),
        animated=True,
        environment={"torch": "2"},
        mlflow_url=None,
    )


def test_the_table_has_mean_and_spread_of_the_seeds(results: list[LoopResult]) -> None:
    table = loop_table(by_method(results), 16)
    assert table.columns[:2] == ("method", "MAE")
    assert [row[0] for row in table.rows] == ["SRC", "NON", "SOL-ZO", "SOL-FO"]
    assert table.rows[2] == ("SOL-ZO", "0.1210±0.0014", "6.0±0.1", "0.15±0.00", "80±0 %", "48", "1,000", "12.5 s")
    assert table.rows[0][:5] == ("SRC", "0.2000", "10.0", "0.15", "–")


def test_the_share_of_the_way_is_that_of_each_seed(results: list[LoopResult]) -> None:
    grouped = by_method(results)
    assert share_of_the_way(grouped, "sol-zo") == pytest.approx([0.8, 0.078 / 0.098])
    assert share_of_the_way(grouped, "sol-fo") == [1.0, 1.0]
    assert share_of_the_way({"sol-zo": grouped["sol-zo"]}, "sol-zo") == []


HOLDS = "SRC > NON > SOL-ZO ≥ SOL-FO holds with 2 seeds, for every pair beyond its spread."


def test_the_whole_order_is_said_to_hold_or_where_it_does_not(results: list[LoopResult], tmp_path: Path) -> None:
    def notes(*seeds: dict[str, float]) -> tuple[list[str], list[str]]:
        some = [result(tmp_path, name, seed, e) for seed, errors in enumerate(seeds) for name, e in errors.items()]
        return order_notes(by_method([one for one in some if one.method != "src" or one.corrected.seed == 0]))

    assert order_notes(by_method(results)) == ([HOLDS], [])
    assert notes(ERRORS | {"non": 0.25, "sol-fo": 0.13})[1] == [
        "The error of NON (0.2500) is not below that of SRC (0.2000).",
        "The error of SOL-FO (0.1300) is not below that of SOL-ZO (0.1200).",
    ]
    assert notes(ERRORS | {"sol-zo": 0.21, "non": 0.2})[1] == [
        "The error of NON (0.2000) is not below that of SRC (0.2000).",
        "The error of SOL-ZO (0.2100) is not below that of SRC (0.2000).",
        "The error of SOL-ZO (0.2100) is not below that of NON (0.2000).",
    ], "every pair is looked at, not neighbours alone"
    assert notes(ERRORS | {"sol-fo": 0.12})[1] == [], "as good as first order is as it should be"
    assert notes(ERRORS | {"non": float("inf")})[1] == ["The error of NON (inf) is not below that of SRC (0.2000)."]
    assert notes(ERRORS, ERRORS | {"non": 0.121})[1] == [
        "The error of SOL-ZO (0.1200±0.0000) is below that of NON (0.1405±0.0276) by no more than the spread of their "
        "difference (0.0205±0.0276)."
    ]


def test_the_numbers_for_machines_the_pictures_and_what_was_lost(results: list[LoopResult], tmp_path: Path) -> None:
    reported = write(tmp_path, [*results[:-1], result(tmp_path, "sol-fo", 1, 0.1, lost=True)])
    found = json.loads(reported.result.read_text())
    assert [method["method"] for method in found["methods"]] == list(ERRORS)
    assert found["methods"][0]["mae"] == pytest.approx([0.12, 0.122])
    lost = "SOL-FO: diverged in training: 2, restarts of the program: 1, test cases diverged: 1."
    assert found["notes"] == [HOLDS, lost]
    text = reported.markdown.read_text()
    assert "20 training and 2 test cases" in text
    assert "| SOL-ZO | 0.121±0.001 | 0.119±0.038 |" in text
    signatures = {".png": b"\x89PNG", ".gif": b"GIF89a"}
    assert set(found["pictures"]) == {"fields", "error-over-time", "bars", "training-loss", "animation"}
    for name in found["pictures"].values():
        assert (reported.folder / name).read_bytes().startswith(signatures[Path(name).suffix])
    with pytest.raises(WorkError, match="at least one method"):
        write(tmp_path, [])


def test_errors_end_with_a_divergence(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(3, 2, 2, 4, 4, generator=generator)
    images = reference + 0.5
    images[2, 1] = torch.nan
    errors = errors_of(images, reference)
    assert errors["mae"][:, 0].tolist() == pytest.approx([0.5] * 3)
    for values in errors.values():
        assert values.isfinite().tolist() == [[True, True], [True, True], [True, False]]
    on_a_line = errors_of(torch.ones(3, 2, 1, 7), torch.zeros(3, 2, 1, 7))
    assert set(on_a_line) == {"mae", "relative_error"} and on_a_line["mae"].tolist() == [[1, 1]] * 3
    write_images(tmp_path / "images.arrow", images[:, 0])
    assert torch.equal(read_images(tmp_path / "images.arrow"), images[:, 0])
