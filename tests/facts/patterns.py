"""The patterns of Q and DQ nodes that facts are about, and what onnxruntime makes of them."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from quant_core.model.session import optimized_graph
from tests.models import sketch

# Not arithmetic: Q and DQ at the borders, Transposes around NHWC kernels, copies of scales.
BORDERS = frozenset({"QuantizeLinear", "DequantizeLinear", "Transpose", "Identity"})

X_SCALE, W_SCALE = np.float32(0.05), np.float32(0.01)
ACTIVATIONS: dict[str, np.ndarray] = {
    "s": np.asarray(X_SCALE),
    "z": np.array(128, np.uint8),
    "z0": np.array(0, np.uint8),
    "signed_z": np.array(0, np.int8),
    "unit_scale": np.array(1 / 256, np.float32),
}


def pair(value: str, out: str, scale: str = "s", zero: str = "z") -> str:
    """QuantizeLinear and DequantizeLinear."""
    quantize = f"{out}_q = QuantizeLinear({value}, {scale}, {zero})"
    return f"{quantize} {out} = DequantizeLinear({out}_q, {scale}, {zero})\n"


def weight_of(shape: tuple[int, ...], axis: int, dtype: type = np.int8) -> dict[str, np.ndarray]:
    """Constants of a quantized operator.

    Weights w with one scale ws and one zero point wz per channel; an int32 bias b with the scale
    bs = x_scale * ws.
    """
    channels = shape[axis]
    ones = np.ones(channels, np.float32)
    return {
        "w": np.random.default_rng(0)
        .integers(0 if dtype is np.uint8 else -60, 60, shape)
        .astype(dtype),
        "ws": W_SCALE * ones,
        "wz": np.zeros(channels, dtype),
        "b": np.arange(channels, dtype=np.int32),
        "bs": X_SCALE * W_SCALE * ones,
        "bz": np.zeros(channels, np.int32),
        "float_bias": ones,
    }


def kernels(
    body: str,
    constants: Mapping[str, np.ndarray],
    x: str = "float[n,4,8,8] x",
    opset: int = 17,
    *,
    borders: bool = False,
) -> list[str]:
    """The operators that compute y from x once onnxruntime has optimized the model, in order."""
    model = sketch(
        f"({x}) => (float y) {{ {body} }}", ACTIVATIONS | dict(constants), opset, ir_version=10
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    ran = [node.op_type for node in optimized_graph(model.SerializeToString()).graph.node]
    return ran if borders else [op for op in ran if op not in BORDERS]


def int4(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.int4)


def uint4(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.uint4)
