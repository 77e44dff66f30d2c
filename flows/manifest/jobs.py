"""What a manifest requests, as data: which models are made, from what, how they are judged and how
they run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from quant_core.config import Contract, QuantConfig
from quant_core.data.spec import SampleSpec
from quant_core.errors import RequestError
from quant_core.text import digest_of
from tasks.locations import Location, Url, location
from tasks.rows import model_label

Copy = tuple[Location, Location]  # a file, and where it belongs as well

RANDOM_JUDGES = 8  # not tuned: what was made has been checked on random samples already


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
    def label(self) -> str:
        """The name with that of the output, for people."""
        return model_label(self.name, self.output.name)

    @property
    def judged_by(self) -> SampleSpec:
        """The samples that the result is judged by: a few random ones if no others are given."""
        return self.evaluation or self.calibration or SampleSpec(count=RANDOM_JUDGES)

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
    copies: tuple[Copy, ...] = ()
    workers: int | None = None
    limits: Limits = Limits()
    benchmark: Benchmark = Benchmark()
    file: Path | None = field(default=None, compare=False)

    def digest(self) -> str:
        """Manifests that request the same have the same digest, wherever they lie."""
        requested = {f.name: getattr(self, f.name) for f in fields(self)} | {
            "jobs": [job.to_dict() for job in self.jobs],
            "file": None,
            "limits": asdict(self.limits),
            "benchmark": asdict(self.benchmark),
        }
        return digest_of(json.dumps(requested, sort_keys=True, default=str).encode())


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
