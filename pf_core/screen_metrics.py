"""Metrics of a predicted screen against the real one, from mean profiles and from cells.

Names and values are those of cell-eval 0.8.2 (Arc Institute). Each function returns an array (n_perturbations,) in the
order of `real.perturbations`, or one number for the screen. What is undefined is NaN, never 0. `vcc.cell_eval_table`
collects all of them.

Every change is against the control of its own side: the prediction's mean less the mean of the *predicted* screen's
controls. Pass the same controls on both sides unless the model predicts control cells too.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy import stats

from pf_core.metrics import sum_of_distances
from pf_core.screens import Screen, check_pair

__all__ = [
    "discrimination_score",
    "mae",
    "mae_delta",
    "mse",
    "mse_delta",
    "pearson_delta",
    "pearson_edistance",
    "spearman",
]

Metric = Literal["l1", "l2", "cosine"]


def _profiles(real: Screen, predicted: Screen) -> tuple[np.ndarray, np.ndarray]:
    check_pair(real, predicted)
    return real.means()[:-1], predicted.means()[:-1]


def _deltas(real: Screen, predicted: Screen) -> tuple[np.ndarray, np.ndarray]:
    check_pair(real, predicted)
    first, second = real.means(), predicted.means()
    return first[:-1] - first[-1], second[:-1] - second[-1]


def mse(real: Screen, predicted: Screen) -> np.ndarray:
    """Mean over genes of the squared difference of the mean profiles, (n_perturbations,). 0 is best."""
    first, second = _profiles(real, predicted)
    return np.mean((first - second) ** 2, axis=1)


def mae(real: Screen, predicted: Screen) -> np.ndarray:
    """Mean over genes of the absolute difference of the mean profiles, (n_perturbations,). 0 is best."""
    first, second = _profiles(real, predicted)
    return np.mean(np.abs(first - second), axis=1)


def mse_delta(real: Screen, predicted: Screen) -> np.ndarray:
    """Mean over genes of the squared difference of the mean changes, (n_perturbations,). Equals mse if controls do."""
    first, second = _deltas(real, predicted)
    return np.mean((first - second) ** 2, axis=1)


def mae_delta(real: Screen, predicted: Screen) -> np.ndarray:
    """Mean over genes of the absolute difference of the mean changes, (n_perturbations,). Equals mae if controls do."""
    first, second = _deltas(real, predicted)
    return np.mean(np.abs(first - second), axis=1)


def pearson_delta(real: Screen, predicted: Screen) -> np.ndarray:
    """Pearson correlation over genes of predicted and real mean changes, (n_perturbations,). In -1..1, 1 is best.

    NaN where a change does not vary over genes, as for a prediction that equals control.
    """
    return _correlation(*_deltas(real, predicted))


def _correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pearson correlation along the last axis; NaN where one of the two is constant."""
    # Constant to the last digit: the mean of equal numbers need not be that number, and rounding is no variation.
    constant = (np.ptp(first, axis=-1) == 0) | (np.ptp(second, axis=-1) == 0)
    first = first - first.mean(axis=-1, keepdims=True)
    second = second - second.mean(axis=-1, keepdims=True)
    scale = np.sqrt(np.sum(first**2, axis=-1) * np.sum(second**2, axis=-1))
    found = np.divide(np.sum(first * second, axis=-1), scale, out=np.full(scale.shape, np.nan), where=scale > 0)
    return np.where(constant, np.nan, found)


def discrimination_score(
    real: Screen, predicted: Screen, *, metric: Metric = "l1", exclude_target: bool = True
) -> np.ndarray:
    """How near a predicted change is to its own real change, among the real changes of all perturbations.

    1 - rank / n_perturbations, where rank counts the real changes that are nearer than the right one: 1 is best, and
    1/2 + 1/(2 n) what a guess gets on average. With l1 this is the Virtual Cell Challenge's PDS. The gene a
    perturbation is named after is left out of its comparison, because a model is told that this gene changes; a
    combination ("A+B") is no gene name, and nothing is left out. Ties go to the earlier label, as in cell-eval where
    NumPy's default sort leaves them in place; so a prediction without change scores by the alphabet with "cosine".

    Args:
        real, predicted: screens with equal genes and labels.
        metric: "l1", "l2", or "cosine" (1 for a change of length 0).
        exclude_target: leave out the gene named like the perturbation.

    Returns:
        (n_perturbations,) in 1/n..1.

    Raises:
        ValueError: screens do not match, or the metric is unknown.
    """
    if metric not in ("l1", "l2", "cosine"):
        raise ValueError(f"metric={metric!r}; 'l1', 'l2' or 'cosine' was wanted")
    first, second = _deltas(real, predicted)
    place = {gene: column for column, gene in enumerate(real.genes)}
    scores = np.empty(len(first))
    for row, name in enumerate(real.perturbations):
        # A gene that is 0 on both sides adds nothing to any of the three distances.
        target = [place[name]] if exclude_target and name in place else []
        saved, change = first[:, target].copy(), second[row].copy()
        first[:, target], change[target] = 0.0, 0.0
        order = np.argsort(_distances(first, change, metric), kind="stable")
        first[:, target] = saved
        scores[row] = 1.0 - int(np.flatnonzero(order == row)[0]) / len(first)
    return scores


def _distances(rows: np.ndarray, row: np.ndarray, metric: Metric) -> np.ndarray:
    if metric == "l1":
        return np.abs(rows - row).sum(axis=1)
    if metric == "l2":
        return np.sqrt(((rows - row) ** 2).sum(axis=1))
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(row)
    return 1.0 - np.divide(rows @ row, lengths, out=np.zeros(len(rows)), where=lengths > 0)


def pearson_edistance(real: Screen, predicted: Screen) -> float:
    """Pearson correlation over perturbations of the E-distances to control, predicted with real. 1 is best.

    E-distance of kind "cell-eval" (Euclidean, V, all genes): it asks whether strong perturbations are predicted to be
    strong, and not whether they go anywhere right. NaN for a single perturbation. Cells of one perturbation and the
    controls are dense at once.
    """
    check_pair(real, predicted)
    sides = np.array([_energies(real), _energies(predicted)])
    return float(_correlation(sides[0], sides[1])) if sides.shape[1] > 1 else float("nan")


def _energies(screen: Screen) -> np.ndarray:
    control = screen.of(screen.control).toarray()
    within_control = sum_of_distances(control, control) / len(control) ** 2
    found = []
    for name in screen.perturbations:
        cells = screen.of(name).toarray()
        between = sum_of_distances(cells, control) / (len(cells) * len(control))
        found.append(2 * between - sum_of_distances(cells, cells) / len(cells) ** 2 - within_control)
    return np.array(found)


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman correlation with average ranks; NaN for fewer than two values or constant ones."""
    if len(first) < 2:
        return float("nan")
    return float(_correlation(stats.rankdata(first), stats.rankdata(second)))
