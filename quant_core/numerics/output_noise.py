"""The noise that rounded weights make in a layer's output, by the second moments of its inputs.

Rows W (C, K) become Q, and make the noise tr((W - Q) H (W - Q)'), H = E[x x'] being the Gram matrix
of the inputs x. What is damped has a share of its mean diagonal added to that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant_core.numerics.integer_weight import QMAX8
from quant_core.numerics.sqnr import sqnr_db

# Share of the mean diagonal that is added to it, so that H can be factored: the GPTQ paper's value.
DAMPING = 0.01
# Times DAMPING, where rounded rows are judged. With 1, as in the factor, the gain of GPTQ on many
# samples does not show (python -m tests.bench.accuracy); with 0.1, errors that few samples miss do
# not (test_gptq.py).
JUDGED_DAMPING = 0.5
# Of the energy of the largest row of a weight: below it a row is dead, as pruning and folded
# normalizations leave it. Not tuned: float32 itself keeps 2**-24 of an amplitude.
DEAD_ROW = 2.0**-48
MAX_COLUMNS = 1536  # of one Gram matrix: factoring it takes the cube of that


def parts_of(columns: int) -> int:
    """P: into how many Gram matrices of equal, even width K columns are split; 0 where no such
    split exists.

    One matrix has at most MAX_COLUMNS columns. The width is even so that no pair of neighbours is
    in two of them.
    """
    least = -(-columns // MAX_COLUMNS)
    if least == 1:
        return 1
    for parts in range(least, columns):
        width, rest = divmod(columns, parts)
        if rest == 0 and width % 2 == 0:
            return parts
    return 0


def output_noise(
    rows: NDArray[Any], values: NDArray[Any], gram: NDArray[Any] | None
) -> NDArray[np.float64]:
    """(C,): per row, the mean squared error of its output where `values` stand for it.

    rows, values  (C, K)
    gram          H, (G, P, k, k), second moments of the inputs; None if nothing is known of them:
                  then it is the identity, as for independent inputs of one size

    With values of 0 it is the row's signal.
    """
    d = (rows - values).astype(np.float32, copy=False)
    if gram is None:
        return np.asarray(np.einsum("ck,ck->c", d, d, dtype=np.float64))
    groups, parts, columns, _ = gram.shape
    d = d.reshape(groups, -1, parts, columns).transpose(0, 2, 1, 3)
    return np.asarray(
        np.einsum("gpok,gpok->go", d @ gram.astype(np.float32, copy=False), d, dtype=np.float64)
    ).reshape(-1)


def noise_db(
    exact: NDArray[Any],
    rounded: NDArray[Any],
    floor: NDArray[np.float64] | float = 0.0,
    gram: NDArray[Any] | None = None,
) -> tuple[float, float]:
    """SQNR of the outputs of a matrix (C, K), and of the worst of its rows that count, in dB.

    gram  of the inputs, if calibration has it: (G, P, k, k)

    A row does not count if it is dead, or if its bias sets the floor of its scale: then what the
    row adds is less than the bias is rounded by.
    """
    moments = None if gram is None else judged_moments(gram)
    signal = output_noise(exact, np.zeros_like(exact), moments)
    noise = output_noise(exact, rounded, moments)
    counts = signal > DEAD_ROW * signal.max(initial=0.0)
    counts &= np.broadcast_to(floor, signal.shape) * QMAX8 <= np.abs(exact).max(1, initial=0.0)
    worst = (noise[counts] / signal[counts]).max(initial=0.0)
    return sqnr_db(float(signal.sum()), float(noise.sum())), sqnr_db(1.0, float(worst))


def judged_moments(gram: NDArray[Any]) -> NDArray[np.float32]:
    """H by which rounded rows are judged: H of few samples sees no error where no input was."""
    return damped(gram, damping_of(gram, JUDGED_DAMPING))


def damping_of(gram: NDArray[Any], times: float = 1.0) -> NDArray[np.float64]:
    """(G, P): so many times DAMPING of the mean diagonal of each matrix; 1 where that is 0."""
    mean = np.einsum("gpkk->gpk", gram).mean(2, dtype=np.float64)
    return np.where(mean > 0, times * DAMPING * mean, 1.0)


def damped(gram: NDArray[Any], damping: NDArray[np.float64]) -> NDArray[np.float32]:
    """H with the damping (G, P) of each matrix added to its diagonal, (G, P, k, k)."""
    out = gram.astype(np.float32)
    diagonal = np.arange(out.shape[2])
    out[:, :, diagonal, diagonal] += damping[:, :, None].astype(np.float32)
    return out
