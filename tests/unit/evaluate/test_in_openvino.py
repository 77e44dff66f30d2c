"""Whatever becomes of the process in which OpenVINO runs, its caller goes on."""

from __future__ import annotations

import numpy as np
import pytest

from quant_core.errors import DataError, ModelError
from quant_core.evaluate.in_openvino import profile_in_openvino, run_in_openvino

# Doubles what it reads. The text of a "model" says what goes wrong, and when.
STAND_IN = """
import os, signal
from datetime import timedelta
from types import SimpleNamespace
save_model = lambda model, path, compress_to_fp16: open(path, "w").write(model)
FIRST_US, COLD_US = 10_000, 105
last = None
class Kernel:
    def get_friendly_name(self): return "k"
    def get_rt_info(self): return {}
class Compiled:
    outputs = ["y"]
    def __init__(self, text): self.text = text
    def __call__(self, feed):
        if "crash" in self.text: os.kill(os.getpid(), signal.SIGSEGV)
        return {"y": 2 * feed["a/x"]}
    def create_infer_request(self): return Request(self)
    def get_runtime_model(self): return SimpleNamespace(get_ordered_ops=lambda: [Kernel()])
class Request:
    def __init__(self, model): self.model, self.feed, self.runs = model, None, []
    def infer(self, feed=None):
        self.feed = feed or self.feed
        paused = "paused" in self.model.text and self.model.text.count("+") < 2
        global last
        us = 500 if paused else COLD_US if "cold" in self.model.text and last is not self else 5
        last = self
        self.runs.append(us if self.runs else FIRST_US)
        return self.model(self.feed)
    def get_profiling_info(self):
        us = timedelta(microseconds=sum(self.runs) // len(self.runs))
        return [SimpleNamespace(node_name="k", real_time=us)]
class Core:
    def read_model(self, path):
        text = open(path).read()
        if "paused" in text: open(path, "a").write("+")  # once for each process
        if "unknown" in text: raise RuntimeError("Check failed\\n\\nno such operator\\n")
        return text
    def compile_model(self, text, device, options): return Compiled(text)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package `openvino` in a folder with models of text; returns what writes such a model."""
    (tmp_path / "openvino.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)

    def model(text):
        path = tmp_path / f"{text}.onnx"
        path.write_text(text)
        return path

    return model


def test_every_model_runs_on_every_feed_and_all_are_timed(stand_in, tmp_path):
    feeds = [{"a/x": np.arange(n, dtype=np.float32)} for n in (3, 5)]
    output = tmp_path / "made.xml"

    found = run_in_openvino(
        [stand_in("one"), output], feeds, seconds=0.01, export=(stand_in("two"), output)
    )

    for outputs in found.outputs:
        assert [y.tolist() for (y,) in outputs] == [(2 * feed["a/x"]).tolist() for feed in feeds]
    assert found.times.shape[1] == 2
    assert output.read_text() == "two"


def test_what_a_first_run_takes_is_no_time_of_a_kernel(stand_in):
    """OpenVINO reports the mean of all runs, in whole microseconds: 1 too little at most."""
    found = run_in_openvino([stand_in("one")], [{"a/x": np.zeros(1)}], profiles=True)

    [[kernel]] = found.kernels
    assert kernel.ms == pytest.approx(0.005, abs=0.0015)


def test_a_pause_of_most_processes_is_no_time_of_a_kernel(stand_in):
    [[kernel]] = profile_in_openvino([stand_in("paused")], {"a/x": np.zeros(1)})

    assert kernel.ms == pytest.approx(0.005, abs=0.0015)


def test_what_a_run_after_one_of_another_model_takes_more_hardly_counts(stand_in):
    """Ten runs follow each other, the first of which finds cold caches: 105 and 9 times 5."""
    models = [stand_in("cold"), stand_in("cold too")]

    for [kernel] in profile_in_openvino(models, {"a/x": np.zeros(1)}):
        assert kernel.ms == pytest.approx(0.015, abs=0.0015)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("crash", "OpenVINO cannot run it: it crashed with SIGSEGV"),
        ("unknown", "OpenVINO cannot read it: no such operator"),
    ],
)
def test_a_model_that_does_not_run_or_ends_its_process_is_named(stand_in, text, problem):
    path = stand_in(text)

    with pytest.raises(ModelError) as raised:
        run_in_openvino([stand_in("one"), path], [{"a/x": np.zeros(1)}])

    assert (raised.value.problem, raised.value.where) == (problem, str(path))


def test_without_the_package_it_does_not_start(stand_in):
    path = stand_in("one")
    path.with_name("openvino.py").write_text("raise ImportError('none')")

    with pytest.raises(ModelError, match="does not start: it ended with exit code 1"):
        run_in_openvino([path], [{"a/x": np.zeros(1)}])


def test_texts_are_refused_before_anything_starts(stand_in):
    with pytest.raises(DataError, match="no texts"):
        run_in_openvino([stand_in("one")], [{"a/x": np.array(["a"], object)}])
