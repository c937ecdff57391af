"""TLS for Dask: both sides show a certificate of one authority, and nothing goes over the wire in the clear."""

import os
import ssl
from pathlib import Path

from distributed.security import Security

from configs.clusters import TlsFiles
from deepzero_core.errors import RequestError

VARIABLES = {"ca": "DEEPZERO_TLS_CA", "cert": "DEEPZERO_TLS_CERT", "key": "DEEPZERO_TLS_KEY"}
_WHAT = {"ca": "the authority's certificate", "cert": "this side's certificate", "key": "its private key"}


def security_of(files: TlsFiles, *, what: str) -> Security:
    """Dask's settings for the three PEM files; `what` they are needed for begins the messages.

    Raises:
        RequestError: a file is not named, cannot be read, or the three do not belong together.
    """
    found = {name: _file(name, getattr(files, name), what) for name in VARIABLES}
    try:
        # What Dask would find out on the first connection, as a time-out.
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=str(found["ca"]))
        context.load_cert_chain(found["cert"], found["key"])
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{what}: the TLS files cannot be used together ({getattr(error, 'reason', None) or error}): needed are "
            "PEM files of an authority, a certificate signed by it, and the certificate's key"
        ) from None
    ca, cert, key = (str(found[name]) for name in ("ca", "cert", "key"))
    roles = {
        f"tls_{role}_{part}": path
        for role in ("client", "worker", "scheduler")
        for part, path in (("cert", cert), ("key", key))
    }
    return Security(tls_ca_file=ca, require_encryption=True, **roles)


def _file(name: str, given: Path | None, what: str) -> Path:
    variable = VARIABLES[name]
    path = given or (Path(os.environ[variable]) if os.environ.get(variable) else None)
    if path is None:
        raise RequestError(
            f"{what} needs {_WHAT[name]}: set tls.{name} in cluster.options, or {variable}, to a PEM file"
        )
    path = path.expanduser()
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise RequestError(f"{what}: {_WHAT[name]} {path} cannot be read: {error.strerror or error}") from None
    return path
