"""How a node computes."""

from __future__ import annotations

from enum import StrEnum


class Compute(StrEnum):
    """How a node computes.

    FLOAT    in float32
    STATIC   in int8, with activation ranges from calibration
    DYNAMIC  in int8, with activation ranges found at run time
    BLOCKS   int4 weights by int8 activations whose ranges are found block by block at run time:
             best where the input has one row
    """

    FLOAT = "float"
    STATIC = "static"
    DYNAMIC = "dynamic"
    BLOCKS = "blocks"

    @property
    def is_integer(self) -> bool:
        """Whether the node multiplies integers."""
        return self is not Compute.FLOAT
