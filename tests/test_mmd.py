"""MMD against a loop and against its closed form for normal distributions."""

import math

import numpy as np
import pytest

from pf_core import metrics
from pf_core.mmd import bandwidth, mmd
from pf_core.noise import generator


def _draw(name, *shape):
    return generator(37, f"test_mmd.{name}").standard_normal(shape)


@pytest.mark.parametrize("estimator", ["u", "v"])
def test_mmd_equals_naive_loops(estimator, monkeypatch):
    x, y = _draw("x", 11, 5), _draw("y", 7, 5) + 0.5
    monkeypatch.setattr(metrics, "CHUNK", 17)

    def mean(a, b, same):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and estimator == "u" and i == j)]
        return sum(math.exp(-0.3 * sum((a[i] - b[j]) ** 2)) for i, j in pairs) / len(pairs)

    wanted = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert mmd(x, y, gamma=0.3, estimator=estimator) == pytest.approx(wanted, rel=1e-12)


def test_mmd_of_two_normals_is_their_closed_form():
    # E exp(-g d^2) with d ~ N(m, 2) in each of two dimensions is (1 + 4g)^(-1/2) exp(-g m^2 / (1 + 4g)).
    g, shift, n = 0.4, 0.8, 4001
    x, y = _draw("normal x", n, 2), _draw("normal y", n, 2) + [shift, 0]
    wanted = 2 / (1 + 4 * g) * (1 - math.exp(-g * shift**2 / (1 + 4 * g)))
    assert mmd(x, y, gamma=g) == pytest.approx(wanted, abs=0.01)


def test_the_u_statistic_is_unbiased_for_equal_distributions():
    values = np.array([mmd(_draw(f"u{i}", 17, 3), _draw(f"w{i}", 19, 3), gamma=0.3) for i in range(200)])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(len(values))


def test_bandwidths_are_what_their_names_say():
    x, y = _draw("x", 11, 5), _draw("y", 7, 5)
    pooled = np.concatenate([x, y])
    squares = [sum((pooled[i] - pooled[j]) ** 2) for i in range(18) for j in range(i)]
    assert bandwidth(x, y) == pytest.approx(1 / np.median(squares), rel=1e-12)
    assert bandwidth(x, y, rule="mean") == pytest.approx(1 / np.mean(squares), rel=1e-12)
    assert bandwidth(x, y, rule="scale") == pytest.approx(1 / (5 * pooled.var()), rel=1e-12)


def test_bad_input_is_refused():
    x = _draw("x", 11, 5)
    with pytest.raises(ValueError, match="gamma=0"):
        mmd(x, x, gamma=0)
    with pytest.raises(ValueError, match="'median', 'mean' or 'scale'"):
        bandwidth(x, x, rule="scott")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="pass gamma"):
        bandwidth(np.ones((3, 2)), np.ones((5, 2)))
    with pytest.raises(ValueError, match="2 of each"):
        mmd(x, x[:1], gamma=1.0)
    with pytest.raises(ValueError, match="shapes"):
        mmd(x, x[:, :2], gamma=1.0)
    with pytest.raises(ValueError, match="not finite"):
        mmd(x, x * np.inf, gamma=1.0)
