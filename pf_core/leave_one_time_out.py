"""Leave one time point out in turn: a run a time point and seed, judged beside the simple answers; resumable.

Below the output directory:

    plan.json                    what is run; a directory is continued by the same call only
    POINT/choice.json            pace, bend and reach chosen on inner points, and the scores they were chosen by
    POINT/inner/...              the inner scores; their run directories are removed
    POINT/seed-0/                a run directory like any other
    task.json, task.md, task.svg

These settings belong to the prediction and not to the training, so all candidates are judged on the same inner runs. An
inner run gets a data set from which the cells of the outer time point have been removed, so it cannot see them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pf_core import data, flow_fit, metrics, times
from pf_core.baselines import Declined
from pf_core.checkpoint import MANIFEST, Run, write_atomic
from pf_core.config import Config
from pf_core.dataset import Dataset
from pf_core.errors import ConfigError, DataError, RunError
from pf_core.flow_model import FlowModel
from pf_core.model import read_config
from pf_core.task_report import Result, Score, write
from pf_core.task_run import cells_of, keep_plan, scores_of
from pf_core.time_baselines import gap
from pf_core.times import Course

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["CANDIDATES", "leave_one_time_out"]

CANDIDATES: tuple[dict[str, Any], ...] = tuple(
    {"flow.pace": pace, "flow.bend": bend, "flow.reach": reach}
    for pace, bend, reach in itertools.product((0.0, 0.5, 1.0), (0.0, 1.0), (0.0, 0.25, 0.5, 1.0))
)
FEWEST_INNER = 2  # time points; with fewer, the configured settings are taken


def leave_one_time_out(
    source: Any,
    config: Config,
    *,
    name: str,
    out: str | Path,
    seeds: Sequence[int] = (0, 1, 2),
    points: Sequence[str] | None = None,
    inner: bool = False,
    network: str | Path | None = None,
    backend: str = "jax",
    device: str = "cpu",
    min_cells: int = 20,
    console: Console | None = None,
) -> Result:
    """Train without each middle time point in turn, judge every run, and write the table, the plot and the JSON.

    Args:
        source: AnnData, or a path.
        config: settings of system "flow"; its seed and holdout are replaced.
        name: of the result.
        out: directory of the results; one of the same call is continued, and what is complete is not run again.
        seeds: of the trainings; more can be added later.
        points: names of the time points; all but the first and the last by default.
        inner: choose pace, bend and reach of every time point on the others: each inner time point is left out once
            more, with the first seed.
        network: CSV of regulatory edges.
        backend, device: as in fit_flow.
        min_cells: a condition with fewer held-out cells is not judged.
        console: where progress and the table are printed.

    Returns:
        Every score; a fold is a time point.

    Raises:
        ConfigError: settings or time points that do not exist.
        DataError: the data cannot be used, or have no time point between two others.
        RunError: `out` belongs to another call.
    """
    if config.flow.bins:
        raise ConfigError(f"flow.bins is {config.flow.bins}, and bins have no name to hold out; use data.timepoint")
    dataset = data.load(source, config.data, contrasts=False)
    course = times.read(dataset, config)
    middle = course.names[1:-1]
    chosen = tuple(points) if points is not None else middle
    for point in chosen:
        if point not in middle:
            raise ConfigError(f"{point!r} is no time point between two others; there are {', '.join(middle) or 'none'}")
    if not chosen:
        raise DataError(f"there are {len(course.names)} time points; one between two others is wanted")
    out = Path(out)
    column = config.data.timepoint or config.data.time
    plan = {"name": name, "config": config.to_toml(), "inner": inner, "backend": backend, "data": dataset.fingerprint()}
    keep_plan(out, plan | {"network": str(network) if network is not None else None})
    options: dict[str, Any] = {"network": network, "backend": backend, "device": device}
    scores: list[Score] = []
    folds: list[dict[str, Any]] = []
    for number, point in enumerate(chosen, 1):
        folder = out / _file(point)
        settings = dataclasses.replace(config, data=dataclasses.replace(config.data, holdout=(f"{column}={point}",)))
        choice = _choose(dataset, course, settings, point, seeds[0], folder, options, console) if inner else None
        if choice:
            settings = _with(settings, choice["chosen"])
        audits = []
        for seed in seeds:
            _say(console, f"{name}: {point} left out, seed {seed}")
            run = _train(source, dataclasses.replace(settings, seed=seed), folder / f"seed-{seed}", options)
            audits.append(run.read_json("data.json")["audit"])
            scores += scores_of(run.read_json("metrics.json")["metrics"], number, seed, min_cells)
        folds.append({"fold": number, "name": point, "audit": audits, "choice": choice})
    task = {"kind": "leave one time point out", "column": column, "config": config.to_toml(), "inner": inner}
    result = Result(name, task, backend, list(seeds), folds, scores)
    write(out, result, console)
    return result


def _say(console: Console | None, text: str) -> None:
    if console is not None:
        console.print(text, highlight=False, markup=False)


def _file(point: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-.+" else "_" for letter in point)


def _with(config: Config, settings: dict[str, Any]) -> Config:
    flow = {key.removeprefix("flow."): value for key, value in settings.items()}
    return dataclasses.replace(config, flow=dataclasses.replace(config.flow, **flow))


def _train(source: Any, config: Config, path: Path, options: dict[str, Any]) -> Run:
    """A finished and judged run, trained, continued or found."""
    if not (path / MANIFEST).exists():
        flow_fit.fit_flow(source, out=path, config=config, **options)
    else:
        found = Run.open(path)
        if read_config(found) != config:
            raise RunError(f"{path} was trained with other settings; choose another --out")
        if not found.has("metrics.json"):
            rest = {key: value for key, value in options.items() if key != "network"}
            flow_fit.resume_flow(path, source=source, **rest)
    return Run.open(path)


# --- inner points -------------------------------------------------------------------------------------------------
def _choose(
    dataset: Dataset,
    course: Course,
    config: Config,
    point: str,
    seed: int,
    folder: Path,
    options: dict[str, Any],
    console: Console | None,
) -> dict[str, Any] | None:
    """Pace, bend and reach with the least mean energy distance over inner time points; None where there are too few."""
    remaining = [name for name in course.names if name != point]
    within = remaining[1:-1]
    if len(within) < FEWEST_INNER:
        return None
    path = folder / "choice.json"
    if path.exists():
        return json.loads(path.read_text())
    kept = np.flatnonzero(course.index != course.names.index(point))
    source = cells_of(dataset, kept)
    (folder / "inner").mkdir(parents=True, exist_ok=True)
    values: dict[str, list[float]] = {}
    for one in within:
        _say(console, f"{point} left out: inner time point {one}")
        written = folder / "inner" / f"{_file(one)}.json"
        if not written.exists():
            column = config.data.timepoint or config.data.time
            inside = dataclasses.replace(config.data, holdout=(f"{column}={one}",))
            settings = dataclasses.replace(config, seed=seed, data=inside)
            run = written.with_suffix("")
            _train(source, settings, run, options)
            found = candidate_scores(run, source, options["backend"], options["device"])
            write_atomic(written, json.dumps(found) + "\n")
            shutil.rmtree(run)
        values[one] = json.loads(written.read_text())
    means = np.mean(list(values.values()), axis=0)
    best = int(np.argmin(np.where(np.isfinite(means), means, np.inf)))
    choice = {
        "chosen": CANDIDATES[best],
        "seed": seed,
        "points": values,
        "candidates": [
            {"settings": settings, "mean": float(mean)} for settings, mean in zip(CANDIDATES, means, strict=True)
        ],
        "cells": {"inner": len(kept), "outer": dataset.n_cells - len(kept)},
    }
    write_atomic(path, json.dumps(choice, indent=1) + "\n")
    return choice


def candidate_scores(path: Path, source: Any, backend: str, device: str) -> list[float]:
    """Mean energy distance (U, 20 principal components) of every candidate on the held-out cells of a run."""
    run, _, dataset, split, course = flow_fit.reopen(path, source)
    model = FlowModel.load(run.path, backend=backend, device=device)
    ruler = metrics.real_pca(dataset.rows(np.arange(dataset.n_cells)))
    seen = np.union1d(split.train, split.validation)
    found = {(one.label, one.tissue): one for one in times.series(dataset, course, seen)}
    keys = sorted({(str(dataset.label[i]), str(dataset.tissue[i]), int(course.index[i])) for i in split.heldout})
    values: list[list[float]] = []
    for label, tissue, index in keys:
        here = (dataset.label == label) & (dataset.tissue == tissue) & (course.index == index)
        real = ruler.transform(dataset.rows(split.heldout[here[split.heldout]]))
        series = found.get((label, tissue))
        if series is None or len(real) < 2 or isinstance(gap(series, float(course.points[index])).sides, Declined):
            continue
        hole, name = gap(series, float(course.points[index])), f"{label}/{tissue}/{course.names[index]}"
        row = []
        for candidate in CANDIDATES:
            moved = model.interpolate(
                dataset,
                hole,
                seed=model.config.seed,
                name=name,
                **{key.removeprefix("flow."): value for key, value in candidate.items()},
            )
            assert not isinstance(moved, Declined)
            row.append(metrics.energy_distance(ruler.transform(moved.counts), real))
        values.append(row)
    if not values:
        raise DataError(f"{path} holds out nothing between two time points")
    return np.mean(values, axis=0).tolist()
