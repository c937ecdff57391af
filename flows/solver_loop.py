"""Train a network that corrects a coarse solver, in the loop with it, and set every method beside the others."""

from collections.abc import Iterator

from prefect import flow

from configs.solver_loop import SolverLoop
from flows.experiment import recorded, tidied
from tasks.couple import couple, pretrain_corrector, share_out_corrector, uncorrected
from tasks.generate import generate
from tasks.loop_publish import report_loop
from tasks.records import Cases, Corrected, LoopResult, Reported
from tasks.roll_out import roll_out
from tasks.stage import Tracking


@flow(name="solver-loop", flow_run_name="{experiment.name}", on_cancellation=[tidied], on_crashed=[tidied])
def solver_loop(experiment: SolverLoop) -> Reported:
    """Compute the reference, pre-train, train by every method, roll out on the test cases, report."""
    with recorded("solver-loop", experiment) as tracking:
        cases = generate(tracking, experiment)
        results = [
            LoopResult(corrected=corrected, rolled=roll_out(tracking, experiment, cases, corrected))
            for seed in experiment.seeds
            for corrected in corrected_by_all(tracking, experiment, cases, seed)
        ]
        return report_loop(tracking, experiment, cases, results)


def corrected_by_all(tracking: Tracking, experiment: SolverLoop, cases: Cases, seed: int) -> Iterator[Corrected]:
    """What each of the experiment's methods makes of the same corrector, and that corrector as it was before.

    The experiment's own method comes first; "src" is the same for every seed.
    """
    given = tracking, experiment, cases
    methods = [method for method in experiment.methods if method != "src" or seed == experiment.seeds[0]]
    trained = set(methods) != {"src"}
    before = pretrain_corrector(*given, seed) if trained and experiment.pretraining.steps else None
    for method in methods:
        if method == "src":
            yield uncorrected(seed)
            continue
        shares = share_out_corrector(*given, seed, before) if method == "sol-zo" else None
        yield couple(*given, method, seed, before=before, shares=shares)
    if before is not None:
        yield before
