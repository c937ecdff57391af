"""The benchmarks of load, memory and orchestration measure what they say: in small, and with what has to be noticed."""

import threading
from pathlib import Path
from typing import Any

import pytest

from benchmarks import load, orchestration, soak
from benchmarks.orchestration import BAR, Cost, Turns
from benchmarks.soak import Reading, Soak


def test_many_metrics_in_one_run_are_all_there_in_order(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    found = load.metrics(3_000)
    assert found.lost == ""
    assert not list(home.glob("spool/*"))


def test_two_trainings_take_turns() -> None:
    turns, order = Turns(), []

    def train(side: str, steps: int) -> None:
        def records() -> Any:
            for step in range(steps):
                order.append(side)
                yield step

        assert list(turns.taken(side, records())) == list(range(steps))

    both = [threading.Thread(target=train, args=(side, 20)) for side in ("orchestrated", "bare")]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(30)
    assert order == ["bare", "orchestrated"] * 20
    assert [len(turns.wall[side]) for side in ("bare", "orchestrated")] == [20, 20]
    assert all(seconds >= 0 for side in turns.processor.values() for seconds in side)


def test_what_orchestration_costs_is_held_against_the_bar() -> None:
    def cost(share: float) -> Cost:
        return Cost(9, "digits", 1.0, 1.0, 1 + share, share, share, share, True, {}, {})

    assert cost(BAR - 0.001).holds and not cost(BAR + 0.001).holds


def soaked(per_hour: float) -> Soak:
    """Memory that first rises, as every program's does, and then by this many MiB an hour."""
    readings = [
        Reading(step, 36.0 * step, {"flow": 300 + min(step, 15) + per_hour * step / 100, "Dask worker 1": 200.0})
        for step in range(101)
    ]
    return Soak(60, 100, readings)


def test_memory_that_grows_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert soaked(0).flat
    leaky = soaked(30)
    assert not leaky.flat
    assert leaky.growth["flow"] == pytest.approx(24 / 321, rel=0.02)
    assert leaky.growth["Dask worker 1"] == pytest.approx(0, abs=1e-9)
    soak.show(leaky)
    assert "growth" in capsys.readouterr().out
    soak.draw(leaky, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_both_ways_of_training_end_with_the_same_bits(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from infra import orchestration as settings

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.delenv("DEEPZERO_DATA_ROOT", raising=False)
    settings.configure()
    found = orchestration.measure(4, print)
    assert found.same_bits and found.steps >= 2
    orchestration.show(found)
