"""Kriging over contexts: against scikit-learn's Gaussian process, simulations with known answers, and bad input."""

import itertools

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import norm
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel

from pf_core import kriging
from pf_core.kriging import corrected_squares, krige, shrink, strata
from pf_core.noise import generator


def _world(n_genes: int, n: int, *, scale: float, error: float, seed: int) -> tuple[np.ndarray, ...]:
    """Changes of n + 1 contexts drawn from the model, the last to be predicted."""
    rng = generator(seed, "test_kriging")
    places = rng.standard_normal((n + 1, 3))
    squares = cdist(places, places, "sqeuclidean")
    kernel = np.exp(-squares / np.median(squares[:n, :n][np.triu_indices(n, 1)]))
    truth = rng.standard_normal(n_genes) + (np.linalg.cholesky(scale * kernel) @ rng.standard_normal((n + 1, n_genes)))
    measured = truth[:n] + np.sqrt(error) * rng.standard_normal((n, n_genes))
    return truth, measured, np.full((n, n_genes), error), squares, places


def test_with_one_scale_and_one_length_it_is_a_gaussian_process_with_an_unknown_mean(monkeypatch):
    _, measured, errors, squares, places = _world(7, 5, scale=0.3, error=0.01, seed=3)
    monkeypatch.setattr(kriging, "SCALES", np.array([0.3]))
    monkeypatch.setattr(kriging, "LENGTHS", np.array([1.0]))
    unit = np.median(squares[:5, :5][np.triu_indices(5, 1)])
    # A constant with a vast prior variance is a flat mean.
    kernel = ConstantKernel(0.3, "fixed") * RBF(np.sqrt(unit / 2), "fixed") + ConstantKernel(1e6, "fixed")
    process = GaussianProcessRegressor(kernel, alpha=0.01, optimizer=None).fit(places[:5], measured)
    mean, deviation = process.predict(places[5:], return_std=True)
    found = krige(measured, errors, squares)
    np.testing.assert_allclose(found.mean, mean[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.sqrt(found.variance), deviation[0], rtol=1e-3)


def test_intervals_cover_what_they_say():
    truth, measured, errors, squares, _ = _world(4001, 7, scale=0.1, error=0.02, seed=5)
    found = krige(measured, errors, squares)
    inside = np.abs(truth[-1] - found.mean) <= norm.ppf(0.95) * np.sqrt(found.variance)
    assert 0.87 < inside.mean() < 0.93


def test_genes_that_do_not_differ_get_the_mean_and_those_that_do_follow_their_neighbour():
    rng = generator(7, "test_kriging.mixture")
    squares = cdist(*[np.array([[0.0], [0.2], [5.0], [5.3], [5.1]])] * 2, "sqeuclidean")
    changes = np.zeros((4, 601))
    changes[:2, :60] = 3.0  # responds in the first pair of contexts alone
    changes += 0.05 * rng.standard_normal(changes.shape)
    found = krige(changes, np.full(changes.shape, 0.0025), squares)
    assert np.abs(found.mean[:60]).max() < 0.5  # the new context lies with the second pair
    assert np.abs(found.mean[60:] - changes[:, 60:].mean(0)).max() < 0.1
    assert found.variance[:60].min() > 2 * np.median(found.variance[60:])


def test_a_context_of_few_cells_counts_for_little():
    squares = np.array([[0.0, 1, 1], [1, 0, 1], [1, 1, 0.0]])
    changes = np.array([[1.0, 1.0, 1.0], [5.0, 5.0, 5.0]])
    found = krige(changes, np.array([[1e-4] * 3, [1e4] * 3]), squares)
    np.testing.assert_allclose(found.mean, 1.0, atol=0.05)


def test_one_context_is_shrunk_by_its_error():
    rng = generator(13, "test_kriging.one")
    truth = np.where(np.arange(2003) < 100, 2.0, 0.0) * rng.standard_normal(2003)
    measured = truth + 0.5 * rng.standard_normal(2003)
    found = krige(measured[None], np.full((1, 2003), 0.25), np.zeros((2, 2)))
    assert np.mean((found.mean - truth) ** 2) < 0.4 * np.mean((measured - truth) ** 2)
    inside = np.abs(truth - found.mean) <= norm.ppf(0.95) * np.sqrt(found.variance) + 1e-3
    assert inside.mean() > 0.85


def test_with_one_scale_shrinkage_is_the_posterior_of_a_normal(monkeypatch):
    monkeypatch.setattr(kriging, "SCALES", np.array([0.3]))
    rng = generator(17, "test_kriging.shrink")
    values, errors = rng.standard_normal(11), rng.gamma(2.0, 0.1, 11)
    centre = np.average(values, weights=1 / (errors + kriging.SPREAD))
    found = shrink(values, errors, [np.arange(11)])
    np.testing.assert_allclose(found.mean, centre + 0.3 / (0.3 + errors) * (values - centre))
    np.testing.assert_allclose(found.variance, 1 / (1 / 0.3 + 1 / errors))


def test_strata_hold_every_gene_once_in_the_order_of_their_changes():
    change = generator(19, "test_kriging.strata").standard_normal(2003)
    parts = strata(change)
    assert [len(part) for part in parts] == [25, 75, 301, 1602]
    assert sorted(np.concatenate(parts)) == list(range(2003))
    for first, second in itertools.pairwise(parts):
        assert np.abs(change[first]).min() >= np.abs(change[second]).max()
    assert [len(part) for part in strata(change[:37])] == [37]


def test_corrected_squares_take_off_what_noise_adds():
    rng = generator(11, "test_kriging.squares")
    truth = rng.standard_normal((3, 5003))
    error = np.array([0.5, 2.0, 0.1])[:, None] * np.ones_like(truth)
    seen = truth + np.sqrt(error) * rng.standard_normal(truth.shape)
    np.testing.assert_allclose(corrected_squares(seen, error), cdist(truth, truth, "sqeuclidean"), rtol=0.05, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "errors", "squares", "words"),
    [
        (np.zeros((2, 3)), np.ones((2, 4)), np.zeros((3, 3)), "do not fit"),
        (np.zeros((2, 3)), np.ones((2, 3)), np.zeros((2, 2)), "do not fit"),
        (np.zeros((0, 3)), np.ones((0, 3)), np.zeros((1, 1)), "do not fit"),
        (np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((3, 3)), "sampling variances"),
    ],
)
def test_bad_input_is_told(changes, errors, squares, words):
    with pytest.raises(ValueError, match=words):
        krige(changes, errors, squares)
