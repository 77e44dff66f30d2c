"""Imports point one way, between the top-level folders and inside them.

deployments -> flows -> tasks -> quant_core, and quant_core needs no orchestrator.
"""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("quant_core", "tasks", "flows", "deployments")  # each may import those before it

# The shelves of a package, lowest first; shelves on one line may not import each other either.
# Files directly in the package, such as flows/journal.py, are named like shelves.
CORE_SHELVES = (
    ("text", "deadline", "late_sympy", "versions"),
    ("errors", "metrics"),
    ("fields",),
    ("config",),
    ("numerics",),
    ("model",),
    ("data",),
    ("optimize",),
    ("plan",),
    ("calibrate",),
    ("rewrite",),
    ("evaluate",),
    ("search",),
    ("answers",),
    ("api",),
    ("judging",),
    ("worker",),
)
FLOW_SHELVES = (
    ("console", "entries", "manifest", "reading", "regression", "runtime", "stage_answers"),
    ("journal", "report"),
    ("batch",),
    ("audit",),
    ("cli",),
)
SHELVES = {"quant_core": CORE_SHELVES, "flows": FLOW_SHELVES}
DOOR = "__main__.py"
PACKAGES = ["tasks"] + [
    f"{package}/{shelf}"
    for package, floors in SHELVES.items()
    for shelf in itertools.chain(*floors)
    if (ROOT / package / shelf).is_dir()
]

CORE_IMPORTS = {
    "numpy",
    "ml_dtypes",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "threadpoolctl",
    "networkx",
    "quant_core",
    *sys.stdlib_module_names,
}
CORE_SILENCE = {"logging", "warnings"}
HEAVY = ("prefect", "dask", "distributed", "pyarrow", "pandas", "yaml")
LATE = "sympy.core"
CORE_HEAVY = ("numpy", "onnx", "onnx_ir", "onnxruntime")


def sources(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def nodes_that_run(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes below `tree`, but for the bodies of `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from nodes_that_run(child)


@cache
def imported_modules(path: Path) -> frozenset[str]:
    """Every module that the file imports when it runs, at its top or in a function."""
    found: set[str] = set()
    for node in nodes_that_run(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}: relative import"
            assert node.module is not None
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if is_module(name) else node.module for name in names}
    return frozenset(found)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(path: Path) -> frozenset[str]:
    """Top-level names of all modules that the file imports, for types alone too."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return frozenset(names)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer):
    above = set(LAYERS[LAYERS.index(layer) + 1 :])

    wrong = {str(path.relative_to(ROOT)): above & imports(path) for path in sources(layer)}

    assert not any(wrong.values()), wrong


@pytest.mark.parametrize("package", SHELVES)
def test_every_file_stands_on_a_shelf(package):
    known = {shelf for floor in SHELVES[package] for shelf in floor}

    found = {path.relative_to(ROOT / package).parts[0] for path in sources(package)}

    assert {name.removesuffix(".py") for name in found} - {"__init__"} == known


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_tells_which_file_answers_which_question(package):
    told = set(re.findall(r"\w+", ast.get_docstring(tree_of(ROOT / package / "__init__.py"))))

    files = {path.stem for path in (ROOT / package).glob("*.py") if path.name != DOOR}

    assert files - {"__init__"} <= told


@pytest.mark.parametrize("package", SHELVES)
def test_no_shelf_imports_one_beside_or_above_it(package):
    floor_of = {shelf: i for i, floor in enumerate(SHELVES[package]) for shelf in floor}

    wrong = []
    for path in sources(package):
        shelf = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        if shelf == "__init__":  # the package's public names come from all shelves
            continue
        if path.name == DOOR:  # `python -m flows.batch` is a command, as those of the highest shelf
            shelf = SHELVES[package][-1][0]
        for module in imported_modules(path):
            top, _, rest = module.partition(".")
            other = rest.partition(".")[0]
            if top != package or other == shelf:
                continue
            if floor_of.get(other, len(floor_of)) >= floor_of[shelf]:
                wrong.append(f"{module_name(path)} -> {module}")

    assert not wrong


def test_no_module_imports_itself_through_others():
    paths = [path for layer in LAYERS for path in sources(layer)]
    graph = {module_name(path): imported_modules(path) for path in paths}

    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_one_module_knows_how_files_in_stores_are_reached():
    paths = [path for layer in LAYERS for path in sources(layer)]

    assert [module_name(path) for path in paths if "fsspec" in imports(path)] == ["tasks.stores"]


def test_the_core_imports_only_numbers_and_onnx():
    others = {module_name(path): imports(path) - CORE_IMPORTS for path in sources("quant_core")}

    # An extra, in a process of its own.
    assert others.pop("quant_core.evaluate.in_openvino_main") == {"openvino"}
    assert not any(others.values()), others


def test_the_core_neither_logs_nor_prints():
    for path in sources("quant_core"):
        assert not CORE_SILENCE & imports(path), f"{path.name} logs or warns"
        names = {node.id for node in ast.walk(tree_of(path)) if isinstance(node, ast.Name)}
        assert "print" not in names, f"{path.name} prints"


MAIN = "from flows.cli.commands import main; main"


@pytest.mark.parametrize(
    ("statement", "unneeded"),
    [
        ("import quant_core", HEAVY + CORE_HEAVY),
        ("import quant_core.api", HEAVY),
        ("import quant_core.worker.stages", (*HEAVY, LATE)),
        ("import flows.cli.commands", HEAVY + CORE_HEAVY),
        (f"{MAIN}(['--help'])", HEAVY + CORE_HEAVY),
        (f"{MAIN}(['info', 'absent.onnx'])", (*HEAVY, LATE, "onnxruntime")),
        (f"{MAIN}(['quantize', 'absent.onnx', '-o', 'out.onnx'])", (*HEAVY, LATE)),
        (f"{MAIN}(['doctor'])", (*HEAVY, LATE)),
    ],
)
def test_nothing_is_imported_that_is_not_needed(statement, unneeded):
    """`import prefect` alone takes three seconds: `--help` must not wait for it."""
    loaded = f"(name for name in {unneeded!r} if name in sys.modules)"
    program = f"import sys\n{statement}\nprint('loaded', *{loaded})"
    command = [sys.executable, "-c", program]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "loaded"
