"""What is typed becomes what was meant; what is answered can be read by people and by programs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from flows import doctor, options, show
from flows.cli import main
from flows.options import Answer
from quant_core.config import Contract, QuantConfig
from quant_core.errors import DataError

ROOT = Path(__file__).parent.parent.parent
COMMANDS = ("info", "quantize", "calibrate", "validate", "benchmark", "doctor")


@pytest.fixture
def typed():
    """A command that takes every group; calling it gives what the options became."""
    app, seen = typer.Typer(), {}

    @options.register(app)
    def probe(config: QuantConfig, samples: options.SampleOptions, accuracy: options.AccuracyOptions) -> Answer:
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
    assert seen["samples"] == options.SampleOptions()
    assert seen["accuracy"] == options.AccuracyOptions()


def test_every_option_of_a_config_can_be_typed(typed):
    code, seen = typed(
        *("--bits", "4", "--mode", "static", "--method", "percentile", "--percentile", "99.5", "--per-tensor"),
        *("--asymmetric", "--block-size", "64", "--weight-method", "rtn", "--no-bias-correction", "--exclude", "a*"),
        *("--exclude", "b", "--layer-bits", "head=32", "--layer-bits", "x=y=8", "--min-elements", "9"),
        *("--target", "arm64", "--runtime", "qdq"),
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
    )
    assert set(options.CONFIG) == set(QuantConfig.__slots__)


def test_samples_and_a_contract_can_be_typed(typed):
    code, seen = typed(
        *("--data", "d.npz", "--labels", "l.npy", "--num-samples", "5", "--shape", "x=1,3,8,8", "--shape", "y=1,2"),
        *("--metric", "top1", "--max-drop", "0.01"),
    )

    assert code == 0
    assert seen["samples"].source == Path("d.npz")
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
        (["--layer-bits", "head=5"], ["--layer-bits head", "is 5", "32, 8, 4"]),
        (["--target", "x86"], ["--target", "x86-avx2"]),
        (["--metric", "accuracy", "--min", "1"], ["--metric", "top1"]),
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
    options.register(app)(function)

    def run(*arguments):
        try:
            app(list(arguments))
        except SystemExit as done:
            return done.code

    return run


def test_an_answer_is_text_or_json(capsys):
    def probe() -> Answer:
        return Answer({"snr": float("inf"), "rows": ({"a": 1},)}, lambda data: "for people", exit_code=1)

    run = answering(probe)

    assert run() == 1
    assert capsys.readouterr().out == "for people\n"
    assert run("--format", "json") == 1
    assert json.loads(capsys.readouterr().out) == {"snr": None, "rows": [{"a": 1}]}
    assert run("--format", "xml") == 2


def test_an_error_is_three_lines_or_a_json_object(capsys):
    def probe() -> Answer:
        raise DataError("holds NaN", "d.npy, sample 3", "Drop it")

    run = answering(probe)

    assert run() == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: holds NaN\nwhere: d.npy, sample 3\n hint: Drop it\n")
    assert run("--format", "json") == 1
    error = {"kind": "DataError", "problem": "holds NaN", "where": "d.npy, sample 3", "hint": "Drop it"}
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
    nodes = [{"node": evil, "op_type": "Conv", "compute": "float", "storage": "int8", "elements": 9, "reason": evil}]

    show.answer({"target": "portable", "nodes": nodes}, show.plan)
    show.explain(DataError(evil, evil, evil), as_json=False)

    out, err = capsys.readouterr()
    for text in (out, err):
        assert "conv\\x1b[31m\\x07\\u202e[bold]x[/bold]\\udc80" in text
        assert "\x1b" not in text


def test_a_table_in_a_pipe_is_not_squeezed(capsys):
    rows = [
        {"node": "block/" * 20, "op_type": "Conv", "compute": "static", "storage": "int8", "elements": 1, "reason": ""}
    ]

    show.answer({"target": "portable", "nodes": rows}, show.plan)

    assert "block/" * 20 in capsys.readouterr().out


def test_sizes_and_shares_read_as_a_person_writes_them():
    assert (show.size(1234), show.size(2_500_000), show.size(None)) == ("1.2 kB", "2.50 MB", "")
    assert (show.ratio(4, 1), show.ratio(4, None)) == ("4.00x", "")
    assert (show.percent(0.98765), show.percent(None)) == ("98.77 %", "")
    assert (show.ms(1.23456), show.ms(None)) == ("1.23 ms", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    assert main([command, "--help"]) == 0
    assert "--format" in capsys.readouterr().out


def test_a_command_line_without_a_command_is_answered_with_help(capsys):
    main([])

    assert "quantize" in "".join(capsys.readouterr())


def test_doctor_names_versions_that_are_known_not_to_work():
    assert doctor.broken({"fastapi": "0.150.0", "sqlalchemy": "2.0.58", "prefect": "3.8.8"}) == []

    found = doctor.broken({"fastapi": "0.165.0", "sqlalchemy": "2.1.0b1", "prefect": "3.9.0", "dask": None})

    assert [problem.split()[0] for problem in found] == ["fastapi", "sqlalchemy", "prefect"]


def test_doctor_tells_the_target_threads_and_versions(capsys):
    code = main(["doctor", "--format", "json"])

    report = json.loads(capsys.readouterr().out)
    assert code == int(bool(report["problems"]))
    assert {"target", "threads", "memory"} <= report["host"].keys()
    assert report["versions"]["onnxruntime"]


def test_help_answers_at_once():
    """Best of three: a busy machine is not our import time. Under 0.2 s on an idle one."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "flows.cli", "--help"], cwd=ROOT, capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)

    assert min(seconds) < 0.7
