"""From valid values of a manifest to jobs: defaults are merged, paths made absolute."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path, PurePath
from typing import Any

from flows.manifest import huggingface
from flows.manifest.jobs import Job
from flows.manifest.mistakes import Mistake, Place
from flows.manifest.models import Entry, find_models
from flows.manifest.outputs import original_of, output_test
from flows.manifest.paths import absolute, below
from quant_core.config import Contract, QuantConfig
from quant_core.data.spec import RANDOM, SampleSpec
from quant_core.errors import QuantError, RequestError
from quant_core.metrics import find_metric
from tasks.locations import Location, Url


def make_jobs(
    values: Mapping[str, Any], folder: Path
) -> tuple[list[tuple[Place, Job]], list[Mistake]]:
    """A job for every model that `values` names, with its place in the manifest; and mistakes."""
    batch = values.get("batch") or {}
    output_dir = absolute(folder, batch["output_dir"]) if batch.get("output_dir") else None
    entries, mistakes = find_models(values, folder)
    stems = Counter(path.stem for path in {entry.input for entry in entries})
    jobs: list[tuple[Place, Job]] = []
    for entry in entries:
        has_own_stem = stems[entry.input.stem] == 1
        try:
            jobs.append((entry.place, _job(values, entry, folder, output_dir, has_own_stem)))
        except RequestError as error:
            key = error.where.split(".")
            # what a folder's models have in common stands at the top
            is_common = entry.root is not None and key[0] in values
            place = (*key,) if is_common else (*entry.place, *key)
            mistakes.append(Mistake(place, error.problem, error.hint))
    # A folder that holds both originals and outputs: outputs are no originals, neither of this
    # manifest, nor of an earlier run, nor of `quantize`. A float model with the name of an output
    # is an original.
    inputs, outputs = {job.input for _, job in jobs}, {job.output for _, job in jobs}
    made_by_batches = output_test()

    def was_made(path: Location) -> bool:
        is_called_so = path in outputs or original_of(path) in inputs
        return made_by_batches(path) or (is_called_so and not _is_float(path))

    originals = [
        (place, job) for place, job in jobs if place[0] == "models" or not was_made(job.input)
    ]
    if jobs and not originals and not mistakes:
        problem = "holds only what batches have made"
        mistakes.append(Mistake(("batch", "input_dir"), problem, "List them under `models`"))
    return originals, mistakes


def _is_float(path: Location) -> bool:
    """Whether a local file is a model without integers; those in stores are not looked into."""
    if isinstance(path, Url):
        return False
    from quant_core.model.info import model_info  # it imports onnx, and is hardly ever needed

    try:
        return not model_info(path).quantized
    except QuantError:
        return False


def _job(
    values: Mapping[str, Any],
    entry: Entry,
    folder: Path,
    output_dir: Location | None,
    has_own_stem: bool,
) -> Job:
    """The entry's job: each option is the model's own, or else the manifest's.

    Raises: RequestError, whose `where` is a key of the entry.
    """
    options = {**present(values), **present(entry.options)}
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
        contract=Contract.from_dict(present(promise)) if promise else None,
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


def _longer_name(entry: Entry) -> str:
    """The name of a model whose stem others have too: with the folders that tell them apart."""
    parts = below(entry.input, entry.root).parts if entry.root else entry.input.parts[-2:]
    return str(PurePath(*parts).with_suffix(""))


def _output_path(
    entry: Entry, config: QuantConfig, folder: Path, output_dir: Location | None
) -> Location:
    """The file to write.

    Raises: RequestError if none is named, or a link leads out of `output_dir`.
    """
    if entry.options.get("output"):
        return absolute(folder, entry.options["output"])
    if output_dir is None:
        hint = "Name the file to write, or give batch.output_dir"
        raise RequestError("is missing", "output", hint)
    if entry.graph is not None:
        name = huggingface.output_name(entry.input.name, config.bits)
        output = output_dir / entry.graph.place / name
    else:
        place = below(entry.input, entry.root).parent if entry.root else PurePath()
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
    options = {**present(default), **present(own)}
    if not options:
        return None
    source, labels = options.get("data", RANDOM), options.get("labels")
    if source != RANDOM:
        source = str(absolute(folder, source.replace("{name}", stem)))
    if labels:
        labels = str(absolute(folder, labels.replace("{name}", stem)))
    return SampleSpec(
        source=source,
        labels=labels or None,
        count=options.get("num_samples"),
        shape=options.get("shape"),
        seed=options.get("seed", 0),
    )


def present(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """The values that are not None."""
    return {key: value for key, value in (values or {}).items() if value is not None}
