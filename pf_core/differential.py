"""Differential expression by the Wilcoxon rank-sum test: every gene and every perturbation at once, on sparse cells.

The test is the two-sided asymptotic Mann-Whitney U with tie correction and continuity correction, that is
`scipy.stats.mannwhitneyu(x, y, method="asymptotic")`, which is also what pdex (the engine of cell-eval) computes. Only
stored values are sorted, once for the whole screen; the zeros of a gene are one block of ties whose place is known.
Then every perturbation costs time linear in its own stored values.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import sparse, stats
from scipy.special import ndtr

from pf_core.screens import Screen

__all__ = ["DETable", "RankSums", "differential", "rank_sum", "rank_sums"]

BLOCK = 4_000_000  # stored values that are sorted at once; also bounds the (perturbations x genes) working arrays


class RankSums(NamedTuple):
    """Mann-Whitney U of the first group, and the two-sided p-value; (n_genes,) or (n_groups, n_genes)."""

    statistic: np.ndarray
    p_value: np.ndarray


def rank_sum(x: Any, y: Any) -> RankSums:
    """Wilcoxon rank-sum test of every gene between two groups of cells.

    Args:
        x: (n, n_genes) sparse or dense, one group; values of any sign, zeros need not be stored.
        y: (m, n_genes) the other.

    Returns:
        RankSums of shape (n_genes,): U of x, and p (1 where all cells of a gene are equal).

    Raises:
        ValueError: a group is empty, genes differ in number, or a value is not finite.
    """
    x, y = sparse.csr_matrix(x), sparse.csr_matrix(y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x has {x.shape[1]} genes and y {y.shape[1]}; the same genes were wanted")
    codes = np.repeat([0, 1], [x.shape[0], y.shape[0]])
    found = rank_sums(sparse.vstack([x, y], format="csc"), codes, n_groups=2, reference=1)
    return RankSums(found.statistic[0], found.p_value[0])


def rank_sums(cells: Any, codes: np.ndarray, *, n_groups: int, reference: int) -> RankSums:
    """Wilcoxon rank-sum tests of every gene, every group of cells against the reference group.

    Args:
        cells: (n_cells, n_genes) sparse or dense.
        codes: (n_cells,) group of each cell, 0 <= code < n_groups.
        n_groups: number of groups, none of them empty.
        reference: code of the group all others are tested against; its own row has U = n^2/2 and p = 1.

    Returns:
        RankSums of shape (n_groups, n_genes).

    Raises:
        ValueError: codes do not fit, a group is empty, or a value is not finite.
    """
    cells = sparse.csc_matrix(cells, dtype=np.float64, copy=True)
    cells.sum_duplicates()
    cells.eliminate_zeros()
    codes = np.asarray(codes)
    if codes.shape != (cells.shape[0],):
        raise ValueError(f"codes has shape {codes.shape}; ({cells.shape[0]},), one per cell, was wanted")
    if not 0 <= reference < n_groups or (codes.size and not (codes.min() >= 0 and codes.max() < n_groups)):
        raise ValueError(f"codes and reference must lie in 0..{n_groups - 1}")
    sizes = np.bincount(codes, minlength=n_groups)
    if np.any(sizes == 0):
        raise ValueError(f"groups {np.flatnonzero(sizes == 0).tolist()} have no cells; leave them out")
    if not np.all(np.isfinite(cells.data)):
        raise ValueError("cells holds values that are not finite; ranks are undefined for them")
    u, ties = np.empty((n_groups, cells.shape[1])), np.empty((n_groups, cells.shape[1]))
    for genes in _blocks(cells.indptr, n_groups):
        u[:, genes], ties[:, genes] = _block(cells[:, genes], codes, sizes, reference)
    u[reference] = sizes[reference] ** 2 / 2.0
    p = _p_values(u, ties, sizes[:, None].astype(np.float64), float(sizes[reference]))
    p[reference] = 1.0
    return RankSums(u, p)


def _blocks(indptr: np.ndarray, n_groups: int) -> list[slice]:
    cost = indptr + n_groups * np.arange(len(indptr))  # of all genes before each one
    edges = [0]
    while edges[-1] < len(indptr) - 1:
        edges.append(max(edges[-1] + 1, int(np.searchsorted(cost, cost[edges[-1]] + BLOCK, side="right")) - 1))
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _block(cells: Any, codes: np.ndarray, sizes: np.ndarray, reference: int) -> tuple[np.ndarray, np.ndarray]:
    """U against the reference, and sum(t^3 - t) over ties, each (n_groups, n_genes of the block)."""
    shape = (len(sizes), cells.shape[1])

    def per_group_and_gene(who: np.ndarray, gene: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        flat = np.bincount(who * shape[1] + gene, weights, minlength=shape[0] * shape[1])
        return flat.reshape(shape).astype(np.float64)

    # A run is one distinct value of one gene; runs are numbered by gene, then value.
    gene = np.repeat(np.arange(shape[1]), np.diff(cells.indptr))
    order = np.lexsort((cells.data, gene))
    gene, value, who = gene[order], cells.data[order], codes[cells.indices[order]]
    first = np.ones(len(value), dtype=bool)
    first[1:] = (gene[1:] != gene[:-1]) | (value[1:] != value[:-1])
    run, n_runs = np.cumsum(first) - 1, int(first.sum())
    run_gene, positive = gene[first], value[first] > 0

    stored = per_group_and_gene(who, gene)
    zeros = sizes[:, None] - stored
    equal = np.bincount(run[who == reference], minlength=n_runs).astype(np.float64)
    below = np.cumsum(equal) - equal
    starts = np.concatenate([[0.0], np.cumsum(stored[reference])])[:-1]  # reference values of the genes before
    below += np.where(positive, zeros[reference, run_gene], 0.0) - starts[run_gene]
    negative = np.bincount(run_gene, np.where(positive, 0.0, equal), minlength=shape[1])

    u = per_group_and_gene(who, gene, (below + equal / 2)[run])
    u += zeros * (negative + zeros[reference] / 2)

    # Ties of reference and group together: those of the reference alone, and what the group's own values add.
    ties = np.broadcast_to(np.bincount(run_gene, equal**3 - equal, minlength=shape[1]), shape).copy()
    keys, times = np.unique(who * n_runs + run, return_counts=True)
    group, its_run = keys // max(n_runs, 1), keys % max(n_runs, 1)
    own, other = times.astype(np.float64), equal[its_run]
    ties += per_group_and_gene(group, run_gene[its_run], own * (3 * other * (other + own) + own**2 - 1))
    both = zeros + zeros[reference]
    return u, ties + both**3 - both


def _p_values(u: np.ndarray, ties: np.ndarray, n: np.ndarray, m: float) -> np.ndarray:
    total = n + m
    variance = n * m / 12.0 * (total + 1.0 - ties / (total * np.maximum(total - 1.0, 1.0)))
    deviation = np.abs(u - n * m / 2.0) - 0.5  # the continuity correction, of the larger of the two U
    varies = variance > 0
    z = np.divide(deviation, np.sqrt(variance, where=varies, out=np.ones_like(u)))
    return np.where(varies, np.minimum(2.0 * ndtr(-z), 1.0), 1.0)


@dataclass(frozen=True)
class DETable:
    """Differential expression of every perturbation against control; arrays are (n_perturbations, n_genes).

    target_mean and (n_genes,) reference_mean are profiles in natural units (log1p undone); log2_fold_change can be
    infinite where one of them is 0 and is 0 where both are; statistic is Mann-Whitney's U of the perturbed cells; fdr
    is the p-value adjusted after Benjamini and Hochberg over the genes of each perturbation.
    """

    perturbations: tuple[str, ...]
    genes: tuple[str, ...]
    target_mean: np.ndarray
    reference_mean: np.ndarray
    log2_fold_change: np.ndarray
    statistic: np.ndarray
    p_value: np.ndarray
    fdr: np.ndarray


def differential(
    screen: Screen, *, mean: Literal["geometric", "arithmetic"] = "geometric", epsilon: float = 0.0
) -> DETable:
    """Test every gene of every perturbation against control, as pdex does for cell-eval.

    pdex 0.3.0, `mode="ref", is_log1p=True`; cell-eval 0.8.2 calls it with epsilon=0 and geometric means.

    Args:
        screen: log1p-normalised cells with their labels.
        mean: of the profiles behind the fold change: "geometric" is expm1 of the mean of log1p values, "arithmetic" the
            mean of expm1 of the values.
        epsilon: added to both means before the fold change.

    Returns:
        A DETable with perturbations in sorted order.

    Raises:
        ValueError: an option is unknown, epsilon is negative, or a value is not finite.
    """
    if mean not in ("geometric", "arithmetic") or not epsilon >= 0:
        raise ValueError(f"mean={mean!r}, epsilon={epsilon!r}; 'geometric' or 'arithmetic', and 0 or more, were wanted")
    names = (*screen.perturbations, screen.control)
    codes = screen.codes()
    tests = rank_sums(screen.cells, codes, n_groups=len(names), reference=len(names) - 1)
    if mean == "geometric":
        profiles = np.expm1(screen.means(codes))
    else:
        natural = screen.cells.copy()
        natural.data = np.expm1(natural.data)
        profiles = screen.means(codes, natural)
    target, control = profiles[:-1], profiles[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.log2((target + epsilon) / (control + epsilon))
    change[np.isnan(change)] = 0.0
    p = tests.p_value[:-1]
    fdr = stats.false_discovery_control(p, axis=1) if p.size else p.copy()
    return DETable(screen.perturbations, screen.genes, target, control, change, tests.statistic[:-1], p, fdr)
