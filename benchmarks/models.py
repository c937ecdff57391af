"""Networks of the benchmarks that the package has no need of, and how every network is cut into blocks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.problem import Block
from deepzero_core.models import DnCNN


def dncnn(depth: int = 17, width: int = 64, channels: int = 3) -> nn.Module:
    """The package's DnCNN with an orthogonal last convolution: with zeros no other parameter moves the loss."""
    network = DnCNN(channels, depth=depth, width=width)
    last = network.layers[-1]
    assert isinstance(last, nn.Conv2d)
    nn.init.orthogonal_(last.weight)
    return network


class Encoder(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): [B, N, width] → the same. Source: Dosovitskiy et al. 2021."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A small vision transformer: [B, 3, size, size] → scores [B, classes]. Source: Dosovitskiy et al. 2021."""

    def __init__(
        self, size: int = 32, patch: int = 4, width: int = 64, depth: int = 4, heads: int = 4, classes: int = 10
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) * 0.02)
        self.encoders = nn.Sequential(*(Encoder(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def embed(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.position

    def scores(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.norm(x[:, 0]))
        return scores

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.encoders(self.embed(x)))


def cut_sequential(network: nn.Module, _: Tensor) -> list[Block]:
    return [Block(part, (name,)) for name, part in network.named_children()]


def cut_resnet(network: nn.Module, _: Tensor) -> list[Block]:
    stages = (("stage1", network.stage1), ("stage2", network.stage2), ("stage3", network.stage3))
    return [
        Block(lambda x: F.relu(network.norm1(network.conv1(x))), ("conv1", "norm1")),
        *(Block(block, (f"{name}.{i}",)) for name, stage in stages for i, block in enumerate(stage)),
        Block(lambda x: network.linear(x.mean(dim=(2, 3))), ("linear",)),
    ]


def cut_dncnn(network: nn.Module, inputs: Tensor) -> list[Block]:
    layers = [Block(layer, (f"layers.{i}",)) for i, layer in enumerate(network.layers)]
    return [*layers, Block(lambda noise: inputs - noise, ())]


def cut_vit(network: nn.Module, _: Tensor) -> list[Block]:
    return [
        Block(network.embed, ("patches", "token", "position")),
        *(Block(encoder, (f"encoders.{i}",)) for i, encoder in enumerate(network.encoders)),
        Block(network.scores, ("norm", "head")),
    ]
