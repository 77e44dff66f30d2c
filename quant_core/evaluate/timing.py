"""How fast a quantized model is beside its float original, measured in turns on the same machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from quant_core.errors import RequestError
from quant_core.model.session import run

BLOCK_SECONDS = (
    1e-3  # calls are timed in blocks of at least this, which the clock and its call cannot blur
)
WARM_UP = 0.1  # share of the time
PATIENCE = 5  # times the time asked for, spent at most to reach the rounds asked for


@dataclass(frozen=True, slots=True)
class Timing:
    """Latency of one call in milliseconds, both models in turn: medians, 95th percentiles over the rounds.

    speedup  median over the rounds of float's time over the quantized one's; lo and hi are its quartiles
    """

    float_ms: float
    quantized_ms: float
    float_p95_ms: float
    quantized_p95_ms: float
    speedup: float
    speedup_lo: float
    speedup_hi: float
    rounds: int
    threads: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    reference: ort.InferenceSession,
    candidate: ort.InferenceSession,
    feed: Mapping[str, np.ndarray],
    *,
    seconds: float = 2.0,
    min_rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Both models on the same feed, A B A B, for about so long.

    clock  time.thread_time leaves out what neighbours take from one thread; the wall clock is what users wait

    Raises: RequestError if the sessions have different threads, or threads that spin and so slow the other session
    (`open_session` gives neither); ModelError if one does not run on the feed.
    """
    options = [session.get_session_options() for session in (reference, candidate)]
    threads = [o.intra_op_num_threads for o in options]
    if threads[0] != threads[1]:
        raise RequestError(
            f"float has {threads[0]} threads, quantized {threads[1]}", hint="Open both with as many"
        )
    if threads[0] != 1 and not all(_sleeps(o) for o in options):
        raise RequestError(
            "idle threads spin and slow the other session", hint="Open both with open_session"
        )
    feed = dict(feed)
    for session in (reference, candidate):
        run(session, feed)  # told well if it fails, and the first call allocates
    calls = [lambda s=session: s.run(None, feed) for session in (reference, candidate)]
    return summarize(
        take_turns(*calls, seconds=seconds, min_rounds=min_rounds, clock=clock), threads[0]
    )


def take_turns(
    reference: Callable[[], object],
    candidate: Callable[[], object],
    *,
    seconds: float,
    min_rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> np.ndarray:
    """Seconds a call, one row per round, columns reference and candidate.

    After a warm-up each round times one block of each: as many calls, the same number for both, as make the faster
    one's block long enough for the clock. Rounds go on for `seconds`, and on to `min_rounds` unless that takes five
    times as long; there is at least one.
    """
    start = clock()
    fastest, calls = math.inf, 1
    while True:  # the warm-up, and how many calls a block needs
        fastest = min(fastest, *(_block(call, calls, clock) for call in (reference, candidate)))
        if clock() - start >= WARM_UP * seconds:
            break
        calls = max(1, math.ceil(BLOCK_SECONDS / max(fastest, 1e-9)))
    calls = max(1, math.ceil(BLOCK_SECONDS / max(fastest, 1e-9)))

    rounds: list[tuple[float, float]] = []
    start = clock()
    while True:
        rounds.append((_block(reference, calls, clock), _block(candidate, calls, clock)))
        spent = clock() - start
        if spent >= seconds and (len(rounds) >= min_rounds or spent >= PATIENCE * seconds):
            return np.array(rounds)


def summarize(times: np.ndarray, threads: int) -> Timing:
    """Medians and paired ratios of `take_turns`."""
    times = np.maximum(times, 1e-12)
    (float_ms, quantized_ms), (float_p95_ms, quantized_p95_ms) = np.percentile(
        times * 1e3, [50, 95], axis=0
    )
    lo, median, hi = np.percentile(times[:, 0] / times[:, 1], [25, 50, 75])
    return Timing(
        float_ms=float(float_ms),
        quantized_ms=float(quantized_ms),
        float_p95_ms=float(float_p95_ms),
        quantized_p95_ms=float(quantized_p95_ms),
        speedup=float(median),
        speedup_lo=float(lo),
        speedup_hi=float(hi),
        rounds=len(times),
        threads=threads,
    )


def _block(call: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    """Seconds a call, over so many."""
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls


def _sleeps(options: ort.SessionOptions) -> bool:
    try:
        return bool(options.get_session_config_entry("session.intra_op.allow_spinning") == "0")
    except RuntimeError:  # never set, and spinning is the default
        return False
