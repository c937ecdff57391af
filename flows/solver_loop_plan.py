"""What `deepzero run solver-loop` would do, from the real simulator and network: what cannot be built is refused."""

from pathlib import Path

from rich.table import Table

from configs.solver_loop import ASKING, SolverLoop
from deepzero_core.errors import RequestError
from infra.specs import described


def solver_loop_plan(flow_name: str, experiment: SolverLoop, base: Path, *, predict: bool = False) -> Table:
    """Simulator, cases, corrector and costs. `predict`: time a step of every method, too. Nothing is written.

    Raises:
        RequestError: the simulator or the network of the experiment is not what it says.
    """
    from tasks.loop_problem import blank_features, corrector_of, open_simulator

    training, cases = experiment.training, experiment.cases
    with open_simulator(experiment) as simulator:
        if "sol-fo" in experiment.methods and not simulator.differentiable:
            raise RequestError("'sol-fo' differentiates the solver, and this one is not differentiable: leave it out")
        corrector = corrector_of(experiment, *blank_features(experiment, simulator), 0)
        state = ", ".join(f"{name} {list(shape)}" for name, shape in simulator.state_shapes.items())
    windows = len(cases.train) * (cases.frames - experiment.longest)
    if training.batch_size > windows:
        raise RequestError(f"training.batch_size={training.batch_size} cannot be filled from {windows} windows")
    asked = sum(
        steps * training.batch_size * (unroll + (training.queries - 1) * (unroll - 1))
        for steps, unroll in experiment.stages
    )
    asking = sum(method in ASKING for method in experiment.methods) * len(experiment.seeds)
    course = ", ".join(f"{steps:,} steps with m = {unroll}" for steps, unroll in experiment.stages)
    tried = f"{len(cases.validation)} validation, " if cases.validation else ""
    rows = {
        "flow": flow_name,
        "simulator": f"{experiment.simulator.kind}: {state}",
        "cases": f"{len(cases.train)} train, {tried}{len(cases.test)} test, {cases.frames:,} frames each",
        "corrector": f"{experiment.corrector.name}: {sum(p.numel() for p in corrector.parameters()):,} parameters",
        "methods": ", ".join(experiment.methods) + f"; seeds {', '.join(map(str, experiment.seeds))}",
        "training": f"{course}; {training.batch_size} simulations",
        "queries": f"at most {training.queries:,} per step",
        "solver steps": f"at most {asked:,} per zeroth-order training, {asked * asking:,} in all",
        "roll-out": f"{experiment.rollout.frames:,} steps of every test case",
        "workers": described(experiment.cluster),
    }
    if predict:
        # Imports Prefect, which reads its settings then: a run has yet to make them.
        from tasks.loop_prediction import training_seconds
        from tasks.report import duration

        seconds = training_seconds(experiment)
        each = ", ".join(f"{method} {duration(value)}" for method, value in seconds.items())
        total = len(experiment.seeds) * sum(seconds.values())
        if each:
            rows["time"] = f"about {each} per training, {duration(total)} in all, on this machine with nothing beside"
    table = Table(show_header=False, box=None, title=f"{experiment.name}: what would be done", title_justify="left")
    for label, text in rows.items():
        table.add_row(f"[bold]{label}", text)
    return table
