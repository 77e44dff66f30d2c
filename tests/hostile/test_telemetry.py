"""Prefect sends no telemetry, neither from a batch nor from a deployment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_telemetry_is_off_in_a_deployment_too():
    program = (
        "import flows.batch.flow;"
        "from prefect._internal.analytics.enabled import is_telemetry_enabled;"
        "from prefect.settings import get_current_settings;"
        "print(is_telemetry_enabled(), get_current_settings().server.analytics_enabled)"
    )
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "DO_NOT", "CI"))
    }

    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.split() == ["False", "False"]
