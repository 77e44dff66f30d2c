"""The self-contained HTML pages of `quantmill explain -o` and `quantmill compare -o`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.console.formats import format_ms, format_percent
from flows.console.timing_views import COMPARED, compared_rows, comparison_legend, explanation_line
from flows.report.details import NAME, NUMBER, rows_table
from flows.report.document import document
from flows.report.elements import Element, element
from quant_core.model.atomic import write_named

COLUMNS = {  # heading -> class of its cells
    "kernel": NAME,
    "operator": None,
    "computes in": None,
    "time": NUMBER,
    "share": NUMBER,
    "why in float": NAME,
    "pairs that saturate without VNNI": NUMBER,
    "quantmill would": NAME,
    "stands for": NAME,
}


def write_explanation(explanation: Mapping[str, Any], path: Path) -> None:
    """Write the page of what `Explanation.to_dict` says; it appears as a whole, or not at all."""
    rows = [
        [
            kernel["name"],
            kernel["op_type"],
            kernel["arithmetic"],
            format_ms(kernel["ms"]),
            format_percent(kernel["share"], 1),
            kernel["why"],
            str(kernel["saturating_pairs"] or ""),
            kernel["advice"],
            ", ".join(kernel["covers"]),
        ]
        for kernel in explanation["kernels"]
    ]
    title = f"quantmill explain {Path(explanation['model']).name}"
    table = rows_table("Kernels in the order in which they run", COLUMNS, rows)
    _write(path, title, [element("p", {}, explanation_line(explanation)), table])


def write_comparison(comparison: Mapping[str, Any], path: Path) -> None:
    """Write the page of several files of one model; it appears as a whole, or not at all."""
    cells = [[*row.values()] for row in compared_rows(comparison)]
    columns = {heading: NAME if heading in ("file", "verdict") else NUMBER for heading in COMPARED}
    table = rows_table("Each file beside the original", columns, cells)
    title = f"quantmill compare {Path(comparison['original']['file']).name}"
    _write(path, title, [element("p", {}, comparison_legend(comparison)), table])


def _write(path: Path, title: str, body: Sequence[Element]) -> None:
    page = document(title, [element("h1", {}, title), *body])
    write_named(path, page.encode("utf-8"))
