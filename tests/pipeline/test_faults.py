"""Thirty models with every fault at once: the good ones are made, the others fail with a reason."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flows.console.events import StageBegan
from flows.manifest.read import check_manifest
from tests.pipeline.conftest import FAST, age, save_data, save_model
from tests.processes import command_line, descendants

GOOD = [f"good{k:02d}" for k in range(23)]
REASONS = {
    "segfault": ("quantize", "SIGSEGV"),
    "hang": ("quantize", "took longer than 15 s"),
    "hog": ("quantize", "out of memory"),
    "killer": ("quantize", "Dask worker died"),
    "torn": ("prepare", ""),
    "nan": ("", "NaN"),
    "garbage": ("", "neither an .npy nor an .npz"),
    "full": ("publish", "no space left"),
}
TRANSIENT = "full"


@pytest.fixture
def full_disk(tmp_path) -> Iterator[Path | None]:
    """A small tmpfs on which nothing is free; None where none can be mounted, which takes root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=64k", "quantmill-test", str(disk)]
    if (
        shutil.which("mount") is None
        or subprocess.run(mounted, capture_output=True, check=False).returncode
    ):
        yield None
        return
    try:
        with (disk / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    except OSError:
        pass
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def manifest(tmp_path):
    """Good models, bad ones, and one whose child is killed once. Each has data of its own."""
    (tmp_path / "models").mkdir()
    (tmp_path / "data").mkdir()
    for seed, name in enumerate([*GOOD, "astray", *REASONS]):
        save_model(tmp_path / "models" / f"{name}.onnx", seed)
        save_data(tmp_path / "data" / f"{name}.npy")
    torn = tmp_path / "models" / "torn.onnx"
    torn.write_bytes(torn.read_bytes()[:300])
    np.save(tmp_path / "data" / "nan.npy", np.full((4, 3, 8, 8), np.nan, np.float32))
    (tmp_path / "data" / "garbage.npy").write_bytes(b"no array at all")
    for path in (torn, *(tmp_path / "data").iterdir()):
        age(path)

    def manifest(disk: Path | None):
        on_full_disk = [{"input": "models/full.onnx", "output": f"{disk}/full.onnx"}]
        return check_manifest(
            {
                "mode": "weight_only",
                "models": on_full_disk if disk else [],
                "batch": {"input_dir": "models/[!f]*.onnx", "output_dir": "out"},
                "calibration": {"data": "data/{name}.npy"},
                "limits": {"timeout_s": 15, "memory_mb": 500},
                **FAST,
            },
            tmp_path,
        )

    return manifest


@pytest.mark.slow
def test_every_fault_is_one_row_with_its_reason_and_all_others_finish(
    manifest, run, tmp_path, full_disk
):
    killed: list[int] = []

    def kill_the_api_server(event) -> None:
        if isinstance(event, StageBegan) and event.model == "good05" and not killed:
            killed.extend(
                pid
                for pid in descendants(os.getpid())
                if "flows.runtime.api_server" in command_line(pid)
            )
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    result = run(manifest(full_disk), on_progress=kill_the_api_server)

    rows = {row.model: row for row in result.rows}
    assert killed
    assert len(rows) >= 30
    assert {name for name, row in rows.items() if row.outcome == "done"} == {*GOOD, "astray"}
    for name in rows.keys() & REASONS.keys():
        stage, message = REASONS[name]
        assert rows[name].stage == stage or not stage, name
        assert message in rows[name].error
        assert rows[name].hint
    assert (
        tmp_path / "models" / "killer.kills"
    ).read_text() == "xxx"  # three times, then set aside
    assert result.exit_code == 1
    assert {path.name for path in (tmp_path / "out").glob("*.onnx")} == {
        f"{n}_int8.onnx" for n in (*GOOD, "astray")
    }
    if full_disk:
        assert [path.name for path in full_disk.rglob("*") if path.is_file()] == ["filler"]
        (full_disk / "filler").unlink()

    again = {row.model: row.outcome for row in run(manifest(full_disk)).rows}

    assert {name for name, outcome in again.items() if outcome == "done"} == again.keys() & {
        TRANSIENT
    }
    assert {name for name, outcome in again.items() if outcome == "skipped"} == {*GOOD, "astray"}
