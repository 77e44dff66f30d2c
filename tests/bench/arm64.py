"""Files for target arm64 in the aarch64 wheels of onnxruntime, under qemu-user: right, not fast.

    apt install qemu-user-static debootstrap     # as root, as debootstrap wants it
    python -m tests.bench.arm64 --root DIR [--models NAME,...] [--zoo ZOO] [--samples 16]

DIR becomes an arm64 Debian with Python, unpacked and never booted, and the wheels that match this
host's onnxruntime and numpy; what is there already is used. A row reads: SQNR against float of the
file's outputs on this host, and emulated, where saturation or a wrong kernel would show. Emulation
says nothing of speed, and runs the kernels of the CPU that qemu's `max` is: with dot products and
I8MM. SME is hidden: qemu 7.2 computes its product of bytes (SMOPA) wrongly, and with it
onnxruntime's DynamicQuantizeMatMul.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime as ort

from quant_core.api import quantize_model
from quant_core.config import QuantConfig
from quant_core.data.spec import SampleSpec
from quant_core.evaluate.fidelity import compare
from quant_core.model.session import open_session, run
from tests.bench.accuracy import feeds_of, load_zoo
from tests.bench.runtimes import DEMO, Feed, samples_of

EMULATOR = "qemu-aarch64-static"
CPU = "max,sme=off"
DEBIAN = ("bookworm", "3.11")  # the suite, and its Python
PACKAGES = "python3,libstdc++6,libgomp1"
# What qemu-user shows is this host's. Without these lines onnxruntime's library crashes when it is
# loaded, as it looks for ARM's.
PROCESSOR = """processor\t: 0
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""
IN_EMULATOR = """
import sys, numpy, onnxruntime
model, feeds, outputs = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
given = numpy.load(feeds)
names = [i.name for i in session.get_inputs()]
found = {}
for sample in sorted({key.split(":", 1)[0] for key in given}):
    feed = {name: given[f"{sample}:{name}"] for name in names}
    for i, array in enumerate(session.run(None, feed)):
        found[f"{sample}:{i}"] = array
numpy.savez(outputs, **found)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--models", type=lambda s: s.split(","), help="all of the demo")
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--samples", type=int, default=16, help="calibration samples, at most")
    args = parser.parse_args()
    prepare(args.root)
    print(f"onnxruntime {ort.__version__}, aarch64 under {EMULATOR}\n")
    print("| model | dB here | dB emulated | file against file, dB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="quantmill-bench-") as name:
        folder = Path(name)
        for model, data in _models(args, folder):
            print(f"| {model.stem} | {row(args.root, model, data, folder)} |", flush=True)


def _models(args: argparse.Namespace, folder: Path) -> list[tuple[Path, Path]]:
    """(float model, calibration samples)."""
    wanted = args.models
    if args.zoo is None:
        found = sorted((DEMO / "models").glob("*.onnx"))
        data = DEMO / "data"
        return [
            (m, data / m.stem / "calibration.npz") for m in found if not wanted or m.stem in wanted
        ]
    zoo, rows = load_zoo(args.zoo), []
    for case in zoo.cases(args.zoo):
        if case.model.exists() and (not wanted or case.name in wanted):
            own = folder / case.name
            own.mkdir()
            model = shutil.copy(case.model, own / f"{case.name}.onnx")
            rows.append((Path(model), feeds_of(zoo, case, args.samples, own)))
    return rows


def row(root: Path, model: Path, data: Path, folder: Path) -> str:
    """The cells of one model."""
    file = folder / "made.onnx"
    config = QuantConfig(target="arm64")
    quantize_model(model, file, config, calibration=SampleSpec(data, count=16))
    feeds = samples_of(model, data)
    sessions = open_session(model), open_session(file)
    names = [output.name for output in sessions[0].get_outputs()]
    wanted, here = ([run(session, feed) for feed in feeds] for session in sessions)
    there = emulated(root, file, feeds, folder)
    pairs = ((wanted, here), (wanted, there), (here, there))
    found = (compare(*pair, names).sqnr_db for pair in pairs)
    return " | ".join("-" if db is None else f"{db:.1f}" for db in found)


def emulated(root: Path, model: Path, feeds: list[Feed], folder: Path) -> list[list[np.ndarray]]:
    """The outputs for each feed, from onnxruntime on the emulated CPU."""
    given, outputs = folder / "feeds.npz", folder / "outputs.npz"
    arrays = {f"{i:03d}:{name}": x for i, feed in enumerate(feeds) for name, x in feed.items()}
    np.savez(given, **arrays)
    python = root / "usr" / "bin" / f"python{DEBIAN[1]}"
    command = [EMULATOR, "-cpu", CPU, "-L", root, "-E", f"PYTHONPATH={root / 'opt' / 'site'}"]
    command += [python, "-c", IN_EMULATOR, model, given, outputs]
    subprocess.run([str(part) for part in command], check=True)
    found = np.load(outputs)
    count = len(found.files) // len(feeds)
    return [[found[f"{i:03d}:{k}"] for k in range(count)] for i in range(len(feeds))]


def prepare(root: Path) -> None:
    """Debian's arm64 packages and aarch64 wheels, unpacked below `root`."""
    for program in (EMULATOR, "debootstrap"):
        if shutil.which(program) is None:
            sys.exit(f"{program} is not installed: see --help")
    root.mkdir(parents=True, exist_ok=True)
    site = root / "opt" / "site"
    if not (root / "usr" / "bin" / f"python{DEBIAN[1]}").exists():
        options = ["--arch=arm64", "--foreign", "--variant=minbase", f"--include={PACKAGES}"]
        subprocess.run(["debootstrap", *options, DEBIAN[0], str(root)], check=True)
        for package in sorted((root / "var/cache/apt/archives").glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)
    if not site.exists():
        wheels = root / "opt" / "wheels"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--platform", "manylinux_2_28_aarch64", "--python-version", DEBIAN[1]]
        versions = [f"onnxruntime=={ort.__version__}", f"numpy=={np.__version__}"]
        subprocess.run([*command, "-d", str(wheels), *versions], check=True)
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc" / "cpuinfo").write_text(PROCESSOR)


if __name__ == "__main__":
    main()
