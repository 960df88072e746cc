"""Metrics of screens and of tables against SciPy, scikit-learn and loops; cell-eval itself is in test_eval_peers.py."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import spatial, stats
from sklearn.metrics import average_precision_score, roc_auc_score

from pf_core import de_metrics, screen_metrics, vcc
from pf_core.differential import DETable
from pf_core.edistance import edistance
from pf_core.noise import generator
from pf_core.screens import Screen, check_pair

GENES = [f"g{i}" for i in range(19)]
LABELS = ["control", "g11", "g2", "g2+g5", "x"]


def _screen(side):
    rng = generator(41, f"test_screen_metrics.{side}")
    labels = np.repeat(LABELS, (13, 7, 5, 11, 3))
    cells = np.maximum(
        rng.standard_normal((39, 19))
        + generator(41, "shift").standard_normal((5, 19)).repeat((13, 7, 5, 11, 3), axis=0),
        0,
    )
    cells[2] = 0
    return Screen(cells, labels, GENES, control="control"), cells, labels


def _pair():
    (real, x, labels), (predicted, y, _) = _screen("real"), _screen("predicted")
    means = [{name: cells[labels == name].mean(0) for name in LABELS} for cells in (x, y)]
    return real, predicted, means


def test_metrics_of_mean_profiles_equal_their_definitions():
    real, predicted, (x, y) = _pair()
    for row, name in enumerate(real.perturbations):
        error = y[name] - x[name]
        change = (x[name] - x["control"], y[name] - y["control"])
        difference = change[1] - change[0]
        assert screen_metrics.mse(real, predicted)[row] == pytest.approx(np.mean(error**2), rel=1e-12)
        assert screen_metrics.mae(real, predicted)[row] == pytest.approx(np.mean(np.abs(error)), rel=1e-12)
        assert screen_metrics.mse_delta(real, predicted)[row] == pytest.approx(np.mean(difference**2), rel=1e-12)
        assert screen_metrics.mae_delta(real, predicted)[row] == pytest.approx(np.mean(np.abs(difference)), rel=1e-12)
        wanted = stats.pearsonr(*change).statistic
        assert screen_metrics.pearson_delta(real, predicted)[row] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("metric", "scipys"), [("l1", "cityblock"), ("l2", "euclidean"), ("cosine", "cosine")])
@pytest.mark.parametrize("exclude", [True, False])
def test_discrimination_counts_the_nearer_changes_without_the_target_gene(metric, scipys, exclude):
    real, predicted, (x, y) = _pair()
    found = screen_metrics.discrimination_score(real, predicted, metric=metric, exclude_target=exclude)
    for row, name in enumerate(real.perturbations):
        kept = [i for i, gene in enumerate(GENES) if not exclude or gene != name]
        change = (y[name] - y["control"])[kept]
        distances = [
            spatial.distance.cdist([(x[other] - x["control"])[kept]], [change], scipys)[0, 0]
            for other in real.perturbations
        ]
        assert found[row] == 1 - sum(d < distances[row] for d in distances) / 4


def test_the_target_gene_decides_nothing_in_discrimination():
    real, predicted, _ = _pair()
    cells = predicted.cells.toarray()
    cells[predicted.labels == "g2", GENES.index("g2")] = 14
    far = Screen(cells, predicted.labels, GENES, control="control")
    for metric in ("l1", "l2", "cosine"):
        found = screen_metrics.discrimination_score(real, far, metric=metric)
        np.testing.assert_array_equal(found, screen_metrics.discrimination_score(real, predicted, metric=metric))


def test_the_truth_discriminates_perfectly_and_no_change_by_the_alphabet():
    real, _, _ = _pair()
    np.testing.assert_array_equal(screen_metrics.discrimination_score(real, real), 1.0)
    still = Screen(np.ones((39, 19)), real.labels, GENES, control="control")
    found = screen_metrics.discrimination_score(real, still, metric="cosine")
    np.testing.assert_array_equal(found, [1, 0.75, 0.5, 0.25])
    assert np.isnan(screen_metrics.pearson_delta(real, still)).all()


def test_pearson_edistance_equals_scipys_over_edistances():
    real, predicted, _ = _pair()
    energies = [
        [edistance(s.of(n).toarray(), s.of("control").toarray(), kind="cell-eval") for n in s.perturbations]
        for s in (real, predicted)
    ]
    wanted = stats.pearsonr(*energies).statistic
    assert screen_metrics.pearson_edistance(real, predicted) == pytest.approx(wanted, rel=1e-10)


def test_screens_that_do_not_match_are_refused():
    real, predicted, _ = _pair()
    with pytest.raises(ValueError, match="different genes"):
        check_pair(real, Screen(predicted.cells, predicted.labels, GENES[::-1], control="control"))
    with pytest.raises(ValueError, match="only one of real and predicted has 'x'"):
        check_pair(real, predicted.take(np.flatnonzero(predicted.labels != "x")))
    with pytest.raises(ValueError, match="control 'control' and predicted 'x'"):
        check_pair(real, Screen(predicted.cells, predicted.labels, GENES, control="x"))
    with pytest.raises(ValueError, match="'l1', 'l2' or 'cosine'"):
        screen_metrics.discrimination_score(real, real, metric="l3")  # pyright: ignore[reportArgumentType]


def _table(side, n=5, genes=61):
    """Changes with ties; perturbation 0 has no significant gene, 1 a single one, 4 all of them."""
    rng = generator(41, f"test_screen_metrics.table.{side}")
    change = np.round(rng.standard_normal((n, genes)) + generator(41, "effect").standard_normal((n, genes)), 1)
    change[2, :2] = np.inf, -np.inf
    fdr = rng.choice([1e-12, 1e-4, 0.01, 0.04, 0.2, 0.7, 1.0], (n, genes))
    if side == "real":
        fdr[0], fdr[4] = 0.5, 0.001
        fdr[1] = np.where(np.arange(genes) == 7, 0.01, 0.9)
    names = tuple(f"p{i}" for i in range(n))
    empty = np.zeros((n, genes))
    return DETable(names, tuple(f"g{i}" for i in range(genes)), empty, empty[0], change, empty, fdr, fdr)


def _top(table, row, k):
    """The k strongest significant genes, one at a time."""
    left, found = [g for g in range(61) if table.fdr[row, g] < 0.05], []
    while left and len(found) < k:
        best = max(left, key=lambda g: (abs(table.log2_fold_change[row, g]), -g))
        left.remove(best)
        found.append(best)
    return set(found)


@pytest.mark.parametrize("k", [None, 1, 3, 11, 500])
def test_overlap_and_precision_equal_a_naive_count(k):
    real, predicted = _table("real"), _table("predicted")
    for row in range(5):
        for found, side in ((de_metrics.overlap_at, real), (de_metrics.precision_at, predicted)):
            size = len(_top(side, row, 999))
            n = size if k is None else min(k, size)
            wanted = len(_top(real, row, n) & _top(predicted, row, n)) / n if n else 0.0
            assert found(real, predicted, k)[row] == wanted


def test_metrics_of_significant_genes_equal_scipys_and_naive_counts():
    real, predicted = _table("real"), _table("predicted")
    rank, direction = (f(real, predicted) for f in (de_metrics.de_spearman_lfc_sig, de_metrics.de_direction_match))
    recall = de_metrics.de_sig_genes_recall(real, predicted)
    assert np.isnan(rank[:2]).all()
    assert np.isnan([direction[0], recall[0]]).all()
    for row in range(1, 5):
        genes = sorted(_top(real, row, 999))
        a, b = real.log2_fold_change[row, genes], predicted.log2_fold_change[row, genes]
        right = [(p > 0, p < 0) == (q > 0, q < 0) for p, q in zip(a.tolist(), b.tolist(), strict=True)]
        assert direction[row] == sum(right) / len(right)
        assert recall[row] == np.mean([predicted.fdr[row, g] < 0.05 for g in genes])
        if row > 1:
            assert rank[row] == pytest.approx(stats.spearmanr(a, b).statistic, rel=1e-12)


def test_areas_equal_scikit_learns_and_are_undefined_without_both_classes():
    real, predicted = _table("real"), _table("predicted")
    for ours, theirs in ((de_metrics.roc_auc, roc_auc_score), (de_metrics.pr_auc, average_precision_score)):
        found = ours(real, predicted)
        assert np.isnan(found[[0, 4]]).all()
        for row in range(1, 4):
            score = -np.log10(np.clip(predicted.fdr[row], 1e-10, 1))
            assert found[row] == pytest.approx(theirs(real.fdr[row] < 0.05, score), rel=1e-12)


def test_a_screen_without_significant_genes_has_rank_correlation_one_and_a_single_one_none():
    real, predicted = _table("real"), _table("predicted")
    counts = [(t.fdr < 0.05).sum(1)[1:] for t in (real, predicted)]
    wanted = stats.spearmanr(*counts).statistic
    assert de_metrics.de_spearman_sig(real, predicted) == pytest.approx(wanted, rel=1e-12)
    assert de_metrics.de_spearman_sig(replace(real, fdr=np.ones((5, 61))), predicted) == 1.0
    alone = replace(real, fdr=np.where(np.arange(5)[:, None] == 3, real.fdr, 1.0))
    assert np.isnan(de_metrics.de_spearman_sig(alone, predicted))


def test_tables_that_do_not_match_are_refused():
    real = _table("real")
    with pytest.raises(ValueError, match="one list"):
        de_metrics.roc_auc(real, replace(real, genes=real.genes[::-1]))
    with pytest.raises(ValueError, match="k=0"):
        de_metrics.overlap_at(real, real, 0)


def test_the_challenges_score_is_the_mean_of_three_scaled_parts():
    baseline = vcc.VccParts(des=0.1, pds=0.5, mae=0.04)
    assert vcc.vcc_score(baseline, baseline) == 0
    assert vcc.vcc_score(vcc.VccParts(1, 1, 0), baseline) == pytest.approx(1)
    # (0.2 - 0.1)/0.9, (0.7 - 0.5)/0.5, (0.04 - 0.03)/0.04
    assert vcc.vcc_score(vcc.VccParts(0.2, 0.7, 0.03), baseline) == pytest.approx((1 / 9 + 0.4 + 0.25) / 3)
    # What is worse than the baseline costs nothing, and what is undefined counts as nothing.
    assert vcc.vcc_score(vcc.VccParts(0.0, 0.7, 9.0), baseline) == pytest.approx(0.4 / 3)
    assert vcc.vcc_score(vcc.VccParts(0.2, float("nan"), 0.04), baseline) == pytest.approx(1 / 27)


def test_the_parts_of_the_challenge_are_means_of_the_table():
    real, predicted, _ = _pair()
    table, parts = vcc.cell_eval_table(real, predicted), vcc.vcc_parts(real, predicted)
    assert parts.des == table["overlap_at_N"].mean()
    assert parts.pds == table["discrimination_score_l1"].mean()
    assert parts.mae == table["mae"].mean()
