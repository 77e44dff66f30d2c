"""A whole HTML page in our style, which opens from the disk and asks no host for anything."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources

from flows.report.elements import Element, element


def document(title: str, body: Sequence[Element], script: str = "") -> str:
    """A whole page in our style, which asks no host for anything and runs only this script."""
    style = read_asset("page.css")
    head = element(
        "head",
        {},
        element("meta", {"charset": "utf-8"}),
        element(
            "meta", {"http-equiv": "Content-Security-Policy", "content": _policy(style, script)}
        ),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"name": "color-scheme", "content": "light dark"}),
        element("link", {"rel": "icon", "href": "data:,"}),
        element("title", {}, title),
    )
    inside = "\n".join(part.to_html() for part in body)
    heading = head.to_html().removesuffix("</head>")
    return (
        f'<!DOCTYPE html>\n<html lang="en">{heading}<style>{style}</style></head>\n'
        f"<body>\n{inside}\n<script>{script}</script></body></html>\n"
    )


def _policy(style: str, script: str) -> str:
    """A policy that forbids every request, and all but the page's own style and script."""
    return (
        f"default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src '{_sha256(style)}'; script-src '{_sha256(script)}'"
    )


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def read_asset(name: str) -> str:
    """The text of a file that lies beside this one."""
    return resources.files("flows.report").joinpath(name).read_text(encoding="utf-8")
