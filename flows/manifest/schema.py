"""What a manifest may say: YAML or TOML text to plain values, or the list of its mistakes."""

from __future__ import annotations

import difflib
import math
import os
import re
import reprlib
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import PydanticCustomError

from quant_core.config import Contract, QuantConfig
from quant_core.errors import RequestError

MAX_BYTES = 8 << 20
MAX_VALUES = 1_000_000
LONGEST_NAME = 255  # bytes, of one folder or file
LONG_KEY = re.compile(r"""(?:\.[ \t]*+(?:"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+'|[\w-]++)[ \t]*+){16}""")
Place = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing that is wrong: where in the manifest, what, and what would be right."""

    place: Place
    problem: str
    hint: str

    def __str__(self) -> str:
        return f"{spell(self.place)}: {self.problem}" + (f" ({self.hint})" if self.hint else "")


def spell(place: Place) -> str:
    """models[2].contract.metric"""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place).lstrip(".")


def read_values(path: Path) -> object:
    """What the text of that file says. Raises: RequestError if it cannot be read, or is neither YAML nor TOML."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)  # a device, or a pipe, does not tell its size
        if len(content) > MAX_BYTES:
            raise RequestError(
                "is larger than 8 MB", str(path), "Use the batch form with a folder of models"
            )
        return _parse(content.decode("utf-8"), path)
    except OSError as error:
        problem = f"cannot be read: {(error.strerror or str(error)).lower()}"
        raise RequestError(problem, str(path), "Name a YAML or TOML manifest") from None
    except UnicodeDecodeError:
        raise RequestError("is not UTF-8 text", str(path), "Name a YAML or TOML manifest") from None


def form_mistakes(values: Mapping[str, Any]) -> list[Mistake]:
    """Everything in these values that is not as the form wants it."""
    try:
        _Manifest.model_validate(values)
    except ValidationError as error:
        return [_mistake(found) for found in error.errors(include_url=False)]
    if not values.get("models") and not (values.get("batch") or {}).get("input_dir"):
        return [Mistake(("models",), "names no model", "List models, or give batch.input_dir")]
    return []


# The form: what pydantic holds each key to. What an option may be, quant_core.config alone knows.


def _asks(check: Callable[[Any], object]) -> AfterValidator:
    """A validator that accepts what `check` does not complain about."""

    def validate(value: Any) -> Any:
        try:
            check(value)
        except RequestError as error:
            raise PydanticCustomError(
                "asked", "{problem}", {"problem": error.problem, "hint": error.hint}
            ) from None
        return value

    return AfterValidator(validate)


def _one_key(kind: Any, key: str, needed: Mapping[str, Any]) -> Callable[[Any], object]:
    """A check of one key alone, so that one mistake does not hide the next."""
    return lambda value: kind.from_dict({**needed, key: value})


def _check_shape(value: object) -> None:
    shapes = value.values() if isinstance(value, Mapping) else [value]
    for shape in shapes:
        if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
            raise RequestError(
                f"is {reprlib.repr(value)}",
                "shape",
                "A list of sizes, or one such list for each input",
            )


def _check_path(text: str) -> None:
    try:
        too_long = any(
            len(os.fsencode(part)) > LONGEST_NAME for part in Path(text).expanduser().parts
        )
    except RuntimeError:
        raise RequestError(f"is {reprlib.repr(text)}", "path", "There is no such user") from None
    if not text or "\0" in text or too_long:
        raise RequestError(
            f"is {reprlib.repr(text)}", "path", "A path, relative to the manifest's folder"
        )


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


PathText = Annotated[str, _asks(_check_path)]


class _Samples(_Form):
    data: PathText | None = None
    labels: PathText | None = None
    num_samples: int | None = Field(None, ge=1)
    shape: Annotated[Any, _asks(_check_shape)] = None
    seed: int | None = Field(None, ge=0)


class _Batch(_Form):
    input_dir: PathText | None = None
    output_dir: PathText | None = None
    skip_existing: bool | None = None
    continue_on_error: bool | None = None
    keep_cache: bool | None = None
    costs: PathText | None = None
    jobs: int | None = Field(None, ge=1, le=4096)


class _Limits(_Form):
    timeout_s: float | None = Field(None, gt=0, le=1e6)
    memory_mb: int | None = Field(None, ge=64)


class _Benchmark(_Form):
    seconds: float | None = Field(None, ge=0, le=3600)
    threads: int | None = Field(None, ge=1, le=1024)


_Contract: Any = create_model(
    "_Contract",
    __base__=_Form,
    **{
        f.name: (Annotated[Any, _asks(_one_key(Contract, f.name, {"min": 0.0}))], None)
        for f in fields(Contract)
    },
)  # type: ignore[call-overload]


_Options: Any = create_model(
    "_Options",
    __base__=_Form,
    calibration=(_Samples | None, None),
    evaluation=(_Samples | None, None),
    contract=(_Contract | None, None),
    **{
        f.name: (Annotated[Any, _asks(_one_key(QuantConfig, f.name, {}))], None)
        for f in fields(QuantConfig)
    },
)  # type: ignore[call-overload]


class _Model(_Options):  # type: ignore[misc]
    input: PathText
    output: PathText | None = None
    name: Annotated[str, Field(min_length=1, max_length=200)] | None = None


class _Manifest(_Options):  # type: ignore[misc]
    models: list[_Model] | None = None
    batch: _Batch | None = None
    limits: _Limits | None = None
    benchmark: _Benchmark | None = None


_FORMS = {
    "": _Manifest,
    "models": _Model,
    "batch": _Batch,
    "limits": _Limits,
    "benchmark": _Benchmark,
    "contract": _Contract,
    "calibration": _Samples,
    "evaluation": _Samples,
}


def _mistake(found: Any) -> Mistake:
    """One of pydantic's errors in our words."""
    place, kind, value = found["loc"], found["type"], reprlib.repr(found["input"])
    if kind == "asked":
        return Mistake(place, found["ctx"]["problem"], found["ctx"]["hint"])
    if kind == "extra_forbidden":
        parent = next((key for key in reversed(place[:-1]) if isinstance(key, str)), "")
        known = list(_FORMS.get(parent, _Manifest).model_fields)
        near = difflib.get_close_matches(str(place[-1]), known, 1)
        return Mistake(
            place,
            "unknown key",
            f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}",
        )
    if kind == "missing":
        return Mistake(place, "is missing", "Every model needs it")
    if kind == "model_type":
        return Mistake(place, f"is {value}", "Must be a mapping of keys to values")
    return Mistake(
        place,
        f"is {value}",
        found["msg"].replace("Input should be", "Must be").replace("a valid string", "text"),
    )


# The door: text to plain values


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML in which a key that is given twice is a mistake, not a silent loss of the first.

    Aliases may not unfold to more than MAX_VALUES: a kilobyte of them can name each other a billion times.
    """

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _unfolded(node, {}) > MAX_VALUES:
            raise yaml.YAMLError(f"its aliases unfold to more than {MAX_VALUES:,} values")
        return node


def _unfolded(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values the node stands for, all aliases followed; infinitely many if it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # until all of it is counted
        children = (
            [part for pair in node.value for part in pair]
            if isinstance(node, yaml.MappingNode)
            else node.value
        )
        inside = (
            0
            if isinstance(node, yaml.ScalarNode)
            else sum(_unfolded(child, known) for child in children)
        )
        known[id(node)] = 1 + inside
    return known[id(node)]


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> Iterator[dict[Any, Any]]:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value != "<<" and isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
    return loader.construct_yaml_map(node)


_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def _read_toml(text: str) -> object:
    """Raises: ValueError."""
    if LONG_KEY.search(
        text
    ):  # memory and time that tomllib takes grow with the square of their number
        raise ValueError("a key has more than 16 parts")
    return tomllib.loads(text)


def _check_scalars(values: object) -> None:
    """Raises: ValueError for a number of more than 64 bits, or text that is not Unicode: neither survives JSON."""
    if isinstance(values, dict):
        for pair in values.items():
            _check_scalars(pair)
    elif isinstance(values, (list, tuple, set)):
        for value in values:
            _check_scalars(value)
    elif isinstance(values, str):
        values.encode()
    elif isinstance(values, int) and values.bit_length() > 63:
        raise ValueError("a number has more than 64 bits")


def _parse(text: str, path: Path) -> object:
    kind = "TOML" if path.suffix == ".toml" else "YAML"
    try:
        values = _read_toml(text) if kind == "TOML" else yaml.load(text, _UniqueKeyLoader)
        _check_scalars(values)
        return values
    except (
        Exception
    ) as error:  # constructors of YAML's types raise anything for a text that they do not like
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or (
            "nested too deep" if isinstance(error, RecursionError) else error
        )
        raise RequestError(f"is not {kind}: {problem}", f"{path}{line}", "") from None
