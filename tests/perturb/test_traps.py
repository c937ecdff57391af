"""Modules that easily go wrong in the engine: equal to the reference, with a warning where they are not traced."""

# ruff: noqa: E501  (a registry: one case, one line)

import warnings
from collections.abc import Callable

import pytest
import torch
from cases import Apply, after_conv, after_linear, energy
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core import cge, reference
from deepzero_core.perturb.evaluator import prepare

Loss = Callable[[Tensor, Tensor], Tensor]


class Free(nn.Module):
    """Parameters and a function of (module, input)."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def free(function: Callable[[nn.Module, Tensor], Tensor], **shapes: tuple[int, ...]) -> Callable[[], nn.Module]:
    return lambda: Free(function, **{name: torch.randn(shape) for name, shape in shapes.items()})


def last(*values: object) -> Tensor:
    assert isinstance(values[-1], Tensor)
    return values[-1]


CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
HIDDEN = torch.arange(6) > 2

# name: module, input shape
TRACED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    # lists of numbers before a perturbed operand
    "layer_norm_2d": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm((3, 4))), (5, 3, 4)),
    "layer_norm_3d": (lambda: nn.Sequential(nn.Conv2d(2, 2, 3), nn.LayerNorm((2, 3, 3))), (3, 2, 5, 5)),
    # −∞ − (−∞)
    "masked_softmax": (after_linear(lambda y: F.softmax(y.masked_fill(HIDDEN, -torch.inf), -1)), (5, 4)),
    "where_softmax": (after_linear(lambda y: F.softmax(torch.where(HIDDEN, -torch.inf, y), -1)), (5, 4)),
    "masked_logsumexp": (after_linear(lambda y: y.masked_fill(HIDDEN, -torch.inf).logsumexp(1, keepdim=True)), (5, 4)),
    "masked_amax": (after_linear(lambda y: y.masked_fill(HIDDEN, -torch.inf).amax(1, keepdim=True)), (5, 4)),
    "masked_exp": (after_linear(lambda y: y.masked_fill(HIDDEN, -torch.inf).exp()), (5, 4)),
    "masked_sigmoid": (after_linear(lambda y: y.masked_fill(HIDDEN, -torch.inf).sigmoid()), (5, 4)),
    "masked_max": (after_linear(lambda y: torch.maximum(y.masked_fill(HIDDEN, -torch.inf), -y)), (5, 4)),
    "masked_rows": (after_linear(lambda y: F.softmax(y.masked_fill(HIDDEN, -torch.inf), 0).nan_to_num()), (5, 4)),
    "masked_quotient": (after_linear(lambda y: 1 / (1 + (1 / y.masked_fill(HIDDEN, 0)).abs())), (5, 4)),
    # the square root of 0 and of what leaves 0
    "root_of_zero": (after_linear(lambda y: y.relu().sqrt()), (5, 4)),
    "norm_of_zero": (after_linear(lambda y: y.masked_fill(HIDDEN, 0).unflatten(1, (2, 3)).norm(dim=2)), (5, 4)),
    "deviation_of_equals": (after_linear(lambda y: (y * 0 + 1).std(1, keepdim=True) + y.masked_fill(HIDDEN, 0).unflatten(1, (2, 3)).std(2)), (5, 4)),
    "layer_norm_of_equals": (after_linear(lambda y: F.layer_norm(y.masked_fill(HIDDEN, 1).unflatten(1, (2, 3)), (3,))), (5, 4)),
    "causal_attention": (lambda: Apply(nn.MultiheadAttention(4, 2, batch_first=True), lambda i, x: i(x, x, x, attn_mask=CAUSAL)[0]), (3, 5, 4)),
    "padded_attention": (lambda: Apply(nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True), lambda i, x: i(x, x, x, key_padding_mask=torch.arange(5).expand(3, 5) > 3)[0]), (3, 5, 4)),
    # one element in several places, or bias with rows of its own
    "overlapping_windows": (free(lambda m, x: x @ m.w.unfold(0, 4, 1), w=(7,)), (5, 4)),
    "strided_windows": (free(lambda m, x: x @ m.w.unfold(0, 4, 2).t()[:, :2], w=(7,)), (5, 4)),
    "as_strided": (free(lambda m, x: x @ m.w.as_strided((4, 4), (1, 1)), w=(7,)), (5, 4)),
    "addmm_matrix": (free(lambda m, x: torch.addmm(m.b, x, m.w), b=(5, 6), w=(4, 6)), (5, 4)),
    "addmm_tall": (free(lambda m, x: torch.addmm(m.b, x, m.w, beta=2, alpha=3), b=(6, 3), w=(4, 3)), (6, 4)),
    "addmm_row": (free(lambda m, x: torch.addmm(m.b, x, m.w), b=(1, 3), w=(4, 3)), (5, 4)),
    "addmm_column": (free(lambda m, x: torch.addmm(m.b, x, m.w), b=(5, 1), w=(4, 3)), (5, 4)),
    "expanded_bias": (free(lambda m, x: (x + m.b.expand(5, 4)) * m.b, b=(4,)), (5, 4)),
    "empty_parameters": (free(lambda m, x: x @ torch.cat([m.z, m.w]).t() + m.e.sum(), z=(0, 4), w=(3, 4), e=(0,)), (5, 4)),
    "empty_and_full": (after_linear(lambda y: torch.cat([torch.empty(0, dtype=y.dtype), y], 1)), (5, 4)),
    "strided_parameter": (lambda: Free(lambda m, x: x @ m.w, w=torch.randn(6, 8)[::2, ::2].t()), (5, 4)),
    # in-place writes
    "view_written": (free(lambda m, x: (lambda w: last(w[0].mul_(2), w[:, 1].add_(w[:, 0]), x @ w))(m.w.clone()), w=(4, 3)), (5, 4)),
    "slices_written": (after_conv(lambda y: last(y[:, 0].mul_(2), y[:, 1:3].add_(y[:, 0:1]), y[..., 0].zero_(), y[:, :, 1].copy_(y[:, :, 2]), y)), (3, 2, 6, 6)),
    "index_put": (after_linear(lambda y: y.index_put((torch.tensor([0, 0, 1]), torch.tensor([1, 1, 2])), y[:3, 0], accumulate=True)), (5, 4)),
    "scatter_add": (after_linear(lambda y: y.new_zeros(len(y), 3).scatter_add(1, torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(len(y), 6), y)), (5, 4)),
    # recurrent, embedding, complex, normalised weights
    "bidirectional_lstm": (lambda: Apply(nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True), lambda i, x: i(x)[0]), (3, 4, 4)),
    "bidirectional_gru": (lambda: Apply(nn.GRU(4, 3, batch_first=True, bidirectional=True), lambda i, x: i(x)[0]), (3, 4, 4)),
    "embedding_rows": (lambda: Apply(nn.Sequential(nn.Embedding(7, 3, padding_idx=0), nn.Linear(3, 2)), lambda i, x: i((3 * x.abs()).long() % 7)), (5, 4)),
    "embedding_bag": (lambda: Apply(nn.EmbeddingBag(7, 3, mode="max"), lambda i, x: i((3 * x.abs()).long() % 7)), (5, 4)),
    "fourier": (free(lambda m, x: torch.fft.irfft(torch.fft.rfft(x) @ torch.view_as_complex(m.w), n=4), w=(3, 3, 2)), (5, 4)),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), (5, 4)),
    "orthogonal": (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 3)), (5, 4)),
    "group_norm_over_blocks": (lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.GroupNorm(1, 4)), (3, 2, 5, 5)),
    "grouped_transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, groups=2, dilation=2), nn.ReLU(), nn.ConvTranspose2d(6, 3, 2, groups=3)), (3, 4, 3, 3)),
    "squeeze_and_excite": (lambda: Apply(nn.ModuleList([nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1)]), lambda i, x: (lambda y: y * i[1](y.mean((2, 3), keepdim=True)).sigmoid())(i[0](x))), (3, 2, 5, 5)),
    "negative_padding": (after_conv(lambda y: F.pad(y, (-1, 0, 1, -1, -1, 1))), (3, 2, 6, 6)),
    "bicubic": (after_conv(lambda y: F.interpolate(y, scale_factor=1.7, mode="bicubic")), (3, 2, 5, 5)),
    "nearest_exact": (after_conv(lambda y: F.interpolate(y, scale_factor=1.7, mode="nearest-exact")), (3, 2, 5, 5)),
    "straight_through": (after_linear(lambda y: F.one_hot(y.argmax(1), 6) * y + torch.where(y > 0, y, 0.0)), (5, 4)),
    "solve": (lambda: Free(lambda m, x: torch.linalg.solve(m.w, x.t()).t() * torch.linalg.det(m.w), w=torch.eye(4) + 0.1), (5, 4)),
    # only a small step stays positive definite
    "cholesky": (lambda: Free(lambda m, x: x @ torch.linalg.cholesky(2 * torch.eye(4, dtype=x.dtype) - torch.outer(m.w, m.w)), w=torch.ones(4) / 2), (5, 4)),
    # layout decides which element a dropout mask meets
    "transposed_dropout": (after_linear(lambda y: F.dropout(y.unflatten(1, (2, 3)).transpose(1, 2), 0.4)), (5, 4)),
    "channel_dropout": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Dropout2d(0.5)), (3, 2, 5, 5)),
    "encoder_with_dropout": (lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.3, batch_first=True), (3, 5, 4)),
}  # fmt: skip


def compare(module: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss = energy, mu: float = 5e-3) -> None:
    """Same random numbers, own copies of the inputs: a module may write into what it is given."""
    coordinates = {name: torch.arange(min(16, value.numel())) for name, value in module.named_parameters()}
    torch.manual_seed(1)
    found = cge(module, inputs.clone(), targets, loss, mu=mu, coordinates=coordinates)
    torch.manual_seed(1)
    expected = reference.cge(module, inputs.clone(), targets, loss, mu=mu, coordinates=coordinates)
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-8} if expected.outputs.dtype == torch.float64 else {"rtol": 1e-3, "atol": 2e-3}
    )
    for name, gradient in expected.gradients.items():
        assert gradient.isfinite().all()
        torch.testing.assert_close(
            found.gradients[name], gradient, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
    for name, buffer in expected.buffers.items():
        torch.testing.assert_close(found.buffers[name], buffer, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", TRACED)
def test_traced_and_right(name: str, training: bool) -> None:
    make, shape = TRACED[name]
    torch.manual_seed(0)
    module = make().double().train(training)
    inputs, targets = torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], dtype=torch.float64)
    assert prepare(module, inputs, targets, energy).untraced is None
    compare(module, inputs, targets)


LARGE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "softplus": F.softplus, "elu": F.elu, "logsigmoid": F.logsigmoid,
    "log": lambda y: (y.square() + 1).log(), "reciprocal": lambda y: 1 / (y.square() + 1), "cube": lambda y: y**3 / 1e6, "layer_norm": lambda y: F.layer_norm(y, (6,)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_large_differences(name: str, dtype: torch.dtype) -> None:
    """Inputs of 1e3 under a step of 5e-2 move activations by 50: far beyond every expansion."""
    torch.manual_seed(0)
    module = after_linear(LARGE[name])().to(dtype)
    inputs, targets = 1e3 * torch.randn(6, 4, dtype=dtype), torch.zeros(6, dtype=dtype)

    def first_moment(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs @ torch.linspace(-1, 1, 6, dtype=outputs.dtype) - targets

    found = cge(module, inputs, targets, first_moment, mu=5e-2).gradients
    module.double()
    expected = reference.cge(module, inputs.double(), targets.double(), first_moment, mu=5e-2).gradients
    tolerance = 1e-5 if dtype == torch.float64 else 1e-4
    for key, gradient in expected.items():
        assert (found[key] - gradient).norm() <= tolerance * gradient.norm()


@pytest.mark.parametrize("scale", [1e3, 1e4, 1e5])
@pytest.mark.parametrize("kind", ["softmax", "log_softmax"])
def test_large_logits(kind: str, scale: float) -> None:
    """A step of 5e-3 on inputs of this size moves the logits by 5 to 500: neither overflow nor 1 + S = 0."""
    torch.manual_seed(0)
    module = nn.Linear(4, 3).double()
    inputs, targets = scale * torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    losses: dict[str, Loss] = {
        "softmax": lambda outputs, t: (F.softmax(outputs, 1) * torch.arange(3.0).double()).sum(1).square(),
        "log_softmax": F.cross_entropy,
    }
    compare(module, inputs, targets, losses[kind])


MIXED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "product": lambda m, x: (x * m.w * m.s) @ m.v,
    "quotient": lambda m, x: (x * m.w / m.s).exp() @ m.v,
    "sum": lambda m, x: (x * m.w + m.s - m.s * 2) @ m.v,
    "where": lambda m, x: torch.where(x > 0, x * m.w, m.s).float() @ m.v,
    "joined": lambda m, x: torch.cat([x * m.w, (x * m.s).double()], 1).double()[:, 2:6].float() @ m.v,
    "cast": lambda m, x: ((x * m.w).double() * m.s).float() @ m.v,
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_types(name: str) -> None:
    """A float64 number among float32 tensors does not make the result float64, nor its change."""
    torch.manual_seed(0)
    module = Free(MIXED[name], w=torch.randn(4), s=torch.tensor(2.0, dtype=torch.float64), v=torch.randn(4, 3))
    inputs, targets = torch.randn(5, 4), torch.randn(5)
    assert prepare(module, inputs, targets, energy).untraced is None
    compare(module, inputs, targets, mu=2e-2)


def test_float64_loss_of_a_float32_module() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    compare(module, torch.randn(6, 4), torch.randn(6), lambda y, t: energy(y.double(), t.double()), mu=2e-2)


def test_channels_last() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.MaxPool2d(2))
    module.double().to(memory_format=torch.channels_last)
    inputs = torch.randn(3, 2, 7, 7, dtype=torch.float64).to(memory_format=torch.channels_last)
    compare(module, inputs, torch.randn(3, dtype=torch.float64))


class ClipsItself(nn.Module):
    """Writes into its weights and its input, as a max-norm constraint or an in-place normalisation does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.linear.weight[0].mul_(0.9)
        self.linear.bias.data.clamp_(-0.1, 0.1)
        return self.linear(x.sub_(0.5))


@pytest.mark.parametrize("estimator", [cge, reference.cge], ids=["engine", "reference"])
def test_what_a_module_writes_in_place_stays_in_the_query(estimator) -> None:
    torch.manual_seed(0)
    module = ClipsItself().double()
    inputs, targets = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    weight, bias, given = module.linear.weight.clone(), module.linear.bias.clone(), inputs.clone()
    estimator(module, inputs, targets, energy)
    assert torch.equal(module.linear.weight, weight)
    assert torch.equal(module.linear.bias, bias)
    assert torch.equal(inputs, given)
    compare(module, inputs, targets)


class Remembers(nn.Module):
    """Keeps an activation as a plain attribute and reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.mean = nn.Linear(4, 3), torch.zeros(3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.mean = 0 * self.mean + y.mean(0)
        return y - 2 * self.mean


def test_plain_attributes_keep_no_stand_ins_of_tracing() -> None:
    torch.manual_seed(0)
    module = Remembers().double()
    compare(module, torch.randn(5, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64))
    assert type(module.mean) is Tensor
    assert module.mean.isfinite().all()


def forward_hooked() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    module[0].register_forward_hook(lambda _, inputs, output: 2 * output)
    module[2].register_forward_pre_hook(lambda layer, inputs: (inputs[0] + layer.weight.sum(),))
    return module


def test_hooks_are_part_of_the_module() -> None:
    torch.manual_seed(0)
    compare(forward_hooked().double(), torch.randn(5, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64))


def nearly_singular() -> nn.Module:
    """Away from its parameters by more than a step, where the graph is compared, it fails."""
    return Free(lambda m, x: x @ torch.linalg.cholesky(m.w * torch.eye(4, dtype=x.dtype)), w=torch.full([4], 1e-4))


UNTRACED: dict[str, Callable[[], nn.Module]] = {
    "nearly_singular": nearly_singular,
    "compiled": lambda: torch.compile(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), backend="eager"),
    "number_of_a_parameter": lambda: Apply(nn.Linear(4, 3), lambda inner, x: inner(x) * float(inner.bias[0])),
    "random_of_a_parameter": lambda: Apply(nn.Linear(4, 3), lambda i, x: torch.bernoulli(i(x).sigmoid()) * i(x)),
    "cumulative_momentum": lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=None)),
}


@pytest.mark.parametrize("name", UNTRACED)
def test_untraced_with_a_warning_and_right(name: str) -> None:
    torch.manual_seed(0)
    module = UNTRACED[name]().double()
    inputs, targets = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compare(module, inputs, targets, mu=5e-5)
    assert any("cannot be traced" in str(warning.message) for warning in caught)
