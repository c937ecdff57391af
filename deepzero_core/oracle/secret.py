"""A token that is read when it is needed, sent in a header, and shown to nobody."""

import os
from dataclasses import dataclass
from pathlib import Path

from deepzero_core.errors import RequestError

_BEARER = "Authorization"


@dataclass(frozen=True)
class Token:
    """Where a token is, never the token itself: settings can be printed, stored and sent to workers.

    env:    the environment variable that holds it; or
    file:   the file that holds it and nothing else.
    header: the header it goes into; in Authorization it stands after the word Bearer.
    """

    env: str | None = None
    file: str | None = None
    header: str = _BEARER

    def read(self) -> str:
        """The token, "" where none is set up.

        Raises:
            RequestError: the variable or the file is not there, is empty, or holds what no header can carry.
        """
        if self.env is not None and self.file is not None:
            raise RequestError("a token comes from an environment variable or from a file, not from both")
        if self.env is not None:
            where, text = f"the environment variable {self.env}", os.environ.get(self.env)
            if text is None:
                raise RequestError(f"the token should be in {where}, which is not set")
        elif self.file is not None:
            where = f"the file {self.file}"
            try:
                text = Path(self.file).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                why = error.strerror if isinstance(error, OSError) else "it is not text"
                raise RequestError(f"the token in {where} cannot be read: {why}") from None
        else:
            return ""
        token = text.strip()
        if not token:
            raise RequestError(f"the token in {where} is empty")
        if not all("!" <= letter <= "~" for letter in token):
            raise RequestError(f"the token in {where} holds spaces or characters that no header can carry")
        return token

    def headers(self) -> dict[str, str]:
        """The header that carries it; none where there is no token."""
        token = self.read()
        if not token:
            return {}
        return {self.header: f"Bearer {token}" if self.header.lower() == _BEARER.lower() else token}
