"""The plan, the layers report and the file say the same of every node."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from quant_core.calibrate.gram import gram_matrices
from quant_core.calibrate.matmul_inputs import matmul_inputs
from quant_core.calibrate.observe import observe
from quant_core.config import QuantConfig
from quant_core.model.session import optimized_graph
from quant_core.numerics.granularity import PerBlock
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from quant_core.plan.types import Compute, NodeChoice, QuantPlan, Storage
from quant_core.rewrite.apply import Quantized, apply_plan
from tests.models import sketch
from tests.oracle.agreement import assert_they_agree
from tests.oracle.cases import CASES, weights
from tests.oracle.quantizing import Prepared, make, prepare_proto, prepared


def four_bit_widths(model: ir.Model) -> dict[str, int]:
    """Initializer of int4 (C, blocks, width) -> width."""
    return {
        name: int(value.const_value.shape[2])
        for name, value in model.graph.initializers.items()
        if value.const_value.dtype == ir.DataType.INT4 and len(value.const_value.shape) == 3
    }


def quantized(
    given: Prepared,
    target: str,
    choices: dict[str, NodeChoice] | None = None,
    *,
    with_grams: bool = False,
    **options: object,
) -> tuple[QuantPlan, Quantized]:
    plan = make_plan(given.model, QuantConfig.from_dict(options), TARGETS[target], choices)
    stored = ir.to_proto(given.model).SerializeToString()
    stats = observe(stored, plan, given.feeds)
    if with_grams:
        found = gram_matrices(stored, matmul_inputs(given.model, plan), given.feeds)
        stats = replace(stats, gram_matrices=found)
    return plan, apply_plan(given.model, plan, stats)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("target", "mode"),
    [
        ("x86", "auto"),  # test_every_model.py has its other modes
        *(("portable", mode) for mode in ("static", "dynamic", "auto", "weight_only")),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_the_plan_the_report_and_the_file_agree(case, target, mode, bits):
    assert_they_agree(*quantized(prepared(case), target, mode=mode, bits=bits))


@pytest.mark.parametrize("case", ["attention", "residual"])
def test_they_agree_where_a_search_chose_blocks(case):
    given = prepared(case)
    blocks = NodeChoice(Compute.BLOCKS, Storage.INT4)
    choices = {str(n.name): blocks for n in given.model.graph}

    plan, made = quantized(given, "x86-vnni", choices, bits=4)

    assert any(n.compute is Compute.BLOCKS for n in plan.nodes) or case == "residual"
    assert_they_agree(plan, made)


@pytest.mark.parametrize(
    ("columns", "method", "compute", "width"),
    [
        (1568, "auto", Compute.DYNAMIC, 28),  # two Gram matrices of 784 columns
        (1568, "rtn", Compute.BLOCKS, 32),
        (2048, "auto", Compute.BLOCKS, 32),
    ],
)
def test_a_weight_that_is_rounded_in_parts_computes_as_the_plan_says(
    columns, method, compute, width
):
    text = f"(float[n,{columns}] x) => (float[n,64] y) {{ y = MatMul(x, w) }}"
    given = prepare_proto(sketch(text, weights(w=(columns, 64))))
    choices = {"y": NodeChoice(Compute.BLOCKS, Storage.INT4)}

    plan, made = quantized(
        given, "x86-vnni", choices, bits=4, weight_method=method, with_grams=method != "rtn"
    )

    assert [(n.compute, n.granularity) for n in plan.nodes if n.weights] == [
        (compute, PerBlock(width, may_be_uneven=compute is not Compute.BLOCKS))
    ]
    assert_they_agree(plan, made)
    if compute is not Compute.BLOCKS:
        assert list(four_bit_widths(made.model).values()) == [width]
    assert np.isfinite(made.weight_sqnr_db["y"])


def test_a_conv_that_the_plan_calls_float_is_float_when_onnxruntime_has_loaded_the_file():
    given = prepared("residual")
    convs = [n.name for n in given.model.graph if n.op_type == "Conv"]

    for conv in convs:
        made = make(given, "x86", {conv: Compute.FLOAT}, mode="static")

        loaded = optimized_graph(made.model.SerializeToString()).graph
        integers = [n for n in loaded.node if n.op_type == "QLinearConv"]
        assert len(integers) == len(convs) - 1
