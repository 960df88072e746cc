"""Entropic plans of the PyTorch twin against the conditions of their optimum, assignment, and bad input."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

torch = pytest.importorskip("torch")
pytest.importorskip("ot", reason="POT is not installed")

from pf_torch import coupling  # noqa: E402
from pf_torch.coupling import entropic_plan  # noqa: E402

N, M, D = 11, 13, 3


def sides(outlier=0.0, n=N, m=M):
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((n, D)), rng.standard_normal((m, D)) + 0.7
    x[0] += outlier
    return x, y


def cost_of(x, y):
    cost = ((x[:, None] - y[None]) ** 2).sum(-1)
    return cost / cost.mean()


@pytest.mark.parametrize("outlier", [0.0, 30.0])
@pytest.mark.parametrize("epsilon", [1.0, 0.05, 0.01])
def test_a_balanced_plan_has_its_marginals_and_is_a_kernel_with_factors(outlier, epsilon):
    x, y = sides(outlier)
    plan = entropic_plan(x, y, epsilon=epsilon).numpy()
    assert plan.dtype == np.float64
    np.testing.assert_allclose(plan.sum(1), np.full(N, 1 / N), rtol=0, atol=1e-10)
    np.testing.assert_allclose(plan.sum(0), np.full(M, 1 / M), rtol=0, atol=1e-10)
    kernel = -cost_of(x, y) / epsilon
    keep = plan > 1e-250  # what is smaller has no logarithm
    logs = np.where(keep, np.log(np.where(keep, plan, 1.0)) - kernel, np.nan)
    rows = logs - np.nanmean(logs, axis=1, keepdims=True)
    if keep.all():  # log P + C / epsilon is a row's number plus a column's
        np.testing.assert_allclose(rows - rows[:1], 0, atol=1e-9)


def test_the_cost_of_a_plan_is_that_of_the_best_assignment_to_the_entropys_share():
    x, y = sides(m=N)
    cost = cost_of(x, y)
    best = cost[linear_sum_assignment(cost)].mean()
    excess = [float((entropic_plan(x, y, epsilon=epsilon).numpy() * cost).sum() - best) for epsilon in (0.2, 0.05)]
    assert 0 < excess[1] < excess[0] < 0.2 * np.log(N)  # epsilon times the largest difference of entropies
    assert excess[1] < 0.05 * np.log(N)


@pytest.mark.parametrize("outlier", [0.0, 5.0, 50.0])
@pytest.mark.parametrize("epsilon", [0.2, 0.02])
@pytest.mark.parametrize("unbalanced", [0.1, 1.0, 10.0])
def test_an_unbalanced_plan_is_stationary(outlier, epsilon, unbalanced):
    """d/dP of sum P C + epsilon sum P (log P - 1) + rho [KL(P 1, a) + KL(P^T 1, b)] is 0, entry by entry."""
    x, y = sides(outlier)
    plan = entropic_plan(x, y, epsilon=epsilon, unbalanced=unbalanced).numpy()
    log_rows, log_columns = (np.log(plan.sum(axis) * n) for axis, n in ((1, N), (0, M)))
    keep = plan > 1e-250
    logs = np.log(np.where(keep, plan, 1.0))
    slope = cost_of(x, y) + epsilon * logs + unbalanced * (log_rows[:, None] + log_columns)
    assert keep[1:].all()
    np.testing.assert_allclose(np.where(keep, slope, 0.0), 0, atol=1e-9)


def test_strong_marginals_are_held_and_weak_ones_let_go_of_an_outlier():
    x, y = sides(outlier=10.0)
    rows = [entropic_plan(x, y, epsilon=0.1, unbalanced=rho).numpy().sum(1) for rho in (1e3, 0.1)]
    np.testing.assert_allclose(rows[0], 1 / N, rtol=0.02)
    assert rows[1][0] < 1e-3 * rows[1][1:].min()


def test_the_unbalanced_plan_is_pots_where_pot_can():
    import ot

    x, y = sides()
    with pytest.warns(UserWarning, match="entropy"):
        want = ot.sinkhorn_unbalanced(
            [], [], cost_of(x, y), 0.2, 0.5, reg_type="entropy", stopThr=1e-14, numItermax=10_000
        )
    np.testing.assert_allclose(entropic_plan(x, y, epsilon=0.2, unbalanced=0.5), want, rtol=1e-8)


def test_the_plan_knows_neither_place_nor_unit_nor_order_of_the_cells():
    x, y = sides()
    plan = entropic_plan(x, y, epsilon=0.1)
    np.testing.assert_allclose(entropic_plan(7 * x + 3, 7 * y + 3, epsilon=0.1), plan, rtol=1e-8)
    np.testing.assert_allclose(entropic_plan(x[::-1].copy(), y, epsilon=0.1), plan.flip(0), rtol=1e-8)
    np.testing.assert_allclose(entropic_plan(y, x, epsilon=0.1), plan.T, rtol=1e-8)


@pytest.mark.parametrize("unbalanced", [0.0, 1.0])
def test_coincident_and_single_cells_have_a_plan(unbalanced):
    plan = entropic_plan(np.zeros((N, D)), np.zeros((M, D)), epsilon=0.1, unbalanced=unbalanced).numpy()
    np.testing.assert_allclose(plan, plan[0, 0], rtol=1e-12)
    assert 0.5 < entropic_plan(np.ones((1, D)), np.zeros((1, D)), epsilon=0.1).sum() <= 1 + 1e-12


def test_float32_and_tensors_that_want_gradients_are_taken_as_data():
    x, y = (torch.tensor(side, dtype=torch.float32) for side in sides())
    plan = entropic_plan(x.requires_grad_(), y, epsilon=0.1)
    assert not plan.requires_grad
    assert plan.dtype == torch.float64
    np.testing.assert_allclose(plan, entropic_plan(*sides(), epsilon=0.1), rtol=1e-4)


def test_bad_input_is_named(monkeypatch):
    x, y = sides()
    with pytest.raises(ValueError, match=r"x and y have shapes \(11, 3\) and \(13, 2\)"):
        entropic_plan(x, y[:, :2], epsilon=0.1)
    with pytest.raises(ValueError, match="with a cell on each side"):
        entropic_plan(x[:0], y, epsilon=0.1)
    for epsilon in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"epsilon is .*a number above 0"):
            entropic_plan(x, y, epsilon=epsilon)
    with pytest.raises(ValueError, match=r"unbalanced is -1\.0"):
        entropic_plan(x, y, epsilon=0.1, unbalanced=-1.0)
    with pytest.raises(ValueError, match="not finite"):
        entropic_plan(x * np.nan, y, epsilon=0.1)
    monkeypatch.setattr(coupling, "MAX_ITERATIONS", 3)
    for unbalanced in (0.0, 1.0):
        with pytest.raises(RuntimeError, match=r"did not converge in 3 rounds .*raise epsilon, which is 0\.01"):
            entropic_plan(x, y, epsilon=0.01, unbalanced=unbalanced)
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=r'pip install "perturb-forecast\[flow\]"'):
        entropic_plan(x, y, epsilon=0.1)
