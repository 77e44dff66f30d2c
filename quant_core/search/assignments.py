"""Step 3 of a search: which nodes of the fastest candidate are best put into float."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from quant_core.config import Contract
from quant_core.errors import ModelError
from quant_core.plan.make import with_choice
from quant_core.plan.targets import Runtime
from quant_core.plan.types import IN_FLOAT, IN_FLOAT16, Storage
from quant_core.search.bench import Bench
from quant_core.search.calibrated import CalibratedModel
from quant_core.search.candidate import Candidate
from quant_core.search.choose import best_of, fastest_of, of_most_worth
from quant_core.search.minimum_cut import (
    Assignment,
    NodeCost,
    TensorCost,
    assignment_of,
    cheapest_assignments,
)
from quant_core.search.node_costs import node_costs
from quant_core.search.policy import POLICY
from quant_core.search.race import Race
from quant_core.search.variants import Trial, computes_alike, is_dynamic_conv
from quant_core.text import counted

Groups = list[list[str]]  # names of nodes that go into float together
Counts = Callable[[int, Mapping[int, Candidate]], Iterator[int]]

# Between these the time of conversions is fitted: what lies outside is noise of the clock.
CONVERSION_SCALES = (0.25, 8.0)


def try_assignments(
    race: Race,
    bench: Bench,
    contract: Contract | None,
    *,
    whole_front: bool = False,
) -> Race:
    """The race with assignments of the fastest candidate's nodes to float and integers; with
    outliers treated, where that is worth more.

    whole_front  whether all of them are tried, whatever the candidates are worth
    """
    fastest = fastest_of(race.candidates)
    start = of_most_worth(c for c in race.candidates if computes_alike(c.plan, fastest.plan))
    judged = best_of(race.candidates) if contract is None else start
    # In another runtime nodes may lose by integers that gain by them in onnxruntime, and so may
    # dynamic Convs.
    is_open = not judged.is_faithful or bench.timed_in is Runtime.OPENVINO
    is_open = is_open or any(map(is_dynamic_conv, start.plan.nodes))
    is_open = is_open and any(n.compute.is_integer for n in start.plan.weighted)
    has_time = bench.has_time_after([start], POLICY.trials_of_a_step)
    if not has_time or not (is_open or whole_front):
        return race
    counts = counts_until_worse
    if whole_front:
        counts = every_count
    elif contract is not None or judged.is_faithful:
        counts = fastest_count
    return race.after(*_trials(race.calibrated, start, bench, counts))


def _trials(
    calibrated: CalibratedModel, start: Candidate, bench: Bench, counts: Counts
) -> list[Trial]:
    """The trials of those numbers of groups, best first, that `counts` asks for."""
    trials: dict[int, Trial] = {}
    tried = {0: start}
    try:
        groups = float_groups(calibrated, start, bench)
        coarse: set[str] | None = None
        for count in counts(len(groups), tried):
            if not bench.has_time_after(tried.values()):
                break
            nodes = nodes_of(groups[:count])
            label = f"{start.label}, {counted(len(nodes), 'node')} in float"
            bench.progress(f"trying {label}")
            if coarse is None:  # no sooner: for this, weights are rounded anew
                in_float = with_choice(calibrated.model, start.plan, nodes_of(groups), IN_FLOAT)
                coarse = coarse_weights(calibrated.build(in_float, start.label))
            plan = with_choice(calibrated.model, start.plan, nodes, IN_FLOAT)
            plan = with_choice(calibrated.model, plan, coarse & set(nodes), IN_FLOAT16)
            candidate = bench.judge(calibrated.build(plan, label))
            trials[count] = Trial(label, plan, candidate)
            tried[count] = candidate
    except ModelError as error:
        trials[0] = Trial(f"more than {start.label}", start.plan, error)
    return list(trials.values())


def every_count(groups: int, tried: Mapping[int, Candidate]) -> Iterator[int]:
    """Every number of groups."""
    yield from range(1, groups + 1)


def fastest_count(groups: int, tried: Mapping[int, Candidate]) -> Iterator[int]:
    """One group, if there are more: nodes that float computes faster, so that nothing is slower."""
    yield from range(1, min(groups, 2))


def counts_until_worse(groups: int, tried: Mapping[int, Candidate]) -> Iterator[int]:
    """The numbers of groups that lead to the candidate of the highest rank.

    1. One group. No more where neither that nor none is faster than float for the user: all others
       give up speed.
    2. If that is not above the aim, 3, 9, 27, ... until one is, and bisection from the one before
       it for the fewest that are. What is too slow to be worth it ends it on that side. It goes
       from the fast side, as noise does not only fall with the number: where few samples judge,
       one decision that falls otherwise costs some dB, and another node may win them back.
    3. If it is, 2, 4, 8, ... until two are worse than the best.
    4. Those halfway from the best to the next that was tried on each side, and once more if one of
       them is better. Not on the side of fewer if these are no faster than the best, nor on that of
       more if it is faithful: what lies between would differ by the noise of a race.

    tried  what was tried, and grows meanwhile
    """

    def best() -> int:
        return max(tried, key=lambda count: tried[count].rank)

    def is_enough(count: int) -> bool:
        candidate = tried[count]
        return candidate.is_above(candidate.aim) or candidate.gain < POLICY.real_gain

    if groups < 2:
        return
    yield 1  # 1
    if max(candidate.gain for candidate in tried.values()) < POLICY.real_gain:
        return
    last = 1
    while not is_enough(last) and 3 * last < groups:  # 2
        last *= 3
        yield last
    low, high = (last // 3, last) if is_enough(last) else (last, groups)
    while high - low > 1:
        middle = (low + high) // 2
        yield middle
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    end = 2 if is_enough(1) else groups
    while end < groups and end <= max(2, 4 * best()):  # 3
        yield end
        end *= 2
    for _ in range(2):  # 4
        middle = best()
        before = max((n for n in tried if n < middle), default=middle)
        after = min((n for n in tried if n > middle), default=min(end, groups))
        faster = tried[before].gain - POLICY.clock_noise > tried[middle].gain
        fewer = [(before + middle) // 2] if faster else []
        more = [] if tried[middle].is_faithful else [(middle + after) // 2]
        yield from (n for n in (*fewer, *more) if n not in tried)
        if best() == middle:
            break


def float_groups(calibrated: CalibratedModel, start: Candidate, bench: Bench) -> Groups:
    """Groups of the nodes with weights that compute in integers: those that are best put into float
    first come first, by the minimum cuts of minimum_cut.py. Of a single node nothing is measured.

    Raises: ModelError if one of the models does not run.
    """
    left = {n.node: None for n in start.plan.weighted if n.compute.is_integer}
    if len(left) < 2:
        return [list(left)] if left else []
    bench.progress("measuring the time and the noise of each node")
    costs, tensors = node_costs(calibrated.model, start, bench)
    if len(costs) <= POLICY.trials_of_a_step:
        costs = _with_noise_of_outputs(costs, calibrated, start, bench)
    assignments = cheapest_assignments(costs, tensors)
    if tensors:
        tensors = _fitted_to_whole(tensors, costs, assignments, calibrated, start, bench)
        assignments = cheapest_assignments(costs, tensors)
    groups = []
    for assignment in assignments:
        groups.append([node for node in left if node in assignment.in_float])
        left = {node: None for node in left if node not in assignment.in_float}
    return [group for group in (*groups, list(left)) if group]


def _with_noise_of_outputs(
    costs: Mapping[str, NodeCost], calibrated: CalibratedModel, start: Candidate, bench: Bench
) -> dict[str, NodeCost]:
    """The costs of a few nodes, the noise of each being that of the model's outputs where all the
    others compute in float.

    The noise of a node's own output tells little before a logarithm or a division, and models of
    few nodes are often such: front ends that make features of sound.
    """
    found, bench = {}, bench.for_ranking()
    for node, cost in costs.items():
        others = [other for other in costs if other != node]
        plan = with_choice(calibrated.model, start.plan, others, IN_FLOAT)
        alone = bench.judge_fidelity(calibrated.build(plan, start.label))
        found[node] = replace(cost, noise=alone.noise)
    return found


def coarse_weights(in_float: Candidate) -> set[str]:
    """The nodes whose weights would keep much of the noise in 8 bits, though they compute in float,
    as these do.
    """
    db = in_float.quantized.weight_sqnr_db
    in_int8 = (n.node for n in in_float.plan.nodes if n.storage is Storage.INT8)
    return {node for node in in_int8 if db.get(node, math.inf) < POLICY.float_weights_db}


def nodes_of(groups: Groups) -> list[str]:
    """The nodes of all these groups."""
    return [node for group in groups for node in group]


def _fitted_to_whole(
    tensors: list[TensorCost],
    costs: Mapping[str, NodeCost],
    assignments: Sequence[Assignment],
    calibrated: CalibratedModel,
    start: Candidate,
    bench: Bench,
) -> list[TensorCost]:
    """The tensors with all conversions scaled as two whole models need it: the start, and the
    assignment that converts most. As they are if what it converts takes no longer than races err.
    """
    if start.cost is None:
        return tensors
    all_integer = assignment_of(costs, tensors, ())
    probe = max(assignments[:-1], key=lambda a: a.conversion_ms)
    converted_ms = probe.conversion_ms - all_integer.conversion_ms
    if converted_ms <= (1 - POLICY.equal_speed) * start.cost.quantized_ms:
        return tensors
    nodes = [n.node for n in start.plan.weighted if n.node in probe.in_float]
    plan = with_choice(calibrated.model, start.plan, nodes, IN_FLOAT)
    found = bench.time(calibrated.build(plan, start.label))
    if found is None:
        return tensors
    # Each ran in turns with the float model: what the host did meanwhile cancels out.
    more_ms = start.cost.float_ms * (1 / found.speedup - 1 / start.cost.speedup)
    scale = (more_ms - (probe.compute_ms - all_integer.compute_ms)) / converted_ms
    lo, hi = CONVERSION_SCALES
    scale = min(max(scale, lo), hi)
    return [replace(tensor, conversion_ms=scale * tensor.conversion_ms) for tensor in tensors]
