"""What is computed for rows that nobody reads is not computed."""

from __future__ import annotations

import numpy as np
import pytest

from quant_core.model.session import open_session, run
from tests.unit.optimize.checked import optimized

RNG = np.random.default_rng(5)


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


BLOCK = """q = MatMul(x, wq) k = MatMul(x, wk) p = Reshape(q, heads) r = Reshape(k, heads)
           s = Transpose<perm = [0, 2, 1, 3]>(p) t = Transpose<perm = [0, 2, 3, 1]>(r)
           u = MatMul(s, t) a = Softmax<axis = -1>(u) v = Transpose<perm = [0, 2, 1, 3]>(r)
           m = MatMul(a, v) o = Transpose<perm = [0, 2, 1, 3]>(m) c = Reshape(o, whole)
           d = MatMul(c, wo) e = Add(x, d) n = LayerNormalization(e, g)
           f = MatMul(n, w1) h = Add(f, b) i = MatMul(h, w2) j = Add(i, n)"""
WEIGHTS = {name: random(8, 8) for name in ("wq", "wk", "wo", "w1", "w2")}
CONSTANTS = {**WEIGHTS, "g": random(8), "b": random(8), "last": np.int64(-1)}


@pytest.mark.parametrize("rows", [0, 5, -1])
def test_a_block_of_a_transformer_computes_the_one_token_that_is_read(rows):
    shapes = {"heads": np.array([0, rows, 2, 4]), "whole": np.array([0, rows, 8])}
    text = f"(float[n, 5, 8] x) => (float[n, 8] y) {{ {BLOCK} y = Gather<axis = 1>(j, last) }}"

    found, operators = optimized(text, {**CONSTANTS, **shapes})

    assert {c.node for c in found.applied} == {"q", "u", "a", "m", "d", "n", "f", "i"}
    assert operators.count("Gather") == 1
    assert operators[-1] == "Squeeze"


def test_a_slice_of_one_row_moves_and_stays_a_row():
    ends = {"start": np.array([-1]), "end": np.array([2**31]), "axis": np.array([1])}
    found, operators = optimized(
        """(float[n, s, 8] x) => (float[n, 1, 8] y)
           { d = MatMul(x, w) r = Relu(d) y = Slice(r, start, end, axis) }""",
        {"w": random(8, 8), **ends},
    )

    assert operators == ["Slice", "MatMul", "Relu"]
    assert [(c.rule, c.node) for c in found.applied] == [("unread_rows", "d")]


@pytest.mark.parametrize(("start", "end"), [(0, 1), (-1, 2**31)], ids=["the first", "the last"])
def test_a_slice_of_no_rows_at_all_gives_none(start, end):
    ends = {"start": np.array([start]), "end": np.array([end]), "axis": np.array([1])}
    found, _ = optimized(
        """(float[n, s, 8] x) => (float[n, t, 8] y)
           { d = MatMul(x, w) r = Relu(d) y = Slice(r, start, end, axis) }""",
        {"w": random(8, 8), **ends},
    )

    assert [c.rule for c in found.applied] == ["unread_rows"]
    (y,) = run(open_session(found.model), {"x": random(2, 0, 8)})
    assert y.shape == (2, 0, 8)


def test_rows_of_a_constant_operand_are_taken_once():
    found, operators = optimized(
        """(float[n, 4, 8] x) => (float[n, 8] y)
           { a = Add(x, p) d = MatMul(a, w) y = Gather<axis = 1>(d, first) }""",
        {"w": random(8, 8), "p": random(1, 4, 8), "first": np.int64(0)},
    )

    assert operators == ["Gather", "Add", "MatMul", "Squeeze"]
    shapes = [v.const_value.shape for v in found.model.graph.initializers.values()]
    assert (1, 1, 8) in shapes


@pytest.mark.parametrize(
    ("behind", "axis", "shape"),
    [
        ("t = Transpose<perm = [2, 0, 1]>(d)", 2, "8, n, 1"),
        ("t = Unsqueeze(d, one)", 2, "n, 1, 1, 8"),
        ("u = Unsqueeze(d, one) r = Relu(u) t = Squeeze(r, one)", 1, "n, 1, 8"),
        ("t = ReduceMax<axes = [-1], keepdims = 0>(d)", 1, "n, 1"),
        ("s = Softmax(d) t = ReduceMean<axes = [-1]>(s)", 1, "n, 1, 1"),
        ("t = LayerNormalization(d, g)", 1, "n, 1, 8"),
        ("c = Greater(d, g) t = Where(c, d, g)", 1, "n, 1, 8"),
    ],
)
def test_a_choice_passes_what_works_row_by_row_to_the_product(behind, axis, shape):
    found, operators = optimized(
        f"""(float[n, 4, 8] x) => (float[{shape}] y)
            {{ d = MatMul(x, w) {behind} y = Gather<axis = {axis}>(t, first) }}""",
        {"w": random(8, 8), "g": random(8), "first": np.array([0]), "one": np.array([1])},
    )

    assert operators[0] == "Gather"
    assert "d" in {change.node for change in found.applied}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("d = MatMul(x, w) y = Gather<axis = 2>(d, i)", "it chooses columns"),
        ("d = Softmax<axis = 1>(x) y = Gather<axis = 1>(d, i)", "each row depends on all"),
        ("d = MatMul(x, w) e = Relu(d) y = Gather<axis = 1>(d, i)", "an output reads all"),
        ("d = MatMul(x, w) y = Gather<axis = 1>(d, most)", "most rows are read"),
        ("e = Relu(x) y = Gather<axis = 1>(e, i)", "only numbers move"),
    ],
)
def test_a_choice_stays_where_it_is_if(text, why):
    outputs = "float[n, c, d] y, float[n, 4, 8] e" if "e = Relu(d)" in text else "float[n, c, d] y"
    constants = {"w": random(8, 8), "i": np.array([0]), "most": np.array([0, 1, 2])}
    used = {name: array for name, array in constants.items() if f", {name})" in text}

    found, _ = optimized(f"(float[n, 4, 8] x) => ({outputs}) {{ {text} }}", used)

    assert not found.applied, why
