"""A few of ONNX's own test models, with their own data; `tests.bench.backend` tries all of them."""

from __future__ import annotations

import pytest

from tests.bench.backend import INSTALLED, SOUND, WAYS, outcomes, stored_cases, with_constants

# Convs in one to three dimensions, grouped, depthwise and transposed; a table; products; sequences.
NAMES = (
    "pytorch-converted/test_Conv1d_groups",
    "pytorch-converted/test_Conv2d_depthwise_with_multiplier",
    "pytorch-converted/test_Conv3d_dilated_strided",
    "pytorch-converted/test_ConvTranspose2d",
    "pytorch-converted/test_Embedding",
    "pytorch-converted/test_Linear_no_bias",
    "simple/test_sequence_model4",
)


@pytest.mark.parametrize("name", NAMES)
def test_its_files_are_sound_in_every_way(tmp_path, name):
    (case,) = stored_cases(INSTALLED / name)
    tried = [one for one in (case, with_constants(case)) if one is not None]

    found = {(one.name, way): what for one in tried for way, what in outcomes(one, tmp_path)}

    assert {way for _, way in found} == {*WAYS}
    assert {what for what in found.values() if what not in SOUND} == set()
    has_weights = not name.startswith("simple")
    assert has_weights == ("sound" in found.values())
