"""Which genes a model sees: highly variable ones, and the alignment of new data to a trained model's genes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pf_core.dataset import Dataset
from pf_core.errors import DataError, nearest

__all__ = ["align_genes", "highly_variable"]


def highly_variable(dataset: Dataset, cells: np.ndarray, n: int, keep: Sequence[str] = ()) -> list[str]:
    """The n most variable genes among these cells, plus every perturbed gene, in the dataset's order.

    Counts are standardised by the standard deviation that a quadratic fit of log variance on log mean expects, clipped
    at sqrt(n_cells), and ranked by their variance (Stuart et al. 2019, Cell 177:1888, "vst"; the original fit is a
    loess). Two passes over CSR blocks; nothing is made dense.

    Args:
        dataset: all genes.
        cells: indices of the training cells; no other cell is read.
        n: genes wanted; 0 or more than there are keeps all.
        keep: further genes to keep where they exist.

    Returns:
        Names: n, and the genes among dataset.perturbations and `keep` that were not chosen by variance.
    """
    if n <= 0 or n >= dataset.n_genes:
        return [str(gene) for gene in dataset.genes]
    n_cells = len(cells)
    if n_cells < 2:
        raise DataError(f"highly variable genes need 2 training cells or more, there are {n_cells}; hold out less")
    first, second = np.zeros(dataset.n_genes), np.zeros(dataset.n_genes)
    for _, rows in dataset.blocks(cells):
        values = rows.data.astype(np.float64)
        first += np.bincount(rows.indices, values, dataset.n_genes)
        second += np.bincount(rows.indices, values**2, dataset.n_genes)
    mean = first / n_cells
    variance = (second - n_cells * mean**2) / (n_cells - 1)
    spread = _expected_spread(mean, variance)
    ceiling = mean + spread * np.sqrt(n_cells)
    first, second = np.zeros(dataset.n_genes), np.zeros(dataset.n_genes)
    for _, rows in dataset.blocks(cells):
        values = np.minimum(rows.data.astype(np.float64), ceiling[rows.indices])
        first += np.bincount(rows.indices, values, dataset.n_genes)
        second += np.bincount(rows.indices, values**2, dataset.n_genes)
    score = (n_cells * mean**2 + second - 2.0 * mean * first) / ((n_cells - 1) * spread**2)
    chosen = np.isin(dataset.genes, [*dataset.perturbations, *keep])
    chosen[np.argsort(-score, kind="stable")[:n]] = True
    return [str(gene) for gene in dataset.genes[chosen]]


def _expected_spread(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Standard deviation expected at each mean; infinite, so that the score is 0, for genes that do not vary."""
    varies = variance > 1e-12 * np.maximum(mean, 1.0) ** 2
    spread = np.full(len(mean), np.inf)
    if varies.any():
        x, y = np.log10(mean[varies]), np.log10(variance[varies])
        degree = min(2, len(np.unique(x)) - 1)
        fit = np.polynomial.Polynomial.fit(x, y, degree) if degree else np.mean
        spread[varies] = np.sqrt(10.0 ** (fit(x) if degree else np.full(len(x), y.mean())))
    return spread


def align_genes(dataset: Dataset, genes: Sequence[str]) -> tuple[Dataset, dict[str, Any]]:
    """The dataset with exactly these genes in this order; genes that it lacks are zeros, counted in the report.

    Args:
        dataset: cells to align.
        genes: the genes of a trained model.

    Returns:
        (dataset, {"wanted": n, "found": n, "missing": names, "unused": n genes of the dataset that were left out}).

    Raises:
        DataError: fewer than half of the genes are found.
    """
    position = {gene: index for index, gene in enumerate(dataset.genes)}
    columns = np.array([position.get(gene, -1) for gene in genes], dtype=np.int64)
    missing = [str(gene) for gene in np.asarray(genes, dtype=object)[columns < 0]]
    found = len(columns) - len(missing)
    if 2 * found < len(columns):
        raise DataError(
            f"only {found} of the model's {len(columns)} genes are in the data; name genes as in training "
            f"({missing[0]!r} is missing, {nearest(missing[0], position)})"
        )
    report = {"wanted": len(columns), "found": found, "missing": missing, "unused": dataset.n_genes - found}
    return dataset.with_columns(list(genes), columns), report
