"""One self-contained HTML page of the kernels that run a model: `quantmill explain -o`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.console.render import explanation_line, format_ms, format_percent
from flows.report.details import rows_table
from flows.report.elements import element
from flows.report.page import document
from quant_core.model.atomic import atomic_write

COLUMNS = {  # heading -> whether its values are numbers
    "kernel": False,
    "operator": False,
    "computes in": False,
    "time": True,
    "share": True,
    "why in float": False,
    "pairs that saturate without VNNI": True,
    "quantmill would": False,
    "stands for": False,
}


def write_explanation(explanation: Mapping[str, Any], path: Path) -> None:
    """Write the page of what `Explanation.to_dict` says; it appears as a whole, or not at all."""
    rows = [
        [
            kernel["name"],
            kernel["op_type"],
            kernel["arithmetic"],
            format_ms(kernel["ms"]),
            format_percent(kernel["share"]),
            kernel["why"],
            str(kernel["saturating_pairs"] or ""),
            kernel["advice"],
            ", ".join(kernel["covers"]),
        ]
        for kernel in explanation["kernels"]
    ]
    title = f"quantmill explain {Path(explanation['model']).name}"
    body = [
        element("h1", {}, title),
        element("p", {}, explanation_line(explanation)),
        rows_table("Kernels in the order in which they run", COLUMNS, rows),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(document(title, body).encode("utf-8"))
