"""What a search judges, noted."""

from __future__ import annotations

import pytest

from quant_core.search.bench import Bench


@pytest.fixture
def judged(monkeypatch) -> list[str]:
    """Labels of the candidates that were judged."""
    labels: list[str] = []

    def counted(method):
        judge = getattr(Bench, method)

        def counting(bench, candidate):
            labels.append(candidate.label)
            return judge(bench, candidate)

        return counting

    for method in ("judge", "judge_fidelity"):
        monkeypatch.setattr(Bench, method, counted(method))
    return labels
