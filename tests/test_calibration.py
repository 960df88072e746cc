"""What training says of a change in other contexts, and how decoded means take it up."""

import numpy as np
import pytest
from scipy import sparse
from small_data import small

from pf_core import data
from pf_core.calibration import calibrate, from_arrays, levels, measure, to_arrays
from pf_core.config import DataConfig
from pf_core.evaluation import coverage
from pf_core.kriging import Change
from pf_core.labels import CONTROL
from pf_core.noise import generator


def _profiles(rng: np.random.Generator, *shape: int) -> np.ndarray:
    draw = rng.gamma(0.5, 1.0, shape) + 1e-4
    return draw / draw.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def calibrated():
    dataset = data.load(small(), DataConfig())
    groups = [g for g in data.groups(dataset, np.arange(dataset.n_cells)) if g.label != CONTROL]
    rng = generator(41, "test_calibration.decoded")
    before, after = _profiles(rng, 2, len(groups), dataset.n_genes)
    return dataset, groups, calibrate(dataset, groups, before, after)


def test_the_error_of_a_log_profile_is_the_spread_of_repeated_measurements():
    rng = generator(43, "test_calibration.measure")
    p, library = _profiles(rng, 29), 3000.0
    found = [measure(sparse.csr_matrix(rng.poisson(library * p, (53, 29))), np.full(53, library)) for _ in range(301)]
    spread = np.var([one.value for one in found], axis=0, ddof=1)
    np.testing.assert_allclose(np.mean([one.noise for one in found], axis=0), spread, rtol=0.35)
    assert all((one.error >= one.noise * 52 / 53 - 1e-12).all() for one in found)


def test_a_gene_without_counts_is_not_known_without_error():
    counts = sparse.csr_matrix(np.array([[3.0, 0.0], [5.0, 0.0]]))
    found = measure(counts, np.array([3.0, 5.0]))
    assert found.value[1] == 0
    assert found.error[1] > 0
    assert found.noise[1] == 0


def test_decoded_means_are_brought_to_the_profile_of_the_controls_and_to_the_predicted_change(calibrated):
    dataset, _, calibration = calibrated
    rng = generator(47, "test_calibration.levels")
    controls = np.flatnonzero(dataset.is_control)
    here = measure(dataset.rows(controls), dataset.library()[controls])
    before, after = _profiles(rng, 2, dataset.n_genes)
    carried = calibration.of((("A", 1.0),), ("t1", "x"), here)
    assert carried is not None
    first, second, change = levels(here, before, after, [carried])
    assert change is not None
    p0, p1 = (np.log1p(1e4 * mean) for mean in (first * before, second * after))
    np.testing.assert_allclose(p0, here.value, atol=1e-9)
    np.testing.assert_allclose(p1 - p0, change.mean, atol=1e-9)
    np.testing.assert_allclose((second * after).sum(), (first * before).sum())


def test_what_is_not_known_changes_nothing(calibrated):
    dataset, _, calibration = calibrated
    here = measure(dataset.rows(np.arange(5)), dataset.library()[:5])
    assert calibration.of((("C", 1.0),), ("t1", "x"), here) is None
    first, second, change = levels(here, np.ones(3), np.ones(3), [None])
    assert change is None
    assert (first == 1).all()
    assert (second == 1).all()


def test_a_condition_that_is_not_known_among_two_leaves_the_decoded_change_in_full(calibrated):
    dataset, _, calibration = calibrated
    here = measure(dataset.rows(np.arange(50)), dataset.library()[:50])
    before, after = _profiles(generator(53, "test_calibration.two"), 2, dataset.n_genes)
    carried = calibration.of((("A", 1.0),), ("t1", "x"), here)
    assert carried is not None
    *_, alone = levels(here, before, after, [carried])
    *_, both = levels(here, before, after, [carried, None])
    assert alone is not None
    assert both is not None
    assert not np.allclose(alone.mean, both.mean)


def test_a_calibration_survives_the_disk(calibrated):
    dataset, _, calibration = calibrated
    again = from_arrays(to_arrays(calibration))
    here = measure(dataset.rows(np.arange(50)), dataset.library()[:50])
    one, two = (some.of((("A", 1.0), ("B", 1.0)), ("t2", "y"), here) for some in (calibration, again))
    assert one is not None
    assert two is not None
    np.testing.assert_allclose(one.residual, two.residual, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one.change.mean, two.change.mean, rtol=1e-3, atol=1e-4)


def test_coverage_counts_genes_inside_the_interval():
    rng = generator(59, "test_calibration.coverage")
    n = 2003
    real, controls = (measure(sparse.csr_matrix(np.ones((2, n))), np.full(2, float(n))) for _ in range(2))
    error = np.sqrt(0.3 + real.error + controls.error)
    right = coverage(Change(error * rng.standard_normal(n), np.full(n, 0.3)), real, controls)
    assert 0.88 < right["coverage_90"] < 0.92
    wrong = coverage(Change(9 * error * rng.standard_normal(n), np.full(n, 0.3)), real, controls)
    assert wrong["coverage_90"] < 0.2
    assert wrong["coverage_90_top"] < wrong["coverage_90"]
