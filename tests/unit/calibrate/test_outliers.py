"""Large channels of what dynamic products read are treated where that makes them more exact."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from quant_core.calibrate import outliers
from quant_core.calibrate.observe import observe
from quant_core.calibrate.outliers import TREATMENT_ROWS, choose_treatments
from quant_core.config import QuantConfig
from quant_core.data.inputs import input_specs
from quant_core.data.samples import open_samples
from quant_core.data.spec import SampleSpec
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from tests.models import normalized, sketch
from tests.oracle.cases import weights

CHANNELS = 96


def treatments_of(x: np.ndarray, text: str = "y = MatMul(x, w)", bits: int = 8) -> dict:
    """How the inputs of products of x (samples, rows, CHANNELS) and w are treated."""
    text = f"(float[n,rows,{CHANNELS}] x) => (float[n,rows,32] y) {{ {text} }}"
    return treatments(sketch(text, weights(w=(CHANNELS, 32))), x, "MatMul", bits=bits)


def treatments(proto: onnx.ModelProto, x: np.ndarray, *op_types: str, bits: int = 8) -> dict:
    """How the inputs of nodes of these types are treated in the model, whose input x is."""
    source, model = proto.SerializeToString(), normalized(proto)
    plan = make_plan(model, QuantConfig(bits=bits, min_elements=0), TARGETS["x86"])
    samples = open_samples(SampleSpec({"x": x}), input_specs(source))
    products = [n for n in plan.nodes if n.op_type in op_types]
    return choose_treatments(model, products, observe(source, plan, samples).means, samples)


def inputs(samples: int, rows: int, largest: float) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((samples, rows, CHANNELS), dtype=np.float32)
    x[..., 7] *= largest
    return x


def test_a_large_channel_is_split_off_and_even_ones_are_left_alone() -> None:
    (found,) = treatments_of(inputs(4, 16, largest=100)).values()

    assert found.split == (7,)
    assert found.gain_db > 20
    assert treatments_of(inputs(4, 16, largest=1)) == {}


def test_what_noise_of_4_bit_weights_hides_is_not_treated() -> None:
    x = inputs(4, 16, largest=5)

    assert treatments_of(x, bits=8)
    assert treatments_of(x, bits=4) == {}


def test_a_weight_that_products_of_several_inputs_share_is_stored_once() -> None:
    shared = "z = Neg(x) a = MatMul(x, w) b = MatMul(z, w) y = Add(a, b)"

    assert treatments_of(inputs(4, 16, largest=100), shared) == {}


def test_of_a_long_sample_some_rows_are_multiplied_and_all_set_the_range() -> None:
    x = inputs(2, 4 * TREATMENT_ROWS, largest=1)
    x[:, 1, 7] = 1000  # a row that is not among those

    (found,) = treatments_of(x).values()

    assert found.split == (7,)


def test_weights_are_rounded_once_for_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = []
    quantize = outliers.quantize_int8
    monkeypatch.setattr(
        outliers, "quantize_int8", lambda *a, **k: rounded.append(a) or quantize(*a, **k)
    )

    treatments_of(inputs(8, 4, largest=100))

    assert len(rounded) == 6  # smoothed or not; none, few or more channels split off


def test_channels_of_pixels_are_those_of_1x1_convs() -> None:
    x = np.moveaxis(inputs(4, 16, largest=100), -1, 1)[..., None]
    text = f"(float[n,{CHANNELS},16,1] x) => (float[n,32,16,1] y) {{ y = Conv(x, w) }}"

    (found,) = treatments(sketch(text, weights(w=(32, CHANNELS, 1, 1))), x, "Conv").values()

    assert found.split == (7,)
    assert found.gain_db > 20


def test_a_tensor_whose_products_differ_in_the_axis_of_channels_is_not_treated() -> None:
    text = f"""(float[n,{CHANNELS},{CHANNELS}] x) => (float[n,r,s] y, float[n,p,q] z) {{
        y = Conv(x, w) z = MatMul(x, v)
    }}"""
    proto = sketch(text, weights(w=(32, CHANNELS, 1), v=(CHANNELS, 32)))

    assert treatments(proto, inputs(4, CHANNELS, largest=100), "Conv", "MatMul") == {}
