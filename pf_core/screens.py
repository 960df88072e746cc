"""A screen: log-normalised cells of many perturbations and of control, the unit that screen-wide metrics compare.

Perturbations are taken in sorted order everywhere, so an array (n_perturbations,) of one function lines up with that of
another. Metrics of a pair want the same genes and the same labels on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse

from pf_core.outputs import Csr

__all__ = ["Screen", "check_pair"]

MAX_LOG = 15.0  # log1p of 3 million counts per cell; cell-eval draws the line at the same place


class Screen:
    """Log-normalised cells with the perturbation of each.

    Attributes:
        cells: (n_cells, n_genes) CSR float64, log1p of normalised counts as from `metrics.normalise`.
        labels: (n_cells,) perturbation of each cell.
        genes: (n_genes,) names.
        control: the label of the control cells.
        perturbations: sorted labels without control.
    """

    def __init__(self, cells: Any, labels: Sequence[str] | np.ndarray, genes: Sequence[str], *, control: str):
        """Check and keep the cells.

        Args:
            cells: (n_cells, n_genes) sparse or dense, log1p of normalised counts.
            labels: (n_cells,) perturbation of each cell.
            genes: (n_genes,) names, each once; a perturbation named like a gene has it as its target.
            control: the label of the control cells.

        Raises:
            ValueError: a label is missing, lengths do not match, values are not finite or are raw counts, a gene is
                named twice, there are no control cells or no others.
        """
        missing = [label for label in labels if not isinstance(label, str)]
        if missing:
            raise ValueError(f"labels holds {missing[0]!r}, which is no string; name every cell's perturbation")
        self.cells: Csr = sparse.csr_matrix(cells, dtype=np.float64)
        self.labels = np.asarray(labels, dtype=str)
        self.genes = tuple(str(gene) for gene in genes)
        self.control = str(control)
        n_cells, n_genes = self.cells.shape
        if self.labels.shape != (n_cells,) or len(self.genes) != n_genes:
            raise ValueError(
                f"cells has shape {(n_cells, n_genes)}, but there are {self.labels.size} labels and {len(self.genes)} "
                "genes; one label per cell and one name per gene were wanted"
            )
        if len(set(self.genes)) != n_genes:
            raise ValueError("a gene is named twice; make gene names unique")
        if not np.all(np.isfinite(self.cells.data)):
            raise ValueError("cells holds values that are not finite")
        if self.cells.data.size and self.cells.data.max() > MAX_LOG:
            raise ValueError(
                f"cells holds {self.cells.data.max():g}; log1p of normalised counts is at most {MAX_LOG:g}, pass "
                "metrics.normalise(counts)"
            )
        found = np.unique(self.labels)
        if self.control not in found:
            raise ValueError(f"no cell is labelled {self.control!r}, the control; labels are {_some(found)}")
        self.perturbations = tuple(str(name) for name in found if name != self.control)
        if not self.perturbations:
            raise ValueError(f"all cells are labelled {self.control!r}, the control; nothing is left to compare")

    def codes(self) -> np.ndarray:
        """(n_cells,) index into perturbations; control is len(perturbations)."""
        names = np.array(self.perturbations)
        codes = np.searchsorted(names, self.labels)
        codes[self.labels == self.control] = len(names)
        return codes

    def means(self, codes: np.ndarray | None = None, cells: Csr | None = None) -> np.ndarray:
        """(n_perturbations + 1, n_genes) mean of the cells of each perturbation, control last."""
        codes = self.codes() if codes is None else codes
        cells = self.cells if cells is None else cells
        sizes = np.bincount(codes, minlength=len(self.perturbations) + 1)
        # Sums first: the mean of equal values is then that value, and no change is exactly 0.
        ones = sparse.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))), (len(sizes), len(codes)))
        sums: Csr = ones @ cells
        return sums.toarray() / sizes[:, None]

    def take(self, cells: np.ndarray) -> Screen:
        """The screen of these cells (indices; they may repeat)."""
        return Screen(self.cells[cells], self.labels[cells], self.genes, control=self.control)

    def of(self, label: str) -> Csr:
        """The cells with a label."""
        return self.cells[np.flatnonzero(self.labels == label)]


def check_pair(real: Screen, predicted: Screen) -> None:
    """Refuse two screens that cannot be compared gene by gene and perturbation by perturbation."""
    if real.genes != predicted.genes:
        raise ValueError("real and predicted have different genes, or in another order; align them first")
    if real.control != predicted.control:
        raise ValueError(f"real has control {real.control!r} and predicted {predicted.control!r}; one was wanted")
    if real.perturbations != predicted.perturbations:
        differing = np.array(sorted(set(real.perturbations) ^ set(predicted.perturbations)))
        raise ValueError(f"only one of real and predicted has {_some(differing)}; the same labels were wanted")


def _some(names: np.ndarray) -> str:
    return ", ".join(map(repr, names[:5].tolist())) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
