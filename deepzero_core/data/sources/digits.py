"""Handwritten digits that come with scikit-learn: real images without a download."""

import numpy as np

from deepzero_core.data.sources.base import RawData, Request, Source, SourceInfo, register
from deepzero_core.data.sources.splitting import stratified_split

_LEVELS = 16


def read(request: Request) -> RawData:
    """1,437 train and 360 test images, uint8 [N, 1, 8, 8]: the 17 grey levels v as round(v·255/16)."""
    # scikit-learn takes a second to import, and only this function needs it.
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / _LEVELS)).astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int64)
    train, test = stratified_split(labels, name=request.name)
    return RawData(
        splits={"train": (images[train], labels[train]), "test": (images[test], labels[test])},
        source="Optical Recognition of Handwritten Digits, UCI (Alpaydin and Kaynak 1998), as shipped by scikit-learn",
        class_names=tuple(str(name) for name in digits.target_names),
    )


register(
    Source(
        SourceInfo("digits", "handwritten digits, 8x8 grey, 10 classes", "CC BY 4.0", ""),
        read,
    )
)
