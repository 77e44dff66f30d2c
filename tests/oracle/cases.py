"""Models of every form that quant_core must take: tiny, random, each with a feature of its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tests.models import sketch, tiny_cnn

CASES: dict[str, Callable[[], onnx.ModelProto]] = {"tiny_cnn": tiny_cnn}
IMAGE, VECTOR, STEPS = "float[n,4,8,8] x", "float[n,32] x", "float[n,5,32] x"
SAME = "pads = [1, 1, 1, 1]"


def case(build: Callable[[], onnx.ModelProto]) -> Callable[[], onnx.ModelProto]:
    """A row of CASES."""
    CASES[build.__name__] = build
    return build


def weights(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Standard normal weights, scaled so that activations stay near one; vectors are not scaled."""
    rng = np.random.default_rng(1)
    scale = {
        name: np.sqrt(max(np.prod(shape) / max(shape[0], shape[-1]), 1))
        for name, shape in shapes.items()
        if shape
    }
    return {
        n: (rng.standard_normal(s) / (scale[n] if len(s) > 1 else 1)).astype(np.float32)
        for n, s in shapes.items()
    }


@case
def conv_without_a_bias():
    return sketch(f"({IMAGE}) => (float[n,8,6,6] y) {{ y = Conv(x, w) }}", weights(w=(8, 4, 3, 3)))


@case
def conv_1d():
    return sketch(
        "(float[n,4,9] x) => (float[n,8,7] y) { y = Conv(x, w, b) }", weights(w=(8, 4, 3), b=(8,))
    )


@case
def conv_3d():
    text = "(float[n,4,5,5,5] x) => (float[n,8,3,3,3] y) { y = Conv(x, w, b) }"
    return sketch(text, weights(w=(8, 4, 3, 3, 3), b=(8,)))


@case
def grouped_and_depthwise():
    text = f"""({IMAGE}) => (float[n,8,8,8] y) {{
        d = Conv<group = 4, {SAME}>(x, u, b) r = Relu(d) g = Conv<group = 2, {SAME}>(r, w)
        y = Identity(g)
    }}"""
    return sketch(
        text,
        weights(u=(8, 1, 3, 3), b=(8,), w=(8, 4, 3, 3))
        | weights(u=(4, 1, 3, 3), b=(4,), w=(8, 2, 3, 3)),
    )


@case
def depthwise_with_several_outputs_for_each_channel():
    text = f"({IMAGE}) => (float[n,8,8,8] y) {{ y = Conv<group = 4, {SAME}>(x, u, b) }}"
    return sketch(text, weights(u=(8, 1, 3, 3), b=(8,)))


@case
def odd_strides_dilations_and_automatic_padding():
    text = f"""({IMAGE}) => (float[n,8,2,2] y) {{
        a = Conv<auto_pad = "SAME_UPPER", strides = [2, 2]>(x, w, b) r = Relu(a)
        y = Conv<dilations = [2, 1], strides = [1, 2], pads = [0, 0, 1, 1]>(r, v)
    }}"""
    return sketch(
        text.replace("float[n,8,2,2] y", "float[n,8,h,k] y"),
        weights(w=(8, 4, 3, 3), b=(8,), v=(8, 8, 2, 2)),
    )


@case
def residual(opset: int = 17):
    text = f"""({IMAGE}) => (float[n,3] y) {{
        a = Conv<{SAME}>(x, u, b) r = Relu(a) s = Conv<{SAME}>(r, v, b) t = Add(s, x) z = Relu(t)
        p = GlobalAveragePool(z) f = Flatten(p) y = Gemm<transB = 1>(f, g, h)
    }}"""
    return sketch(text, weights(u=(4, 4, 3, 3), v=(4, 4, 3, 3), b=(4,), g=(3, 4), h=(3,)), opset)


@case
def every_mover_and_elementwise_operator():
    text = f"""({IMAGE}) => (float[n,2,c] y) {{
        a = Conv<{SAME}>(x, u, b) l = LeakyRelu<alpha = 0.2>(a)
        m = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(l)
        v = AveragePool<kernel_shape = [3, 3], {SAME}>(m) c = Concat<axis = 1>(m, v) e = Conv(c, w)
        s = Sigmoid(e) p = Mul(e, s) q = GlobalAveragePool(p) z = Conv(q, k) g = Sigmoid(z)
        h = Mul(p, g)
        t = Transpose<perm = [0, 2, 3, 1]>(h) r = Reshape(t, shape) i = Unsqueeze(r, axes)
        o = Squeeze(i, axes)
        y = MatMul(o, f)
    }}"""
    shape = {"shape": np.array([0, 2, -1]), "axes": np.array([1])}
    return sketch(
        text, weights(u=(4, 4, 3, 3), b=(4,), w=(8, 8, 1, 1), k=(8, 8, 1, 1), f=(64, 8)) | shape
    )


@case
def clip_and_constants_beside_activations():
    text = f"""({IMAGE}) => (float[n,4,8,8] y) {{
        a = Conv<{SAME}>(x, u, b) c = Clip(a, zero, six) d = Add(c, k) e = Mul(d, m)
        f = Conv<{SAME}>(e, v)
        y = Clip(f, low, six)
    }}"""
    constants = {
        "zero": np.float32(0),
        "six": np.float32(6),
        "low": np.float32(-1),
        "m": np.float32(0.5),
        "k": np.ones((1, 4, 1, 1), np.float32),
    }
    return sketch(text, weights(u=(4, 4, 3, 3), v=(4, 4, 3, 3), b=(4,)) | constants)


@case
def a_pad_that_is_not_merged_into_its_conv():
    text = f"""({IMAGE}) => (float[n,6,8,8] y) {{
        p = Pad(x, pads, , axes) a = Conv(p, u, b) y = Relu(a) }}"""
    sizes = {"pads": np.array([1, 1, 1, 1]), "axes": np.array([2, 3])}
    return sketch(text, weights(u=(6, 4, 3, 3), b=(6,)) | sizes, opset=18)


@case
def max_pool_with_relu_and_with_indices():
    text = f"""({IMAGE}) => (float[n,8,4,4] y, int64[n,4,4,4] i) {{
        a = Conv<{SAME}>(x, u) m = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(a) r = Relu(m)
        p, i = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x) t = Add(r, p)
        y = Conv<{SAME}>(t, w)
    }}"""
    return sketch(text, weights(u=(4, 4, 3, 3), w=(8, 4, 3, 3)))


def average_pool(attributes: str, opset: int) -> onnx.ModelProto:
    text = f"""({IMAGE}) => (float[n,4,h,k] y) {{
        a = Conv<{SAME}>(x, u) r = Relu(a) p = AveragePool<kernel_shape = [3, 3], {attributes}>(r)
        y = Conv<{SAME}>(p, u)
    }}"""
    return sketch(text, weights(u=(4, 4, 3, 3)), opset)


CASES["average_pool_with_dilations"] = lambda: average_pool("dilations = [1, 1]", 19)
CASES["average_pool_that_counts_padding_and_rounds_up"] = lambda: average_pool(
    f"ceil_mode = 1, count_include_pad = 1, strides = [2, 2], {SAME}", 19
)


@case
def graph_outputs_in_the_middle():
    text = f"""({IMAGE}) =>
        (float[n,4,8,8] a, float[n,4,8,8] r, float[n,4,8,8] s, float[n,4,8,8] y) {{
        a = Conv<{SAME}>(x, u) r = Relu(a) s = Conv<{SAME}>(r, v) t = Add(s, r)
        y = Conv<{SAME}>(t, u)
    }}"""
    return sketch(text, weights(u=(4, 4, 3, 3), v=(4, 4, 3, 3)))


@case
def names_that_are_taken():
    text = f"""({IMAGE}) => (float[n,4,8,8] a, float[n,4,8,8] y) {{
        a = Conv<{SAME}>(x, u) a_float = Relu(a) a_quantized = Conv<{SAME}>(a_float, x_scale)
        u_int8 = Conv<{SAME}>(a_quantized, u) y = Add(u_int8, a_quantized)
    }}"""
    return sketch(text, weights(u=(4, 4, 3, 3), x_scale=(4, 4, 3, 3)))


@case
def nodes_without_names():
    model = residual()
    for node in model.graph.node:
        node.name = ""
    return model


@case
def a_weight_shared_by_convs():
    text = f"""({IMAGE}) => (float[n,4,8,8] y) {{
        a = Conv<{SAME}>(x, u, b) r = Relu(a) s = Conv<{SAME}>(r, u, c)
        y = Conv<{SAME}, dilations = [1, 1]>(s, u)
    }}"""
    return sketch(text, weights(u=(4, 4, 3, 3), b=(4,), c=(4,)))


@case
def a_weight_and_its_transpose():
    text = f"""({VECTOR}) => (float[n,32] y) {{
        a = Gemm(x, w) r = Tanh(a) y = Gemm<transB = 1>(r, w, b) }}"""
    return sketch(text, weights(w=(32, 32), b=(32,)))


@case
def an_embedding_tied_to_the_output():
    text = """(int64[n,5] ids) => (float[n,5,40] y) {
        e = Gather(w, ids) h = MatMul(e, u) t = Tanh(h) y = MatMul(t, v) }"""
    tied = weights(w=(40, 32), u=(32, 32))
    return sketch(text, tied | {"v": np.ascontiguousarray(tied["w"].T)})


@case
def an_embedding_alone():
    return sketch(
        "(int64[n,5] ids) => (float[n,5,32] y) { y = Gather(w, ids) }", weights(w=(40, 32))
    )


def gemm_bias(
    attributes: str, bias: tuple[int, ...], w: tuple[int, int] = (32, 6), x: str = "float[4,32] x"
) -> onnx.ModelProto:
    return sketch(
        f"({x}) => (float[4,6] y) {{ y = Gemm<{attributes}>(x, w, b) }}", weights(w=w, b=bias)
    )


CASES |= {
    "gemm_with_a_scalar_bias": lambda: gemm_bias("alpha = 1.0", ()),
    "gemm_with_a_bias_of_one": lambda: gemm_bias("alpha = 1.0", (1,)),
    "gemm_with_a_bias_of_one_row": lambda: gemm_bias("alpha = 1.0", (1, 6)),
    "gemm_with_a_bias_per_row": lambda: gemm_bias("alpha = 1.0", (4, 1)),
    "gemm_with_a_bias_for_every_output": lambda: gemm_bias("alpha = 1.0", (4, 6)),
    "gemm_with_transposed_weight": lambda: gemm_bias("transB = 1", (6,), (6, 32)),
    "gemm_with_transposed_input": lambda: gemm_bias("transA = 1", (6,), x="float[32,4] x"),
    "gemm_with_alpha": lambda: gemm_bias("alpha = 0.25", (6,)),
    "gemm_with_beta": lambda: gemm_bias("beta = 3.0", (6,)),
}


@case
def gemm_with_as_many_rows_as_channels_and_a_bias_per_row():
    return sketch(
        "(float[6,32] x) => (float[6,6] y) { y = Gemm(x, w, b) }", weights(w=(32, 6), b=(6, 1))
    )


@case
def gemm_with_a_computed_bias():
    text = f"({VECTOR}) => (float[n,6] y) {{ b = MatMul(x, v) y = Gemm(x, w, b) }}"
    return sketch(text, weights(w=(32, 6), v=(32, 6)))


@case
def conv_with_a_computed_weight_or_bias():
    text = f"""({IMAGE}, float[4] b) => (float[n,4,8,8] y) {{
        k = Tanh(b) a = Conv<{SAME}>(x, u, k) m = ReduceMean<axes = [0], keepdims = 0>(a)
        s = Reshape(m, shape)
        r = Relu(a) t = Conv<pads = [1, 2, 2, 1]>(r, s) y = Add(t, x)
    }}"""
    return sketch(text, weights(u=(4, 4, 3, 3)) | {"shape": np.array([4, 4, 4, 4])})


@case
def matrices_of_three_dimensions():
    text = f"({STEPS}) => (float[n,5,8] y) {{ a = MatMul(x, w) r = Tanh(a) y = MatMul(r, v) }}"
    return sketch(text, weights(w=(32, 32), v=(32, 8)))


@case
def a_stack_of_matrices():
    return sketch(
        "(float[3,5,32] x) => (float[3,5,8] y) { y = MatMul(x, w) }", weights(w=(3, 32, 8))
    )


@case
def a_vector_times_a_matrix():
    return sketch("(float[32] x) => (float[8] y) { y = MatMul(x, w) }", weights(w=(32, 8)))


@case
def attention():
    text = f"""({STEPS}) => (float[n,5,32] y) {{
        q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) kt = Transpose<perm = [0, 2, 1]>(k)
        s = MatMul(q, kt) p = Softmax<axis = -1>(s) o = MatMul(p, v) r = MatMul(o, wo) a = Add(r, b)
        y = Add(a, x)
    }}"""
    return sketch(text, weights(wq=(32, 32), wk=(32, 32), wv=(32, 32), wo=(32, 32), b=(32,)))


@case
def transposed_convolution():
    text = f"""({IMAGE}) => (float[n,6,c,d] y) {{
        a = Conv<{SAME}>(x, u) r = Relu(a) y = ConvTranspose<group = 2, strides = [2, 2]>(r, w, b)
    }}"""
    return sketch(text, weights(u=(4, 4, 3, 3), w=(4, 3, 3, 3), b=(6,)))


def recurrent(
    op: str, gates: int, directions: int = 1, extra: str = "", inputs: str = ""
) -> onnx.ModelProto:
    side = "bidirectional" if directions == 2 else "forward"
    outputs = ", ".join(["s", "h", "c"][: 3 if op == "LSTM" else 2])
    more = f", float[{directions},n,16] c" if op == "LSTM" else ""
    text = f"""(float[5,n,32] x{inputs}) =>
        (float[5,{directions},n,16] s, float[{directions},n,16] h{more}) {{
        {outputs} = {op}<hidden_size = 16, direction = "{side}">(x, w, r, b{extra})
    }}"""
    return sketch(
        text,
        weights(
            w=(directions, gates * 16, 32),
            r=(directions, gates * 16, 16),
            b=(directions, gates * 32),
        ),
    )


CASES |= {
    "lstm": lambda: recurrent("LSTM", 4),
    "lstm_both_ways": lambda: recurrent("LSTM", 4, 2),
    "lstm_with_initial_states": lambda: recurrent(
        "LSTM", 4, extra=", , h0, c0", inputs=", float[1,n,16] h0, float[1,n,16] c0"
    ),
    "gru": lambda: recurrent("GRU", 3, 2),
    "rnn": lambda: recurrent("RNN", 1),
}


@case
def convolution_at_computed_places():
    text = f"""({IMAGE}) => (float[n,6,8,8] y) {{
        o = Conv<{SAME}>(x, u) d = DeformConv<{SAME}>(x, v, o) r = Relu(d) y = Conv(r, w)
    }}"""
    return sketch(text, weights(u=(18, 4, 3, 3), v=(8, 4, 3, 3), w=(6, 8, 1, 1)), opset=19)


@case
def lstm_of_which_only_the_last_state_is_read():
    text = f"""({STEPS}) => (float[n,3] y) {{
        t = Transpose<perm = [1, 0, 2]>(x) unread, h = LSTM<hidden_size = 16>(t, w, r, b)
        l = Squeeze(h, axes) y = Gemm(l, g, k)
    }}"""
    arrays = weights(w=(1, 64, 32), r=(1, 64, 16), b=(1, 128), g=(16, 3), k=(3,))
    return sketch(text, arrays | {"axes": np.array([0])})


@case
def two_stacked_lstms():
    text = f"""({STEPS}) => (float[5,n,16] y) {{
        t = Transpose<perm = [1, 0, 2]>(x) a, ah, ac = LSTM<hidden_size = 16>(t, w, r, b)
        s = Squeeze(a, axes)
        c, ch, cc = LSTM<hidden_size = 16>(s, v, q) y = Squeeze(c, axes)
    }}"""
    arrays = weights(w=(1, 64, 32), r=(1, 64, 16), b=(1, 128), v=(1, 64, 16), q=(1, 64, 16))
    return sketch(text, arrays | {"axes": np.array([1])})


@case
def a_branch_with_weights_of_its_own():
    text = f"""({VECTOR}, bool c) => (float[n,8] y) {{
        a = MatMul(x, w)
        y = If(c) <
            then_branch = yes () => (float[n,8] p) {{ p = MatMul(a, inner) }},
            else_branch = no () => (float[n,8] q) {{ r = Relu(a) q = Gemm(r, outer, b) }}
        >
    }}"""
    model = sketch(text, weights(w=(32, 32), outer=(32, 8), b=(8,)))
    inner = numpy_helper.from_array(weights(inner=(32, 8))["inner"], "inner")
    next(
        a.g for n in model.graph.node for a in n.attribute if a.name == "then_branch"
    ).initializer.append(inner)
    return model


@case
def a_relu_in_a_branch_reads_a_conv_outside():
    text = f"""({IMAGE}, bool c) => (float[n,4,8,8] y) {{
        a = Conv<{SAME}>(x, u)
        y = If(c) <
            then_branch = yes () => (float[n,4,8,8] p) {{ p = Relu(a) }},
            else_branch = no () => (float[n,4,8,8] q) {{ q = Neg(x) }}
        >
    }}"""
    return sketch(text, weights(u=(4, 4, 3, 3)))


@case
def constants_that_hide():
    """A Constant node, an Identity, and initializers that are inputs too (IR version 3)."""
    model = sketch(
        f"""({IMAGE}) => (float[n,3] y) {{
            v = Identity(hidden) a = Conv<{SAME}>(x, u, b) r = Relu(a) s = Conv(r, v)
            p = GlobalAveragePool(s)
            f = Flatten(p) y = Gemm(f, g)
        }}""",
        weights(u=(4, 4, 3, 3), b=(4,), hidden=(4, 4, 3, 3)),
    )
    g = numpy_helper.from_array(weights(g=(4, 3))["g"], "g")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["g"], "constant", value=g))
    declared = (
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer
    )
    model.graph.input.extend(list(declared))
    return model


CASES |= {
    f"opset_{opset}": lambda opset=opset: residual(opset) for opset in (9, 11, 13, 19, 22, 23)
}


@case
def opset_21_that_declares_an_older_ir():
    model = tiny_cnn(21)
    model.ir_version = 9
    return model


@case
def batch_norm_between():
    text = f"""({IMAGE}) => (float[n,4,8,8] y) {{
        a = Conv<{SAME}>(x, u) n = BatchNormalization(a, g, b, m, v) r = Relu(n)
        c = Conv<{SAME}>(r, w)
        y = BatchNormalization(c, g, b, m, v)
    }}"""
    ones = np.ones(4, np.float32)
    return sketch(
        text,
        weights(u=(4, 4, 3, 3), w=(4, 4, 3, 3), g=(4,), b=(4,)) | {"m": 0.1 * ones, "v": 2 * ones},
    )


@case
def dead_and_huge_channels():
    """A channel of zeros, one a million times larger, and a bias that dwarfs its products."""
    model = conv_without_a_bias()
    w = numpy_helper.to_array(model.graph.initializer[0]).copy()
    w[0], w[1] = 0, w[1] * 1e-6
    b = np.zeros(8, np.float32)
    b[2] = 1e4
    return sketch(f"({IMAGE}) => (float[n,8,6,6] y) {{ y = Conv(x, w, b) }}", {"w": w, "b": b})


@case
def several_inputs_of_several_types():
    text = """(float[n,4,8,8] image, int64[n,5] ids, double[n] d) => (float[n,4] y, double[n] z) {
        a = Conv(image, u) p = GlobalAveragePool(a) f = Flatten(p) e = Gather(w, ids)
        m = ReduceMean<axes = [1], keepdims = 0>(e) c = Concat<axis = 1>(f, m) y = Gemm(c, g)
        z = Neg(d)
    }"""
    return sketch(text, weights(u=(4, 4, 3, 3), w=(8, 32), g=(36, 4)))


@case
def weights_without_numbers():
    """Products with matrices of no columns and of no rows: heads that were cut off."""
    text = """(float[n,32] x) => (float[n,8] y, float[n,0] z) {
        a = Slice(x, l, l, k) b = MatMul(a, e) m = MatMul(x, w) y = Add(m, b) z = MatMul(x, o)
    }"""
    empty = {"e": np.zeros((0, 8), np.float32), "o": np.zeros((32, 0), np.float32)}
    ends = {"l": np.zeros(1, np.int64), "k": np.ones(1, np.int64)}
    return sketch(text, weights(w=(32, 8)) | empty | ends)
