"""Random fields as measurements are: neighbours are alike, and the mean is not 0.

Models that take noise for a spectrogram, a series or a photograph are left cold by it: what they
compute of it hardly varies, and rounding shows less than it does on real samples.

Source: Field 1987, Relations Between the Statistics of Natural Images and the Response Properties
of Cortical Cells: of an image, each octave has the same power. So it is in music and speech (Voss
and Clarke 1975, 1/f Noise in Music and Speech).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST = 8  # steps of an axis along which neighbours are alike
AXES = 2  # at most, the last ones


def draw_field(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[Any]:
    """A field of that shape with unit variance, around a mean that is normal."""
    level = rng.standard_normal(dtype=np.float32)
    axes = [axis for axis, size in enumerate(shape) if size >= LEAST][-AXES:]
    if not axes:
        return rng.standard_normal(shape, np.float32) + level
    half = axes[-1]  # of real numbers, frequencies below 0 say nothing more
    squares = np.zeros((), np.float32)
    for axis in axes:
        steps = (np.fft.rfftfreq if axis == half else np.fft.fftfreq)(shape[axis])
        along = [-1 if k == axis else 1 for k in range(len(shape))]
        squares = squares + np.square(steps, dtype=np.float32).reshape(along)
    squares[squares == 0] = np.inf  # the mean is the level alone
    amplitude = squares ** (-len(axes) / 4)
    sizes = [size // 2 + 1 if axis == half else size for axis, size in enumerate(shape)]
    spectrum = rng.standard_normal((*sizes, 2), np.float32).view(np.complex64)[..., 0] * amplitude
    field = np.fft.irfftn(spectrum, [shape[axis] for axis in axes], axes)
    return np.asarray(field / field.std() + level)
