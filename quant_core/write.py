"""How a model becomes a file: whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import onnx_ir as ir

from quant_core.errors import ModelError
from quant_core.prepare import is_large
from quant_core.session import open_session


def write_model(model: ir.Model, output: Path) -> int:
    """Bytes written: the file appears whole, or not at all. Weights above 2 GB go into `<name>.data` beside it."""
    large = is_large(model)
    try:
        return _write(model, output, large)
    except OSError as error:
        raise ModelError(
            f"cannot be written: {error.strerror or error}", str(output), "Is there room on the disk?"
        ) from error


def _write(model: ir.Model, output: Path, large: bool) -> int:
    with tempfile.TemporaryDirectory(prefix=".quantmill-", dir=output.parent) as folder:
        new = Path(folder, output.name)
        ir.save(model, new, external_data=f"{output.name}.data" if large else None)
        open_session(new)  # what was written loads
        files = sorted(Path(folder).iterdir(), key=lambda f: f.name == output.name)  # the model last
        size = sum(f.stat().st_size for f in files)
        for file in files:
            with file.open("rb") as written:
                os.fsync(written.fileno())
            file.replace(output.parent / file.name)
    return size
