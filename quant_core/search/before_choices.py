"""What is searched and judged of a model that ends in a choice among its results: all before it.

    boxes, scores ──> TopK or NonMaxSuppression ──> Gather ──> outputs
    └ what is judged

Where results are close to one another, the smallest noise changes which of them come first, and in
which order: an output then has other boxes in its rows, whatever became of the weights. A detector
on an image that shows nothing is such a case, and float itself does not repeat it.

1. Nodes that choose, and all behind them, are left out; what they read is an output in their place.
2. Nothing is left out if float weights of any size are behind a choice, as those of a mixture of
   experts are, also where they pass through nodes of their own on their way there: then it is no
   end of the model. Nor with labels or a contract: these are on outputs.
3. What was found is made of the whole model: nodes behind a choice stay in float.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from quant_core.model import files
from quant_core.model.choices import LEAST_SHARE, behind_choices, inside_of, read_by
from quant_core.model.unused import drop_unused
from quant_core.model.write import write_model
from quant_core.plan.make import replan
from quant_core.plan.types import IN_FLOAT, IN_FLOAT32, NodeChoice, QuantPlan
from quant_core.search.calibrated import calibrated_as_planned, remade
from quant_core.search.job import QuantJob
from quant_core.search.result import Made
from quant_core.text import joined

BEHIND = "behind a choice among results"
JUDGED = "judged by what the model chooses from at its end, not by what it chooses"


def made_before_choices(job: QuantJob, make: Callable[[QuantJob], Made]) -> Made:
    """What is made of the job, or else of its model without the choice at its end."""
    behind = _behind_choices(job)
    if not behind:
        return make(job)
    model = _without(job.model, behind)
    before = tuple(n for n in job.plan.nodes if n.node not in behind)
    plan = _planned_for(model, replace(job.plan, nodes=before), {})
    with TemporaryDirectory(prefix="quantmill-") as folder:
        original = Path(folder, job.original.name)
        write_model(model, original)
        made = make(replace(job, model=model, original=original, plan=plan))
    return _of_whole_model(made, job, behind)


def _behind_choices(job: QuantJob) -> set[str]:
    """The names of the nodes that choose and of all behind them; empty if nothing is left out."""
    is_labelled = job.evaluation is not None and job.evaluation.labels is not None
    if job.contract is not None or is_labelled or files.is_large(job.model):
        return set()
    ending = behind_choices(job.model)
    names = {str(node.name) for node in ending}
    with_inner = names | {str(node.name) for node in inside_of(ending)}
    elements = sum(n.elements for n in job.plan.nodes)
    own = sum(n.elements for n in job.plan.nodes if n.node in with_inner)
    return names if own < LEAST_SHARE * elements else set()


def _without(model: ir.Model, names: set[str]) -> ir.Model:
    """A copy without these nodes, whose outputs are what they read."""
    copy = model.clone()
    behind = {node for node in copy.graph if node.name in names}
    kept = [v for v in copy.graph.outputs if v.producer() not in behind]
    copy.graph.outputs[:] = [*kept, *(v for v in read_by(behind) if v not in kept)]
    drop_unused(copy)
    return copy


def _of_whole_model(made: Made, job: QuantJob, behind: set[str]) -> Made:
    """What was made, for the whole model of the job (step 3)."""
    weighted = [n.node for n in job.plan.weighted if n.node in behind]
    changes = dict.fromkeys(weighted, IN_FLOAT32)
    changes |= dict.fromkeys(behind.difference(weighted), IN_FLOAT)
    plan = _planned_for(job.model, made.best.plan, changes)
    reasoned = (replace(n, reason=BEHIND) if n.node in behind else n for n in plan.nodes)
    plan = replace(plan, nodes=tuple(reasoned))
    calibrated = calibrated_as_planned(job, plan)
    best = calibrated.with_planned_biases(remade(replace(made.best, plan=plan), calibrated))
    return replace(
        made,
        best=replace(best, fidelity=made.best.fidelity),
        job=job,
        float_model=job.model,
        note=joined([made.note, JUDGED]),
    )


def _planned_for(model: ir.Model, plan: QuantPlan, changes: Mapping[str, NodeChoice]) -> QuantPlan:
    """The plan for a model with more or fewer nodes than its own."""
    replanned = replan(model, plan, changes)
    return replace(replanned, tuned_biases_db=plan.tuned_biases_db, idle_globs=plan.idle_globs)
