"""The self-contained HTML pages of `quantmill explain -o` and `quantmill compare -o`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.console.timing_views import (
    COMPARED,
    EXPLAINED,
    compared_rows,
    comparison_legend,
    explained_rows,
    explanation_line,
)
from flows.report.details import NAME, NUMBER, rows_table
from flows.report.document import document
from flows.report.elements import Element, element
from quant_core.model.atomic import write_named

TEXTS = ("kernel", "why in float", "quantmill would", "stands for", "file", "verdict")
# Heading -> class of its cells; all others hold numbers.
KINDS = {**dict.fromkeys(TEXTS, NAME), "operator": None, "computes in": None}


def write_explanation(explanation: Mapping[str, Any], path: Path) -> None:
    """Write the page of what `Explanation.to_dict` says; it appears as a whole, or not at all."""
    title = f"quantmill explain {Path(explanation['model']).name}"
    rows = explained_rows(explanation["kernels"])
    table = _table("Kernels in the order in which they run", EXPLAINED, rows)
    _write(path, title, [element("p", {}, explanation_line(explanation)), table])


def write_comparison(comparison: Mapping[str, Any], path: Path) -> None:
    """Write the page of several files of one model; it appears as a whole, or not at all."""
    table = _table("Each file beside the original", COMPARED, compared_rows(comparison))
    title = f"quantmill compare {Path(comparison['original']['file']).name}"
    _write(path, title, [element("p", {}, comparison_legend(comparison)), table])


def _table(caption: str, headings: Sequence[str], rows: Sequence[Mapping[str, str]]) -> Element:
    columns = {heading: KINDS.get(heading, NUMBER) for heading in headings}
    return rows_table(caption, columns, [[*row.values()] for row in rows])


def _write(path: Path, title: str, body: Sequence[Element]) -> None:
    page = document(title, [element("h1", {}, title), *body])
    write_named(path, page.encode("utf-8"))
