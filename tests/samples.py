"""Inputs, arrays in files and opened samples, for tests of samples."""

from __future__ import annotations

import io
import zipfile

import numpy as np
from onnx import helper

from quant_core.data.input_spec import InputSpec
from quant_core.data.samples import open_samples
from quant_core.data.spec import SampleSpec


def spec(name, dtype, *shape):
    return InputSpec(name, np.dtype(dtype), shape)


IMAGE = [spec("image", "float32", "N", 1, 2, 2)]


TOKENS = [spec("ids", "int64", "N", "T"), spec("lengths", "int64", "N")]


def images(n, dtype=np.float32):
    return np.arange(n * 4).reshape(n, 1, 2, 2).astype(dtype)


def saved(path, array):
    np.save(path, array)
    return path


def zipped(path, method, **arrays):
    """An .npz that numpy reads but does not write: any compression, any bytes as a member."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, array in arrays.items():
            if isinstance(array, np.ndarray):
                buffer = io.BytesIO()
                np.save(buffer, array)
                array = buffer.getvalue()
            archive.writestr(f"{name}.npy", array)
    return path


def opened(source, inputs, **options):
    return open_samples(SampleSpec(source, **options), inputs)


def values(samples):
    return [{name: array.tolist() for name, array in feed.items()} for feed in samples]


def model(inputs):
    infos = [helper.make_tensor_value_info(name, dtype, shape) for name, dtype, shape in inputs]
    outputs = [
        helper.make_tensor_value_info(f"{name}_out", dtype, None) for name, dtype, _ in inputs
    ]
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name, _, _ in inputs]
    graph = helper.make_graph(nodes, "g", infos, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
