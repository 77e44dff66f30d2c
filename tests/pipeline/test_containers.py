"""deployments/container without a container engine: its files are read, its commands are run."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import socket
import sys

import pytest
import yaml

from tests.pipeline.conftest import FAST, QUICK, save_data, save_model
from tests.pipeline.services import ROOT, ask, running, wait_for_run
from tests.processes import wait_until

CONTAINER = ROOT / "deployments" / "container"
COMPILERS = re.compile(r"\b(gcc|g\+\+|clang|cmake|build-essential)\b")


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, with continued lines joined."""
    text = (CONTAINER / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def services() -> dict:
    return yaml.safe_load((CONTAINER / "compose.yaml").read_text())["services"]


def test_the_image_is_slim_runs_as_a_user_without_rights_and_needs_no_compiler():
    steps = instructions()
    said = {word: [value for name, value in steps if name == word] for word, _ in steps}

    assert [image.endswith("-slim") for image in said["FROM"]] == [True]
    assert said["USER"] == ["quantmill"]
    assert steps.index(("USER", "quantmill")) > max(
        i for i, (name, _) in enumerate(steps) if name in ("RUN", "COPY")
    )
    assert not any(COMPILERS.search(command) for command in said["RUN"])
    assert any("--only-binary=:all:" in command for command in said["RUN"])
    for copied in said["COPY"]:
        *sources, _ = shlex.split(copied)
        assert all((ROOT / source).exists() for source in sources)
        assert not any(source.startswith("deployments/demo") for source in sources)  # no models


def test_every_service_sees_the_models_at_one_path_and_only_this_host_reaches_prefect():
    mounts = {
        name: [v.split(":")[-1] for v in said["volumes"]] for name, said in services().items()
    }

    assert all("/work" in paths for paths in mounts.values())
    assert set(mounts) == {"prefect", "scheduler", "worker", "nightly"}
    assert services()["worker"]["deploy"]["replicas"] == 2
    for said in services().values():
        assert said["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in said.get("ports", []))


@pytest.mark.slow
def test_the_commands_of_all_services_make_the_models_of_a_manifest(api, tmp_path):
    url, environment = api  # the server of the service `prefect`
    names = ("a", "b")
    (tmp_path / "models").mkdir()
    for seed, name in enumerate(names):
        save_model(tmp_path / "models" / f"{name}.onnx", seed)
    save_data(tmp_path / "data.npy")
    batch = {"input_dir": "models", "output_dir": "out"}
    manifest = {"calibration": {"data": "data.npy"}, "batch": batch, **FAST, **QUICK}
    (tmp_path / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])

    def command(service: str) -> list[str]:
        """As in compose.yaml, with this host in place of the containers."""
        program, *arguments = services()[service]["command"]
        text = "\n".join(arguments).replace("/work", str(tmp_path)).replace("8786", port)
        start = [sys.executable] if program == "python" else [sys.executable, "-m", program]
        return [*start, *text.replace("tcp://scheduler:", "tcp://127.0.0.1:").split("\n")]

    with contextlib.ExitStack() as stack:
        stack.enter_context(running([*command("scheduler"), "--host", "127.0.0.1"], environment))
        for _ in range(services()["worker"]["deploy"]["replicas"]):
            stack.enter_context(running(command("worker"), environment))
        stack.enter_context(running(command("nightly"), environment))
        nightly = wait_for_deployment(url, "nightly")
        wait_until(lambda: ask(url, f"/deployments/{nightly}/create_flow_run", {}))
        wait_for_run(url, f"batch {tmp_path / 'manifest.yaml'}")

    summary = json.loads((tmp_path / "out" / "reports" / "summary.json").read_text())
    assert (summary["state"], summary["done"]) == ("Completed", 2)
    assert {path.name for path in (tmp_path / "out").glob("*.onnx")} == {
        f"{name}_int8.onnx" for name in names
    }


def wait_for_deployment(url: str, name: str) -> str:
    """The id of the deployment of that name, once it is served."""
    found: list[str] = []

    def is_there() -> bool:
        deployments = ask(url, "/deployments/filter", {}) or []
        found.extend(one["id"] for one in deployments if one["name"] == name)
        return bool(found)

    wait_until(is_there)
    return found[0]


def test_the_server_that_tests_start_is_that_of_the_service():
    program, *arguments = services()["prefect"]["command"]

    assert program == "prefect"
    assert arguments[:3] == ["server", "start", "--host"]
    assert services()["nightly"]["environment"]["PREFECT_API_URL"] == "http://prefect:4200/api"
