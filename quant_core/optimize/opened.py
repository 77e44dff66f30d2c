"""A float model as onnxruntime reads it: opened and measured once."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from quant_core.model import files
from quant_core.model.session import open_session


@dataclass(frozen=True, slots=True, eq=False)
class OpenedModel:
    """A model that no rule changes any more.

    session     None where there is nothing to run it on
    size_bytes  that it takes in a file
    """

    model: ir.Model
    session: ort.InferenceSession | None
    size_bytes: int

    @classmethod
    def of(cls, model: ir.Model, *, is_run: bool) -> OpenedModel:
        """Raises: ModelError if it is to be run and onnxruntime cannot load it."""
        session = open_session(model) if is_run else None
        return cls(model, session, files.size_in_file(model))

    def digest(self) -> str:
        """Of the bytes of its message."""
        with tempfile.TemporaryDirectory(prefix="quantmill-") as folder:
            content, _ = files.serialized(self.model, Path(folder))
        return hashlib.blake2b(content, digest_size=16).hexdigest()
