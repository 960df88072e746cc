"""From decoded means to predicted cells: count transport, negative-binomial sampling, or the means themselves.

A model, and every baseline, says for each control cell what its mean profile is (mu0) and what it would become under
the perturbation (mu1). How that becomes a cell is one choice, made here and applied to all of them alike:

- "transport" keeps the control cell's own counts x: thinned by Binomial(x, mu1/mu0) where the mean falls, increased by
  a Poisson draw of mean mu1 - mu0 where it rises. Up to a doubling the increase follows the cell's own rate, which
  given its count is Gamma with mean (x + r)/(mu0 + r) times mu0: a cell that expresses a gene raises it more. What goes
  beyond a doubling is new expression and no cell's own. The cell keeps the noise, the depth and the co-expression that
  no decoder models.
- "sample" draws NB(mu1, r).
- "mean" is mu1. It has no noise, so distances between distributions punish it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import sparse

from pf_core.config import Output
from pf_core.noise import generator

Csr = Any  # scipy.sparse.csr_matrix, whose own annotations call .shape optional
Means = Callable[[slice], tuple[np.ndarray, np.ndarray]]
"""Rows of the controls -> (mu0, mu1), each (n_rows, n_genes), in counts at the cells' own library size."""

BLOCK = 512  # rows that are dense at once; also the unit of the random streams, so it is a constant and no argument


def transport(
    counts: Csr, mu0: np.ndarray, mu1: np.ndarray, rng: np.random.Generator, r: np.ndarray | float | None = None
) -> Csr:
    """Move control cells from mean mu0 to mean mu1, keeping their own counts.

    Binomial(x, mu1/mu0) where mu1 < mu0. Where mu1 > mu0, with d = mu1 - mu0 and w = (x + r)/(mu0 + r),
    x + Poisson(w min(d, mu0) + max(d - mu0, 0)); without r, w = 1. x itself where both means are equal (also where both
    are 0). Nothing is divided by a mean of 0 and no ratio above 1 is formed. Since E[w] = 1 for counts of mean mu0, the
    expectation over cells is mu1 in either case.

    Args:
        counts: (n_cells, n_genes) sparse, non-negative integers.
        mu0, mu1: (n_cells, n_genes) means of the cell before and after, in counts, finite and not negative.
        rng: as from `pf_core.noise.generator`.
        r: (n_genes,) or () inverse dispersion of the cells around mu0, positive; None for no spread.

    Returns:
        (n_cells, n_genes) CSR of integers, in the dtype of counts, without stored zeros.

    Raises:
        ValueError: shapes differ, counts are not non-negative integers, or a mean is negative or not finite.
    """
    counts = _csr(counts)
    shape = counts.shape
    mu0, mu1 = _means("mu0", mu0, shape), _means("mu1", mu1, shape)
    if not np.all((counts.data >= 0) & (counts.data == np.rint(counts.data)) & np.isfinite(counts.data)):
        raise ValueError("counts holds values that are not non-negative integers; pass raw counts, not normalised ones")
    cells, genes = np.repeat(np.arange(shape[0]), np.diff(counts.indptr)), counts.indices
    before, after = mu0[cells, genes], mu1[cells, genes]
    falls = after < before  # implies before > 0
    kept = counts.data.astype(np.int64)
    kept[falls] = rng.binomial(kept[falls], after[falls] / before[falls])
    thinned = sparse.csr_matrix((kept, counts.indices, counts.indptr), shape=shape)
    rise = np.maximum(mu1 - mu0, 0.0)
    if r is not None:
        own = np.minimum(rise, mu0)
        rise += own * ((counts.toarray() + r) / (mu0 + r) - 1.0)
    moved = _csr(thinned + sparse.csr_matrix(rng.poisson(np.maximum(rise, 0.0))))
    moved.eliminate_zeros()
    return moved.astype(counts.dtype)


def sample(mu: np.ndarray, r: np.ndarray, rng: np.random.Generator, dtype: str = "float32") -> Csr:
    """Negative-binomial counts of mean mu and inverse dispersion r (variance mu + mu^2/r), as gamma-Poisson draws.

    Args:
        mu: (n_cells, n_genes) means in counts, finite and not negative.
        r: (n_genes,) or (n_cells, n_genes), positive.
        rng: as from `pf_core.noise.generator`.
        dtype: of the result.

    Returns:
        (n_cells, n_genes) CSR of integers.

    Raises:
        ValueError: r does not broadcast to mu or is not positive; a mean is negative or not finite.
    """
    mu, r = _means("mu", mu, np.shape(mu)), np.asarray(r, dtype=np.float64)
    if r.shape not in (mu.shape, mu.shape[1:]):
        raise ValueError(f"r has shape {r.shape}; {mu.shape[1:]} (one per gene) or {mu.shape} was wanted")
    if not np.all((r > 0) & np.isfinite(r)):
        raise ValueError("r holds values that are not positive and finite; pass the dispersion, not its logarithm")
    rate = rng.standard_gamma(np.broadcast_to(r, mu.shape)) * (mu / r)
    return sparse.csr_matrix(rng.poisson(rate).astype(dtype))


def predicted_counts(
    counts: Csr,
    means: Means | None,
    *,
    seed: int,
    name: str,
    output: Output = "transport",
    r: np.ndarray | float | None = None,
) -> Csr:
    """The predicted cells, one for each control cell, block by block.

    Args:
        counts: (n_cells, n_genes) CSR counts of the control cells.
        means: (mu0, mu1) of a block of the control cells; None says that nothing changes, and the control cells
            themselves are the prediction under every output.
        seed: the run's seed.
        name: what is predicted, for example "NK cells/IFNB". Draws depend on (seed, name, output) and on nothing
            else: two predictors with equal means get equal cells.
        output: "transport", "sample" or "mean".
        r: (n_genes,) or () inverse dispersion: of the draws of "sample", and of the cells' own rates in "transport".

    Returns:
        (n_cells, n_genes) CSR, float32. For "mean" every entry is stored.

    Raises:
        ValueError: an unknown output, r missing for "sample", or what `transport` and `sample` raise.
    """
    if output not in ("transport", "sample", "mean"):
        raise ValueError(f"output is {output!r}; one of 'transport', 'sample', 'mean' was wanted")
    if output == "sample" and r is None:
        raise ValueError("output='sample' needs r, the inverse dispersion of each gene (the model's own)")
    counts = _csr(counts, np.float32)
    if means is None:
        return counts.copy()
    blocks, (n_cells, n_genes) = [], counts.shape
    for index, start in enumerate(range(0, n_cells, BLOCK)):
        rows = slice(start, min(start + BLOCK, n_cells))
        mu0, mu1 = means(rows)
        rng = generator(seed, f"output.{output}.{name}", index)
        if output == "transport":
            blocks.append(transport(counts[rows], mu0, mu1, rng, r))
        elif output == "sample":
            assert r is not None
            blocks.append(sample(mu1, np.broadcast_to(r, n_genes), rng))
        else:
            blocks.append(sparse.csr_matrix(_means("mu1", mu1, (rows.stop - rows.start, n_genes)).astype(np.float32)))
    return _csr(sparse.vstack(blocks)) if blocks else counts.copy()


def scaled(counts: Csr, factor: np.ndarray, *, seed: int, name: str, output: Output = "transport") -> Csr:
    """Predicted cells with gene means multiplied: Binomial(x, f) where f < 1, x + Poisson((f - 1) x) where f > 1.

    Args:
        counts: (n_cells, n_genes) CSR, from `predicted_counts` under the same output.
        factor: (n_genes,) finite and not negative.
        seed, name: of the draws.
        output: for "mean" the means themselves are multiplied.

    Returns:
        (n_cells, n_genes) CSR, float32.
    """
    if output == "mean":
        return _csr(counts.multiply(factor), np.float32)

    def means(rows: slice) -> tuple[np.ndarray, np.ndarray]:
        own = counts[rows].toarray().astype(np.float64)
        return own, own * factor

    return predicted_counts(counts, means, seed=seed, name=name)


def _csr(counts: Csr, dtype: Any = None) -> Csr:
    return sparse.csr_matrix(counts, dtype=dtype)


def _means(name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    value = np.asarray(value, dtype=np.float64)
    if value.shape != tuple(shape):
        raise ValueError(f"{name} has shape {value.shape}; {tuple(shape)} (cells, genes) was wanted")
    if not (np.all(np.isfinite(value)) and np.all(value >= 0)):
        raise ValueError(f"{name} holds values that are negative or not finite; a mean in counts was wanted")
    return value
