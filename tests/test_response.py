"""The response analysis against operators and a decoder that are known in closed form."""

import dataclasses
import json

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from pf_core import backends, cli, data
from pf_core.batches import Vocabulary
from pf_core.config import NORMALISED_TOTAL, Config, DataConfig, OperatorConfig, StageConfig, VAEConfig
from pf_core.epistasis import Epistasis, epistasis, measured_pairs
from pf_core.errors import PredictionError
from pf_core.initial import Sizes, operator_parameters, vae_parameters
from pf_core.model import Model
from pf_core.response import Controls, across_tissues, axes, corrections, displacements, similarity
from pf_core.response_sections import _epistasis
from pf_core.simulate import simulate

D, G, K = 4, 7, 3  # latents, genes, bases
FAR = 50.0  # keeps the decoder's units positive, so that its logits are linear in z


def known_model(table, B, u, *, tissues=("t1", "t2")) -> Model:
    """A model whose profile (alpha, beta) of each perturbation is a row of `table`, and whose logits are z @ M."""
    names = ("<unknown>", *table)
    config = Config(
        dtype="float64",
        vae=VAEConfig(n_hidden=D, n_latent=D),
        operator=OperatorConfig(n_embedding=2 * K, n_theta=2 * K, n_bases=K, n_hidden=2 * K, n_tissue_embedding=2),
    )
    sizes = Sizes(n_genes=G, n_tissues=1 + len(tissues), n_perturbations=len(names))
    params = vae_parameters(config.vae, sizes, 0) | operator_parameters(config.operator, D, sizes, 0)
    params["conditions.perturbation.table"] = np.vstack([np.zeros(2 * K), *table.values()])
    params["conditions.theta.weight"] = np.vstack([np.eye(2 * K), np.zeros((2, 2 * K))])
    params["conditions.theta.bias"] = np.zeros(2 * K)
    for name, part in (("alpha", slice(0, K)), ("beta", slice(K, 2 * K))):
        pick = np.eye(2 * K)[:, part]
        params[f"operators.{name}.hidden.weight"] = np.hstack([pick, -pick])  # relu(x) - relu(-x) is x
        params[f"operators.{name}.hidden.bias"] = np.zeros(2 * K)
        params[f"operators.{name}.out.weight"] = np.vstack([np.eye(K), -np.eye(K)])
        params[f"operators.{name}.out.bias"] = np.zeros(K)
    params["operators.B"], params["operators.u"] = np.asarray(B, float), np.asarray(u, float)
    M = np.random.default_rng(5).normal(size=(D, G))
    params["vae.decoder.hidden.weight"] = np.vstack([np.eye(D), np.zeros((1 + len(tissues), D))])
    params["vae.decoder.hidden.bias"] = np.full(D, FAR)
    params["vae.decoder.mean.weight"], params["vae.decoder.mean.bias"] = M, -FAR * M.sum(0)
    units = {"dose_units": (1.0,) * len(names), "covariates": (), "covariate_means": (), "covariate_scales": ()}
    vocabulary = Vocabulary(tuple(f"g{i}" for i in range(G)), names, ("<unknown>", *tissues), (), **units)
    return Model(config, vocabulary, params, backends.load("torch", dtype="float64"), None)  # type: ignore[arg-type]


def row(alpha=(), beta=()):
    out = np.zeros(2 * K)
    out[: len(alpha)], out[K : K + len(beta)] = alpha, beta
    return out


def turn(i, j):
    out = np.zeros((D, D))
    out[j, i], out[i, j] = 1.0, -1.0
    return out


BASES = np.stack([turn(0, 2), turn(1, 3), np.zeros((D, D))])
SHIFTS = np.eye(D)[:K]


@pytest.fixture(scope="module")
def controls():
    rng = np.random.default_rng(3)
    tissue, kind = np.repeat(["t1", "t2"], 26), np.tile(np.repeat(["x", "y"], 13), 2)
    return Controls(0.3 * rng.normal(size=(52, D)), tissue.astype(object), kind.astype(object))


def slopes(model, z, direction):
    """d log1p(1e4 softmax(z M)) along a direction, written out."""
    logits = z @ model.params["vae.decoder.mean.weight"]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    step = direction @ model.params["vae.decoder.mean.weight"]
    mu = NORMALISED_TOTAL * p
    return mu * (step - (p * step).sum(1, keepdims=True)) / (1.0 + mu)


def test_the_genes_of_a_shift_axis_are_the_jacobian_along_u(controls):
    model = known_model({"A": row(beta=[3.0, 0.5]), "B": row(beta=[4.0])}, BASES, SHIFTS)
    axis = next(one for one in axes(model, ["A", "B"], controls) if one.name == "u1")
    rms = np.sqrt((3.0**2 + 4.0**2) / 2)
    expected = slopes(model, controls.z, np.tile(rms * SHIFTS[0], (52, 1)))
    np.testing.assert_allclose(axis.effect, expected.mean(0), rtol=1e-6)
    np.testing.assert_allclose(axis.spread, expected.std(0), rtol=1e-6)
    np.testing.assert_allclose(axis.coefficients, [3.0, 4.0], rtol=1e-9)
    assert axis.top([f"g{i}" for i in range(G)], 1)[0][0] == f"g{np.abs(expected.mean(0)).argmax()}"


def test_the_genes_of_a_linear_axis_follow_the_field_of_each_cell(controls):
    model = known_model({"A": row(alpha=[0.2])}, BASES, SHIFTS)
    axis = next(one for one in axes(model, ["A"], controls) if one.name == "B1")
    expected = slopes(model, controls.z, 0.2 * controls.z @ BASES[0].T).mean(0)
    np.testing.assert_allclose(axis.effect, expected, rtol=1e-6, atol=1e-12)


def test_principal_axes_span_the_mean_displacements_and_no_more(controls):
    table = {"A": row(beta=[1.0, 1.0]), "B": row(beta=[-2.0, -2.0]), "C": row(beta=[0.0, 0.0, 0.5])}
    model = known_model(table, BASES, SHIFTS)
    found = [axis for axis in axes(model, list(table), controls) if axis.kind == "principal"]
    assert len(found) == 2
    np.testing.assert_allclose(found[0].coefficients, [-np.sqrt(2), 2 * np.sqrt(2), 0.0], atol=1e-9)


def test_opposite_conditions_have_cosine_minus_one_and_nothing_has_none(controls):
    table = {"A": row(beta=[1.0]), "B": row(beta=[-2.0]), "C": row(beta=[0.5, 0.05]), "none": row()}
    found = similarity(known_model(table, BASES, SHIFTS), list(table), controls)
    assert found.image[0, 1] == pytest.approx(-1.0)
    assert found.image[0, 2] == pytest.approx(1 / np.sqrt(1.01))
    np.testing.assert_allclose(found.magnitude, [1.0, 2.0, np.sqrt(0.2525), 0.0], atol=1e-12)
    assert np.isnan(found.image[0, 3])
    assert found.clusters[0] == found.clusters[2] != found.clusters[1]
    assert found.clusters[3] == 0
    assert found.order[-1] == 3


def test_displacements_do_not_depend_on_the_bases_but_profiles_do(controls):
    table = {"A": row(beta=[1.0, 1.0]), "B": row(beta=[1.0, -1.0])}
    scaled = {name: value * np.array([1, 1, 1, 0.1, 1, 1]) for name, value in table.items()}
    first = similarity(known_model(table, BASES, SHIFTS), ["A", "B"], controls)
    other = similarity(known_model(scaled, BASES, SHIFTS * [[10.0], [1.0], [1.0]]), ["A", "B"], controls)
    np.testing.assert_allclose(first.image, other.image, atol=1e-9)
    assert first.profile[0, 1] == pytest.approx(0.0, abs=1e-9)
    assert other.profile[0, 1] == pytest.approx((0.01 - 1) / (0.01 + 1))


def test_corrections_rank_by_where_cells_end_and_not_by_direction(controls):
    table = {"A": row(beta=[1.0]), "exact": row(beta=[-1.0]), "three": row(beta=[-3.0]), "near": row(beta=[-0.8, 0.3])}
    found = corrections(known_model(table, BASES, SHIFTS), "A", controls)
    assert [one.label for one in found.candidates] == ["exact", "near", "three"]
    exact, near, three = found.candidates
    assert exact.after == pytest.approx(0.0, abs=1e-9)
    assert exact.restored == pytest.approx(1.0)
    assert exact.cosine == three.cosine == pytest.approx(-1.0)
    assert three.cosine < near.cosine
    assert three.after > found.nothing > near.after
    assert [one.label for one in found.helping] == ["exact", "near"]
    assert exact.together == pytest.approx(0.0, abs=1e-9)


def test_what_the_control_operator_does_is_no_effect_of_a_condition(controls):
    table = {"A": row(beta=[1.0]), "exact": row(beta=[-1.0])}
    model = known_model(table, BASES, SHIFTS)
    before = displacements(model, ["A"], controls)
    model.params["operators.b0"] = np.full((3, D), 0.4)
    np.testing.assert_allclose(displacements(model, ["A"], controls), before, atol=1e-12)
    assert corrections(model, "A", controls).candidates[0].restored == pytest.approx(1.0)


def test_the_commutator_is_that_of_the_known_operators_and_zero_for_shifts(controls):
    table = {"A": row(alpha=[0.3]), "B": row(beta=[1.0]), "C": row(beta=[0.0, 1.0])}
    model = known_model(table, BASES, SHIFTS)
    turning, shifting = epistasis(model, [("A", "B"), ("B", "C")], controls)
    # K_A K_B z - K_B K_A z = 0.3 B_1 u_1 for every cell, and |B_1 u_1| = 1.
    assert turning.commutator == pytest.approx(0.3)
    moved = 0.3 * np.sqrt((controls.z[:, [0, 2]] ** 2).sum(1).mean())
    assert turning.relative == pytest.approx(0.3 / (moved + 1.0))
    assert (shifting.commutator, shifting.relative) == pytest.approx((0.0, 0.0), abs=1e-12)
    assert (turning.predicted, shifting.predicted) == pytest.approx((0.0, 0.0), abs=1e-9)
    assert not turning.measured
    assert np.isnan(turning.observed)


def pair_cells(interaction: float) -> anndata.AnnData:
    """A doubles gene 1, B doubles gene 2, the pair does both and changes gene 3 by a factor."""
    rng, n = np.random.default_rng(11), 400
    parts, labels = [], []
    for label in ("control", "A", "B", "A+B"):
        mean = np.array([5000.0, 40, 40, 40, 40, 40, 40])
        mean[1] *= 2 if "A" in label else 1
        mean[2] *= 2 if "B" in label else 1
        mean[3] *= interaction if label == "A+B" else 1
        mean[0] -= mean[1:].sum() - 240  # equal depth, so that addition is exact
        parts.append(rng.poisson(mean, (n, G)))
        labels += [label] * n
    index = [f"c{i}" for i in range(4 * n)]
    obs = pd.DataFrame({"perturbation": labels, "tissue": "t1", "cell_type": "x"}, index=index)
    var = pd.DataFrame(index=[f"g{i}" for i in range(G)])
    return anndata.AnnData(sparse.csr_matrix(np.vstack(parts).astype(np.float32)), obs=obs, var=var)


def test_the_observed_departure_is_the_interaction_and_noise_for_addition(controls):
    model = known_model({"A": row(beta=[1.0]), "B": row(beta=[0.0, 1.0])}, BASES, SHIFTS)
    found = {}
    for factor in (1.0, 2.0):
        dataset = data.load(pair_cells(factor), DataConfig())
        assert measured_pairs(model, dataset) == [("A", "B")]
        [found[factor]] = epistasis(model, [("A", "B")], controls, dataset)
    assert found[1.0].observed < 0.03
    assert 0.4 < found[1.0].excess < 2.0
    # Three genes are doubled, one by A, one by B, one by the pair alone: 1 / (1 + 1) up to counting noise.
    assert found[2.0].observed == pytest.approx(0.5, abs=0.04)
    assert found[2.0].excess > 20
    assert found[2.0].n_cells == 400


def test_the_page_says_when_a_model_adds():
    pairs = [Epistasis("A", name, 0.1, 0.02, 4e-7, 0.3, 1.2, 100) for name in "BCDEFG"]
    says = [
        _epistasis(found, {}).texts[-1] for found in (pairs, [*pairs, dataclasses.replace(pairs[0], predicted=0.05)])
    ]
    assert ["This model adds" in one for one in says] == [True, False]


def test_contexts_differ_by_where_their_cells_lie_and_tissues_by_their_operators():
    z = np.repeat(np.eye(D)[:2], 17, 0)
    cells = Controls(
        np.vstack([z, z]),
        np.repeat(["t1", "t2"], 34).astype(object),
        np.tile(np.repeat(["x", "y"], 17), 2).astype(object),
    )
    model = known_model({"A": row(alpha=[0.3, 0.3])}, BASES, SHIFTS)
    model.params["operators.b0"] = np.vstack([np.zeros(D), np.ones(D), np.zeros(D)])  # control moves, too
    found = across_tissues(model, "A", cells, n_top=3)
    np.testing.assert_allclose(found.distance, 0.0, atol=1e-12)
    assert found.contexts == (("t1", "x"), ("t1", "y"), ("t2", "x"), ("t2", "y"))
    np.testing.assert_allclose(found.angle[0], [0, 90, 0, 90], atol=1e-4)
    np.testing.assert_allclose(found.magnitude, 0.3)
    assert found.shared[0, 0] == 1.0
    assert found.common([f"g{i}" for i in range(G)])[0][1] >= 2


def test_bad_requests_say_what_was_wanted(controls):
    model = known_model({"A": row(beta=[1.0]), "B": row()}, BASES, SHIFTS)
    with pytest.raises(PredictionError, match="two or more different"):
        similarity(model, ["A"], controls)
    with pytest.raises(PredictionError, match="did you mean 'A'"):
        corrections(model, "a", controls)
    with pytest.raises(PredictionError, match="control changes nothing"):
        corrections(model, "control", controls)
    with pytest.raises(PredictionError, match="given twice"):
        epistasis(model, [("A", "A")], controls)
    alone = known_model({"A": row(beta=[1.0])}, BASES, SHIFTS)
    with pytest.raises(PredictionError, match="no candidate"):
        corrections(alone, "A", controls)


# --- the command --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("response")
    simulate(3, n_genes=29, n_control=23, n_single=13, n_pair=11).write_h5ad(folder / "cells.h5ad")
    steps = StageConfig(max_steps=8, steps_per_call=4)
    config = Config(
        data=DataConfig(genes=0),
        vae=VAEConfig(n_hidden=9, n_latent=4),
        operator=dataclasses.replace(OperatorConfig(), cells_per_condition=11),
        stage_vae=steps,
        stage_operator=steps,
    )
    Model.train(folder / "cells.h5ad", out=folder / "run", backend="torch", config=config)
    return folder / "run"


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["pf", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_writes_one_page_with_its_numbers_and_figures(monkeypatch, trained, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--out", out, "--backend", "torch", "--perturbation", "TF1", "--undo", "TF1"]
    assert run(monkeypatch, "response", trained, *options) == 0
    found = json.loads((out / "response.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert set(found) == {"labels", "missing", "axes", "similarity", "corrections", "epistasis", "tissues", "undone"}
    assert [one["perturbation"] for one in found["corrections"]] == ["TF1"]
    assert len(found["epistasis"]) == 10
    page = (out / "response.html").read_text()
    for text in ("Response axes", "Similar conditions", "undoes this one", "order and addition", "Virtual correction"):
        assert text in page
    assert "<script" not in page
    assert 'src="http' not in page
    for name in ("similarity", "corrections-TF1", "epistasis", "contexts-TF1", "undone"):
        drawing = (out / f"{name}.svg").read_text()
        assert drawing.startswith("<svg")
        assert "var(--" not in drawing
    assert run(monkeypatch, "response", trained, *options) == 2
    assert "is not empty; nothing was written" in capsys.readouterr().err


def test_an_unknown_condition_is_named_with_the_nearest_one(monkeypatch, trained, tmp_path, capsys):
    options = ["--out", tmp_path / "o", "--backend", "torch", "--perturbation", "TF11"]
    assert run(monkeypatch, "response", trained, *options) == 2
    assert "did you mean 'TF1'?" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
