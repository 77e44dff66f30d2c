"""Scheduled runs start on a real server, by a process worker and by `deployments.serve`.

Both work after the other: `deployments.serve` has served that server in test_containers.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.pipeline.conftest import FAST, QUICK, save_data, save_model
from tests.pipeline.services import PREFECT, ROOT, ask, running, wait_for_run

# Every 15 seconds: a worker starts what is due within ten, and more runs than one are for nothing.
OFTEN = "* * * * * */15"

pytestmark = pytest.mark.slow


@pytest.fixture
def manifest(tmp_path) -> Path:
    """A manifest of one model."""
    (tmp_path / "models").mkdir()
    save_model(tmp_path / "models" / "m.onnx")
    save_data(tmp_path / "data.npy")
    batch = {"input_dir": "models", "output_dir": "out", "jobs": 1}
    said = {"calibration": {"data": "data.npy"}, "batch": batch, **FAST, **QUICK}
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
    ask(url, "/work_pools/", {"name": "quantmill", "type": "process"})
    done = subprocess.run(
        [*PREFECT, *deploy],
        cwd=ROOT,
        env={**environment, "PWD": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert f"Deploying to Prefect's server at {url}" in done.stdout

    with running([*PREFECT, "worker", "start", "--pool", "quantmill"], environment):
        batches = wait_for_run(url, f"batch {manifest}")

    assert batches["auto_scheduled"]
    assert batches["work_pool_name"] == "quantmill"
    assert summary(tmp_path)["state"] == "Completed"


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
        "quantmill-batch-report",
        "quantmill-batch-progress",
        "quantmill-audit-summary",
        "quantmill-audit-progress",
    }
    assert summary(tmp_path)["state"] == "Completed"


def test_a_schedule_that_cron_does_not_know_is_told_in_one_line(manifest):
    command = [sys.executable, "-m", "deployments.serve", str(manifest), "--cron", "61 * * * *"]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert "argument --cron: is '61 * * * *'; five fields are meant" in done.stderr
    assert "Traceback" not in done.stderr


def summary(folder: Path) -> dict:
    return json.loads((folder / "out" / "reports" / "summary.json").read_text())
