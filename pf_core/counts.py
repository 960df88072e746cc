"""Count matrices: what is checked before SciPy's compiled code sees them, and how they are cut.

SciPy's sparse routines trust indptr and indices and crash the interpreter where those are wrong, so every matrix is
first checked here with plain NumPy, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import sparse

from pf_core.errors import DataError

__all__ = [
    "Csr",
    "canonical",
    "check_indices",
    "check_indptr",
    "check_values",
    "from_matrix",
    "index_type",
    "row_blocks",
    "take_columns",
]

Csr = Any  # scipy.sparse.csr_matrix, whose own annotations call .shape optional

BLOCK_VALUES = 2**22  # values looked at in one go
LARGEST_COUNT = 2**24  # float32 holds every integer up to here
RAW = 'give raw counts in layers["counts"], or name their layer with the setting layer'


def row_blocks(n_rows: int, n_columns: int) -> Iterator[tuple[int, int]]:
    """Bounds of blocks of rows that stay small even where they are dense for a moment."""
    step = int(np.clip(4 * BLOCK_VALUES // max(n_columns, 1), 64, 8192))
    for start in range(0, n_rows, step):
        yield start, min(start + step, n_rows)


def index_type(*largest: int) -> type:
    """The narrowest index type of SciPy that holds these numbers."""
    return np.int32 if max(largest) < 2**31 else np.int64


def check_indptr(indptr: np.ndarray, n_rows: int, n_values: int, name: str) -> np.ndarray:
    """indptr as int64, if it has n_rows + 1 entries that rise from 0 to n_values."""
    if indptr.ndim != 1 or indptr.dtype.kind not in "iu" or len(indptr) != n_rows + 1:
        raise DataError(
            f"{name} is broken: indptr has shape {indptr.shape} and type {indptr.dtype}, "
            f"{n_rows + 1} integers were wanted; write the file again"
        )
    # Compared without subtraction: differences of unsigned or extreme values would wrap around.
    if int(indptr[0]) != 0 or int(indptr[-1]) != n_values or bool((indptr[1:] < indptr[:-1]).any()):
        raise DataError(f"{name} is broken: indptr does not rise from 0 to {n_values}; write the file again")
    return indptr.astype(np.int64, copy=False)


def check_indices(indices: np.ndarray, n_columns: int, name: str) -> None:
    """Refuse column indices outside 0..n_columns-1."""
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise DataError(
            f"{name} is broken: its indices are {indices.dtype}, integers were wanted; write the file again"
        )
    for start in range(0, len(indices), BLOCK_VALUES):
        block = indices[start : start + BLOCK_VALUES]
        low, high = int(block.min()), int(block.max())
        if low < 0 or high >= n_columns:
            bad = low if low < 0 else high
            raise DataError(f"{name} is broken: index {bad} is outside 0..{n_columns - 1}; write the file again")


def check_values(values: np.ndarray, name: str) -> None:
    """Refuse what is no count: not finite, negative, not an integer, or beyond float32's integers."""
    if values.dtype.kind not in "biuf":
        raise DataError(f"{name} holds {values.dtype}, numbers were wanted; {RAW}")
    flat = values.reshape(-1)
    for start in range(0, len(flat), BLOCK_VALUES):
        block = flat[start : start + BLOCK_VALUES]
        low, high = block.min(), block.max()  # NaN if any is NaN
        if not (np.isfinite(low) and np.isfinite(high)):
            raise DataError(f"{name} holds {int((~np.isfinite(block)).sum())} or more NaN or infinite values; {RAW}")
        if low < 0:
            raise DataError(f"{name} holds {low:g}, so it is scaled, and counts are not negative; {RAW}")
        if high > LARGEST_COUNT:
            raise DataError(f"{name} holds {high:g}, more than the {LARGEST_COUNT} a count of one cell can be; {RAW}")
        if block.dtype.kind == "f" and bool((fractions := block != np.rint(block)).any()):
            raise DataError(
                f"{name} holds {block[fractions][0]:g}, so it is normalised or logged, and counts are integers; {RAW}"
            )


def canonical(matrix: Csr) -> Csr:
    """The same matrix with sorted columns, no repeats and no stored zeros; a copy only where something changes."""
    if not matrix.has_canonical_format or np.count_nonzero(matrix.data) < len(matrix.data):
        matrix = matrix.copy()
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
    return matrix


def from_matrix(matrix: Any, name: str) -> Csr:
    """A matrix in memory as checked, canonical float32 CSR; float32 CSR is shared, not copied.

    Args:
        matrix: (n_cells, n_genes) CSR, CSC or dense.
        name: what messages call it.
    """
    if sparse.issparse(matrix) and matrix.format in ("csr", "csc"):
        n_major, n_minor = matrix.shape if matrix.format == "csr" else matrix.shape[::-1]
        if matrix.data.shape != matrix.indices.shape:
            raise DataError(f"{name} is broken: {matrix.data.shape} values for {matrix.indices.shape} indices")
        indptr = check_indptr(matrix.indptr, n_major, len(matrix.indices), name)
        check_indices(matrix.indices, n_minor, name)
        check_values(matrix.data, name)
        # astype of the parts, because a conversion of the whole would run compiled code for nothing.
        parts = (matrix.data.astype(np.float32, copy=False), matrix.indices, indptr)
        rows = sparse.csr_matrix(parts, shape=(n_major, n_minor))
        return canonical(rows if matrix.format == "csr" else rows.T.tocsr())
    if isinstance(matrix, np.ndarray) and matrix.ndim == 2:
        blocks = []
        for start, stop in row_blocks(*matrix.shape):
            check_values(matrix[start:stop], name)
            blocks.append(sparse.csr_matrix(np.asarray(matrix[start:stop], dtype=np.float32)))
        return sparse.vstack(blocks, format="csr") if blocks else sparse.csr_matrix(matrix.shape, dtype=np.float32)
    raise DataError(f"{name} is a {type(matrix).__name__}; a NumPy array or a SciPy CSR or CSC matrix was wanted")


def take_columns(matrix: Csr, columns: np.ndarray) -> Csr:
    """Columns of a checked CSR matrix in a new order; -1 gives a column of zeros."""
    present = np.flatnonzero(columns >= 0)
    taken: Csr = matrix[:, columns[present]]
    indices = present.astype(taken.indices.dtype)[taken.indices]
    taken = sparse.csr_matrix((taken.data, indices, taken.indptr), shape=(matrix.shape[0], len(columns)))
    taken.sort_indices()
    return taken
