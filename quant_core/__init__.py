"""The core: float ONNX models become INT8 and INT4 models that onnxruntime runs in integers.

import quant_core
quant_core.quantize_with_calibration("model.onnx", "model_int8.onnx", "calibration.npz")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quant_core.answers import Compared as Compared
    from quant_core.answers import Explanation as Explanation
    from quant_core.answers import OptimizeResult as OptimizeResult
    from quant_core.answers import Validation as Validation
    from quant_core.api import optimize_model as optimize_model
    from quant_core.api import plan_model as plan_model
    from quant_core.api import quantize as quantize
    from quant_core.api import quantize_model as quantize_model
    from quant_core.api import quantize_with_calibration as quantize_with_calibration
    from quant_core.config import Contract as Contract
    from quant_core.config import QuantConfig as QuantConfig
    from quant_core.data.spec import SampleSpec as SampleSpec
    from quant_core.errors import QuantError as QuantError
    from quant_core.judging import benchmark_model as benchmark_model
    from quant_core.judging import compare_models as compare_models
    from quant_core.judging import explain_model as explain_model
    from quant_core.judging import validate_model as validate_model
    from quant_core.model.info import model_info as model_info
    from quant_core.search.result import QuantResult as QuantResult

__version__ = "0.1.0"

# Module -> the names that it defines for the users of the package.
PUBLIC = {
    "api": (
        "optimize_model",
        "plan_model",
        "quantize",
        "quantize_model",
        "quantize_with_calibration",
    ),
    "judging": ("benchmark_model", "compare_models", "explain_model", "validate_model"),
    "answers": ("Compared", "Explanation", "OptimizeResult", "Validation"),
    "config": ("Contract", "QuantConfig"),
    "data.spec": ("SampleSpec",),
    "errors": ("QuantError",),
    "model.info": ("model_info",),
    "search.result": ("QuantResult",),
}


def __getattr__(name: str) -> Any:
    """A public name, imported at first use: `import quant_core` waits for no onnxruntime."""
    for home, names in PUBLIC.items():
        if name in names:
            return getattr(import_module(f"quant_core.{home}"), name)
    raise AttributeError(f"module quant_core has no attribute {name}")


def __dir__() -> list[str]:
    """Interactive shells complete the public names, though none is imported yet."""
    return sorted({*globals(), *(name for names in PUBLIC.values() for name in names)})
