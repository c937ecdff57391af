"""Passwords, keys and database addresses: from environment variables, or from the files that `…_FILE` variables name.

They are handed on in environments only: a command line can be read by every user of the machine, and state files and
logs are copied and sent around.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deepzero_core.errors import RequestError

PREFECT_AUTH = "PREFECT_SERVER_API_AUTH_STRING"
MLFLOW_USER = "MLFLOW_TRACKING_USERNAME"
MLFLOW_PASSWORD = "MLFLOW_TRACKING_PASSWORD"
MLFLOW_KEY = "MLFLOW_FLASK_SERVER_SECRET_KEY"
PREFECT_DATABASE = "DEEPZERO_PREFECT_DATABASE"
MLFLOW_DATABASE = "DEEPZERO_MLFLOW_DATABASE"
TLS = ("DEEPZERO_TLS_CA", "DEEPZERO_TLS_CERT", "DEEPZERO_TLS_KEY")
NAMES = (PREFECT_AUTH, MLFLOW_USER, MLFLOW_PASSWORD, MLFLOW_KEY, PREFECT_DATABASE, MLFLOW_DATABASE)
# Under these names clients of Prefect look for the same string.
CLIENT_PREFECT_AUTH = "PREFECT_API_AUTH_STRING"

_SHORTEST_PASSWORD = 12  # MLflow's own rule


@dataclass(frozen=True)
class Secrets:
    """values: variable -> secret, those that were given. tls: the three certificate files, or empty."""

    values: Mapping[str, str]
    tls: tuple[Path, ...]

    def __repr__(self) -> str:
        return f"Secrets({', '.join(sorted(self.values))})"

    @property
    def mlflow_auth(self) -> bool:
        return all(name in self.values for name in (MLFLOW_USER, MLFLOW_PASSWORD, MLFLOW_KEY))

    @property
    def prefect_auth(self) -> bool:
        return PREFECT_AUTH in self.values

    def missing(self) -> list[str]:
        """What would have to be given before anybody else may reach the services."""
        wanted = [f"${name}" for name in (PREFECT_AUTH, MLFLOW_USER, MLFLOW_PASSWORD, MLFLOW_KEY)]
        lacking = [name for name in wanted if name[1:] not in self.values]
        return lacking if self.tls else [*lacking, *(f"${name}" for name in TLS)]

    def hide(self, text: str) -> str:
        """The text without the secrets, should one have got into it."""
        for value in self.values.values():
            text = text.replace(value, "…")
        return _PASSWORD_IN_URL.sub(r"\1…\2", text)


_PASSWORD_IN_URL = re.compile(r"(\w://[^/\s:@]*:)[^@/\s]+(@)")


def read(files: Mapping[str, str] | None = None) -> Secrets:
    """Every secret that the environment, or a file it names, holds.

    Args:
        files: variable -> file, for those that the environment says nothing of.

    Raises:
        RequestError: a file cannot be read or is empty, a variable is given twice, or a value cannot be right.
    """
    values = {name: value for name in NAMES if (value := _value(name, files or {})) is not None}
    if ":" not in values.get(PREFECT_AUTH, ":"):
        raise RequestError(f"${PREFECT_AUTH} must have the form user:password")
    if len(values.get(MLFLOW_PASSWORD, "x" * _SHORTEST_PASSWORD)) < _SHORTEST_PASSWORD:
        raise RequestError(f"${MLFLOW_PASSWORD} must have at least {_SHORTEST_PASSWORD} characters, as MLflow demands")
    for name in (PREFECT_DATABASE, MLFLOW_DATABASE):
        if name in values and not values[name].startswith(("postgresql://", "postgresql+", "postgres://")):
            raise RequestError(
                f"${name} must be the address of a PostgreSQL database: postgresql://user:password@host/name"
            )
    return Secrets(values, _tls())


def named_files() -> dict[str, str]:
    """Variable -> absolute path, for the secrets that are given as files."""
    return {name: str(Path(path).expanduser().absolute()) for name in NAMES if (path := os.environ.get(f"{name}_FILE"))}


def tls_files() -> dict[str, str]:
    """Variable -> absolute path of Dask's certificate files, where they are given. RequestError as `read`."""
    return dict(zip(TLS, map(str, _tls()), strict=False))


def variables() -> set[str]:
    """The names of all variables that hold secrets or name files of them."""
    return {*NAMES, CLIENT_PREFECT_AUTH, *(f"{name}_FILE" for name in NAMES)}


def _value(name: str, files: Mapping[str, str]) -> str | None:
    given, file = os.environ.get(name), os.environ.get(f"{name}_FILE")
    if given and file:
        raise RequestError(f"both ${name} and ${name}_FILE are set; keep one of them")
    if given:
        return given
    path = file or files.get(name)
    if not path:
        return None
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise RequestError(f"the file that ${name}_FILE names, {path}, cannot be read: {reason}") from None
    if not text:
        raise RequestError(f"the file that ${name}_FILE names, {path}, is empty")
    return text


def _tls() -> tuple[Path, ...]:
    given = {name: os.environ[name] for name in TLS if os.environ.get(name)}
    if not given:
        return ()
    if len(given) < len(TLS):
        absent = ", ".join(f"${name}" for name in TLS if name not in given)
        raise RequestError(f"Dask's TLS needs {' and '.join(f'${name}' for name in TLS)} together; {absent} is not set")
    for name, path in given.items():
        if not Path(path).expanduser().is_file():
            raise RequestError(f"${name} names {path}, which is no file")
    return tuple(Path(path).expanduser().absolute() for path in given.values())
