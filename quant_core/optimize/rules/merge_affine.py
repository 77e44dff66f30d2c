"""Affine operators in a row become as few as can do the same."""

from __future__ import annotations

import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.applied import Applied
from quant_core.optimize.chains import chains, operators_for, write_chain
from quant_core.optimize.facts import Facts


def merge_affine(model: ir.Model, facts: Facts) -> list[Applied]:
    """Chains of affine operators become one Mul and one Add, or less, where that is fewer.

    Mul(s1) -> Add(t1) -> Mul(s2) -> Add(t2)   =>   Mul(s1 s2) -> Add(t1 s2 + t2)
    """
    applied = []
    for inside in graph.graphs_of(model):
        for chain in chains(inside, facts):
            needed = len(operators_for(chain, chain.affine, facts))
            # An output of a graph needs a node that writes it.
            if needed < len(chain.nodes) and (needed or not chain.output.is_graph_output()):
                kept = write_chain(chain, chain.affine, facts)
                gone = tuple(name for name in chain.names if name not in kept)
                applied.append(Applied("merge_affine", (*kept, chain.names[-1])[0], gone))
    return applied
