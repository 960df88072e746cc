"""The judgement of a flow run: held-out time points predicted from their neighbours, beside the simple answers.

All methods are measured on the same principal components of all measured cells (a ruler, not a model), on log1p of
counts per 10,000, by the energy distance's U-statistic.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from pf_core import flow_report, metrics, noise, times
from pf_core.baselines import Declined
from pf_core.ceiling import resample
from pf_core.config import Output
from pf_core.data import Dataset
from pf_core.errors import PredictionError
from pf_core.metrics import PCA
from pf_core.outputs import Csr
from pf_core.report import HeldOutCells, render
from pf_core.splits import Split
from pf_core.time_baselines import Gap, closeness, gap, mixed, ot_interpolation
from pf_core.times import Course, Point
from pf_core.verdict import Condition, MetricRow, metrics_json, print_metrics

if TYPE_CHECKING:
    from rich.console import Console

    from pf_core.flow_model import FlowModel, Sides

__all__ = ["MODEL", "Judged", "evaluate", "judge_run"]

Kind = Literal["model", "baseline", "reference"]

MAX_CELLS = 2000  # per side and time point, chosen by a named draw: distances are quadratic in it
MAX_PLAN_CELLS = 1000  # of a side of the coupling of the OT interpolation
MAX_PCA_CELLS = 20_000
CEILING_REPEATS = 10  # splits of the real cells into halves
MODEL = "flow"
PREVIOUS, NEXT = "previous point", "next point"
MIXTURE = "mixture of neighbours"
INTERPOLATION = "OT interpolation"
ALONG = "mixture along the course"  # of the flow's pace and bend, with cells that stay where they are
HALVES = "real cells, half against half"


@dataclass(frozen=True)
class Judged:
    """One held-out time point: its scores, and the cells in the plane of the first two components."""

    condition: Condition
    rows: tuple[MetricRow, ...]
    neighbours: np.ndarray  # (n, 2)
    real: np.ndarray  # (n, 2)
    predicted: np.ndarray | None  # (n, 2); None where the model declined


def judge_run(
    model: FlowModel,
    dataset: Dataset,
    course: Course,
    split: Split,
    *,
    output: Output = "transport",
    console: Console | None = None,
) -> list[Judged]:
    """Judge a flow on the held-out time points of its own run and write metrics.json and report.html.

    Args:
        model: a trained flow model; its run receives the files.
        dataset: with the model's genes.
        course: its times.
        split: the run's split.
        output: how the model's means become cells.
        console: where the table is printed.
    """
    seen = np.union1d(split.train, split.validation)
    ruler, judged = evaluate(model, dataset, course, seen, split.heldout, output=output, seed=model.config.seed)
    rows = tuple(row for one in judged for row in one.rows)
    share = tuple(float(part) for part in ruler.share[:2])
    report = flow_report.payload(
        model.run,
        model.config,
        model.backend,
        metrics=rows,
        cells=tuple(
            HeldOutCells(one.condition, one.neighbours, one.real, one.predicted)
            for one in judged
            if one.predicted is not None
        ),
        explained=(share[0], share[1]) if len(share) > 1 else None,
        facts={"output": output},
    )
    model.run.write("metrics.json", json.dumps(metrics_json(rows), indent=1) + "\n")
    model.run.write("report.html", render(report))
    model.run.commit()
    if console is not None:
        print_metrics(console, rows)
    return judged


def evaluate(
    model: FlowModel,
    dataset: Dataset,
    course: Course,
    seen: np.ndarray,
    heldout: np.ndarray,
    *,
    output: Output = "transport",
    seed: int = 0,
) -> tuple[PCA, list[Judged]]:
    """Judge every condition, tissue and time point among the held-out cells.

    Args:
        model: a trained flow model.
        dataset: with the model's genes.
        course: its times.
        seen: indices of the cells training has seen; the model and every baseline start from these alone.
        heldout: indices of the cells to be predicted.
        output: how the model's means become cells.
        seed: of the draws.

    Returns:
        The principal components that all were measured in, and one entry per (label, tissue, time point).
    """
    ruler = metrics.real_pca(dataset.rows(_some(np.arange(dataset.n_cells), MAX_PCA_CELLS, seed, "pca")))
    known = {(one.label, one.tissue): one for one in times.series(dataset, course, seen)}
    keys = sorted({(str(dataset.label[i]), str(dataset.tissue[i]), int(course.index[i])) for i in heldout})
    found = []
    for label, tissue, point in keys:
        here = (dataset.label == label) & (dataset.tissue == tissue) & (course.index == point)
        name = f"{label}/{tissue}/{course.names[point]}"
        cells = _some(heldout[here[heldout]], MAX_CELLS, seed, f"{name}.real")
        condition = Condition(label, tissue, "", len(cells), course.shown(point))
        series, time = known.get((label, tissue)), float(course.points[point])
        hole = gap(series, time) if series else Gap(label, tissue, time, None, None)
        found.append(_judge(model, dataset, condition, hole, cells, name, ruler, output=output, seed=seed))
    return ruler, found


def _some(cells: np.ndarray, most: int, seed: int, name: str) -> np.ndarray:
    if len(cells) <= most:
        return cells
    return np.sort(noise.generator(seed, f"evaluation.{name}").permutation(cells)[:most])


def _judge(
    model: FlowModel,
    dataset: Dataset,
    condition: Condition,
    hole: Gap,
    cells: np.ndarray,
    name: str,
    ruler: PCA,
    *,
    output: Output,
    seed: int,
) -> Judged:
    real = metrics.normalise(dataset.rows(cells))
    found = answers(model, dataset, hole, name, ruler, output=output, seed=seed)
    side = hole.before or hole.after
    # Changes of the mean are measured from the nearest point before, as by someone who knows the past.
    origin = real if side is None else metrics.normalise(dataset.rows(side.cells))
    rows = [
        MetricRow(condition, method, kind=kind, declined=cells_.reason)
        if isinstance(cells_, Declined)
        else MetricRow(condition, method, metrics.score_normalised(real, cells_, origin, ruler), kind)
        for method, kind, cells_ in found
    ]
    if len(cells) >= 4:
        rows.append(MetricRow(condition, HALVES, _halves(real, origin, ruler, seed=seed, name=name), "reference"))
    places = {method: ruler.project(cells_)[:, :2] for method, _, cells_ in found if not isinstance(cells_, Declined)}
    nowhere = np.empty((0, 2))
    neighbours = np.concatenate([places.get(method, nowhere) for method in (PREVIOUS, NEXT)])
    return Judged(condition, tuple(rows), neighbours, ruler.project(real)[:, :2], places.get(MODEL))


def answers(
    model: FlowModel, dataset: Dataset, hole: Gap, name: str, ruler: PCA, *, output: Output, seed: int
) -> list[tuple[str, Kind, Csr | Declined]]:
    """What every method says of an unseen time point: log-normalised cells (n, n_genes), or why there are none."""

    def moved(sides: Sides, reach: float | None = None) -> Csr | Declined:
        try:
            cells = model.interpolate(dataset, hole, sides=sides, output=output, seed=seed, name=name, reach=reach)
        except PredictionError as error:
            return Declined(str(error))
        return cells if isinstance(cells, Declined) else metrics.normalise(cells.counts)

    def plain(side: Point | None, method: str) -> Csr | Declined:
        if side is None:
            return Declined(f"there is no {'earlier' if method == PREVIOUS else 'later'} time point")
        return metrics.normalise(dataset.rows(_some(side.cells, MAX_CELLS, seed, f"{name}.{method}")))

    both = hole.sides
    mixture, coupled = both, both
    if not isinstance(both, Declined):
        share = closeness(both[0].time, hole.time, both[1].time)
        chosen = mixed(both[0].cells, both[1].cells, share, seed=seed, name=name, most=MAX_CELLS)
        mixture = metrics.normalise(dataset.rows(np.concatenate(chosen)))
        before, after = (metrics.normalise(dataset.rows(side.cells)) for side in both)
        coupled = ot_interpolation(
            before, after, ruler.project(before), ruler.project(after), share, seed=seed, name=name, most=MAX_PLAN_CELLS
        )
    return [
        (MODEL, "model", moved("both")),
        (PREVIOUS, "baseline", plain(hole.before, PREVIOUS)),
        (NEXT, "baseline", plain(hole.after, NEXT)),
        (INTERPOLATION, "baseline", coupled),
        (MIXTURE, "baseline", mixture),
        (ALONG, "reference", moved("both", reach=0.0)),
        ("flow from the previous point alone", "reference", moved("previous")),
        ("flow from the next point alone", "reference", moved("next")),
    ]


def _halves(real: Csr, origin: Csr, ruler: PCA, *, seed: int, name: str) -> dict[str, float]:
    """The ceiling: every metric between disjoint halves of the real cells, mean over CEILING_REPEATS splits."""
    splits = (resample(real.shape[0], seed=seed, name=f"evaluation.{name}", index=i) for i in range(CEILING_REPEATS))
    found = [metrics.score_normalised(real[first], real[second], origin, ruler) for first, second in splits]
    return {key: float(np.mean([values[key] for values in found])) for key in found[0]}
