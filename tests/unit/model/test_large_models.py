"""Models larger than one protobuf message are read, run and written with tensors in files."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quant_core.api import quantize_model
from quant_core.config import QuantConfig
from quant_core.model import files, graph
from quant_core.model.opset import raise_opset
from quant_core.model.prepare import prepare
from quant_core.model.session import open_session
from quant_core.worker import stages
from tests.models import save_apart, sketch
from tests.oracle.cases import weights

TEXT = """(float[n,96] x) => (float[n,96] y) {
    a = MatMul(x, u) r = Relu(a) b = MatMul(r, v) c = Add(b, k) y = Gemm<transB = 1>(c, w, z)
}"""
LIMIT = 1000  # bytes, for 2 GB
WAYS = {
    "weight-only": {"mode": "weight_only"},
    "int4": {"mode": "weight_only", "bits": 4},
    "static int4": {"mode": "static", "bits": 4},
    "dynamic": {"mode": "dynamic"},
    "race": {},
    "partly float": {"mode": "static", "exclude": ["b"]},
    "float16": {"layer_bits": {"*": 16}, "float_storage": "float16"},
}


def large(folder: Path, opset: int = 17) -> Path:
    path = folder / "float.onnx"
    arrays = weights(u=(96, 96), v=(96, 96), w=(96, 96), k=(96,), z=(96,))
    save_apart(sketch(TEXT, arrays, opset), path, "float.data")
    return path


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((16, 96), dtype=np.float32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("opset", [11, 17])
def test_a_large_model_becomes_what_a_small_one_does(tmp_path, monkeypatch, x, way, opset):
    config, path = (
        QuantConfig.from_dict({"target": "x86", **WAYS[way]}),
        large(tmp_path, opset),
    )
    samples = None if way == "float16" else x
    plan = quantize_model(
        path, tmp_path / "small.onnx", config, calibration=samples
    ).plan  # a race has many winners

    monkeypatch.setattr(files, "MESSAGE_BYTES", LIMIT)
    made = quantize_model(path, tmp_path / "large.onnx", calibration=samples, plan=plan)

    assert made.size_bytes == sum(f.stat().st_size for f in tmp_path.glob("large.onnx*"))
    assert (tmp_path / "large.onnx_data").exists()
    assert not any(
        t.HasField("raw_data") for t in stored(tmp_path / "large.onnx") if np.prod(t.dims) > 512
    )
    small, large_ = (
        open_session(tmp_path / f"{name}.onnx").run(None, {"x": x})[0]
        for name in ("small", "large")
    )
    np.testing.assert_array_equal(small, large_)


def stored(path: Path) -> list[onnx.TensorProto]:
    return list(onnx.load(path, load_external_data=False).graph.initializer)


def test_it_is_searched_as_well(tmp_path, monkeypatch, x):
    monkeypatch.setattr(files, "MESSAGE_BYTES", LIMIT)

    made = quantize_model(large(tmp_path), tmp_path / "out.onnx", calibration=x)

    assert len(made.trace) > 1
    assert not any("error" in row for row in made.trace)


def test_a_prepared_model_leaves_its_tensors_in_a_file_that_goes_when_they_do(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(files, "MESSAGE_BYTES", LIMIT)

    prepared = prepare(large(tmp_path))
    tensors = list(files.external_tensors(prepared))
    folder = Path(tensors[0].base_dir)
    copy = prepared.clone()

    assert folder.exists()
    assert {t.name for t in tensors} == {"u", "v", "w"}  # small ones are in the model
    del prepared
    gc.collect()
    assert folder.exists()
    assert graph.array(copy.graph.initializers["u"]).shape == (96, 96)
    del copy, tensors
    gc.collect()
    assert not folder.exists()


def test_a_small_output_of_a_large_model_needs_no_other_file(tmp_path, monkeypatch, x):
    monkeypatch.setattr(
        files, "MESSAGE_BYTES", 60_000
    )  # the float model is larger, the quantized one is not
    path, output = large(tmp_path), tmp_path / "out.onnx"
    config = QuantConfig(mode="weight_only", exclude=("y",)).to_dict()

    found = stages.prepare(str(path), str(tmp_path), config, None)
    assert (tmp_path / "prepared.onnx_data").exists()
    stages.quantize(
        str(path),
        found["prepared"],
        str(tmp_path / "plan.json"),
        [],
        None,
        None,
        None,
        str(output),
    )
    for file in tmp_path.glob("prepared.*"):
        file.unlink()

    assert list(tmp_path.glob("out.onnx*")) == [output]
    assert not list(files.external_tensors(files.load(output)))
    assert np.isfinite(open_session(output).run(None, {"x": x})[0]).all()


def test_raising_the_opset_touches_no_large_tensor(tmp_path):
    model = files.load(large(tmp_path, 11))
    held = {
        n: v.const_value for n, v in model.graph.initializers.items() if v.const_value.nbytes > 1024
    }

    raised = raise_opset(model, 21)

    assert len(held) == 3
    assert all(raised.graph.initializers[n].const_value is tensor for n, tensor in held.items())
    assert [v.name for v in raised.graph.inputs] == ["x"]
    assert isinstance(raised.graph.initializers["u"].const_value, ir.ExternalTensor)
