"""The count table of a batch: all that a likelihood with one r per gene needs of the small counts (docs/math.md 1).

With one r per gene the sum over cells of lgamma(x + r) - lgamma(r) is sum_j C[j, g] log(r_g + j), where C[j, g] is the
weight of the cells with more than j counts of gene g. The table holds that for entries of at most `TABLE_ROWS` counts;
the few larger ones, the tail, are named one by one, so that nothing is dropped.
"""

from __future__ import annotations

import numpy as np

from pf_core.config import TABLE_ROWS
from pf_core.counts import Csr

__all__ = ["count_table", "tail_sizes"]


def tail_sizes(counts: Csr, rows: int = TABLE_ROWS) -> np.ndarray:
    """(n_cells,) entries of every cell that a table leaves to the tail."""
    return np.diff(np.concatenate([[0], np.cumsum(counts.data > rows)])[counts.indptr])


def count_table(
    counts: Csr, weight: np.ndarray, n_tail: int, *, dtype: str = "float32", rows: int = TABLE_ROWS
) -> dict[str, np.ndarray]:
    """The table and the tail of some cells.

    Args:
        counts: (n_cells, n_genes) CSR, integer-valued, >= 0.
        weight: (n_cells,) >= 0.
        n_tail: length of the tail, the same for all batches, so that nothing is compiled again.
        dtype: of the table.
        rows: counts up to here are in the table.

    Returns:
        table (rows, n_genes), the weight of the cells with more than j and at most `rows` counts of a gene; and tail
        (n_tail,) int32, cell * n_genes + gene of every entry with more, then -1.

    Raises:
        ValueError: more than n_tail entries in the tail, or more entries than int32 counts.
    """
    n_cells, n_genes = counts.shape
    if n_cells * n_genes >= 2**31:
        raise ValueError(f"{n_cells} cells x {n_genes} genes are more than int32 counts; use smaller batches")
    weights = np.repeat(weight, np.diff(counts.indptr))
    # Beside the rows, one for stored zeros and one for the tail; neither is kept.
    place = np.minimum(counts.data, rows + 1).astype(np.int64) * n_genes + counts.indices
    exactly = np.bincount(place, weights=weights, minlength=(rows + 2) * n_genes).reshape(rows + 2, n_genes)
    table = np.cumsum(exactly[rows:0:-1], axis=0)[::-1]
    large = np.flatnonzero(counts.data > rows)
    if len(large) > n_tail:
        raise ValueError(f"{len(large)} counts are above {rows} but the tail has {n_tail} places; give it more")
    cells = np.searchsorted(counts.indptr, large, side="right") - 1
    tail = np.full(n_tail, -1, np.int32)
    tail[: len(large)] = cells * n_genes + counts.indices[large]
    return {"table": table.astype(dtype), "tail": tail}
