"""Real against real: splits are what they are said to be, and ceilings are between chance and perfect."""

import numpy as np
import pytest

from pf_core import ceiling, metrics, screen_metrics
from pf_core.noise import generator
from pf_core.screens import Screen


@pytest.mark.parametrize("n", [2, 23, 30])
def test_halves_are_disjoint_and_equal(n):
    first, second = ceiling.resample(n, seed=3, name="A")
    assert len(first) == len(second) == n // 2
    assert not set(first.tolist()) & set(second.tolist())


def test_samples_with_replacement_have_full_size_and_repeat_cells():
    first, second = ceiling.resample(101, seed=3, name="A", method="replacement")
    assert len(first) == len(second) == 101
    # 1 - 1/e of the cells are expected in each.
    assert all(50 < len(set(side.tolist())) < 78 for side in (first, second))
    assert not np.array_equal(first, second)


def test_a_split_depends_on_seed_name_and_index_and_on_nothing_else():
    def of(**changed):
        return ceiling.resample(31, **{"seed": 3, "name": "A", "index": 2, **changed})[0].tolist()

    assert of() == of()
    assert all(of() != of(**changed) for changed in ({"seed": 4}, {"name": "B"}, {"index": 3}))


def test_the_ceiling_of_an_unbiased_distance_is_zero_within_its_noise():
    cells = generator(29, "test_ceiling.cells").standard_normal((83, 5))
    found = ceiling.ceiling(cells, metrics.energy_distance, seed=3, name="A", n_repeats=50)
    assert found.values.shape == (50,)
    assert abs(found.mean) < 4 * found.std
    assert found.values.min() < 0 < found.values.max()


def test_samples_with_replacement_share_cells_so_their_ceiling_is_optimistic():
    cells = generator(29, "test_ceiling.cells").standard_normal((83, 5))

    def distance(x, y):
        return np.linalg.norm(x.mean(axis=0) - y.mean(axis=0))

    halves, shared = (
        ceiling.ceiling(cells, distance, seed=3, name="A", n_repeats=50, method=m) for m in ("halves", "replacement")
    )
    assert shared.mean < halves.mean


def _screen():
    rng = generator(29, "test_ceiling.screen")
    labels = np.repeat(["A", "B", "control"], (41, 37, 53))
    shift = np.where(labels[:, None] == "A", 3.0, 0) * rng.random(17)
    return Screen(
        np.abs(rng.standard_normal((131, 17)) + shift), labels, [f"g{i}" for i in range(17)], control="control"
    )


def test_a_screen_is_split_within_every_label():
    seen = []

    def look(first, second):
        seen.append((first, second))
        return 0.0

    ceiling.screen_ceiling(_screen(), look, seed=3, n_repeats=1)
    for side in seen[0]:
        assert [int((side.labels == label).sum()) for label in ("A", "B", "control")] == [20, 18, 26]
    rows = [{row.tobytes() for row in side.cells.toarray()} for side in seen[0]]
    assert not rows[0] & rows[1]


def test_the_ceiling_of_a_screen_is_one_row_per_repeat_and_reproducible():
    first, again = (
        ceiling.screen_ceiling(_screen(), screen_metrics.pearson_delta, seed=3, n_repeats=7) for _ in range(2)
    )
    assert first.values.shape == (7, 2)
    assert first.mean.shape == first.std.shape == (2,)
    np.testing.assert_array_equal(first.values, again.values)
    assert first.mean[0] > 0.8 > first.mean[1]  # B does nothing: its change is noise


def test_spearman_brown_doubles_the_length_of_a_test():
    np.testing.assert_allclose(ceiling.spearman_brown(np.array([0.5, 1.0, 0.0, -0.3])), [2 / 3, 1, np.nan, np.nan])


def test_bad_input_is_refused():
    cells = np.ones((5, 3))
    with pytest.raises(ValueError, match="two are the least"):
        ceiling.resample(1, seed=3, name="A")
    with pytest.raises(ValueError, match="'halves' or 'replacement'"):
        ceiling.resample(7, seed=3, name="A", method="thirds")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="n_repeats=0"):
        ceiling.ceiling(cells, metrics.energy_distance, seed=3, name="A", n_repeats=0)
