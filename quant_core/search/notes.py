"""What a person should know about a result: why it is doubtful, and why bits changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from quant_core.calibrate.observe import Statistics
from quant_core.config import Mode
from quant_core.data.hashes import hash_value
from quant_core.data.input_hints import takes_bytes
from quant_core.data.samples import Samples
from quant_core.model import files, graph
from quant_core.model.session import Feed
from quant_core.plan.other_constants import LARGE_SHARE
from quant_core.plan.types import NodePlan, QuantPlan, Storage
from quant_core.search.bench import Bench
from quant_core.search.candidate import Candidate
from quant_core.search.policy import POLICY
from quant_core.text import joined

SHOWN_WEIGHTS = 3  # in a note; more are counted


def speed_note(best: Candidate) -> str:
    """A note that the model is slower than float; "" if it is not, or cannot be timed."""
    if best.speedup is None or best.speedup >= POLICY.equal_speed:
        return ""
    was_raced = best.plan.config.mode == Mode.AUTO
    why = "nothing faster was found" if was_raced else "mode auto may find faster"
    return f"{best.speedup:.2f}x of float's speed: {why}"


def stored_note(plan: QuantPlan, samples: Samples | None) -> str:
    """A note that weights are only stored, as integers could not gain; "" where they might."""
    if samples is None or not plan.rounding_samples:
        return ""
    count = min(plan.rounding_samples, len(samples))
    few = f", rounded for {count} samples" if count < len(samples) else ""
    return f"integers cannot make it faster: weights are only stored{few}"


def time_note(
    samples: Samples | None,
    stats: Statistics | None,
    judges: Samples | None,
    bench: Bench | None,
    *,
    is_cut_short: bool,
) -> str:
    """A note on what the time budget was too short for; "" if for nothing.

    samples, stats  of the calibration; without stats nothing was calibrated
    judges, bench   which samples should have judged candidates, and what did
    is_cut_short    whether there was no time for one more trial when the search ended
    """
    found = []
    if samples is not None and stats is None:
        found.append("nothing was calibrated")
    if samples is not None and stats is not None and stats.samples < len(samples):
        found.append(f"calibrated on {stats.samples} of {len(samples)} samples")
    given = judges if judges is not None and not judges.are_random else None
    if given is not None and bench is not None and len(bench.samples) < len(given):
        found.append(f"judged by {len(bench.samples)} of {len(given)}")
    if is_cut_short:
        found.append("the search ended with the best plan that it had")
    return f"the time budget was short: {', '.join(found)}" if found else ""


def alike_note(samples: Samples | None) -> str:
    """A note that all given samples are equal, so that no others were measured; else ""."""
    if samples is None or samples.are_random or len(samples) == 1:
        return ""
    contents = map(_content, samples)
    first = next(contents)
    if any(content != first for content in contents):
        return ""
    return f"all {len(samples)} samples are the same: nothing was measured for other inputs"


def _content(feed: Feed) -> bytes:
    """All that the feed holds."""
    parts: list[bytes] = []
    for name, value in feed.items():
        hash_value(name, value, parts.append)
    return b"".join(parts)


def bytes_note(samples: Samples | None, original: Path) -> str:
    """A note that samples are bytes where the model takes floats of any scale; else ""."""
    names = samples.bytes_for_floats() if samples is not None else []
    if not names:
        return ""
    model = files.load(original)
    wrong = [name for name in names if not takes_bytes(model, name)]
    if not wrong:
        return ""
    return f"samples of {', '.join(wrong)} are bytes, taken as 0 to 255: are they to be scaled?"


def size_note(size_bytes: int, float_size_bytes: int) -> str:
    """A note that the file is larger than its float original; "" if it is not."""
    if size_bytes <= float_size_bytes:
        return ""
    return f"larger than its original: {size_bytes} bytes, not {float_size_bytes}"


def float_weights_note(model: ir.Model, plan: QuantPlan) -> str:
    """A note on which large weights stay float, and why; "" if none does."""
    total = files.constant_bytes(model)
    found: dict[str, tuple[int, str]] = {}
    for node in plan.nodes:
        if node.storage is Storage.FLOAT32:
            names = ", ".join(node.weights)
            found[names] = 4 * node.elements, node.reason
    sizes = _constant_sizes(model)
    for name, reason in plan.constants.items():
        if reason != Storage.FLOAT16:
            found[name] = sizes.get(name, total), reason.removeprefix("float32: ")
    large = {name: row for name, row in found.items() if row[0] >= LARGE_SHARE * total}
    ordered = sorted(large, key=lambda name: -large[name][0])
    shown = [f"{name} stays float: {large[name][1]}" for name in ordered[:SHOWN_WEIGHTS]]
    if len(ordered) > SHOWN_WEIGHTS:
        shown.append(f"{len(ordered) - SHOWN_WEIGHTS} more weights stay float")
    return joined(shown)


def _constant_sizes(model: ir.Model) -> dict[str, int]:
    """Constant -> its bytes."""
    return {
        str(value.name): value.const_value.nbytes
        for value in graph.initializers_of(model)
        if value.const_value is not None
    }


def with_reasons(plan: QuantPlan, requested: QuantPlan, why: str) -> QuantPlan:
    """The plan with the reason `why` at each node that was requested in 4 bits and takes more."""
    four = set(requested.in_four_bits)

    def explained(node: NodePlan) -> NodePlan:
        if node.node not in four or node.storage in (Storage.INT4, None):
            return node
        return replace(node, reason=joined((node.reason, f"{node.storage}: {why}")))

    return replace(plan, nodes=tuple(explained(node) for node in plan.nodes))
