"""Every model, quantized in every way, is valid, as planned and near to float."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quant_core.calibrate.observe import Statistics
from quant_core.plan.make import QuantPlan
from quant_core.plan.targets import TARGETS, host_kernels
from quant_core.rewrite.apply import apply_plan
from tests.oracle.agreement import assert_they_agree
from tests.oracle.cases import CASES
from tests.oracle.quantizing import make, prepared, sqnr_db

# Normally distributed weights and activations in 8 and 4 bits have an SQNR near 40 and 20 dB after
# one layer; here up to five layers follow each other.
NEAR_DB = {16: 55.0, 8: 24.0, 4: 12.0}
WAYS = {
    "static": {"mode": "static"},
    "static per tensor": {"mode": "static", "per_channel": False},
    "static from int4": {"mode": "static", "bits": 4},
    "dynamic": {"mode": "dynamic"},
    "dynamic from int4": {"mode": "dynamic", "bits": 4},
    "weight-only": {"mode": "weight_only"},
    "weight-only from int4": {"mode": "weight_only", "bits": 4},
    "qdq": {"mode": "weight_only", "runtime": "qdq"},
    "qdq from int4": {"mode": "weight_only", "runtime": "qdq", "bits": 4},
    "asymmetric": {"mode": "weight_only", "symmetric": False},
    "float16": {"layer_bits": {"*": 16}, "float_storage": "float16"},
    "float16 beside": {"mode": "static", "min_elements": 300, "float_storage": "float16"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_a_quantized_model_is_valid_and_near_and_as_planned(case, way):
    given = prepared(case)
    before = ir.to_proto(given.model).SerializeToString(deterministic=True)

    made = make(given, **WAYS[way])

    onnx.checker.check_model(made.model, full_check=True)
    assert [i.name for i in made.model.graph.input] == list(given.feeds[0])
    assert [(o.name, o.type.tensor_type.elem_type) for o in made.model.graph.output] == [
        (o.name, o.type.tensor_type.elem_type) for o in given.original.graph.output
    ]
    assert_they_agree(made.plan, made.quantized)
    assert (
        sqnr_db(given.floats(), made.outputs(given.feeds))
        > NEAR_DB[16 if way == "float16" else made.plan.config.bits]
    )
    assert ir.to_proto(given.model).SerializeToString(deterministic=True) == before
    again = apply_plan(
        given.model,
        QuantPlan.from_json(made.plan.to_json()),
        Statistics(made.stats.tensors, made.stats.means),
    )
    assert ir.to_proto(again.model).SerializeToString() == made.model.SerializeToString()


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "x86"])
@pytest.mark.parametrize("case", ["residual", "every_mover_and_elementwise_operator", "attention"])
def test_every_target_is_near(case, target):
    if host_kernels() == "x86-avx2" and not TARGETS[target].saturates:
        pytest.skip("what is made for a CPU that does not saturate is wrong on this one")
    given = prepared(case)

    made = make(given, target, mode="static")

    assert sqnr_db(given.floats(), made.outputs(given.feeds)) > NEAR_DB[8]


@pytest.mark.parametrize("n", [1, 3, 7])
def test_the_batch_stays_free(n):
    given = prepared("residual")
    made = make(given, mode="static")
    feeds = [{"x": np.concatenate([feed["x"]] * 2)[:n]} for feed in given.feeds]

    assert [outputs[0].shape for outputs in made.outputs(feeds)] == [(n, 3)] * 4
