"""Float constants can be stored in 16 bits; what 16 bits cannot hold stays as it is.

Nothing else in the model changes.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quant_core.model.session import optimized_graph
from tests.models import sketch
from tests.oracle.cases import CASES, weights
from tests.oracle.quantizing import make, prepare_proto, prepared

PLAIN = {"layer_bits": {"*": 16}, "float_storage": "float16"}


def types(model: onnx.ModelProto) -> dict[str, int]:
    return {t.name: t.data_type for t in model.graph.initializer}


@pytest.mark.parametrize(
    "case", sorted(CASES.keys() - {"an_embedding_alone", "an_embedding_tied_to_the_output"})
)
def test_once_loaded_the_float_model_is_left(case):
    given = prepared(case)
    made = make(given, **PLAIN)

    ran, wanted = (
        [
            n.op_type
            for n in optimized_graph(
                ir.to_proto(m).SerializeToString()
                if isinstance(m, ir.Model)
                else m.SerializeToString()
            ).graph.node
        ]
        for m in (made.model, given.model)
    )

    assert all(n.storage == "float16" for n in made.plan.nodes if n.weights)
    tables = [n for n in made.plan.nodes if n.op_type == "Gather"]
    assert sorted(ran) == sorted(wanted + ["Cast"] * len(tables))


def test_a_table_keeps_16_bits_in_memory_and_its_rows_become_float():
    made = make(prepared("an_embedding_alone"), **PLAIN)

    assert [n.op_type for n in optimized_graph(made.model.SerializeToString()).graph.node] == [
        "Gather",
        "Cast",
    ]


def test_what_float16_cannot_hold_stays_float32_and_says_why():
    arrays = weights(big=(32, 32), tiny=(32, 32), good=(32, 32))
    arrays |= {"big": arrays["big"] * 1e6, "tiny": arrays["tiny"] * 1e-7}
    text = """(float[n,32] x) => (float[n,32] y) {
        a = MatMul(x, big) b = MatMul(a, tiny) y = MatMul(b, good) }"""

    made = make(prepare_proto(sketch(text, arrays)), layer_bits={"*": 16})

    plans = {n.weights[0]: n for n in made.plan.nodes}
    assert {name: plan.storage for name, plan in plans.items()} == {
        "big": "float32",
        "tiny": "float32",
        "good": "float16",
    }
    assert "overflow float16" in plans["big"].reason
    assert "too small for float16" in plans["tiny"].reason
    kinds = types(made.model)
    assert (kinds.pop("big"), kinds.pop("tiny")) == (onnx.TensorProto.FLOAT,) * 2
    assert list(kinds.values()) == [onnx.TensorProto.FLOAT16]


def test_other_constants_are_halved_too_but_no_mask_that_overflows_and_no_divisor_that_vanishes():
    mask = np.where(np.tri(32, dtype=bool), 0, -1e9).astype(np.float32)
    arrays = weights(w=(32, 32), place=(32, 32)) | {
        "mask": mask,
        "by": np.float32(1e-9) ** np.eye(32, dtype=np.float32),
    }
    text = """(float[32,32] x) => (float[32,32] y) {
        a = Add(x, place) b = Sub(a, mask) c = Div(b, by) y = MatMul(c, w) }"""

    made = make(prepare_proto(sketch(text, arrays)), mode="dynamic", float_storage="float16")

    assert made.plan.constants["place"] == "float16"
    assert "1e+09 overflow" in made.plan.constants["mask"]
    assert "too small" in made.plan.constants["by"]
    kinds = types(made.model)
    halved = [name for name, kind in kinds.items() if kind == onnx.TensorProto.FLOAT16]
    assert kinds.keys() >= {"mask", "by"}
    assert len(halved) == 1
    assert "place" not in kinds


def test_nothing_is_halved_unasked():
    made = make(prepared("tiny_cnn"), exclude=["*"])

    assert set(types(made.model).values()) == {onnx.TensorProto.FLOAT}
    assert not made.plan.constants
