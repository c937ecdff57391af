"""The losses of denoised smoothing, one number per example.

    pre-training    mean over pixels of (D(x + δ) − x)²
    stability       CE(f(D(x + δ)), argmax f(x)) + w·‖D(x + δ) − x‖²

f is the classifier that is defended, as it is; D the denoiser; δ ~ N(0, σ²I); w ≥ 0 the weight of reconstruction.
Source: Salman et al. 2020 (denoised smoothing), the loss called Stab.
"""

from torch import Tensor
from torch.nn import functional as F


def mean_squared_error(outputs: Tensor, images: Tensor) -> Tensor:
    """(D(x + δ) − x)², its mean over the pixels: [B, C, H, W] twice → [B]."""
    return (outputs - images).square().flatten(1).mean(1)


def stability(logits: Tensor, labels: Tensor) -> Tensor:
    """CE(f(D(x + δ)), argmax f(x)): logits [N, K], labels int64 [N] → [N]."""
    return F.cross_entropy(logits, labels, reduction="none")


def squared_distance(outputs: Tensor, images: Tensor) -> Tensor:
    """‖D(x + δ) − x‖²: [N, C, H, W] twice → [N]."""
    return (outputs - images).square().flatten(1).sum(1)
