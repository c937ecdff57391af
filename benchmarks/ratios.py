"""Layer-wise pruning ratios of ResNet-20 by ZO-GraSP, kept in `ratios.json`: made by `python -m benchmarks.ratios`.

192 directions per estimate, 25 samples per class, at initialisation, as in Chen et al. 2024. The samples are CIFAR-10's
where DEEPZERO_DATA_ROOT says that it is there, random images otherwise; the file says which.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core import draw_masks, layer_ratios, zo_grasp_scores
from deepzero_core.data import BatchSource, ImageStore, prepare
from deepzero_core.data.sources import DATA_ROOT
from deepzero_core.models import build_model

FILE = Path(__file__).with_name("ratios.json")
SPARSITIES = (0.8, 0.9, 0.95, 0.99)
QUERIES, PER_CLASS, CLASSES = 192, 25, 10


def resnet20() -> nn.Module:
    """The network at the initialisation that the ratios belong to."""
    return build_model("resnet20", in_channels=3, num_classes=CLASSES, image_size=32, seed=0)


def coordinates(module: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Flat indices of a mask drawn at the ratios of the file; biases and normalisation layers whole."""
    ratios = json.loads(FILE.read_text(encoding="utf-8"))["ratios"][str(sparsity)]
    masks = draw_masks(ratios, module, torch.Generator().manual_seed(0))
    return {name: mask.flatten().nonzero().squeeze(1) for name, mask in masks.items()}


def _samples() -> tuple[str, Tensor, Tensor]:
    if os.environ.get(DATA_ROOT):
        with tempfile.TemporaryDirectory() as home:
            store = ImageStore.open(prepare("cifar10", home=Path(home)).path)
            manifest = store.manifest
            source = BatchSource(store.split("train"), batch_size=1, seed=0, mean=manifest.mean, std=manifest.std)
            inputs, targets = source.per_class(PER_CLASS)
            return "CIFAR-10", inputs, targets
    inputs = torch.randn(PER_CLASS * CLASSES, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return "random images", inputs, torch.arange(CLASSES).repeat_interleave(PER_CLASS)


def made(inputs: Tensor, targets: Tensor, queries: int) -> Mapping[str, Any]:
    """The ratios by sparsity and parameter name."""
    generator = torch.Generator().manual_seed(0)
    scores = zo_grasp_scores(resnet20(), inputs, targets, F.cross_entropy, queries=queries, generator=generator)
    return {str(sparsity): layer_ratios(scores, sparsity) for sparsity in SPARSITIES}


def main() -> None:
    """Score the weights once and write the file."""
    data, inputs, targets = _samples()
    document = {
        "command": "python -m benchmarks.ratios",
        "data": data,
        "queries": QUERIES,
        "samples_per_class": PER_CLASS,
        "torch": torch.__version__,
        "ratios": made(inputs, targets, QUERIES),
    }
    FILE.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
