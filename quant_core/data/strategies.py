"""The ways to draw random samples, which are tried until a model runs on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SIDE = 224  # of an open spatial axis of an image (rank 4)
# Sides that vision models are trained with: where a table holds a row for each patch of an image,
# no other size runs. Small ones last: one patch alone can be added to any table.
SIDES = (
    *(384, 336, 256, 448, 512, 518, 240, 288, 320, 640, 768, 800, 960, 1024),
    *(192, 160, 128, 112, 96, 64, 32, 28),
)
LENGTH = 32  # of any other open axis that is not the batch
SHORT = 16  # the longest text that some models take beside an image


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to draw.

    length       of open axes that are neither the batch nor a side of an image
    is_alone     whether only the first input has open axes of that length, and all others of 1
    side         of open sides of an image
    batch        of open first axes: models that turn or cut each image take several at once
    masks        the value of every mask: 1 where that keeps a position, 0 where that does
    least        of whole numbers that index a table: 0 is often the padding
    integers     the one value of all other whole numbers; None: what the hints allow
    is_positive  whether floats that are normal otherwise are positive, as spectra are
    """

    length: int = LENGTH
    side: int = SIDE
    batch: int = 1
    masks: int = 1
    least: int = 0
    integers: int | None = None
    is_alone: bool = False
    is_positive: bool = False


# The ways before and behind those with the sizes that a model's constants hold: of other sizes,
# those of 1 may run on models that were made for more.
FIRST = (
    Strategy(),
    Strategy(masks=0),
    Strategy(is_positive=True),
    Strategy(least=1),
    Strategy(integers=1),
    Strategy(integers=0),
    *(Strategy(side=side) for side in SIDES),
)
LAST = (
    Strategy(length=128, side=256),
    Strategy(length=64, side=64),
    Strategy(length=512, side=640),
    Strategy(length=16, side=32),
    Strategy(length=1, side=128),
    Strategy(length=16000, side=320),
    Strategy(length=512, side=512, masks=0),
    Strategy(is_alone=True),
    Strategy(length=512, is_alone=True),
    Strategy(length=8, side=16, integers=0),
    *(Strategy(length=SHORT, side=side) for side in SIDES),
)


def strategies(sizes: Sequence[int]) -> Iterator[Strategy]:
    """All ways, of which some draw lengths, sides and batches of these sizes."""
    yield from FIRST
    yield from (Strategy(length=size) for size in sizes)
    yield from LAST
    yield from (Strategy(side=size) for size in sizes)
    yield from (Strategy(batch=size) for size in sorted(sizes))  # few take less time
