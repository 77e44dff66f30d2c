"""Which versions of packages are installed."""

from __future__ import annotations

from functools import cache
from importlib import metadata

PACKAGES = ("quantmill", "onnx", "onnxruntime")  # those that decide a result


@cache
def installed_version(package: str) -> str | None:
    """The version of a package, which is not imported; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def versions() -> dict[str, str]:
    """Package -> version of what decides a result; `unknown` for what is not installed."""
    return {name: installed_version(name) or "unknown" for name in PACKAGES}
