"""The schema of a manifest: which keys and values it may have."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import PydanticCustomError

from flows.manifest.mistakes import Mistake
from quant_core.config import Contract, QuantConfig
from quant_core.errors import RequestError, nearest_hint
from quant_core.model.atomic import MAX_NAME_BYTES
from tasks.locations import is_url, location
from tasks.stores import EXTRAS, check_url

REQUEST_ERROR = "request_error"  # the type of pydantic's error that holds a RequestError


def schema_mistakes(values: Mapping[str, Any]) -> list[Mistake]:
    """Every unknown key, missing key and value of a wrong type or range."""
    try:
        _Manifest.model_validate(values)
    except ValidationError as error:
        return [_mistake(found) for found in error.errors(include_url=False)]
    if not values.get("models") and not (values.get("batch") or {}).get("input_dir"):
        return [Mistake(("models",), "names no model", "List models, or give batch.input_dir")]
    return []


# The schema, in pydantic's models. Options of quant_core are checked by quant_core.config itself.


def _checked_by(check: Callable[[Any], object]) -> AfterValidator:
    """A validator that turns a RequestError of `check` into an error of pydantic."""

    def validate(value: Any) -> Any:
        try:
            check(value)
        except RequestError as error:
            context = {"problem": error.problem, "hint": error.hint}
            raise PydanticCustomError(REQUEST_ERROR, "{problem}", context) from None
        return value

    return AfterValidator(validate)


def _option(kind: Any, key: str, required: Mapping[str, Any]) -> Any:
    """The annotation of one option of a config or contract.

    Each option is checked alone, with the other keys that `kind` requires, so that one mistake does
    not hide the next. One that is null is absent.
    """

    def check(value: Any) -> None:
        if value is not None:
            kind.from_dict({**required, key: value})

    return Annotated[Any, _checked_by(check)]


def _check_shape(value: object) -> None:
    shapes = value.values() if isinstance(value, Mapping) else [value]
    for shape in shapes:
        if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
            hint = "A list of sizes, or one such list for each input"
            raise RequestError(f"is {reprlib.repr(value)}", "shape", hint)


def _check_path(text: str) -> None:
    if is_url(text):
        check_url(text)
    try:
        parts = location(text).parts if is_url(text) else Path(text).expanduser().parts
    except RuntimeError:
        raise RequestError(f"is {reprlib.repr(text)}", "path", "There is no such user") from None
    scheme, colon, rest = text.partition(":")
    if scheme.lower() in EXTRAS and colon and not rest.startswith("//"):
        raise RequestError(f"is {reprlib.repr(text)}", "path", f"A URL begins with {scheme}://")
    if "${" in text or any(part.startswith("$") for part in parts):
        # else a folder of that name would appear
        hint = "Variables are not expanded: write the path itself"
        raise RequestError(f"is {reprlib.repr(text)}", "path", hint)
    too_long = any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in parts)
    if not text or "\0" in text or too_long:
        hint = "A path, relative to the manifest's folder"
        raise RequestError(f"is {reprlib.repr(text)}", "path", hint)


def _check_output(text: str) -> None:
    _check_path(text)
    if not text.lower().endswith(".onnx"):  # else it may be the file of samples, or the manifest
        raise RequestError(f"is {reprlib.repr(text)}", "path", "Name a file, ending in .onnx")


def _check_local_path(text: str) -> None:
    if is_url(text):
        raise RequestError(
            f"is {reprlib.repr(text)}", "path", "A local path: it is written to often"
        )
    _check_path(text)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


PathText = Annotated[str, _checked_by(_check_path)]
OutputText = Annotated[str, _checked_by(_check_output)]
LocalPathText = Annotated[str, _checked_by(_check_local_path)]


class _Samples(_Section):
    """Samples to calibrate with, or to judge by.

    data         a .npy, a .npz with one array per input, a folder of .npz feeds, or `random`
    labels       a .npy with the right answer of each sample
    num_samples  at most so many of them, spread evenly over the data
    shape        open sizes of random samples: a list, or one such list for each input
    seed         of random samples; 0 if left out
    """

    data: PathText | None = None
    labels: PathText | None = None
    num_samples: int | None = Field(None, ge=1)
    shape: Annotated[Any, _checked_by(_check_shape)] = None
    seed: int | None = Field(None, ge=0)


class _Batch(_Section):
    """Which models are made beside those that are listed, and how the batch goes on.

    input_dir          a folder or a glob of models
    output_dir         where models without an `output` are written, and the reports
    layout             `huggingface`: input_dir is the folder of one model, which is made as a whole
    work_dir           local folder of journal and reports where the outputs lie in a store
    skip_existing      whether outputs that are up to date stay; true if left out
    continue_on_error  whether the others are made when a model fails; true if left out
    keep_cache         whether what stages answered is kept when a model is finished; false if left
                       out
    costs              file of the timings that plans were chosen by; one of its own if left out
    jobs               workers on this host; as many as fit if left out
    """

    input_dir: PathText | None = None
    output_dir: PathText | None = None
    layout: Literal["huggingface"] | None = None
    work_dir: LocalPathText | None = None
    skip_existing: bool | None = None
    continue_on_error: bool | None = None
    keep_cache: bool | None = None
    costs: LocalPathText | None = None
    jobs: int | None = Field(None, ge=1, le=4096)


class _Limits(_Section):
    """When a stage of a model is stopped.

    timeout_s  after so many seconds; 3600 if left out
    memory_mb  when it holds more than this; most of the host's memory if left out
    """

    timeout_s: float | None = Field(None, gt=0, le=1e6)
    memory_mb: int | None = Field(None, ge=64)


class _Benchmark(_Section):
    """How finished models are timed beside their originals.

    seconds  for each model, 0: not at all; 0.1 if left out
    threads  of both models; 1 if left out
    """

    seconds: float | None = Field(None, ge=0, le=3600)
    threads: int | None = Field(None, ge=1, le=1024)


_Contract: Any = create_model(
    "_Contract",
    __base__=_Section,
    **{f.name: (_option(Contract, f.name, {"min": 0.0}), None) for f in fields(Contract)},
)  # type: ignore[call-overload]


_Options: Any = create_model(
    "_Options",
    __base__=_Section,
    calibration=(_Samples | None, None),
    evaluation=(_Samples | None, None),
    contract=(_Contract | None, None),
    **{f.name: (_option(QuantConfig, f.name, {}), None) for f in fields(QuantConfig)},
)  # type: ignore[call-overload]


class _Model(_Options):  # type: ignore[misc]
    """One model.

    input        the float model: a path, relative to the manifest's folder, or a URL
    output       the file to write; below batch.output_dir if left out
    name         what reports call it; the name of its file if left out
    calibration  the samples that ranges are measured on; without any, nothing is static
    evaluation   the samples that the result is judged by; those of the calibration if left out
    contract     what the result must satisfy
    """

    input: PathText
    output: OutputText | None = None
    name: Annotated[str, Field(min_length=1, max_length=200)] | None = None


class _Manifest(_Options):  # type: ignore[misc]
    """What holds for all models, where a model says nothing else, and how they are made.

    models       the models, one by one
    batch        models of a folder, and how the batch goes on
    limits       when a stage is stopped
    benchmark    how finished models are timed
    calibration  the samples that ranges are measured on
    evaluation   the samples that results are judged by
    contract     what each result must satisfy
    """

    models: list[_Model] | None = None
    batch: _Batch | None = None
    limits: _Limits | None = None
    benchmark: _Benchmark | None = None


SECTIONS = {
    "": _Manifest,
    "models": _Model,
    "batch": _Batch,
    "limits": _Limits,
    "benchmark": _Benchmark,
    "contract": _Contract,
    "calibration": _Samples,
    "evaluation": _Samples,
}


def _mistake(error: Any) -> Mistake:
    """One of pydantic's errors in our words."""
    place, kind, value = error["loc"], error["type"], reprlib.repr(error["input"])
    if kind == REQUEST_ERROR:
        return Mistake(place, error["ctx"]["problem"], error["ctx"]["hint"])
    if kind == "extra_forbidden":
        parent = next((key for key in reversed(place[:-1]) if isinstance(key, str)), "")
        known = list(SECTIONS.get(parent, _Manifest).model_fields)
        hint = nearest_hint(str(place[-1]), known) or f"Known: {', '.join(known)}"
        return Mistake(place, "unknown key", hint)
    if kind == "missing":
        return Mistake(place, "is missing", "Every model needs it")
    if kind == "model_type":
        is_model = len(place) == 2 and place[0] == "models"
        hint = "Write `input: FILE`" if is_model else "Must be a mapping of keys to values"
        return Mistake(place, f"is {value}", hint)
    hint = error["msg"].replace("Input should be", "Must be").replace("a valid string", "text")
    return Mistake(place, f"is {value}", hint)
