"""What a model is, before anything is done to it: interface, opset, operators and size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from quant_core.model import files, graph


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or output. A size is a number, a symbol, or None if it is not known."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model at a glance.

    size_bytes  of the file and its external data
    parameters  elements of all initializers and Constant nodes
    operators   how many nodes there are of each type, the most frequent first
    quantized   whether a node computes in a quantizer's integers
    """

    name: str
    num_nodes: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    opset: int
    ir_version: int
    size_bytes: int
    parameters: int
    operators: dict[str, int]
    quantized: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def model_info(path: str | Path) -> ModelInfo:
    """What the model in that file is. Raises: ModelError if it cannot be read."""
    path = Path(path)
    model = files.load(path)
    nodes = [node for g in graph.graphs_of(model) for node in g]
    fed = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    return ModelInfo(
        name=model.graph.name or path.stem,
        num_nodes=len(nodes),
        inputs=tuple(_tensor(value) for value in fed),
        outputs=tuple(_tensor(value) for value in model.graph.outputs),
        opset=graph.opset(model, str(path)),
        ir_version=model.ir_version,
        size_bytes=files.size_on_disk(path, model),
        parameters=sum(int(tensor.size) for tensor in _parameters(model)),
        operators=_operators(nodes),
        quantized=graph.is_quantized(model),
    )


def _parameters(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """The tensors of all initializers and Constant nodes."""
    for g in graph.graphs_of(model):
        for value in g.initializers.values():
            if value.const_value is not None:
                yield value.const_value
        for node in g:
            if node.op_type == "Constant" and "value" in node.attributes:
                yield node.attributes["value"].as_tensor()


def _operators(nodes: list[ir.Node]) -> dict[str, int]:
    """Operator type, with its domain if that is not ONNX's -> number of nodes."""
    counts = Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in nodes)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _tensor(value: ir.Value) -> TensorInfo:
    dtype = "unknown" if value.dtype is None else str(value.dtype.name).lower()
    sizes = () if value.shape is None else value.shape
    shape = tuple(size if isinstance(size, int) else size.value for size in sizes)
    return TensorInfo(str(value.name), dtype, shape)
