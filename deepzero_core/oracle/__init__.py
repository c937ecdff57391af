"""Black boxes that people really cannot open: a network, an ONNX file, a scoring server, a function.

with open_oracle("mlflow", url="http://127.0.0.1:5001", batch_size=64, budget=100_000, cache="answers.sqlite") as box:
    scores = logits(box, images)  # [N, C, H, W] → [N, K]
    loss_fn = behind(as_layer(box), torch.nn.functional.cross_entropy)
"""

from deepzero_core.oracle.account import Account, MemoryAccount, StoredAccount, Usage
from deepzero_core.oracle.cache import ResponseCache
from deepzero_core.oracle.function import FunctionOracle
from deepzero_core.oracle.http import HttpOracle
from deepzero_core.oracle.logits import as_layer, logits
from deepzero_core.oracle.metered import Metered, Statistics
from deepzero_core.oracle.module import ModuleOracle
from deepzero_core.oracle.onnx import OnnxOracle
from deepzero_core.oracle.opening import KINDS, open_oracle, settings_of
from deepzero_core.oracle.protocol import Answers, BlackBoxUnavailableError, Oracle, QueryBudgetError
from deepzero_core.oracle.transport import Retry

__all__ = [
    "KINDS",
    "Account",
    "Answers",
    "BlackBoxUnavailableError",
    "FunctionOracle",
    "HttpOracle",
    "MemoryAccount",
    "Metered",
    "ModuleOracle",
    "OnnxOracle",
    "Oracle",
    "QueryBudgetError",
    "ResponseCache",
    "Retry",
    "Statistics",
    "StoredAccount",
    "Usage",
    "as_layer",
    "logits",
    "open_oracle",
    "settings_of",
]
