"""Random values of one input: between which bounds, and how they are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from quant_core.data.images import draw_image, image_axis
from quant_core.data.input_hints import Hint
from quant_core.data.input_spec import InputSpec
from quant_core.data.open_sizes import SAMPLE_RATE
from quant_core.data.random_fields import draw_field
from quant_core.data.strategies import Strategy
from quant_core.data.units import Units
from quant_core.model.containers import DTYPES, boxed, element_type

ITEMS = 3  # of a sequence
BYTE = 255.0  # the largest value of a pixel


@dataclass(frozen=True, slots=True)
class Range:
    """How an input is drawn: from these texts, or from low to high. Without these, floats are
    noise, or a field.

    is_whole     values are whole numbers, both ends included, whatever their type
    is_positive  logarithms of the values are normal
    units        mean and deviation of what has 0 and 1 otherwise
    """

    shape: tuple[int, ...]
    low: float | None = None
    high: float = 0.0
    is_whole: bool = False
    is_audio: bool = False
    is_positive: bool = False
    choices: tuple[str, ...] = ()
    units: Units | None = None


def find_range(
    spec: InputSpec,
    shape: tuple[int, ...],
    hint: Hint,
    strategy: Strategy,
    sizes: Mapping[str, int],
    steps: int,
    side: int,
) -> Range:
    """How the input is drawn.

    shape  without open axes
    hint   what the model's nodes tell of its values
    sizes  symbol -> size, for indices into an axis of that symbol
    steps  how many steps the inputs have, which lengths are
    side   how high and wide the images among the inputs are
    """
    if spec.dtype.kind == "U":
        return Range(shape, choices=hint.choices)
    if spec.container:
        open_size = strategy.length if len(hint.item) < 4 else strategy.side
        item = tuple(size if isinstance(size, int) else open_size for size in hint.item)
        return Range(item, choices=hint.choices)
    if hint.value is not None:
        return Range(shape, hint.value, hint.value)
    if hint.is_side:
        return Range(shape, side, side, is_whole=True)
    if hint.is_mask:
        return Range(shape, strategy.masks, strategy.masks)
    if spec.dtype.kind == "f" and hint.below is None:
        if hint.top is not None:
            return Range(shape, hint.top / 2 if hint.top == 1 else 0.0, hint.top)
        units = hint.units if hint.units is not None and hint.units.fit(shape) else None
        is_positive = strategy.is_positive
        return Range(shape, is_audio=hint.is_audio, is_positive=is_positive, units=units)
    if strategy.integers is not None:
        return Range(shape, strategy.integers, strategy.integers, is_whole=True)
    if hint.is_length:
        return Range(shape, steps, steps, is_whole=True)
    return _range_of_indices(spec, shape, hint, strategy, sizes)


def _range_of_indices(
    spec: InputSpec,
    shape: tuple[int, ...],
    hint: Hint,
    strategy: Strategy,
    sizes: Mapping[str, int],
) -> Range:
    """Whole numbers from 0, or from the least of the strategy, to below what the hint says."""
    below = sizes.get(hint.below) if isinstance(hint.below, str) else hint.below
    if below is None:
        below = 256 if spec.dtype == np.uint8 else 2
    high = max(0, below - 1)
    least = strategy.least if hint.below is not None else 0
    return Range(shape, min(least, high), high, is_whole=True)


def draw(spec: InputSpec, drawn: Range, rng: np.random.Generator) -> np.ndarray:
    """Values of an input; those of an image are of its kinds (images.py), other floats are noise or
    a field (random_fields.py).
    """
    if spec.dtype.kind == "U":
        return rng.choice(np.array(drawn.choices), drawn.shape)
    if spec.container:
        return _draw_container(spec, drawn, rng)
    if 0 in drawn.shape:
        return np.zeros(drawn.shape, spec.dtype)
    axis = image_axis(drawn.shape)
    if drawn.low is not None:
        if axis is not None and (drawn.low, drawn.high) == (0, BYTE):
            pixels = BYTE / 2 + BYTE / 4 * draw_image(drawn.shape, axis, rng)
            return np.asarray(np.rint(pixels.clip(0, BYTE)), spec.dtype)
        if not drawn.is_whole:
            return rng.uniform(drawn.low, drawn.high, drawn.shape).astype(spec.dtype)
        return rng.integers(int(drawn.low), int(drawn.high) + 1, drawn.shape).astype(spec.dtype)
    values = rng.standard_normal(drawn.shape)
    if drawn.is_audio:
        return _tones(values, rng).astype(spec.dtype)
    if axis is not None:
        values = draw_image(drawn.shape, axis, rng)
    elif len(drawn.shape) > 1 and rng.integers(2):
        values = draw_field(drawn.shape, rng)
    if drawn.is_positive:
        levels = rng.standard_normal((*drawn.shape[:-1], 1)) if drawn.shape else 0.0
        values = np.exp(values + 3 * levels)  # rows differ by 50 dB, as quiet and loud spectra do
    elif drawn.units is not None:
        most = np.finfo(spec.dtype).max
        values = drawn.units.of(values).clip(-most, most)
    return values.astype(spec.dtype)


def _draw_container(spec: InputSpec, drawn: Range, rng: np.random.Generator) -> np.ndarray:
    """A sequence of a few tensors, or a map with a number for each key that the model knows."""
    dtype = np.dtype(DTYPES[element_type(spec.container)])
    sizes = [() if "map(" in spec.container else drawn.shape] * (len(drawn.choices) or ITEMS)
    values = [rng.standard_normal(size).astype(dtype) for size in sizes]
    if "map(" not in spec.container:
        return boxed(values)
    keys: list[Any] = list(drawn.choices or range(len(values)))
    if "map(int64" in spec.container:
        keys = [int(key) for key in keys]
    return boxed(dict(zip(keys, (value.item() for value in values), strict=True)))


def _tones(noise: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A few tones that come and go along the last axis, and little noise, within [-1, 1]."""
    time = rng.uniform() + np.arange(noise.shape[-1] if noise.ndim else 1) / SAMPLE_RATE
    sound = 0.001 * noise
    for frequency in rng.uniform(80, 3000, 4):
        loudness = 0.2 * np.sin(np.pi * rng.uniform(0.5, 4) * time) ** 2
        sound = sound + loudness * np.sin(2 * np.pi * frequency * time)
    return np.clip(sound, -1, 1).reshape(noise.shape)
