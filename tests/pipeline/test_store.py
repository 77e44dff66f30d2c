"""Batches whose models, data and outputs lie in a store: a server on loopback speaks S3."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml

from flows.batch import flow_run, to_do
from flows.journal import open_journal
from flows.manifest.read import check_manifest
from flows.runtime.run_options import RunOptions
from quant_core.judging import validate_model
from tasks import store_requests, stores
from tasks.cache import host_cache
from tasks.locations import Url
from tasks.rows import Outcome
from tests.models import tiny_cnn
from tests.pipeline.conftest import save_data
from tests.store import BUCKET, SECRET, credentials, s3_server

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STORE = Url(f"s3://{BUCKET}")
PROGRAM = "import sys; from distributed.cli.{0} import main; sys.exit(main())"
COMMON = ("--no-dashboard", "--host", "127.0.0.1")


@pytest.fixture(scope="module")
def server():
    """An S3 server's requests; clients in this process and in its children find it."""
    with s3_server() as (url, requests), pytest.MonkeyPatch.context() as patch:
        for name, value in credentials(url).items():
            patch.setenv(name, value)
        yield requests


@pytest.fixture(scope="module")
def cluster(server, starting_server, tmp_path_factory):
    """A scheduler with two workers, each with folders of its own."""
    folder = tmp_path_factory.mktemp("cluster")
    with contextlib.ExitStack() as stack:
        address = folder / "scheduler.json"
        start(stack, folder, "dask_scheduler", "--port", "0", "--scheduler-file", str(address))
        for k in range(2):
            own = folder / f"worker{k}"
            own.mkdir()
            options = ("--scheduler-file", str(address), "--nthreads", "1", "--no-nanny")
            start(stack, own, "dask_worker", *options, QUANTMILL_CACHE=str(own / "cache"))
        wait_for(address)
        starting_server()
        yield yaml.safe_load(address.read_text())["address"]


def start(stack, folder, program, *options, **environment):
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM.format(program), *options, *COMMON],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    stack.callback(process.wait)
    stack.callback(process.kill)


def wait_for(path: Path) -> None:
    for _ in range(1200):
        if path.exists() and path.read_text().endswith("}"):
            return
        threading.Event().wait(0.05)
    raise TimeoutError(path)


@pytest.fixture
def mill(tmp_path, server):
    """Values of a manifest of the named models in the store, one of which has external data."""

    def mill(place: Url, *names: str):
        local = tmp_path / "local"
        local.mkdir()
        for seed, name in enumerate(names):
            model, data = tiny_cnn(seed=seed), f"{name}.data"
            external = {"save_as_external_data": True, "location": data, "size_threshold": 0}
            onnx.save(model, local / f"{name}.onnx", **(external if seed == 0 else {}))
        save_data(local / "data.npy")
        for path in local.iterdir():
            stores.upload(path, place / path.name, 60.0)
        return {
            "calibration": {"data": f"{place}/data.npy"},
            "benchmark": {"seconds": 0},
            "mode": "static",  # with samples to calibrate on, and few candidates
            "batch": {"input_dir": f"{place}/*.onnx", "output_dir": f"{place}/out"},
        }

    yield mill
    server.status, server.delay_s = lambda method, path: "", 0.0


def run(cluster, values, folder):
    from flows.batch.run import run_batch

    return run_batch(check_manifest(values, folder), RunOptions(scheduler=cluster))


def written_by(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_workers_that_share_nothing_but_a_slow_and_busy_store_make_a_batch_in_two_runs(
    cluster, server, mill, tmp_path, monkeypatch
):
    monkeypatch.setattr(store_requests, "RETRY_S", 0.0)
    monkeypatch.setattr(host_cache().contents, "max_bytes", 1)  # nothing that is read ahead stays
    monkeypatch.setattr(to_do, "READERS", 1)
    monkeypatch.setattr(flow_run, "WAITING", -1)  # one model at a time
    place = STORE / "models"
    out, values = place / "out", mill(place, "external", "a", "b")

    def is_busy(method, path):
        is_output = (method, path) == ("PUT", f"/{BUCKET}/models/out/a_int8.onnx")
        return "503 Service Unavailable" if is_output else ""

    server.status, server.delay_s = is_busy, 0.01
    first = run(cluster, values, tmp_path)

    assert [row.outcome for row in first.rows] == [Outcome.FAILED, Outcome.DONE, Outcome.DONE]
    assert (first.rows[0].stage, first.rows[0].where) == ("publish", f"{out}/a_int8.onnx")
    last_is_read = server.seen.index(("GET", f"/{BUCKET}/models/external.onnx"))
    assert "PUT" in {method for method, path in server.seen[:last_is_read] if "/cache/" in path}
    made, local = tmp_path / "made.onnx", tmp_path / "local"
    stores.download(out / "external_int8.onnx", made, 60.0)
    found = validate_model(local / "external.onnx", made, np.load(local / "data.npy"))
    assert found.fidelity.cosine > 0.99

    server.status, server.seen[:] = (lambda method, path: ""), []
    stores.write(out / "b_int8.onnx", b"edited by hand")
    second = run(cluster, values, tmp_path)

    assert [row.outcome for row in second.rows] == [Outcome.DONE, Outcome.DONE, Outcome.SKIPPED]
    assert "made again" in (second.rows[1].note or "")
    prepared = {path for _, path in server.seen if path.endswith("prepared.onnx")}
    assert len(prepared) == 1, "of b: the answers of a's stages were kept"
    names = {str(url.relative_to(out)) for url in stores.tree(out)}
    assert {name for name in names if not name.startswith(".quantmill/outputs/")} == {
        "a_int8.onnx",
        "b_int8.onnx",
        "external_int8.onnx",
    }
    assert SECRET.encode() not in written_by(check_manifest(values, tmp_path).folder)


def test_a_batch_killed_between_upload_and_journal_uploads_the_same_bytes_again(
    cluster, server, mill, tmp_path
):
    place = STORE / "killed"
    values = mill(place, "a")
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-P", "-m", "flows.batch", str(tmp_path / "m.yaml")]
    uploaded = f"/{BUCKET}/killed/out/a_int8.onnx"
    process = subprocess.Popen(
        [*command, "--scheduler", cluster, "--prefect", "inherit"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def kill_after_upload(method, path):
        if (method, path) == ("HEAD", uploaded) and ("PUT", uploaded) in server.seen:
            process.send_signal(signal.SIGKILL)
        return ""

    server.status = kill_after_upload
    assert process.wait() == -signal.SIGKILL
    with open_journal(check_manifest(values, tmp_path).folder) as journal:
        assert not list(journal.models())
    first = stores.stat(place / "out" / "a_int8.onnx")

    server.status, server.seen[:] = (lambda method, path: ""), []
    (row,) = run(cluster, values, tmp_path).rows

    assert row.outcome is Outcome.DONE
    assert ("PUT", uploaded) in server.seen
    assert not [path for _, path in server.seen if path.endswith("prepared.onnx")]
    assert stores.stat(place / "out" / "a_int8.onnx") == first
