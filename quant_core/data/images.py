"""Random images of several kinds, as models respond to different ones.

A detector of text finds none in noise, and then says the same of all images, whatever became of its
weights.

Source of the rectangles: Lee, Mumford and Huang 2001, Occlusion Models for Natural Images, whose
sizes and edges are distributed as those of photographs (dead leaves).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quant_core.data.random_fields import draw_field

CHANNELS = (1, 3, 4)
COARSE = 8  # patches along each side
LEAVES = 64
LINES = 12  # of writing
STROKES = 3  # of a letter

Image = NDArray[np.float64]


def image_axis(shape: tuple[int, ...]) -> int | None:
    """The axis of an image's channels, (N, C, H, W) or (N, H, W, C); None if it is no image."""
    if len(shape) != 4:
        return None
    for axis, sides in ((1, shape[2:]), (3, shape[1:3])):
        if shape[axis] in CHANNELS and min(sides) >= 2 * COARSE:
            return axis
    return None


def draw_image(shape: tuple[int, ...], axis: int, rng: np.random.Generator) -> Image:
    """An image of that shape, of about unit variance around 0, with channels on that axis."""
    n, c, h, w = shape if axis == 1 else (shape[0], shape[3], *shape[1:3])
    kind = (_patches, _dead_leaves, _writing, _clouds)[rng.integers(4)]
    image: Image = np.stack([kind(c, h, w, rng) for _ in range(n)])
    return np.moveaxis(image, 1, axis)


def _patches(c: int, h: int, w: int, rng: np.random.Generator) -> Image:
    """Noise on even patches."""
    patches = rng.standard_normal((c, COARSE, COARSE))
    for axis, size in ((1, h), (2, w)):
        patches = patches.repeat(-(-size // COARSE), axis=axis).take(range(size), axis=axis)
    return np.asarray((rng.standard_normal((c, h, w)) + patches) / np.sqrt(2))


def _dead_leaves(c: int, h: int, w: int, rng: np.random.Generator) -> Image:
    """Rectangles of all sizes over one another, the dead leaves model of photographs."""
    image = _ground(c, h, w, rng)
    for _ in range(LEAVES):
        height, width = np.exp(rng.uniform(0, np.log(min(h, w)), 2)).astype(int)
        y, x = rng.integers(1 - height, h), rng.integers(1 - width, w)
        rows, columns = slice(max(y, 0), y + height), slice(max(x, 0), x + width)
        image[:, rows, columns] = rng.standard_normal((c, 1, 1))
    return image


def _writing(c: int, h: int, w: int, rng: np.random.Generator) -> Image:
    """Lines of letters, which are a few strokes each, in one colour on a plain ground."""
    image = _ground(c, h, w, rng)
    for _ in range(LINES):
        height = int(rng.integers(COARSE, max(COARSE + 1, h // 4)))
        colour, thick = rng.standard_normal((c, 1, 1)), max(1, height // COARSE)
        top, left = int(rng.integers(0, max(1, h - height))), int(rng.integers(0, w))
        right = min(w, left + int(rng.integers(height, w + height)))
        for x in range(left, right, 2 * height // 3):
            image[:, top : top + height, x : x + 2 * height // 3] = image[:, :1, :1]
            for down, across in rng.integers(0, (height - thick, height // 2), (STROKES, 2)):
                if rng.random() < 0.5:
                    image[:, top : top + height, x + across : x + across + thick] = colour
                else:
                    image[:, top + down : top + down + thick, x : x + height // 2] = colour
    return image


def _clouds(c: int, h: int, w: int, rng: np.random.Generator) -> Image:
    """A smooth field that all channels share, and as strong a one for each channel."""
    return np.asarray((draw_field((1, h, w), rng) + draw_field((c, h, w), rng)) / np.sqrt(2))


def _ground(c: int, h: int, w: int, rng: np.random.Generator) -> Image:
    return np.tile(rng.standard_normal((c, 1, 1)), (1, h, w))
