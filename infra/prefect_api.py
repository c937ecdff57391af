"""Talking to a Prefect server that may not be there: answers within seconds, or one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from deepzero_core.errors import RequestError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

_PATIENCE_S = 15.0


@contextmanager
def client_of(api_url: str) -> "Iterator[SyncPrefectClient]":
    """A client of the Prefect server at `api_url`, such as http://127.0.0.1:4200/api.

    Raises:
        RequestError: no Prefect server answers there, or it wants a password; also when it goes away later.
    """
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import (
        PREFECT_API_REQUEST_TIMEOUT,
        PREFECT_API_URL,
        PREFECT_CLIENT_MAX_RETRIES,
        temporary_settings,
    )

    settings = {
        PREFECT_API_URL: api_url,
        PREFECT_API_REQUEST_TIMEOUT: _PATIENCE_S,
        PREFECT_CLIENT_MAX_RETRIES: 1,
    }
    shown = without_password(api_url)
    try:
        with temporary_settings(settings), get_client(sync_client=True) as client:
            if client.request("GET", "/health").json() is not True:
                raise RequestError(f"what answers at {shown} is no Prefect server; its address ends in /api")
            yield client
    except httpx.TransportError as error:
        raise RequestError(
            f"no Prefect server answers at {shown} ({type(error).__name__}); `deepzero up` starts one, "
            "and $PREFECT_API_URL names another"
        ) from error
    except PrefectHTTPStatusError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise RequestError(
                f"the Prefect server at {shown} wants user:password; $PREFECT_API_AUTH_STRING is the place for it"
            ) from error
        if str(error.request.url).endswith("/health"):
            raise RequestError(
                f"what answers at {shown} is no Prefect server (status {status}); its address ends in /api"
            ) from error
        raise
    except ValueError as error:
        if type(error).__name__ != "JSONDecodeError":
            raise
        raise RequestError(f"what answers at {shown} is no Prefect server; its address ends in /api") from error


def without_password(url: str) -> str:
    address = urlsplit(url)
    return url.replace(f":{address.password}@", ":…@") if address.password else url
