"""What a worker can be asked to do: each stage takes JSON values and paths, and returns JSON values.

`python -m quant_core.worker.stages` serves them (child.py). Samples are given as `SampleSpec.to_dict` writes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from quant_core import api
from quant_core.calibrate.observe import Statistics, observe
from quant_core.config import Contract, QuantConfig
from quant_core.data.samples import Samples, input_specs, open_samples
from quant_core.data.spec import SampleSpec
from quant_core.evaluate.node_noise import measure_noise
from quant_core.evaluate.sensitivity import NodeNoise, sensitivities
from quant_core.evaluate.timing_cache import TimingCache
from quant_core.model import graph
from quant_core.model.info import model_info
from quant_core.model.prepare import prepare as prepare_model
from quant_core.model.write import write_model
from quant_core.plan.types import QuantPlan
from quant_core.worker.child import serve

Row = dict[str, Any]


def prepare(model: str, folder: str, config: Row, samples: Row | None) -> Row:
    """Writes prepared.onnx and plan.json into `folder`, and says what the model is and what is planned."""
    feeds = _open(model, samples) if samples else None
    prepared = prepare_model(model, api.some(feeds))
    plan = api.first_plan(prepared, QuantConfig.from_dict(config), measured=feeds is not None)
    path = Path(folder, "prepared.onnx")
    write_model(prepared, path)
    Path(folder, "plan.json").write_text(plan.to_json(), encoding="utf-8")
    return {"info": model_info(model).to_dict(), "prepared": str(path), "plan": plan.to_dict()}


def calibrate(prepared: str, plan: str, samples: Row, shard: tuple[int, int], out: str) -> Row:
    """Writes the statistics of one shard of the samples to `out`."""
    started = time.perf_counter()
    mine = _open(prepared, samples).shard(*shard)
    observe(Path(prepared), _plan(plan), mine).save(out)
    return {"samples": len(mine), "seconds": time.perf_counter() - started}


def quantize(
    model: str, prepared: str, plan: str, stats: list[str], samples: Row | None, config: Row, contract: Row | None,
    evaluation: Row | None, output: str, costs: str | None = None,
) -> Row:  # fmt: skip
    """Writes the best model to `output`; judged by the evaluation samples, else by those of calibration.

    What is timed for that is looked up in the file `costs`, and added to it.
    """
    wide = _plan(plan)
    measured = Statistics.merged(Statistics.load(path) for path in stats) if stats else None
    feeds = _open(model, samples) if samples else None
    judged = _open(model, evaluation) if evaluation else feeds
    held_to = Contract.from_dict(contract) if contract else None
    ready = graph.normalize(graph.load(prepared))
    made = api.check_output(model, output)
    timed = TimingCache(costs)
    return api.finish(
        ready, model, made, wide, measured, feeds, judged, held_to, detailed=False, costs=timed
    ).to_dict()


def validate(
    model: str,
    quantized: str,
    samples: Row,
    contract: Row | None,
    metric: str | None,
    prepared: str | None,
) -> Row:
    """How right the quantized model is, and what each node costs if the prepared model is given."""
    held_to = Contract.from_dict(contract) if contract else None
    feeds = _open(model, samples)
    found = api.validate_model(model, quantized, feeds, metric=metric, contract=held_to).to_dict()
    if prepared is not None:
        noises = _measure_noise(prepared, quantized, feeds)
        found |= {"damage": [asdict(row) for row in sensitivities([noises])]}
    return found | {"detailed": prepared is not None}


def sensitivity(prepared: str, quantized: str, samples: Row, shard: tuple[int, int]) -> Row:
    """The noise of each node on one shard of a few samples, to be merged by `sensitivities`."""
    noises = _measure_noise(prepared, quantized, _open(prepared, samples), shard)
    return {"noise": [noise.to_dict() for noise in noises]}


def benchmark(model: str, quantized: str, samples: Row | None, threads: int, seconds: float) -> Row:
    """How fast the quantized model is beside its original."""
    spec = SampleSpec.from_dict(samples or {})
    feeds = open_samples(replace(spec, count=1, labels=None), input_specs(Path(model)))
    return {
        "timing": api.benchmark_model(
            model, quantized, feeds, threads=threads, seconds=seconds
        ).to_dict()
    }


STAGES: dict[str, Callable[..., Row]] = {
    "prepare": prepare, "calibrate": calibrate, "quantize": quantize, "validate": validate,
    "sensitivity": sensitivity, "benchmark": benchmark,
}  # fmt: skip


def _open(model: str, samples: Row) -> Samples:
    """The samples of a request, for the model in that file."""
    return open_samples(SampleSpec.from_dict(samples), input_specs(Path(model)))


def _measure_noise(
    prepared: str, quantized: str, samples: Samples, shard: tuple[int, int] = (0, 1)
) -> list[NodeNoise]:
    few = samples.subsample(api.DAMAGE_FEEDS)
    mine = few.shard(*shard) if shard[0] < len(few) else ()
    return measure_noise(graph.normalize(graph.load(prepared)), graph.load(quantized), mine)


def _plan(path: str) -> QuantPlan:
    return QuantPlan.from_json(Path(path).read_text(encoding="utf-8"))


if __name__ == "__main__":
    serve(STAGES)
