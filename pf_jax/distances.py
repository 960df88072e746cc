"""Energy distances between sets of cells (docs/math.md 5).

Distances are consumed in tiles and never stored: one pass over the tiles gives the value and the closed-form
gradient. The rule is a `jax.custom_jvp` whose tangent is linear in the gradient of that pass, and the pass itself is
made of differentiable operations under `jax.checkpoint`, so that jvp, grad and Hessian-vector products all work in
the memory of a tile (third derivatives work too, by plain autodiff of the pass).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pf_core.config import TILE
from pf_jax.layers import matmul

__all__ = ["energy_distance", "energy_distance_grouped", "sliced_energy_distance"]

Estimator = Literal["v", "u"]


def energy_distance(
    x: jax.Array,
    y: jax.Array,
    *,
    wx: jax.Array | None = None,
    wy: jax.Array | None = None,
    estimator: Estimator = "v",
    power: int = 1,
    smoothing: float = 0.0,
    method: Literal["tiled", "plain"] = "tiled",
    tile: int = TILE,
) -> jax.Array:
    """Energy distance 2 E|x - y| - E|x - x'| - E|y - y'| between two sets of cells.

    Differentiated in x and y; weights are data. Coincident cells have distance 0 and gradient 0. The distance is 0,
    with gradient 0, when the weights of a side are all 0.

    Args:
        x: (n, n_latent).
        y: (m, n_latent).
        wx: (n,) weights >= 0, normalised here; None for equal weights.
        wy: (m,) the same for y.
        estimator: "v" (pairs of a cell with itself count; never negative) or "u" (they do not; unbiased, and not a
            number when a side has a single cell).
        power: 1 for distances, 2 for squared distances (from moments, without pairs).
        smoothing: s of sqrt(d^2 + s), in units of x squared.
        method: "tiled", or "plain" for whole matrices of distances.
        tile: rows and columns of a tile.

    Returns:
        () distance, in units of x (squared for power 2).

    Raises:
        ValueError: shapes that do not fit, or an unknown option.
    """
    _check(x, y, 2, estimator, power, smoothing)
    if method not in ("tiled", "plain"):
        raise ValueError(f"method is {method!r}; 'tiled' or 'plain' was wanted")
    if tile < 1:
        raise ValueError(f"tile is {tile}; a positive number of rows was wanted")
    return _energy(x, y, wx, wy, estimator, power, smoothing, None if method == "plain" else tile)


def energy_distance_grouped(
    x: jax.Array,
    y: jax.Array,
    *,
    wx: jax.Array,
    wy: jax.Array,
    estimator: Estimator = "v",
    power: int = 1,
    smoothing: float = 0.0,
) -> jax.Array:
    """Energy distance of every condition, on padded groups: one call, no pair across conditions.

    Differentiated in x and y; weights are data. A group whose weights are all 0 gives 0 with gradient 0.

    Args:
        x: (n_conditions, n, n_latent), padded.
        y: (n_conditions, m, n_latent), padded.
        wx: (n_conditions, n) weights >= 0, 0 for padding; normalised here.
        wy: (n_conditions, m) the same for y.
        estimator: "v" or "u", as in `energy_distance`.
        power: 1 for distances, 2 for squared distances.
        smoothing: s of sqrt(d^2 + s), in units of x squared.

    Returns:
        (n_conditions,) distances.

    Raises:
        ValueError: shapes that do not fit, or an unknown option.
    """
    _check(x, y, 3, estimator, power, smoothing)
    return _energy(x, y, wx, wy, estimator, power, smoothing, TILE)


def sliced_energy_distance(
    x: jax.Array, y: jax.Array, directions: jax.Array, *, estimator: Estimator = "v"
) -> jax.Array:
    """Energy distance by one-dimensional projections: |x| = c_d E_w |<w, x>| over unit vectors w.

    Differentiated in x and y, exactly, from ranks; coincident projections contribute gradient 0. Each direction
    costs O((n + m) log(n + m)).

    Args:
        x: (n, n_latent).
        y: (m, n_latent).
        directions: (n_directions, n_latent) unit rows, drawn by the caller.
        estimator: "v" or "u", as in `energy_distance`.

    Returns:
        () distance, in units of x.

    Raises:
        ValueError: shapes that do not fit, or an unknown option.
    """
    _check(x, y, 2, estimator, 1, 0.0)
    n_latent = x.shape[1]
    if directions.ndim != 2 or directions.shape[1] != n_latent:
        raise ValueError(f"directions have shape {directions.shape}; (n_directions, {n_latent}) was wanted")
    if estimator == "u" and min(x.shape[0], y.shape[0]) < 2:
        raise ValueError(f"estimator 'u' needs two cells a side; got {x.shape[0]} and {y.shape[0]}")
    centre = jax.lax.stop_gradient(x.mean(0))
    a, b = matmul(directions, (x - centre).T), matmul(directions, (y - centre).T)
    n, m = a.shape[1], b.shape[1]
    own = (n * n, m * m) if estimator == "v" else (n * (n - 1), m * (m - 1))
    # sum_ij |a_i - b_j| = sum_i a_i s_i - ..., s_i = sum_j sign(a_i - b_j): linear in a and b between changes of rank.
    ranks_a = 2.0 / (n * m) * _signs(a, b) - 2.0 / own[0] * _signs(a, a)
    ranks_b = 2.0 / (n * m) * _signs(b, a) - 2.0 / own[1] * _signs(b, b)
    scale = math.sqrt(math.pi) * math.exp(math.lgamma((n_latent + 1) / 2) - math.lgamma(n_latent / 2))
    return scale * ((ranks_a * a).sum(-1) + (ranks_b * b).sum(-1)).mean()


def _signs(a: jax.Array, b: jax.Array) -> jax.Array:
    """sum_j sign(a_i - b_j) along the last axis, by sorting; no gradient."""
    a, b = jax.lax.stop_gradient((a, jnp.sort(b, axis=-1)))
    below = jax.vmap(partial(jnp.searchsorted, side="left"))(b, a)
    not_above = jax.vmap(partial(jnp.searchsorted, side="right"))(b, a)
    return (below + not_above - b.shape[-1]).astype(a.dtype)


def _energy(x, y, wx, wy, estimator: Estimator, power: int, smoothing: float, tile: int | None) -> jax.Array:
    """Energy distances over the leading axes; tile None stores whole matrices."""
    wx, wy = _weights(wx, x, "wx"), _weights(wy, y, "wy")
    if estimator == "u" and min(x.shape[-2], y.shape[-2]) < 2:
        raise ValueError(f"estimator 'u' needs two cells a side; got {x.shape[-2]} and {y.shape[-2]}")
    total_x, total_y = wx.sum(-1, keepdims=True), wy.sum(-1, keepdims=True)
    present = (total_x > 0) & (total_y > 0)
    wx = jnp.where(present, wx / jnp.where(present, total_x, 1.0), 0.0)
    wy = jnp.where(present, wy / jnp.where(present, total_y, 1.0), 0.0)
    # The distance does not change under a shift, so the shift is a constant: it keeps float32 far from the origin.
    centre = jax.lax.stop_gradient((wx[..., None] * x).sum(-2, keepdims=True))
    x, y = x - centre, y - centre
    own_x, own_y = (wx * wx).sum(-1), (wy * wy).sum(-1)
    if power == 2:
        return _squared_energy(x, y, wx, wy, own_x, own_y, estimator)
    if tile is None:
        within_x, within_y = _plain(x, x, wx, wx, smoothing), _plain(y, y, wy, wy, smoothing)
        between = _plain(x, y, wx, wy, smoothing)
    else:
        within_x, within_y = _within(x, wx, smoothing, tile), _within(y, wy, smoothing, tile)
        between = _between(x, y, wx, wy, smoothing, tile)
    if estimator == "u":
        diagonal = math.sqrt(smoothing)
        within_x = (within_x - diagonal * own_x) / (1.0 - own_x)
        within_y = (within_y - diagonal * own_y) / (1.0 - own_y)
    return 2.0 * between - within_x - within_y


def _squared_energy(x, y, wx, wy, own_x, own_y, estimator: Estimator) -> jax.Array:
    """Squared distances from moments: smoothing adds the same to every term and cancels."""
    mean_x, mean_y = (wx[..., None] * x).sum(-2), (wy[..., None] * y).sum(-2)
    value = 2.0 * ((mean_x - mean_y) ** 2).sum(-1)
    if estimator == "u":
        spread_x = (wx[..., None] * (x - mean_x[..., None, :]) ** 2).sum((-2, -1))
        spread_y = (wy[..., None] * (y - mean_y[..., None, :]) ** 2).sum((-2, -1))
        value = value - 2.0 * (spread_x * own_x / (1.0 - own_x) + spread_y * own_y / (1.0 - own_y))
    return value


# --- sums over pairs ---------------------------------------------------------------------------------------------


def _plain(x, y, wx, wy, smoothing: float) -> jax.Array:
    """sum_ij wx_i wy_j |x_i - y_j| from the whole matrix, differentiated by autodiff."""
    squared = ((x[..., :, None, :] - y[..., None, :, :]) ** 2).sum(-1) + smoothing
    positive = squared > 0
    distance = jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)
    return (wx[..., :, None] * wy[..., None, :] * distance).sum((-2, -1))


def _block(x, y, wx, wy, smoothing: float):
    """Value and gradients of sum_ij wx_i wy_j |x_i - y_j| on one tile."""
    squared = ((x[..., :, None, :] - y[..., None, :, :]) ** 2).sum(-1) + smoothing
    positive = squared > 0
    distance = jnp.sqrt(jnp.where(positive, squared, 1.0))
    weight = wx[..., :, None] * wy[..., None, :] * positive
    value = (weight * distance).sum((-2, -1))
    weight = weight / distance
    gx = weight.sum(-1)[..., None] * x - matmul(weight, y)
    gy = weight.sum(-2)[..., None] * y - matmul(jnp.swapaxes(weight, -1, -2), x)
    return value, gx, gy


def _tiles(n: int, m: int, tile: int, symmetric: bool) -> np.ndarray:
    """(n_tiles, 3): row and column of every tile, and how often it counts (twice above the diagonal)."""
    rows, columns = -(-n // tile), -(-m // tile)
    pairs = [(i, j, 1) for i in range(rows) for j in range(columns)]
    if symmetric:
        pairs = [(i, j, 1 + (i < j)) for i, j, _ in pairs if i <= j]
    return np.asarray(pairs, np.int32)


def _padded(array: jax.Array, axis: int, tile: int) -> jax.Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, -array.shape[axis] % tile)
    return jnp.pad(array, widths)


def _pass(x, y, wx, wy, smoothing: float, tile: int, symmetric: bool):
    """Value and gradients of the whole sum; with symmetric, y is x and the gradient in x is gx + gy."""
    n, m = x.shape[-2], y.shape[-2]
    if max(n, m) <= tile:
        return _block(x, y, wx, wy, smoothing)
    tile = min(tile, max(n, m))
    x, y, wx, wy = _padded(x, -2, tile), _padded(y, -2, tile), _padded(wx, -1, tile), _padded(wy, -1, tile)
    slice_of = partial(jax.lax.dynamic_slice_in_dim, slice_size=tile)

    @jax.checkpoint
    def step(carry, pair):
        value, gx, gy = carry
        i, j, count = pair[0] * tile, pair[1] * tile, pair[2].astype(x.dtype)
        part, part_x, part_y = _block(
            slice_of(x, i, axis=-2),
            slice_of(y, j, axis=-2),
            slice_of(wx, i, axis=-1),
            slice_of(wy, j, axis=-1),
            smoothing,
        )
        return (value + count * part, _add(gx, count * part_x, i), _add(gy, count * part_y, j)), None

    start = jnp.zeros(x.shape[:-2], x.dtype), jnp.zeros_like(x), jnp.zeros_like(y)
    (value, gx, gy), _ = jax.lax.scan(step, start, _tiles(n, m, tile, symmetric))
    return value, gx[..., :n, :], gy[..., :m, :]


def _add(total: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    old = jax.lax.dynamic_slice_in_dim(total, start, part.shape[-2], axis=-2)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, axis=-2)


@partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _between(x, y, wx, wy, smoothing: float, tile: int) -> jax.Array:
    """sum_ij wx_i wy_j |x_i - y_j|, differentiated in x and y."""
    return _pass(x, y, wx, wy, smoothing, tile, False)[0]


@_between.defjvp
def _between_jvp(smoothing, tile, primals, tangents):
    x, y, wx, wy = primals
    value, gx, gy = _pass(x, y, wx, wy, smoothing, tile, False)
    return value, (gx * tangents[0]).sum((-2, -1)) + (gy * tangents[1]).sum((-2, -1))


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _within(x, wx, smoothing: float, tile: int) -> jax.Array:
    """sum_ij wx_i wx_j |x_i - x_j|, differentiated in x; tiles above the diagonal only."""
    return _pass(x, x, wx, wx, smoothing, tile, True)[0]


@_within.defjvp
def _within_jvp(smoothing, tile, primals, tangents):
    x, wx = primals
    value, gx, gy = _pass(x, x, wx, wx, smoothing, tile, True)
    return value, ((gx + gy) * tangents[0]).sum((-2, -1))


# --- checks ------------------------------------------------------------------------------------------------------


def _weights(weight: jax.Array | None, cells: jax.Array, name: str) -> jax.Array:
    if weight is None:
        return jnp.ones(cells.shape[:-1], cells.dtype)
    if weight.shape != cells.shape[:-1]:
        raise ValueError(f"{name} has shape {weight.shape}; one weight per cell, {cells.shape[:-1]}, was wanted")
    return jax.lax.stop_gradient(weight).astype(cells.dtype)


def _check(x: jax.Array, y: jax.Array, ndim: int, estimator: str, power: int, smoothing: float) -> None:
    if x.ndim != ndim or y.ndim != ndim or x.shape[-1] != y.shape[-1] or x.shape[:-2] != y.shape[:-2]:
        wanted = "(n, n_latent) and (m, n_latent)" if ndim == 2 else "(n_conditions, n or m, n_latent)"
        raise ValueError(f"x and y have shapes {x.shape} and {y.shape}; {wanted} were wanted")
    if estimator not in ("v", "u"):
        raise ValueError(f"estimator is {estimator!r}; 'v' or 'u' was wanted")
    if power not in (1, 2):
        raise ValueError(f"power is {power!r}; 1 or 2 was wanted")
    if smoothing < 0:
        raise ValueError(f"smoothing is {smoothing}; a number >= 0 was wanted")
