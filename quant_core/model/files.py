"""How a model is read from a file, and how many bytes it takes there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers the 4-bit types that onnx_ir gives numpy)
import onnx
import onnx_ir as ir

from quant_core.errors import ModelError, nearest_hint
from quant_core.model.external_initializers import size_with_weights
from quant_core.model.graph import (
    first_line,
    graphs_inside,
    graphs_of,
    initializers_of,
    nodes_of,
    opset,
)
from quant_core.model.locations import data_names, lies_beside
from quant_core.model.proto import (
    external_protos,
    from_proto,
    has_held_types,
    restore_types,
    to_proto,
)

OPSET_WITHOUT_NODES = 17  # of a model that has no node of ONNX's own and need not declare it
MESSAGE_BYTES = 1_900_000_000  # of tensors in one file: protobuf holds 2 GB in a message

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
BINARY = "protobuf"  # whatever the file's name: by .json, onnx would write text
FETCH = "Fetch the file itself: git lfs pull"


def load(path: str | Path) -> ir.Model:
    """The model in that file; tensors in external files stay there until they are read.

    Raises: ModelError if there is no such file, if it is not ONNX, or if external data is missing
    or outside the model's folder.
    """
    path = Path(path)
    if not path.is_file():
        raise no_file(path)
    if not _is_unicode(str(path)):  # which onnxruntime needs
        raise ModelError("has a name or a folder that is not UTF-8", str(path), "Rename it")
    if is_lfs_pointer(path):
        raise ModelError("is a pointer of Git LFS, not the model", str(path), FETCH)
    try:
        model = read(path)
        if not any(not node.domain for node in nodes_of(model)):
            model.graph.opset_imports.setdefault("", OPSET_WITHOUT_NODES)
        opset(model, str(path))
        if model.graph is None or not len(model.graph):
            raise ModelError(
                "the model has no nodes", str(path), "Was it truncated? Export or download it again"
            )
        check_external(model, path)
        return model
    except ModelError:
        raise
    except Exception as error:  # protobuf and onnx_ir raise many types for other bytes
        raise ModelError(
            f"not a readable ONNX model: {first_line(error)}",
            str(path),
            "Is it truncated, or another format?",
        ) from error


def no_file(path: Path) -> ModelError:
    """The error of a path that is a folder or a device, or where nothing is."""
    if path.is_dir():
        return ModelError("is a folder, not a file", str(path), "Name an .onnx file in it")
    if path.exists():
        return ModelError("is no ordinary file", str(path), "Name an .onnx file")
    if path.parts[0].endswith(":"):  # Path makes s3:/ of s3://
        hint = "One model is a file of this host; a batch reads from stores"
        return ModelError("no such file", str(path), hint)
    siblings = (file.name for file in path.parent.glob("*.onnx"))
    hint = nearest_hint(path.name, siblings) or "Check the path"
    return ModelError("no such file", str(path), hint)


def _is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8; names of files may hold any bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file only says which large file belongs there, as Git does without LFS.

    Source: the specification of Git LFS, version 1, "The pointer".
    """
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def read(path: Path) -> ir.Model:
    """The model in that file, unchecked; tensors in external files stay there."""
    proto = onnx.load(path, BINARY, load_external_data=False)
    folder = _follow_links(proto, path)
    model = from_proto(proto)
    ir.external_data.set_base_dir(model.graph, folder)
    return model


def _follow_links(proto: onnx.ModelProto, path: Path) -> Path:
    """The folder that locations of external data are relative to.

    The cache of a model hub has links in one folder, the model's, to real files in another. If both
    the model and all of its data are such links, the message is edited in place, so that locations
    are relative to the folder of the real model.
    """
    if not path.is_symlink():
        return path.parent
    folder, found = path.resolve().parent, []
    for tensor in external_protos(proto):
        entry = next(e for e in tensor.external_data if e.key == "location")
        file = (path.parent / entry.value).resolve()
        if not _is_inside(Path(entry.value)) or not file.is_relative_to(folder):
            return path.parent
        found.append((entry, str(file.relative_to(folder))))
    for entry, location in found:
        entry.value = location
    return folder


def _is_inside(location: Path) -> bool:
    """Whether a location, before links are followed, is below the folder it is relative to."""
    return not location.is_absolute() and ".." not in location.parts


def check_external(model: ir.Model, path: Path) -> None:
    """Check that every external file of the model is there, long enough, and in its folder.

    Raises: ModelError if one is not.
    """
    for tensor in external_tensors(model):
        location = Path(os.fspath(tensor.location))
        file = Path(tensor.base_dir) / location
        if not _is_inside(location) or not lies_beside(file, path):
            raise ModelError(
                f"tensor {tensor.name} lies outside the model's folder: {location}",
                str(path),
                "Save it beside the model",
            )
        if not file.is_file():
            raise ModelError(
                f"external data file {location} is missing", str(path), "Copy it beside the model"
            )
        if is_lfs_pointer(file):
            problem = f"external data file {location} is a pointer of Git LFS, not the data"
            raise ModelError(problem, str(path), FETCH)
        end = (tensor.offset or 0) + (tensor.length or 0)
        if end > file.stat().st_size:
            raise ModelError(
                f"external data file {location} is too short for {tensor.name}",
                str(path),
                "Copy it again",
            )


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Every tensor that lies in a file of its own: initializers, and attributes of nodes."""
    for graph in (*graphs_of(model), *_function_graphs(model)):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
        for node in graph:
            for tensor in _attribute_tensors(node):
                if isinstance(tensor, ir.ExternalTensor):
                    yield tensor


def release(*tensors: Any) -> None:
    """Free the memory of those tensors that lie in files; they are read again when needed."""
    for tensor in tensors:
        if isinstance(tensor, ir.ExternalTensor):
            with suppress(BufferError):  # an array still views the memory
                tensor.release()


def size_on_disk(path: Path, model: ir.Model) -> int:
    """Bytes of the model file and of its external data: what several tensors share counts once, and
    what other models hold does not.
    """
    parts: dict[Path, list[tuple[int, int]]] = {}
    for tensor in external_tensors(model):
        start = tensor.offset or 0
        file = Path(tensor.base_dir, tensor.location)
        parts.setdefault(file, []).append((start, start + tensor.nbytes))
    return path.stat().st_size + sum(map(_covered, parts.values()))


def _covered(parts: list[tuple[int, int]]) -> int:
    """How many bytes lie in any of these parts of a file, (start, end)."""
    covered = last = 0
    for start, end in sorted(parts):
        covered += max(0, end - max(start, last))
        last = max(last, end)
    return covered


def bytes_on_disk(path: Path) -> int:
    """As `size_on_disk`, but the model is read only if it names other files. Raises: as `load`."""
    is_alone = path.is_file() and not data_names(path)
    return path.stat().st_size if is_alone else size_on_disk(path, load(path))


def is_large(model: ir.Model, *, as_float: bool = False) -> bool:
    """Whether the tensors need nearly all of what one protobuf message can hold.

    as_float  count every element as a float32 of 4 bytes
    """
    tensors = tensors_of(model)
    size = sum(4 * tensor.size if as_float else tensor.nbytes for tensor in tensors)
    return size > MESSAGE_BYTES


def constant_bytes(model: ir.Model) -> int:
    """Bytes of all constants; none is read for that."""
    return sum(tensor.nbytes for tensor in tensors_of(model))


def size_in_file(model: ir.Model) -> int:
    """Bytes that the model takes when it is written; of a large model, only its tensors count."""
    if is_large(model):
        return constant_bytes(model)
    return size_with_weights(model)


def save(model: ir.Model, path: Path, external_data: str | None = None) -> None:
    """Write the model; with `external_data`, its tensors into a file of that name beside it."""
    if external_data is None:
        onnx.save(to_proto(ir.external_data.load_to_model(model)), path, BINARY)
        return
    ir.save(model, path, BINARY, external_data=external_data)
    if has_held_types(model):
        proto = onnx.load(path, BINARY, load_external_data=False)
        restore_types(proto, model)
        onnx.save(proto, path, BINARY)


def serialized(model: ir.Model, folder: Path) -> tuple[bytes, Path | None]:
    """The model as one protobuf message, and the folder of the tensors that are not in it.

    1. Tensors that lie in files stay there, if they are all in one folder; that folder is returned.
    2. If they are in several folders, or the tensors in memory are too large for one message, all
       tensors are written into `folder`, which is returned.
    3. Without external tensors, the folder is None.
    """
    tensors = list(tensors_of(model))
    folders = {Path(t.base_dir).absolute() for t in tensors if isinstance(t, ir.ExternalTensor)}
    in_memory = sum(t.nbytes for t in tensors if not isinstance(t, ir.ExternalTensor))
    if len(folders) > 1 or in_memory > MESSAGE_BYTES:
        path = folder / "model.onnx"
        save(model, path, external_data="tensors")
        return path.read_bytes(), folder
    return to_proto(model).SerializeToString(), next(iter(folders), None)


def tensors_of(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """The tensors of all initializers."""
    tensors = (value.const_value for value in initializers_of(model))
    return (tensor for tensor in tensors if tensor is not None)


def _function_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The graphs of the model's own functions, and every graph inside them."""
    for function in model.functions.values():
        yield function.graph
        yield from graphs_inside(function.graph)


def _attribute_tensors(node: ir.Node) -> Iterator[Any]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.TENSOR:
            yield attribute.value
        elif attribute.type == ir.AttributeType.TENSORS:
            yield from attribute.value
