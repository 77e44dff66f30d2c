"""Which nodes read the values of an input, handed on by others or computed from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import onnx_ir as ir

# Operators whose output holds values of that input, unchanged; () stands for any input.
PASSES_ON: dict[str, tuple[int, ...]] = {
    "Cast": (0,),
    "Identity": (0,),
    "OptionalGetElement": (0,),
    "Unsqueeze": (0,),
    "Squeeze": (0,),
    "Reshape": (0,),
    "Transpose": (0,),
    "Slice": (0,),
    "Expand": (0,),
    "Flatten": (0,),
    "Split": (0,),
    "Tile": (0,),
    "Gather": (0,),
    "Clip": (0,),
    "Concat": (),
    "Where": (1, 2),
    "StringNormalizer": (0,),
    "StringSplit": (0,),
    "Tokenizer": (0,),
    "ArrayFeatureExtractor": (0,),
    "FeatureVectorizer": (),
}
NORMALIZATIONS = ("BatchNormalization", "InstanceNormalization", "LayerNormalization")


def reached(
    sources: Iterable[ir.Value], passes_on: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[ir.Node, int, ir.Value]]:
    """(node, position, value) wherever these values are read, or what nodes make of them.

    passes_on  operator -> positions of the inputs that its outputs are made of; () for any
    """
    seen = set(sources)
    waiting = list(seen)
    while waiting:
        value = waiting.pop()
        for use in value.uses():
            node, position = use.node, use.idx
            yield node, position, value
            positions = passes_on.get(node.op_type)
            if positions is not None and (not positions or position in positions):
                new = [output for output in node.outputs if output not in seen]
                seen.update(new)
                waiting += new
