"""Calibration and comparison on another execution provider of onnxruntime, beside the CPU's.

    python -m tests.bench.providers PROVIDER [--zoo DIR] [--cases NAME,...] [--samples 16]

The models are the demo's, and those of the zoo whose weights are stored. A cell of the last two
columns is the SQNR in dB of a static INT8 file against its float model, both run on the CPU and
both on the provider; the largest difference of a range is a share of that range, over all tensors.

Exit code 1 where the provider does not work here.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from quant_core.api import quantize_model
from quant_core.calibrate.observe import Statistics, observe
from quant_core.config import QuantConfig
from quant_core.data.inputs import input_specs
from quant_core.data.samples import open_samples
from quant_core.data.spec import SampleSpec
from quant_core.judging import validate_model
from quant_core.model.prepare import prepare
from quant_core.model.providers import find_provider
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from tests.bench.accuracy import feeds_of, load_zoo

DEMO = Path(__file__).parents[2] / "deployments/demo"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("provider", help="such as cuda or openvino")
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--cases", type=lambda s: s.split(","), help="all that are stored")
    parser.add_argument("--samples", type=int, default=16, help="of calibration, at most")
    args = parser.parse_args()
    _, problem = find_provider(args.provider)
    if problem:
        raise SystemExit(problem)
    titles = f"tensors | range differs by | CPU, s | {args.provider}, s"
    files = f"made by the CPU: CPU, {args.provider} | made by {args.provider}: CPU, {args.provider}"
    print(f"| model | {titles} | {files} |\n{'|---' * 7}|")
    with tempfile.TemporaryDirectory(prefix="quantmill-bench-") as scratch:
        for name, model, data in cases(args, Path(scratch)):
            print(row(name, model, data, args, Path(scratch)), flush=True)


def cases(args: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, Path, Path]]:
    """(name, float model, calibration samples) of each."""
    for model in sorted((DEMO / "models").glob("*.onnx")):
        yield model.stem, model, DEMO / "data" / model.stem / "calibration.npz"
    if args.zoo:
        zoo = load_zoo(args.zoo)
        for case in zoo.cases(args.zoo):
            if case.model.exists() and (not args.cases or case.name in args.cases):
                (scratch / case.name).mkdir()
                yield case.name, case.model, feeds_of(zoo, case, args.samples, scratch / case.name)


def row(name: str, model: Path, data: Path, args: argparse.Namespace, scratch: Path) -> str:
    """One line of the table."""
    providers = ("cpu", args.provider)
    (here, seconds), (there, seconds_there) = (
        observed(model, data, provider, args.samples) for provider in providers
    )
    share = max(
        max(abs(stats.lo - there.of_tensor(tensor).lo), abs(stats.hi - there.of_tensor(tensor).hi))
        / max(stats.hi - stats.lo, 1e-30)
        for tensor, stats in here.tensors.items()
    )
    files = []
    for provider in providers:
        made = scratch / f"{name}_{provider}.onnx"
        config = QuantConfig(mode="static", provider=provider)
        quantize_model(model, made, config, calibration=data)
        found = [validate_model(model, made, data, provider=by).fidelity for by in providers]
        files.append(", ".join(f"{fidelity.sqnr_db:.1f}" for fidelity in found))
    times = f"{seconds:.2f} | {seconds_there:.2f}"
    return f"| {name} | {len(here.tensors)} | {share:.0e} | {times} | {' | '.join(files)} |"


def observed(model: Path, data: Path, provider: str, samples: int) -> tuple[Statistics, float]:
    """Statistics of static activations, and the seconds that they took behind a first sample."""
    feeds = list(open_samples(SampleSpec(data, count=samples), input_specs(model), model))
    config = QuantConfig(mode="static", provider=provider)
    plan = make_plan(prepare(model, feeds[:1]), config, TARGETS["x86"])
    observe(model, plan, feeds[:1])
    started = time.perf_counter()
    return observe(model, plan, feeds), time.perf_counter() - started


if __name__ == "__main__":
    main()
