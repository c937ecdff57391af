"""Which corrector a training ends with: the one of those on its way that does best on the validation cases.

The same rule for every method: tried at the beginning and then at equal distances, the error being that of the report,
over all frames of all validation cases; a divergence is an error without bound. Without validation cases a training
ends with the corrector of its last step.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from configs.solver_loop import SolverLoop
from deepzero_core.training import StepRecord
from deepzero_core.training.checkpoint import DamagedCheckpointError, load, save
from simulators import methods
from simulators.measures import mean_absolute_error
from simulators.protocol import Simulator
from tasks.loop_problem import Setting, open_simulator, reference_images


class Validation:
    """Tries a module in the course of its training and remembers its best weights in `path`.

    times: how often in `steps` steps. simulator: one of its own, so that the training's counts are of the training.
    """

    def __init__(
        self, setting: Setting, simulator: Simulator, module: nn.Module, path: Path, *, steps: int, times: int
    ) -> None:
        self.setting, self.simulator, self.module, self.path = setting, simulator, module, path
        self.times = {round(steps * (number + 1) / times) for number in range(times)}
        self.best = math.inf
        self.best_step: int | None = None
        if path.exists():
            # Of a run that was killed: what it found is found again, to the same bits.
            found = self._kept()
            self.best, self.best_step = found["mae"], found["step"]
        else:
            self._consider(0)

    def __call__(self, record: StepRecord, last: bool) -> dict[str, Any] | None:
        """What the history says of the step, where the corrector is tried after it."""
        if not (last or record.step in self.times):
            return None
        return {"validation_mae": self._consider(record.step)}

    def keep_best(self, last_step: int) -> tuple[int, float | None]:
        """Give the module its best weights: of which step they are, and their error.

        Where not one try came to its end, the module stays as the last step has left it.
        """
        if self.best_step is None:
            return last_step, None
        self.module.load_state_dict(self._kept()["weights"])
        return self.best_step, self.best

    def _consider(self, step: int) -> float | None:
        error = validation_error(self.setting, self.simulator, self.module)
        if error < self.best:
            self.best, self.best_step = error, step
            save(self.path, {"mae": error, "step": step, "weights": self.module.state_dict()})
        return error if math.isfinite(error) else None

    def _kept(self) -> dict[str, Any]:
        try:
            return load(self.path)
        except DamagedCheckpointError as error:
            raise type(error)(f"{error}; remove the folder {self.path.parent}, and the training starts anew") from error


@contextmanager
def validating(
    loop: SolverLoop, setting: Setting, module: nn.Module, folder: Path, *, steps: int
) -> Iterator[Validation | None]:
    """The validation of a training; None where there are no cases for it."""
    if not setting.validation:
        yield None
        return
    with open_simulator(loop) as simulator:
        yield Validation(setting, simulator, module, folder / "best.ckpt", steps=steps, times=loop.training.validations)


def validation_error(setting: Setting, simulator: Simulator, module: nn.Module) -> float:
    """Mean absolute error over all frames of all validation cases; infinite where one diverges."""
    frames = setting.loop.cases.frames - 1
    mode = module.training
    module.eval()
    try:
        images = methods.roll_out(simulator, setting.coupling, module, setting.validation, frames)
    finally:
        module.train(mode)
    reference = reference_images(setting.coupling, setting.validation, frames)
    flat, wanted = (values.flatten(2)[..., None, None] for values in (images, reference))
    error = float(mean_absolute_error(flat, wanted).mean())
    return error if math.isfinite(error) else math.inf
