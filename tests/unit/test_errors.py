"""What an error says that people can act on."""

from __future__ import annotations

import pytest

from quant_core.errors import nearest_hint


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
