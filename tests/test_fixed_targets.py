"""Training sees the value of an energy distance while it differentiates in one side: JAX then goes another way.

The parity suite holds the derivatives to the oracle, but values as they are without differentiation; they are here.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from pf_jax.distances import energy_distance, energy_distance_grouped

N, M, D = 16, 20, 3


def cells(near: int):
    """Two sides, `near` pairs of cells almost or wholly at one place in each and across, and a cell without weight."""
    rng = np.random.default_rng(near)
    x, y = rng.normal(size=(N, D)), 0.4 + 1.3 * rng.normal(size=(M, D))
    for k in range(near):
        x[2 * k] = x[2 * k + 1] + 1e-4 * rng.normal(size=D)
        y[2 * k] = y[2 * k + 1]
    if near:
        y[11] = x[9]
    wx, wy = rng.uniform(0.3, 2, N), rng.uniform(0.3, 2, M)
    wx[15], wy[3] = 0.0, 0.0
    return x, y, wx, wy


def by_matrices(x, y, wx, wy, estimator, smoothing) -> float:
    wx, wy = wx / wx.sum(), wy / wy.sum()

    def mean(a, b, wa, wb, own):
        pairs = wa[:, None] * wb * np.sqrt(cdist(a, b, "sqeuclidean") + smoothing)
        if own and estimator == "u":
            return (pairs.sum() - np.trace(pairs)) / (1 - (wa**2).sum())
        return pairs.sum()

    return 2 * mean(x, y, wx, wy, False) - mean(x, x, wx, wx, True) - mean(y, y, wy, wy, True)


@pytest.mark.parametrize(("estimator", "smoothing"), [("v", 0.0), ("u", 0.25)])
def test_the_value_beside_a_gradient_in_one_side_is_the_value(estimator, smoothing):
    options = {"estimator": estimator, "smoothing": smoothing}

    @jax.jit
    def both(x, y, wx, wy):
        one = jax.value_and_grad(partial(energy_distance, **options))(x, y, wx=wx, wy=wy)
        grouped = lambda x: energy_distance_grouped(
            jnp.stack([x, x]), jnp.stack([y, y]), wx=jnp.stack([wx, wx]), wy=jnp.stack([wy, 0 * wy]), **options
        )
        groups, pull = jax.vjp(grouped, x)
        return (
            one,
            groups,
            pull(jnp.array([1.0, 5.0]))[0],
            jax.grad(energy_distance, (0, 1))(x, y, wx=wx, wy=wy, **options),
        )

    with jax.enable_x64(True):
        for near in (0, 1, 5):  # none, few, and too many to be taken one by one
            given = cells(near)
            (value, gradient), groups, in_groups, (of_x, _) = both(*map(jnp.asarray, given))
            want = by_matrices(*given, **options)
            np.testing.assert_allclose(value, want, rtol=1e-9)  # cdist rounds near pairs
            np.testing.assert_allclose(groups, [want, 0.0], rtol=1e-9)
            np.testing.assert_allclose(gradient, of_x, rtol=1e-8, atol=1e-12)
            np.testing.assert_allclose(in_groups, of_x, rtol=1e-8, atol=1e-12)


def test_a_gradient_in_one_side_needs_no_products_for_the_other():
    """Squared distances of x to all and of y among themselves, and the pull on x: no pull on y."""
    x, y, wx, wy = (jnp.asarray(value, jnp.float32) for value in cells(0))
    gradient = jax.jit(jax.value_and_grad(partial(energy_distance, wx=wx, wy=wy)))
    text = gradient.lower(x, y).compile().as_text()
    shapes = [line.split(" = f32")[1].split("{")[0] for line in text.splitlines() if " dot(" in line]
    assert set(shapes) == {f"[{N},{N + M}]", f"[{N},{D + 1}]", f"[{M},{M}]"}
