"""How long the original takes for one sample, and how many samples that leaves time for."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from quant_core.evaluate.timing_cache import Cost, TimingCache
from quant_core.model.session import Feed, open_session, run
from quant_core.search.bench import model_on
from quant_core.search.policy import POLICY


def one_run(original: Path, feed: Feed, costs: TimingCache) -> Cost:
    """The CPU time of one run of the original. Raises: ModelError if it does not run."""
    what = f"{model_on(costs.digest_of(original), feed)} in float"
    return costs.of(what, partial(_timed, original, feed))


def affordable_samples(one: Cost) -> int:
    """On how many samples a model that takes so long for one can run in `POLICY.drawn_s`."""
    return int(1e3 * POLICY.drawn_s / one.float_ms)


def _timed(original: Path, feed: Feed) -> Cost:
    session = open_session(original)
    run(session, feed)  # the first one allocates memory
    began_at = time.thread_time()
    run(session, feed)
    return Cost(max(1e-3, 1e3 * (time.thread_time() - began_at)), 1.0)
