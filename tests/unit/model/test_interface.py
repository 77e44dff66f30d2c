"""What a model says of itself and of its inputs and outputs stays as it was."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from quant_core.api import quantize_model
from quant_core.config import QuantConfig
from tests.models import sketch

W = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)


def described() -> onnx.ModelProto:
    """A model that uses all that ONNX lets one say of it."""
    text = "(float[m,32] x, float[32] shift, int64[3] idle)"
    text += """ => (float[n,32] y, float[n,32] z, float[n,32] v) {
        a = MatMul(x, w) y = Add(a, shift) z = Relu(y) v = MatMul(z, u)
    }"""
    model = sketch(text, {"w": W, "u": W, "shift": np.zeros(32, np.float32)})
    model.doc_string, model.domain, model.model_version = "a model", "org.example", 7
    model.graph.doc_string = "a graph"
    model.opset_import.extend([helper.make_opsetid("ai.onnx.ml", 2), helper.make_opsetid("own", 3)])
    helper.set_model_props(model, {"classes": "a,b"})
    model.graph.output.append(model.graph.output[0])  # twice
    x, v = model.graph.input[0], model.graph.output[2]
    x.doc_string, x.type.denotation = "an input", "TENSOR"
    v.doc_string = "an output that a product writes"
    for place in (model.graph, x, v):
        entry = place.metadata_props.add()
        entry.key, entry.value = "unit", "m"
    return model


@pytest.mark.parametrize(
    "config", [{}, {"mode": "dynamic"}, {"bits": 4}, {"float_storage": "float16"}]
)
def test_names_types_texts_and_metadata_of_the_interface_stay(tmp_path, config):
    before = described()
    path, output = tmp_path / "model.onnx", tmp_path / "made.onnx"
    onnx.save(before, path)

    quantize_model(path, output, QuantConfig(**config))

    after = onnx.load(output)
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    assert "shift" in {tensor.name for tensor in after.graph.initializer}  # the default
    for name in ("doc_string", "domain", "model_version"):
        assert getattr(after, name) == getattr(before, name)
    assert (after.graph.name, after.graph.doc_string) == ("sketch", "a graph")
    assert list(after.graph.metadata_props) == list(before.graph.metadata_props)
    assert ("classes", "a,b") in {(p.key, p.value) for p in after.metadata_props}
    versions = {entry.domain: entry.version for entry in after.opset_import}
    assert (versions["ai.onnx.ml"], versions["own"]) == (2, 3)
    onnx.checker.check_model(after)
