"""What kernels of onnxruntime-web take, on shapes that no model of ours has: `Target.kernels`.

    python -m tests.bench.kernels [--seconds 1] [--threads 1]

Times chains of equal Convs and MatMuls, in float and in integers, with and without a float operator
between them, and fits the constants of `KernelTimes` to all times, each by its relative error: the
last lines are what stands in quant_core/plan/targets.py. Beside each time stands what they say.
CPU time in node.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from flows.runtime.javascript import race
from quant_core.plan.targets import KernelTimes
from quant_core.plan.types import Compute
from tests.models import random_feed, sketch
from tests.oracle.cases import weights
from tests.oracle.quantizing import make, prepare_proto

LAYERS = 6
# (channels, pixels along each axis, taps along each axis)
CONVS = (
    (8, 64, 1), (24, 40, 1), (48, 20, 1), (96, 20, 1), (192, 10, 1), (320, 5, 1),
    (8, 40, 3), (24, 24, 3), (48, 12, 3), (80, 9, 3), (12, 20, 5),
)  # fmt: skip
# (rows, columns)
PRODUCTS = ((4, 192), (12, 96), (24, 320), (40, 160), (160, 80), (320, 48))
ONE_ROW = (96, 192, 320, 640)


@dataclasses.dataclass(frozen=True, slots=True)
class Chain:
    """Equal layers, one behind the other.

    between     whether a float operator stands behind each
    multiplied  multiply-adds of a layer
    elements    of what a layer reads, and of what it writes
    """

    text: str
    shape: tuple[int, ...]
    mode: str
    between: bool
    multiplied: int
    elements: int

    def counts(self, *, integers: bool) -> dict[str, float]:
        """How often each term of its time counts."""
        borders = LAYERS if self.between or self.mode == "dynamic" else 1
        per_border = 1 if self.mode == "dynamic" else 2  # a dynamic product leaves floats itself
        return {
            "product": LAYERS * self.multiplied,
            "unfolded": LAYERS * self.multiplied / self.shape[0],
            "output": LAYERS * self.elements,
            "conversion": borders * per_border * self.elements if integers else 0,
            "between": LAYERS * self.elements if self.between else 0,
            "call": 1,
        }


def convs(channels: int, pixels: int, taps: int, *, between: bool) -> Chain:
    pads = [taps // 2] * 4
    layer = f"Conv<kernel_shape = [{taps}, {taps}], pads = {pads}>"
    image = f"1, {channels}, {pixels}, {pixels}"
    elements = channels * pixels**2
    return Chain(
        _chained(layer, image, between=between),
        (channels, channels, taps, taps),
        "static",
        between,
        elements * channels * taps**2,
        elements,
    )


def products(rows: int, columns: int) -> Chain:
    text = _chained("MatMul", f"{rows}, {columns}", between=True)
    elements = rows * columns
    return Chain(text, (columns, columns), "dynamic", True, elements * columns, elements)


def _chained(layer: str, shape: str, *, between: bool) -> str:
    lines, value = [], "x"
    for i in range(LAYERS):
        lines.append(f"a{i} = {layer}({value}, w)")
        value = f"a{i}"
        if between:
            lines.append(f"t{i} = Tanh({value})")
            value = f"t{i}"
    steps = " ".join(lines)
    return f"(float[{shape}] x) => (float[{shape}] y) {{ {steps} y = Identity({value}) }}"


def times(chain: Chain, folder: Path, seconds: float, threads: int) -> tuple[float, float]:
    """Nanoseconds of the chain in float and in integers."""
    proto = sketch(chain.text, weights(w=chain.shape))
    made = make(prepare_proto(proto), "web", _all_in_integers(proto, chain), mode=chain.mode)
    assert all(n.compute.is_integer for n in made.plan.nodes if n.weights)
    paths = folder / "float.onnx", folder / "integers.onnx"
    onnx.save(proto, paths[0])
    onnx.save(made.model, paths[1])
    found = race("wasm", paths, random_feed(proto), threads=threads, seconds=seconds).timing
    return found.float_ms * 1e6, found.quantized_ms * 1e6


def _all_in_integers(proto: onnx.ModelProto, chain: Chain) -> dict[str, Compute]:
    compute = Compute.DYNAMIC if chain.mode == "dynamic" else Compute.STATIC
    return {n.name: compute for n in proto.graph.node if "w" in n.input}


def fitted(chains: list[Chain], ns: NDArray[np.float64]) -> dict[str, float]:
    """What each term takes in float and in integers, none below 0, from times of shape (chains, 2).

    Of terms that would be negative, the most negative is 0 and the others are fitted anew.
    """
    own = ("product", "unfolded", "output")
    names = [f"{kind}_{term}" for term in own for kind in ("float", "integer")]
    names += ["conversion", "between", "call"]
    rows, wanted = [], []
    for chain, pair in zip(chains, ns, strict=True):
        for kind, time in zip(("float", "integer"), pair, strict=True):
            counts = chain.counts(integers=kind == "integer")
            counts |= {f"{kind}_{term}": counts[term] for term in own}
            rows.append([counts.get(name, 0.0) / time for name in names])
            wanted.append(1.0)
    matrix, left = np.array(rows), list(range(len(names)))
    while True:
        found = np.linalg.lstsq(matrix[:, left], np.array(wanted), rcond=None)[0]
        if found.min() >= 0:
            taken = {names[i]: float(x) for i, x in zip(left, found, strict=True)}
            return dict.fromkeys(names, 0.0) | taken
        del left[int(found.argmin())]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing, per chain")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    chains = [convs(*shape, between=between) for shape in CONVS for between in (False, True)]
    chains += [products(*shape) for shape in PRODUCTS]
    with tempfile.TemporaryDirectory(prefix="quantmill-bench-") as name:
        folder = Path(name)
        taken = np.array([times(c, folder, args.seconds, args.threads) for c in chains])
        rows = [products(1, columns) for columns in ONE_ROW]
        one_row = np.array([times(c, folder, args.seconds, args.threads) for c in rows])
    found = fitted(chains, taken)
    print("| weight | elements | float ms | integers ms | speed | as fitted |")
    print("|---|---|---|---|---|---|")
    for chain, (a, b) in zip(chains + rows, [*taken, *one_row], strict=True):
        speed = _predicted(chain, found, "float") / _predicted(chain, found, "integer")
        cells = (chain.shape, chain.elements, f"{a / 1e6:.3f}", f"{b / 1e6:.3f}")
        print(f"| {' | '.join(map(str, cells))} | {a / b:.2f}x | {speed:.2f}x |")
    ratio = float(np.median(one_row[:, 1] / one_row[:, 0]))
    fields = [f.name for f in dataclasses.fields(KernelTimes) if f.name != "one_row"]
    print(KernelTimes(**{name: round(found[name], 3) for name in fields}, one_row=round(ratio, 2)))
    print({name: round(found[name], 3) for name in ("between", "call")})


def _predicted(chain: Chain, found: dict[str, float], kind: str) -> float:
    counts = chain.counts(integers=kind == "integer")
    return sum(n * found.get(term, found.get(f"{kind}_{term}", 0.0)) for term, n in counts.items())


if __name__ == "__main__":
    main()
