"""Baselines of an unseen time point: shares, draws, and interpolation between coupled cells."""

import numpy as np
import pytest
from scipy import sparse

from pf_core.baselines import Declined
from pf_core.metrics import energy_distance
from pf_core.time_baselines import (
    clock,
    closeness,
    curve_over_line,
    gap,
    mixed,
    ot_interpolation,
    path_lengths,
    reading,
)
from pf_core.times import Point, Series

MANY = 2000


def test_closeness_is_linear_in_time():
    assert closeness(8.0, 32.0, 64.0) == pytest.approx(24 / 56)
    assert closeness(-2.0, 0.0, 2.0) == 0.5


@pytest.mark.parametrize("time", [8.0, 64.0, 70.0])
def test_a_time_that_is_not_between_is_refused(time):
    with pytest.raises(ValueError, match="is not between 8 and 64"):
        closeness(8.0, time, 64.0)


@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.5, 0.93])
def test_the_mixture_has_the_share_of_each_side_and_as_many_cells_as_there_are(share):
    before, after = np.arange(100, 171), np.arange(300, 353)
    first, second = mixed(before, after, share, seed=3, name="d", most=MANY)
    assert set(first) <= set(before)
    assert set(second) <= set(after)
    assert len(set(first)) == len(first)
    assert abs(len(second) / (len(first) + len(second)) - share) < 0.011
    assert len(first) == 71 or len(second) == 53


def test_a_side_without_a_share_gives_no_cell():
    first, second = mixed(np.arange(13), np.arange(20, 37), 0.0, seed=0, name="d", most=MANY)
    assert len(first) == 13
    assert len(second) == 0


def test_a_small_share_of_few_cells_still_gives_one():
    _, second = mixed(np.arange(13), np.arange(20, 23), 0.01, seed=0, name="d", most=MANY)
    assert len(second) == 1


def test_the_draw_depends_on_seed_and_name_only():
    arguments = (np.arange(71), np.arange(100, 153), 0.3)
    same = [mixed(*arguments, seed=5, name="a", most=40) for _ in range(2)]
    other = mixed(*arguments, seed=5, name="b", most=40)
    np.testing.assert_array_equal(same[0][0], same[1][0])
    assert not np.array_equal(same[0][0], other[0])
    assert sum(map(len, same[0])) == 40


def test_interpolation_couples_a_shifted_copy_with_itself():
    """The optimal plan of squared distances between a sample and its translation is the translation."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(41, 3))
    order = rng.permutation(41)
    y = (x + [4.0, 0.0, 0.0])[order]
    cells = ot_interpolation(
        sparse.csr_matrix(x), sparse.csr_matrix(y), x, y, 0.25, seed=0, name="d", most=MANY
    ).toarray()
    np.testing.assert_allclose(np.sort(cells, 0), np.sort(x + [1.0, 0.0, 0.0], 0), atol=1e-12)


def test_interpolation_of_unequal_sides_has_the_larger_number_of_cells():
    rng = np.random.default_rng(1)
    a, b = sparse.csr_matrix(rng.poisson(1.0, (17, 5))), sparse.csr_matrix(rng.poisson(1.0, (11, 5)))
    x, y = rng.normal(size=(17, 2)), rng.normal(size=(11, 2))
    assert ot_interpolation(a, b, x, y, 0.5, seed=0, name="d", most=MANY).shape == (17, 5)
    assert ot_interpolation(a, b, x, y, 0.5, seed=0, name="d", most=7).shape == (7, 5)


def test_interpolation_loses_noise_that_the_mixture_keeps():
    """Two samples of one distribution: the mixture is a third sample; where cells are not coupled, noise averages."""
    rng = np.random.default_rng(2)
    x, y, real = rng.normal(size=(3, 211, 7))
    first, second = mixed(np.arange(211), np.arange(211), 0.5, seed=0, name="d", most=MANY)
    mixture = np.concatenate([x[first], y[second]])
    between = ot_interpolation(
        sparse.csr_matrix(x), sparse.csr_matrix(y), x[:, :2], y[:, :2], 0.5, seed=0, name="d", most=MANY
    ).toarray()
    assert energy_distance(mixture, real) < 0.02
    assert energy_distance(between, real) > 0.03
    np.testing.assert_allclose(between[:, 2:].var(0).mean(), 0.5, atol=0.05)  # of the mean of two independent normals


def point(time, label="control"):
    return Point(time, f"{time:g}", label, np.arange(3))


def test_a_gap_has_the_measured_points_next_to_it():
    series = Series("drug", "t", (point(0.0), point(6.0, "drug"), point(24.0, "drug"), point(48.0, "drug")))
    assert [side.time for side in gap(series, 12.0).sides] == [6.0, 24.0]
    assert [side.time for side in gap(series, 24.0).sides] == [6.0, 48.0]  # left out where it is measured itself


@pytest.mark.parametrize(("time", "word"), [(-1.0, "earlier"), (0.0, "earlier"), (9.0, "later")])
def test_a_gap_at_the_end_of_a_series_declines(time, word):
    found = gap(Series("drug", "t", (point(0.0), point(9.0))), time).sides
    assert isinstance(found, Declined)
    assert found.reason == f"there is no {word} time point to interpolate from"


# --- clock --------------------------------------------------------------------------------------------------------
def test_the_way_is_as_long_as_the_sum_of_its_steps():
    rng = np.random.default_rng(0)
    cells = [rng.normal(size=(n, 3)) + shift for n, shift in ((31, 0.0), (29, 2.0), (37, 2.0))]
    first, second = (energy_distance(*pair) for pair in (cells[:2], cells[1:]))
    np.testing.assert_allclose(path_lengths(cells), [0.0, first**0.5, first**0.5 + max(second, 0.0) ** 0.5])


def test_time_points_without_a_change_between_them_keep_their_order():
    cells = [np.ones((5, 2)), np.ones((7, 2)), np.zeros((3, 2)), np.zeros((1, 2))]
    assert (np.diff(path_lengths(cells)) > 0).all()


@pytest.mark.parametrize(("pace", "wanted"), [(0.0, [0, 0.25, 1]), (1.0, [0, 0.6, 1]), (0.5, [0, 0.425, 1])])
def test_a_clock_runs_from_even_in_time_to_even_in_change(pace, wanted):
    np.testing.assert_allclose(clock([2.0, 3.0, 6.0], np.array([0.0, 3.0, 5.0]), pace), wanted)


def test_an_even_clock_and_one_of_two_points_are_linear_in_time():
    times, lengths = [0.0, 1.0, 2.0, 4.0], np.array([0.0, 1.0, 5.0, 12.0])
    assert reading(times, clock(times, lengths, 0.0), 2.5) == pytest.approx(0.625)
    assert reading([0.0, 10.0], clock([0.0, 10.0], np.array([0.0, 7.0]), 1.0), 4.0) == pytest.approx(0.4)


def test_what_changed_fast_before_a_gap_changes_early_in_it():
    times = [0.0, 1.0, 3.0, 4.0]
    early, late = np.array([0.0, 5.0, 8.0, 8.1]), np.array([0.0, 0.1, 3.1, 8.1])
    assert reading(times, early, 2.0) > 5.0 + 0.55 * 3.0
    assert reading(times, late, 2.0) < 0.1 + 0.45 * 3.0
    readings = [reading(times, early, time) for time in np.linspace(1.01, 2.99, 50)]
    assert (np.diff(readings) > 0).all()
    assert 5 < readings[0] < readings[-1] < 8


def test_no_clock_is_read_outside_the_points_or_at_one():
    for time in (-1.0, 0.0, 1.0, 3.0, 4.0):
        with pytest.raises(ValueError, match="is not between two of 0, 1, 3"):
            reading([0.0, 1.0, 3.0], np.array([0.0, 1.0, 2.0]), time)


# --- curve --------------------------------------------------------------------------------------------------------
def test_the_curve_is_the_monotone_cubic_through_all_points():
    """Halfway between equally spaced points: their mean and an eighth of the difference of the two slopes, which are
    harmonic means of those of the intervals on either side."""
    profiles = np.array([[0.0, 7.0], [1.0, 5.0], [4.0, 3.0], [4.5, 1.0]])
    slopes = 2 * 1 * 3 / (1 + 3), 2 * 3 * 0.5 / (3 + 0.5)
    wanted = (2.5 + (slopes[0] - slopes[1]) / 8) / 2.5
    np.testing.assert_allclose(curve_over_line(np.arange(4.0), profiles, 1.5), [wanted, 1.0])


def test_the_curve_never_leaves_what_both_neighbours_have():
    rng = np.random.default_rng(0)
    readings, profiles = np.array([0.0, 0.1, 0.4, 1.0]), rng.gamma(0.3, size=(4, 101))
    for now in (0.11, 0.2, 0.39):
        share = closeness(0.1, now, 0.4)
        curve = curve_over_line(readings, profiles, now) * ((1 - share) * profiles[1] + share * profiles[2])
        low, high = np.sort(profiles[1:3], axis=0)
        assert (curve >= low * (1 - 1e-12)).all()
        assert (curve <= high * (1 + 1e-12)).all()


def test_two_points_have_no_curve_and_a_gene_that_neither_neighbour_has_no_factor():
    two = np.array([[1.0, 0.0], [3.0, 5.0]])
    np.testing.assert_allclose(curve_over_line(np.array([0.0, 1.0]), two, 0.3), 1.0)
    absent = np.array([[0.0], [0.0], [2.0]])
    np.testing.assert_array_equal(curve_over_line(np.array([0.0, 0.6, 1.0]), absent, 0.3), 1.0)
