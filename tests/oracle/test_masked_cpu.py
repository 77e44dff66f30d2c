"""What is made by default computes the same on x86 CPUs with and without VNNI."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from quant_core.api import quantize_model
from quant_core.config import QuantConfig
from quant_core.data.spec import SampleSpec
from quant_core.judging import validate_model
from quant_core.model.session import open_session, run
from quant_core.plan.targets import host_kernels
from tests import masked_cpu
from tests.exact_sums import open_exact
from tests.models import sketch
from tests.oracle.quantizing import make, prepare_proto, sqnr_db

DEMO = Path(__file__).parents[2] / "deployments" / "demo"
MODELS = ("digits_cnn", "language_transformer", "stress_bilstm")
# A rounding that falls to the other side on another CPU adds less noise than rounding did.
DIFFERENCE_DB = 0.5
RUN = "import sys; from tests.oracle.test_masked_cpu import main; main(sys.argv[1])"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def mask(tmp_path_factory) -> Path:
    """What a process needs to see a CPU without VNNI."""
    folder = tmp_path_factory.mktemp("masked")
    try:
        masked_cpu.environment(folder)
    except masked_cpu.CannotMask as reason:
        pytest.skip(str(reason))
    return folder


def sqnr_to_float(folder: Path) -> dict[str, float | None]:
    """Name -> SQNR of NAME.int8.onnx against NAME.onnx on the samples NAME.npz, on this CPU."""
    return {
        path.stem: validate_model(
            path,
            path.with_suffix(".int8.onnx"),
            SampleSpec(path.with_suffix(".npz"), count=32),
        ).fidelity.sqnr_db
        for path in folder.glob("*.onnx")
        if ".int8" not in path.name
    }


def main(folder: str) -> None:
    """The same, in a process that sees another CPU, as JSON beside the files."""
    Path(folder, "found.json").write_text(json.dumps(sqnr_to_float(Path(folder))))


def on_both(folder: Path, mask: Path) -> tuple[dict[str, float], dict[str, float]]:
    """SQNR by name natively and masked."""
    masked_cpu.run_masked(["-c", RUN, str(folder)], mask)
    return sqnr_to_float(folder), json.loads((folder / "found.json").read_text())


def test_default_files_compute_the_same_with_and_without_vnni(tmp_path, mask):
    for name in MODELS:
        model = shutil.copy(DEMO / "models" / f"{name}.onnx", tmp_path)
        shutil.copy(DEMO / "data" / name / "evaluation.npz", tmp_path / f"{name}.npz")
        data = DEMO / "data" / name / "calibration.npz"
        quantize_model(model, tmp_path / f"{name}.int8.onnx", calibration=SampleSpec(data, count=8))

    natively, masked = on_both(tmp_path, mask)

    assert set(natively) == set(MODELS)
    assert masked == pytest.approx(natively, abs=DIFFERENCE_DB)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_default_files_compute_on_this_cpu_what_exact_sums_give(mode, tmp_path):
    """Weights and inputs at the top of their ranges, as below; but with or without VNNI."""
    rng = np.random.default_rng(0)
    weight = rng.uniform(0.9, 1.0, (64, 16)).astype(np.float32)
    model = sketch("(float[n, 64] x) => (float[n, 16] y) { y = MatMul(x, w) }", {"w": weight})
    feed = {"x": rng.uniform(0.9, 1.0, (32, 64)).astype(np.float32)}
    [wanted] = run(open_session(model.SerializeToString()), feed)
    found = {}
    for target in ("x86", "x86-vnni"):
        path = tmp_path / f"{target}.onnx"
        onnx.save(make(prepare_proto(model), target, mode=mode).model, path)
        found[target] = [
            run(session, feed)[0] for session in (open_session(path), open_exact(path))
        ]

    here, exact = found["x86"]
    assert np.array_equal(here, exact)
    cut_off, whole = (sqnr_db([[wanted]], [[y]]) for y in found["x86-vnni"])
    assert bool(whole > cut_off + 20) is (host_kernels() == "x86-avx2")


def test_what_saturates_there_is_made_for_vnni_only_on_request(tmp_path, mask):
    """Weights and inputs at the top of their ranges, whose sums of pairs exceed int16."""
    rng = np.random.default_rng(0)
    weight = rng.uniform(0.9, 1.0, (64, 16)).astype(np.float32)
    model = sketch("(float[n, 64] x) => (float[n, 16] y) { y = MatMul(x, w) }", {"w": weight})
    data = tmp_path / "data.npz"
    np.savez(data, x=rng.uniform(0.9, 1.0, (32, 64)).astype(np.float32))
    for target in ("x86", "x86-vnni"):
        onnx.save(model, tmp_path / f"{target}.onnx")
        shutil.copy(data, tmp_path / f"{target}.npz")
        config = QuantConfig(target=target, mode="static")
        quantize_model(
            tmp_path / f"{target}.onnx",
            tmp_path / f"{target}.int8.onnx",
            config,
            calibration=data,
        )

    natively, masked = on_both(tmp_path, mask)

    assert masked["x86"] == pytest.approx(natively["x86"], abs=DIFFERENCE_DB)
    assert masked["x86-vnni"] < natively["x86-vnni"] - 20
