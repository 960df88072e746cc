"""Figures and the page of the LOY calls and of the virtual correction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pf_core.loy import LOY, NO_Y, UNDECIDED, XY, LoyScores
from pf_core.loy_cells import Correction
from pf_core.page import Drawing, Page, Section, Table, write
from pf_core.plots import CONTROL, MODEL, REAL
from pf_core.svg import INK, RULE, figure, set_ticks, short, svg

if TYPE_CHECKING:
    from anndata import AnnData
    from rich.console import Console

__all__ = ["correction_pairs", "donor_shares", "expected_observed", "print_calls", "score_histogram", "write_page"]

COLOURS = {XY: REAL, LOY: MODEL, UNDECIDED: CONTROL, NO_Y: "#c05f9b"}
DRAWN = 2000  # cells of each call


def score_histogram(scores: LoyScores) -> str:
    """Log posterior odds of LOY, stacked by call."""
    keep = np.isfinite(scores.score)
    values = scores.score[keep]
    low = max(-40.0, float(np.quantile(values, 0.02)))
    values = np.clip(values, low, 20)
    with figure(330, 210) as drawing:
        axes = drawing.add_axes((0.155, 0.2, 0.82, 0.68))
        edges = np.linspace(low, 20, 41).tolist()
        kinds = [kind for kind in (XY, UNDECIDED, LOY) if (scores.call[keep] == kind).any()]
        parts = [values[scores.call[keep] == kind] for kind in kinds]
        axes.hist(parts, edges, stacked=True, color=[COLOURS[kind] for kind in kinds], label=kinds, linewidth=0)
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=(0, (3, 2)))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.1, handlelength=1.1)
        axes.set_xlabel("log posterior odds of LOY (nats; ends hold the rest)", labelpad=2)
        axes.set_ylabel("cells", labelpad=2)
        set_ticks(axes.xaxis, False)
        set_ticks(axes.yaxis, False, whole=True)
        return svg(drawing, f"Log posterior odds of {keep.sum()} cells: " + ", ".join(_counts(scores)))


def expected_observed(scores: LoyScores) -> str:
    """Observed Y counts against those that an XY cell of the same depth has."""
    rng = np.random.default_rng(0)  # only moves the points apart
    with figure(330, 210) as drawing:
        axes = drawing.add_axes((0.155, 0.2, 0.82, 0.68))
        top = 1.0
        for kind in (UNDECIDED, XY, LOY):
            rows = np.flatnonzero((scores.call == kind) & np.isfinite(scores.expected))
            if len(rows):
                rows = rng.permutation(rows)[:DRAWN]
                x = np.maximum(scores.expected[rows], 0.05)
                y = scores.observed[rows] + rng.uniform(-0.3, 0.3, len(rows))
                top = max(top, float(y.max()), float(x.max()))
                axes.plot(
                    x,
                    np.arcsinh(y),
                    "o",
                    color=COLOURS[kind],
                    markersize=2.4,
                    alpha=0.5,
                    markeredgewidth=0,
                    rasterized=True,
                    label=kind,
                )
        line = np.geomspace(0.05, top, 50)
        axes.plot(line, np.arcsinh(line), color=INK, linewidth=0.9, linestyle=(0, (3, 2)))
        axes.set_xscale("log")
        set_ticks(axes.xaxis, True)
        marks = [mark for mark in (0, 1, 3, 10, 30, 100, 300, 1000) if mark <= top]
        axes.set_yticks(np.arcsinh(marks), [str(mark) for mark in marks])
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.1, markerscale=2.2, handletextpad=0.1
        )
        axes.set_xlabel("Y counts expected with a Y", labelpad=2)
        axes.set_ylabel("Y counts observed", labelpad=2)
        return svg(drawing, "Observed against expected counts of Y genes; LOY cells lie far below the dashed diagonal")


def donor_shares(scores: LoyScores) -> str:
    """Cells of every donor by call."""
    names = list(scores.donors)
    row = 21
    longest = 12 + 5.8 * max(len(short(name, 24)) for name in names)
    width, height = longest + 250, 62 + row * len(names)
    with figure(width, height) as drawing:
        axes = drawing.add_axes((longest / width, 34 / height, 238 / width, row * len(names) / height))
        for place, name in enumerate(names):
            found, left = scores.donors[name], 0.0
            parts = {XY: found["xy"], LOY: found["loy"], UNDECIDED: found["undecided"]}
            parts[NO_Y] = found["cells"] - sum(parts.values())
            for kind, n in parts.items():
                share = n / found["cells"]
                axes.barh(
                    place,
                    share,
                    left=left,
                    height=0.66,
                    color=COLOURS[kind],
                    linewidth=0,
                    label=kind if place == 0 else None,
                )
                left += share
        axes.set_yticks(range(len(names)), [short(name, 24) for name in names])
        axes.tick_params(axis="y", length=0)
        axes.set(xlim=(0, 1), ylim=(len(names) - 0.4, -0.6))
        axes.set_xticks([0, 0.5, 1], ["0", "50%", "100%"])
        axes.set_xlabel("share of cells", labelpad=2)
        axes.spines["left"].set_visible(False)
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-longest / 238, 1),
            ncols=4,
            borderaxespad=0.1,
            handlelength=1.0,
            columnspacing=0.9,
            handletextpad=0.4,
        )
        return svg(
            drawing, "Calls per donor: " + "; ".join(f"{name} {found['loy']} LOY" for name, found in _items(scores))
        )


def correction_pairs(found: Correction) -> str:
    """Energy distance of LOY cells to XY cells before and after the correction, per context."""
    row = 30
    names = [f"{one.cell_type}, {one.tissue}" for one in found.contexts]
    longest = 12 + 5.8 * max(len(short(name, 30)) for name in names)
    width, height = longest + 270, 66 + row * len(names)
    with figure(width, height) as drawing:
        axes = drawing.add_axes((longest / width, 36 / height, 254 / width, row * len(names) / height))
        for place, one in enumerate(found.contexts):
            axes.plot([one.before_counts, one.after_counts], [place, place], color=RULE, linewidth=2.4, zorder=1)
        place = np.arange(len(names))
        marks = (
            ("before_counts", "o", MODEL, "LOY cells"),
            ("after_counts", "D", REAL, "moved back"),
            ("floor_counts", "|", INK, "XY halves"),
        )
        for name, marker, colour, label in marks:
            values = [getattr(one, name) for one in found.contexts]
            axes.plot(values, place, marker, color=colour, markersize=9 if marker == "|" else 6.5, label=label)
        axes.set_yticks(place, [short(name, 30) for name in names])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.margins(x=0.06)
        set_ticks(axes.xaxis, False)
        axes.set_xlabel("energy distance to real XY cells", labelpad=2)
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-longest / 254, 1),
            ncols=3,
            borderaxespad=0.1,
            handletextpad=0.2,
            columnspacing=1.0,
        )
        mean = f"mean {found.mean('before_counts'):.3g} before, {found.mean('after_counts'):.3g} after"
        return svg(drawing, f"Distance of LOY cells to XY cells in {len(names)} contexts, {mean}")


def _items(scores: LoyScores) -> list[tuple[str, Any]]:
    return [(name, found) for name, found in scores.donors.items()]


def _counts(scores: LoyScores) -> list[str]:
    return [f"{n:,} {kind}" for kind, n in scores.counts().items()]


def print_calls(scores: LoyScores, *, console: Console) -> None:
    """Donors and their calls, one line each."""
    console.print(f"Y genes: {', '.join(scores.genes)}; ambient {scores.ambient:.3f}, {scores.ambient_source}")
    for name, found in _items(scores):
        share = found["loy_share"]
        called = f"LOY {share:.1%} of {found['loy'] + found['xy']} called, " if share == share else ""
        console.print(f"{name}: {found['status']}; {called}{found['undecided']} undecided", highlight=False)


def write_page(path: Path, labelled: AnnData, scores: LoyScores, *, title: str) -> None:
    """The calls as one HTML page."""
    report = json.loads(labelled.uns["loy"])
    counts = scores.counts()
    called = counts[LOY] + counts[XY]
    sentence = f"{counts[LOY]:,} of {called:,} cells that could be called have lost their Y"
    sentence += f"; {counts[UNDECIDED]:,} are undecided, {counts[NO_Y]:,} are of donors without a Y."
    checks = []
    if report["control_ratio"] is not None:
        checks.append(
            f"Control genes of similar expression: LOY cells have {report['control_ratio']:.2f} times the counts of XY"
            " cells. Near 1, the missing Y counts are not missing depth."
        )
    if report["par_ratio"] is not None:
        checks.append(
            f"Pseudoautosomal genes, which played no part in the calls: {report['par_ratio']:.2f} times."
            " Below 1 confirms that a copy is gone."
        )
    else:
        checks.append("No pseudoautosomal gene has counts, so that the calls have no independent confirmation here.")
    donors = Table(
        "Donors",
        ("donor", "what it is", "cells", "XY", "LOY", "undecided", "LOY share of called", "Y per 10,000"),
        tuple(
            (
                name,
                one["status"],
                one["cells"],
                one["xy"],
                one["loy"],
                one["undecided"],
                one["loy_share"],
                one["y_per_10k"],
            )
            for name, one in _items(scores)
        ),
        (1,),
    )
    types = Table(
        "Cell types",
        ("cell type", "cells of male donors", "XY cells behind it", "Y counts per 10,000 in XY cells", "dispersion r"),
        tuple(
            (name, int(one["cells"]), round(one["xy_cells"]), 1e4 * one["share"], one["r"])
            for name, one in scores.types.items()
        ),
    )
    genes = Table(
        "Y genes of the list that were not used",
        ("gene", "why"),
        tuple((gene, why) for gene, why in scores.dropped.items()),
        (1,),
    )
    reasons = {str(name): int(n) for name, n in labelled.obs["loy_reason"].value_counts().items() if name != "called"}
    why = Table("Why cells were not called", ("reason", "cells"), tuple(reasons.items()))
    sections = (
        Section(
            "Calls",
            (
                "A cell is called where its counts say so at the level asked for, and only where it is deep enough that"
                " no Y count at all would have been a call of LOY.",
                *checks,
            ),
            (
                Drawing(score_histogram(scores), "Score"),
                Drawing(expected_observed(scores), "Y counts"),
                Drawing(donor_shares(scores), "Donors"),
            ),
            (donors, types),
            "clouds",
        ),
        Section("What was left out", (), (), tuple(table for table in (why, genes) if table.rows)),
    )
    facts = {
        "Y genes": ", ".join(scores.genes),
        "ambient": f"{scores.ambient:.3f}, {scores.ambient_source}",
        "cells": f"{labelled.n_obs:,}",
    }
    footer = "Labels and scores are in obs of the h5ad file, all of this in uns['loy']."
    write(path, Page(title, sections, facts, sentence, footer))
