"""`quantmill batch` and `config` request what was typed, and start nothing that is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli.commands import main
from flows.runtime.run_options import RunOptions
from quant_core.config import Contract, QuantConfig
from tests.folders import save_folder

ROOT = Path(__file__).parents[4]


@pytest.fixture
def requested(quantized, monkeypatch):
    """What a command requests of the batch, which then does nothing."""
    seen = {}
    monkeypatch.setattr(
        "flows.batch.run.run_and_show",
        lambda manifest, options, as_json: (
            seen.update(m=manifest, options=options, as_json=as_json) or 1
        ),
    )
    return seen


def test_batch_requests_what_was_typed(requested):
    line = (
        "batch float.onnx int8.onnx -o out --bits 4 --exclude a* --data samples.npy"
        " --num-samples 9 --jobs 3 --metric agreement --min 0.9 --no-skip-existing"
        " --stop-on-error --only f* --scheduler tcp://a:1"
    )

    code = main(line.split())

    manifest = requested["m"]
    job = manifest.jobs[0]
    assert code == 1
    assert requested["options"] == RunOptions(scheduler="tcp://a:1", jobs=3, only=["f*"])
    assert not requested["as_json"]
    assert [(j.input.name, j.output) for j in manifest.jobs] == [
        ("float.onnx", Path.cwd() / "out/float_int4.onnx"),
        ("int8.onnx", Path.cwd() / "out/int8_int4.onnx"),
    ]
    assert (manifest.skip_existing, manifest.continue_on_error) == (False, False)
    assert job.config == QuantConfig(bits=4, exclude=("a*",))
    assert (job.calibration.source, job.calibration.count) == (
        str(Path("samples.npy").absolute()),
        9,
    )
    assert job.contract == Contract("agreement", min=0.9)


def test_batch_takes_a_contract_that_bounds_the_drop_alone(requested):
    line = "batch float.onnx -o out --data samples.npy --metric cosine --max-drop 0.1"

    assert main(line.split()) == 1

    assert requested["m"].jobs[0].contract == Contract("cosine", max_drop=0.1)


def test_batch_takes_a_folder(requested):
    assert main(["batch", ".", "-o", "out", "--format", "json"]) == 1

    assert [job.name for job in requested["m"].jobs] == ["float", "int8"]
    assert requested["as_json"]


@pytest.mark.parametrize("command", ["config", "batch"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.yaml", "models: [{input: float.onnx, output: o.onnx}]"),
        ("m.YML", "models: [{input: float.onnx, output: o.onnx}]"),
        ("m.json", '{"models": [{"input": "float.onnx", "output": "o.onnx"}]}'),
        ("m.TOML", '[[models]]\ninput = "float.onnx"\noutput = "o.onnx"'),
    ],
)
def test_config_and_batch_do_what_a_manifest_says(requested, command, name, text):
    Path(name).write_text(text)

    assert main([command, name, "--force", "--allow-code", ".", "--jobs", "2"]) == 1

    manifest = requested["m"]
    assert (manifest.file, manifest.jobs[0].output) == (Path.cwd() / name, Path.cwd() / "o.onnx")
    assert requested["options"] == RunOptions(force=True, allow_code=Path(), jobs=2)


def test_audit_requests_what_was_typed(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "flows.audit.run.audit_and_show",
        lambda *given, **options: seen.append((given, options)) or 0,
    )

    main(
        [
            "audit",
            "out",
            "--only",
            "f*",
            "--jobs",
            "2",
            "--max-slowdown",
            "0.2",
            "--allow-code",
            ".",
            "--format",
            "json",
        ]
    )

    options = RunOptions(jobs=2, only=["f*"], allow_code=Path())
    assert seen == [((Path("out"), options), {"max_slowdown": 0.2, "as_json": True})]


@pytest.mark.parametrize(("module", "command"), [("batch", "config"), ("audit", "audit")])
def test_a_module_that_is_run_is_a_command(module, command):
    words = [sys.executable, "-m", f"flows.{module}", "absent", "--jobs", "x"]

    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (2, "")
    assert f"`quantmill {command} --help` lists what can be given" in done.stderr


def plans_of(capsys, line: str) -> tuple[int, list[dict]]:
    """Exit code and plans of a dry run: a JSON line each."""
    code = main([*line.split(), "--dry-run", "--format", "json"])
    return code, [json.loads(row) for row in capsys.readouterr().out.splitlines()]


def test_a_folder_of_hugging_face_is_written_beside_it(tmp_path, monkeypatch, capsys):
    save_folder(tmp_path / "model", names=["encoder_model"])
    monkeypatch.chdir(tmp_path)

    code, (plan,) = plans_of(capsys, "batch model --layout huggingface --bits 4")

    assert code == 0
    assert plan["output"] == str(tmp_path / "model_int4/onnx/encoder_model_q4.onnx")
    assert plan["plan"] is not None
    assert main(["batch", "model"]) == main(["batch", "a.onnx", "--layout", "huggingface"]) == 2


def test_a_dry_run_of_a_batch_prints_plans_and_errors_alike_in_both_commands(
    quantized, capsys, monkeypatch
):
    before = sorted(Path().iterdir())

    code, plans = plans_of(capsys, "batch float.onnx int8.onnx -o out")

    assert code == 1
    assert {node["node"] for node in plans[0]["plan"]["nodes"]} >= {"conv", "gemm"}
    assert "quantized already" in plans[1]["error"]
    assert sorted(Path().iterdir()) == before

    monkeypatch.setattr("flows.batch.run.plan_batch", lambda manifest, options: iter(plans))
    Path("m.yaml").write_text("models: [{input: float.onnx}]\nbatch: {output_dir: out}\n")
    assert plans_of(capsys, "batch m.yaml") == plans_of(capsys, "config m.yaml") == (1, plans)
    texts = []
    for command in ("batch", "config"):
        assert main([command, "m.yaml", "--dry-run"]) == 1
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert all(part in texts[0] for part in ("float -> ", "conv", "quantized already"))


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("batch absent.onnx gone.onnx -o out", "no such file"),
        ("batch nowhere -o out", "no such file or folder: nowhere"),
        ("batch float.onnx -o out --metric top1 --min 0.9", "top1 needs labels"),
        ("batch float.onnx -o out --metric cosine", "--max-drop or --min"),
        ("batch float.onnx -o out --jobs 0", "1 or more"),
        ("config absent.yaml", "absent.yaml"),
        ("batch absent.toml", "absent.toml cannot be read: no such file"),
        ("batch m.yaml float.onnx -o out", "m.yaml is a manifest, which stands alone"),
        (
            "batch m.yaml -o out --bits 8 --stop-on-error",
            "--output-dir, --continue-on-error, --bits",
        ),
        (
            "batch m.yaml --metric cosine --max-drop 1 --data random",
            "cannot stand beside a manifest",
        ),
        ("config float.onnx", "float.onnx"),
        ("report .", "output folder of a batch"),
    ],
)
def test_a_wrong_batch_is_not_started(requested, capsys, line, part):
    code = main(line.split())

    assert code == 2
    assert "m" not in requested
    assert part in capsys.readouterr().err
