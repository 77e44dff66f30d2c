"""Samples that are spliced of given ones: parts that belong together come from one of them."""

from __future__ import annotations

import numpy as np

from tests.samples import opened, spec

SPECS = [spec("ids", "int64", "N", "T"), spec("mask", "int64", "N", "T"), spec("rate", "float32")]


def feed(number: int, length: int) -> dict[str, np.ndarray]:
    ids = np.full((1, length), number)
    return {"ids": ids, "mask": ids % 2, "rate": np.float32(number)}


def test_a_splice_has_the_same_part_of_all_inputs_from_another_sample():
    given = opened([feed(1, 20), feed(2, 20)], SPECS)

    spliced = given.spliced(50)

    assert all((spliced[i]["ids"] == given[i]["ids"]).all() for i in range(2))
    assert len({feed["ids"].tobytes() for feed in spliced}) > 30
    assert all((feed["mask"] == feed["ids"] % 2).all() for feed in spliced)
    assert {float(feed["rate"]) for feed in spliced} == {1.0, 2.0}


def test_samples_of_several_lengths_are_spliced_as_far_as_both_go():
    given = opened([feed(1, 5), feed(2, 20)], SPECS)

    spliced = given.spliced(50)

    assert {feed["ids"].shape for feed in spliced} == {(1, 5), (1, 20)}
    assert any(len(np.unique(feed["ids"])) == 2 for feed in spliced)


def test_the_same_splices_are_made_again_and_their_digest_is_their_own():
    given = opened([feed(1, 20), feed(2, 20)], SPECS)

    first, again = given.spliced(9), given.spliced(9)

    assert all((a["ids"] == b["ids"]).all() for a, b in zip(first, again, strict=True))
    assert first.digest() == again.digest() != given.digest()
    assert first.where(8) != given.where(1)
