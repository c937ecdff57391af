"""A network written in MLflow's format so that it gives the same scores when it is read again."""

import copy
import warnings
from pathlib import Path

import torch
from mlflow.entities import LoggedModel
from torch import Tensor, nn

from deepzero_core.errors import WorkError
from tasks.environment import version
from tasks.tracking_store import STORE_ERRORS, one_line


def save_model(module: nn.Module, example: Tensor, path: Path, logged: LoggedModel, run_id: str) -> None:
    """Write `module`, in eval mode and on the CPU, into the new folder `path`; the module itself is left as it is.

    The format is pt2 (torch.export, no pickle) with the batch axis left open. What was written is read again and
    compared.

    Args:
        module: network from [N, …] to [N, K].
        example: inputs, float32 [N, …], N ≥ 1.
        path: folder to be made.
        logged: the model's entry in the store.
        run_id: of the run that trained it.

    Raises:
        WorkError: the network cannot be exported, or would not give the same scores after loading.
    """
    with warnings.catch_warnings():
        # MLflow's own type hints, seen when this part of it is imported for the first time.
        warnings.filterwarnings("ignore", message=".*[Aa]ny type hint is inferred as AnyType", category=UserWarning)
        import mlflow.pyfunc
    import mlflow.pytorch
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import Schema, TensorSpec

    network = copy.deepcopy(module).cpu().eval()
    # Two examples: an axis of length one is taken for a constant by the export.
    pair = torch.cat([example, example])[:2].detach().cpu().contiguous()
    with torch.no_grad():
        scores = network(pair)
    inputs, outputs = (Schema([TensorSpec(tensor.numpy().dtype, (-1, *tensor.shape[1:]))]) for tensor in (pair, scores))
    try:
        mlflow.pytorch.save_model(
            network,
            path,
            mlflow_model=Model(
                artifact_path=logged.artifact_location,
                model_uuid=logged.model_id,
                model_id=logged.model_id,
                run_id=run_id,
            ),
            signature=ModelSignature(inputs=inputs, outputs=outputs),
            input_example=pair.numpy(),
            # Named, because finding them out takes seconds; without build tags, which no index has.
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in ("mlflow", "torch", "numpy")],
            serialization_format="pt2",
        )
        loaded = mlflow.pytorch.load_model(str(path))
        several = torch.cat([pair, pair, pair[:1]])
        with torch.no_grad():
            same = all(torch.allclose(loaded(batch), network(batch), atol=1e-5) for batch in (several, pair[:1]))
    except STORE_ERRORS:
        raise
    except Exception as error:  # whatever torch.export, or a network it has specialised, raises
        raise WorkError(f"torch.export cannot take this network for every size of batch: {one_line(error)}") from error
    if not same:
        raise WorkError("the exported network gives other scores than the one that was trained")
