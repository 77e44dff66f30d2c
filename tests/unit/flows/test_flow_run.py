"""How a flow of Prefect is called: its result counts, whatever becomes of Prefect."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from flows.batch import flow_run
from flows.batch.flow_run import Caller, call_flow, current_caller, run_side_by_side
from flows.console.events import Unrecorded
from flows.console.result import BatchResult
from flows.manifest.jobs import Manifest
from quant_core.errors import RequestError, StageError


@pytest.fixture
def events():
    return []


@pytest.fixture
def caller(events, tmp_path):
    return Caller(Manifest((), tmp_path), None, events.append)


def call(flow, caller):
    return call_flow("batch", flow, caller, BatchResult, "Once more")


def test_a_run_that_is_over_counts_although_prefect_s_server_is_lost(caller, events):
    result = BatchResult("run", (), Path("reports"), 1.0)

    def flow(return_state):
        current_caller().on_end(result)
        raise ConnectionError("refused")

    assert call(flow, caller) is result
    assert events == [Unrecorded("refused")]


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (ConnectionError("refused"), "the batch stopped: refused. Once more"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (OSError(28, "No space left on device"), "the batch stopped: no space left on device"),
    ],
)
def test_a_run_that_prefect_stops_is_an_error_in_words(caller, problem, words):
    def flow(return_state):
        raise problem

    with pytest.raises(StageError) as caught:
        call(flow, caller)

    assert words in f"{caught.value.problem}. {caught.value.hint}"


def test_an_error_of_ours_stays_what_it_is(caller):
    def flow(return_state):
        raise RequestError("is wrong")

    with pytest.raises(RequestError, match="is wrong"):
        call(flow, caller)


def test_workers_that_join_late_get_calls_too(monkeypatch):
    workers = [1]
    all_busy = threading.Barrier(8 + flow_run.WAITING, timeout=60)

    def join() -> int:
        workers[0] = 8
        return -1

    with ThreadPoolExecutor(16) as threads:
        task = SimpleNamespace(submit=lambda *call: threads.submit(flow_run._call.fn, *call))
        monkeypatch.setattr(flow_run, "_call", SimpleNamespace(fn=flow_run._call.fn))
        flow_run._call.with_options = lambda **options: task
        calls = [("joins", join), *(("waits", all_busy.wait) for _ in range(all_busy.parties))]

        results = run_side_by_side("model", calls, lambda: workers[0])

    assert sorted(results) == list(range(-1, all_busy.parties))
