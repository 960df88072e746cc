"""Cells, genes, conditions and their controls: an h5ad, a zarr store or an AnnData becomes a Dataset.

Interface skeleton: the signatures are final, the bodies follow.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pf_core.config import DataConfig
from pf_core.counts import DataError

__all__ = ["UNKNOWN", "DataError", "Dataset", "Group", "groups", "load"]

UNKNOWN = "<unknown>"  # index 0 of every vocabulary, and the label of a missing tissue, cell type or batch


@dataclass(frozen=True)
class Dataset:
    """Counts and what was done to every cell. All rows are in the order of the source.

    Label arrays (cells, genes, label, tissue, cell_type, batch) are object arrays of str, so that a million cells
    share one string per level.
    """

    counts: Any  # (n_cells, n_genes) float32 CSR, or h5ad.BackedCounts with .shape and .rows(indices)
    totals: np.ndarray  # (n_cells,) float64 counts per cell over the genes held here
    cells: np.ndarray  # (n_cells,) str, unique
    genes: np.ndarray  # (n_genes,) str, unique
    perturbations: tuple[str, ...]  # vocabulary of single members, UNKNOWN first, then sorted; no control
    members: np.ndarray  # (n_cells, n_members) int32 into perturbations; 0 with dose 0 is padding
    doses: np.ndarray  # (n_cells, n_members) float32
    label: np.ndarray  # (n_cells,) "control", "A", "A+B", "A@0.5+B"
    is_control: np.ndarray  # (n_cells,) bool
    tissue: np.ndarray  # (n_cells,) str; "all" where there is no such column
    cell_type: np.ndarray  # (n_cells,) str
    batch: np.ndarray  # (n_cells,) str
    covariates: np.ndarray  # (n_cells, n_covariates) float32
    tissues: tuple[str, ...]  # vocabulary, UNKNOWN first
    batches: tuple[str, ...]  # vocabulary, UNKNOWN first
    obs: Any  # pandas.DataFrame, one row per cell held here
    config: DataConfig
    summary: dict[str, Any] = field(default_factory=dict)  # what was read, left out, missing

    @property
    def n_cells(self) -> int: ...
    @property
    def n_genes(self) -> int: ...
    def rows(self, indices: np.ndarray) -> Any:
        """Counts of some cells as CSR float32, in the order asked for (repeats allowed)."""

    def dense(self, indices: np.ndarray, dtype: str = "float32") -> np.ndarray:
        """Counts of some cells as a dense (n, n_genes) array."""
        raise NotImplementedError

    def library(self) -> np.ndarray:
        """(n_cells,) float64 counts per cell over the genes held here, at least 1."""
        raise NotImplementedError

    def select_genes(self, names: Any) -> Dataset:
        """The same cells with only these genes, in this order."""
        raise NotImplementedError

    def blocks(self, cells: np.ndarray | None = None) -> Any:
        """Yield (indices, CSR rows) over all or some cells, block by block."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """sha256 over gene names, cell names and counts; the same for memory and backed, any storage dtype."""
        raise NotImplementedError


@dataclass(frozen=True)
class Group:
    """Cells of one condition in one context, and the control cells they are compared with."""

    label: str
    members: np.ndarray  # (n_members,) int32
    doses: np.ndarray  # (n_members,) float32
    tissue: str
    cell_type: str
    batch: str  # "" where batches are pooled
    cells: np.ndarray  # indices into the dataset, sorted
    controls: np.ndarray  # indices into the dataset, sorted
    covariates: np.ndarray  # (n_covariates,) float32 mean over cells


def load(source: str | Path | Any, config: DataConfig, *, backed: bool = False, training: bool = True) -> Dataset:
    """Read and check a data set. training=False admits files of only controls, or without controls."""
    raise NotImplementedError


def groups(
    dataset: Dataset, cells: np.ndarray, *, controls: np.ndarray | None = None, include_control: bool = False
) -> list[Group]:
    """Groups per (label, tissue, cell_type), split by batch where both sides have MIN_MATCHED cells in it.

    controls: indices the controls are taken from; None takes the control cells among `cells`, so that training
    cells are never compared with held-out ones by accident.
    """
    raise NotImplementedError
