"""`quantmill quantize --export openvino`: the same model in OpenVINO's own files, checked there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from flows.cli.command import Answer
from quant_core.config import QuantConfig
from quant_core.data.spec import SampleSpec
from quant_core.errors import RequestError

EXPORT_SAMPLES = 8  # on which an export is compared with what it was made of


def for_export(export: str, config: QuantConfig, plan: Path | None) -> QuantConfig:
    """The config for the runtime of an export. Raises: RequestError if it is for another one, or
    the runtime is not installed.
    """
    from flows.runtime.openvino_ir import check_openvino

    check_openvino()
    if plan is not None or config.target == export:
        return config
    if config.target != "auto":
        hint = f"Leave it out, or write --target {export}"
        raise RequestError(f"is {config.target}, and --export {export}", "--target", hint)
    return replace(config, target=export)


def check_export(output: Path) -> None:
    """Raises: RequestError if the export of that model would replace a file of somebody else's."""
    from flows.runtime.openvino_ir import weights_beside

    weights_beside(output.with_suffix(".xml"))


def with_export(answer: Answer, original: Path, calibration: SampleSpec | None) -> Answer:
    """The answer, with OpenVINO's files beside the model, and what OpenVINO makes of them.

    The exit code is 1 if they are wrong, slow or not in integers there.
    """
    from flows.runtime.openvino_ir import export_ir
    from quant_core.data.for_model import samples_for

    result = dict(answer.data)
    output = Path(result["output"])
    spec = replace(calibration or SampleSpec(), labels=None, count=EXPORT_SAMPLES)
    samples = samples_for(original, spec, original, output)
    feeds = [samples[i] for i in range(len(samples))]
    found = export_ir(original, output, output.with_suffix(".xml"), feeds).to_dict()
    code = max(answer.exit_code, int(bool(found["note"])))
    return replace(answer, data=result | {"export": found}, exit_code=code)
