"""What is written for a target keeps the rules of its runtime, whatever the model."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from quant_core.config import QuantConfig
from quant_core.evaluate.timing_cache import TimingCache
from quant_core.model.graph import MICROSOFT
from quant_core.model.session import open_session, run
from quant_core.numerics.granularity import PerChannel, PerTensor
from quant_core.numerics.saturation import PAIR_LIMIT
from quant_core.plan.targets import TARGETS
from quant_core.plan.types import Compute
from quant_core.search.first_plan import first_plan
from quant_core.search.prepared import prepare_optimized
from tests.models import random_feed, sketch
from tests.oracle.cases import weights
from tests.oracle.quantizing import make, prepare_proto, prepared, sqnr_db

CNNS = ("residual", "grouped_and_depthwise")
WAYS = {"int8": {}, "int4": {"bits": 4}, "weight-only": {"mode": "weight_only"}}
STANDARD = [target.name for target in TARGETS.values() if not target.is_onnxruntime]
BYTES = {TensorProto.INT8, TensorProto.UINT8}


def convs_of(
    model: onnx.ModelProto,
) -> tuple[list[onnx.NodeProto], dict[str, onnx.TensorProto], dict[str, onnx.NodeProto]]:
    """The Convs, the initializers by name, and the node that makes each value."""
    convs = [n for n in model.graph.node if n.op_type == "Conv"]
    constants = {t.name: t for t in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    return convs, constants, makers


def zero_points(model: onnx.ModelProto, op_type: str) -> list[tuple[int, np.ndarray]]:
    """(type, values) of the zero point of each such node; one that is left out is 0."""
    constants = {t.name: t for t in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type == op_type:
            zero = constants.get(node.input[2]) if len(node.input) > 2 else None
            kind = (zero or constants[node.input[0]]).data_type
            found.append((kind, numpy_helper.to_array(zero) if zero else np.zeros(1, np.int8)))
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("target", STANDARD)
def test_other_runtimes_get_standard_operators_only(target, way):
    made = make(prepared("grouped_and_depthwise"), target, **WAYS[way])

    assert MICROSOFT not in {node.domain for node in made.model.graph.node}


@pytest.mark.parametrize("target", [t.name for t in TARGETS.values() if not t.decodes_int4])
@pytest.mark.parametrize("case", CNNS)
def test_integer_weights_are_bytes_where_decoding_is_not_folded(case, target):
    made = make(prepared(case), target, bits=4)

    integers = [n for n in made.plan.nodes if n.weights and n.compute is Compute.STATIC]
    assert integers
    assert {n.storage.bits for n in integers} == {8}
    # a weight goes from its initializer to DequantizeLinear, and to nothing else
    stored = {t.name for t in made.model.graph.initializer if t.data_type in BYTES}
    readers = {n.op_type for n in made.model.graph.node if stored & set(n.input)}
    assert readers <= {"DequantizeLinear", "QuantizeLinear"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CNNS)
def test_tensorrt_gets_int8_with_zero_points_of_zero_and_float_biases(case, way):
    model = make(prepared(case), "tensorrt", **WAYS[way]).model

    activations = zero_points(model, "QuantizeLinear")
    assert {kind for kind, _ in activations} <= {TensorProto.INT8}
    for kind, zero in activations + zero_points(model, "DequantizeLinear"):
        assert kind in (TensorProto.INT8, TensorProto.INT4)
        assert not zero.astype(np.int32).any()


STORED = """(float[n, 64, 8, 8] x) => (float y) {
    c = Conv(x, w) d = ConvTranspose(c, t) g = GlobalAveragePool(d) f = Flatten(g)
    h = Gemm<transB = 1>(f, u) y = MatMul(h, v)
}"""
# Target -> operator -> the block in which 4-bit weights of it share a scale, None for a channel's
IN_4_BITS = {
    "tensorrt": {"Gemm": 64},
    "qnn": {"Conv": None, "ConvTranspose": None, "Gemm": None},
    "openvino": {"Conv": None, "ConvTranspose": None, "Gemm": 32, "MatMul": 16},
}


@pytest.mark.parametrize("target", IN_4_BITS)
def test_4_bit_weights_share_scales_as_the_runtime_documents_it(target):
    shapes = {"w": (64, 64, 3, 3), "t": (64, 64, 1, 1), "u": (48, 64), "v": (48, 20)}

    model = make(
        prepare_proto(sketch(STORED, weights(**shapes))), target, bits=4, mode="weight_only"
    ).model

    stored = {t.name for t in model.graph.initializer if t.data_type == TensorProto.INT4}
    blocks = {
        node.output[0]: next((a.i for a in node.attribute if a.name == "block_size"), None)
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored
    }
    readers = {name: node.op_type for node in model.graph.node for name in node.input}
    assert {readers[name]: block for name, block in blocks.items()} == IN_4_BITS[target]
    feed = {"x": np.random.default_rng(0).normal(size=(2, 64, 8, 8)).astype(np.float32)}
    [made] = run(open_session(model.SerializeToString()), feed)
    assert np.isfinite(made).all()


@pytest.mark.parametrize("case", CNNS)
def test_qnn_gets_16_bit_activations_and_symmetric_weights(case):
    model = make(prepared(case), "qnn").model

    assert {kind for kind, _ in zero_points(model, "QuantizeLinear")} == {TensorProto.UINT16}
    assert next(o.version for o in model.opset_import if not o.domain) >= 21
    weights = [zero for kind, zero in zero_points(model, "DequantizeLinear") if kind in BYTES]
    assert weights
    assert not any(zero.any() for zero in weights)


@pytest.mark.parametrize("target", [t.name for t in TARGETS.values() if not t.requantizes])
@pytest.mark.parametrize("case", CNNS)
def test_only_what_integer_kernels_read_is_quantized_where_that_is_enough(case, target):
    model = make(prepared(case), target).model

    static = {n.node for n in make(prepared(case), target).plan.nodes}
    readers = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    pairs = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert pairs
    for pair in pairs:
        read = [r.name for dq in readers[pair.output[0]] for r in readers[dq.output[0]]]
        assert static & set(read)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(("channels", "taps"), [(3, 3), (3, 1), (4, 3), (1, 3)])
def test_pairs_are_safe_in_each_order_in_which_a_kernel_adds_them(channels, taps, target):
    text = f"(float[1, {channels}, 8, 8] x) => (float y) {{ y = Conv(x, w) }}"
    given = prepare_proto(sketch(text, weights(w=(8, channels, taps, taps))))

    made = make(given, target.name, mode="static")

    [conv] = [n for n in made.plan.nodes if n.weights]
    assert conv.compute is Compute.STATIC
    if target.pairs_channels:
        [q] = [
            numpy_helper.to_array(t).astype(int)
            for t in made.model.graph.initializer
            if t.data_type == TensorProto.INT8 and len(t.dims) == 4
        ]
        padded = np.pad(q, [(0, 0), (0, channels % 2), (0, 0), (0, 0)])
        of_one_tap = padded[:, ::2] + padded[:, 1::2]
        in_a_row = q.transpose(0, 2, 3, 1).reshape(len(q), -1)
        in_a_row = in_a_row[:, 0:-1:2] + in_a_row[:, 1::2]
        assert max(np.abs(of_one_tap).max(), np.abs(in_a_row).max(initial=0)) <= PAIR_LIMIT


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_hard_sigmoids_are_clips_where_they_have_no_fast_kernel(target):
    text = """(float[1, 8, 6, 6] x) => (float y) {
        c = Conv(x, w) h = HardSigmoid<alpha = 0.3, beta = 0.4>(c) y = Mul(c, h)
    }"""
    given = prepare_proto(sketch(text, weights(w=(8, 8, 1, 1))))

    operators = [node.op_type for node in make(given, target.name).model.graph.node]

    assert ("HardSigmoid" in operators) is target.has_hard_sigmoid
    assert ("Clip" in operators) is not target.has_hard_sigmoid


COUNTED = {
    "same all around": "pads = [1, 1, 1, 1]",
    "more on one side": "pads = [0, 2, 1, 0], strides = [2, 1]",
    "by size": 'auto_pad = "SAME_UPPER", strides = [2, 2]',
}


@pytest.mark.parametrize("target", [t.name for t in TARGETS.values() if not t.counts_padding])
@pytest.mark.parametrize("padding", COUNTED.values(), ids=COUNTED)
def test_no_pool_of_integers_counts_its_padding_where_that_is_wrong(target, padding):
    text = f"""(float[n, 4, 9, 9] x) => (float y) {{
        c = Conv(x, w) p = AveragePool<kernel_shape = [3, 3], count_include_pad = 1, {padding}>(c)
        y = Conv(p, v)
    }}"""
    proto = sketch(text, weights(w=(4, 4, 1, 1), v=(4, 4, 1, 1)))

    made = make(prepare_proto(proto), target).model

    makers = {name: node.op_type for node in made.graph.node for name in node.output}
    pools = [n for n in made.graph.node if n.op_type == "AveragePool"]
    counting = [n for n in pools if any(a.name == "count_include_pad" and a.i for a in n.attribute)]
    assert {makers[n.input[0]] for n in counting} == {"ConstantOfShape"}
    feed = random_feed(proto, n=2)
    [wanted], [found] = (
        run(open_session(model.SerializeToString()), feed) for model in (proto, made)
    )
    assert sqnr_db([[wanted]], [[found]]) > 25


@pytest.mark.parametrize("target", [t for t in TARGETS.values() if t.rewrites])
def test_what_pays_on_a_target_is_rewritten_without_a_clock(target, tmp_path):
    text = "(float[1, 2, 64, 1] x) => (float y) { c = Conv(x, w) y = Relu(c) }"
    path = tmp_path / "tall.onnx"
    onnx.save(sketch(text, weights(w=(4, 2, 9, 1))), path)

    found = prepare_optimized(path, QuantConfig(target=target.name), None, TimingCache())

    assert {change.rule for change in found.applied} == set(target.rewrites)


@pytest.mark.parametrize("target", TARGETS)
def test_without_samples_no_target_needs_any(target):
    config = QuantConfig(target=target)

    plan = first_plan(prepared("attention").model, config, measured=False)

    assert not plan.activations
    assert {n.storage.bits for n in plan.nodes if n.weights} == {8}


@pytest.mark.parametrize("compute", [Compute.DYNAMIC, Compute.BLOCKS])
def test_arm64_gets_products_that_kleidiai_computes(compute):
    """Source: pull requests 25187 (dynamic products) and 27751 (blocks) of onnxruntime."""
    text = "(float[n, 64] x) => (float[n, 20] y) { h = MatMul(x, w) y = MatMul(h, v) }"
    given = prepare_proto(sketch(text, weights(w=(64, 96), v=(96, 20))))
    bits = 4 if compute is Compute.BLOCKS else 8
    computes = {str(n.name): compute for n in given.model.graph}

    model = make(given, "arm64", computes, bits=bits).model

    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    products = [n for n in model.graph.node if n.op_type in ("MatMulInteger", "MatMulNBits")]
    assert len(products) == 2
    for node in products:
        if compute is Compute.DYNAMIC:
            assert constants[node.input[1]].dtype == np.int8
            assert len(node.input) < 4 or not node.input[3] or not constants[node.input[3]].any()
        else:
            given_as = {a.name: a.i for a in node.attribute}
            assert given_as["block_size"] % 32 == 0
            assert given_as["K"] % given_as["block_size"] == 0


def test_web_leaves_depthwise_convs_in_float():
    planned = make(prepared("grouped_and_depthwise"), "web").plan.nodes

    computes = {n.compute for n in planned if "depthwise" in n.reason}
    assert computes == {Compute.FLOAT}
    assert Compute.STATIC in {n.compute for n in planned if n.weights}


def test_web_leaves_an_lstm_in_float_whatever_is_chosen():
    given = prepared("lstm")

    names = [n.node for n in make(given, "web").plan.nodes if n.op_type == "LSTM"]
    plan = make(given, "web", dict.fromkeys(names, Compute.DYNAMIC)).plan

    assert names
    assert {n.compute for n in plan.nodes if n.op_type == "LSTM"} == {Compute.FLOAT}


@pytest.mark.parametrize("target", [t.name for t in TARGETS.values() if len(t.times) < 3])
@pytest.mark.parametrize("compute", [Compute.DYNAMIC, Compute.BLOCKS])
def test_a_way_that_never_pays_on_a_target_is_never_planned(target, compute):
    given = prepared("attention")

    names = [n.node for n in make(given, target).plan.nodes if n.weights]
    plan = make(given, target, dict.fromkeys(names, compute)).plan

    ways = {n.compute for n in plan.nodes if n.weights}
    assert ways <= {Compute.FLOAT, *TARGETS[target].times}


@pytest.mark.parametrize("target", [t.name for t in TARGETS.values() if t.only_constants])
@pytest.mark.parametrize("case", ["lstm", "gru", "rnn"])
def test_recurrent_weights_are_constants_beside_integers_where_they_must_be(case, target):
    def storage(**options):
        plan = make(prepared(case), target, **options).plan
        return {n.storage.is_integer for n in plan.nodes if n.op_type == case.upper()}

    assert storage() == {False}
    assert storage(mode="weight_only") == {True}


@pytest.mark.parametrize("case", CNNS)
def test_tensorrt_decodes_every_weight_at_its_reader(case):
    """Source: TensorRT's documentation, "Explicit quantization": weights go from a constant through
    one DequantizeLinear, along the axis of output channels, to the layer; biases are float.
    """
    model = make(prepared(case), "tensorrt").model

    convs, constants, makers = convs_of(model)
    assert convs
    for conv in convs:
        pairs = [makers[name] for name in conv.input[:2]]
        assert {n.op_type for n in pairs} == {"DequantizeLinear"}
        weight, scale = (constants[name] for name in pairs[1].input[:2])
        assert weight.data_type == TensorProto.INT8
        axes = {a.name: a.i for a in pairs[1].attribute}
        assert list(scale.dims) in ([], [weight.dims[axes.get("axis", 1)]])
        assert axes.get("axis", 1) == 0 or list(scale.dims) == []
        if len(conv.input) > 2:
            assert constants[conv.input[2]].data_type == TensorProto.FLOAT


@pytest.mark.parametrize("case", CNNS)
def test_qnn_gets_symmetric_int8_weights_and_int32_biases_on_the_grid_of_products(case):
    """Source: onnxruntime's documentation of the QNN execution provider, "Running a quantized
    model": weights int8 or uint8, biases int32 with the product of both scales.
    """
    model = make(prepared(case), "qnn").model

    convs, constants, makers = convs_of(model)
    assert convs
    for conv in convs:
        data, weight, *bias = (makers[name] for name in conv.input)
        stored = constants[weight.input[0]]
        assert stored.data_type == TensorProto.INT8
        assert numpy_helper.to_array(stored).min() >= -127
        scales = [numpy_helper.to_array(constants[n.input[1]]) for n in (data, weight, *bias)]
        for node, scale in zip(bias, scales[2:], strict=True):
            assert constants[node.input[0]].data_type == TensorProto.INT32
            np.testing.assert_allclose(scale, scales[0] * scales[1], rtol=1e-6)


@pytest.mark.parametrize(
    ("op_type", "scale", "zero"), [("Sigmoid", 2**-16, 0), ("Tanh", 2**-15, 2**15)]
)
def test_qnn_gets_the_scales_that_it_requires_of_16_bits(op_type, scale, zero):
    """Source: onnxruntime.quantization.execution_providers.qnn, `QnnCompatibilityOverrides`."""
    text = f"""(float[n, 4, 8, 8] x) => (float[n, 4, 8, 8] y) {{
        a = Conv(x, w) s = {op_type}(a) y = Conv(s, v)
    }}"""
    proto = sketch(text, weights(w=(4, 4, 1, 1), v=(4, 4, 1, 1)))

    model = make(prepare_proto(proto), "qnn").model

    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    [written] = [node for node in model.graph.node if node.op_type == op_type]
    [pair] = [node for node in model.graph.node if written.output[0] in node.input]
    assert pair.op_type == "QuantizeLinear"
    assert constants[pair.input[1]] == scale
    assert constants[pair.input[2]] == zero


def test_qnn_gets_matmuls_of_one_scale_and_convs_of_one_for_each_channel():
    text = """(float[n, 8, 4] x) => (float[n, 6, 4] y) {
        a = Conv(x, w) y = MatMul(a, v)
    }"""
    proto = sketch(text, weights(w=(6, 8, 1), v=(4, 4)))

    plan = make(prepare_proto(proto), "qnn").plan

    found = {n.op_type: n.granularity for n in plan.nodes}
    assert found == {"Conv": PerChannel(), "MatMul": PerTensor()}


TABLE, MATRIX, STACK = (300, 64), (64, 128), (30, 64, 64)
# What reads a table -> its lines, and the shapes of what they hold
READERS = {
    "a product": ("r = Gather(e, i) y = MatMul(r, w)", {"e": TABLE, "w": MATRIX}),
    "the table too": ("r = Gather(e, i) t = Transpose(e) y = MatMul(r, t)", {"e": TABLE}),
    "picked matrices": ("r = Gather(e, i) y = MatMul(r, w)", {"e": STACK, "w": MATRIX}),
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("lines", "shapes"), READERS.values(), ids=READERS)
def test_tensorrt_picks_rows_that_are_float(lines, shapes, bits):
    """Source: onnx-tensorrt, docs/operators.md: only DequantizeLinear takes int8."""
    proto = sketch(f"(int64[n] i) => (float y) {{ {lines} }}", weights(**shapes))

    made = make(prepare_proto(proto), "tensorrt", mode="weight_only", bits=bits).model

    kinds = {*BYTES, TensorProto.INT4}
    stored = {t.name for t in made.graph.initializer if t.data_type in kinds}
    assert stored
    assert {n.op_type for n in made.graph.node if stored & set(n.input)} == {"DequantizeLinear"}
    feed = {"i": np.arange(30)}
    [wanted], [found] = (
        run(open_session(model.SerializeToString()), feed) for model in (proto, made)
    )
    assert sqnr_db([[wanted]], [[found]]) > (30 if bits == 8 else 12)


@pytest.mark.parametrize("target", ["tensorrt", "qnn"])
@pytest.mark.parametrize("mode", ["static", "weight_only"])
def test_no_weight_is_stored_to_be_folded_when_a_model_loads(target, mode):
    model = make(prepared("grouped_and_depthwise"), target, mode=mode).model

    stored = {t.name for t in model.graph.initializer if t.data_type in BYTES}
    readers = [n for n in model.graph.node if stored & set(n.input)]
    assert readers
    assert {n.op_type for n in readers} <= {"DequantizeLinear", "QuantizeLinear"}
