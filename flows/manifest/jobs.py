"""What a manifest asks for: read from YAML or TOML, checked as a whole, with every mistake reported at once."""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from flows.manifest.schema import Mistake, Place, form_mistakes, read_values, spell
from quant_core.config import Contract, QuantConfig
from quant_core.data.spec import SampleSpec
from quant_core.errors import RequestError
from quant_core.metrics import find_metric


@dataclass(frozen=True, slots=True)
class Job:
    """One model: what it is made from and what it is held to. Without calibration nothing is measured."""

    name: str
    input: Path
    output: Path
    config: QuantConfig
    calibration: SampleSpec | None
    evaluation: SampleSpec | None
    contract: Contract | None

    @property
    def judged_by(self) -> SampleSpec:
        """The samples that tell how right the result is: random ones only if there are no others."""
        return self.evaluation or self.calibration or SampleSpec()

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "input": str(self.input),
            "output": str(self.output),
            "config": self.config.to_dict(),
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "evaluation": self.evaluation.to_dict() if self.evaluation else None,
            "judged_by": self.judged_by.to_dict(),
            "contract": self.contract.to_dict() if self.contract else None,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Job:
        return cls(
            name=values["name"],
            input=Path(values["input"]),
            output=Path(values["output"]),
            config=QuantConfig.from_dict(values["config"]),
            calibration=SampleSpec.from_dict(values["calibration"])
            if values["calibration"]
            else None,
            evaluation=SampleSpec.from_dict(values["evaluation"]) if values["evaluation"] else None,
            contract=Contract.from_dict(values["contract"]) if values["contract"] else None,
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """When a stage is stopped."""

    timeout_s: float = 3600.0
    memory_mb: int | None = None


@dataclass(frozen=True, slots=True)
class Benchmark:
    """How long and with how many threads a model is timed against its float original; 0 seconds: not at all."""

    seconds: float = 0.1
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """Jobs, and how to run them. Its `digest` is the same whenever the same things are asked for.

    costs  where what is timed is looked up and kept (costs.py); None: in the output folder's own records
    """

    jobs: tuple[Job, ...]
    folder: Path
    skip_existing: bool = True
    continue_on_error: bool = True
    keep_cache: bool = False
    costs: Path | None = None
    workers: int | None = None
    limits: Limits = Limits()
    benchmark: Benchmark = Benchmark()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives the manifest back."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return own | {
            "jobs": [job.to_dict() for job in self.jobs],
            "folder": str(self.folder),
            "costs": str(self.costs) if self.costs else None,
            "limits": asdict(self.limits),
            "benchmark": asdict(self.benchmark),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        return cls(
            **{
                **values,
                "jobs": tuple(Job.from_dict(job) for job in values["jobs"]),
                "folder": Path(values["folder"]),
                "costs": Path(values["costs"]) if values["costs"] else None,
                "limits": Limits(**values["limits"]),
                "benchmark": Benchmark(**values["benchmark"]),
            }
        )

    def digest(self) -> str:
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_manifest(path: str | Path) -> Manifest:
    """The manifest in that YAML or TOML file. Raises: RequestError that lists all mistakes."""
    path = Path(path)
    return check_manifest(read_values(path), path.absolute().parent, str(path))


def check_manifest(values: object, folder: Path, where: str = "manifest") -> Manifest:
    """The manifest that says this, its paths relative to `folder`. Raises: RequestError that lists all mistakes."""
    if not isinstance(values, Mapping):
        raise RequestError(
            "is not a mapping of keys to values", where, "Start with `models:` or `batch:`"
        )
    mistakes = form_mistakes(values)
    meant: list[Mistake] = []
    sound = _sound(values, mistakes)
    batch: Mapping[str, Any] = sound.get("batch") or {}
    placed = _placed_jobs(sound, folder, meant)
    if any(mistake.place[:1] != ("models",) for mistake in mistakes):
        meant.clear()  # what a half-understood manifest means would only mislead; what it names is there or not
    _check_files(placed, meant)
    costs = _costs(batch, folder, meant)
    if mistakes := mistakes + meant:
        raise _rejected(mistakes, where)
    jobs, output_dir = tuple(job for _, job in placed), batch.get("output_dir")
    return Manifest(
        jobs=jobs,
        folder=_path(folder, output_dir) if output_dir else jobs[0].output.parent,
        workers=batch.get("jobs"),
        costs=costs,
        limits=Limits(**_given(values.get("limits"))),
        benchmark=Benchmark(**_given(values.get("benchmark"))),
        **_given(
            {key: batch.get(key) for key in ("skip_existing", "continue_on_error", "keep_cache")}
        ),
    )


# The meaning: defaults merged, globs expanded, paths resolved


def _sound(values: Mapping[str, Any], mistakes: Sequence[Mistake]) -> dict[str, Any]:
    """The values without what is wrong in form; None instead of a model in which something is."""
    said = dict(values)
    for mistake in mistakes:
        key, *rest = mistake.place or ("",)
        section = said.get(str(key))
        if key == "models" and rest and isinstance(section, list):
            said["models"] = [
                None if index == rest[0] else model for index, model in enumerate(section)
            ]
        elif rest and isinstance(section, Mapping):
            said[str(key)] = {name: value for name, value in section.items() if name != rest[0]}
        else:
            said.pop(str(key), None)
    return said


Placed = list[tuple[Place, Job]]


def _placed_jobs(values: Mapping[str, Any], folder: Path, mistakes: list[Mistake]) -> Placed:
    """Every job, with the place in the manifest that asked for it."""
    batch = values.get("batch") or {}
    output_dir = _path(folder, batch["output_dir"]) if batch.get("output_dir") else None
    entries: list[tuple[Place, dict[str, Any]]] = [
        (("models", index), {**model, "input": _path(folder, model["input"])})
        for index, model in enumerate(values.get("models") or [])
        if model is not None
    ]
    if pattern := batch.get("input_dir"):
        if output_dir is None:
            mistakes.append(
                Mistake(
                    ("batch", "output_dir"),
                    "is missing",
                    "Where are the models of input_dir to go?",
                )
            )
            return []
        found = [{"input": path, "base": base} for path, base in _glob(folder, pattern)]
        if not found:
            mistakes.append(
                Mistake(
                    ("batch", "input_dir"),
                    f"no .onnx file in {pattern}",
                    f"Looked in {_path(folder, pattern)}",
                )
            )
        entries += [(("batch", "input_dir"), entry) for entry in found]
    stems = Counter(entry["input"].stem for _, entry in entries)
    placed: Placed = []
    for place, entry in entries:
        try:
            placed.append(
                (
                    place,
                    _job(values, entry, folder, output_dir, alone=stems[entry["input"].stem] == 1),
                )
            )
        except RequestError as error:
            mistakes.append(Mistake((*place, *error.where.split(".")), error.problem, error.hint))
    made = {
        job.output for _, job in placed
    }  # of an earlier run, where models are written beside their originals
    return [(place, job) for place, job in placed if place[0] == "models" or job.input not in made]


def _job(
    values: Mapping[str, Any],
    entry: Mapping[str, Any],
    folder: Path,
    output_dir: Path | None,
    alone: bool,
) -> Job:
    options = {**_given(values), **_given(entry)}
    config = QuantConfig.from_dict(
        {f.name: options[f.name] for f in fields(QuantConfig) if f.name in options}
    )
    if entry.get("output"):
        output = _path(folder, entry["output"])
    elif output_dir is not None:
        inside = entry["input"].relative_to(entry["base"]).parent if "base" in entry else Path()
        output = output_dir / inside / f"{entry['input'].stem}_int{config.bits}.onnx"
        if not Path(os.path.realpath(output.parent)).is_relative_to(os.path.realpath(output_dir)):
            raise RequestError(
                f"a link leads out of output_dir: {output.parent}",
                "output",
                "Name the file to write",
            )
    else:
        raise RequestError(
            "is missing", "output", "Name the file to write, or give batch.output_dir"
        )
    stem = entry["input"].stem
    calibration, evaluation = (
        _samples(values.get(key), entry.get(key), folder, stem)
        for key in ("calibration", "evaluation")
    )
    promised = entry.get("contract") or values.get(
        "contract"
    )  # as a whole: half of another promise makes no sense
    contract = Contract.from_dict(_given(promised)) if promised else None
    if (
        contract
        and find_metric(contract.metric).needs_labels
        and (evaluation or calibration or SampleSpec()).labels is None
    ):
        raise RequestError(
            f"{contract.metric} needs labels",
            "contract.metric",
            "Give evaluation.labels, or promise agreement or cosine",
        )
    return Job(
        name=entry.get("name") or (stem if alone else output.stem),
        input=entry["input"],
        output=output,
        config=config,
        calibration=calibration,
        evaluation=evaluation,
        contract=contract,
    )


def _samples(
    default: Mapping[str, Any] | None, own: Mapping[str, Any] | None, folder: Path, stem: str
) -> SampleSpec | None:
    """Key by key: the model's own word, else the manifest's. `{name}` in a path is the model's file name."""
    said = {**_given(default), **_given(own)}
    if not said:
        return None
    source, labels = said.get("data"), said.get("labels")
    return SampleSpec(
        source="random"
        if source in (None, "random")
        else str(_path(folder, source.replace("{name}", stem))),
        labels=str(_path(folder, labels.replace("{name}", stem))) if labels else None,
        count=said.get("num_samples"),
        shape=said.get("shape"),
        seed=said.get("seed", 0),
    )


def _costs(batch: Mapping[str, Any], folder: Path, mistakes: list[Mistake]) -> Path | None:
    """The table of costs that is named, once it can be read."""
    if not batch.get("costs"):
        return None
    from quant_core.evaluate.timing_cache import (
        TimingCache,  # imports onnxruntime, which hardly any manifest needs
    )

    path = _path(folder, batch["costs"])
    try:
        TimingCache(path)
    except RequestError as error:
        mistakes.append(Mistake(("batch", "costs"), f"{error.problem}: {path}", error.hint))
    return path


def _given(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """Without what is absent."""
    return {key: value for key, value in (values or {}).items() if value is not None}


def _check_files(placed: Placed, mistakes: list[Mistake]) -> None:
    """What is read is there; nothing is written twice, or over what is read."""
    inputs = {os.path.realpath(job.input): place for place, job in placed}
    outputs: dict[str, Place] = {}
    names: dict[str, Place] = {}
    missing = cache(lambda path: not _is_a(Path.is_file, path) and not _is_a(Path.is_dir, path))
    for place, job in placed:
        real = os.path.realpath(job.output)
        if missing(job.input) or job.input.is_dir():
            mistakes.append(
                Mistake((*place, "input"), f"no such file: {job.input}", _neighbour(job.input))
            )
        if real in inputs:
            problem = f"is also an input: {job.output}"
            mistakes.append(
                Mistake(
                    (*place, "output"),
                    problem,
                    "Originals are never overwritten: name another file",
                )
            )
        if outputs.setdefault(real, place) is not place:
            problem = f"is also the output of {spell(outputs[real])}: {job.output}"
            mistakes.append(Mistake((*place, "output"), problem, "Name another file"))
        if _is_a(Path.is_dir, job.output):
            mistakes.append(
                Mistake(
                    (*place, "output"), f"is a folder: {job.output}", "Name a file, ending in .onnx"
                )
            )
        if names.setdefault(job.name, place) is not place:
            mistakes.append(
                Mistake((*place, "name"), f"{job.name} is taken", "Give each model its own name")
            )
        for key, spec in (("calibration", job.calibration), ("evaluation", job.evaluation)):
            for what, path in spec.files() if spec else ():
                if missing(path):
                    mistakes.append(
                        Mistake((*place, key, what), f"no such file: {path}", _neighbour(path))
                    )


def _is_a(kind: Callable[[Path], bool], path: Path) -> bool:
    try:
        return kind(path)
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


def _neighbour(path: Path) -> str:
    """The file that was meant, if its name is nearly the same."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f"There is no folder {path.parent}"
    near = difflib.get_close_matches(path.name, names, 1)
    return f"Did you mean {near[0]}?" if near else "Paths start at the manifest's folder"


def _glob(folder: Path, pattern: str) -> list[tuple[Path, Path]]:
    """Each model that the pattern or folder names, with the folder that its place is told from."""
    path = _path(folder, pattern)
    if path.is_dir():
        return [(model, path) for model in sorted(path.glob("*.onnx"))]
    base = path
    while glob.has_magic(str(base)):
        base = base.parent
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207 - ** as a shell means it
    return [(model, base if base.is_dir() else base.parent) for model in found if model.is_file()]


def _path(folder: Path, text: str) -> Path:
    return Path(os.path.abspath(folder / Path(text).expanduser()))  # noqa: PTH100 - resolve() would follow links


def _rejected(mistakes: Sequence[Mistake], where: str) -> RequestError:
    unique = list(dict.fromkeys(map(str, mistakes)))
    count = "1 mistake" if len(unique) == 1 else f"{len(unique)} mistakes"
    return RequestError("\n  ".join([count + ":", *unique]), where, "Nothing was started")
