"""From a file of cells to cells at other times: who starts, who moves, and the AnnData that comes out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pf_core import data, genes, noise, times
from pf_core.baselines import Declined
from pf_core.config import Output
from pf_core.data import Dataset
from pf_core.errors import PredictionError, RunError, nearest
from pf_core.flow_model import FlowModel, Method, Moved, Sides
from pf_core.labels import CONTROL, condition_label, texts
from pf_core.time_baselines import gap
from pf_core.times import Course, Series

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Cells", "Way", "cells", "counterfactual", "starting", "to_anndata", "trajectory"]


@dataclass(frozen=True)
class Cells:
    """Measured cells with the model's genes, and when they were measured."""

    dataset: Dataset
    course: Course
    missing: int  # genes of the model that the source lacks; they count as 0


@dataclass(frozen=True)
class Way:
    """Cells at several times: the same on their way from one time, or those of the measured points around each."""

    condition: str
    times: np.ndarray  # (n_times,) real units, in the order asked for
    points: tuple[Moved, ...]
    from_time: float | None  # None where cells come from the measured points on both sides


def cells(model: FlowModel, source: Any = None, *, heldout: bool = True) -> Cells:
    """Measured cells: read, aligned to the model's genes, with their times.

    Args:
        model: a trained flow model.
        source: AnnData or a path; by default the data of the run.
        heldout: whether cells that the run held out are among them; of the run's own data only.

    Raises:
        DataError: the data cannot be used.
        RunError: the data of the run have moved, changed, or were an AnnData object.
    """
    own = source is None
    dataset = data.load(own_source(model) if own else source, model.config.data, training=False)
    if own:
        if dataset.fingerprint() != model.run.read_json("data.json")["fingerprint"]:
            raise RunError(f"the data are not those that {model.run.path} was trained on; name the file with --data")
        if not heldout:
            away = model.run.read_arrays("split.safetensors")["heldout"]
            dataset = dataset.select_cells(np.setdiff1d(np.arange(dataset.n_cells), away))
    dataset, report = genes.align_genes(dataset, model.vocabulary.genes)
    return Cells(dataset, times.read(dataset, model.config, least=1), len(report["missing"]))


def own_source(model: FlowModel) -> Path:
    """The file that a run was trained on.

    Raises:
        RunError: it has moved, or was an AnnData object.
    """
    recorded = model.run.read_json("data.json")["source"]
    path = None if recorded is None else model.run.path / recorded
    if path is None or not path.exists():
        where = "an AnnData object" if path is None else f"{path}, which is not there any more"
        raise RunError(f"{model.run.path} was trained on {where}; name the file with --data")
    return path


def starting(
    model: FlowModel,
    found: Cells,
    start: str | float,
    condition: str,
    *,
    tissue: str | None = None,
    keep: Mapping[str, str] | None = None,
    most: int | None = None,
) -> tuple[float, np.ndarray]:
    """A time point and its cells of a condition; where the condition has none there, the control cells.

    Args:
        model: a trained flow model.
        found: from `cells`.
        start: name of a time point, or its time in real units.
        condition: of the cells.
        tissue: only cells of this tissue.
        keep: column -> value, only these cells.
        most: a draw of so many of them.

    Raises:
        PredictionError: no such time point, column or value, or no cell is left.
    """
    dataset, course = found.dataset, found.course
    point = _point(course, start)
    here = (course.index == point) & _kept(model, dataset, tissue, keep)
    label = condition_label(model.members(condition), model.config.data.separator)
    for one in (label, CONTROL):
        chosen = np.flatnonzero(here & (dataset.label == one))
        if len(chosen):
            return float(course.points[point]), _some(chosen, most)
    raise PredictionError(
        f"no cell at {course.shown(point)} is {label!r} or control, with the columns that were asked for; start at"
        " another time point, or ask for less"
    )


def _point(course: Course, wanted: str | float) -> int:
    """Index of a time point by its name or its time."""
    if str(wanted) in course.names:
        return course.names.index(str(wanted))
    try:
        near = np.flatnonzero(np.isclose(course.points, float(wanted), rtol=1e-6, atol=0.0))
    except ValueError:
        near = np.empty(0, int)
    if len(near):
        return int(near[0])
    shown = ", ".join(course.shown(point) for point in range(len(course.points)))
    raise PredictionError(f"no cell was measured at time {wanted}; measured are {shown}")


def _kept(model: FlowModel, dataset: Dataset, tissue: str | None, keep: Mapping[str, str] | None) -> np.ndarray:
    mask = np.ones(dataset.n_cells, bool)
    if tissue is not None:
        model.code(CONTROL, tissue)  # refuses a tissue that the model does not know
        mask &= dataset.tissue == tissue
    for column, value in (keep or {}).items():
        if column not in dataset.obs:
            raise PredictionError(f"column {column!r} is not in obs; {nearest(column, list(dataset.obs))}")
        labels, _ = texts(dataset.obs[column], column)
        if value not in labels:
            raise PredictionError(f"no cell has {column}={value}; {nearest(value, sorted(set(labels)))}")
        mask &= labels == value
    return mask


def _some(chosen: np.ndarray, most: int | None) -> np.ndarray:
    if most is None or len(chosen) <= most:
        return chosen
    return np.sort(noise.generator(0, "trajectory.start").permutation(chosen)[:most])


def trajectory(
    model: FlowModel,
    found: Cells,
    condition: str,
    at: Sequence[float],
    *,
    start: str | float | None = None,
    tissue: str | None = None,
    keep: Mapping[str, str] | None = None,
    most: int | None = None,
    sides: Sides = "both",
    output: Output = "transport",
    seed: int = 0,
    method: Method = "rk4",
) -> Way:
    """Cells of a condition at several times.

    Args:
        model: a trained flow model.
        found: from `cells`.
        condition: under which cells move.
        at: times, real units.
        start: the time point from which the same cells are followed, forward and backward. None takes, at every time,
            the cells of the measured points next to it (`FlowModel.interpolate`); at a measured time, its own cells.
        tissue, keep, most: which cells, see `starting`; most counts cells of `start` only.
        sides: without a start, "both" neighbours or one of them.
        output: how decoded means become cells.
        seed: of the draws.
        method: of integration.

    Raises:
        PredictionError: times outside the trained range, or names that the model or the data do not know.
    """
    model.scaled(at)
    if start is not None:
        begin, chosen = starting(model, found, start, condition, tissue=tissue, keep=keep, most=most)
        return follow(model, found, chosen, begin, at, condition, output=output, seed=seed, method=method)
    kept = np.flatnonzero(_kept(model, found.dataset, tissue, keep))
    label = condition_label(model.members(condition), model.config.data.separator)
    known = [one for one in times.series(found.dataset, found.course, kept) if one.label == label]
    if not known:
        there = sorted(set(map(str, found.dataset.label[kept])))
        raise PredictionError(f"no cell of condition {label!r} is left to start from; {nearest(label, there)}")
    options: dict[str, Any] = {"sides": sides, "output": output, "seed": seed, "method": method}
    points = [_joined([_between(model, found.dataset, one, time, options) for one in known]) for time in at]
    return Way(condition, np.asarray(at, np.float64), tuple(points), None)


def follow(
    model: FlowModel,
    found: Cells,
    chosen: np.ndarray,
    begin: float,
    at: Sequence[float],
    condition: str,
    *,
    output: Output = "transport",
    seed: int = 0,
    method: Method = "rk4",
) -> Way:
    """The same cells at several times, on their way from one."""
    dataset = found.dataset
    z0, latents = model.encode(dataset, chosen), model.move(dataset, chosen, begin, at, condition, method=method)
    came = np.full(len(chosen), begin)
    points = [
        Moved(chosen, came, z0, z1, model.predicted(dataset, chosen, z0, z1, output=output, seed=seed, name=""))
        for z1 in latents
    ]
    return Way(condition, np.asarray(at, np.float64), tuple(points), begin)


def counterfactual(
    model: FlowModel, found: Cells, first: str, second: str, at: Sequence[float], *, start: str | float, **options: Any
) -> tuple[Way, Way]:
    """The same cells with the same draws under two conditions: those of the first at the time point `start`."""
    one = trajectory(model, found, first, at, start=start, **options)
    assert one.from_time is not None
    rest = {name: options[name] for name in ("output", "seed", "method") if name in options}
    return one, follow(model, found, one.points[0].cells, one.from_time, at, second, **rest)


def _between(model: FlowModel, dataset: Dataset, series: Series, time: float, options: dict[str, Any]) -> Moved:
    """Cells of one series at one time."""
    for point in series.points:
        if math.isclose(point.time, time, rel_tol=1e-9):
            z = model.encode(dataset, point.cells)
            return Moved(point.cells, np.full(len(z), point.time), z, z, dataset.rows(point.cells))
    answer = model.interpolate(dataset, gap(series, time), name=f"{series.label}/{series.tissue}/{time:g}", **options)
    if isinstance(answer, Declined):
        raise PredictionError(
            f"{series.label!r} in tissue {series.tissue!r} at {model.time(time)}: {answer.reason}; measured are"
            f" {', '.join(model.time(point.time) for point in series.points)}"
        )
    return answer


def _joined(parts: Sequence[Moved]) -> Moved:
    from scipy import sparse

    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("cells", "start", "z0", "z1")}
    return Moved(**arrays, counts=sparse.csr_matrix(sparse.vstack([part.counts for part in parts])))


def to_anndata(model: FlowModel, found: Cells, way: Way) -> AnnData:
    """One row per time and cell: counts in X, times in obs, latents there and at the start in obsm."""
    import anndata
    import pandas as pd
    from scipy import sparse

    columns = model.config.data
    frames = []
    for time, point in zip(way.times, way.points, strict=True):
        frame = found.dataset.obs.iloc[point.cells].drop(columns=[columns.timepoint], errors="ignore").copy()
        frame[columns.perturbation] = way.condition
        frame[columns.time], frame["from_time"], frame["from_cell"] = float(time), point.start, list(frame.index)
        frame.index = [f"{name}-t{time:g}" for name in frame.index]
        frames.append(frame)
    counts = sparse.csr_matrix(sparse.vstack([point.counts for point in way.points]))
    var = pd.DataFrame(index=pd.Index(model.vocabulary.genes))
    adata = anndata.AnnData(counts, obs=pd.concat(frames), var=var)
    adata.obsm["X_latent"] = np.concatenate([point.z1 for point in way.points])
    adata.obsm["X_start_latent"] = np.concatenate([point.z0 for point in way.points])
    adata.uns["pf"] = {"condition": way.condition, "n_genes_missing": found.missing}
    if way.from_time is not None:
        adata.uns["pf"]["from_time"] = way.from_time
    return adata
