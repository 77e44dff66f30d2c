"""How graphs of one model store a weight once that several of them hold."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx
from onnx.external_data_helper import set_external_data, uses_external_data

from quant_core.model.session import open_session

LEAST_BYTES = 1024  # of a tensor that is worth a place in another file
ALIGNMENT = 64

Key = tuple[int, tuple[int, ...], bytes]  # type, shape, digest of the values


def share_weights(models: Sequence[Path], folder: Path, data: str) -> int:
    """Write the models into a folder, with the tensors that are equal in several of them in a file.

    data  the name of that file

    Returns the bytes of that file; 0 if no tensor is shared, or a model has external data already,
    and then nothing is written.

    Raises: ModelError if onnxruntime cannot load what was written.
    """
    protos = [onnx.load(path, load_external_data=False) for path in models]
    tensors = [list(_tensors(proto.graph)) for proto in protos]
    if any(uses_external_data(tensor) for found in tensors for tensor in found):
        return 0
    holders: dict[Key, set[int]] = {}
    for index, found in enumerate(tensors):
        for tensor in found:
            if len(tensor.raw_data) >= LEAST_BYTES:
                holders.setdefault(_key(tensor), set()).add(index)
    shared = {key for key, indices in holders.items() if len(indices) > 1}
    if not shared:
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    offsets = _write(folder / data, shared, tensors)
    for proto, found, path in zip(protos, tensors, models, strict=True):
        _refer(found, offsets, data)
        onnx.save(proto, folder / path.name)
        open_session(folder / path.name)
    return (folder / data).stat().st_size


def _write(
    path: Path, shared: set[Key], tensors: Sequence[Sequence[onnx.TensorProto]]
) -> dict[Key, int]:
    """Write each shared tensor once. Returns where it begins."""
    offsets: dict[Key, int] = {}
    with path.open("wb") as file:
        for tensor in (tensor for found in tensors for tensor in found):
            if len(tensor.raw_data) < LEAST_BYTES:
                continue
            key = _key(tensor)
            if key in shared and key not in offsets:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                offsets[key] = file.tell()
                file.write(tensor.raw_data)
        file.flush()
        os.fsync(file.fileno())
    return offsets


def _refer(tensors: Sequence[onnx.TensorProto], offsets: Mapping[Key, int], data: str) -> None:
    """Put the place in the file in the stead of the values of each shared tensor."""
    for tensor in tensors:
        if len(tensor.raw_data) >= LEAST_BYTES and (key := _key(tensor)) in offsets:
            set_external_data(tensor, data, offsets[key], len(tensor.raw_data))
            tensor.ClearField("raw_data")


def _key(tensor: onnx.TensorProto) -> Key:
    digest = hashlib.blake2b(tensor.raw_data, digest_size=16).digest()
    return tensor.data_type, tuple(tensor.dims), digest


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every initializer of the graph and of those inside it."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)
