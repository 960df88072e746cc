"""The sections of the response page: what each part of the analysis shows, in figures, tables and words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pf_core.epistasis import Epistasis
from pf_core.loy_cells import Correction
from pf_core.loy_plots import correction_pairs
from pf_core.page import Drawing, Section, Table
from pf_core.response import Axis, Controls, Corrections, Similarity, Tissues
from pf_core.response_plots import correction_bars, epistasis_scatter, gene_bars, heat, similarity_map

__all__ = ["Response", "sections", "sentence"]

AXES_SHOWN = 8
ADDITIVE = 1e-3  # of the moves: a model with smaller departures predicts none


@dataclass(frozen=True)
class Response:
    """Everything the page shows; `missing` says which part could not be made, and why."""

    genes: tuple[str, ...]
    controls: Controls
    labels: tuple[str, ...]
    axes: tuple[Axis, ...]
    similarity: Similarity | None
    corrections: tuple[Corrections, ...]
    pairs: tuple[Epistasis, ...]
    tissues: tuple[Tissues, ...]
    undone: Correction | None
    missing: dict[str, str]


def sentence(found: Response) -> str:
    parts = []
    if found.similarity is not None:
        numbers = found.similarity.clusters[found.similarity.clusters > 0]
        n = len(set(numbers.tolist()))
        parts.append(f"{len(numbers)} conditions that move cells form {n} cluster{'s' if n != 1 else ''}")
    helped = [one for one in found.corrections if one.helping]
    if helped:
        best = max(helped, key=lambda one: one.candidates[0].restored)
        parts.append(
            f"nearest correction: {best.candidates[0].label} after {best.perturbation}"
            f" ({best.candidates[0].restored:.0%} of the way back)"
        )
    elif found.corrections:
        parts.append("no candidate brings cells nearer to control than doing nothing")
    return "; ".join(parts).capitalize()[:1] + "; ".join(parts)[1:] + "." if parts else ""


def sections(found: Response) -> tuple[list[Section], dict[str, str]]:
    figures: dict[str, str] = {}
    found_sections = [_axes(found, figures)]
    if found.similarity is not None:
        found_sections.append(_alike(found.similarity, figures))
    if found.corrections:
        found_sections.append(_corrections(found.corrections, figures))
    if found.pairs:
        found_sections.append(_epistasis(found.pairs, figures))
    found_sections.append(_tissues(found, figures))
    if found.undone is not None:
        found_sections.append(_undone(found.undone, figures))
    if found.missing:
        table = Table("Parts that could not be made", ("part", "why"), tuple(found.missing.items()), (1,))
        found_sections.append(Section("Left out", (), (), (table,)))
    return found_sections, figures


def _axes(found: Response, figures: dict[str, str]) -> Section:
    shown = [axis for axis in found.axes if axis.kind == "principal"]
    others = sorted((axis for axis in found.axes if axis.kind != "principal"), key=lambda axis: -axis.strength)
    shown += [axis for axis in others if axis.strength > 0][: max(AXES_SHOWN - len(shown), 0)]
    kinds = {"principal": "principal direction", "shift": "shift axis (β)", "linear": "linear axis (α)"}
    drawings = []
    for axis in shown:
        figures[f"axis-{axis.name}"] = gene_bars(axis, found.genes)
        strongest = np.argsort(-np.abs(axis.coefficients), kind="stable")[:3]
        rms = math.sqrt(float((axis.coefficients**2).mean())) or 1.0
        used = ", ".join(f"{found.labels[i]} {axis.coefficients[i] / rms:+.1f}".replace("-", "−") for i in strongest)
        drawings.append(
            Drawing(figures[f"axis-{axis.name}"], f"{axis.name}, {kinds[axis.kind]}", f"Most used by {used}")
        )
    rows = tuple(
        (axis.name, kinds[axis.kind], axis.strength, ", ".join(gene for gene, _, _ in axis.top(found.genes, 8)))
        for axis in found.axes
    )
    return Section(
        "Response axes and their genes",
        (
            "Directions in which conditions move control cells, and the genes whose expression changes along them: the"
            " decoder's derivative, averaged over control cells, for a typical (rms) coefficient.",
            "Bars: change of log1p counts per 10,000. Lines: standard deviation over control cells; where it is"
            " wide, the"
            " gene answers differently in different cells. PR are principal directions of all conditions and do not"
            " depend on the choice of bases; u and B are the bases of the model. A PR axis points to where the"
            " condition goes that uses it most."
            " Coefficients under each figure are in units of their rms.",
        ),
        tuple(drawings),
        (Table("All axes", ("axis", "kind", "strength", "genes"), rows, (1, 3)),),
        "bars",
    )


def _alike(found: Similarity, figures: dict[str, str]) -> Section:
    figures["similarity"] = similarity_map(found)
    rows = []
    for i in found.order:
        others = [j for j in range(len(found.labels)) if j != i and math.isfinite(found.image[i, j])]
        near = max(others, key=lambda j: found.image[i, j]) if others and found.clusters[i] else None
        far = min(others, key=lambda j: found.image[i, j]) if others and found.clusters[i] else None
        rows.append(
            (
                found.labels[i],
                str(found.clusters[i]) if found.clusters[i] else "moves nothing",
                float(found.magnitude[i]),
                "" if near is None else f"{found.labels[near]} ({found.image[i, near]:.2f})",
                "" if far is None else f"{found.labels[far]} ({found.image[i, far]:.2f})".replace("-", "−"),
                "" if far is None else f"{found.profile[i, far]:.2f}".replace("-", "−"),
            )
        )
    columns = ("condition", "cluster", "rms displacement", "most alike", "most opposite", "its profile cosine")
    return Section(
        "Similar conditions",
        (
            "Cosine of the displacements of the same control cells: 1 acts alike, −1 acts in the opposite direction, 0"
            " has nothing in common. The dashed line cuts the tree into clusters.",
            "The cosine of profiles (α, β) is in response.json too; it depends on the choice of bases and is no"
            " basis for"
            " clusters.",
        ),
        (Drawing(figures["similarity"]),),
        (Table("Nearest and most opposite conditions", columns, tuple(rows), (1, 3, 4, 5)),),
        "",
    )


def _corrections(found: Sequence[Corrections], figures: dict[str, str]) -> Section:
    drawings, rows = [], []
    for one in found:
        name = f"corrections-{_file(one.perturbation)}"
        figures[name] = correction_bars(one)
        drawings.append(Drawing(figures[name], f"After {one.perturbation}"))
        rows += [
            (
                f"{one.perturbation}, then {c.label}",
                c.after,
                one.nothing,
                f"{c.restored:.0%}".replace("-", "−"),
                c.cosine,
                c.together,
            )
            for c in one.candidates[:5]
        ]
    columns = ("perturbation, then candidate", "distance after", "nothing done", "way back", "cosine", "both at once")
    return Section(
        "Which perturbation undoes this one",
        (
            "Control cells are moved by the perturbation, then by each candidate. Bars: energy distance that is left"
            " to the"
            " controls; blue where it is less than with nothing done (dashed line). Right: cosine of the two"
            " directions.",
            "These are candidates for experiments. The composition of two operators is an extrapolation: the"
            " candidate was"
            " trained on controls and is applied to perturbed cells here. “Both at once” is the operator of the"
            " combination.",
        ),
        tuple(drawings),
        (Table("The five nearest to control", columns, tuple(rows)),),
    )


def _epistasis(found: Sequence[Epistasis], figures: dict[str, str]) -> Section:
    from scipy.stats import spearmanr

    measured = [one for one in found if math.isfinite(one.observed) and math.isfinite(one.relative)]
    note, drawings = "", ()
    if len(measured) >= 2:
        figures["epistasis"] = epistasis_scatter(measured)
        drawings = (Drawing(figures["epistasis"]),)
    x, y = [one.relative for one in measured], [one.observed for one in measured]
    if len(measured) >= 5 and len(set(x)) > 1 and len(set(y)) > 1:
        result: Any = spearmanr(x, y)
        note = f"Rank correlation of the two over {len(x)} pairs: {result.statistic:.2f} (p = {result.pvalue:.2g})."
    departures = [one.predicted for one in found if math.isfinite(one.predicted)]
    if departures and max(departures) < ADDITIVE:
        note += (
            " This model adds: its operators of pairs are the sums of their members', and no departure from addition"
            " is predicted for a pair that was not measured."
        )
    rows = sorted(found, key=lambda one: -(one.observed if math.isfinite(one.observed) else -1.0))
    table = tuple(
        (f"{o.first}+{o.second}", o.commutator, o.relative, o.predicted, o.observed, o.excess, o.n_cells) for o in rows
    )
    columns = (
        "pair",
        "commutator",
        "relative",
        "model's departure",
        "observed departure",
        "excess over noise",
        "cells",
    )
    return Section(
        "Combinations: order and addition",
        (
            "Horizontal: the relative commutator, how much it matters which perturbation acts first. Vertical: by how"
            " much the real cells of the pair depart from the sum of the single effects, with the noise of the means"
            " removed.",
            "An excess near 1 means that the departure is what noise alone would give. " + note,
        ),
        drawings,
        (Table("Measured pairs", columns, table),),
        "",
    )


def _tissues(found: Response, figures: dict[str, str]) -> Section:
    drawings, tables = [], []
    for one in found.tissues:
        names = [f"{cell_type}, {tissue}" for tissue, cell_type in one.contexts]
        if len(names) > 1:
            key = f"contexts-{_file(one.perturbation)}"
            figures[key] = heat(names, one.angle, f"{one.perturbation}: angle", low=0, high=180, unit="degrees")
            figures[f"{key}-genes"] = heat(
                names,
                one.shared,
                f"{one.perturbation}: top {one.n_top} genes",
                low=0,
                high=1,
                cmap="Blues",
                unit="shared",
            )
            drawings += [Drawing(figures[key]), Drawing(figures[f"{key}-genes"])]
        rows = tuple((g, f"{n} of {len(names)}", c) for g, n, c in one.common(found.genes)[:10])
        tables.append(
            Table(f"{one.perturbation}: genes in the top of most contexts", ("gene", "contexts", "change"), rows)
        )
        if len(one.tissues) > 1:
            pairs = [(i, j) for i in range(len(one.tissues)) for j in range(i)]
            told = tuple((f"{one.tissues[j]} – {one.tissues[i]}", float(one.distance[i, j])) for i, j in pairs)
            tables.append(Table(f"{one.perturbation}: distance of the operators", ("tissues", "Frobenius"), told))
    return Section(
        "The same perturbation across tissues and cell types",
        (
            "Angle between the mean displacements of control cells (0 is the same direction, 90 unrelated, 180"
            " opposite),"
            " and the share of the strongest genes that two contexts have in common.",
            "Cell types of a tissue share one operator; they differ by where their cells lie.",
        ),
        tuple(drawings),
        tuple(tables),
    )


def _undone(found: Correction, figures: dict[str, str]) -> Section:
    figures["undone"] = correction_pairs(found)
    rows = tuple(
        (
            f"{c.cell_type}, {c.tissue}",
            c.n_loy,
            c.n_xy,
            c.before_counts,
            c.after_counts,
            c.floor_counts,
            c.before,
            c.after,
        )
        for c in found.contexts
    )
    columns = ("context", "cells", "controls", "before", "after", "control halves", "before, latent", "after, latent")
    return Section(
        "Virtual correction",
        (
            "Real perturbed cells moved back by the inverse of their operator, and their energy distance to real"
            " control"
            " cells: on principal components of counts, and in the latent space.",
            f"Condition number of the operators at most {found.condition_number:.3g}: an error of the operator grows"
            f" by at"
            f" most {found.amplification:.3g} in the inverse. Cells that trained the operator flatter it; hold"
            f" donors out"
            " for an honest number.",
        ),
        (Drawing(figures["undone"]),),
        (Table("Distances", columns, rows),),
    )


def _file(label: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-+." else "_" for letter in label)
