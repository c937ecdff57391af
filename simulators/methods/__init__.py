"""Training a corrector in the loop with a solver; see `simulators.methods.sources`."""

from simulators.methods.coupling import BurgersCoupling, Coupling, FieldCoupling, Scales, WakeCoupling, scales_of
from simulators.methods.sources import FirstOrderLoop, Loop, NonInteractive, SplitLoop, ZerothOrderLoop
from simulators.methods.unrolled import RolloutLoss, Unrolled
from simulators.methods.windows import Windows, roll_out

__all__ = [
    "BurgersCoupling",
    "Coupling",
    "FieldCoupling",
    "FirstOrderLoop",
    "Loop",
    "NonInteractive",
    "RolloutLoss",
    "Scales",
    "SplitLoop",
    "Unrolled",
    "WakeCoupling",
    "Windows",
    "ZerothOrderLoop",
    "roll_out",
    "scales_of",
]
