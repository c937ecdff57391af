"""One forward pass per perturbation: for modules that cannot be traced."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deepzero_core.perturb.cost import Cost
from deepzero_core.perturb.evaluator import BasePass, Chunk, Situation
from deepzero_core.perturb.objective import RandomState, objective, preserved_random_state


@dataclass(frozen=True)
class _Batch:
    buffers: dict[str, Tensor]
    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class SeparateEvaluator:
    """Runs the module itself, with the random numbers of the base pass."""

    module: nn.Module
    situation: Situation
    untraced: str | None = None
    _pass: dict[str, Cost] = field(default_factory=dict, compare=False, repr=False)

    def base(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], inputs: Tensor, targets: Tensor
    ) -> BasePass:
        state = RandomState()
        before = {name: buffer.clone() for name, buffer in buffers.items()}
        with torch.no_grad():
            result = objective(self.module, parameters, before, inputs, targets, self.situation.loss_fn)
        cache = _Batch(before, inputs, targets)
        return BasePass(result.loss, result.outputs, result.buffers, parameters, cache, state)

    def coordinates(self, base: BasePass, chunk: Chunk, step: float, precision: str = "float32") -> Tensor:
        batch: _Batch = base.cache
        losses = []
        with torch.no_grad(), preserved_random_state():
            for index in chunk.indices.tolist():
                moved = dict(base.parameters)
                moved[chunk.name] = moved[chunk.name].clone(memory_format=torch.contiguous_format)
                moved[chunk.name].view(-1)[index] += step
                base.random_state.restore()
                result = objective(
                    self.module, moved, batch.buffers, batch.inputs, batch.targets, self.situation.loss_fn
                )
                losses.append(result.loss - base.loss)
        return torch.stack(losses)

    def chunk_size(self, base: BasePass, name: str, memory: int) -> int:
        return base.parameters[name].numel()

    def starts(self, base: BasePass, name: str, chunks: int) -> int:
        """Unknown: the module is never seen operator by operator."""
        return 0

    def cost(self, base: BasePass, name: str) -> dict[str, Cost]:
        """A whole forward pass, "dense" throughout: the operations that torch knows of, counted in a single pass."""
        if not self._pass:
            batch: _Batch = base.cache
            with torch.no_grad(), preserved_random_state(), FlopCounterMode(display=False) as counter:
                base.random_state.restore()
                objective(
                    self.module, base.parameters, batch.buffers, batch.inputs, batch.targets, self.situation.loss_fn
                )
            self._pass["dense"] = Cost(float(counter.get_total_flops()))
        return dict(self._pass)
