"""The figures of the response analysis, as inline SVG that reads on light and on dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pf_core.epistasis import Epistasis
from pf_core.plots import CONTROL, MODEL, REAL
from pf_core.response import Axis, Corrections, Similarity
from pf_core.svg import INK, MUTED, PAPER, RULE, VARIABLES, figure, set_ticks, short, svg, tick

__all__ = ["correction_bars", "epistasis_scatter", "gene_bars", "heat", "similarity_map", "standalone"]

DIVERGING = "PuOr_r"
SHOWN = 16  # candidates of a correction
NAMED = 12  # pairs with their names in the scatter
LIGHT = {INK: "#1b1f24", MUTED: "#57606a", RULE: "#d5dae0", PAPER: "#ffffff"}


def standalone(drawing: str) -> str:
    """A figure of a page as an SVG file of its own: the page's colours and font filled in, on white."""
    for sentinel, variable in VARIABLES.items():
        drawing = drawing.replace(variable, LIGHT[sentinel])
    head, body = drawing.split(">", 1)
    box = head.split('viewBox="')[1].split('"')[0].split()
    size = f' width="{box[2]}" height="{box[3]}" font-family="Helvetica, Arial, sans-serif"'
    return f'{head}{size}><rect width="100%" height="100%" fill="white"/>{body}\n'


def gene_bars(axis: Axis, genes: Sequence[str], n: int = 12) -> str:
    """The genes that move most along an axis: effect as bars, spread over control cells as whiskers."""
    rows = axis.top(genes, n)
    row = 17
    height = 46 + row * len(rows)
    with figure(300, height) as drawing:
        axes = drawing.add_axes((0.27, 30 / height, 0.70, row * len(rows) / height))
        effects, spreads = (np.array([one[i] for one in rows]) for i in (1, 2))
        place = np.arange(len(rows))
        colours = [MODEL if value > 0 else REAL for value in effects]
        axes.barh(place, effects, height=0.68, color=colours, linewidth=0)
        axes.errorbar(effects, place, xerr=spreads, fmt="none", ecolor=INK, elinewidth=0.8, capsize=0, alpha=0.8)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(place, [short(one[0], 14) for one in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        set_ticks(axes.xaxis, False)
        axes.set_xlabel("change of log1p counts per 10,000", labelpad=1)
        named = ", ".join(f"{gene} {tick(float(f'{effect:.2g}'))}" for gene, effect, _ in rows[:5])
        return svg(drawing, f"Axis {axis.name}: genes that move most: {named}")


def heat(
    names: Sequence[str],
    values: np.ndarray,
    title: str,
    *,
    low: float = -1.0,
    high: float = 1.0,
    cmap: str = DIVERGING,
    unit: str = "",
) -> str:
    """A square matrix between named rows, with the values written in where there is room."""
    n = len(names)
    side = 34 if n <= 12 else max(9, 400 // n)
    label = 10 + 5.6 * max(len(short(name, 26)) for name in names)
    width, height = label + side * n + 14, 58 + side * n + 0.72 * label
    with figure(width, height) as drawing:
        bottom = 0.72 * label + 34
        axes = drawing.add_axes((label / width, bottom / height, side * n / width, side * n / height))
        axes.set_title(title, pad=6, x=-label / (side * n))
        image = _grid(axes, values, low, high, cmap)
        shown = [short(name, 26) for name in names]
        size = 9 if side >= 14 else 7
        axes.set_yticks(range(n), shown, fontsize=size)
        axes.set_xticks(range(n), shown, rotation=50, ha="right", rotation_mode="anchor", fontsize=size)
        if side >= 30:
            _numbers(axes, values, low, high, cmap)
        _bar(drawing, image, (label / width, 20 / height, min(side * n, 150) / width, 7 / height), low, high, unit)
        return svg(drawing, f"{title}: {n} by {n} values from {tick(_least(values))} to {tick(_most(values))}")


def similarity_map(found: Similarity) -> str:
    """Cosines of displacements as a heat map in the order of the dendrogram, which stands above it."""
    from scipy.cluster import hierarchy

    order, n = found.order, len(found.labels)
    names = [found.labels[i] for i in order]
    side = 24 if n <= 24 else max(8, 560 // n)
    label, tree = 12 + 5.8 * max(len(short(name, 24)) for name in names), 74
    width, height = label + side * n + 12, tree + side * n + 0.72 * label + 44
    with figure(width, height) as drawing:
        left, bottom = label / width, (0.72 * label + 40) / height
        axes = drawing.add_axes((left, bottom, side * n / width, side * n / height))
        image = _grid(axes, found.image[np.ix_(order, order)], -1.0, 1.0, DIVERGING)
        size = 9 if side >= 13 else 7
        axes.set_yticks(range(n), [short(name, 24) for name in names], fontsize=size)
        axes.set_xticks(
            range(n),
            [short(name, 24) for name in names],
            rotation=50,
            ha="right",
            rotation_mode="anchor",
            fontsize=size,
        )
        above = drawing.add_axes(
            (left, bottom + (side * n + 3) / height, side * len(found.clustered) / width, (tree - 14) / height)
        )
        lines = hierarchy.dendrogram(found.linkage, no_plot=True, color_threshold=0)
        for x, y in zip(lines["icoord"], lines["dcoord"], strict=True):
            above.plot(np.asarray(x) / 10 - 0.5, y, color=INK, linewidth=0.9)
        above.axhline(0.5, color=MODEL, linewidth=0.9, linestyle=(0, (3, 2)))
        above.set_xlim(0, len(found.clustered))
        above.set_ylim(0, max(1.05 * float(found.linkage[:, 2].max()), 0.55))
        above.set_xticks([])
        above.set_yticks([0, 0.5, 1] if found.linkage[:, 2].max() > 0.9 else [0, 0.5])
        above.set_ylabel("1 − cosine", fontsize=8.5)
        for side_name in ("top", "right", "bottom"):
            above.spines[side_name].set_visible(False)
        _bar(drawing, image, (left, 22 / height, min(side * n, 150) / width, 7 / height), -1, 1, "cosine")
        clusters = "; ".join(
            ", ".join(found.labels[i] for i in np.flatnonzero(found.clusters == number))
            for number in range(1, found.clusters.max() + 1)
        )
        return svg(drawing, f"Similarity of {n} conditions by displacement, clustered. Clusters: {clusters}")


def correction_bars(found: Corrections) -> str:
    """Distance to the controls that is left after each candidate, against doing nothing, with the cosine beside it."""
    rows = found.candidates[:SHOWN]
    row = 20
    height = 64 + row * len(rows)
    longest = 12 + 5.8 * max(len(short(one.label, 22)) for one in rows)
    width = 330 + longest
    with figure(width, height) as drawing:
        bottom, span = 34 / height, row * len(rows) / height
        axes = drawing.add_axes((longest / width, bottom, 212 / width, span))
        place = np.arange(len(rows))
        colours = [REAL if one.after < found.nothing else CONTROL for one in rows]
        axes.barh(place, [one.after for one in rows], height=0.66, color=colours, linewidth=0)
        axes.axvline(found.nothing, color=MODEL, linewidth=1.3, linestyle=(0, (3, 2)))
        # Placed by the side that has room.
        right = found.nothing < 0.6 * max(found.nothing, *(one.after for one in rows))
        axes.annotate(
            "nothing done",
            (found.nothing, 1),
            (3 if right else -3, 3),
            ("data", "axes fraction"),
            "offset points",
            ha="left" if right else "right",
            fontsize=8.5,
            color=MODEL,
        )
        axes.set_yticks(place, [short(one.label, 22) for one in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 1.04 * max(found.nothing, *(one.after for one in rows)))
        axes.set_xlabel("energy distance to controls after it", labelpad=1)
        other = drawing.add_axes(((longest + 226) / width, bottom, 88 / width, span))
        other.axvline(0, color=RULE, linewidth=0.8)
        values = [one.cosine if math.isfinite(one.cosine) else 0.0 for one in rows]
        other.plot(values, place, "o", color=INK, markersize=4.5)
        other.set_xlim(-1.1, 1.1)
        other.set_xticks([-1, 0, 1])
        other.set_xlabel("cosine", labelpad=1)
        other.set_yticks([])
        for panel in (axes, other):
            panel.set_ylim(len(rows) - 0.4, -0.6)
            panel.grid(axis="x")
            panel.set_axisbelow(True)
            panel.spines["left"].set_visible(False)
            set_ticks(panel.xaxis, False) if panel is axes else None
        best = rows[0]
        text = (
            f"nearest to controls after {found.perturbation}: {best.label}, distance {tick(float(f'{best.after:.3g}'))}"
        )
        return svg(drawing, f"Candidates that undo {found.perturbation}; {text} (nothing: {tick(found.nothing)})")


def epistasis_scatter(pairs: Sequence[Epistasis]) -> str:
    """Relative commutator of each measured pair against its observed departure from addition."""
    rows = [one for one in pairs if math.isfinite(one.observed) and math.isfinite(one.relative)]
    with figure(360, 270) as drawing:
        axes = drawing.add_axes((0.15, 0.17, 0.81, 0.77))
        x, y = np.array([one.relative for one in rows]), np.array([one.observed for one in rows])
        far = sorted(range(len(rows)), key=lambda i: -(x[i] / max(x.max(), 1e-12) + y[i] / max(y.max(), 1e-12)))[:NAMED]
        axes.plot(x, y, "o", color=REAL, markersize=6, markeredgecolor=PAPER, markeredgewidth=0.6)
        taken: list[tuple[float, float, float]] = []  # left, right and height of the names, in parts of the axes
        width, height = max(float(x.max()) * 1.18, 1e-9), max(float(y.max()) * 1.12, 1e-9)
        for i in far:  # names that would lie on each other are left to the table
            text = short(f"{rows[i].first}+{rows[i].second}", 18)
            at, end, long = x[i] / width, x[i] / width > 0.72, 0.018 * len(text)
            left = at - long - 0.02 if end else at + 0.02
            spot = (left, left + long, y[i] / height)
            if all(spot[1] < a or spot[0] > b or abs(spot[2] - c) > 0.055 for a, b, c in taken):
                taken.append(spot)
                axes.annotate(
                    text,
                    (x[i], y[i]),
                    (-5 if end else 5, 4),
                    textcoords="offset points",
                    fontsize=8,
                    color=MUTED,
                    ha="right" if end else "left",
                )
        axes.set(xlim=(0, width), ylim=(-0.03 * height, height))
        axes.grid()
        axes.set_axisbelow(True)
        set_ticks(axes.xaxis, False)
        set_ticks(axes.yaxis, False)
        axes.set_xlabel("commutator, relative to the moves", labelpad=2)
        axes.set_ylabel("observed departure from addition", labelpad=2)
        return svg(drawing, f"Commutator against observed departure from addition, {len(rows)} measured pairs")


def _grid(axes: Any, values: np.ndarray, low: float, high: float, cmap: str) -> Any:
    image = axes.imshow(values, cmap=cmap, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axes.tick_params(length=0, pad=2)
    for side in axes.spines.values():
        side.set_visible(False)
    for row, column in np.argwhere(~np.isfinite(values)):
        axes.text(column, row, "×", ha="center", va="center", fontsize=8, color=MUTED)
    return image


def _numbers(axes: Any, values: np.ndarray, low: float, high: float, cmap: str) -> None:
    from matplotlib import colormaps

    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            red, green, blue, _ = colormaps[cmap]((value - low) / max(high - low, 1e-12))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            text = f"{value:.0f}" if max(abs(low), abs(high)) >= 10 else f"{value:.2f}".replace("-0.00", "0.00")
            colour = "#ffffff" if dark else "#1b1f24"
            axes.text(column, row, text.replace("-", "−"), ha="center", va="center", fontsize=8, color=colour)


def _bar(
    drawing: Any, image: Any, place: tuple[float, float, float, float], low: float, high: float, unit: str
) -> None:
    bar = drawing.add_axes(place)
    drawing.colorbar(image, cax=bar, orientation="horizontal", ticks=[low, (low + high) / 2, high])
    bar.set_xticklabels([tick(float(f"{value:.3g}")) for value in (low, (low + high) / 2, high)], fontsize=8)
    bar.tick_params(length=0, pad=1)
    if unit:
        bar.set_title(unit, fontsize=8, fontweight="normal", color=MUTED, pad=2)
    for side in bar.spines.values():
        side.set_visible(False)


def _least(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(f"{finite.min():.3g}") if len(finite) else math.nan


def _most(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(f"{finite.max():.3g}") if len(finite) else math.nan
