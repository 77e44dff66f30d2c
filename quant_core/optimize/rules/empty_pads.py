"""A Pad that adds nothing goes: onnxruntime keeps it, and leaves its blocked layout for it."""

from __future__ import annotations

import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.applied import Applied
from quant_core.optimize.edit import bypass, remove
from quant_core.optimize.facts import Facts


def empty_pads(model: ir.Model, facts: Facts) -> list[Applied]:
    """Readers of a Pad by zero entries read what it reads.

        Conv -> c -> Pad(0, 0, ...) -> Add   =>   Conv -> c -> Add

    1. All its sizes are constants.
    2. An output of a graph keeps the node that writes it.
    """
    applied = []
    for pad in graph.nodes_of(model, "Pad"):
        sizes, result = graph.constant(graph.input_at(pad, 1)), pad.outputs[0]
        readers = graph.consumers(result)
        if sizes is None or sizes.any() or result.is_graph_output() or not readers:
            continue
        bypass(result, graph.value(pad.inputs[0]))
        remove([pad])
        applied.append(Applied("empty_pads", str(readers[0].name), (str(pad.name),)))
    return applied
