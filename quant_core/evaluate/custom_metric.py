"""A metric of the user's own: a Python function `module:function` over all outputs and labels.

It is code, and a manifest may come from anybody. So it runs only while `code_allowed` names the
folder that its module lies in.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from quant_core.errors import DataError, RequestError

CustomMetric = Callable[[dict[str, Any], np.ndarray | None], float]

HINT = "module:function, as in accuracy:word_error"
_folder: ContextVar[Path | None] = ContextVar("folder", default=None)


@contextlib.contextmanager
def code_allowed(folder: str | Path | None) -> Iterator[None]:
    """Let metrics `module:function` run, from that folder alone; None changes nothing.

    Modules that were imported from there are forgotten at the end: their files may change, and
    another folder may have modules of the same names.
    """
    if folder is None:
        yield
        return
    folder, before = Path(folder).absolute(), set(sys.modules)
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)
        added = set(sys.modules) - before
        for name in [name for name in added if _lies_in(folder, sys.modules[name])]:
            del sys.modules[name]


def load_custom_metric(name: str) -> CustomMetric:
    """The function `module:function`, whose module lies in the folder that `code_allowed` names.

    It is called as function(outputs, labels) with {output name: array over all samples}, or
    {output name: list with one array per feed} where shapes differ, and with the labels or None.
    It returns a number; more is better.

    Raises: RequestError if it is not allowed, or there is no such function.
    """
    folder = _folder.get()
    if folder is None:
        raise not_allowed(name)
    module, _, function_name = name.partition(":")
    with _first_on_import_path(folder):
        _check_that_it_is_found_in(folder, module.partition(".")[0], name)
        try:
            loaded = importlib.import_module(module)
            function = getattr(loaded, function_name)
        except Exception as error:  # importing runs the user's code, which may raise anything
            raise RequestError(f"cannot be imported: {error}", name, HINT) from error
    if not _lies_in(folder, loaded):
        raise RequestError(f"cannot be imported: is not in {folder}", name, HINT)
    if not callable(function):
        hint = "Name a function(outputs, labels) -> float"
        raise RequestError(f"is {type(function).__name__}", name, hint)
    return function  # type: ignore[no-any-return]


@contextlib.contextmanager
def _first_on_import_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _check_that_it_is_found_in(folder: Path, package: str, name: str) -> None:
    """Raises: RequestError if to import this module or package would run code from elsewhere."""
    spec = PathFinder.find_spec(package)
    # A folder without __init__.py is a package too, but only where no other is found.
    places = [spec.origin] if spec and spec.origin else spec and spec.submodule_search_locations
    if not places or not all(_is_below(folder, place) for place in places):
        raise RequestError(f"cannot be imported: is not in {folder}", name, HINT)
    if package in sys.modules and not _lies_in(folder, sys.modules[package]):
        problem = f"cannot be imported: there is another module {package}, which is in use"
        raise RequestError(problem, name, f"Rename {package} in {folder}")


def not_allowed(name: str) -> RequestError:
    """The error for a metric that is code, and that the caller did not allow."""
    hint = "--allow-code DIR runs it, from the folder DIR; in Python, allow_code=DIR"
    return RequestError("is code of your own, which runs only where you allow it", name, hint)


def _lies_in(folder: Path, module: ModuleType | None) -> bool:
    found_at = getattr(module, "__file__", None)
    places = [found_at] if found_at else getattr(module, "__path__", ())
    return bool(places) and all(_is_below(folder, place) for place in places)


def _is_below(folder: Path, place: str) -> bool:
    """Whether a path leads into the folder, as it is written or through links."""
    return Path(place).is_relative_to(folder) or Path(place).resolve().is_relative_to(
        folder.resolve()
    )


def measure_custom_metric(
    name: str,
    output_names: Sequence[str],
    feeds: Sequence[Sequence[np.ndarray]],
    labels: np.ndarray | None,
) -> float:
    """Value of the metric `module:function` for a model's outputs, given feed by feed.

    Raises: RequestError if there is no such function; DataError if it fails or does not return a
    finite number.
    """
    function = load_custom_metric(name)
    folder = _folder.get()
    assert folder is not None
    outputs = {
        output_name: _over_all_samples([outputs[i] for outputs in feeds])
        for i, output_name in enumerate(output_names)
    }
    try:
        with _first_on_import_path(folder):  # the function may import what lies beside it
            value = float(function(outputs, labels))
    except Exception as error:  # the user's code may raise anything
        shapes = ", ".join(f"{key} {_shape(array)}" for key, array in outputs.items())
        problem = f"failed on {shapes}: {type(error).__name__}: {error}"
        raise DataError(problem, name, "Repair the metric") from error
    if not math.isfinite(value):
        raise DataError(f"returned {value}", name, "A metric is a finite number")
    return value


def _over_all_samples(arrays: Sequence[np.ndarray]) -> Any:
    """The arrays joined along axis 0, or a list of them where the other axes differ."""
    arrays = [np.atleast_1d(array) for array in arrays]
    inner_shapes = {array.shape[1:] for array in arrays}
    return np.concatenate(arrays) if len(inner_shapes) == 1 else arrays


def _shape(array: Any) -> object:
    return getattr(array, "shape", "of several shapes")
