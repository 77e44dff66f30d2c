"""What orchestration costs per model, measured with tiny models whose stages take little time.

python -m tests.bench.thousand [MODELS]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import duckdb
import onnx
import yaml

from tests.models import tiny_cnn

ROOT = Path(__file__).parents[2]
MOST_MS, MOST_MB = 60, 600


def main(count: int) -> int:
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "models").mkdir()
        for seed in range(count):
            onnx.save(tiny_cnn(seed=seed), folder / "models" / f"m{seed:05d}.onnx")
        said = {
            "mode": "weight_only",
            "benchmark": {"seconds": 0},
            "evaluation": {"data": "random", "num_samples": 2},
        }
        said |= {"batch": {"input_dir": "models", "output_dir": "out"}}
        (folder / "m.yaml").write_text(yaml.safe_dump(said))
        time.sleep(1.1)  # until the last model has settled
        seconds, workers, peak_mb, cpu_s = timed(folder)
        timings = f"{folder}/out/reports/timings/*.parquet"
        stages, runs = duckdb.sql(
            f"select sum(seconds), count(*) from read_parquet('{timings}')"
        ).fetchall()[0]
        journal = (folder / "out" / ".quantmill" / "journal.jsonl").stat().st_size
        database = sum(path.stat().st_size for path in (folder / "prefect").rglob("prefect.db*"))
        overhead_ms = 1000 * (seconds - stages / workers) / count
        cpu_ms = 1000 * cpu_s / count
        per_worker = stages / workers
        print(f"{count} models, {runs} stages, {workers} workers: {seconds:.1f} s")
        print(f"stages: {per_worker:.1f} s a worker")
        print(f"a model: overhead {overhead_ms:.1f} ms (at most {MOST_MS})")
        print(f"a model: coordinator CPU {cpu_ms:.1f} ms")
        print(f"coordinator's peak {peak_mb:.0f} MB (at most {MOST_MB})")
        print(f"a model: {journal / count:.0f} bytes of journal")
        print(f"a model: {database / count:.0f} bytes of Prefect's database")
        return int(overhead_ms > MOST_MS or peak_mb > MOST_MB)


def timed(folder: Path) -> tuple[float, int, float, float]:
    """Seconds from the first stage to the end, workers, and the coordinator's peak MB and CPU s."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "prefect")}
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "flows.batch", str(folder / "m.yaml"), "--format", "json"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "started":
            begun, workers, before = time.monotonic(), event["workers"], cpu_seconds(process.pid)
        if event["event"] == "model":  # the last one comes just before the end
            status = Path(f"/proc/{process.pid}/status").read_text()
            cpu = cpu_seconds(process.pid) - before
    seconds = time.monotonic() - begun
    assert process.wait() == 0
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return seconds, workers, peak / 1024, cpu


def cpu_seconds(pid: int) -> float:
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))
