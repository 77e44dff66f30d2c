"""`python -m flows.batch` as a person runs it: output, exit codes, signals, and kill -9."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.dataset
import pytest
import yaml

from tests.pipeline.conftest import FAST, prefect_home, save_data, save_model
from tests.processes import command_line, descendants, is_alive, wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch, migrated):
    cache = tmp_path.parent / "prefect-of-commands"
    prefect_home(cache / "quantmill" / "prefect", migrated)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    (tmp_path / "models").mkdir()
    for seed in range(6):
        save_model(tmp_path / "models" / f"m{seed}.onnx", seed)
    save_data(tmp_path / "data.npy")
    batch = {"input_dir": "models", "output_dir": "out"}
    said = {"mode": "static", "calibration": {"data": "data.npy"}, "batch": batch, **FAST}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(said))
    return tmp_path


def command(folder, *arguments) -> list[str]:
    return [sys.executable, "-m", "flows.batch", str(folder / "m.yaml"), *arguments]


def start(folder, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        command(folder, *arguments),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_a_dry_run_prints_the_plans_and_starts_and_writes_nothing(folder):
    code = (
        "import sys; from flows.cli.commands import main; code = main(['config', *sys.argv[1:]]);"
        "assert not {'prefect', 'distributed', 'pyarrow'} & set(sys.modules); sys.exit(code)"
    )
    before = sorted(folder.rglob("*"))

    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "m.yaml"), "--dry-run", "--format", "json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    plans = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["model"] for row in plans] == [f"m{k}" for k in range(6)]
    assert {node["node"] for node in plans[0]["plan"]["nodes"]} >= {"conv", "gemm"}
    assert sorted(folder.rglob("*")) == before


def test_a_wrong_manifest_is_told_whole_with_exit_code_2_and_no_traceback(folder):
    (folder / "m.yaml").write_text("bits: 7\nbatch: {input_dir: models, output_dir: out, job: 3}\n")

    done = subprocess.run(command(folder), cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert "bits: is 7" in done.stderr
    assert "Did you mean jobs?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "out").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_model_is_stopped_in_a_word_and_leaves_nothing(folder, number, code):
    slow = (
        "import sys, time; from flows.cli.commands import main; from quant_core.model import write;"
        "write.save = lambda *a, **k: (print('writing', flush=True), time.sleep(60));"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [
        sys.executable,
        "-c",
        slow,
        "quantize",
        str(folder / "models" / "m0.onnx"),
        "-o",
        str(folder / "o.onnx"),
    ]
    before = sorted(folder.rglob("*"))
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == "writing\n"

    process.send_signal(number)

    _, errors = process.communicate()
    assert (process.returncode, errors) == (code, "stopped\n")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_goes_on_and_reports_as_if_nothing_had_happened(
    folder,
):
    """SIGTERM, kill -9 of the API server, then an undisturbed end, in JSON lines."""
    process = start(folder, "--format", "json")
    wait_for(process, '"started"')
    process.send_signal(
        signal.SIGSTOP
    )  # or a busy machine would finish six tiny models while we look around
    below = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    assert process.wait() == 143
    assert '"event":"end"' not in (folder / "out" / ".quantmill" / "journal.jsonl").read_text()
    wait_until(lambda: not any(map(is_alive, below)))

    process = start(folder, "--format", "json")
    wait_for(process, '"started"')
    server = next(
        pid for pid in descendants(process.pid) if "flows.runtime.api_server" in command_line(pid)
    )
    signal_to(server)
    lines = process.stdout.read().splitlines()

    assert process.wait() == 0
    last = json.loads(lines[-1])
    assert last["event"] == "finished"
    assert [row["outcome"] for row in last["models"]] == ["done"] * 6
    models = pyarrow.dataset.dataset(folder / "out" / "reports" / "models").to_table().to_pylist()
    assert sorted(row["model"] for row in models) == [f"m{k}" for k in range(6)]
    assert {row["run_id"] for row in models} == {last["run_id"]}
    left = {
        path.relative_to(folder / "out").as_posix()
        for path in (folder / "out").rglob("*")
        if path.is_file()
    }
    tables = {
        f"reports/{name}/{last['run_id']}.parquet"
        for name in ("runs", "models", "layers", "timings")
    }
    outputs = {path for path in left if path.startswith(".quantmill/outputs/")}
    assert len(outputs) == 6
    assert left - outputs == {
        ".quantmill/id",
        ".quantmill/journal.jsonl",
        ".quantmill/costs.jsonl",
        "reports/summary.json",
        "reports/report.html",
        *tables,
        *(f"m{k}_int8.onnx" for k in range(6)),
    }


def wait_for(process: subprocess.Popen, text: str) -> None:
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    raise AssertionError(f"{text} was never said: {''.join(seen)}")


def signal_to(pid: int) -> None:
    import os

    os.kill(pid, signal.SIGKILL)
