"""Which of the options that were typed mean nothing, alone or beside others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flows.cli.groups import AccuracyOptions
from flows.console.flags import flag
from quant_core.config import QuantConfig
from quant_core.data.spec import SampleSpec
from quant_core.errors import RequestError
from quant_core.metrics import find_metric


def refuse_beside(option: str, others: Mapping[str, object]) -> None:
    """Raises: RequestError if one of the other options was typed, which would do nothing."""
    for other, value in others.items():
        if value:
            raise RequestError(f"means nothing with {option}", other, "Leave one of them out")


def check_labels(accuracy: AccuracyOptions, samples: SampleSpec) -> None:
    """Raises: RequestError if the metric needs labels, and the samples have none."""
    metric = accuracy.contract.metric if accuracy.contract else accuracy.metric
    if metric is not None and find_metric(metric).needs_labels and samples.labels is None:
        hint = "Give --labels, or take agreement or cosine"
        raise RequestError("needs labels", f"--metric {metric}", hint)


def changed_options(config: QuantConfig) -> dict[str, Any]:
    """The options that differ from the defaults, as a manifest has them."""
    default = QuantConfig().to_dict()
    return {key: value for key, value in config.to_dict().items() if value != default[key]}


def first_accuracy_option(accuracy: AccuracyOptions) -> str | None:
    """The first of `--metric`, `--max-drop` and `--min` that was typed; None if none was."""
    contract = accuracy.contract
    typed = {
        "--metric": accuracy.metric,
        "--max-drop": contract and contract.max_drop,
        "--min": contract and contract.min,
    }
    return next((option for option, value in typed.items() if value is not None), None)


def first_measured_option(config: QuantConfig) -> str | None:
    """The first option that was typed of those that do nothing without samples: how ranges are
    chosen, and GPTQ; None if none was.
    """
    changed = changed_options(config)
    measured = {"method", "percentile"} | (
        {"weight_method"} if config.weight_method == "gptq" else set()
    )
    return next((flag(key) for key in changed if key in measured), None)
