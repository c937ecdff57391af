"""Where the buffers of a draft lie, and where its phases end."""

from collections.abc import Mapping

from deepzero_core.perturb.native import program
from deepzero_core.perturb.native.program import EXTERNAL, LOCAL, NONE, SHARED, Buffer, Norm, Program, Step
from deepzero_core.perturb.regions.draft import Draft


class _Arena:
    """Places for buffers that come and go: the lowest gap that is large enough."""

    def __init__(self) -> None:
        self._taken: dict[int, tuple[int, int]] = {}
        self.size = 0

    def take(self, buffer: int, floats: int) -> int:
        start = 0
        for first, last in sorted(self._taken.values()):
            if first - start >= floats:
                break
            start = max(start, last)
        self._taken[buffer] = start, start + floats
        self.size = max(self.size, start + floats)
        return start

    def hand_over(self, old: int, new: int) -> int:
        self._taken[new] = self._taken.pop(old)
        return self._taken[new][0]

    def give_back(self, buffer: int) -> None:
        self._taken.pop(buffer, None)


def lay_out(draft: Draft, external: Mapping[int, int]) -> Program:
    """The program of a draft. `external`: buffers that are the caller's, and their numbers."""
    phase_of, phase_ends, measured = _phases(draft)
    first, last = _lifetimes(draft)
    arenas = {LOCAL: _Arena(), SHARED: _Arena()}
    places = {buffer: (EXTERNAL, number) for buffer, number in external.items()}
    storage = {
        buffer: LOCAL if phase_of[first[buffer]] == phase_of[last[buffer]] else SHARED
        for buffer in first
        if buffer not in external
    }
    floats = [space.elements * program.lanes() for space in draft.spaces]
    for number, step in enumerate(draft.steps):
        target = step.target
        if target in storage and target not in places:
            kind = storage[target]
            over = _overwritten(draft, step, last, storage)
            offset = arenas[kind].take(target, floats[target]) if over is None else arenas[kind].hand_over(over, target)
            places[target] = kind, offset
        for buffer in (step.source, step.residual, step.target):
            if buffer in storage and last[buffer] == number:
                arenas[storage[buffer]].give_back(buffer)
    buffers = [
        Buffer(*places.get(i, (LOCAL, 0)), 1 if s.thin else s.channels, s.positions * program.lanes(), s.thin, s.shift)
        for i, s in enumerate(draft.spaces)
    ]
    norms, channels = [], 0
    for number, norm in enumerate(draft.norms):
        width = buffers[norm.source].channels
        addresses = [draft.address(part) for part in (norm.values, norm.mean, norm.scale, norm.gamma, norm.beta)]
        norms.append(Norm(*addresses, norm.source, measured[number], width, norm.values.shape[1], channels))
        channels += width
    return Program(
        draft.steps, buffers, norms, phase_ends, draft.batch,
        arenas[LOCAL].size, arenas[SHARED].size, channels, draft.kept,
    )  # fmt: skip


def _phases(draft: Draft) -> tuple[list[int], list[int], dict[int, int]]:
    """By step its phase, the phases' ends, and by normalisation the phase that gathers its sums: a step that reads a
    normalisation's statistics begins a phase where the present one still gathers them."""
    phase_of: list[int] = []
    ends: list[int] = []
    measured: dict[int, int] = {}
    for number, step in enumerate(draft.steps):
        if step.kind == program.CHAIN and step.norm != NONE and measured[step.norm] == len(ends):
            ends.append(number)
        if step.kind == program.MOMENTS:
            measured[step.norm] = len(ends)
        phase_of.append(len(ends))
    return phase_of, [*ends, len(draft.steps)], measured


def _lifetimes(draft: Draft) -> tuple[dict[int, int], dict[int, int]]:
    """By buffer, the first and the last step that touches it."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for number, step in enumerate(draft.steps):
        for buffer in (step.source, step.residual, step.target):
            if buffer != NONE:
                first.setdefault(buffer, number)
                last[buffer] = number
    return first, last


def _overwritten(draft: Draft, step: Step, last: Mapping[int, int], storage: Mapping[int, int]) -> int | None:
    """The operand whose place the result may take: element by element, and nobody reads it again."""
    if step.kind not in (program.CHAIN, program.ACTIVATE) or step.pool:
        return None
    for operand in (step.source, step.residual):
        same = operand in storage and storage[operand] == storage[step.target]
        if same and draft.steps[last[operand]] is step and draft.spaces[operand] == draft.spaces[step.target]:
            return int(operand)
    return None
