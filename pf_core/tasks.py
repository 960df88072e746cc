"""Tasks: which conditions are held out in turn, read from a TOML file.

A task has four kinds of folds:

- "leave-one-out": every perturbed cell of one value of a column (a cell type, a tissue) is held out; one fold a value.
- "replicate": the same for a replicate or donor, whose controls stay and are predicted from.
- "combinations": the combinations of perturbations are dealt into `folds` parts, and a part is held out everywhere.
- "unseen": perturbations are dealt into `folds` parts; every condition with one of them is held out everywhere.

Controls are never held out. A column `by` that is neither tissue nor cell type is joined to the cell type, so that
contexts, and with them the controls that are predicted from, are those of the replicate. docs/tasks.md describes the
file.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pf_core import noise
from pf_core.config import Config, DataConfig, from_dict, to_dict
from pf_core.data import Dataset
from pf_core.errors import ConfigError, DataError, nearest
from pf_core.labels import texts

__all__ = ["Fold", "Inner", "Task", "folds", "load", "with_context"]

Kind = Literal["leave-one-out", "replicate", "combinations", "unseen"]
BY_CONTEXT = ("leave-one-out", "replicate")
CONTEXT = "pf_context"  # obs column of the joined contexts


@dataclass(frozen=True)
class TaskTable:
    """The [task] table of the file as it stands, with its defaults."""

    name: str = ""
    data: str = ""
    kind: Kind = "leave-one-out"
    by: str = ""
    values: tuple[str, ...] = ()
    largest: int = 0
    perturbations: tuple[str, ...] = ()
    folds: int = 0
    seeds: tuple[int, ...] = (0,)
    min_cells: int = 20
    features: str = ""


@dataclass(frozen=True)
class Inner:
    """The choice of settings on inner folds: `grid` holds the values of dotted settings, all combinations are tried."""

    grid: tuple[tuple[str, tuple[Any, ...]], ...]
    folds: int = 3

    def candidates(self) -> list[dict[str, Any]]:
        """Every combination of the grid, the last setting varying fastest."""
        names = [name for name, _ in self.grid]
        return [dict(zip(names, values, strict=True)) for values in itertools.product(*(v for _, v in self.grid))]


@dataclass(frozen=True)
class Task:
    """A task as read from its file.

    Attributes:
        name: what tables are headed with.
        data: path of the data as written.
        folder: of the file, which `data` and `features` are relative to.
        kind, by, values, largest, perturbations, n_folds, seeds, min_cells, features: see docs/tasks.md.
        train: settings that differ from the default Config, nested tables.
        inner: the choice on inner folds; None for none.
    """

    name: str
    data: str
    folder: Path
    kind: Kind
    by: str = ""
    values: tuple[str, ...] = ()
    largest: int = 0
    perturbations: tuple[str, ...] = ()
    n_folds: int = 0
    seeds: tuple[int, ...] = (0,)
    min_cells: int = 20
    features: str = ""
    train: dict[str, Any] = field(default_factory=dict)
    inner: Inner | None = None

    def config(self, settings: dict[str, Any] | None = None) -> Config:
        """The Config of a training, with further settings {"operator.shrinkage": 0.3, ...}.

        Raises:
            ConfigError: an unknown setting, or a value it cannot have.
        """
        table = to_dict(Config())
        _merge(table, self.train, "train")
        for name, value in (settings or {}).items():
            *path, last = name.split(".")
            nested: dict[str, Any] = {last: value}
            for part in reversed(path):
                nested = {part: nested}
            _merge(table, nested, "inner.grid")
        if self.needs_context(from_dict(Config, table).data):
            table["data"]["cell_type"] = CONTEXT
        return from_dict(Config, table)

    def needs_context(self, data: DataConfig) -> bool:
        """Whether `by` is neither the tissue nor the cell type, and is joined to the cell type."""
        return self.kind in BY_CONTEXT and self.by not in (data.tissue, data.cell_type)

    def described(self) -> dict[str, Any]:
        """What makes two runs of a task the same one: everything but seeds and place, plain values."""
        return {
            "name": self.name,
            "kind": self.kind,
            "by": self.by,
            "values": list(self.values),
            "largest": self.largest,
            "perturbations": list(self.perturbations),
            "folds": self.n_folds,
            "min_cells": self.min_cells,
            "train": self.train,
            "inner": {"folds": self.inner.folds, "grid": {k: list(v) for k, v in self.inner.grid}}
            if self.inner
            else None,
        }


@dataclass(frozen=True)
class Fold:
    """One fold: its name, and the expressions (pf_core.splits) of what is held out."""

    index: int
    name: str
    holdout: tuple[str, ...]


# --- reading ------------------------------------------------------------------------------------------------------
def load(path: str | Path) -> Task:
    """Read and check a task file.

    Raises:
        ConfigError: no such file, not TOML, an unknown key, a wrong type, or keys that do not go together.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"there is no task file {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    _known(table, ("task", "train", "inner"), "")
    parts = {key: table.get(key, {}) for key in ("task", "train", "inner")}
    for key, value in parts.items():
        if not isinstance(value, dict):
            raise ConfigError(f"{key} is {value!r}; a table was wanted")
    if "task" not in table:
        raise ConfigError(f"{path} has no [task] table; docs/tasks.md shows one")
    given = dict(parts["task"])
    seeds = given.pop("seeds", [0])
    whole = isinstance(seeds, list) and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"task.seeds is {seeds!r}; a list of different whole numbers from 0 was wanted")
    read: TaskTable = from_dict(TaskTable, given, "task")
    _check(read, given)
    train = parts["train"]
    for key in ("holdout", "holdout_share"):
        if isinstance(train.get("data"), dict) and key in train["data"]:
            raise ConfigError(f"train.data.{key} is what a task decides; leave it out")
    if "seed" in train:
        raise ConfigError("train.seed is what task.seeds decides; leave it out")
    task = Task(
        name=read.name or path.stem,
        data=read.data,
        folder=path.parent,
        kind=read.kind,
        by=read.by,
        values=read.values,
        largest=read.largest,
        perturbations=read.perturbations,
        n_folds=read.folds,
        seeds=tuple(seeds),
        min_cells=read.min_cells,
        features=read.features,
        train=train,
        inner=_inner(parts["inner"]) if "inner" in table else None,
    )
    for candidate in task.inner.candidates() if task.inner else [{}]:
        task.config(candidate)
    return task


def _check(task: TaskTable, given: dict[str, Any]) -> None:
    if not task.data:
        raise ConfigError("task.data is missing; name the h5ad file")
    if "kind" not in given:
        raise ConfigError("task.kind is missing; leave-one-out, replicate, combinations or unseen was wanted")
    if task.min_cells < 2:
        raise ConfigError(f"task.min_cells is {task.min_cells}; 2 or more was wanted")
    if task.largest < 0:
        raise ConfigError(f"task.largest is {task.largest}; a number of values was wanted, 0 for all")
    if len(set(task.values)) < len(task.values):
        raise ConfigError("task.values names a value twice")
    if task.kind in BY_CONTEXT:
        if not task.by:
            raise ConfigError(
                f"task.by is missing; a task of kind {task.kind!r} names the column it leaves values out of"
            )
        if task.folds:
            raise ConfigError(
                f"task.folds does not go with kind {task.kind!r}; every value is a fold (largest = N takes N)"
            )
        if task.values and task.largest:
            raise ConfigError("task.values and task.largest exclude each other; give one")
    else:
        if task.folds < 2:
            raise ConfigError(f"task.folds is {task.folds}; a task of kind {task.kind!r} needs 2 or more")
        for key in ("by", "largest", "perturbations"):
            if given.get(key):
                raise ConfigError(f"task.{key} does not go with kind {task.kind!r}; leave it out")
    if task.kind == "unseen" and not task.features:
        raise ConfigError("task.features is missing; unseen perturbations are predicted from a CSV of their features")


def _inner(table: dict[str, Any]) -> Inner:
    _known(table, ("folds", "grid"), "inner")
    n_folds, grid = table.get("folds", 3), table.get("grid", {})
    if not isinstance(n_folds, int) or isinstance(n_folds, bool) or n_folds < 1:
        raise ConfigError(f"inner.folds is {n_folds!r}; a whole number from 1 was wanted")
    if not isinstance(grid, dict) or not grid:
        raise ConfigError("inner.grid is missing; name settings and their values: operator.shrinkage = [0.1, 0.3]")
    found = tuple(_leaves(grid, ""))
    if any(name.split(".")[0] in ("data", "seed") for name, _ in found):
        raise ConfigError("inner.grid names data or seed; only settings of the model and its training can be chosen")
    return Inner(found, n_folds)


def _leaves(table: dict[str, Any], where: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for key, value in table.items():
        name = f"{where}.{key}" if where else key
        if isinstance(value, dict):
            yield from _leaves(value, name)
        elif isinstance(value, list) and value:
            yield name, tuple(value)
        else:
            raise ConfigError(f"inner.grid.{name} is {value!r}; a list of values was wanted")


def _known(table: dict[str, Any], keys: Sequence[str], where: str) -> None:
    for key in table:
        if key not in keys:
            raise ConfigError(f"unknown key {where + '.' if where else ''}{key}; {nearest(key, keys)}")


def _merge(table: dict[str, Any], changes: dict[str, Any], where: str) -> None:
    for key, value in changes.items():
        if key not in table:
            raise ConfigError(f"unknown setting {where}.{key}; {nearest(key, table)}")
        if isinstance(table[key], dict):
            if not isinstance(value, dict):
                raise ConfigError(f"{where}.{key} is {value!r}; a table was wanted")
            _merge(table[key], value, f"{where}.{key}")
        else:
            table[key] = value


# --- folds --------------------------------------------------------------------------------------------------------
def with_context(obs: Any, task: Task, data: DataConfig) -> Any:
    """A copy of obs (pandas.DataFrame) with the column of contexts joined from cell type and `by`.

    Raises:
        DataError: there is no such column.
    """
    if task.by not in obs.columns:
        raise DataError(f"task.by names column {task.by!r}; {nearest(task.by, obs.columns)}")
    values, _ = texts(obs[task.by], task.by)
    obs = obs.copy()
    if data.cell_type and data.cell_type in obs.columns:
        types, _ = texts(obs[data.cell_type], data.cell_type)
        obs[CONTEXT] = [f"{one} {value}" for one, value in zip(types, values, strict=True)]
    else:
        obs[CONTEXT] = values.astype(str)
    return obs


def folds(task: Task, dataset: Dataset) -> list[Fold]:
    """The folds of a task, or of what is left of its cells.

    Args:
        task: the task.
        dataset: read with `task.config().data`.

    Raises:
        DataError: an unknown column, value or perturbation, or nothing to hold out.
    """
    if task.kind in BY_CONTEXT:
        return _by_value(task, dataset)
    labels = {
        str(label): int(n) for label, n in zip(*np.unique(_perturbed_labels(dataset), return_counts=True), strict=True)
    }
    cell = {str(label): i for i, label in enumerate(dataset.label)}
    parts = {label: {dataset.perturbations[m] for m in dataset.members[cell[label]] if m} for label in labels}
    if task.kind == "combinations":
        known = sorted(
            label for label, members in parts.items() if len(members) > 1 and labels[label] >= task.min_cells
        )
        what = "combination"
    else:
        known = sorted(
            {
                name
                for label, names in parts.items()
                for name in names
                if len(names) == 1 and labels[label] >= task.min_cells
            }
        )
        what = "perturbation"
    chosen = sorted(_named(task.values, known, f"{what}s with {task.min_cells} cells")) or known
    if len(chosen) < task.n_folds:
        raise DataError(f"there are {len(chosen)} {what}s for {task.n_folds} folds; lower task.folds or task.min_cells")
    order = noise.permutation(0, f"task.folds.{task.kind}", 0, len(chosen))
    found = []
    for index, some in enumerate(np.array_split(order, task.n_folds)):
        held = sorted(chosen[i] for i in some)
        if task.kind == "unseen":
            held = sorted(label for label, members in parts.items() if members & set(held))
        column = dataset.config.perturbation
        found.append(Fold(index, f"part {index + 1} of {task.n_folds}", tuple(f"{column}={label}" for label in held)))
    return found


def _by_value(task: Task, dataset: Dataset) -> list[Fold]:
    config, obs = dataset.config, dataset.obs
    if task.by not in obs.columns:
        raise DataError(f"task.by names column {task.by!r}; {nearest(task.by, obs.columns)}")
    column, _ = texts(obs[task.by], task.by)
    perturbed = ~dataset.is_control
    every = sorted({str(label) for label in dataset.label[perturbed]})
    labels = _named(task.perturbations, every, "perturbations") or every
    taken = perturbed & np.isin(dataset.label, labels)
    sizes = {str(value): int(np.sum(taken & (column == value))) for value in sorted(set(column))}
    enough = [value for value, n in sizes.items() if n >= task.min_cells]
    values = _named(task.values, list(sizes), f"values of {task.by}") or sorted(enough, key=lambda v: (-sizes[v], v))
    values = values[: task.largest] if task.largest else values
    if not values:
        raise DataError(f"no value of {task.by!r} has {task.min_cells} perturbed cells; lower task.min_cells")
    found = []
    for index, value in enumerate(values):
        if sizes[value] < task.min_cells:
            raise DataError(
                f"{task.by}={value} has {sizes[value]} perturbed cells, fewer than task.min_cells {task.min_cells}"
            )
        here = sorted({str(label) for label in dataset.label[taken & (column == value)]})
        held = tuple(f"{task.by}={value},{config.perturbation}={label}" for label in here)
        found.append(Fold(index, value, held))
    return found


def _perturbed_labels(dataset: Dataset) -> np.ndarray:
    return dataset.label[~dataset.is_control].astype(str)


def _named(values: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    for value in values:
        if value not in known:
            raise DataError(f"the task names {value!r}, which is not among the {what}; {nearest(value, known)}")
    return list(values)


def inner_task(task: Task) -> Task:
    """The task of the inner folds, over whatever conditions its data still hold."""
    assert task.inner is not None
    if task.kind in BY_CONTEXT:
        return replace(task, values=(), largest=task.inner.folds, inner=None)
    return replace(task, values=(), n_folds=task.inner.folds, inner=None)
