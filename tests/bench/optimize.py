"""Exact rewrites alone: how much faster the float model gets, and how near its outputs stay.

    python -m tests.bench.optimize --zoo DIR [--cases ppocrv4_rec,...] [--seconds 3] [--json FILE]

prepared   speed over the file as it is, of what every quantization starts from
optimized  the same after the rules of quant_core/optimize, with the quartiles of the paired rounds
dB         of the outputs on samples that the rules were not checked on, the worst one
rules      how many places each rule changed; behind a minus sign, why one was undone

One thread, CPU time, A B A B in turn.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import onnx_ir as ir

from quant_core.evaluate.timing import Timing, measure
from quant_core.metrics import MAX_SQNR_DB
from quant_core.model.prepare import prepare
from quant_core.model.session import Model, open_session, run
from quant_core.numerics.sqnr import difference_db
from quant_core.optimize.run import optimize
from tests.bench.accuracy import load_zoo

CHECKED = 2  # samples that the rules are checked on


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--cases", type=lambda s: s.split(","), help="all that are stored")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing, per model")
    parser.add_argument("--json", type=Path, help="where the results go")
    args = parser.parse_args()
    zoo = load_zoo(args.zoo)
    results = {}
    print(
        "case                           float ms  prepared  optimized  (lo, hi)        dB  s  rules"
    )
    for case in zoo.cases(args.zoo):
        if case.model.exists() and (not args.cases or case.name in args.cases):
            results[case.name] = row = measured(zoo, case, args.seconds)
            print(_line(case.name, row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def _line(name: str, row: dict[str, Any]) -> str:
    speed = f"{row['prepared']:8.2f}  {row['optimized']:9.2f}  ({row['lo']:.2f}, {row['hi']:.2f})"
    checks = f"{row['db']:6.0f}  {row['seconds']:.0f}  {row['rules']}"
    return f"{name:30} {row['float_ms']:8.2f}  {speed}  {checks}"


def measured(zoo: Any, case: Any, seconds: float) -> dict[str, Any]:
    """One line of the table, as JSON values."""
    feeds = zoo.load_calibration(case, 2 * CHECKED)
    first = feeds[0]
    prepared = prepare(case.model, feeds[:CHECKED])
    started = time.monotonic()
    found = optimize(
        prepared,
        feeds[:CHECKED],
        lambda before, after: timed(before.model, after.model, first, seconds / 2).speedup_lo,
    )
    spent = time.monotonic() - started
    with tempfile.TemporaryDirectory(prefix="quantmill-bench-") as folder:
        path = Path(folder, "optimized.onnx")
        ir.save(found.model, path)
        whole = timed(case.model, path, first, seconds)
        base = timed(case.model, prepared, first, seconds)
        nearness = worst_db(case.model, path, feeds)
    counts = Counter(change.rule for change in found.applied)
    undone = [f"-{u.rule} ({u.reason})" for u in found.undone]
    return {
        "float_ms": whole.float_ms,
        "prepared": base.speedup,
        "optimized": whole.speedup,
        "lo": whole.speedup_lo,
        "hi": whole.speedup_hi,
        "db": nearness,
        "seconds": spent,
        "rules": " ".join([f"{rule} {n}" for rule, n in counts.items()] + undone),
    }


def timed(before: Model, after: Model, feed: Any, seconds: float) -> Timing:
    """Both models on one thread, in turn."""
    sessions = [open_session(model) for model in (before, after)]
    return measure(*sessions, feed, seconds=seconds, clock=time.thread_time)


def worst_db(before: Model, after: Model, feeds: list[Any]) -> float:
    """Signal over difference of the worst float output on any feed, 200 if all are equal."""
    sessions = [open_session(model) for model in (before, after)]
    outputs = ([run(session, feed) for session in sessions] for feed in feeds)
    pairs = (pair for both in outputs for pair in zip(*both, strict=True))
    found = (difference_db(a, b, 0.0) for a, b in pairs if a.dtype.kind == "f")
    return min(chain([MAX_SQNR_DB], found))


if __name__ == "__main__":
    main()
