"""Views of measured times: of two models, of several files, of a model's kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from flows.console.formats import (
    before_after,
    busy_mark,
    format_ms,
    format_number,
    format_percent,
    format_rate,
    format_ratio,
    format_size,
    format_speedup,
    latencies,
)
from flows.console.tables import facts_table, rows_table

MINOR_SHARE = 0.01  # of the time of a model: kernels below it are shown together
_BOTH = ("float", "quantized")

COMPARED = ("file", "size", "", "accuracy", "agreement", "SQNR dB", "latency", "speed", "load",
            "memory", "verdict")  # fmt: skip
EXPLAINED = ("kernel", "operator", "computes in", "time", "share", "why in float",
             "saturates without VNNI", "quantmill would", "stands for")  # fmt: skip
COMPARED_LEGEND = (
    "agreement: share of the decisions that equal the original's. SQNR: of each output. speed: "
    "over the original's, both in turn. load, memory: of loading it in a new process."
)


def timing_view(result: Mapping[str, Any]) -> RenderableType:
    """The latency of both models for each number of threads and samples in a feed, the speed-up
    with its quartiles, and what each takes to load.
    """
    rows = [_timing_row(timing) for timing in result["timings"]]
    headings, optional = tuple(rows[0]), ("p95", "quartiles", "rounds")
    table = rows_table(rows, headings, right=headings, optional=optional)
    return Group(table, facts_table(_beside_times(result)), *_busy_warnings(result["timings"]))


def _timing_row(timing: Mapping[str, Any]) -> dict[str, Any]:
    """Heading -> value, for one number of threads and samples in a feed."""
    float_ms, quantized_ms = timing["float_ms"], timing["float_ms"] / timing["speedup"]
    per_s = 1e3 * timing["batch"]
    lo, hi = timing["speedup_lo"], timing["speedup_hi"]
    return {
        "threads": timing["threads"],
        "batch": timing["batch"],
        "median": before_after(float_ms, quantized_ms, format_ms),
        "p95": before_after(timing["float_p95_ms"], timing["quantized_p95_ms"], format_ms),
        "samples/s": before_after(per_s / float_ms, per_s / quantized_ms, format_rate),
        "speed": format_speedup(timing["speedup"]) + busy_mark(timing),
        "quartiles": f"{format_number(lo)} to {format_number(hi)}",
        "rounds": timing["rounds"],
    }


def _beside_times(result: Mapping[str, Any]) -> dict[str, str]:
    """What is known of both models besides: what they take to load, or how JavaScript ran them."""
    if result["footprints"] is None:
        timing = result["timings"][0]
        equal = (f"{format_number(timing[f'{name}_equal_db'], 0)} dB" for name in _BOTH)
        return {
            "outputs against Python's": " and ".join(equal),
            "float over itself": format_speedup(timing["control"]),
        }
    before, after = (result["footprints"][name] for name in _BOTH)
    return {
        "load time": before_after(before["load_ms"], after["load_ms"], format_ms),
        "memory": before_after(before["memory_bytes"], after["memory_bytes"], format_size),
    }


def comparison_view(result: Mapping[str, Any]) -> RenderableType:
    """Several files of one model side by side, the original first."""
    optional = ("memory", "load", "")
    table = rows_table(compared_rows(result), COMPARED, right=COMPARED[1:-1], optional=optional)
    return Group(table, Text(comparison_legend(result), style="dim"), *_busy_warnings([result]))


def comparison_legend(result: Mapping[str, Any]) -> str:
    """What the columns of a comparison mean, and that its samples were drawn, if they were."""
    return f"{COMPARED_LEGEND} The samples were drawn." if result["is_drawn"] else COMPARED_LEGEND


def _busy_warnings(measured: Sequence[Mapping[str, Any]]) -> list[Text]:
    """A warning that others used the host while something was timed, if they did."""
    loads = [found["host_load"] for found in measured if found["busy"]]
    if not loads:
        return []
    share = format_percent(max(loads), 0)
    problem = f"others took {share} of this host meanwhile; time it again when it is quiet"
    return [Text(f"warning: {problem}", style="yellow")]


def compared_rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Heading of COMPARED -> text, for the original and each file of a comparison."""
    original, first = result["original"], result["files"][0]
    found = first["fidelity"]
    value = _first_given(found["metric_float"], found["top1_float"])
    rows = [_compared_row(original, value, first["timing"]["float_ms"])]
    for file in result["files"]:
        fidelity, timing = file["fidelity"], file["timing"]
        value = _first_given(fidelity["metric"], fidelity["top1"])
        outputs = (format_number(output["sqnr_db"], 1) for output in fidelity["per_output"])
        rows.append(
            _compared_row(file, value, latencies(timing)[1])
            | {
                "": format_ratio(original["size_bytes"], file["size_bytes"]),
                "agreement": format_percent(fidelity["agreement"]),
                "SQNR dB": ", ".join(output or "-" for output in outputs),
                "speed": format_speedup(timing["speedup"]),
                "verdict": "" if file["verdict"] == "none" else file["verdict"].replace("_", " "),
            }
        )
    return [{heading: row.get(heading, "") for heading in COMPARED} for row in rows]


def _compared_row(file: Mapping[str, Any], value: float | None, ms: float | None) -> dict[str, str]:
    """The columns that the original has as well."""
    return {
        "file": file["file"],
        "size": format_size(file["size_bytes"]),
        "accuracy": format_number(value, 4),
        "latency": format_ms(ms),
        "load": format_ms(file["load_ms"]),
        "memory": format_size(file["memory_bytes"]),
    }


def _first_given(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def explanation_view(result: Mapping[str, Any]) -> RenderableType:
    """The kernels that take most of the time first, and what the time goes to in all.

    Those of which there is little to say are one row.
    """
    kernels = sorted(result["kernels"], key=lambda kernel: -kernel["ms"])
    minor = [kernel for kernel in kernels if _is_minor(kernel)]
    rows = explained_rows([k for k in kernels if len(minor) == 1 or k not in minor])
    if len(minor) > 1:
        rows.append(
            {
                "kernel": f"{len(minor)} others",
                "operator": f"below {format_percent(MINOR_SHARE, 0)} each",
                "time": format_ms(sum(kernel["ms"] for kernel in minor)),
                "share": format_percent(sum(kernel["share"] for kernel in minor), 1),
            }
        )
    table = rows_table(rows, EXPLAINED[:-1], right=("time", "share"))
    return Group(table, Text(explanation_line(result)))


def explained_rows(kernels: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Heading of EXPLAINED -> text, for each of these kernels."""
    return [
        {
            "kernel": kernel["name"],
            "operator": kernel["op_type"],
            "computes in": kernel["arithmetic"],
            "time": format_ms(kernel["ms"]),
            "share": format_percent(kernel["share"], 1),
            "why in float": kernel["why"],
            "saturates without VNNI": str(kernel["saturating_pairs"] or ""),
            "quantmill would": kernel["advice"],
            "stands for": ", ".join(kernel["covers"]),
        }
        for kernel in kernels
    ]


def _is_minor(kernel: Mapping[str, Any]) -> bool:
    """Whether a kernel takes hardly any time, and there is nothing to say about it."""
    weight_in_float = kernel["has_weight"] and kernel["why"]
    has_remark = weight_in_float or kernel["saturating_pairs"] or kernel["advice"]
    return kernel["share"] < MINOR_SHARE and not has_remark


def explanation_line(result: Mapping[str, Any]) -> str:
    """What the time goes to, in a line."""
    shares = [f"{format_percent(share, 1)} {name}" for name, share in result["shares"].items()]
    return f"{format_ms(result['ms'])} in {len(result['kernels'])} kernels: {', '.join(shares)}"
