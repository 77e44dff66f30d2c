"""What people should know of a checked model: which outputs are below the floor or near it, what
was repaired, and of which outputs the samples prove little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import cache

from quant_core.data.samples import Samples
from quant_core.errors import ModelError
from quant_core.evaluate.node_noise import isolated_db
from quant_core.evaluate.variation import varying_db
from quant_core.metrics import PROBABILITY_ERROR, OutputFidelity
from quant_core.model.containers import numbers_of
from quant_core.plan.types import QuantPlan
from quant_core.search.bench import Bench
from quant_core.search.calibrated import CalibratedModel
from quant_core.search.candidate import Candidate
from quant_core.search.policy import POLICY

SHOWN_NODES = 3  # names in a note; more are counted
UNREACHED_DB = 140.0  # what float32 itself keeps: what was rounded does not show in such an output


def poorly_measured(judged: Candidate, bench: Bench) -> list[str]:
    """A note on each output that is sound, though the samples prove little of it."""
    assert judged.fidelity is not None
    least = judged.plan.config.least_db
    names = bench.reference.names
    judging = [o for o in judged.fidelity.per_output if o.measured_db is not None]

    @cache
    def share_db(output: str) -> float | None:
        return varying_db(map(numbers_of, bench.reference.outputs.of(names.index(output))))

    which = f"all {len(bench.samples)} samples that judge"
    if judging and all(share_db(o.name) == -math.inf for o in judging):
        return [f"float's outputs are the same on {which}: little was measured"]
    doubts = [(o, _doubt(o, least, share_db)) for o in judging]
    notes = [f"output {o.name} {o.nearness}, but {doubt}" for o, doubt in doubts if doubt]
    if not notes and _is_unreached(judged):
        notes.append(f"rounded weights change no output on {which}: little was measured")
    return notes


def _is_unreached(judged: Candidate) -> bool:
    """Whether rounding changed weights, but no float output: the samples may saturate a Softmax."""
    assert judged.fidelity is not None
    measured = [o.centred_db for o in judged.fidelity.per_output if o.centred_db is not None]
    is_rounded = min(judged.quantized.weight_sqnr_db.values(), default=math.inf) < UNREACHED_DB
    return is_rounded and bool(measured) and min(measured) >= UNREACHED_DB


def _doubt(output: OutputFidelity, least: float, share_db: Callable[[str], float | None]) -> str:
    """Why the samples prove little of an output; "" if they prove enough, or it is not sound."""
    if output.centred_db is None or (output.sound_db or 0.0) < POLICY.noted_db:
        return ""
    lo, hi = output.float_range or (0.0, 1.0)
    if lo > hi:
        return "float gives no finite number on all samples that judge"
    if output.is_same_probability:
        is_flat = output.centred_db < POLICY.noted_db and hi - lo < 2 * PROBABILITY_ERROR
        return f"is from {lo:.2g} to {hi:.2g} on all samples that judge" if is_flat else ""
    share = share_db(output.name)
    if share is None or math.isinf(share) or output.centred_db + share >= least:
        return ""
    return f"{output.centred_db + share:.1f} dB of what differs between samples"


def close_to_floor(judged: Candidate) -> tuple[str, ...]:
    """A note on each output that is above the floor, but not by much."""
    assert judged.fidelity is not None
    return tuple(
        f"output {o.name} {o.nearness}"
        for o in judged.fidelity.per_output
        if o.sound_db is not None and o.sound_db < POLICY.noted_db
    )


def shortfall_of(calibrated: CalibratedModel, judged: Candidate, samples: Samples) -> str:
    """The broken outputs, and the node with the most noise of its own."""
    assert judged.fidelity is not None
    least = judged.plan.config.least_db
    outputs = judged.fidelity.per_output
    broken = [f"output {o.name} {why}" for o in outputs if (why := _shortfall(o, least))]
    few = samples.subsample(POLICY.sensitivity_samples)
    try:
        found = isolated_db(calibrated.model, judged.model, few)
    except ModelError:  # the outputs are broken all the same, whichever node is to blame
        found = {}
    if found:
        worst = min(found, key=found.__getitem__)
        broken.append(f"most noise comes from node {worst}, {found[worst]:.1f} dB")
    return "; ".join(broken)


def _shortfall(output: OutputFidelity, least_db: float) -> str:
    """Why the output is broken, "" if it is not."""
    is_below = output.sound_db is not None and output.sound_db < least_db
    return output.flaw or (f"{output.nearness}, at least {least_db:g}" if is_below else "")


def repair_note(before: Candidate, after: Candidate) -> str:
    """What an output was like, and which nodes were promoted for it."""
    assert before.fidelity is not None
    flaws = before.fidelity.flaws
    what = flaws[0] if flaws else f"the worst output had {before.fidelity.sound_db or 0:.1f} dB"
    return f"{what}: {listed(_changed_nodes(before.plan, after.plan))} in more bits or in float"


def _changed_nodes(before: QuantPlan, after: QuantPlan) -> list[str]:
    was = {n.node: (n.compute, n.storage) for n in before.nodes}
    return [n.node for n in after.weighted if was.get(n.node) != (n.compute, n.storage)]


def listed(names: Collection[str]) -> str:
    """The first few names, and how many more there are."""
    ordered = names if isinstance(names, list) else sorted(names)
    more = len(ordered) - SHOWN_NODES
    shown = ", ".join(ordered[:SHOWN_NODES]) or "no node"
    return f"{shown} and {more} more" if more > 0 else shown
