"""Where state lives: data stores, checkpoints, the MLflow store and logs all lie below one folder."""

import os
from pathlib import Path

from deepzero_core.errors import RequestError

VARIABLE = "DEEPZERO_HOME"


def home() -> Path:
    """The absolute path of the state folder: $DEEPZERO_HOME, or the place the operating system has for such data.

    Nothing is created here. RequestError when the path cannot be a folder.
    """
    given = os.environ.get(VARIABLE, "")
    if given:
        try:
            path = Path(given).expanduser().absolute()
            blocked = path.exists() and not path.is_dir()
        except (OSError, RuntimeError, ValueError) as error:
            raise RequestError(f"{VARIABLE}={given!r} is not a usable path: {error}") from error
    else:
        import platformdirs

        path = platformdirs.user_data_path("deepzero", appauthor=False).absolute()
        blocked = path.exists() and not path.is_dir()
    if blocked:
        raise RequestError(f"{path} must be a folder for deepzero's state, but is a file; set {VARIABLE} to a folder")
    return path


def logs(base: Path) -> Path:
    """Folder of the logs that unexpected failures leave behind."""
    return base / "logs"


def stores(base: Path) -> Path:
    """Folder of the prepared data stores."""
    return base / "data"


def mlflow_database(base: Path) -> Path:
    """SQLite file of the MLflow tracking store."""
    return base / "mlflow.db"


def mlflow_artifacts(base: Path) -> Path:
    """Folder of the MLflow artifacts."""
    return base / "mlartifacts"
