"""The child in which damaged models are opened, in every way that quantmill opens one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quant_core import graph
from quant_core.child import serve
from quant_core.info import model_info
from quant_core.proof import saturating_nodes
from quant_core.samples import input_specs


def load(path: str) -> dict[str, Any]:
    info = model_info(path)
    graph.normalize(graph.load(path))
    saturating_nodes(Path(path))
    return {"nodes": info.num_nodes, "inputs": len(input_specs(Path(path)))}


if __name__ == "__main__":
    serve({"load": load})
