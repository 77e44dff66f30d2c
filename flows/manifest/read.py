"""From a manifest, a file or values, to its jobs: checked as a whole, and all its mistakes are
reported at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flows.manifest.files import copies_beside, costs_mistakes, file_mistakes, output_mistakes
from flows.manifest.jobs import Benchmark, Limits, Manifest
from flows.manifest.make import make_jobs, present
from flows.manifest.mistakes import Mistake
from flows.manifest.parse import read_values
from flows.manifest.paths import absolute, local
from flows.manifest.schema import schema_mistakes
from quant_core.errors import RequestError
from quant_core.text import counted
from tasks.locations import Location, Url

MOST_SHOWN = 20  # mistakes: one in a glob or a generated list is often made for every model


def read_manifest(path: str | Path) -> Manifest:
    """The manifest in that YAML or TOML file. Raises: RequestError that lists its mistakes."""
    path = Path(path)
    manifest = check_manifest(read_values(path), path.absolute().parent, str(path))
    return replace(manifest, file=path.absolute())


def check_manifest(values: object, folder: Path, where: str = "manifest") -> Manifest:
    """The manifest with these values. Its paths are relative to `folder`.

    Raises: RequestError that lists the mistakes, those of the schema and those of meaning; of many
        the first ones, and how many there are.
    """
    if not isinstance(values, Mapping):
        hint = "Start with `models:` or `batch:`"
        raise RequestError("is not a mapping of keys to values", where, hint)
    mistakes = schema_mistakes(values)
    values = _without_mistakes(values, mistakes)
    batch: Mapping[str, Any] = values.get("batch") or {}
    placed_jobs, meaning_mistakes = make_jobs(values, folder)
    costs = local(folder, batch["costs"]) if batch.get("costs") else None
    # A mistake outside `models` may change what every model means, so mistakes of meaning would
    # only mislead. Files are checked all the same: a file is there or it is not.
    if all(mistake.place[:1] == ("models",) for mistake in mistakes):
        mistakes += meaning_mistakes
    copies, copy_mistakes = copies_beside(batch, placed_jobs, folder)
    mistakes += output_mistakes(placed_jobs)
    mistakes += copy_mistakes
    mistakes += costs_mistakes(costs)
    # A file that is missing fails its models alone, unless that would leave none to make.
    unreadable = file_mistakes(placed_jobs)
    if mistakes or len({mistake.place[:2] for mistake in unreadable}) == len(placed_jobs):
        mistakes += unreadable
    if mistakes:
        raise _rejection(mistakes, where)
    jobs = tuple(job for _, job in placed_jobs)
    output_dir = batch.get("output_dir")
    outputs = absolute(folder, output_dir) if output_dir else jobs[0].output.parent
    switches = ("skip_existing", "continue_on_error", "keep_cache")
    return Manifest(
        jobs=jobs,
        folder=_run_folder(folder, batch.get("work_dir"), outputs),
        store=outputs if isinstance(outputs, Url) else None,
        workers=batch.get("jobs"),
        costs=costs,
        copies=copies,
        limits=Limits(**present(values.get("limits"))),
        benchmark=Benchmark(**present(values.get("benchmark"))),
        **present({key: batch.get(key) for key in switches}),
    )


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


def _run_folder(folder: Path, named: str | None, outputs: Location) -> Path:
    """The local folder of the journal and the reports.

    Outputs in a store have one that is called like their URL, beside the manifest.
    """
    if named:
        return local(folder, named)
    if isinstance(outputs, Path):
        return outputs
    return folder.joinpath("quantmill", outputs.scheme, *outputs.parts)


def _rejection(mistakes: Sequence[Mistake], where: str) -> RequestError:
    lines = list(dict.fromkeys(map(str, mistakes)))  # a shared section's mistake shows only once
    shown = lines[:MOST_SHOWN]
    if len(lines) > MOST_SHOWN:
        shown.append(f"and {len(lines) - MOST_SHOWN} more")
    heading = f"{counted(len(lines), 'mistake')}:"
    return RequestError("\n  ".join([heading, *shown]), where, "Nothing was started")
