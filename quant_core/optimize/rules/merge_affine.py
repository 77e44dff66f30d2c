"""Affine operators in a row become as few as can do the same."""

from __future__ import annotations

import onnx_ir as ir

from quant_core.optimize.applied import Applied
from quant_core.optimize.chains import Chain, chains, operators_for, write_chain
from quant_core.optimize.facts import Facts


def merge_affine(model: ir.Model, facts: Facts) -> list[Applied]:
    """Chains of affine operators become one Mul and one Add, or less, where that is fewer.

    Mul(s1) -> Add(t1) -> Mul(s2) -> Add(t2)   =>   Mul(s1 s2) -> Add(t1 s2 + t2)
    """
    applied = []
    for chain in chains(model, facts):
        needed = len(operators_for(chain, chain.affine, facts))
        if needed < len(chain.nodes) and (needed or _can_go(chain)):
            kept = write_chain(chain, chain.affine, facts)
            gone = tuple(name for name in chain.names if name not in kept)
            applied.append(Applied("merge_affine", (*kept, chain.names[-1])[0], gone))
    return applied


def _can_go(chain: Chain) -> bool:
    """Whether what the chain reads can stand for what it writes: an output of a graph needs a node
    of that graph, and no other output.
    """
    if not chain.output.is_graph_output():
        return True
    writer = chain.source.producer()
    own = chain.inside
    return writer is not None and writer.graph is own and not chain.source.is_graph_output()
