"""Random images are of several kinds, whatever the type of their pixels and the axis of colours."""

from __future__ import annotations

import numpy as np
import pytest

from quant_core.data.input_spec import InputSpec
from quant_core.data.random_values import Range, draw
from quant_core.data.samples import open_samples
from quant_core.data.spec import SampleSpec


def images(*shape: int, dtype: str = "float32", count: int = 8) -> np.ndarray:
    """The first images of a model that takes these, one row each."""
    samples = open_samples(SampleSpec(count=count), [InputSpec("x", np.dtype(dtype), shape)])
    return np.concatenate([feed["x"] for feed in samples])


@pytest.mark.parametrize("shape", [(1, 3, 64, 96), (1, 64, 96, 3), (1, 1, 28, 28)])
def test_some_of_few_images_are_noise_and_others_have_edges_and_even_ground(shape):
    drawn = images(*shape)

    axis = 1 if shape[1] in (1, 3) else 3
    rows = np.moveaxis(drawn, axis, 1)[:, 0]
    even = (np.diff(rows, axis=2) == 0).mean((1, 2))
    assert drawn.shape == (8, *shape[1:])
    assert (even < 0.01).any()  # noise
    assert ((even > 0.5) & (even < 1)).sum() > 1


def test_bytes_are_images_too():
    spec = InputSpec("x", np.dtype("float32"), (1, 3, 64, 64))

    pixels = draw(spec, Range((1, 3, 64, 64), 0.0, 255.0), np.random.default_rng(0))
    whole = images(1, 64, 64, 3, dtype="uint8")

    for found in (pixels, whole):
        assert (found == np.rint(found)).all()
        assert 0 <= found.min() < 100 < found.max() <= 255
    assert len(np.unique(pixels)) < 64  # colours, no noise of bytes


@pytest.mark.parametrize("shape", [(1, 8, 64, 64), (1, 3, 8, 64), (3, 64, 64)])
def test_what_is_no_image_is_noise(shape):
    drawn = images(*shape)

    assert (np.diff(drawn, axis=-1) != 0).all()
