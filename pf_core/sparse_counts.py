"""Batches on their way to a device: counts as CSR, and arrays that a device can take without a copy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pf_core.counts import Csr

__all__ = ["Batch", "SparseCounts", "aligned", "stack"]

ALIGNMENT = 64  # bytes; JAX on a processor reads such arrays where they lie and copies others


@dataclass(frozen=True, eq=False)
class SparseCounts:
    """An array of counts (..., n_genes) as CSR matrices of its rows; NumPy takes it as the dense array."""

    shape: tuple[int, ...]
    rows: tuple[Csr, ...]  # of as many rows each, one after the other; those that a matrix lacks at its end are zeros

    @property
    def dtype(self) -> np.dtype:
        """Of the values."""
        return self.rows[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the dense array."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def travels_lighter(self) -> bool:
        """Whether values and 32-bit places are fewer bytes than the dense array, and such places reach all of it."""
        n_values = sum(rows.nnz for rows in self.rows)
        reached = math.prod(self.shape) + n_values < 2**31
        return reached and n_values * (self.dtype.itemsize + 4) < self.nbytes

    def places(self) -> np.ndarray:
        """(n_values,) int32: where each value stands in the flattened array."""
        n_genes, n_rows = self.shape[-1], math.prod(self.shape[:-1]) // len(self.rows)
        starts = [index * n_rows + np.arange(rows.shape[0], dtype=np.int32) for index, rows in enumerate(self.rows)]
        sizes = np.concatenate([np.diff(rows.indptr) for rows in self.rows])
        columns = np.concatenate([rows.indices for rows in self.rows]).astype(np.int32, copy=False)
        return np.repeat(np.concatenate(starts) * np.int32(n_genes), sizes) + columns

    def values(self) -> np.ndarray:
        """(n_values,) what is not zero."""
        return np.concatenate([rows.data for rows in self.rows])

    def dense(self) -> np.ndarray:
        """The array with its zeros."""
        out = aligned(self.shape, self.dtype)
        n_rows = math.prod(self.shape[:-1]) // len(self.rows)
        for block, rows in zip(out.reshape(len(self.rows), n_rows, self.shape[-1]), self.rows, strict=True):
            rows.toarray(out=block[: rows.shape[0]])
            block[rows.shape[0] :] = 0
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.dense() if dtype is None else self.dense().astype(dtype, copy=False)


Batch = Mapping[str, np.ndarray | SparseCounts]


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array to be filled that begins at a multiple of ALIGNMENT bytes."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def stack(trees: Sequence[Batch]) -> dict[str, np.ndarray | SparseCounts]:
    """The leaves of some batches along a new first axis."""
    out: dict[str, np.ndarray | SparseCounts] = {}
    for name, first in trees[0].items():
        leaves: list[Any] = [tree[name] for tree in trees]
        if isinstance(first, SparseCounts):
            out[name] = SparseCounts((len(leaves), *first.shape), tuple(rows for leaf in leaves for rows in leaf.rows))
        else:
            out[name] = np.stack(leaves, out=aligned((len(leaves), *first.shape), first.dtype))
    return out
