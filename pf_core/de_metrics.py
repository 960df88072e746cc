"""Agreement of two tables of differential expression: real and predicted.

Names and values are those of cell-eval 0.8.2 (Arc Institute). A gene is significant in a perturbation where its
adjusted p-value (fdr) is below 0.05. Each function returns an array (n_perturbations,), in the order of the tables, or
one number for the screen. cell-eval keeps its tables in float32, so that values within rounding of each other are ties;
so do these functions, or ranks would differ.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from pf_core.differential import DETable
from pf_core.screen_metrics import spearman

__all__ = [
    "de_direction_match",
    "de_nsig_counts",
    "de_sig_genes_recall",
    "de_spearman_lfc_sig",
    "de_spearman_sig",
    "overlap_at",
    "pr_auc",
    "precision_at",
    "roc_auc",
]

FDR = np.float32(0.05)


def _check(real: DETable, predicted: DETable) -> None:
    if real.perturbations != predicted.perturbations or real.genes != predicted.genes:
        raise ValueError("real and predicted tables have different perturbations or genes; make them from one list")


def _significant(table: DETable) -> np.ndarray:
    return table.fdr.astype(np.float32) < FDR


def _changes(table: DETable) -> np.ndarray:
    return table.log2_fold_change.astype(np.float32)


def _ranked(table: DETable) -> list[np.ndarray]:
    """Significant genes of each perturbation, the largest |log2 fold change| first, ties in the order of genes."""
    sizes, significant = np.abs(_changes(table)), _significant(table)
    return [
        genes[np.argsort(-size[genes], kind="stable")]
        for size, genes in zip(sizes, map(np.flatnonzero, significant), strict=True)
    ]


def overlap_at(real: DETable, predicted: DETable, k: int | None = None) -> np.ndarray:
    """Share of the k strongest real significant genes found among the k strongest predicted ones. 1 is best.

    k is at most the number of real significant genes, and that number where it is None (cell-eval's overlap_at_N, which
    is the Virtual Cell Challenge's DES). Strongest by |log2 fold change|. 0 where no gene is really significant.
    """
    return _overlap(real, predicted, k, divide_by="real")


def precision_at(real: DETable, predicted: DETable, k: int | None = None) -> np.ndarray:
    """Share of the k strongest predicted significant genes found among the k strongest real ones. 1 is best.

    k is at most the number of predicted significant genes, and that number where it is None (cell-eval's
    precision_at_N). 0 where no gene is predicted to be significant.
    """
    return _overlap(real, predicted, k, divide_by="predicted")


def _overlap(
    real: DETable, predicted: DETable, k: int | None, *, divide_by: Literal["real", "predicted"]
) -> np.ndarray:
    _check(real, predicted)
    if k is not None and k < 1:
        raise ValueError(f"k={k}; a number of genes of 1 or more, or None for all, was wanted")
    shares = []
    for first, second in zip(_ranked(real), _ranked(predicted), strict=True):
        n = len(first if divide_by == "real" else second)
        n = n if k is None else min(k, n)
        shares.append(np.intersect1d(first[:n], second[:n]).size / n if n else 0.0)
    return np.array(shares)


def de_nsig_counts(real: DETable, predicted: DETable) -> tuple[np.ndarray, np.ndarray]:
    """Number of significant genes of each perturbation, real and predicted, (n_perturbations,) each."""
    _check(real, predicted)
    return _significant(real).sum(axis=1), _significant(predicted).sum(axis=1)


def de_spearman_sig(real: DETable, predicted: DETable) -> float:
    """Spearman correlation over perturbations of the numbers of significant genes. In -1..1, 1 is best.

    Over perturbations with real significant genes only; 1 where there are none, and NaN for a single one or equal
    numbers, as in cell-eval.
    """
    first, second = de_nsig_counts(real, predicted)
    some = first > 0
    return spearman(first[some], second[some]) if some.any() else 1.0


def de_spearman_lfc_sig(real: DETable, predicted: DETable) -> np.ndarray:
    """Spearman correlation of log2 fold changes over the really significant genes. In -1..1, 1 is best.

    Infinite changes are the largest or smallest. NaN where fewer than two genes are significant, or changes are equal.
    """
    _check(real, predicted)
    rows = zip(_changes(real), _changes(predicted), _significant(real), strict=True)
    return np.array([spearman(first[here], second[here]) for first, second, here in rows])


def de_direction_match(real: DETable, predicted: DETable) -> np.ndarray:
    """Share of the really significant genes whose predicted change has the right sign. In 0..1, 1 is best.

    A predicted change of exactly 0 has the wrong sign. NaN where no gene is significant.
    """
    _check(real, predicted)
    return _share(np.sign(_changes(real)) == np.sign(_changes(predicted)), _significant(real))


def de_sig_genes_recall(real: DETable, predicted: DETable) -> np.ndarray:
    """Share of the really significant genes that are predicted to be significant. In 0..1, 1 is best; NaN for none."""
    _check(real, predicted)
    return _share(_significant(predicted), _significant(real))


def _share(right: np.ndarray, among: np.ndarray) -> np.ndarray:
    n = among.sum(axis=1)
    return np.divide((right & among).sum(axis=1), n, out=np.full(n.shape, np.nan), where=n > 0)


def roc_auc(real: DETable, predicted: DETable) -> np.ndarray:
    """Area under the ROC curve of real significance, ranked by the predicted -log10 fdr. In 0..1, 1 best, 1/2 chance.

    fdr below 1e-10 is taken as 1e-10. NaN where all genes or none are significant.
    """
    from sklearn.metrics import roc_auc_score

    return _area(real, predicted, roc_auc_score)


def pr_auc(real: DETable, predicted: DETable) -> np.ndarray:
    """Average precision of real significance, ranked by the predicted -log10 fdr. 1 is best; chance is the true share.

    fdr below 1e-10 is taken as 1e-10. NaN where all genes or none are significant.
    """
    from sklearn.metrics import average_precision_score

    return _area(real, predicted, average_precision_score)


def _area(real: DETable, predicted: DETable, of) -> np.ndarray:
    _check(real, predicted)
    scores = -np.log10(np.clip(predicted.fdr.astype(np.float32), np.float32(1e-10), np.float32(1.0)))
    labels = _significant(real)
    return np.array(
        [
            of(label, score) if label.any() and not label.all() else float("nan")
            for label, score in zip(labels, scores, strict=True)
        ]
    )
