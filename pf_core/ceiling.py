"""The ceiling of a metric: what it says of real cells against real cells of the same condition.

No prediction can be expected to do better than a second sample of the truth. `ceiling` takes any metric of two sets of
cells, `screen_ceiling` any metric of two screens; both split the real cells by named draws, so that a seed gives the
same numbers on every machine.

"halves" splits the cells into two disjoint halves: independent samples of half the depth, so the ceiling is pessimistic
for metrics that get better with more cells (`spearman_brown` extrapolates correlations, as cell-eval does).
"replacement" draws two samples of the full size with replacement: full depth, but the two share cells, so the ceiling
is optimistic, and doubled cells make tests of differential expression call too much. Report which one it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pf_core.noise import generator
from pf_core.screens import Screen

__all__ = ["Ceiling", "ceiling", "resample", "screen_ceiling", "spearman_brown"]

Method = Literal["halves", "replacement"]


@dataclass(frozen=True)
class Ceiling:
    """Values of a metric between resamples of real cells: (n_repeats,), or (n_repeats, n_perturbations)."""

    values: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Mean over repeats, () or (n_perturbations,)."""
        return self.values.mean(axis=0)

    @property
    def std(self) -> np.ndarray:
        """Standard deviation over repeats, of single repeats; NaN for one repeat."""
        if len(self.values) < 2:
            return np.full(self.values.shape[1:], np.nan)
        return self.values.std(axis=0, ddof=1)


def resample(
    n: int, *, seed: int, name: str, index: int = 0, method: Method = "halves"
) -> tuple[np.ndarray, np.ndarray]:
    """Two samples of n cells: disjoint halves of n // 2 (one is left over if n is odd), or n each with replacement.

    Args:
        n: number of cells, 2 or more.
        seed, name, index: of the draw, see `pf_core.noise.generator`.
        method: "halves" or "replacement".

    Returns:
        Two sorted arrays of indices below n.
    """
    if method not in ("halves", "replacement"):
        raise ValueError(f"method={method!r}; 'halves' or 'replacement' was wanted")
    if n < 2:
        raise ValueError(f"{name!r} has {n} cells; two are the least that can be compared with each other")
    rng = generator(seed, f"ceiling.{name}", index)
    if method == "replacement":
        first, second = rng.integers(0, n, (2, n))
    else:
        first, second = rng.permutation(n)[: n // 2 * 2].reshape(2, -1)
    return np.sort(first), np.sort(second)


def ceiling(
    cells: Any,
    metric: Callable[[Any, Any], float],
    *,
    seed: int,
    name: str,
    n_repeats: int = 10,
    method: Method = "halves",
) -> Ceiling:
    """What a metric of two sets of cells says of real cells against real ones.

    Args:
        cells: (n_cells, ...) array or CSR: the real cells of one condition, in the form that metric wants.
        metric: from two sets of rows of cells to a number.
        seed: of the draws.
        name: of the condition, so that conditions are split independently.
        n_repeats: how many splits.
        method: "halves" or "replacement".

    Raises:
        ValueError: fewer than two cells, no repeat, or an unknown method.
    """
    _check_repeats(n_repeats)
    pairs = (resample(cells.shape[0], seed=seed, name=name, index=i, method=method) for i in range(n_repeats))
    return Ceiling(np.array([float(metric(cells[first], cells[second])) for first, second in pairs]))


def screen_ceiling(
    screen: Screen,
    metric: Callable[[Screen, Screen], np.ndarray | float],
    *,
    seed: int,
    n_repeats: int = 10,
    method: Method = "halves",
) -> Ceiling:
    """What a metric of two screens says of the real screen against itself.

    The cells of every perturbation and of control are split on their own, so both sides have the same composition and
    controls are independent too.

    Args:
        screen: the real cells; every label with two cells or more.
        metric: from two screens to an array (n_perturbations,) or a number, for example `screen_metrics.pearson_delta`.
        seed: of the draws.
        n_repeats: how many splits.
        method: "halves" or "replacement".
    """
    _check_repeats(n_repeats)
    return Ceiling(np.array([metric(*_split(screen, seed, i, method)) for i in range(n_repeats)], dtype=np.float64))


def _check_repeats(n_repeats: int) -> None:
    if n_repeats < 1:
        raise ValueError(f"n_repeats={n_repeats}; 1 or more was wanted")


def _split(screen: Screen, seed: int, index: int, method: Method) -> tuple[Screen, Screen]:
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for label in (*screen.perturbations, screen.control):
        cells = np.flatnonzero(screen.labels == label)
        for side, rows in zip(
            sides, resample(len(cells), seed=seed, name=label, index=index, method=method), strict=True
        ):
            side.append(cells[rows])
    first, second = (np.concatenate(side) for side in sides)
    return screen.take(first), screen.take(second)


def spearman_brown(r: np.ndarray | float) -> np.ndarray:
    """2r/(1 + r): what a reliability between halves would be at full depth. NaN where r is not positive.

    As cell-eval 0.8.2 does to its mean scores over perturbations (`compute_ceiling`).
    """
    r = np.asarray(r, dtype=np.float64)
    return np.divide(2 * r, 1 + r, out=np.full(r.shape, np.nan), where=r > 0)
