"""What the engine has to reach: ratios of a baseline's time to the engine's, and relative errors of its gradients."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """must: what is required; aim: what is hoped for. `lower`: smaller is better. form: how a value is written."""

    must: float
    aim: float | None = None
    lower: bool = False
    form: str = "{:g}×"

    def verdict(self, value: float) -> str:
        """The bar in words, and whether a value meets it."""
        met = self._reaches(value, self.must)
        aimed = self.aim is not None and self._reaches(value, self.aim)
        aim = "" if self.aim is None else f", aim {self.form.format(self.aim)}"
        return f"must {self.form.format(self.must)}{aim}: {'aim met' if aimed else 'met' if met else 'not met'}"

    def _reaches(self, value: float, wanted: float) -> bool:
        return value <= wanted if self.lower else value >= wanted


def _error(must: float, aim: float | None = None) -> Bar:
    return Bar(must, aim, lower=True, form="{:.0e}")


# (case, baseline, kind of device), on two cores unless it is a GPU
SPEED = {
    ("cnn5", "feature reuse", "cpu"): Bar(15, 25),
    ("resnet20-90-b64", "feature reuse", "cpu"): Bar(3.5, 6),
    ("dncnn17", "feature reuse", "cpu"): Bar(2.5, 4),
    ("cnn5", "vmap", "cpu"): Bar(5, 15),
    ("resnet20-90-b64", "vmap", "cpu"): Bar(5, 15),
    ("dncnn17", "vmap", "cpu"): Bar(5, 15),
    ("cnn5", "feature reuse", "cuda"): Bar(60, 150),
    ("resnet20-90-b256", "feature reuse", "cuda"): Bar(20, 50),
    ("workers", "one worker", "cpu"): Bar(1.8, 1.95),
}

MEMORY = Bar(1.0, lower=True, form="{:g} GiB")
"""GiB beside a plain forward pass, at the default budget."""

CERTIFICATION = Bar(2.0)
"""How many times longer a plain loop over the examples takes."""

SAVED = Bar(0.5, form="{:.0%}")
"""Share of the samples that adaptive mode does without, on the demo."""

SIMULATORS = Bar(30, 100)
"""PhiFlow's eager step of one simulation, over a simulation's share of a step of 256."""

# precision of the engine → bar; relative error against float64 CGE at μ = 5e-3, against autograd at μ = 1e-6
AGAINST_CGE = {
    "value": _error(2e-3),
    "float32": _error(1e-4, 3e-5),
    "bfloat16": _error(1e-2, 5e-3),
}
AGAINST_DERIVATIVE = {
    "float32": _error(1e-5, 2e-6),
    "bfloat16": _error(1e-2, 5e-3),
}
