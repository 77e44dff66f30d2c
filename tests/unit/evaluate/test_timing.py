"""Timing: the order of turns, the number of calls and the sums, never how long anything takes."""

import itertools
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from quant_core.errors import ModelError, RequestError
from quant_core.evaluate.timing import Timing, measure, summarize, take_turns
from quant_core.model.session import open_session


class Clock:
    """A clock that only calls move."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def call(self, name, seconds, *, more=0.0):
        """A call that takes `more` every second time."""

        def called():
            self.now += seconds + more * (self.log.count(name) % 2)
            self.log.append(name)

        return called

    def __call__(self):
        return self.now


def relu():
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()


FEED = {"x": np.ones((1, 4), np.float32)}


def test_the_models_take_turns():
    clock = Clock()

    times = take_turns([clock.call("A", 0.02), clock.call("B", 0.01)], seconds=0.3, clock=clock)

    # the warm-up is "AB" as well; then every second round begins with the other one
    text = "".join(clock.log).removeprefix("AB")
    assert text.startswith("ABBA")
    assert ("ABBA" * len(text)).startswith(text)
    assert len(times) == 10
    np.testing.assert_allclose(times, [[0.02, 0.01]] * 10)


def test_no_one_of_three_models_follows_itself_where_others_do_not():
    clock = Clock()

    take_turns([clock.call(name, 0.01) for name in "ABC"], seconds=0.9, clock=clock)

    text = "".join(clock.log)
    assert not {"AA", "BB", "CC"} & {a + b for a, b in itertools.pairwise(text)}
    assert text.count("A") == text.count("B") == text.count("C")


def test_short_calls_are_timed_in_blocks_that_the_clock_can_see():
    clock = Clock()

    take_turns([clock.call("A", 2**-13), clock.call("B", 2**-14)], seconds=0.1, clock=clock)

    assert "".join(clock.log).endswith("A" * 17 + "B" * 17)


def test_blocks_last_as_long_as_is_asked():
    clock = Clock()

    take_turns(
        [clock.call(name, 2**-6) for name in "AB"], seconds=1, clock=clock, block_seconds=0.1
    )

    assert "".join(clock.log).endswith("A" * 7 + "B" * 7)


def slow_calls(clock, seconds, more=0.05):
    return [clock.call("A", seconds), clock.call("B", seconds, more=more)]


def test_a_slow_model_gets_its_rounds_unless_that_takes_far_too_long():
    slow, brief, slower = Clock(), Clock(), Clock()

    five = take_turns(slow_calls(slow, 0.2), seconds=1.0, min_rounds=5, clock=slow)
    few = take_turns(slow_calls(brief, 0.2), seconds=0.01, clock=brief)
    one = take_turns(slow_calls(slower, 9), seconds=1.0, min_rounds=5, clock=slower)

    assert (len(five), len(few), len(one)) == (5, 5, 1)


@pytest.mark.parametrize(("more", "count"), [(0.0, 3), (0.003, 3), (0.005, 5)])
def test_three_rounds_of_slow_models_are_enough_where_they_agree(more, count):
    clock = Clock()

    rounds = take_turns(slow_calls(clock, 0.2, more), seconds=0.1, clock=clock)

    assert len(rounds) == count


def test_a_slow_model_is_warm_after_one_call():
    slow, quick = Clock(), Clock()

    rounds = len(take_turns([slow.call("A", 0.2), slow.call("B", 0.2)], seconds=0.1, clock=slow))
    take_turns([quick.call("A", 1e-3), quick.call("B", 1e-3)], seconds=0, clock=quick)

    assert "".join(slow.log) == "AB" + ("ABBA" * rounds)[: 2 * rounds]
    assert "".join(quick.log).startswith("ABAB" + "AB")


def test_of_slow_models_that_have_run_the_warm_up_is_a_round():
    slow, quick = Clock(), Clock()
    quick_calls = [quick.call("A", 1e-3), quick.call("B", 1e-3)]

    rounds = len(take_turns(slow_calls(slow, 0.2), seconds=0.1, clock=slow, are_warm=True))
    take_turns(quick_calls, seconds=0, clock=quick, are_warm=True)

    assert "".join(slow.log) == ("ABBA" * rounds)[: 2 * rounds]
    assert "".join(quick.log).startswith("ABAB" + "AB")


def test_speedup_is_the_median_of_paired_ratios():
    """A machine that slows down for a while slows both, and pairs do not see it."""
    times = np.array([[2, 1], [20, 10], [2, 1], [4, 1], [3, 3]]) / 1000

    timing = summarize(times, threads=2)

    assert timing.float_deciles_ms[::5] == (2, 3, 20)
    assert replace(timing, float_deciles_ms=(), quantized_deciles_ms=()) == Timing(
        float_ms=3.0,
        quantized_ms=1.0,
        float_p95_ms=pytest.approx(16.8),
        quantized_p95_ms=pytest.approx(8.6),
        speedup=2.0,
        speedup_lo=2.0,
        speedup_hi=2.0,
        rounds=5,
        threads=2,
    )


def test_neighbours_that_disturb_most_rounds_do_not_change_the_speedup():
    """One model is twice as fast; in two of three rounds a neighbour takes up to ten times more."""
    rng = np.random.default_rng(0)
    times = np.tile([2e-3, 1e-3], (300, 1)) * rng.uniform(1, 1.01, (300, 2))
    disturbed = rng.random((300, 2)) < 0.45
    times[disturbed] *= rng.uniform(2, 10, disturbed.sum())

    timing = summarize(times, threads=1)

    assert timing.speedup == pytest.approx(2.0, rel=0.02)
    assert timing.speedup_hi / timing.speedup_lo < 1.03


def test_two_sessions_are_measured():
    """With a clock that moves by a tick whenever it is read, a block of calls takes one tick."""
    tick = 2**-9  # seconds: more than a block lasts, so a block is one call
    readings = itertools.count()

    timing = measure(
        open_session(relu()),
        open_session(relu()),
        FEED,
        seconds=50 * tick,
        clock=lambda: next(readings) * tick,
    )

    assert timing.threads == 1
    assert timing.rounds >= 1  # how many depends on the machine
    assert 0 < timing.float_ms <= timing.float_p95_ms
    assert timing.speedup_lo <= timing.speedup <= timing.speedup_hi
    assert timing.to_dict()["rounds"] == timing.rounds


def test_sessions_that_cannot_be_compared_are_refused():
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    spinning = ort.InferenceSession(relu(), options, providers=["CPUExecutionProvider"])

    with pytest.raises(RequestError, match="1 threads, quantized 2"):
        measure(open_session(relu()), open_session(relu(), threads=2), FEED, seconds=0.1)
    with pytest.raises(RequestError, match="spin"):
        measure(open_session(relu(), threads=2), spinning, FEED, seconds=0.1)


def test_a_feed_that_does_not_fit_is_an_error_before_anything_is_timed():
    with pytest.raises(ModelError, match="does not run on"):
        measure(
            open_session(relu()),
            open_session(relu()),
            {"x": np.ones((1, 5), np.float32)},
            seconds=0.1,
        )
