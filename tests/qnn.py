"""Models as Qualcomm's HTP runs them: the package onnxruntime-qnn emulates it on x86."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from quant_core.errors import RequestError

PROVIDER = "QNNExecutionProvider"
# What stands between floats of the caller and integers of the model, in onnxruntime.
BORDERS = {"QuantizeLinear", "DequantizeLinear"}


def version() -> str:
    """Raises: RequestError if onnxruntime-qnn is not installed."""
    try:
        return f"onnxruntime-qnn {metadata.version('onnxruntime-qnn')}"
    except metadata.PackageNotFoundError:
        raise RequestError("onnxruntime-qnn is not installed", hint="It is on PyPI") from None


@cache
def _device() -> Any:
    import onnxruntime_qnn

    ort.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    [device] = [found for found in ort.get_ep_devices() if found.ep_name == PROVIDER]
    return device, onnxruntime_qnn.get_qnn_htp_path()


def run_in_qnn(
    model: Path, feed: Mapping[str, np.ndarray]
) -> tuple[list[np.ndarray], Counter[str]]:
    """The outputs, and the operators that onnxruntime computes instead, borders left out.

    Open sizes become those of the feed, as the HTP takes fixed ones only.
    """
    device, backend = _device()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for tensor in ort.InferenceSession(model).get_inputs():
        for name, size in zip(tensor.shape, feed[tensor.name].shape, strict=True):
            if isinstance(name, str):
                options.add_free_dimension_override_by_name(name, size)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.add_provider_for_devices([device], {"backend_path": backend})
    session = ort.InferenceSession(model, options)
    elsewhere = Counter(
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != PROVIDER
        for node in part.get_nodes()
        if node.op_type not in BORDERS
    )
    return session.run(None, dict(feed)), elsewhere
