"""A minimum cut finds the cheapest of all assignments, for every price of noise."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest

from quant_core.search.minimum_cut import (
    NodeCost,
    TensorCost,
    assignment_of,
    cheapest_assignments,
)


def chain(rng: np.random.Generator, length: int) -> tuple[dict[str, NodeCost], list[TensorCost]]:
    """Nodes of random costs, each read by some of those behind it, the last by float."""
    names = [f"n{i}" for i in range(length)]
    nodes = {name: NodeCost(*map(float, rng.random(3))) for name in names}
    tensors = [TensorCost(None, tuple(names[:2]), 0.1)]
    for i, name in enumerate(names):
        readers = tuple(other for other in names[i + 1 :] if rng.random() < 0.4)
        is_last = name == names[-1]
        tensors.append(TensorCost(name, readers, float(rng.random() * 0.3), is_last))
    return nodes, tensors


@pytest.mark.parametrize("seed", range(20))
def test_no_assignment_of_all_is_cheaper(seed):
    nodes, tensors = chain(np.random.default_rng(seed), 7)
    every = [
        assignment_of(nodes, tensors, chosen)
        for count in range(len(nodes) + 1)
        for chosen in combinations(nodes, count)
    ]

    found = cheapest_assignments(nodes, tensors)

    assert found[0].ms == pytest.approx(min(a.ms for a in every))
    assert found[-1].in_float == set(nodes)
    for faster, quieter in pairwise(found):
        assert faster.in_float <= quieter.in_float
        if quieter.noise < faster.noise:
            price = (quieter.ms - faster.ms) / (faster.noise - quieter.noise)
            least = min(a.ms + price * a.noise for a in every)
            near = faster.ms + price * faster.noise - least
            assert near <= price * faster.noise * 0.3  # halving ends where noise differs by 1 dB


def test_a_noisy_node_goes_to_float_first_and_a_cheap_conversion_with_it():
    nodes = {
        "loud": NodeCost(1.0, 2.0, 1.0),
        "quiet": NodeCost(1.0, 2.0, 0.001),
        "small": NodeCost(0.1, 0.11, 0.001),
    }
    tensors = [
        TensorCost(None, ("loud",), 0.5),
        TensorCost("loud", ("small",), 0.5),
        TensorCost("small", ("quiet",), 0.1),
        TensorCost("quiet", (), 0.1, is_read_in_float=True),
    ]

    found = [sorted(a.in_float) for a in cheapest_assignments(nodes, tensors)]

    assert found == [[], ["loud", "small"], ["loud", "quiet", "small"]]
