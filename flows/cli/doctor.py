"""`quantmill doctor`: what this host has, and which of its versions are known to fail."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flows.cli.command import Answer
from flows.console import model_views
from flows.console.formats import format_size
from quant_core.plan.targets import cpu_flags, cpu_name, host_kernels, host_target_name
from quant_core.versions import installed_version
from quant_core.worker.memory import total_bytes, usable_cores

PACKAGES = (
    "quantmill",
    "onnxruntime",
    "onnx",
    "onnx_ir",
    "numpy",
    "ml_dtypes",
    "prefect",
    "fastapi",
    "sqlalchemy",
    "dask",
    "distributed",
    "pyarrow",
    "pydantic",
    "pyyaml",
    "typer",
    "rich",
)
# Instruction sets that decide which target is fast here.
RELEVANT_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True, slots=True)
class BrokenVersions:
    """Versions of a package that fail: at least `first` and below `end`, each if given."""

    package: str
    consequence: str
    first: str | None = None
    end: str | None = None


BROKEN = (
    BrokenVersions(
        "fastapi",
        "Prefect's server fails at import: every batch dies; install 'fastapi>=0.139,<0.151'",
        first="0.151",
    ),
    BrokenVersions(
        "fastapi",
        "older than what Prefect 3.8.8 was tried with; install 'fastapi>=0.139,<0.151'",
        end="0.139",
    ),
    BrokenVersions(
        "sqlalchemy",
        "Prefect creates no scheduled run, silently; install 'sqlalchemy[asyncio]>=2.0,<2.1'",
        first="2.1",
    ),
    BrokenVersions(
        "prefect",
        "asks for a certifi that may not be installable; install 'prefect==3.8.8'",
        first="3.9",
    ),
)


def doctor() -> Answer:
    """What this host is, and which of its versions are known not to work together."""
    report = examine_host()
    return Answer(report, model_views.host_view, exit_code=int(bool(report["problems"])))


def examine_host() -> dict[str, Any]:
    """`host`, `versions` and `problems`, as JSON values."""
    versions = {name: installed_version(name) for name in PACKAGES}
    problems = [
        f"{name} is not installed: install quantmill again"
        for name in PACKAGES[1:]
        if versions[name] is None
    ]
    return {
        "host": host_facts(),
        "versions": versions,
        "problems": problems + known_problems(versions),
    }


def host_facts() -> dict[str, str]:
    """What the host is, in words for a person."""
    flags = cpu_flags()
    return {
        "target": host_target_name(),
        "kernels": host_kernels(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cpu": cpu_name(),
        "cpu flags": " ".join(flag for flag in RELEVANT_FLAGS if flag in flags),
        "threads": f"{usable_cores()} of {os.cpu_count()}",
        "memory": format_size(total_bytes()),
        "python": f"{platform.python_version()} ({sys.executable})",
    }


def known_problems(versions: Mapping[str, str | None]) -> list[str]:
    """What is known to go wrong with these versions of packages."""
    problems = []
    for broken in BROKEN:
        version = versions.get(broken.package)
        if version is None:
            continue
        is_before = broken.first is not None and _parts(version) < _parts(broken.first)
        is_after = broken.end is not None and _parts(version) >= _parts(broken.end)
        if not is_before and not is_after:
            problems.append(f"{broken.package} {version}: {broken.consequence}")
    return problems


def _parts(version: str) -> tuple[int, ...]:
    """The first three numbers of a version, to compare it with another; `2.1.0b1` is 2.1.0."""
    numbers = re.findall(r"\d+", version.split("+")[0])
    return tuple(int(number) for number in numbers[:3])
