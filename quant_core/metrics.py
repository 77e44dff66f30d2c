"""What a comparison with the float model measures, and the table `METRICS` of contract metrics.

A new metric is one row of the table, and a field of `Fidelity` if its value is not measured yet.
Contracts, reports, audits, the console and the command line all read the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from quant_core.text import plain

MAX_SQNR_DB = 200.0  # of outputs that do not differ: float32 itself keeps about 150 dB
PROBABILITY_ERROR = 0.02  # probabilities that differ by less lead to the same decisions


@dataclass(frozen=True, slots=True)
class OutputFidelity:
    """One output of the quantized model against the float model's, over all samples.

    cosine         cosine similarity in [-1, 1]
    sqnr_db        signal-to-quantization-noise ratio in dB, from -200 to 200
    centred_db     the same, of the values around the mean of them all where they vary: of ages or
                   years the mean says little, and is most of the signal
    lower_db       a lower confidence bound of it for a few other samples, from the spread over
                   these
    max_abs_error  largest absolute difference
    agreement      share of decisions that equal the float model's; None if nothing is decided
    flaw           why the output is unusable, "" if it is usable: it holds NaN or infinity where
                   float does not, or has another shape. An unusable float output has sqnr_db,
                   centred_db and lower_db -200, cosine -1 and an infinite max_abs_error; one that
                   has another shape for some samples only has the values of the others
    float_range    least and largest value of the float model, masks left out
    integer_db     of an integer output: SQNR of its numbers around their mean, or what decisions
                   count as, 20 dB where one in ten differs from float's, of all or of the mean
                   class if that is more; whichever is higher
    upper_integer_db  an upper confidence bound of it, from the spread over samples
    class_agreement  of an integer output: mean of the agreement over the classes of float
    is_reshaped    whether it has another shape than float's for some samples

    What does not apply is None: cosine, sqnr_db, centred_db, lower_db and max_abs_error of an
    integer output.
    """

    name: str
    cosine: float | None = None
    sqnr_db: float | None = None
    max_abs_error: float | None = None
    agreement: float | None = None
    flaw: str = ""
    float_range: tuple[float, float] | None = None
    centred_db: float | None = None
    lower_db: float | None = None
    integer_db: float | None = None
    upper_integer_db: float | None = None
    class_agreement: float | None = None
    is_reshaped: bool = False

    @property
    def measured_db(self) -> float | None:
        """`centred_db`, or `integer_db` of integers."""
        return self.integer_db if self.sqnr_db is None else self.centred_db

    @property
    def measured_lower_db(self) -> float | None:
        """`lower_db`, or `integer_db` of integers."""
        return self.integer_db if self.sqnr_db is None else self.lower_db

    @property
    def sound_db(self) -> float | None:
        """`measured_db`, but MAX_SQNR_DB for probabilities that differ little: small ones are
        tails.
        """
        return MAX_SQNR_DB if self.is_same_probability else self.measured_db

    @property
    def sound_lower_db(self) -> float | None:
        """`sound_db`, with `lower_db` in place of `centred_db`.

        `upper_integer_db` of integers: a decision that differs may be a tie, so that a few prove
        nothing.
        """
        if self.sqnr_db is None:
            return self.upper_integer_db
        return MAX_SQNR_DB if self.is_same_probability else self.lower_db

    @property
    def nearness(self) -> str:
        """`measured_db` for people; of integers with the share that equals float's."""
        text = f"has {self.measured_db:.1f} dB"
        if self.sqnr_db is not None:
            hides = self.sqnr_db > (self.measured_db or 0.0) + 1
            return f"{text} around its mean, {self.sqnr_db:.1f} dB with it" if hides else text
        if self.agreement is None:
            return text
        equal = f"{percent(self.agreement)} equal float's"
        if self.class_agreement is not None and self.class_agreement < self.agreement:
            equal += f", {percent(self.class_agreement)} of the mean class"
        return f"{text} ({equal})"

    @property
    def is_same_probability(self) -> bool:
        """Whether the values are probabilities that lead to the same decisions as float's."""
        if self.float_range is None or self.max_abs_error is None:
            return False
        lo, hi = self.float_range
        return lo >= 0 and hi <= 1 and self.max_abs_error < PROBABILITY_ERROR


@dataclass(frozen=True, slots=True)
class Fidelity:
    """A quantized model against its float original.

    cosine         mean over the float outputs
    sqnr_db        mean over the float outputs, in dB
    max_abs_error  largest one of all float outputs
    agreement      share of equal decisions: of the output that the labels fit, or without labels
                   of all outputs that have as many rows as the first one
    top1           share of labels that the quantized model predicts; negative labels are ignored
    flips_bad      number of labels that only the float model predicts
    flips_good     number of labels that only the quantized model predicts
    metric         value of the user's own function
    note           what makes these numbers doubtful, "" if nothing does
    """

    per_output: tuple[OutputFidelity, ...]
    samples: int
    cosine: float | None
    sqnr_db: float | None
    max_abs_error: float | None
    agreement: float | None
    top1: float | None = None
    top1_float: float | None = None
    flips_bad: int | None = None
    flips_good: int | None = None
    metric: float | None = None
    metric_float: float | None = None
    note: str = ""

    @property
    def sound_db(self) -> float | None:
        """`sound_db` of the worst output; None if no output can be compared."""
        return _least(output.sound_db for output in self.per_output)

    @property
    def measured_db(self) -> float | None:
        """`measured_db` of the worst output; None if no output can be compared."""
        return _least(output.measured_db for output in self.per_output)

    @property
    def measured_lower_db(self) -> float | None:
        """`measured_lower_db` of the worst output; None if no output can be compared."""
        return _least(output.measured_lower_db for output in self.per_output)

    @property
    def sound_lower_db(self) -> float | None:
        """`sound_lower_db` of the worst output; None if no output can be compared."""
        return _least(output.sound_lower_db for output in self.per_output)

    @property
    def flaws(self) -> tuple[str, ...]:
        """One line for each output that is unusable."""
        return tuple(f"output {o.name} {o.flaw}" for o in self.per_output if o.flaw)

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON values: an infinite error becomes null."""
        return plain(asdict(self))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fidelity:
        """The fidelity that `to_dict` wrote; an infinite error stays None."""
        per_output = tuple(OutputFidelity(**output) for output in values["per_output"])
        return cls(**{**values, "per_output": per_output})


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


@dataclass(frozen=True, slots=True)
class Metric:
    """One number that a contract may be held to. More is always better.

    value         value of the quantized model, None where it was not measured
    of_float      value of the float model itself. It is None where that means nothing; then
                  `max_drop` means nothing either
    needs_labels  whether it can only be measured with labels
    noise         (recorded value, number of samples) -> the part of the value that may change by
                  chance when the model is measured again elsewhere, in units of the value
    form          how a value is shown to people
    missing       what to do where it was not measured
    most          the largest value that it can have
    """

    name: str
    value: Callable[[Fidelity], float | None]
    of_float: Callable[[Fidelity], float | None] | None
    needs_labels: bool
    noise: Callable[[float, int], float]
    form: Callable[[float], str]
    missing: str
    most: float = math.inf


def standard_error(share: float, samples: int) -> float:
    """Standard error of a share in [0, 1] of so many samples, and never less than one sample."""
    variance = max(0.0, samples * share * (1 - share))
    return max(1.0, math.sqrt(variance)) / max(1, samples) + 1e-9


def _in_decibels(name: str, value: Callable[[Fidelity], float | None]) -> Metric:
    """A metric of how near outputs are to those of float."""
    return Metric(
        name=name,
        value=value,
        of_float=None,
        needs_labels=False,
        noise=lambda value, samples: 0.5,  # kernels of other CPUs round otherwise
        form="{:.1f} dB".format,
        missing="No output is float: use agreement",
    )


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            name="top1",
            value=lambda fidelity: fidelity.top1,
            of_float=lambda fidelity: fidelity.top1_float,
            needs_labels=True,
            noise=standard_error,
            form=percent,
            missing="Give labels that are whole numbers",
            most=1.0,
        ),
        Metric(
            name="agreement",
            value=lambda fidelity: fidelity.agreement,
            of_float=None,
            needs_labels=False,
            noise=standard_error,
            form=percent,
            missing="No output decides anything: use cosine, sqnr or module:function",
            most=1.0,
        ),
        Metric(
            name="cosine",
            value=lambda fidelity: fidelity.cosine,
            of_float=lambda fidelity: None if fidelity.cosine is None else 1.0,
            needs_labels=False,
            noise=lambda value, samples: 0.12 * (1 - value) + 1e-6,  # half a decibel
            form="{:.5f}".format,
            missing="No output is float: use agreement",
            most=1.0,
        ),
        _in_decibels("sqnr", lambda fidelity: fidelity.sqnr_db),
        _in_decibels("worst_sqnr", lambda fidelity: fidelity.sound_db),
        _in_decibels("worst_lower_sqnr", lambda fidelity: fidelity.sound_lower_db),
    )
}


def find_metric(name: str) -> Metric:
    """The row of this metric; a name outside the table is the user's own `module:function`."""
    if name in METRICS:
        return METRICS[name]
    return Metric(
        name=name,
        value=lambda fidelity: fidelity.metric,
        of_float=lambda fidelity: fidelity.metric_float,
        needs_labels=False,
        noise=lambda value, samples: 0.01 * abs(value),
        form="{:.2f}".format,
        missing="Pass the function to compare",
    )


def custom_metric_in(*metrics: str | None) -> str | None:
    """The first of these that is a metric of the user's own, "module:function"; None if none is."""
    return next((metric for metric in metrics if metric is not None and ":" in metric), None)


def default_metric(fidelity: Fidelity) -> Metric:
    """The metric to report without a contract: top1 if there were labels, else agreement."""
    return METRICS["agreement" if fidelity.top1 is None else "top1"]
