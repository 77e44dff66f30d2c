"""GPTQ is pair-safe where the plan says so, and never worse than rounding to nearest."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from quant_core.calibrate.observe import Statistics
from quant_core.config import QuantConfig
from quant_core.deadline import NO_DEADLINE, Deadline
from quant_core.numerics import gptq
from quant_core.numerics.gptq import gptq_int4, gptq_int8
from quant_core.numerics.granularity import PerBlock, PerChannel, PerTensor
from quant_core.numerics.integer_weight import IntegerWeight
from quant_core.numerics.levels import EVEN, NORMAL
from quant_core.numerics.output_noise import damped, damping_of, output_noise
from quant_core.numerics.round_nearest import block_width, quantize_int4, quantize_int8
from quant_core.numerics.saturation import unsafe_pairs
from quant_core.numerics.sweep import Factor, lower_factor
from quant_core.plan.types import Compute, NodePlan, QuantPlan, Storage
from quant_core.rewrite.rounding import Rounding

SEEDS = range(8)


def problem(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (C, K), and Gram matrices (G, P, k, k) of inputs that vary together.

    Some inputs are always zero.
    """
    rng = np.random.default_rng(seed)
    groups, columns = 1 + seed % 2, [1, 7, 18, 32, 33, 70, 64, 96][seed]
    parts = 1 if seed < 6 else 2
    rows = rng.standard_normal((6 * groups, columns)).astype(np.float32)
    rows[0] = 0
    x = (
        rng.standard_normal((groups, 200, columns))
        @ rng.standard_normal((groups, columns, columns))
        + 1
    )
    x[:, :, ::5] = 0 if seed % 3 == 0 else x[:, :, ::5]
    x = x.reshape(groups, 200, parts, columns // parts)
    return rows, np.einsum("gnpk,gnpl->gpkl", x, x) / 200


def error(rows: np.ndarray, found: IntegerWeight, gram: np.ndarray) -> np.ndarray:
    """What rounding adds to each output on average, squared."""
    d = (rows - found.values).astype(np.float64).reshape(len(gram), -1, *gram.shape[1:3])
    return np.einsum("gopk,gpkl,gopl->go", d, gram, d).ravel()


@pytest.mark.parametrize("granularity", [PerChannel(), PerTensor()])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_int8_is_safe_and_never_worse_than_rounding_to_nearest(seed, safe, granularity):
    rows, gram = problem(seed)

    nearest = quantize_int8(rows, granularity, pair_safe=safe)
    found = gptq_int8(rows, gram, granularity, pair_safe=safe)

    assert not safe or len(unsafe_pairs(found.q)) == 0
    assert found.scale.shape == nearest.scale.shape
    worst, scale = error(rows, nearest, gram).sum(), np.einsum("gpkk->", gram)
    assert (
        error(rows, found, gram).sum() <= worst * (1 + 1e-4) + 1e-12 * scale
    )  # errors are judged in float32


@pytest.mark.parametrize("levels", [EVEN, NORMAL], ids=["even", "normal"])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_int4_fits_its_types_is_safe_and_never_worse_than_rounding_to_nearest(seed, safe, levels):
    rows, gram = problem(seed)
    block = block_width(gram.shape[-1], 16)

    nearest = quantize_int4(rows, block, pair_safe=safe, levels=levels)
    found = gptq_int4(rows, gram, block, pair_safe=safe, levels=levels)

    assert -8 <= found.blocks.min() <= found.blocks.max() <= 7
    assert 1 <= found.multipliers.min() <= found.multipliers.max() <= 15
    multipliers = np.repeat(found.multipliers, block, axis=1)
    np.testing.assert_array_equal(found.q, levels.table[multipliers, found.blocks + 8])
    assert not safe or len(unsafe_pairs(found.q)) == 0
    assert error(rows, found, gram).sum() <= error(rows, nearest, gram).sum() * (1 + 1e-4)


def test_it_gains_where_inputs_vary_together():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((16, 64)).astype(np.float32)
    x = rng.standard_normal((500, 4)) @ rng.standard_normal((4, 64)) + 0.1 * rng.standard_normal(
        (500, 64)
    )
    gram = (x.T @ x / 500)[None, None]

    for nearest, found in (
        (quantize_int8(rows, pair_safe=True), gptq_int8(rows, gram, pair_safe=True)),
        (quantize_int4(rows, 32), gptq_int4(rows, gram, 32)),
    ):
        assert error(rows, found, gram).sum() < 0.5 * error(rows, nearest, gram).sum()


def test_scales_are_at_least_the_floor():
    rows, gram = problem(2)
    floor = np.full(len(rows), 0.3)

    assert np.all(gptq_int8(rows, gram, floor=floor, pair_safe=True).scale >= np.float32(0.3))
    assert np.all(gptq_int4(rows, gram, 1, floor=floor).scale >= np.float32(0.3))


def gemm_in_int4() -> tuple[ir.Node, ir.Value, QuantPlan]:
    """A Gemm of 100 columns in blocks of 20, and its plan."""
    weight = ir.Value(
        name="w",
        const_value=ir.tensor(np.random.default_rng(0).standard_normal((4, 100), np.float32)),
    )
    node = ir.Node(
        "", "Gemm", [ir.Value(name="x"), weight], [ir.AttrInt64("transB", 1)], name="gemm"
    )
    planned = NodePlan(
        "gemm",
        "Gemm",
        Compute.STATIC,
        Storage.INT4,
        ("w",),
        400,
        granularity=PerBlock(20),
        pair_safe=True,
    )
    config = QuantConfig(bits=4, block_size=16)
    return node, weight, QuantPlan(config, "x86", (planned,), activations={}, means={})


def test_weights_are_rounded_to_nearest_once_there_is_no_time():
    node, weight, plan = gemm_in_int4()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 2, 1, 50)) * np.linspace(0.1, 5, 50)
    stats = Statistics(gram_matrices={"gemm": np.einsum("npok,npol->opkl", x, x) / 200})

    def integers(stats: Statistics, deadline: Deadline = NO_DEADLINE) -> np.ndarray:
        rounding = Rounding(plan, stats, deadline=deadline)
        return rounding.integers(node, weight, plan.nodes[0]).integers.q

    nearest = integers(Statistics())
    assert not np.array_equal(integers(stats), nearest)
    np.testing.assert_array_equal(integers(stats, Deadline.after(0)), nearest)


def test_blocks_of_a_wide_weight_keep_within_the_parts_of_its_gram_matrix():
    """100 columns in two parts of 50: blocks of 20 would lie in both."""
    node, weight, plan = gemm_in_int4()
    rounding = Rounding(plan, Statistics(gram_matrices={"gemm": np.stack([[np.eye(50)] * 2])}))

    found = rounding.integers(node, weight, plan.nodes[0]).integers

    width = 100 // found.multipliers.shape[1]
    assert 50 % width == 0
    np.testing.assert_array_equal(
        found.q, found.blocks * np.repeat(found.multipliers, width, axis=1).astype(int)
    )


@pytest.mark.parametrize("safe", [True, False])
def test_no_int4_step_up_or_down_lessens_the_error_much_further(safe):
    """Descent ends where no single weight can gain more than a hundredth, pairs allowing."""
    rows, gram = problem(5)
    found = gptq_int4(rows, gram, block_width(gram.shape[-1], 16), pair_safe=safe)
    spread = np.repeat(
        found.multipliers, rows.shape[1] // found.multipliers.shape[1], axis=1
    ).astype(int)
    start, gains = error(rows, found, gram).sum(), []

    for column in range(rows.shape[1]):
        for sign in (-1, 1):
            q = found.q.astype(int)
            q[:, column] += sign * spread[:, column]
            fits = (-8 * spread <= q).all() and (q <= 7 * spread).all()
            if fits and not (safe and len(unsafe_pairs(q))):
                gains.append(start - error(rows, IntegerWeight(q, found.scale), gram).sum())

    assert max(gains, default=0.0) < 0.01 * start


@pytest.mark.parametrize("samples", [8, 24, 64])
def test_few_samples_do_not_cost_what_they_do_not_show(samples):
    """Weights fitted to fewer inputs than columns are about as good on others as nearest ones."""
    rng = np.random.default_rng(samples)
    rows = rng.normal(size=(32, 64)).astype(np.float32)
    seen = rng.normal(size=(samples, 64))
    gram = (seen.T @ seen / samples)[None, None]

    nearest, fitted = (
        np.square(rows - found.values).sum()  # on white inputs, all of which count alike
        for found in (quantize_int8(rows, pair_safe=True), gptq_int8(rows, gram, pair_safe=True))
    )

    assert fitted < 4 * nearest


@pytest.mark.parametrize("levels", [EVEN, NORMAL], ids=["even", "normal"])
def test_non_negative_rows_keep_their_signs_and_exact_zeros(levels):
    """A filter bank in front of a Log has no value for a negative sum."""
    rng = np.random.default_rng(5)
    rows = np.maximum(0, rng.standard_normal((8, 64))).astype(np.float32)
    x = rng.standard_normal((200, 4)) @ rng.standard_normal((4, 64))
    gram = (x.T @ x / 200)[None, None].astype(np.float32)

    eight, four = gptq_int8(rows, gram), gptq_int4(rows, gram, 32, levels=levels)

    for found in (eight, four):
        assert (found.q >= 0).all()
        assert (found.q[rows == 0] == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_noise_that_a_sweep_adds_up_is_that_of_its_outputs(seed):
    rows, gram = problem(seed)
    scale = np.maximum(np.abs(rows).max(1), 1) / np.float32(40)

    (swept,) = gptq._int8_sweep(rows, Factor.of(gram), scale[None], pair_safe=False)

    for times in (0.0, 0.5):
        damping = times * damping_of(gram)
        exact = output_noise(rows, swept.integers * scale[:, None], damped(gram, damping))
        largest = output_noise(rows, rows + scale[:, None], damped(gram, damping))
        np.testing.assert_allclose(
            swept.noise(damping), exact, rtol=1e-3, atol=1e-4 * largest.max()
        )


@pytest.mark.parametrize(("count", "width"), [(3, 9), (2, 64), (1, 130), (2, 200)])
def test_a_factor_by_blocks_is_that_of_numpy(count, width):
    rows = np.random.default_rng(width).standard_normal((count, width, 3 * width))
    matrices = (rows @ rows.swapaxes(1, 2) / width).astype(np.float32)

    found = lower_factor(matrices[:, ::-1, ::-1])

    wanted = np.linalg.cholesky(matrices[:, ::-1, ::-1].astype(np.float64))
    assert not np.triu(found, 1).any()
    rounding = width * np.finfo(np.float32).eps  # of sums of so many products
    np.testing.assert_allclose(found, wanted, atol=rounding * np.abs(wanted).max())


def test_a_matrix_that_is_not_positive_definite_has_no_factor():
    with pytest.raises(np.linalg.LinAlgError):
        lower_factor(-np.eye(100, dtype=np.float32)[None])
