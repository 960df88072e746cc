"""Entropic plans: POT under PyTorch and ott under JAX against each other and against Sinkhorn written out in NumPy."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

from parity_tests.jets import WIDE
from parity_tests.trajectories import backend_of
from pf_core.coupling import exact_plan, squared_distances

SOLVERS = {"jax": "ott", "torch": "ot"}
MISSING = {twin: importlib.util.find_spec(solver) is None for twin, solver in SOLVERS.items()}
N, M, D = 13, 7, 3
REGIMES = [(0.5, 0.0), (0.05, 0.0), (0.5, 2.0), (0.05, 0.25)]  # epsilon, unbalanced


@pytest.fixture(autouse=True)
def _x64_put_back():
    import jax

    before = jax.config.values["jax_enable_x64"]
    yield
    jax.config.update("jax_enable_x64", before)


def solver(twin: str) -> Any:
    """A twin's Backend in float64, where the library of its plans is installed."""
    if MISSING[twin]:
        pytest.skip(f"{SOLVERS[twin]} is not installed: entropic plans need the extra 'flow'")
    return backend_of(twin, "float64")


def cells() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(5)
    return draw.normal(size=(N, D)), draw.normal(0.7, 1.4, (M, D))


def log_sum(values: np.ndarray, axis: int) -> np.ndarray:
    largest = values.max(axis=axis, keepdims=True)
    return np.log(np.exp(values - largest).sum(axis=axis)) + largest.squeeze(axis)


def sinkhorn(x: np.ndarray, y: np.ndarray, epsilon: float, unbalanced: float, rounds: int = 40_000) -> np.ndarray:
    """P = u exp(-C / epsilon) v by the textbook iteration on logarithms: u = (a / K v)^tau, v = (b / K^T u)^tau."""
    cost = squared_distances(x, y).astype(WIDE)
    kernel = -cost / cost.mean() / WIDE(epsilon)
    tau = WIDE(unbalanced) / (WIDE(unbalanced) + WIDE(epsilon)) if unbalanced else WIDE(1)
    log_u, log_v = np.zeros(len(x), WIDE), np.zeros(len(y), WIDE)
    for _ in range(rounds):
        before = log_u
        log_u = tau * (-np.log(WIDE(len(x))) - log_sum(kernel + log_v, 1))
        log_v = tau * (-np.log(WIDE(len(y))) - log_sum(kernel + log_u[:, None], 0))
        if np.abs(log_u - before).max() < 1e-16:
            break
    else:
        raise RuntimeError("the reference did not converge")
    return np.exp(log_u[:, None] + kernel + log_v).astype(np.float64)


@pytest.mark.parametrize(("epsilon", "unbalanced"), REGIMES)
@pytest.mark.parametrize("twin", SOLVERS)
def test_a_plan_is_that_of_sinkhorn_written_out(twin: str, epsilon: float, unbalanced: float) -> None:
    x, y = cells()
    found = solver(twin).entropic_plan(x, y, epsilon=epsilon, unbalanced=unbalanced)
    wanted = sinkhorn(x, y, epsilon, unbalanced)
    assert found.shape == (N, M)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9 * wanted.max())


@pytest.mark.parametrize(("epsilon", "unbalanced"), REGIMES)
def test_pot_and_ott_make_the_same_plan(epsilon: float, unbalanced: float) -> None:
    one, two = (
        solver(twin).entropic_plan(*cells(), epsilon=epsilon, unbalanced=unbalanced) for twin in ("jax", "torch")
    )
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-9 * two.max())


@pytest.mark.parametrize("twin", SOLVERS)
def test_a_balanced_plan_has_the_marginals_and_costs_little_more_than_the_exact_one(twin: str) -> None:
    x, y = cells()
    cost = squared_distances(x, y)
    plan = solver(twin).entropic_plan(x, y, epsilon=0.01, unbalanced=0.0)
    np.testing.assert_allclose(plan.sum(1), 1 / N, rtol=1e-8)
    np.testing.assert_allclose(plan.sum(0), 1 / M, rtol=1e-8)
    least = float(exact_plan(x, y).multiply(cost).sum())
    # The entropy of a plan is at most log(n m).
    assert least <= (plan * cost).sum() <= least + 0.01 * cost.mean() * np.log(N * M)


@pytest.mark.parametrize("twin", SOLVERS)
def test_an_unbalanced_plan_leaves_a_far_cell_out(twin: str) -> None:
    x, y = cells()
    x[4] += 40.0
    backend = solver(twin)
    held = backend.entropic_plan(x, y, epsilon=0.05, unbalanced=0.0)[4].sum()
    free = backend.entropic_plan(x, y, epsilon=0.05, unbalanced=0.25)[4].sum()
    assert held == pytest.approx(1 / N, rel=1e-8)
    assert free < 1e-3 / N


@pytest.mark.parametrize("twin", SOLVERS)
def test_cells_that_coincide_have_an_even_plan(twin: str) -> None:
    plan = solver(twin).entropic_plan(np.ones((N, D)), np.ones((M, D)), epsilon=0.05, unbalanced=0.0)
    np.testing.assert_allclose(plan, 1 / (N * M), rtol=1e-10)


@pytest.mark.parametrize("twin", SOLVERS)
@pytest.mark.parametrize(
    ("x", "y", "options"),
    [
        (np.ones((3, 2)), np.ones((5, 3)), {}),
        (np.ones((0, 2)), np.ones((5, 2)), {}),
        (np.full((3, 2), np.nan), np.ones((5, 2)), {}),
        (np.ones((3, 2)), np.ones((5, 2)), {"epsilon": 0.0}),
        (np.ones((3, 2)), np.ones((5, 2)), {"unbalanced": -1.0}),
    ],
    ids=["widths", "no cells", "not finite", "no entropy", "negative strength"],
)
def test_misuse_is_a_value_error_also_without_the_library(twin: str, x: Any, y: Any, options: dict) -> None:
    with pytest.raises(ValueError, match="wanted"):
        backend_of(twin, "float64").entropic_plan(x, y, **({"epsilon": 0.1, "unbalanced": 0.0} | options))


@pytest.mark.parametrize("twin", SOLVERS)
def test_a_library_that_is_missing_is_named_with_its_extra(twin: str) -> None:
    if not MISSING[twin]:
        pytest.skip(f"{SOLVERS[twin]} is installed")
    with pytest.raises(ImportError, match=r"perturb-forecast\[flow\]"):
        backend_of(twin, "float64").entropic_plan(*cells(), epsilon=0.1, unbalanced=0.0)
