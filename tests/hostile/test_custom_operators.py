"""No library of custom operators is ever loaded: a model that needs one is refused, in words."""

from __future__ import annotations

import onnx
import pytest
from onnx import helper

from quant_core.errors import ModelError
from quant_core.model.session import open_session
from tests.models import one_graph


def test_an_operator_of_a_library_is_refused(tmp_path):
    model = one_graph([helper.make_node("Evil", ["x"], ["y"], "evil", domain="evil.so")], {})
    model.opset_import.append(helper.make_opsetid("evil.so", 1))
    onnx.save(model, tmp_path / "m.onnx")

    with pytest.raises(ModelError, match="Custom operators are never loaded"):
        open_session(tmp_path / "m.onnx")
