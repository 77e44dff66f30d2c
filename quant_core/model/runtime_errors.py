"""What onnxruntime's messages mean, and what to do about them."""

from __future__ import annotations

import re

from quant_core.errors import ModelError

CUSTOM_OPERATORS = "Custom operators are never loaded: use standard ones"

# Pattern of onnxruntime's message -> what to do about it; the first match counts.
HINTS = (
    (
        r"No graph was found|does not have a graph|[Pp]rotobuf parsing failed",
        "Not an ONNX model, or cut short: export or copy it again",
    ),
    (
        r"[Ee]xternal data|model_path must not be empty",
        "Its weights lie in another file: keep it in the model's folder",
    ),
    (
        r"Cast\(21\)|tensor\(u?int4\)|tensor type 2[12] "
        r"|(GatherBlockQuantized|MatMulNBits)\(.*not a registered",
        "4-bit weights need onnxruntime 1.23 or newer: update it, or quantize to 8 bits",
    ),
    (
        r"Unsupported model IR version",
        "Update onnxruntime, or save the model with an older IR version",
    ),
    (
        r"Opset \d+ is under development",
        "Convert the model to an opset that this onnxruntime knows",
    ),
    (
        r"is not a registered function/op|No Op registered for|No opset import",
        CUSTOM_OPERATORS,
    ),
    (
        r"NOT_IMPLEMENTED|Could not find an implementation",
        "No CPU kernel for this type: export in float32",
    ),
    (
        r"Type Error|Type parameter|acyclic|[Ii]nvalid model",
        "The graph is wrong: onnx.checker.check_model says more",
    ),
    (r"[Ff]ailed to allocate|bad allocation", "Out of memory: use fewer jobs or a larger machine"),
)


class CustomOperatorError(ModelError):
    """The model has operators that onnxruntime does not know, as a tokenizer's."""


def loading_error(error: Exception, where: str) -> ModelError:
    """The error for a model that onnxruntime refused to load with this one."""
    hints = (hint for pattern, hint in HINTS if re.search(pattern, str(error)))
    hint = next(hints, "Does it load in onnxruntime?")
    kind = CustomOperatorError if hint == CUSTOM_OPERATORS else ModelError
    return kind(f"onnxruntime cannot load it: {short_message(error)}", where, hint)


def short_message(error: Exception) -> str:
    """onnxruntime's message on one line, without prefixes, source lines and C++ signatures."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed:", "", text)
    text = re.sub(r"/onnxruntime_src/\S+:\d+ (?:.*?\) )?", "", text)
    return text if len(text) <= 300 else f"{text[:300]}..."
