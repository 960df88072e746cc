"""Predicted cells have the means they were given, stay counts, and are the same on every run."""

import tracemalloc

import numpy as np
import pytest
from scipy import sparse, stats

from pf_core.noise import generator
from pf_core.outputs import BLOCK, predicted_counts, sample, scaled, transport


def _rng(name):
    return generator(11, f"test_outputs.{name}")


def _counts(n_cells, n_genes, density, name="counts"):
    rng = _rng(name)
    counts = rng.poisson(3.0, (n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < density)
    return sparse.csr_matrix(counts.astype(np.float32))


def test_transported_counts_have_the_stated_mean():
    x = np.array([0, 1, 5, 40, 3, 0, 7, 2, 9, 6, 11], dtype=np.float32)
    mu0 = np.array([2, 2, 8, 30, 1, 0, 0, 1e-8, 4, 1e-12, 3])
    mu1 = np.array([1, 0.5, 6, 29, 4, 3, 2, 5, 0, 1e-13, 3])
    n = 40_000
    tiled = sparse.csr_matrix(np.tile(x, (n, 1)))
    moved = transport(tiled, np.tile(mu0, (n, 1)), np.tile(mu1, (n, 1)), _rng("mean")).toarray()
    ratio = np.divide(mu1, mu0, out=np.ones_like(mu1), where=mu1 < mu0)
    wanted = x * ratio + np.maximum(mu1 - mu0, 0)
    error = np.sqrt((x * ratio * (1 - ratio) + np.maximum(mu1 - mu0, 0)) / n)
    assert np.all(np.abs(moved.mean(axis=0) - wanted) <= 4.5 * error)


def test_up_to_a_doubling_the_increase_follows_the_cells_own_rate():
    x, r = np.array([0, 1, 9, 0, 7], dtype=np.float32), np.array([0.5, 0.5, 2.0, 1.0, 3.0])
    mu0, mu1 = np.array([2.0, 2.0, 4.0, 1.0, 5.0]), np.array([3.0, 3.0, 12.0, 9.0, 5.0])
    n = 40_000
    tiled = sparse.csr_matrix(np.tile(x, (n, 1)))
    moved = transport(tiled, np.tile(mu0, (n, 1)), np.tile(mu1, (n, 1)), _rng("own"), r).toarray()
    rise = [1.0 * 0.5 / 2.5, 1.0 * 1.5 / 2.5, 4.0 * 11 / 6 + 4.0, 1.0 * 1 / 2 + 7.0, 0.0]
    assert np.all(np.abs(moved.mean(axis=0) - x - rise) <= 4.5 * np.sqrt(np.array(rise) / n))


def test_own_rates_leave_the_mean_over_cells_where_it_was():
    n, mu0, mu1, r = 60_000, 1.5, 4.0, 0.7
    counts = sample(np.full((n, 1), mu0), np.array([r]), _rng("cells"))
    moved = transport(counts, np.full((n, 1), mu0), np.full((n, 1), mu1), _rng("own"), np.array([r])).toarray()
    assert abs(moved.mean() - mu1) <= 4.5 * moved.std() / np.sqrt(n)


def test_transported_counts_are_non_negative_integers_of_the_same_dtype_without_stored_zeros():
    counts = _counts(13, 17, 0.4)
    mu0, mu1 = _rng("a").gamma(1.0, 3.0, (2, 13, 17))
    moved = transport(counts, mu0, mu1, _rng("b"))
    assert moved.dtype == np.float32
    assert moved.format == "csr"
    assert np.all(moved.data > 0)
    assert np.array_equal(moved.data, np.rint(moved.data))


def test_transport_between_equal_means_is_the_identity_also_at_zero_mean():
    counts = _counts(13, 17, 0.4)
    mu = _rng("a").gamma(1.0, 3.0, (13, 17)) * (_rng("z").random((13, 17)) < 0.5)
    assert (transport(counts, mu, mu.copy(), _rng("b")) != counts).nnz == 0


def test_transport_to_a_mean_of_zero_removes_every_count_even_from_the_smallest_mean():
    moved = transport(_counts(13, 17, 0.4), np.full((13, 17), 5e-324), np.zeros((13, 17)), _rng("b"))
    assert moved.nnz == 0


def test_thinning_is_binomial():
    n, x, p = 20_000, 11, 0.3
    counts = sparse.csr_matrix(np.full((n, 1), x, dtype=np.float32))
    moved = transport(counts, np.full((n, 1), 2.0), np.full((n, 1), 0.6), _rng("binomial")).toarray().ravel()
    observed = np.bincount(moved.astype(int), minlength=x + 1)
    expected = n * stats.binom.pmf(np.arange(x + 1), x, p)
    tail = expected < 5
    observed, expected = (np.append(v[~tail], v[tail].sum()) for v in (observed, expected))
    assert stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize(("mu", "r"), [(3.0, 0.7), (0.2, 5.0), (40.0, 1e4)])
def test_samples_are_negative_binomial(mu, r):
    n = 20_000
    drawn = sample(np.full((n, 1), mu), np.array([r]), _rng(f"nb.{mu}")).toarray().ravel().astype(int)
    expected = n * stats.nbinom.pmf(np.arange(drawn.max() + 1), r, r / (r + mu))
    kept = expected >= 5
    observed = np.append(np.bincount(drawn)[kept], n - np.bincount(drawn)[kept].sum())
    assert stats.chisquare(observed, np.append(expected[kept], n - expected[kept].sum())).pvalue > 1e-3


def test_samples_are_finite_at_the_bounds_of_the_dispersion():
    mu = np.tile([1e-8, 1e5], (997, 1))
    for r in (1e-4, 1e4):
        assert np.all(np.isfinite(sample(mu, np.full(2, r), _rng(f"bounds.{r}")).toarray()))


@pytest.mark.parametrize("output", ["transport", "sample", "mean"])
def test_predictions_repeat_keep_the_order_of_cells_and_ask_for_one_block_at_a_time(output):
    n_cells, n_genes, asked = 2 * BLOCK + 3, 7, []
    counts = _counts(n_cells, n_genes, 0.5)
    mu0 = np.full((n_cells, n_genes), 1e-9)
    mu1 = 1e4 * np.arange(1, n_cells + 1)[:, None] * np.ones(n_genes)

    def means(rows):
        asked.append(rows.stop - rows.start)
        return mu0[rows], mu1[rows]

    options = {"seed": 3, "name": "task", "output": output, "r": np.full(n_genes, 1e4)}
    first = predicted_counts(counts, means, **options)
    assert max(asked) <= BLOCK
    assert sum(asked) == n_cells
    assert (first != predicted_counts(counts, means, **options)).nnz == 0
    np.testing.assert_allclose(first.toarray(), mu1, rtol=0.1)


def test_draws_differ_between_tasks_and_between_seeds():
    counts = _counts(13, 17, 0.4)
    means = lambda rows: (np.zeros((13, 17)), np.full((13, 17), 2.0))
    drawn = [predicted_counts(counts, means, seed=s, name=n) for s, n in ((0, "a"), (0, "b"), (1, "a"))]
    assert (drawn[0] != drawn[1]).nnz > 0
    assert (drawn[0] != drawn[2]).nnz > 0


@pytest.mark.parametrize("output", ["transport", "sample", "mean"])
def test_no_change_is_the_control_cells_under_every_output(output):
    counts = _counts(13, 17, 0.4)
    assert (predicted_counts(counts, None, seed=0, name="a", output=output, r=np.ones(17)) != counts).nnz == 0


def test_no_more_than_blocks_are_dense():
    n_cells, n_genes = 23 * BLOCK, 101
    counts = _counts(n_cells, n_genes, 0.02)
    means = lambda rows: (
        np.full((rows.stop - rows.start, n_genes), 1.0),
        np.full((rows.stop - rows.start, n_genes), 1.01),
    )
    tracemalloc.start()
    predicted_counts(counts, means, seed=0, name="a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < n_cells * n_genes * 8 / 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"counts": sparse.csr_matrix(np.full((2, 3), 0.5))}, "integers"),
        ({"counts": sparse.csr_matrix(np.full((2, 3), -1.0))}, "integers"),
        ({"mu0": np.ones((2, 2))}, "mu0 has shape"),
        ({"mu1": np.full((2, 3), np.nan)}, "mu1 holds"),
        ({"mu1": np.full((2, 3), -1.0)}, "mu1 holds"),
    ],
)
def test_transport_names_what_is_wrong(change, said):
    good = {"counts": sparse.csr_matrix(np.ones((2, 3))), "mu0": np.ones((2, 3)), "mu1": np.ones((2, 3))}
    with pytest.raises(ValueError, match=said):
        transport(**(good | change), rng=_rng("error"))


def test_sampling_without_a_dispersion_and_unknown_outputs_are_refused():
    counts, means = _counts(2, 3, 1.0), lambda rows: (np.ones((2, 3)), np.ones((2, 3)))
    with pytest.raises(ValueError, match="needs r"):
        predicted_counts(counts, means, seed=0, name="a", output="sample")
    with pytest.raises(ValueError, match="output is 'median'"):
        predicted_counts(counts, means, seed=0, name="a", output="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="r holds"):
        sample(np.ones((2, 3)), np.zeros(3), _rng("error"))


def test_scaled_cells_are_thinned_or_increased_from_their_own_counts():
    x, factor = np.array([0, 9, 40, 13, 7, 0], dtype=np.float32), np.array([0.3, 0.3, 0.9, 1.0, 2.5, 2.5])
    n = 40_000
    tiled = sparse.csr_matrix(np.tile(x, (n, 1)))
    moved = scaled(tiled, factor, seed=3, name="a").toarray()
    assert np.array_equal(moved, np.rint(moved))
    assert (moved[:, factor <= 1] <= x[factor <= 1]).all()
    assert (moved[:, factor >= 1] >= x[factor >= 1]).all()
    variance = x * np.where(factor < 1, factor * (1 - factor), factor - 1)
    assert np.all(np.abs(moved.mean(axis=0) - x * factor) <= 4.5 * np.sqrt(variance / n))
    np.testing.assert_allclose(moved.var(axis=0), variance, rtol=0.05)


def test_scaled_means_are_multiplied():
    means = sparse.csr_matrix(np.array([[0.5, 2.0, 0.0], [1.5, 0.25, 3.0]], dtype=np.float32))
    factor = np.array([0.5, 3.0, 2.0])
    found = scaled(means, factor, seed=0, name="a", output="mean")
    np.testing.assert_array_equal(found.toarray(), means.toarray() * factor)
