"""Where a stage runs: on a Dask worker, in that worker's killable child, with the limits of the batch."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quant_core.child import STAGE_MODULE, InterruptedStage, run_stage
from quant_core.errors import QuantError, StageError

if TYPE_CHECKING:
    from distributed import Client


class Workers:
    """A Dask client, and what a stage may use there. Not a dataclass: Prefect would look for futures inside it."""

    def __init__(self, client: Client, timeout_s: float, memory_bytes: int | None, module: str = STAGE_MODULE) -> None:
        self.client, self.timeout_s, self.memory_bytes = client, timeout_s, memory_bytes
        self.module = module

    def run(self, stage: str, request: Mapping[str, Any], alone: bool = False) -> dict[str, Any]:
        """What `quant_core.child.run_stage` returns. Raises: as it does; InterruptedStage if the worker was lost."""
        return self.run_all(stage, [request], alone)[0]

    def run_all(self, stage: str, requests: Sequence[Mapping[str, Any]], alone: bool = False) -> list[dict[str, Any]]:
        """One stage several times, on as many workers as are free."""
        futures = [
            self.client.submit(
                run_stage,
                stage,
                dict(request),
                timeout_s=self.timeout_s,
                memory_bytes=self.memory_bytes,
                alone=alone,
                module=self.module,
                key=f"{stage}-{uuid.uuid4().hex}",
            )
            for request in requests
        ]
        try:
            return [future.result() for future in futures]
        except QuantError:
            raise
        except (Exception, asyncio.CancelledError) as problem:
            raise _told(problem, stage) from problem
        finally:
            self.client.cancel([f for f in futures if not f.done()])  # type: ignore[no-untyped-call]

    def count(self) -> int:
        return max(1, len(self.client.scheduler_info(n_workers=-1)["workers"]))


def is_transient(task: object, run: object, state: Any) -> bool:
    """Trying again makes sense: a worker or a child was lost, or something was busy. Prefect's retry condition."""
    try:
        state.result()
    except InterruptedStage:
        return True
    except BaseException:
        return False
    return False


def _told(problem: BaseException, stage: str) -> StageError:
    """An exception of Dask's own in our words."""
    from distributed.client import FutureCancelledError
    from distributed.scheduler import KilledWorker

    where = f"stage {stage}"
    if isinstance(problem, KilledWorker):
        # A scheduler of ours gives up at once, and Prefect tries again; another may have tried often enough.
        kind = InterruptedStage if problem.allowed_failures == 0 else StageError
        return kind("its Dask worker died", where, "The model may be what kills it: try it alone, with more memory")
    if isinstance(problem, (FutureCancelledError, asyncio.CancelledError, OSError, TimeoutError)):
        return InterruptedStage("the Dask scheduler was lost", where, "Is the cluster still running?")
    return StageError(f"{type(problem).__name__}: {problem}", where, "The worker failed, not the stage: same versions?")
