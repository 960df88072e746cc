"""The figures of a trajectory: cells by time on the principal components, their ways, the field, genes over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pf_core.plots import CONTROL, MODEL, REAL
from pf_core.svg import INK, PAPER, figure, plain, set_ticks, short, svg, tick

__all__ = ["Curve", "cells_by_time", "field", "gene_curve", "ways"]

CMAP = "viridis"
DRAWN = 900  # cells of a panel; more only cover each other
COLOURS = (MODEL, REAL)  # of the condition, and of its counterfactual
Limits = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One gene in one condition over time: mean over cells and quartiles of single cells."""

    name: str
    mean: np.ndarray  # (n_times,) of log1p counts per 10,000
    low: np.ndarray
    high: np.ndarray


def cells_by_time(
    panels: Sequence[tuple[str, np.ndarray, np.ndarray]], span: tuple[float, float], limits: Limits, unit: str
) -> str:
    """Clouds on the same two components, coloured by time.

    Args:
        panels: title, (n, 2) points and (n,) their times.
        span: first and last time of the colours.
        limits: of the axes.
        unit: of time.
    """
    n = len(panels)
    width, height = 236 * n + 16, 262
    with figure(width, height) as drawing:
        image = None
        for i, (title, points, times) in enumerate(panels):
            axes = drawing.add_axes(((12 + 236 * i) / width, 50 / height, 226 / width, 188 / height))
            _plane(axes, limits, title, first=i == 0)
            kept = _some(len(points))
            image = axes.scatter(
                *points[kept].T,
                c=times[kept],
                cmap=CMAP,
                vmin=span[0],
                vmax=span[1],
                s=7,
                linewidths=0,
                rasterized=True,
            )
        _bar(drawing, image, (12 / width, 22 / height, 150 / width, 7 / height), unit)
        told = "; ".join(f"{title}: {len(points)} cells" for title, points, _ in panels)
        return svg(drawing, f"Cells by time on two principal components. {told}")


def ways(
    points: np.ndarray, real_times: np.ndarray, lines: Sequence[tuple[str, np.ndarray]], limits: Limits, unit: str
) -> str:
    """Ways of single cells over the real cells, thin, and the mean way of each condition, thick.

    Args:
        points: (n, 2) the real cells.
        real_times: (n,) their times.
        lines: name and (n_lines, n_times, 2) ways; the first condition, then its counterfactual.
        limits: of the axes.
        unit: of time.
    """
    width, height = 420, 360
    with figure(width, height) as drawing:
        axes = drawing.add_axes((12 / width, 50 / height, 396 / width, 286 / height))
        _plane(axes, limits, "", first=True)
        kept = _some(len(points))
        span = (float(real_times.min()), float(real_times.max()))
        image = axes.scatter(
            *points[kept].T,
            c=real_times[kept],
            cmap=CMAP,
            vmin=span[0],
            vmax=span[1],
            s=6,
            linewidths=0,
            alpha=0.4,
            rasterized=True,
        )
        for (name, way), colour in zip(lines, COLOURS, strict=False):
            for one in way:
                axes.plot(*one.T, color=colour, linewidth=0.7, alpha=0.55)
            mean = way.mean(0)
            axes.plot(*mean.T, color=PAPER, linewidth=4.6, solid_capstyle="round")
            axes.plot(*mean.T, color=colour, linewidth=2.6, solid_capstyle="round", label=plain(short(name, 36)))
            axes.plot(*mean[0], "o", color=PAPER, markersize=7, markeredgecolor=colour, markeredgewidth=2)
            axes.annotate(
                "",
                mean[-1],
                mean[-2],
                arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2.2, "mutation_scale": 15},
            )
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, borderaxespad=0.2, handlelength=1.4)
        _bar(drawing, image, (12 / width, 22 / height, 150 / width, 7 / height), unit)
        told = "; ".join(f"{name} from {_at(way.mean(0)[0])} to {_at(way.mean(0)[-1])}" for name, way in lines)
        return svg(drawing, f"Ways of {len(lines[0][1])} cells on two principal components, on average {told}")


def field(points: np.ndarray, starts: np.ndarray, arrows: np.ndarray, title: str, limits: Limits, scale: float) -> str:
    """The vector field at one time: mean arrows of the cells in each square of the plane.

    Args:
        points: (n, 2) the real cells, in grey.
        starts: (m, 2) where cells are.
        arrows: (m, 2) their velocities on the components, per unit of normalised time.
        title: of the panel.
        limits: of the axes.
        scale: length of the plane that an arrow of length 1 gets.
    """
    width, height = 252, 232
    with figure(width, height) as drawing:
        axes = drawing.add_axes((12 / width, 20 / height, 232 / width, 188 / height))
        _plane(axes, limits, title, first=True)
        kept = _some(len(points))
        axes.plot(*points[kept].T, "o", markersize=2.0, color=CONTROL, alpha=0.35, markeredgewidth=0, rasterized=True)
        at, mean = squares(starts, arrows, limits)
        if len(at):
            axes.quiver(
                *at.T,
                *(scale * mean).T,
                angles="xy",
                scale_units="xy",
                scale=1.0,
                color=MODEL,
                width=0.0075,
                headwidth=3.6,
                headlength=4.2,
                headaxislength=3.8,
                zorder=3,
            )
        return svg(drawing, f"Vector field, {title}: {len(at)} arrows, mean {_at(arrows.mean(0))} over all cells")


def squares(starts: np.ndarray, arrows: np.ndarray, limits: Limits, n: int = 13) -> tuple[np.ndarray, np.ndarray]:
    """Mean place and mean arrow of the cells in each square of an n by n grid that holds any, (m, 2) each."""
    low = np.array([limits[0][0], limits[1][0]])
    size = (np.array([limits[0][1], limits[1][1]]) - low) / n
    index = np.floor((starts - low) / size).astype(int)
    inside = ((index >= 0) & (index < n)).all(1)
    _, place = np.unique(index[inside] @ [n, 1], return_inverse=True)
    weight = np.bincount(place)
    sums = [
        np.stack([np.bincount(place, values[inside, k], len(weight)) for k in (0, 1)], 1) for values in (starts, arrows)
    ]
    return sums[0] / weight[:, None], sums[1] / weight[:, None]


def gene_curve(
    gene: str, times: np.ndarray, curves: Sequence[Curve], measured: Sequence[tuple[float, float, float]], unit: str
) -> str:
    """One gene over time: predicted mean and quartiles, and the means of real cells where they were measured.

    Args:
        gene: its name.
        times: (n_times,) of the curves, in real units.
        curves: of the condition, and of its counterfactual.
        measured: (time, mean, standard error) of real cells of the condition.
        unit: of time.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    width, height = 262, 186
    with figure(width, height) as drawing:
        axes = drawing.add_axes((0.155, 0.205, 0.82, 0.655))
        axes.set_title(short(gene, 30), pad=6)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        for curve, colour in zip(curves, COLOURS, strict=False):
            axes.fill_between(times, curve.low, curve.high, color=colour, alpha=0.16, linewidth=0)
            axes.plot(times, curve.mean, color=colour, linewidth=1.7)
        if measured:
            t, mean, error = np.array(measured).T
            axes.errorbar(
                t, mean, yerr=error, fmt="o", color=INK, markersize=4.2, markerfacecolor=PAPER, elinewidth=1.1, zorder=4
            )
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
        set_ticks(axes.yaxis, False)
        axes.set_xlabel(f"time ({unit})" if unit else "time", labelpad=1)
        first = curves[0]
        return svg(
            drawing, f"{gene}: predicted mean from {tick(_short(first.mean[0]))} to {tick(_short(first.mean[-1]))}"
        )


def _plane(axes: Any, limits: Limits, title: str, *, first: bool) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)
    axes.set(xlim=limits[0], ylim=limits[1], xticks=[], yticks=[])
    if title:
        axes.set_title(short(title, 44), fontsize=10.5, color=INK, fontweight="normal", pad=4)
    axes.set_xlabel("PC 1", labelpad=2, fontsize=9, loc="right")
    if first:
        axes.set_ylabel("PC 2", labelpad=2, fontsize=9, loc="top")


def _bar(drawing: Any, image: Any, place: tuple[float, float, float, float], unit: str) -> None:
    bar = drawing.add_axes(place)
    drawing.colorbar(image, cax=bar, orientation="horizontal")
    image.colorbar.solids.set_alpha(1)
    set_ticks(bar.xaxis, False)
    bar.tick_params(length=0, labelsize=8, pad=1)
    bar.set_title(f"time ({unit})" if unit else "time", fontsize=8.5, fontweight="normal", pad=2)
    for side in bar.spines.values():
        side.set_visible(False)


def _some(n: int) -> np.ndarray:
    order = np.random.default_rng(0).permutation(n)  # of what is drawn only; also no time lies on top of the others
    return order[:DRAWN]


def _at(point: np.ndarray) -> str:
    return f"({tick(_short(point[0]))}, {tick(_short(point[1]))})"


def _short(value: float) -> float:
    return float(f"{float(value):.2g}")
