"""How a model becomes a file: with all of its content, or not at all."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir

from quant_core.errors import ModelError, reason_of
from quant_core.model import graph, origins
from quant_core.model.atomic import atomic_write, move_synced
from quant_core.model.files import external_tensors, is_large, load, save
from quant_core.model.session import open_session


def sign(model: ir.Model) -> None:
    """Edit in place what is about to be written: the operator sets that are used, no types that
    tensors tell anyway, no names of former nodes, and who made it.
    """
    for domain in {n.domain for n in graph.nodes_of(model) if n.domain}:
        model.graph.opset_imports.setdefault(domain, 1)
    for value in graph.initializers_of(model):
        if not (value.is_graph_input() or value.is_graph_output()):
            value.type = value.shape = None  # half as many value_info in the file
    model.metadata_props.pop(origins.METADATA, None)
    model.producer_name = "quantmill"


def write_model(model: ir.Model, output: Path) -> int:
    """Write the model to `output` and return the bytes written.

    1. The model is written into a temporary folder beside `output`. Tensors of a model above 2 GB
       go into `<name>_data`.
    2. onnxruntime loads what was written.
    3. The files move to their places, the model last, so that it never lacks its data.

    Raises: ModelError if the file cannot be written, or onnxruntime cannot load it.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".quantmill-", dir=output.parent) as folder:
            new = Path(folder, output.name)
            _save(model, new)
            # An optimized session of a large model would hold its weights twice, once as floats.
            open_session(new, optimize=not is_large(model, as_float=True), packed=False)
            return _publish(new, output.parent)
    except OSError as error:
        raise _not_written(error, output) from error


def write_copy(source: Path, output: Path) -> int:
    """Copy the model in the file `source` to `output`, and return the bytes written.

    What lies in files beside it becomes part of `output`, as in `write_model`. Raises: as that.
    """
    model = load(source)
    if any(external_tensors(model)):
        return write_model(model, output)
    try:
        with atomic_write(output) as stream:
            stream.write(source.read_bytes())
    except OSError as error:
        raise _not_written(error, output) from error
    return output.stat().st_size


def copied_bytes(source: Path) -> int:
    """The most bytes that `write_copy` writes: those that tensors share in a file, for each."""
    return source.stat().st_size + sum(tensor.nbytes for tensor in external_tensors(load(source)))


def _not_written(error: OSError, output: Path) -> ModelError:
    problem = f"cannot be written: {reason_of(error)}"
    return ModelError(problem, str(output), "Is there room on the disk?")


def _save(model: ir.Model, path: Path) -> None:
    """Write the file, and the file of its tensors if they do not fit into one message."""
    if is_large(model):
        save(model, path, external_data=f"{path.name}_data")
    else:
        save(model, path)


def _publish(new: Path, folder: Path) -> int:
    """Move `new` and the files beside it into `folder`; returns their size in bytes."""
    files = sorted(new.parent.iterdir(), key=lambda file: file == new)
    size = sum(file.stat().st_size for file in files)
    for file in files:
        move_synced(file, folder / file.name)
    return size
