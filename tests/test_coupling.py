"""Plans against linear programming and brute force; pairs against the masses they are drawn from."""

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog

from pf_core import coupling
from pf_core.config import STANDARD_FLOOR, FlowConfig
from pf_core.coupling import argmax_pairs, coupler, exact_plan, pairs, sample_pairs, squared_distances, standard
from pf_core.errors import DataError


def cells(n: int, m: int, d: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(size=(m, d)) + 0.4


def whole_program(cost: np.ndarray) -> float:
    """The optimal cost by one linear program over all n m variables."""
    n, m = cost.shape
    rows = np.kron(np.eye(n), np.ones((1, m)))
    columns = np.kron(np.ones((1, n)), np.eye(m))
    totals = np.concatenate([np.full(n, 1.0 / n), np.full(m, 1.0 / m)])
    return float(linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=totals).fun)


def value(plan, x, y) -> float:
    return float(plan.multiply(squared_distances(x, y)).sum())


def check_marginals(plan, n, m):
    np.testing.assert_allclose(plan.toarray().sum(1), 1.0 / n, rtol=1e-12)
    np.testing.assert_allclose(plan.toarray().sum(0), 1.0 / m, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_plan_of_equal_sizes_is_the_best_of_all_permutations(seed):
    x, y = cells(6, 6, seed=seed)
    cost = squared_distances(x, y)
    best = min(sum(cost[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(6)))
    plan = exact_plan(x, y)
    assert value(plan, x, y) == pytest.approx(best / 6, rel=1e-12)
    check_marginals(plan, 6, 6)


@pytest.mark.parametrize(("n", "m"), [(1, 7), (7, 1), (2, 3), (12, 8), (17, 29), (31, 13), (40, 37)])
def test_the_plan_of_unequal_sizes_is_that_of_the_whole_linear_program(n, m):
    x, y = cells(n, m, seed=n)
    plan = exact_plan(x, y)
    assert value(plan, x, y) == pytest.approx(whole_program(squared_distances(x, y)), rel=1e-10)
    check_marginals(plan, n, m)
    assert plan.nnz < n + m


def test_unequal_sizes_agree_with_an_assignment_of_repeated_cells():
    x, y = cells(6, 9, seed=5)
    repeated = exact_plan(np.repeat(x, 3, axis=0), np.repeat(y, 2, axis=0))
    assert value(exact_plan(x, y), x, y) == pytest.approx(
        value(repeated, np.repeat(x, 3, axis=0), np.repeat(y, 2, axis=0)), rel=1e-12
    )


def test_coincident_cells_and_dimensions_that_do_not_vary_have_a_plan():
    x, y = np.zeros((5, 2)), np.zeros((7, 2))
    check_marginals(exact_plan(x, y), 5, 7)
    x, y = cells(11, 13)
    x[:, 1] = y[:, 1] = 4.0
    assert value(exact_plan(x, y), x, y) == pytest.approx(whole_program(squared_distances(x, y)), rel=1e-10)


def test_distances_are_squared_and_exact_far_from_the_origin():
    x, y = cells(5, 4)
    expected = ((x[:, None] - y[None]) ** 2).sum(-1)
    np.testing.assert_allclose(squared_distances(x + 1e3, y + 1e3), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (np.zeros((0, 3)), np.zeros((2, 3)), r"x has shape \(0, 3\)"),
        (np.zeros((2, 3)), np.zeros((0, 3)), "some cells each"),
        (np.zeros((2, 3)), np.zeros((2, 4)), r"\(n, d\) and \(m, d\)"),
        (np.zeros(3), np.zeros((2, 3)), "x has shape"),
        (np.full((2, 3), np.nan), np.zeros((2, 3)), "not finite"),
        (np.zeros((2, 3)), np.full((4, 3), np.inf), "not finite"),
    ],
)
def test_sides_that_have_no_plan_are_refused(x, y, says):
    with pytest.raises(ValueError, match=says):
        exact_plan(x, y)


def test_too_many_cells_for_an_exact_plan_are_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(coupling, "MAX_CELLS", 10)
    with pytest.raises(DataError, match=r"between 11 and 3 cells .*flow.scope='minibatch'"):
        exact_plan(*cells(11, 3))


# --- pairs -----------------------------------------------------------------------------------------------------------
def test_an_assignment_gives_each_of_its_pairs_once_and_in_another_order_each_time():
    plan = exact_plan(*cells(23, 23))
    drawn = [sample_pairs(plan, 23, np.random.default_rng(seed)) for seed in (0, 1)]
    for rows, columns in drawn:
        np.testing.assert_array_equal(np.sort(rows), np.arange(23))
        np.testing.assert_array_equal(columns[np.argsort(rows)], plan.toarray().argmax(1))
    assert not np.array_equal(drawn[0][0], drawn[1][0])


def test_pairs_come_as_often_as_their_mass_says():
    rng = np.random.default_rng(3)
    plan = rng.random((4, 5)) * (rng.random((4, 5)) > 0.3)
    total = np.zeros_like(plan)
    for seed in range(400):
        count = np.zeros_like(plan)
        np.add.at(count, sample_pairs(plan, 7, np.random.default_rng(seed)), 1)
        expected = 7 * plan / plan.sum()
        assert (count >= np.floor(expected)).all()
        assert (count <= np.ceil(expected)).all()
        total += count
    np.testing.assert_allclose(total / 400, expected, atol=5 * 0.5 / 20)


def test_dense_and_sparse_plans_give_the_same_pairs():
    plan = exact_plan(*cells(9, 14))
    for pairing in ("sample", "argmax"):
        one = pairs(plan, 12, np.random.default_rng(0), pairing)
        other = pairs(plan.toarray(), 12, np.random.default_rng(0), pairing)
        np.testing.assert_array_equal(one, other)


def test_argmax_takes_the_largest_mass_of_every_row_that_has_some():
    plan = np.array([[0.1, 0.3, 0.3], [0.0, 0.0, 0.0], [0.2, 0.0, 0.1]])
    rows, columns = argmax_pairs(plan)
    np.testing.assert_array_equal(rows, [0, 2])
    np.testing.assert_array_equal(columns, [1, 0])
    rows, columns = pairs(plan, 6, np.random.default_rng(0), "argmax")
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 1)] * 3 + [(2, 0)] * 3


@pytest.mark.parametrize("plan", [np.zeros((2, 2)), np.array([[1.0, -0.1]]), np.array([[np.nan, 1.0]])])
def test_a_plan_without_mass_or_with_negative_mass_is_refused(plan):
    with pytest.raises(ValueError, match="plan has no mass"):
        sample_pairs(plan, 3, np.random.default_rng(0))


# --- units and choice ------------------------------------------------------------------------------------------------
def test_latents_are_standardised_with_ddof_0_and_a_floor():
    z = np.array([[1.0, 5.0], [3.0, 5.0], [8.0, 5.0]])
    center, scale = standard(z)
    np.testing.assert_allclose(center, [4.0, 5.0])
    np.testing.assert_allclose(scale, [np.sqrt(26.0 / 3.0), STANDARD_FLOOR])
    np.testing.assert_allclose(((z - center) / scale)[:, 1], 0.0)
    with pytest.raises(ValueError, match="some cell was wanted"):
        standard(np.zeros((0, 2)))


def test_entropic_plans_are_asked_of_the_twin_with_the_settings_of_the_run():
    class Twin:
        def entropic_plan(self, x, y, *, epsilon, unbalanced):
            return x, y, epsilon, unbalanced

    assert coupler(FlowConfig(), Twin()) is exact_plan  # type: ignore[arg-type]
    couple = coupler(FlowConfig(coupling="entropic", epsilon=0.3, unbalanced=2.0), Twin())  # type: ignore[arg-type]
    assert couple(1, 2) == (1, 2, 0.3, 2.0)  # type: ignore[arg-type]
