"""Moments of counts against NumPy, of the negative binomial against SciPy and draws."""

import numpy as np
import pytest
from scipy import sparse, stats

from pf_core import count_calibration, outputs
from pf_core.noise import generator


def _law(n_cells=23, n_genes=7):
    rng = generator(31, "test_count_calibration.law")
    return rng.gamma(0.7, 4.0, (n_cells, n_genes)), rng.gamma(2.0, 1.0, n_genes)


def test_moments_of_counts_equal_numpys():
    counts = generator(31, "test_count_calibration.counts").poisson(1.3, (41, 11)).astype(float)
    counts[:, 3] = 0
    stored = sparse.csr_matrix(counts)
    stored.data[::5] = 0  # stored zeros
    dense, found = stored.toarray(), count_calibration.count_moments(stored)
    np.testing.assert_allclose(found.mean, dense.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.variance, dense.var(0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(found.zeros, (dense == 0).mean(0), rtol=1e-13)


def test_moments_of_the_law_equal_a_sum_over_scipys_probabilities(monkeypatch):
    mu, r = _law()
    monkeypatch.setattr(count_calibration, "BLOCK", 5)
    found = count_calibration.nb_moments(mu, r)
    x = np.arange(2000)
    for gene in range(7):
        p = np.mean([stats.nbinom.pmf(x, r[gene], r[gene] / (r[gene] + m)) for m in mu[:, gene]], axis=0)
        assert p.sum() == pytest.approx(1, abs=1e-9)
        mean = x @ p
        assert found.mean[gene] == pytest.approx(mean, rel=1e-7)
        assert found.variance[gene] == pytest.approx((x - mean) ** 2 @ p, rel=1e-6)
        assert found.zeros[gene] == pytest.approx(p[0], rel=1e-10)


def test_counts_drawn_from_the_law_are_calibrated_and_their_means_are_not():
    mu, r = _law(5003, 13)
    rng = generator(31, "test_count_calibration.draw")
    real = count_calibration.count_moments(outputs.sample(mu, r, rng))
    law = count_calibration.count_calibration(real, count_calibration.nb_moments(mu, r))
    assert abs(law.variance_bias) < 0.1
    assert law.zero_error < 0.02
    assert law.n_genes == 13
    means = count_calibration.count_calibration(real, count_calibration.count_moments(mu))
    assert means.variance_bias < -0.3
    assert means.zero_bias < -0.1


def test_calibration_of_half_the_variance_is_minus_one():
    real = count_calibration.Moments(np.ones(3), np.array([2.0, 4.0, 0.0]), np.array([0.5, 0.5, 1.0]))
    half = count_calibration.Moments(np.ones(3), np.array([1.0, 2.0, 1.0]), np.array([0.7, 0.3, 1.0]))
    found = count_calibration.count_calibration(real, half)
    assert (found.variance_bias, found.variance_error, found.n_genes) == (-1.0, 1.0, 2)
    assert found.zero_bias == pytest.approx(0)
    assert found.zero_error == pytest.approx(0.4 / 3)


def test_bad_input_is_refused():
    mu, r = _law()
    with pytest.raises(ValueError, match="not its logarithm"):
        count_calibration.nb_moments(mu, -r)
    with pytest.raises(ValueError, match=r"r \(6,\)"):
        count_calibration.nb_moments(mu, r[:6])
    with pytest.raises(ValueError, match="two are the least"):
        count_calibration.count_moments(mu[:1])
    with pytest.raises(ValueError, match="align"):
        count_calibration.count_calibration(
            count_calibration.nb_moments(mu, r), count_calibration.nb_moments(mu[:, :5], r[:5])
        )
