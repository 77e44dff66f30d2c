"""A folder as Hugging Face's tools export it: a small encoder-decoder in four graphs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.external_data_helper import set_external_data

from tests.models import sketch

WORDS, WIDTH, HEADS, START = 48, 32, 2, 3
NAMES = ("encoder_model", "decoder_model", "decoder_with_past_model", "decoder_model_merged")
OWN = ("decoder.key", "decoder.value")
CROSS = ("encoder.key", "encoder.value")

ENCODER = f"""(int64[batch_size, encoder_sequence_length] input_ids,
              int64[batch_size, encoder_sequence_length] attention_mask)
    => (float[batch_size, encoder_sequence_length, {WIDTH}] last_hidden_state) {{
    x = Gather(words, input_ids)
    m1 = Unsqueeze(attention_mask, axes12) m2 = Cast<to = 1>(m1) m3 = Sub(one, m2)
    bias = Mul(m3, low)
    q1 = MatMul(x, e_q) q2 = Reshape(q1, heads) q = Transpose<perm = [0, 2, 1, 3]>(q2)
    k1 = MatMul(x, e_k) k2 = Reshape(k1, heads) k = Transpose<perm = [0, 2, 3, 1]>(k2)
    v1 = MatMul(x, e_v) v2 = Reshape(v1, heads) v = Transpose<perm = [0, 2, 1, 3]>(v2)
    s1 = MatMul(q, k) s2 = Mul(s1, scale) s3 = Add(s2, bias) s = Softmax(s3)
    c1 = MatMul(s, v) c2 = Transpose<perm = [0, 2, 1, 3]>(c1) c3 = Reshape(c2, flat)
    c = MatMul(c3, e_o) h1 = Add(x, c) h2 = MatMul(h1, e_up) h3 = Relu(h2)
    h = MatMul(h3, e_down) y = Add(h1, h)
    last_hidden_state = LayerNormalization(y, gain)
}}"""

DECODER = """(int64[batch_size, sequence_length] input_ids,
              int64[batch_size, encoder_sequence_length] encoder_attention_mask{inputs})
    => (float[batch_size, sequence_length, {words}] logits,
        float[batch_size, 2, total_length, 16] "present.0.decoder.key",
        float[batch_size, 2, total_length, 16] "present.0.decoder.value"{outputs}) {{
    x = Gather(words, input_ids)
    q1 = MatMul(x, d_q) q2 = Reshape(q1, heads) q = Transpose<perm = [0, 2, 1, 3]>(q2)
    k1 = MatMul(x, d_k) k2 = Reshape(k1, heads) k = Transpose<perm = [0, 2, 1, 3]>(k2)
    v1 = MatMul(x, d_v) v2 = Reshape(v1, heads) v = Transpose<perm = [0, 2, 1, 3]>(v2)
    {keys}
    kt = Transpose<perm = [0, 1, 3, 2]>("present.0.decoder.key")
    s1 = MatMul(q, kt) s2 = Mul(s1, scale)
    t1 = Shape(s2) t2 = Gather(t1, two) t3 = Gather(t1, three) t4 = Sub(t3, t2)
    t5 = Slice(t1, lasts, end) t6 = Expand(one, t5)
    t7 = Trilu<upper = 0>(t6, t4) t8 = Sub(one, t7) causal = Mul(t8, low)
    s3 = Add(s2, causal) s = Softmax(s3)
    c1 = MatMul(s, "present.0.decoder.value") c2 = Transpose<perm = [0, 2, 1, 3]>(c1)
    c3 = Reshape(c2, flat) c = MatMul(c3, d_o) h1 = Add(x, c)
    xq1 = MatMul(h1, x_q) xq2 = Reshape(xq1, heads) xq = Transpose<perm = [0, 2, 1, 3]>(xq2)
    m1 = Unsqueeze(encoder_attention_mask, axes12) m2 = Cast<to = 1>(m1) m3 = Sub(one, m2)
    bias = Mul(m3, low)
    xt = Transpose<perm = [0, 1, 3, 2]>("{crossed}.0.encoder.key")
    z1 = MatMul(xq, xt) z2 = Mul(z1, scale) z3 = Add(z2, bias) z = Softmax(z3)
    g1 = MatMul(z, "{crossed}.0.encoder.value") g2 = Transpose<perm = [0, 2, 1, 3]>(g1)
    g3 = Reshape(g2, flat) g = MatMul(g3, x_o) h2 = Add(h1, g)
    h3 = LayerNormalization(h2, gain) h4 = MatMul(h3, d_up) h5 = Relu(h4)
    h6 = MatMul(h5, d_down) h = Add(h3, h6) logits = MatMul(h, head)
}}"""
ALONE = f"""(int64[batch_size, sequence_length] input_ids,
             int64[batch_size, total_sequence_length] attention_mask,
             int64[batch_size, sequence_length] position_ids,
             float[batch_size, 2, past_sequence_length, 16] "past_key_values.0.key",
             float[batch_size, 2, past_sequence_length, 16] "past_key_values.0.value")
    => (float[batch_size, sequence_length, {WORDS}] logits,
        float[batch_size, 2, total_sequence_length, 16] "present.0.key",
        float[batch_size, 2, total_sequence_length, 16] "present.0.value") {{
    w = Gather(words, input_ids) p = Gather(places, position_ids) x = Add(w, p)
    q1 = MatMul(x, d_q) q2 = Reshape(q1, heads) q = Transpose<perm = [0, 2, 1, 3]>(q2)
    k1 = MatMul(x, d_k) k2 = Reshape(k1, heads) k = Transpose<perm = [0, 2, 1, 3]>(k2)
    v1 = MatMul(x, d_v) v2 = Reshape(v1, heads) v = Transpose<perm = [0, 2, 1, 3]>(v2)
    "present.0.key" = Concat<axis = 2>("past_key_values.0.key", k)
    "present.0.value" = Concat<axis = 2>("past_key_values.0.value", v)
    kt = Transpose<perm = [0, 1, 3, 2]>("present.0.key")
    s1 = MatMul(q, kt) s2 = Mul(s1, scale)
    t1 = Shape(s2) t2 = Gather(t1, two) t3 = Gather(t1, three) t4 = Sub(t3, t2)
    t5 = Slice(t1, lasts, end) t6 = Expand(one, t5)
    t7 = Trilu<upper = 0>(t6, t4) t8 = Sub(one, t7) causal = Mul(t8, low)
    m1 = Unsqueeze(attention_mask, axes12) m2 = Cast<to = 1>(m1) m3 = Sub(one, m2)
    bias = Mul(m3, low) s3 = Add(s2, causal) s4 = Add(s3, bias) s = Softmax(s4)
    c1 = MatMul(s, "present.0.value") c2 = Transpose<perm = [0, 2, 1, 3]>(c1)
    c3 = Reshape(c2, flat) c = MatMul(c3, d_o) h1 = Add(x, c)
    h3 = LayerNormalization(h1, gain) h4 = MatMul(h3, d_up) h5 = Relu(h4)
    h6 = MatMul(h5, d_down) h = Add(h3, h6) logits = MatMul(h, head)
}}"""
BEGIN = {
    "inputs": f", float[batch_size, encoder_sequence_length, {WIDTH}] encoder_hidden_states",
    "outputs": "".join(
        f', float[batch_size, 2, encoder_length, 16] "present.0.{key}"' for key in CROSS
    ),
    "keys": """
    "present.0.decoder.key" = Identity(k) "present.0.decoder.value" = Identity(v)
    ck1 = MatMul(encoder_hidden_states, x_k) ck2 = Reshape(ck1, heads)
    "present.0.encoder.key" = Transpose<perm = [0, 2, 1, 3]>(ck2)
    cv1 = MatMul(encoder_hidden_states, x_v) cv2 = Reshape(cv1, heads)
    "present.0.encoder.value" = Transpose<perm = [0, 2, 1, 3]>(cv2)""",
    "crossed": "present",
}
GO_ON = {
    "inputs": "".join(
        f', float[batch_size, 2, past_{key[:7]}_length, 16] "past_key_values.0.{key}"'
        for key in (*OWN, *CROSS)
    ),
    "outputs": "",
    "keys": """
    "present.0.decoder.key" = Concat<axis = 2>("past_key_values.0.decoder.key", k)
    "present.0.decoder.value" = Concat<axis = 2>("past_key_values.0.decoder.value", v)""",
    "crossed": "past_key_values",
}


def save_folder(folder: Path, *, names: Sequence[str] = NAMES, data: str | None = None) -> None:
    """Write the graphs of these names with a config and a tokenizer.

    data  a file for the weights of all graphs, which each of them is stored in once
    """
    (folder / "onnx").mkdir(parents=True)
    config = {"model_type": "marian", "decoder_start_token_id": START}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    stored: dict[str, tuple[int, int]] = {}
    for name, model in encoder_decoder().items():
        if name in names:
            if data is not None:
                _store(model, folder / "onnx" / data, stored)
            onnx.save(model, folder / "onnx" / f"{name}.onnx")
    for path in folder.rglob("*.*"):
        os.utime(path, (1e9, 1e9))  # a batch waits for a file that was written just now


def _store(model: onnx.ModelProto, path: Path, stored: dict[str, tuple[int, int]]) -> None:
    """Move the large weights to a file, in which graphs share what has one name."""
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) < 1024:
            continue
        if tensor.name not in stored:
            with path.open("ab") as file:
                stored[tensor.name] = file.tell(), file.write(tensor.raw_data)
        offset, length = stored[tensor.name]
        set_external_data(tensor, path.name, offset, length)
        tensor.ClearField("raw_data")


def encoder_decoder(seed: int = 0) -> dict[str, onnx.ModelProto]:
    """The four graphs of a model of random weights, of which the decoders share theirs."""
    known = weights(seed)
    encoder = sketch(ENCODER, _read(ENCODER, known))
    begin = DECODER.format(words=WORDS, **BEGIN)
    go_on = DECODER.format(words=WORDS, **GO_ON)
    decoder, with_past = (sketch(text, _read(text, known)) for text in (begin, go_on))
    return dict(zip(NAMES, (encoder, decoder, with_past, merged(decoder, with_past)), strict=True))


def decoder_alone(seed: int = 0) -> onnx.ModelProto:
    """A language model in one graph, which takes a past of any length, also 0."""
    return sketch(ALONE, _read(ALONE, weights(seed)))


def merged(decoder: onnx.ModelProto, with_past: onnx.ModelProto) -> onnx.ModelProto:
    """Both decoders behind `use_cache_branch`. Weights are those of the outer graph."""
    branches = [_branch(with_past, "with_past_"), _branch(decoder, "begin_")]
    crossed = [f"present.0.{key}" for key in CROSS]
    past = [f"past_key_values.0.{key}" for key in CROSS]
    for name, source in zip(crossed, past, strict=True):  # the branch passes them on
        branches[0].node.append(helper.make_node("Identity", [source], [f"with_past_{name}"]))
        branches[0].output.append(
            helper.make_tensor_value_info(f"with_past_{name}", TensorProto.FLOAT, [None] * 4)
        )
    outputs = decoder.graph.output
    node = helper.make_node(
        "If",
        ["use_cache_branch"],
        [output.name for output in outputs],
        "optimum::if",
        then_branch=branches[0],
        else_branch=branches[1],
    )
    inputs = {value.name: value for value in (*decoder.graph.input, *with_past.graph.input)}
    cache = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    shared = {t.name: t for t in (*decoder.graph.initializer, *with_past.graph.initializer)}
    graph = helper.make_graph(
        [node], "merged", [*inputs.values(), cache], list(outputs), list(shared.values())
    )
    return helper.make_model(graph, opset_imports=decoder.opset_import, ir_version=8)


def _branch(model: onnx.ModelProto, prefix: str) -> onnx.GraphProto:
    branch = onnx.GraphProto(name=prefix)
    made = {name for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        copied = branch.node.add()
        copied.CopyFrom(node)
        copied.name = prefix + node.name
        copied.input[:] = [prefix + name if name in made else name for name in node.input]
        copied.output[:] = [prefix + name for name in node.output]
    for output in model.graph.output:
        branch.output.append(
            helper.make_tensor_value_info(prefix + output.name, TensorProto.FLOAT, None)
        )
    return branch


def weights(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {f"{kind}_{role}": (WIDTH, WIDTH) for kind in "edx" for role in "qkvo"}
    for kind in "ed":
        shapes |= {f"{kind}_up": (WIDTH, 4 * WIDTH), f"{kind}_down": (4 * WIDTH, WIDTH)}
    shapes["head"] = (WIDTH, WORDS)
    floats = {name: rng.normal(size=shape) / shape[0] ** 0.5 for name, shape in shapes.items()}
    floats["words"] = rng.normal(size=(WORDS, WIDTH))
    floats["places"] = rng.normal(size=(64, WIDTH))
    floats |= {"gain": np.ones(WIDTH), "one": 1.0, "low": -1e4, "scale": 0.25}
    integers = {
        "heads": [0, 0, HEADS, WIDTH // HEADS],
        "flat": [0, 0, WIDTH],
        "axes12": [1, 2],
        "two": 2,
        "three": 3,
        "lasts": [2],
        "end": [4],
    }
    return {
        **{name: np.asarray(value, np.float32) for name, value in floats.items()},
        **{name: np.asarray(value, np.int64) for name, value in integers.items()},
    }


def _read(text: str, known: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights that the text names."""
    words = set(text.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return {name: array for name, array in known.items() if name in words}
