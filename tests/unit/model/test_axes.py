"""Open axes that an exporter called alike have sizes of their own."""

from __future__ import annotations

import pytest

from quant_core.model.axes import distinct_axes


@pytest.mark.parametrize(
    ("axes", "told"),
    [
        ((-1, 3, -1, -1), (None, 3, None, None)),
        (("?", "None", 80), (None, None, 80)),
        (("N", 3, "N", "N"), (None, 3, None, None)),
        (("N", 3, "H", "H"), ("N", 3, "H", "H")),
        (("N", "N"), ("N", "N")),
        ((2, "N", None), (2, "N", None)),
        ((), ()),
    ],
)
def test_what_says_nothing_is_left_out(axes, told):
    assert distinct_axes(axes) == told
