"""Bytes of quantized weights and all that belongs to them in the file, beside the float weights'.

    python -m tests.bench.size --zoo DIR [--cases efficientnet_lite0,mnist_resnet]
                               [--target x86] [--json FILE]

The weights are those of Conv, MatMul, Gemm, recurrent operators and tables. To a quantized weight
belong all integers, scales, multipliers and zero points that replace it. The rest of the file is
listed by what it is spent on: names, nodes, shapes ...
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from quant_core.api import quantize_model
from quant_core.config import QuantConfig
from quant_core.model.prepare import prepare
from quant_core.plan.operators import RULES
from tests.bench.accuracy import feeds_of, load_zoo

WIDTHS = {
    "float": 32,
    "bfloat16": 16,
    "float16": 16,
    "int64": 64,
    "int32": 32,
    "int16": 16,
    "int8": 8,
    "uint8": 8,
    "int4": 4,
    "uint4": 4,
}
PASSING = (
    "Cast",
    "Mul",
    "Reshape",
    "Transpose",
    "DequantizeLinear",
    "Gather",
)  # between stored integers and operator


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument(
        "--cases", type=lambda s: s.split(","), default=["efficientnet_lite0", "mnist_resnet"]
    )
    parser.add_argument("--target", default="auto")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    zoo, rows = load_zoo(args.zoo), []
    for case in zoo.cases(args.zoo):
        if case.name in args.cases and case.model.exists():
            rows += [row(zoo, case, bits, args) for bits in (8, 4, 44)]
    weight_columns = "weights, float bytes | quantized | ratio"
    print(f"| case | bits | {weight_columns} | file, float | quantized | ratio | rest of it |")
    print("|---" * 9 + "|")
    for r in rows:
        weights = (
            f"{r['weights_float']} | {r['weights']} | {r['weights_float'] / r['weights']:.2f}x"
        )
        files = f"{r['file_float']} | {r['file']} | {r['file_float'] / r['file']:.2f}x"
        rest = ", ".join(f"{size} {name}" for name, size in r["rest"].items())
        print(f"| {r['case']} | {r['bits']} | {weights} | {files} | {rest} |")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def row(zoo: Any, case: Any, bits: int, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        feeds = feeds_of(zoo, case, args.samples, Path(folder))
        path = Path(folder, "quantized.onnx")
        by_name = (
            {"*": 4} if bits == 44 else {}
        )  # also what is too narrow for 4 bits to be worth its error
        config = QuantConfig(
            bits=8 if bits == 8 else 4, mode="static", target=args.target, layer_bits=by_name
        )
        result = quantize_model(case.model, path, config, calibration=feeds)
        model = onnx.load(path)
        replaced = {
            layer["node"]
            for layer in result.layers
            if layer["storage"] != "float32" and layer["weight"]
        }
        before = weights_of(ir.to_proto(prepare(case.model)), replaced)
        after = weights_of(model, replaced)
        return {
            "case": case.name,
            "bits": "4, every layer" if by_name else bits,
            "file_float": case.model.stat().st_size,
            "file": path.stat().st_size,
            "weights_float": sum(before.values()),
            "weights": sum(after.values()),
            "rest": rest_of(model, after),
        }


def weights_of(model: onnx.ModelProto, nodes: set[str]) -> dict[str, int]:
    """Constants that the weights of these nodes are made of -> bytes of their values."""
    sizes = {i.name: bytes_of(i) for i in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    found: dict[str, int] = {}
    for node in model.graph.node:
        if node.name in nodes:
            for position in RULES[node.op_type].weights:
                found |= {
                    name: sizes[name]
                    for name in constants_behind(node.input[position], makers)
                    if name in sizes
                }
    return found


def constants_behind(name: str, makers: dict[str, onnx.NodeProto]) -> Iterator[str]:
    """Names that a value is computed from by the nodes that bring weights back."""
    if name not in makers:
        yield name
    elif makers[name].op_type in PASSING:
        for source in makers[name].input:
            yield from constants_behind(source, makers)


def bytes_of(tensor: onnx.TensorProto) -> int:
    """Of its values alone."""
    kind = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
    return -(-WIDTHS[kind] * int(onnx.numpy_helper.to_array(tensor).size) // 8)


def rest_of(model: onnx.ModelProto, weights: dict[str, int]) -> dict[str, int]:
    """What else the file holds, in bytes, the largest first."""
    graph, sizes = model.graph, Counter[str]()
    for tensor in graph.initializer:
        sizes["names of constants"] += len(tensor.name)
        if tensor.name not in weights:
            sizes["biases and other constants"] += bytes_of(tensor)
        sizes["fields of constants"] += tensor.ByteSize() - len(tensor.name) - bytes_of(tensor)
    for node in graph.node:
        sizes["names in nodes"] += sum(map(len, (*node.input, *node.output, node.name)))
        sizes["nodes"] += node.ByteSize() - sum(map(len, (*node.input, *node.output, node.name)))
    sizes["shapes of values"] = sum(v.ByteSize() for v in graph.value_info)
    sizes["metadata"] = model.ByteSize() - graph.ByteSize()
    return dict(sizes.most_common())


if __name__ == "__main__":
    main()
