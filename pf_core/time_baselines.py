"""What a prediction for an unseen time point has to beat: answers made of the cells of its two neighbours alone.

The strong one is the plain mixture of the neighbours' real cells: it needs no model and keeps the noise of real cells,
which interpolation between coupled cells averages away. Everything here is a pure function of (cells, seed, name), and
the mixture's cells are those that the model moves: a model that moves them not at all scores what the mixture scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import sparse

from pf_core.baselines import Declined
from pf_core.coupling import exact_plan, sample_pairs
from pf_core.metrics import energy_distance
from pf_core.noise import generator
from pf_core.outputs import Csr
from pf_core.times import Point, Series

__all__ = [
    "Gap",
    "clock",
    "closeness",
    "curve_over_line",
    "gap",
    "mixed",
    "ot_interpolation",
    "path_lengths",
    "reading",
    "some",
]

LEAST_STEP = 1e-6  # time points without a change between them keep their order on every clock


@dataclass(frozen=True)
class Gap:
    """An unseen time point of one condition and tissue, between the measured ones next to it.

    A side is None where the series ends: what lies there is an extrapolation, which no method here answers.
    """

    label: str
    tissue: str
    time: float  # real units
    before: Point | None
    after: Point | None
    points: tuple[Point, ...] = ()  # of the series, without any at this time

    @property
    def sides(self) -> tuple[Point, Point] | Declined:
        """Both sides, or why there are not two."""
        if self.before is None or self.after is None:
            missing = "earlier" if self.before is None else "later"
            return Declined(f"there is no {missing} time point to interpolate from")
        return self.before, self.after


def gap(series: Series, time: float) -> Gap:
    """The gap of a series in which a time lies; a time point of the series at this very time is left out."""
    points = tuple(point for point in series.points if point.time != time)
    before = [point for point in points if point.time < time]
    after = [point for point in points if point.time > time]
    return Gap(series.label, series.tissue, time, before[-1] if before else None, after[0] if after else None, points)


def closeness(before: float, time: float, after: float) -> float:
    """The later side's part of what lies at a time: 0 at the earlier time point, 1 at the later, linear between.

    Raises:
        ValueError: the time is not strictly between the two.
    """
    if not before < time < after:
        raise ValueError(f"time {time:g} is not between {before:g} and {after:g}")
    return (time - before) / (after - before)


def path_lengths(cells: Sequence[np.ndarray]) -> np.ndarray:
    """(n_points,) length of the way from the first time point to each, by the distances of neighbours.

    The distance is the root of the energy distance (U), which is a metric, and at least LEAST_STEP.

    Args:
        cells: (n, d) coordinates of the cells of every time point, in order.
    """
    found = [energy_distance(x, y) if min(len(x), len(y)) > 1 else 0.0 for x, y in pairwise(cells)]
    return np.concatenate([[0.0], np.cumsum([max(math.sqrt(max(one, 0.0)), LEAST_STEP) for one in found])])


def clock(times: Sequence[float], lengths: np.ndarray, pace: float) -> np.ndarray:
    """(n_points,) what a clock shows at the measured times: 0 at the first, 1 at the last.

    Args:
        times: (n_points,) measured times, rising.
        lengths: (n_points,) from `path_lengths`.
        pace: 0 for a clock that runs with time, 1 for one that runs with the change of cells; between, in proportion.
    """
    even = (np.asarray(times, np.float64) - times[0]) / (times[-1] - times[0])
    return (1.0 - pace) * even + pace * lengths / lengths[-1]


def reading(times: Sequence[float], readings: np.ndarray, time: float) -> float:
    """What a clock shows at a time that was not measured: a monotone cubic (Fritsch and Carlson 1980) through `clock`.

    Where cells change fast before a gap and slowly after it, most of the gap's change comes early.

    Raises:
        ValueError: the time is not strictly between two of the measured ones.
    """
    from scipy.interpolate import PchipInterpolator

    if not times[0] < time < times[-1] or time in times:
        raise ValueError(f"time {time:g} is not between two of {', '.join(f'{one:g}' for one in times)}")
    return float(PchipInterpolator(times, readings)(time))


def curve_over_line(readings: np.ndarray, profiles: np.ndarray, now: float) -> np.ndarray:
    """(n_genes,) mean profile on the course's curve over that of the straight line between the neighbours.

    The curve of a gene is a monotone cubic over the clock, through all measured points: it never leaves what both
    neighbours have. With two points it is the line, and the factor 1, as for a gene that neither neighbour has.

    Args:
        readings: (n_points,) of the clock, rising.
        profiles: (n_points, n_genes) mean profiles, not negative.
        now: what the clock shows, between two of the points.
    """
    from scipy.interpolate import PchipInterpolator

    after = int(np.searchsorted(readings, now))
    share = closeness(readings[after - 1], now, readings[after])
    line = (1.0 - share) * profiles[after - 1] + share * profiles[after]
    curve = PchipInterpolator(readings, profiles)(now)
    return np.divide(curve, line, out=np.ones_like(line), where=line > 0)


def mixed(
    before: np.ndarray, after: np.ndarray, share: float, *, seed: int, name: str, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cells of both sides in proportion 1 - share to share: as many as there are, without repeats.

    Args:
        before, after: indices of the cells on either side.
        share: of the later side, from 0 to 1.
        seed, name: of the draw.
        most: cells in all; fewer where a side has too few for its part.

    Returns:
        The chosen cells of each side, in the order given; at least one of each that has a part.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share:g}; a number from 0 to 1 was wanted")
    bounds = [len(cells) / part for cells, part in ((before, 1 - share), (after, share)) if part > 0]
    n = min([*bounds, float(most)])
    counts = [
        min(len(c), max(1, math.floor(n * p + 0.5))) if p > 0 else 0 for c, p in ((before, 1 - share), (after, share))
    ]
    return some(before, counts[0], seed, f"{name}.before"), some(after, counts[1], seed, f"{name}.after")


def some(cells: np.ndarray, n: int, seed: int, name: str) -> np.ndarray:
    """At most n of the cells, in their order."""
    if n >= len(cells):
        return cells
    return cells[np.sort(generator(seed, f"mixture.{name}").permutation(len(cells))[:n])]


def ot_interpolation(
    before: Csr, after: Csr, x: np.ndarray, y: np.ndarray, share: float, *, seed: int, name: str, most: int
) -> Csr:
    """Linear interpolation of the expression of optimally coupled cells, (1 - share) a_i + share b_j.

    Args:
        before, after: (n, n_genes) and (m, n_genes) CSR, log-normalised cells of either side.
        x, y: (n, d) and (m, d) coordinates of these cells, under whose squared distance the plan is exact.
        share: of the later side.
        seed, name: of the draws.
        most: cells of a side; of a larger one a draw. The plan costs about their number to the third.

    Returns:
        (k, n_genes) CSR of log-normalised interpolated cells: k pairs of the plan, the number of the larger side.
    """
    i = some(np.arange(len(x)), most, seed, f"{name}.couple.before")
    j = some(np.arange(len(y)), most, seed, f"{name}.couple.after")
    pairs = sample_pairs(exact_plan(x[i], y[j]), max(len(i), len(j)), generator(seed, f"mixture.{name}.pairs"))
    return sparse.csr_matrix((1.0 - share) * before[i[pairs[0]]] + share * after[j[pairs[1]]])
