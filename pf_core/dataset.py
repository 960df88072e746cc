"""The record of a data set: cells, genes, conditions, contexts, and the groups that training compares."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pf_core.backed import BackedCounts
from pf_core.config import MIN_MATCHED, DataConfig
from pf_core.counts import Csr, row_blocks, take_columns
from pf_core.errors import DataError, nearest
from pf_core.labels import CONTROL, UNKNOWN

__all__ = ["Dataset", "Group", "groups", "totals_of", "unique_names"]


@dataclass(frozen=True)
class Dataset:
    """Counts and what was done to every cell; rows are in the order of the source.

    Names and labels are object arrays of str: a million cells share one string per level.
    """

    counts: Any  # (n_cells, n_genes) float32 CSR, or BackedCounts
    totals: np.ndarray  # (n_cells,) float64 counts per cell over the genes held here
    cells: np.ndarray  # (n_cells,) str, unique
    genes: np.ndarray  # (n_genes,) str, unique
    perturbations: tuple[str, ...]  # vocabulary of single members, UNKNOWN first; control is not in it
    members: np.ndarray  # (n_cells, n_members) int32 into perturbations; 0 with dose 0 is padding
    doses: np.ndarray  # (n_cells, n_members) float32
    label: np.ndarray  # (n_cells,) "control", "A", "A+B", "A@0.5+B", joined by the separator of the config
    is_control: np.ndarray  # (n_cells,) bool
    tissue: np.ndarray  # (n_cells,) str
    cell_type: np.ndarray  # (n_cells,) str
    batch: np.ndarray  # (n_cells,) str
    covariates: np.ndarray  # (n_cells, n_covariates) float32
    tissues: tuple[str, ...]  # vocabulary, UNKNOWN first
    batches: tuple[str, ...]  # vocabulary, UNKNOWN first
    obs: Any  # pandas.DataFrame as it came, one row per cell
    config: DataConfig  # which columns these were read from
    summary: dict[str, Any] = field(default_factory=dict)  # what was read, dropped, missing; plain values

    @property
    def n_cells(self) -> int:
        return len(self.cells)

    @property
    def n_genes(self) -> int:
        return len(self.genes)

    def rows(self, indices: np.ndarray) -> Csr:
        """Counts of some cells as float32 CSR, in the order asked for; repeats are allowed."""
        indices = self._checked(indices)
        return self.counts.rows(indices) if isinstance(self.counts, BackedCounts) else self.counts[indices]

    def dense(self, indices: np.ndarray, dtype: str = "float32") -> np.ndarray:
        """Counts of some cells as a dense (n, n_genes) array."""
        return self.rows(indices).toarray().astype(dtype, copy=False)

    def library(self) -> np.ndarray:
        """(n_cells,) float64 counts per cell over the genes held here, at least 1."""
        return np.maximum(self.totals, 1.0)

    def blocks(self, cells: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, Csr]]:
        """Yield (indices, CSR rows) over all or some cells, block by block in the order given."""
        cells = np.arange(self.n_cells) if cells is None else self._checked(cells)
        for start, stop in row_blocks(len(cells), self.n_genes):
            yield cells[start:stop], self.rows(cells[start:stop])

    def select_cells(self, indices: np.ndarray) -> Dataset:
        """Some cells, in this order, under the same vocabularies."""
        indices = self._checked(indices)
        backed = isinstance(self.counts, BackedCounts)
        per_cell = ("totals", "cells", "members", "doses", "label", "is_control", "tissue", "cell_type", "batch")
        return dataclasses.replace(
            self,
            counts=self.counts.select(rows=indices) if backed else self.counts[indices],
            covariates=self.covariates[indices],
            obs=self.obs.iloc[indices],
            **{name: getattr(self, name)[indices] for name in per_cell},
        )

    def select_genes(self, names: Sequence[str] | np.ndarray) -> Dataset:
        """The same cells with only these genes, in this order."""
        position = {gene: index for index, gene in enumerate(self.genes)}
        unknown = [name for name in names if name not in position]
        if unknown:
            raise DataError(f"there is no gene {unknown[0]!r}; {nearest(unknown[0], position)}")
        return self.with_columns(names, np.array([position[name] for name in names], dtype=np.int64))

    def with_columns(self, genes: Sequence[str] | np.ndarray, columns: np.ndarray) -> Dataset:
        """The same cells with other columns: columns[j] of the old genes, or zeros where it is -1."""
        backed = isinstance(self.counts, BackedCounts)
        counts = self.counts.select(columns=columns) if backed else take_columns(self.counts, columns)
        return dataclasses.replace(self, counts=counts, genes=unique_names(genes, "gene"), totals=totals_of(counts))

    def fingerprint(self) -> str:
        """sha256 over gene names, cell names and counts; the same in memory and backed, for any storage type."""
        names, lengths, indices, values = (hashlib.sha256() for _ in range(4))
        for table in (self.genes, self.cells):
            names.update(json.dumps(list(table)).encode())
        for _, rows in self.blocks():  # one digest per stream, so that the bounds of the blocks leave no trace
            lengths.update(np.diff(rows.indptr).astype("<i8").tobytes())
            indices.update(rows.indices.astype("<i8").tobytes())
            values.update(rows.data.astype("<f4").tobytes())
        return hashlib.sha256(b"".join(part.digest() for part in (names, lengths, indices, values))).hexdigest()

    def _checked(self, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices)
        if indices.ndim != 1 or (len(indices) and indices.dtype.kind not in "iu"):
            raise ValueError(f"indices has shape {indices.shape} and type {indices.dtype}; (n,) integers were wanted")
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.n_cells:
            raise ValueError(f"indices reach {indices.min()}..{indices.max()} beyond the {self.n_cells} cells")
        return indices.astype(np.int64, copy=False)


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


def groups(
    dataset: Dataset, cells: np.ndarray, *, controls: np.ndarray | None = None, include_control: bool = False
) -> list[Group]:
    """Groups per (label, tissue, cell type), each with the controls of its context, sorted by those names.

    A group is split by batch where both sides have MIN_MATCHED cells in a batch; what is left over is pooled
    (batch "") and compared with all controls of its context.

    Args:
        dataset: what the indices refer to.
        cells: (n,) indices of the cells to group.
        controls: indices that controls are taken from. None takes the control cells among `cells`, so that training
            cells meet no held-out control; for held-out cells pass all controls that may be used.
        include_control: also return the control cells among `cells` as groups whose controls are themselves.

    Raises:
        DataError: perturbed cells in a context (tissue, cell type) without controls.
    """
    cells = np.unique(np.asarray(cells, dtype=np.int64))
    pool = cells if controls is None else np.unique(np.asarray(controls, dtype=np.int64))
    pools = _by(pool[dataset.is_control[pool]], dataset.tissue, dataset.cell_type)
    result = []
    for (label, *where), found in _by(cells, dataset.label, dataset.tissue, dataset.cell_type).items():
        context = (where[0], where[1])
        matched = found if label == CONTROL else pools.get(context)
        if matched is None:
            raise DataError(
                f"{len(found)} cells of {label!r} in tissue {context[0]!r}, cell type {context[1]!r} have no controls; "
                "leave these cells out, or match controls across cell types with cell_type=''"
            )
        if label != CONTROL or include_control:
            result += _split_by_batch(dataset, label, context, found, matched)
    return result


def _split_by_batch(
    dataset: Dataset, label: str, context: tuple[str, str], cells: np.ndarray, controls: np.ndarray
) -> list[Group]:
    matched: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    rest = cells
    if len(dataset.batches) > 2:  # with one batch there is nothing to match
        others = _by(controls, dataset.batch)
        for key, found in _by(cells, dataset.batch).items():
            if key[0] != UNKNOWN and min(len(found), len(others.get(key, ()))) >= MIN_MATCHED:
                matched[key[0]] = (found, others[key])
                rest = np.setdiff1d(rest, found, assume_unique=True)
    if len(rest):
        matched[""] = (rest, rest if label == CONTROL else controls)
    return [
        Group(
            label=label,
            members=dataset.members[cells[0]],
            doses=dataset.doses[cells[0]],
            tissue=context[0],
            cell_type=context[1],
            batch=batch,
            cells=found,
            controls=against,
            covariates=dataset.covariates[found].mean(axis=0, dtype=np.float64).astype(np.float32),
        )
        for batch, (found, against) in sorted(matched.items())
    ]


def _by(cells: np.ndarray, *keys: np.ndarray) -> dict[tuple[str, ...], np.ndarray]:
    """Indices per combination of labels, combinations in the order of the labels, indices in the order given."""
    import pandas as pd

    if not len(cells):
        return {}
    factors = [pd.factorize(key[cells], sort=True) for key in keys]
    order = np.lexsort([index for index, _ in reversed(factors)])  # stable
    table = np.stack([index for index, _ in factors], axis=1)[order]
    cuts = np.flatnonzero((table[1:] != table[:-1]).any(axis=1)) + 1
    return {
        tuple(str(levels[code]) for code, (_, levels) in zip(table[start], factors, strict=True)): cells[
            order[start:stop]
        ]
        for start, stop in itertools.pairwise([0, *cuts.tolist(), len(cells)])
    }


def totals_of(counts: Any) -> np.ndarray:
    """(n_cells,) float64 sums of CSR or BackedCounts, block by block; of backed counts this checks every value."""
    totals = np.empty(counts.shape[0])
    for start, stop in row_blocks(*counts.shape):
        rows = counts.rows(np.arange(start, stop)) if isinstance(counts, BackedCounts) else counts[start:stop]
        sums = np.concatenate([[0.0], np.cumsum(rows.data, dtype=np.float64)])
        totals[start:stop] = sums[rows.indptr[1:]] - sums[rows.indptr[:-1]]  # exact, because counts are integers
    return totals


def unique_names(names: Any, what: str) -> np.ndarray:
    """Names of cells or genes as an object array of str, if no two are equal."""
    table = np.empty(len(names), dtype=object)
    table[:] = [name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names]
    if (n_repeats := len(table) - len(set(table))) > 0:
        seen: set[str] = set()
        first = next(name for name in table if name in seen or seen.add(name))
        call = {"cell": "obs_names_make_unique", "gene": "var_names_make_unique"}[what]
        raise DataError(
            f"{n_repeats} {what} names are repeats, such as {first!r}; make them unique with adata.{call}()"
        )
    return table
