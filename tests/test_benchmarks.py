"""The benchmark program on tiny cases: baselines and arithmetic of times are right, and what is measured is kept."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import accuracy, baselines, certification, fan_out, models, physics, plot, ratios, simulators
from benchmarks.__main__ import main
from benchmarks.bars import AGAINST_CGE, MEMORY, SAVED, Bar
from benchmarks.baselines import Slopes
from benchmarks.cases import CASES, Case, classification, denoising, dense, spread
from benchmarks.measure import MU, Options, measure
from benchmarks.problem import Coordinates, Problem, evenly, reuse_flops
from benchmarks.results import Row, save
from benchmarks.table import show
from benchmarks.timing import Contender, Timing, by_group, by_parameter, in_turns, settled
from benchmarks.workers import measure_workers
from deepzero_core import reference
from deepzero_core.models import build_model


def small_cnn() -> nn.Module:
    return build_model("cnn", in_channels=3, num_classes=10, image_size=8, depth=2, width=4, seed=0)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "cnn": lambda: classification(small_cnn, models.cut_sequential, 6, 8),
    "resnet": lambda: classification(ratios.resnet20, models.cut_resnet, 3, 8),
    "dncnn": lambda: denoising(lambda: models.dncnn(4, 6), 3, 8),
    "vit": lambda: classification(lambda: models.ViT(8, 4, 8, 2, 2), models.cut_vit, 5, 8),
}
BASELINES: dict[str, Callable[[Problem, float], Slopes]] = {
    "feature reuse": baselines.feature_reuse,
    "no reuse": baselines.no_reuse,
    "vmap": lambda problem, mu: baselines.vmapped(problem, mu, 2),
    "torchzero": baselines.torchzero,
}


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_baselines_are_the_reference(problem: str, baseline: str) -> None:
    if baseline == "torchzero":
        pytest.importorskip("torchzero")
    double = PROBLEMS[problem]().to(torch.float64)
    before = {name: parameter.clone() for name, parameter in double.module.named_parameters()}
    coordinates = {name: evenly(torch.arange(value.numel()), 2) for name, value in before.items()}
    slopes = BASELINES[baseline](double, MU)
    found = slopes(coordinates)
    exact = reference.cge(
        double.module, double.inputs, double.targets, double.loss_fn, mu=MU, coordinates=coordinates
    ).gradients
    for name, indices in coordinates.items():
        torch.testing.assert_close(found[name], exact[name].flatten()[indices], rtol=1e-6, atol=1e-10)
        assert torch.equal(double.module.get_parameter(name), before[name]), name
    # What is subtracted from every part's time has to exist: an estimate of no coordinate.
    assert slopes({next(iter(before)): torch.arange(0)})


@pytest.mark.parametrize("problem", PROBLEMS)
def test_blocks_are_the_network(problem: str) -> None:
    built = PROBLEMS[problem]()
    features = built.inputs
    for block in built.blocks:
        features = block.run(features)
    torch.testing.assert_close(features, built.module(built.inputs))
    for name, _ in built.module.named_parameters():
        assert sum(block.holds(name) for block in built.blocks) == 1, name


def test_floating_point_operations_of_feature_reuse() -> None:
    """Two linear blocks: 2·B·in·out each; a coordinate of the first costs both, one of the second its own."""
    network = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 2, bias=False))
    problem = Problem(network, torch.ones(4, 3), torch.zeros(4, 2), nn.functional.mse_loss, models.cut_sequential)
    spent = reuse_flops(problem, {"0.weight": torch.arange(2), "1.weight": torch.arange(7)})
    assert spent == 2 * (2 * 4 * 3 * 5) + (2 + 7) * (2 * 4 * 5 * 2)


class Costs:
    """Estimates that cost 10 s a call and a fixed time per coordinate of a parameter, and the clock they run by."""

    def __init__(self, **each: float) -> None:
        self.now, self.each, self.calls = 0.0, each, 0

    def slopes(self, coordinates: Coordinates) -> dict[str, Tensor]:
        self.calls += 1
        self.now += 10 + sum(self.each[name] * len(indices) for name, indices in coordinates.items())
        return {}

    def clock(self) -> float:
        return self.now


def test_a_sampled_time_is_the_whole_time_where_costs_are_as_assumed() -> None:
    costs = Costs(a=1.0, b=0.25)
    coordinates = {"a": torch.arange(100), "b": torch.arange(40)}
    whole = Contender("whole", costs.slopes, coordinates, ())
    parts = by_parameter(coordinates, lambda _: 8)
    sampled = replace(whole, name="sampled", parts=parts)
    assert whole.seconds(costs.clock) == pytest.approx(10 + 100 + 10)
    assert sampled.seconds(costs.clock) == pytest.approx(10 + 100 + 10)
    held = Costs(a=1.0, b=0.25)
    prepared = replace(sampled, prepared=held.slopes)
    assert prepared.seconds(lambda: costs.now + held.now) == pytest.approx(10 + 100 + 10)
    assert (whole.sampled, sampled.sampled) == (None, "16 of 140 coordinates in 2 parts")


def test_only_what_takes_long_is_sampled() -> None:
    costs = Costs(a=1.0)
    coordinates = {"a": torch.arange(100)}
    contender = Contender("a", costs.slopes, coordinates, by_parameter(coordinates, lambda _: 5))
    ready, turn = settled(contender, 200.0, costs.clock)
    assert (ready.parts, turn) == ((), pytest.approx(110.0))
    ready, turn = settled(contender, 1.0, costs.clock)
    assert ready is contender
    assert turn == pytest.approx(10 + 10 + (10 + 5))


def test_contenders_take_turns() -> None:
    costs, seen = Costs(a=1.0), []
    contenders = [Contender(name, costs.slopes, {"a": torch.arange(3)}, ()) for name in ("one", "two")]
    times = in_turns(contenders, 2, costs.clock, lambda repeat, contender: seen.append((repeat, contender.name)))
    assert seen == [(0, "one"), (0, "two"), (1, "one"), (1, "two")]
    assert times["two"] == Timing((13.0, 13.0), None)


def test_parts_stand_for_all_coordinates() -> None:
    coordinates = {name: torch.arange(size) for name, size in {"a": 50, "b": 3, "c": 0, "d": 7, "e": 90}.items()}
    for parts in (by_parameter(coordinates, lambda _: 4), by_group(coordinates, 2, 4)):
        assert sum(part.stands_for for part in parts) == 150
        assert all(len(part.indices) == len(part.indices.unique()) <= 4 for part in parts)
    assert by_parameter({"a": torch.arange(10)}, lambda _: 4)[0].indices.tolist() == [3, 4, 5, 6]
    assert [part.name for part in by_group(coordinates, 2, 4)] == ["a", "e"]


def test_spread_takes_as_many_of_every_parameter_as_it_can() -> None:
    chosen = spread(nn.Linear(10, 3), ["weight", "bias"], 20)
    assert {name: len(indices) for name, indices in chosen.items()} == {"weight": 17, "bias": 3}
    assert all(len(indices.unique()) == len(indices) for indices in chosen.values())


@pytest.mark.parametrize(("sparsity", "queries"), [(80, 55_053), (90, 28_220), (95, 14_803), (99, 4_069)])
def test_ratios_give_the_papers_queries(sparsity: int, queries: int) -> None:
    case = CASES[f"resnet20-{sparsity}-b64"]
    assert sum(len(indices) for indices in case.coordinates(ratios.resnet20()).values()) == queries


def test_networks_have_the_sizes_they_are_known_for() -> None:
    assert sum(parameter.numel() for parameter in models.dncnn().parameters()) == 558_400
    assert len(CASES["dncnn17"].coordinates(models.dncnn())) == 17
    for name, total in (("cnn5", 12_610), ("dncnn17", 1_152), ("vit", 1_000)):
        module = CASES[name].build().module
        assert sum(len(indices) for indices in CASES[name].coordinates(module).values()) == total


@pytest.mark.parametrize(
    ("bar", "value", "words"),
    [
        (Bar(15, 25), 14.9, "must 15×, aim 25×: not met"),
        (Bar(15, 25), 15.0, "must 15×, aim 25×: met"),
        (Bar(15, 25), 25.0, "must 15×, aim 25×: aim met"),
        (AGAINST_CGE["float32"], 5e-5, "must 1e-04, aim 3e-05: met"),
        (AGAINST_CGE["value"], 1e-3, "must 2e-03: met"),
        (AGAINST_CGE["value"], 3e-3, "must 2e-03: not met"),
        (MEMORY, 0.3, "must 1 GiB: met"),
        (SAVED, 0.4, "must 50%: not met"),
    ],
)
def test_a_bar_says_whether_it_is_met(bar: Bar, value: float, words: str) -> None:
    assert bar.verdict(value) == words


def test_a_case_is_measured_and_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case("cnn5", "a small CNN", PROBLEMS["cnn"], dense)
    lines: list[str] = []
    rows = measure(case, Options(repeats=2, precisions=("float32", "value")), lines.append)
    assert [row.precision for row in rows] == ["float32", "value"]
    for row in rows:
        assert row.agrees and row.error is not None and row.error < 1e-2
        assert {"feature reuse", "no reuse", "vmap"} <= row.baselines.keys()
        assert all(len(timing.seconds) == 2 and timing.sampled is None for timing in row.baselines.values())
        assert row.coordinates == sum(parameter.numel() for parameter in small_cnn().parameters())
        assert "must 15×" in row.verdicts["feature reuse"]
        assert row.share_of_peak is not None and row.share_of_peak > 0
    assert any("repeat 2 of 2" in line for line in lines)
    save(tmp_path / "rows.json", [row.document() for row in rows])
    kept = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert kept[0]["ratios"] == rows[0].ratios
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.json"]
    show(rows)
    assert "a small CNN" in capsys.readouterr().out


def test_a_run_that_is_stopped_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> Problem:
        raise KeyboardInterrupt

    case = Case("first", "a small CNN", PROBLEMS["cnn"], dense)
    monkeypatch.setitem(CASES, "first", case)
    monkeypatch.setitem(CASES, "second", replace(case, name="second", build=stop))
    file = tmp_path / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        main(["--case", "first", "--case", "second", "--repeats", "1", "--json", str(file)])
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert [row["case"] for row in kept["rows"]] == ["first"]
    assert kept["machine"]["torch"] == torch.__version__


def test_a_row_that_is_wrong_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    row = Row("vit", "ViT", "float32", "cpu", 1, Timing((1.0,), None), {}, error=0.03, paper_error=0.01)
    assert not row.agrees
    assert replace(row, paper_error=0.05).agrees
    show([row])
    assert "disagrees" in capsys.readouterr().out


@pytest.mark.slow
def test_two_workers_give_the_bits_of_one() -> None:
    (row,) = measure_workers(Options(repeats=1), lambda _: None, depth=1, batch=8, size=8)
    assert row.coordinates == 730
    assert row.verdicts["one worker"].startswith("must 1.8×")


def test_accuracy_is_measured_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curves = accuracy.measure(lambda _: None, precisions=("float32",), mus=(MU, 1e-6), depth=1, batch=8, per_layer=2)
    exact, paper, engine = curves
    assert [curve.name for curve in curves] == ["float64", "paper", "float32"]
    assert exact.against_cge == (0.0, 0.0)
    assert exact.against_derivative[1] < exact.against_derivative[0]
    assert engine.against_derivative[1] < 1e-4 < paper.against_derivative[1]
    accuracy.show(curves)
    assert "float32 against autograd at μ = 1e-06" in capsys.readouterr().out
    plot.draw(curves, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--case", "cnn6"], "did you mean 'cnn5'?"),
        (["--precision", "float16"], "did you mean 'bfloat16'?"),
        (["--repeats", "0"], "at least 1"),
        (["accuracy", "--precision", "nonsense"], "valid are"),
        (["certification", "--case", "digit"], "did you mean 'digits'?"),
        (["simulators", "--case", "wakes"], "did you mean 'wake'?"),
        (["fan-out", "--case", "wait"], "did you mean 'waiting'?"),
    ],
)
def test_a_wrong_request_is_answered_in_a_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_slow_program_is_shared_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fan_out, "EACH_S", 0.002)
    monkeypatch.setattr(fan_out, "SIMULATIONS", 8)
    target = tmp_path / "shared.json"
    assert main(["fan-out", "--repeats", "1", "--threads", "1", "--json", str(target)]) == 0
    found = {shared["case"]: shared["seconds"] for shared in json.loads(target.read_text())["fan-out"]}
    assert set(found) == {"computing", "waiting"}
    assert all(seconds >= 0.004 for several in found.values() for seconds in several.values())
    assert "2 workers beside 1" in capsys.readouterr().out


def test_peak_memory_is_that_of_a_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "peaks.json"
    assert main(["memory", "--case", "cnn5", "--threads", "1", "--json", str(target)]) == 0
    (peaks,) = json.loads(target.read_text())["peaks"]
    assert peaks["case"] == "cnn5" and 0 < peaks["forward"] < peaks["engine"]
    assert "GiB" in capsys.readouterr().out


def test_the_published_certification_and_ours_are_timed_and_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = certification.CASES["resnet20"]
    settings = replace(case.settings, n0=20, n=400)

    def halves(examples: int) -> tuple[nn.Module, Tensor]:
        network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
        with torch.no_grad():
            network[1].weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
            network[1].bias.zero_()
        return network, torch.tensor([[0.4, 0.0], [-0.1, 0.0]])

    monkeypatch.setitem(certification.CASES, "digits", replace(case, build=halves, examples=2, settings=settings))
    target = tmp_path / "times.json"
    arguments = ["certification", "--case", "digits", "--threads", "1", "--repeats", "1", "--json", str(target)]
    assert main(arguments) == 0
    (kept,) = json.loads(target.read_text())["certification"]
    assert set(kept["seconds"]) == {"published", "shared", "inference", "adaptive"}
    assert kept["samples"]["published"] == kept["samples"]["inference"] == 2 * 420
    assert kept["saved"] == pytest.approx(1 - kept["samples"]["adaptive"] / 840)
    assert kept["certified"] == {"published": 1, "shared": 1, "inference": 1, "adaptive": 1}
    assert "of the samples saved, must" in capsys.readouterr().out


def test_simulators_are_timed_beside_phiflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(simulators, "TOGETHER", (1, 4))
    target = tmp_path / "speeds.json"
    assert main(["simulators", "--case", "burgers", "--repeats", "1", "--threads", "1", "--json", str(target)]) == 0
    document = json.loads(target.read_text())
    (speed,) = document["speed"]
    assert speed["case"] == "burgers" and speed["eager"] > 0
    assert speed["ratios"]["4"] == pytest.approx(speed["eager"] / speed["together"]["4"])
    assert document["machine"]["phiflow"] == "3.4.0"
    assert "4 together" in capsys.readouterr().out


def test_a_physical_finding_that_does_not_hold_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = physics.Finding("cole-hopf", "order", 0.5, "1 ± 0.1", False)
    monkeypatch.setitem(physics.CASES, "cole-hopf", lambda report: [wrong])
    target = tmp_path / "physics.json"
    assert main(["simulators", "--case", "cole-hopf", "--threads", "1", "--json", str(target)]) == 1
    assert "cole-hopf, order" in capsys.readouterr().err
    assert json.loads(target.read_text())["physics"][0]["found"] == 0.5
