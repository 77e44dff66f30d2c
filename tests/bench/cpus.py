"""One file on two CPUs: this one, which has VNNI, and the same one without (tests/masked_cpu).

    python -m tests.bench.cpus --zoo DIR [--cases NAME,...] [--samples 32] [--seconds 2]

default      made here by default, target x86
for VNNI     made here for target x86-vnni
made there   made by default where VNNI is hidden

A cell reads `SQNR in dB @speed over float`, first here, then without VNNI. One thread, CPU time,
all files of a case in turns.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from quant_core.api import quantize_model
from quant_core.config import QuantConfig
from quant_core.evaluate.timing import measure_all
from quant_core.model.session import open_session
from tests import masked_cpu
from tests.bench.accuracy import feeds_of, load_zoo

FILES = ("default", "for VNNI", "made there")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--cases", type=lambda s: s.split(","), help="all that are stored")
    parser.add_argument("--samples", type=int, default=32, help="calibration samples, at most")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing, per case and CPU")
    parser.add_argument("--make", type=Path, help="make one case's default file; used inside")
    parser.add_argument("--judge", type=Path, help="judge the files of a folder; used inside")
    args = parser.parse_args()
    zoo = load_zoo(args.zoo)
    cases = [
        case
        for case in zoo.cases(args.zoo)
        if case.model.exists() and (not args.cases or case.name in args.cases)
    ]
    if args.make:
        make(cases[0], args.make, "made there", "x86")
    elif args.judge:
        found = judged(zoo, cases[0], args.judge, args.seconds)
        (args.judge / "found.json").write_text(json.dumps(found))
    else:
        print(f"| case | {' | '.join(FILES)} |\n{'|---' * (1 + len(FILES))}|", flush=True)
        with tempfile.TemporaryDirectory(prefix="quantmill-mask-") as mask:
            for case in cases:
                print(row(zoo, case, args, Path(mask)), flush=True)


def row(zoo: Any, case: Any, args: argparse.Namespace, mask: Path) -> str:
    """One line of the table."""
    with tempfile.TemporaryDirectory(prefix="quantmill-bench-") as name:
        folder = Path(name)
        feeds_of(zoo, case, args.samples, folder)
        make(case, folder, "default", "x86")
        make(case, folder, "for VNNI", "x86-vnni")
        again = ["-m", "tests.bench.cpus", "--zoo", str(args.zoo), "--cases", case.name]
        again += ["--seconds", str(args.seconds)]
        masked_cpu.run_masked([*again, "--make", str(folder)], mask)
        here = judged(zoo, case, folder, args.seconds)
        masked_cpu.run_masked([*again, "--judge", str(folder)], mask)
        there = json.loads((folder / "found.json").read_text())
    cells = (f"{_text(here[file])}, {_text(there[file])}" for file in FILES)
    return f"| {case.name} | {' | '.join(cells)} |"


def make(case: Any, folder: Path, file: str, target: str) -> None:
    """Quantize the case's model with the feeds in the folder."""
    config, output = QuantConfig(target=target), folder / f"{file}.onnx"
    quantize_model(case.model, output, config, calibration=folder / "feeds")


def judged(zoo: Any, case: Any, folder: Path, seconds: float) -> dict[str, list[float | None]]:
    """File -> [SQNR in dB against float on this CPU, speed over float]."""
    paths = [folder / f"{file}.onnx" for file in FILES]
    sqnr = [zoo.evaluate(case, path)["sqnr_db"] for path in paths]
    sessions = [open_session(path) for path in (case.model, *paths)]
    feed = zoo.load_calibration(case, 1)[0]
    timings = measure_all(sessions[0], sessions[1:], feed, seconds=seconds, clock=time.thread_time)
    return {f: [db, t.speedup] for f, db, t in zip(FILES, sqnr, timings, strict=True)}


def _text(found: list[float | None]) -> str:
    db, speed = found
    return f"{'-' if db is None else format(db, '.1f')} @{speed:.2f}"


if __name__ == "__main__":
    main()
