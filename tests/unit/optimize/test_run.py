"""The optimizer keeps what is right, not larger and not slower, and says what it did not keep."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from quant_core.errors import ModelError
from quant_core.model import graph
from quant_core.model.normalize import normalize
from quant_core.model.session import open_session, run
from quant_core.optimize.applied import Applied, from_text, rules_of, to_text
from quant_core.optimize.rules import EXACT, TIMED
from quant_core.optimize.run import follow, optimize
from tests.models import random_feed, sketch

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3)


def scaled() -> tuple[ir.Model, dict[str, np.ndarray]]:
    """Gemm and a Mul that fits into it, and a feed."""
    text = "(float[n, 3] x) => (float[n, 4] y) { g = Gemm<transB = 1>(x, w) y = Mul(g, s) }"
    proto = sketch(text, {"w": WEIGHT, "s": np.float32(2)})
    model = ir.from_proto(proto)
    normalize(model)
    return model, random_feed(proto)


def change_gemm(model: ir.Model, weight: np.ndarray) -> list[Applied]:
    """A rule's change, once: the Gemm reads this weight instead of its own."""
    gemm = next(iter(model.graph))
    if gemm.inputs[1].name == "changed":
        return []
    gemm.replace_input_with(1, graph.initializer(model.graph, "changed", weight))
    return [Applied("change", "g", ())]


def test_what_changes_an_output_is_undone(monkeypatch):
    monkeypatch.setitem(EXACT, "change", lambda model, facts: change_gemm(model, WEIGHT + 0.1))
    model, feed = scaled()

    found = optimize(model, [feed])

    assert {change.rule for change in found.applied} == {"fold_into_producer"}
    (undone,) = found.undone
    assert (undone.rule, undone.nodes) == ("change", ("g",))
    assert "an output changes to" in undone.reason


def test_a_model_in_which_no_rule_finds_anything_is_not_even_opened(monkeypatch):
    monkeypatch.setattr("quant_core.optimize.opened.open_session", lambda model: 1 / 0)
    proto = sketch(
        "(float[n, 3] x) => (float[n, 4] y) { y = Gemm<transB = 1>(x, w) }", {"w": WEIGHT}
    )
    model = ir.from_proto(proto)
    normalize(model)

    found = optimize(model, [random_feed(proto)], speedup=lambda before, after: 2.0)

    assert (found.model, found.applied, found.undone) == (model, (), ())


def test_what_makes_the_file_larger_is_undone(monkeypatch):
    def grow(model, facts):
        if "large" in model.graph.initializers:
            return []
        large = graph.initializer(model.graph, "large", np.zeros((1, 4000), np.float32))
        total = ir.Node("", "ReduceSum", [large], [ir.AttrInt64("keepdims", 0)], name="r")
        total.outputs[0].name, gemm = "r", next(iter(model.graph))
        model.graph.insert_before(gemm, total)
        graph.set_input(gemm, 2, total.outputs[0])
        return [Applied("grow", "g", ())]

    monkeypatch.setitem(EXACT, "grow", grow)
    model, feed = scaled()

    found = optimize(model, [feed])

    assert [undone.reason for undone in found.undone] == ["the file grows"]


def test_what_does_not_run_is_undone(monkeypatch):
    wrong = np.zeros((4, 7), np.float32)
    monkeypatch.setitem(EXACT, "change", lambda model, facts: change_gemm(model, wrong))
    model, feed = scaled()

    found = optimize(model, [feed])

    assert [undone.reason[:16] for undone in found.undone] == ["it does not run:"]


def test_what_does_not_load_is_undone_though_there_is_nothing_to_run_it_on(monkeypatch):
    wrong = np.zeros((4, 7), np.float32)
    monkeypatch.setitem(EXACT, "change", lambda model, facts: change_gemm(model, wrong))
    model, _ = scaled()

    found = optimize(model)

    assert found.model is model
    assert not found.applied
    assert {undone.reason[:17] for undone in found.undone} == {"it does not load:"}


def test_outputs_that_are_sequences_are_compared():
    text = """(float[n, 3] x) => (seq(float[n, 3]) y)
              { a = Exp(x) b = Exp(x) y = SequenceConstruct(a, b) }"""
    proto = sketch(text, {})
    model = ir.from_proto(proto)
    normalize(model)

    found = optimize(model, [random_feed(proto)])

    assert [change.rule for change in found.applied] == ["common_subexpressions"]


def close_choice() -> tuple[ir.Model, dict[str, np.ndarray]]:
    """The best of four scores, two of which are alike, and the box of it; and a feed."""
    text = """(float[1, 3] x) => (float[1, 1] box) {
        g = Gemm<transB = 1>(x, w) b = Gemm<transB = 1>(x, v) s, i = TopK(g, k)
        box = GatherElements<axis = 1>(b, i) }"""
    alike = np.float32([[1, 1, 1], [1, 1, 1], [-1, -1, -1], [-1, -1, -1]])
    proto = sketch(text, {"w": alike, "v": WEIGHT, "k": np.array([1])})
    model = ir.from_proto(proto)
    normalize(model)
    return model, {"x": np.ones((1, 3), np.float32)}


@pytest.mark.parametrize(("factor", "stays"), [(1 + 1e-6, True), (1.1, False)])
def test_of_close_results_another_may_be_chosen(monkeypatch, factor, stays):
    model, feed = close_choice()
    scaled = np.float32([1, factor, 1, 1])[:, None] * graph.array(model.graph.initializers["w"])
    monkeypatch.setitem(EXACT, "change", lambda model, facts: change_gemm(model, scaled))

    found = optimize(model, [feed], rules=["change"])

    boxes = [run(open_session(m), feed)[0].item() for m in (model, found.model)]
    assert boxes == ([3, 12] if stays else [3, 3])
    assert bool(found.applied) is stays


def test_what_chooses_among_results_must_stay_the_same(monkeypatch):
    def choose_the_least(model, facts):
        (top,) = graph.nodes_of(model, "TopK")
        if not graph.attribute(top, "largest", 1):
            return []
        top.attributes["largest"] = ir.AttrInt64("largest", 0)
        return [Applied("change", "t", ())]

    monkeypatch.setitem(EXACT, "change", choose_the_least)
    model, feed = close_choice()

    found = optimize(model, [feed], rules=["change"])

    assert not found.applied


def prelus() -> ir.Model:
    text = """(float[n, 2, 4, 4] x) => (float[n, 2, 4, 4] y, float[n, 2, 4, 4] z)
              { y = PRelu(x, s) z = PRelu(x, t) }"""
    slopes = np.float32([[[0.5]], [[0.25]]])
    model = ir.from_proto(sketch(text, {"s": slopes, "t": slopes / 2}))
    normalize(model)
    return model


def test_what_is_timed_is_not_tried_without_a_clock():
    found = optimize(prelus())

    assert (found.applied, found.undone) == ((), ())


def test_of_what_is_slower_together_the_places_that_are_faster_stay():
    def speedup(before, after):
        kept = {node.name for node in after.model.graph if node.op_type == "PRelu"}
        return 1.5 if kept == {"z"} else 0.9

    found = optimize(prelus(), speedup=speedup)

    assert [change.node for change in found.applied] == ["y"]
    assert [(undone.nodes, undone.reason) for undone in found.undone] == [
        (("y", "z"), "0.90x of the speed")
    ]


def test_the_model_that_is_given_stays_as_it_is():
    model, feed = scaled()
    before = ir.to_proto(model)

    optimize(model, [feed])

    assert ir.to_proto(model) == before


def test_changes_of_another_model_cannot_be_followed():
    model, _ = scaled()

    with pytest.raises(ModelError, match="finds other nodes than the plan names"):
        follow(model, [Applied("fold_into_producer", "conv_7", ("m",))])


def test_a_rule_that_is_unknown_cannot_be_followed():
    model, _ = scaled()

    with pytest.raises(ModelError, match="no rule is called magic"):
        follow(model, [Applied("magic", "g", ())])


def test_changes_come_back_from_their_text():
    changes = (Applied("fold_into_producer", "g", ("y", "z")), Applied("wide_kernels", "c", ()))

    assert from_text(to_text(changes)) == changes
    assert to_text(()) == ""


@pytest.mark.parametrize("text", ["?", "aaaaa", to_text([Applied("r", "n", ())])[:-10]])
def test_a_text_that_is_no_list_of_changes_is_an_error(text):
    with pytest.raises(ModelError, match="cannot be read"):
        from_text(text)


def test_every_rule_has_one_name():
    assert not EXACT.keys() & TIMED.keys()


def test_a_node_was_rewritten_by_its_own_rules_and_those_of_what_it_absorbed():
    changes = [
        Applied("first", "a", ("x",)),
        Applied("second", "b", ("a",)),
        Applied("first", "b", ("y",)),
        Applied("third", "c", ("c",)),
    ]

    assert rules_of(changes) == {"b": ["first", "second"], "c": ["third"]}
