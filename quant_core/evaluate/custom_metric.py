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


def own_metric(*metrics: str | None) -> str | None:
    """The first of these that is a metric of the user's own, "module:function"; None if none is."""
    return next((metric for metric in metrics if metric is not None and ":" in metric), None)


@contextlib.contextmanager
def code_allowed(folder: str | Path | None) -> Iterator[None]:
    """Let metrics `module:function` run, from that folder alone; None changes nothing."""
    token = _folder.set(_folder.get() if folder is None else Path(folder).absolute())
    try:
        yield
    finally:
        _folder.reset(token)


def load_custom_metric(name: str) -> CustomMetric:
    """The function `module:function`, whose module lies in the folder that `code_allowed` names.

    It is called as function(outputs, labels) with {output name: array over all samples}, or
    {output name: list with one array per feed} where shapes differ, and with the labels or None.
    It returns a number; more is better.

    Raises: RequestError if it is not allowed, or there is no such function.
    """
    folder = _folder.get()
    if folder is None:
        raise RequestError(*not_allowed(name))
    module, _, function_name = name.partition(":")
    importlib.invalidate_caches()
    if PathFinder.find_spec(module.partition(".")[0], [str(folder)]) is None:
        raise RequestError(f"cannot be imported: is not in {folder}", name, HINT)
    if not _lies_in(folder, sys.modules.get(module)):
        sys.modules.pop(module, None)  # of the same name, from another folder
    sys.path.insert(0, str(folder))
    try:
        function = getattr(importlib.import_module(module), function_name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise RequestError(f"cannot be imported: {error}", name, HINT) from error
    finally:
        sys.path.remove(str(folder))
    if not callable(function):
        hint = "Name a function(outputs, labels) -> float"
        raise RequestError(f"is {type(function).__name__}", name, hint)
    return function  # type: ignore[no-any-return]


def not_allowed(name: str) -> tuple[str, str, str]:
    """Problem, where and hint of a metric that is code, and that the caller did not allow."""
    hint = "--allow-code DIR runs it, from the folder DIR; in Python, allow_code=DIR"
    return "is code of your own, which runs only where you allow it", name, hint


def _lies_in(folder: Path, module: ModuleType | None) -> bool:
    found_at = getattr(module, "__file__", None)
    return found_at is not None and Path(found_at).is_relative_to(folder)


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
    outputs = {
        output_name: _over_all_samples([outputs[i] for outputs in feeds])
        for i, output_name in enumerate(output_names)
    }
    try:
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
