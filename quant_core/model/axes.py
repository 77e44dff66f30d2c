"""Which sizes and names of an input's axes mean something: exporters write placeholders too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

Axes: TypeAlias = tuple[int | str | None, ...]  # a size, a name of an open one, or None

# What exporters write for any open size, in lower case.
PLACEHOLDERS = frozenset({"", "?", "-1", "*", "any", "dyn", "dynamic", "none", "unk", "unknown"})


def distinct_axes(axes: Sequence[int | str | None]) -> Axes:
    """The axes with None for every open one that has no size and no name of its own.

    1. Some exporters write -1 for an open size, of which arithmetic makes other sizes.
    2. A placeholder is no name: axes that have it differ.
    3. Nor is the name of the first axis of an image that another axis has too: there are not as
       many images as pixels. A matrix may be square.
    """

    def distinct(size: int | str | None) -> int | str | None:
        if isinstance(size, int):
            return size if size >= 0 else None  # 1.
        is_placeholder = size is None or size.lower() in PLACEHOLDERS  # 2.
        is_shared = len(axes) == 4 and size == axes[0] and size in axes[1:]  # 3.
        return None if is_placeholder or is_shared else size

    return tuple(map(distinct, axes))
