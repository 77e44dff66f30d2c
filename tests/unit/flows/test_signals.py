"""Signals end a command in order, unless whoever started it has them ignored."""

from __future__ import annotations

import signal

import pytest

from flows.runtime.signals import SIGNALS, stopped_in_order


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_work_and_the_exit_code_names_it(number, capsys):
    with pytest.raises(SystemExit) as stopped, stopped_in_order():
        signal.raise_signal(number)

    assert (stopped.value.code, capsys.readouterr().err) == (128 + number, "stopped\n")


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    try:
        with stopped_in_order():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
