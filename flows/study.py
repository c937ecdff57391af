"""Run a flow for every point of a grid of settings and several seeds, and put all of it into one table."""

import json
import logging
import time

from prefect import flow
from prefect.states import State

from configs.study import Point, Study
from deepzero_core.errors import DeepZeroError
from flows.catalogue import flow_called
from flows.experiment import below, recorded, tidied
from tasks.present import SUMMARY
from tasks.records import Outcome, Reported, Studied
from tasks.stage import Stage, Tracking, perform, stage_task
from tasks.study_publish import report_study
from tasks.tracking_store import one_line

_log = logging.getLogger("tasks.study")


@flow(name="study", flow_run_name="{experiment.name}", on_cancellation=[tidied], on_crashed=[tidied])
def study(experiment: Study) -> Reported:
    """Run the flow for every point and seed, one after the other, and report; what is done is not done again."""
    with recorded("study", experiment) as tracking:
        outcomes = [outcome_of(tracking, experiment, point) for point in experiment.points()]
        return report_study(tracking, experiment, outcomes)


def outcome_of(tracking: Tracking, experiment: Study, point: Point) -> Outcome:
    """The point's numbers; or the sentence that it failed with, for the others go on."""
    try:
        studied = run_point(tracking, experiment.flow, point)
    except Exception as error:
        sentence, expected = one_line(error), isinstance(error, DeepZeroError)
        _log.error("point %s, seed %d failed: %s", point.label, point.seed, sentence, exc_info=not expected)
        return Outcome(values=point.values, seed=point.seed, error=sentence)
    return Outcome(values=point.values, seed=point.seed, studied=studied)


@stage_task("point")
def run_point(tracking: Tracking, flow_name: str, point: Point) -> State[Studied] | Studied:
    """One run of the flow, below an MLflow run of its own that shows what the point was and what came of it."""
    # The same bits for one worker or many, so that the cluster is no part of what was done.
    inputs = {"flow": flow_name, "experiment": point.experiment.model_dump(mode="json", exclude={"name", "cluster"})}
    return perform(
        tracking, "point", Studied, inputs, lambda stage: _run(stage, flow_name, point), f"{point.label}, {point.seed}"
    )


def _run(stage: Stage, flow_name: str, point: Point) -> Studied:
    started = time.monotonic()
    stage.run.params({**point.values, "seed": point.seed})
    with below(stage.run.run_id):
        reported = flow_called(flow_name)(point.experiment)
    metrics: dict[str, float] = json.loads((reported.folder / SUMMARY).read_text(encoding="utf-8"))
    stage.summarise(**metrics)
    return Studied(
        report=reported.folder,
        metrics=metrics,
        run_id=reported.folder.name,
        seconds=time.monotonic() - started,
    )
