"""How a batch or an audit is run, whatever it works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.runtime.prefect_api import Prefect


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What the caller of a run decides, while a manifest says what is made.

    scheduler   address of a Dask cluster; None: workers on this host
    jobs        how many workers on this host; None: what fits
    only        globs over the names of models; without any, all
    force       whether a batch makes again what is up to date
    allow_code  the folder of metrics `module:function`; None: none may run
    prefect     whose server and settings are used
    """

    scheduler: str | None = None
    jobs: int | None = None
    only: Sequence[str] = ()
    force: bool = False
    allow_code: str | Path | None = None
    prefect: Prefect = Prefect.OWN

    @property
    def code(self) -> str | None:
        """`allow_code` as an absolute path, which a worker elsewhere understands too."""
        return None if self.allow_code is None else str(Path(self.allow_code).absolute())


DEFAULT_OPTIONS = RunOptions()
