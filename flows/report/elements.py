"""A page as a tree of elements that is written as HTML, or as JSON for the page's own script.

Texts and attributes are data: control characters become visible escapes as an element is made, and
markup is escaped as it is written, so that no name from a model can become markup. The script makes
elements of the JSON and never reads markup.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from quant_core.text import printable

VOID = {"meta", "link", "input", "circle", "line", "path", "polyline"}  # have no end tag here
GZIP_LEVEL = 6  # 9 takes three times as long, and gives files that are 1 % smaller


class Element(NamedTuple):
    """One element, made by `element`. In JSON, [tag, attributes, [child, ...]]."""

    tag: str
    attributes: Mapping[str, str]
    children: tuple[Child, ...] = ()

    def to_html(self) -> str:
        """Escaped markup."""
        attributes = "".join(f' {key}="{html.escape(v)}"' for key, v in self.attributes.items())
        if self.tag in VOID and not self.children:
            return f"<{self.tag}{attributes}/>"
        return f"<{self.tag}{attributes}>{_to_html(self.children)}</{self.tag}>"


class TableBody(NamedTuple):
    """The rows of a table, made by `table_body`. In JSON, [[class, ...], [[cell, ...], ...]].

    A page may have a million cells: as elements of their own they would take most of the time.

    kinds  class of each column's cells, empty for none
    rows   what stands in each cell
    """

    kinds: tuple[str, ...]
    rows: tuple[tuple[Child, ...], ...]

    def to_html(self) -> str:
        """Escaped markup."""
        starts = [f'<td class="{html.escape(kind)}">' if kind else "<td>" for kind in self.kinds]
        lines = [
            "".join(
                f"{start}{_to_html((cell,))}</td>" for start, cell in zip(starts, row, strict=True)
            )
            for row in self.rows
        ]
        return "<tbody>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</tbody>"


Child = Element | TableBody | str


def element(
    tag: str, attributes: Mapping[str, object] | None = None, *children: Child | None
) -> Element:
    """An element without the attributes and children that are None."""
    present = {k: printable(v) for k, v in (attributes or {}).items() if v is not None}
    return Element(tag, present, _printable(children))


def table_body(kinds: Sequence[str | None], rows: Sequence[Sequence[Child]]) -> TableBody:
    """The rows of a table whose columns have these classes; None: no class."""
    return TableBody(tuple(kind or "" for kind in kinds), tuple(map(_printable, rows)))


def pack(children: Sequence[Child]) -> str:
    """The children as JSON, compressed by gzip, in base64."""
    text = json.dumps(children, separators=(",", ":"))
    packed = gzip.compress(text.encode(), GZIP_LEVEL, mtime=0)
    return base64.b64encode(packed).decode("ascii")


def _printable(children: Sequence[Child | None]) -> tuple[Child, ...]:
    """The children that are not None, with every control character as a visible escape."""
    present = [child for child in children if child is not None]
    return tuple([printable(child) if isinstance(child, str) else child for child in present])


def _to_html(children: Sequence[Child]) -> str:
    return "".join(
        html.escape(child) if isinstance(child, str) else child.to_html() for child in children
    )
