"""Differences of lgamma and its derivatives in extended precision, and the negative binomial built on them.

Direct sums for the first `DIRECT` terms, then the asymptotic series, whose first neglected term is below 1e-24 there.
"""

from __future__ import annotations

import numpy as np

from parity_tests.jets import WIDE, Array, Jet, Number, compose, elementwise

DIRECT = 1000


def _asymptotic(z: Array, order: int) -> Array:
    """lgamma (order 0), digamma (1), trigamma (2), ... of z >= DIRECT, up to a constant for order 0."""
    if order == 0:
        return (z - WIDE(0.5)) * np.log(z) - z + 1 / (12 * z) - 1 / (360 * z**3) + 1 / (1260 * z**5)
    if order == 1:
        return np.log(z) - 1 / (2 * z) - 1 / (12 * z**2) + 1 / (120 * z**4) - 1 / (252 * z**6)
    if order == 2:
        return 1 / z + 1 / (2 * z**2) + 1 / (6 * z**3) - 1 / (30 * z**5) + 1 / (42 * z**7)
    if order == 3:
        return -1 / z**2 - 1 / z**3 - 1 / (2 * z**4) + 1 / (6 * z**6) - 1 / (6 * z**8)
    return 2 / z**3 + 3 / z**4 + 2 / z**5 - 1 / z**7 + 4 / (3 * z**9)


def polygamma_difference(x: Array, r: Array, order: int) -> Array:
    """d^order/dr^order of lgamma(x + r) - lgamma(r), x integer counts."""
    x, r = np.broadcast_arrays(np.asarray(x, WIDE), np.asarray(r, WIDE))
    total = np.zeros(x.shape, WIDE)
    signs = (0, 1, -1, 2, -6)
    # The smallest terms first would be better still; 64 bits make up for it.
    for j in range(int(min(x.max(initial=0), DIRECT))):
        term = np.log(r + j) if order == 0 else WIDE(signs[order]) / (r + j) ** order
        total = total + np.where(j < x, term, 0)
    large = x > DIRECT
    if large.any():
        start = np.where(large, r + DIRECT, WIDE(DIRECT))
        stop = np.where(large, r + x, WIDE(DIRECT))
        total = total + np.where(large, _asymptotic(stop, order) - _asymptotic(start, order), 0)
    return total


def lgamma_difference(x: Array, r: Jet, order: int = 0) -> Jet:
    """The difference's derivative of that order in r, as a jet."""
    x = np.asarray(x, WIDE)
    shape = np.broadcast_shapes(x.shape, r.shape)
    r = r.broadcast(shape)
    out = elementwise(r, *[lambda v, k=k: polygamma_difference(x, v, k) for k in range(order, order + 4)])
    if order == 0:
        # sum_j log(r + j): rounding the argument r + j alone moves each of the x terms by u, also where the log is 0.
        grown = out.v.error + np.broadcast_to(x, shape).astype(np.float64)
        out = Jet(Number(out.v.value, grown), out.a, out.b, out.ab)
    return out


def _size(*terms: Array) -> Array:
    return np.sum([np.abs(term).astype(np.float64) for term in np.broadcast_arrays(*terms)], axis=0)


def nb_log_prob_elements(x: Array, mu: Jet, r: Jet, method: str = "stable") -> Jet:
    """Negative binomial log probability, elementwise, with its closed first and second derivatives.

    The scale of rounding is the sum of absolute terms of the grouped form for "stable" and of the textbook form
    for "plain".
    """
    x = np.asarray(x, WIDE)
    shape = np.broadcast_shapes(x.shape, mu.shape, r.shape)
    x, mu, r = np.broadcast_to(x, shape), mu.broadcast(shape), r.broadcast(shape)
    m, s = mu.value, r.value
    rising = [polygamma_difference(x, s, k) for k in range(3)]
    factorial = polygamma_difference(x, np.ones(shape, WIDE), 0)
    ratio = np.log1p(m / s)
    log_mu = np.where(x > 0, x * np.log(m), 0)
    rising_ratio = rising[0] - x * np.log(s + m)  # sum_j log((r + j) / (r + mu))
    value = rising_ratio + log_mu - factorial - s * ratio
    d_mu = s * (x - m) / (m * (s + m))
    d_r = rising[1] - ratio + (m - x) / (s + m)
    d_mu_mu = -x / m**2 + (x + s) / (m + s) ** 2
    d_mu_r = (x - m) / (s + m) ** 2
    d_r_r = rising[2] + m / (s * (s + m)) + (x - m) / (s + m) ** 2

    size = _size(rising_ratio, log_mu - factorial, s * ratio, value)
    size_mu = _size(s * (x + m) / (m * (s + m)))
    size_r = _size(rising[1], ratio, (m - x) / (s + m))
    size_mu_mu = _size(x / m**2, (x + s) / (m + s) ** 2)
    size_mu_r = _size((x + m) / (s + m) ** 2)
    size_r_r = _size(rising[2], m / (s * (s + m)), (x + m) / (s + m) ** 2)
    if method == "plain":
        gammas = [polygamma_difference(np.floor(s) + 1000, s, k) for k in range(2)]
        size = size + _size(gammas[0], rising[0], factorial, (x + s) * np.log1p(s + m), log_mu)
        size_r = size_r + _size(gammas[1], 1 / s, np.log(s))
    relative = (mu.v.error / np.abs(m) + r.v.error / np.abs(s)).astype(np.float64)

    def number(term: Array, scale: Array, by_mu: Array, by_r: Array) -> Number:
        return Number(term, scale + np.abs(by_mu).astype(float) * mu.v.error + np.abs(by_r).astype(float) * r.v.error)

    first = [number(d_mu, size_mu, d_mu_mu, d_mu_r), number(d_r, size_r, d_mu_r, d_r_r)]
    mixed = Number(d_mu_r, size_mu_r * (1 + 3 * relative))
    second = [
        [Number(d_mu_mu, size_mu_mu * (1 + 3 * relative)), mixed],
        [mixed, Number(d_r_r, size_r_r * (1 + 3 * relative))],
    ]
    return compose([mu, r], number(value, size, d_mu, d_r), first, second)
