"""Charts as inline SVG: a sparkline, a scatter with its front, the layers of one model, the
histogram of a tensor, and the distribution of latencies.

Each is a few lines of SVG. The smallest library that draws them all weighs more than a whole report
of one model, and would have to run before anything is seen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from flows.report.elements import Child, Element, element
from quant_core.search.trace import TrialRow, is_finite, is_measured, on_front

SPARK_WIDTH, SPARK_HEIGHT = 80, 18
WIDTH, HEIGHT = 460, 230
FULL_WIDTH = 960  # of a chart with a point for each layer
LEFT, BOTTOM, TOP, RIGHT = 52, 36, 24, 12
MAX_LAYERS = 400  # points in the chart; the table beside it has every layer
MAX_TICKS = 6
# The least that an axis spans: less than this is noise, and would look like a difference.
LEAST_SPEEDUPS, LEAST_DB = 0.4, 4.0


def sparkline(values: Sequence[float | None], label: str) -> Element | None:
    """A line through the values, oldest first; None with fewer than two of them."""
    known = [(i, value) for i, value in enumerate(values) if value is not None]
    if len(known) < 2:
        return None
    lo, hi = min(v for _, v in known), max(v for _, v in known)
    step = (SPARK_WIDTH - 6) / (len(values) - 1)
    points = [(3 + i * step, _scaled(v, lo, hi, SPARK_HEIGHT - 3, 3)) for i, v in known]
    return _small_picture(
        "spark",
        label,
        element("polyline", {"class": "line", "points": _points(points)}),
        element(
            "circle", {"class": "dot", "cx": _n(points[-1][0]), "cy": _n(points[-1][1]), "r": 2.5}
        ),
    )


def front_chart(trials: Sequence[TrialRow], written: tuple[float, float] | None) -> Element | None:
    """Speed-up and SQNR of every trial, with those on the front marked.

    written  the same two of the model as it was written, measured at the end
    """
    points = [(t["speedup"], t["sqnr_db"], t) for t in trials if is_measured(t)]
    if not points:
        return None
    values = [(x, y) for x, y, _ in points] + ([written] if written else [])
    across = _padded([x for x, _ in values], LEAST_SPEEDUPS)
    axes = _Axes(*across, *_padded([y for _, y in values], LEAST_DB))
    front = on_front(trials)
    marks: list[Child] = []
    for x, y, trial in points:
        text = f"{trial['candidate']}: {x:.2f}x, {y:.1f} dB"
        kind = "trial unbeaten" if trial in front else "trial"
        marks.append(_dot(axes.place(x, y), kind, text, 4.5))
    if written:
        text = f"as written: {written[0]:.2f}x, {written[1]:.1f} dB"
        marks.append(_dot(axes.place(*written), "written", text, 6.5))
    return axes.chart("Plans that were tried", "speed-up over float", "SQNR, dB", marks)


def layers_chart(layers: Sequence[Mapping[str, Any]]) -> Element | None:
    """SQNR of the first layers by position: each alone, and with all before it."""
    shown = [row for row in layers[:MAX_LAYERS] if is_finite(row.get("cumulative_db"))]
    if len(shown) < 2:
        return None
    alone = [row for row in shown if is_finite(row.get("isolated_db"))]
    ys = [row["cumulative_db"] for row in shown] + [row["isolated_db"] for row in alone]
    across = shown[0]["position"], shown[-1]["position"]
    axes = _Axes(*across, *_padded(ys, LEAST_DB), x_step=1, width=FULL_WIDTH)
    line = [axes.place(row["position"], row["cumulative_db"]) for row in shown]
    marks: list[Child] = [element("polyline", {"class": "front", "points": _points(line)})]
    for row in alone:
        text = f"{row['position']} {row['node']}: alone {row['isolated_db']:.1f} dB"
        marks.append(_dot(axes.place(row["position"], row["isolated_db"]), "trial", text, 3))
    for row in shown:
        text = f"{row['position']} {row['node']}: so far {row['cumulative_db']:.1f} dB"
        marks.append(_dot(axes.place(row["position"], row["cumulative_db"]), "written", text, 3))
    return axes.chart("SQNR by layer", "layer", "SQNR, dB", marks)


def range_chart(layer: Mapping[str, Any]) -> Element | None:
    """The histogram of what calibration saw of a layer's output, and the ends of what its integers
    cover; None without a histogram.
    """
    if not layer.get("histogram"):
        return None
    shares = [math.sqrt(share) for share in json.loads(layer["histogram"])]  # tails are small
    seen_lo, seen_hi = layer["seen_lo"], layer["seen_hi"]
    lo, hi = min(seen_lo, layer["range_lo"]), max(seen_hi, layer["range_hi"])
    if hi <= lo:
        return None
    # Whole pixels, and one point a bin: a report may have ten thousand of these.
    left, right = (round(_across(value, lo, hi)) for value in (seen_lo, seen_hi))
    floor, most = SPARK_HEIGHT - 1, max(shares) or 1.0
    slope = (floor - 2) / most
    line = [
        f"{x},{floor - round(slope * share)}"
        for x, share in zip(_middles(left, right, len(shares)), shares, strict=True)
    ]
    ends = [_across(layer["range_lo"], lo, hi), _across(layer["range_hi"], lo, hi)]
    bars = " ".join(f"M{_n(x)},0V{SPARK_HEIGHT}" for x in ends)
    label = (
        f"seen {seen_lo:.4g} to {seen_hi:.4g}, "
        f"covered {layer['range_lo']:.4g} to {layer['range_hi']:.4g}"
    )
    return _small_picture(
        "spark range",
        label,
        element("polyline", {"class": "line", "points": " ".join(line)}),
        element("path", {"class": "end", "d": bars}),
    )


def latency_chart(timing: Mapping[str, Any]) -> Element | None:
    """The share of rounds in which either model was at most so slow; None without deciles."""
    kinds = {"float": "front", "quantized": "line"}
    deciles = {
        name: json.loads(timing[f"{name}_deciles_ms"])
        for name in kinds
        if timing.get(f"{name}_deciles_ms")
    }
    if len(deciles) < len(kinds):
        return None
    # The slowest round of all may be a hundred times slower, and would hide the others.
    most = max(values[-2] for values in deciles.values())
    axes = _Axes(0.0, 1.05 * most, 0, 100)
    marks: list[Child] = []
    for name, values in deciles.items():
        shown = [axes.place(min(ms, axes.x_hi), 10 * i) for i, ms in enumerate(values)]
        text = f"{name}: median {values[5]:.4g} ms, slowest {values[-1]:.4g} ms"
        marks.append(
            element(
                "polyline",
                {"class": kinds[name], "points": _points(shown)},
                element("title", {}, text),
            )
        )
    return axes.chart("Latency", "latency of a call, ms", "% of rounds", marks)


@cache
def _middles(left: int, right: int, count: int) -> tuple[int, ...]:
    """The middles of so many bins of equal width, in whole pixels."""
    step = (right - left) / count
    return tuple(round(left + (i + 0.5) * step) for i in range(count))


def _across(value: float, lo: float, hi: float) -> float:
    return _scaled(value, lo, hi, 2, SPARK_WIDTH - 2)


@dataclass(frozen=True, slots=True)
class _Axes:
    """The scales of a chart: the smallest and the largest x and y in it.

    x_step  least distance of two ticks
    width   of the picture
    """

    x_lo: float
    x_hi: float
    y_lo: float
    y_hi: float
    x_step: float = 0.0
    width: int = WIDTH

    def place(self, x: float, y: float) -> tuple[int, int]:
        """Where the point lies in the picture, in whole pixels."""
        across = _scaled(x, self.x_lo, self.x_hi, LEFT, self.width - RIGHT)
        return round(across), round(_scaled(y, self.y_lo, self.y_hi, HEIGHT - BOTTOM, TOP))

    def chart(self, title: str, across: str, up: str, marks: Sequence[Child]) -> Element:
        """The picture: axes with ticks and names, and the marks on them."""
        parts: list[Child] = []
        for y, text in _ticks(self.y_lo, self.y_hi):
            top = self.place(self.x_lo, y)[1]
            ends = {"x1": LEFT, "x2": self.width - RIGHT, "y1": _n(top), "y2": _n(top)}
            place = {"x": LEFT - 6, "y": _n(top + 4), "text-anchor": "end"}
            parts += [element("line", {"class": "grid", **ends}), element("text", place, text)]
        for x, text in _ticks(self.x_lo, self.x_hi, self.x_step):
            left = self.place(x, self.y_lo)[0]
            place = {"x": _n(left), "y": HEIGHT - BOTTOM + 16, "text-anchor": "middle"}
            parts.append(element("text", place, text))
        end = {"x": self.width - RIGHT, "y": HEIGHT - 4, "text-anchor": "end"}
        names = [
            element("text", end, f"{across} →"),
            element("text", {"x": LEFT, "y": TOP - 10}, f"↑ {up}"),
        ]
        view = {
            "class": "chart",
            "viewBox": f"0 0 {self.width} {HEIGHT}",
            "role": "img",
            "aria-label": title,
        }
        return element("svg", view, *parts, *names, *marks)


def _small_picture(kind: str, label: str, *marks: Element) -> Element:
    """A picture of the height of a line of text."""
    view = {
        "class": kind,
        "viewBox": f"0 0 {SPARK_WIDTH} {SPARK_HEIGHT}",
        "width": SPARK_WIDTH,
        "height": SPARK_HEIGHT,
        "role": "img",
    }
    return element("svg", view, element("title", {}, label), *marks)


def _dot(place: tuple[int, int], kind: str, text: str, radius: float) -> Element:
    attributes = {"class": kind, "cx": place[0], "cy": place[1], "r": radius}
    return element("circle", attributes, element("title", {}, text))


def _padded(values: Sequence[float], least: float) -> tuple[float, float]:
    """The bounds of an axis with some space at both ends, at least so far from each other."""
    lo, hi = min(values), max(values)
    pad = max((hi - lo) * 0.08, (least - (hi - lo)) / 2)
    return lo - pad, hi + pad


def _scaled(value: float, lo: float, hi: float, start: float, end: float) -> float:
    """`value` of the range lo..hi in the range start..end; the middle if lo equals hi."""
    share = 0.5 if hi == lo else (value - lo) / (hi - lo)
    return start + share * (end - start)


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{_n(x)},{_n(y)}" for x, y in points)


def _ticks(lo: float, hi: float, least: float = 0.0) -> list[tuple[float, str]]:
    """Round values from lo to hi, at most MAX_TICKS of them and at least so far from each other,
    each with its text.
    """
    least = max(least, (hi - lo) / MAX_TICKS)
    power = math.floor(math.log10(least))
    step = next(s for s in (m * 10.0**power for m in (1, 2, 5, 10)) if s >= least)
    digits = max(0, -math.floor(math.log10(step)))
    first, last = math.ceil(lo / step), math.floor(hi / step)
    return [(i * step, f"{i * step:.{digits}f}") for i in range(first, last + 1)]


def _n(value: float) -> str:
    return f"{round(value, 1):g}"
