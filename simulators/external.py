"""A program of anybody's as a simulator: in C, Fortran, Julia, a binary without its source.

    "pipe"     one process per simulator, kept alive, asked through its standard input (`simulators.wire`)
    "folder"   one process per step: PROGRAM ARGUMENTS… in.npz out.npz, in a folder that is removed afterwards

A program that crashes, hangs or answers nonsense is killed with all that it started, and started again; when it has
failed `retries` times more on the same question, that question's simulations have crashed, and the run goes on.
"""

import subprocess
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepzero_core.errors import RequestError, suggest
from simulators import wire
from simulators.contained import Contained, Crash
from simulators.program import Conversation, ProgramFailedError, end_of, start, stop
from simulators.protocol import Shapes, State, Statistics

PROTOCOLS = ("pipe", "folder")


class ExternalProgram(Contained):
    """A program that advances simulations by one step.

    command: the program and its arguments, without a shell. environment: variables that it gets beside PATH and a few.
    state_shapes, param_shapes: of one simulation, by name; no name twice. The program gets states and parameters and
    answers with the state, each array [N, …] in float64 (or float32, where that is what the state is in).
    timeout: seconds for one answer. retries: how often a question is asked again.
    batch_size: the most simulations of one question; its crash takes no more with it.

    A simulation that the program cannot advance comes back as NaN and has diverged. Copies and pickles start a process
    of their own when they are first asked.

    RequestError: a program that cannot be started, a command that is one string, an unknown protocol, names that clash.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        state_shapes: Shapes,
        param_shapes: Shapes | None = None,
        protocol: str = "pipe",
        timeout: float = 60.0,
        retries: int = 1,
        environment: Mapping[str, str] | None = None,
        limit: float = 1e6,
        batch_size: int | None = 1024,
    ) -> None:
        super().__init__(limit=limit, batch_size=batch_size)
        if isinstance(command, str) or not command:
            raise RequestError("command must be a list: the program, then each of its arguments; no shell reads it")
        if protocol not in PROTOCOLS:
            raise RequestError(f"unknown protocol {protocol!r}: {suggest(protocol, PROTOCOLS)}")
        if not timeout > 0 or retries < 0:
            raise RequestError(f"timeout must be positive and retries not negative, not {timeout} and {retries}")
        self._state_shapes, self._param_shapes = dict(state_shapes), dict(param_shapes or {})
        if clash := self._state_shapes.keys() & self._param_shapes.keys():
            raise RequestError(f"a state and a parameter have the same name: {', '.join(sorted(clash))}")
        if not self._state_shapes or any(" " in name for name in (*self._state_shapes, *self._param_shapes)):
            raise RequestError("a state has at least one field, and names are without spaces")
        self.command, self.protocol, self.timeout, self.retries = tuple(command), protocol, timeout, retries
        self.environment = dict(environment or {})

    def _begin(self) -> None:
        super()._begin()
        self._conversation: Conversation | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_conversation"}

    @property
    def state_shapes(self) -> Shapes:
        return self._state_shapes

    @property
    def param_shapes(self) -> Shapes:
        return self._param_shapes

    def close(self) -> None:
        """End the program. A later step starts it again."""
        with self._lock:
            if self._conversation is not None:
                self._conversation.close()
                self._conversation = None

    def advance(self, state: State, params: State) -> State | Crash:
        arrays = {name: np.ascontiguousarray(value.detach().numpy()) for name, value in (state | params).items()}
        expected = {name: tuple(value.shape) for name, value in state.items()}
        failure = ""
        for attempt in range(1 + self.retries):
            if attempt:
                self._count(Statistics(restarts=1, last_error=failure))
            try:
                ask = self._by_pipe if self.protocol == "pipe" else self._by_folder
                return {name: torch.from_numpy(value.copy()) for name, value in ask(arrays, expected).items()}
            except (ProgramFailedError, wire.MalformedAnswerError) as error:
                failure = f"the program {self.command[0]!r} failed: {error}"
                self.close()
        return Crash(failure)

    def _by_pipe(self, arrays: dict[str, np.ndarray], expected: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        if self._conversation is None:
            self._conversation = Conversation(self.command, self.environment)
        self._conversation.say(wire.question(arrays), self.timeout)
        return wire.answer(self._conversation, expected)

    def _by_folder(self, arrays: dict[str, np.ndarray], expected: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        with tempfile.TemporaryDirectory(prefix="deepzero-program-") as folder, tempfile.TemporaryFile() as errors:
            question, answer = Path(folder) / "in.npz", Path(folder) / "out.npz"
            np.savez(question, **arrays)
            command = (*self.command, str(question), str(answer))
            process = start(command, Path(folder), self.environment, errors, pipes=False)
            try:
                process.wait(self.timeout)
                if process.returncode != 0:
                    raise ProgramFailedError(end_of(process, errors))
            except subprocess.TimeoutExpired:
                raise ProgramFailedError("it did not answer in time") from None
            finally:
                stop(process)
            return _read(answer, expected)


def _read(path: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in expected}
    except FileNotFoundError:
        raise ProgramFailedError(f"it wrote no {path.name}") from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise wire.MalformedAnswerError(f"its {path.name} cannot be read ({error})") from error
    for name, shape in expected.items():
        if found[name].shape != shape or found[name].dtype.kind != "f":
            raise wire.MalformedAnswerError(
                f"it answered {name} as {found[name].dtype} {found[name].shape}, not as floats of shape {shape}"
            )
    return found
