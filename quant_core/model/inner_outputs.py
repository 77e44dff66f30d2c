"""How inner tensors of a model become outputs of it, without parsing the model."""

from __future__ import annotations

from collections.abc import Sequence


def inner_outputs(outputs: Sequence[str], counting: Sequence[str]) -> bytes:
    """Bytes that add graph outputs to the serialized model they are appended to, and a node before
    each that counts the elements of a tensor, if there are tensors to count.

    Protobuf defines that joined messages merge and that repeated fields join. The fields are
    ModelProto.graph = 7, GraphProto.node = 1 and output = 12, NodeProto.input = 1, output = 2 and
    op_type = 4, ValueInfoProto.name = 1. So even a large model need not be parsed, and onnxruntime
    infers the types.
    """
    nodes = [
        _field(1, _field(1, tensor.encode()) + _field(2, name.encode()) + _field(4, b"Size"))
        for tensor, name in zip(counting, outputs, strict=False)
    ]
    infos = [_field(12, _field(1, name.encode())) for name in outputs]
    return _field(7, b"".join(nodes + infos))


def _field(number: int, content: bytes) -> bytes:
    """One length-delimited protobuf field."""
    size, length = len(content), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + content
