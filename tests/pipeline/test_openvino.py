"""What OpenVINO makes of a model that is exported for it."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from flows.cli.commands import main
from flows.runtime import openvino_ir
from flows.runtime.openvino_ir import EQUAL_DB, LOST_DB, ExportedIR, export_ir
from quant_core.evaluate.in_openvino import run_in_openvino
from quant_core.evaluate.timing import Timing
from quant_core.model.session import open_session, run
from quant_core.plan.targets import TARGETS
from tests.models import random_feed, sketch, tiny_cnn
from tests.oracle.cases import SAME, weights
from tests.oracle.quantizing import make, prepare_proto, sqnr_db

FASTER = Timing(2.0, 1.0, 2.0, 1.0, 2.0, 2.0, 2.0, 5, 1)
SLOWER = Timing(1.0, 2.0, 1.0, 2.0, 0.5, 0.5, 0.5, 5, 1)


@pytest.fixture
def cnn(tmp_path):
    """A float model and samples for it."""
    onnx.save(tiny_cnn(), tmp_path / "cnn.onnx")
    feeds = [random_feed(tiny_cnn(), seed)["x"] for seed in range(8)]
    np.savez(tmp_path / "x.npz", x=np.concatenate(feeds))
    return tmp_path / "cnn.onnx", tmp_path / "x.npz"


@pytest.mark.slow
def test_a_static_cnn_runs_in_integers_as_exactly_as_here(cnn, tmp_path, capsys):
    pytest.importorskip("openvino", reason="openvino is not installed")
    model, data = cnn
    output = tmp_path / "made.onnx"

    request = ["quantize", str(model), "--data", str(data), "-o", str(output), "--mode", "static"]
    main([*request, "--export", "openvino", "--format", "json"])

    result = json.loads(capsys.readouterr().out)
    found = result["export"]
    assert result["target"] == "openvino"
    assert found["integers"] == found["multiplying"] == 2
    assert found["float_db"] > EQUAL_DB
    assert found["there_db"] > found["here_db"] - LOST_DB
    assert {path.suffix for path in tmp_path.glob("made.*")} == {".onnx", ".xml", ".bin"}


@pytest.mark.slow
def test_pools_that_count_their_padding_are_right(tmp_path):
    """OpenVINO itself pads integers with 0, whatever their zero point: 1 dB."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    text = """(float[1, 8, 12, 12] x) => (float y) {
        a = Conv(x, u) b = Conv(a, v)
        p = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1>(a)
        c = Conv(p, w) y = Add(b, c)
    }"""
    given = prepare_proto(sketch(text, weights(u=(8, 8, 1, 1), v=(8, 8, 1, 1), w=(8, 8, 1, 1))))
    original, quantized = tmp_path / "float.onnx", tmp_path / "quantized.onnx"
    onnx.save(given.original, original)
    onnx.save(make(given, "openvino").model, quantized)

    feeds = [random_feed(given.original)]
    found = export_ir(original, quantized, tmp_path / "made.xml", feeds, seconds=0.01)

    assert found.there_db > found.here_db - LOST_DB


@pytest.mark.slow
@pytest.mark.parametrize("target", [t.name for t in TARGETS.values() if t.pairs_channels])
@pytest.mark.parametrize("channels", [2, 3])
def test_no_pair_of_channels_saturates_in_openvino(channels, target, tmp_path):
    """As it does without VNNI where a Conv of 3 channels is safe in onnxruntime only."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    text = f"(float[1, {channels}, 8, 8] x) => (float[1, 64, 8, 8] y) {{ y = Conv<{SAME}>(x, w) }}"
    path = tmp_path / "made.onnx"
    given = prepare_proto(sketch(text, weights(w=(64, channels, 3, 3))))
    onnx.save(make(given, target).model, path)
    largest = {"x": np.full((1, channels, 8, 8), 9, np.float32)}

    [[[there]]] = run_in_openvino([path], [largest]).outputs

    [here] = run(open_session(path), largest)
    assert sqnr_db([[here]], [[there]]) > EQUAL_DB


@pytest.mark.slow
@pytest.mark.parametrize("target", ["openvino", "portable"])
def test_rows_of_tables_are_right_there(target, tmp_path):
    """OpenVINO crashes where columns are scaled before rows are picked, as in files for x86, or
    takes their scales for those of rows.
    """
    pytest.importorskip("openvino", reason="openvino is not installed")
    text = "(int64[n, t] i) => (float[n, t, 96] y) { r = Gather(w, i) y = Relu(r) }"
    proto = sketch(text, weights(w=(90, 96)))
    path = tmp_path / "made.onnx"
    onnx.save(make(prepare_proto(proto), target, mode="weight_only").model, path)
    feed = {"i": np.arange(90).reshape(2, 45)}

    [[[there]]] = run_in_openvino([path], [feed]).outputs

    [here] = run(open_session(path), feed)
    assert sqnr_db([[here]], [[there]]) > EQUAL_DB


@pytest.mark.slow
def test_an_export_keeps_open_sizes_and_is_checked_on_samples_of_several(tmp_path):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    text = "(float[n, 3, h, w] x) => (float[n, 4, h, w] y) { a = Conv(x, u) y = Relu(a) }"
    given = prepare_proto(sketch(text, weights(u=(4, 3, 1, 1))))
    original, quantized = tmp_path / "float.onnx", tmp_path / "quantized.onnx"
    onnx.save(given.original, original)
    onnx.save(make(given, "openvino").model, quantized)
    rng = np.random.default_rng(0)
    sizes = ((1, 3, 8, 8), (2, 3, 12, 5))
    feeds = [{"x": rng.standard_normal(size).astype(np.float32)} for size in sizes]

    found = export_ir(original, quantized, tmp_path / "made.xml", feeds, seconds=0.1)

    assert found.float_db > EQUAL_DB
    assert found.there_db > found.here_db - LOST_DB
    shape = openvino.Core().read_model(tmp_path / "made.xml").inputs[0].get_partial_shape()
    assert [size.is_dynamic for size in shape] == [True, False, True, True]


def test_what_is_wrong_with_an_export_is_said():
    def notes(integers, *found):
        return ExportedIR("made.xml", 1, "2026.4", integers, 2, *found).note

    assert notes(2, FASTER, 120.0, 40.0, 41.0) == ""
    assert notes(2, FASTER, 120.0, 79.0, 70.0) == ""  # both are equal to float
    assert "float model itself" in notes(2, FASTER, -9.0, 40.0, -9.0)
    assert "less exactly" in notes(2, FASTER, 120.0, 40.0, 30.0)
    assert "nothing of it in integers" in notes(0, FASTER, 120.0, 40.0, 40.0)
    assert "0.50x" in notes(2, SLOWER, 120.0, 40.0, 40.0)


def test_without_openvino_nothing_is_made(cnn, monkeypatch, capsys):
    monkeypatch.setattr(openvino_ir, "openvino_version", lambda: None)
    model, _ = cnn

    code = main(["quantize", str(model), "--export", "openvino"])

    assert code == 2
    assert 'pip install "quantmill[openvino]"' in capsys.readouterr().err
    assert [path.name for path in model.parent.glob("*.onnx")] == ["cnn.onnx"]


def test_an_export_is_made_for_its_own_target_only(cnn, monkeypatch, capsys):
    monkeypatch.setattr(openvino_ir, "check_openvino", lambda: "0")

    code = main(["quantize", str(cnn[0]), "--target", "x86", "--export", "openvino"])

    assert code == 2
    assert "--target openvino" in capsys.readouterr().err


def test_weights_of_somebody_else_are_seen_before_any_work(cnn, tmp_path, monkeypatch, capsys):
    model, _ = cnn
    monkeypatch.setattr(openvino_ir, "check_openvino", lambda: "0")
    other, output = tmp_path / "made.bin", tmp_path / "made.onnx"
    other.write_bytes(b"theirs")

    code = main(["quantize", str(model), "-o", str(output), "--export", "openvino"])

    assert code == 2
    assert "made.bin exists and is no earlier export" in capsys.readouterr().err
    assert other.read_bytes() == b"theirs"
    assert not output.exists()
