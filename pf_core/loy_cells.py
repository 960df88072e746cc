"""LOY as a perturbation: labels that `pf train` reads, and LOY cells moved back to XY.

The direction of the correction. Training finds K with K(XY) ~ LOY in distribution, so K's inverse moves LOY cells back:
z -> A^-1 (z - b). How far it can miss is known: for any coupling of K(XY) and LOY, |K^-1 x - K^-1 y| <= |x - y| / s
with s the smallest singular value of A, so that in Wasserstein distance W(K^-1 LOY, XY) <= W(LOY, K XY) / s. What
training left over is amplified by at most 1/s. With A near the identity, where the shrinkage keeps it, that is little;
where A is ill-conditioned nothing useful is left, and the inverse is refused. The alternative, an operator trained the
other way (`pf train --control LOY` with XY as the perturbation), minimises the distance of the corrected cells
directly, but needs a second run, and its cells are judged by the loss it was trained with. The inverse is a test of
the model that exists.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pf_core import data
from pf_core.errors import DataError, PredictionError, nearest
from pf_core.genes import align_genes
from pf_core.labels import condition_label, texts
from pf_core.loy import LEVEL, LOY, NO_Y, UNDECIDED, XY, LoyScores, loy_score
from pf_core.metrics import energy_distance, real_pca
from pf_core.noise import generator
from pf_core.operator import Operator
from pf_core.outputs import predicted_counts
from pf_core.y_genes import AMBIGUOUS_GENES, PAR_GENES, Y_GENES

if TYPE_CHECKING:
    from anndata import AnnData

    from pf_core.model import Model

__all__ = ["Correction", "CorrectionContext", "invert", "label_loy", "loy_report", "virtual_correction"]

COLUMN = "loy"
MAX_CONDITION = 10.0  # largest condition number of A that is inverted
MAX_CELLS = 1000  # per side and context, for distances
COLUMNS = (COLUMN, "loy_call", "loy_reason", "loy_score", "loy_posterior", "y_counts", "y_expected")


def label_loy(
    adata: AnnData,
    *,
    cell_type: str = "cell_type",
    donor: str = "donor",
    xy: Sequence[str] = (),
    layer: str = "",
    y_genes: Sequence[str] = Y_GENES,
    ambient: float | None = None,
    level: float = LEVEL,
    keep_y: bool = False,
) -> tuple[AnnData, LoyScores]:
    """A copy of the cells with their LOY labels.

    obs["loy"] is "LOY", "XY" or missing (undecided, or without a Y), which is what `pf train --perturbation-column loy
    --control XY` reads; cells without a label are left out there and counted. obs["loy_call"], "loy_reason",
    "loy_score", "loy_posterior", "y_counts" and "y_expected" say why. uns["loy"] is `loy_report` as JSON.

    Args:
        adata: raw counts of all genes, in X, layers["counts"] or `layer`.
        cell_type, donor: obs columns; "" for one type, or one donor.
        xy: cells known to be XY, "column=value"; several add up. None: the mixture is estimated.
        layer: of the counts.
        y_genes, ambient, level: as in `loy_score`.
        keep_y: keep the Y genes among the genes. They are taken out otherwise: a model that sees them learns the
            label from the counts that it was made of, and no response.

    Raises:
        DataError: a column, layer or value that is not there, labels that exist already, or what `loy_score` raises.
    """
    if not adata.var_names.is_unique:
        raise DataError("gene names are repeated; make them unique with adata.var_names_make_unique()")
    taken = [name for name in COLUMNS if name in adata.obs]
    if taken:
        raise DataError(f"obs has a column {taken[0]!r} already; label cells that are not labelled, or drop it")
    layer = layer or ("counts" if "counts" in adata.layers else "")
    if layer and layer not in adata.layers:
        raise DataError(f"there is no layer {layer!r}; {nearest(layer, list(adata.layers))}")
    counts = adata.layers[layer] if layer else adata.X
    labels = {
        name: _column(adata, column, name) if column else None
        for name, column in (("cell_type", cell_type), ("donor", donor))
    }
    scores = loy_score(
        counts,
        [str(name) for name in adata.var_names],
        **labels,
        control=_known(adata, xy) if xy else None,
        y_genes=y_genes,
        ambient=ambient,
        level=level,
    )
    import pandas as pd

    barred = set() if keep_y else {*Y_GENES, *AMBIGUOUS_GENES, *y_genes}
    out = adata[:, [name not in barred for name in adata.var_names]].copy()
    called = np.isin(scores.call, (XY, LOY))
    out.obs[COLUMN] = pd.Series(scores.call, index=out.obs.index).where(called).astype(pd.CategoricalDtype([LOY, XY]))
    out.obs["loy_call"] = pd.Categorical(scores.call, categories=[XY, LOY, UNDECIDED, NO_Y])
    out.obs["loy_reason"] = pd.Categorical(np.where(scores.reason == "", "called", scores.reason))
    out.obs["loy_score"], out.obs["loy_posterior"] = scores.score, scores.posterior
    out.obs["y_counts"], out.obs["y_expected"] = scores.observed, scores.expected
    report = loy_report(scores, counts, [str(name) for name in adata.var_names])
    out.uns["loy"] = json.dumps(report)
    return out, scores


def loy_report(scores: LoyScores, counts: Any, genes: Sequence[str]) -> dict[str, Any]:
    """What was used and found, in plain values.

    "control_ratio" compares LOY with XY cells in the control genes, as the median over genes (about 1, or depth is
    missing and not the Y).
    "par_ratio" compares pseudoautosomal genes, which played no part in the call: one copy of two is left, so a value
    below 1 confirms that the Y is gone.
    """
    from scipy import sparse

    matrix = sparse.csr_matrix(counts)
    total = np.asarray(matrix.sum(1), float).ravel()
    lost, kept = scores.call == LOY, scores.call == XY
    par = [place for place, gene in enumerate(genes) if gene in PAR_GENES]
    out: dict[str, Any] = {
        "calls": scores.counts(),
        "genes": list(scores.genes),
        "dropped": dict(scores.dropped),
        "control_genes": list(scores.control_genes),
        "ambient": scores.ambient,
        "ambient_source": scores.ambient_source,
        "donors": {name: dict(found) for name, found in scores.donors.items()},
        "types": {name: dict(found) for name, found in scores.types.items()},
        "control_ratio": None,
        "par_ratio": None,
    }
    if lost.any() and kept.any():
        out["control_ratio"] = _control_ratio(scores, matrix, genes, total, lost, kept)
        rates = [float(matrix[rows][:, par].sum() / total[rows].sum()) for rows in (lost, kept)] if par else [0.0, 0.0]
        out["par_ratio"] = rates[0] / rates[1] if rates[1] > 0 else None
    return json.loads(json.dumps(out), parse_constant=lambda _: None)  # JSON knows no NaN: null


def _control_ratio(
    scores: LoyScores, matrix: Any, genes: Sequence[str], total: np.ndarray, lost: np.ndarray, kept: np.ndarray
) -> float | None:
    """Median over control genes of the rate in LOY cells over that in XY cells: genes that answer LOY are outvoted."""
    place = {gene: column for column, gene in enumerate(genes)}
    columns = [place[gene] for gene in scores.control_genes]
    rates = [np.asarray(matrix[rows][:, columns].sum(0), float).ravel() / total[rows].sum() for rows in (lost, kept)]
    seen = rates[1] > 0
    return float(np.median(rates[0][seen] / rates[1][seen])) if seen.any() else None


def _column(adata: AnnData, column: str, what: str) -> np.ndarray:
    if column not in adata.obs:
        raise DataError(
            f"obs has no {what} column {column!r} ({nearest(column, map(str, adata.obs))}); name it, or give '' if all"
            f" cells are of one {what.replace('_', ' ')}"
        )
    return texts(adata.obs[column], column)[0]


def _known(adata: AnnData, clauses: Sequence[str]) -> np.ndarray:
    mask = np.zeros(adata.n_obs, bool)
    for clause in clauses:
        column, equals, value = (part.strip() for part in clause.partition("="))
        if not equals:
            raise DataError(f"{clause!r} does not say which cells are XY; column=value was wanted, such as donor=D1")
        labels = _column(adata, column, "control")
        if value not in labels:
            raise DataError(f"no cell has {column}={value}; {nearest(value, sorted(set(labels)))}")
        mask |= labels == value
    return mask


# --- virtual correction -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class CorrectionContext:
    """One tissue and cell type: energy distances (U) of LOY cells to real XY cells, before and after."""

    tissue: str
    cell_type: str
    n_loy: int
    n_xy: int
    before: float  # in the model's latent space
    after: float
    before_counts: float  # on principal components of log-normalised counts
    after_counts: float
    floor_counts: float  # between two halves of the XY cells there


@dataclass(frozen=True)
class Correction:
    """LOY cells moved back, and how near they came to XY cells."""

    contexts: tuple[CorrectionContext, ...]
    condition_number: float  # the largest, of the operators that were inverted
    amplification: float  # 1 / smallest singular value: the most by which an error of the operator grows
    cells: AnnData  # corrected counts; obs of the LOY cells; latents in obsm

    def mean(self, name: str) -> float:
        """A distance, averaged over contexts by their LOY cells."""
        weight = [context.n_loy for context in self.contexts]
        return float(np.average([getattr(context, name) for context in self.contexts], weights=weight))


def invert(operator: Operator, *, max_condition: float = MAX_CONDITION) -> Operator:
    """The inverse K^-1(z) = A^-1 (z - b) of an operator.

    Raises:
        PredictionError: A is singular or too ill-conditioned for its inverse to mean anything.
    """
    number = float(np.linalg.cond(np.asarray(operator.A, np.float64)))
    if not number <= max_condition:
        raise PredictionError(
            f"the operator of {operator.label!r} has condition number {number:.3g}, more than {max_condition:g}: its"
            " inverse would amplify noise by as much. Train with more operator.shrinkage, or train the other direction"
            " (the perturbed cells as --control) and predict with that run"
        )
    inverse = np.linalg.inv(np.asarray(operator.A, np.float64))
    return Operator(f"{operator.label} undone", inverse, -inverse @ operator.b, -operator.alpha, -operator.beta)


def virtual_correction(
    model: Model,
    loy_cells: Any,
    xy_cells: Any = None,
    *,
    perturbation: str = LOY,
    max_condition: float = MAX_CONDITION,
    seed: int = 0,
) -> Correction:
    """Move perturbed cells back by the inverse of their operator, and compare them with real control cells.

    Works for any perturbation; LOY is the one it is named after.

    Args:
        model: trained with LOY as a perturbation and XY as control.
        loy_cells: AnnData or path; its cells labelled `perturbation` are moved.
        xy_cells: AnnData or path with control cells; None takes those of `loy_cells`.
        perturbation: the label.
        max_condition: of the operators; above it, the inverse is refused.
        seed: of the draws of the corrected counts, and of the cells that are compared.

    Returns:
        Correction; contexts without 2 cells of each kind are not compared.

    Raises:
        DataError: the data cannot be used.
        PredictionError: no perturbed or control cell, an unknown perturbation, or an ill-conditioned operator.
    """
    import anndata
    import pandas as pd

    wanted = condition_label(model.members(perturbation), model.config.data.separator)
    source = _load(model, loy_cells)
    reference = source if xy_cells is None else _load(model, xy_cells)
    lost, kept = np.flatnonzero(source.label == wanted), np.flatnonzero(reference.is_control)
    if not len(lost) or not len(kept):
        raise PredictionError(
            f"there are {len(lost)} cells of {wanted!r} and {len(kept)} control cells; some of both were wanted: label"
            " them with `pf loy`, and train and correct with the same columns"
        )
    z, target = model.encode(source, lost), model.encode(reference, kept)
    back, numbers, gains = np.empty_like(z), [0.0], [0.0]
    places = sorted(set(zip(source.tissue[lost], source.batch[lost], strict=True)))
    members = model.members(perturbation)
    for tissue, batch in places:
        rows = (source.tissue[lost] == tissue) & (source.batch[lost] == batch)
        covariates = source.covariates[lost][rows].mean(0, keepdims=True)
        prepared = model.conditions(members, [model._tissue(tissue)], [batch], covariates)
        operator = model.operators(prepared, [wanted])[0]
        back[rows] = invert(operator, max_condition=max_condition)(z[rows])
        singular = np.linalg.svd(np.asarray(operator.A, np.float64), compute_uv=False)
        numbers.append(float(singular[0] / singular[-1]))
        gains.append(float(1.0 / singular[-1]))
    codes = model.vocabulary.codes("tissues", source.tissue[lost])
    library = source.library()[lost].astype(model.config.dtype)

    def means(rows: slice) -> tuple[np.ndarray, np.ndarray]:
        rest = (codes[rows], library[rows])
        return model.decode(z[rows], *rest), model.decode(back[rows], *rest)

    counts, real = source.rows(lost), reference.rows(kept)
    corrected = predicted_counts(counts, means, seed=seed, name=f"{wanted} undone", r=model.dispersion())
    contexts = _compare(source, lost, reference, kept, (z, back, target), (counts, corrected, real), seed)
    obs = source.obs.iloc[lost].copy()
    cells = anndata.AnnData(corrected, obs=obs, var=pd.DataFrame(index=pd.Index(model.vocabulary.genes)))
    cells.obsm["X_before_latent"], cells.obsm["X_latent"] = z, back
    return Correction(tuple(contexts), max(numbers), max(gains), cells)


def _load(model: Model, source: Any) -> data.Dataset:
    dataset = data.load(source, dataclasses.replace(model.config.data, min_counts=0), training=False)
    return align_genes(dataset, model.vocabulary.genes)[0]


def _compare(
    source: data.Dataset,
    lost: np.ndarray,
    reference: data.Dataset,
    kept: np.ndarray,
    latents: tuple[np.ndarray, np.ndarray, np.ndarray],
    counts: tuple[Any, Any, Any],
    seed: int,
) -> list[CorrectionContext]:
    from scipy import sparse

    pca = real_pca(sparse.csr_matrix(sparse.vstack([counts[0], counts[2]])))
    scores = [pca.transform(part) for part in counts]
    found = []
    for tissue, kind in sorted(set(zip(source.tissue[lost], source.cell_type[lost], strict=True))):
        rng = generator(seed, f"correction.{tissue}.{kind}")
        ours = np.flatnonzero((source.tissue[lost] == tissue) & (source.cell_type[lost] == kind))
        theirs = np.flatnonzero((reference.tissue[kept] == tissue) & (reference.cell_type[kept] == kind))
        if len(ours) < 2 or len(theirs) < 4:
            continue
        ours, theirs = rng.permutation(ours)[:MAX_CELLS], rng.permutation(theirs)[:MAX_CELLS]
        half = len(theirs) // 2
        found.append(
            CorrectionContext(
                str(tissue),
                str(kind),
                len(ours),
                len(theirs),
                energy_distance(latents[0][ours], latents[2][theirs]),
                energy_distance(latents[1][ours], latents[2][theirs]),
                energy_distance(scores[0][ours], scores[2][theirs]),
                energy_distance(scores[1][ours], scores[2][theirs]),
                energy_distance(scores[2][theirs[:half]], scores[2][theirs[half:]]),
            )
        )
    if not found:
        raise PredictionError(
            "no tissue and cell type has 2 perturbed and 4 control cells; give control cells of the same contexts"
        )
    return found
