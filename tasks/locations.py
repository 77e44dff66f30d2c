"""Where a file or folder is: a local path, or a URL of a store such as `s3://bucket/model.onnx`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
LOCAL = ("file", "local")
MODELS = "*.[oO][nN][nN][xX]"  # the models in a folder, as a glob


@dataclass(frozen=True, slots=True, order=True)
class Url:
    """The URL of a file or folder in a store, with what `Path` has for a local one."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, below: str | PurePath) -> Url:
        # The text of a key counts: to a store, a//b is another one than a/b.
        key = below if isinstance(below, str) else "/".join(below.parts)
        return Url(f"{self.text}/{key}") if key else self

    @property
    def scheme(self) -> str:
        return self.text.partition("://")[0].lower()

    @property
    def parts(self) -> tuple[str, ...]:
        """The store, then the names of folders and file."""
        return tuple(part for part in self.text.partition("://")[2].split("/") if part)

    @property
    def name(self) -> str:
        return self.parts[-1] if self.parts else ""

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> Url:
        """The folder; a store is its own."""
        is_store = len(self.parts) < 2
        return self if is_store else Url(self.text.rstrip("/").rpartition("/")[0])

    def with_name(self, name: str) -> Url:
        return self.parent / name

    def relative_to(self, folder: Url) -> PurePosixPath:
        """The place below a folder. Raises: ValueError if it is elsewhere."""
        return PurePosixPath(*self.parts).relative_to(PurePosixPath(*folder.parts))


Location = Path | Url


def is_url(text: str) -> bool:
    """Whether the text names a file in a store; `file://` is a local one."""
    return URL.match(text) is not None and Url(text).scheme not in LOCAL


def location(text: str) -> Location:
    """The file or folder that a text names."""
    if is_url(text):
        scheme, slashes, rest = text.rstrip("/").partition("://")
        return Url(f"{scheme.lower()}{slashes}{rest}")
    return Path(text.partition("://")[2] if URL.match(text) else text)


def is_model(path: Location) -> bool:
    """Whether the name is a model's; in either case, as files from Windows have it."""
    return path.suffix.lower() == ".onnx"
