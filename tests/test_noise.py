"""Draws are pure functions of (seed, name, index)."""

import numpy as np

from pf_core import noise


def test_a_draw_depends_on_seed_name_and_index_and_on_nothing_else():
    first = noise.normal(1, "vae.eps", 5, (3, 2))
    noise.normal(1, "vae.eps", 4, (100,))
    np.testing.assert_array_equal(first, noise.normal(1, "vae.eps", 5, (3, 2)))
    for other in (noise.normal(2, "vae.eps", 5, (3, 2)), noise.normal(1, "eps", 5, (3, 2))):
        assert not np.array_equal(first, other)
    assert not np.array_equal(first, noise.normal(1, "vae.eps", 6, (3, 2)))


def test_float32_noise_is_float64_noise_rounded():
    exact = noise.normal(3, "x", 0, (11,), "float64")
    np.testing.assert_array_equal(noise.normal(3, "x", 0, (11,)), exact.astype(np.float32))


def test_streams_of_neighbouring_indices_do_not_overlap():
    first, second = (noise.normal(0, "x", index, (100_000,), "float64") for index in (0, 1))
    assert not np.isin(first[:1000], second).any()
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02


def test_normal_draws_are_normal():
    from scipy import stats

    draws = np.concatenate([noise.normal(0, "x", index, (100,), "float64") for index in range(200)])
    assert stats.kstest(draws, "norm").pvalue > 1e-3


def test_a_permutation_is_one():
    assert sorted(noise.permutation(0, "order", 3, 17)) == list(range(17))
