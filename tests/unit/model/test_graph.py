"""Edits of a graph leave nothing behind."""

import numpy as np
import onnx_ir as ir

from quant_core.model.graph import graphs_of, initializers_of, nodes_of
from quant_core.model.unused import drop_unused
from tests.models import sketch

BRANCHES = """(float[n, 4] x, bool p) => (float[n, 4] y) {
    y = Relu(x)
    a = MatMul(x, w)
    b = MatMul(a, w)
    unread = If(p) <
        then_branch = g1 () => (float[n, 4] u) {
            u = If(p) <
                then_branch = g3 () => (float[n, 4] s) { s = Relu(b) },
                else_branch = g4 () => (float[n, 4] t) { t = Neg(a) } > },
        else_branch = g2 () => (float[n, 4] v) { v = Neg(b) } > }"""


def test_each_graph_comes_before_those_inside_it():
    model = ir.from_proto(sketch(BRANCHES, {"w": np.ones((4, 4), np.float32)}))

    main, *inside = graphs_of(model)

    assert main is model.graph
    assert [graph.name for graph in inside] == ["g1", "g3", "g4", "g2"]
    assert inside == list(model.graph.subgraphs())


def test_nodes_that_are_gone_or_of_other_domains_are_passed_over():
    model = ir.from_proto(sketch(BRANCHES, {"w": np.ones((4, 4), np.float32)}))
    walk = nodes_of(model, "Neg", "Relu")

    first = next(walk)
    gone, other = (n for n in nodes_of(model, "Neg"))
    gone.graph.remove(gone)
    other.domain = "com.example"

    assert first.op_type == "Relu"
    assert [node.outputs[0].name for node in walk] == ["s"]
    assert [value.name for value in initializers_of(model)] == ["w"]


def test_what_only_a_dropped_branch_reads_is_dropped_too():
    model = ir.from_proto(sketch(BRANCHES, {"w": np.ones((4, 4), np.float32)}))

    drop_unused(model)

    assert [node.op_type for node in model.graph] == ["Relu"]
    assert not model.graph.initializers


def test_attention_that_reads_a_past_keeps_the_present_that_its_kernel_writes():
    shapes = "float[1, 2, s, 8] q, float[1, 2, s, 8] k, float[1, 2, s, 8] v"
    text = f"""({shapes}, float[1, 2, p, 8] past) => (float[1, 2, s, 8] y) {{
        a, key, value = Attention(q, k, v, , past, past)
        b, unread, neither = Attention(a, k, v)
        y = Relu(b)
        dead, dead_key, dead_value = Attention(q, k, v, , past, past)
    }}"""
    model = ir.from_proto(sketch(text, {}, opset=23))

    drop_unused(model)

    outputs = [[value.name for value in node.outputs] for node in model.graph]
    assert outputs == [["a", "key", "value"], ["b"], ["y"]]
    assert [value.name for value in model.graph.outputs] == ["y"]
