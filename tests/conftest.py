"""What holds for all tests."""

import os

import pytest
from hypothesis import settings

# No test asserts a time, so neither may hypothesis, whose examples have 200 ms each by default.
settings.register_profile("quantmill", deadline=None)
settings.load_profile("quantmill")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What tests fetch from stores does not land in the user's cache."""
    os.environ["QUANTMILL_CACHE"] = str(tmp_path_factory.mktemp("stores"))
