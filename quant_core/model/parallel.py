"""A function of many items on a few threads: onnxruntime and numpy compute without the GIL."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Threads. Two results at most wait in memory, and other models of a batch need cores too.
AT_ONCE = 2
PAYS_S = 1e-3  # less than this costs more in another thread


def parallel_map(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """The function of each item, in their order; while one is used, the next ones are computed.

    That begins after the first item that takes long enough to be worth a thread. The items are read
    by the caller's thread. Numpy treats errors in the function as it does there.

    Raises: what the function raises, in the place of its result.
    """
    left = iter(items)
    for item in left:
        started = time.perf_counter()
        result = function(item)
        pays = time.perf_counter() - started >= PAYS_S
        yield result
        if pays:
            yield from _in_threads(function, left)


def _in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    coming: deque[Future[R]] = deque()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for item in items:
            coming.append(pool.submit(copy_context().run, function, item))
            if len(coming) > AT_ONCE:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
