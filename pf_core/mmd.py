"""Maximum mean discrepancy with a Gaussian kernel, its bandwidth rule named.

MMD^2 = E k(X, X') + E k(Y, Y') - 2 E k(X, Y), k(a, b) = exp(-gamma |a - b|^2) (Gretton et al. 2012, JMLR 13:723).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from scipy.spatial.distance import cdist

from pf_core import metrics

__all__ = ["Rule", "bandwidth", "mmd"]

Rule = Literal["median", "mean", "scale"]


def bandwidth(x: np.ndarray, y: np.ndarray, *, rule: Rule = "median") -> float:
    """gamma of the Gaussian kernel, from the squared distances among all cells of x and y together.

    "median": 1 / median over pairs of different cells (the median heuristic, exp(-d^2 / median d^2)); "mean": 1 / mean
    over the same pairs; "scale": 1 / (n_features * variance of all values), scikit-learn's gamma="scale" for its SVMs.
    A bandwidth taken from both samples differs between two methods: compare methods at the gamma of the real cells, or
    at a fixed one.

    Args:
        x: (n, d) one sample.
        y: (m, d) the other; pass real cells twice to have a gamma that depends on them alone.
        rule: the rule.

    Returns:
        gamma > 0.

    Raises:
        ValueError: unknown rule, shapes do not match, or the cells are all alike.
    """
    if rule not in ("median", "mean", "scale"):
        raise ValueError(f"rule={rule!r}; 'median', 'mean' or 'scale' was wanted")
    x, y = _checked(x, y, least=1)
    pooled = np.concatenate([x, y])
    if rule == "scale":
        size = pooled.shape[1] * pooled.var()
    elif rule == "mean":
        # Sum over all pairs is 2 n times the sum of squares around the mean.
        size = 2.0 * np.sum((pooled - pooled.mean(axis=0)) ** 2) / (len(pooled) - 1)
    else:
        rows = np.triu_indices(len(pooled), k=1)
        size = float(np.median(cdist(pooled, pooled, "sqeuclidean")[rows]))
    if not size > 0:
        raise ValueError(f"the {rule} squared distance of the cells is {size}; pass gamma, no bandwidth follows")
    return 1.0 / float(size)


def mmd(x: np.ndarray, y: np.ndarray, *, gamma: float, estimator: Literal["u", "v"] = "u") -> float:
    """Squared maximum mean discrepancy of two samples under exp(-gamma |a - b|^2). 0 is best, at most 2.

    Args:
        x: (n, d) one sample.
        y: (m, d) the other.
        gamma: of the kernel, positive; from `bandwidth`, or fixed. pertpy's and CellFlow's default is 1 or a list.
        estimator: "u" (without a cell's similarity to itself; unbiased, can be negative) or "v" (pertpy 1.0.3,
            cellflow-tools 0.0.9).

    Returns:
        The squared discrepancy, without a root.

    Raises:
        ValueError: shapes do not match, values are not finite, too few rows, or an unknown option.
    """
    if estimator not in ("u", "v") or not (gamma > 0 and np.isfinite(gamma)):
        raise ValueError(f"estimator={estimator!r}, gamma={gamma!r}; 'u' or 'v', and a positive number, were wanted")
    x, y = _checked(x, y, least=2 if estimator == "u" else 1)

    def similarity(a: np.ndarray, b: np.ndarray) -> float:
        return float(sum(np.exp(-gamma * block).sum() for block in _squared_distances(a, b)))

    def within(a: np.ndarray) -> float:
        n = len(a)
        return (similarity(a, a) - n) / (n * (n - 1)) if estimator == "u" else similarity(a, a) / n**2

    return within(x) + within(y) - 2.0 * similarity(x, y) / (len(x) * len(y))


def _squared_distances(a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, metrics.CHUNK // len(b))
    return (cdist(a[start : start + rows], b, "sqeuclidean") for start in range(0, len(a), rows))


def _checked(x: np.ndarray, y: np.ndarray, *, least: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y have shapes {x.shape} and {y.shape}; (n, d) and (m, d) were wanted")
    if min(len(x), len(y)) < least:
        raise ValueError(f"x has {len(x)} rows and y {len(y)}; {least} of each were wanted")
    if not (np.all(np.isfinite(x)) and np.all(np.isfinite(y))):
        raise ValueError("x or y holds values that are not finite")
    return x, y
