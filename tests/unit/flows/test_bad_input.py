"""Wrong input is answered with problem, place and hint; no file is half written or changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from flows.cli.commands import main
from tests.models import one_graph, save_apart, tiny_cnn

ROOT = Path(__file__).parents[3]
SAMPLES = np.random.default_rng(7).standard_normal((8, 3, 8, 8), dtype=np.float32)
CASES: dict[str, tuple[Callable[[Path], list[str]], int, str]] = {}


def case(
    exit_code: int, message: str
) -> Callable[[Callable[[Path], list[str]]], Callable[[Path], list[str]]]:
    """A row of CASES: prepares a folder and says what is typed in it."""

    def add(prepare: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
        CASES[prepare.__name__] = (prepare, exit_code, message)
        return prepare

    return add


def quantizing(name: str = "float.onnx", *options: str) -> list[str]:
    return ["quantize", name, "-o", "out.onnx", *options]


def calibrating(data: str, *options: str) -> list[str]:
    return quantizing("float.onnx", "--mode", "static", "--data", data, *options)


@case(2, "no such file")
def no_file(folder):
    return quantizing("absent.onnx")


@case(2, "folder")
def a_folder_as_model(folder):
    (folder / "sub").mkdir()
    return quantizing("sub")


@case(1, "text.onnx")
def not_onnx(folder):
    (folder / "text.onnx").write_text("a letter, not a model\n" * 50)
    return quantizing("text.onnx")


@case(1, "empty.onnx")
def an_empty_file(folder):
    (folder / "empty.onnx").write_bytes(b"")
    return quantizing("empty.onnx")


@case(1, "cut.onnx")
def a_truncated_model(folder):
    whole = (folder / "float.onnx").read_bytes()
    (folder / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    return quantizing("cut.onnx")


@case(1, "opset")
def an_opset_from_the_future(folder):
    onnx.save(tiny_cnn(opset=999), folder / "future.onnx")
    return quantizing("future.onnx")


@case(1, "Upsample")
def an_opset_that_nothing_runs(folder):
    old = helper.make_node(
        "Upsample", ["x"], ["y"], "old", mode="nearest", width_scale=2.0, height_scale=2.0
    )
    onnx.save(one_graph([old], {}, opset=1), folder / "old.onnx")
    return quantizing("old.onnx")


@case(1, "weights.bin")
def missing_external_data(folder):
    save_apart(tiny_cnn(), folder / "apart.onnx", "weights.bin")
    (folder / "weights.bin").unlink()
    return quantizing("apart.onnx")


@case(1, "too short")
def truncated_external_data(folder):
    save_apart(tiny_cnn(), folder / "apart.onnx", "weights.bin")
    (folder / "weights.bin").write_bytes(b"\0" * 10)
    return quantizing("apart.onnx")


@case(2, "no such file")
def missing_samples(folder):
    return calibrating("absent.npy")


@case(1, "shape")
def samples_of_the_wrong_shape(folder):
    np.save(folder / "bad.npy", SAMPLES[:, :, :4])
    return calibrating("bad.npy")


@case(1, "shape")
def samples_of_the_wrong_rank(folder):
    np.save(folder / "bad.npy", SAMPLES.reshape(8, -1))
    return calibrating("bad.npy")


@case(1, "complex64")
def samples_of_the_wrong_dtype(folder):
    np.save(folder / "bad.npy", SAMPLES.astype(np.complex64))
    return calibrating("bad.npy")


@case(1, "no input")
def samples_of_the_wrong_names(folder):
    np.savez(folder / "bad.npz", pixels=SAMPLES, mask=SAMPLES)
    return calibrating("bad.npz")


@case(1, "NaN")
def nan_in_samples(folder):
    bad = SAMPLES.copy()
    bad[3, 1, 2, 2] = np.nan
    np.save(folder / "bad.npy", bad)
    return calibrating("bad.npy")


@case(1, "infinite")
def infinity_in_samples(folder):
    bad = SAMPLES.copy()
    bad[5, 0, 0, 0] = np.inf
    np.save(folder / "bad.npy", bad)
    return calibrating("bad.npy")


@case(1, "bad.npy")
def an_empty_data_set(folder):
    np.save(folder / "bad.npy", SAMPLES[:0])
    return calibrating("bad.npy")


@case(2, "no .npz")
def an_empty_folder_of_samples(folder):
    (folder / "none").mkdir()
    return calibrating("none")


@case(1, "bad.npy")
def samples_that_are_no_array(folder):
    (folder / "bad.npy").write_text("1, 2, 3")
    return calibrating("bad.npy")


@case(1, "bad.npy")
def pickled_samples(folder):
    np.save(folder / "bad.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return calibrating("bad.npy")


@case(1, "labels")
def too_few_labels(folder):
    np.save(folder / "labels.npy", np.zeros(3, np.int64))
    return calibrating("samples.npy", "--labels", "labels.npy")


@case(1, "quantized already")
def a_model_that_is_quantized_already(folder):
    assert (
        main(
            [
                "quantize",
                "float.onnx",
                "-o",
                "int8.onnx",
                "--mode",
                "static",
                "--data",
                "samples.npy",
            ]
        )
        == 0
    )
    return quantizing("int8.onnx")


@case(1, "nothing to quantize")
def a_model_with_nothing_to_quantize(folder):
    onnx.save(one_graph([helper.make_node("Relu", ["x"], ["y"], "relu")], {}), folder / "relu.onnx")
    return quantizing("relu.onnx")


@case(2, "cannot be made")
def an_output_under_a_file(folder):
    (folder / "file").write_text("in the way")
    return ["quantize", "float.onnx", "-o", "file/out.onnx"]


@case(2, "folder")
def an_output_that_is_a_folder(folder):
    (folder / "sub").mkdir()
    return ["quantize", "float.onnx", "-o", "sub"]


@case(2, "no regular file")
def an_output_that_is_a_pipe(folder):
    os.mkfifo(folder / "pipe")
    return ["quantize", "float.onnx", "-o", "pipe"]


@case(2, "file name too long")
def an_output_with_a_long_name(folder):
    return ["quantize", "float.onnx", "-o", "x" * 300]


@case(2, "file name too long")
def a_model_with_a_long_name(folder):
    return ["info", "x" * 300]


@case(2, "never changed")
def an_output_that_is_the_original(folder):
    (folder / "sub").mkdir()
    return ["quantize", "float.onnx", "-o", "sub/../float.onnx"]


@case(2, "never changed")
def an_output_that_is_a_link_to_the_original(folder):
    (folder / "link.onnx").symlink_to("float.onnx")
    return ["quantize", "float.onnx", "-o", "link.onnx"]


@case(2, "never changed")
def an_output_that_is_the_data(folder):
    return ["calibrate", "float.onnx", "--data", "samples.npy", "-o", "./samples.npy"]


@case(2, "never changed")
def an_output_that_is_the_plan(folder):
    (folder / "plan.json").write_text("{}")
    return ["quantize", "float.onnx", "--plan", "plan.json", "-o", "plan.json"]


@case(2, "never changed")
def an_output_that_holds_the_weights_of_the_original(folder):
    save_apart(tiny_cnn(), folder / "apart.onnx", "weights.bin")
    return ["quantize", "apart.onnx", "-o", "weights.bin"]


@case(2, "never changed")
def a_page_in_place_of_the_model(folder):
    return ["explain", "float.onnx", "-o", "float.onnx"]


@case(2, "never changed")
def a_page_in_place_of_a_file_that_is_compared(folder):
    shutil.copy(folder / "float.onnx", folder / "other.onnx")
    return ["compare", "float.onnx", "other.onnx", "-o", "other.onnx"]


@case(2, "never changed")
def a_page_in_place_of_weights(folder):
    save_apart(tiny_cnn(), folder / "apart.onnx", "weights.bin")
    return ["explain", "apart.onnx", "-o", "weights.bin"]


@case(2, "cannot be made")
def a_page_under_a_file(folder):
    return ["compare", "float.onnx", "float.onnx", "-o", "samples.npy/page.html"]


@case(2, "is not taken for standard output")
def an_output_that_is_a_dash(folder):
    return ["quantize", "float.onnx", "-o", "-"]


@case(2, "holds no costs")
def costs_in_the_model(folder):
    return quantizing("float.onnx", "--costs", "float.onnx")


@case(2, "--data")
def calibration_without_data(folder):
    return ["calibrate", "float.onnx"]


@case(2, "--method")
def an_unknown_method(folder):
    return quantizing("float.onnx", "--method", "median")


@case(2, "plan.json")
def a_plan_that_is_none(folder):
    (folder / "plan.json").write_text('{"nodes": []}')
    return quantizing("float.onnx", "--plan", "plan.json")


@case(2, "no such file")
def validation_of_nothing(folder):
    return ["validate", "float.onnx", "absent.onnx"]


@case(1, "")
def validation_against_another_model(folder):
    other = one_graph([helper.make_node("Relu", ["x"], ["y"], "relu")], {})
    other.graph.input[0].name = other.graph.node[0].input[0] = "z"
    onnx.save(other, folder / "other.onnx")
    return ["validate", "float.onnx", "other.onnx", "--data", "samples.npy"]


@case(2, "no such file")
def a_benchmark_of_nothing(folder):
    return ["benchmark", "float.onnx", "absent.onnx"]


@case(1, "text.onnx")
def information_on_what_is_no_model(folder):
    (folder / "text.onnx").write_text("a letter")
    return ["info", "text.onnx"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    onnx.save(tiny_cnn(), tmp_path / "float.onnx")
    np.save(tmp_path / "samples.npy", SAMPLES)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_explained_and_leaves_nothing_behind(name, folder, capsys):
    prepare, exit_code, message = CASES[name]
    typed = prepare(folder)
    before = contents(folder)
    capsys.readouterr()

    code = main(typed)

    out, err = capsys.readouterr()
    assert (code, out) == (exit_code, ""), err
    assert [line[:6] for line in err.splitlines()] == ["error:", "hint: "], err
    assert message in err
    assert contents(folder) == before


def test_a_program_gets_the_same_as_json(folder, capsys):
    code = main(["quantize", "absent.onnx", "-o", "out.onnx", "--format", "json"])

    out, err = capsys.readouterr()
    assert (code, err) == (2, "")
    error = json.loads(out)["error"]
    assert error["kind"] == "ModelError"
    assert error["where"] == "absent.onnx"
    assert error["problem"]
    assert error["hint"]


def test_native_code_says_nothing_of_its_own(folder):
    """onnxruntime writes to the process's stderr, past Python."""
    np.save(folder / "bad.npy", SAMPLES[:, :, :4])
    (folder / "cut.onnx").write_bytes((folder / "float.onnx").read_bytes()[:200])

    for typed in (calibrating(str(folder / "bad.npy")), ["info", "cut.onnx"]):
        command = [
            sys.executable,
            "-c",
            f"import sys; from flows.cli.commands import main; sys.exit(main({typed!r}))",
        ]
        done = subprocess.run(
            command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )

        assert done.returncode == 1
        begins = [line[:6] for line in done.stderr.splitlines()]
        assert begins == ["error:", "hint: "], done.stderr


def test_a_good_request_overwrites_its_output_and_not_its_input(folder):
    before = contents(folder)
    (folder / "out.onnx").write_bytes(b"of an earlier run")

    code = main(calibrating("samples.npy"))

    after = contents(folder)
    assert code == 0
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"out.onnx"}
    onnx.checker.check_model(onnx.load(folder / "out.onnx"))
