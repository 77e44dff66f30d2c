"""The command line: options become values, and answers are text for people or JSON."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
import pyarrow
import pytest
import typer
from pyarrow import parquet

import quant_core
from flows.cli import doctor, options
from flows.cli.command import Answer, register
from flows.cli.commands import main
from flows.console import formats, model_views, printing, run_views, timing_views
from quant_core.config import Contract, QuantConfig
from quant_core.data.spec import SampleSpec
from quant_core.errors import DataError
from tests.folders import save_folder
from tests.models import sketch, tiny_cnn
from tests.oracle.cases import weights

ROOT = Path(__file__).parents[3]
COMMANDS = (
    "info",
    "quantize",
    "calibrate",
    "batch",
    "validate",
    "benchmark",
    "compare",
    "config",
    "explain",
    "init",
    "report",
    "doctor",
)


@pytest.fixture
def typed():
    """A command that takes every group; running it returns what the options became."""
    app, seen = typer.Typer(), {}

    @register(app)
    def probe(
        config: QuantConfig, samples: SampleSpec, accuracy: options.AccuracyOptions
    ) -> Answer:
        """Probe."""
        seen.update(config=config, samples=samples, accuracy=accuracy)
        return Answer({}, lambda data: "")

    def run(*arguments):
        with pytest.raises(SystemExit) as done:
            app(list(arguments), prog_name="probe")
        return done.value.code, seen

    return run


def test_options_that_are_not_typed_leave_every_default(typed):
    code, seen = typed()

    assert code == 0
    assert seen["config"] == QuantConfig()
    assert seen["samples"] == SampleSpec()
    assert seen["accuracy"] == options.AccuracyOptions()


def test_every_option_of_a_config_can_be_typed(typed):
    code, seen = typed(
        *(
            "--bits",
            "4",
            "--mode",
            "static",
            "--method",
            "percentile",
            "--percentile",
            "99.5",
            "--per-tensor",
        ),
        *(
            "--asymmetric",
            "--block-size",
            "64",
            "--weight-method",
            "rtn",
            "--no-bias-correction",
            "--exclude",
            "a*",
        ),
        *(
            "--exclude",
            "b",
            "--layer-bits",
            "head=32",
            "--layer-bits",
            "x=y=8",
            "--min-elements",
            "9",
        ),
        *("--target", "arm64", "--runtime", "qdq"),
        *("--fix-shape", "batch=1,x:0:2=224", "--fix-shape", "a=b=3"),
    )

    assert code == 0
    assert seen["config"] == QuantConfig(
        bits=4,
        mode="static",
        method="percentile",
        percentile=99.5,
        per_channel=False,
        symmetric=False,
        block_size=64,
        weight_method="rtn",
        bias_correction=False,
        exclude=("a*", "b"),
        layer_bits={"head": 32, "x=y": 8},
        min_elements=9,
        target="arm64",
        runtime="qdq",
        fix_shape={"batch": 1, "x:0:2": 224, "a=b": 3},
    )
    assert set(options.CONFIG) == set(QuantConfig.__slots__)


def test_samples_and_a_contract_can_be_typed(typed):
    code, seen = typed(
        *(
            "--data",
            "d.npz",
            "--labels",
            "l.npy",
            "--num-samples",
            "5",
            "--shape",
            "x=1,3,8,8",
            "--shape",
            "y=1,2",
        ),
        *("--metric", "top1", "--max-drop", "0.01"),
    )

    assert code == 0
    assert seen["samples"].source == "d.npz"
    assert seen["samples"].shape == {"x": [1, 3, 8, 8], "y": [1, 2]}
    assert seen["accuracy"].contract == Contract("top1", max_drop=0.01)


def test_a_metric_without_a_promise_is_only_measured(typed):
    _, seen = typed("--metric", "cosine")

    assert seen["accuracy"] == options.AccuracyOptions("cosine", None)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--bits", "5"], ["--bits", "is 5", "8, 4"]),
        (["--method", "entrpy"], ["--method", "entropy"]),
        (["--min-elements", "-1"], ["--min-elements", "0 or more"]),
        (["--layer-bits", "head"], ["--layer-bits", "GLOB=BITS"]),
        (["--layer-bits", "head=5"], ["--layer-bits head", "is 5", "32, 16, 8, 4"]),
        (["--fix-shape", "batch"], ["--fix-shape", "NAME=SIZE"]),
        (["--fix-shape", "batch=0"], ["--fix-shape batch", "1 or more"]),
        (["--target", "x68"], ["--target", "x86"]),
        (["--metric", "accuracy", "--min", "1"], ["--metric", "top1"]),
        (["--metric", "accuracy"], ["--metric", "top1"]),
        (["--metric", "sqnr", "--max-drop", "1"], ["--max-drop", "Set min"]),
        (["--num-samples", "0"], ["--num-samples", "1 or more"]),
        (["--shape", "1,a"], ["--shape", "'1,a'", "224"]),
        (["--shape", "1,2", "--shape", "x=1"], ["--shape", "INPUT="]),
    ],
)
def test_a_wrong_option_is_named_with_what_would_be_right(typed, capsys, arguments, told):
    code, _ = typed(*arguments)

    out, err = capsys.readouterr()
    assert code == 2
    assert not out
    assert "Traceback" not in err
    for part in told:
        assert part in err


@pytest.mark.parametrize("arguments", [["--bitz", "8"], ["--bits", "eight"], ["stray"]])
def test_a_mistyped_line_has_exit_code_2(typed, arguments):
    code, _ = typed(*arguments)

    assert code == 2


def answering(function):
    app = typer.Typer()
    register(app)(function)

    def run(*arguments):
        try:
            app(list(arguments))
        except SystemExit as done:
            return done.code

    return run


def test_an_answer_is_text_or_json(capsys):
    def probe() -> Answer:
        return Answer(
            {"snr": float("inf"), "rows": ({"a": 1},)}, lambda data: "for people", exit_code=1
        )

    run = answering(probe)

    assert run() == 1
    assert capsys.readouterr().out == "for people\n"
    assert run("--format", "json") == 1
    assert json.loads(capsys.readouterr().out) == {"snr": None, "rows": [{"a": 1}]}
    assert run("--format", "xml") == 2


def test_an_error_is_a_sentence_and_a_hint_or_a_json_object(capsys):
    def probe() -> Answer:
        raise DataError("holds NaN", "d.npy, sample 3", "Drop it")

    run = answering(probe)

    assert run() == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: d.npy, sample 3 holds NaN\nhint: Drop it\n")
    assert run("--format", "json") == 1
    error = {
        "kind": "DataError",
        "problem": "holds NaN",
        "where": "d.npy, sample 3",
        "hint": "Drop it",
    }
    assert json.loads(capsys.readouterr().out) == {"error": error}


def test_a_bug_shows_no_traceback_unless_asked(capsys, monkeypatch):
    def probe() -> Answer:
        raise ZeroDivisionError("oh")

    run = answering(probe)

    assert run() == 1
    assert "ZeroDivisionError: oh" in capsys.readouterr().err
    monkeypatch.setenv("QUANTMILL_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run()


def test_names_from_files_cannot_drive_the_terminal(capsys):
    evil = "conv\x1b[31m\x07\u202e[bold]x[/bold]\udc80"
    nodes = [
        {
            "node": evil,
            "op_type": "Conv",
            "compute": "float",
            "storage": "int8",
            "elements": 9,
            "reason": evil,
        }
    ]

    printing.print_answer({"target": "portable", "nodes": nodes}, model_views.plan_view)
    printing.print_error(DataError(evil, evil, evil), as_json=False)

    out, err = capsys.readouterr()
    for text in (out, err):
        assert "conv\\x1b[31m\\x07\\u202e[bold]x[/bold]\\udc80" in text
        assert "\x1b" not in text


def test_a_table_in_a_pipe_is_not_squeezed(capsys):
    rows = [
        {
            "node": "block/" * 20,
            "op_type": "Conv",
            "compute": "static",
            "storage": "int8",
            "elements": 1,
            "reason": "",
        }
    ]

    printing.print_answer({"target": "portable", "nodes": rows}, model_views.plan_view)

    assert "block/" * 20 in capsys.readouterr().out


def test_a_batch_tells_what_makes_a_verdict_doubtful(capsys):
    printing.print_answer(
        [{"model": "m", "outcome": "done", "verdict": "met", "note": "only guesses"}],
        run_views.batch_table,
    )

    assert "met: only guesses" in capsys.readouterr().out


def test_sizes_and_shares_read_as_a_person_writes_them():
    assert (
        formats.format_size(1234),
        formats.format_size(2_500_000),
        formats.format_size(None),
    ) == (
        "1.2 kB",
        "2.50 MB",
        "",
    )
    assert [formats.format_ratio(4, after) for after in (1, 4, 8, None)] == [
        "4.00x smaller",
        "1.00x smaller",
        "2.00x larger",
        "",
    ]
    assert (formats.format_percent(0.98765), formats.format_percent(None)) == ("98.77 %", "")
    assert (formats.format_ms(1.23456), formats.format_ms(None)) == ("1.23 ms", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--format" in shown
    assert not re.search(r"<bool>|<list|<path>|[{}]", shown)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("quantise m.onnx", "error: no such command 'quantise'\nhint: Did you mean 'quantize'?\n"),
        (
            "quantize m.onnx --bitz 4",
            "error: there is no option --bitz\nhint: Did you mean --bits?\n",
        ),
        (
            "benchmark m.onnx",
            "error: missing argument 'QUANTIZED'\n"
            "hint: `quantmill benchmark --help` lists what can be given\n",
        ),
        (
            "quantize m.onnx --mode statik",
            "error: --mode is 'statik', not one of auto, static, dynamic, weight_only\n"
            "hint: Did you mean static?\n",
        ),
        (
            "benchmark m.onnx q.onnx --threads two",
            "error: --threads should be a valid integer\n"
            "hint: `quantmill benchmark --help` lists what can be given\n",
        ),
        (
            "benchmark m.onnx q.onnx --runtime nod",
            "error: --runtime 'nod' is not one of 'python', 'node', 'web', 'wasm'\n"
            "hint: `quantmill benchmark --help` lists what can be given\n",
        ),
    ],
)
def test_a_command_line_that_cannot_be_read_is_answered_with_a_sentence(line, sentence, capsys):
    assert main(line.split()) == 2
    assert capsys.readouterr() == ("", sentence)


def test_for_programs_that_sentence_is_json(capsys):
    assert main(["quantize", "m.onnx", "--bitz", "4", "--format=json"]) == 2

    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["problem"], error["hint"]) == (
        "there is no option --bitz",
        "Did you mean --bits?",
    )


def test_an_error_of_an_option_names_it_as_it_is_typed(quantized, capsys):
    assert main(["validate", "float.onnx", "int8.onnx", "--provider", "gpu"]) == 2
    assert capsys.readouterr().err.startswith("error: --provider is 'gpu', not one of ")


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("quantmill qu", ["quantize"]),
        ("quantmill quantize m.onnx --target x86-v", ["x86-vnni"]),
        ("quantmill validate a.onnx b.onnx --metric ag", ["agreement"]),
    ],
)
def test_the_shell_completes_commands_and_values(typed, completed, monkeypatch, capsys):
    monkeypatch.setenv("_QUANTMILL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))

    assert main([]) == 0
    assert capsys.readouterr().out.split() == completed


def test_a_command_line_without_a_command_is_answered_with_help(capsys):
    main([])

    assert "quantize" in "".join(capsys.readouterr())


def test_doctor_names_versions_that_are_known_not_to_work():
    assert (
        doctor.known_problems({"fastapi": "0.150.0", "sqlalchemy": "2.0.58", "prefect": "3.8.8"})
        == []
    )

    found = doctor.known_problems(
        {"fastapi": "0.165.0", "sqlalchemy": "2.1.0b1", "prefect": "3.9.0", "dask": None}
    )

    assert [problem.split()[0] for problem in found] == ["fastapi", "sqlalchemy", "prefect"]


def test_doctor_tells_the_target_threads_and_versions(capsys):
    code = main(["doctor", "--format", "json"])

    report = json.loads(capsys.readouterr().out)
    assert code == int(bool(report["problems"]))
    assert {"target", "threads", "memory"} <= report["host"].keys()
    assert report["versions"]["onnxruntime"]


@pytest.fixture
def quantized(tmp_path, monkeypatch, capsys):
    """A folder with float.onnx, int8.onnx and samples.npy; what quantizing answered."""
    monkeypatch.chdir(tmp_path)
    onnx.save(tiny_cnn(), "float.onnx")
    np.save(
        "samples.npy", np.random.default_rng(3).standard_normal((32, 3, 8, 8), dtype=np.float32)
    )
    line = "quantize float.onnx -o int8.onnx --mode static --data samples.npy --format json"
    assert main(line.split()) == 0
    return json.loads(capsys.readouterr().out)


def answer_of(capsys, line):
    """Exit code and JSON of a command line, which must have a text form too."""
    assert main(line.split()) in (0, 1)
    assert capsys.readouterr().out.strip()
    code = main([*line.split(), "--format", "json"])
    return code, json.loads(capsys.readouterr().out)


def test_info_tells_what_a_model_is(quantized, capsys):
    _, info = answer_of(capsys, "info float.onnx")

    assert info["inputs"] == [{"name": "x", "dtype": "float", "shape": ["n", 3, 8, 8]}]
    assert (info["num_nodes"], info["opset"], info["quantized"]) == (5, 17, False)
    assert info["operators"]["Conv"] == 1
    assert answer_of(capsys, "info int8.onnx")[1]["quantized"]


def test_quantize_tells_sizes_and_layers(quantized):
    assert quantized["size_bytes"] == Path("int8.onnx").stat().st_size
    assert quantized["float_size_bytes"] == Path("float.onnx").stat().st_size
    assert {"conv", "gemm"} <= {layer["node"] for layer in quantized["layers"]}


def test_a_dry_run_writes_nothing_and_its_plan_can_be_carried_out(quantized, capsys):
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

    assert (
        main(
            [
                "quantize",
                "float.onnx",
                "-o",
                "again.onnx",
                "--plan",
                "plan.json",
                "--data",
                "samples.npy",
            ]
        )
        == 0
    )

    assert Path("again.onnx").read_bytes() == Path("int8.onnx").read_bytes()


def test_a_plan_is_of_its_model_and_says_everything(quantized, capsys):
    other = json.dumps(quantized["plan"]).replace('"gemm"', '"head"')
    Path("plan.json").write_text(json.dumps(quantized["plan"]))
    Path("other.json").write_text(other)
    line = "quantize float.onnx -o again.onnx"

    for rest, told in (
        ("--plan other.json --data samples.npy", "another model: this one has no head"),
        ("--plan plan.json", "need calibration"),
        ("--plan plan.json --data samples.npy --bits 4", "--bits"),
    ):
        assert main(f"{line} {rest}".split()) == 2
        assert told in capsys.readouterr().err
    assert not Path("again.onnx").exists()


@pytest.mark.parametrize(
    "idle", ["--labels l.npy", "--num-samples 3", "--shape 1,3,8,8", "--metric sqnr", "--min 0.5"]
)
def test_an_option_that_needs_samples_is_not_ignored_without(quantized, capsys, idle):
    assert main(f"quantize float.onnx -o again.onnx {idle}".split()) == 2
    assert idle.split()[0] in capsys.readouterr().err


def test_a_glob_that_matches_nothing_is_noted(quantized, capsys):
    _, result = answer_of(
        capsys, "quantize float.onnx -o again.onnx --exclude hea* --layer-bits gem?=32"
    )

    assert "exclude hea* matches no node and no weight" in result["note"]


def test_calibrate_names_its_output_after_the_model(quantized, capsys):
    code, result = answer_of(
        capsys, "calibrate float.onnx --data samples.npy --method minmax --bits 4"
    )

    assert (code, result["output"]) == (0, "float_int4.onnx")
    assert Path("float_int4.onnx").is_file()
    assert result["plan"]["config"]["method"] == "minmax"


def test_quantize_names_its_output_after_the_model_and_tells_what_was_won(quantized, capsys):
    original = Path("float.onnx").read_bytes()

    code, result = answer_of(capsys, "quantize float.onnx --data samples.npy")

    assert (code, result["output"]) == (0, "float_int8.onnx")
    assert Path("float.onnx").read_bytes() == original
    assert result["timing"]["speedup"] > 0
    assert result["next"] == "quantmill validate float.onnx float_int8.onnx --data samples.npy"


def test_optimize_only_names_its_output_after_the_model(quantized, capsys):
    code, result = answer_of(capsys, "quantize float.onnx --optimize-only")

    assert (code, result["output"]) == (0, "float_optimized.onnx")


def test_pareto_shows_the_plans_that_none_beats_and_the_chosen_one(quantized, capsys):
    line = "quantize float.onnx -o best.onnx --mode static --data samples.npy --pareto"

    assert main(line.split()) == 0
    text = capsys.readouterr().out
    _, result = answer_of(capsys, line)

    assert "chosen: " in text
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


def test_info_tells_what_was_rewritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    nodes = "m = Mul(x, s) y = Conv<pads = [1, 1, 1, 1]>(m, w)"
    text = f"(float[n,3,8,8] x) => (float[n,8,8,8] y) {{ {nodes} }}"
    onnx.save(sketch(text, weights(w=(8, 3, 3, 3)) | {"s": np.float32(0.5)}), "float.onnx")

    assert main(["quantize", "float.onnx", "--optimize-only", "-o", "small.onnx"]) == 0
    capsys.readouterr()
    _, info = answer_of(capsys, "info small.onnx")

    assert info["rewrites"] == {"fold_into_consumers": 1}


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"quantmill {quant_core.__version__}\n"


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("--bits 3", "error: --bits is 3, not one of 8, 4\n"),
        ("--target x68", "hint: Did you mean x86?\n"),
        ("--method percentil", "hint: Did you mean percentile?\n"),
        ("--data samples.npy --metric top11 --min 0", "hint: Did you mean top1?\n"),
    ],
)
def test_a_wrong_value_is_told_in_a_sentence_with_what_is_near(quantized, capsys, typed, sentence):
    assert main(f"quantize float.onnx {typed}".split()) == 2
    assert sentence in capsys.readouterr().err


def test_validate_holds_a_model_against_its_contract(quantized, capsys):
    line = "validate float.onnx int8.onnx --data samples.npy"

    code, found = answer_of(capsys, line)
    assert (code, found["verdict"]) == (0, "none")
    assert found["fidelity"]["agreement"] > 0.5
    assert answer_of(capsys, f"{line} --metric agreement --min 0.5")[0] == 0
    code, found = answer_of(capsys, f"{line} --metric sqnr --min 1000")
    assert (code, found["verdict"]) == (1, "not_met")
    assert found["reason"]


def test_benchmark_times_both_models(quantized, capsys):
    code, timing = answer_of(capsys, "benchmark float.onnx int8.onnx --seconds 0.1")

    assert code == 0
    assert timing["speedup_lo"] <= timing["speedup"] <= timing["speedup_hi"]
    assert timing["threads"] == 1
    for model in ("float", "quantized"):
        assert timing["footprints"][model]["load_ms"] > 0


def test_benchmark_takes_several_numbers_of_threads_and_samples(quantized, capsys):
    line = "benchmark float.onnx int8.onnx --threads 1 --threads 2 --batch 1 --batch 3"

    _, answer = answer_of(capsys, f"{line} --seconds 0.1")

    settings = [(row["threads"], row["batch"]) for row in answer["timings"]]
    assert settings == [(1, 1), (1, 3), (2, 1), (2, 3)]


def test_explain_writes_a_page_in_which_names_are_data(quantized, capsys):
    model = tiny_cnn()
    model.graph.node[0].name = "<script>alert(1)</script>"
    onnx.save(model, "odd.onnx")

    code, answer = answer_of(capsys, "explain odd.onnx --seconds 0.1 -o page/odd.html")

    assert code == 0
    assert any("<script>alert(1)</script>" in k["covers"] for k in answer["kernels"])
    page = Path("page/odd.html").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert" not in page


def test_kernels_of_which_there_is_little_to_say_are_one_row(capsys):
    def kernel(name, share, why=""):
        text = {"op_type": "Conv", "arithmetic": "int8", "why": why, "advice": ""}
        return {"name": name, "ms": share, "share": share, "saturating_pairs": 0, **text}

    small = [kernel(f"small{i}", 0.004) for i in range(5)]
    kernels = [kernel("large", 0.97), kernel("odd", 0.001, "no kernel"), *small]
    found = {"kernels": kernels, "ms": 1.0, "shares": {"int8": 1.0}}

    printing.print_answer(found, timing_views.explanation_view)

    text = capsys.readouterr().out
    assert "large" in text
    assert "odd" in text
    assert "small" not in text
    assert "5 others" in text


def test_compare_shows_several_files_beside_one_original(quantized, capsys):
    line = "compare float.onnx int8.onnx float.onnx --data samples.npy --seconds 0.1"

    code, answer = answer_of(capsys, f"{line} --metric sqnr --min 190 -o page.html")

    assert code == 1
    page = Path("page.html").read_text(encoding="utf-8")
    assert page.count(">float.onnx<") == 2
    assert page.count(">not met<") == 1
    assert answer["original"]["size_bytes"] == Path("float.onnx").stat().st_size
    int8, same = answer["files"]
    assert (int8["verdict"], same["verdict"]) == ("not_met", "met")
    assert int8["size_bytes"] < same["size_bytes"]
    assert same["fidelity"]["max_abs_error"] == 0
    for row in (answer["original"], int8, same):
        assert row["memory_bytes"] > 0


@pytest.fixture
def asked(quantized, monkeypatch):
    """What a command requests of the batch, which then does nothing."""
    seen = {}
    monkeypatch.setattr(
        "flows.batch.run.run_and_show",
        lambda manifest, **options: seen.update(options, m=manifest) or 1,
    )
    return seen


def test_batch_asks_for_what_was_typed(asked):
    line = (
        "batch float.onnx int8.onnx -o out --bits 4 --exclude a* --data samples.npy"
        " --num-samples 9 --jobs 3 --metric agreement --min 0.9 --no-skip-existing"
        " --stop-on-error --only f* --scheduler tcp://a:1"
    )

    code = main(line.split())

    manifest = asked.pop("m")
    job = manifest.jobs[0]
    assert code == 1
    assert asked == {
        "as_json": False,
        "jobs": 3,
        "only": ["f*"],
        "scheduler": "tcp://a:1",
        "prefect": "own",
        "allow_code": None,
    }
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


def test_batch_takes_a_folder(asked):
    assert main(["batch", ".", "-o", "out", "--format", "json"]) == 1

    assert [job.name for job in asked["m"].jobs] == ["float", "int8"]
    assert asked["as_json"]


def test_config_carries_out_a_manifest(asked):
    Path("m.yaml").write_text("models: [{input: float.onnx, output: o.onnx}]")

    assert main(["config", "m.yaml", "--force"]) == 1

    assert asked["m"].jobs[0].output == Path.cwd() / "o.onnx"
    assert asked["force"]


def test_a_folder_of_hugging_face_is_written_beside_it(tmp_path, monkeypatch, capsys):
    save_folder(tmp_path / "model", names=["encoder_model"])
    monkeypatch.chdir(tmp_path)

    code, (plan,) = answer_of(capsys, "batch model --layout huggingface --bits 4 --dry-run")

    assert code == 0
    assert plan["output"] == str(tmp_path / "model_int4/onnx/encoder_model_q4.onnx")
    assert plan["plan"] is not None
    assert main(["batch", "model"]) == main(["batch", "a.onnx", "--layout", "huggingface"]) == 2


def test_a_dry_run_of_a_batch_prints_plans_and_errors(quantized, capsys):
    before = sorted(Path().iterdir())

    code, plans = answer_of(capsys, "batch float.onnx int8.onnx -o out --dry-run")

    assert code == 1
    assert {node["node"] for node in plans[0]["plan"]["nodes"]} >= {"conv", "gemm"}
    assert "quantized already" in plans[1]["error"]
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("batch absent.onnx gone.onnx -o out", "no such file"),
        ("batch nowhere -o out", "no .onnx file"),
        ("batch float.onnx -o out --metric top1 --min 0.9", "top1 needs labels"),
        ("batch float.onnx -o out --metric cosine", "--max-drop or --min"),
        ("batch float.onnx -o out --jobs 0", "1 or more"),
        ("config absent.yaml", "absent.yaml"),
        ("config float.onnx", "float.onnx"),
        ("report .", "output folder of a batch"),
    ],
)
def test_a_wrong_batch_is_not_started(asked, capsys, line, told):
    code = main(line.split())

    assert code == 2
    assert "m" not in asked
    assert told in capsys.readouterr().err


def test_report_shows_the_latest_run_or_the_one_that_is_named(tmp_path, capsys):
    for day, outcome in ((1, "done"), (2, "failed")):
        run_id, when = f"run{day}", datetime(2026, 1, day, tzinfo=UTC)
        counts = {"models": 1, "done": 1, "skipped": 0, "failed": 0, "not_met": 0}
        run = {
            "run_id": run_id,
            "started_at": when,
            "seconds": 2.5,
            "host": "h",
            "target": "arm64",
            **counts,
        }
        sizes = {
            "float_size_bytes": 4_000_000,
            "size_bytes": 1_000_000,
            "speedup": 2.0,
            "float_ms": 4.0,
            "quantized_ms": 2.1,
            "busy": run_id == "run1",
        }
        told = {
            "metric": "top1",
            "accuracy_float": 0.99,
            "accuracy": 0.98,
            "verdict": "none",
            "reason": None,
        }
        why = {"outcome": outcome, "stage": "prepare", "error": "not\x1bONNX"}
        for table, row in (
            ("runs", run),
            ("models", {"run_id": run_id, "model": "m", **sizes, **told, **why}),
        ):
            (tmp_path / "reports" / table).mkdir(parents=True, exist_ok=True)
            parquet.write_table(
                pyarrow.Table.from_pylist([row]), tmp_path / "reports" / table / f"{run_id}.parquet"
            )
    (tmp_path / "reports" / "runs" / ".torn.parquet.tmp").write_bytes(b"PAR1")

    assert main(["report", str(tmp_path)]) == 0
    assert "failed: prepare: not\\x1bONNX" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "reports"), "--run", "run1"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["m"])
    for part in (
        "4.00 MB -> 1.00 MB",
        "4.00x smaller",
        "99.00 % -> 98.00 %",
        "top1",
        "4 ms -> 2 ms",
        "2.00x (busy host)",
        "done",
    ):
        assert part in line
    assert main(["report", str(tmp_path), "--format", "json"]) == 0
    assert (
        json.loads(capsys.readouterr().out)["runs"][0]["started_at"] == "2026-01-01T00:00:00+00:00"
    )
    assert main(["report", str(tmp_path), "--run", "run3"]) == 2
    assert "run1, run2" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "elsewhere")]) == 2
    assert f"error: {tmp_path}/elsewhere/reports holds no report\n" in capsys.readouterr().err
