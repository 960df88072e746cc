"""What trained operators say about biology: axes and their genes, similar and opposite perturbations, order, tissues.

Everything is measured on control cells of the data, so that a direction counts as far as cells lie where it acts:

    D_p(z) = K_p(z) - K_0(z)        the displacement of a control cell by perturbation p

with K_0 the operator of control in the same tissue, which is trained near the identity and not fixed at it. The bases
B_k and u_k are not unique (a change of basis, undone in alpha and beta, is the same model), and neither are cosines of
profiles (alpha, beta). Displacements are unique. Conditions are therefore clustered by displacement, and the cosine
of profiles stands beside it. Genes are read on the scale log1p of counts per 10,000, like the metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pf_core.dataset import Dataset
from pf_core.errors import PredictionError
from pf_core.labels import CONTROL, UNKNOWN
from pf_core.metrics import energy_distance
from pf_core.operator import Operator

if TYPE_CHECKING:
    from pf_core.model import Model

__all__ = [
    "Axis",
    "Candidate",
    "Controls",
    "Corrections",
    "Similarity",
    "Tissues",
    "across_tissues",
    "axes",
    "control_cells",
    "corrections",
    "decoded_change",
    "displacements",
    "similarity",
]

PER_CONTEXT = 100  # control cells of a tissue and cell type
WEAK = 1e-6  # rms displacement, relative to the strongest condition, below which a direction means nothing
CLUSTER_AT = 0.5  # cosine at which the dendrogram is cut
MAX_BASES = 16  # of each kind whose genes are shown


@dataclass(frozen=True)
class Controls:
    """Control cells on which operators are compared."""

    z: np.ndarray  # (n, n_latent)
    tissue: np.ndarray  # (n,) str
    cell_type: np.ndarray  # (n,) str

    @property
    def tissues(self) -> list[str]:
        return sorted(set(self.tissue))

    @property
    def contexts(self) -> dict[tuple[str, str], np.ndarray]:
        """(tissue, cell type) -> its rows."""
        keys = sorted(set(zip(self.tissue, self.cell_type, strict=True)))
        return {key: np.flatnonzero((self.tissue == key[0]) & (self.cell_type == key[1])) for key in keys}


def control_cells(model: Model, dataset: Dataset, *, per_context: int = PER_CONTEXT) -> Controls:
    """Latents of control cells, evenly spaced, as many of each tissue and cell type that the model knows.

    Args:
        model: a trained model.
        dataset: with the model's genes.
        per_context: most cells of a tissue and cell type.

    Raises:
        PredictionError: no control cell of a tissue that was in training.
    """
    known = model.vocabulary.tissues[1:] or (UNKNOWN,)
    rows: list[int] = []
    for tissue, cell_type in sorted(set(zip(dataset.tissue, dataset.cell_type, strict=True))):
        mask = dataset.is_control & (dataset.tissue == tissue) & (dataset.cell_type == cell_type)
        found = np.flatnonzero(mask)
        if tissue in known and len(found):
            places = np.linspace(0, len(found) - 1, min(per_context, len(found))).astype(int)
            rows += found[np.unique(places)].tolist()
    if not rows:
        raise PredictionError(
            f"the data have no control cell of a tissue that was in training ({', '.join(known)});"
            " give the data of the run, or control cells of these tissues"
        )
    cells = np.array(rows)
    return Controls(model.encode(dataset, cells), dataset.tissue[cells], dataset.cell_type[cells])


def tissue_operators(model: Model, labels: Sequence[str], tissues: Sequence[str]) -> dict[tuple[str, str], Operator]:
    """(label, tissue) -> operator, at pooled batches and mean covariates."""
    # Control is whatever the run's own settings call it.
    written = {CONTROL: model.config.data.control[0]}
    return {
        (label, tissue): model.operator(written.get(label, label), tissue=tissue)
        for label in labels
        for tissue in tissues
    }


def move(operators: dict[tuple[str, str], Operator], label: str, z: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """Latents of cells under a condition, each by the operator of its tissue; float64."""
    out = np.empty(z.shape)
    for name in set(tissue):
        rows = tissue == name
        out[rows] = operators[label, name](z[rows].astype(np.float64))
    return out


def displacements(model: Model, labels: Sequence[str], controls: Controls) -> np.ndarray:
    """(n_labels, n_cells, n_latent): where each condition moves each control cell, relative to control's own operator.

    Raises:
        PredictionError: a perturbation or tissue that the model does not know.
    """
    found = tissue_operators(model, [CONTROL, *labels], controls.tissues)
    still = move(found, CONTROL, controls.z, controls.tissue)
    return np.stack([move(found, label, controls.z, controls.tissue) - still for label in labels])


def decoded_change(model: Model, before: np.ndarray, after: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """(n_genes,) mean over cells of the change of log1p of decoded counts per 10,000.

    Args:
        before, after: (n, n_latent).
        tissue: (n,) str.
    """
    codes = model.vocabulary.codes("tissues", tissue)
    return (model.log_profiles(after, codes) - model.log_profiles(before, codes)).mean(0)


# --- axes ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Axis:
    """A direction in which conditions move cells, and the genes that move along it.

    kind "principal": a principal direction of the mean displacements of all conditions, which does not depend on the
    choice of bases. "shift": u_k, whose coefficient is beta_k. "linear": the field B_k z, with alpha_k.
    """

    kind: str
    number: int  # from 1
    effect: np.ndarray  # (n_genes,) change of log1p counts per 10,000, per typical (rms) coefficient
    spread: np.ndarray  # (n_genes,) standard deviation of it over control cells
    coefficients: np.ndarray  # (n_labels,) of each condition, relative to control
    strength: float  # norm of `effect`

    @property
    def name(self) -> str:
        sign = {"principal": "PR", "shift": "u", "linear": "B"}[self.kind]
        return f"{sign}{self.number}"

    def top(self, genes: Sequence[str], n: int = 15) -> list[tuple[str, float, float]]:
        """The n genes that move most: (gene, effect, spread over cells)."""
        order = np.argsort(-np.abs(self.effect), kind="stable")[:n]
        return [(str(genes[i]), float(self.effect[i]), float(self.spread[i])) for i in order]


def axes(model: Model, labels: Sequence[str], controls: Controls, *, n_principal: int = 4) -> list[Axis]:
    """Response axes with their genes: the decoder's Jacobian times the direction, averaged over control cells.

    The derivative of log1p(mu) is J d / (1 + mu), with mu at 10,000 counts per cell. It is taken per cell and then
    averaged: a gene whose response changes sign between cell types has a small effect and a large spread.

    Args:
        model: a trained model.
        labels: conditions whose coefficients scale the axes.
        controls: from `control_cells`.
        n_principal: principal directions; as many as the conditions and latents allow.

    Returns:
        Principal axes first, then the MAX_BASES largest shift and linear ones; each kind by strength.
    """
    tissues, codes = controls.tissues, model.vocabulary.codes("tissues", controls.tissue)
    found = tissue_operators(model, [CONTROL, *labels], tissues)

    def profile(name: str) -> np.ndarray:  # (n_labels, n_bases), mean over tissues
        rows = [
            [getattr(found[label, t], name) - getattr(found[CONTROL, t], name) for t in tissues] for label in labels
        ]
        return np.asarray(rows, np.float64).mean(1)

    alpha, beta = profile("alpha"), profile("beta")
    mean_shift = displacements(model, labels, controls).mean(1)
    left, size, right = np.linalg.svd(mean_shift, full_matrices=False)
    z, n = controls.z.astype(np.float64), len(controls.z)
    kept = [k for k in range(min(n_principal, len(size))) if size[k] > WEAK * max(size[0], 1e-300)]
    B, u = (np.asarray(model.params[f"operators.{name}"], np.float64) for name in ("B", "u"))
    # The sign of a singular vector is free: positive for the condition that uses it most.
    signs = np.sign(left[np.abs(left).argmax(0), np.arange(len(size))])
    left, right = left * signs, right * signs[:, None]
    fields = [("principal", k, np.tile(right[k], (n, 1)), left[:, k] * size[k]) for k in kept]
    fields += [("shift", k, np.tile(u[k], (n, 1)), beta[:, k]) for k in _strongest(u, beta)]
    fields += [("linear", k, z @ B[k].T, alpha[:, k]) for k in _strongest(B, alpha)]
    out = []
    for kind, k, direction, coefficients in fields:
        rms = float(np.sqrt((coefficients**2).mean()))
        slopes = model.slopes(z, direction * rms, codes)
        effect = slopes.mean(0)
        strength = float(np.linalg.norm(effect))
        out.append(Axis(kind, k + 1, effect, slopes.std(0), coefficients, strength))
    order = {"principal": 0, "shift": 1, "linear": 2}
    return sorted(out, key=lambda axis: (order[axis.kind], -axis.strength))


def _strongest(bases: np.ndarray, coefficients: np.ndarray) -> list[int]:
    """The MAX_BASES bases that the conditions use most, by norm times coefficients; an ensemble has many."""
    size = np.linalg.norm(bases.reshape(len(bases), -1), axis=1) * np.linalg.norm(coefficients, axis=0)
    return sorted(np.argsort(-size, kind="stable")[:MAX_BASES].tolist())


# --- similar conditions -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Similarity:
    """Cosines between conditions, and their clusters. Rows are in the order asked for."""

    labels: tuple[str, ...]
    image: np.ndarray  # (P, P) cosine of displacements of control cells; NaN for conditions without any
    profile: np.ndarray  # (P, P) cosine of (alpha, beta), control's subtracted
    magnitude: np.ndarray  # (P,) rms displacement, latent units
    linkage: np.ndarray  # SciPy's, average linkage on 1 - image, of the conditions in `clustered`
    clustered: np.ndarray  # indices of the conditions that move cells at all
    clusters: np.ndarray  # (P,) number from 1; 0 for a condition that moves nothing
    order: np.ndarray  # (P,) rows in the order of the dendrogram, those without displacement last


def similarity(model: Model, labels: Sequence[str], controls: Controls, *, cut: float = CLUSTER_AT) -> Similarity:
    """Which conditions act alike.

    Args:
        model: a trained model.
        labels: two conditions or more.
        controls: from `control_cells`.
        cut: clusters hold conditions whose mean cosine is above it.

    Raises:
        PredictionError: fewer than two conditions, or none that moves a cell.
    """
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    if len(set(labels)) < 2 or len(set(labels)) < len(labels):
        raise PredictionError(f"{len(labels)} conditions were given; two or more different ones were wanted")
    moved = displacements(model, labels, controls).reshape(len(labels), -1)
    magnitude = np.sqrt((moved**2).sum(1) / len(controls.z))
    tissues = controls.tissues
    found = tissue_operators(model, [CONTROL, *labels], tissues)

    def coefficients(label: str) -> np.ndarray:
        return np.concatenate([np.concatenate([found[label, t].alpha, found[label, t].beta]) for t in tissues])

    profiles = np.stack([coefficients(label) - coefficients(CONTROL) for label in labels]).astype(np.float64)
    image, profile = _cosines(moved), _cosines(profiles)
    able = np.flatnonzero(np.isfinite(np.diag(image)) & (magnitude > WEAK * magnitude.max()))
    if len(able) < 2:
        raise PredictionError("fewer than two conditions move cells; there is nothing to compare")
    apart = np.clip(1.0 - image[np.ix_(able, able)], 0.0, 2.0)
    np.fill_diagonal(apart, 0.0)
    tree = hierarchy.linkage(squareform((apart + apart.T) / 2, checks=False), "average", optimal_ordering=True)
    clusters = np.zeros(len(labels), int)
    clusters[able] = hierarchy.fcluster(tree, 1.0 - cut, "distance")
    order = [*able[hierarchy.leaves_list(tree)], *(i for i in range(len(labels)) if i not in set(able))]
    return Similarity(tuple(labels), image, profile, magnitude, tree, able, clusters, np.array(order))


def _cosines(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1)
    weak = norms <= WEAK * max(norms.max(), 1e-300)
    unit = rows / np.where(weak, np.nan, norms)[:, None]
    return np.clip(unit @ unit.T, -1.0, 1.0)


# --- what undoes it -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Candidate:
    """A perturbation applied after the one to be undone."""

    label: str
    after: float  # energy distance (V) of K_c(K_p(controls)) to controls, mean over contexts
    together: float  # of the operator of the combination p+c, both at once
    restored: float  # 1 - after / nothing: 1 all the way back, 0 no help, negative further away
    cosine: float  # of the displacements of c and p; -1 is opposite; NaN where one moves nothing


@dataclass(frozen=True)
class Corrections:
    """Candidates that undo a perturbation, the best first."""

    perturbation: str
    nothing: float  # energy distance of K_p(controls) to controls: what remains when nothing is done
    candidates: tuple[Candidate, ...]

    @property
    def helping(self) -> tuple[Candidate, ...]:
        """Candidates that end nearer to the controls than doing nothing."""
        return tuple(one for one in self.candidates if one.after < self.nothing)


def corrections(
    model: Model, perturbation: str, controls: Controls, candidates: Sequence[str] | None = None
) -> Corrections:
    """Which perturbation undoes this one: candidates ranked by where perturbed controls end, not by direction alone.

    A condition of opposite direction but twice the size overshoots, and one that is opposite on average can be far off
    for one cell type; both show in the distance and not in the cosine. Distances are taken within each tissue and cell
    type, between the same control cells before and after, and averaged over them.

    Args:
        model: a trained model.
        perturbation: the one to undo.
        controls: from `control_cells`.
        candidates: labels; None for every single perturbation of the model but the members of this one.

    Raises:
        PredictionError: no candidate, or a name that the model does not know.
    """
    own = {name for name, _ in model.members(perturbation)}
    if not own:
        raise PredictionError("control changes nothing; name a perturbation that is to be undone")
    if candidates is None:
        candidates = [name for name in model.vocabulary.perturbations[1:] if name not in own]
    if not candidates:
        raise PredictionError(f"there is no candidate beside {perturbation!r}; the model knows no other perturbation")
    separator = model.config.data.separator
    pairs = {label: f"{perturbation}{separator}{label}" for label in candidates if separator}
    found = tissue_operators(model, [CONTROL, perturbation, *candidates, *pairs.values()], controls.tissues)
    z, tissue = controls.z, controls.tissue
    still = move(found, CONTROL, z, tissue)
    ill = move(found, perturbation, z, tissue)

    def distance(moved: np.ndarray) -> float:
        parts = [energy_distance(moved[rows], still[rows], estimator="v") for rows in controls.contexts.values()]
        return float(np.mean(parts))

    nothing = distance(ill)
    shifts = {label: move(found, label, z, tissue) - still for label in (perturbation, *candidates)}
    # K_c was trained as a map from controls: what K_0 does to a control is no part of its effect, and is taken out.
    base = move(found, CONTROL, ill, tissue) - ill
    rows = []
    for label in candidates:
        after = distance(move(found, label, ill, tissue) - base)
        together = distance(move(found, pairs[label], z, tissue)) if pairs else float("nan")
        cosine = _cosines(np.stack([shifts[perturbation].ravel(), shifts[label].ravel()]))[0, 1]
        restored = 1.0 - after / nothing if nothing > 0 else float("nan")
        rows.append(Candidate(label, after, together, restored, float(cosine)))
    return Corrections(perturbation, nothing, tuple(sorted(rows, key=lambda one: one.after)))


# --- tissues ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Tissues:
    """One perturbation in every tissue and cell type."""

    perturbation: str
    tissues: tuple[str, ...]
    distance: np.ndarray  # (T, T) Frobenius norm of the difference of the operators (A and b), control's subtracted
    contexts: tuple[tuple[str, str], ...]  # (tissue, cell type)
    magnitude: np.ndarray  # (C,) rms displacement
    angle: np.ndarray  # (C, C) degrees between mean displacements; NaN where one moves nothing
    correlation: np.ndarray  # (C, C) of the decoded changes over genes
    change: np.ndarray  # (C, n_genes) decoded change of log1p counts per 10,000
    shared: np.ndarray  # (C, C) share of the top genes, by absolute change, that two contexts have in common
    n_top: int

    def common(self, genes: Sequence[str]) -> list[tuple[str, int, float]]:
        """Genes by the number of contexts in whose top they are: (gene, contexts, mean change)."""
        member = _top(self.change, self.n_top).sum(0)
        order = sorted(np.flatnonzero(member), key=lambda g: (-member[g], -abs(self.change[:, g].mean())))
        return [(str(genes[int(g)]), int(member[g]), float(self.change[:, g].mean())) for g in order]


def across_tissues(model: Model, perturbation: str, controls: Controls, *, n_top: int = 20) -> Tissues:
    """How differently one perturbation acts: operators between tissues, displacements and genes between contexts.

    Cell types of a tissue share the operator; what differs between them is where their cells lie. Control's operator of
    the tissue is subtracted, or differences between tissues themselves would count.

    Raises:
        PredictionError: a perturbation that the model does not know.
    """
    tissues, contexts = controls.tissues, controls.contexts
    found = tissue_operators(model, [CONTROL, perturbation], tissues)
    maps = []
    for name in tissues:
        ours, still = found[perturbation, name], found[CONTROL, name]
        maps.append(np.column_stack([ours.A - still.A, ours.b - still.b]).astype(np.float64))
    distance = np.array([[np.linalg.norm(a - b) for b in maps] for a in maps])
    moved = move(found, perturbation, controls.z, controls.tissue)
    still = move(found, CONTROL, controls.z, controls.tissue)
    shift = np.stack([(moved - still)[rows].mean(0) for rows in contexts.values()])
    size = np.array([np.sqrt(((moved - still)[rows] ** 2).sum(1).mean()) for rows in contexts.values()])
    change = np.stack(
        [decoded_change(model, still[rows], moved[rows], controls.tissue[rows]) for rows in contexts.values()]
    )
    top = _top(change, n_top)
    n_top = int(top.sum(1).max())
    shared = (top[:, None] & top[None]).sum(-1) / n_top
    centred = change - change.mean(1, keepdims=True)
    names = tuple(contexts)
    angle = np.degrees(np.arccos(_cosines(shift)))
    return Tissues(perturbation, tuple(tissues), distance, names, size, angle, _cosines(centred), change, shared, n_top)


def _top(change: np.ndarray, n: int) -> np.ndarray:
    """(C, n_genes) bool: the n genes of largest absolute change of each row."""
    n = min(n, change.shape[1])
    out = np.zeros(change.shape, bool)
    np.put_along_axis(out, np.argsort(-np.abs(change), axis=1, kind="stable")[:, :n], True, axis=1)
    return out
