"""Running a task: one training a fold and seed, settings chosen on inner folds, scores gathered; resumable.

Below the output directory:

    plan.json                    what is run; a directory is continued by the same task only
    fold-1/choice.json           the settings chosen on inner folds, and the scores they were chosen by
    fold-1/inner/...             scores of the inner trainings, whose run directories are removed
    fold-1/seed-0/               a run directory like any other
    task.json, task.md, task.svg

Inner trainings get a data set from which the cells of the outer fold have been removed, so they cannot see them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pf_core import data as data_layer
from pf_core import fit, splits
from pf_core.checkpoint import MANIFEST, Run, write_atomic
from pf_core.config import Config
from pf_core.data import Dataset
from pf_core.errors import ConfigError, DataError, RunError
from pf_core.model import read_config
from pf_core.task_report import Result, Score, write
from pf_core.tasks import CONTEXT, Fold, Task, inner_task, with_context
from pf_core.tasks import folds as folds_of
from pf_core.verdict import DECIDING_METRIC

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Finished", "finished", "run"]


@dataclass(frozen=True)
class Bench:
    """What every training of a task shares."""

    task: Task
    dataset: Dataset
    source: Any  # path or AnnData
    features: Path | None
    backend: str
    device: str
    console: Console | None

    def say(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False)


def run(
    task: Task,
    *,
    out: str | Path,
    data: str | Path | None = None,
    backend: str = "jax",
    device: str = "cpu",
    seeds: int | None = None,
    folds: Sequence[int] | None = None,
    console: Console | None = None,
) -> Result:
    """Run a task, or go on with it, and write its table, plot and JSON.

    Args:
        task: from `pf_core.tasks.load`.
        out: directory of the results; one of the same task is continued, and what is complete is not run again.
        data: folder of the data, where it is not that of the task file.
        backend, device: as in Model.train.
        seeds: only the first so many of the task's seeds.
        folds: only these folds, counted from 1.
        console: where progress and the table are printed.

    Returns:
        Every score, and what follows from them.

    Raises:
        ConfigError, DataError: the task and the data do not go together; nothing has been trained then.
        RunError: `out` belongs to another task.
    """
    if seeds is not None and not 1 <= seeds <= len(task.seeds):
        raise ConfigError(f"{seeds} seeds were asked for, but the task has {len(task.seeds)}; name more in task.seeds")
    chosen_seeds = task.seeds[: seeds or len(task.seeds)]
    bench = _bench(task, data, backend, device, console)
    every = folds_of(task, bench.dataset)
    numbers = sorted(set(range(1, len(every) + 1) if folds is None else folds))
    if not numbers or not 1 <= numbers[0] <= numbers[-1] <= len(every):
        raise ConfigError(f"folds {list(folds or ())} were asked for; the task has folds 1 to {len(every)}")
    chosen = [every[number - 1] for number in numbers]
    for fold in chosen:
        _check_fold(bench, fold)
    out = Path(out)
    _plan(out, bench)
    scores: list[Score] = []
    facts: list[dict[str, Any]] = []
    for fold in chosen:
        folder = out / f"fold-{fold.index + 1}"
        folder.mkdir(exist_ok=True)
        choice = _choose(bench, fold, folder) if task.inner else None
        settings = choice["chosen"] if choice else {}
        audits = []
        for seed in chosen_seeds:
            bench.say(f"fold {fold.index + 1} of {len(every)} ({fold.name}), seed {seed}")
            config = _config(task, fold, seed, settings)
            done = _train(bench, config, folder / f"seed-{seed}", bench.source)
            audits.append(done.read_json("data.json")["audit"])
            scores += scores_of(done.read_json("metrics.json")["metrics"], fold.index + 1, seed, task.min_cells)
        facts.append(
            {
                "fold": fold.index + 1,
                "name": fold.name,
                "holdout": list(fold.holdout),
                "audit": audits,
                "choice": choice,
            }
        )
    result = Result(task.name, task.described(), backend, list(chosen_seeds), facts, scores)
    write(out, result, console)
    return result


@dataclass(frozen=True)
class Finished:
    """One training of a task that was run, with its data and its split; `path` is the run directory."""

    fold: Fold
    seed: int
    path: Path
    dataset: Dataset
    split: splits.Split


def finished(task: Task, *, out: str | Path, data: str | Path | None = None) -> Iterator[Finished]:
    """The trainings of a task that `run` has finished below `out`, by fold and seed.

    Args:
        task, out, data: as for `run`.

    Raises:
        RunError: there is none.
    """
    bench = _bench(task, data, "jax", "cpu", None)
    some = False
    for fold in folds_of(task, bench.dataset):
        for seed in task.seeds:
            path = Path(out) / f"fold-{fold.index + 1}" / f"seed-{seed}"
            if not (path / "metrics.json").exists():
                continue
            some = True
            _, _, dataset, split = fit.reopen(path, bench.source)
            yield Finished(fold, seed, path, dataset, split)
    if not some:
        raise RunError(f"{out} holds no finished training of {task.name}; run pf evaluate --task first")


# --- what is run --------------------------------------------------------------------------------------------------
def _bench(task: Task, folder: str | Path | None, backend: str, device: str, console: Console | None) -> Bench:
    root = Path(folder) if folder is not None else task.folder
    path = root / task.data
    if not path.exists():
        raise DataError(f"there is no {task.data} in {root}; give the folder that holds it (--data)")
    features = root / task.features if task.features else None
    if features is not None and not features.exists():
        features = task.folder / task.features
    if features is not None and not features.exists():
        raise DataError(f"there is no {task.features} in {root} or beside the task file")
    config = task.config()
    source: Any = path
    if config.data.cell_type == CONTEXT:
        cell_type = task.train.get("data", {}).get("cell_type", Config().data.cell_type)
        plain = dataclasses.replace(config.data, cell_type=cell_type)
        dataset = data_layer.load(path, plain, training=False)
        source = cells_of(dataset, np.arange(dataset.n_cells), with_context(dataset.obs, task, plain))
    dataset = data_layer.load(source, config.data)
    return Bench(task, dataset, source, features, backend, device, console)


def cells_of(dataset: Dataset, cells: np.ndarray, obs: Any = None) -> Any:
    """AnnData of some cells, as read."""
    import anndata
    import pandas as pd

    obs = (dataset.obs if obs is None else obs).iloc[cells].copy()
    obs.index = pd.Index(dataset.cells[cells].astype(str))
    adata = anndata.AnnData(dataset.rows(cells), obs=obs, var=pd.DataFrame(index=pd.Index(dataset.genes.astype(str))))
    if dataset.config.layer and dataset.config.layer != "X":
        adata.layers[dataset.config.layer] = adata.X
    return adata


def _config(task: Task, fold: Fold, seed: int, settings: dict[str, Any]) -> Config:
    config = task.config(settings)
    return dataclasses.replace(config, seed=seed, data=dataclasses.replace(config.data, holdout=fold.holdout))


def _check_fold(bench: Bench, fold: Fold) -> None:
    """Every training of the fold has something to train on and its inner folds exist, before anything is trained."""
    task = bench.task
    try:
        split = splits.split(bench.dataset, _config(task, fold, task.seeds[0], {}).data, task.seeds[0])
    except DataError as error:
        raise DataError(f"fold {fold.index + 1} ({fold.name}): {error}") from None
    if task.inner is None:
        return
    try:
        inside = _inside(bench, split)
        for inner in folds_of(inner_task(task), inside):
            splits.split(inside, _config(task, inner, task.seeds[0], {}).data, task.seeds[0])
    except DataError as error:
        raise DataError(f"inner folds of fold {fold.index + 1} ({fold.name}): {error}; or leave [inner] out") from None


def _plan(out: Path, bench: Bench) -> None:
    plan = {
        "task": bench.task.described(),
        "backend": bench.backend,
        "data": bench.dataset.fingerprint(),
        "features": hashlib.sha256(bench.features.read_bytes()).hexdigest() if bench.features else None,
    }
    keep_plan(out, plan)


def keep_plan(out: Path, plan: dict[str, Any]) -> None:
    """Write what is run into `out`, or see that it is what was run there before.

    Raises:
        RunError: `out` belongs to another plan, or to something else.
    """
    text, path = json.dumps(plan, indent=1) + "\n", out / "plan.json"
    if path.exists():
        if path.read_text() != text:
            raise RunError(f"{out} holds other settings, other data or another backend; choose another --out")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(
            f"{out} exists and is not the output of the same call; nothing was written. Choose another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)


# --- trainings ----------------------------------------------------------------------------------------------------
def _train(bench: Bench, config: Config, path: Path, source: Any) -> Run:
    """A finished and judged run, trained, continued or found."""
    options: dict[str, Any] = {"backend": bench.backend, "device": bench.device}
    if not (path / MANIFEST).exists():
        fit.fit(source, out=path, config=config, features=bench.features, **options)
    else:
        found = Run.open(path)
        if read_config(found) != config:
            raise RunError(f"{path} was trained with other settings; choose another --out")
        if not found.has("metrics.json"):
            fit.resume(path, source=source, **options)
    return Run.open(path)


def scores_of(rows: Iterable[Mapping[str, Any]], fold: int, seed: int, min_cells: int) -> list[Score]:
    """The rows of a run's table, as metrics.json holds them, without conditions of few cells."""
    fixed = {"condition", "label", "tissue", "cell_type", "time", "cells", "method", "kind", "declined"}
    return [
        Score(
            fold=fold,
            seed=seed,
            condition=row["condition"],
            cells=row["cells"],
            method=row["method"],
            kind=row["kind"],
            declined=row["declined"],
            values={key: float("nan") if value is None else value for key, value in row.items() if key not in fixed},
        )
        for row in rows
        if row["cells"] >= min_cells
    ]


# --- inner folds --------------------------------------------------------------------------------------------------
def _inside(bench: Bench, split: splits.Split) -> Dataset:
    """The cells that training of the outer fold sees, as a data set of their own."""
    kept = np.sort(np.concatenate([split.train, split.validation]))
    return data_layer.load(cells_of(bench.dataset, kept), bench.dataset.config)


def _choose(bench: Bench, fold: Fold, folder: Path) -> dict[str, Any]:
    """The settings with the least mean energy distance over the inner folds, with the task's first seed."""
    path = folder / "choice.json"
    if path.exists():
        return json.loads(path.read_text())
    task, seed = bench.task, bench.task.seeds[0]
    assert task.inner is not None
    split = splits.split(bench.dataset, _config(task, fold, seed, {}).data, seed)
    inside = _inside(bench, split)
    shared = set(inside.cells) & set(bench.dataset.cells[split.heldout])
    if shared:
        raise RuntimeError(f"{len(shared)} cells of the outer fold are in its inner folds")
    source = cells_of(inside, np.arange(inside.n_cells))
    inner, candidates = folds_of(inner_task(task), inside), task.inner.candidates()
    (folder / "inner").mkdir(exist_ok=True)
    table = []
    for number, settings in enumerate(candidates):
        values = []
        for one in inner:
            bench.say(f"fold {fold.index + 1} ({fold.name}): inner fold {one.name}, {settings}")
            name = folder / "inner" / f"{number + 1}-{one.index + 1}"
            values.append(_inner_score(bench, _config(task, one, seed, settings), name, source, one, seed))
        table.append({"settings": settings, "values": values, "mean": float(np.mean(values))})
    best = min(range(len(table)), key=lambda row: (not np.isfinite(table[row]["mean"]), table[row]["mean"], row))
    if not np.isfinite(table[best]["mean"]):
        raise DataError(f"fold {fold.index + 1} ({fold.name}): no inner fold gave a finite energy distance")
    choice = {
        "chosen": candidates[best],
        "metric": DECIDING_METRIC,
        "seed": seed,
        "inner": [{"name": one.name, "holdout": list(one.holdout)} for one in inner],
        "candidates": table,
        "cells": {"inner": inside.n_cells, "outer": len(split.heldout), "shared": len(shared)},
    }
    write_atomic(path, json.dumps(choice, indent=1) + "\n")
    return choice


def _inner_score(bench: Bench, config: Config, path: Path, source: Any, fold: Fold, seed: int) -> float:
    """The model's mean energy distance in one inner fold; its run directory goes once the number is written."""
    written = path.with_suffix(".json")
    if not written.exists():
        table = _train(bench, config, path, source).read_json("metrics.json")["metrics"]
        rows = scores_of(table, fold.index + 1, seed, bench.task.min_cells)
        values = {s.condition: s.values.get(DECIDING_METRIC, float("nan")) for s in rows if s.kind == "model"}
        if not values:
            raise DataError(f"inner fold {fold.name} has no condition of {bench.task.min_cells} cells")
        write_atomic(written, json.dumps({"conditions": values, "mean": float(np.mean(list(values.values())))}) + "\n")
    if path.exists():
        shutil.rmtree(path)
    return float(json.loads(written.read_text())["mean"])
