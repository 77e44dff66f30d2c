"""Only as many stages run at once as memory allows, and none waits for a process that is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from quant_core.errors import StageError, StageReason
from quant_core.worker import memory
from quant_core.worker.run import StageLimits, run_stage, shut_down
from tests.processes import LONGEST_WAIT_S, wait_until

STAGES = "tests.odd_stages"
GB = 1 << 30
NOBODY = 1 << 30  # no process has that number: what is reserved for it is never taken


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host of ten gigabytes on which nothing else runs."""
    monkeypatch.setattr(memory, "own_folder", lambda: tmp_path)
    monkeypatch.setattr(memory, "available_bytes", lambda: 10 * GB)
    return tmp_path


def test_stages_that_fit_together_run_at_once(host):
    both_began = threading.Barrier(2)

    def stage(need: int) -> None:
        with memory.reserve(need, NOBODY):
            both_began.wait(timeout=LONGEST_WAIT_S)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(stage, [4 * GB, 6 * GB]))


def test_stages_never_hold_more_together_than_there_is(host):
    held, most_held, lock = 0, [], threading.Lock()

    def stage(need: int) -> None:
        nonlocal held
        with memory.reserve(need, NOBODY):
            with lock:
                held += need
                most_held.append(held)
            time.sleep(0.05)  # for others to begin meanwhile
            with lock:
                held -= need

    with ThreadPoolExecutor(12) as threads:
        list(threads.map(stage, [3 * GB, 4 * GB, 1 * GB, 6 * GB] * 3))

    assert len(most_held) == 12
    assert max(most_held) <= 10 * GB
    assert [path.name for path in host.iterdir()] == ["gate"]


def test_the_only_stage_begins_whatever_it_needs(host):
    with memory.reserve(1000 * GB, NOBODY):
        assert len(list(host.glob("stage-*"))) == 1


def test_what_a_stage_holds_already_is_not_counted_twice(host):
    held = memory.held_bytes(os.getpid())

    with memory.reserve(held + 9 * GB, os.getpid()), memory.reserve(GB - 1, NOBODY):
        pass  # `available_bytes` is less what is held: nine gigabytes are still to be taken


def test_a_process_that_is_killed_keeps_nothing(host):
    code = f"""
import sys, time
from pathlib import Path
from quant_core.worker import memory
memory.own_folder = lambda: Path({str(host)!r})
with memory.reserve(9 << 30, {NOBODY}):
    print("in", flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"in\n"
    waiting = threading.Thread(target=lambda: memory.reserve(8 * GB, NOBODY).__enter__())
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()

    other.send_signal(signal.SIGKILL)
    other.communicate()

    waiting.join(LONGEST_WAIT_S)
    assert not waiting.is_alive()


def test_a_stage_that_outgrows_its_reservation_ends_when_the_host_has_no_more(
    host, tmp_path, monkeypatch
):
    request = {"megabytes": 300, "mark": str(tmp_path / "mark"), "until": str(tmp_path / "until")}
    (tmp_path / "until").touch()
    answer = run_stage("hold", request, StageLimits(need_bytes=GB), module=STAGES)
    assert answer["peak_bytes"] > 300_000_000

    (tmp_path / "until").unlink()
    (tmp_path / "mark").unlink()
    with ThreadPoolExecutor(1) as threads:
        little = StageLimits(need_bytes=GB // 8)
        held = threads.submit(run_stage, "hold", request, little, module=STAGES)
        wait_until(lambda: (tmp_path / "mark").exists())
        monkeypatch.setattr(memory, "available_bytes", lambda: -1)

        with pytest.raises(StageError, match=r"\d+ MB held, and this host has no more") as error:
            held.result()
        assert error.value.reason is StageReason.HOST_MEMORY

    shut_down()


def test_this_host_says_what_memory_it_has():
    assert 0 < memory.available_bytes() < memory.total_bytes()
    assert memory.held_bytes(os.getpid()) > 1_000_000
    assert memory.peak_bytes(os.getpid()) >= memory.held_bytes(os.getpid()) // 2
    assert memory.held_bytes(NOBODY) == 0
