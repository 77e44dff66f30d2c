"""Jobs of a manifest: which models are made, from what, and how they are judged.

A manifest is checked as a whole, and all its mistakes are reported at once.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path, PurePath
from typing import Any

from flows.manifest import huggingface
from flows.manifest.outputs import is_output, output_test
from flows.manifest.schema import (
    Mistake,
    Place,
    format_place,
    read_values,
    schema_mistakes,
)
from quant_core.config import Contract, QuantConfig
from quant_core.data.spec import SampleSpec
from quant_core.errors import DataError, ModelError, QuantError, RequestError
from quant_core.metrics import find_metric
from tasks.cache import the_cache
from tasks.stores import Location, Url, listing, location

# Of a folder in which a name similar to a missing one is looked for: each takes 30 us.
MOST_NAMES = 256


@dataclass(frozen=True, slots=True)
class Job:
    """One model to make, and the contract that it must satisfy.

    Without `calibration` no range of an activation is measured.

    data  the file for weights that other jobs hold too; None: the output holds all of its own
    """

    name: str
    input: Location
    output: Location
    config: QuantConfig
    calibration: SampleSpec | None
    evaluation: SampleSpec | None
    contract: Contract | None
    data: str | None = None

    @property
    def judged_by(self) -> SampleSpec:
        """The samples that the result is judged by: random ones if no others are given."""
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
            "data": self.data,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Job:
        return cls(
            name=values["name"],
            input=location(values["input"]),
            output=location(values["output"]),
            config=QuantConfig.from_dict(values["config"]),
            calibration=SampleSpec.from_dict(values["calibration"])
            if values["calibration"]
            else None,
            evaluation=SampleSpec.from_dict(values["evaluation"]) if values["evaluation"] else None,
            contract=Contract.from_dict(values["contract"]) if values["contract"] else None,
            data=values.get("data"),
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """The time and memory after which a stage is stopped."""

    timeout_s: float = 3600.0
    memory_mb: int | None = None


@dataclass(frozen=True, slots=True)
class Benchmark:
    """How a model is timed against its float original; 0 seconds: it is not timed."""

    seconds: float = 0.1
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """Jobs, and how to run them.

    folder  the local folder of the journal and the reports: the output folder, if that is local
    store   the output folder if it is in a store; there workers leave files for each other that
            share no disk
    costs   the table of measured costs (evaluate/timing_cache.py); None: one in the output folder
    copies  files and where they belong beside the outputs; an output may get a second name so
    file    where the manifest was read; None if it was not read from a file
    """

    jobs: tuple[Job, ...]
    folder: Path
    store: Url | None = None
    skip_existing: bool = True
    continue_on_error: bool = True
    keep_cache: bool = False
    costs: Path | None = None
    copies: tuple[tuple[Path, Path], ...] = ()
    workers: int | None = None
    limits: Limits = Limits()
    benchmark: Benchmark = Benchmark()
    file: Path | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives the manifest back."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return own | {
            "jobs": [job.to_dict() for job in self.jobs],
            "folder": str(self.folder),
            "store": str(self.store) if self.store else None,
            "costs": str(self.costs) if self.costs else None,
            "copies": [[str(source), str(target)] for source, target in self.copies],
            "file": str(self.file) if self.file else None,
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
                "store": Url(values["store"]) if values.get("store") else None,
                "costs": Path(values["costs"]) if values["costs"] else None,
                "copies": tuple((Path(a), Path(b)) for a, b in values.get("copies", ())),
                "file": Path(values["file"]) if values["file"] else None,
                "limits": Limits(**values["limits"]),
                "benchmark": Benchmark(**values["benchmark"]),
            }
        )

    def digest(self) -> str:
        """Manifests that request the same have the same digest, wherever they lie."""
        text = json.dumps(replace(self, file=None).to_dict(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_manifest(path: str | Path) -> Manifest:
    """The manifest in that YAML or TOML file. Raises: RequestError that lists all mistakes."""
    path = Path(path)
    manifest = check_manifest(read_values(path), path.absolute().parent, str(path))
    return replace(manifest, file=path.absolute())


def check_manifest(values: object, folder: Path, where: str = "manifest") -> Manifest:
    """The manifest with these values. Its paths are relative to `folder`.

    Raises: RequestError that lists all mistakes, those of the schema and those of meaning.
    """
    if not isinstance(values, Mapping):
        hint = "Start with `models:` or `batch:`"
        raise RequestError("is not a mapping of keys to values", where, hint)
    mistakes = schema_mistakes(values)
    values = _without_mistakes(values, mistakes)
    batch: Mapping[str, Any] = values.get("batch") or {}
    placed_jobs, meaning_mistakes = _make_jobs(values, folder)
    costs = _local(folder, batch["costs"]) if batch.get("costs") else None
    # A mistake outside `models` may change what every model means, so mistakes of meaning would
    # only mislead. Files are checked all the same: a file is there or it is not.
    if all(mistake.place[:1] == ("models",) for mistake in mistakes):
        mistakes += meaning_mistakes
    copies, copy_mistakes = _copies(batch, placed_jobs, folder)
    mistakes += _output_mistakes(placed_jobs)
    mistakes += copy_mistakes
    mistakes += _costs_mistakes(costs)
    # A file that is missing fails its models alone, unless that would leave none to make.
    unreadable = _file_mistakes(placed_jobs)
    if mistakes or len({mistake.place[:2] for mistake in unreadable}) == len(placed_jobs):
        mistakes += unreadable
    if mistakes:
        raise _rejection(mistakes, where)
    jobs = tuple(job for _, job in placed_jobs)
    output_dir = batch.get("output_dir")
    outputs = _absolute(folder, output_dir) if output_dir else jobs[0].output.parent
    switches = ("skip_existing", "continue_on_error", "keep_cache")
    return Manifest(
        jobs=jobs,
        folder=_run_folder(folder, batch.get("work_dir"), outputs),
        store=outputs if isinstance(outputs, Url) else None,
        workers=batch.get("jobs"),
        costs=costs,
        copies=copies,
        limits=Limits(**_present(values.get("limits"))),
        benchmark=Benchmark(**_present(values.get("benchmark"))),
        **_present({key: batch.get(key) for key in switches}),
    )


def select(manifest: Manifest, only: Sequence[str]) -> list[Job]:
    """The jobs whose name matches one of the globs in `only`; all jobs if it is empty.

    Raises: RequestError if no job matches.
    """
    jobs = list(manifest.jobs)
    if only:
        jobs = [job for job in jobs if any(fnmatchcase(job.name, glob) for glob in only)]
    if not jobs:
        names = ", ".join(job.name for job in manifest.jobs[:5])
        problem = f"matches no model: {', '.join(only)}"
        raise RequestError(problem, "only", f"Models are called {names}")
    return jobs


def _without_mistakes(values: Mapping[str, Any], mistakes: Sequence[Mistake]) -> dict[str, Any]:
    """The values without every key that has a mistake; a model with a mistake becomes None."""
    valid = dict(values)
    for mistake in mistakes:
        key, *rest = mistake.place or ("",)
        section = valid.get(str(key))
        if key == "models" and rest and isinstance(section, list):
            valid["models"] = [None if i == rest[0] else model for i, model in enumerate(section)]
        elif rest and isinstance(section, Mapping):
            valid[str(key)] = {name: value for name, value in section.items() if name != rest[0]}
        else:
            valid.pop(str(key), None)
    return valid


# From valid values to jobs: defaults are merged, globs expanded and paths made absolute.


@dataclass(frozen=True, slots=True)
class _Entry:
    """A model that the manifest names.

    place    the key in the manifest that names it
    options  the options of this model alone
    root     the folder below which the output has the same place as the input; None: there is none
    graph    the graph of a model of several that it is; None: it is a model of its own
    """

    place: Place
    input: Location
    options: Mapping[str, Any]
    root: Location | None = None
    graph: huggingface.Graph | None = None


def _make_jobs(
    values: Mapping[str, Any], folder: Path
) -> tuple[list[tuple[Place, Job]], list[Mistake]]:
    """A job for every model that `values` names, with its place in the manifest; and mistakes."""
    batch = values.get("batch") or {}
    output_dir = _absolute(folder, batch["output_dir"]) if batch.get("output_dir") else None
    entries, mistakes = _find_models(values, folder)
    stems = Counter(entry.input.stem for entry in entries)
    jobs: list[tuple[Place, Job]] = []
    for entry in entries:
        has_own_stem = stems[entry.input.stem] == 1
        try:
            jobs.append((entry.place, _job(values, entry, folder, output_dir, has_own_stem)))
        except RequestError as error:
            place = (*entry.place, *error.where.split("."))
            mistakes.append(Mistake(place, error.problem, error.hint))
    # A folder that holds both originals and outputs: outputs are no originals, neither of this
    # manifest nor of an earlier run.
    outputs = {job.output for _, job in jobs}
    made_by_batches = output_test()
    originals = [
        (place, job)
        for place, job in jobs
        if place[0] == "models" or not (job.input in outputs or made_by_batches(job.input))
    ]
    if jobs and not originals and not mistakes:
        problem = "holds only what batches have made"
        mistakes.append(Mistake(("batch", "input_dir"), problem, "List them under `models`"))
    return originals, mistakes


def _find_models(values: Mapping[str, Any], folder: Path) -> tuple[list[_Entry], list[Mistake]]:
    """What `models` lists and `batch.input_dir` matches."""
    entries = [
        _Entry(("models", index), _absolute(folder, model["input"]), model)
        for index, model in enumerate(values.get("models") or [])
        if model is not None
    ]
    batch = values.get("batch") or {}
    pattern = batch.get("input_dir")
    if not pattern:
        return entries, []
    if not batch.get("output_dir"):
        hint = "Where are the models of input_dir to go?"
        return [], [Mistake(("batch", "output_dir"), "is missing", hint)]
    place = ("batch", "input_dir")
    if batch.get("layout"):
        return _find_graphs(entries, place, _absolute(folder, pattern))
    try:
        matches = _glob(folder, pattern)
    except OSError as problem:
        reason = problem.strerror or str(problem)
        return entries, [Mistake(place, f"cannot be listed: {reason}", str(problem.filename))]
    if not matches:
        hint = f"Looked in {_absolute(folder, pattern)}"
        return entries, [Mistake(place, f"no .onnx file in {pattern}", hint)]
    listed = {_real(entry.input) for entry in entries}
    found = [_Entry(place, path, {}, root) for path, root in matches if _real(path) not in listed]
    return entries + found, []


def _find_graphs(
    listed: list[_Entry], place: Place, root: Location
) -> tuple[list[_Entry], list[Mistake]]:
    """What `models` lists, and the graphs of a folder of Hugging Face."""
    if isinstance(root, Url) or not _is_folder(root):
        hint = "layout: huggingface takes the folder of one model, with its config.json"
        return listed, [Mistake(place, f"is no folder: {root}", hint)]
    graphs = huggingface.find_graphs(root)
    if not graphs:
        return listed, [Mistake(place, f"no .onnx file in {root}", "Export the model first")]
    return listed + [_Entry(place, graph.input, {}, root, graph) for graph in graphs], []


def _job(
    values: Mapping[str, Any],
    entry: _Entry,
    folder: Path,
    output_dir: Location | None,
    has_own_stem: bool,
) -> Job:
    """The entry's job: each option is the model's own, or else the manifest's.

    Raises: RequestError, whose `where` is a key of the entry.
    """
    options = {**_present(values), **_present(entry.options)}
    config_options = {f.name: options[f.name] for f in fields(QuantConfig) if f.name in options}
    config = QuantConfig.from_dict(config_options)
    output = _output_path(entry, config, folder, output_dir)
    stem = entry.input.stem
    samples = {
        key: _samples(values.get(key), entry.options.get(key), folder, stem)
        for key in ("calibration", "evaluation")
    }
    data = entry.graph.data if entry.graph is not None else None
    if data is not None:
        # Weights that several graphs hold stay equal if samples have no part in their rounding.
        if config.weight_method == "auto":
            config = replace(config, weight_method="mse")
        data = huggingface.output_name(data, config.bits)
    if entry.graph is not None:
        samples = {key: _flowing(spec, key, entry.graph) for key, spec in samples.items()}
    # A contract is one promise: half of the model's and half of the manifest's makes no sense.
    promise = entry.options.get("contract") or values.get("contract")
    job = Job(
        name=entry.options.get("name") or (stem if has_own_stem else _longer_name(entry)),
        input=entry.input,
        output=output,
        config=config,
        **samples,
        contract=Contract.from_dict(_present(promise)) if promise else None,
        data=data,
    )
    if job.contract and job.judged_by.labels is None:
        metric = job.contract.metric
        if find_metric(metric).needs_labels:
            hint = "Give evaluation.labels, or promise agreement or cosine"
            raise RequestError(f"{metric} needs labels", "contract.metric", hint)
    return job


def _flowing(spec: SampleSpec | None, key: str, graph: huggingface.Graph) -> SampleSpec | None:
    """The samples as they reach one graph of several; random ones to calibrate on without others.

    Labels are of what the whole model gives, so that only a graph alone has them.
    """
    if spec is None and key == "evaluation":
        return None
    spec = spec or SampleSpec()
    return replace(spec, flow=graph.flow, labels=None if graph.flow.before else spec.labels)


def _longer_name(entry: _Entry) -> str:
    """The name of a model whose stem others have too: with the folders that tell them apart."""
    below = _below(entry.input, entry.root).parts if entry.root else entry.input.parts[-2:]
    return str(PurePath(*below).with_suffix(""))


def _below(file: Location, root: Location) -> PurePath:
    """The place of a file below the folder or store that it was found in."""
    if isinstance(file, Url):
        assert isinstance(root, Url)
        return file.relative_to(root)
    assert isinstance(root, Path)
    return file.relative_to(root)


def _output_path(
    entry: _Entry, config: QuantConfig, folder: Path, output_dir: Location | None
) -> Location:
    """The file to write.

    Raises: RequestError if none is named, or a link leads out of `output_dir`.
    """
    if entry.options.get("output"):
        return _absolute(folder, entry.options["output"])
    if output_dir is None:
        hint = "Name the file to write, or give batch.output_dir"
        raise RequestError("is missing", "output", hint)
    if entry.graph is not None:
        name = huggingface.output_name(entry.input.name, config.bits)
        output = output_dir / entry.graph.place / name
    else:
        place = _below(entry.input, entry.root).parent if entry.root else PurePath()
        output = output_dir / place / f"{entry.input.stem}_int{config.bits}.onnx"
    if isinstance(output, Url) or isinstance(output_dir, Url):
        return output
    if not Path(os.path.realpath(output.parent)).is_relative_to(os.path.realpath(output_dir)):
        problem = f"a link leads out of output_dir: {output.parent}"
        raise RequestError(problem, "output", "Name the file to write")
    return output


def _samples(
    default: Mapping[str, Any] | None, own: Mapping[str, Any] | None, folder: Path, stem: str
) -> SampleSpec | None:
    """Key by key the model's `own` value, else the manifest's; None if there are no keys.

    `{name}` in a path is the model's file name without its suffix.
    """
    options = {**_present(default), **_present(own)}
    if not options:
        return None
    source, labels = options.get("data"), options.get("labels")
    if source not in (None, "random"):
        source = str(_absolute(folder, source.replace("{name}", stem)))
    if labels:
        labels = str(_absolute(folder, labels.replace("{name}", stem)))
    return SampleSpec(
        source=source or "random",
        labels=labels or None,
        count=options.get("num_samples"),
        shape=options.get("shape"),
        seed=options.get("seed", 0),
    )


def _present(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """The values that are not None."""
    return {key: value for key, value in (values or {}).items() if value is not None}


def _glob(folder: Path, pattern: str) -> list[tuple[Location, Location]]:
    """Each model that a folder or glob names, with the folder that its place is relative to.

    What cannot be read, such as a link to nothing, is found too: it becomes a failed row. Names
    that start with a dot are found only by a glob that starts with one.

    Raises: OSError if a store cannot be listed.
    """
    path = _absolute(folder, pattern)
    if isinstance(path, Url):
        return _glob_in_store(path)
    if path.is_dir():
        names = sorted(path.glob("*.onnx"))
        return [(model, path) for model in names if not model.name.startswith(".")]
    root = path
    while glob.has_magic(str(root)):
        root = root.parent
    if not root.is_dir():
        root = root.parent
    matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 - ** as a shell means it
    models = sorted(Path(name) for name in matches)
    # A folder is a model that cannot be read if it is named like one.
    return [(model, root) for model in models if model.suffix == ".onnx" or not model.is_dir()]


def _glob_in_store(pattern: Url) -> list[tuple[Location, Location]]:
    """As `_glob`, of a folder or a glob in a store."""
    root = pattern
    while glob.has_magic(str(root)) and root != root.parent:
        root = root.parent
    if root == pattern:
        pattern /= "*.onnx"
    shows_hidden = any(part.startswith(".") for part in pattern.relative_to(root).parts)
    found = the_cache().find(pattern, root)
    return [
        (url, root)
        for url in found
        if shows_hidden or not any(p.startswith(".") for p in url.relative_to(root).parts)
        if url.suffix == ".onnx" or not the_cache().stat(url).is_folder
    ]


def _run_folder(folder: Path, named: str | None, outputs: Location) -> Path:
    """The local folder of the journal and the reports.

    Outputs in a store have one that is called like their URL, beside the manifest.
    """
    if named:
        return _local(folder, named)
    if isinstance(outputs, Path):
        return outputs
    return folder.joinpath("quantmill", outputs.scheme, *outputs.parts)


def _absolute(folder: Path, text: str) -> Location:
    """The file or folder that a manifest in `folder` means."""
    place = location(text)
    return place if isinstance(place, Url) else _local(folder, str(place))


def _local(folder: Path, text: str) -> Path:
    # resolve() would follow links
    return Path(os.path.abspath(folder / Path(text).expanduser()))  # noqa: PTH100


# Mistakes that only the file system shows.


def _file_mistakes(placed_jobs: Sequence[tuple[Place, Job]]) -> list[Mistake]:
    """What is wrong with files that are to be read."""
    exists = cache(_exists)  # many models share one file of samples
    hint = cache(partial(_similar_name, names_in=cache(_names_in)))
    read = {path for _, job in placed_jobs for _, path in files_to_read(job)}
    if in_stores := [path for path in read if isinstance(path, Url)]:
        the_cache().look_at(in_stores)
    mistakes = []
    for place, job in placed_jobs:
        for key, path in files_to_read(job):
            if problem := _what_is_wrong(path, exists, may_be_folder=key[0] != "input"):
                mistakes.append(Mistake((*place, *key), f"{problem}: {path}", hint(path)))
    return mistakes


def unreadable_file(job: Job) -> QuantError | None:
    """What is wrong with a file that the job reads, None if nothing is."""
    for key, path in files_to_read(job):
        if problem := _what_is_wrong(path, _exists, may_be_folder=key[0] != "input"):
            kind = ModelError if key[0] == "input" else DataError
            return kind(problem, str(path), _similar_name(path))
    return None


def files_to_read(job: Job) -> Iterator[tuple[tuple[str, ...], Location]]:
    """The files and folders that the job reads, each with its key in the manifest."""
    yield ("input",), job.input
    for section, spec in (("calibration", job.calibration), ("evaluation", job.evaluation)):
        for key, path in spec.files() if spec else ():
            yield (section, key), location(path)


def _what_is_wrong(
    path: Location, exists: Callable[[Location], bool], may_be_folder: bool
) -> str | None:
    if isinstance(path, Url):
        return _what_is_wrong_in_store(path, may_be_folder)
    if exists(path):
        return "is a folder, not a file" if not may_be_folder and _is_folder(path) else None
    if os.path.lexists(path):
        return "is a link to nothing" if path.is_symlink() else "is no regular file"
    return "no such file"


def _what_is_wrong_in_store(url: Url, may_be_folder: bool) -> str | None:
    try:
        is_folder = the_cache().stat(url).is_folder
    except OSError as problem:
        return problem.strerror or str(problem)
    return "is a folder, not a file" if is_folder and not may_be_folder else None


def _output_mistakes(placed_jobs: Sequence[tuple[Place, Job]]) -> Iterator[Mistake]:
    """Outputs that would replace an input or another output."""
    inputs = {_file_key(job.input) for _, job in placed_jobs}
    place_of_output: dict[str, tuple[Place, Job]] = {}
    for place, job in placed_jobs:
        output = _file_key(job.output)
        if output in inputs:
            hint = "Originals are never overwritten: name another file"
            yield Mistake((*place, "output"), f"is also an input: {job.output}", hint)
        first_place, first = place_of_output.setdefault(output, (place, job))
        if first is not job:
            problem = f"is also the output of {format_place(first_place)}: {job.output}"
            if first_place == place:  # both were found by input_dir
                problem = f"is the output of both {first.input} and {job.input}: {job.output}"
            yield Mistake((*place, "output"), problem, "Name another file")
        if _is_folder(job.output):
            problem = f"is a folder: {job.output}"
            yield Mistake((*place, "output"), problem, "Name a file, ending in .onnx")


def _copies(
    batch: Mapping[str, Any], placed_jobs: Sequence[tuple[Place, Job]], folder: Path
) -> tuple[tuple[tuple[Path, Path], ...], list[Mistake]]:
    """What belongs beside the outputs of a layout; and originals that would be replaced."""
    if not (batch.get("layout") and batch.get("input_dir") and batch.get("output_dir")):
        return (), []
    root, output_dir = (_absolute(folder, batch[key]) for key in ("input_dir", "output_dir"))
    if isinstance(root, Url) or isinstance(output_dir, Url):
        problem = "takes local folders, not URLs"
        return (), [Mistake(("batch", "layout"), problem, "Fetch the folder first")]
    place = ("batch", "input_dir")
    jobs = [job for found_at, job in placed_jobs if found_at == place]
    bits_of = {job.output: job.config.bits for job in jobs if isinstance(job.output, Path)}
    second = [(path, huggingface.second_name(path, bits)) for path, bits in bits_of.items()]
    names = [(source, target) for source, target in second if target is not None]
    mistakes = []
    for path in (*bits_of, *(target for _, target in names)):
        if _exists(path) and path.is_relative_to(root) and not is_output(path):
            hint = "Originals are never overwritten: name another folder"
            mistakes.append(Mistake(("batch", "output_dir"), f"holds {path} already", hint))
    others = huggingface.other_files(root, output_dir) if _is_folder(root) else []
    return (*others, *names), mistakes


def _file_key(path: Location) -> str:
    """Equal for two paths that may be one file: through links, or where letter case is ignored."""
    if isinstance(path, Url):
        return str(path)
    return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()


def _real(path: Location) -> str:
    return str(path) if isinstance(path, Url) else os.path.realpath(path)


def _costs_mistakes(costs: Path | None) -> Iterator[Mistake]:
    """Why the table of costs cannot be used."""
    if costs is None:
        return
    # It imports onnxruntime, and hardly any manifest names such a table.
    from quant_core.evaluate.timing_cache import TimingCache

    try:
        TimingCache(costs)
    except RequestError as error:
        yield Mistake(("batch", "costs"), f"{error.problem}: {costs}", error.hint)


def _exists(path: Location) -> bool:
    """Whether there is such a local file or folder; a pipe or a device is neither."""
    try:
        assert isinstance(path, Path)
        return path.is_file() or path.is_dir()
    except OSError:  # the name is too long, or its folder must not be entered
        return False


def _is_folder(path: Location) -> bool:
    """Whether there is a local folder. In most stores a file may have the name of one."""
    try:
        return isinstance(path, Path) and path.is_dir()
    except OSError:
        return False


def _names_in(folder: Location) -> list[str]:
    """Raises: OSError if there is no such folder."""
    inside = folder.iterdir() if isinstance(folder, Path) else listing(folder)
    return [entry.name for entry in inside]


def _similar_name(path: Location, names_in: Callable[[Location], list[str]] = _names_in) -> str:
    """A hint: the file in the same folder whose name is nearly the same, if there is one.

    names_in  the names in a folder; one that remembers, where many files are looked at
    """
    try:
        names = names_in(path.parent)
    except OSError:
        return f"There is no folder {path.parent}"
    few = names if len(names) <= MOST_NAMES else []
    near = difflib.get_close_matches(path.name, few, 1)
    return f"Did you mean {near[0]}?" if near else "Paths start at the manifest's folder"


def _rejection(mistakes: Sequence[Mistake], where: str) -> RequestError:
    lines = list(dict.fromkeys(map(str, mistakes)))  # a shared section's mistake shows only once
    count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
    return RequestError("\n  ".join([count + ":", *lines]), where, "Nothing was started")
