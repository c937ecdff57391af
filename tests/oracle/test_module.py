"""A network behind the protocol: its values to the last bit, nothing else of it."""

import pickle

import pytest
import torch
from scoring import images, network
from torch import Tensor, nn

from deepzero_core.errors import RequestError, WorkError
from deepzero_core.oracle import ModuleOracle


class Leaky(nn.Module):
    """Switches gradients on for itself and works in place on what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            for parameter in self.inner.parameters():
                parameter.requires_grad_(True)
            return self.inner(x.mul_(2).requires_grad_(True))


class Whole(nn.Module):
    """Labels where scores are wanted."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).argmax(1)


@pytest.mark.parametrize("module", [network(), Leaky()], ids=["plain", "one that switches gradients on"])
def test_no_gradient_leaks(module: nn.Module) -> None:
    box = ModuleOracle(module)
    x = images(4).requires_grad_(True)
    before = x.detach().clone()
    with torch.enable_grad():
        answer = box.query(x)
        assert not answer.requires_grad
        assert answer.grad_fn is None
        with pytest.raises(RuntimeError, match="does not require grad"):
            answer.sum().backward()
        # Beside something that does have a gradient, the box gives none of it.
        (answer.sum() * x.sum()).backward()
    torch.testing.assert_close(x.grad, answer.sum().expand_as(x))
    assert torch.equal(x.detach(), before)
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap], ids=["grad", "vmap"])
def test_a_transform_is_refused(transform: object) -> None:
    box = ModuleOracle(network())
    with pytest.raises(RequestError, match="as_layer"):
        transform(lambda x: box.query(x).sum())(images(2)[None] if transform is torch.func.vmap else images(2))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_forward_mode_is_refused() -> None:
    import torch.autograd.forward_ad as forward_mode

    with forward_mode.dual_level(), pytest.raises(RequestError, match="as_layer"):
        ModuleOracle(network()).query(forward_mode.make_dual(images(2), images(2)))


def test_the_callers_module_is_left_alone_and_cannot_reach_in() -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(1), network()).train()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    box = ModuleOracle(module)
    first = box.query(images(8))
    assert torch.equal(first, box.query(images(8))), "eval mode: no mask is drawn"
    assert all(child.training for child in (module, module[0], module[1]))
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(box.query(images(8)), first)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_types(kind: torch.dtype) -> None:
    module = network().to(kind)
    answer = ModuleOracle(module).query(images(3).double())
    assert answer.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
    with torch.no_grad():
        assert torch.equal(answer, module(images(3).to(kind)).to(answer.dtype))


def test_identity_is_that_of_the_weights() -> None:
    one, same, other = network(), network(), network()
    with torch.no_grad():
        other[3].bias[0] += 1e-6
    assert ModuleOracle(one).identity == ModuleOracle(same).identity
    strided = network()
    strided[0].dilation = (2, 2)
    assert len({ModuleOracle(module).identity for module in (one, other, strided)}) == 3


def test_it_travels() -> None:
    box = ModuleOracle(network(), batch_size=4)
    assert torch.equal(pickle.loads(pickle.dumps(box)).query(images(2)), box.query(images(2)))


def test_refusals() -> None:
    box = ModuleOracle(network(), batch_size=2, name="mine")
    for wrong, sentence in [
        (images(3), "the black box mine takes at most 2"),
        (images(0), r"not shape \[0, 1, 4, 4\]"),
        (torch.zeros(3), r"not shape \[3\]"),
        ([[1.0]], "not list"),
    ]:
        with pytest.raises(RequestError, match=sentence):
            box.query(wrong)
    with pytest.raises(WorkError, match=r"mine failed on a question of shape \[2, 5, 4, 4\]: RuntimeError"):
        box.query(torch.zeros(2, 5, 4, 4))
    with pytest.raises(RequestError, match=r"int64 .*looks like labels"):
        ModuleOracle(Whole()).query(images(2))
    with pytest.raises(RequestError, match="must have the form"):
        ModuleOracle("nonsense")
    with pytest.raises(RequestError, match=r"is a torch\.nn\.Module, not a OrderedDict"):
        ModuleOracle("collections:OrderedDict")
    assert torch.equal(ModuleOracle("scoring:network").query(images(2)), box.query(images(2)))
