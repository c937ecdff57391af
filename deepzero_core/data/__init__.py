"""Images: sources, the memory-mapped store, and batches that are a function of (seed, epoch, index)."""

from deepzero_core.data.batches import Augmentation, Batch, BatchSource, normalise, to_tensor
from deepzero_core.data.manifest import SCHEMA_VERSION, Manifest
from deepzero_core.data.sources import Prepared, SourceInfo, available, prepare, prepared_stores
from deepzero_core.data.store import ImageStore, Split, verify, write_store
from deepzero_core.data.torchvision_compat import import_torchvision

__all__ = [
    "SCHEMA_VERSION",
    "Augmentation",
    "Batch",
    "BatchSource",
    "ImageStore",
    "Manifest",
    "Prepared",
    "SourceInfo",
    "Split",
    "available",
    "import_torchvision",
    "normalise",
    "prepare",
    "prepared_stores",
    "to_tensor",
    "verify",
    "write_store",
]
