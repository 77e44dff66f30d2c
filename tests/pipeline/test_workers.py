"""A worker's death counts against the stage that it was running, not against stages that waited."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import dask
import pytest
from distributed import Client
from distributed.scheduler import KilledWorker

from flows.runtime.dask import local_cluster
from quant_core.errors import StageError, StageReason
from quant_core.versions import versions
from quant_core.worker.host import alone_on_host
from quant_core.worker.run import MAX_WORKER_DEATHS, StageLimits, run_stage, shut_down
from tasks.workers import BARE_BYTES, MAX_DEATHS_BEFORE_BEGIN, Workers
from tests.pipeline.services import serve
from tests.unit.worker.test_child import wait_until

STAGES = "tests.odd_stages"
LIMITS = StageLimits(timeout_s=60.0)


def test_a_stage_that_waits_on_a_killed_worker_loses_no_try(tmp_path, monkeypatch):
    serve(monkeypatch, STAGES)
    with ExitStack() as stack:
        # As on a host so busy that no worker comes back in the time that Dask gives it.
        stack.enter_context(dask.config.set({"distributed.deploy.lost-worker-timeout": "0s"}))
        client = stack.enter_context(Client(stack.enter_context(local_cluster(1))))
        threads = stack.enter_context(ThreadPoolExecutor(2))
        workers = Workers(client, LIMITS, tmp_path)

        killer = threads.submit(
            workers.run, "kill_the_worker", "bad", {"ready": str(tmp_path / "ready")}
        )
        wait_until(lambda: any(mark.stat().st_size for mark in tmp_path.iterdir()))
        neighbour = threads.submit(workers.run, "echo", "good", {"text": "alive"})
        wait_until(lambda: len(next(iter(client.processing().values()))) == 2)
        (tmp_path / "ready").touch()

        with pytest.raises(StageError, match="Dask worker died") as error:
            killer.result()
        assert error.value.reason is StageReason.LOST
        assert neighbour.result()["result"] == {
            "text": "alive"
        }  # of one call: Prefect tried it once


class Deadly:
    """A Dask client on which every worker dies, `begun` of them during the stage."""

    def __init__(self, begun: int) -> None:
        self.begun, self.deaths = begun, 0

    def submit(self, function, stage, request, limits, mark, key):
        def result(timeout=None):
            self.deaths += 1
            Path(mark).write_bytes(b"x" * self.begun)
            raise KilledWorker("task", SimpleNamespace(address="tcp://nowhere"), 0)

        return SimpleNamespace(result=result, done=lambda: True)


def test_deaths_before_a_stage_began_are_retried_often_but_not_forever(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    client = Deadly(begun=0)

    with pytest.raises(StageError, match="every Dask worker died before it began"):
        Workers(client, LIMITS, tmp_path).run("prepare", "m", {})

    assert client.deaths == MAX_DEATHS_BEFORE_BEGIN


def test_a_death_during_a_stage_is_a_try(tmp_path):
    client = Deadly(begun=1)

    with pytest.raises(StageError, match="Dask worker died") as error:
        Workers(client, LIMITS, tmp_path).run("prepare", "m", {})

    assert error.value.reason is StageReason.LOST
    assert client.deaths == 1
    assert not list(tmp_path.iterdir())


def test_a_scheduler_that_tries_again_by_itself_has_used_up_the_tries(tmp_path):
    with pytest.raises(StageError, match="Dask worker died") as error:
        Workers(Deadly(begun=MAX_WORKER_DEATHS), LIMITS, tmp_path).run("prepare", "m", {})

    assert error.value.reason is StageReason.DEADLY
    assert not error.value.reason.is_transient


def test_a_stage_during_which_workers_died_too_often_is_not_started_again(tmp_path):
    mark = tmp_path / "mark"
    mark.write_bytes(b"x" * (MAX_WORKER_DEATHS - 1))
    assert run_stage("echo", {"text": ""}, mark=str(mark), module=STAGES)["result"]
    assert mark.stat().st_size == MAX_WORKER_DEATHS - 1

    mark.write_bytes(b"x" * MAX_WORKER_DEATHS)
    with pytest.raises(StageError, match="Dask worker died"):
        run_stage("echo", {"text": ""}, mark=str(mark), module=STAGES)

    shut_down()


def test_what_a_stage_will_need_is_what_it_held_or_what_is_known_of_its_model(tmp_path):
    workers = Workers(SimpleNamespace(), LIMITS, tmp_path)
    assert workers.need("quantize", "m") == BARE_BYTES

    workers.expect("m", 100_000_000)
    expected = workers.need("quantize", "m")
    workers.peaks["m", "prepare"] = 5 * expected
    workers.peaks["m", "validate"] = 1000
    workers.peaks["other", "quantize"] = 100 * expected

    assert expected > 500_000_000
    assert workers.need("quantize", "m") == 10 * expected
    assert workers.need("validate", "m") == 1000


def test_a_stage_that_ran_out_of_the_hosts_memory_reserves_twice_as_much_the_next_time(
    tmp_path,
):
    def submit(function, stage, request, limits, *others, key):
        def result(timeout=None):
            if limits.need_bytes < 3 * BARE_BYTES:
                raise StageError("out of memory", reason=StageReason.HOST_MEMORY)
            return {"result": {}, "peak_bytes": 12345, "versions": versions()}

        return SimpleNamespace(result=result, done=lambda: True)

    workers = Workers(SimpleNamespace(submit=submit), LIMITS, tmp_path)

    for _ in range(2):
        with pytest.raises(StageError):
            workers.run("prepare", "m", {})
    workers.run("prepare", "m", {})

    assert workers.need("prepare", "m") == 12345


@pytest.mark.parametrize("theirs", [{"versions": {**versions(), "quantmill": "0.0.1"}}, {}])
def test_an_answer_of_a_worker_with_other_versions_is_refused(tmp_path, theirs):
    def submit(function, *arguments, key):
        answer = {"result": {}, "peak_bytes": 1, **theirs}
        return SimpleNamespace(result=lambda timeout=None: answer, done=lambda: True)

    workers = Workers(SimpleNamespace(submit=submit), LIMITS, tmp_path)

    with pytest.raises(StageError, match=r"other versions: quantmill (0\.0\.1|unknown)"):
        workers.run("prepare", "m", {})


def test_stages_that_run_alone_say_that_they_wait_and_wait_no_longer_than_the_limit_together(
    tmp_path,
):
    granted = []

    def submit(function, stage, request, limits, *others, key):
        granted.append(limits.patience_s)
        waited_s = min(limits.patience_s, 40.0)
        answer = {"result": {}, "peak_bytes": 1, "versions": versions(), "waited_s": waited_s}

        looks = iter([False, True])  # it has begun at the second look

        def result(timeout=None):
            if not next(looks):
                raise TimeoutError
            return answer

        return SimpleNamespace(result=result, done=lambda: True)

    workers, said = Workers(SimpleNamespace(submit=submit), LIMITS, tmp_path), []

    for _ in range(3):
        workers.run_alone("benchmark", "m", {}, said.append)

    assert granted == said == [60.0, 20.0, 0.0]


def test_a_stage_that_runs_alone_waits_until_its_host_is_free_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.workers.WAIT_S", 0.2)
    serve(monkeypatch, STAGES)
    free, said = ExitStack(), []

    def on_wait(seconds):
        said.append(seconds)
        free.close()

    with local_cluster(1) as cluster, Client(cluster) as client:
        free.enter_context(alone_on_host(60.0))
        workers = Workers(client, LIMITS, tmp_path)

        answer = workers.run_alone("echo", "m", {"text": "alone"}, on_wait)

    assert answer["result"] == {"text": "alone"}
    assert said == [60.0]
    assert workers.patience_s < 60.0


def test_a_cluster_that_has_lost_all_workers_fails_the_stage_instead_of_waiting_for_ever(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("tasks.workers.NO_WORKER_S", 0.0)

    def submit(function, *arguments, key):
        def result(timeout=None):
            raise TimeoutError

        return SimpleNamespace(result=result, done=lambda: False)

    client = SimpleNamespace(
        submit=submit, scheduler_info=lambda n_workers: {"workers": {}}, cancel=lambda futures: None
    )

    with pytest.raises(StageError, match="no Dask worker is left"):
        Workers(client, LIMITS, tmp_path).run("prepare", "m", {})
