"""A float model as onnxruntime reads it: opened and measured once, when that is first needed."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from quant_core.model import files
from quant_core.model.session import open_session
from quant_core.text import digest_of


@dataclass(frozen=True, eq=False)
class OpenedModel:
    """A model that no rule changes any more."""

    model: ir.Model

    @cached_property
    def session(self) -> ort.InferenceSession:
        """Raises: ModelError if onnxruntime cannot load it."""
        return open_session(self.model)

    @cached_property
    def size_bytes(self) -> int:
        """Bytes that it takes in a file."""
        return files.size_in_file(self.model)

    def digest(self) -> str:
        """The digest of the bytes of its message."""
        with tempfile.TemporaryDirectory(prefix="quantmill-") as folder:
            content, _ = files.serialized(self.model, Path(folder))
        return digest_of(content)
