"""The audit: what stands is kept, and every way to get worse is a failed audit with its reason."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow.dataset
import pytest

from flows.audit.published import read_published
from flows.audit.run import run_audit
from flows.journal import open_journal
from flows.manifest.jobs import Job
from flows.manifest.outputs import FOLDER
from flows.runtime.run_options import RunOptions
from quant_core.config import QuantConfig
from quant_core.errors import RequestError
from tasks.cache import files_digest
from tasks.rows import AuditOutcome
from tests.pipeline.conftest import QUICK, save_model
from tests.pipeline.test_journal import model_entry


def rewrite_journal(manifest, change) -> None:
    """As if the batch had measured something else."""
    path = manifest.folder / FOLDER / "journal.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    for entry in entries:
        if entry["event"] == "model":
            change(entry)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.mark.parametrize("spoiled", [{"output": 7}, {"name": None}, {"config": {"bitz": 8}}])
def test_a_line_that_is_spoiled_is_counted_and_the_one_before_it_is_audited(tmp_path, spoiled):
    model = tmp_path / "m.onnx"
    job = Job("m", model, tmp_path / "o.onnx", QuantConfig(), None, None, None).to_dict()
    with open_journal(tmp_path) as journal:
        for digest, values in (("good", job), ("bad", job | spoiled)):
            made = replace(model_entry("r", job["output"]), digest=digest, job=values)
            journal.append(made)

    found, skipped_lines = read_published(tmp_path, [])

    assert ([one.entry.digest for one in found], skipped_lines) == (["good"], 1)


@pytest.mark.slow
def test_every_way_to_get_worse_is_told(mill, run, harness, tmp_path):
    names = ("kept", "altered", "missing", "stale", "slower", "wronger", "broken")
    manifest = mill(*names, **QUICK)
    run(manifest)
    outputs = {job.name: job.output for job in manifest.jobs}
    outputs["altered"].write_bytes(outputs["kept"].read_bytes())
    outputs["wronger"].write_bytes(outputs["slower"].read_bytes())
    outputs["missing"].unlink()
    save_model(tmp_path / "models" / "stale.onnx", seed=99)

    def change(entry):
        entry["timings"][-1]["busy"] = False
        if entry["name"] == "slower":
            entry["timings"][-1] |= {"speedup": 1000.0, "speedup_lo": 900.0}
        if entry["name"] in ("kept", "stale"):
            entry["timings"][-1] |= {"speedup_lo": 0.01}
        if entry["name"] == "wronger":
            entry["files"] = files_digest(manifest.folder, ["wronger_int8.onnx"])
        if entry["name"] == "broken":
            entry["job"]["judged_by"] = entry["job"]["calibration"] = {
                **entry["job"]["calibration"],
                "shape": {"z": [1]},
            }

    rewrite_journal(manifest, change)
    with (manifest.folder / FOLDER / "journal.jsonl").open("a") as journal:
        journal.write('{"event": "model", "name"\n[]\n')

    result = run_audit(manifest.folder, RunOptions(scheduler=harness))

    rows = {row.model: row for row in result.rows}
    assert result.skipped_lines == 2
    # The host of the test may be busy; then speeds are not compared.
    speeds = {rows[name].outcome for name in ("kept", "slower")}
    assert speeds == {"kept", "regressed"} or "inconclusive" in speeds
    for name, ideal in (("kept", "kept"), ("slower", "regressed")):
        if rows[name].outcome == "inconclusive":
            rows[name] = replace(rows[name], outcome=AuditOutcome(ideal), reason="speedup")
    assert {name: row.outcome for name, row in rows.items()} == {
        "kept": "kept",
        "altered": "regressed",
        "missing": "regressed",
        "stale": "stale",
        "slower": "regressed",
        "wronger": "regressed",
        "broken": "stale",
    }
    assert "not what the batch wrote" in rows["altered"].reason
    assert "missing_int8.onnx" in rows["missing"].reason
    assert "speedup" in rows["slower"].reason
    assert "agreement" in rows["wronger"].reason
    assert result.exit_code == 1
    table = pyarrow.dataset.dataset(result.reports / "audits").to_table().to_pylist()
    assert {row["model"] for row in table} == set(outputs)
    summary = json.loads((result.reports / "audit-summary.json").read_text())
    assert summary["state"] == "Failed"
    wrong = {row["model"] for row in summary["wrong"]}
    assert wrong - {"slower"} == {"altered", "missing", "wronger"}


@pytest.mark.slow
def test_what_stands_passes_and_a_folder_without_a_batch_is_a_wrong_request(
    mill, run, harness, tmp_path
):
    manifest = mill("a", "b", contract={"metric": "cosine", "min": 0.5}, benchmark={"seconds": 0})
    run(manifest)

    result = run_audit(manifest.folder, RunOptions(scheduler=harness, only=["a"]))

    assert result.exit_code == 0
    assert [(row.model, row.outcome) for row in result.rows] == [("a", "kept")]
    with pytest.raises(RequestError, match="no batch"):
        run_audit(tmp_path / "models", RunOptions(scheduler=harness))


def test_a_speed_that_was_measured_on_a_busy_host_is_no_baseline(mill, run, harness):
    manifest = mill("a", **QUICK)
    run(manifest)

    def change(entry):
        entry["timings"][-1] |= {"speedup": 1000.0, "speedup_lo": 900.0, "busy": True}

    rewrite_journal(manifest, change)

    result = run_audit(manifest.folder, RunOptions(scheduler=harness))

    assert [row.outcome for row in result.rows] == ["inconclusive"]
    assert "busy" in result.rows[0].reason
    assert result.exit_code == 0
