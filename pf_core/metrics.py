"""How close predicted cells are to real ones: distances between distributions, and agreement of mean changes.

Everything is float64 NumPy and SciPy, independent of the twins. All methods of one table are measured in the same
space: the leading principal components of the real cells, on log1p of counts normalised to 1e4 per cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import sparse
from scipy.spatial.distance import cdist

from pf_core.config import NORMALISED_TOTAL
from pf_core.outputs import Csr

PERMUTATIONS = 199
CHUNK = 4_000_000  # distances held at once (32 MB)
TOP_GENES = 1000  # of r2_top and l2_top


def energy_distance(x: np.ndarray, y: np.ndarray, *, estimator: str = "u", power: int = 1) -> float:
    """Energy distance 2 E|X - Y|^p - E|X - X'|^p - E|Y - Y'|^p of two samples, without a final root.

    power=1 is the energy distance of Szekely and Rizzo (2013); power=2, which sees only means, is the E-distance as
    scPerturb defined it first. The U-statistic is unbiased and can be negative; the V-statistic counts the pairs of a
    cell with itself and is never negative. Memory is bounded by CHUNK distances.

    Args:
        x: (n, d) one sample.
        y: (m, d) the other.
        estimator: "u" (1/(n(n-1))) or "v" (1/n^2).
        power: 1 or 2.

    Returns:
        The distance.

    Raises:
        ValueError: shapes do not match, values are not finite, too few rows, or an unknown option.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y have shapes {x.shape} and {y.shape}; (n, d) and (m, d) were wanted")
    if estimator not in ("u", "v") or power not in (1, 2):
        raise ValueError(f"estimator={estimator!r}, power={power!r}; 'u' or 'v', and 1 or 2, were wanted")
    least = 2 if estimator == "u" else 1
    if min(len(x), len(y)) < least:
        raise ValueError(f"x has {len(x)} rows and y {len(y)}; the {estimator!r} estimator needs {least} of each")
    if not (np.all(np.isfinite(x)) and np.all(np.isfinite(y))):
        raise ValueError("x or y holds values that are not finite")
    metric = "euclidean" if power == 1 else "sqeuclidean"
    n, m = len(x), len(y)
    own = (n * (n - 1), m * (m - 1)) if estimator == "u" else (n * n, m * m)
    between = 2.0 * sum_of_distances(x, y, metric) / (n * m)
    return between - sum_of_distances(x, x, metric) / own[0] - sum_of_distances(y, y, metric) / own[1]


def permutation_p(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, *, n: int = PERMUTATIONS) -> float:
    """p-value of the energy distance of two samples: share of relabelled samples that are as far apart or farther.

    Args:
        x, y: (n_x, d) and (n_y, d), two rows or more each; all pairwise distances are held at once.
        rng: of the relabellings.
        n: number of relabellings; the smallest p is 1 / (n + 1).
    """
    pooled = np.concatenate([x, y]).astype(np.float64)
    distances = cdist(pooled, pooled)
    first = np.zeros((n + 1, len(pooled)))
    first[:, : len(x)] = 1.0
    first[1:] = rng.permuted(first[1:], axis=1)
    towards = first @ distances
    inside, reach = (towards * first).sum(1), towards.sum(1)
    between, outside = reach - inside, distances.sum() - 2.0 * reach + inside
    size, rest = len(x), len(y)
    energy = 2.0 * between / (size * rest) - inside / (size * (size - 1)) - outside / (rest * (rest - 1))
    return float(np.mean(energy >= energy[0] - 1e-9 * abs(energy[0])))


def sum_of_distances(
    x: np.ndarray, y: np.ndarray, metric: Literal["euclidean", "sqeuclidean"] = "euclidean", *, floor: float = 0.0
) -> float:
    """Sum over all pairs of max(distance, floor), for x (n, d) and y (m, d), with at most CHUNK distances at once."""
    rows = max(1, CHUNK // len(y))
    # Differences, not a Gram form: no digit is lost where the mean is large against the spread.
    blocks = (cdist(x[start : start + rows], y, metric) for start in range(0, len(x), rows))
    return float(sum((block if floor == 0 else np.maximum(block, floor)).sum() for block in blocks))


def normalise(counts, *, total: float = NORMALISED_TOTAL) -> Csr:
    """log1p of counts scaled to 1e4 per cell, sparse, float64. A cell without counts stays zero.

    Args:
        counts: (n_cells, n_genes) sparse or dense, not negative.
        total: what a cell is scaled to; cell-eval and scanpy's default is `median_total` of each file.
    """
    if not (total > 0 and np.isfinite(total)):
        raise ValueError(f"total={total}; a positive number of counts per cell was wanted")
    normalised: Csr = sparse.csr_matrix(counts, dtype=np.float64, copy=True)
    totals = np.asarray(normalised.sum(axis=1)).ravel()
    factor = np.divide(total, totals, out=np.zeros_like(totals), where=totals > 0)
    normalised.data = np.log1p(normalised.data * np.repeat(factor, np.diff(normalised.indptr)))
    return normalised


def median_total(counts) -> float:
    """Median of the counts per cell, over cells that have any; NaN where none has."""
    totals = np.asarray(sparse.csr_matrix(counts, dtype=np.float64).sum(axis=1)).ravel()
    return float(np.median(totals[totals > 0])) if np.any(totals > 0) else float("nan")


@dataclass(frozen=True)
class PCA:
    """Principal components of the real cells.

    mean (n_genes,), components (n_components, n_genes) with orthonormal rows, variance (n_components,) along them,
    share (n_components,) of the total variance.
    """

    mean: np.ndarray
    components: np.ndarray
    variance: np.ndarray
    share: np.ndarray

    def transform(self, counts) -> np.ndarray:
        """Scores (n_cells, n_components) of raw counts, which are normalised first."""
        return self.project(normalise(counts))

    def project(self, normalised: Csr) -> np.ndarray:
        """Scores of what `normalise` returned."""
        n_genes = normalised.shape[1]
        if n_genes != len(self.mean):
            raise ValueError(f"counts has {n_genes} genes but the components have {len(self.mean)}")
        return np.asarray(normalised @ self.components.T) - self.mean @ self.components.T


def real_pca(counts: Csr, *, n: int = 20, seed: int = 0) -> PCA:
    """Leading principal components of log-normalised real cells, without densifying them.

    Args:
        counts: (n_cells, n_genes) raw counts of all real cells, held-out ones included: it is a ruler, not a model.
        n: number of components; at most min(n_cells, n_genes) - 1 exist for the solver.
        seed: start vector of the solver; the result depends on it by rounding only.
    """
    from sklearn.decomposition import PCA as SklearnPCA

    normalised = normalise(counts)
    n = min(n, min(normalised.shape) - 1)
    if n < 1:
        raise ValueError(f"counts has shape {normalised.shape}; two cells and two genes are the least")
    # svd_flip inside fixes the signs by the largest loading of each component.
    fitted = SklearnPCA(n, svd_solver="arpack", random_state=seed).fit(normalised)
    return PCA(
        np.asarray(fitted.mean_),
        np.asarray(fitted.components_),
        np.asarray(fitted.explained_variance_),
        np.asarray(fitted.explained_variance_ratio_),
    )


def pearson_delta(real: np.ndarray, predicted: np.ndarray, control: np.ndarray) -> float:
    """Pearson correlation over genes of the predicted with the real change of the mean against control.

    NaN where one of the two changes does not vary over genes, as for a prediction that equals control: the
    correlation is undefined there, not 0.

    Args:
        real, predicted, control: (n_genes,) means of log-normalised cells.
    """
    real, predicted = np.asarray(real) - control, np.asarray(predicted) - control
    real, predicted = real - real.mean(), predicted - predicted.mean()
    scale = float(np.linalg.norm(real) * np.linalg.norm(predicted))
    return float(real @ predicted) / scale if scale > 0 else float("nan")


def r2_means(real: np.ndarray, predicted: np.ndarray) -> float:
    """Coefficient of determination 1 - SS_res/SS_tot of the real mean profile by the predicted one, over genes.

    (Not the squared correlation, which some papers call by the same name and which forgives scale and offset.)
    """
    real, predicted = np.asarray(real, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    total = float(np.sum((real - real.mean()) ** 2))
    return 1.0 - float(np.sum((real - predicted) ** 2)) / total if total > 0 else float("nan")


def mse_means(real: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over genes of the squared difference of the mean profiles."""
    return float(np.mean((np.asarray(real, dtype=np.float64) - predicted) ** 2))


def highest_genes(mean: np.ndarray, n: int = TOP_GENES) -> np.ndarray:
    """Indices of the n genes of the highest mean, the highest first; all genes where there are no more than n.

    Args:
        mean: (n_genes,) mean profile that says what is high. Take the control cells', which no method predicts.
        n: how many.
    """
    mean = np.asarray(mean, dtype=np.float64)
    if mean.ndim != 1 or n < 1:
        raise ValueError(f"mean has shape {mean.shape} and n is {n}; (n_genes,) and 1 or more were wanted")
    return np.argsort(-mean, kind="stable")[:n]


def r2_top(real: np.ndarray, predicted: np.ndarray, control: np.ndarray, *, n: int = TOP_GENES) -> float:
    """r2_means on the n genes that are highest in the control cells. At most 1, which is best; below 0 is possible."""
    genes = highest_genes(control, n)
    return r2_means(np.asarray(real)[genes], np.asarray(predicted)[genes])


def l2_top(real: np.ndarray, predicted: np.ndarray, control: np.ndarray, *, n: int = TOP_GENES) -> float:
    """Euclidean distance of the mean profiles over the n genes that are highest in the control cells. 0 is best.

    A norm, not a mean: it grows with n. The prediction error of Ahlmann-Eltze, Huber and Anders (2025),
    doi:10.1038/s41592-025-02772-6, on log-normalised means.
    """
    genes = highest_genes(control, n)
    return float(np.linalg.norm(np.asarray(real, dtype=np.float64)[genes] - np.asarray(predicted)[genes]))


def score(real, predicted, control, pca: PCA) -> dict[str, float]:
    """Every number of the table for one condition.

    Args:
        real: (n, n_genes) counts of the real perturbed cells.
        predicted: (m, n_genes) counts of the predicted cells.
        control: (k, n_genes) counts of the control cells they were predicted from.
        pca: from `real_pca`.

    Returns:
        energy_pca_u, energy_pca_v, pearson_delta, r2, mse. What is undefined is NaN: the U-statistic of a single cell,
        the correlation of a change that is constant.
    """
    return score_normalised(normalise(real), normalise(predicted), normalise(control), pca)


def score_normalised(real: Csr, predicted: Csr, control: Csr, pca: PCA) -> dict[str, float]:
    """As `score`, of cells that are log-normalised already: interpolated cells have no counts.

    Args:
        real, predicted, control: (n, n_genes) CSR, as from `normalise`; control is what changes are measured against.
        pca: from `real_pca`.
    """
    for name, cells in (("real", real), ("predicted", predicted), ("control", control)):
        if cells.shape[0] == 0:
            raise ValueError(f"{name} holds no cells; leave this condition out of the table")
    x, y = pca.project(predicted), pca.project(real)
    means = [np.asarray(cells.mean(axis=0)).ravel() for cells in (real, predicted, control)]
    return {
        "energy_pca_u": energy_distance(x, y, estimator="u") if min(len(x), len(y)) > 1 else float("nan"),
        "energy_pca_v": energy_distance(x, y, estimator="v"),
        "pearson_delta": pearson_delta(*means),
        "r2": r2_means(means[0], means[1]),
        "mse": mse_means(means[0], means[1]),
    }
