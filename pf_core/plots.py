"""The figures of the run report, as inline SVG.

Each figure is small, so that the page can set many side by side on a desktop and below each other on a phone without
shrinking the text. Clouds of points and heat maps are raster images inside the SVG, in colours that hold on light and
on dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from pf_core.svg import INK, MUTED, PAPER, RULE, figure, plain, set_ticks, short, svg, tick
from pf_core.verdict import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["cloud", "curve", "eigenvalues", "energies", "gradient_map", "profiles", "shared_limits"]

# Okabe and Ito's colour-blind safe hues, a little lighter so that they also hold on a dark page.
CONTROL, REAL, PREDICTED, MODEL = "#8d9299", "#1f7fc4", "#e0702a", "#e0702a"
BASELINES = (
    ("o", "#8d9299"),
    ("s", "#1f7fc4"),
    ("^", "#2a9d7c"),
    ("v", "#c05f9b"),
    ("P", "#b58900"),
    ("X", "#6c71c4"),
    ("<", "#b0554e"),
    ("h", "#5f8f2f"),
    (">", "#3a8f9c"),
    ("d", "#a6761d"),
    ("*", "#7a5195"),
    ("p", "#55606b"),
)
LEGEND_COLUMNS = 3
CELLS_DRAWN = 600  # per kind and condition; more only cover each other
BINS = 240  # of a curve
MAP_BINS = 72  # of the gradient heat map


# --- curves -------------------------------------------------------------------------------------------------------
def binned(steps: np.ndarray, values: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, ...]:
    """Steps, means, minima and maxima of at most `bins` runs of points; a run without finite values is NaN."""
    if len(steps) <= bins:
        finite = np.where(np.isfinite(values), values, np.nan)
        return steps.astype(float), finite, finite, finite
    edges = np.linspace(0, len(steps), bins + 1).astype(int)
    out = np.full((4, bins), np.nan)
    for i, (first, last) in enumerate(pairwise(edges)):
        run = values[first:last]
        run = run[np.isfinite(run)]
        out[0, i] = steps[first:last].mean()
        if len(run):
            out[1:, i] = run.mean(), run.min(), run.max()
    return tuple(out)


def _log_helps(*series: np.ndarray) -> bool:
    values = np.concatenate([one[np.isfinite(one)] for one in series] or [np.empty(0)])
    return len(values) > 1 and values.min() > 0 and values.max() / values.min() > 30


def curve(
    title: str,
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    events: Sequence[int] = (),
    bad: Sequence[int] = (),
    level: float | None = None,
    level_name: str = "",
    log: bool | None = None,
) -> str:
    """One quantity over steps: the training line with its spread, validation points, events as vertical lines."""
    steps, values = np.asarray(train[0], float), np.asarray(train[1], float)
    seen = np.empty((2, 0)) if validation is None else np.asarray(validation, float)
    log = _log_helps(values, seen[1]) if log is None else log and _log_helps(values, seen[1])
    with figure(270, 178) as drawing:
        axes = drawing.add_axes((0.165, 0.19, 0.81, 0.66))
        axes.set_title(short(title, 38), pad=7)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        x, mean, low, high = binned(steps, values)
        drawn = np.isfinite(mean).any() or np.isfinite(seen[1]).any()
        if np.isfinite(mean).any():
            axes.fill_between(x, low, high, color=REAL, alpha=0.22, linewidth=0)
            axes.plot(
                x, mean, color=REAL, linewidth=1.4, marker="o" if np.isfinite(mean).sum() == 1 else "", label="training"
            )
        keep = np.isfinite(seen[1])
        if keep.any():
            style: dict[str, Any] = {"linewidth": 1.0, "linestyle": (0, (3, 1.5)), "marker": "o", "markersize": 3.2}
            axes.plot(
                seen[0][keep], seen[1][keep], color=PREDICTED, markeredgecolor=PAPER, markeredgewidth=0.4, **style
            )
        if not drawn:
            axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", color=MUTED)
            axes.set_yticks([])
        if log:
            axes.set_yscale("log")
        if level is not None and drawn:
            axes.axhline(level, color=INK, linewidth=0.9, linestyle=(0, (1, 1.6)))
            axes.annotate(
                level_name, (1, level), (0, 2), ("axes fraction", "data"), "offset points", ha="right", fontsize=8.5
            )
        for step in events:
            axes.axvline(step, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
        if len(bad):
            axes.plot(
                bad,
                np.full(len(bad), 1.0),
                "x",
                color=INK,
                markersize=5,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
            )
        set_ticks(axes.xaxis, False, whole=True)
        if drawn:
            set_ticks(axes.yaxis, log)
        axes.margins(x=0.02)
        if len(steps) and steps[0] == steps[-1]:
            axes.set_xlim(steps[0] - 1, steps[0] + 1)
        axes.set_xlabel("step", labelpad=1)
        last = mean[np.isfinite(mean)]
        alt = f"{title} over {len(steps)} recorded steps"
        if len(last):
            alt += f", from {tick(last[0])} to {tick(last[-1])}"
        if keep.any():
            alt += f"; validation ends at {tick(seen[1][keep][-1])}"
        return svg(drawing, alt)


# --- judgement ----------------------------------------------------------------------------------------------------
def energies(rows: Sequence[tuple[str, Mapping[str, float]]], model: Sequence[str], baselines: Sequence[str]) -> str:
    """Energy distance per condition as a dot plot: one row a condition, one marker shape a method."""
    values = np.array([value for _, found in rows for value in found.values() if math.isfinite(value)])
    log = _log_helps(values)
    shown = {method for _, found in rows for method, value in found.items() if math.isfinite(value)}
    row, top = 31, 8 + 13 * max(math.ceil(len(shown) / LEGEND_COLUMNS), 1)
    height = top + row * len(rows) + 34
    with figure(410, height) as drawing:
        axes = drawing.add_axes((0.03, 32 / height, 0.94, 1 - (top + 32) / height))
        axes.spines["left"].set_visible(False)
        axes.set_yticks([])
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        order = [
            method for method in (*baselines, *model) if any(math.isfinite(f.get(method, math.nan)) for _, f in rows)
        ]
        n_ours = sum(method in model for method in order)
        for i, (name, found) in enumerate(rows):
            finite = [value for value in found.values() if math.isfinite(value)]
            if finite:
                axes.plot(
                    [min(finite), max(finite)], [i, i], color=RULE, linewidth=2.2, solid_capstyle="round", zorder=1
                )
            place = axes.get_yaxis_transform()
            missing = "" if finite else "   no finite value"
            axes.text(0, i - 0.3, short(name, 70) + missing, transform=place, va="center", fontsize=10)
        for method in order:
            xs = [found.get(method, math.nan) for _, found in rows]
            ours = method in model
            marker, colour = ("D", MODEL) if ours else BASELINES[list(baselines).index(method) % len(BASELINES)]
            style: dict[str, Any] = {"markersize": 8 if ours else 6.5, "zorder": 4 if ours else 3, "linestyle": "none"}
            face = colour if ours else PAPER
            axes.plot(
                xs,
                range(len(rows)),
                marker,
                color=colour,
                markerfacecolor=face,
                markeredgewidth=1.5,
                label=plain(method),
                **style,
            )
        if log:
            axes.set_xscale("log")
        if len(values):
            set_ticks(axes.xaxis, log)
        axes.set_ylim(len(rows) - 0.45, -0.72)
        axes.margins(x=0.04)
        axes.set_xlabel(
            "energy distance to the real cells (less is better)" + (", log scale" if log else ""), labelpad=3
        )
        handles, labels = axes.get_legend_handles_labels()
        drawing.legend(
            handles[-n_ours:] + handles[:-n_ours] if n_ours else handles,
            labels[-n_ours:] + labels[:-n_ours] if n_ours else labels,
            loc="upper left",
            ncols=LEGEND_COLUMNS,
            bbox_to_anchor=(0.0, 1.0),
            handletextpad=0.1,
            columnspacing=1.1,
            borderaxespad=0.1,
        )
        alt = f"Energy distance of {', '.join(order)} in {len(rows)} held-out conditions; values in the table"
        return svg(drawing, alt)


def shared_limits(clouds: Sequence[np.ndarray]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Axis limits that hold 99% of all points of all clouds."""
    points = np.concatenate([_finite(points) for points in clouds] or [np.empty((0, 2))])
    if not len(points):
        return (-1.0, 1.0), (-1.0, 1.0)
    low, high = np.quantile(points, [0.005, 0.995], axis=0)
    pad = np.maximum(0.08 * (high - low), 1e-6 + 1e-3 * np.abs(high))
    low, high = low - pad, high + pad
    return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))


def _finite(points: np.ndarray) -> np.ndarray:
    points = np.asarray(points, float).reshape(-1, 2)
    return points[np.isfinite(points).all(1)]


def _thin(points: np.ndarray) -> np.ndarray:
    points = _finite(points)
    if len(points) <= CELLS_DRAWN:
        return points
    return points[np.random.default_rng(0).permutation(len(points))[:CELLS_DRAWN]]


def _contour(axes: Axes, points: np.ndarray, limits: tuple[tuple[float, float], tuple[float, float]]) -> bool:
    """Lines around half and nine tenths of the points; False where the points are too few or lie on a line."""
    from scipy.stats import gaussian_kde

    if len(points) < 12 or np.linalg.cond(np.cov(points.T)) > 1e8:
        return False
    density = gaussian_kde(points.T)
    levels = np.quantile(density(points.T), [0.1, 0.5])
    if not levels[0] < levels[1]:
        return False
    x, y = np.linspace(*limits[0], 56), np.linspace(*limits[1], 56)
    grid = density(np.stack(np.meshgrid(x, y)).reshape(2, -1)).reshape(56, 56)
    axes.contour(
        x, y, grid, levels=levels, colors=INK, linewidths=[0.8, 1.3], linestyles=["dashed", "solid"], alpha=0.85
    )
    return True


def cloud(
    name: str,
    control: np.ndarray,
    real: np.ndarray,
    predicted: np.ndarray | None,
    limits: tuple[tuple[float, float], tuple[float, float]],
    labels: tuple[str, str] = ("PC 1", "PC 2"),
    origin: str = "control",
) -> str:
    """Control and real cells beside control and predicted cells, with the outline of the real cells on both.

    `origin` says what stands in the place of control cells, where it is something else.
    """
    real, moved = _finite(real), _finite(np.empty((0, 2)) if predicted is None else predicted)
    drawn = _thin(real)
    with figure(360, 202) as drawing:
        for i, (title, points, colour) in enumerate((("real", real, REAL), ("predicted", moved, PREDICTED))):
            axes = drawing.add_axes((0.07 + 0.48 * i, 0.117, 0.44, 0.7842))
            for side in ("top", "right"):
                axes.spines[side].set_visible(True)
            style: dict[str, Any] = {"linestyle": "none", "rasterized": True, "markeredgewidth": 0}
            axes.plot(*_thin(control).T, marker="o", markersize=2.4, color=CONTROL, alpha=0.55, **style)
            axes.plot(
                *(drawn if i == 0 else _thin(points)).T, marker="o", markersize=3.0, color=colour, alpha=0.75, **style
            )
            axes.set(xlim=limits[0], ylim=limits[1], xticks=[], yticks=[])
            _contour(axes, drawn, limits)
            drawn_of = count(len(points), "cell")
            axes.set_title(f"{title}, {drawn_of}", fontsize=11, color=INK, fontweight="normal", pad=4)
            axes.set_xlabel(labels[0], labelpad=3, fontsize=10)
            if i == 0:
                axes.set_ylabel(labels[1], labelpad=3, fontsize=10)
        centre = [np.round(points.mean(0), 2) if len(points) else "none" for points in (_finite(control), real, moved)]
        named = ", ".join(f"{kind} {at}" for kind, at in zip((origin, "real", "predicted"), centre, strict=True))
        return svg(drawing, f"{name}: first two principal components. Centres: {named}")


# --- operators ----------------------------------------------------------------------------------------------------
def profiles(names: Sequence[str], alpha: np.ndarray, beta: np.ndarray) -> str:
    """Response profiles as a heat map: a row per condition, a column per basis, alpha left and beta right."""
    row = 17 if len(names) <= 30 else 13
    height = 76 + row * len(names)
    finite = [values[np.isfinite(values)] for values in (alpha, beta)]
    with figure(520, height) as drawing:
        bottom, span = 42 / height, row * len(names) / height
        for i, (title, values, found) in enumerate((("α, linear", alpha, finite[0]), ("β, shift", beta, finite[1]))):
            left = 0.40 + 0.31 * i
            axes = drawing.add_axes((left, bottom, 0.28, span))
            axes.set_title(title, pad=4)
            limit = float(np.abs(found).max()) if len(found) and np.abs(found).max() > 0 else 1.0
            image = axes.imshow(values, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
            axes.set_xticks(
                range(values.shape[1]),
                [str(k + 1) for k in range(values.shape[1])],
                fontsize=8 if values.shape[1] <= 12 else 6,
            )
            axes.xaxis.tick_top()
            axes.tick_params(length=0, pad=2)
            labels = [short(name, 36) for name in names] if i == 0 else []
            axes.set_yticks(range(len(labels)), labels, fontsize=9 if row == 17 else 8)
            for side in axes.spines.values():
                side.set_visible(False)
            bar = drawing.add_axes((left + 0.03, 22 / height, 0.22, 8 / height))
            drawing.colorbar(image, cax=bar, orientation="horizontal", ticks=[-limit, 0, limit])
            bar.set_xticklabels([tick(float(f"{value:.2g}")) for value in (-limit, 0, limit)], fontsize=8)
            bar.tick_params(length=0, pad=1)
            for side in bar.spines.values():
                side.set_visible(False)
        return svg(drawing, f"Response profiles of {len(names)} conditions: coefficients alpha and beta of every basis")


def eigenvalues(
    title: str, values: np.ndarray, rho_max: float, limits: tuple[float, float, float, float] | None = None
) -> str:
    """Eigenvalues in the complex plane with the unit circle and the circle of radius rho_max."""
    values = np.asarray(values, complex)
    values = values[np.isfinite(values)]
    reach = 1.08 * max([1.0, rho_max, *np.abs(values).tolist()])
    x0, x1, y0, y1 = limits or (-reach, reach, -reach, reach)
    with figure(210, 204) as drawing:
        axes = drawing.add_axes((0.15, 0.115, 0.82, 0.844))
        angle = np.linspace(0, 2 * np.pi, 721)
        axes.plot(np.cos(angle), np.sin(angle), color=INK, linewidth=1.0)
        axes.plot(
            rho_max * np.cos(angle), rho_max * np.sin(angle), color=PREDICTED, linewidth=1.0, linestyle=(0, (3, 2))
        )
        axes.axhline(0, color=RULE, linewidth=0.6)
        axes.axvline(0, color=RULE, linewidth=0.6)
        inside = np.abs(values) <= 1
        for mask, marker, colour in ((inside, "o", REAL), (~inside, "D", PREDICTED)):
            size = 4.2 if len(values) < 200 else 3
            style: dict[str, Any] = {
                "linestyle": "none",
                "markersize": size,
                "markeredgewidth": 0.5,
                "markeredgecolor": PAPER,
                "alpha": 0.85,
            }
            axes.plot(
                np.real(values[mask]),
                np.imag(values[mask]),
                marker=marker,
                color=colour,
                rasterized=len(values) > 200,
                **style,
            )
        axes.set(xlim=(x0, x1), ylim=(y0, y1), aspect="equal")
        set_ticks(axes.xaxis, False)
        set_ticks(axes.yaxis, False)
        axes.tick_params(labelsize=8.5)
        most = float(np.abs(values).max()) if len(values) else math.nan
        outside = f"{int((~inside).sum())} outside the unit circle, largest modulus {most:.3f}"
        return svg(drawing, f"{title}: {len(values)} eigenvalues, {outside}")


# --- gradients ----------------------------------------------------------------------------------------------------
def gradient_map(steps: np.ndarray, norms: Mapping[str, np.ndarray]) -> str:
    """Gradient norm per parameter over steps, colour on a log scale; exact zeros grey, non-finite values crossed."""
    from matplotlib.colors import LogNorm

    names = list(norms)
    table = np.array([norms[name] for name in names], float).reshape(len(names), len(steps))
    edges = np.unique(np.linspace(0, len(steps), min(MAP_BINS, len(steps)) + 1).astype(int))
    bins = list(pairwise(edges))
    value = np.full((len(names), len(bins)), np.nan)
    broken = np.zeros(value.shape, bool)
    for j, (first, last) in enumerate(bins):
        run = table[:, first:last]
        broken[:, j] = np.isinf(run).any(1)
        finite = np.isfinite(run)
        counted = finite.sum(1)
        value[:, j] = np.where(counted > 0, np.where(finite, run, 0).sum(1) / np.maximum(counted, 1), np.nan)
    positive = value[value > 0]
    low, high = (float(positive.min()), float(positive.max())) if len(positive) else (0.1, 1.0)
    low = max(low, high * 1e-8) if high > low else high / 10
    height = 30 + 15 * len(names) + 44
    with figure(480, height) as drawing:
        axes = drawing.add_axes((0.36, 58 / height, 0.62, 15 * len(names) / height))
        zero = np.where(value == 0, 1.0, np.nan)
        extent = (-0.5, len(bins) - 0.5, len(names) - 0.5, -0.5)
        style: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest", "extent": extent}
        image = axes.imshow(
            np.where(value > 0, value, np.nan), norm=LogNorm(low, high, clip=True), cmap="viridis", **style
        )
        axes.imshow(zero, cmap="Greys", vmin=0, vmax=2, **style)
        at = np.argwhere(broken)
        axes.plot(at[:, 1], at[:, 0], "x", color="#d1242f", markersize=4.5, markeredgewidth=1.3)
        axes.set(xlim=extent[:2], ylim=extent[2:])
        axes.set_yticks(range(len(names)), [short(name, 34) for name in names], fontsize=8)
        at_ticks = np.unique(np.linspace(0, len(bins) - 1, 5).astype(int))
        axes.set_xticks(at_ticks, [f"{int(steps[bins[j][0]])}" for j in at_ticks], fontsize=8)
        axes.tick_params(length=0)
        axes.set_xlabel("step", labelpad=1, fontsize=8.5)
        for side in axes.spines.values():
            side.set_visible(False)
        bar = drawing.add_axes((0.36, 18 / height, 0.62, 7 / height))
        drawing.colorbar(image, cax=bar, orientation="horizontal")
        set_ticks(bar.xaxis, True)
        bar.tick_params(length=0, labelsize=8, pad=1)
        bar.set_ylabel("norm, log scale", rotation=0, ha="right", va="center", fontsize=8.5, labelpad=6)
        for side in bar.spines.values():
            side.set_visible(False)
        span = f"from {tick(low)} to {tick(high)}"
        return svg(drawing, f"Gradient norms of {len(names)} parameters over {len(steps)} recorded steps, {span}")
