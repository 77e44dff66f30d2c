"""The last line of defence: each finished model runs beside its original, and is repaired.

1. A weight is broken if one of its channels, or of the matrices of a stack, has less SQNR after
   rounding than `config.floor` asks of an output. It gets scales of its own for each channel, then
   8 bits, then 16.
2. Both models run on samples: those that candidates were judged by, or drawn ones.
3. An output is broken if it is not finite where float is, or its SQNR is below the floor. Outputs
   that float itself does not repeat, or that change their shape, cannot be judged.
4. What writes an output in integers, of which these alone lose a channel, computes in float.
5. Of a model with a broken output the fewest nodes are promoted to more bits or float until no
   output is broken (promotion.py), with the floor as the contract.
6. What is broken all the same is reported, with the node that adds the most noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache

from quant_core.config import Contract
from quant_core.data.samples import Samples
from quant_core.errors import ModelError
from quant_core.evaluate.lost_channels import lost_channels
from quant_core.evaluate.node_noise import isolated_db
from quant_core.evaluate.variation import varying_db
from quant_core.metrics import PROBABILITY_ERROR, Fidelity, OutputFidelity
from quant_core.model.containers import numbers_of
from quant_core.plan.make import with_choice
from quant_core.plan.types import IN_FLOAT, IN_FLOAT16, IN_INT8, IN_OWN_SCALES, QuantPlan
from quant_core.search.bench import Bench
from quant_core.search.calibrated import CalibratedModel, remade
from quant_core.search.candidate import Candidate
from quant_core.search.policy import POLICY
from quant_core.search.promotion import promote
from quant_core.search.variants import Trial
from quant_core.text import counted, joined

NOT_CHECKED = "not checked"
SHOWN_NODES = 3  # names in a note; more are counted
WHOLE_ROUNDS = 3  # a sum of a Concat of Convs


@dataclass(frozen=True, slots=True, eq=False)
class Checked:
    """A candidate after the check, and what came of it.

    fidelity   of the outputs that could be judged; None if none could
    shortfall  which outputs are broken and which node is to blame, "" if none is
    notes      what was repaired, and what cannot be judged
    close      what is above the floor, but not by much
    trials     what was tried to repair it
    """

    best: Candidate
    fidelity: Fidelity | None
    shortfall: str = ""
    notes: tuple[str, ...] = ()
    close: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()

    @property
    def worst_db(self) -> float | None:
        """SQNR of its worst output in dB, small probabilities too; None if it is not known."""
        return None if self.fidelity is None else self.fidelity.measured_db


def check_floor(
    calibrated: CalibratedModel,
    best: Candidate,
    bench: Bench | None,
    *,
    contract: Contract | None = None,
    repairs: bool = True,
) -> Checked:
    """The candidate with no output below its floor, if that can be had.

    best      its fidelity is None unless this bench judged it
    bench     None if there is no sample that the float model runs on
    contract  a promise of speed or size outranks the floor: then nothing is repaired
    repairs   whether nodes may be promoted

    Raises: ModelError if the model does not run, and does not with all nodes in float either.
    """
    outranked = contract is not None and (contract.min_speedup or contract.max_size_ratio)
    repairs = repairs and not outranked
    if repairs:
        best = _with_sound_weights(calibrated, best)
    broken = _broken_weights(best)
    if bench is None:
        note = f"{NOT_CHECKED}: no sample fits that could be drawn"
        return Checked(best, None, shortfall=broken, notes=(note,))
    judged = _judged(calibrated, best, bench, repairs=repairs)
    if not judged.is_sound:
        bench, judged = _where_float_repeats(bench, judged)
    bench, judged, notes = _only_judgeable(bench, judged)
    if not bench.judged_outputs:
        notes.append(f"{NOT_CHECKED}: no output can be judged")
        return Checked(best, None, shortfall=broken, notes=tuple(notes))
    judged, lost = _with_whole_outputs(calibrated, judged, bench, repairs=repairs)
    notes += lost
    trials: tuple[Trial, ...] = ()
    if repairs and not judged.is_sound:
        bench.progress("repairing outputs that are below the floor")
        promoted = promote(calibrated, judged, bench, judged.plan.config.floor)
        if promoted.best is not judged:
            notes.append(_repair_note(judged, promoted.best))
        judged, trials = promoted.best, promoted.trials
    shortfall = _broken_weights(judged)
    if not judged.is_sound:
        shortfall = joined([shortfall, shortfall_of(calibrated, judged, bench.samples)])
    notes += _doubted(judged, bench)
    close = close_to_floor(judged) if judged.is_sound else ()
    return Checked(judged, judged.fidelity, shortfall, tuple(notes), close, trials)


def _with_sound_weights(calibrated: CalibratedModel, best: Candidate) -> Candidate:
    """The candidate whose broken weights are rounded otherwise (step 1)."""
    label, changed = best.label, set[str]()
    for choice in (IN_OWN_SCALES, IN_INT8, IN_FLOAT16):
        broken = list(_broken_nodes(best))
        if not broken:
            break
        changed.update(broken)
        plan = with_choice(calibrated.model, best.plan, broken, choice)
        otherwise = f"{label}, weights of {counted(len(changed), 'node')} rounded otherwise"
        best = remade(replace(best, plan=plan, label=otherwise), calibrated)
    return best


def _broken_nodes(candidate: Candidate) -> dict[str, float]:
    """Node with a broken weight -> SQNR of its worst channel in dB."""
    least = candidate.plan.config.least_db
    found = candidate.quantized.worst_row_db
    rounded = {n.node for n in candidate.plan.nodes if n.is_rounded}
    return {node: db for node, db in found.items() if db < least and node in rounded}


def _broken_weights(candidate: Candidate) -> str:
    """What is to be said of each broken weight, "" if none is."""
    least = candidate.plan.config.least_db
    return joined(
        f"a channel of the weight of node {node} has {db:.1f} dB, at least {least:g}"
        for node, db in _broken_nodes(candidate).items()
    )


def _judged(
    calibrated: CalibratedModel, best: Candidate, bench: Bench, *, repairs: bool
) -> Candidate:
    """The candidate with its fidelity; one that does not run gets all its nodes in float."""
    if best.fidelity is not None:
        return best
    try:
        return bench.judge_fidelity(best)
    except ModelError:
        if not repairs:
            raise
        nodes = [n.node for n in best.plan.weighted]
        plan = with_choice(calibrated.model, best.plan, nodes, IN_FLOAT)
        return bench.judge_fidelity(calibrated.build(plan, f"{best.label}, all nodes in float"))


def _with_whole_outputs(
    calibrated: CalibratedModel, judged: Candidate, bench: Bench, *, repairs: bool
) -> tuple[Candidate, list[str]]:
    """The candidate without integers that lose a channel of an output (step 4), and a note on each
    such output. Behind those that go into float there may be others.
    """
    least = judged.plan.config.least_db
    samples = bench.samples.subsample(POLICY.noise_samples)
    lost: dict[str, list[str]] = {}
    for _ in range(WHOLE_ROUNDS if repairs else 1):
        planned = {node: name for name, node in judged.quantized.written.items()}
        found = lost_channels(calibrated.model, judged.model, samples, least)
        new = [(o, planned[n]) for o, nodes in found.items() for n in nodes if n in planned]
        if not new:
            break
        for output, node in new:
            lost.setdefault(output, []).append(node)
        if repairs:
            plan = with_choice(calibrated.model, judged.plan, (n for _, n in new), IN_FLOAT)
            label = f"{judged.label}, {counted(len(lost), 'output')} in float"
            judged = bench.judge(calibrated.build(plan, label))
    if repairs:
        text = "output {} lost a channel in integers: {} in float"
    else:
        text = "output {} loses a channel in integers, written by {}"
    return judged, [text.format(o, _list(nodes)) for o, nodes in lost.items()]


def _where_float_repeats(bench: Bench, judged: Candidate) -> tuple[Bench, Candidate]:
    """The bench without the outputs that float does not repeat on any of the samples, and the
    candidate as it judges it.
    """
    steadier = bench.where_float_repeats()
    if steadier.reference.unsteady <= bench.reference.unsteady:
        return bench, judged
    return steadier, steadier.judge_fidelity(judged)


def _only_judgeable(bench: Bench, judged: Candidate) -> tuple[Bench, Candidate, list[str]]:
    """The bench without the samples and outputs that cannot be judged, the candidate as it judges
    it, and a note on what is left out.
    """
    assert judged.fidelity is not None
    notes = []
    if bench.reference.unsteady:
        which = _list(bench.reference.unsteady)
        when = "run again or without onnxruntime's optimizers"
        notes.append(f"{NOT_CHECKED}: {when}, float gives other values at {which}")
    reshaped = {o.name for o in judged.fidelity.per_output if o.is_reshaped}
    if not reshaped:
        return bench, judged, notes
    alike = bench.where_shapes_agree(judged)
    others = len(bench.samples) - (len(alike.samples) if alike is not None else 0)
    which = f"for {others} of {len(bench.samples)} samples"
    notes.append(f"{NOT_CHECKED}: the number of results differs {which} at {_list(reshaped)}")
    if alike is None:
        kept = [o.name for o in judged.fidelity.per_output if o.name not in reshaped]
        alike = replace(bench, judged_outputs=tuple(kept))
    return alike, alike.judge_fidelity(judged) if alike.judged_outputs else judged, notes


def _doubted(judged: Candidate, bench: Bench) -> list[str]:
    """A note on each output that is sound, though the samples prove little of it."""
    assert judged.fidelity is not None
    least = judged.plan.config.least_db
    names = bench.reference.names
    judging = [o for o in judged.fidelity.per_output if o.measured_db is not None]

    @cache
    def share_db(output: str) -> float | None:
        return varying_db(map(numbers_of, bench.reference.outputs.of(names.index(output))))

    if judging and all(share_db(o.name) == -math.inf for o in judging):
        which = f"all {len(bench.samples)} samples that judge"
        return [f"float's outputs are the same on {which}: little was measured"]
    doubts = [(o, _doubt(o, least, share_db)) for o in judging]
    return [f"output {o.name} {o.nearness}, but {doubt}" for o, doubt in doubts if doubt]


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
    broken = [
        f"output {o.name} {o.flaw or f'{o.nearness}, at least {least:g}'}"
        for o in judged.fidelity.per_output
        if o.flaw or (o.sound_db is not None and o.sound_db < least)
    ]
    few = samples.subsample(POLICY.sensitivity_samples)
    try:
        found = isolated_db(calibrated.model, judged.model, few)
    except ModelError:  # the outputs are broken all the same, whichever node is to blame
        found = {}
    if found:
        worst = min(found, key=found.__getitem__)
        broken.append(f"most noise comes from node {worst}, {found[worst]:.1f} dB")
    return "; ".join(broken)


def _repair_note(before: Candidate, after: Candidate) -> str:
    """What an output was like, and which nodes were promoted for it."""
    assert before.fidelity is not None
    flaws = before.fidelity.flaws
    what = flaws[0] if flaws else f"the worst output had {before.fidelity.sound_db or 0:.1f} dB"
    return f"{what}: {_list(_changed_nodes(before.plan, after.plan))} in more bits or in float"


def _changed_nodes(before: QuantPlan, after: QuantPlan) -> list[str]:
    was = {n.node: (n.compute, n.storage) for n in before.nodes}
    return [n.node for n in after.weighted if was.get(n.node) != (n.compute, n.storage)]


def _list(names: Collection[str]) -> str:
    """The first few names, and how many more there are."""
    ordered = names if isinstance(names, list) else sorted(names)
    more = len(ordered) - SHOWN_NODES
    shown = ", ".join(ordered[:SHOWN_NODES]) or "no node"
    return f"{shown} and {more} more" if more > 0 else shown
