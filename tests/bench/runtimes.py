"""Which runtime runs which kind of file, how near to onnxruntime's outputs, and how fast.

    python -m tests.bench.runtimes [--seconds 4] [--runtimes python,node,wasm,openvino]
    python -m tests.bench.runtimes --target web [--bits 4] [--zoo DIR] [--cases NAME,...]
                                   [--samples 32] [--keep FOLDER] [--without-vnni]

The first prints a row for each runtime that is installed here, and a column for each kind of file,
made of the demo's models. The second makes the file of each model of the demo, or case of DIR, for
a target, and runs it in the runtimes of that target; with --keep, files stay in the folder and are
used again. A cell reads `speed over float there, SQNR of the outputs there against those of
onnxruntime in Python`. In JavaScript, `itself` is the speed of the float model over a copy of it in
the same rounds: 1, but for what else moves the clock. For OpenVINO, whose kernels round otherwise,
a cell reads SQNR against float there and, in brackets, in onnxruntime. `int8 k/n`: so many of the
kernels that multiply.

For qnn, which emulates the HTP of Qualcomm's chips, it says SQNR in the same way and
what is computed elsewhere; speeds of an emulation say nothing.

One thread, both models in turns, CPU time; in Chromium (runtime web) the wall clock.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import EPFail as Fail

from flows.runtime.javascript import RUNTIMES as IN_JAVASCRIPT
from flows.runtime.javascript import find_browser, find_package, race
from flows.runtime.openvino_ir import check_openvino, export_ir
from quant_core.api import plan_model, quantize_model
from quant_core.config import QuantConfig
from quant_core.data.inputs import input_specs
from quant_core.data.samples import open_samples
from quant_core.data.spec import SampleSpec
from quant_core.errors import QuantError, RequestError
from quant_core.evaluate.fidelity import compare
from quant_core.evaluate.timing import measure
from quant_core.model.session import open_session, run
from quant_core.plan.types import UNEVEN, QuantPlan
from tests import masked_cpu, qnn
from tests.bench.accuracy import feeds_of, load_zoo

DEMO = Path(__file__).parents[2] / "deployments" / "demo"
# Kind of file -> model of the demo, and how it is made. "blocks": 4-bit MatMulNBits.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "static INT8": ("digits_cnn", {"mode": "static"}),
    "static INT4": ("digits_cnn", {"mode": "static", "bits": 4}),
    "static INT8, target openvino": ("digits_cnn", {"mode": "static", "target": "openvino"}),
    "dynamic INT8": ("language_transformer", {"mode": "dynamic"}),
    "weight-only INT8": ("language_transformer", {"mode": "weight_only"}),
    "weight-only INT8, qdq": ("language_transformer", {"mode": "weight_only", "runtime": "qdq"}),
    "MatMulNBits INT4": ("language_transformer", {"mode": "blocks", "bits": 4}),
}
OF_TARGET = {
    "web": ("wasm", "web"),
    "openvino": ("openvino",),
    "qnn": ("qnn",),
    "x86": ("python",),
    "portable": ("python",),
}
Feed = Mapping[str, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["python", *IN_JAVASCRIPT, "openvino", "qnn"]
    parser.add_argument("--runtimes", type=lambda s: s.split(","), default=names)
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing, per cell")
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--cases", type=lambda s: s.split(","), help="all that are stored")
    parser.add_argument("--target", choices=list(OF_TARGET), help="of each file, in its runtime")
    parser.add_argument("--bits", type=int, default=8, help="of the weights of each file")
    parser.add_argument("--keep", type=Path, help="folder of files, which are used if there")
    parser.add_argument("--samples", type=int, default=32, help="calibration samples, at most")
    flag = "--without-vnni"
    parser.add_argument(flag, action="store_true", help="as on such a CPU (tests/masked_cpu)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quantmill-bench-") as folder:
        if args.without_vnni:
            again = [argument for argument in sys.argv[1:] if argument != flag]
            masked_cpu.run_masked(["-m", "tests.bench.runtimes", *again], Path(folder))
        elif args.target:
            of_models(args, args.keep or Path(folder))
        else:
            of_kinds(args, Path(folder))


def of_kinds(args: argparse.Namespace, folder: Path) -> None:
    """Print a row for each runtime."""
    files = {kind: made(folder, i, *KINDS[kind]) for i, kind in enumerate(KINDS)}
    print(f"| runtime | {' | '.join(files)} |\n|---{'|---' * len(files)}|")
    for runtime in args.runtimes:
        try:
            title = version(runtime)
        except RequestError as missing:
            print(f"| {runtime} | {missing} |")
            continue
        cells = []
        for model, path, data in files.values():
            cells.append(cell(runtime, model, path, samples_of(model, data), args.seconds))
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


def of_models(args: argparse.Namespace, folder: Path) -> None:
    """Print a row for each model, and a column for each runtime."""
    runtimes = [runtime for runtime in OF_TARGET[args.target] if runtime in args.runtimes]
    titles = [f"{args.target} in {version(runtime)}" for runtime in runtimes]
    print(f"| model | {' | '.join(titles)} |\n|---{'|---' * len(titles)}|")
    for name, model, data in models_of(args, folder / args.target):
        path = folder / args.target / name / f"int{args.bits}.onnx"
        try:
            if not path.exists():
                samples = SampleSpec(data, count=args.samples)
                config = QuantConfig(target=args.target, bits=args.bits)
                quantize_model(model, path, config, calibration=samples)
            feeds = samples_of(model, data)
            cells = [cell(runtime, model, path, feeds, args.seconds) for runtime in runtimes]
        except QuantError as error:
            cells = [f"no: {error.problem}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def models_of(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Path, Path]]:
    """(name, float model, calibration samples) of the chosen models, in folders of these names."""
    if args.zoo is None:
        models = {m.stem: m for m in sorted((DEMO / "models").glob("*.onnx"))}
    else:
        zoo = load_zoo(args.zoo)
        cases = {case.name: case for case in zoo.cases(args.zoo) if case.model.exists()}
        models = {name: case.model for name, case in cases.items()}
    for name, model in models.items():
        if args.cases and name not in args.cases:
            continue
        own = folder / name
        own.mkdir(parents=True, exist_ok=True)
        if args.zoo is None:
            yield name, model, DEMO / "data" / name / "calibration.npz"
        else:
            yield name, model, feeds_of(zoo, cases[name], args.samples, own)


def made(folder: Path, number: int, name: str, config: dict[str, Any]) -> tuple[Path, Path, Path]:
    """(float model, the file, evaluation samples)."""
    model, data = DEMO / "models" / f"{name}.onnx", DEMO / "data" / name
    path, plan = folder / f"{number}.onnx", None
    calibration = data / "calibration.npz"
    if config["mode"] == "blocks":
        own = QuantConfig.from_dict(config | {"mode": "dynamic"})
        plan = _in_blocks(plan_model(model, own, SampleSpec(calibration, count=4)))
        config = config | {"mode": "dynamic"}
    quantize_model(
        model,
        path,
        QuantConfig.from_dict(config),
        calibration=SampleSpec(calibration, count=32),
        plan=plan,
    )
    return model, path, data / "evaluation.npz"


def _in_blocks(plan: QuantPlan) -> QuantPlan:
    """The plan with its 4-bit MatMuls as MatMulNBits."""
    values = plan.to_dict()
    for node in values["nodes"]:
        if node["op_type"] in ("MatMul", "Gemm") and node["granularity"] in (32, f"32{UNEVEN}"):
            node |= {"compute": "blocks", "granularity": 32}
    return QuantPlan.from_json(json.dumps(values))


def samples_of(model: Path, data: Path) -> list[Feed]:
    samples = open_samples(SampleSpec(data, count=4), input_specs(model), model)
    return [samples[i] for i in range(len(samples))]


def version(runtime: str) -> str:
    """The runtime's name and version. Raises: RequestError if it is not installed."""
    if runtime == "python":
        return f"onnxruntime {ort.__version__}"
    if runtime == "openvino":
        return f"OpenVINO {check_openvino()}"
    if runtime == "qnn":
        return qnn.version()
    host = IN_JAVASCRIPT[runtime]
    package = json.loads((find_package(host.package) / "package.json").read_text())
    where = " in Chromium" if host.is_browser and find_browser() else ""
    where = where or (" (wasm, in node)" if runtime == "wasm" else "")
    return f"{host.package} {package['version']}{where}"


def cell(runtime: str, model: Path, path: Path, feeds: list[Feed], seconds: float) -> str:
    """One cell of the table."""
    try:
        if runtime == "openvino":
            found = export_ir(model, path, path.with_suffix(".xml"), feeds, seconds)
            kernels = f"int8 {found.integers}/{found.multiplying}"
            there, here = _db(found.there_db), _db(found.here_db)
            wrong = f"; {found.note}" if "wrongly" in found.note else ""
            return f"{found.timing.speedup:.2f}x, {there} ({here}), {kernels}{wrong}"
        if runtime == "python":
            sessions = open_session(model), open_session(path)
            timing = measure(*sessions, feeds[0], seconds=seconds, clock=time.thread_time)
            return f"{timing.speedup:.2f}x"
        if runtime == "qnn":
            return in_qnn(model, path, feeds[0])
        raced = race(runtime, (model, path), feeds[0], seconds=seconds)
        session = open_session(path)
        names = [output.name for output in session.get_outputs()]
        there = [[raced.outputs[1][name] for name in names]]
        equal = compare([run(session, feeds[0])], there, names).sqnr_db
        control = "-" if raced.control is None else f"{raced.control:.2f}x"
        return f"{raced.timing.speedup:.2f}x, {_db(equal)}, itself {control}"
    except QuantError as error:
        return f"no: {error.problem[:80]}"


def in_qnn(model: Path, path: Path, feed: Feed) -> str:
    """SQNR there and, in brackets, in onnxruntime; and what onnxruntime computes instead."""
    try:
        there, elsewhere = qnn.run_in_qnn(path, feed)
    except Fail as error:
        return f"no: {str(error)[-80:]}"
    wanted, here = (run(open_session(file), feed) for file in (model, path))
    names = [output.name for output in open_session(model).get_outputs()]
    found = [_db(compare([wanted], [outputs], names).sqnr_db) for outputs in (there, here)]
    left = ", ".join(f"{count} {name}" for name, count in elsewhere.items())
    return f"{found[0]} ({found[1]}), elsewhere: {left or 'nothing'}"


def _db(value: float | None) -> str:
    return "equal" if value is None or value > 100 else f"{value:.0f} dB"


if __name__ == "__main__":
    main()
