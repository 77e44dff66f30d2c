"""Trains a small network with quantization in the loop, and exports it with the scales it learned.

    python deployments/demo/train_qat.py OUTPUT.onnx
    quantmill quantize OUTPUT.onnx -o small.onnx

It needs scikit-learn for the data, the handwritten digits of digits_cnn, and numpy and onnx for all
else; ten seconds on one core. Weights are rounded to int8 with a scale for each output, and
activations with one scale each, in every step of the training; gradients pass through the rounding
unchanged. The file has what exporters of quantization-aware training write: float weights behind
QuantizeLinear and DequantizeLinear.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", arXiv 1712.05877, section 3.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits

Array = NDArray[np.float32]

HIDDEN, CLASSES, QMAX = 48, 10, 127
EPOCHS, BATCH, RATE = 40, 32, 2e-3
SMOOTHING = 0.99  # of the largest activation seen


@dataclass(slots=True)
class Layer:
    """y = quantized(x) quantized(w) + b, w (K, N)."""

    w: Array
    b: Array
    peak: float = 0.0
    moments: list[Array] = field(default_factory=list)

    def forward(self, x: Array, *, training: bool) -> tuple[Array, Array, Array]:
        """(y, x and w as they were multiplied)."""
        if training:
            largest = float(np.abs(x).max())
            kept = SMOOTHING if self.peak else 0.0
            self.peak = kept * self.peak + (1 - kept) * largest
        x, w = rounded(x, self.x_scale), rounded(self.w, self.w_scale)
        return x @ w + self.b, x, w

    @property
    def x_scale(self) -> np.float32:
        return np.float32(self.peak / QMAX)

    @property
    def w_scale(self) -> Array:
        """(N,)"""
        return np.abs(self.w).max(0) / np.float32(QMAX)

    def step(self, gradients: tuple[Array, Array], time: int) -> None:
        """One step of Adam."""
        parameters = (self.w, self.b)
        if not self.moments:
            self.moments = [np.zeros_like(p) for p in parameters * 2]
        for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
            mean, square = self.moments[i], self.moments[i + 2]
            mean += 0.1 * (g - mean)
            square += 0.001 * (g * g - square)
            corrected = mean / (1 - 0.9**time)
            p -= RATE * corrected / (np.sqrt(square / (1 - 0.999**time)) + 1e-8)


def rounded(x: Array, scale: Array | np.float32) -> Array:
    """What QuantizeLinear and DequantizeLinear make of x."""
    return (np.clip(np.rint(x / scale), -QMAX - 1, QMAX) * scale).astype(np.float32)


def main(path: Path) -> None:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x, y = images[order].astype(np.float32), labels[order]
    judged = slice(128, 728)  # the evaluation samples of digits_cnn; those before are its others
    layers = train(x[728:], y[728:])
    logits = forward(layers, x[judged])
    export(layers, path)
    print(f"{path}: top-1 {np.mean(logits.argmax(1) == y[judged]):.4f}")


def train(x: Array, y: NDArray[np.int64]) -> list[Layer]:
    rng = np.random.default_rng(1)
    sizes = (x.shape[1], HIDDEN, CLASSES)
    layers = [
        Layer(
            (rng.normal(size=(k, n)) * np.sqrt(2 / k)).astype(np.float32), np.zeros(n, np.float32)
        )
        for k, n in itertools.pairwise(sizes)
    ]
    first, second = layers
    time = 0
    for _ in range(EPOCHS):
        for chosen in np.array_split(rng.permutation(len(x)), len(x) // BATCH):
            time += 1
            a, x_rounded, _ = first.forward(x[chosen] / 16, training=True)
            h = np.maximum(a, 0)
            logits, h_rounded, w_rounded = second.forward(h, training=True)
            exponentials = np.exp(logits - logits.max(1, keepdims=True))
            error = exponentials / exponentials.sum(1, keepdims=True)
            error[np.arange(len(chosen)), y[chosen]] -= 1
            error /= len(chosen)
            back = (error @ w_rounded.T) * (a > 0)
            second.step((h_rounded.T @ error, error.sum(0)), time)
            first.step((x_rounded.T @ back, back.sum(0)), time)
    return layers


def forward(layers: list[Layer], x: Array) -> Array:
    first, second = layers
    hidden = np.maximum(first.forward(x / 16, training=False)[0], 0)
    return second.forward(hidden, training=False)[0]


def export(layers: list[Layer], path: Path) -> None:
    """image (n, 1, 8, 8) of 0..16 -> logits (n, 10)."""
    constants: dict[str, NDArray[np.generic]] = {"top": np.array(16, np.float32)}
    nodes = [
        helper.make_node("Div", ["image", "top"], ["scaled"]),
        helper.make_node("Flatten", ["scaled"], ["x0"]),
    ]

    def pair(name: str, scale: NDArray[np.float32], **axis: int) -> str:
        constants[f"{name}_scale"] = scale
        constants[f"{name}_zero"] = np.zeros(scale.shape, np.int8)
        params = [f"{name}_scale", f"{name}_zero"]
        nodes.append(helper.make_node("QuantizeLinear", [name, *params], [f"{name}_q"], **axis))
        last = helper.make_node("DequantizeLinear", [f"{name}_q", *params], [f"{name}_dq"], **axis)
        nodes.append(last)
        return f"{name}_dq"

    for i, layer in enumerate(layers):
        constants |= {f"w{i}": layer.w, f"b{i}": layer.b}
        inputs = [pair(f"x{i}", np.array(layer.x_scale)), pair(f"w{i}", layer.w_scale, axis=1)]
        is_last = i == len(layers) - 1
        output = "logits" if is_last else f"a{i}"
        nodes.append(helper.make_node("Gemm", [*inputs, f"b{i}"], [output], f"layer{i}"))
        if not is_last:
            nodes.append(helper.make_node("Relu", [output], [f"x{i + 1}"]))
    graph = helper.make_graph(
        nodes,
        "digits_qat",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
