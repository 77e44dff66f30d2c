"""What converters and optimizers lose of a model: names of sizes, texts, operator sets."""

from __future__ import annotations

import onnx_ir as ir

from quant_core.model.proto import TYPE


def restore_interface(model: ir.Model, original: ir.Model) -> None:
    """Edit `model` in place: what its original says of itself, its inputs and its outputs.

    Converters and optimizers name sizes that were left open, and forget texts and operator sets.
    """
    model.doc_string, model.graph.doc_string = original.doc_string, original.graph.doc_string
    model.graph.name = original.graph.name
    model.graph.metadata_props.update(original.graph.metadata_props)
    for domain, version in original.graph.opset_imports.items():
        model.graph.opset_imports.setdefault(domain, version)
    before = (*original.graph.inputs, *original.graph.outputs)
    known = {value.name: value for value in before}
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in known:
            found = known[value.name]
            value.shape, value.doc_string = found.shape, found.doc_string
            value.metadata_props.update(found.metadata_props)
            if value.dtype == found.dtype:
                value.type = found.type  # with its denotation
            if TYPE in found.meta:
                value.meta[TYPE] = found.meta[TYPE]
