"""A stage in its child: every death is reported, and the next stage runs."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from quant_core.errors import (
    DataError,
    ModelError,
    QuantError,
    StageError,
    StageReason,
    error_from_dict,
)
from quant_core.worker import host
from quant_core.worker.run import StageLimits, run_stage, shut_down
from tests.processes import is_alive, wait_until

STAGES = "tests.odd_stages"


@pytest.fixture(autouse=True)
def no_child_left():
    yield
    shut_down()


def ask(name: str, request=None, **limits):
    return run_stage(name, request or {}, StageLimits(**limits), module=STAGES)


def test_an_answer_comes_back_whole_however_much_is_printed_beside_it():
    run = ask("echo", request={"text": "x" * 3_000_000})

    assert run["result"] == {"text": "x" * 3_000_000}
    assert run["seconds"] > 0
    assert run["peak_bytes"] > 1_000_000


def test_one_child_serves_stage_after_stage():
    assert len({ask("pid")["result"]["pid"] for _ in range(5)}) == 1


@pytest.mark.parametrize(
    ("name", "reason", "problem"),
    [
        ("segfault", StageReason.CRASHED, "crashed with SIGSEGV"),
        ("abort", StageReason.CRASHED, "crashed with SIGABRT"),
        ("leave", StageReason.CRASHED, "ended with exit code 3"),
        ("exit", StageReason.FAILED, "SystemExit"),
        ("killed", StageReason.KILLED, "killed by SIGKILL"),
        ("disk_full", StageReason.FAILED, "no space left"),
        ("busy", StageReason.BUSY, "busy"),
        ("bug", StageReason.FAILED, "KeyError: 'x'"),
        ("too_large", StageReason.MEMORY, "out of memory"),
    ],
)
def test_every_way_to_fail_is_reported_and_the_next_stage_runs(name, reason, problem):
    with pytest.raises(StageError, match=problem) as error:
        ask(name)

    assert error.value.reason is reason
    assert ask("echo", request={"text": "again"})["result"] == {"text": "again"}


@pytest.mark.parametrize(
    "error",
    [
        QuantError("a"),
        ModelError("a", "b"),
        DataError("a", "b", "c"),
        StageError("a", "b", "c", StageReason.KILLED),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_survives_json_and_pickling(error):
    for copy in (
        error_from_dict(json.loads(json.dumps(error.to_dict()))),
        pickle.loads(pickle.dumps(error)),
    ):
        assert type(copy) is type(error)
        assert copy.to_dict() == error.to_dict()


def test_what_is_wrong_with_the_data_stays_a_data_error():
    with pytest.raises(DataError, match="has NaN"):
        ask("wrong_data")

    assert ask("echo", request={"text": "again"})["result"] == {"text": "again"}


def test_native_code_that_hangs_is_stopped_at_its_deadline_with_all_it_started():
    with pytest.raises(StageError, match=r"took longer than 0.5 s") as error:
        ask("hang", timeout_s=0.5)  # by itself it would hang for an hour

    assert error.value.reason is StageReason.TIMEOUT


def test_memory_is_limited_and_the_peak_is_reported():
    with pytest.raises(StageError, match=r"\d+ MB held, 210 MB allowed") as error:
        ask("hog", memory_bytes=210_000_000)

    assert error.value.reason is StageReason.MEMORY


def test_a_child_dies_with_its_parent_even_while_native_code_holds_the_interpreter(tmp_path):
    code = f"""
from quant_core.worker.run import run_stage
run_stage("hang", {{"mark": {str(tmp_path / "pid")!r}}}, module={STAGES!r})
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[3])
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())

    parent.kill()
    parent.wait()

    wait_until(lambda: not is_alive(pid))


def test_a_benchmark_has_the_host_to_itself_and_reports_how_busy_others_were():
    run = ask("echo", request={"text": ""}, alone=True)

    assert run["host_load"] >= 0
    assert isinstance(run["busy"], bool)


def test_a_lock_that_somebody_keeps_is_waited_for_as_long_as_patience_lasts():
    with host.alone_on_host(1.0) as is_alone:
        assert is_alone
        run = ask("echo", request={"text": ""}, alone=True, patience_s=0.3)
        assert run["busy"]
        assert run["waited_s"] >= 0.3
    with host.alone_on_host(0.0) as is_alone:
        assert is_alone


def test_a_benchmark_beside_others_is_marked(monkeypatch):
    passed = iter(range(1000))  # as many CPU seconds at every look, however short the time between
    monkeypatch.setattr(host, "busy_seconds", lambda: next(passed))

    assert ask("echo", request={"text": ""}, alone=True)["busy"]
    monkeypatch.setattr(host, "busy_seconds", lambda: 0.0)
    assert not ask("echo", request={"text": ""}, alone=True)["busy"]
