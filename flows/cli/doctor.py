"""`quantmill doctor`: what this host has, and whether that is what quantmill needs."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from flows.cli.command import Answer
from flows.console import model_views
from flows.console.formats import format_size
from quant_core.plan.targets import cpu_flags, cpu_name, host_kernels, host_target_name
from quant_core.versions import installed_version
from quant_core.worker.memory import total_bytes, usable_cores

# Instruction sets that decide which target is fast here.
RELEVANT_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")


def doctor() -> Answer:
    """Show what this host is, and whether it has the versions of packages that quantmill needs."""
    report = examine_host()
    return Answer(report, model_views.host_view, exit_code=int(bool(report["problems"])))


def examine_host() -> dict[str, Any]:
    """`host`, `versions` and `problems`, as JSON values."""
    names = ("quantmill", *_requirements())
    versions = {name: installed_version(name) for name in names}
    missing = [
        f"{name} is not installed: install quantmill again"
        for name in names[1:]
        if versions[name] is None
    ]
    problems = missing + known_problems(versions)
    return {"host": host_facts(), "versions": versions, "problems": problems}


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
    """Which of these versions of packages are others than quantmill works with."""
    required = _requirements()
    return [
        f"{name} {version}: quantmill needs another one; pip install '{required[name]}'"
        for name, version in versions.items()
        if version is not None and name in required
        if not required[name].specifier.contains(version, prereleases=True)
    ]


def _requirements() -> dict[str, Any]:
    """Name -> what pyproject.toml requires of each package, but for those of extras."""
    from packaging.requirements import Requirement  # only this command needs it

    try:
        listed = map(Requirement, metadata.requires("quantmill") or ())
    except metadata.PackageNotFoundError:  # as in a checkout
        return {}
    return {found.name: found for found in listed if found.marker is None}
