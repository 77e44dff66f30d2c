"""The noise that rounded weights make in a layer's output, by the second moments of its inputs.

Rows W (C, K) become Q, and make the noise tr((W - Q) H (W - Q)'), H = E[x x'] being the Gram matrix
of the inputs x. What is damped has a share of its mean diagonal added to that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Share of the mean diagonal that is added to it, so that H can be factored: the GPTQ paper's value.
DAMPING = 0.01
# Times DAMPING, where rounded rows are judged. With 1, as in the factor, the gain of GPTQ on many
# samples does not show (python -m tests.bench.accuracy); with 0.1, errors that few samples miss do
# not (test_gptq.py).
JUDGED_DAMPING = 0.5
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
