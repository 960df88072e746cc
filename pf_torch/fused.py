"""Energy distances as one kernel on a CUDA device, in Triton (docs/math.md 5).

A program holds a few cells and passes by all the others, one after the other. What a pair leaves, its distance and its
pull on the cell, is added up where it arises: nothing of a pair is ever written. Every distance is that of a
difference, as in the plain form, so that float32 holds for any data.

Triton is imported here and nowhere else. PyTorch for CUDA brings it along.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["pulls"]

NUMBERS = 2048  # of the cells that a program holds: 16 a thread, and as many for each of three sums
RUN = 128  # cells that are added up by themselves first: float32 would lose many small terms in one long sum


@triton.jit
def _kernel(
    cells,  # (P, n_cells, d)
    weight,  # (P, n_cells)
    total,  # (P, n_rows)
    pull,  # (P, n_rows, d)
    n_cells,
    n_rows,
    first,
    smoothing: tl.constexpr,  # an argument would be float32
    d: tl.constexpr,
    width: tl.constexpr,  # the power of two that d fits into
    rows: tl.constexpr,
    run: tl.constexpr,
):
    kind: tl.constexpr = cells.dtype.element_ty
    group = tl.program_id(1).to(tl.int64)
    cells += group * n_cells * d
    weight += group * n_cells
    total += group * n_rows
    pull += group * n_rows * d
    feature = tl.arange(0, width)[None, :]
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    own = first + row
    here = (row < n_rows)[:, None] & (feature < d)
    x = tl.load(cells + own[:, None].to(tl.int64) * d + feature, mask=here, other=0.0)

    distances, pulled = tl.zeros([rows], kind), tl.zeros([rows, width], kind)
    for start in range(0, n_cells, run):
        some_distances, some_pulled = tl.zeros([rows], kind), tl.zeros([rows, width], kind)
        for j in range(start, min(start + run, n_cells)):
            z = tl.load(cells + tl.cast(j, tl.int64) * d + feature, mask=feature < d, other=0.0)
            difference = x - z
            squared = tl.sum(difference * difference, 1) + smoothing
            # A cell with itself is no pair; cells at one place are 0 apart and do not pull.
            pair = (squared > 0.0) & (own != j)
            distance = tl.sqrt(tl.where(pair, squared, 1.0))
            w = tl.where(pair, tl.load(weight + j), 0.0)
            some_distances += w * distance
            some_pulled += (w / distance)[:, None] * difference
        distances += some_distances
        pulled += some_pulled
    tl.store(total + row, distances, mask=row < n_rows)
    tl.store(pull + row[:, None].to(tl.int64) * d + feature, pulled, mask=here)


def pulls(cells: Tensor, weight: Tensor, first: int, n_rows: int, smoothing: float) -> tuple[Tensor, Tensor]:
    """Sums over all cells j but i itself, for some cells i: of w_j |z_i - z_j|, and of w_j (z_i - z_j) / |z_i - z_j|.

    Nothing is differentiated.

    Args:
        cells: (P, n_cells, n_latent) z, contiguous, on a CUDA device.
        weight: (P, n_cells) w, of either sign, contiguous and of the same type.
        first: i are the cells from here on,
        n_rows: and so many.
        smoothing: c of sqrt(d^2 + c), which takes the place of both distances.

    Returns:
        (P, n_rows) and (P, n_rows, n_latent).
    """
    n_groups, n_cells, d = cells.shape
    total, pull = cells.new_empty(n_groups, n_rows), cells.new_empty(n_groups, n_rows, d)
    width = triton.next_power_of_2(d)
    rows = max(1, NUMBERS // width)
    fixed: dict[str, Any] = {"smoothing": smoothing, "d": d, "width": width, "rows": rows, "run": RUN}
    with torch.cuda.device_of(cells):  # Triton launches on the current device
        _kernel[triton.cdiv(n_rows, rows), n_groups](cells, weight, total, pull, n_cells, n_rows, first, **fixed)
    return total, pull
