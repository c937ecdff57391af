"""A defended classifier written in MLflow's pyfunc format, to be loaded, served and asked for certified answers."""

import json
import logging
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.entities import LoggedModel

import deepzero_core
import infra
from configs.defence import Defence
from deepzero_core.data import ImageStore, to_tensor
from deepzero_core.errors import WorkError
from infra.served import DESCRIPTION, DefendedClassifier
from tasks.certify import settings_of
from tasks.environment import version
from tasks.records import Defended, Prepared, Victim
from tasks.tracking import Run
from tasks.victim import victim_of

_NEEDS = ("mlflow", "torch", "numpy", "pandas", "scipy")
_NEEDS_OF = {"onnx": ("onnxruntime",), "http": ("httpx", "tenacity"), "mlflow": ("httpx", "tenacity")}


def log_defended(run: Run, defence: Defence, prepared: Prepared, victim: Victim, defended: Defended) -> str:
    """Log x ↦ (class, certified radius, abstention) as the model "defended"; its URI.

    What was written is read again and asked once.

    Raises:
        WorkError: MLflow did not take it.
    """
    example = to_tensor(ImageStore.open(prepared.store).split("test").images[:1]).numpy()
    return run.saved_model(
        "defended", lambda path, logged: _save(path, logged, run.run_id, defence, prepared, victim, defended, example)
    )


def _save(
    path: Path,
    logged: LoggedModel,
    run_id: str,
    defence: Defence,
    prepared: Prepared,
    victim: Victim,
    defended: Defended,
    example: np.ndarray,
) -> None:
    with warnings.catch_warnings():
        # MLflow's own type hints, seen when this part of it is imported for the first time.
        warnings.filterwarnings("ignore", message=".*[Aa]ny type hint is inferred as AnyType", category=UserWarning)
        import mlflow.pyfunc
    # It says of every example that it validates it.
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    certification = defence.certification
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, *example.shape[1:]))]),
        outputs=Schema(
            [
                ColSpec(DataType.long, "label"),
                ColSpec(DataType.string, "class"),
                ColSpec(DataType.double, "radius"),
                ColSpec(DataType.boolean, "abstained"),
                ColSpec(DataType.double, "p_lower"),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec("n0", DataType.long, certification.n0),
                ParamSpec("n", DataType.long, certification.n),
                ParamSpec("alpha", DataType.double, certification.alpha),
                ParamSpec("seed", DataType.long, 0),
            ]
        ),
    )
    with tempfile.TemporaryDirectory(prefix="deepzero-defended-") as temporary:
        folder = Path(temporary) / "defended"
        folder.mkdir()
        _write(folder, defence, prepared, victim, defended)
        mlflow.pyfunc.save_model(
            path,
            loader_module="infra.served",
            data_path=str(folder),
            code_paths=[str(Path(package.__file__ or "").parent) for package in (deepzero_core, infra)],
            mlflow_model=Model(
                artifact_path=logged.artifact_location,
                model_uuid=logged.model_id,
                model_id=logged.model_id,
                run_id=run_id,
            ),
            signature=signature,
            input_example=(example, {"n0": 1, "n": 10, "alpha": 0.5}),
            # Named, because finding them out takes seconds; without build tags, which no index has.
            pip_requirements=[
                f"{name}=={version(name).partition('+')[0]}" for name in (*_NEEDS, *_NEEDS_OF.get(victim.kind, ()))
            ],
        )
        answer = DefendedClassifier(folder).predict(example, {"n0": 1, "n": 10, "alpha": 0.5})
    if len(answer) != 1:
        raise WorkError("the logged classifier gives another number of answers than it is asked for")


def _write(folder: Path, defence: Defence, prepared: Prepared, victim: Victim, defended: Defended) -> None:
    """The folder that `infra.served` reads."""
    described: dict[str, Any] = dict(victim_of(defence, victim)) | {"account": None}
    if victim.kind == "trained":
        shutil.copyfile(described["weights"], folder / "victim.pt")
        described["weights"] = "victim.pt"
    else:
        described |= {"cache": None, "settings": {k: v for k, v in described["settings"].items() if k != "budget"}}
    if defended.weights is not None:
        shutil.copyfile(defended.weights, folder / "purifier.pt")
    settings = vars(settings_of(defence.certification))
    description = {
        "victim": described,
        "purifier": defended.purifier,
        "weights": None if defended.weights is None else "purifier.pt",
        "image_shape": prepared.image_shape,
        "class_names": prepared.class_names,
        "certification": {**settings, "radii": list(settings["radii"])},
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2), encoding="utf-8")
