"""One file on two CPUs: this one, which has VNNI, and the same one without (tests/masked_cpu).

    python -m tests.bench.cpus --zoo DIR [--cases NAME,...] [--keep FOLDER]
                               [--samples 32] [--rounds 5] [--seconds 2]

default      made here by default, target x86
for VNNI     made here for target x86-vnni
made there   made by default where VNNI is hidden

A cell of the first three columns reads `SQNR in dB @speed over float`, first here, then without
VNNI. The last two compare the default file with the one that is made for each of the CPUs, `for
VNNI` here and `made there` there: its speed over that one's, the median of the rounds and their
least and largest. One thread, CPU time, all files of a case in turns; a round is a process.

On a CPU that has no VNNI to hide, the columns are SQNR in dB of the default file on the calibration
samples, here and with exact sums (tests/exact_sums: what a CPU with VNNI computes), `equal` where
the outputs are to the last bit, and the number of its nodes that can saturate.

With --keep, files and what was measured stay in the folder, and the same command goes on from them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from quant_core.api import quantize_model
from quant_core.config import QuantConfig
from quant_core.evaluate.fidelity import compare
from quant_core.evaluate.saturation_check import saturating_nodes
from quant_core.evaluate.timing import measure_all
from quant_core.model.normalize import load_normalized
from quant_core.model.session import open_session, run
from tests import masked_cpu
from tests.bench.accuracy import feeds_of, load_zoo
from tests.exact_sums import open_exact

# File -> its target, and whether it is made without VNNI.
FILES = {"default": ("x86", False), "for VNNI": ("x86-vnni", False), "made there": ("x86", True)}
RIVALS = {"here": "for VNNI", "there": "made there"}
TITLES = ("here: default over for VNNI", "there: default over made there")
TITLES_OF_EXACT = ("here", "with exact sums", "nodes that can saturate")
Found = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--cases", type=lambda s: s.split(","), help="all that are stored")
    parser.add_argument("--keep", type=Path, help="folder of files and results, read first")
    parser.add_argument("--samples", type=int, default=32, help="calibration samples, at most")
    parser.add_argument("--rounds", type=int, default=5, help="per case and CPU")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing, per round")
    parser.add_argument("--make", help="the file to make; used inside")
    parser.add_argument("--measure", choices=list(RIVALS), help="what is measured; used inside")
    args = parser.parse_args()
    zoo = load_zoo(args.zoo)
    cases = [
        case
        for case in zoo.cases(args.zoo)
        if case.model.exists() and (not args.cases or case.name in args.cases)
    ]
    if args.make:
        make(cases[0], args.keep, args.make)
    elif args.measure:
        measure(zoo, cases[0], args.keep, args.measure, args.seconds)
    else:
        with tempfile.TemporaryDirectory(prefix="quantmill-bench-") as name:
            scratch = Path(name)
            titles, row_of = [*FILES, *TITLES], row
            try:
                masked_cpu.environment(scratch)
            except masked_cpu.CannotMask as reason:
                print(f"{reason}: beside it, sums are exact\n")
                titles, row_of = [*TITLES_OF_EXACT], exact_row
            print(f"| case | {' | '.join(titles)} |\n{'|---' * (1 + len(titles))}|", flush=True)
            for case in cases:
                folder = (args.keep or scratch) / case.name
                folder.mkdir(parents=True, exist_ok=True)
                print(row_of(zoo, case, folder, args, scratch), flush=True)


def row(zoo: Any, case: Any, folder: Path, args: argparse.Namespace, scratch: Path) -> str:
    """One line of the table."""
    feeds_of(zoo, case, args.samples, folder)
    again = ["-m", "tests.bench.cpus", "--zoo", str(args.zoo), "--cases", case.name]
    again += ["--seconds", str(args.seconds), "--keep", str(folder)]
    for file, (_, without_vnni) in FILES.items():
        if not _path(folder, file).exists():
            _run([*again, "--make", file], scratch, masked=without_vnni)
    while min(_rounds(folder, where) for where in RIVALS) < args.rounds:
        for where in RIVALS:
            _run([*again, "--measure", where], scratch, masked=where == "there")
    here, there = (_read(folder, where) for where in RIVALS)
    cells = [f"{_cell(here, file)}, {_cell(there, file)}" for file in FILES]
    ratios = [_ratio(here), _ratio(there)]
    return f"| {case.name} | {' | '.join(cells + ratios)} |"


def exact_row(zoo: Any, case: Any, folder: Path, args: argparse.Namespace, scratch: Path) -> str:
    """One line of the table of a CPU without VNNI."""
    samples = zoo.load_calibration(case, args.samples)
    feeds_of(zoo, case, args.samples, folder)
    path = _path(folder, "default")
    if not path.exists():
        again = ["-m", "tests.bench.cpus", "--zoo", str(args.zoo), "--cases", case.name]
        _run([*again, "--keep", str(folder), "--make", "default"], scratch, masked=False)
    in_float, *sessions = open_session(case.model), open_session(path), open_exact(path)
    names = [output.name for output in in_float.get_outputs()]
    wanted, *found = ([run(session, feed) for feed in samples] for session in (in_float, *sessions))
    cells = [_db(compare(wanted, outputs, names).sqnr_db) for outputs in found]
    pairs = zip(itertools.chain(*found[0]), itertools.chain(*found[1]), strict=True)
    cells[1] += ", equal" if all(np.array_equal(a, b) for a, b in pairs) else ""
    unsafe = len(saturating_nodes(load_normalized(path)))
    return f"| {case.name} | {' | '.join(cells)} | {unsafe} |"


def make(case: Any, folder: Path, file: str) -> None:
    """Quantize the case's model with the feeds in the folder."""
    config = QuantConfig(target=FILES[file][0])
    quantize_model(case.model, _path(folder, file), config, calibration=folder / "feeds")


def measure(zoo: Any, case: Any, folder: Path, where: str, seconds: float) -> None:
    """Add a round to what is known of the files on this CPU."""
    found = _read(folder, where)
    if not found["db"]:
        found["db"] = {file: zoo.evaluate(case, _path(folder, file))["sqnr_db"] for file in FILES}
    in_float, *sessions = (
        open_session(p) for p in (case.model, *(_path(folder, f) for f in FILES))
    )
    rival = sessions[list(FILES).index(RIVALS[where])]
    feed, clock = zoo.load_calibration(case, 1)[0], time.thread_time
    timings = measure_all(in_float, sessions, feed, seconds=seconds / 2, clock=clock)
    found["speeds"].append({f: t.speedup for f, t in zip(FILES, timings, strict=True)})
    [pair] = measure_all(rival, [sessions[0]], feed, seconds=seconds / 2, clock=clock)
    found["ratios"].append(pair.speedup)
    (folder / f"{where}.json").write_text(json.dumps(found, indent=1))


def _run(arguments: list[str], scratch: Path, *, masked: bool) -> None:
    """This command again, in a process of its own."""
    if masked:
        masked_cpu.run_masked(arguments, scratch)
    else:
        subprocess.run([sys.executable, *arguments], check=True)


def _path(folder: Path, file: str) -> Path:
    return folder / f"{file}.onnx"


def _read(folder: Path, where: str) -> Found:
    path = folder / f"{where}.json"
    if not path.exists():
        return {"db": {}, "speeds": [], "ratios": []}
    return dict(json.loads(path.read_text()))


def _rounds(folder: Path, where: str) -> int:
    return len(_read(folder, where)["ratios"])


def _cell(found: Found, file: str) -> str:
    speed = median(speeds[file] for speeds in found["speeds"])
    return f"{_db(found['db'][file])} @{speed:.2f}"


def _db(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _ratio(found: Found) -> str:
    ratios = found["ratios"]
    return f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


if __name__ == "__main__":
    main()
