"""Are predicted counts as variable, and as often zero, as real ones? Gene by gene, on raw counts.

A decoder can have every mean right and its noise wrong: too little (means passed off as cells), or too much (a
dispersion that also explains differences between cells which the latent should). Both show here and in nothing that
looks at means. Compare cells of one condition: a mixture of conditions is more variable than any of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from pf_core.outputs import Csr

__all__ = ["CountCalibration", "Moments", "count_calibration", "count_moments", "nb_moments"]

BLOCK = 512  # cells that are dense at once


@dataclass(frozen=True)
class Moments:
    """Of the counts of each gene over cells, (n_genes,) each: mean, variance (counts^2), share of zeros."""

    mean: np.ndarray
    variance: np.ndarray
    zeros: np.ndarray


def count_moments(counts) -> Moments:
    """Mean, unbiased variance and share of zeros of every gene, without densifying.

    Args:
        counts: (n_cells, n_genes) sparse or dense, two cells or more, raw: not normalised.

    Raises:
        ValueError: fewer than two cells, or values that are negative or not finite.
    """
    cells: Csr = sparse.csr_matrix(counts, dtype=np.float64)
    n = cells.shape[0]
    if n < 2:
        raise ValueError(f"counts has {n} cells; two are the least for a variance")
    if not np.all((cells.data >= 0) & np.isfinite(cells.data)):
        raise ValueError("counts holds values that are negative or not finite; pass raw counts")
    mean = np.asarray(cells.sum(axis=0)).ravel() / n
    # Around the mean, not the difference of two large sums: the stored values, then the zeros.
    deviations = cells.copy()
    deviations.data = (cells.data - mean[cells.indices]) ** 2
    stored = np.bincount(cells.indices, minlength=len(mean))
    squares = np.asarray(deviations.sum(axis=0)).ravel() + (n - stored) * mean**2
    nonzero = np.bincount(cells.indices[cells.data > 0], minlength=len(mean))
    return Moments(mean, squares / (n - 1), 1.0 - nonzero / n)


def nb_moments(mu: np.ndarray, r: np.ndarray) -> Moments:
    """What a negative-binomial decoder says of a set of cells: moments of one count of a cell drawn from the set.

    Over cells c: mean of mu_c; mean of (mu_c + mu_c^2/r) plus the variance of mu_c; mean of (r/(r + mu_c))^r. Exact, no
    draw is made. Cells whose means lie on their library sizes are compared with real cells at the same depths.

    Args:
        mu: (n_cells, n_genes) decoded means in counts, not negative.
        r: (n_genes,) or (n_cells, n_genes) inverse dispersion, positive.

    Raises:
        ValueError: shapes do not match, or values are out of range.
    """
    mu, r = np.asarray(mu), np.asarray(r)
    if mu.ndim != 2 or len(mu) == 0 or r.shape not in (mu.shape, mu.shape[1:]):
        raise ValueError(f"mu has shape {mu.shape} and r {r.shape}; (n_cells, n_genes) and that or (n_genes,) wanted")
    if not (np.all((mu >= 0) & np.isfinite(mu)) and np.all((r > 0) & np.isfinite(r))):
        raise ValueError("mu must be finite and not negative, r finite and positive; pass r, not its logarithm")
    mean = mu.mean(axis=0, dtype=np.float64)
    within, between, zeros = (np.zeros(mu.shape[1]) for _ in range(3))
    for start in range(0, len(mu), BLOCK):
        rows = slice(start, start + BLOCK)
        means, shape = mu[rows].astype(np.float64), (r[rows] if r.ndim == 2 else r).astype(np.float64)
        within += (means + means**2 / shape).sum(axis=0)
        between += ((means - mean) ** 2).sum(axis=0)
        zeros += np.exp(-shape * np.log1p(means / shape)).sum(axis=0)
    return Moments(mean, (within + between) / len(mu), zeros / len(mu))


@dataclass(frozen=True)
class CountCalibration:
    """Predicted against real variance and zeros.

    variance_bias is the median, and variance_error the mean absolute value, over genes of log2(predicted / real
    variance): 0 is best, -1 half the variance that real cells have. They are over the n_genes genes that vary on both
    sides (NaN if none does). zero_bias is the mean, and zero_error the mean absolute value, over all genes of predicted
    less real share of zeros: 0 is best, in -1..1 and 0..1.
    """

    variance_bias: float
    variance_error: float
    zero_bias: float
    zero_error: float
    n_genes: int


def count_calibration(real: Moments, predicted: Moments) -> CountCalibration:
    """Compare the moments of predicted counts, or of a decoder's law, with those of real counts of the same genes."""
    if real.mean.shape != predicted.mean.shape:
        raise ValueError(f"real has {real.mean.size} genes and predicted {predicted.mean.size}; align them first")
    varies = (real.variance > 0) & (predicted.variance > 0)
    ratio = np.log2(predicted.variance[varies] / real.variance[varies])
    difference = predicted.zeros - real.zeros
    return CountCalibration(
        float(np.median(ratio)) if ratio.size else float("nan"),
        float(np.mean(np.abs(ratio))) if ratio.size else float("nan"),
        float(np.mean(difference)),
        float(np.mean(np.abs(difference))),
        int(varies.sum()),
    )
