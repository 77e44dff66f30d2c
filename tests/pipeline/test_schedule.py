"""Scheduled runs start on a real server, by `deployments.serve` and by a process worker."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from flows.runtime.prefect_api import ENVIRONMENT
from tests.pipeline.conftest import FAST, save_data, save_model
from tests.processes import wait_until

ROOT = Path(__file__).parents[2]
PREFECT = [sys.executable, "-m", "prefect"]
EAGER = {
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "1",
    "PREFECT_RUNNER_POLL_FREQUENCY": "1",
    "PREFECT_LOGGING_LEVEL": "ERROR",
    "PREFECT_UI_ENABLED": "false",
}
OFTEN = "* * * * * */5"  # every five seconds

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def api(tmp_path_factory) -> Iterator[tuple[str, dict[str, str]]]:
    """A server with its scheduler, and the environment in which everything finds it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    home = str(tmp_path_factory.mktemp("home"))
    places = {"PREFECT_HOME": home, "PREFECT_API_URL": url}
    environment = {**os.environ, **ENVIRONMENT, **EAGER, **places}
    start = ["server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with running([*PREFECT, *start], environment):
        wait_until(lambda: ask(url, "/health") is True)
        yield url, environment


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str]) -> Iterator[None]:
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


@pytest.fixture
def manifest(tmp_path) -> Path:
    """A manifest of one model."""
    (tmp_path / "models").mkdir()
    save_model(tmp_path / "models" / "m.onnx")
    save_data(tmp_path / "data.npy")
    batch = {"input_dir": "models", "output_dir": "out", "jobs": 1}
    said = {"calibration": {"data": "data.npy"}, "batch": batch, **FAST}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(said))
    return tmp_path / "m.yaml"


def test_a_process_worker_runs_what_prefect_yaml_deploys(api, manifest, tmp_path):
    url, environment = api
    said = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())
    said["deployments"] = [one for one in said["deployments"] if one["name"] == "nightly"]
    said["deployments"][0] |= {
        "parameters": {"manifest": str(manifest)},
        "schedules": [{"cron": OFTEN}],
    }
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump(said))
    deploy = ["--no-prompt", "deploy", "--prefect-file", str(tmp_path / "prefect.yaml"), "--all"]
    for command in (["work-pool", "create", "quantmill", "--type", "process"], deploy):
        subprocess.run(
            [*PREFECT, *command], cwd=ROOT, env=environment, check=True, capture_output=True
        )

    with running([*PREFECT, "worker", "start", "--pool", "quantmill"], environment):
        batches = wait_for_run(url, f"batch {manifest}")

    assert batches["auto_scheduled"]
    assert batches["work_pool_name"] == "quantmill"
    assert summary(tmp_path)["state"] == "Completed"
    # A run that was cut off would keep its deployment's one slot for minutes.
    for deployment in ask(url, "/deployments/filter", {}):
        ask(url, f"/deployments/{deployment['id']}", method="DELETE")


def test_the_nightly_batch_and_the_weekly_audit_fire_on_schedule(api, manifest, tmp_path):
    url, environment = api
    command = [sys.executable, "-m", "deployments.serve", str(manifest)]

    with running([*command, "--cron", OFTEN, "--audit-cron", OFTEN], environment):
        batches, audits = (
            wait_for_run(url, name) for name in (f"batch {manifest}", f"audit {tmp_path / 'out'}")
        )

    assert batches["auto_scheduled"]
    assert {"quantmill", "batch"} <= set(batches["tags"])
    assert audits["auto_scheduled"]
    artifacts = {artifact["key"] for artifact in ask(url, "/artifacts/filter", {})}
    assert artifacts >= {
        "quantmill-batch-models",
        "quantmill-batch-summary",
        "quantmill-audit-summary",
    }
    assert summary(tmp_path)["state"] == "Completed"


def wait_for_run(url: str, name: str) -> dict:
    """The first run of that name that is completed."""
    wanted = {"flow_runs": {"name": {"any_": [name]}, "state": {"type": {"any_": ["COMPLETED"]}}}}
    found: list[dict] = []
    wait_until(lambda: found.extend(ask(url, "/flow_runs/filter", wanted) or []) or found)
    return found[0]


def summary(folder: Path) -> dict:
    return json.loads((folder / "out" / "reports" / "summary.json").read_text())


def ask(url: str, path: str, body: dict | None = None, method: str | None = None):
    """What the API answers; None if it does not answer."""
    request = urllib.request.Request(
        url + path, None if body is None else json.dumps(body).encode(), method=method
    )
    request.add_header("Content-Type", "application/json")
    with contextlib.suppress(OSError):
        return json.loads(urllib.request.urlopen(request, timeout=10).read() or "null")
    return None
