"""Numbers as people read them; one that is None becomes an empty text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from quant_core.metrics import find_metric


def format_size(count: float | None) -> str:
    """Bytes, or kB, MB and GB, which are powers of ten here."""
    if count is None:
        return ""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    if count >= 1e6:
        return f"{count / 1e6:.2f} MB"
    return f"{count / 1e3:.1f} kB" if count >= 1e3 else f"{count:.0f} B"


def format_ratio(before: float | None, after: float | None) -> str:
    """How many times smaller or larger, for example `3.97x smaller`."""
    if not before or not after:
        return ""
    if after <= before:
        return f"{before / after:.2f}x smaller"
    return f"{after / before:.2f}x larger"


def format_percent(share: float | None, digits: int = 2) -> str:
    """A share of 1 in per cent, with so many digits behind the point."""
    return "" if share is None else f"{100 * share:.{digits}f} %"


def format_ms(value: float | None) -> str:
    """Milliseconds to three digits, but no finer than microseconds; whole ones from 100 on."""
    if value is None:
        return ""
    if value >= 99.95:
        return f"{value:,.0f} ms"
    return f"{value:#.3g} ms" if value >= 0.1 else f"{value:.3f} ms"


def format_number(value: float | None, digits: int = 2) -> str:
    """The number with so many digits behind the point."""
    return "" if value is None else f"{value:.{digits}f}"


def format_db(value: float | None) -> str:
    """Decibels, to a tenth."""
    return "" if value is None else f"{value:.1f} dB"


def format_metric(name: str | None, value: float | None) -> str:
    """A value of the metric of that name."""
    return "" if value is None else find_metric(name or "").form(value)


def format_count(count: int | None) -> str:
    """A count with commas; nothing for 0."""
    return f"{count:,}" if count else ""


def format_speedup(speedup: float | None) -> str:
    """How many times as fast, for example `1.84x`."""
    return "" if speedup is None else f"{speedup:.2f}x"


def format_rate(per_second: float | None) -> str:
    """How many in a second."""
    if per_second is None:
        return ""
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2f}"


def busy_mark(row: Mapping[str, Any]) -> str:
    """What follows a speed-up that was measured while others used the host."""
    return " (busy)" if row.get("busy") else ""


def before_after(
    before: float | None,
    after: float | None,
    form: Callable[[float | None], str],
    arrow: str = "->",
) -> str:
    """Both values, or the one after if either is unknown."""
    if before is None or after is None:
        return form(after)
    return f"{form(before)} {arrow} {form(after)}"


def accuracy_before_after(row: Mapping[str, Any], before: str, arrow: str = "->") -> str:
    """The metric before and after, where `before` names the column of the value before."""
    form = partial(format_metric, row.get("metric"))
    return before_after(row.get(before), row.get("accuracy"), form, arrow)


def latencies(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Milliseconds of the float model and of the quantized one; None if they were not timed.

    The second number is the first divided by the speed-up, which was measured in turns. The medians
    in the reports may be of unequal conditions: the clock rate changed, or a neighbour woke up.
    """
    float_ms, speedup = row.get("float_ms"), row.get("speedup")
    return (float_ms, float_ms / speedup) if float_ms and speedup else (None, None)


def count_words(words: Iterable[str]) -> str:
    """How often each word occurs: `12 static, 3 float`."""
    return ", ".join(f"{count} {word}" for word, count in Counter(words).most_common())
