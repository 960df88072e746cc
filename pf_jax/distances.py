"""Energy distances between sets of cells (docs/math.md 5).

Distances are consumed in tiles and never stored: one pass over the tiles gives the value and the closed-form
gradient. The rule is a `jax.custom_jvp` whose tangent is the product with that gradient, and the pass is made of
differentiable operations under `jax.checkpoint`, so that jvp, grad and Hessian-vector products (forward over reverse,
or reverse over reverse) work in the memory of a tile.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from pf_core.config import TILE
from pf_jax.layers import matmul

__all__ = ["energy_distance", "energy_distance_grouped", "sliced_energy_distance"]

Estimator = Literal["v", "u"]
_NEAR = 1e-3  # of |x|^2 + |y|^2 about the centre: below it |x - y|^2 is not taken from a product of matrices
_PAIRS = 64  # one pair in so many can be near without all of a tile being taken by differences,
_NUMBERS = 1 << 21  # if their differences are no more numbers than that
_CACHED = 1 << 18  # pairs of all groups; with more, a processor takes group by group, each of which stays in its cache
_FAR = 1e30  # its square root and its inverse fit into float32


def energy_distance(
    x: jax.Array,
    y: jax.Array,
    *,
    wx: jax.Array | None = None,
    wy: jax.Array | None = None,
    estimator: Estimator = "v",
    power: int = 1,
    smoothing: float = 0.0,
    method: Literal["tiled", "plain", "fused"] = "tiled",
    tile: int | None = None,
) -> jax.Array:
    """Energy distance 2 E|x - y| - E|x - x'| - E|y - y'| between two weighted sets of cells.

    Differentiated in x and y; weights are data. Coincident cells have distance 0 and gradient 0. All is 0 when
    the weights of a side are. Tiled, value and gradient need the memory of n + m cells and one tile of pairs; second
    derivatives exist, and in PyTorch they hold all pairs.

    Args:
        x: (n, n_latent).
        y: (m, n_latent).
        wx: (n,) weights >= 0, normalised here; None for equal weights.
        wy: (m,) the same for y.
        estimator: "v" (pairs of a cell with itself count; never negative) or "u" (they do not; unbiased). A side with
            one cell of positive weight has no pairs, and its term of "u" is 0.
        power: 1 for distances, 2 for squared distances (from moments, without pairs).
        smoothing: s >= 0 of sqrt(d^2 + s), in units of x squared, also between a cell and itself; power 2 cancels it.
        method: "tiled", "plain" for whole matrices of distances, or "fused" for one kernel on a CUDA device, which
            PyTorch alone has.
        tile: most rows and columns of a tile; None for what is fast, TILE.

    Returns:
        () distance, in units of x (squared for power 2).

    Raises:
        ValueError: shapes that do not fit, fewer than two cells a side for "u", an unknown option, or "fused" where it
            is not.
    """
    _check(x, y, 2, estimator, power, smoothing)
    if method == "fused":
        raise ValueError("method is 'fused', a kernel of the PyTorch twin; JAX has 'tiled' and 'plain'")
    if method not in ("tiled", "plain"):
        raise ValueError(f"method is {method!r}; 'tiled' or 'plain' was wanted")
    tile = TILE["jax"] if tile is None else tile
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

    Differentiated in x and y; weights are data. A group with a side whose weights are all 0 gives 0 with gradient 0.

    Args:
        x: (n_conditions, n, n_latent); padding must be finite.
        y: (n_conditions, m, n_latent); padding must be finite.
        wx: (n_conditions, n) weights >= 0, 0 for padding; normalised here.
        wy: (n_conditions, m) the same for y.
        estimator: "v" or "u", as in `energy_distance`.
        power: 1 for distances, 2 for squared distances.
        smoothing: s >= 0 of sqrt(d^2 + s), in units of x squared.

    Returns:
        (n_conditions,) distances, in units of x (squared for power 2).

    Raises:
        ValueError: shapes that do not fit, fewer than two cells a side for "u", or an unknown option.
    """
    _check(x, y, 3, estimator, power, smoothing)
    sides = x, y, _weights(wx, x, "wx"), _weights(wy, y, "wy")

    def together(x: jax.Array, y: jax.Array, wx: jax.Array, wy: jax.Array) -> jax.Array:
        return _energy(x, y, wx, wy, estimator, power, smoothing, TILE["jax"])

    def one_by_one(*sides: jax.Array) -> jax.Array:
        return jax.lax.map(lambda one: together(*one), sides)

    if x.shape[0] * (x.shape[1] + y.shape[1]) ** 2 <= _CACHED:
        return together(*sides)
    return jax.lax.platform_dependent(*sides, cpu=one_by_one, default=together)


def sliced_energy_distance(
    x: jax.Array, y: jax.Array, directions: jax.Array, *, estimator: Estimator = "v"
) -> jax.Array:
    """Energy distance by one-dimensional projections: |x| = c_d E_w |<w, x>| over unit vectors w.

    c_d = sqrt(pi) Gamma((d + 1) / 2) / Gamma(d / 2), d = n_latent. Along one direction the sum of |a_i - b_j| is linear
    between crossings, its slopes differences of ranks: differentiated in x and y exactly, coincident projections with
    slope 0 and the second derivative 0. Each direction costs O((n + m) log(n + m)).

    Args:
        x: (n, n_latent).
        y: (m, n_latent).
        directions: (n_directions, n_latent) unit rows, drawn by the caller.
        estimator: "v" or "u", as in `energy_distance`.

    Returns:
        () distance, mean over directions, in units of x.

    Raises:
        ValueError: shapes that do not fit, fewer than two cells a side for "u", or an unknown estimator.
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
    own_x, own_y = (wx * wx).sum(-1), (wy * wy).sum(-1)
    # The distance does not change under a shift, so the shift is a constant: it keeps float32 far from the origin.
    centre = jax.lax.stop_gradient((wx[..., None] * x).sum(-2, keepdims=True))
    if power == 2:
        return _squared_energy(x - centre, y - centre, wx, wy, own_x, own_y, estimator)
    if tile is None:
        return _plain_energy(x, y, wx, wy, own_x, own_y, estimator, smoothing)
    # Both sides in one set: E = sum_ij w_i w_j s_ij |z_i - z_j| with s = -1 within a side and cross between the sides,
    # so that what cancels does so term by term, before float32 rounds a sum.
    scale_x, scale_y = (_rest(own_x), _rest(own_y)) if estimator == "u" else (jnp.ones_like(own_x),) * 2
    weight = jnp.concatenate([wx / jnp.sqrt(scale_x)[..., None], wy / jnp.sqrt(scale_y)[..., None]], axis=-1)
    value = _signed_sum(x, y, weight, centre, jnp.sqrt(scale_x * scale_y), smoothing, tile)
    return value if estimator == "u" else value - math.sqrt(smoothing) * (own_x + own_y)


def _rest(own: jax.Array) -> jax.Array:
    """1 - sum w^2, the weight of the pairs of different cells; a single cell has none, and its term is 0, not 0/0."""
    return jnp.where(own < 1.0, 1.0 - own, 1.0)


def _squared_energy(x, y, wx, wy, own_x, own_y, estimator: Estimator) -> jax.Array:
    """Squared distances from moments: smoothing adds the same to every term and cancels."""
    mean_x, mean_y = (wx[..., None] * x).sum(-2), (wy[..., None] * y).sum(-2)
    value = 2.0 * ((mean_x - mean_y) ** 2).sum(-1)
    if estimator == "u":
        spread_x = (wx[..., None] * (x - mean_x[..., None, :]) ** 2).sum((-2, -1))
        spread_y = (wy[..., None] * (y - mean_y[..., None, :]) ** 2).sum((-2, -1))
        value = value - 2.0 * (spread_x * own_x / _rest(own_x) + spread_y * own_y / _rest(own_y))
    return value


def _plain_energy(x, y, wx, wy, own_x, own_y, estimator: Estimator, smoothing: float) -> jax.Array:
    """The formula as it stands, from whole matrices, differentiated by autodiff."""

    def mean(x, y, wx, wy):
        squared = ((x[..., :, None, :] - y[..., None, :, :]) ** 2).sum(-1) + smoothing
        positive = squared > 0
        distance = jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)
        return (wx[..., :, None] * wy[..., None, :] * distance).sum((-2, -1))

    within_x, within_y = mean(x, x, wx, wx), mean(y, y, wy, wy)
    if estimator == "u":
        diagonal = math.sqrt(smoothing)
        within_x = (within_x - diagonal * own_x) / _rest(own_x)
        within_y = (within_y - diagonal * own_y) / _rest(own_y)
    return 2.0 * mean(x, y, wx, wy) - within_x - within_y


# --- tiles -------------------------------------------------------------------------------------------------------


@partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def _signed_sum(x, y, weight, centre, cross, smoothing: float, tile: int):
    """sum_{i != j} w_i w_j s_ij |z_i - z_j| over the cells z of both sides, differentiated in x and y.

    Args:
        x: (..., n, n_latent).
        y: (..., m, n_latent).
        weight: (..., n + m) w >= 0, of x before y.
        centre: (..., 1, n_latent), about the middle of the cells.
        cross: (...) s of a pair across the sides; it is -1 within a side.
        smoothing: c of sqrt(d^2 + c).
        tile: rows of a tile.
    """
    return _pass(jnp.concatenate([x, y], axis=-2), weight, centre, cross, x.shape[-2], smoothing, tile)[0]


def _signed_sum_jvp(smoothing, tile, primals, tangents):
    x, y, weight, centre, cross = primals
    n, (x_dot, y_dot, *_) = x.shape[-2], tangents
    if isinstance(y_dot, SymbolicZero) and n + y.shape[-2] <= tile:  # y are data, as the targets of training are
        value, gradient = _one_sided(x, y, weight, centre, cross, smoothing)
    else:
        value, gradient = _pass(jnp.concatenate([x, y], axis=-2), weight, centre, cross, n, smoothing, tile)
    tangent = jnp.zeros_like(value)
    for part, dot in ((gradient[..., :n, :], x_dot), (gradient[..., n:, :], y_dot)):
        if not isinstance(dot, SymbolicZero):
            tangent = tangent + (part * dot).sum((-2, -1))
    return value, tangent


_signed_sum.defjvp(_signed_sum_jvp, symbolic_zeros=True)


def _one_sided(x, y, weight, centre, cross, smoothing: float):
    """Value of `_signed_sum` and its gradient in x, in one tile: pairs within y count in the value only.

    The value is a sum of distances here; Euler's theorem would need the gradient in y.
    """
    n, m = x.shape[-2], y.shape[-2]
    cells = jnp.concatenate([x, y], axis=-2)
    shifted = cells - centre
    all_cells = cells, _pulls(shifted, weight), _sizes(shifted, weight)
    cut = lambda start, size: tuple(
        _slice(array, start, size, axis) for array, axis in zip(all_cells, (-2, -1, -1), strict=True)
    )
    own, across = jnp.arange(n + m) < n, cross[..., None, None]
    sums, _, _, of_x = _block(
        cut(0, n),
        all_cells,
        centre,
        lambda: jnp.where(own, -1.0, across),
        lambda: jnp.eye(n, n + m, dtype=bool),
        smoothing,
        lambda: jnp.where(own, -1.0, 2.0 * across),  # a pair across stands for two
    )
    minus = lambda: jnp.full_like(across, -1.0)
    *_, of_y = _block(cut(n, m), cut(n, m), centre, minus, lambda: jnp.eye(m, dtype=bool), smoothing, minus)
    value = (weight[..., :n] * of_x).sum(-1) + (weight[..., n:] * of_y).sum(-1)
    return value, 2.0 * weight[..., :n, None] * (sums[..., -1:] * shifted[..., :n, :] - sums[..., :-1])


def _pass(cells, weight, centre, cross, n_first: int, smoothing: float, tile: int):
    """Value and gradient of `_signed_sum`, in one pass over the tiles on and above the diagonal.

    With p_ij = s_ij / |z_i - z_j| and z about the centre, half the gradient in z_i is w_i sum_j p_ij w_j (z_i - z_j):
    two products of matrices with p. The value needs no sum over pairs of its own: it is linear in the scale of the
    cells, so that by Euler's theorem it is sum_i z_i . gradient_i.
    """
    n = cells.shape[-2]
    n_tiles = -(-n // tile)
    tile = min(tile, n, 16 * -(-n // (16 * n_tiles)))  # equal tiles, little padding, rows of whole cache lines
    first = jnp.arange(n_tiles * tile) < n_first
    cells, weight = _padded(cells, -2, tile), _padded(weight, -1, tile)
    shifted = cells - centre
    sizes, pulls = _sizes(shifted, weight), _pulls(shifted, weight)

    def block(row, column):
        i, j = row * tile, column * tile
        same = lambda: _slice(first, i, tile, 0)[:, None] == _slice(first, j, tile, 0)
        x, y = (
            (_slice(cells, at, tile, -2), _slice(pulls, at, tile, -1), _slice(sizes, at, tile, -1)) for at in (i, j)
        )
        return _block(
            x,
            y,
            centre,
            lambda: jnp.where(same(), -1.0, cross[..., None, None]),
            lambda: (row == column) & jnp.eye(tile, dtype=bool),  # a cell with itself
            smoothing,
        )

    @jax.checkpoint
    def step(totals, pair):
        sums, across, near = totals
        row, column = pair
        count = jnp.where(row == column, 1.0, 2.0).astype(cells.dtype)  # a tile above the diagonal stands for two
        here, there, part, _ = block(row, column)
        sums = _add(sums, count * here, row * tile, -2)
        return (sums, _add(across, count * there, column * tile, -1), near + count * part), None

    if n_tiles == 1:
        sums, _, near, _ = block(0, 0)
        sums = 2.0 * sums
    else:
        rows, columns = np.triu_indices(n_tiles)
        start = jnp.zeros_like(jnp.swapaxes(pulls, -1, -2)), jnp.zeros_like(pulls), jnp.zeros_like(weight[..., 0])
        pairs = rows.astype(np.int32), columns.astype(np.int32)
        (sums, across, near), _ = jax.lax.scan(step, start, pairs)
        sums = sums + jnp.swapaxes(across, -1, -2)
    gradient = weight[..., None] * (sums[..., -1:] * shifted - sums[..., :-1])
    value = (gradient * shifted).sum((-2, -1))
    if smoothing:  # the smoothed distance is p (d^2 + c): Euler's sum has the part with d^2
        value = value + smoothing * (0.5 * (weight * sums[..., -1]).sum(-1) + near)
    return value, gradient[..., :n, :]


def _block(first, second, centre, sign, skip, smoothing: float, count=None):
    """On one tile: the sums s = sum_j p_ij wy_j [y_j, 1] of every x, the same of every y, and what these leave out.

    The pull on x is then wx (s_last x - s_others). A product of matrices gives squared distances fast, but loses pairs
    that are close compared with their distance from the centre. These (coincident cells above all) are taken by
    differences: where they are few they alone, else the whole tile. Of such a pair p wy (x - y) is taken off s_others,
    nothing is added to s_last, and wx wy p is returned in a sum of its own.

    Args:
        first: cells x (..., n, n_latent), their w [z, 1] as (..., n_latent + 1, n), and their squared distances from
            the centre (..., n).
        second: the same of y.
        centre: (..., 1, n_latent).
        sign, skip: functions that make arrays of pairs: s_ij, and which pairs do not count.
        smoothing: c of sqrt(d^2 + c).
        count: a function that makes an array of pairs f_ij; then there is a fourth result, sum_j f_ij wy_j |x_i - y_j|
            of every x. The compiler leaves out the results that are not used.
    """
    (x, pull_x, size_x), (y, pull_y, size_y) = first, second
    wx, wy = pull_x[..., -1, :], pull_y[..., -1, :]
    # The one array of pairs that is kept; what else is needed of pairs is made where it is used, in the same pass.
    products = matmul(x - centre, jnp.swapaxes(y - centre, -1, -2))
    few = max(1, min(products.size // _PAIRS, _NUMBERS // x.shape[-1]))

    def squares():
        """Squared distances, and which pairs are near."""
        scale = size_x[..., :, None] + size_y[..., None, :]
        squared = scale - 2.0 * products
        return squared, (squared <= _NEAR * scale) & ~skip()

    def inverses(squared, skipped):
        """p, 0 for the pairs that are skipped."""
        return jnp.where(skipped, 0.0, sign() / jnp.sqrt(jnp.where(skipped, 1.0, squared + smoothing)))

    def sums(p):
        # Written so that p is read as it lies: transposing a tile costs more than the product.
        return matmul(p, jnp.swapaxes(pull_y, -1, -2)), matmul(pull_x, p)

    def lengths(squared, skipped):
        if count is None:
            return jnp.zeros_like(wx)
        distance = jnp.where(skipped, 0.0, jnp.sqrt(jnp.where(skipped, 1.0, squared + smoothing)))
        return (count() * wy[..., None, :] * distance).sum(-1)

    def by_product():
        squared = squares()[0]
        return *sums(inverses(squared, skip())), jnp.zeros_like(wx[..., 0]), lengths(squared, skip())

    def by_pairs():
        squared, near = squares()
        # The flat places of the near pairs; where there are fewer, one beyond the end, which is read as the last.
        at = jnp.searchsorted(jnp.cumsum(near.ravel(), dtype=jnp.int32), jnp.arange(1, few + 1))
        group, i, j = jnp.unravel_index(at, (math.prod(near.shape[:-2]), *near.shape[-2:]))
        difference = _rows(x)[group * near.shape[-2] + i] - _rows(y)[group * near.shape[-1] + j]
        exact = (difference * difference).sum(-1) + smoothing
        skipped = (at >= near.size) | (exact <= 0)
        signs = jnp.broadcast_to(sign(), near.shape).ravel()[at]
        p = jnp.where(skipped, 0.0, signs / jnp.sqrt(jnp.where(skipped, 1.0, exact)))
        of_x, of_y = _groups(wx)[group, i] * p, _groups(wy)[group, j] * p
        here, there = sums(inverses(squared, skip() | near))
        none = jnp.zeros_like(p)[:, None]
        force = jnp.concatenate([difference, none], axis=-1)
        near_x = jnp.zeros_like(here).reshape(-1, *here.shape[-2:]).at[group, i].add(-of_y[:, None] * force)
        near_y = jnp.zeros_like(there).reshape(-1, *there.shape[-2:]).at[group, :, j].add(of_x[:, None] * force)
        part = jnp.zeros_like(wx[..., 0]).ravel().at[group].add(of_x * _groups(wy)[group, j])
        length = lengths(squared, skip() | near)
        if count is not None:
            factor = jnp.broadcast_to(count(), near.shape).ravel()[at] * _groups(wy)[group, j]
            distance = jnp.where(skipped, 0.0, jnp.sqrt(jnp.where(skipped, 1.0, exact)))
            length = _groups(length).at[group, i].add(factor * distance).reshape(length.shape)
        here, there = here + near_x.reshape(here.shape), there + near_y.reshape(there.shape)
        return here, there, part.reshape(wx.shape[:-1]), length

    def by_difference():
        exact = ((x[..., :, None, :] - y[..., None, :, :]) ** 2).sum(-1)
        skipped = skip() | (exact + smoothing <= 0)
        p = inverses(exact, skipped)

        def row(there, one):
            x, w, p = one
            difference = x[..., None, :] - y
            there = there + (w[..., None] * p)[..., None] * difference
            return there, -((wy * p)[..., None] * difference).sum(-2)

        rows = jnp.moveaxis(x, -2, 0), jnp.moveaxis(wx, -1, 0), jnp.moveaxis(p, -2, 0)
        there, here = jax.lax.scan(row, jnp.zeros_like(y), rows)
        widen = lambda sums: jnp.pad(sums, [(0, 0)] * (sums.ndim - 1) + [(0, 1)])
        part = (wx * (p * wy[..., None, :]).sum(-1)).sum(-1)
        here, there = widen(jnp.moveaxis(here, 0, -2)), jnp.swapaxes(widen(there), -1, -2)
        return here, there, part, lengths(exact, skipped)

    def by_differences():
        return jax.lax.cond(squares()[1].sum(dtype=jnp.int32) <= few, by_pairs, by_difference)

    # Column by column first, as one loop over rows that threads share; XLA would make one sum of both, on one thread.
    return jax.lax.cond(jax.lax.optimization_barrier(squares()[1].any(-2)).any(), by_differences, by_product)


def _rows(cells):
    """All cells of all groups as rows."""
    return cells.reshape(-1, cells.shape[-1])


def _groups(weight):
    """Weights of all groups, (n_groups, n)."""
    return weight.reshape(-1, weight.shape[-1])


def _sizes(cells, weight):
    """Squared distance from the centre; cells without weight are put far away, where they are near to nothing."""
    return jnp.where(weight > 0, (cells * cells).sum(-1), _FAR)


def _pulls(shifted, weight):
    """w [z, 1] of every cell, with cells along the last axis: the way in which both products read it."""
    return jnp.swapaxes(
        weight[..., None] * jnp.concatenate([shifted, jnp.ones_like(shifted[..., :1])], axis=-1), -1, -2
    )


def _padded(array: jax.Array, axis: int, tile: int) -> jax.Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, -array.shape[axis] % tile)
    return jnp.pad(array, widths)


def _slice(array: jax.Array, start, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)


def _add(total: jax.Array, part: jax.Array, start, axis: int) -> jax.Array:
    old = _slice(total, start, part.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, axis=axis)


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
