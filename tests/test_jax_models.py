"""Modules of the JAX twin, against NumPy written from docs/math.md."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pf_core.config import MU_FLOOR, OperatorConfig, VAEConfig
from pf_core.initial import Sizes, operator_parameters, select, vae_parameters
from pf_jax import conditions, operators, probe, vae
from pf_jax.layers import Linear

C, G, T, P, M, N, D, H, K = 7, 11, 3, 5, 2, 13, 4, 17, 6
SIZES = Sizes(n_genes=G, n_tissues=T, n_perturbations=5, n_batches=2, n_covariates=1)


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def shaken(params, seed=0):
    """Off the initial values, where the identity and the zeros hide faults."""
    rng = np.random.default_rng(seed)
    return {name: value + 0.3 * rng.normal(size=value.shape) for name, value in params.items()}


def vae_of(**options):
    config = VAEConfig(n_hidden=H, n_latent=D, **options)
    return config, select(shaken(vae_parameters(config, SIZES, 0)), "vae")


def family_params():
    config = OperatorConfig(n_embedding=3, n_tissue_embedding=2, n_theta=8, n_bases=K, n_hidden=9)
    return shaken(operator_parameters(config, D, SIZES, 0))


def dense(params, name, x):
    return x @ params[f"{name}.weight"] + params[f"{name}.bias"]


def onehot(tissue):
    return np.eye(T)[tissue]


@pytest.mark.parametrize("kind", ["log1p", "counts"])
def test_encoder_is_the_written_network(kind):
    config, params = vae_of(input=kind)
    rng = np.random.default_rng(1)
    x, tissue = rng.poisson(2.0, (C, G)), rng.integers(0, T, C)
    h = np.maximum(dense(params, "encoder.hidden", np.log1p(x) if kind == "log1p" else x), 0)
    h = np.concatenate([h, onehot(tissue)], axis=1)
    mean, logvar = vae.NBVAE(config, params).encode(jnp.asarray(x), jnp.asarray(tissue))
    np.testing.assert_allclose(mean, dense(params, "encoder.mean", h), rtol=1e-12)
    np.testing.assert_allclose(logvar, dense(params, "encoder.logvar", h), rtol=1e-12)


@pytest.mark.parametrize("scale", ["library", "softplus"])
def test_decoder_is_the_written_network(scale):
    config, params = vae_of(scale=scale)
    rng = np.random.default_rng(2)
    z, tissue, library = rng.normal(size=(C, D)), rng.integers(0, T, C), rng.random(C) * 900 + 1
    h = np.maximum(dense(params, "decoder.hidden", np.concatenate([z, onehot(tissue)], axis=1)), 0)
    logits = dense(params, "decoder.mean", h)
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wanted = (library[:, None] * share if scale == "library" else np.log1p(np.exp(logits))) + MU_FLOOR
    found = vae.NBVAE(config, params).decode(jnp.asarray(z), jnp.asarray(tissue), jnp.asarray(library))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_softplus_scale_is_finite_with_its_gradient_for_any_logit():
    config, params = vae_of(scale="softplus")
    params["decoder.mean.bias"] = np.linspace(-800, 800, G)
    model = vae.NBVAE(config, params)
    z, tissue, library = jnp.ones((1, D)), jnp.zeros(1, int), jnp.ones(1)
    value, gradient = jax.value_and_grad(lambda z: model.decode(z, tissue, library).sum())(z)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dispersion", ["gene", "gene-tissue"])
def test_dispersion_is_per_gene_or_per_gene_and_tissue(dispersion):
    config, params = vae_of(dispersion=dispersion)
    tissue = np.array([2, 0, 1, 1, 2, 0, 2])
    r = np.exp(np.clip(params["decoder.log_r"], np.log(1e-4), np.log(1e4)))
    found = vae.NBVAE(config, params).dispersion(jnp.asarray(tissue))
    np.testing.assert_allclose(found, r if dispersion == "gene" else r[tissue], rtol=1e-12)


def test_vae_samples_with_the_noise_it_is_given():
    config, params = vae_of()
    rng = np.random.default_rng(3)
    x, tissue, eps = rng.poisson(2.0, (C, G)), rng.integers(0, T, C), rng.normal(size=(C, D))
    model = vae.NBVAE(config, params)
    library = jnp.asarray(x.sum(1) + 1.0)
    mu, r, z_mu, z_logvar = model(jnp.asarray(x), jnp.asarray(tissue), library, jnp.asarray(eps))
    z = np.asarray(z_mu) + np.exp(np.clip(np.asarray(z_logvar), -10, 10) / 2) * eps
    np.testing.assert_allclose(mu, model.decode(jnp.asarray(z), jnp.asarray(tissue), library), rtol=1e-12)
    np.testing.assert_array_equal(r, model.dispersion(jnp.asarray(tissue)))


def test_attribute_paths_are_the_canonical_names():
    config, params = vae_of()
    model = vae.NBVAE(config, params)
    found = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert found.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(found[name][...], value)
    params = family_params()
    for module, prefix in (
        (conditions.ConditionEncoder(select(params, "conditions")), "conditions"),
        (operators.OperatorFamily(select(params, "operators")), "operators"),
    ):
        names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))}
        assert names == select(params, prefix).keys()


def test_modules_are_trained_by_users_through_nnx():
    config, params = vae_of()
    model = vae.NBVAE(config, params)
    graph, trained, rest = nnx.split(model, nnx.Param, ...)
    loss = lambda trained: (
        nnx.merge(graph, trained, rest).decode(jnp.ones((1, D)), jnp.zeros(1, int), jnp.ones(1)).sum()
    )
    gradient = jax.grad(loss)(trained)
    assert np.abs(nnx.to_pure_dict(gradient)["decoder"]["hidden"]["weight"]).max() > 0


def test_condition_encoder_sums_members_times_doses():
    params = select(family_params(), "conditions")
    rng = np.random.default_rng(4)
    members, doses = rng.integers(0, 5, (P, M)), rng.random((P, M))
    tissue, batch, covariates = rng.integers(0, T, P), rng.random((P, 2)), rng.normal(size=(P, 1))
    embedding = (doses[..., None] * params["perturbation.table"][members]).sum(1)
    x = np.concatenate([embedding, params["tissue.table"][tissue], batch, covariates], axis=1)
    found = conditions.ConditionEncoder(params)(*map(jnp.asarray, (members, doses, tissue, batch, covariates)))
    np.testing.assert_allclose(found, dense(params, "theta", x), rtol=1e-12)


def test_control_is_the_zero_vector_and_padding_changes_nothing():
    params = select(family_params(), "conditions")
    encoder = conditions.ConditionEncoder(params)
    rest = jnp.zeros(2, int), jnp.zeros((2, 2)), jnp.zeros((2, 1))
    control = encoder(jnp.asarray([[0, 0], [3, 4]]), jnp.zeros((2, 2)), *rest)
    np.testing.assert_array_equal(control[0], control[1])
    alone = encoder(jnp.asarray([[3], [4]]), jnp.ones((2, 1)), *rest)
    padded = encoder(jnp.asarray([[3, 0], [4, 1]]), jnp.asarray([[1.0, 0.0], [1.0, 0.0]]), *rest)
    np.testing.assert_allclose(alone, padded, rtol=1e-13)


def test_fixed_features_replace_the_table_and_are_not_trained():
    params = select(family_params(), "conditions")
    del params["perturbation.table"]
    rng = np.random.default_rng(5)
    params |= {"features": rng.normal(size=(5, 7)), "perturbation.map": rng.normal(size=(7, 3))}
    encoder = conditions.ConditionEncoder(params)
    table = params["features"] @ params["perturbation.map"]
    members, doses = rng.integers(0, 5, (P, M)), rng.random((P, M))
    rest = np.zeros(P, int), np.zeros((P, 2)), np.zeros((P, 1))
    x = np.concatenate([(doses[..., None] * table[members]).sum(1), params["tissue.table"][rest[0]], *rest[1:]], axis=1)
    found = encoder(*map(jnp.asarray, (members, doses, *rest)))
    np.testing.assert_allclose(found, dense(params, "theta", x), rtol=1e-12)
    trained = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(encoder, nnx.Param))}
    assert "features" not in trained
    assert "perturbation.map" in trained


def operators_by_hand(params, theta, tissue):
    def network(name):
        return dense(params, f"{name}.out", np.maximum(dense(params, f"{name}.hidden", theta), 0))

    alpha, beta = network("alpha"), network("beta")
    A = params["A0"][tissue] + sum(alpha[:, k, None, None] * params["B"][k] for k in range(K))
    b = params["b0"][tissue] + sum(beta[:, k, None] * params["u"][k] for k in range(K))
    return alpha, beta, A, b


def test_operator_family_is_the_written_sum_of_bases():
    params = select(family_params(), "operators")
    rng = np.random.default_rng(6)
    theta, tissue, z = rng.normal(size=(P, 8)), rng.integers(0, T, P), rng.normal(size=(P, N, D))
    alpha, beta, A, b = operators_by_hand(params, theta, tissue)
    family = operators.OperatorFamily(params)
    found = family.operator(jnp.asarray(theta), jnp.asarray(tissue))
    for one, wanted in zip(found, (A, b), strict=True):
        np.testing.assert_allclose(one, wanted, rtol=1e-12)
    image = family(jnp.asarray(z), jnp.asarray(theta), jnp.asarray(tissue))
    wanted = [[A[p] @ z[p, i] + b[p] for i in range(N)] for p in range(P)]
    np.testing.assert_allclose(image, wanted, rtol=1e-11)
    profile = operators.response_profile(family, jnp.asarray(theta))
    np.testing.assert_allclose(profile, np.concatenate([alpha, beta], axis=1), rtol=1e-12)


def test_per_cell_operators_need_no_matrix_per_cell_and_give_the_same():
    params = select(family_params(), "operators")
    rng = np.random.default_rng(7)
    theta, tissue, z = rng.normal(size=(N, 8)), rng.integers(0, T, N), rng.normal(size=(N, D))
    _, _, A, b = operators_by_hand(params, theta, tissue)
    found = operators.OperatorFamily(params).per_cell(*map(jnp.asarray, (z, theta, tissue)))
    np.testing.assert_allclose(found, np.einsum("cij,cj->ci", A, z) + b, rtol=1e-11)


def test_compose_applies_first_to_last():
    rng = np.random.default_rng(8)
    pairs = [(rng.normal(size=(P, D, D)), rng.normal(size=(P, D))) for _ in range(3)]
    z = rng.normal(size=(P, N, D))
    wanted = z
    for A, b in pairs:
        wanted = np.einsum("pij,pnj->pni", A, wanted) + b[:, None]
    A, b = operators.compose([(jnp.asarray(A), jnp.asarray(b)) for A, b in pairs])
    np.testing.assert_allclose(operators.apply_operator(A, b, jnp.asarray(z)), wanted, rtol=1e-11, atol=1e-13)


def test_commutator_norm_is_that_of_affine_maps_written_as_matrices():
    rng = np.random.default_rng(9)
    first, second = ((rng.normal(size=(D, D)), rng.normal(size=D)) for _ in range(2))

    def homogeneous(A, b):
        return np.block([[A, b[:, None]], [np.zeros((1, D)), np.ones((1, 1))]])

    a, b = homogeneous(*first), homogeneous(*second)
    found = operators.commutator_norm(*(tuple(map(jnp.asarray, pair)) for pair in (first, second)))
    assert float(found) == pytest.approx(np.linalg.norm(a @ b - b @ a), rel=1e-12)


def test_commutator_norm_has_gradient_zero_where_the_operators_commute():
    b = jnp.ones(D)
    gradient = jax.grad(lambda A: operators.commutator_norm((A, b), (A, b)))(jnp.eye(D) * 2.0)
    assert (gradient == 0).all()


def test_identity_penalty_is_the_weighted_mean_of_squared_distances():
    rng = np.random.default_rng(10)
    A, weight = rng.normal(size=(P, D, D)), np.array([1.0, 0.0, 2.0, 0.5, 0.0])
    squared = ((A - np.eye(D)) ** 2).sum((1, 2))
    assert float(operators.identity_penalty(jnp.asarray(A))) == pytest.approx(squared.mean(), rel=1e-13)
    found = operators.identity_penalty(jnp.asarray(A), jnp.asarray(weight))
    assert float(found) == pytest.approx(np.average(squared, weights=weight), rel=1e-13)


def test_record_notes_values_only_while_recording_and_never_under_jit():
    layer = Linear({"weight": np.eye(2), "bias": np.zeros(2)})
    assert probe.record("nobody listens", 3) == 3
    with probe.recording() as found:
        probe.record("a", layer(jnp.ones(2)))
        jax.jit(lambda x: probe.record("traced", layer(x)))(jnp.ones(2))
        probe.record("b", 1.0)
    assert list(found) == ["a", "b"]


def test_modules_name_what_does_not_fit():
    config, params = vae_of()
    model = vae.NBVAE(config, params)
    with pytest.raises(ValueError, match="model expects"):
        model.encode(jnp.ones((C, G - 1)), jnp.zeros(C, int))
    with pytest.raises(ValueError, match="model expects"):
        model.decode(jnp.ones((C, D + 1)), jnp.zeros(C, int), jnp.ones(C))
    encoder = conditions.ConditionEncoder(select(family_params(), "conditions"))
    with pytest.raises(ValueError, match=r"theta\.weight expects"):
        encoder(jnp.ones((P, M), int), jnp.ones((P, M)), jnp.zeros(P, int), jnp.ones((P, 3)), jnp.ones((P, 1)))
    with pytest.raises(ValueError, match="at least one"):
        operators.compose([])
