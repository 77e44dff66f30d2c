"""What a model is, before anything is done to it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from quant_core.model import graph


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or output: sizes are numbers, symbols or None."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model at a glance; `parameters` counts the elements of all initializers."""

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
    model = graph.load(path)
    nodes = [n for g in graph.graphs_of(model) for n in g]
    operators = Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in nodes)
    weights = [
        v.const_value
        for g in graph.graphs_of(model)
        for v in g.initializers.values()
        if v.const_value is not None
    ]
    constants = [
        a.value
        for n in nodes
        if n.op_type == "Constant"
        for a in n.attributes.values()
        if a.name == "value"
    ]
    return ModelInfo(
        name=model.graph.name or path.stem,
        num_nodes=len(nodes),
        inputs=tuple(
            _tensor(v) for v in model.graph.inputs if v.name not in model.graph.initializers
        ),
        outputs=tuple(_tensor(v) for v in model.graph.outputs),
        opset=graph.opset(model, str(path)),
        ir_version=model.ir_version,
        size_bytes=graph.size_on_disk(path, model),
        parameters=sum(int(t.size) for t in (*weights, *constants)),
        operators=dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        quantized=graph.is_quantized(model),
    )


def _tensor(value: ir.Value) -> TensorInfo:
    shape = (
        ()
        if value.shape is None
        else tuple(d if isinstance(d, int) else d.value for d in value.shape)
    )
    return TensorInfo(
        str(value.name),
        str(value.dtype.name).lower() if value.dtype is not None else "unknown",
        shape,
    )
