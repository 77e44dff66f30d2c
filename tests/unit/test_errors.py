"""What an error says that people can act on."""

from __future__ import annotations

import errno
import os

import pytest

from quant_core.errors import nearest_hint, reason_of


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("digit.onnx", ["digits.onnx", "bert.onnx"], "Did you mean digits.onnx?"),
        ("nope.onnx", ["m.onnx"], ""),
        ("nope.onnx", ["nope.txt"], "Did you mean nope.txt?"),
        ("input.2", ["input.1"], "Did you mean input.1?"),
        ("bitz", ["bits", "method"], "Did you mean bits?"),
    ],
)
def test_a_hint_names_what_is_near_and_an_ending_of_files_is_not(word, known, hint):
    assert nearest_hint(word, known) == hint


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOENT, os.strerror(errno.ENOENT), "/Data"), "no such file or directory"),
        (OSError("No space for /Data/A.onnx"), "no space for /Data/A.onnx"),
        (OSError(), ""),
    ],
)
def test_a_reason_begins_in_lower_case_and_keeps_the_names_in_it(error, reason):
    assert reason_of(error) == reason
