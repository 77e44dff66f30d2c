"""Random fields as nature has them: neighbours are alike, and the mean is not 0.

Models that take noise for a spectrogram, a series or a photograph are left cold by it: what they
compute of it hardly varies, and rounding shows less than it does on real samples.

Source: Field 1987, Relations Between the Statistics of Natural Images and the Response Properties
of Cortical Cells: amplitudes fall as 1/f. So they do in music and speech (Voss and Clarke 1975).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEAST = 8  # steps of an axis along which neighbours are alike
AXES = 2  # at most, the last ones


def draw_field(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
    """A field of that shape with unit variance, around a mean that is normal."""
    noise = rng.standard_normal(shape)
    axes = [axis for axis, size in enumerate(shape) if size >= LEAST][-AXES:]
    level = rng.standard_normal()
    if not axes:
        return noise + level
    squares = np.zeros(())
    for axis in axes:
        steps = np.fft.fftfreq(shape[axis]).reshape(
            [-1 if k == axis else 1 for k in range(len(shape))]
        )
        squares = squares + steps**2
    amplitude = np.divide(1.0, np.sqrt(squares), out=np.zeros(squares.shape), where=squares > 0)
    field = np.fft.ifftn(np.fft.fftn(noise, axes=axes) * amplitude, axes=axes).real
    return np.asarray(field / field.std() + level)
