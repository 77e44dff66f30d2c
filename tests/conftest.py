"""What holds for all tests."""

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings

from quant_core import judging
from quant_core.evaluate.timing import Timing
from quant_core.search import bench, matmul_costs, node_costs, possible_gain, prepared
from quant_core.worker.memory import usable_cores

# No test asserts a time, so neither may hypothesis, whose examples have 200 ms each by default.
settings.register_profile("quantmill", deadline=None)
settings.load_profile("quantmill")

# What tests start need not compile our modules again, even where this process keeps none compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_xdist_auto_num_workers() -> int:
    """One process more than cores: a fifth of the suite waits for servers and batches to start."""
    return usable_cores() + 1


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What tests fetch from stores does not land in the user's cache."""
    os.environ["QUANTMILL_CACHE"] = str(tmp_path_factory.mktemp("stores"))


SHORT_S = 0.02
TIMED = (
    *((module, "measure") for module in (bench, matmul_costs, prepared, judging)),
    *((module, "profile_kernels") for module in (node_costs, possible_gain)),
)


@pytest.fixture(scope="session", autouse=True)
def _short_races():
    """Races take as long as a few rounds of a tiny model do: no test depends on who wins one."""

    def shortened(time_it: Callable[..., Any]) -> Callable[..., Any]:
        def in_short(*models: Any, seconds: float, **options: Any) -> Any:
            return time_it(*models, seconds=min(seconds, SHORT_S), **options)

        return in_short

    with pytest.MonkeyPatch.context() as patch:
        for module, name in TIMED:
            patch.setattr(module, name, shortened(getattr(module, name)))
        yield


@pytest.fixture
def equal_times(monkeypatch):
    """A clock for which everything takes as long as float, so that no race decides."""
    as_float = Timing(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 5, 1)
    for module in (bench, matmul_costs, prepared):
        monkeypatch.setattr(module, "measure", lambda *_, **__: as_float)
