"""`quantmill quantize` and `quantmill calibrate`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from flows.cli import answers
from flows.cli.commands import main
from quant_core.errors import ModelError
from tests.command_line import answer_of
from tests.models import sketch


def test_quantize_says_sizes_and_layers(quantized):
    assert quantized["size_bytes"] == Path("int8.onnx").stat().st_size
    assert quantized["float_size_bytes"] == Path("float.onnx").stat().st_size
    assert {"conv", "gemm"} <= {layer["node"] for layer in quantized["layers"]}


@pytest.mark.parametrize(
    ("end", "says"),
    [
        ("Sigmoid(h)", "at least 8 dB wanted"),
        ("Neg(h)", "at least 8 dB wanted"),
        ("Exp(t)", "probabilities within 0.02 of float's"),
    ],
)
def test_a_summary_says_how_near_the_worst_output_is_to_float(tmp_path, capsys, end, says):
    values = {
        "w": np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32),
        "low": np.float32(-80),
    }
    text = f"(float[n,64] x) => (float[n,64] y) {{ h = MatMul(x, w) t = Add(h, low) y = {end} }}"
    onnx.save(sketch(text, values), tmp_path / "m.onnx")

    line = ["quantize", str(tmp_path / "m.onnx"), "--mode", "weight_only", "--bits", "4"]
    assert main(line) == 0

    (shown,) = (n for n in capsys.readouterr().out.splitlines() if n.startswith("worst output"))
    bound, on_drawn = map(float, re.findall(r"(-?[\d.]+) dB (?:or more|on drawn samples)", shown))
    assert shown.removeprefix("worst output").strip().startswith("SQNR")
    assert bound <= on_drawn
    assert says in shown


def test_a_summary_on_given_samples_says_so(quantized, capsys):
    assert main(["quantize", "float.onnx", "--data", "samples.npy"]) == 0

    shown = capsys.readouterr().out
    assert "or more around its mean" in shown
    assert "on the samples that judged" in shown


def test_a_dry_run_writes_nothing_and_its_plan_can_be_followed(quantized, capsys):
    before = sorted(Path().iterdir())
    _, plan = answer_of(
        capsys, "quantize float.onnx --dry-run --exclude gemm --mode static --data samples.npy"
    )
    assert sorted(Path().iterdir()) == before

    Path("plan.json").write_text(json.dumps(plan))
    _, result = answer_of(
        capsys, "quantize float.onnx -o planned.onnx --plan plan.json --data samples.npy"
    )

    assert {layer["node"]: layer["compute"] for layer in result["layers"]} == {
        node["node"]: node["compute"] for node in plan["nodes"]
    }
    assert (
        next(node for node in plan["nodes"] if node["node"] == "gemm")["reason"]
        == "excluded by gemm"
    )


def test_a_replayed_plan_makes_the_same_bytes(quantized):
    Path("plan.json").write_text(json.dumps(quantized["plan"]))

    line = "quantize float.onnx -o again.onnx --plan plan.json --data samples.npy"
    assert main(line.split()) == 0

    assert Path("again.onnx").read_bytes() == Path("int8.onnx").read_bytes()


def test_a_plan_is_of_its_model_and_says_everything(quantized, capsys):
    other = json.dumps(quantized["plan"]).replace('"gemm"', '"head"')
    Path("plan.json").write_text(json.dumps(quantized["plan"]))
    Path("other.json").write_text(other)
    line = "quantize float.onnx -o again.onnx"

    for rest, part in (
        ("--plan other.json --data samples.npy", "another model: this one has no head"),
        ("--plan plan.json", "need calibration"),
        ("--plan plan.json --data samples.npy --bits 4", "--bits"),
    ):
        assert main(f"{line} {rest}".split()) == 2
        assert part in capsys.readouterr().err
    assert not Path("again.onnx").exists()


def test_a_plan_that_was_edited_wrongly_says_where(quantized, capsys):
    plan = quantized["plan"]
    node = plan["nodes"][0]
    edits = (
        (plan | {"nodes": [node | {"comptue": "float"}]}, "comptue: unknown key"),
        (plan | {"nodes": [node | {"compute": "magic"}]}, "not a plan: 'magic' is not"),
        ({key: plan[key] for key in plan if key != "config"}, "not a plan: config: is missing"),
        (plan | {"activations": {}}, f"has node {node['node']} static, and no activation"),
    )

    for edited, sentence in edits:
        Path("plan.json").write_text(json.dumps(edited))
        assert main(["quantize", "float.onnx", "-o", "again.onnx", "--plan", "plan.json"]) == 2
        assert sentence in capsys.readouterr().err
    assert not Path("again.onnx").exists()


@pytest.mark.parametrize(
    "needless",
    [
        "--labels l.npy",
        "--num-samples 3",
        "--shape 1,3,8,8",
        "--metric sqnr",
        "--min 0.5",
        "--method mse",
        "--percentile 99",
        "--weight-method gptq",
    ],
)
def test_an_option_that_needs_samples_is_not_ignored_without(quantized, capsys, needless):
    assert main(f"quantize float.onnx -o again.onnx {needless}".split()) == 2
    assert needless.split()[0] in capsys.readouterr().err


def test_a_glob_that_matches_nothing_is_noted(quantized, capsys):
    _, result = answer_of(
        capsys, "quantize float.onnx -o again.onnx --exclude hea* --layer-bits gem?=32"
    )

    assert "exclude hea* matches no node and no weight" in result["note"]


def test_a_dry_run_says_which_glob_matches_nothing(quantized, capsys):
    line = "quantize float.onnx --dry-run --exclude hea* --exclude conv*"

    _, plan = answer_of(capsys, line)
    main(line.split())

    assert plan["idle_globs"] == ["exclude hea*"]
    assert "exclude hea* matches no node and no weight" in capsys.readouterr().out


def test_calibrate_names_its_output_after_the_model(quantized, capsys):
    code, result = answer_of(
        capsys, "calibrate float.onnx --data samples.npy --method minmax --bits 4"
    )

    assert (code, result["output"]) == (0, "float_int4.onnx")
    assert Path("float_int4.onnx").is_file()
    assert result["plan"]["config"]["method"] == "minmax"


def test_quantize_names_its_output_after_the_model_and_says_what_was_won(quantized, capsys):
    original = Path("float.onnx").read_bytes()

    code, result = answer_of(capsys, "quantize float.onnx --data samples.npy")

    assert (code, result["output"]) == (0, "float_int8.onnx")
    assert Path("float.onnx").read_bytes() == original
    assert result["timing"]["speedup"] > 0
    proposed = "quantmill validate float.onnx float_int8.onnx --data FRESH_SAMPLES.npz"
    assert result["next"] == proposed


def test_optimize_only_names_its_output_after_the_model(quantized, capsys):
    code, result = answer_of(capsys, "quantize float.onnx --optimize-only")

    assert (code, result["output"]) == (0, "float_optimized.onnx")


@pytest.mark.parametrize(
    "rest",
    [
        "--optimize-only --plan plan.json",
        "--optimize-only --pareto",
        "--optimize-only --dry-run",
        "--optimize-only --export openvino",
        "--optimize-only --data samples.npy --min 0.5",
        "--optimize-only --bits 4",
        "--dry-run --plan plan.json",
    ],
)
def test_an_option_that_would_do_nothing_is_refused(quantized, capsys, rest):
    assert main(f"quantize float.onnx -o new.onnx {rest}".split()) == 2

    assert "means nothing with --" in capsys.readouterr().err
    assert not Path("new.onnx").exists()


@pytest.mark.parametrize(
    "line",
    [
        "quantize float.onnx --data samples.npy --max-drop 0.1",
        "calibrate float.onnx --data samples.npy --metric top1",
        "validate float.onnx int8.onnx --metric top1 --max-drop 0.1",
        "compare float.onnx int8.onnx --metric top1",
        "batch float.onnx -o out --data samples.npy --max-drop 0.1",
    ],
)
def test_a_metric_that_needs_labels_is_refused_without(quantized, capsys, line):
    assert main(line.split()) == 2

    assert "--metric top1 needs labels" in capsys.readouterr().err


def test_a_contract_that_is_missed_proposes_to_look_closer_at_the_same_samples(quantized, capsys):
    rest = "--data samples.npy --labels labels.npy"
    np.save("labels.npy", np.zeros(32, np.int64))

    for line in (f"validate float.onnx int8.onnx {rest}", f"quantize float.onnx -o m.onnx {rest}"):
        code, result = answer_of(capsys, f"{line} --metric sqnr --min 300")

        output = result.get("output", "int8.onnx")
        assert code == 1
        assert result["next"] == f"quantmill validate float.onnx {output} {rest} --detailed"


def test_pareto_shows_the_plans_that_none_beats_and_the_chosen_one(quantized, capsys):
    line = "quantize float.onnx -o best.onnx --mode static --data samples.npy --pareto"

    assert main(line.split()) == 0
    text = capsys.readouterr().out
    _, result = answer_of(capsys, line)

    assert re.search(r"^ plan .* chosen *$", text, re.MULTILINE)
    assert result["chosen"] in {row["candidate"] for row in result["trace"]}
    speeds = [row["speedup"] for row in result["front"]]
    assert speeds == sorted(speeds, reverse=True)
    assert all(row in result["trace"] for row in result["front"])


@pytest.mark.parametrize("needless", ["", "--data samples.npy --plan plan.json"])
def test_pareto_needs_samples_and_a_search(quantized, capsys, needless):
    plan_it = "quantize float.onnx --mode static --data samples.npy --dry-run --format json"
    main(plan_it.split(" "))
    Path("plan.json").write_text(capsys.readouterr().out)

    assert main(f"quantize float.onnx --pareto {needless}".split()) == 2


def test_a_file_that_its_runtime_cannot_time_is_written_and_reported(
    quantized, monkeypatch, capsys
):
    def fail(*arguments):
        raise ModelError("does not run in onnxruntime-web", "float.onnx")

    monkeypatch.setattr(answers, "timer_for", lambda target: fail)

    code, result = answer_of(capsys, "quantize float.onnx --data samples.npy --target web")
    main(["quantize", "float.onnx", "--data", "samples.npy", "--target", "web"])

    assert (code, result["timing"]) == (0, None)
    assert Path(result["output"]).is_file()
    assert "not timed: float.onnx: does not run in onnxruntime-web" in capsys.readouterr().out


def test_no_time_budget_is_exceeded_to_time_what_was_found(quantized, capsys):
    line = "quantize float.onnx -o short.onnx --data samples.npy --time-budget"

    assert main([*line.split(), "0.001"]) == 0
    assert "not timed: the time budget is over" in capsys.readouterr().out
