"""The plan that calibration covers, and what it says where there are no samples."""

import pytest

from quant_core.config import QuantConfig
from quant_core.search.first_plan import UNMEASURED, first_plan
from tests.models import normalized, sketch
from tests.oracle.cases import weights


@pytest.mark.parametrize("bits", [8, 4])
def test_without_samples_a_conv_says_that_its_kernel_needs_them(bits):
    text = "(float[n,8,6,6] x) => (float[n,64,6,6] y) { a = Conv(x, u) y = Conv(a, w) }"
    model = normalized(sketch(text, weights(u=(64, 8, 1, 1), w=(64, 64, 1, 1))))

    plan = first_plan(model, QuantConfig(bits=bits), measured=False)

    assert all(node.reason.startswith(UNMEASURED) for node in plan.nodes)
