"""The report: complete or not there, safe against its own content, and stable for machines."""

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepzero_core.errors import RequestError, WorkError
from tasks.records import Certified, Evaluated, MethodResult, Prepared, Pruned, Reported, Trained
from tasks.report import duration, gap_to_first_order, methods_table, write_report

NASTY = "a | b <script>alert(1)</script> `x` [y](z)"


def result(
    folder: Path, method: str, accuracy: float, sparsity: float | None = None, queries: int = 30, steps: int = 30
) -> MethodResult:
    path = folder / f"{method}.jsonl"
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        spent = queries * step // steps
        lines.append({"kind": "step", "step": step, "loss": 2 / step, "queries": spent})
        lines.append({"kind": "evaluation", "step": step, "queries": spent, "test_accuracy": accuracy * step / steps})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trained = Trained(
        method=method,
        folder=folder,
        history=path,
        weights=folder / "weights",
        weights_digest="0" * 64,
        sparse=sparsity is not None,
        steps=steps,
        queries=queries,
        seconds=185.0,
    )
    evaluated = Evaluated(accuracy=accuracy, loss=0.25, confusion=((9, 1), (0, 10)))
    return MethodResult(method=method, sparsity=sparsity, trained=trained, evaluated=evaluated)


@dataclass(frozen=True)
class Material:
    results: list[MethodResult]
    pruned: Pruned
    prepared: Prepared
    certified: Certified

    def write(self, folder: Path, **changes: Any) -> Reported:
        arguments: dict[str, Any] = {
            "experiment_yaml": "name: demo\nseed: 0\n",
            "title": "demo",
            "results": self.results,
            "pruned": self.pruned,
            "prepared": self.prepared,
            "certified": self.certified,
            "environment": {"torch": "2.13.0", "commit": "abc"},
            "mlflow_url": "http://127.0.0.1:5000/#/experiments/1/runs/abc",
            "notes": ["a note"],
        }
        return write_report(folder, **(arguments | changes))


@pytest.fixture
def material(tmp_path: Path) -> Material:
    data = tmp_path / "data"
    data.mkdir()
    table = data / "certificates.parquet"
    pq.write_table(pa.table({"label": [0, 1], "predicted": [0, -1], "radius": [0.3, 0.0]}), table)
    return Material(
        results=[
            result(data, "cge", 0.95, 0.9, queries=14_400),
            result(data, "first-order", 0.965),
            result(data, "first-order-sparse-gradients", 0.955, 0.9),
        ],
        pruned=Pruned(
            folder=data,
            method="zo-grasp",
            sparsity=0.9,
            ratios={"conv.weight": 0.9, "linear.weight": 0.5},
            sizes={"conv.weight": 100, "linear.weight": 20, "linear.bias": 2},
            coordinates=22,
            queries=386,
            seconds=1.0,
        ),
        prepared=Prepared(
            store=data,
            digest="d" * 64,
            name="digits",
            class_names=("even", "odd"),
            image_shape=(1, 8, 8),
            counts={"train": 1437, "test": 360},
        ),
        certified=Certified(
            table=table,
            examples=2,
            accuracy_at={0.25: 0.5, 0.0: 0.5},
            average_radius=0.15,
            abstained=1,
            sigma=0.25,
            alpha=0.001,
            samples=100,
            seconds=1.0,
        ),
    )


class Page(HTMLParser):
    """Tags with attributes, and the visible text, of a page whose elements are all closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, Mapping[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "link", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_self_contained(material: Material, tmp_path: Path) -> None:
    reported = material.write(tmp_path / "report")
    page = Page(reported.html.read_text(encoding="utf-8"))
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 6
    for source in sources:
        assert source is not None
        head, _, content = source.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(content, validate=True).startswith(b"\x89PNG")
    assert [attributes["href"] for tag, attributes in page.tags if "href" in attributes] == [
        "http://127.0.0.1:5000/#/experiments/1/runs/abc"
    ]
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    text = " ".join(page.texts)
    for expected in ("95.00%", "−1.50", "14,400", "3 min 05 s", "name: demo", "2.13.0", "a note"):
        assert expected in text


def test_content_stays_content(material: Material, tmp_path: Path) -> None:
    reported = material.write(
        tmp_path / "report",
        title=NASTY,
        notes=[NASTY],
        environment={"cpu": NASTY},
        experiment_yaml=f"name: '{NASTY}'",
        mlflow_url="javascript:alert(1)",
    )
    page = Page(reported.html.read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [attributes for _, attributes in page.tags if "href" in attributes]
    assert sum(NASTY in text for text in page.texts) >= 4
    markdown = reported.markdown.read_text(encoding="utf-8").partition("````yaml")[0]
    assert "<script>" not in markdown.replace("\\<", "")


def test_markdown_shows_the_table_and_existing_pictures(material: Material, tmp_path: Path) -> None:
    reported = material.write(tmp_path / "report")
    text = reported.markdown.read_text(encoding="utf-8")
    assert "| CGE | 90% | 95.00% | −1.50 | 14,400 | 30 | 3 min 05 s |" in text
    assert "| First order | – | 96.50% | – | 30 | 30 | 3 min 05 s |" in text
    assert "| certified accuracy | 50.0% | 50.0% |" in text
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(pictures) == 6
    assert all((reported.folder / name).is_file() for name in pictures)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows[:5]} == {8}


def test_result_for_machines(material: Material, tmp_path: Path) -> None:
    reported = material.write(tmp_path / "report")
    text = reported.result.read_text(encoding="utf-8")
    found = json.loads(text)
    assert text == json.dumps(found, indent=2, sort_keys=True) + "\n"
    assert set(found) == {
        "certification", "created", "data", "environment", "experiment_yaml", "methods", "mlflow_url", "notes",
        "pictures", "pruning", "schema_version", "table", "title",
    }  # fmt: skip
    assert found["schema_version"] == 1
    assert [method["method"] for method in found["methods"]] == ["cge", "first-order", "first-order-sparse-gradients"]
    assert found["methods"][0]["gap_to_first_order"] == pytest.approx(-0.015)
    assert found["methods"][1]["gap_to_first_order"] is None
    assert found["methods"][0]["confusion"] == [[9, 1], [0, 10]]
    assert found["certification"]["accuracy_at"] == [[0.0, 0.5], [0.25, 0.5]]
    assert found["pruning"]["ratios"] == {"conv.weight": 0.9, "linear.weight": 0.5}
    assert found["data"]["class_names"] == ["even", "odd"]
    assert str(tmp_path) not in text
    assert set(found["pictures"].values()) == {path.name for path in reported.folder.glob("*.png")}


def test_what_adaptive_mode_saved_is_told(material: Material, tmp_path: Path) -> None:
    plain = material.write(tmp_path / "plain").markdown.read_text()
    assert "50 samples per example, each certificate right" in plain
    certified = material.certified.model_copy(update={"saved": 300})
    text = material.write(tmp_path / "saved", certified=certified).markdown.read_text()
    assert "50 samples per example on average, 75% of them saved by stopping" in text


def test_a_plain_run_without_pruning_and_certificates(material: Material, tmp_path: Path) -> None:
    reported = material.write(
        tmp_path / "report", results=material.results[:1], pruned=None, certified=None, mlflow_url=None, notes=()
    )
    found = json.loads(reported.result.read_text())
    assert (found["pruning"], found["certification"], found["mlflow_url"], found["notes"]) == (None, None, None, [])
    assert set(found["pictures"]) == {"accuracy-against-queries", "confusion-matrix", "learning-curves"}
    Page(reported.html.read_text(encoding="utf-8"))


def test_an_earlier_report_is_replaced_whole(material: Material, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    material.write(folder)
    reported = material.write(folder, certified=None, title="again")
    assert not (folder / "certified-accuracy.png").exists()
    assert json.loads(reported.result.read_text())["title"] == "again"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "report"]


def test_a_report_that_fails_leaves_the_earlier_one(material: Material, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    material.write(folder, title="first")
    material.certified.table.unlink()
    with pytest.raises(WorkError, match=r"certificates\.parquet cannot be read"):
        material.write(folder, title="second")
    assert json.loads((folder / "result.json").read_text())["title"] == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "report"]


def test_a_folder_of_something_else_is_left_alone(material: Material, tmp_path: Path) -> None:
    (tmp_path / "data" / "thesis.tex").write_text("years")
    with pytest.raises(RequestError, match="holds files that are not a report's"):
        material.write(tmp_path / "data")
    with pytest.raises(RequestError, match="must be a folder for the report"):
        material.write(tmp_path / "data" / "thesis.tex")
    assert (tmp_path / "data" / "thesis.tex").read_text() == "years"


def test_a_report_needs_a_result(material: Material, tmp_path: Path) -> None:
    with pytest.raises(WorkError, match="at least one method"):
        material.write(tmp_path / "report", results=[])


def test_the_gap_is_to_dense_first_order_training(material: Material, tmp_path: Path) -> None:
    main, dense, _ = material.results
    assert gap_to_first_order(main, material.results) == pytest.approx(-0.015)
    assert gap_to_first_order(dense, material.results) is None
    assert gap_to_first_order(main, [main]) is None
    methods = json.loads(material.write(tmp_path / "report").result.read_text(encoding="utf-8"))["methods"]
    assert [row[3] for row in methods_table(methods).rows] == ["−1.50", "–", "−1.00"]


def test_the_speed_of_steps_stands_beside_its_prediction(material: Material, tmp_path: Path) -> None:
    """Where the cost model had a say; histories of before it lack the fields."""
    assert "share of peak" not in material.write(tmp_path / "before").markdown.read_text(encoding="utf-8")
    history = material.results[0].trained.history
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    for line in lines[2:]:
        if line["kind"] == "step":
            line |= {"step_seconds": 0.5 * line["step"], "predicted_seconds": 0.04, "share_of_peak": 0.62}
    history.write_text("".join(json.dumps(line) + "\n" for line in lines))
    written = material.write(tmp_path / "after")
    text = written.markdown.read_text(encoding="utf-8")
    assert re.search(r"^\| method \| time per step \| predicted \| share of peak \|$", text, re.M)
    (row,) = re.findall(r"^\|.*40 ms.*\|$", text, re.M)
    assert row.endswith("| 8.0 s | 40 ms | 62% |"), "medians"
    assert "share of peak" in written.html.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (0.0304, "30 ms"),
        (0.0999, "0.1 s"),
        (4.21, "4.2 s"),
        (59.96, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text
