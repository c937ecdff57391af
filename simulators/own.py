"""A simulator of one's own from plain settings, as a configuration holds them and as they travel to a worker."""

from collections.abc import Mapping
from typing import Any

from deepzero_core.callables import reason, resolve
from deepzero_core.errors import RequestError
from simulators.contained import Contained
from simulators.external import ExternalProgram
from simulators.function import FunctionSimulator


def own_simulator(kind: str, settings: Mapping[str, Any]) -> Contained:
    """kind: "external" or "function". settings: the arguments of its class; a function by "package.module:callable".

    A step is cut as `Contained` does where the settings have no batch_size: alike in every process.
    RequestError: settings that the simulator does not take, a function that cannot be imported.
    """
    given: dict[str, Any] = {"batch_size": None} | dict(settings)
    for key in ("state_shapes", "param_shapes"):
        given[key] = {name: tuple(shape) for name, shape in given.get(key, {}).items()}
    build: Any = ExternalProgram
    if kind == "function":
        given["function"], build = resolve(str(given["function"]), what="simulator"), FunctionSimulator
    try:
        own: Contained = build(**given)
    except (TypeError, ValueError) as error:
        raise RequestError(f"simulator.settings do not fit: {reason(error)}") from error
    return own
