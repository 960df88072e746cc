"""Energy distances of the JAX twin, against loops, SciPy and closed forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cdist

from pf_jax import distances
from pf_jax.distances import sliced_energy_distance

# JAX compiles for minutes here; in the fast tier the parity suite holds the same functions to the oracle.
pytestmark = pytest.mark.slow

# Compiled once for all tests of one shape; the checks of arguments run while tracing.
_OPTIONS = ("estimator", "power", "smoothing", "method", "tile")
energy_distance = jax.jit(distances.energy_distance, static_argnames=_OPTIONS)
energy_distance_grouped = jax.jit(distances.energy_distance_grouped, static_argnames=_OPTIONS[:3])


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def cells(seed: int, n: int = 13, m: int = 7, d: int = 3):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(size=(m, d)) * 1.3 + 0.4, rng.random(n), rng.random(m)


def by_loops(x, y, wx, wy, estimator="v", power=1, smoothing=0.0) -> float:
    def term(a, b, wa, wb, own):
        total = weight = 0.0
        for i in range(len(a)):
            for j in range(len(b)):
                if own and estimator == "u" and i == j:
                    continue
                squared = float(((a[i] - b[j]) ** 2).sum())
                total += wa[i] * wb[j] * (squared if power == 2 else (squared + smoothing) ** 0.5)
                weight += wa[i] * wb[j]
        return total / weight

    return 2 * term(x, y, wx, wy, False) - term(x, x, wx, wx, True) - term(y, y, wy, wy, True)


def gradient_by_formula(x, y, wx, wy, estimator="v"):
    """Closed form of docs/math.md 5 with weights, in x."""
    wx, wy = wx / wx.sum(), wy / wy.sum()
    scale = 1 - (wx**2).sum() if estimator == "u" else 1.0

    def units(a, b):
        difference = a[:, None] - b[None]
        distance = np.linalg.norm(difference, axis=-1, keepdims=True)
        return difference / np.where(distance > 0, distance, 1.0)

    between = np.einsum("i,j,ijk->ik", wx, wy, units(x, y))
    within = np.einsum("i,j,ijk->ik", wx, wx, units(x, x))
    return 2 * between - 2 * within / scale


@pytest.mark.parametrize("method", ["tiled", "plain"])
@pytest.mark.parametrize("estimator", ["v", "u"])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.03])
def test_energy_distance_is_the_sum_over_pairs(method, estimator, power, smoothing):
    x, y, wx, wy = cells(0)
    options = {"estimator": estimator, "power": power, "smoothing": smoothing}
    found = energy_distance(
        jnp.asarray(x), jnp.asarray(y), wx=jnp.asarray(wx), wy=jnp.asarray(wy), method=method, tile=5, **options
    )
    assert float(found) == pytest.approx(by_loops(x, y, wx, wy, **options), rel=1e-12)
    equal = energy_distance(jnp.asarray(x), jnp.asarray(y), method=method, tile=64, **options)
    assert float(equal) == pytest.approx(by_loops(x, y, np.ones(13), np.ones(7), **options), rel=1e-12)


def test_energy_distance_in_one_dimension_is_scipys():
    x, y, _, _ = cells(1, 31, 23, 1)
    found = energy_distance(jnp.asarray(x), jnp.asarray(y))
    assert float(found) == pytest.approx(stats.energy_distance(x[:, 0], y[:, 0]) ** 2, rel=1e-10)


def test_squared_energy_distance_is_twice_the_squared_distance_of_the_means():
    x, y, _, _ = cells(2)
    wanted = 2 * ((x.mean(0) - y.mean(0)) ** 2).sum()
    assert float(energy_distance(jnp.asarray(x), jnp.asarray(y), power=2)) == pytest.approx(wanted, rel=1e-13)


@pytest.mark.parametrize("estimator", ["v", "u"])
@pytest.mark.parametrize("tile", [4, 64])
@pytest.mark.parametrize("d", [3, 41])
def test_tiled_gradient_is_the_closed_form(estimator, tile, d):
    x, y, wx, wy = cells(3, d=d)
    function = lambda x, y: energy_distance(
        x, y, wx=jnp.asarray(wx), wy=jnp.asarray(wy), estimator=estimator, tile=tile
    )
    gx, gy = jax.grad(function, (0, 1))(jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(gx, gradient_by_formula(x, y, wx, wy, estimator), rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(gy, gradient_by_formula(y, x, wy, wx, estimator), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"estimator": "u"}, {"smoothing": 0.05}, {"power": 2, "estimator": "u"}])
def test_energy_distance_second_derivatives_agree_with_differences_of_the_gradient(options):
    x, y, wx, wy = (jnp.asarray(a) for a in cells(4))
    gradient = jax.jit(jax.grad(lambda x: energy_distance(x, y, wx=wx, wy=wy, tile=6, **options)))
    direction = jnp.cos(jnp.arange(39.0)).reshape(13, 3)
    _, forward_over_reverse = jax.jvp(gradient, (x,), (direction,))
    reverse_over_reverse = jax.grad(lambda x: (gradient(x) * direction).sum())(x)
    h = 1e-6
    wanted = (gradient(x + h * direction) - gradient(x - h * direction)) / (2 * h)
    np.testing.assert_allclose(forward_over_reverse, wanted, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(reverse_over_reverse, forward_over_reverse, rtol=1e-10, atol=1e-13)


def test_energy_distance_jvp_is_the_gradient_times_the_direction():
    x, y, wx, wy = cells(5)
    function = lambda x: energy_distance(x, jnp.asarray(y), wx=jnp.asarray(wx), wy=jnp.asarray(wy), tile=6)
    direction = np.sin(np.arange(39.0)).reshape(13, 3)
    _, found = jax.jvp(function, (jnp.asarray(x),), (jnp.asarray(direction),))
    assert float(found) == pytest.approx((gradient_by_formula(x, y, wx, wy) * direction).sum(), rel=1e-12)


@pytest.mark.parametrize("method", ["tiled", "plain"])
def test_coincident_cells_have_no_pull_on_each_other(method):
    x, y, wx, wy = cells(6)
    x[3], x[5], y[2] = x[4], y[1], y[0]
    function = lambda x: energy_distance(
        x, jnp.asarray(y), wx=jnp.asarray(wx), wy=jnp.asarray(wy), method=method, tile=6
    )
    value, gradient = jax.value_and_grad(function)(jnp.asarray(x))
    assert float(value) == pytest.approx(by_loops(x, y, wx, wy), rel=1e-12)
    np.testing.assert_allclose(gradient, gradient_by_formula(x, y, wx, wy), rtol=1e-11, atol=1e-14)
    _, second = jax.jvp(jax.grad(function), (jnp.asarray(x),), (jnp.ones_like(gradient),))
    assert np.isfinite(second).all()


def test_energy_distance_of_a_set_to_itself_is_zero_with_gradient_zero():
    x, _, _, _ = cells(7)
    value, gradient = jax.value_and_grad(lambda x: energy_distance(x, jnp.asarray(x_fixed), tile=5))(
        jnp.asarray(x_fixed := x)
    )
    assert abs(float(value)) < 1e-15
    np.testing.assert_allclose(gradient, 0.0, atol=1e-16)
    one_point = jnp.ones((4, 3))
    value, gradient = jax.value_and_grad(lambda x: energy_distance(x, one_point))(one_point)
    assert float(value) == 0.0
    assert (gradient == 0).all()


def test_cells_of_weight_zero_change_nothing_and_get_no_gradient():
    x, y, wx, wy = cells(8)
    wx[[2, 9]] = 0.0
    moved = x.copy()
    moved[[2, 9]] = [[1e3, -5.0, 0.2], x[4]]
    function = lambda x: energy_distance(x, jnp.asarray(y), wx=jnp.asarray(wx), wy=jnp.asarray(wy), tile=6)
    for cells_ in (x, moved):
        value, gradient = jax.value_and_grad(function)(jnp.asarray(cells_))
        keep = wx > 0
        assert float(value) == pytest.approx(by_loops(x[keep], y, wx[keep], wy), rel=1e-12)
        assert (gradient[~keep] == 0).all()


def test_weights_are_data_and_carry_no_gradient():
    x, y, wx, wy = (jnp.asarray(a) for a in cells(9))
    for method in ("tiled", "plain"):
        gradient = jax.grad(lambda wx, method=method: energy_distance(x, y, wx=wx, wy=wy, method=method))(wx)
        assert (gradient == 0).all()


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("estimator", ["v", "u"])
@pytest.mark.parametrize("d", [2, 17])
@pytest.mark.parametrize("tile", [64, 512])
def test_float32_value_and_gradient_hold_far_from_the_origin(mean, estimator, d, tile):
    x, y, _, _ = cells(10, 211, 193, d)
    x, y = (x + mean).astype(np.float32), (y + mean).astype(np.float32)
    function = jax.value_and_grad(lambda x, y: energy_distance(x, y, estimator=estimator, tile=tile), (0, 1))
    value, gradients = function(jnp.asarray(x), jnp.asarray(y))
    assert value.dtype == jnp.float32
    x, y = x.astype(np.float64), y.astype(np.float64)
    n, m = len(x), len(y)
    scale_x, scale_y = (n * (n - 1), m * (m - 1)) if estimator == "u" else (n * n, m * m)
    wanted = 2 * cdist(x, y).mean() - cdist(x, x).sum() / scale_x - cdist(y, y).sum() / scale_y
    assert float(value) == pytest.approx(wanted, rel=1e-5)
    sides = (x, y, np.ones(n), np.ones(m)), (y, x, np.ones(m), np.ones(n))
    for found, side in zip(gradients, sides, strict=True):
        exact = gradient_by_formula(*side, estimator)
        assert np.abs(found - exact).max() <= 1e-5 * np.abs(exact).max()


def test_float32_gradient_is_right_when_a_cell_nearly_repeats():
    x, y, _, _ = cells(11, 23, 19, 5)
    x[3] = x[4] + 1e-6
    x, y = (x + 30).astype(np.float32), (y + 30).astype(np.float32)
    found = jax.grad(lambda x: energy_distance(x, jnp.asarray(y)))(jnp.asarray(x))
    exact = gradient_by_formula(x.astype(np.float64), y.astype(np.float64), np.ones(23), np.ones(19))
    assert np.abs(found - exact).max() <= 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("repeated", [0, 1, 3, 6, 7, 9])  # 6 + 4 * repeated pairs are near, and up to 32 are few
def test_near_pairs_have_the_derivatives_of_the_plain_form(repeated):
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(2, 20, 5)) + 3.0, rng.normal(size=(2, 12, 5))
    x[:, 1 : 1 + repeated] = x[:, 19 - repeated : 19] + 1e-5 * rng.normal(size=(2, repeated, 5))
    x[1, 0] = y[1, 0] = x[1, 19]  # a cell of both sides, in one group only
    wx, wy = rng.random((2, 20)), rng.random((2, 12))
    wx[:, 5], wy[0, 3] = 0.0, 0.0
    x, y, wx, wy, direction = map(jnp.asarray, (x, y, wx, wy, rng.normal(size=x.shape)))

    def derivatives(energies):
        energy = lambda x, y: (energies(x, y) ** 2).sum()
        gradient = jax.grad(energy, (0, 1))
        return jax.jit(lambda: (energy(x, y), gradient(x, y), jax.jvp(lambda x: gradient(x, y), (x,), (direction,))))()

    def plain(x, y):
        each = [distances.energy_distance(x[g], y[g], wx=wx[g], wy=wy[g], method="plain") for g in range(2)]
        return jnp.stack(each)

    found = derivatives(lambda x, y: distances.energy_distance_grouped(x, y, wx=wx, wy=wy))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(derivatives(plain)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_groups_too_many_for_the_cache_are_taken_one_by_one_and_nothing_changes(monkeypatch):
    rng = np.random.default_rng(6)
    x, y, share = rng.normal(size=(5, 7, 3)), rng.normal(size=(5, 11, 3)) + 0.4, rng.normal(size=5)
    x[1, 4] = x[1, 5]  # coincident cells in one group only
    wx, wy = rng.random((5, 7)), rng.random((5, 11))

    def derivatives():
        # Not the functions compiled above, which may have been traced under the other limit.
        total = lambda x: (share * distances.energy_distance_grouped(x, y, wx=wx, wy=wy)).sum()
        return jax.jit(lambda: (*jax.value_and_grad(total)(x), jax.jvp(jax.grad(total), (x,), (x**2,))[1]))()

    together = derivatives()
    monkeypatch.setattr(distances, "_CACHED", 0)
    for found, wanted in zip(derivatives(), together, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("estimator", ["v", "u"])
@pytest.mark.parametrize("power", [1, 2])
def test_grouped_energy_distance_is_one_distance_per_group_whatever_the_padding(estimator, power):
    rng = np.random.default_rng(12)
    sizes = [(5, 3), (2, 7), (4, 4)]
    x, y, wx, wy = np.zeros((4, 5, 3)), np.zeros((4, 7, 3)), np.zeros((4, 5)), np.zeros((4, 7))
    for p, (n, m) in enumerate(sizes):
        x[p, :n], y[p, :m], wx[p, :n], wy[p, :m] = (rng.random(s) for s in ((n, 3), (m, 3), n, m))
        x[p, n:], y[p, m:] = x[p, n - 1], y[p, 0]  # padding repeats a cell
    function = lambda x: energy_distance_grouped(
        x, jnp.asarray(y), wx=jnp.asarray(wx), wy=jnp.asarray(wy), estimator=estimator, power=power
    )
    found = function(jnp.asarray(x))
    for p, (n, m) in enumerate(sizes):
        wanted = by_loops(x[p, :n], y[p, :m], wx[p, :n], wy[p, :m], estimator, power)
        assert float(found[p]) == pytest.approx(wanted, rel=1e-11)
    assert found[3] == 0.0
    gradient = jax.grad(lambda x: function(x).sum())(jnp.asarray(x))
    assert np.isfinite(gradient).all()
    assert (gradient[3] == 0).all()
    assert (gradient[wx == 0] == 0).all()


def test_a_group_with_one_empty_side_is_zero():
    x, y = jnp.ones((1, 3, 2)), jnp.arange(8.0).reshape(1, 4, 2)
    value = energy_distance_grouped(x, y, wx=jnp.zeros((1, 3)), wy=jnp.ones((1, 4)))
    assert value[0] == 0.0


def test_sliced_energy_distance_along_an_axis_is_scipys():
    x, y, _, _ = cells(13, 17, 11, 1)
    found = sliced_energy_distance(jnp.asarray(x), jnp.asarray(y), jnp.ones((1, 1)))
    # In one dimension c_d is sqrt(pi) Gamma(1) / Gamma(1/2) = 1.
    assert float(found) == pytest.approx(stats.energy_distance(x[:, 0], y[:, 0]) ** 2, rel=1e-10)


@pytest.mark.parametrize("estimator", ["v", "u"])
def test_sliced_energy_distance_converges_to_the_energy_distance(estimator):
    x, y, _, _ = cells(14, 31, 29, 3)
    directions = np.random.default_rng(0).normal(size=(20000, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    found = sliced_energy_distance(jnp.asarray(x), jnp.asarray(y), jnp.asarray(directions), estimator=estimator)
    assert float(found) == pytest.approx(by_loops(x, y, np.ones(31), np.ones(29), estimator), rel=0.03)


def test_sliced_gradient_agrees_with_central_differences_and_ignores_ties():
    x, y, _, _ = cells(15, 7, 5, 3)
    directions = jnp.asarray(np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0])
    function = lambda x: sliced_energy_distance(x, jnp.asarray(y), directions)
    direction = np.cos(np.arange(21.0)).reshape(7, 3)
    found = (jax.grad(function)(jnp.asarray(x)) * direction).sum()
    h = 1e-6
    wanted = (function(jnp.asarray(x + h * direction)) - function(jnp.asarray(x - h * direction))) / (2 * h)
    assert float(found) == pytest.approx(float(wanted), rel=1e-7)
    tied = jax.grad(lambda x: sliced_energy_distance(x, jnp.asarray(y), directions))(jnp.asarray(y))
    np.testing.assert_allclose(tied, 0.0, atol=1e-15)


def test_distances_name_what_does_not_fit():
    x, y = jnp.ones((3, 2)), jnp.ones((5, 2))
    with pytest.raises(ValueError, match="x and y have shapes"):
        energy_distance(x, jnp.ones((5, 3)))
    with pytest.raises(ValueError, match="wx has shape"):
        energy_distance(x, y, wx=jnp.ones(4))
    with pytest.raises(ValueError, match="'v' or 'u'"):
        energy_distance(x, y, estimator="w")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 or 2"):
        energy_distance(x, y, power=3)
    with pytest.raises(ValueError, match="two cells a side"):
        energy_distance(x[:1], y, estimator="u")
    with pytest.raises(ValueError, match="n_directions"):
        sliced_energy_distance(x, y, jnp.ones((4, 3)))
