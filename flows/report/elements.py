"""A page as a tree of elements that is written as HTML, or as JSON for the page's own script.

Text and attributes are data until they are written, and are escaped there, so that no name from a
model can become markup. The script makes elements of the JSON and never reads markup.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant_core.text import printable

VOID = {"meta", "link", "input", "circle", "line", "polyline", "rect"}  # have no end tag here


@dataclass(frozen=True, slots=True)
class Element:
    """One element. Children are elements or text."""

    tag: str
    attributes: Mapping[str, str]
    children: tuple[Child, ...] = ()

    def to_html(self) -> str:
        """Escaped markup; control characters of a name become visible escapes."""
        attributes = "".join(f' {key}="{_escape(v)}"' for key, v in self.attributes.items())
        if self.tag in VOID and not self.children:
            return f"<{self.tag}{attributes}/>"
        inside = "".join(map(_to_html, self.children))
        return f"<{self.tag}{attributes}>{inside}</{self.tag}>"

    def to_json(self) -> list[Any]:
        """[tag, attributes, child, ...], where a child is text or such a list."""
        attributes = {key: printable(value) for key, value in self.attributes.items()}
        return [self.tag, attributes, *map(_to_json, self.children)]


Child = Element | str


def element(
    tag: str, attributes: Mapping[str, object] | None = None, *children: Child | None
) -> Element:
    """An element without the attributes and children that are None."""
    present = {k: str(v) for k, v in (attributes or {}).items() if v is not None}
    return Element(tag, present, tuple(child for child in children if child is not None))


def pack(children: tuple[Child, ...]) -> str:
    """The children as JSON, compressed by gzip, in base64."""
    text = json.dumps([_to_json(child) for child in children], separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode("ascii")


def _to_html(child: Child) -> str:
    return child.to_html() if isinstance(child, Element) else _escape(child)


def _to_json(child: Child) -> Any:
    return child.to_json() if isinstance(child, Element) else printable(child)


def _escape(text: str) -> str:
    return html.escape(printable(text), quote=True)
