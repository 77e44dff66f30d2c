"""What a target's kernel times say pays, where nothing can be timed."""

from __future__ import annotations

import pytest

from quant_core.config import QuantConfig
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from quant_core.plan.types import Compute
from quant_core.search.kernel_times import without_losses
from tests.models import sketch
from tests.oracle.cases import weights
from tests.oracle.quantizing import prepare_proto


def planned(
    text: str, target: str = "web", mode: str = "auto", **shapes: tuple[int, ...]
) -> dict[str, Compute]:
    """Node with weights -> how it computes after what loses was left out."""
    given = prepare_proto(sketch(text, weights(**shapes)))
    plan = make_plan(given.model, QuantConfig(target=target, mode=mode), TARGETS[target])
    found = without_losses(given.model, plan, given.feeds[0])
    return {n.node: n.compute for n in found.nodes if n.weights}


@pytest.mark.parametrize(
    ("channels", "compute"), [(4, Compute.FLOAT), (256, Compute.STATIC)], ids=["few", "many"]
)
def test_a_conv_of_few_products_stays_in_float_on_the_web(channels, compute):
    text = f"(float[1, {channels}, 16, 16] x) => (float y) {{ y = Conv(x, w) }}"

    assert planned(text, w=(channels, channels, 1, 1)) == {"y": compute}


def test_a_conv_that_saves_less_than_its_conversions_take_pays_among_other_integers_only():
    alone = "(float[1, 64, 16, 16] x) => (float y) { t = Tanh(x) a = Conv(t, v) y = Tanh(a) }"
    among = """(float[1, 64, 16, 16] x) => (float y) {
        b = Conv<pads = [1, 1, 1, 1]>(x, w) a = Conv(b, v) y = Conv<pads = [1, 1, 1, 1]>(a, u)
    }"""
    wide, narrow = (64, 64, 3, 3), (32, 64, 1, 1)

    assert planned(alone, v=narrow) == {"a": Compute.FLOAT}
    found = planned(among, w=wide, v=narrow, u=(64, 32, 3, 3))
    assert set(found.values()) == {Compute.STATIC}


@pytest.mark.parametrize(
    ("rows", "compute"), [(1, Compute.FLOAT), (64, Compute.DYNAMIC)], ids=["one", "many"]
)
def test_a_product_of_one_row_stays_in_float_on_the_web(rows, compute):
    text = f"(float[{rows}, 256] x) => (float y) {{ t = Tanh(x) y = MatMul(t, w) }}"

    assert planned(text, mode="dynamic", w=(256, 768)) == {"y": compute}


def test_a_target_without_kernel_times_keeps_its_plan():
    text = "(float[1, 4, 16, 16] x) => (float y) { y = Conv(x, w) }"

    assert planned(text, "openvino", w=(4, 4, 1, 1)) == {"y": Compute.STATIC}
