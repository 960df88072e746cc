"""LOY calls, labels and the virtual correction on simulated donors, whose truth is known."""

import json

import anndata
import numpy as np
import pytest
from scipy import sparse, stats

from pf_core import cli, data
from pf_core.config import Config, DataConfig, OperatorConfig, StageConfig, VAEConfig
from pf_core.errors import ConfigError, DataError, PredictionError
from pf_core.loy import LOY, NO_Y, UNDECIDED, XY, _evidence, loy_score
from pf_core.loy_cells import invert, label_loy, virtual_correction
from pf_core.model import Model
from pf_core.operator import Operator
from pf_core.simulate import simulate
from pf_core.simulate_loy import SIMULATED_Y, simulate_loy
from pf_core.y_genes import AMBIGUOUS_GENES, PAR_GENES, Y_GENES


def called(adata, **options):
    labels = {"cell_type": adata.obs["cell_type"].to_numpy(), "donor": adata.obs["donor"].to_numpy()}
    return loy_score(adata.X, list(adata.var_names), **(labels | options))


@pytest.fixture(scope="module")
def cells():
    return simulate_loy(1)


# --- the score ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("library", "found"), [(1000.0, 0.15), (3000.0, 0.7), (10000.0, 0.95)])
@pytest.mark.parametrize("known", [False, True])
def test_sensitivity_grows_with_depth_and_false_calls_stay_rare(library, found, known):
    adata = simulate_loy(2, library=library)
    truth = adata.obs["true_loy"].to_numpy()
    scores = called(adata, control=(adata.obs["donor"] == "donor1").to_numpy() if known else None)
    lost, kept, sure = truth == LOY, truth == XY, np.isin(scores.call, (XY, LOY))
    assert (scores.call[lost] == LOY).mean() > found
    assert (scores.call[lost & sure] == LOY).mean() > 0.95
    assert (scores.call[kept] == LOY).mean() < 0.005


def test_the_posterior_is_a_probability(cells):
    scores, truth = called(cells), cells.obs["true_loy"].to_numpy() == LOY
    male = np.isfinite(scores.score)
    # donor1 has no LOY, and its prior is kept at 2%: it is left out of a comparison of shares.
    male &= (cells.obs["donor"] != "donor1").to_numpy()
    posterior, lost = scores.posterior[male], truth[male]
    assert posterior.mean() == pytest.approx(lost.mean(), abs=0.01)
    for low, high in ((0.0, 0.05), (0.05, 0.5), (0.5, 0.95), (0.95, 1.01)):
        rows = (posterior >= low) & (posterior < high)
        error = 3 * np.sqrt(0.25 / max(rows.sum(), 1))
        assert lost[rows].mean() == pytest.approx(posterior[rows].mean(), abs=max(error, 0.02))


def test_shallow_cells_are_undecided_with_the_reason():
    scores = called(simulate_loy(3, library=150.0))
    male = scores.call != NO_Y
    assert (scores.call[male] == UNDECIDED).mean() > 0.99
    assert set(scores.reason[male]) <= {"too few counts to tell", ""}


def test_depth_does_not_tell_called_loy_cells_from_called_xy_cells(cells):
    scores = called(cells)
    depth = np.asarray(cells.X.sum(1)).ravel()
    kinds = cells.obs["cell_type"].to_numpy()
    donors = (cells.obs["donor"] != "donor1").to_numpy()
    for kind in sorted(set(kinds)):
        a, b = (depth[(scores.call == call) & (kinds == kind) & donors] for call in (LOY, XY))
        assert stats.mannwhitneyu(a, b).pvalue > 0.01, kind
        assert np.median(a) / np.median(b) == pytest.approx(1.0, abs=0.12)


def test_known_xy_controls_give_their_share_of_y_counts(cells):
    known = (cells.obs["donor"] == "donor1").to_numpy()
    scores = called(cells, control=known)
    y = np.asarray(cells[:, list(scores.genes)].X.sum(1)).ravel()
    rest = np.asarray(cells[:, [g for g in cells.var_names if g not in SIMULATED_Y]].X.sum(1)).ravel()
    for kind in ("type1", "type2", "type3"):
        rows = known & (cells.obs["cell_type"] == kind).to_numpy()
        assert scores.types[kind]["share"] == pytest.approx(y[rows].sum() / rest[rows].sum(), rel=1e-6)
    assert scores.donors["donor1"]["loy_share"] < 0.01  # false calls where there is no LOY


def test_the_evidence_without_spread_is_the_poisson_ratio_in_closed_form():
    y, mu, ambient = np.array([0.0, 1.0, 5.0]), np.array([3.0, 3.0, 8.0]), 0.03
    np.testing.assert_allclose(_evidence(y, mu, 1e6, ambient), (1 - ambient) * mu + y * np.log(ambient), rtol=1e-4)


def test_without_loy_the_mixture_finds_next_to_none():
    scores = called(simulate_loy(4, share=0.0))
    assert scores.counts()[LOY] <= 4


# --- donors -------------------------------------------------------------------------------------------------------
def test_female_donors_are_flagged_and_measure_the_ambient_share(cells):
    scores = called(cells)
    female = (cells.obs["sex"] == "female").to_numpy()
    assert set(scores.call[female]) == {NO_Y}
    assert set(scores.call[~female]).isdisjoint({NO_Y})
    assert "female donor" in scores.donors["donor5"]["status"]
    assert np.isnan(scores.score[female]).all()
    assert scores.ambient == pytest.approx(0.03, abs=0.01)
    assert "female" in scores.ambient_source


def test_only_female_donors_are_refused(cells):
    with pytest.raises(DataError, match=r"no donor has a Y chromosome to lose.*XIST is expressed, a female donor"):
        called(cells[cells.obs["sex"] == "female"])


def test_a_donor_without_y_and_without_xist_is_not_called_female(cells):
    part = cells[cells.obs["donor"].isin(["donor1", "donor2"])].copy()
    rows = np.flatnonzero(part.obs["donor"] == "donor2")
    dense = part.X.toarray()
    dense[np.ix_(rows, [part.var_names.get_loc(gene) for gene in SIMULATED_Y])] = 0
    part.X = sparse.csr_matrix(dense)
    scores = called(part)
    assert scores.donors["donor2"]["status"] == "no Y and no XIST: complete loss, or another species"
    assert set(scores.call[rows]) == {NO_Y}


def test_cells_of_both_sexes_under_one_donor_are_flagged(cells):
    part = cells.copy()
    part.obs["donor"] = part.obs["donor"].replace({"donor5": "donor4"})
    scores = called(part)
    assert "both sexes" in scores.donors["donor4"]["status"]
    assert scores.donors["donor3"]["status"] == "male"


def test_controls_of_a_female_donor_are_refused(cells):
    with pytest.raises(DataError, match="choose controls among male donors"):
        called(cells, control=(cells.obs["donor"] == "donor5").to_numpy())


# --- genes --------------------------------------------------------------------------------------------------------
def test_the_list_holds_no_pseudoautosomal_or_ambiguous_gene():
    assert not set(Y_GENES) & {*PAR_GENES, *AMBIGUOUS_GENES}
    assert len(set(Y_GENES)) == len(Y_GENES)


@pytest.mark.parametrize("gene", ["CD99", "PCDH11Y"])
def test_a_gene_that_the_x_carries_too_is_refused(cells, gene):
    with pytest.raises(DataError, match=f"{gene} is pseudoautosomal, or as good as equal"):
        called(cells, y_genes=("RPS4Y1", gene))


def test_genes_not_seen_in_xy_cells_and_genes_of_females_are_dropped(cells):
    changed = cells.copy()
    dense = changed.X.toarray()
    dense[:, changed.var_names.get_loc("ZFY")] = np.random.default_rng(0).poisson(0.5, changed.n_obs)
    changed.X = sparse.csr_matrix(dense)
    scores = called(changed)
    assert scores.dropped == {"ZFY": "female cells have it too", "NLGN4Y": "seen in 0.0% of XY cells"}
    assert "RPS4Y1" in scores.genes


def test_cells_in_which_control_genes_are_missing_too_are_not_called(cells):
    scores = called(cells)
    assert not {*scores.control_genes} & {*Y_GENES}
    rows = np.flatnonzero((scores.call == LOY) & (cells.obs["cell_type"] == "type3").to_numpy())[:7]
    changed = cells.copy()
    dense = changed.X.toarray()
    dense[np.ix_(rows, [changed.var_names.get_loc(gene) for gene in scores.control_genes])] = 0
    changed.X = sparse.csr_matrix(dense)
    again = called(changed)
    assert set(again.call[rows]) == {UNDECIDED}
    assert "control genes of similar expression are missing too" in set(again.reason[rows])


def test_unusable_input_is_refused_with_the_remedy(cells):
    names = list(cells.var_names)
    with pytest.raises(DataError, match="raw counts, not normalised"):
        loy_score(cells.X * 0.5, names)
    with pytest.raises(DataError, match="give the symbols of all genes"):
        loy_score(cells.X, [f"x{name}" for name in names])
    with pytest.raises(DataError, match="one name per column"):
        loy_score(cells.X, names[:-1])
    with pytest.raises(DataError, match=r"between 0\.5 and 1"):
        called(cells, level=1.0)
    with pytest.raises(DataError, match="mark some, or leave it"):
        called(cells, control=np.zeros(cells.n_obs, bool))
    with pytest.raises(ConfigError, match=r"share=1\.5"):
        simulate(0, loy=1.5)


# --- labels -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def labelled(cells):
    return label_loy(cells)[0]


def test_labels_are_read_as_a_perturbation_and_undecided_cells_are_left_out(labelled, cells, tmp_path):
    labelled.write_h5ad(tmp_path / "loy.h5ad")
    dataset = data.load(tmp_path / "loy.h5ad", DataConfig(perturbation="loy", control=("XY",)))
    calls = labelled.obs["loy_call"].value_counts()
    assert dict(zip(*np.unique(dataset.label, return_counts=True), strict=True)) == {
        "LOY": calls["LOY"],
        "control": calls["XY"],
    }
    report = json.loads(anndata.read_h5ad(tmp_path / "loy.h5ad").uns["loy"])
    assert report["calls"]["LOY"] == calls["LOY"]
    assert report["par_ratio"] is None
    assert cells.obs.columns.tolist() == ["tissue", "cell_type", "donor", "sex", "age", "true_loy"]


def test_the_model_does_not_see_the_genes_that_made_the_label(labelled, cells):
    assert not set(labelled.var_names) & set(Y_GENES)
    assert "XIST" in labelled.var_names
    kept, _ = label_loy(cells, keep_y=True)
    assert set(SIMULATED_Y) <= set(kept.var_names)


def test_control_genes_of_loy_cells_are_at_full_depth_and_pseudoautosomal_genes_at_half():
    adata = simulate_loy(6, effect=0.0)
    par = [gene for gene in adata.var_names if gene.startswith("gene")][:3]
    adata.var_names = [dict(zip(par, ("CD99", "ASMTL", "DHRSX"), strict=True)).get(g, g) for g in adata.var_names]
    lost = (adata.obs["true_loy"] == LOY).to_numpy()
    dense = adata.X.toarray()
    for gene in ("CD99", "ASMTL", "DHRSX"):  # one of two copies is left
        column = adata.var_names.get_loc(gene)
        dense[lost, column] = np.random.default_rng(1).binomial(dense[lost, column].astype(int), 0.5)
    adata.X = sparse.csr_matrix(dense)
    report = json.loads(label_loy(adata)[0].uns["loy"])
    assert report["control_ratio"] == pytest.approx(1.0, abs=0.05)
    assert report["par_ratio"] == pytest.approx(0.5, abs=0.08)


def test_labelling_says_what_is_missing(cells, labelled):
    with pytest.raises(DataError, match="no donor column 'patient'"):
        label_loy(cells, donor="patient")
    with pytest.raises(DataError, match="has a column 'loy' already"):
        label_loy(labelled)
    with pytest.raises(DataError, match="did you mean 'donor1'"):
        label_loy(cells, xy=["donor=donor_1"])
    with pytest.raises(DataError, match="column=value was wanted"):
        label_loy(cells, xy=["donor1"])
    with pytest.raises(DataError, match="no layer 'raw'"):
        label_loy(cells, layer="raw")


def test_the_command_labels_a_simulated_file(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["pf", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    source, out = tmp_path / "cells.h5ad", tmp_path / "loy.h5ad"
    assert run("simulate", source, "--loy", "0.3", "--genes", "40") == 0
    assert "5 donors" in capsys.readouterr().out
    assert run("loy", source, "--out", out, "--xy", "donor=donor1") == 0
    assert "donor5: no Y: XIST is expressed, a female donor" in capsys.readouterr().out
    truth = anndata.read_h5ad(out).obs
    assert (truth["true_loy"][truth["loy"] == "LOY"] == "LOY").mean() > 0.98
    page = (tmp_path / "loy.html").read_text()
    assert "have lost their Y" in page
    assert page.count("<svg") == 3
    assert run("loy", source, "--out", out) == 2
    assert "nothing was written" in capsys.readouterr().err


# --- virtual correction -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model(labelled, tmp_path_factory):
    steps = {"steps_per_call": 50, "learning_rate": 3e-3}
    config = Config(
        data=DataConfig(genes=0, perturbation="loy", control=("XY",), holdout=("donor=donor4",)),
        vae=VAEConfig(n_hidden=64, n_latent=12, kl_warmup=50),
        operator=OperatorConfig(cells_per_condition=48),
        stage_vae=StageConfig(max_steps=600, **steps),
        stage_operator=StageConfig(max_steps=300, **steps),
    )
    out = tmp_path_factory.mktemp("loy") / "run"
    return Model.train(labelled, out=out, backend="torch", config=config)


@pytest.mark.slow
def test_loy_cells_of_a_donor_that_was_held_out_are_moved_near_real_xy_cells(model, labelled):
    found = virtual_correction(model, labelled[labelled.obs["donor"] == "donor4"], labelled)
    assert found.mean("after_counts") < 0.35 * found.mean("before_counts")
    assert found.mean("after") < 0.35 * found.mean("before")
    assert sum(one.after_counts < one.before_counts for one in found.contexts) >= 5
    assert found.condition_number < 3
    assert found.cells.n_obs == sum(one.n_loy for one in found.contexts)
    assert (found.cells.X.data == np.rint(found.cells.X.data)).all()


def test_cells_without_a_loy_effect_are_not_brought_nearer(model, labelled):
    xy = labelled[labelled.obs["loy"] == "XY"].copy()
    half = np.arange(xy.n_obs) % 2 == 0
    xy.obs["loy"] = np.where(half, "LOY", "XY")
    found = virtual_correction(model, xy)
    assert abs(found.mean("before_counts")) < 0.1
    assert found.mean("after_counts") > 5 * abs(found.mean("before_counts"))


def test_the_inverse_undoes_the_operator_and_an_ill_conditioned_one_is_refused():
    rng = np.random.default_rng(2)
    good = Operator("LOY", np.eye(5) + 0.1 * rng.normal(size=(5, 5)), rng.normal(size=5), np.ones(2), np.zeros(2))
    z = rng.normal(size=(11, 5))
    np.testing.assert_allclose(invert(good)(good(z)), z, atol=1e-12)
    bad = Operator("LOY", np.diag([1.0, 1.0, 0.01]), np.zeros(3), np.ones(2), np.zeros(2))
    with pytest.raises(PredictionError, match="condition number 100, more than 10"):
        invert(bad)
    singular = Operator("LOY", np.zeros((2, 2)), np.zeros(2), np.ones(2), np.zeros(2))
    with pytest.raises(PredictionError, match="would amplify noise"):
        invert(singular)


def test_a_correction_without_cells_of_both_kinds_is_refused(model, labelled):
    with pytest.raises(PredictionError, match="0 control cells"):
        virtual_correction(model, labelled[labelled.obs["loy"] == "LOY"])
