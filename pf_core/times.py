"""Time courses: when every cell was measured, which cells follow which, and the time in which a flow runs.

How times are read, in one place:

- the column config.data.time holds finite numbers, in one unit: that of the column "<time>_unit" where there is one;
- time points are its distinct values; or the groups of the column config.data.timepoint, each at the mean time of its
  cells; or config.flow.bins groups of about equally many cells (quantiles), each at the mean time of its cells;
- a condition begins with the control cells of its tissue at the latest control time point before its own first one (in
  the whole data set, held out or not), where there is such a point;
- the flow's own time is s = (time - first) / (last - first), first and last among the cells that are seen in training.

Time points are read from all cells, held-out ones included: a time is a label, not a measurement.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pf_core.config import Config, DataConfig
from pf_core.dataset import Dataset
from pf_core.errors import ConfigError, DataError, nearest
from pf_core.labels import CONTROL, texts
from pf_core.splits import Split, held_out, validation_share

__all__ = [
    "Axis",
    "Course",
    "Interval",
    "Point",
    "Series",
    "axis_of",
    "facts",
    "intervals",
    "read",
    "series",
    "split",
]

MAX_POINTS = 24  # distinct values of a time column that are taken for time points as they are
FEW_CELLS = 10  # a time point with fewer training cells is named in the run's facts


@dataclass(frozen=True)
class Course:
    """The time of every cell of a data set."""

    unit: str  # "" where the data name none
    names: tuple[str, ...]  # of the time points, in the order of time
    points: np.ndarray  # (n_points,) float64, rising
    index: np.ndarray  # (n_cells,) int64 into the points
    times: np.ndarray  # (n_cells,) float64 as in the data; within a time point they may differ
    empty: tuple[str, ...] = ()  # time points that the column names and no cell has

    def shown(self, point: int) -> str:
        """A time point as a message names it."""
        name = self.names[point]
        return f"{name} {self.unit}".strip() if _is_number(name) else name


@dataclass(frozen=True)
class Axis:
    """Real time and the flow's own, s: 0 at the first and 1 at the last time point of training."""

    first: float
    last: float
    unit: str = ""

    def scaled(self, time: Any) -> Any:
        """s of real times."""
        return (np.asarray(time, np.float64) - self.first) / (self.last - self.first)

    def real(self, s: Any) -> Any:
        """Real times of s."""
        return self.first + np.asarray(s, np.float64) * (self.last - self.first)


@dataclass(frozen=True)
class Point:
    """The cells of one condition and tissue at one time point."""

    time: float
    name: str
    label: str  # of the cells: control where a condition begins with controls
    cells: np.ndarray  # indices into the dataset, sorted


@dataclass(frozen=True)
class Series:
    """One condition in one tissue over time. One point alone is possible: nothing can be learned from it."""

    label: str
    tissue: str
    points: tuple[Point, ...]  # rising in time


@dataclass(frozen=True)
class Interval:
    """Two neighbouring time points of a series: what a plan couples."""

    label: str
    tissue: str
    start: Point
    stop: Point

    def within(self, cells: np.ndarray) -> Interval | None:
        """The same interval with these cells only; None where a side has none of them."""
        sides = [
            Point(p.time, p.name, p.label, np.intersect1d(p.cells, cells, assume_unique=True))
            for p in (self.start, self.stop)
        ]
        return Interval(self.label, self.tissue, *sides) if all(len(p.cells) for p in sides) else None


# --- reading -------------------------------------------------------------------------------------------------------
def read(dataset: Dataset, config: Config, *, least: int = 2) -> Course:
    """The times of a data set's cells.

    Args:
        dataset: all cells.
        config: its data.time, data.timepoint and flow.bins.
        least: time points that are wanted; a trained model starts from one.

    Raises:
        DataError: no such column, times that are no finite numbers or in two units, one time point only, or more than
            MAX_POINTS of them without bins.
        ConfigError: both bins and a column of time points are asked for.
    """
    settings, bins = config.data, config.flow.bins
    if settings.timepoint and bins:
        raise ConfigError(f"data.timepoint is {settings.timepoint!r} and flow.bins {bins}; set one of them")
    times, empty = _times(dataset.obs, settings)
    unit = _unit(dataset.obs, settings)
    if settings.timepoint:
        names, points, index, empty = _named(dataset.obs, settings, times)
    elif bins:
        names, points, index = _binned(times, bins)
    else:
        points, index = np.unique(times, return_inverse=True)
        names = tuple(f"{point:.10g}" for point in points)
    course = Course(unit, names, points, index.astype(np.int64), times, empty)
    if len(points) < least:
        where = settings.timepoint or settings.time
        raise DataError(f"obs column {where!r} has one time point only, {course.shown(0)}; a flow needs two or more")
    if len(points) > MAX_POINTS and not settings.timepoint and not bins:
        raise DataError(
            f"obs column {settings.time!r} has {len(points)} distinct times, with {np.bincount(index).min()} cells at"
            f" the rarest; group them with --set flow.bins=8, or name a column of time points with data.timepoint"
        )
    return course


def _column(obs: Any, name: str, role: str) -> Any:
    if name not in obs.columns:
        raise DataError(f"obs has no column {name!r}; {nearest(name, obs.columns)} (setting data.{role})")
    return obs[name]


def _times(obs: Any, settings: DataConfig) -> tuple[np.ndarray, tuple[str, ...]]:
    """(n_cells,) float64 times, and the values that the column declares and no cell has."""
    import pandas as pd

    column = _column(obs, settings.time, "time")
    times = np.asarray(pd.to_numeric(column.astype(object), errors="coerce"), np.float64)
    wrong = ~np.isfinite(times)
    if wrong.any():
        shown = column.to_numpy(object)[wrong][0]
        raise DataError(
            f"obs column {settings.time!r} has {int(wrong.sum())} values that are no finite number, such as {shown!r};"
            " leave out these cells, or write times as numbers"
        )
    return times, _unused(column)


def _unused(column: Any) -> tuple[str, ...]:
    """Categories that no cell has."""
    import pandas as pd

    if not isinstance(column.dtype, pd.CategoricalDtype):
        return ()
    counts = column.value_counts(sort=False)
    return tuple(str(category) for category in column.cat.categories if not counts.get(category, 0))


def _unit(obs: Any, settings: DataConfig) -> str:
    name = f"{settings.time}_unit"
    if name not in obs.columns:
        return ""
    values, _ = texts(obs[name], name, missing="")
    units = sorted(set(values) - {""})
    if len(units) > 1:
        raise DataError(f"obs column {name!r} holds {len(units)} units, {', '.join(units)}; bring times to one unit")
    return units[0] if units else ""


def _named(
    obs: Any, settings: DataConfig, times: np.ndarray
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, tuple[str, ...]]:
    """Time points that a column names: each at the mean time of its cells."""
    column = _column(obs, settings.timepoint, "timepoint")
    labels, missing = texts(column, settings.timepoint)
    if missing:
        raise DataError(f"obs column {settings.timepoint!r} has {missing} cells without a time point; leave them out")
    distinct, index = np.unique(labels.astype(str), return_inverse=True)
    names = [str(name) for name in distinct]
    points = _means(times, index)
    order = np.argsort(points, kind="stable")
    for one, other in itertools.pairwise(order):
        if points[one] == points[other]:
            raise DataError(
                f"time points {names[one]!r} and {names[other]!r} of obs column {settings.timepoint!r} have one mean"
                f" {settings.time!r}, {points[one]:g}; give them one name, or different times"
            )
    place = np.argsort(order)
    return tuple(names[row] for row in order), points[order], place[index], _unused(column)


def _binned(times: np.ndarray, bins: int) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """About equally many cells per bin; equal times are never parted, so that there may be fewer bins."""
    edges = np.unique(np.quantile(times, np.linspace(0.0, 1.0, bins + 1)[1:-1], method="inverted_cdf"))
    _, index = np.unique(np.searchsorted(edges, times, side="left"), return_inverse=True)
    points = _means(times, index)
    bounds = [(times[index == point].min(), times[index == point].max()) for point in range(len(points))]
    return tuple(f"{low:.10g} to {high:.10g}" for low, high in bounds), points, index


def _means(times: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Mean time of every time point; equal times have themselves as mean, without rounding."""
    first = np.zeros(index.max() + 1)
    first[index] = times
    return first + np.bincount(index, times - first[index]) / np.bincount(index)


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


# --- splitting -----------------------------------------------------------------------------------------------------
def split(dataset: Dataset, course: Course, config: DataConfig, seed: int) -> Split:
    """Held-out cells by expression, then a validation share of every (condition, tissue, time point) that is left.

    Raises:
        DataError: a column, value or combination that no cell has, or nothing left to train on.
        ConfigError: holdout_share, which draws conditions and not time points.
    """
    if config.holdout_share:
        raise ConfigError(
            f"data.holdout_share is {config.holdout_share:g}; the flow system holds out what --holdout names, such as"
            f" {config.time}={course.names[len(course.names) // 2]}"
        )
    held = held_out(dataset, config)
    keys = list(zip(dataset.label, dataset.tissue, course.index.tolist(), strict=True))
    position = {key: row for row, key in enumerate(sorted(set(keys)))}
    index = np.fromiter((position[key] for key in keys), np.int64, len(keys))
    if held.all():
        raise DataError("every cell is held out; hold out less")
    validation = validation_share(np.where(held, -1, index), config.validation_share, seed)
    parts = {keys[cell] for cell in np.flatnonzero(held)}
    return Split(
        train=np.flatnonzero(~held & ~validation),
        validation=np.flatnonzero(validation),
        heldout=np.flatnonzero(held),
        conditions=[(label, tissue, course.names[point]) for label, tissue, point in sorted(parts)],
    )


# --- what follows what ---------------------------------------------------------------------------------------------
def series(dataset: Dataset, course: Course, cells: np.ndarray) -> list[Series]:
    """Every condition and tissue among these cells with its time points, sorted by label and tissue.

    A condition begins with the controls before its first time point in the whole data set: where that one is held out,
    the condition has begun all the same, and later controls are not what its cells were.
    """
    cells = np.unique(np.asarray(cells, np.int64))
    first: dict[tuple[str, str], float] = {}
    keys = list(zip(dataset.label.tolist(), dataset.tissue.tolist(), strict=True))
    for key, time in zip(keys, course.points[course.index].tolist(), strict=True):
        first[key] = min(time, first.get(key, time))
    found: dict[tuple[str, str], dict[int, list[int]]] = {}
    for cell in cells.tolist():
        found.setdefault(keys[cell], {}).setdefault(int(course.index[cell]), []).append(cell)
    measured = {
        (label, tissue): [
            Point(float(course.points[p]), course.names[p], label, np.array(points[p], np.int64))
            for p in sorted(points)
        ]
        for (label, tissue), points in found.items()
    }
    out = []
    for (label, tissue), points in sorted(measured.items()):
        before = [p for p in measured.get((CONTROL, tissue), []) if p.time < first[label, tissue]]
        out.append(Series(label, tissue, (*before[-1:], *points) if label != CONTROL else tuple(points)))
    return out


def intervals(courses: Sequence[Series]) -> list[Interval]:
    """The neighbouring time points of every series.

    Raises:
        DataError: no series has two time points, so that there is nothing to learn a flow from.
    """
    found = [
        Interval(one.label, one.tissue, start, stop)
        for one in courses
        for start, stop in itertools.pairwise(one.points)
    ]
    if not found:
        one = courses[0]
        raise DataError(
            f"no condition has training cells at two time points: {one.label!r} in tissue {one.tissue!r} has"
            f" {one.points[0].name} alone. Hold out less, or take all tissues for one course (--tissue-column '')"
        )
    return found


def facts(course: Course, courses: Sequence[Series], split: Split) -> dict[str, Any]:
    """What a run tells of its course, as plain values: cells per time point, and the time points of every series."""
    counts = {
        name: np.bincount(course.index[getattr(split, name)], minlength=len(course.points)).tolist()
        for name in ("train", "validation", "heldout")
    }
    rows = zip(course.names, course.points.tolist(), *counts.values(), strict=True)
    points = [dict(zip(("name", "time", *counts), row, strict=True)) for row in rows]
    return {
        "points": points,
        "points_without_cells": list(course.empty),
        "points_with_few_cells": [point["name"] for point in points if 0 < point["train"] < FEW_CELLS],
        "series": [
            {
                "label": one.label,
                "tissue": one.tissue,
                "points": [point.name for point in one.points],
                "cells": [len(point.cells) for point in one.points],
                "starts_from_control": one.points[0].label != one.label,
            }
            for one in courses
        ],
    }


def axis_of(course: Course, cells: np.ndarray) -> Axis:
    """The time axis of the cells that training sees."""
    points = course.points[course.index[cells]]
    if points.min() == points.max():
        raise DataError(
            f"one time point is left for training, {course.shown(int(course.index[cells][0]))}; hold out less"
        )
    return Axis(float(points.min()), float(points.max()), course.unit)
