"""kill -9 of the coordinator at random moments: `python -m tests.bench.kills [KILLS] [MODELS]`.

Then one full run: its rows and files have to be those of a batch that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow.dataset
import yaml

from tasks.contents import file_digest
from tests.models import tiny_cnn

ROOT = Path(__file__).parents[2]
# What a clock, a chance or this host's load decides; everything else has to be the same.
VARYING = {
    "run_id",
    "started_at",
    "finished_at",
    "seconds",
    "peak_bytes",
    "host_load",
    "rounds",
    "trace",
    "busy",
    "note",
    "workers",  # none where the killed run had made all models, and only its end was missing
}
VARYING |= {
    f"{kind}{part}_ms" for kind in ("float", "quantized") for part in ("", "_p95", "_deciles")
}
VARYING |= {"speedup", "speedup_lo", "speedup_hi"}


def make_models(folder: Path, models: int) -> None:
    """A manifest over models whose plan no timing decides."""
    (folder / "models").mkdir(parents=True)
    for seed in range(models):
        onnx.save(tiny_cnn(seed=seed), folder / "models" / f"m{seed:02d}.onnx")
    np.save(
        folder / "data.npy",
        np.random.default_rng(0).standard_normal((16, 3, 8, 8), dtype=np.float32),
    )
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))  # settled
    said = {
        "mode": "weight_only",
        "calibration": {"data": "data.npy"},
        "benchmark": {"seconds": 0.02},
    }
    said |= {"batch": {"input_dir": "models", "output_dir": "out", "jobs": 2}}
    (folder / "m.yaml").write_text(yaml.safe_dump(said))


def start(folder: Path, options: Sequence[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flows.batch", str(folder / "m.yaml"), "--format", "json"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder.parent / "prefect")}
    return subprocess.Popen(
        [*command, *options], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE
    )


def run(folder: Path, options: Sequence[str]) -> float:
    """Undisturbed; the seconds between its first event and its end."""
    process = start(folder, options)
    assert process.stdout is not None
    lines = [(time.monotonic(), line) for line in process.stdout]
    assert process.wait() == 0, f"exit code {process.returncode}:\n" + "".join(
        line for _, line in lines
    )
    times = [at for at, line in lines if '"started"' in line or '"finished"' in line]
    return times[-1] - times[0]


def kill_at(folder: Path, after: float, options: Sequence[str]) -> bool:
    """Killed so many seconds after the first event; whether it was still at work then."""
    process = start(folder, options)
    assert process.stdout is not None
    for line in process.stdout:
        if '"started"' in line:
            break
    try:
        process.wait(after)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        return True
    finally:
        process.wait()
        process.stdout.close()


def is_over(folder: Path) -> bool:
    """Whether its batch came to its end before the kill came: a new one would only skip."""
    lines = (
        (folder / "out" / ".quantmill" / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    )
    return any('"event":"end"' in line for line in lines)


def state(folder: Path) -> dict[str, Any]:
    """Every file with its content, every table of the last run without what varies."""
    out = folder / "out"
    runs = pyarrow.dataset.dataset(out / "reports" / "runs").to_table().to_pylist()
    last = max(runs, key=lambda row: row["started_at"])["run_id"]
    tables: dict[str, Any] = {}
    for name in ("runs", "models", "layers", "timings"):
        rows = pyarrow.dataset.dataset(out / "reports" / name).to_table().to_pylist()
        mine = [
            {k: v for k, v in row.items() if k not in VARYING}
            for row in rows
            if row["run_id"] == last
        ]
        tables[name] = json.loads(json.dumps(mine, default=str).replace(str(folder), ""))
    files = [path for path in out.rglob("*") if path.is_file()]
    kept = {
        str(path.relative_to(out)): file_digest(path) for path in files if path.suffix == ".onnx"
    }
    others = sorted(
        str(path.relative_to(out)).replace(last, "RUN") for path in files if path.suffix != ".onnx"
    )
    return {"tables": tables, "files": kept, "others": others, "runs": len(runs)}


def storm(
    work: Path, kills: int, models: int, options: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The state after `kills` kills and a full run, that of an undisturbed run, and a count.

    The count is of kills that hit a batch at work. A batch that is done before it is killed starts
    again from nothing, since its next run would only skip.

    options  of every command
    """
    make_models(work / "calm", models)
    seconds = run(work / "calm", options)
    shutil.copytree(
        work / "calm", work / "storm", ignore=shutil.ignore_patterns("out"), symlinks=True
    )
    chance, hits = random.Random(0), 0
    for _ in range(3 * kills):
        killed = kill_at(work / "storm", chance.uniform(0, seconds), options)
        if is_over(work / "storm"):
            shutil.rmtree(work / "storm" / "out")
        else:
            hits += killed
        if hits == kills:
            break
    run(work / "storm", options)
    return state(work / "storm"), state(work / "calm"), hits


def main(kills: int, models: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        after, calm, hits = storm(Path(folder), kills, models)
        same = {key: after[key] == calm[key] for key in ("tables", "files")}
        stray = set(after["others"]) - set(calm["others"])
        seconds = time.monotonic() - begun
        print(f"{kills} kills, {hits} of them at work, {models} models, {seconds:.0f} s")
        print(f"rows the same: {same['tables']}, models the same: {same['files']}")
        print(f"stray files: {sorted(stray) or 'none'}")
        return int(not all(same.values()))


if __name__ == "__main__":
    typed = [int(text) for text in sys.argv[1:]]
    sys.exit(main(*typed, *(50, 20)[len(typed) :]))
