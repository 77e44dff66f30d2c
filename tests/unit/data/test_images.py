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

    rng = np.random.default_rng(0)
    pixels = [draw(spec, Range((1, 3, 64, 64), 0.0, 255.0), rng) for _ in range(8)]
    whole = images(1, 64, 64, 3, dtype="uint8")

    for found in (np.concatenate(pixels), whole):
        assert (found == np.rint(found)).all()
        assert 0 <= found.min() < 100 < found.max() <= 255
    assert min(len(np.unique(image)) for image in pixels) < 64  # colours, no noise of bytes


def test_some_images_are_light_and_shade_without_edges():
    drawn = images(1, 1, 64, 64, count=16)[:, 0]

    alike = np.array([np.corrcoef(x[:, 1:].ravel(), x[:, :-1].ravel())[0, 1] for x in drawn])
    even = (np.diff(drawn, axis=2) == 0).mean((1, 2))
    assert ((alike > 0.7) & (even < 0.01)).any()


@pytest.mark.parametrize("shape", [(1, 8, 64, 64), (1, 3, 8, 64), (3, 64, 64)])
def test_what_is_no_image_is_noise(shape):
    drawn = images(*shape)

    assert (np.diff(drawn, axis=-1) != 0).all()


def test_of_other_floats_some_are_noise_and_in_some_neighbours_are_alike_around_a_mean():
    drawn = images(1, 100, 40)

    alike = [np.corrcoef(x[1:].ravel(), x[:-1].ravel())[0, 1] for x in drawn]
    assert min(alike) < 0.1
    assert max(alike) > 0.5
    assert np.abs(drawn.mean((1, 2))).max() > 0.5
