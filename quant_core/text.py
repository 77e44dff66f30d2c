"""Values as strict JSON, names of contents, and text without control characters."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any


def plain(value: Any) -> Any:
    """The value as strict JSON, which knows neither NaN nor infinity: they become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def printable(value: object) -> str:
    """Text from a model or a manifest with every control character as a visible escape."""
    text = str(value)
    if text.isprintable():  # as nearly every text is
        return text
    return "".join(map(_visible, text))


def storable(text: str) -> str:
    """The text with bytes of a file's name that are no UTF-8 as visible escapes."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def digest_of(content: bytes) -> str:
    """A name of the content, which no other has: 128 bits in hex."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def counted(number: int, noun: str) -> str:
    """How many there are: `1 node`, `3 nodes`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def joined(notes: Iterable[str | None]) -> str:
    """The notes that are not empty, as one line."""
    return "; ".join(filter(None, notes))


def _visible(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")
