"""One batch on 1, 2 and 4 worker processes that have joined a scheduler.

    python -m tests.bench.scaling [MODELS]

The models must be the same to the last byte; the seconds show what a worker adds.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import duckdb
import yaml

from tasks.contents import file_digest
from tests.bench.batch100 import write_inputs

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def main(count: int) -> int:
    made: dict[int, dict[str, str]] = {}
    seconds: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        write_inputs(folder, count, 128)
        time.sleep(1.1)
        for workers in (1, 2, 4):
            with cluster(workers) as address:
                seconds[workers], made[workers] = timed(folder, f"out{workers}", address)
            timings = f"{folder}/out{workers}/reports/timings/*.parquet"
            query = (
                f"select stage, sum(seconds) from read_parquet('{timings}') group by 1 order by 1"
            )
            stages = ", ".join(
                f"{stage} {spent:.1f}" for stage, spent in duckdb.sql(query).fetchall()
            )
            speedup = seconds[1] / seconds[workers]
            print(f"{workers} workers: {seconds[workers]:.1f} s, x {speedup:.2f} ({stages})")
    same = made[1] == made[2] == made[4]
    print(f"{count} models, the same to the last byte: {same}")
    return int(not same)


def timed(folder: Path, out: str, address: str) -> tuple[float, dict[str, str]]:
    """Seconds from the first stage to the end, and each model's digest."""
    said = {"mode": "weight_only", "bits": 4, "weight_method": "gptq", "benchmark": {"seconds": 0}}
    said |= {
        "calibration": {"data": "data.npy"},
        "batch": {"input_dir": "models", "output_dir": out},
    }
    (folder / "m.yaml").write_text(yaml.safe_dump(said))
    command = [
        sys.executable,
        "-m",
        "flows.batch",
        str(folder / "m.yaml"),
        "--format",
        "json",
        "--scheduler",
        address,
    ]
    environment = {**ENVIRONMENT, "XDG_CACHE_HOME": str(folder / "prefect")}
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "started":
                begun = time.monotonic()
            if event["event"] == "finished":
                seconds = time.monotonic() - begun
    assert process.returncode == 0, line
    return seconds, {path.name: file_digest(path) for path in sorted((folder / out).glob("*.onnx"))}


@contextlib.contextmanager
def cluster(workers: int) -> Iterator[str]:
    """The address of a scheduler with so many worker processes, each of one thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    scheduler = ["scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"]
    worker = [
        "worker",
        address,
        "--nworkers",
        str(workers),
        "--nthreads",
        "1",
        "--no-dashboard",
        "--host",
        "127.0.0.1",
    ]
    with contextlib.ExitStack() as stack:
        for command in (scheduler, worker):
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", *command],
                cwd=ROOT,
                env=ENVIRONMENT,
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(stop, process)
        from distributed import Client

        with Client(address, timeout=30) as client:
            client.wait_for_workers(workers, timeout=60)
        yield address


def stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 12))
