"""A defended classifier as MLflow loads and serves it: images in; class, certified radius and abstention out.

MLflow calls `_load_pyfunc` with the folder that `tasks.tracking_defended` has written: description.json and weights. No
code is read from it, and no pickle.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from deepzero_core.errors import RequestError
from deepzero_core.smoothing import Certification, certify_many
from deepzero_core.training.sources import step_generator
from infra.classifiers import defended

DESCRIPTION = "description.json"


class DefendedClassifier:
    """Randomised smoothing of x ↦ f(D(x)).

    predict(images [N, C, H, W] in [0, 1]) → one row per image:
        label      the class's number, −1 where it abstains
        class      its name, empty where it abstains
        radius     ℓ₂, in units of the images; 0 where it abstains
        abstained  whether it does
        p_lower    the lower bound on the probability of the class under noise
    params: sigma is fixed by training; n0, n, alpha and seed may be given.
    """

    def __init__(self, folder: Path) -> None:
        self._description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        self._folder = folder
        self._shape = tuple(self._description["image_shape"])
        self._classifier = defended(torch.zeros(self._shape), **self._located())

    def predict(self, images: Any, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """See the class. RequestError: images of another shape, or a parameter out of range."""
        batch = torch.from_numpy(np.array(images, dtype=np.float32))
        if tuple(batch.shape[1:]) != self._shape:
            raise RequestError(f"images must have the shape [N, {', '.join(map(str, self._shape))}], not {batch.shape}")
        given = self._description["certification"] | (params or {})
        seed = int(given.pop("seed", 0))
        settings = Certification(**given | {"radii": tuple(given["radii"])})
        generators = (step_generator(seed, number) for number in range(len(batch)))
        found = list(certify_many(self._classifier, iter(batch), settings, generators=generators))
        names = self._description["class_names"]
        return pd.DataFrame(
            {
                "label": [c.label for c in found],
                "class": ["" if c.abstained else names[c.label] for c in found],
                "radius": [c.radius for c in found],
                "abstained": [c.abstained for c in found],
                "p_lower": [c.p_lower for c in found],
            }
        )

    def _located(self) -> dict[str, Any]:
        """Arguments of `defended`, with the files where they lie now."""
        victim, weights = dict(self._description["victim"]), self._description["weights"]
        if "weights" in victim:
            victim["weights"] = str(self._folder / victim["weights"])
        return {
            "victim": victim,
            "purifier": self._description["purifier"],
            "weights": None if weights is None else str(self._folder / weights),
        }


def _load_pyfunc(path: str) -> DefendedClassifier:
    return DefendedClassifier(Path(path))
