"""Which execution provider of onnxruntime runs a model: the one asked for, if it works here."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import onnxruntime as ort

from quant_core.errors import ModelError
from quant_core.fields import one_of
from quant_core.model.session import CPU, open_session

# y = Relu(x), one float: importing onnx to write it would take longer than all else here.
_PROBE = (
    b'\x08\x08:5\n\x0e\n\x01x\x12\x01y"\x04Relu:\x00\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01'
    b"\x12\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


class Provider(NamedTuple):
    """An execution provider by onnxruntime's name, and a note where it is not the one asked for."""

    name: str
    note: str = ""


@cache
def find_provider(name: str) -> Provider:
    """The execution provider of that name, or the CPU where it does not work here.

    name  "cpu", "cuda", "openvino" or another one, whatever its letter case

    Raises: RequestError if onnxruntime knows no such provider.
    """
    known = {p.removesuffix("ExecutionProvider").lower(): p for p in ort.get_all_providers()}
    one_of("provider", name.lower(), tuple(sorted(known)))
    provider, why = known[name.lower()], "does not work here"
    if provider not in ort.get_available_providers():
        why = "is not in this onnxruntime"
    else:
        try:
            session = open_session(_PROBE, provider=provider)
            if provider in session.get_providers():
                return Provider(provider)
        except ModelError as error:
            why = f"does not work ({error.problem})"
    return Provider(CPU, f"provider {name} {why}: the CPU ran instead")
