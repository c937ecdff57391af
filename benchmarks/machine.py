"""What a run ran on and with."""

import psutil
import torch

from deepzero_core.perturb.native.build import library
from tasks.environment import environment, version


def load_average() -> float:
    """Processes that ran or waited on average over the last minute."""
    return round(psutil.getloadavg()[0], 2)


def machine(threads: int, device: torch.device) -> dict[str, object]:
    """Versions, commit and hardware (see `tasks.environment`), threads, device, kernels of the engine,
    and the load."""
    torch_kernels = f"torch, {torch.backends.cpu.get_cpu_capability()}"
    return environment() | {
        "torchzero": version("torchzero"),
        "threads": threads,
        "load": load_average(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "kernels": "compiled for this processor" if library() is not None else torch_kernels,
    }
