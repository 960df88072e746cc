"""Batches on their way to a device: counts without their zeros, and arrays that a device can take without a copy."""

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
    """An array of counts (..., n_genes) without its zeros: values, and their places in the flattened array.

    They are what a CSR matrix holds, without the bounds of its rows, so that one scatter makes any number of batches
    dense.
    """

    shape: tuple[int, ...]
    places: np.ndarray  # (n_values,) int64, each once
    values: np.ndarray  # (n_values,)

    @classmethod
    def of_rows(cls, rows: Csr, shape: tuple[int, ...], dtype: str) -> SparseCounts:
        """The rows of a matrix (n, n_genes) as an array of a shape (..., n_genes) of n * n_genes entries."""
        n, n_genes = rows.shape
        starts = np.repeat(np.arange(n, dtype=np.int64) * n_genes, np.diff(rows.indptr))
        return cls(shape, starts + rows.indices, rows.data.astype(dtype, copy=False))

    @classmethod
    def stack(cls, parts: Sequence[SparseCounts]) -> SparseCounts:
        """Arrays of one shape along a new first axis."""
        size = math.prod(parts[0].shape)
        places = np.concatenate([part.places + index * size for index, part in enumerate(parts)])
        return cls((len(parts), *parts[0].shape), places, np.concatenate([part.values for part in parts]))

    @property
    def nbytes(self) -> int:
        """Bytes of the dense array."""
        return math.prod(self.shape) * self.values.itemsize

    @property
    def travels_lighter(self) -> bool:
        """Whether values and 32-bit places are fewer bytes than the dense array, and such places reach all of it."""
        size = math.prod(self.shape)
        return size < 2**31 - len(self.places) and len(self.places) * (self.values.itemsize + 4) < self.nbytes

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.dense() if dtype is None else self.dense().astype(dtype, copy=False)

    def dense(self) -> np.ndarray:
        """The array with its zeros."""
        out = aligned(self.shape, self.values.dtype)
        out.reshape(-1)[self.places] = self.values
        return out


Batch = Mapping[str, np.ndarray | SparseCounts]


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros that begin at a multiple of ALIGNMENT bytes."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def stack(trees: Sequence[Batch]) -> dict[str, np.ndarray | SparseCounts]:
    """The leaves of some batches along a new first axis."""
    out: dict[str, np.ndarray | SparseCounts] = {}
    for name, first in trees[0].items():
        leaves: list[Any] = [tree[name] for tree in trees]
        if isinstance(first, SparseCounts):
            out[name] = SparseCounts.stack(leaves)
        else:
            out[name] = np.stack(leaves, out=aligned((len(leaves), *first.shape), first.dtype))
    return out
