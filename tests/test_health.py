"""Verdicts on gradients."""

import numpy as np
import pytest

from pf_core.health import HUGE, TINY, health_of, judge


@pytest.mark.parametrize(
    ("grad", "param", "verdict"),
    [
        (None, [1.0], "none"),
        ([0.0, 0.0], [1.0, 1.0], "zero"),
        ([0.5 * TINY, 0.0], [1.0, 1.0], "tiny"),
        ([2 * TINY, 0.0], [1.0, 1.0], "ok"),
        ([1.1 * HUGE, 0.0], [0.0, 1.0], "huge"),
        ([1.1 * HUGE, 0.0], [0.0, 2.0], "ok"),
        ([np.nan, 1.0], [1.0, 1.0], "non-finite"),
        ([-np.inf, 1.0], [1.0, 1.0], "non-finite"),
    ],
)
def test_verdict_follows_from_size_and_path(grad, param, verdict):
    assert health_of(None if grad is None else np.array(grad, "float32"), np.array(param)).verdict == verdict


def test_numbers_beside_the_verdict_are_those_of_the_finite_entries():
    health = health_of(np.array([[3.0, np.nan], [-4.0, np.inf]]), np.ones((2, 2)))
    assert (health.norm, health.max_abs, health.n_nonfinite) == (5.0, 4.0, 2)


def test_an_overflowing_norm_is_not_finite():
    assert judge(float("inf"), 1e200, 0, 1.0, True).verdict == "non-finite"
