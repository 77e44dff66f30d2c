"""Calibration and comparison on other execution providers than the CPU."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from quant_core.api import plan_model, quantize_model
from quant_core.calibrate.observe import observe
from quant_core.config import QuantConfig
from quant_core.errors import RequestError
from quant_core.judging import validate_model
from quant_core.model.providers import find_provider
from quant_core.model.session import CPU
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from tests.models import random_feed, tiny_cnn
from tests.oracle.quantizing import prepare_proto

# Providers of which PyPI has wheels, for CPUs (onnxruntime-openvino) and GPUs (onnxruntime-gpu).
OTHERS = ("openvino", "cuda")
# Products are added in another order there, and convolutions may be Winograd's: a range may move
# by this share of it.
TOLERANCE = 1e-3


@pytest.fixture
def cnn(tmp_path):
    onnx.save(tiny_cnn(), tmp_path / "cnn.onnx")
    np.savez(tmp_path / "x.npz", **random_feed(tiny_cnn(), 0))
    return tmp_path / "cnn.onnx", tmp_path / "x.npz"


@pytest.mark.parametrize("name", OTHERS)
def test_ranges_found_there_are_those_found_on_the_cpu(name):
    provider, note = find_provider(name)
    if note:
        pytest.skip(note)
    given = prepare_proto(tiny_cnn())
    here, there = (
        observe(given.original.SerializeToString(), _plan(given, used), given.feeds).tensors
        for used in ("cpu", name)
    )

    assert provider != CPU
    assert here
    for tensor, stats in here.items():
        bounds = np.array([stats.lo, stats.hi])
        found = np.array([there[tensor].lo, there[tensor].hi])
        assert np.abs(bounds - found).max() <= TOLERANCE * np.ptp(bounds)


def _plan(given, provider):
    config = QuantConfig(mode="static", provider=provider)
    return make_plan(given.model, config, TARGETS["x86"])


def test_where_a_provider_is_missing_the_cpu_runs_and_that_is_said(cnn, tmp_path, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
    find_provider.cache_clear()
    model, data = cnn

    made = quantize_model(
        model, tmp_path / "made.onnx", QuantConfig(provider="cuda"), calibration=data
    )
    checked = validate_model(model, tmp_path / "made.onnx", data, provider="cuda")

    assert "provider cuda is not in this onnxruntime: the CPU ran instead" in made.note
    assert "the CPU ran instead" in checked.fidelity.note
    find_provider.cache_clear()


def test_a_provider_that_nobody_knows_is_an_error_that_names_the_known_ones():
    with pytest.raises(RequestError, match=r"cpu.*cuda.*openvino"):
        find_provider("abacus")


def test_a_provider_that_nobody_knows_is_an_error_also_where_nothing_is_measured(cnn):
    with pytest.raises(RequestError, match="abacus"):
        plan_model(cnn[0], QuantConfig(provider="abacus"))


def test_the_cpu_is_a_provider_without_a_note():
    assert find_provider("CPU") == (CPU, "")
