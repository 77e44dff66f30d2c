"""The last line of defence: each finished model runs beside its original, and is repaired.

1. Both models run on samples: those that candidates were judged by, or drawn ones.
2. An output is broken if it is not finite where float is, or its SQNR is below `config.floor`.
   Outputs that float itself does not repeat, or that change their shape, cannot be judged.
3. Of a model with a broken output the fewest nodes are promoted to other rounding, more bits or
   float until no output is broken (mixed_precision.py), with the floor as the contract.
4. What is broken all the same is reported, with the node that adds the most noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from quant_core.config import Contract
from quant_core.data.samples import Samples
from quant_core.errors import ModelError
from quant_core.evaluate.node_noise import measure_sensitivity
from quant_core.plan.types import QuantPlan
from quant_core.search.calibrated import CalibratedModel
from quant_core.search.candidate import Bench, Candidate
from quant_core.search.mixed_precision import IN_FLOAT, promote, with_choice
from quant_core.search.policy import POLICY
from quant_core.search.variants import Trial

NOT_CHECKED = "not checked"
SHOWN_NODES = 3  # names in a note; more are counted


@dataclass(frozen=True, slots=True, eq=False)
class Checked:
    """A candidate after the check, and what came of it.

    worst_db   SQNR of its worst output in dB; None if no output could be judged
    shortfall  which outputs are broken and which node is to blame, "" if none is
    notes      what was repaired, what cannot be judged, and what is close to the floor
    trials     what was tried to repair it
    """

    best: Candidate
    worst_db: float | None
    shortfall: str = ""
    notes: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()


def check_floor(
    calibrated: CalibratedModel,
    best: Candidate,
    bench: Bench | None,
    *,
    contract: Contract | None = None,
    repairs: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Checked:
    """The candidate with no output below its floor, if that can be had.

    bench     None if there is no sample that the float model runs on
    contract  a promise of speed or size outranks the floor: then nothing is repaired
    repairs   whether nodes may be promoted

    Raises: ModelError if the model does not run, and does not with all nodes in float either.
    """
    if bench is None:
        return Checked(best, None, notes=(f"{NOT_CHECKED}: no sample fits that could be drawn",))
    judged = _judged(calibrated, best, bench, repairs=repairs)
    bench, notes = _only_judgeable(bench, judged)
    if not bench.judged_outputs:
        return Checked(best, None, notes=(*notes, f"{NOT_CHECKED}: no output can be judged"))
    start = judged = bench.judge_fidelity(judged)
    if judged.is_sound:
        return Checked(judged, _worst_db(judged), notes=(*notes, *_close(judged)))
    trials: tuple[Trial, ...] = ()
    outranked = contract is not None and (contract.min_speedup or contract.max_size_ratio)
    if repairs and not outranked:
        progress("repairing outputs that are below the floor")
        floor = judged.plan.config.floor
        promoted = promote(calibrated, judged, bench, floor, progress)
        judged, trials = promoted.best, promoted.trials
        notes = [*notes, _repair_note(start, judged)]
    if judged.is_sound:
        return Checked(judged, _worst_db(judged), "", (*notes, *_close(judged)), trials)
    shortfall = _shortfall(calibrated, judged, bench.samples)
    return Checked(judged, _worst_db(judged), shortfall, tuple(notes), trials)


def _judged(
    calibrated: CalibratedModel, best: Candidate, bench: Bench, *, repairs: bool
) -> Candidate:
    """The candidate with its fidelity; one that does not run gets all its nodes in float."""
    try:
        return bench.judge_fidelity(best)
    except ModelError:
        if not repairs:
            raise
        nodes = [n.node for n in best.plan.nodes if n.weights]
        plan = with_choice(calibrated.model, best.plan, nodes, IN_FLOAT)
        return bench.judge_fidelity(calibrated.build(plan, f"{best.label}, all nodes in float"))


def _only_judgeable(bench: Bench, judged: Candidate) -> tuple[Bench, list[str]]:
    """The bench without the outputs that cannot be judged, and a note on these."""
    assert judged.fidelity is not None
    unsteady = bench.unsteady_outputs()
    reshaped = {o.name for o in judged.fidelity.per_output if "shape" in o.flaw} - unsteady
    notes = []
    if unsteady:
        notes.append(f"{NOT_CHECKED}: float gives other values each time at {_list(unsteady)}")
    if reshaped:
        notes.append(f"{NOT_CHECKED}: the number of results differs at {_list(reshaped)}")
    left_out = unsteady | reshaped
    kept = [o.name for o in judged.fidelity.per_output if o.name not in left_out]
    return replace(bench, judged_outputs=tuple(kept)), notes


def _worst_db(judged: Candidate) -> float | None:
    assert judged.fidelity is not None
    return judged.fidelity.worst_db


def _close(judged: Candidate) -> list[str]:
    """A note on each output that is above the floor, but not by much."""
    assert judged.fidelity is not None
    return [
        f"output {o.name} has {o.sound_db:.1f} dB"
        for o in judged.fidelity.per_output
        if o.sound_db is not None and o.sound_db < POLICY.noted_db
    ]


def _shortfall(calibrated: CalibratedModel, judged: Candidate, samples: Samples) -> str:
    """The broken outputs, and the node with the most noise of its own."""
    assert judged.fidelity is not None
    least = judged.plan.config.floor.min
    assert least is not None
    broken = [
        f"output {o.name} {o.flaw or f'has {o.sound_db:.1f} dB, at least {least:g}'}"
        for o in judged.fidelity.per_output
        if o.flaw or (o.sound_db is not None and o.sound_db < least)
    ]
    few = samples.subsample(POLICY.sensitivity_samples)
    found = measure_sensitivity(calibrated.model, judged.model, few)
    if found:
        worst = min(found, key=lambda node: node.isolated_db)
        broken.append(f"most noise comes from node {worst.node}, {worst.isolated_db:.1f} dB")
    return "; ".join(broken)


def _repair_note(before: Candidate, after: Candidate) -> str:
    """What an output was like, and which nodes were promoted for it."""
    assert before.fidelity is not None
    flaws = before.fidelity.flaws
    what = flaws[0] if flaws else f"the worst output had {before.fidelity.worst_db or 0:.1f} dB"
    return f"{what}: {_list(_changed_nodes(before.plan, after.plan))} in more bits or in float"


def _changed_nodes(before: QuantPlan, after: QuantPlan) -> list[str]:
    was = {n.node: (n.compute, n.storage) for n in before.nodes}
    return [n.node for n in after.nodes if n.weights and was.get(n.node) != (n.compute, n.storage)]


def _list(names: set[str] | list[str]) -> str:
    """The first few names, and how many more there are."""
    ordered = names if isinstance(names, list) else sorted(names)
    more = len(ordered) - SHOWN_NODES
    shown = ", ".join(ordered[:SHOWN_NODES]) or "no node"
    return f"{shown} and {more} more" if more > 0 else shown
