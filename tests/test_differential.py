"""Rank-sum tests on sparse cells against SciPy and against a loop over pairs of cells."""

import numpy as np
import pytest
from scipy import sparse, stats

from pf_core import differential
from pf_core.noise import generator
from pf_core.screens import Screen


def _values(name, n_cells, n_genes, density=0.4):
    """Small integers, so that there are many ties, and mostly zeros."""
    rng = generator(17, f"test_differential.{name}")
    dense = rng.integers(1, 6, (n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < density)
    return dense.astype(np.float64)


def _scipys(x, y):
    return stats.mannwhitneyu(x, y, axis=0, method="asymptotic", alternative="two-sided")


@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
def test_rank_sums_equal_scipys_on_counts_with_ties(density):
    x, y = _values("x", 23, 41, density), _values("y", 37, 41, density)
    wanted, found = _scipys(x, y), differential.rank_sum(sparse.csr_matrix(x), sparse.csc_matrix(y))
    np.testing.assert_array_equal(found.statistic, wanted.statistic)
    np.testing.assert_allclose(found.p_value, wanted.pvalue, rtol=1e-12)


def test_rank_sums_equal_scipys_on_values_of_both_signs():
    rng = generator(17, "test_differential.signs")
    x, y = (np.round(rng.standard_normal((n, 31)), 1) * (rng.random((n, 31)) < 0.5) for n in (19, 29))
    wanted, found = _scipys(x, y), differential.rank_sum(x, y)
    np.testing.assert_array_equal(found.statistic, wanted.statistic)
    np.testing.assert_allclose(found.p_value, wanted.pvalue, rtol=1e-12)


def test_u_counts_the_pairs_in_which_the_first_is_larger():
    x, y = _values("x", 11, 5), _values("y", 7, 5)
    wanted = [sum((a > b) + (a == b) / 2 for a in x[:, g] for b in y[:, g]) for g in range(5)]
    np.testing.assert_array_equal(differential.rank_sum(x, y).statistic, wanted)


def test_a_gene_without_any_count_has_p_one():
    x, y = _values("x", 11, 5), _values("y", 7, 5)
    x[:, 3] = y[:, 3] = 0
    x[:, 2] = y[:, 2] = 4
    np.testing.assert_array_equal(differential.rank_sum(x, y).p_value[[2, 3]], 1.0)


def test_every_group_against_the_reference_is_the_test_of_the_two():
    cells = sparse.csr_matrix(_values("groups", 61, 13))
    codes = generator(17, "test_differential.codes").integers(0, 4, 61)
    found = differential.rank_sums(cells, codes, n_groups=4, reference=2)
    for group in (0, 1, 3):
        alone = differential.rank_sum(cells[codes == group], cells[codes == 2])
        np.testing.assert_array_equal(found.statistic[group], alone.statistic)
        np.testing.assert_array_equal(found.p_value[group], alone.p_value)
    np.testing.assert_array_equal(found.p_value[2], 1.0)


def test_blocks_of_genes_change_nothing(monkeypatch):
    x, y = _values("x", 23, 41), _values("y", 37, 41)
    whole = differential.rank_sum(x, y)
    monkeypatch.setattr(differential, "BLOCK", 53)
    blocked = differential.rank_sum(x, y)
    np.testing.assert_array_equal(blocked.statistic, whole.statistic)
    np.testing.assert_array_equal(blocked.p_value, whole.p_value)


def test_stored_zeros_are_zeros():
    x, y = sparse.csr_matrix(_values("x", 23, 41)), _values("y", 37, 41)
    stored = x.copy()
    stored.data[::3] = 0
    np.testing.assert_array_equal(
        differential.rank_sum(stored, y).p_value, differential.rank_sum(stored.toarray(), y).p_value
    )


def test_empty_groups_and_undefined_values_are_refused():
    x = _values("x", 23, 7)
    with pytest.raises(ValueError, match="no cells"):
        differential.rank_sum(x, x[:0])
    with pytest.raises(ValueError, match="not finite"):
        differential.rank_sum(x, np.where(x > 3, np.nan, x))
    with pytest.raises(ValueError, match="7 genes and y 5"):
        differential.rank_sum(x, x[:, :5])


def _screen():
    cells = np.log1p(_values("screen", 83, 17))
    labels = np.array(["A", "B", "control"])[generator(17, "test_differential.labels").integers(0, 3, 83)]
    return Screen(cells, labels, [f"g{i}" for i in range(17)], control="control"), cells, labels


@pytest.mark.parametrize(("mean", "epsilon"), [("geometric", 0.0), ("arithmetic", 0.5)])
def test_the_table_equals_scipy_gene_by_gene(mean, epsilon):
    screen, cells, labels = _screen()
    table = differential.differential(screen, mean=mean, epsilon=epsilon)
    control = cells[labels == "control"]
    for row, name in enumerate(("A", "B")):
        here = cells[labels == name]
        profile = [np.expm1(c.mean(0)) if mean == "geometric" else np.expm1(c).mean(0) for c in (here, control)]
        np.testing.assert_allclose(
            table.log2_fold_change[row], np.log2((profile[0] + epsilon) / (profile[1] + epsilon)), rtol=1e-10
        )
        wanted = _scipys(here, control).pvalue
        np.testing.assert_allclose(table.p_value[row], wanted, rtol=1e-12)
        np.testing.assert_allclose(table.fdr[row], stats.false_discovery_control(wanted), rtol=1e-12)


def test_a_silent_gene_has_fold_change_zero_and_a_gene_only_one_side_has_infinity():
    screen, cells, labels = _screen()
    cells[:, 0] = 0
    cells[labels == "A", 1] = 0
    cells[labels == "control", 2] = 0
    table = differential.differential(Screen(cells, labels, screen.genes, control="control"))
    assert table.log2_fold_change[0, :3].tolist() == [0.0, -np.inf, np.inf]


def test_a_screen_says_what_is_wrong_with_it():
    cells = _values("x", 5, 3)
    with pytest.raises(ValueError, match="no cell is labelled 'ctrl'"):
        Screen(cells, ["A", "B", "A", "B", "A"], "abc", control="ctrl")
    with pytest.raises(ValueError, match="nothing is left to compare"):
        Screen(cells, ["A"] * 5, "abc", control="A")
    with pytest.raises(ValueError, match="4 labels"):
        Screen(cells, ["A"] * 4, "abc", control="A")
    with pytest.raises(ValueError, match="normalise"):
        Screen(cells + 15, ["A"] * 4 + ["B"], "abc", control="A")
    with pytest.raises(ValueError, match="labels holds nan"):
        Screen(cells, ["A", "B", "A", "B", float("nan")], "abc", control="A")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="named twice"):
        Screen(cells, ["A"] * 5, "aba", control="A")
