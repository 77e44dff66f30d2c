"""The words of a plan: how a node computes, how its weights are stored, and the whole decision for
one model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from quant_core.config import QuantConfig
from quant_core.errors import RequestError
from quant_core.fields import known_keys
from quant_core.numerics.granularity import BothAxes, Granularity, PerBlock, PerChannel, PerTensor
from quant_core.numerics.weight_methods import WEIGHT_METHODS
from quant_core.optimize.applied import Applied
from quant_core.plan.compute import Compute as Compute  # a word of plans, and of targets
from quant_core.plan.targets import find_target


class Storage(StrEnum):
    """The type of a weight in the file."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def bits(self) -> int:
        """Bits of one weight."""
        return _BITS[self]

    @property
    def is_integer(self) -> bool:
        """Whether weights are rounded to integers."""
        return self in (Storage.INT8, Storage.INT4)

    @classmethod
    def of_bits(cls, bits: int) -> Storage:
        """The storage that `bits` of a config ask for: 32, 16, 8 or 4."""
        return next(storage for storage, width in _BITS.items() if width == bits)


WRITE_ONE = "Write one with --dry-run --format json"
UNEVEN = " uneven"  # behind the size of a block
_BITS = {Storage.FLOAT32: 32, Storage.FLOAT16: 16, Storage.INT8: 8, Storage.INT4: 4}


@dataclass(frozen=True, slots=True)
class OutlierTreatment:
    """How the outliers of one tensor are treated where dynamic nodes read it
    (calibrate/outliers.py).

    smooth   channels are divided, and weights multiplied, by SmoothQuant's factors
    split    the channels that are multiplied in float
    gain_db  by how many dB that brings the products nearer to float's
    """

    smooth: bool
    split: tuple[int, ...]
    gain_db: float


@dataclass(frozen=True, slots=True)
class NodeChoice:
    """What a search asks of one node; None leaves the decision to the config.

    compute      how the node computes, if it can
    storage      how its weights are stored, if they can be
    granularity  of the weights: of a dynamic node in 8 bits, or how wide blocks of 4 bits are
    reason       why it computes in float, where float was chosen
    """

    compute: Compute | None = None
    storage: Storage | None = None
    granularity: Granularity | None = None
    reason: str = "no integer kernel was found better"


# A node in float stores its weights as they are; one in float16 computes in float, and weights that
# float16 cannot hold are stored in float32.
IN_FLOAT = NodeChoice(Compute.FLOAT)
IN_FLOAT16 = NodeChoice(storage=Storage.FLOAT16)
IN_FLOAT32 = NodeChoice(storage=Storage.FLOAT32)
IN_INT8 = NodeChoice(storage=Storage.INT8)
IN_OWN_SCALES = NodeChoice(granularity=PerChannel())  # of each channel; in 4 bits they are finer


@dataclass(frozen=True, slots=True)
class NodePlan:
    """What becomes of one node.

    storage      of its weights, None where it has none
    granularity  of its rounded weights, None where none is rounded; in 4 bits the real width of a
                 block, but of a node with two weights, each of which has the divisor of its columns
                 that is nearest to that width
    pair_safe    its int8 rows must be safe from saturating int16 sums (numerics/saturation.py)
    reason       why it does not compute in integers, or what it was fused into
    """

    node: str
    op_type: str
    compute: Compute
    storage: Storage | None = None
    weights: tuple[str, ...] = ()
    elements: int = 0
    reason: str = ""
    granularity: Granularity | None = None
    pair_safe: bool = False

    @property
    def is_rounded(self) -> bool:
        """Whether its weights become integers."""
        return self.storage is not None and self.storage.is_integer

    def in_float(self, storage: Storage) -> NodePlan:
        """This node in float, with its weights stored as these floats."""
        return replace(
            self, compute=Compute.FLOAT, storage=storage, granularity=None, pair_safe=False
        )

    @property
    def weight_storage(self) -> Storage:
        """The storage of a node that has weights."""
        assert self.storage is not None, f"{self.node} has no weights"
        return self.storage

    @property
    def weight_granularity(self) -> Granularity:
        """What shares a scale in the weights of a node whose weights are rounded."""
        assert self.granularity is not None, f"{self.node} has no weight that is rounded"
        return self.granularity

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives the node's plan back."""
        own = {name: getattr(self, name) for name in self.__slots__}
        return own | {
            "compute": str(self.compute),
            "storage": str(self.storage or ""),
            "weights": list(self.weights),
            "granularity": _granularity_to_json(self.granularity),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NodePlan:
        """Raises: RequestError for an unknown key, ValueError for an unknown word."""
        known = known_keys(cls, values)
        known["compute"] = Compute(known["compute"])
        known["storage"] = Storage(known["storage"]) if known.get("storage") else None
        known["granularity"] = _granularity_from_json(known.get("granularity"))
        return cls(**known)


@dataclass(frozen=True, slots=True)
class QuantPlan:
    """The whole decision for one model; `to_json` and `from_json` are inverse.

    activations   tensor that is quantized -> tensor whose range and parameters it has (itself, or
                  the one that a node which only moves values took it from)
    means         input of nodes with weights -> axes of its channels, whose means bias correction
                  needs: a Conv and a MatMul that read one tensor see other axes of it
    outliers      input of dynamic nodes -> how its outliers are treated
    constants     other constants -> float16, or why they stay float32: large ones, and with
                  float_storage float16 all
    stored        node -> how a search chose to store its weights, where the config would store them
                  otherwise
    equalized_db  by how much cross-layer equalization brought outputs nearer to float's, 0 where it
                  was not done
    tuned_biases_db  the same of empirical bias correction
    holdout       every so many-th sample was held out when weights were fitted; 0 if none was
    rounding_samples  weights are only stored, as integers could not make the model faster, and are
                  rounded for so many samples; 0 if that was not found
    rewrites      how the float model was rewritten before it was planned, change by change
    idle_globs    a key of the config with a glob of it that matches nothing in the model, for each
    """

    config: QuantConfig
    target: str
    nodes: tuple[NodePlan, ...]
    activations: Mapping[str, str]
    means: Mapping[str, tuple[int, ...]]
    outliers: Mapping[str, OutlierTreatment] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)
    stored: Mapping[str, Storage] = field(default_factory=dict)
    equalized_db: float = 0.0
    tuned_biases_db: float = 0.0
    holdout: int = 0
    rounding_samples: int = 0
    rewrites: tuple[Applied, ...] = ()
    idle_globs: tuple[str, ...] = ()

    @property
    def weighted(self) -> list[NodePlan]:
        """The nodes that have weights."""
        return [n for n in self.nodes if n.weights]

    @property
    def in_four_bits(self) -> list[str]:
        """The nodes whose weights are stored in 4 bits."""
        return [n.node for n in self.nodes if n.storage is Storage.INT4]

    @property
    def uses_gptq(self) -> bool:
        """Whether weights are rounded with GPTQ where calibration allows it."""
        return WEIGHT_METHODS[self.config.weight_method].uses_gram

    @property
    def fits_four_bits(self) -> bool:
        """Whether its weights in 4 bits are fitted to the calibration samples."""
        return bool(self.in_four_bits) and self.uses_gptq

    @property
    def stores_less(self) -> bool:
        """Whether any weight or constant takes fewer bytes than in float32."""
        found = {n.storage for n in self.nodes} | set(self.constants.values())
        return not found.isdisjoint((Storage.FLOAT16, Storage.INT8, Storage.INT4))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "config": self.config.to_dict(),
            "target": self.target,
            "equalized_db": self.equalized_db,
            "tuned_biases_db": self.tuned_biases_db,
            "holdout": self.holdout,
            "rounding_samples": self.rounding_samples,
            "rewrites": [change.to_dict() for change in self.rewrites],
            "idle_globs": list(self.idle_globs),
            "nodes": [n.to_dict() for n in self.nodes],
            "activations": dict(self.activations),
            "means": {tensor: list(axes) for tensor, axes in self.means.items()},
            "outliers": {tensor: asdict(how) for tensor, how in self.outliers.items()},
            "constants": dict(self.constants),
            "stored": {node: str(storage) for node, storage in self.stored.items()},
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantPlan:
        """The plan that `to_dict` wrote. Raises: RequestError if this is not a plan."""
        try:
            known = known_keys(cls, values)
            nodes = tuple(NodePlan.from_dict(node) for node in known["nodes"])
            for node, count in Counter(planned.node for planned in nodes).items():
                if count > 1:
                    raise ValueError(f"names node {node} {count} times")
            outliers = {
                tensor: OutlierTreatment(**known_keys(OutlierTreatment, how))
                for tensor, how in known["outliers"].items()
            }
            return cls(
                config=QuantConfig.from_dict(known["config"]),
                target=find_target(known["target"]).name,
                nodes=nodes,
                activations=dict(known["activations"]),
                means={tensor: tuple(axes) for tensor, axes in known["means"].items()},
                outliers=outliers,
                constants=dict(known["constants"]),
                stored={node: Storage(word) for node, word in known["stored"].items()},
                equalized_db=float(known["equalized_db"]),
                tuned_biases_db=float(known.get("tuned_biases_db", 0.0)),
                holdout=int(known.get("holdout", 0)),
                rounding_samples=int(known.get("rounding_samples", 0)),
                rewrites=tuple(Applied.from_dict(row) for row in known.get("rewrites", ())),
                idle_globs=tuple(map(str, known.get("idle_globs", ()))),
            )
        except KeyError as error:
            raise RequestError("is missing", str(error.args[0]), WRITE_ONE) from error
        except (TypeError, ValueError) as error:
            raise RequestError(str(error), "plan", WRITE_ONE) from error

    @classmethod
    def from_json(cls, text: str) -> QuantPlan:
        """Raises: RequestError if the text is not a plan."""
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise RequestError(f"not JSON: {error}", "plan", WRITE_ONE) from error


def _granularity_to_json(granularity: Granularity | None) -> str | int | None:
    """Words for whole tensors and channels, the size of a block, and whether it may be uneven."""
    match granularity:
        case PerTensor():
            return "tensor"
        case PerChannel():
            return "channel"
        case BothAxes():
            return "both axes"
        case PerBlock(size, may_be_uneven):
            return f"{size}{UNEVEN}" if may_be_uneven else size
    return None


def _granularity_from_json(value: str | int | None) -> Granularity | None:
    """The inverse of `_granularity_to_json`. Raises: ValueError for another word."""
    if value is None:
        return None
    if isinstance(value, int):
        return PerBlock(value)
    size, uneven, rest = value.partition(UNEVEN)
    if uneven and size.isdecimal() and not rest:
        return PerBlock(int(size), may_be_uneven=True)
    words: dict[str, Granularity] = {
        "tensor": PerTensor(),
        "channel": PerChannel(),
        "both axes": BothAxes(),
    }
    if value not in words:
        raise ValueError(f"granularity {value!r} is not tensor, channel, both axes or a block size")
    return words[value]
