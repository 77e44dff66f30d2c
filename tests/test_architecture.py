"""Imports point one way: deployments -> flows -> tasks -> quant_core, and the core needs no orchestrator."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("quant_core", "tasks", "flows", "deployments")  # each may import those before it
CORE_IMPORTS = {
    "numpy",
    "ml_dtypes",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "quant_core",
    *sys.stdlib_module_names,
}
CORE_SILENCE = {"logging", "warnings"}
HEAVY = ("prefect", "dask", "distributed", "pyarrow", "pandas", "yaml")


def sources(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Top-level names of all modules that the file imports, lazily or not."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}: relative import"
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer):
    above = set(LAYERS[LAYERS.index(layer) + 1 :])

    wrong = {
        str(p.relative_to(ROOT)): found
        for p in sources(layer)
        if (found := above & set(imports(p)))
    }

    assert not wrong


def test_the_core_imports_only_numbers_and_onnx():
    wrong = {
        str(p.relative_to(ROOT)): found
        for p in sources("quant_core")
        if (found := set(imports(p)) - CORE_IMPORTS)
    }

    assert not wrong


def test_the_core_neither_logs_nor_prints():
    for path in sources("quant_core"):
        assert not CORE_SILENCE & set(imports(path)), f"{path.name} logs or warns"
        calls = (
            n
            for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(n, ast.Call)
        )
        assert "print" not in {c.func.id for c in calls if isinstance(c.func, ast.Name)}, (
            f"{path.name} prints"
        )


@pytest.mark.parametrize(
    "statement",
    [
        "import quant_core",
        "import quant_core.api",
        "import quant_core.worker.stages",
        "import flows.cli.commands",
        "from flows.cli.commands import main; main(['--help'])",
        "from flows.cli.commands import main; main(['info', 'absent.onnx'])",
        "from flows.cli.commands import main; main(['quantize', 'absent.onnx', '-o', 'out.onnx'])",
        "from flows.cli.commands import main; main(['doctor'])",
    ],
)
def test_one_model_needs_no_orchestrator(statement):
    """`import prefect` alone costs three seconds."""
    program = f"import sys\n{statement}\nprint('loaded', *(name for name in {HEAVY!r} if name in sys.modules))"

    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert done.stdout.splitlines()[-1] == "loaded"
