"""The response analysis of a run as files: response.json, figures, and one HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pf_core.checkpoint import write_atomic
from pf_core.dataset import Dataset
from pf_core.epistasis import Epistasis, epistasis, measured_pairs
from pf_core.errors import ConfigError, PredictionError
from pf_core.labels import CONTROL
from pf_core.loy_cells import Correction, virtual_correction
from pf_core.loy_plots import correction_pairs
from pf_core.page import Drawing, Page, Section, Table, write
from pf_core.response import (
    Axis,
    Controls,
    Corrections,
    Similarity,
    Tissues,
    across_tissues,
    axes,
    control_cells,
    corrections,
    displacements,
    similarity,
)
from pf_core.response_plots import (
    correction_bars,
    epistasis_scatter,
    gene_bars,
    heat,
    similarity_map,
    standalone,
)

if TYPE_CHECKING:
    from pf_core.model import Model

__all__ = ["Response", "analyse", "write_response"]

LOOKED_AT = 4  # strongest conditions whose corrections and tissues are shown, where none is named
MOST = 60  # conditions in the heat map
AXES_SHOWN = 8
GENES = 15  # per axis in response.json


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


def analyse(
    model: Model,
    dataset: Dataset,
    *,
    perturbations: Sequence[str] = (),
    undo: str | None = None,
    source: Any = None,
) -> Response:
    """Every part of the response analysis.

    Args:
        model: a trained model.
        dataset: cells with the model's genes, controls among them.
        perturbations: conditions whose corrections and tissues are wanted; the strongest LOOKED_AT otherwise.
        undo: a perturbation whose real cells are moved back by the inverse of its operator.
        source: AnnData or path of the cells, for `undo`.

    Raises:
        PredictionError: names that the model does not know, or data without controls.
    """
    for label in perturbations:
        if not model.members(label):
            raise PredictionError(f"{label!r} is control; name a perturbation")
    controls = control_cells(model, dataset)
    known = set(model.vocabulary.perturbations[1:])
    pairs = measured_pairs(model, dataset)
    separator = model.config.data.separator
    singles = [label for label in sorted(set(dataset.label)) if label in known]
    labels = [*singles, *(f"{a}{separator}{b}" for a, b in pairs)]
    labels += [label for label in perturbations if label not in labels]
    labels = [label for label in labels if label != CONTROL]
    if not labels:
        raise PredictionError(
            "no perturbation of the data is one that the model knows; give the data of the run, or name perturbations"
        )
    size = np.sqrt((displacements(model, labels, controls) ** 2).sum(2).mean(1))
    strongest = [labels[i] for i in np.argsort(-size, kind="stable")]
    kept = [label for label in labels if label in set(strongest[:MOST]) | set(perturbations)]
    chosen = list(perturbations) or [label for label in strongest if label in known][:LOOKED_AT]
    missing: dict[str, str] = {}
    alike, undoing = None, []
    if len(kept) < 2:
        missing["similarity"] = "the model knows one condition only"
    else:
        alike = similarity(model, kept, controls)
    for label in chosen:
        if len(known - {name for name, _ in model.members(label)}) == 0:
            missing["corrections"] = "the model knows no other perturbation"
        else:
            undoing.append(corrections(model, label, controls, _candidates(model, label, singles)))
    if not pairs:
        missing["epistasis"] = "the data hold no pair of which both members are there too"
    found = epistasis(model, pairs, controls, dataset) if pairs else []
    return Response(
        genes=tuple(model.vocabulary.genes),
        controls=controls,
        labels=tuple(kept),
        axes=tuple(axes(model, kept, controls)),
        similarity=alike,
        corrections=tuple(undoing),
        pairs=tuple(found),
        tissues=tuple(across_tissues(model, label, controls) for label in chosen),
        undone=virtual_correction(model, source, perturbation=undo) if undo is not None else None,
        missing=missing,
    )


def _candidates(model: Model, label: str, singles: Sequence[str]) -> list[str] | None:
    own = {name for name, _ in model.members(label)}
    return [name for name in singles if name not in own] or None


def write_response(out: Path, found: Response, *, title: str, facts: dict[str, Any]) -> None:
    """Write response.json, response.html and the figures as SVG into a folder that is new or empty.

    Raises:
        ConfigError: the folder holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; nothing was written. Choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    sections, figures = _sections(found)
    write_atomic(out / "response.json", json.dumps(_plain(to_json(found)), indent=1) + "\n")
    for name, drawing in figures.items():
        write_atomic(out / f"{name}.svg", standalone(drawing).encode())
    facts = {
        **facts,
        "conditions": len(found.labels),
        "control cells compared": len(found.controls.z),
        "contexts": len(found.controls.contexts),
    }
    footer = (
        "Numbers are in response.json, figures as SVG files beside this page; docs/response.md says what they mean."
    )
    write(out / "response.html", Page(title, tuple(sections), facts, _sentence(found), footer))


def to_json(found: Response) -> dict[str, Any]:
    """The numbers of the analysis in plain values."""
    genes = found.genes
    out: dict[str, Any] = {"labels": list(found.labels), "missing": found.missing}
    out["axes"] = [
        {
            "name": axis.name,
            "kind": axis.kind,
            "strength": axis.strength,
            "coefficients": dict(zip(found.labels, axis.coefficients.tolist(), strict=True)),
            "genes": [{"gene": g, "effect": e, "spread": s} for g, e, s in axis.top(genes, GENES)],
        }
        for axis in found.axes
    ]
    if found.similarity is not None:
        alike = found.similarity
        out["similarity"] = {
            "labels": list(alike.labels),
            "displacement": alike.image.tolist(),
            "profile": alike.profile.tolist(),
            "magnitude": alike.magnitude.tolist(),
            "cluster": alike.clusters.tolist(),
            "order": alike.order.tolist(),
        }
    out["corrections"] = [asdict(one) for one in found.corrections]
    out["epistasis"] = [asdict(one) for one in found.pairs]
    out["tissues"] = [
        {
            "perturbation": one.perturbation,
            "tissues": list(one.tissues),
            "operator_distance": one.distance.tolist(),
            "contexts": [list(context) for context in one.contexts],
            "magnitude": one.magnitude.tolist(),
            "angle_degrees": one.angle.tolist(),
            "correlation": one.correlation.tolist(),
            "shared_top_genes": one.shared.tolist(),
            "genes": [{"gene": g, "contexts": n, "change": c} for g, n, c in one.common(genes)[: one.n_top]],
        }
        for one in found.tissues
    ]
    if found.undone is not None:
        undone = found.undone
        out["undone"] = {
            "contexts": [asdict(one) for one in undone.contexts],
            "condition_number": undone.condition_number,
            "amplification": undone.amplification,
        }
    return out


def _plain(value: Any) -> Any:
    """NumPy scalars to Python's, and NaN to null, which JSON knows."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- the page -----------------------------------------------------------------------------------------------------
def _sentence(found: Response) -> str:
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


def _sections(found: Response) -> tuple[list[Section], dict[str, str]]:
    figures: dict[str, str] = {}
    sections = [_axes(found, figures)]
    if found.similarity is not None:
        sections.append(_alike(found.similarity, figures))
    if found.corrections:
        sections.append(_corrections(found.corrections, figures))
    if found.pairs:
        sections.append(_epistasis(found.pairs, figures))
    sections.append(_tissues(found, figures))
    if found.undone is not None:
        sections.append(_undone(found.undone, figures))
    if found.missing:
        table = Table("Parts that could not be made", ("part", "why"), tuple(found.missing.items()), (1,))
        sections.append(Section("Left out", (), (), (table,)))
    return sections, figures


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
            "Bars: change of log1p counts per 10,000. Lines: standard deviation over control cells; where it is wide, the"
            " gene answers differently in different cells. PR are principal directions of all conditions and do not"
            " depend on the choice of bases; u and B are the bases of the model. A PR axis points to where the condition goes that uses it most."
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
            "The cosine of profiles (α, β) is in response.json too; it depends on the choice of bases and is no basis for"
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
            "Control cells are moved by the perturbation, then by each candidate. Bars: energy distance that is left to the"
            " controls; blue where it is less than with nothing done (dashed line). Right: cosine of the two directions.",
            "These are candidates for experiments. The composition of two operators is an extrapolation: the candidate was"
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
            "Right: the relative commutator, by how much it matters which perturbation acts first. Up: by how much the real"
            " cells of the pair depart from the sum of the single effects, with the noise of the means removed.",
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
            "Angle between the mean displacements of control cells (0 is the same direction, 90 unrelated, 180 opposite),"
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
            "Real perturbed cells moved back by the inverse of their operator, and their energy distance to real control"
            " cells: on principal components of counts, and in the latent space.",
            f"Condition number of the operators at most {found.condition_number:.3g}: an error of the operator grows by at"
            f" most {found.amplification:.3g} in the inverse. Cells that trained the operator flatter it; hold donors out"
            " for an honest number.",
        ),
        (Drawing(figures["undone"]),),
        (Table("Distances", columns, rows),),
    )


def _file(label: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-+." else "_" for letter in label)
