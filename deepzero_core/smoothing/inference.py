"""A network as fast as it goes without changing what it computes, for the many forward passes of a certification.

    folded      an evaluation-mode BatchNorm behind a convolution is a scale and a shift of it: γ s (W·x + b − m) + β
    laid out    channels last, as convolutions and pooling are fastest on a processor
    sliced      a batch goes through in pieces whose largest value stays in the caches; every piece has the same size,
                the last one filled up with blanks
    apart       of several threads each takes whole pieces, so that none waits for another at every layer
    late        where a ReLU stands before a maximum over pixels, behind it: a quarter of the values, the same result
    pooled      2×2 maxima are taken of rows and then of columns, whole vectors at a time
    by columns  a linear layer multiplies images as columns: as rows, the last bit of a score may depend on the row

With the last two a copy's scores do not depend on the batch it came in.

Folding rounds differently: scores agree to about six digits. What is certified is this network; the same on every
machine and for every number of workers, since nothing here is chosen by measuring.
"""

import copy
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from deepzero_core.errors import RequestError

SLICE_BYTES = 4 << 20
"""Of the largest value of a pass: with its neighbours it fills a second-level cache and a share of the third."""
LEAST, MOST = 16, 512
"""Images per slice: fewer do not pay for the calls of the layers."""
_AGREEMENT = 1e-3


class Inference(nn.Module):
    """[N, …] → the module's scores [N, K], by a private copy in evaluation mode.

    module: any; one that cannot be traced is sliced and laid out and not folded. example: one image without the batch
    axis, whose size decides the slices.

    RequestError: the module cannot take the example.
    """

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        super().__init__()
        plain = copy.deepcopy(module).eval()
        probe = example.new_zeros(2, *example.shape)
        probe[1] = example
        try:
            with torch.no_grad():
                expected, largest = _observed(plain, probe)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise RequestError(
                f"the network cannot take images of shape {list(example.shape)}: {str(error).strip().splitlines()[0]}"
            ) from error
        self.net = _replaced(_folded(plain))
        with torch.no_grad():
            if not torch.allclose(self.net(probe), expected, rtol=_AGREEMENT, atol=_AGREEMENT):
                self.net = _replaced(plain)
        self._planar = example.ndim == 3
        if self._planar:
            self.net = self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        on_processor = example.device.type == "cpu"
        self.slice = _slice(largest) if on_processor else None
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        if self._planar:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.slice is None:
            scores: Tensor = self.net(images)
            return scores
        pieces, threads = images.split(self.slice), torch.get_num_threads()
        together = threads > 1 and len(pieces) > 1
        parts = list(_threads(threads).map(self._scores, pieces) if together else map(self._scores, pieces))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.no_grad()
    def _scores(self, part: Tensor) -> Tensor:
        assert self.slice is not None
        missing = self.slice - len(part)
        if not missing:
            return self.net(part)  # type: ignore[no-any-return]
        blank = part.new_zeros(missing, *part.shape[1:])
        return self.net(torch.cat([part, blank]))[: len(part)]  # type: ignore[no-any-return]


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Threads that compute alone each."""
    pool, started = ThreadPoolExecutor(count, "inference"), threading.Barrier(count + 1)

    def alone() -> None:
        torch.set_num_threads(1)
        started.wait()

    for _ in range(count):
        pool.submit(alone)
    started.wait()
    torch.set_num_threads(count)  # of threads that begin later; torch keeps it for the process and for each thread
    return pool


def _slice(largest: int) -> int:
    """A power of two of images: the largest value fits SLICE_BYTES, and filling up the last slice costs little."""
    size = MOST
    while size > LEAST and size * largest > SLICE_BYTES:
        size //= 2
    return size


def _observed(module: nn.Module, images: Tensor) -> tuple[Tensor, int]:
    """Scores, and the bytes that the largest result of any layer takes per image."""
    largest = 0

    def see(_: nn.Module, __: object, result: object) -> None:
        nonlocal largest
        if isinstance(result, Tensor):
            largest = max(largest, result.numel() * result.element_size() // len(images))

    handles = [part.register_forward_hook(see) for part in module.modules()]
    try:
        scores: Tensor = module(images)
    finally:
        for handle in handles:
            handle.remove()
    return scores, largest


def _folded(module: nn.Module) -> nn.Module:
    """The module with every BatchNorm folded that alone reads a convolution, and every ReLU behind the pooling that
    alone reads it; itself where it is not traced."""
    try:
        traced = fx.symbolic_trace(copy.deepcopy(module))
    except Exception:  # whatever a stranger's forward does with symbols: it runs as it is
        return module
    parts = dict(traced.named_modules())
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    for node in list(traced.graph.nodes):
        before = node.args[0] if node.args else None
        if not (isinstance(before, fx.Node) and node.op == before.op == "call_module" and len(before.users) == 1):
            continue
        first, second = parts[str(before.target)], parts[str(node.target)]
        once = calls.count(before.target) == calls.count(node.target) == 1
        if type(first) is nn.ReLU and type(second) is nn.MaxPool2d and not second.return_indices:
            node.replace_all_uses_with(before)
            node.args, before.args = before.args, (node,)
            node.append(before)
            continue
        folds = isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d) and second.running_var is not None
        if once and folds:
            fused = fuse_conv_bn_eval(first, second)
            parent, _, name = str(before.target).rpartition(".")
            setattr(traced.get_submodule(parent), name, fused)
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced.eval()


class _ByColumns(nn.Linear):
    """W xᵀ, transposed, of images x [N, F]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 2:
            return F.linear(x, self.weight, self.bias)
        products = torch.mm(self.weight, x.t()).t()
        return products if self.bias is None else products + self.bias


class _Halved(nn.Module):
    """The maximum of every 2×2 pixels, [N, C, H, W] → [N, C, ⌊H/2⌋, ⌊W/2⌋]."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2] // 2 * 2, x.shape[-1] // 2 * 2
        rows = torch.maximum(x[..., 0:height:2, :], x[..., 1:height:2, :])
        return torch.maximum(rows[..., 0:width:2], rows[..., 1:width:2])


_TWO = ((2, 2), (2, 2), (0, 0), (1, 1), False, False)


def _replaced(module: nn.Module) -> nn.Module:
    """The module with its own linear and 2×2 pooling layers replaced; heirs of them, which may do more, stay."""
    for parent in list(module.modules()):
        for name, part in list(parent.named_children()):
            setattr(parent, name, _better(part))
    return _better(module)


def _better(layer: nn.Module) -> nn.Module:
    if type(layer) is nn.Linear:
        return _ByColumns(layer)
    if type(layer) is nn.MaxPool2d:
        sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        pairs = tuple((size, size) if isinstance(size, int) else size for size in sizes)
        if (*pairs, layer.ceil_mode, layer.return_indices) == _TWO:
            return _Halved()
    return layer
