"""Values of inner tensors: read in parts, they are what one run of the whole model gives."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import parser

from quant_core.model import values
from quant_core.model.containers import boxed
from quant_core.model.session import open_session, run, sizes_of
from quant_core.model.values import PartwiseRunner, numbered_values_of, parts_of, values_of
from tests.models import sketch

# `r` is read again at the end, and inside both branches.
MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
graph (float[n, 8] x) => (float[n, 8] y, float[n, 8] z) {
    r = Relu(x)
    s = Neg(r)
    total = ReduceSum<keepdims = 0>(s)
    zero = Constant<value_float = 0.0>()
    is_less = Less(total, zero)
    t = If(is_less) <
        then_branch = negative () => (float[n, 8] a) { a = Mul(r, s) },
        else_branch = other () => (float[n, 8] b) { b = Add(r, s) }
    >
    u = Tanh(t)
    y = Add(u, r)
    z = Sub(y, x)
}
"""
INNER = ["r", "s", "t", "u", "y", "z"]
FEEDS = [
    {"x": np.random.default_rng(k).standard_normal((k + 3, 8), dtype=np.float32)} for k in range(3)
]


def model() -> ir.Model:
    return ir.from_proto(parser.parse_model(MODEL))


def whole(feed):
    session = open_session(model(), outputs=[n for n in INNER if n not in "yz"], optimize=False)
    names = [output.name for output in session.get_outputs()]
    return feed | dict(zip(names, run(session, feed), strict=True))


@pytest.mark.parametrize("tensors", [INNER, ["x", *INNER], INNER[::-1], ["z"]])
def test_parts_hold_each_tensor_of_each_feed_once(monkeypatch, tensors):
    monkeypatch.setattr(values, "MAX_PART_BYTES", 2 * 4 * FEEDS[0]["x"].size)

    found = list(values_of(model(), tensors, FEEDS))

    assert len(found) == len(FEEDS) * -(-len(tensors) // 2)
    expected = [whole(feed) for feed in FEEDS]
    for name in tensors:
        of_feeds = [part[name] for part in found if name in part]
        for x, known in zip(of_feeds, expected, strict=True):
            np.testing.assert_array_equal(x, known[name])


def test_parts_are_those_of_the_feed_at_their_position(monkeypatch):
    monkeypatch.setattr(values, "MAX_PART_BYTES", 1)

    for position, part in numbered_values_of(model(), INNER, FEEDS):
        expected = whole(FEEDS[position])
        for name, x in part.items():
            np.testing.assert_array_equal(x, expected[name])


def test_small_tensors_are_one_part_and_a_large_one_is_a_part_of_its_own(monkeypatch):
    assert parts_of(model(), INNER, FEEDS[0]) == [INNER]

    monkeypatch.setattr(values, "MAX_PART_BYTES", 1)

    assert parts_of(model(), INNER, FEEDS[0]) == [[name] for name in INNER]


def test_a_model_that_declares_all_sizes_is_not_run_for_them(monkeypatch):
    text = "(float[2, 8] x) => (float[2, 8] y) { r = Relu(x) y = Neg(r) }"
    declaring = ir.from_proto(sketch(text, {}))
    declaring.graph[0].outputs[0].shape = ir.Shape([2, 8])
    monkeypatch.setattr(values, "sizes_of", None)
    monkeypatch.setattr(values, "MAX_PART_BYTES", 1)

    feed = {"x": np.zeros((2, 8), np.float32)}

    assert parts_of(declaring, ["r", "y"], feed) == [["r"], ["y"]]


def test_a_tensor_may_be_wanted_again_in_a_later_part():
    runner = PartwiseRunner(model(), [["r"], ["y", "r"]])

    first, second = runner.run(FEEDS[0])

    np.testing.assert_array_equal(first["r"], second["r"])


def test_without_tensors_or_feeds_there_is_nothing_to_read():
    assert list(values_of(model(), [], FEEDS)) == [{}] * len(FEEDS)
    assert list(values_of(model(), INNER, [])) == []


def test_sequences_that_several_parts_read_are_computed_for_each(monkeypatch):
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    graph (float[n, 8] x, seq(float[m, 8]) more) => (float[k, 8] y) {
        r = Relu(x)
        parts = SplitToSequence(r)
        zero = Constant<value_int = 0>()
        first = SequenceAt(parts, zero)
        given = SequenceAt(more, zero)
        t = Tanh(first)
        both = SequenceInsert(parts, given)
        y = ConcatFromSequence<axis = 0>(both)
    }
    """
    wanted = ["r", "first", "given", "t", "y"]
    feed = FEEDS[0] | {"more": boxed([FEEDS[1]["x"], FEEDS[0]["x"]])}
    proto = parser.parse_model(text)
    [whole] = values_of(ir.from_proto(proto), wanted, [feed])
    monkeypatch.setattr(values, "MAX_PART_BYTES", 1)

    found = list(values_of(ir.from_proto(proto), wanted, [feed]))

    assert [list(part) for part in found] == [[name] for name in wanted]
    for part in found:
        for name, value in part.items():
            np.testing.assert_array_equal(value, whole[name])


def test_sizes_are_those_of_inputs_inner_tensors_and_outputs():
    assert sizes_of(model(), ["x", "t", "z"], FEEDS[0]) == dict.fromkeys("xtz", FEEDS[0]["x"].size)
