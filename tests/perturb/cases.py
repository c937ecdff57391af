"""The registry of layers and networks that every fast path is compared on: a new layer is one new line."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

aten = torch.ops.aten

Built = tuple[nn.Module, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A module in float64 inputs, with the loss it is trained with."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    loss: Callable[[Any, Tensor], Tensor]
    classes: int | None = None
    untraced: str | None = None

    def __str__(self) -> str:
        return self.name

    def build(self) -> Built:
        torch.manual_seed(0)
        module = self.make()
        inputs = torch.randn(self.shape, dtype=torch.float64)
        targets = torch.randint(self.classes, self.shape[:1]) if self.classes else torch.randn(self.shape[:1]).double()
        return module, inputs, targets


def energy(outputs: Tensor, targets: Tensor) -> Tensor:
    """A smooth loss of outputs of any shape [B, …], per example."""
    flat = outputs.flatten(1)
    weights = torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype)
    return (flat @ weights - targets).square() + flat.square().mean(1)


def layer(name: str, make: Callable[[], nn.Module], *shape: int) -> Case:
    return Case(name, make, shape, energy)


class Apply(nn.Module):
    """A layer with a function before or after it."""

    def __init__(self, inner: nn.Module, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner, x)


def after_linear(function: Callable[[Tensor], Tensor], width: int = 6) -> Callable[[], nn.Module]:
    return lambda: Apply(nn.Linear(4, width), lambda inner, x: function(inner(x)))


def after_conv(function: Callable[[Tensor], Tensor], channels: int = 4) -> Callable[[], nn.Module]:
    return lambda: Apply(nn.Conv2d(2, channels, 3, padding=1), lambda inner, x: function(inner(x)))


ACTIVATIONS = {
    "relu": F.relu, "leaky_relu": F.leaky_relu, "gelu": F.gelu, "silu": F.silu, "elu": F.elu, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "softplus": F.softplus, "hardtanh": F.hardtanh, "hardswish": F.hardswish, "relu6": F.relu6,
    "softmax": lambda y: F.softmax(y, -1), "log_softmax": lambda y: F.log_softmax(y, -1), "abs": torch.abs,
    "square_root": lambda y: (y.square() + 1).sqrt(), "glu": F.glu, "normalize": lambda y: F.normalize(y, dim=-1),
    "cumsum": lambda y: y.cumsum(1), "sort": lambda y: y.sort(1).values, "logsumexp": lambda y: y.logsumexp(1, keepdim=True),
    "amax": lambda y: y.amax(1, keepdim=True), "in_place": lambda y: y.relu_().mul_(2), "written_slice": lambda y: written(y),
    "where": lambda y: torch.where(y > 0, y, 0.1 * y), "self_product": lambda y: y.unsqueeze(2) @ y.unsqueeze(1),
    "negative": lambda y: -y, "square": torch.square, "cube": lambda y: y**3,
    "divide": lambda y: y / (2 + y.square()), "chunks": lambda y: torch.cat([c * i for i, c in enumerate(y.chunk(3, 1), 1)], 1),
    "unbind": lambda y: torch.stack(y.unbind(1)[::2], 1), "roll": lambda y: y.roll(1, 1) * y, "flip": lambda y: y.flip(1) * y,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"), "mish": F.mish, "celu": lambda y: F.celu(y, 0.7), "selu": F.selu,
    "softplus_sharp": lambda y: F.softplus(y, 3, 1), "logsigmoid": F.logsigmoid, "erf": torch.erf, "sin": torch.sin, "cos": torch.cos,
    "atan": torch.atan, "exp": torch.exp, "expm1": torch.expm1, "log": lambda y: (y.square() + 0.1).log(), "log1p": lambda y: y.square().log1p(),
    "rsqrt": lambda y: (y.square() + 0.1).rsqrt(), "reciprocal": lambda y: 1 / (y.square() + 0.1), "fourth_power": lambda y: y**4,
    "real_power": lambda y: (y.square() + 0.1) ** 0.7, "power_of_two": lambda y: 2**y, "power": lambda y: (y.square() + 0.1) ** y,
    "clamp": lambda y: y.clamp(-0.3, 0.4), "clamp_within": lambda y: y.clamp(-y[0].detach().abs(), ONE), "clamp_min": lambda y: torch.clamp_min(y, 0.1),
    "clamp_max": lambda y: torch.clamp_max(y, 0.1), "clamp_below": lambda y: torch.clamp_max(torch.clamp_min(y, -ONE / 3), ONE / 2),
    "hardsigmoid": F.hardsigmoid, "maximum": lambda y: torch.maximum(y, -0.5 * y), "minimum": lambda y: torch.minimum(y, y[:1]),
    "threshold": lambda y: F.threshold(y, 0.1, 2), "softshrink": F.softshrink, "hardshrink": F.hardshrink, "softsign": F.softsign,
    "masked_fill": lambda y: y.masked_fill(torch.arange(6) > 3, 2.0), "masked_fill_tensor": lambda y: y.masked_fill(torch.arange(6) > 3, ONE),
    "rounded": lambda y: y * torch.div(y, 0.3, rounding_mode="floor"), "hypot": lambda y: torch.hypot(y, y.flip(1)), "one_minus": lambda y: (1 - y) * y,
    "numbers": lambda y: aten.div.Scalar(aten.sub.Scalar(aten.add.Scalar(y, 1.0), 0.5, 2), 3.0), "cosine": lambda y: F.cosine_similarity(y, y.flip(1), 1)[:, None],
    "deviation": lambda y: y.std((0, 1)) * y, "moments": lambda y: torch.cat(torch.var_mean(y, 1, correction=0, keepdim=True), 1),
    "norm": lambda y: y.norm() * y, "product": lambda y: y.prod(1, keepdim=True), "repeat": lambda y: y.repeat(1, 2), "triangles": lambda y: y.tril() - y.triu(1), "where_fixed": lambda y: torch.where(torch.arange(6) > 2, y, -y.flip(1)),
    "batched_sum": lambda y: torch.baddbmm(y[:, None], y[:, None], y[:, :, None] @ y[:, None], beta=2, alpha=3), "dot": lambda y: y * y[0].dot(y[1]),
    "gate": lambda y: (lambda a, b: a * b.sigmoid())(*y.chunk(2, 1)), "heads": lambda y: y.unflatten(1, (3, 2)).softmax(2), "variance": lambda y: y.var(1, keepdim=True), "batch_mean": lambda y: y - y.mean(0), "einsum": lambda y: torch.einsum("bi,bj->bij", y, y),
}  # fmt: skip


def written(y: Tensor) -> Tensor:
    z = torch.zeros_like(y)
    z[:, 1:] += y[:, 1:]
    return z


ONE = torch.ones((), dtype=torch.float64)

IMAGE_FUNCTIONS = {
    "channel_softmax": lambda y: y.softmax(1), "row_softmax": lambda y: y.softmax(2), "channel_log_softmax": lambda y: y.log_softmax(1),
    "space_logsumexp": lambda y: y.logsumexp((2, 3)), "channel_norm": lambda y: y.norm(dim=1), "space_norm": lambda y: y.norm(dim=(2, 3)),
    "channel_chunks": lambda y: torch.cat([y.chunk(2, 1)[1].tanh(), y.narrow(1, 0, 1)], 1), "row_chunks": lambda y: torch.cat(y.split(3, 2)[::-1], 3),
    "unbound_channels": lambda y: torch.stack(y.unbind(1)[::2], 3), "two_channels": lambda y: y[:, 1] * y[:, 2], "split_channels": lambda y: y.unflatten(1, (2, 2)).softmax(1),
    "gram": lambda y: y.flatten(2) @ y.flatten(2).mT, "mixed_rows": lambda y: y @ torch.linspace(-1, 1, 18, dtype=y.dtype).view(6, 3),
    "max_pool": lambda y: F.max_pool2d(y, 2), "max_pool_overlapping": lambda y: F.max_pool2d(y, 3, 2, 1),
    "avg_pool": lambda y: F.avg_pool2d(y, 2), "global_pool": lambda y: F.adaptive_avg_pool2d(y, 1),
    "adaptive_pool": lambda y: F.adaptive_avg_pool2d(y, 3), "adaptive_max": lambda y: F.adaptive_max_pool2d(y, 2),
    "mean": lambda y: y.mean((2, 3)), "channel_mean": lambda y: y.mean(1), "upsample": lambda y: F.interpolate(y, scale_factor=2),
    "bilinear": lambda y: F.interpolate(y, scale_factor=2, mode="bilinear"), "pixel_shuffle": lambda y: F.pixel_shuffle(y, 2),
    "strided_slice": lambda y: y[:, :, ::2, ::2], "channel_slice": lambda y: y[:, 1:3], "flatten": lambda y: y.flatten(1),
    "transpose": lambda y: y.transpose(1, 3), "pad_channels": lambda y: F.pad(y, (0, 0, 0, 0, 1, 2)), "pad_space": lambda y: F.pad(y, (1, 2, 0, 1), value=3.0),
    "reflect": lambda y: F.pad(y, (1, 1, 1, 1), mode="reflect"), "circular": lambda y: F.pad(y, (1, 1, 1, 1), mode="circular"),
    "unfold": lambda y: F.unfold(y, 3), "local_response": lambda y: F.local_response_norm(y, 2), "reshape_merge": lambda y: y.reshape(len(y), 2, -1),
    "pool_indices": lambda y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2), "instance_norm": F.instance_norm,
    "attention": lambda y: F.scaled_dot_product_attention(y, y, y), "grid_mean": lambda y: y.mean(0, keepdim=True).expand_as(y) * y,
}  # fmt: skip

LAYERS = [
    layer("linear", lambda: nn.Linear(4, 3), 5, 4),
    layer("linear_no_bias", lambda: nn.Linear(4, 3, bias=False), 5, 4),
    layer("linear_3d", lambda: nn.Linear(4, 3), 3, 5, 4),
    layer("bilinear", lambda: Apply(nn.Bilinear(4, 4, 3), lambda inner, x: inner(x, x)), 5, 4),
    layer("conv1d", lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1), 4, 2, 9),
    layer("conv2d", lambda: nn.Conv2d(2, 3, 3), 3, 2, 6, 6),
    layer("conv2d_strided", lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), 3, 2, 7, 6),
    layer("conv2d_grouped", lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), 3, 4, 5, 5),
    layer("conv2d_depthwise", lambda: nn.Conv2d(4, 4, 3, groups=4), 3, 4, 5, 5),
    layer("conv2d_same", lambda: nn.Conv2d(2, 3, 3, padding="same", dilation=2), 3, 2, 5, 5),
    layer("conv2d_circular", lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), 3, 2, 5, 5),
    layer("conv2d_reflect", lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), 3, 2, 5, 5),
    layer("conv3d", lambda: nn.Conv3d(2, 2, 2, padding=1), 2, 2, 3, 3, 3),
    layer("conv_transpose1d", lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), 3, 2, 4),
    layer("conv_transpose2d", lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), 3, 2, 4, 4),
    layer("two_convs", lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3)), 3, 2, 6, 6),
    layer("conv_then_grouped", lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2)), 3, 2, 6, 6),
    layer("conv_then_transposed", lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 3, 3)), 3, 2, 6, 6),
    layer("batch_norm1d", lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), 6, 4),
    layer("batch_norm2d", lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), 4, 2, 5, 5),
    layer("batch_norm3d", lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2)), 3, 1, 3, 3, 3),
    layer("batch_norm_plain", lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=False)), 4, 2, 5, 5),
    layer("batch_norm_untracked", lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)), 4, 2, 5, 5),
    layer("layer_norm", lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)), 5, 4),
    layer("group_norm", lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)), 3, 2, 5, 5),
    layer("instance_norm", lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True)), 3, 2, 5, 5),
    layer("layer_norm_of_images", lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.LayerNorm((3, 3))), 2, 2, 5, 5),
    layer("layer_norm_across_channels", lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.LayerNorm((3, 3, 3), bias=False)), 2, 2, 5, 5),
    layer("layer_norm_of_tokens", lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6, elementwise_affine=False)), 2, 3, 4),
    layer("group_norm_plain", lambda: nn.Sequential(nn.Conv1d(2, 6, 3), nn.GroupNorm(2, 6, affine=False)), 3, 2, 5),
    layer("group_norm_of_repeats", lambda: Apply(nn.Conv1d(2, 2, 3), lambda inner, x: F.group_norm(inner(x).repeat_interleave(3, 1), 2)), 2, 2, 5),
    layer("rms_norm", lambda: nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6)), 5, 4),
    layer("prelu", lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.PReLU(3)), 3, 2, 5, 5),
    layer("weight_norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), 5, 4),
    layer("lstm", lambda: Apply(nn.LSTM(4, 3, batch_first=True), lambda inner, x: inner(x)[0]), 3, 4, 4),
    layer("gru_cell", lambda: Apply(nn.GRUCell(4, 3), lambda inner, x: inner(x)), 5, 4),
    layer("multihead_attention", lambda: Apply(nn.MultiheadAttention(4, 2, batch_first=True), lambda inner, x: inner(x, x, x)[0]), 3, 5, 4),
    layer("attention_alone", lambda: Apply(nn.MultiheadAttention(4, 2, batch_first=True), lambda inner, x: inner(x, x, x, need_weights=False)[0]), 3, 5, 4),
    layer("projected_attention", lambda: Apply(nn.Linear(4, 12), lambda inner, x: F.scaled_dot_product_attention(*inner(x).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4), is_causal=True)), 2, 5, 4),
    layer("encoder_layer", lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), 3, 5, 4),
    layer("whole_attention", lambda: Apply(nn.Linear(4, 12), lambda inner, x: F.scaled_dot_product_attention(*inner(x).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4))), 2, 5, 4),
    layer("feed_forward", lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6), nn.GELU("tanh"), nn.Linear(6, 3)), 2, 5, 4),
    layer("embedding", lambda: Apply(nn.Embedding(7, 3), lambda inner, x: inner(x[:, 0].abs().long() % 7) * x.sum(1, keepdim=True)), 5, 4),
    *[layer(f"linear_{name}", after_linear(function), 5, 4) for name, function in ACTIVATIONS.items()],
    *[layer(f"conv_{name}", after_conv(function), 3, 2, 6, 6) for name, function in IMAGE_FUNCTIONS.items()],
]  # fmt: skip


class Residual(nn.Module):
    """Conv-BN blocks with an identity and a strided, zero-padded shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv1, self.norm1 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.norm2 = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        x = F.relu(x + self.norm1(self.conv1(x)))
        x = F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)) + self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class Concatenating(nn.Module):
    """Dense connections: every layer reads all earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(5, 2, 3, padding=1)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, F.relu(self.first(x))], 1)
        x = torch.cat([F.gelu(self.second(x)), x], 1)
        return self.head(F.max_pool2d(x, 2).amax((2, 3)))


class SmallViT(nn.Module):
    """Patches, a class token, learned positions, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 4, 2, stride=2)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 5, 4))
        self.block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.position
        return self.head(self.block(tokens)[:, 0])


class Shared(nn.Module):
    """One weight used three times: as a layer twice, and tied to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.out.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class SharedConvolution(nn.Module):
    """One convolution and one BatchNorm in a loop: a changed weight meets a changed input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + F.relu(self.norm(self.conv(x)))
        return x.mean((2, 3))


class FreeParameters(nn.Module):
    """Parameters outside any layer: a scalar temperature, a gate, a matrix that is scaled before use."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.gate = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.randn(4))
        self.matrix, self.unused = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.gate.sigmoid()) @ (self.matrix / self.matrix.norm()) / self.temperature


class SeveralOutputs(nn.Module):
    """A dictionary of outputs, read by the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = F.silu(self.body(x))
        return {"class": self.left(features), "value": self.right(features)}


def joint_loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs["class"], targets) + outputs["value"].square().mean()


def smoothed_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, label_smoothing=0.1, reduction="none")


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, F.one_hot(targets, outputs.shape[1]).to(outputs.dtype))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "huber": F.huber_loss, "summed_huber": lambda y, t: F.huber_loss(y, t, reduction="sum", delta=0.3), "smooth_l1": F.smooth_l1_loss,
    "smooth_l1_each": lambda y, t: F.smooth_l1_loss(y, t, reduction="none", beta=0.4).mean(1), "l1": F.l1_loss, "squared_each": lambda y, t: F.mse_loss(y, t, reduction="none").sum(1),
    "binary": lambda y, t: F.binary_cross_entropy_with_logits(y, t.sigmoid(), pos_weight=torch.arange(1.0, 4.0).to(y)), "soft_margin": lambda y, t: F.soft_margin_loss(y, t.sign()),
    "divergence": lambda y, t: F.kl_div(y.log_softmax(1), t.softmax(1), reduction="batchmean"), "poisson": F.poisson_nll_loss,
}  # fmt: skip


def columns(targets: Tensor) -> Tensor:
    """[B] → [B, 3]."""
    return targets[:, None] * torch.arange(1, 4, dtype=targets.dtype)


LAYERS += [
    Case(f"loss_{name}", lambda: nn.Linear(4, 3), (5, 4), lambda y, t, loss=loss: loss(y, columns(t)))
    for name, loss in LOSSES.items()
]


NETWORKS = [
    Case(
        "smoothed_and_weighted",
        lambda: nn.Linear(4, 3),
        (5, 4),
        lambda y, t: F.cross_entropy(y, t, torch.arange(1.0, 4.0).to(y), label_smoothing=0.2),
        classes=3,
    ),
    Case("squared_error", SharedConvolution, (4, 2, 5, 5), squared_error, classes=2),
    Case("residual", Residual, (4, 2, 6, 6), F.cross_entropy, classes=4),
    Case("concatenating", Concatenating, (3, 2, 6, 6), F.cross_entropy, classes=3),
    Case("small_vit", SmallViT, (3, 1, 4, 4), F.cross_entropy, classes=3),
    Case("shared", Shared, (5, 4), smoothed_cross_entropy, classes=4),
    Case("shared_convolution", SharedConvolution, (4, 2, 5, 5), F.cross_entropy, classes=2),
    Case("free_parameters", FreeParameters, (5, 4), F.cross_entropy, classes=3),
    Case("several_outputs", SeveralOutputs, (5, 4), joint_loss, classes=3),
]
