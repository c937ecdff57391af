"""Delivery into a real SQLite store: nothing lost, nothing doubled, wherever an attempt breaks off."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

from deepzero_core.errors import RequestError, WorkError
from tasks import delivery, gate, tracking
from tasks.gate import Gate
from tasks.spool import Spool, place, waiting
from tasks.tracking import Run, initialise
from tasks.waiting import deliver_on_demand, deliver_waiting, patience_s, settle


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("delivery") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPZERO_HOME", str(home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        initialise("tests")
    return home


@pytest.fixture
def experiment(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("DEEPZERO_HOME", str(store))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    gate.gate.cache_clear()
    yield initialise("tests")
    for outbox in list(tracking._outboxes.values()):
        tracking._drop(outbox)
    for left in (store / "spool").glob("*"):
        left.unlink() if left.is_file() else None


def client() -> MlflowClient:
    return MlflowClient(tracking_uri=tracking.tracking_uri())


CALLS = ("log_batch", "create_run", "log_artifact", "log_artifacts", "log_inputs", "set_terminated", "update_run")


class Away:
    """A store that is away while `away`, and may have taken what it then says it has not."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.away, self.taken = False, False
        for name in (*CALLS, "get_run", "search_runs", "get_metric_history"):
            patch.setattr(MlflowClient, name, self.wrapped(getattr(MlflowClient, name), name))
        patch.setattr(gate, "answers", lambda uri: not self.away)

    def wrapped(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not self.away:
                return call(*args, **kwargs)
            if self.taken and name in CALLS:
                call(*args, **kwargs)
            raise ConnectionError("away")

        return wrapper


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Away:
    return Away(monkeypatch)


@pytest.mark.parametrize("taken", [False, True], ids=["refuses", "takes-and-breaks-off"])
def test_everything_that_falls_into_the_gap_is_delivered_once(
    experiment: str, store: Path, away: Away, tmp_path: Path, taken: bool
) -> None:
    """A stage begins, works and ends while the store is away; its parent was there before and ends afterwards."""
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").write_text("<p>")
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"first")
    with Run.start(experiment, "flow") as parent:
        parent.metrics({"before": 1}, 1)
        parent.flush()
        away.away, away.taken = True, taken
        with Run.start(experiment, "stage", parent=parent, tags={"t": 1}, params={"p": {"q": 2}}) as stage:
            for step in range(1, 31):
                stage.metrics({"train/loss": 1 / step, "cost/queries": step}, step)
            stage.artifact(weights, "model")
            weights.write_bytes(b"changed after it was logged")
            stage.artifact(tmp_path / "report", "report")
            stage.text("seed: 1\n", "config/experiment.yaml")
            stage.dataset("digits", "a" * 40, {"train": 5})
            stage.tags({"late": True})
            stage.flush()
        again = Run.resume(parent.run_id)
        again.metrics({"before": 1, "during": 2}, 1)
        assert len(waiting(store)) == 2
        away.away = False
    assert deliver_waiting().left == ()
    assert waiting(store) == []
    (found,) = client().search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
    assert (found.info.run_name, found.info.status) == ("stage", "FINISHED")
    assert (found.data.params, found.data.tags["t"], found.data.tags["late"]) == ({"p.q": "2"}, "1", "True")
    for key in ("train/loss", "cost/queries"):
        points = client().get_metric_history(found.info.run_id, key)
        assert Counter(point.step for point in points) == dict.fromkeys(range(1, 31), 1)
    assert {item.path for item in client().list_artifacts(found.info.run_id)} == {"config", "model", "report"}
    saved = Path(client().download_artifacts(found.info.run_id, "model/weights.bin", str(tmp_path)))
    assert saved.read_bytes() == b"first", "as it was when it was logged"
    assert [one.dataset.name for one in found.inputs.dataset_inputs] == ["digits"]
    assert found.info.end_time - found.info.start_time < 60_000, "the times are those of the work"
    told = client().get_run(parent.run_id)
    assert told.info.status == "FINISHED"
    for key in ("before", "during"):
        assert [point.step for point in client().get_metric_history(parent.run_id, key)] == [1]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(st.sampled_from(["there", "away", "breaks"]), min_size=3, max_size=12), kill=st.booleans())
def test_no_point_is_lost_or_doubled_wherever_attempts_break_off(
    experiment: str, store: Path, away: Away, plan: list[str], kill: bool
) -> None:
    """Attempts that fail before or after the store has taken what they carried, and a process that forgets how far it
    came: the spool is then opened anew."""
    away.away = False
    run = Run.start(experiment, "plan")
    run._outbox.gate._failures = 0
    for step, what in enumerate(plan, start=1):
        away.away, away.taken = what != "there", what == "breaks"
        run._outbox.gate._again = 0.0
        run.metrics({"a": step / 3, "b": float("nan")}, step)
        if what == "breaks":  # the probe says that it is there
            away.away, passable = True, Gate.passable
            Gate.passable = lambda self: True  # type: ignore[method-assign]
            run.flush()
            Gate.passable = passable  # type: ignore[method-assign]
        else:
            run.flush()
    away.away = False
    run._outbox.gate._again = 0.0
    if kill:
        content = run._outbox.spool.path.read_bytes()
        tracking._drop(run._outbox)
        place(store, run.run_id).write_bytes(content)  # as if it had been killed before it could clear it
        assert deliver_waiting().left == ()
    else:
        run.end()
    for key in ("a", "b"):
        points = client().get_metric_history(run.run_id, key)
        assert Counter(point.step for point in points) == dict.fromkeys(range(1, len(plan) + 1), 1)
    assert waiting(store) == []


def test_a_store_that_is_away_is_asked_again_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    now = 0.0
    monkeypatch.setattr(gate, "answers", lambda uri: asked.append(now))
    door = Gate("http://127.0.0.1:9", clock=lambda: now)
    assert door.passable()
    door.failed("x")
    while now < 300:
        assert not door.passable()
        now += 0.5
    assert asked[:4] == [5, 15, 35, 65]
    assert len(asked) < 14
    before = len(asked)
    assert not door.ask_now()
    assert len(asked) == before + 1


def test_nobody_listens(experiment: str) -> None:
    assert not gate.answers("http://127.0.0.1:9")
    assert not gate.answers("postgresql://somebody:secret@127.0.0.1:9/mlflow")
    assert gate.answers("sqlite:////nowhere/mlflow.db")


def test_mlflow_itself_does_not_try_for_minutes(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    gate.configure()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77", "what the user has set stays"


def test_what_belongs_to_another_store_waits_for_it(
    experiment: str, store: Path, away: Away, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.start(experiment, "here")
    away.away = True
    run.metrics({"a": 1}, 1)
    run.end()
    away.away = False
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
        said = deliver_on_demand()
    assert said.splitlines()[0] == "nothing waits for this MLflow store"
    assert f"waits until MLFLOW_TRACKING_URI names it: {place(store, run.run_id)}" in said
    gate.gate.cache_clear()
    assert deliver_on_demand() == "MLflow has been told about 1 runs"
    assert client().get_run(run.run_id).info.status == "FINISHED"


def test_a_flow_waits_a_bounded_time_and_says_so(
    experiment: str, store: Path, away: Away, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run.start(experiment, "waits")
    away.away = True
    run.metrics({"a": 1}, 1)
    run.end()
    settle(1.5)
    assert "waiting up to 1.5 s (DEEPZERO_MLFLOW_WAIT_S) to tell it about 1 runs" in caplog.text
    assert f"it waits in {store / 'spool'}, and `deepzero deliver` or the next run delivers it" in caplog.text
    with pytest.raises(WorkError, match="MLflow does not take everything about 1 runs"):
        deliver_on_demand()
    away.away = False
    settle(60)
    assert waiting(store) == []


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf"])
def test_a_patience_that_is_no_time_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DEEPZERO_MLFLOW_WAIT_S", text)
    with pytest.raises(RequestError, match=r"DEEPZERO_MLFLOW_WAIT_S='.*' has to be a number of seconds"):
        patience_s()


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ({"kind": "end", "status": ["FINISHED"], "time": 1}, "status"),
        ({"kind": "end", "status": "FINISHED", "time": 2**80}, "time"),
        ({"kind": "tags", "values": {"a": ["b"]}}, "values.a"),
        ({"kind": "params", "values": {"a": "\x00"}}, "values.a"),
        ({"kind": "dataset", "name": "n", "digest": ["d"], "facts": {}}, "digest"),
        ({"kind": "reopen", "tags": {"a": None}}, "tags.a"),
    ],
)
def test_an_entry_of_wrong_types_holds_up_nothing(
    experiment: str, store: Path, caplog: pytest.LogCaptureFixture, entry: dict[str, Any], word: str
) -> None:
    """At MLflow's database they would be errors that may pass, and be tried for ever."""
    run_id = client().create_run(experiment).info.run_id
    spool = Spool(place(store, run_id), delivery.head(run_id))
    spool.append(entry)
    spool.append({"kind": "metrics", "points": [["good", 1.0, 1, 1]]})
    spool.close()
    assert deliver_waiting().left == ()
    assert [point.step for point in client().get_metric_history(run_id, "good")] == [1]
    assert f"is not what was written: {word}: " in caplog.text


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(["values", "points", "name", "folder", "status", "time", "tags", "digest", "facts"])
kinds = st.sampled_from([*delivery._SENDERS, "metrics", "nonsense", ""])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(written=st.lists(st.tuples(kinds, st.dictionaries(fields, plain, max_size=4)), min_size=1, max_size=3))
def test_entries_of_any_content_are_told_or_put_aside(
    experiment: str, store: Path, caplog: pytest.LogCaptureFixture, written: list[tuple[str, dict[str, Any]]]
) -> None:
    """A spool is a file in a folder of the user's: whatever stands in it, no traceback and no file from elsewhere."""
    caplog.set_level(logging.CRITICAL, "mlflow")
    run_id = client().create_run(experiment).info.run_id
    path = place(store, run_id)
    spool = Spool(path, delivery.head(run_id))
    for kind, entry in [*written, ("file", {"name": "../../mlflow.db", "folder": None})]:
        spool.append({**entry, "kind": kind})
    spool.append({"kind": "metrics", "points": [["good", 1.0, 1, 1]]})
    spool.close()
    assert deliver_waiting().left == ()
    assert [point.step for point in client().get_metric_history(run_id, "good")] == [1]
    assert client().list_artifacts(run_id) == []
