"""How a model becomes a file: whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import onnx_ir as ir

from quant_core.errors import ModelError
from quant_core.model import graph
from quant_core.model.session import open_session


def write_model(model: ir.Model, output: Path) -> int:
    """Bytes written: the file appears whole, or not at all. Weights above 2 GB go into `<name>.data` beside it."""
    try:
        return _write(model, output)
    except OSError as error:
        raise ModelError(
            f"cannot be written: {error.strerror or error}",
            str(output),
            "Is there room on the disk?",
        ) from error


def _write(model: ir.Model, output: Path) -> int:
    with tempfile.TemporaryDirectory(prefix=".quantmill-", dir=output.parent) as folder:
        new = Path(folder, output.name)
        if graph.is_large(model):
            ir.save(model, new, external_data=f"{output.name}.data")
        else:
            ir.save(
                ir.external_data.load_to_model(model), new
            )  # whatever file its tensors came from
        # what was written loads; onnxruntime would hold a large one, folded to float, twice
        open_session(new, optimize=not graph.is_large(model, as_float=True))
        files = sorted(
            Path(folder).iterdir(), key=lambda f: f.name == output.name
        )  # the model last
        size = sum(f.stat().st_size for f in files)
        for file in files:
            with file.open("rb") as written:
                os.fsync(written.fileno())
            file.replace(output.parent / file.name)
    return size
