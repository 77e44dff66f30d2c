"""The commands that look at models: info, validate, benchmark, explain and compare."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from flows.cli.commands import main
from flows.console import printing, timing_views
from tests.command_line import answer_of
from tests.models import sketch, tiny_cnn
from tests.oracle.cases import weights


def test_info_says_what_a_model_is(quantized, capsys):
    _, info = answer_of(capsys, "info float.onnx")

    assert info["inputs"] == [{"name": "x", "dtype": "float", "shape": ["n", 3, 8, 8]}]
    assert (info["num_nodes"], info["opset"], info["quantized"]) == (5, 17, False)
    assert info["operators"]["Conv"] == 1
    assert set(info["stored_bytes"]) == {"float"}
    int8 = answer_of(capsys, "info int8.onnx")[1]
    assert (int8["quantized"], int8["weights_only"]) == (True, False)
    assert int8["next"] == "quantmill explain int8.onnx"


@pytest.mark.parametrize("runtime", ["folded", "qdq"])
def test_info_says_that_weights_alone_are_integers(quantized, capsys, runtime):
    line = f"quantize float.onnx -o weights.onnx --mode weight_only --runtime {runtime}"
    assert main(line.split()) == 0
    capsys.readouterr()

    _, info = answer_of(capsys, "info weights.onnx")

    assert (info["quantized"], info["weights_only"]) == (True, True)
    assert max(info["stored_bytes"], key=info["stored_bytes"].get) == "int8"


def test_info_says_what_was_rewritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("quant_core.api.is_faster", lambda *_, **__: True)  # by no clock
    nodes = "m = Mul(x, s) y = Conv<pads = [1, 1, 1, 1]>(m, w)"
    text = f"(float[n,3,8,8] x) => (float[n,8,8,8] y) {{ {nodes} }}"
    onnx.save(sketch(text, weights(w=(8, 3, 3, 3)) | {"s": np.float32(0.5)}), "float.onnx")

    assert main(["quantize", "float.onnx", "--optimize-only", "-o", "small.onnx"]) == 0
    capsys.readouterr()
    _, info = answer_of(capsys, "info small.onnx")

    assert info["rewrites"] == {"fold_into_consumers": 1}


def test_validate_holds_a_model_against_its_contract(quantized, capsys):
    line = "validate float.onnx int8.onnx --data samples.npy"

    code, found = answer_of(capsys, line)
    assert (code, found["verdict"]) == (0, "none")
    assert found["fidelity"]["agreement"] > 0.5
    assert answer_of(capsys, f"{line} --metric agreement --min 0.5")[0] == 0
    code, found = answer_of(capsys, f"{line} --metric sqnr --min 1000")
    assert (code, found["verdict"]) == (1, "not_met")
    assert found["reason"]


def test_validate_and_compare_say_that_samples_were_drawn(quantized, capsys):
    for command in ("validate", "compare --seconds 0.1"):
        line = f"{command} float.onnx int8.onnx"

        _, found = answer_of(capsys, line)
        assert found["is_drawn"]
        if command == "validate":
            assert found["next"] == f"quantmill {line} --data SAMPLES.npz"
        assert not answer_of(capsys, f"{line} --data samples.npy")[1]["is_drawn"]
        assert main(line.split()) == 0
        assert "drawn" in capsys.readouterr().out


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


@pytest.mark.parametrize("line", ["explain float.onnx", "compare float.onnx int8.onnx"])
def test_a_page_that_cannot_be_written_is_said_so(quantized, capsys, line):
    Path("taken").mkdir()

    assert main(f"{line} --seconds 0.1 -o taken".split()) == 2

    assert capsys.readouterr().err == "error: taken is a folder\nhint: Name a file in it\n"


def test_kernels_of_which_there_is_little_to_say_are_one_row(capsys):
    def kernel(name, share, why=""):
        text = {"op_type": "Conv", "arithmetic": "int8", "why": why, "advice": ""}
        text |= {"has_weight": True, "covers": []}
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
