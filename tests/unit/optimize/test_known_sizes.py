"""What sizes decide is decided once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from quant_core.model import graph
from quant_core.model.normalize import normalize
from quant_core.model.session import open_session, run
from quant_core.optimize.run import optimize
from tests.models import sketch
from tests.unit.optimize.checked import optimized

NUMBERS = {"zero": np.int64(0), "one": np.int64(1), "two": np.int64(2), "axis": np.array([0]),
           "minus": np.array([-1]), "step": np.int64(1)}  # fmt: skip


def test_a_known_size_among_open_ones_is_a_constant():
    found, operators = optimized(
        """(float[n, 6, t] x) => (float[n, 6, t] y)
           { s = Shape(x) c = Gather(s, one) p = Range(zero, c, step)
             f = Cast<to = 1>(p) k = Unsqueeze(f, minus) y = Add(x, k) }""",
        NUMBERS,
    )

    assert operators == ["Unsqueeze", "Add"]
    assert any(change.rule == "known_sizes" for change in found.applied)


def test_a_known_size_that_meets_an_open_one_stays_a_scalar():
    found, operators = optimized(
        """(float[n, 6, t] x) => (float y)
           { s = Shape(x) c = Gather(s, one) d = Div(c, two) n = Gather(s, zero) m = Mul(n, d)
             u = Unsqueeze(m, axis) r = Concat<axis = 0>(u, pair, minus) y = Reshape(x, r) }""",
        {**NUMBERS, "pair": np.array([2])},
    )

    assert "Div" not in operators
    assert not found.undone


def test_a_shape_of_known_and_open_sizes_stays_computed():
    _, operators = optimized(
        """(float[n, 6, t] x) => (int64[3] y) { s = Shape(x) y = Mul(s, two) }""", NUMBERS
    )

    assert operators == ["Shape", "Mul"]


SIZES = {**NUMBERS, "row": np.array([1, -1]), "four": np.array([4]), "second": np.array([1])}


@pytest.mark.parametrize(
    "arithmetic",
    [
        "r = Shape<start = 1>(x) k = ReduceProd<keepdims = 0>(r)",
        "s = Shape(x) r = Slice(s, second, four) g = Gather(r, zero) k = Neg(g)",
        "s = Shape(x) r = Slice(s, second, four, axis, second) k = Gather(r, minus)",
        "s = Shape(x) r = Slice(s, second, four) m = Reshape(r, row) i = Cast<to = 6>(m)"
        " k = Gather<axis = 1>(i, axis)",
        "s = Shape(x) g = Gather(s, one) u = Unsqueeze(g, axis) d = Concat<axis = 0>(u, u)"
        " e = Gather(d, axis) k = Squeeze(e)",
        "s = Shape(x) g = Gather(s, one) h = Gather(s, two) q = Greater(g, h) k = Where(q, g, h)",
        "s = Shape(x) g = Gather(s, one) h = Gather(s, two) l = Min(g, h) m = Max(g, l, two)"
        " a = LessOrEqual(l, m) b = GreaterOrEqual(l, g) c = Not(b) d = And(a, c) e = Or(d, b)"
        " f = Less(h, g) i = Cast<to = 7>(f) o = Where(e, m, h) v = Sub(o, i) k = Add(v, g)",
        "s = Shape(x) k = Size(s)",
    ],
)
def test_arithmetic_with_known_sizes_is_done_once(arithmetic):
    _, operators = optimized(
        f"""(float[n, 6, 4] x) => (float[n, 6, 4] y)
            {{ {arithmetic} t = Cast<to = 1>(k) y = Add(x, t) }}""",
        SIZES,
    )

    assert operators == ["Add"]


@pytest.mark.parametrize(("number", "stays"), [("nought", False), ("two", True)])
def test_whole_numbers_times_zero_are_zero(number, stays):
    numbers = {"nought": np.int64(0)} if number == "nought" else {"two": NUMBERS["two"]}

    _, operators = optimized(
        f"""(float[n, 3] x, int64 rate) => (float[n, 3] y)
            {{ m = Mul(rate, {number}) f = Cast<to = 1>(m) y = Add(x, f) }}""",
        numbers,
    )

    assert ("Mul" in operators) == stays
    assert ("Cast" in operators) == stays


def test_a_zero_that_keeps_an_input_goes_with_the_add_of_it():
    _, operators = optimized(
        """(float[n, 3] x, int64 rate) => (float[n, 3] y)
            { r = Relu(x) m = Mul(rate, nought) f = Cast<to = 1>(m) y = Add(r, f) }""",
        {"nought": np.int64(0)},
    )

    assert operators == ["Relu"]


BRANCHES = """(float[n, 1, 4] x) => (float[n, d] y, float[n, 1, 4] z) {
    s = Shape(x) c = Gather(s, %s) q = Equal(c, one)
    y = If (q) <then_branch = one_row () => (float[n, d] a) { b = Squeeze(x, first) a = Relu(b) },
                else_branch = rows () => (float[n, d] a) { b = ReduceSum<keepdims = 0>(x, first)
                                                           a = Relu(b) }>
    z = Neg(x) }"""


def test_an_if_that_a_size_decides_is_its_branch():
    found, operators = optimized(BRANCHES % "one", {**NUMBERS, "first": np.array([1])})

    assert operators == ["Squeeze", "Relu", "Neg"]
    changes = [(change.rule, change.node) for change in found.applied]
    assert changes == [("known_sizes", "q"), ("known_sizes", "y")]


def test_an_if_that_an_open_size_decides_stays():
    _, operators = optimized(BRANCHES % "zero", {**NUMBERS, "first": np.array([1])})

    assert "If" in operators


NESTED = """(float[n, 1, 4] x) => (float[n, d] y) {
    s = Shape(x) c = Gather(s, one) q = Equal(c, one)
    y = If (q) <
        then_branch = outer () => (float[n, d] a) {
            t = Shape(x) e = Gather(t, two) r = Equal(e, one) w = Abs(x)
            a = If (r) <then_branch = wrong () => (float[n, d] b) { g = Gather(t, eight)
                                                                    h = Unsqueeze(g, axis)
                                                                    b = Squeeze(w, h) },
                        else_branch = right () => (float[n, d] b) { k = Mul(w, factor)
                                                                    b = Squeeze(k, first) }> },
        else_branch = unused () => (float[n, d] a) { w = Abs(x)
                                                     a = ReduceSum<keepdims = 0>(w, first) }> }"""


def test_branches_within_branches_go_with_their_constants_and_keep_unique_names():
    constants = {"first": np.array([1]), "eight": np.int64(8), "factor": np.full(1, 3.0, "f")}

    found, operators = optimized(NESTED, {**NUMBERS, **constants})

    assert operators == ["Abs", "Mul", "Squeeze"]
    assert len(list(graph.graphs_of(found.model))) == 1


@pytest.mark.parametrize(("a", "b"), [(7, 2), (-7, 2), (7, -2), (0, 3)])
def test_whole_numbers_are_divided_as_onnxruntime_divides_them(a, b):
    text = "(float[7] x) => (int64[1] y) { s = Shape(x) m = Mul(s, a) d = Div(m, b) y = Add(d, v) }"
    proto = sketch(text, {"a": np.array([a]), "b": np.array([b]), "v": np.array([1])})
    model = ir.from_proto(proto)
    normalize(model)
    feed = {"x": np.zeros(7, "f")}

    made = optimize(model).model

    (wanted,), (got,) = (run(open_session(m), feed) for m in (model, made))
    assert wanted.tolist() == got.tolist()
    assert [node.op_type for node in made.graph] == ["Add"]
