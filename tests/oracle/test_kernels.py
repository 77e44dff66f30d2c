"""onnxruntime runs integer kernels where the plan says so.

A weight-only model runs the float model's own kernels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from quant_core.evaluate.saturation_check import saturation_of
from quant_core.model import graph
from quant_core.model.session import optimized_graph
from quant_core.numerics.round_nearest import block_width, fitting_levels, quantize_int4
from quant_core.plan.operators import layout_of
from quant_core.plan.types import Compute, QuantPlan
from tests.models import normalized, sketch
from tests.oracle.cases import CASES, weights
from tests.oracle.quantizing import Prepared, make, planned, prepare_proto, prepared, sqnr_db

CONVS = [
    "tiny_cnn",
    "conv_without_a_bias",
    "conv_1d",
    "conv_3d",
    "grouped_and_depthwise",
    "depthwise_with_several_outputs_for_each_channel",
    "residual",
    "constants_that_hide",
    "odd_strides_dilations_and_automatic_padding",
    "every_mover_and_elementwise_operator",
    "batch_norm_between",
    "clip_and_constants_beside_activations",
    "graph_outputs_in_the_middle",
    "names_that_are_taken",
    "nodes_without_names",
    "a_weight_shared_by_convs",
    "transposed_convolution",
    "dead_and_huge_channels",
    "opset_9",
    "opset_22",
    "max_pool_with_relu_and_with_indices",
    "average_pool_with_dilations",
    "a_relu_in_a_branch_reads_a_conv_outside",
    "several_inputs_of_several_types",
]


def saturating(made) -> list:
    model = normalized(made.model)
    rows = [saturation_of(node) for node in model.graph]
    return [row for row in rows if row is not None and row.pairs]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("case", CONVS)
def test_every_static_conv_runs_in_integers(case, bits):
    made = make(prepared(case), mode="static", bits=bits)

    static = [n for n in made.plan.nodes if n.op_type == "Conv" and n.compute == "static"]
    ran = made.kernels()
    assert static
    assert ran.count("QLinearConv") == len(static)
    assert not {"Conv", "FusedConv"} & set(ran)


def test_a_conv_with_a_computed_bias_stays_float():
    """It would not fuse, and dequantize its weight at every run."""
    made = make(prepared("conv_with_a_computed_weight_or_bias"), mode="static")

    assert planned(made.plan, "a").compute == "float"
    assert "bias" in planned(made.plan, "a").reason


def test_a_residual_network_runs_in_integers_from_input_to_output():
    assert make(prepared("residual"), mode="static").kernels() == [
        "QLinearConv",
        "QLinearConv",
        "QLinearAdd",
        "QLinearGlobalAveragePool",
        "QGemm",
    ]


def test_movers_and_elementwise_operators_between_convs_run_in_8_bits():
    ran = make(prepared("every_mover_and_elementwise_operator"), mode="static").kernels()

    assert set(ran) == {
        "QLinearConv",
        "QLinearLeakyRelu",
        "NhwcMaxPool",
        "QLinearAveragePool",
        "QLinearConcat",
        "QLinearSigmoid",
        "QLinearMul",
        "QLinearGlobalAveragePool",
        "MatMulIntegerToFloat",
    }


@pytest.mark.parametrize(
    "case", ["matrices_of_three_dimensions", "attention", "a_vector_times_a_matrix"]
)
def test_static_matmuls_leave_integers_at_once(case):
    made = make(prepared(case), mode="static")

    static = [
        n for n in made.plan.nodes if n.op_type in ("MatMul", "Gemm") and n.compute == "static"
    ]
    assert static
    assert made.kernels().count("MatMulIntegerToFloat") + made.kernels().count("QGemm") == len(
        static
    )


@pytest.mark.parametrize(("bits", "one_scale"), [(8, False), (8, True), (4, False)])
@pytest.mark.parametrize(
    "case",
    [
        "tiny_cnn",
        "matrices_of_three_dimensions",
        "attention",
        "a_weight_and_its_transpose",
        "gemm_with_transposed_weight",
        "lstm",
        "lstm_both_ways",
        "two_stacked_lstms",
        "an_embedding_tied_to_the_output",
    ],
)
def test_what_is_dynamic_runs_in_one_kernel_each(case, bits, one_scale):
    made = make(prepared(case), mode="dynamic", bits=bits, one_scale=one_scale)

    planned = [n.op_type for n in made.plan.nodes if n.compute == "dynamic"]
    ran = made.kernels()
    assert planned
    assert ran.count("DynamicQuantizeLSTM") == planned.count("LSTM")
    # those that share an input quantize it once
    matmuls = ran.count("DynamicQuantizeMatMul") + ran.count("MatMulIntegerToFloat")
    assert matmuls == len(planned) - planned.count("LSTM")
    assert "MatMulInteger" not in ran


@pytest.mark.parametrize(
    "case", ["attention", "gemm_with_transposed_weight", "two_stacked_lstms", "lstm_both_ways"]
)
def test_one_scale_a_weight_is_one_number_for_each_direction_and_stays_near(case):
    given = prepared(case)
    fine, coarse = (make(given, mode="dynamic", one_scale=one_scale) for one_scale in (False, True))

    sizes = [sorted(n.op_type for n in made.model.graph.node) for made in (fine, coarse)]
    scales = [
        i
        for i in coarse.model.graph.initializer
        if i.data_type == onnx.TensorProto.FLOAT and i.name.startswith("scale_")
    ]
    assert sizes[0] == sizes[1]
    assert scales
    assert all(np.prod(i.dims) <= 2 for i in scales)
    assert sqnr_db(given.floats(), coarse.outputs(given.feeds)) > 25
    assert saturating(coarse) == []


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize(
    "case",
    [
        "residual",
        "attention",
        "two_stacked_lstms",
        "grouped_and_depthwise",
        "depthwise_with_several_outputs_for_each_channel",
    ],
)
def test_no_input_can_saturate_what_is_made_for_avx2(case, mode, bits, per_channel):
    assert (
        saturating(make(prepared(case), "x86", mode=mode, bits=bits, per_channel=per_channel)) == []
    )


def test_on_vnni_weights_are_finer_and_may_be_unsafe_elsewhere():
    given = prepared("gemm_with_transposed_weight")

    assert saturating(make(given, "x86-vnni", mode="static"))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_weight_only_model_runs_what_its_float_model_runs(case, bits):
    given = prepared(case)
    made = make(given, mode="weight_only", bits=bits)

    float_model = ir.to_proto(given.model).SerializeToString()
    float_kernels = [node.op_type for node in optimized_graph(float_model).graph.node]
    ran = [node.op_type for node in optimized_graph(made.model.SerializeToString()).graph.node]

    # A small table of its own is float once the model is loaded.
    is_tied = case == "an_embedding_tied_to_the_output"
    picked = [n for n in made.plan.nodes if n.op_type == "Gather" and is_tied]
    more = Counter(ran)
    more.subtract(Counter(float_kernels))
    if bits == 4 and picked and picked[0].storage == "int4":
        assert (more["GatherBlockQuantized"], more["Gather"]) == (len(picked), -len(picked))
        assert not {op for op, n in more.items() if n and "Gather" not in op}
        return
    assert more["Cast"] == more["Mul"] == len(picked)
    assert 0 <= more["Gather"] <= len(picked)  # a second one where rows have scales
    assert not {op for op, n in more.items() if n and op not in ("Cast", "Gather", "Mul")}


TIED = {
    "a copy, transposed": "t = Tanh(h) y = MatMul(t, v)",
    "the same": "a = Tanh(h) t = Reshape(a, flat) z = Gemm<transB = 1>(t, w) y = Reshape(z, all)",
}


def tied(head: str) -> Prepared:
    arrays = weights(w=(40, 32), u=(32, 32)) | {
        "flat": np.array([-1, 32]),
        "all": np.array([-1, 5, 40]),
    }
    arrays |= {"v": np.ascontiguousarray(arrays["w"].T)} if "copy" in head else {}
    text = f"""(int64[n,5] ids) => (float[n,5,40] y) {{
        e = Gather(w, ids) h = MatMul(e, u) {TIED[head]} }}"""
    return prepare_proto(sketch(text, arrays))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("mode", ["static", "dynamic", "weight_only"])
@pytest.mark.parametrize("head", TIED)
def test_an_embedding_tied_to_the_output_is_stored_once(head, mode, bits):
    given = tied(head)

    made = make(given, mode=mode, bits=bits, layer_bits={"*": bits})

    onnx.checker.check_model(made.model, full_check=True)
    assert [t.name for t in made.model.graph.initializer if np.prod(t.dims) == 40 * 32] == [
        f"int{bits}_0"
    ]
    assert sqnr_db(given.floats(), made.outputs(given.feeds)) > {8: 30, 4: 12}[bits]


@pytest.mark.parametrize("head", TIED)
def test_so_is_one_whose_output_is_a_product_in_blocks_of_4_bits(head):
    given = tied(head)

    made = make(given, compute=dict.fromkeys("yz", Compute.BLOCKS), bits=4, layer_bits={"*": 4})

    ran = [node.op_type for node in optimized_graph(made.model.SerializeToString()).graph.node]
    assert {"GatherBlockQuantized", "MatMulNBits"} <= set(ran)
    in_bytes = [t for t in made.model.graph.initializer if t.data_type == TensorProto.UINT8]
    assert [t.dims for t in in_bytes if t.dims] == [[40, 16]]
    assert sqnr_db(given.floats(), made.outputs(given.feeds)) > 12


def test_a_pad_that_onnxruntime_left_alone_is_left_alone_when_what_is_made_loads():
    """A Conv with the Pad merged may be slower: pads that become constants would be merged."""
    made = make(prepared("a_pad_that_is_not_merged_into_its_conv"), mode="weight_only").model
    pad, conv = (next(n for n in made.graph.node if n.op_type == op) for op in ("Pad", "Conv"))
    constant = numpy_helper.from_array(np.array([0, 0, 1, 1] * 2), "all_pads")
    made.graph.initializer.append(constant)
    pad.input[1:] = ["all_pads"]

    assert {a.name: a.s for a in conv.attribute}["auto_pad"] == b"VALID"
    assert "Pad" in [n.op_type for n in optimized_graph(made.SerializeToString()).graph.node]


@pytest.mark.parametrize(
    ("case", "nodes"),
    [
        ("residual", "*"),
        ("attention", "*"),
        ("gemm_with_transposed_weight", "*"),
        ("transposed_convolution", "a"),
    ],
)
def test_stored_int4_weights_load_to_what_numpy_decodes(case, nodes):
    given = prepared(case)
    options = {"layer_bits": {nodes: 4}, "min_elements": 0, "bias_correction": False}

    made = make(given, mode="weight_only", **options)

    loaded = optimized_graph(made.model.SerializeToString(), optimize="basic").graph
    arrays = [numpy_helper.to_array(t) for t in loaded.initializer]
    nodes = {n.name: n for n in given.model.graph}
    stored = [n for n in made.plan.nodes if n.storage == "int4"]
    assert stored
    for stored_node in stored:
        node = nodes[stored_node.node]
        for name in stored_node.weights:
            weight = graph.array(next(v for v in node.inputs if v is not None and v.name == name))
            layout = layout_of(node, weight.ndim)
            rows = layout.matrix(weight)
            block = block_width(rows.shape[1], 32)
            wanted = quantize_int4(rows, block, levels=fitting_levels(rows, block))
            multipliers = np.repeat(wanted.multipliers, block, axis=1)
            decoded = wanted.levels.table[multipliers, wanted.blocks + 8]
            expected = layout.tensor(
                decoded.astype(np.float32) * wanted.scale[:, None], weight.shape
            )
            assert any(a.shape == expected.shape and np.array_equal(a, expected) for a in arrays), (
                stored_node.node
            )


def test_int4_takes_a_seventh_of_float():
    given = prepared("attention")
    weights = [
        v.const_value.nbytes
        for v in given.model.graph.initializers.values()
        if len(v.const_value.shape) == 2
    ]

    made = make(given, mode="static", bits=4)

    stored = sum(len(t.raw_data) for t in made.model.graph.initializer if t.data_type in (21, 22))
    assert sum(weights) / stored > 7.5


BLOCKWISE = [
    "attention",
    "matrices_of_three_dimensions",
    "gemm_with_transposed_weight",
]


def in_float(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with each MatMulNBits as a MatMul by the numbers that its weight stands for."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    stored = {t.name: numpy_helper.to_array(t) for t in copy.graph.initializer}
    producers = {node.output[0]: node for node in copy.graph.node}

    def scales(name: str) -> np.ndarray:
        if name in stored:
            return stored[name].astype(np.float32)
        factors = [scales(read) for read in producers[name].input]  # of a Cast or a Mul
        return factors[0] * factors[-1] if len(factors) > 1 else factors[0]

    for node in copy.graph.node:
        if node.op_type == "MatMulNBits":
            x, pairs, scale = node.input
            q = producers[pairs].input[0]  # behind an Identity
            nibbles = np.stack([stored[q] & 15, stored[q] >> 4], axis=-1).astype(np.float32) - 8
            blocks = nibbles.reshape(*stored[q].shape[:2], -1) * scales(scale)[..., None]
            weight = blocks.reshape(len(blocks), -1).T.astype(np.float32)
            copy.graph.initializer.append(numpy_helper.from_array(weight, f"{q}_float"))
            node.CopyFrom(onnx.helper.make_node("MatMul", [x, f"{q}_float"], node.output))
    return copy


@pytest.mark.parametrize("case", BLOCKWISE)
def test_blocks_stay_in_4_bits_and_compute_what_the_stored_weights_say(case):
    given = prepared(case)
    all_blocks = dict.fromkeys((n.name for n in given.model.graph), Compute.BLOCKS)

    made = make(given, compute=all_blocks, bits=4, layer_bits={"*": 4})

    exact = replace(made, model=in_float(made.model))
    onnx.checker.check_model(made.model, full_check=True)
    weighted = [n for n in made.plan.nodes if n.weights]
    assert {(n.compute, n.storage) for n in weighted} == {("blocks", "int4")}
    assert made.kernels().count("MatMulNBits") == len(weighted)
    assert (
        sqnr_db(exact.outputs(given.feeds), made.outputs(given.feeds)) > 35
    )  # blocks of activations have 8 bits
    assert made.model.ByteSize() < given.original.ByteSize()
    assert QuantPlan.from_json(made.plan.to_json()) == made.plan


@pytest.mark.parametrize(
    ("case", "target", "options", "compute"),
    [
        ("attention", "x86", {"bits": 8}, "dynamic"),  # as fast, and one kernel fewer to know
        (
            "attention",
            "x86",
            {"bits": 4, "layer_bits": {"*": 4}, "block_size": 64},
            "dynamic",
        ),  # 32 columns
        (
            "attention",
            "portable",
            {"bits": 4, "layer_bits": {"*": 4}},
            "static",
        ),  # onnxruntime's own operator
        ("gemm_with_alpha", "x86", {"bits": 4}, "float"),
    ],
)
def test_what_cannot_compute_in_blocks_does_not(case, target, options, compute):
    given = prepared(case)

    made = make(
        given, target, dict.fromkeys((n.name for n in given.model.graph), Compute.BLOCKS), **options
    )

    assert {n.compute for n in made.plan.nodes if n.weights} == {compute}
