"""Optimal-transport plans between the cells of two time points, and pairs drawn from them (docs/math.md 7).

A plan is a matrix (n, m) of non-negative masses, dense or sparse. An exact plan has row sums 1/n, column sums 1/m and
the smallest sum of mass times squared distance. Entropic and unbalanced plans are made by the twin's own library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from pf_core.backends import Backend
from pf_core.config import STANDARD_FLOOR, FlowConfig
from pf_core.errors import DataError

__all__ = ["argmax_pairs", "coupler", "exact_plan", "pairs", "sample_pairs", "squared_distances", "standard"]

MAX_CELLS = 4000  # of the larger side of an exact plan: about a minute, and 128 MB of distances
NEIGHBOURS = 8  # pairs per cell that the linear program begins with, and most that a round adds
Coupler = Callable[[np.ndarray, np.ndarray], Any]


def standard(latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Center and scale (n_latent,) of latents (n_cells, n_latent): z_std = (z - center) / scale.

    The scale is the standard deviation with ddof = 0, at least STANDARD_FLOOR: what does not vary becomes 0.
    """
    latents = np.asarray(latents, np.float64)
    if latents.ndim != 2 or not len(latents):
        raise ValueError(f"latents has shape {latents.shape}; (n_cells, n_latent) with some cell was wanted")
    return latents.mean(0), np.maximum(latents.std(0), STANDARD_FLOOR)


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(n, m) squared Euclidean distances between the rows of x (n, d) and y (m, d), float64.

    Raises:
        ValueError: a side without cells, sides of unequal width, a value that is not finite.
    """
    from scipy.spatial.distance import cdist

    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not (len(x) and len(y)):
        raise ValueError(f"x has shape {x.shape}, y {y.shape}; (n, d) and (m, d) with some cells each were wanted")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("x or y has values that are not finite; a plan needs finite latents")
    return cdist(x, y, "sqeuclidean")


def exact_plan(x: np.ndarray, y: np.ndarray) -> Any:
    """The optimal-transport plan between x (n, d) and y (m, d) with uniform masses, exact.

    Sides of equal size have an assignment. Others have a linear program of n + m equations, whose n m variables enter
    in rounds: those of near neighbours first, then those that the dual solution says would lower the cost, until there
    is none. Dual feasibility proves that the plan is optimal.

    Returns:
        CSR (n, m), at most n + m - 1 masses, which sum to 1.

    Raises:
        ValueError: as squared_distances.
        DataError: more than MAX_CELLS cells on a side.
    """
    from scipy import sparse
    from scipy.optimize import linear_sum_assignment

    n, m = len(x), len(y)
    if max(n, m) > MAX_CELLS:
        raise DataError(
            f"an exact plan between {n} and {m} cells was asked for and ends at {MAX_CELLS} a side; "
            "couple minibatches (flow.scope='minibatch'), or set flow.coupling='entropic'"
        )
    cost = squared_distances(x, y)
    if n == m:
        rows, columns = linear_sum_assignment(cost)
        mass = np.full(n, 1.0 / n)
    else:
        rows, columns, mass = _transport(cost)
    return sparse.csr_matrix((mass, (rows, columns)), (n, m))


def _transport(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and masses of the exact plan of a cost (n, m) under uniform masses."""
    from scipy import sparse
    from scipy.optimize import linprog

    n, m = cost.shape
    few_rows, few_columns = min(NEIGHBOURS, n), min(NEIGHBOURS, m)
    every_row, every_column = np.arange(n)[:, None], np.arange(m)
    candidate = np.zeros((n, m), bool)
    candidate[every_row, np.argpartition(cost, few_columns - 1, axis=1)[:, :few_columns]] = True
    candidate[np.argpartition(cost, few_rows - 1, axis=0)[:few_rows], every_column] = True
    candidate[_corner(n, m)] = True  # a plan exists among the candidates
    tolerance = 1e-9 * max(float(cost.max()), np.finfo(float).tiny)
    while True:
        rows, columns = np.nonzero(candidate)
        variable = np.arange(len(rows))
        ends, both = np.concatenate([rows, n + columns]), np.concatenate([variable, variable])
        sums = sparse.csr_matrix((np.ones(2 * len(rows)), (ends, both)), (n + m, len(rows)))
        # In units of 1/(n m) sums and masses are whole numbers, so that no rounding is left in them.
        totals = np.concatenate([np.full(n, float(m)), np.full(m, float(n))])
        found = linprog(cost[rows, columns], A_eq=sums, b_eq=totals, method="highs-ds")
        if not found.success:
            raise RuntimeError(f"the linear program of a plan between {n} and {m} cells failed: {found.message}")
        dual = found.eqlin.marginals
        reduced = cost - dual[:n, None] - dual[n:]
        reduced[candidate] = 0.0
        if reduced.min() >= -tolerance:
            mass = np.round(found.x)
            kept = mass > 0
            return rows[kept], columns[kept], mass[kept] / (n * m)
        worst = np.argpartition(reduced, few_columns - 1, axis=1)[:, :few_columns]
        candidate[every_row, worst] |= reduced[every_row, worst] < -tolerance


def _corner(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Support of the north-west corner plan: both sides cut into the pieces that their bounds leave."""
    starts = np.unique(np.concatenate([np.arange(n) * m, np.arange(m) * n]))  # in units of 1/(n m)
    return starts // m, starts // n


def sample_pairs(plan: Any, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """n pairs drawn from a plan, in random order: row and column indices (n,) each.

    The draw is systematic: a pair of probability p comes floor(n p) or ceil(n p) times, n p times on average. An
    assignment of n cells therefore gives each of its pairs once.
    """
    rows, columns, mass = _entries(plan)
    upper = np.cumsum(mass)
    place = np.searchsorted(upper, upper[-1] * (rng.random() + np.arange(n)) / n, side="right")
    place = rng.permutation(np.minimum(place, len(mass) - 1))
    return rows[place], columns[place]


def argmax_pairs(plan: Any) -> tuple[np.ndarray, np.ndarray]:
    """Each row with the column of its largest mass, the first of equals; rows without mass are left out."""
    from scipy import sparse

    dense = plan.toarray() if sparse.issparse(plan) else np.asarray(plan)
    rows = np.flatnonzero((dense > 0).any(axis=1))
    return rows, dense[rows].argmax(axis=1)


def pairs(
    plan: Any, n: int, rng: np.random.Generator, pairing: Literal["sample", "argmax"]
) -> tuple[np.ndarray, np.ndarray]:
    """n pairs of a plan: sampled from it, or an even sample of its argmax pairs."""
    if pairing == "sample":
        return sample_pairs(plan, n, rng)
    rows, columns = argmax_pairs(plan)
    chosen, _ = sample_pairs(np.ones((len(rows), 1)), n, rng)
    return rows[chosen], columns[chosen]


def _entries(plan: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and values of the masses above 0."""
    from scipy import sparse

    found = sparse.coo_matrix(plan)
    if not (np.isfinite(found.data).all() and (found.data >= 0).all() and (found.data > 0).any()):
        raise ValueError("plan has no mass, or masses that are negative or not finite; non-negative ones were wanted")
    kept = found.data > 0
    return found.row[kept], found.col[kept], found.data[kept].astype(np.float64)


def coupler(config: FlowConfig, backend: Backend) -> Coupler:
    """The function of (x, y) that makes the plans of a run: ours where they are exact, else the twin's."""
    if config.coupling == "exact":
        return exact_plan
    return lambda x, y: backend.entropic_plan(x, y, epsilon=config.epsilon, unbalanced=config.unbalanced)
