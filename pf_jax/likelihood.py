"""The negative-binomial likelihood and the ELBO (docs/math.md 1).

The likelihood is evaluated in two branches, neither of which forms a large number to subtract another from it.
With q = mu / (r + mu), s2 = (x - mu) / (r + mu), s1 = r (mu - x) / (x (r + mu)), h(s) = s - log1p(s) >= 0 and the
Stirling error S(z) = lgamma(z + 1) - (z + 1/2) log z + z - log(2 pi) / 2:

    small counts:  log prod_{j<x} (r + j) q / (j + 1)  +  r log(r / (r + mu))
    others:        -x h(s1) - r h(s2) + S(x + r) - S(x) - S(r) - log(x (x + r)) / 2 + log(r) / 2 - log(2 pi) / 2

The second is the saddle-point form (Loader 2000, "Fast and accurate computation of binomial probabilities"): the
terms x log x that a difference of log-gammas would cancel are gone, and what is left has the size of log p.
The derivatives use the same h: r dlogp/dr = -r h(s2) + x / (2 (x + r)) + r (S'(x + r) - S'(r)).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pf_core.config import LOGVAR_MAX, LOGVAR_MIN, R_MAX, R_MIN
from pf_jax.layers import matmul

__all__ = [
    "digamma_difference",
    "elbo_loss",
    "gaussian_kl",
    "inverse_dispersion",
    "lgamma_difference",
    "nb_log_prob",
    "nb_log_prob_elements",
    "nb_log_prob_sum",
    "reparameterize",
    "strict_clip",
]

# B_{2k} / (2k (2k - 1)), k = 1..8: S(z) = sum_k c_k / z^(2k - 1).
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156, -3617 / 122400)
_ROWS = 64  # cells whose likelihood is computed together on a processor
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
# 1 / (2k + 3): h(s) = s t - 2 t^3 sum_k t^(2k) / (2k + 3) with t = s / (2 + s); nine terms serve float64 at |s| < 1/4.
_ATANH = tuple(1.0 / (2 * k + 3) for k in range(9))


@jax.custom_jvp
def strict_clip(x: jax.Array, low: float, high: float) -> jax.Array:
    """x within [low, high].

    The gradient in x is 1 strictly inside and 0 outside and at the bounds, to any order. The bounds carry no gradient.

    Args:
        x: (...) values; NaN stays NaN.
        low: lower bound.
        high: upper bound.

    Returns:
        (...) same dtype as x.
    """
    # twin: jnp.clip splits the gradient of a tie in halves.
    return jnp.clip(x, low, high)


@strict_clip.defjvp
def _strict_clip_jvp(primals, tangents):
    x, low, high = primals
    inside = (x > low) & (x < high)
    return strict_clip(x, low, high), jnp.where(inside, tangents[0], jnp.zeros_like(tangents[0]))


# --- special functions -------------------------------------------------------------------------------------------


def _few(dtype) -> int:
    """From which argument on the Stirling series serves the dtype; counts below it take the product."""
    return 10 if jnp.finfo(dtype).bits > 32 else 3


def _polynomial(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
    total = jnp.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + coefficient
    return total


def _sum_below(x: jax.Array, r: jax.Array, term: Callable[[int], jax.Array]) -> jax.Array:
    """sum_{j < x} term(j) for x below `_few`."""
    total = jnp.zeros(jnp.broadcast_shapes(x.shape, r.shape), r.dtype)
    for j in range(_few(r.dtype) - 1):
        total = total + jnp.where(j < x, term(j), 0.0)
    return total


def _series(z: jax.Array) -> jax.Array:
    """S(z) by its asymptotic series, for z >= `_few`."""
    w = 1.0 / z
    return w * _polynomial(_STIRLING, w * w)


def _series_1(z: jax.Array) -> jax.Array:
    """S'(z)."""
    w = 1.0 / z
    return w * w * _polynomial(tuple(-(2 * k + 1) * c for k, c in enumerate(_STIRLING)), w * w)


def _series_2(z: jax.Array) -> jax.Array:
    """S''(z)."""
    w = 1.0 / z
    return w * w * w * _polynomial(tuple((2 * k + 1) * (2 * k + 2) * c for k, c in enumerate(_STIRLING)), w * w)


@jax.custom_jvp
def _stirling_error(r: jax.Array) -> jax.Array:
    """S(r) for any r > 0.

    Below n = `_few` by S(r) = S(r + n) - n + (r + 1/2) log((r + n) / r) - log prod_{0 < j < n} (r + j) / (r + n).
    """
    n = _few(r.dtype)
    low = jnp.minimum(r, n)  # beyond n the shifted form would cancel, and it is not used
    y = low + n
    product = jnp.ones_like(r)
    for j in range(1, n):
        product = product * ((low + j) / y)
    shifted = _series(y) - n + (low + 0.5) * jnp.log(y / low) - jnp.log(product)
    return jnp.where(r < n, shifted, _series(jnp.maximum(r, n)))


@jax.custom_jvp
def _stirling_error_1(r: jax.Array) -> jax.Array:
    """S'(r) = psi(r) - log r + 1 / (2 r) for any r > 0."""
    n = _few(r.dtype)
    low = jnp.minimum(r, n)
    y = low + n
    shifted = _series_1(y) + jnp.log(y / low) - 0.5 / y - 0.5 / low
    for j in range(1, n):
        shifted = shifted - 1.0 / (low + j)
    return jnp.where(r < n, shifted, _series_1(jnp.maximum(r, n)))


def _stirling_error_2(r: jax.Array) -> jax.Array:
    """S''(r) = psi'(r) - 1 / r - 1 / (2 r^2) for any r > 0."""
    n = _few(r.dtype)
    low = jnp.minimum(r, n)
    y = low + n
    shifted = _series_2(y) + 1.0 / y - 1.0 / low + 0.5 / (y * y) + 0.5 / (low * low)
    for j in range(1, n):
        shifted = shifted + 1.0 / ((low + j) * (low + j))
    return jnp.where(r < n, shifted, _series_2(jnp.maximum(r, n)))


@_stirling_error.defjvp
def _stirling_error_jvp(primals, tangents):
    (r,), (dr,) = primals, tangents
    return _stirling_error(r), _stirling_error_1(r) * dr


@_stirling_error_1.defjvp
def _stirling_error_1_jvp(primals, tangents):
    (r,), (dr,) = primals, tangents
    return _stirling_error_1(r), _stirling_error_2(r) * dr


def _deviance(s: jax.Array, ratio: jax.Array) -> tuple[jax.Array, jax.Array]:
    """h(s) = s - log1p(s) and log1p(s), where ratio = 1 + s was computed without cancellation."""
    near = jnp.abs(s) < 0.25
    t = jnp.where(near, s, 0.0)
    t = t / (2.0 + t)
    small = s * t - 2.0 * t * t * t * _polynomial(_ATANH, t * t)
    logarithm = jnp.log(jnp.where(near, 1.0, ratio))
    return jnp.where(near, small, s - logarithm), jnp.where(near, s - small, logarithm)


# --- differences of log-gammas -----------------------------------------------------------------------------------


def _operands(x: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
    """Floating operands of one dtype; the counts without gradient."""
    floats = [jnp.asarray(other) for other in others]
    dtype = jnp.result_type(*floats, jnp.float32)
    return jax.lax.stop_gradient(jnp.asarray(x).astype(dtype)), *(value.astype(dtype) for value in floats)


def lgamma_difference(x: jax.Array, r: jax.Array) -> jax.Array:
    """lgamma(x + r) - lgamma(r), without the cancellation of the two; exactly 0 where x is 0.

    Differentiated in r, with derivative `digamma_difference`; x is data and carries no gradient.

    Args:
        x: counts, integer-valued, >= 0; broadcasts with r.
        r: inverse dispersion, > 0, float32 or float64.

    Returns:
        Elementwise difference, dtype of r.
    """
    return _lgamma_difference(*_operands(x, r))


def digamma_difference(x: jax.Array, r: jax.Array) -> jax.Array:
    """digamma(x + r) - digamma(r), without the cancellation of the two; exactly 0 where x is 0.

    Differentiated in r, with derivative the difference of trigammas; x is data and carries no gradient.

    Args:
        x: counts, integer-valued, >= 0; broadcasts with r.
        r: inverse dispersion, > 0, float32 or float64.

    Returns:
        Elementwise difference, dtype of r.
    """
    return _digamma_difference(*_operands(x, r))


@jax.custom_jvp
def _lgamma_difference(x: jax.Array, r: jax.Array) -> jax.Array:
    few = x < _few(r.dtype)
    product = jnp.ones(jnp.broadcast_shapes(x.shape, r.shape), r.dtype)
    for j in range(_few(r.dtype) - 1):
        product = product * jnp.where(j < x, r + j, 1.0)
    big = jnp.where(few, _few(r.dtype), x)
    stirling = big * (jnp.log(big + r) - 1.0) + (r - 0.5) * jnp.log1p(big / r) + _series(big + r) - _stirling_error(r)
    return jnp.where(few, jnp.log(product), stirling)


@jax.custom_jvp
def _digamma_difference(x: jax.Array, r: jax.Array) -> jax.Array:
    few = x < _few(r.dtype)
    big = jnp.where(few, _few(r.dtype), x)
    end = big + r
    stirling = jnp.log1p(big / r) + 0.5 * big / (r * end) + _series_1(end) - _stirling_error_1(r)
    return jnp.where(few, _sum_below(x, r, lambda j: 1.0 / (r + j)), stirling)


def _trigamma_difference(x: jax.Array, r: jax.Array) -> jax.Array:
    few = x < _few(r.dtype)
    big = jnp.where(few, _few(r.dtype), x)
    end = big + r
    stirling = -big / (r * end) - 0.5 * big * (end + r) / (r * r * end * end) + _series_2(end) - _stirling_error_2(r)
    return jnp.where(few, _sum_below(x, r, lambda j: -1.0 / ((r + j) * (r + j))), stirling)


@_lgamma_difference.defjvp
def _lgamma_difference_jvp(primals, tangents):
    return _lgamma_difference(*primals), _digamma_difference(*primals) * tangents[1]


@_digamma_difference.defjvp
def _digamma_difference_jvp(primals, tangents):
    return _digamma_difference(*primals), _trigamma_difference(*primals) * tangents[1]


# --- the negative binomial ---------------------------------------------------------------------------------------


def nb_log_prob(x: jax.Array, mu: jax.Array, r: jax.Array, *, method: str = "stable") -> jax.Array:
    """Negative-binomial log probability of every cell, summed over genes.

    Differentiated in mu and r; x is data and carries no gradient. See `nb_log_prob_elements`.

    Args:
        x: (n_cells, n_genes) counts, integer-valued, >= 0.
        mu: (n_cells, n_genes) mean, > 0.
        r: (n_genes,) or (n_cells, n_genes) inverse dispersion, > 0; the variance is mu + mu^2 / r.
        method: "stable", or "plain" for the textbook form with log-gammas.

    Returns:
        (n_cells,) nats per cell.

    Raises:
        ValueError: an unknown method, or shapes that do not fit.
    """
    if method != "stable" or jnp.ndim(x) != 2 or x.shape[0] <= _ROWS:
        return nb_log_prob_elements(x, mu, r, method=method).sum(-1)
    x, mu, r = _checked(x, mu, r)
    return jax.lax.platform_dependent(x, mu, r, cpu=_by_rows, default=lambda x, mu, r: _log_prob(x, mu, r).sum(-1))


def _by_rows(x: jax.Array, mu: jax.Array, r: jax.Array) -> jax.Array:
    """The sum over genes, some cells at a time: what is computed on the way stays in the cache of a processor."""

    @jax.checkpoint
    def one(cell: tuple[jax.Array, ...]) -> jax.Array:
        return _log_prob(cell[0], cell[1], cell[2] if r.ndim == 2 else r).sum(-1)

    return jax.lax.map(one, (x, mu, r) if r.ndim == 2 else (x, mu), batch_size=_ROWS)


def nb_log_prob_elements(x: jax.Array, mu: jax.Array, r: jax.Array, *, method: str = "stable") -> jax.Array:
    """Negative-binomial log probability of every cell and gene.

    Differentiated in mu and r, twice, by closed forms; x is data and carries no gradient. In float32 the error of the
    value is below 1e-6 (1 + x + mu + |log p|), and that of the derivative in log r below 1e-6 (1 + x + mu), for r in
    [1e-4, 1e4], mu in [1e-8, 1e5] and x in [0, 1e6].

    Args:
        x: (n_cells, n_genes) counts, integer-valued, >= 0.
        mu: (n_cells, n_genes) mean, > 0.
        r: (n_genes,) or (n_cells, n_genes) inverse dispersion, > 0; the variance is mu + mu^2 / r.
        method: "stable", or "plain" for the textbook form with log-gammas, which float32 loses at large r.

    Returns:
        (n_cells, n_genes) nats.

    Raises:
        ValueError: an unknown method, or shapes that do not fit.
    """
    if method not in ("stable", "plain"):
        raise ValueError(f"method is {method!r}; 'stable' or 'plain' was wanted")
    x, mu, r = _checked(x, mu, r)
    if method == "stable":
        return _log_prob(x, mu, r)
    lgamma = jax.lax.lgamma
    total = jnp.log(r + mu)
    return lgamma(x + r) - lgamma(r) - lgamma(x + 1.0) + r * (jnp.log(r) - total) + x * (jnp.log(mu) - total)


def _checked(x: jax.Array, mu: jax.Array, r: jax.Array) -> tuple[jax.Array, ...]:
    shapes = jnp.shape(x), jnp.shape(mu), jnp.shape(r)
    if shapes[0] != shapes[1] or shapes[2] not in (shapes[0], shapes[0][-1:], ()):
        raise ValueError(
            f"x, mu and r have shapes {shapes}; (n_cells, n_genes) twice and (n_genes,) or (n_cells, n_genes) "
            "were wanted; align the genes first"
        )
    return _operands(x, mu, r)


def _dispersion_deviance(x: jax.Array, mu: jax.Array, r: jax.Array) -> tuple[jax.Array, jax.Array]:
    """h(s2) and log1p(s2), with the count taken as 0 where it is small."""
    big = jnp.where(x < _few(r.dtype), 0.0, x)
    total = r + mu
    return _deviance((big - mu) / total, (big + r) / total)


@jax.custom_jvp
def _log_prob(x: jax.Array, mu: jax.Array, r: jax.Array) -> jax.Array:
    few = x < _few(r.dtype)
    big = jnp.where(few, float(_few(r.dtype)), x)
    total = r + mu
    mean_share, r_share = mu / total, r / total
    deviance_r, log_r_share = _dispersion_deviance(x, mu, r)
    deviance_x, _ = _deviance(r_share * (mu - big) / big, (big + r) / big * mean_share)
    product = jnp.ones_like(mu)
    for j in range(_few(r.dtype) - 1):
        product = product * jnp.where(j < x, (r + j) * mean_share * (1.0 / (j + 1)), 1.0)
    logarithm = jnp.log(jnp.where(few, product, big * (big + r)))
    constant = 0.5 * jnp.log(r) - _stirling_error(r) - _HALF_LOG_2PI
    stirling = _series(big + r) - _series(big) + constant
    return jnp.where(few, logarithm + r * log_r_share, stirling - 0.5 * logarithm - big * deviance_x - r * deviance_r)


@jax.custom_jvp
def _log_prob_mu(x: jax.Array, mu: jax.Array, r: jax.Array) -> jax.Array:
    """d log p / d mu."""
    return (x - mu) / mu * (r / (r + mu))


@_log_prob_mu.defjvp
def _log_prob_mu_jvp(primals, tangents):
    # The product rule would take 1/mu from 1/mu where x = 0, and 1/r from 1/r where r is large.
    x, mu, r = primals
    _, dmu, dr = tangents
    total = r + mu
    d_mu = (x + r) / (total * total) - x / (mu * mu)
    return _log_prob_mu(*primals), d_mu * dmu + (x - mu) / (total * total) * dr


@jax.custom_jvp
def _log_prob_r(x: jax.Array, mu: jax.Array, r: jax.Array) -> jax.Array:
    """d log p / d r."""
    few = x < _few(r.dtype)
    big = jnp.where(few, float(_few(r.dtype)), x)
    deviance_r, _ = _dispersion_deviance(x, mu, r)
    small = _sum_below(x, r, lambda j: (mu - j) / (r + j)) / (r + mu)
    end = big + r
    return jnp.where(few, small, 0.5 * big / (r * end) + _series_1(end) - _stirling_error_1(r)) - deviance_r


def _log_prob_r_r(x: jax.Array, mu: jax.Array, r: jax.Array) -> jax.Array:
    """d^2 log p / d r^2."""
    few = x < _few(r.dtype)
    big = jnp.where(few, float(_few(r.dtype)), x)
    total = r + mu
    end = big + r
    small = mu * mu / (r * total * total) + _sum_below(
        x, r, lambda j: (j - mu) * (r + j + total) / (total * total * (r + j) * (r + j))
    )
    stirling = (
        (mu - big) * (mu - big) / (total * total * end)
        - 0.5 * big * (end + r) / (r * r * end * end)
        + _series_2(end)
        - _stirling_error_2(r)
    )
    return jnp.where(few, small, stirling)


@_log_prob.defjvp
def _log_prob_jvp(primals, tangents):
    _, dmu, dr = tangents
    return _log_prob(*primals), _log_prob_mu(*primals) * dmu + _log_prob_r(*primals) * dr


@_log_prob_r.defjvp
def _log_prob_r_jvp(primals, tangents):
    x, mu, r = primals
    _, dmu, dr = tangents
    total = r + mu
    return _log_prob_r(*primals), (x - mu) / (total * total) * dmu + _log_prob_r_r(*primals) * dr


# --- sums over cells, by the count table ---------------------------------------------------------------------------


def nb_log_prob_sum(
    x: jax.Array,
    mu: jax.Array,
    r: jax.Array,
    *,
    weight: jax.Array | None = None,
    method: str = "stable",
    table: jax.Array | None = None,
    tail: jax.Array | None = None,
) -> jax.Array:
    """Weighted sum over cells of the negative-binomial log probability.

    Differentiated in mu and r, twice; x, weight and table are data and carry no gradient. With one r per gene, "table"
    needs no log-gamma: sum_c w_c [lgamma(x + r) - lgamma(r)] is a sum over the table's rows, and one dense pass gives
    the rest. Counts beyond the table are taken one by one, so that nothing is dropped.

    Args:
        x: (n_cells, n_genes) counts, integer-valued, >= 0.
        mu: (n_cells, n_genes) mean, > 0.
        r: (n_genes,) inverse dispersion, > 0; (n_cells, n_genes) too, but for "table".
        weight: (n_cells,) >= 0; None for 1.
        method: "table", or one of `nb_log_prob_elements`.
        table: (n_rows, n_genes) weight of the cells with more than j and at most n_rows counts of a gene, made of these
            x and weight by pf_core.count_table; for "table" only.
        tail: (n_tail,) cell * n_genes + gene of every larger count, then -1; for "table" only.

    Returns:
        () nats.

    Raises:
        ValueError: an unknown method, shapes that do not fit, or "table" without table and tail.
    """
    if weight is None:
        weight = jnp.ones(jnp.shape(x)[0], mu.dtype)
    if method != "table":
        return (weight * nb_log_prob(x, mu, r, method=method)).sum()
    if table is None or tail is None:
        raise ValueError("method 'table' needs table and tail; make them of x and weight by pf_core.count_table")
    x, mu, r = _checked(x, mu, r)
    if r.ndim != 1 or table.ndim != 2 or table.shape[1:] != r.shape:
        shapes = f"r and table have shapes {r.shape} and {table.shape}"
        raise ValueError(f"{shapes}; (n_genes,) and (n_rows, n_genes) were wanted")
    weight, table = jax.lax.stop_gradient((weight.astype(mu.dtype), table.astype(mu.dtype)))
    return _table_sum(x, mu, r, weight, table, tail)


def _rows_of(table: jax.Array) -> jax.Array:
    return jnp.arange(table.shape[0], dtype=table.dtype)[:, None]


def _over_table(values: jax.Array, x: jax.Array, weight: jax.Array, table: jax.Array) -> jax.Array:
    """Weighted sum (n_genes,) over cells of the entries that the table holds."""
    # A product with the weights: XLA writes the arrays that a reduction reads on processors, and this one is fewer.
    return matmul(weight, jnp.where(x <= table.shape[0], values, 0.0))


def _of_tail(x, mu, r, weight, tail) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
    """Weights, (x, mu, r) and genes of the tail."""
    present = tail >= 0
    place = jnp.where(present, tail, 0)
    cell, gene = place // x.shape[1], place % x.shape[1]
    return jnp.where(present, weight[cell], 0.0), (x[cell, gene], mu[cell, gene], r[gene]), gene


@jax.custom_jvp
def _table_sum(x, mu, r, weight, table, tail) -> jax.Array:
    """log p = sum_{j<x} log((r + j) / ((r + 1) (j + 1))) + x log(mu (r + 1) / (r + mu)) - r log1p(mu / r), summed.

    Neither logarithm grows with r or 1 / r, which cancel between the sum and the rest without the factor r + 1. The
    second is taken from the derivative in r: -r log1p(mu / r) = r _mean_part - r (mu - x) / (r + mu).
    """
    j = _rows_of(table)
    few = (table * jnp.log((r + j) / ((r + 1.0) * (j + 1.0)))).sum(0)
    total = r + mu
    dense = _over_table(x * jnp.log(mu * ((r + 1.0) / total)) - (mu - x) * (r / total), x, weight, table)
    dense = dense + r * _over_table(_mean_part(x, mu, r), x, weight, table)
    weights, entries, _ = _of_tail(x, mu, r, weight, tail)
    return (few + dense).sum() + (weights * _log_prob(*entries)).sum()


@_table_sum.defjvp
def _table_sum_jvp(primals, tangents):
    x, mu, r, weight, table, tail = primals
    by_mu = weight[:, None] * _log_prob_mu(x, mu, r)
    by_r = _table_sum_r(x, mu, r, weight, table, tail)
    return _table_sum(*primals), (by_mu * tangents[1]).sum() + (by_r * tangents[2]).sum()


def _table_sum_r(x, mu, r, weight, table, tail) -> jax.Array:
    """(n_genes,) derivative in r."""
    few = (table / (r + _rows_of(table))).sum(0)
    dense = _over_table(_mean_part(x, mu, r), x, weight, table)
    weights, entries, gene = _of_tail(x, mu, r, weight, tail)
    return (few + dense).at[gene].add(weights * _log_prob_r(*entries))


@jax.custom_jvp
def _mean_part(x: jax.Array, mu: jax.Array, r: jax.Array) -> jax.Array:
    """(mu - x) / (r + mu) - log1p(mu / r)."""
    return (mu - x) / (r + mu) - jnp.log1p(mu / r)


@_mean_part.defjvp
def _mean_part_jvp(primals, tangents):
    x, mu, r = primals
    total = r + mu
    mixed = (x - mu) / (total * total)
    return _mean_part(*primals), mixed * tangents[1] + (mu / (r * total) + mixed) * tangents[2]


def inverse_dispersion(log_r: jax.Array) -> jax.Array:
    """r = exp(clip(log_r, ln R_MIN, ln R_MAX)).

    Differentiated in log_r: r strictly inside the bounds, 0 outside and at them.

    Args:
        log_r: (...) unbounded.

    Returns:
        (...) inverse dispersion within [R_MIN, R_MAX].
    """
    return jnp.exp(strict_clip(log_r, math.log(R_MIN), math.log(R_MAX)))


# --- the ELBO ----------------------------------------------------------------------------------------------------


def gaussian_kl(mu: jax.Array, logvar: jax.Array) -> jax.Array:
    """KL divergence from N(mu, exp(logvar)) to N(0, 1), summed over latents.

    Differentiated in both. logvar is clipped to [LOGVAR_MIN, LOGVAR_MAX], which passes no gradient outside and at its
    bounds.

    Args:
        mu: (n_cells, n_latent) posterior mean.
        logvar: (n_cells, n_latent) posterior log variance, unclipped.

    Returns:
        (n_cells,) nats per cell.
    """
    logvar = strict_clip(logvar, LOGVAR_MIN, LOGVAR_MAX)
    return 0.5 * (mu * mu + (jnp.expm1(logvar) - logvar)).sum(-1)


def reparameterize(mu: jax.Array, logvar: jax.Array, eps: jax.Array) -> jax.Array:
    """A sample z = mu + exp(logvar / 2) eps of the posterior, logvar clipped as in `gaussian_kl`.

    Differentiated in mu, logvar and eps.

    Args:
        mu: (n_cells, n_latent) posterior mean.
        logvar: (n_cells, n_latent) posterior log variance, unclipped.
        eps: (n_cells, n_latent) standard normal draws of the caller.

    Returns:
        (n_cells, n_latent) latents.
    """
    return mu + jnp.exp(0.5 * strict_clip(logvar, LOGVAR_MIN, LOGVAR_MAX)) * eps


def elbo_loss(
    x: jax.Array,
    mu: jax.Array,
    r: jax.Array,
    z_mu: jax.Array,
    z_logvar: jax.Array,
    *,
    beta: float | jax.Array = 1.0,
    weight: jax.Array | None = None,
    table: jax.Array | None = None,
    tail: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Negative evidence lower bound: mean over cells of -log p plus beta times the mean KL divergence.

    Differentiated in mu, r, z_mu and z_logvar; x is data, and the parts carry no gradient.

    Args:
        x: (n_cells, n_genes) counts.
        mu: (n_cells, n_genes) mean.
        r: (n_genes,) or (n_cells, n_genes) inverse dispersion.
        z_mu: (n_cells, n_latent) posterior mean.
        z_logvar: (n_cells, n_latent) posterior log variance, unclipped.
        beta: weight of the KL divergence.
        weight: (n_cells,) >= 0, for weighted means sum(w f) / sum(w); None for plain means.
        table: (n_rows, n_genes) of these x and weight, as for `nb_log_prob_sum`; used where r is one per gene.
        tail: (n_tail,) the same.

    Returns:
        loss (), nats per cell, and parts {"nll", "kl"}, its two means before beta.

    Raises:
        ValueError: shapes that do not fit.
    """
    if table is not None and jnp.ndim(r) == 1:
        log_p = nb_log_prob_sum(x, mu, r, weight=weight, method="table", table=table, tail=tail)
        nll = -log_p / (jnp.shape(x)[0] if weight is None else weight.sum())
    else:
        nll = _mean(-nb_log_prob(x, mu, r), weight)
    kl = _mean(gaussian_kl(z_mu, z_logvar), weight)
    # twin: stop_gradient of a dictionary would sort its keys, and the parts are recorded in this order.
    return nll + beta * kl, {name: jax.lax.stop_gradient(part) for name, part in (("nll", nll), ("kl", kl))}


def _mean(values: jax.Array, weight: jax.Array | None) -> jax.Array:
    return values.mean() if weight is None else (weight * values).sum() / weight.sum()
