"""A change per gene, carried from contexts where it was measured to one where it was not: kriging over contexts.

For gene g in context c,

    change_cg = m_g + f_g(c) + error_cg,    m_g flat,    f_g ~ GP(0, s_g^2 exp(-D(c, c') / l)),    error ~ N(0, v_cg)

with D the squared distance between the contexts' control profiles. Few genes respond, and those that do differ between
contexts by much, the more so the more they respond on average: genes are put into strata by the size of their mean
change, and within a stratum s_g^2 has a discrete prior on SCALES whose probabilities are learned from its genes by EM
(empirical Bayes; Laird 1978, doi:10.1080/01621459.1978.10480103). Predictions are averaged over it and over LENGTHS,
each by its marginal likelihood, with m_g integrated out. Contexts of few cells have large errors and count for little.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Change", "corrected_squares", "krige", "likely_variance", "mean_change", "shrink", "strata"]

SCALES = np.array([1e-6, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0])  # s^2, of log counts per 10,000
LENGTHS = np.array([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8])  # l, in units of the median squared distance
STRATA = (1 / 80, 1 / 20, 1 / 5)  # shares of the genes with the largest mean change that end a stratum
MIN_STRATUM = 20  # genes; fewer teach no prior
SPREAD = 0.05  # variance between contexts when changes are averaged to sort genes: no context is the mean alone
EM_STEPS = 60
SMALLEST = 1e-6  # eigenvalue of a kernel: corrected distances need not be distances of any points


@dataclass(frozen=True)
class Change:
    """A change of the log of a mean profile, (n_genes,), and the variance of what is not known of it."""

    mean: np.ndarray
    variance: np.ndarray


def krige(changes: np.ndarray, errors: np.ndarray, squares: np.ndarray) -> Change:
    """The change of every gene in one more context.

    Args:
        changes: (n, n_genes) measured changes.
        errors: (n, n_genes) variances of their sampling errors, positive.
        squares: (n + 1, n + 1) squared distances of the contexts; the last is the new one.

    Returns:
        Mean and variance. One measured context does not say how contexts differ: its change is shrunk by its error.

    Raises:
        ValueError: shapes that do not fit, or a variance that is not positive.
    """
    n = len(changes)
    if changes.ndim != 2 or errors.shape != changes.shape or squares.shape != (n + 1, n + 1) or not n:
        raise ValueError(
            f"changes {changes.shape}, errors {errors.shape} and squares {squares.shape} do not fit; "
            "(n, n_genes) twice and (n + 1, n + 1) were wanted"
        )
    if not (np.isfinite(errors) & (errors > 0)).all():
        raise ValueError("errors holds values that are not positive and finite; pass sampling variances")
    parts = strata(mean_change(changes, errors))
    if n == 1:
        return shrink(changes[0], errors[0], parts)
    mean, variance = np.empty(changes.shape[1]), np.empty(changes.shape[1])
    for genes in parts:
        mean[genes], variance[genes] = _krige(changes[:, genes], errors[:, genes], squares)
    return Change(mean, variance)


def mean_change(changes: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """(n_genes,) mean of measured changes (n, n_genes), each weighted by its precision."""
    weight = 1.0 / (errors + SPREAD)
    return (weight * changes).sum(0) / weight.sum(0)


def strata(change: np.ndarray) -> list[np.ndarray]:
    """Indices of genes by decreasing size of a change (n_genes,), in parts whose priors are learned apart."""
    order = np.argsort(-np.abs(change), kind="stable")
    cuts = [0]
    for share in STRATA:
        end = round(share * len(order))
        if end - cuts[-1] >= MIN_STRATUM and len(order) - end >= MIN_STRATUM:
            cuts.append(end)
    return np.split(order, cuts[1:])


def shrink(values: np.ndarray, errors: np.ndarray, parts: list[np.ndarray]) -> Change:
    """What is likely of values (n_genes,) measured with these variances, by empirical Bayes within each part.

    value_g = m + s_g N(0, 1) + error_g, with m the mean of the part by precision and the prior of s_g^2 as for `krige`.
    """
    mean, variance = np.empty_like(values), np.empty_like(values)
    for genes in parts:
        centre = mean_change(values[genes][:, None], errors[genes][:, None])[0]
        rest, error = values[genes][:, None] - centre, errors[genes][:, None]
        total = SCALES + error
        posterior, _ = _posterior(-0.5 * (rest**2 / total + np.log(total)))
        given = SCALES / total * rest
        kept = (posterior * given).sum(1)
        mean[genes] = centre + kept
        variance[genes] = (posterior * (SCALES * error / total + given**2)).sum(1) - kept**2
    return Change(mean, variance)


def likely_variance(values: np.ndarray, errors: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
    """What is likely of the variance s_g^2 of values (n, n_genes) around 0 measured with variances errors.

    value_ig = s_g N(0, 1) + error_ig, with the prior of s_g^2 as for `krige`, learned within each part; its posterior
    mean, (n_genes,).
    """
    variance = np.empty(values.shape[1])
    for genes in parts:
        total = SCALES + errors[:, genes, None]
        posterior, _ = _posterior(-0.5 * (values[:, genes, None] ** 2 / total + np.log(total)).sum(0))
        variance[genes] = posterior @ SCALES
    return variance


def _krige(changes: np.ndarray, errors: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the new change of the genes of one stratum."""
    n = len(changes)
    apart = squares[:n, :n][np.triu_indices(n, 1)]
    unit = float(np.median(apart[apart > 0])) if (apart > 0).any() else 1.0
    fits = [_given_length(changes, errors, squares, length * unit) for length in LENGTHS]
    evidence = np.array([fit[0] for fit in fits])
    weights = np.exp(evidence - evidence.max())
    weights /= weights.sum()
    mean = sum(w * fit[1] for w, fit in zip(weights, fits, strict=True))
    second = sum(w * fit[2] for w, fit in zip(weights, fits, strict=True))
    return np.asarray(mean), np.maximum(second - mean**2, 0.0)


def _given_length(
    changes: np.ndarray, errors: np.ndarray, squares: np.ndarray, length: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """Log evidence of all genes, and first and second moment of the new change, averaged over SCALES."""
    n, n_genes = changes.shape
    kernel = _positive(np.exp(-squares / length))
    y, one = changes.T[:, :, None], np.ones((n_genes, n, 1))
    logs, means, seconds = [], [], []
    for scale in SCALES:
        covariance = scale * kernel[:n, :n] + errors.T[:, :, None] * np.eye(n)
        between = scale * kernel[:n, n:]
        solved = np.linalg.solve(covariance, np.concatenate([y, one, np.broadcast_to(between, one.shape)], axis=2))
        by_y, by_one, by_new = solved[..., 0], solved[..., 1], solved[..., 2]
        total = by_one.sum(1)
        level = by_y.sum(1) / total
        rest = changes.T - level[:, None]
        misfit = (rest * (by_y - level[:, None] * by_one)).sum(1)
        logs.append(-0.5 * (misfit + np.linalg.slogdet(covariance)[1] + np.log(total)))
        mean = level + (by_new * rest).sum(1)
        unknown = scale * kernel[n, n] - (by_new * between[:, 0]).sum(1) + (1.0 - by_new.sum(1)) ** 2 / total
        means.append(mean)
        seconds.append(unknown + mean**2)
    log, mean, second = (np.stack(part, axis=1) for part in (logs, means, seconds))
    posterior, evidence = _posterior(log)
    return evidence, (posterior * mean).sum(1), (posterior * second).sum(1)


def _posterior(log: np.ndarray) -> tuple[np.ndarray, float]:
    """Probabilities of SCALES of every gene (n_genes, n_scales), their prior learned by EM, and the log evidence."""
    most = log.max(1, keepdims=True)
    likelihood, prior = np.exp(log - most), np.full(log.shape[1], 1.0 / log.shape[1])
    for _ in range(EM_STEPS):
        joint = prior * likelihood
        marginal = joint.sum(1, keepdims=True)
        posterior = joint / marginal
        prior = posterior.mean(0)
    return posterior, float((np.log(marginal) + most).sum())


def _positive(kernel: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(kernel)
    return (vectors * np.maximum(values, SMALLEST)) @ vectors.T


def corrected_squares(profiles: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """(n, n) squared distances of log profiles (n, n_genes), less what their sampling variances add to them."""
    squares = ((profiles[:, None] - profiles[None]) ** 2).sum(-1) - (errors[:, None] + errors[None]).sum(-1)
    np.fill_diagonal(squares, 0.0)
    return np.maximum(squares, 0.0)
