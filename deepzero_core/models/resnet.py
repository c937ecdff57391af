"""Residual networks for small images, He et al. 2016 (section 4.2), with parameter-free (option A) shortcuts.

Input [B, C, H, W]; output, scores of the classes, [B, K]. Three stages of (depth − 2)/6 blocks with 16, 32 and 64
channels.
ResNet-20 at 3 channels and ten classes has 269,722 parameters, 268,336 of them weights of convolutions and of the
linear layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepzero_core.errors import RequestError

RESNET_DEPTHS = (20, 32, 44, 56)
STAGE_WIDTHS = (16, 32, 64)


class PaddedShortcut(nn.Module):
    """Option A: every stride-th pixel, new channels zero; [B, C, H, W] → [B, C + 2·padding, ⌈H/stride⌉, ⌈W/stride⌉]."""

    def __init__(self, stride: int, padding: int) -> None:
        super().__init__()
        self.stride = stride
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))


class BasicBlock(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_width, width, stride)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, 1)
        self.norm2 = nn.BatchNorm2d(width)
        same = in_width == width and stride == 1
        self.shortcut: nn.Module = nn.Identity() if same else PaddedShortcut(stride, (width - in_width) // 2)

    def forward(self, x: Tensor) -> Tensor:
        branch = F.relu(self.norm1(self.conv1(x)))
        branch = self.norm2(self.conv2(branch))
        return F.relu(branch + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-`depth`, depth one of 20, 32, 44, 56 (RequestError otherwise); weights start from He et al. 2015."""

    def __init__(self, depth: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        if depth not in RESNET_DEPTHS:
            raise RequestError(f"there is no ResNet of depth {depth}; valid are: {', '.join(map(str, RESNET_DEPTHS))}")
        blocks = (depth - 2) // 6
        self.conv1 = _conv3x3(in_channels, STAGE_WIDTHS[0], 1)
        self.norm1 = nn.BatchNorm2d(STAGE_WIDTHS[0])
        self.stage1 = _stage(STAGE_WIDTHS[0], STAGE_WIDTHS[0], blocks, stride=1)
        self.stage2 = _stage(STAGE_WIDTHS[0], STAGE_WIDTHS[1], blocks, stride=2)
        self.stage3 = _stage(STAGE_WIDTHS[1], STAGE_WIDTHS[2], blocks, stride=2)
        self.linear = nn.Linear(STAGE_WIDTHS[2], num_classes)
        nn.init.kaiming_normal_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        scores: Tensor = self.linear(torch.mean(x, dim=(2, 3)))
        return scores


def _stage(in_width: int, width: int, blocks: int, *, stride: int) -> nn.Sequential:
    first = BasicBlock(in_width, width, stride)
    return nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(blocks - 1)))


def _conv3x3(in_width: int, width: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_width, width, kernel_size=3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return conv
