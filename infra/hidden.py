"""Passwords in addresses, kept out of what is printed, logged and recorded."""

import re

_USER = re.compile(r"(?P<begin>\b[a-zA-Z][\w+.-]*://[^\s/:@\"']*):[^\s@\"']+@")


def hidden(text: str) -> str:
    """The text with "…" for the password of every address: errors of other libraries repeat the address they tried."""
    return _USER.sub(r"\g<begin>:…@", text)
