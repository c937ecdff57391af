"""How exactly products are computed on a device."""

from collections.abc import Iterator

import pytest
import torch

from deepzero_core.perturb.machine import full_float32


@pytest.fixture
def tf32() -> Iterator[None]:
    """TF32 as torch allows it to cuDNN by default, and everything back afterwards."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision(before[1])
    torch.backends.cudnn.allow_tf32 = before[0]


def test_tf32_is_off_on_a_cuda_device_and_as_it_was_afterwards(tf32: None) -> None:
    with full_float32(torch.device("cuda")):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    with full_float32(torch.device("cpu")):
        assert torch.backends.cudnn.allow_tf32


def test_who_asks_for_tf32_gets_it(tf32: None) -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    with full_float32(torch.device("cuda")):
        assert torch.backends.cudnn.allow_tf32
