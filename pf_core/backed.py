"""Counts that stay on disk: checked blocks of rows, and rows by index."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from scipy import sparse

from pf_core.counts import (
    BLOCK_VALUES,
    Csr,
    canonical,
    check_indices,
    check_indptr,
    check_values,
    index_type,
    row_blocks,
    take_columns,
)
from pf_core.errors import DataError
from pf_core.hdf5 import array, check_filters, decoded, explained, open_file

__all__ = ["BackedCounts", "Stored"]

GAP = 2**14  # values between two wanted rows that are read and dropped rather than skipped


class Stored:
    """A count matrix on disk: CSR, CSC (as the rows of its transpose) or dense.

    The file is opened read-only on first use, and again in another process and after close(). A file that changed
    since it was first opened is refused.
    """

    def __init__(self, path: Path, name: str, file: Any, shape: tuple[int, int]) -> None:
        self.path, self.name = path, name
        self._arrays: tuple[Any, ...] = ()
        self._process = 0
        self._stamp = _stamp(path)
        item = file[name]
        self.encoding, declared = _encoding(item, name)
        if declared != shape:
            raise DataError(f"{name} has shape {declared} but obs and var have {shape}; write the file again")
        self.shape = shape if self.encoding != "csc" else shape[::-1]
        # Values in front of each row: what indptr is for CSR.
        if self.encoding == "dense":
            check_filters(item, name)
            self.offsets = np.arange(self.shape[0] + 1, dtype=np.int64) * self.shape[1]
        else:
            data, indices, indptr = (array(item.get(part), f"{name}/{part}") for part in ("data", "indices", "indptr"))
            if len(data) != len(indices):
                raise DataError(
                    f"{name} is broken: {len(data)} values for {len(indices)} indices; write the file again"
                )
            self.offsets = check_indptr(indptr[:], self.shape[0], len(indices), name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": ()}

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._arrays:
            self._arrays[0].file.close()
        self._arrays = ()

    def block(self, start: int, stop: int) -> Csr:
        """Rows start..stop as checked, canonical float32 CSR."""
        with explained(self.path):
            arrays = self._opened()
            if self.encoding == "dense":
                values = arrays[0][start:stop]
                check_values(values, self.name)
                return sparse.csr_matrix(values.astype(np.float32, copy=False))
            low, high = int(self.offsets[start]), int(self.offsets[stop])
            values, indices = (part[low:high] for part in arrays)
            check_values(values, self.name)
            check_indices(indices, self.shape[1], self.name)
            small = index_type(self.shape[1], len(indices))
            indptr = (self.offsets[start : stop + 1] - low).astype(small)
            parts = (values.astype(np.float32, copy=False), indices.astype(small, copy=False), indptr)
            return canonical(sparse.csr_matrix(parts, shape=(stop - start, self.shape[1])))

    def to_memory(self) -> Csr:
        """The whole matrix as canonical float32 CSR, filled block by block into arrays of its own size."""
        blocks = list(row_blocks(*self.shape))
        size = int(self.offsets[-1])
        if self.encoding == "dense":
            size = sum(self.block(*block).nnz for block in blocks)  # reads twice, to hold it once
        small = index_type(self.shape[1], size)
        _check_memory(size * (4 + np.dtype(small).itemsize), self.path)
        values, indices = np.empty(size, np.float32), np.empty(size, small)
        indptr, filled = np.zeros(self.shape[0] + 1, small), 0
        for start, stop in blocks:
            part = self.block(start, stop)
            values[filled : filled + part.nnz], indices[filled : filled + part.nnz] = part.data, part.indices
            indptr[start + 1 : stop + 1] = filled + part.indptr[1:]
            filled += part.nnz
        matrix = sparse.csr_matrix((values[:filled], indices[:filled], indptr), shape=self.shape)
        return matrix.T.tocsr() if self.encoding == "csc" else matrix

    def _opened(self) -> tuple[Any, ...]:
        """The arrays, kept open for their caches of decompressed chunks."""
        if not self._arrays or self._process != os.getpid():  # an HDF5 handle does not survive a fork
            if not self.path.is_file() or _stamp(self.path) != self._stamp:
                raise DataError("the file changed since it was loaded; load it again")
            item: Any = open_file(self.path)[self.name]
            self._arrays = (item,) if self.encoding == "dense" else (item["data"], item["indices"])
            self._process = os.getpid()
        return self._arrays


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _encoding(item: Any, name: str) -> tuple[str, tuple[int, ...]]:
    """("csr" | "csc" | "dense", shape), read off the attributes that anndata writes."""
    if isinstance(item, h5py.Dataset):
        if item.dtype.kind not in "biuf" or len(item.shape or ()) != 2:
            raise DataError(f"{name} is {item.dtype} of shape {item.shape}; a matrix of numbers was wanted")
        return "dense", tuple(map(int, item.shape or ()))
    encoding = decoded(item.attrs.get("encoding-type", item.attrs.get("h5sparse_format", "")))
    shape = np.asarray(item.attrs.get("shape", item.attrs.get("h5sparse_shape", ())))
    kind = encoding.removesuffix("_matrix")
    if kind not in ("csr", "csc") or shape.shape != (2,) or shape.dtype.kind not in "iu":
        raise DataError(f"{name} has encoding {encoding!r}; CSR, CSC or dense was wanted, as anndata writes them")
    return kind, (int(shape[0]), int(shape[1]))


def _check_memory(n_bytes: int, path: Path) -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else n_bytes
    if n_bytes > memory:
        needed, there = n_bytes / 2**30, memory / 2**30
        raise DataError(f"{path} needs {needed:.0f} GiB of the {there:.0f} GiB there are; load it with backed=True")


class BackedCounts:
    """Counts that stay on disk: rows are read when asked for, equal calls give equal rows, nothing is held whole."""

    def __init__(self, stored: Stored, row_index: np.ndarray | None = None, columns: np.ndarray | None = None) -> None:
        if stored.encoding == "csc":
            raise DataError(
                f"{stored.path}: {stored.name} is stored gene by gene (CSC), so rows cannot be read; "
                "load it with backed=False, or write it as CSR"
            )
        self.stored, self.row_index, self.columns = stored, row_index, columns

    @property
    def shape(self) -> tuple[int, int]:
        n_cells = self.stored.shape[0] if self.row_index is None else len(self.row_index)
        return n_cells, self.stored.shape[1] if self.columns is None else len(self.columns)

    def select(self, *, rows: np.ndarray | None = None, columns: np.ndarray | None = None) -> BackedCounts:
        """Some rows, and columns in a new order (-1 gives zeros); nothing is read."""
        if rows is None:
            rows = self.row_index
        elif self.row_index is not None:
            rows = self.row_index[rows]
        if columns is None:
            columns = self.columns
        elif self.columns is not None:
            columns = np.where(columns >= 0, self.columns[columns], -1)
        return BackedCounts(self.stored, rows, columns)

    def rows(self, indices: np.ndarray) -> Csr:
        """(len(indices), n_genes) float32 CSR, in the order asked for; the file is read in ascending order."""
        wanted = indices if self.row_index is None else self.row_index[indices]
        unique, inverse = np.unique(wanted, return_inverse=True)
        if not len(unique):
            return sparse.csr_matrix((0, self.shape[1]), dtype=np.float32)
        offsets = self.stored.offsets
        # A span ends where the gap to the next row is wide, and where it would hold too many values.
        wide = offsets[unique[1:]] - offsets[unique[:-1] + 1] > GAP
        full = np.diff(offsets[unique] // BLOCK_VALUES) > 0
        parts = []
        for span in np.split(unique, np.flatnonzero(wide | full) + 1):
            block = self.stored.block(int(span[0]), int(span[-1]) + 1)
            block = block if len(span) == block.shape[0] else block[span - span[0]]
            parts.append(block if self.columns is None else take_columns(block, self.columns))
        matrix: Csr = sparse.vstack(parts, format="csr") if len(parts) > 1 else parts[0]
        return matrix if np.array_equal(inverse, np.arange(len(unique))) else matrix[inverse]

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        self.stored.close()
