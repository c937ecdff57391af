"""The one place where torchvision is imported.

torchvision's wheel on PyPI is linked against a CUDA torch. Beside a CPU-only torch its C++ library does not load, the
detection operators are not declared, and `import torchvision` fails on `operator torchvision::nms does not exist`.
Declaring the two operators lets data sets, transforms and models work; calling the operators still fails, as it should.
"""

import importlib
import sys
import threading
from types import ModuleType

import torch

_SYMPTOM = "operator torchvision::nms does not exist"
_OPERATORS = ("nms", "qnms")

_lock = threading.Lock()
# The declarations last as long as the Library object does.
_libraries: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """The torchvision module, with its missing operators declared where that is what keeps it from importing."""
    with _lock:
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            if _SYMPTOM not in str(error):
                raise
        # The failed import leaves half-initialised submodules, which a second import would trust.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in _OPERATORS:
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        return importlib.import_module("torchvision")
