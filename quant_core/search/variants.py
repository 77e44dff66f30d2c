"""What a search tries, as data: the rows of VARIANTS, when one is worth a trial, what it gave."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from quant_core.config import Contract
from quant_core.errors import ModelError
from quant_core.numerics.granularity import Granularity, PerTensor
from quant_core.plan.convolutions import is_pointwise
from quant_core.plan.make import replan
from quant_core.plan.operators import RULES
from quant_core.plan.types import Compute, NodeChoice, NodePlan, OutlierTreatment, QuantPlan
from quant_core.search.candidate import Candidate, satisfying
from quant_core.search.policy import POLICY
from quant_core.search.trace import TrialRow


@dataclass(frozen=True, slots=True)
class Variant:
    """One way in which all nodes with weights compute.

    label             for people; nothing depends on it
    matmul            of nodes with a static and a dynamic kernel: MatMul, Gemm
    recurrent         of nodes with a dynamic kernel alone: LSTM
    other             of all others: Conv and what follows it
    pointwise         of 1x1 Convs, None where they compute as others
    treats_outliers   whether outliers of what dynamic nodes read are smoothed or split off
    granularity       of the weights of dynamic nodes, None for the config's
    equalizes         whether what it makes may become more exact by cross-layer equalization
    is_last_resort    tried only where nothing before it is good enough
    """

    label: str
    matmul: Compute
    recurrent: Compute
    other: Compute
    pointwise: Compute | None = None
    treats_outliers: bool = False
    granularity: Granularity | None = None
    equalizes: bool = False
    is_last_resort: bool = False

    def without_calibration(self) -> Variant | None:
        """This variant with nothing static; None if nothing would be left of it."""
        if self.matmul is Compute.STATIC:
            return None
        return replace(self, other=Compute.FLOAT) if self.other is Compute.STATIC else self

    def compute_of(self, node: NodePlan, pointwise: Collection[str]) -> Compute:
        """How this node with weights computes; a node that cannot computes in the nearest way.

        pointwise  names of the 1x1 Convs
        """
        if is_matmul(node):
            return self.matmul
        if self.pointwise is not None and node.node in pointwise:
            return self.pointwise
        return self.recurrent if RULES[node.op_type].dynamic else self.other

    def plan(
        self,
        model: ir.Model,
        plan: QuantPlan,
        outliers: Mapping[str, OutlierTreatment] | None = None,
    ) -> QuantPlan:
        """The plan with every node with weights computing in this way. Raises: as `make_plan`."""
        pointwise = {str(node.name) for node in model.graph if is_pointwise(node)}
        choices = {
            node.node: NodeChoice(self.compute_of(node, pointwise), granularity=self.granularity)
            for node in plan.weighted
        }
        return replan(model, replace(plan, outliers=outliers or {}), choices)


_FLOAT, _STATIC, _DYNAMIC = Compute.FLOAT, Compute.STATIC, Compute.DYNAMIC

# In the order in which they are tried.
VARIANTS = (
    Variant("static", _STATIC, _DYNAMIC, _STATIC, equalizes=True),
    Variant("dynamic", _DYNAMIC, _DYNAMIC, _STATIC),
    Variant("dynamic, outliers treated", _DYNAMIC, _DYNAMIC, _STATIC, treats_outliers=True),
    Variant("dynamic, one scale per weight", _DYNAMIC, _DYNAMIC, _STATIC, granularity=PerTensor()),
    Variant("blocks", Compute.BLOCKS, _DYNAMIC, _STATIC),
    Variant("dynamic, 1x1 convolutions too", _DYNAMIC, _DYNAMIC, _FLOAT, pointwise=_DYNAMIC),
    Variant(
        "dynamic, 1x1 convolutions too, outliers treated",
        _DYNAMIC,
        _DYNAMIC,
        _FLOAT,
        pointwise=_DYNAMIC,
        treats_outliers=True,
    ),
    Variant("dynamic, convolutions in float", _DYNAMIC, _DYNAMIC, _FLOAT, is_last_resort=True),
    Variant("weight-only", _FLOAT, _FLOAT, _FLOAT, is_last_resort=True),
)


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """What was tried, and what came of it: a judged candidate, or why there is none.

    variant  the row of VARIANTS; None for what was derived from an earlier candidate
    """

    label: str
    plan: QuantPlan
    outcome: Candidate | ModelError
    variant: Variant | None = None

    @property
    def candidate(self) -> Candidate | None:
        """The candidate, None if it failed."""
        return self.outcome if isinstance(self.outcome, Candidate) else None

    def row(self) -> TrialRow:
        """The trial as a row of the trace."""
        if isinstance(self.outcome, Candidate):
            return self.outcome.row()
        return {"candidate": self.label, "error": str(self.outcome)}


def candidates_of(trials: Iterable[Trial]) -> list[Candidate]:
    """The candidates of the trials that did not fail."""
    return [t.candidate for t in trials if t.candidate is not None]


def is_matmul(node: NodePlan) -> bool:
    """Whether the node multiplies an input by a weight of its own, in one of several ways."""
    rule = RULES[node.op_type]
    return bool(node.weights) and rule.kind == "anchor" and rule.dynamic


def is_dynamic_conv(node: NodePlan) -> bool:
    """Whether the node is a 1x1 Conv that finds the range of its input at run time."""
    return node.op_type == "Conv" and node.compute is Compute.DYNAMIC


def may_be_worth_trying(
    variant: Variant, plan: QuantPlan, trials: Sequence[Trial], contract: Contract | None
) -> bool:
    """Whether the variant may be worth a trial after those before it, by what is known before its
    plan is made; `plan` is that of the race.

    1. MatMuls in ways of their own: if there are more than a few of them.
    2. A last resort: if nothing that satisfies the contract, or reaches the aim, is good enough;
       and what computes in float for the most part is no better than a last resort.
    3. 1x1 Convs as dynamic products: if nothing that is good enough is worth as much as static
       Convs are where they pay.
    """
    is_for_convs = variant.pointwise is not None
    is_for_matmuls = variant.matmul in (Compute.DYNAMIC, Compute.BLOCKS) and not is_for_convs
    if is_for_matmuls and _has_few_matmuls(plan):  # 1
        return False
    if variant.is_last_resort:  # 2
        return worth_of_usable(trials, contract) <= POLICY.good_worth
    if is_for_convs:  # 3
        return worth_of_usable(trials, contract) <= POLICY.static_convs_worth
    return True


def worth_trying(variant: Variant, plan: QuantPlan, trials: Sequence[Trial]) -> bool:
    """Whether the variant, whose plan this is, is worth a trial, if it may be.

    1. 1x1 Convs as dynamic products: if there are more than a few.
    2. One scale per weight: if the same computes with more scales left fidelity to spare.
    3. Outliers treated: if the same computes without treatment were not faithful.
    4. Never the same plan twice.
    """
    if variant.pointwise is not None:  # 1
        dynamic = sum(map(is_dynamic_conv, plan.nodes))
        if dynamic < POLICY.rare_share * len(plan.weighted):
            return False
    if variant.granularity is not None:  # 2
        if not plan.config.per_channel or plan.in_four_bits:
            return False
        if not _has_spare_fidelity(_latest_like(plan, trials), candidates_of(trials)):
            return False
    if variant.treats_outliers:  # 3
        untreated = _latest_like(plan, trials)
        return untreated is not None and untreated.sqnr_db <= POLICY.faithful_db
    return not was_tried(plan, trials)  # 4


def worth_of_usable(trials: Iterable[Trial], contract: Contract | None) -> float:
    """The worth of the best candidate that satisfies the contract, or reaches the aim, and computes
    in integers for the most part; 0 if there is none.
    """
    usable = candidates_of(trials)
    if contract is not None:
        usable = satisfying(usable, contract)
    else:
        usable = [c for c in usable if c.reaches_aim]
    return max((c.worth for c in usable if _computes_in_integers(c.plan)), default=0.0)


def was_tried(plan: QuantPlan, trials: Iterable[Trial]) -> bool:
    """Whether one of the trials was of a plan that makes the same model."""
    return any(_identity(trial.plan) == _identity(plan) for trial in trials)


def computes_alike(plan: QuantPlan, other: QuantPlan) -> bool:
    """Whether all nodes compute in the same way in both plans, with outliers treated or not."""
    return [(n.node, n.compute) for n in plan.nodes] == [(n.node, n.compute) for n in other.nodes]


def _identity(plan: QuantPlan) -> tuple[object, ...]:
    """What two plans of one config must share to make the same model, whatever their reasons."""
    nodes = tuple((n.node, n.compute, n.granularity) for n in plan.nodes)
    return nodes, tuple(plan.outliers)


def _computes(plan: QuantPlan) -> tuple[object, ...]:
    return tuple((n.node, n.compute) for n in plan.nodes), tuple(plan.outliers)


def _latest_like(plan: QuantPlan, trials: Iterable[Trial]) -> Candidate | None:
    """The latest candidate whose nodes compute as the plan's do, with the same outliers treated."""
    alike = candidates_of(t for t in trials if _computes(t.plan) == _computes(plan))
    return alike[-1] if alike else None


def _computes_in_integers(plan: QuantPlan) -> bool:
    """Whether half of the nodes with weights do, or more; dynamic Convs, which float may beat by
    far, not counted.
    """
    integer = [n for n in plan.weighted if n.compute.is_integer and not is_dynamic_conv(n)]
    return 2 * len(integer) >= len(plan.weighted)


def _has_few_matmuls(plan: QuantPlan) -> bool:
    """Whether few of the nodes with weights could compute dynamically."""
    dynamic = [n for n in plan.weighted if RULES[n.op_type].dynamic]
    return len(dynamic) < POLICY.rare_share * len(plan.weighted)


def _has_spare_fidelity(candidate: Candidate | None, rivals: Sequence[Candidate]) -> bool:
    """Whether it is known to be faithful, and faster kernels could make it the best.

    Of outputs that are integers only the agreement is known: there is nothing to spare.
    """
    if candidate is None or candidate.fidelity is None or candidate.fidelity.sqnr_db is None:
        return False
    if candidate.sqnr_db < POLICY.faithful_db:
        return False
    return candidate.gain > max(c.worth for c in rivals) - POLICY.per_tensor_gain
