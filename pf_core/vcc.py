"""All metrics of cell-eval in one table, and the score of the Virtual Cell Challenge."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pf_core import de_metrics, screen_metrics
from pf_core.differential import differential
from pf_core.screens import Screen, check_pair

__all__ = ["VccParts", "cell_eval_table", "vcc_parts", "vcc_score"]

TOP = (50, 100, 200, 500)  # the k of overlap_at_k and precision_at_k


def cell_eval_table(real: Screen, predicted: Screen) -> dict[str, np.ndarray]:
    """Every metric of cell-eval's full profile but clustering_agreement, by cell-eval's names.

    Equal to cell-eval 0.8.2 on the same log1p-normalised cells. Numbers of the whole screen (de_spearman_sig,
    pearson_edistance) are repeated for every perturbation, as cell-eval does. What cell-eval leaves out as null is NaN.

    Args:
        real, predicted: screens with equal genes and labels.

    Returns:
        {name: (n_perturbations,)}, perturbations in the order of `real.perturbations`.
    """
    check_pair(real, predicted)
    n = len(real.perturbations)
    tables = differential(real), differential(predicted)
    found = {
        name: getattr(screen_metrics, name)(real, predicted)
        for name in ("pearson_delta", "mse", "mae", "mse_delta", "mae_delta")
    }
    for metric in ("l1", "l2", "cosine"):
        found[f"discrimination_score_{metric}"] = screen_metrics.discrimination_score(real, predicted, metric=metric)
    found["pearson_edistance"] = np.full(n, screen_metrics.pearson_edistance(real, predicted))
    for k in (None, *TOP):
        found[f"overlap_at_{k or 'N'}"] = de_metrics.overlap_at(*tables, k)
        found[f"precision_at_{k or 'N'}"] = de_metrics.precision_at(*tables, k)
    for name in ("de_spearman_lfc_sig", "de_direction_match", "de_sig_genes_recall", "roc_auc", "pr_auc"):
        found[name] = getattr(de_metrics, name)(*tables)
    found["de_spearman_sig"] = np.full(n, de_metrics.de_spearman_sig(*tables))
    counts = de_metrics.de_nsig_counts(*tables)
    found |= {"de_nsig_counts_real": counts[0].astype(float), "de_nsig_counts_pred": counts[1].astype(float)}
    return found


@dataclass(frozen=True)
class VccParts:
    """The three numbers of the Virtual Cell Challenge, each a mean over perturbations.

    des (differential expression score, 0..1, 1 best), pds (perturbation discrimination score, 1/n..1, 1 best), mae
    (mean absolute error of log1p mean profiles, 0 best).
    """

    des: float
    pds: float
    mae: float


def vcc_parts(real: Screen, predicted: Screen) -> VccParts:
    """DES, PDS and MAE of a prediction: means over perturbations of overlap_at_N, discrimination_score_l1 and mae."""
    tables = differential(real), differential(predicted)
    return VccParts(
        float(np.mean(de_metrics.overlap_at(*tables))),
        float(np.mean(screen_metrics.discrimination_score(real, predicted))),
        float(np.mean(screen_metrics.mae(real, predicted))),
    )


def vcc_score(predicted: VccParts, baseline: VccParts) -> float:
    """The overall score of the Virtual Cell Challenge 2025: the mean of the three parts, each scaled by a baseline.

    (DES - DES_0) / (1 - DES_0), (PDS - PDS_0) / (1 - PDS_0) and (MAE_0 - MAE) / MAE_0, each at least 0, averaged; a
    part that is undefined counts as 0. 1 is perfect, 0 no better than the baseline in anything; the leaderboard shows
    100 times this. The Challenge's baseline predicts the mean profile of all training perturbations for every cell.

    Below the baseline a part costs nothing more, so a prediction can give up MAE altogether and gain on the other two.
    Look at the parts.

    Source: virtualcellchallenge.org/evaluation (2025); cell-eval 0.8.2, `score_agg_metrics` on the profile "vcc".

    Args:
        predicted: parts of the prediction.
        baseline: parts of the baseline, on the same real cells.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.array(
            [
                np.divide(predicted.des - baseline.des, 1.0 - baseline.des),
                np.divide(predicted.pds - baseline.pds, 1.0 - baseline.pds),
                np.divide(baseline.mae - predicted.mae, baseline.mae),
            ]
        )
    return float(np.mean(np.clip(np.where(np.isnan(scaled), 0.0, scaled), 0.0, None)))
