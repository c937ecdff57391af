"""The report of a defence: what stands in its table, what it says of the order, and its pictures."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from deepzero_core.errors import WorkError
from tasks.defence_plots import Row, noisy_images
from tasks.defence_report import by_method, defence_table, out_of_order, write_defence_report
from tasks.records import Certified, DefenceResult, Defended, Prepared, Reported, Victim

RADII = (0.0, 0.25)
SHARES = {"deepzero": (0.9, 0.5), "none": (0.4, 0.0), "zo-ae-ds": (0.7, 0.6), "fo-ds": (0.9, 0.7)}


def result(folder: Path, method: str, seed: int, shares: tuple[float, ...]) -> DefenceResult:
    table = folder / f"{method}-{seed}.parquet"
    right = round(10 * shares[0])
    columns = {
        "label": [1] * 10,
        "predicted": [1] * right + [-1] * (10 - right),
        "radius": [0.3] * right + [0.0] * (10 - right),
    }
    pq.write_table(pa.table(columns), table)
    history = folder / f"{method}-{seed}.jsonl"
    history.write_text("".join(json.dumps({"kind": "step", "step": k, "loss": 1 / k}) + "\n" for k in (1, 2, 3)))
    trained = method != "none"
    defended = Defended(
        method=method,
        seed=seed,
        folder=folder,
        history=history if trained else None,
        weights=folder / "weights" if trained else None,
        weights_digest="0" * 64,
        purifier={"denoiser": {}} if trained else None,
        steps=3 if trained else 0,
        queries=48 if trained else 0,
        asked=1536 if trained else 0,
        seconds=12.5,
    )
    certified = Certified(
        table=table,
        examples=10,
        accuracy_at={radius: share + 0.01 * seed for radius, share in zip(RADII, shares, strict=True)},
        average_radius=0.25,
        abstained=10 - right,
        sigma=0.25,
        alpha=0.001,
        samples=4_000,
        saved=6_000,
        seconds=1.0,
    )
    return DefenceResult(defended=defended, certified=certified)


@pytest.fixture
def results(tmp_path: Path) -> list[DefenceResult]:
    return [result(tmp_path, method, seed, shares) for seed in (0, 1) for method, shares in SHARES.items()]


def write(folder: Path, results: list[DefenceResult], price: float | None = None) -> Reported:
    victim = Victim(
        folder=folder, kind="http", name="box", description={}, labels=folder / "labels", fingerprint="f",
        accuracy=0.98, asked=100, seconds=1.0,
    )  # fmt: skip
    prepared = Prepared(
        store=folder, digest="d" * 64, name="digits", class_names=("a", "b"), image_shape=(1, 4, 4),
        counts={"train": 20, "test": 10},
    )  # fmt: skip
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    rows = [
        Row("image", images, "aba", (True, True, False)),
        Row("noise", noisy_images(images, 0.25), "aab", (True,) * 3),
    ]
    return write_defence_report(
        folder / "report",
        experiment_yaml="name: demo\n",
        title="demo",
        results=results,
        victim=victim,
        prepared=prepared,
        queries_per_step=16,
        price_per_thousand=price,
        rows=rows,
        environment={"torch": "2"},
        mlflow_url=None,
    )


def test_the_table_has_mean_and_spread_of_the_seeds(results: list[DefenceResult]) -> None:
    table = defence_table(by_method(results), 16)
    assert table.columns == ("method", "r = 0", "r = 0.25", "ACR", "queries", "per step", "training")
    assert table.rows[0] == ("DeepZero", "90.5±0.7", "50.5±0.7", "0.25±0.00", "48", "16", "12.5 s")
    (alone,) = defence_table(by_method(results[:1]), 16).rows
    assert alone[1] == "90.0"


def test_where_the_order_does_not_hold_it_says_so(results: list[DefenceResult]) -> None:
    assert out_of_order(by_method(results)) == [
        "At radius 0.25 DeepZero (50.5±0.7 %) is not above ZO-AE-DS (60.5±0.7 %)."
    ]
    equal = [r for r in results if r.defended.method in ("deepzero", "fo-ds")]
    assert out_of_order(by_method(equal)) == [], "equal is as the paper found it"


def test_the_numbers_for_machines_and_the_pictures(results: list[DefenceResult], tmp_path: Path) -> None:
    reported = write(tmp_path, results, price=2.0)
    found = json.loads(reported.result.read_text())
    assert found["methods"][0]["certified_accuracy"] == [[0.0, [0.9, 0.91]], [0.25, [0.5, 0.51]]]
    assert found["certification"]["samples"] == 8 * 4_000 and found["certification"]["saved"] == 8 * 6_000
    assert found["order"] == found["notes"] and len(found["order"]) == 1
    text = reported.markdown.read_text()
    assert "| DeepZero, ImageNet-10 (DeepZero) | 86.02 | 76.61 | 61.80 | 43.05 |" in text
    assert "| FO-DS | 1,536 | 4,000 | 11.07 |" in text, "images at 2.00 per thousand"
    for name in found["pictures"].values():
        assert (reported.folder / name).read_bytes().startswith(b"\x89PNG")
    assert "A lower bound between the radii" in text


def test_no_result_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match="at least one method"):
        write(tmp_path, [])
