"""Our metrics beside the packages of the field that have them: the extra `eval`. A peer that is absent is reported.

Simulated screens: primes as sizes, ties, cells without counts, a perturbation named after a gene, a combination, and a
perturbation that does nothing.
"""

import importlib.util
from functools import cache

import numpy as np
import pytest
from scipy import sparse

from pf_core import ceiling, de_metrics, differential, metrics, mmd, screen_metrics, vcc
from pf_core.edistance import edistance
from pf_core.noise import generator
from pf_core.screens import Screen

TOLERANCE = 1e-9  # the promise is 1e-6
LABELS = ("control", "g3", "g5", "g3+g5", "drug", "nothing", "weak")
N_GENES = 127


def _peer(name: str, where: str = "it comes with the extra `eval`"):
    package = name.split(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; {where}")
    return importlib.import_module(name)  # an installed peer that does not import is an error, not a skip


def _counts(side: str) -> tuple[sparse.csr_matrix, np.ndarray]:
    rng = generator(23, f"test_eval_peers.{side}")
    profile = generator(23, "test_eval_peers.profile").gamma(0.6, 1.5, N_GENES)
    profile[7] = 0  # a gene that no cell has
    labels = np.repeat(LABELS, (61, 43, 37, 29, 41, 31, 23))
    effects = {name: np.ones(N_GENES) for name in LABELS}
    for i, name in enumerate(("g3", "g5", "g3+g5", "drug")):
        hit = generator(23, "test_eval_peers.hit", i).permutation(N_GENES)[:29]
        effects[name][hit] = generator(23, "test_eval_peers.effect", i).choice([0.0, 0.2, 3.0, 6.0], 29)
    effects["g3"][3] = effects["g5"][5] = 0
    effects["weak"][11] = 2
    effects["drug"][13] = 0 if side == "real" else 1  # an infinite fold change on one side
    if side == "predicted":
        effects = {name: value**0.7 for name, value in effects.items()}
        effects["nothing"][17:23] = 4
    mean = np.array([profile * effects[name] for name in labels]) * rng.gamma(4, 0.25, len(labels))[:, None]
    counts = rng.poisson(mean).astype(np.float64)
    counts[[5, 71]] = 0  # cells without counts
    return sparse.csr_matrix(counts), labels


@cache
def _screens() -> tuple[Screen, Screen]:
    genes = [f"g{i}" for i in range(N_GENES)]
    real, predicted = (
        Screen(metrics.normalise(counts), labels, genes, control="control")
        for counts, labels in map(_counts, ("real", "predicted"))
    )
    return real, predicted


def _anndata(screen: Screen):
    anndata = _peer("anndata")
    pandas = _peer("pandas")
    names = [f"cell{i}" for i in range(len(screen.labels))]
    obs = pandas.DataFrame({"target": pandas.Categorical(screen.labels)}, index=names)
    return anndata.AnnData(screen.cells.copy(), obs=obs, var=pandas.DataFrame(index=list(screen.genes)))


@cache
def _cell_evals(outdir: str) -> dict[str, np.ndarray]:
    cell_eval = _peer("cell_eval")
    real, predicted = _screens()
    evaluator = cell_eval.MetricsEvaluator(
        _anndata(predicted), _anndata(real), control_pert="control", pert_col="target", num_threads=1, outdir=outdir
    )
    rows, _ = evaluator.compute(
        profile="full", skip_metrics=["clustering_agreement"], write_csv=False, break_on_error=True
    )
    frame = rows.to_pandas().set_index("perturbation").loc[list(real.perturbations)]
    return {name: frame[name].to_numpy(dtype=float) for name in frame.columns}


@cache
def _ours() -> dict[str, np.ndarray]:
    return vcc.cell_eval_table(*_screens())


@pytest.fixture(scope="module")
def cell_evals(tmp_path_factory):
    return _cell_evals(str(tmp_path_factory.mktemp("cell-eval")))


def test_cell_eval_and_we_have_metrics_of_the_same_names(cell_evals):
    assert sorted(_ours()) == sorted(cell_evals)


@pytest.mark.parametrize("name", sorted(_ours()))
def test_our_metric_equals_cell_evals(name, cell_evals):
    np.testing.assert_allclose(_ours()[name], cell_evals[name], rtol=0, atol=TOLERANCE)


def test_the_screens_hold_the_cases_that_were_promised():
    real, _ = (differential.differential(screen) for screen in _screens())
    n = dict(zip(real.perturbations, (real.fdr < 0.05).sum(1), strict=True))
    assert n["nothing"] == 0
    assert n["g3"] > 10
    assert np.isinf(real.log2_fold_change).any()
    assert np.isnan(_ours()["roc_auc"]).any()


def test_metrics_from_counts_equal_cell_evals_own_normalisation(tmp_path):
    cell_eval = _peer("cell_eval")
    real, predicted = _screens()
    sides = {}
    for side, screen in (("real", real), ("predicted", predicted)):
        counts, labels = _counts(side)
        data = _anndata(screen)
        data.X = counts.copy()
        total = metrics.median_total(counts)
        sides[side] = data, Screen(metrics.normalise(counts, total=total), labels, screen.genes, control="control")
    evaluator = cell_eval.MetricsEvaluator(
        sides["predicted"][0],
        sides["real"][0],
        control_pert="control",
        pert_col="target",
        num_threads=1,
        outdir=tmp_path,
    )
    rows, _ = evaluator.compute(profile="vcc", write_csv=False, break_on_error=True)
    parts = vcc.vcc_parts(sides["real"][1], sides["predicted"][1])
    wanted = rows["overlap_at_N"].mean(), rows["discrimination_score_l1"].mean(), rows["mae"].mean()
    np.testing.assert_allclose((parts.des, parts.pds, parts.mae), wanted, rtol=0, atol=TOLERANCE)


def test_the_challenges_score_equals_cell_evals():
    _peer("cell_eval")
    polars = _peer("polars")
    score = importlib.import_module("cell_eval._score").score_agg_metrics
    baseline = vcc.VccParts(0.11, 0.53, 0.031)
    for parts in (vcc.VccParts(0.31, 0.71, 0.029), vcc.VccParts(0.31, 0.71, 9.0), vcc.VccParts(0.0, 0.5, 0.029)):
        frames = (
            polars.DataFrame(
                {"statistic": ["mean"], "mae": [p.mae], "discrimination_score_l1": [p.pds], "overlap_at_N": [p.des]}
            )
            for p in (parts, baseline)
        )
        scores = dict(score(*frames).iter_rows())
        assert vcc.vcc_score(parts, baseline) == pytest.approx(scores["avg_score"], abs=1e-12)


@pytest.mark.parametrize(("mean", "epsilon"), [("geometric", 0.0), ("geometric", 1e-9), ("arithmetic", 0.5)])
def test_the_table_of_differential_expression_equals_pdexs(mean, epsilon):
    pdex = _peer("pdex").pdex
    screen = _screens()[0]
    frame = pdex(
        _anndata(screen),
        groupby="target",
        reference="control",
        threads=1,
        is_log1p=True,
        geometric_mean=mean == "geometric",
        epsilon=epsilon,
        as_pandas=True,
    )
    ours = differential.differential(screen, mean=mean, epsilon=epsilon)
    for row, name in enumerate(ours.perturbations):
        theirs = frame[frame["target"] == name].set_index("feature").loc[list(ours.genes)]
        for column, mine in {
            "target_mean": ours.target_mean[row],
            "ref_mean": ours.reference_mean,
            "log2_fold_change": ours.log2_fold_change[row],
            "statistic": ours.statistic[row],
            "p_value": ours.p_value[row],
            "fdr": ours.fdr[row],
        }.items():
            np.testing.assert_allclose(mine, theirs[column].to_numpy(), rtol=TOLERANCE, atol=1e-12, err_msg=column)


def _comparison(real: differential.DETable, predicted: differential.DETable):
    """cell-eval's comparison of two tables."""
    _peer("cell_eval")
    polars = _peer("polars")
    frames = (
        polars.DataFrame(
            {
                "target": np.repeat(table.perturbations, len(table.genes)),
                "feature": np.tile(table.genes, len(table.perturbations)),
                "log2_fold_change": table.log2_fold_change.ravel(),
                "p_value": table.p_value.ravel(),
                "fdr": table.fdr.ravel(),
            }
        )
        for table in (real, predicted)
    )
    return importlib.import_module("cell_eval._types").initialize_de_comparison(*frames)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7, 11])
def test_overlaps_of_few_genes_equal_cell_evals(k):
    # Without epsilon some changes are infinite and tie; cell-eval's order of ties is that of an unstable sort.
    tables = [differential.differential(screen, epsilon=1e-9) for screen in _screens()]
    comparison = _comparison(*tables)
    for metric, ours in (("overlap", de_metrics.overlap_at), ("precision", de_metrics.precision_at)):
        theirs = comparison.compute_overlap(k=k, metric=metric)
        np.testing.assert_array_equal(ours(*tables, k), [theirs[name] for name in tables[0].perturbations])


def _hand_made(side: str, significant: tuple[int, ...]) -> differential.DETable:
    """A table in which perturbation i has significant[i] significant genes; changes tie."""
    rng = generator(23, f"test_eval_peers.hand-made.{side}")
    shape = (len(significant), 29)
    change = np.round(rng.standard_normal(shape), 1)
    fdr = rng.choice([0.2, 0.7, 1.0], shape)
    for row, n in enumerate(significant):
        fdr[row, rng.permutation(29)[:n]] = rng.choice([1e-300, 1e-7, 0.03], n)
    names, genes = ([f"{letter}{i:02}" for i in range(n)] for letter, n in zip("pg", shape, strict=True))
    empty = np.zeros(shape)
    return differential.DETable(tuple(names), tuple(genes), empty, empty[0], change, empty, fdr, fdr)


@pytest.mark.parametrize(
    ("real", "predicted"),
    [
        ((0, 1, 2, 7, 29), (3, 0, 29, 11, 5)),  # none, a single one, all
        ((0, 0, 0), (3, 0, 1)),  # none anywhere
        ((5, 3, 2), (0, 0, 0)),
        ((0, 0, 5), (1, 2, 3)),  # one perturbation only
        ((5, 5, 5), (1, 2, 3)),  # equal numbers
    ],
)
def test_metrics_of_tables_equal_cell_evals_where_there_is_little_to_compare(real, predicted):
    tables = _hand_made("real", real), _hand_made("predicted", predicted)
    comparison, names = _comparison(*tables), tables[0].perturbations
    theirs = importlib.import_module("cell_eval.metrics._de")
    for ours, metric in (
        (de_metrics.de_spearman_lfc_sig, theirs.DESpearmanLFC()),
        (de_metrics.de_direction_match, theirs.DEDirectionMatch()),
        (de_metrics.de_sig_genes_recall, theirs.DESigGenesRecall()),
        (de_metrics.roc_auc, theirs.compute_roc_auc),
        (de_metrics.pr_auc, theirs.compute_pr_auc),
    ):
        found = metric(comparison)
        wanted = [float("nan") if found.get(name) is None else found[name] for name in names]
        np.testing.assert_allclose(ours(*tables), wanted, rtol=0, atol=TOLERANCE, err_msg=ours.__name__)
    wanted = theirs.DESpearmanSignificant()(comparison)
    np.testing.assert_allclose(de_metrics.de_spearman_sig(*tables), wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
def test_discrimination_among_many_perturbations_equals_cell_evals(metric):
    _peer("cell_eval")
    types, internal = (importlib.import_module(f"cell_eval.{name}") for name in ("_types", "metrics._anndata"))
    rng = generator(23, "test_eval_peers.many")
    genes = [f"g{i}" for i in range(31)]
    labels = np.array(["control", *genes, *(f"drug{i}" for i in range(22))]).repeat(2)
    real = rng.gamma(0.5, 1.0, (108, 31)) * (rng.random((108, 31)) < 0.6)
    predicted = np.maximum(real + 0.8 * rng.standard_normal(real.shape), 0)
    predicted[2 * np.arange(1, 32), np.arange(31)] += 9  # what the target gene does would decide, if it counted
    sides = [Screen(cells, labels, genes, control="control") for cells in (real, predicted)]
    pair = types.PerturbationAnndataPair(*map(_anndata, sides), "target", "control")
    theirs = internal.discrimination_score(pair, metric=metric)
    ours = screen_metrics.discrimination_score(*sides, metric=metric)
    np.testing.assert_allclose(ours, [theirs[name] for name in sides[0].perturbations], rtol=0, atol=1e-12)
    assert len(set(ours.tolist())) > 7
    assert not np.array_equal(ours, screen_metrics.discrimination_score(*sides, metric=metric, exclude_target=False))


def test_spearman_brown_equals_cell_evals():
    _peer("cell_eval")
    polars = _peer("polars")
    correct = importlib.import_module("cell_eval._evaluator")._spearman_brown_correct
    for r in (0.73, 0.0, -0.9, 1.0):
        theirs = correct(polars.DataFrame({"pearson_delta": [r]}))["pearson_delta"][0]
        np.testing.assert_allclose(ceiling.spearman_brown(r), theirs, rtol=1e-15)


def _cells():
    rng = generator(23, "test_eval_peers.cells")
    x, y = rng.standard_normal((53, 11)), 1.5 * rng.standard_normal((37, 11)) + 0.3
    y[5] = x[3]
    return x, y


def test_edistance_equals_scperturbs():
    scperturb = _peer("scperturb")
    anndata, pandas = _peer("anndata"), _peer("pandas")
    x, y = _cells()
    data = anndata.AnnData(np.zeros((90, 1)), obs=pandas.DataFrame({"p": ["x"] * 53 + ["y"] * 37}))
    data.obsm["X_pca"] = np.concatenate([x, y])
    wanted = scperturb.edist(data, obs_key="p", n_jobs=1, verbose=False)
    assert edistance(x, y, kind="scperturb") == pytest.approx(wanted.loc["x", "y"], rel=TOLERANCE)


def test_edistance_equals_pertpys():
    pertpy = _peer("pertpy")
    x, y = _cells()
    wanted = pertpy.tools.Distance("edistance", obsm_key="X_pca")(x, y)
    assert edistance(x, y, kind="pertpy") == pytest.approx(wanted, rel=TOLERANCE)


def test_mmd_equals_pertpys():
    pertpy = _peer("pertpy")
    x, y = _cells()
    wanted = pertpy.tools.Distance("mmd", obsm_key="X_pca")(x, y, kernel="rbf", gamma=0.07)
    assert mmd.mmd(x, y, gamma=0.07, estimator="v") == pytest.approx(wanted, rel=TOLERANCE)


def test_edistance_equals_cell_evals():
    _peer("cell_eval")
    types, internal = (importlib.import_module(f"cell_eval.{name}") for name in ("_types", "metrics._anndata"))
    real, predicted = _screens()
    pair = types.PerturbationAnndataPair(_anndata(real), _anndata(predicted), "target", "control")
    energies = [
        [
            edistance(side.of(name).toarray(), side.of("control").toarray(), kind="cell-eval")
            for name in side.perturbations
        ]
        for side in (real, predicted)
    ]
    assert np.corrcoef(energies)[0, 1] == pytest.approx(internal.edistance(pair), rel=TOLERANCE)


def test_edistance_equals_states_training_loss():
    geomloss, torch = _peer("geomloss"), _peer("torch")
    x, y = _cells()
    loss = geomloss.SamplesLoss(loss="energy", blur=0.05)
    wanted = float(loss(torch.tensor(x), torch.tensor(y)))
    assert edistance(x, y, kind="state") == pytest.approx(wanted, rel=TOLERANCE)


def test_edistance_and_mmd_equal_cellflows_to_its_float32():
    cellflow = _peer("cellflow.metrics", "cellflow-tools 0.0.9 needs an environment of its own, with scipy<1.16")
    x, y = (cells.astype(np.float32) for cells in _cells())
    assert edistance(x, y, kind="cellflow") == pytest.approx(float(cellflow.compute_e_distance(x, y)), rel=1e-5)
    ours = np.mean([mmd.mmd(x, y, gamma=g, estimator="v") for g in (2, 1, 0.5, 0.1, 0.01, 0.005)])
    assert ours == pytest.approx(float(cellflow.compute_scalar_mmd(x, y)), abs=1e-6)
