"""The metrics against naive loops, SciPy, scikit-learn and identities."""

import tracemalloc

import numpy as np
import pytest
from scipy import sparse, stats
from sklearn.metrics import r2_score

from pf_core import metrics
from pf_core.noise import generator


def _draw(name, *shape):
    return generator(13, f"test_metrics.{name}").standard_normal(shape)


def _counts(n_cells, n_genes):
    rng = generator(13, "test_metrics.counts")
    return sparse.csr_matrix(rng.negative_binomial(1.0, 0.5, (n_cells, n_genes)).astype(np.float32))


def _naive_energy(x, y, estimator, power):
    def total(a, b):
        return sum(sum((p - q) ** 2 for p, q in zip(u, v, strict=True)) ** (power / 2) for u in a for v in b)

    n, m = len(x), len(y)
    own = (n * (n - 1), m * (m - 1)) if estimator == "u" else (n * n, m * m)
    return 2 * total(x, y) / (n * m) - total(x, x) / own[0] - total(y, y) / own[1]


@pytest.mark.parametrize("estimator", ["u", "v"])
@pytest.mark.parametrize("power", [1, 2])
def test_energy_distance_equals_naive_loops(estimator, power):
    x, y = _draw("x", 11, 5), _draw("y", 7, 5) + 0.5
    wanted = _naive_energy(x.tolist(), y.tolist(), estimator, power)
    assert metrics.energy_distance(x, y, estimator=estimator, power=power) == pytest.approx(wanted, rel=1e-13)


def test_energy_distance_of_one_dimension_is_the_square_of_scipys():
    x, y = _draw("x", 101, 1), 2 * _draw("y", 53, 1) + 1
    wanted = stats.energy_distance(x.ravel(), y.ravel()) ** 2
    assert metrics.energy_distance(x, y, estimator="v") == pytest.approx(wanted, rel=1e-12)


def test_squared_energy_distance_is_twice_the_squared_difference_of_means():
    x, y = _draw("x", 101, 3), 2 * _draw("y", 53, 3) + 1
    wanted = 2 * np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2)
    assert metrics.energy_distance(x, y, estimator="v", power=2) == pytest.approx(wanted, rel=1e-12)


def test_u_statistic_is_unbiased_for_equal_distributions_and_v_is_not():
    pairs = [(_draw(f"x{i}", 17, 3), _draw(f"y{i}", 19, 3)) for i in range(400)]
    u, v = (np.array([metrics.energy_distance(x, y, estimator=e) for x, y in pairs]) for e in "uv")
    assert abs(u.mean()) < 4 * u.std() / np.sqrt(len(u))
    assert v.mean() > 10 * v.std() / np.sqrt(len(v))


def test_energy_distance_keeps_its_digits_far_from_the_origin():
    x, y = _draw("x", 101, 3), _draw("y", 53, 3) + 0.1
    near, far = metrics.energy_distance(x, y), metrics.energy_distance(x + 1e6, y + 1e6)
    assert far == pytest.approx(near, abs=1e-8)


def test_energy_distance_holds_no_more_than_a_chunk_of_distances(monkeypatch):
    x, y = _draw("x", 2003, 3), _draw("y", 1009, 3)
    whole = metrics.energy_distance(x, y)
    monkeypatch.setattr(metrics, "CHUNK", 10_007)
    tracemalloc.start()
    chunked = metrics.energy_distance(x, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert chunked == pytest.approx(whole, rel=1e-12)
    assert peak < 1_000_000  # 2003 x 2003 distances are 32 MB


@pytest.mark.parametrize(
    ("x", "y", "options", "said"),
    [
        (np.ones((3, 2)), np.ones((3, 5)), {}, "shapes"),
        (np.ones((1, 2)), np.ones((3, 2)), {}, "x has 1 rows"),
        (np.ones((0, 2)), np.ones((3, 2)), {"estimator": "v"}, "x has 0 rows"),
        (np.full((3, 2), np.nan), np.ones((3, 2)), {}, "not finite"),
        (np.ones((3, 2)), np.ones((3, 2)), {"estimator": "w"}, "estimator"),
        (np.ones((3, 2)), np.ones((3, 2)), {"power": 3}, "power"),
    ],
)
def test_energy_distance_names_what_is_wrong(x, y, options, said):
    with pytest.raises(ValueError, match=said):
        metrics.energy_distance(x, y, **options)


def test_normalised_cells_sum_to_ten_thousand_and_empty_cells_stay_empty():
    counts = _counts(13, 17).tolil()
    counts[5] = 0
    counts = counts.tocsr()
    before = counts.copy()
    totals = np.expm1(metrics.normalise(counts).toarray()).sum(axis=1)
    np.testing.assert_allclose(totals, np.where(np.arange(13) == 5, 0, 1e4), rtol=1e-12)
    assert (counts != before).nnz == 0


def test_principal_components_equal_those_of_a_dense_decomposition():
    counts = _counts(101, 37)
    pca = metrics.real_pca(counts, n=5)
    dense = metrics.normalise(counts).toarray()
    left, singular, _ = np.linalg.svd(dense - dense.mean(axis=0), full_matrices=False)
    scores = pca.transform(counts)
    np.testing.assert_allclose(np.abs(scores), np.abs(left[:, :5] * singular[:5]), atol=1e-8)
    np.testing.assert_allclose(pca.variance, singular[:5] ** 2 / 100, rtol=1e-10)


def test_principal_components_do_not_depend_on_the_seed_not_even_by_sign():
    counts = _counts(101, 37)
    first, second = (metrics.real_pca(counts, n=5, seed=seed) for seed in (0, 1))
    np.testing.assert_allclose(first.components, second.components, atol=1e-8)


def test_few_genes_give_fewer_components():
    assert metrics.real_pca(_counts(101, 7)).components.shape == (6, 7)


def test_components_refuse_other_genes():
    with pytest.raises(ValueError, match="37 genes"):
        metrics.real_pca(_counts(101, 7)).transform(_counts(11, 37))


def test_pearson_of_the_mean_change_equals_scipys():
    real, predicted, control = _draw("means", 3, 41)
    wanted = stats.pearsonr(real - control, predicted - control).statistic
    assert metrics.pearson_delta(real, predicted, control) == pytest.approx(wanted, rel=1e-12)


def test_pearson_of_the_mean_change_equals_a_naive_loop():
    real, predicted, control = (row.tolist() for row in _draw("means", 3, 41))
    a = [p - q for p, q in zip(real, control, strict=True)]
    b = [p - q for p, q in zip(predicted, control, strict=True)]
    ma, mb = sum(a) / 41, sum(b) / 41
    cov = sum((p - ma) * (q - mb) for p, q in zip(a, b, strict=True))
    wanted = cov / (sum((p - ma) ** 2 for p in a) * sum((q - mb) ** 2 for q in b)) ** 0.5
    assert metrics.pearson_delta(*(np.array(v) for v in (real, predicted, control))) == pytest.approx(wanted, rel=1e-12)


def test_pearson_of_no_change_is_undefined():
    real, control = _draw("means", 2, 41)
    assert np.isnan(metrics.pearson_delta(real, control, control))


def test_r2_of_the_means_equals_scikit_learns():
    real, predicted = _draw("means", 2, 41)
    assert metrics.r2_means(real, predicted) == pytest.approx(r2_score(real, predicted), rel=1e-12)


def test_mse_of_the_means_equals_a_naive_loop():
    real, predicted = _draw("means", 2, 41)
    wanted = sum((p - q) ** 2 for p, q in zip(real.tolist(), predicted.tolist(), strict=True)) / 41
    assert metrics.mse_means(real, predicted) == pytest.approx(wanted, rel=1e-12)


def test_a_perfect_prediction_gets_perfect_scores():
    counts = _counts(101, 37)
    real, control = counts[:61], counts[61:]
    scores = metrics.score(real, real, control, metrics.real_pca(counts, n=5))
    assert scores["energy_pca_v"] == pytest.approx(0, abs=1e-10)
    assert scores["pearson_delta"] == pytest.approx(1)
    assert (scores["r2"], scores["mse"]) == (1.0, 0.0)


def test_scores_of_a_single_cell_say_what_is_undefined():
    counts = _counts(101, 37)
    scores = metrics.score(counts[:1], counts[1:50], counts[50:], metrics.real_pca(counts, n=5))
    assert np.isnan(scores["energy_pca_u"])
    assert np.isfinite(scores["energy_pca_v"])


def test_scores_of_an_empty_condition_are_refused():
    counts = _counts(101, 37)
    with pytest.raises(ValueError, match="real holds no cells"):
        metrics.score(counts[:0], counts, counts, metrics.real_pca(counts, n=5))


def test_metrics_of_the_highest_genes_equal_numpys_and_scikit_learns():
    real, predicted, control = _draw("means", 3, 41)
    genes = sorted(range(41), key=lambda g: -control[g])[:11]
    assert metrics.highest_genes(control, 11).tolist() == genes
    wanted = sum((real[g] - predicted[g]) ** 2 for g in genes) ** 0.5
    assert metrics.l2_top(real, predicted, control, n=11) == pytest.approx(wanted, rel=1e-12)
    wanted = r2_score(real[genes], predicted[genes])
    assert metrics.r2_top(real, predicted, control, n=11) == pytest.approx(wanted, rel=1e-12)


def test_fewer_genes_than_asked_for_are_all_genes():
    real, predicted, control = _draw("means", 3, 41)
    assert metrics.l2_top(real, predicted, control) == pytest.approx(np.linalg.norm(real - predicted), rel=1e-12)


def test_normalising_to_the_median_total_leaves_the_median_cell_unscaled():
    counts = sparse.csr_matrix(np.array([[1, 3], [0, 0], [2, 0], [5, 4]]))
    assert metrics.median_total(counts) == 4
    np.testing.assert_allclose(metrics.normalise(counts, total=4).toarray()[0], np.log1p([1, 3]), rtol=1e-15)
    with pytest.raises(ValueError, match="positive number"):
        metrics.normalise(counts, total=metrics.median_total(counts[1:2]))


def test_the_permutation_test_is_that_of_energy_distances_of_relabelled_samples():
    rng = generator(71, "test_metrics.permutation")
    x, y = rng.standard_normal((11, 3)), rng.standard_normal((13, 3)) + 0.4
    found = metrics.permutation_p(x, y, generator(73, "test_metrics.relabel"), n=97)
    labels = np.tile(np.r_[np.ones(11), np.zeros(13)], (97, 1))
    labels = generator(73, "test_metrics.relabel").permuted(labels, axis=1).astype(bool)
    pooled, observed = np.concatenate([x, y]), metrics.energy_distance(x, y)
    as_far = sum(metrics.energy_distance(pooled[one], pooled[~one]) >= observed for one in labels)
    assert found == pytest.approx((1 + as_far) / 98)
    assert metrics.permutation_p(x, x + 5.0, generator(73, "test_metrics.relabel"), n=97) == pytest.approx(1 / 98)
