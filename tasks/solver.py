"""The solver as training and roll-out ask it: here, or one's own on Dask workers, the same bits either way."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from configs.solver_loop import PHIFLOW, SolverLoop
from infra.cluster import open_cluster
from infra.fan_out import FanOut, Lost
from simulators.contained import Contained, Crash
from simulators.protocol import Simulator, Statistics
from simulators.shared_out import Answer, Question, SharedOut
from tasks.loop_problem import open_simulator


@contextmanager
def open_solver(loop: SolverLoop, method: str | None = None) -> Iterator[Simulator]:
    """`open_simulator`, shared out where the experiment has workers and the simulator is the user's own.

    method: what it is opened for; sol-fo differentiates the solver, which can be done in this process only.
    """
    cluster = loop.cluster
    with open_simulator(loop) as simulator:
        here = loop.simulator.kind in PHIFLOW or cluster.workers == 0
        if here or method == "sol-fo" or not isinstance(simulator, Contained):
            yield simulator
            return
        described = {"kind": loop.simulator.kind, "settings": dict(loop.simulator.settings)}
        with (
            open_cluster(cluster, mentions=described) as client,
            FanOut(
                client,
                "simulators.shared_out:Member",
                described,
                timeout_s=cluster.timeout_s,
                threads=loop.training.threads,
            ) as members,
        ):

            def ask(questions: Sequence[Question]) -> list[Answer]:
                return [_crashed(found) if isinstance(found, Lost) else found for found in members.ask(questions)]

            yield SharedOut(simulator, ask)


def _crashed(lost: Lost) -> Answer:
    """A simulation that ends the process that advances it has crashed, and the run goes on."""
    return Crash(f"{lost.workers} Dask workers were tried, and each of them ended"), Statistics()
