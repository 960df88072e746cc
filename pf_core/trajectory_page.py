"""The page of a trajectory: where cells go, which genes change, the field they follow, what the end depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pf_core import metrics, noise, times, trajectory
from pf_core.errors import PredictionError, nearest
from pf_core.labels import condition_label
from pf_core.metrics import PCA
from pf_core.page import Drawing, Page, Section, Table, write
from pf_core.plots import shared_limits
from pf_core.sensitivity import Sensitivity, sensitivity
from pf_core.trajectory_plots import Curve, cells_by_time, field, gene_curve, ways
from pf_core.verdict import count, number

if TYPE_CHECKING:
    from anndata import AnnData

    from pf_core.flow_model import FlowModel
    from pf_core.trajectory import Cells, Way

__all__ = ["View", "predict_and_draw", "write_page"]

LINES = 60  # ways of single cells that are drawn
PANELS = 3  # times at which the field is drawn
GENES = 9  # curves, where no gene is named
PCA_CELLS = 20_000
SENSITIVE = 100  # cells whose derivatives are taken
ARROW = 0.16  # length of the longest arrow, of the width of the plane


@dataclass(frozen=True)
class View:
    """What the page is made of."""

    model: FlowModel
    cells: Cells  # the measured ones
    way: Way
    other: Way | None  # the same cells under another condition
    sensitivity: Sensitivity | None
    genes: tuple[str, ...] = ()  # asked for by name

    @property
    def label(self) -> str:
        """The condition of the way as the data name it."""
        return condition_label(self.model.members(self.way.condition), self.model.config.data.separator)


def write_page(path: Path, view: View, *, title: str, facts: dict[str, Any]) -> None:
    """Write the page as one HTML file."""
    ruler, points = plane(view)
    moved = [point.counts[_draw(point.counts.shape[0], 200)] for point in (view.way.points[0], view.way.points[-1])]
    limits = shared_limits([points, *(ruler.transform(counts) for counts in moved)])
    parts = [_where(view, ruler, points, limits), _genes(view), _field(view, ruler, points, limits)]
    if view.sensitivity is not None:
        parts.append(_sensitivity(view, view.sensitivity))
    footer = "Predicted cells are in the h5ad file beside this page; docs/flow.md says what each number means."
    write(path, Page(title, tuple(parts), facts, sentence(view), footer))


def predict_and_draw(
    model: FlowModel,
    source: Path | None,
    condition: str,
    at: Sequence[float],
    *,
    start: str | None,
    counterfactual: str | None,
    genes: tuple[str, ...],
    page: Path | None,
    options: Mapping[str, Any],
) -> AnnData:
    """What `pf trajectory` does: predicted cells as AnnData, and the page where one is asked for.

    Args:
        model: a trained flow model.
        source: file of cells; None for the data of the run.
        condition, at, start, options: as in `pf_core.trajectory.trajectory`.
        counterfactual: another condition for the same cells; with a start only.
        genes: that the page shows, and whose level at the end its sensitivities are of.
        page: HTML file to be written.
    """
    import anndata

    for gene in genes:
        if gene not in model.vocabulary.genes:
            raise PredictionError(f"gene {gene!r} is not one of the model; {nearest(gene, model.vocabulary.genes)}")
    found = trajectory.cells(model, source, heldout=start is not None)
    other = None
    if counterfactual is None or start is None:
        way = trajectory.trajectory(model, found, condition, at, start=start, **options)
    else:
        model.members(counterfactual)
        way, other = trajectory.counterfactual(model, found, condition, counterfactual, at, start=start, **options)
    if page is not None:
        sensitive = None
        if way.from_time is not None and way.times[-1] != way.from_time:
            cells = way.points[0].cells[_draw(len(way.points[0].cells), SENSITIVE)]
            ends = (way.from_time, float(way.times[-1]))
            sensitive = sensitivity(model, found.dataset, cells, *ends, condition, genes=genes)
        view = View(model, found, way, other, sensitive, genes)
        facts = {"run": model.run.path.resolve().name, "backend": model.backend.name, "condition": condition}
        facts |= {"counterfactual": counterfactual} if counterfactual else {}
        write_page(page, view, title=f"Trajectory of {condition}", facts=facts)
    adata = trajectory.to_anndata(model, found, way)
    if other is None:
        return adata
    pair = {condition: adata, str(counterfactual): trajectory.to_anndata(model, found, other)}
    return anndata.concat(pair, label="counterfactual", index_unique="-", merge="same", uns_merge="same")


def plane(view: View) -> tuple[PCA, np.ndarray]:
    """Principal components of the measured cells, and where these lie on the first two, (n_cells, 2)."""
    n = view.cells.dataset.n_cells
    some = np.sort(noise.permutation(0, "trajectory.pca", 0, n)[:PCA_CELLS])
    ruler = metrics.real_pca(view.cells.dataset.rows(some), n=2)
    return ruler, np.concatenate([ruler.transform(rows) for _, rows in view.cells.dataset.blocks()])


def sentence(view: View) -> str:
    """What happened, in one sentence."""
    way, model = view.way, view.model
    n = len(way.points[0].cells)
    who = "cells of the measured time points on both sides"
    if way.from_time is not None:
        who = f"{count(n, 'cell')} measured at {model.time(way.from_time)}"
    if len(way.times) < 2:
        return f"{model.time(way.times[0])}, {way.condition}: {who}, moved there."
    moved = f"{model.time(way.times[0])} to {model.time(way.times[-1])}, {way.condition}: {who}, moved there"
    changed = changes(view)
    names = [f"{model.vocabulary.genes[i]} ({_signed(changed[i])})" for i in np.argsort(-np.abs(changed))[:3]]
    return f"{moved}; genes that change most: {', '.join(names)}."


def changes(view: View) -> np.ndarray:
    """(n_genes,) change of the mean log1p counts per 10,000 of the predicted cells from the first time to the last."""
    first, last = (metrics.normalise(view.way.points[i].counts).mean(axis=0) for i in (0, -1))
    return np.asarray(last - first).ravel()


# --- sections -----------------------------------------------------------------------------------------------------
def _where(view: View, ruler: PCA, points: np.ndarray, limits: Any) -> Section:
    unit, days = view.model.axis.unit, view.cells.course.points[view.cells.course.index]
    span = (float(days.min()), float(days.max()))
    panels = [("measured cells", points, days)]
    for way in filter(None, (view.way, view.other)):
        some = [_draw(point.counts.shape[0], 40 + 900 // len(way.times)) for point in way.points]
        places = [ruler.transform(point.counts[rows]) for point, rows in zip(way.points, some, strict=True)]
        at = np.repeat(way.times, [len(rows) for rows in some])
        panels.append((f"predicted, {way.condition}", np.concatenate(places), at))
    figures = [Drawing(cells_by_time(panels, span, limits, unit), "Cells by time")]
    if view.way.from_time is not None and len(view.way.times) > 1:
        lines = [(way.condition, _lines(view, way, ruler)) for way in filter(None, (view.way, view.other))]
        figures.append(Drawing(ways(points, days, lines, limits, unit), "Ways of single cells"))
    texts = (
        "The plane is that of the first two principal components of all measured cells of the file (log1p of counts per"
        " 10,000). Predicted cells keep their own counts and are moved by the decoded change (count transport).",
        "A way starts at a measured cell and follows the change of its decoded mean; thick is the mean of the cells"
        " that are drawn.",
    )
    return Section("Where cells go", texts, tuple(figures), grid="")


def _draw(n: int, most: int) -> np.ndarray:
    return np.sort(noise.permutation(0, "trajectory.drawn", 0, n)[:most])


def _lines(view: View, way: Way, ruler: PCA) -> np.ndarray:
    """(n_lines, n_times, 2): measured cells, moved by the change of their decoded profiles."""
    start = way.points[0]
    rows = _draw(len(start.cells), LINES)
    model, cells = view.model, start.cells[rows]
    tissue = model.vocabulary.codes("tissues", view.cells.dataset.tissue[cells])
    latents = (start.z0, *(point.z1 for point in way.points))
    places = np.stack([model.log_profiles(z[rows], tissue) @ ruler.components.T for z in latents])
    begin = ruler.transform(view.cells.dataset.rows(cells))
    return (begin + places[1:] - places[0]).transpose(1, 0, 2)


def _genes(view: View) -> Section:
    way, unit = view.way, view.model.axis.unit
    names = np.asarray(view.model.vocabulary.genes)
    changed = changes(view)
    order = np.argsort(-np.abs(changed), kind="stable")
    chosen = [int(np.flatnonzero(names == gene)[0]) for gene in view.genes] or order[:GENES].tolist()
    figures = []
    if len(way.times) > 1:
        both = [one for one in (way, view.other) if one is not None]
        values = [[metrics.normalise(point.counts)[:, chosen].toarray() for point in one.points] for one in both]
        real = _measured(view, chosen)
        for place, gene in enumerate(chosen):
            curves = []
            for one, found in zip(both, values, strict=True):
                cells = [value[:, place] for value in found]
                low, high = np.array([np.quantile(value, [0.25, 0.75]) for value in cells]).T
                curves.append(Curve(one.condition, np.array([value.mean() for value in cells]), low, high))
            figures.append(Drawing(gene_curve(str(names[gene]), way.times, curves, real[place], unit)))
    ends = [np.asarray(metrics.normalise(way.points[i].counts).mean(axis=0)).ravel() for i in (0, -1)]
    rows = tuple((str(names[i]), float(ends[0][i]), float(ends[1][i]), float(changed[i])) for i in order[:20])
    columns = ("gene", f"at {view.model.time(way.times[0])}", f"at {view.model.time(way.times[-1])}", "change")
    legend = "Orange is the condition" + (", blue its counterfactual." if view.other else ".")
    texts = (
        f"Mean log1p counts per 10,000 of the predicted cells, with the quartiles of single cells. {legend} Circles are"
        " means of measured cells of the condition with their standard error, whether training has seen them or not.",
    )
    return Section(
        "Genes over time", texts, tuple(figures), (Table("Genes that change most", columns, rows),), "curves"
    )


def _measured(view: View, genes: Sequence[int]) -> list[list[tuple[float, float, float]]]:
    """Per gene (time, mean, standard error) of the measured cells of the condition, in the tissues of the way."""
    dataset, course = view.cells.dataset, view.cells.course
    tissues = set(dataset.tissue[np.concatenate([point.cells for point in view.way.points])].tolist())
    everyone = np.flatnonzero([tissue in tissues for tissue in dataset.tissue])
    points: dict[float, list[np.ndarray]] = {}
    for series in times.series(dataset, course, everyone):
        if series.label == view.label:
            for point in series.points:
                points.setdefault(point.time, []).append(point.cells)
    found: list[list[tuple[float, float, float]]] = [[] for _ in genes]
    for time, parts in sorted(points.items()):
        cells = np.concatenate(parts)
        if len(cells) > 1:
            values = metrics.normalise(dataset.rows(cells))[:, list(genes)].toarray()
            for place, gene in enumerate(found):
                spread = float(values[:, place].std(ddof=1) / np.sqrt(len(cells)))
                gene.append((time, float(values[:, place].mean()), spread))
    return found


def _field(view: View, ruler: PCA, points: np.ndarray, limits: Any) -> Section:
    model, way = view.model, view.way
    panels = []
    for i in sorted({0, len(way.times) // 2, len(way.times) - 1}):
        point = way.points[i]
        rows = _draw(len(point.cells), 400)
        cells = point.cells[rows]
        codes = model.codes(way.condition, view.cells.dataset.tissue[cells])
        tissue = model.vocabulary.codes("tissues", view.cells.dataset.tissue[cells])
        time = float(model.scaled([way.times[i]])[0])
        velocity = model.velocity(point.z1[rows], codes, time)
        arrows = model.slopes(point.z1[rows], velocity, tissue) @ ruler.components.T
        panels.append((model.time(way.times[i]), ruler.transform(point.counts[rows]), arrows))
    longest = max(float(np.quantile(np.linalg.norm(arrows, axis=1), 0.95)) for _, _, arrows in panels)
    scale = ARROW * (limits[0][1] - limits[0][0]) / max(longest, 1e-12)
    figures = [Drawing(field(points, starts, arrows, title, limits, scale)) for title, starts, arrows in panels]
    span = model.time(model.axis.last - model.axis.first)
    texts = (
        f"Where the field pushes the predicted cells at three times of the way: mean over the cells in each square."
        f" The scale is the same in every panel; the arrow of the 95% quantile stands for {number(longest)} units of"
        f" the plane per {span}.",
    )
    return Section("The field", texts, tuple(figures), grid="curves")


def _sensitivity(view: View, found: Sensitivity) -> Section:
    names, way = view.model.vocabulary.genes, view.way
    directions = tuple(
        (
            str(k),
            one.gain,
            _named(names, one.start_genes),
            _named(names, one.end_genes),
        )
        for k, one in enumerate(found.directions, 1)
    )
    top = tuple(found.top(names))
    grows = float((found.singular > 1).sum(1).mean())
    end = view.model.time(way.times[-1])
    texts = (
        f"Over {count(found.n_cells, 'cell')}: of {found.singular.shape[1]} latent directions {grows:.1f} grow on the"
        f" way and the others shrink; log volume {number(float(found.log_volume.mean())).replace('-', '−')} (above 0"
        " neighbouring cells move apart).",
        "A direction's genes are those whose decoded level it changes, at the start and, after the way, at the end."
        " A gene's effect is what one standard deviation more of its log1p counts at the start does to the target;"
        " derivatives through encoder, flow and decoder say what the model does, not what a cell would do.",
    )
    tables = (
        Table(
            f"Latent directions at the start, by what becomes of them at {end}",
            ("direction", "gain", "genes at the start", "genes at the end"),
            directions,
            (2, 3),
        ),
        Table(
            f"Genes at the start that the end depends on: {found.target}",
            ("gene", "effect of one standard deviation", "gradient", "spread over cells"),
            top,
        ),
    )
    return Section("What the end depends on", texts, (), tables)


def _named(names: Sequence[str], change: np.ndarray, n: int = 5) -> str:
    order = np.argsort(-np.abs(change), kind="stable")[:n]
    return ", ".join(f"{names[i]} {_signed(change[i])}" for i in order)


def _signed(value: Any) -> str:
    return f"{float(value):+.2g}".replace("-", "−")
