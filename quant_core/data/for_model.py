"""The samples that a caller names, opened for one model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort

from quant_core.data.inputs import fixed_specs, input_specs
from quant_core.data.samples import Samples, open_samples
from quant_core.data.spec import SampleSource, SampleSpec
from quant_core.model.session import Model, open_session


def samples_for(
    model: str | Path,
    samples: SampleSource | SampleSpec,
    *loaded: Model | ort.InferenceSession,
    sizes: Mapping[str, int] | None = None,
) -> Samples:
    """The samples for the model in that file; samples that are open already stay as they are.

    loaded  the model, a session of it from callers that have one, and others made of it, which may
            fix sizes
    sizes   of the inputs that are fixed

    Raises: DataError for samples that do not fit; ModelError if the model does not load.
    """
    if isinstance(samples, Samples):
        return samples
    first, *others = loaded or (Path(model),)
    is_open = isinstance(first, ort.InferenceSession)
    session = first if is_open else open_session(first, optimize=False)
    specs = fixed_specs(input_specs(session, *others), sizes or {})
    return open_samples(as_spec(samples), specs, Path(model), session)


def as_spec(samples: SampleSource | SampleSpec) -> SampleSpec:
    """The description of samples of which only the source is named."""
    return samples if isinstance(samples, SampleSpec) else SampleSpec(samples)
