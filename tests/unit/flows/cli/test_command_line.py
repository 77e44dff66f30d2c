"""The command line as a whole: help, mistyped lines, completion, version, doctor."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import quant_core
from flows.cli import doctor
from flows.cli.commands import COMMANDS, main
from tests.command_line import answer_of


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_every_command_explains_itself(command, capsys):
    assert main([command.__name__, "--help"]) == 0
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
            "quantize m.onnx q.onnx",
            "error: q.onnx is one argument too many\nhint: An output is named with -o\n",
        ),
        (
            "info m.onnx q.onnx",
            "error: q.onnx is one argument too many\n"
            "hint: `quantmill info --help` lists what can be given\n",
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
    ("rest", "sentence"),
    [
        ("--fix-shape other=1", "error: --fix-shape other is no open size"),
        ("--data random --shape 1,3", "error: --shape "),
        ("--data random --shape other=1,3,8,8", "error: --shape: 'other' is no input"),
        ("--data random --labels labels.npy", "error: --labels: random samples have no right"),
        ("-o data", "error: data is a folder\n"),
    ],
)
def test_the_place_of_an_error_is_an_option_or_a_file_as_it_was_typed(
    quantized, capsys, rest, sentence
):
    Path("data").mkdir()

    assert main(f"quantize float.onnx {rest}".split()) == 2

    assert capsys.readouterr().err.startswith(sentence)


def test_a_folder_in_the_place_of_a_model_is_a_wrong_request(tmp_path, capsys):
    assert main(["info", str(tmp_path)]) == 2

    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is a folder")


def test_a_proposed_command_names_a_file_that_begins_with_a_dash(quantized, capsys):
    Path("-m.onnx").write_bytes(Path("float.onnx").read_bytes())

    _, found = answer_of(capsys, "info ./-m.onnx")

    assert found["next"] == "quantmill quantize ./-m.onnx"


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
def test_a_wrong_value_is_answered_with_a_sentence_and_what_is_near(
    quantized, capsys, typed, sentence
):
    assert main(f"quantize float.onnx {typed}".split()) == 2
    assert sentence in capsys.readouterr().err


def test_doctor_names_versions_that_are_known_not_to_work():
    assert (
        doctor.known_problems({"fastapi": "0.150.0", "sqlalchemy": "2.0.58", "prefect": "3.8.8"})
        == []
    )

    found = doctor.known_problems(
        {"fastapi": "0.165.0", "sqlalchemy": "2.1.0b1", "prefect": "3.9.0", "dask": None}
    )

    assert [problem.split()[0] for problem in found] == ["fastapi", "sqlalchemy", "prefect"]


def test_doctor_says_the_target_threads_and_versions(capsys):
    code = main(["doctor", "--format", "json"])

    report = json.loads(capsys.readouterr().out)
    assert code == int(bool(report["problems"]))
    assert {"target", "threads", "memory"} <= report["host"].keys()
    assert report["versions"]["onnxruntime"]
