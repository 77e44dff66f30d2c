"""How fast a quantized model is beside its float original, timed in turns on the same machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort

from quant_core.errors import RequestError
from quant_core.model.containers import unboxed
from quant_core.model.session import failing_on

BLOCK_SECONDS = 1e-3  # that a block of calls takes at least: then reading the clock costs nothing
WARM_UP = 0.03  # share of `seconds` that the warm-up takes
SLOW_SECONDS = 5e-3  # a call that takes this or longer is warm after one
QUIET_PART = 4  # one in so many rounds counts for the speed-up
MIN_QUIET_ROUNDS = 5
PATIENCE = 5  # `min_rounds` may take this many times `seconds`,
PATIENCE_SECONDS = 2.0  # or these: two rounds of a slow model say nothing
FEWEST_ROUNDS = 3  # are enough if each model took as long in all of them, but for so much:
STEADY = 1.02  # less than the 3 % within which speed-ups count as equal


@dataclass(frozen=True, slots=True)
class Timing:
    """Latency of one call of each model in milliseconds, and the speed-up.

    float_ms, quantized_ms  medians over the rounds
    *_p95_ms                95th percentiles over the rounds
    speedup                 median over the quiet rounds of float time / quantized time
    speedup_lo, speedup_hi  quartiles of the same
    threads                 of each session
    *_deciles_ms            of the latency over the rounds: minimum, 10 %, ... 90 %, maximum
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
    float_deciles_ms: tuple[float, ...] = ()
    quantized_deciles_ms: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    reference: ort.InferenceSession,
    candidate: ort.InferenceSession,
    feed: Mapping[str, np.ndarray],
    *,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """The latencies of the float model and the quantized one; the rest as in `measure_all`."""
    [timing] = measure_all(reference, [candidate], feed, seconds=seconds, clock=clock)
    return timing


def measure_all(
    reference: ort.InferenceSession,
    candidates: Sequence[ort.InferenceSession],
    feed: Mapping[str, np.ndarray],
    *,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """The latencies of the float model and of each quantized one on the same feed, all in turns.

    seconds  how long the rounds take, without the warm-up
    clock    the wall clock is what users wait for; time.thread_time leaves out what other processes
             take from a session of one thread

    Sessions that `run` has run need no warm-up where they are slow.

    Raises: RequestError if the sessions have different numbers of threads, or threads that spin
    while idle and so slow the other sessions (`open_session` avoids both); ModelError if a model
    does not run on the feed.
    """
    sessions = [reference, *candidates]
    options = [session.get_session_options() for session in sessions]
    threads = [o.intra_op_num_threads for o in options]
    if len(set(threads)) != 1:
        problem = f"float has {threads[0]} threads, quantized {', '.join(map(str, threads[1:]))}"
        raise RequestError(problem, hint="Open all with as many")
    if threads[0] != 1 and not all(_idle_threads_sleep(o) for o in options):
        problem = "idle threads spin and slow the other session"
        raise RequestError(problem, hint="Open both with open_session")
    plain = {name: unboxed(array) for name, array in feed.items()}
    calls = [partial(session.run, None, plain) for session in sessions]
    are_warm = all(getattr(session, "has_run", False) for session in sessions)
    with failing_on(feed):
        times = take_turns(calls, seconds=seconds, clock=clock, are_warm=are_warm)
    return [summarize(times[:, [0, i]], threads[0]) for i in range(1, len(sessions))]


def take_turns(
    calls: Sequence[Callable[[], object]],
    *,
    seconds: float,
    min_rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    are_warm: bool = False,
    block_seconds: float = BLOCK_SECONDS,
) -> np.ndarray:
    """Seconds per call, shape (rounds, calls): one row per round.

    After a warm-up each round times one block of each call, and begins with the next one. A block
    repeats a call as often as the fastest one needs for `block_seconds`, the same for all. Rounds
    go on for `seconds`, and then until there are `min_rounds`, or FEWEST_ROUNDS that agree, or both
    PATIENCE * seconds and PATIENCE_SECONDS are over. There is at least one round. Of slow calls
    that `are_warm` the warm-up is the first one.
    """
    patience = max(PATIENCE * seconds, PATIENCE_SECONDS)
    repeats, warm_up = _warm_up(calls, seconds, block_seconds, clock)
    rounds = [warm_up] if are_warm and warm_up.min() >= SLOW_SECONDS else []
    start = clock() - float(sum(times.sum() for times in rounds))
    while True:
        times = np.zeros(len(calls))
        # Each is the first and the last of a round as often as any other. Forwards and backwards,
        # three or more would not be alike: only those at the ends follow themselves, and find
        # their caches warm.
        first = len(rounds) % len(calls)
        for i in (*range(first, len(calls)), *range(first)):
            times[i] = _time_block(calls[i], repeats, clock)
        rounds.append(times)
        spent = clock() - start
        is_enough = len(rounds) >= min_rounds or spent >= patience or _agree(rounds)
        if spent >= seconds and is_enough:
            return np.array(rounds)


def _agree(rounds: Sequence[np.ndarray]) -> bool:
    """Whether no call took clearly longer in one of a few rounds than in another."""
    if len(rounds) < FEWEST_ROUNDS:
        return False
    return bool((np.max(rounds, axis=0) <= STEADY * np.min(rounds, axis=0)).all())


def _warm_up(
    calls: Sequence[Callable[[], object]],
    seconds: float,
    block_seconds: float,
    clock: Callable[[], float],
) -> tuple[int, np.ndarray]:
    """How many repeats a block needs, and the seconds of each call in the last pass.

    There are two passes at least, as the first one allocates memory; one if calls are slow.
    """
    start = clock()
    fastest, repeats, passes = math.inf, 1, 0
    while passes < (1 if fastest >= SLOW_SECONDS else 2) or clock() - start < WARM_UP * seconds:
        times = np.array([_time_block(call, repeats, clock) for call in calls])
        fastest = min(fastest, times.min())
        repeats = max(1, math.ceil(block_seconds / max(fastest, 1e-9)))
        passes += 1
    return repeats, times


def summarize(times: np.ndarray, threads: int) -> Timing:
    """Percentiles of what `take_turns` measured: `times` (rounds, 2) in seconds per call."""
    times = np.maximum(times, 1e-12)
    medians, p95s = np.percentile(times * 1e3, [50, 95], axis=0)
    deciles = np.percentile(times * 1e3, np.arange(0, 101, 10), axis=0).T.tolist()
    quiet = times[_quiet_rounds(times)]
    lo, median, hi = np.percentile(quiet[:, 0] / quiet[:, 1], [25, 50, 75])
    return Timing(
        float_ms=float(medians[0]),
        quantized_ms=float(medians[1]),
        float_p95_ms=float(p95s[0]),
        quantized_p95_ms=float(p95s[1]),
        speedup=float(median),
        speedup_lo=float(lo),
        speedup_hi=float(hi),
        rounds=len(times),
        threads=threads,
        float_deciles_ms=tuple(deciles[0]),
        quantized_deciles_ms=tuple(deciles[1]),
    )


def _quiet_rounds(times: np.ndarray) -> np.ndarray:
    """The rounds that others disturbed least: one in QUIET_PART, at least MIN_QUIET_ROUNDS.

    Others only ever add time. So a round is as quiet as the slower of its two times is near to the
    least time of the same model.
    """
    slowest = np.max(times / times.min(axis=0), axis=1)
    count = max(MIN_QUIET_ROUNDS, len(times) // QUIET_PART)
    return np.argsort(slowest, kind="stable")[:count]


def _time_block(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    """Seconds per call, over a block of repeats."""
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def _idle_threads_sleep(options: ort.SessionOptions) -> bool:
    try:
        return bool(options.get_session_config_entry("session.intra_op.allow_spinning") == "0")
    except RuntimeError:  # never set, and spinning is the default
        return False
