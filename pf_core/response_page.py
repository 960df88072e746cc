"""The response analysis of a run as files: response.json, figures, and one HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pf_core.checkpoint import write_atomic
from pf_core.dataset import Dataset
from pf_core.epistasis import epistasis, measured_pairs
from pf_core.errors import ConfigError, PredictionError
from pf_core.labels import CONTROL
from pf_core.loy_cells import virtual_correction
from pf_core.page import Page, write
from pf_core.response import (
    across_tissues,
    axes,
    control_cells,
    corrections,
    displacements,
    similarity,
)
from pf_core.response_plots import standalone
from pf_core.response_sections import Response, sections, sentence

if TYPE_CHECKING:
    from pf_core.model import Model

__all__ = ["Response", "analyse", "write_response"]

LOOKED_AT = 4  # strongest conditions whose corrections and tissues are shown, where none is named
MOST = 60  # conditions in the heat map
GENES = 15  # per axis in response.json


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
    parts, figures = sections(found)
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
    write(out / "response.html", Page(title, tuple(parts), facts, sentence(found), footer))


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
