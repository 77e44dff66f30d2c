"""Each finished model runs beside its original, and is repaired where it is below the floor.

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

from dataclasses import dataclass, replace

from quant_core.config import Contract
from quant_core.errors import ModelError
from quant_core.evaluate.lost_channels import lost_channels
from quant_core.metrics import Fidelity
from quant_core.plan.make import with_choice
from quant_core.plan.types import IN_FLOAT, IN_FLOAT16, IN_INT8, IN_OWN_SCALES
from quant_core.search.bench import Bench
from quant_core.search.calibrated import CalibratedModel, remade
from quant_core.search.candidate import Candidate
from quant_core.search.floor_notes import (
    close_to_floor,
    listed,
    poorly_measured,
    repair_note,
    shortfall_of,
)
from quant_core.search.policy import POLICY
from quant_core.search.promotion import promote
from quant_core.search.variants import Trial
from quant_core.text import counted, joined

NOT_CHECKED = "not checked"
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
            notes.append(repair_note(judged, promoted.best))
        judged, trials = promoted.best, promoted.trials
    shortfall = _broken_weights(judged)
    if not judged.is_sound:
        shortfall = joined([shortfall, shortfall_of(calibrated, judged, bench.samples)])
    notes += poorly_measured(judged, bench)
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
    """A phrase on each broken weight, "" if none is."""
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
    return judged, [text.format(o, listed(nodes)) for o, nodes in lost.items()]


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
        which = listed(bench.reference.unsteady)
        when = "run again or without onnxruntime's optimizers"
        notes.append(f"{NOT_CHECKED}: {when}, float gives other values at {which}")
    reshaped = {o.name for o in judged.fidelity.per_output if o.is_reshaped}
    if not reshaped:
        return bench, judged, notes
    alike = bench.where_shapes_agree(judged)
    others = len(bench.samples) - (len(alike.samples) if alike is not None else 0)
    which = f"for {others} of {len(bench.samples)} samples"
    notes.append(f"{NOT_CHECKED}: the number of results differs {which} at {listed(reshaped)}")
    if alike is None:
        kept = [o.name for o in judged.fidelity.per_output if o.name not in reshaped]
        alike = replace(bench, judged_outputs=tuple(kept))
    return alike, alike.judge_fidelity(judged) if alike.judged_outputs else judged, notes
