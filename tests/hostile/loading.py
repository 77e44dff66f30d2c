"""The child in which damaged models are opened, in every way that quantmill opens one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quant_core.data.inputs import input_specs
from quant_core.evaluate.saturation_check import saturating_nodes
from quant_core.model.info import model_info
from quant_core.model.normalize import load_normalized
from quant_core.worker.child_main import serve


def load(path: str) -> dict[str, Any]:
    info = model_info(path)
    saturating_nodes(load_normalized(path))
    return {"nodes": info.num_nodes, "inputs": len(input_specs(Path(path)))}


if __name__ == "__main__":
    serve({"load": load})
