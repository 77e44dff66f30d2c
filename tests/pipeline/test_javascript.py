"""Models where JavaScript runs them: in onnxruntime-node, and in onnxruntime-web in Chromium."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from flows.runtime.javascript import RUNTIMES, find_browser, find_package, race
from quant_core.errors import ModelError, RequestError
from quant_core.model.session import open_session, run
from tests.models import sketch

FEED = {
    "x": np.arange(6, dtype=np.float32).reshape(2, 3),
    "i": np.array([1, 0], np.int64),
    "b": np.array([True, False]),
}
TEXT = """(float[2, 3] x, int64[2] i, bool[2] b) => (float[2, 3] y, int64[2] j, bool[2] c) {
    r = Relu(x) y = Gather(r, i) j = Identity(i) c = Not(b)
}"""


@pytest.fixture(params=RUNTIMES)
def runtime(request):
    host = RUNTIMES[request.param]
    try:
        find_package(host.package)
        if host.is_browser:
            find_browser()
    except RequestError as missing:
        pytest.skip(str(missing))
    return request.param


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(sketch(TEXT), path)
    return path


@pytest.mark.slow
def test_both_models_are_timed_and_compute_there_what_they_compute_here(runtime, model):
    found = race(runtime, (model, model), FEED, seconds=0.1)

    session = open_session(model)
    names = [output.name for output in session.get_outputs()]
    here = dict(zip(names, run(session, FEED), strict=True))
    assert found.timing.rounds >= 9
    assert found.control > 0
    for there in found.outputs:
        assert {name: x.tolist() for name, x in there.items()} == {
            name: x.tolist() for name, x in here.items()
        }


@pytest.mark.slow
def test_weights_may_lie_in_a_file_of_their_own(runtime, tmp_path):
    path, weight = tmp_path / "model.onnx", np.arange(300, dtype=np.float32).reshape(3, 100)
    proto = sketch("(float[2, 3] x) => (float[2, 100] y) { y = MatMul(x, w) }", {"w": weight})
    onnx.save(proto, path, save_as_external_data=True, location="#1 w.data", size_threshold=0)

    found = race(runtime, (path, path), {"x": FEED["x"]}, seconds=0.1)

    for there in found.outputs:
        np.testing.assert_allclose(there["y"], FEED["x"] @ weight, rtol=1e-6)


@pytest.mark.slow
def test_a_model_that_does_not_run_there_is_an_error_that_says_why(runtime, model, tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")

    with pytest.raises(ModelError, match=r"broken\.onnx"):
        race(runtime, (model, broken), FEED, seconds=0.1)


def test_a_package_that_is_not_installed_is_an_error_that_says_how_to_get_it(
    model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NODE_PATH", raising=False)

    with pytest.raises(RequestError, match="npm install --ignore-scripts onnxruntime-web"):
        race("web", (model, model), FEED)
