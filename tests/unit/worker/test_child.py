"""A stage in its child: every way to die is told, nothing outlives its parent, and the next stage runs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quant_core.errors import DataError, StageError
from quant_core.worker import child
from quant_core.worker.child import InterruptedStage, run_stage

STAGES = "tests.odd_stages"


@pytest.fixture(autouse=True)
def no_child_left():
    yield
    child.shut_down()


def ask(name: str, **options):
    request = options.pop("request", {})
    return run_stage(name, request, module=STAGES, **options)


def test_an_answer_comes_back_whole_however_much_is_printed_beside_it():
    run = ask("echo", request={"text": "x" * 3_000_000})

    assert run["result"] == {"text": "x" * 3_000_000}
    assert run["seconds"] > 0
    assert run["peak_bytes"] > 1_000_000


def test_one_child_serves_stage_after_stage():
    assert len({ask("pid")["result"]["pid"] for _ in range(5)}) == 1


@pytest.mark.parametrize(
    ("name", "kind", "told"),
    [
        ("segfault", StageError, "crashed with SIGSEGV"),
        ("abort", StageError, "crashed with SIGABRT"),
        ("leave", StageError, "ended with exit code 3"),
        ("exit", StageError, "SystemExit"),
        ("killed", InterruptedStage, "killed by SIGKILL"),
        ("disk_full", StageError, "no space left"),
        ("busy", InterruptedStage, "busy"),
        ("wrong_data", DataError, "has NaN"),
        ("bug", StageError, "KeyError: 'x'"),
        ("too_large", StageError, "out of memory"),
    ],
)
def test_every_way_to_fail_is_told_and_the_next_stage_runs(name, kind, told):
    with pytest.raises(kind, match=told) as error:
        ask(name)

    assert type(error.value) is kind
    assert ask("echo", request={"text": "again"})["result"] == {"text": "again"}


def test_native_code_that_hangs_is_stopped_at_its_deadline_with_all_it_started():
    before = time.monotonic()

    with pytest.raises(StageError, match=r"took longer than 0.5 s"):
        ask("hang", timeout_s=0.5)

    assert time.monotonic() - before < 30  # not the minute that it would hang


def test_memory_is_limited_and_the_peak_is_told():
    with pytest.raises(StageError, match=r"out of memory: \d+ MB held, 210 MB allowed"):
        ask("hog", memory_bytes=210_000_000)


def test_a_child_dies_with_its_parent_even_while_native_code_holds_the_interpreter(tmp_path):
    code = f"""
from quant_core.worker.child import run_stage
run_stage("hang", {{"mark": {str(tmp_path / "pid")!r}}}, module={STAGES!r})
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[3])
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())

    parent.kill()
    parent.wait()

    wait_until(lambda: not is_alive(pid))


def test_a_benchmark_has_the_host_to_itself_and_tells_how_busy_others_were():
    told = ask("echo", request={"text": ""}, alone=True)

    assert 0 <= told["host_load"] <= 1.5
    assert isinstance(told["busy"], bool)


def test_a_benchmark_beside_others_is_marked(monkeypatch):
    passed = iter(range(1000))  # as many CPU seconds at every look, however short the time between
    monkeypatch.setattr(child, "_busy_seconds", lambda: next(passed))

    assert ask("echo", request={"text": ""}, alone=True)["busy"]
    monkeypatch.setattr(child, "_busy_seconds", lambda: 0.0)
    assert not ask("echo", request={"text": ""}, alone=True)["busy"]


def wait_until(holds, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
