"""How a flow of Prefect is called: its result counts, whatever becomes of Prefect."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.batch.flow_run import Caller, call_flow, current_caller
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
