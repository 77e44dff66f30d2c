"""What this host is to quantmill: target, cores, memory, versions, and which of them are known not to work."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from quant_core.plan.targets import cpu_flags, cpu_name, host_target_name
from quant_core.worker.memory import total_bytes, usable_cores

PACKAGES = (
    "quantmill", "onnxruntime", "onnx", "onnx_ir", "numpy", "ml_dtypes", "prefect", "fastapi", "sqlalchemy",
    "dask", "distributed", "pyarrow", "pydantic", "pyyaml", "typer", "rich",
)  # fmt: skip
TELLING_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
# (package, from this version, before this one, what happens)
BROKEN = (
    (
        "fastapi",
        "0.151",
        None,
        "Prefect's server fails at import: every batch dies; install 'fastapi>=0.139,<0.151'",
    ),
    (
        "fastapi",
        None,
        "0.139",
        "older than what Prefect 3.8.8 was tried with; install 'fastapi>=0.139,<0.151'",
    ),
    (
        "sqlalchemy",
        "2.1",
        None,
        "Prefect creates no scheduled run, silently; install 'sqlalchemy[asyncio]>=2.0,<2.1'",
    ),
    (
        "prefect",
        "3.9",
        None,
        "asks for a certifi that may not be installable; install 'prefect==3.8.8'",
    ),
)


def examine() -> dict[str, Any]:
    """`host`, `versions` and `problems`, as JSON values."""
    versions = {name: installed(name) for name in PACKAGES}
    missing = [
        f"{name} is not installed; pip install quantmill"
        for name in PACKAGES[1:]
        if versions[name] is None
    ]
    return {"host": host(), "versions": versions, "problems": missing + broken(versions)}


def host() -> dict[str, str]:
    flags = cpu_flags()
    return {
        "target": host_target_name(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cpu": cpu_name(),
        "cpu flags": " ".join(flag for flag in TELLING_FLAGS if flag in flags),
        "threads": f"{usable_cores()} of {os.cpu_count()}",
        "memory": f"{total_bytes() / 2**30:.1f} GiB",
        "python": f"{platform.python_version()} ({sys.executable})",
    }


def broken(versions: dict[str, str | None]) -> list[str]:
    """What is known to go wrong with these versions."""
    found = []
    for name, first, end, consequence in BROKEN:
        has = versions.get(name)
        if (
            has
            and (first is None or _order(has) >= _order(first))
            and (end is None or _order(has) < _order(end))
        ):
            found.append(f"{name} {has}: {consequence}")
    return found


def installed(package: str) -> str | None:
    """Its version, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _order(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])
