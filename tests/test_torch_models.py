"""The PyTorch twin's VAE, condition encoder and operators against NumPy written from the formulas."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pf_core.config import MU_FLOOR, OperatorConfig, VAEConfig  # noqa: E402
from pf_core.initial import Sizes, operator_parameters, select, vae_parameters  # noqa: E402
from pf_torch.conditions import ConditionEncoder  # noqa: E402
from pf_torch.layers import Linear, softplus  # noqa: E402
from pf_torch.operators import (  # noqa: E402
    OperatorFamily,
    apply_operator,
    commutator_norm,
    compose,
    identity_penalty,
    response_profile,
)
from pf_torch.probe import record, recording  # noqa: E402
from pf_torch.vae import NBVAE  # noqa: E402

SIZES = Sizes(n_genes=13, n_tissues=3, n_perturbations=5, n_batches=2, n_covariates=1)


def vae_case(**settings):
    config = VAEConfig(n_hidden=7, n_latent=5, **settings)
    params = select(vae_parameters(config, SIZES, seed=1), "vae")
    rng = np.random.default_rng(2)
    params["decoder.log_r"] = rng.standard_normal(params["decoder.log_r"].shape)
    x, tissue = rng.integers(0, 31, (11, 13)).astype(float), rng.integers(0, 3, 11)
    return config, params, x, tissue, rng.uniform(50, 500, 11), rng.standard_normal((11, 5))


def tensors(*arrays):
    return [torch.tensor(a) for a in arrays]


def dense(params, name, x):
    return x @ params[f"{name}.weight"] + params[f"{name}.bias"]


@pytest.mark.parametrize("given", ["log1p", "counts"])
@pytest.mark.parametrize("scale", ["library", "softplus"])
@pytest.mark.parametrize("dispersion", ["gene", "gene-tissue"])
def test_vae_computes_its_formulas(given, scale, dispersion):
    config, params, x, tissue, library, eps = vae_case(input=given, scale=scale, dispersion=dispersion)
    mu, r, z_mu, z_logvar = NBVAE(config, params)(*tensors(x, tissue, library, eps))
    onehot = np.eye(3)[tissue]
    h = np.maximum(dense(params, "encoder.hidden", np.log1p(x) if given == "log1p" else x), 0)
    h = np.concatenate([h, onehot], 1)
    want_mu, want_logvar = dense(params, "encoder.mean", h), dense(params, "encoder.logvar", h)
    z = want_mu + np.exp(np.clip(want_logvar, -10, 10) / 2) * eps
    out = dense(params, "decoder.mean", np.maximum(dense(params, "decoder.hidden", np.concatenate([z, onehot], 1)), 0))
    share = np.exp(out) / np.exp(out).sum(1, keepdims=True)
    want = np.logaddexp(0, out) if scale == "softplus" else library[:, None] * share
    log_r = params["decoder.log_r"]
    np.testing.assert_allclose(z_mu.detach(), want_mu, rtol=1e-12)
    np.testing.assert_allclose(z_logvar.detach(), want_logvar, rtol=1e-12)
    np.testing.assert_allclose(mu.detach(), want + MU_FLOOR, rtol=1e-12)
    np.testing.assert_allclose(r.detach(), np.exp(log_r if dispersion == "gene" else log_r[tissue]), rtol=1e-12)


def test_softplus_never_turns_linear():
    x = torch.tensor([-800.0, -30.0, 0.0, 21.0, 30.0, 800.0], dtype=torch.float64, requires_grad=True)
    y = softplus(x)
    np.testing.assert_allclose(y.detach(), np.logaddexp(0, x.detach().numpy()), rtol=1e-15)
    assert y[3] > 21.0
    (grad,) = torch.autograd.grad(y.sum(), x)
    np.testing.assert_allclose(grad, 1 / (1 + np.exp(-x.detach().numpy().clip(-700))), rtol=1e-12, atol=1e-300)


def test_numpy_parameters_are_owned_by_the_module_under_canonical_names():
    config, params, *_ = vae_case()
    model = NBVAE(config, params)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {k: v.shape for k, v in params.items()}
    torch.optim.SGD(model.parameters(), lr=0.1)
    assert not np.shares_memory(model.encoder.hidden.weight.detach().numpy(), params["encoder.hidden.weight"])


def test_graph_connected_parameters_are_used_as_they_are():
    config, params, x, tissue, library, eps = vae_case()
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    model = NBVAE(config, {name: torch.tensor(value) * scale for name, value in params.items()})
    assert not list(model.parameters())
    model(*tensors(x, tissue, library, eps))[0].sum().backward()
    assert scale.grad is not None


def test_a_wrong_number_of_genes_is_named():
    config, params, x, tissue, *_ = vae_case()
    with pytest.raises(ValueError, match=r"counts have shape \(11, 12\) but the model expects \(n_cells, 13\)"):
        NBVAE(config, params).encode(*tensors(x[:, :12], tissue))


def test_linear_weights_are_in_by_out():
    layer = Linear({"weight": np.arange(6.0).reshape(3, 2), "bias": np.array([1.0, -1.0])})
    np.testing.assert_allclose(layer(torch.tensor([[1.0, 0.0, 2.0]]).double()).detach(), [[9.0, 10.0]])


def condition_case(n_features=0):
    sizes = Sizes(**{**SIZES.__dict__, "n_features": n_features})
    params = operator_parameters(OperatorConfig(n_embedding=7, n_theta=6, n_bases=4), 5, sizes, seed=3)
    rng = np.random.default_rng(4)
    params |= {f"operators.{k}": 0.5 * rng.standard_normal(params[f"operators.{k}"].shape) for k in "Bu"}
    params["operators.A0"] += 0.3 * rng.standard_normal((3, 5, 5))
    params["operators.b0"] += rng.standard_normal((3, 5))
    conditions = {
        "perturbations": np.array([[1, 2], [3, 0], [0, 0], [4, 4]]),
        "doses": np.array([[1.0, 0.5], [1.0, 0.0], [0.0, 0.0], [1.0, 2.0]]),
        "tissue": np.array([1, 2, 0, 1]),
        "batch": np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]),
        "covariates": rng.standard_normal((4, 1)),
    }
    if n_features:
        params["conditions.features"] = rng.standard_normal((5, n_features))
    return params, conditions


@pytest.mark.parametrize("n_features", [0, 3])
def test_condition_vector_is_the_affine_map_of_the_summed_embeddings(n_features):
    params, c = condition_case(n_features)
    got = ConditionEncoder(select(params, "conditions"))(*tensors(*c.values())).detach()
    table = params.get("conditions.perturbation.table")
    if n_features:
        table = params["conditions.features"] @ params["conditions.perturbation.map"]
    for p in range(4):
        embedding = sum(dose * table[i] for i, dose in zip(c["perturbations"][p], c["doses"][p], strict=True))
        tissue = params["conditions.tissue.table"][c["tissue"][p]]
        inputs = np.concatenate([embedding, tissue, c["batch"][p], c["covariates"][p]])
        np.testing.assert_allclose(got[p], dense(params, "conditions.theta", inputs), rtol=1e-12)


def test_control_is_the_zero_vector_whatever_its_padding_points_at():
    params, c = condition_case()
    encoder = ConditionEncoder(select(params, "conditions"))
    c["perturbations"][2] = [3, 1]
    other = {**c, "perturbations": np.where(c["doses"] > 0, c["perturbations"], 0)}
    np.testing.assert_array_equal(encoder(*tensors(*c.values())).detach(), encoder(*tensors(*other.values())).detach())


def test_fixed_features_are_not_trained_and_their_map_is():
    params, _ = condition_case(3)
    names = {name for name, _ in ConditionEncoder(select(params, "conditions")).named_parameters()}
    assert names == {"perturbation.map", "tissue.table", "theta.weight", "theta.bias"}


def test_conditions_of_a_wrong_width_are_named():
    params, c = condition_case()
    c["covariates"] = np.zeros((4, 3))
    with pytest.raises(ValueError, match="2 batches and 3 covariates"):
        ConditionEncoder(select(params, "conditions"))(*tensors(*c.values()))


def operator_case():
    params, c = condition_case()
    rng = np.random.default_rng(6)
    theta = rng.standard_normal((4, 6))
    return select(params, "operators"), theta, c["tissue"], rng.standard_normal((4, 7, 5))


def numpy_operator(params, theta, tissue):
    mlp = lambda name: dense(params, f"{name}.out", np.maximum(dense(params, f"{name}.hidden", theta), 0))
    alpha, beta = mlp("alpha"), mlp("beta")
    A = params["A0"][tissue] + sum(alpha[k] * params["B"][k] for k in range(4))
    return A, params["b0"][tissue] + sum(beta[k] * params["u"][k] for k in range(4))


def test_operator_family_computes_its_formulas_for_groups_and_for_cells():
    params, theta, tissue, z = operator_case()
    family = OperatorFamily(params)
    A, b = family.operator(*tensors(theta, tissue))
    image = family(*tensors(z, theta, tissue)).detach()
    cells = [torch.tensor(np.repeat(a, 7, axis=0)) for a in (theta, tissue)]
    per_cell = family.per_cell(torch.tensor(z.reshape(28, 5)), *cells).detach()
    for p in range(4):
        want_A, want_b = numpy_operator(params, theta[p], tissue[p])
        np.testing.assert_allclose(A[p].detach(), want_A, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(b[p].detach(), want_b, rtol=1e-12, atol=1e-14)
        for i in range(7):
            np.testing.assert_allclose(image[p, i], want_A @ z[p, i] + want_b, rtol=1e-12, atol=1e-13)
            np.testing.assert_allclose(per_cell[7 * p + i], want_A @ z[p, i] + want_b, rtol=1e-12, atol=1e-13)


def test_response_profile_is_alpha_beside_beta():
    params, theta, *_ = operator_case()
    family = OperatorFamily(params)
    profile = response_profile(family, torch.tensor(theta))
    alpha, beta = family.coefficients(torch.tensor(theta))
    assert profile.shape == (4, 8)
    np.testing.assert_array_equal(profile.detach(), torch.cat([alpha, beta], 1).detach())


def test_compose_applies_the_first_operator_first():
    rng = np.random.default_rng(8)
    A, b, z = (torch.tensor(rng.standard_normal(s)) for s in ((3, 2, 5, 5), (3, 2, 5), (2, 7, 5)))
    image = z
    for k in range(3):
        image = apply_operator(A[k], b[k], image)
    composed = compose([(A[k], b[k]) for k in range(3)])
    np.testing.assert_allclose(apply_operator(*composed, z), image, rtol=1e-10)
    with pytest.raises(ValueError, match="at least one was wanted"):
        compose([])


def test_commutator_norm_is_that_of_the_homogeneous_matrices():
    rng = np.random.default_rng(10)
    pairs = [(rng.standard_normal((5, 5)), rng.standard_normal(5)) for _ in range(2)]
    homogeneous = [np.block([[A, b[:, None]], [np.zeros((1, 5)), np.ones((1, 1))]]) for A, b in pairs]
    want = np.linalg.norm(homogeneous[0] @ homogeneous[1] - homogeneous[1] @ homogeneous[0])
    first, second = (tuple(tensors(*pair)) for pair in pairs)
    np.testing.assert_allclose(commutator_norm(first, second), want, rtol=1e-12)


def test_commutator_norm_has_gradient_zero_where_operators_commute():
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0])).requires_grad_()
    norm = commutator_norm((A, torch.zeros(3)), (2 * torch.eye(3), torch.zeros(3)))
    (grad,) = torch.autograd.grad(norm, A)
    assert norm.item() == 0
    assert torch.equal(grad, torch.zeros(3, 3))


def test_commutator_norm_gradient_matches_differences():
    rng = np.random.default_rng(12)
    inputs = [torch.tensor(rng.standard_normal(s), requires_grad=True) for s in ((3, 3), (3,), (3, 3), (3,))]
    assert torch.autograd.gradcheck(lambda A, b, C, d: commutator_norm((A, b), (C, d)), inputs, check_forward_ad=True)


def test_identity_penalty_is_a_weighted_mean():
    rng = np.random.default_rng(14)
    A, weight = rng.standard_normal((3, 5, 5)), np.array([1.0, 0.0, 3.0])
    squared = ((A - np.eye(5)) ** 2).sum((1, 2))
    np.testing.assert_allclose(identity_penalty(torch.tensor(A)), squared.mean(), rtol=1e-12)
    got = identity_penalty(*tensors(A, weight))
    np.testing.assert_allclose(got, np.average(squared, weights=weight), rtol=1e-12)


def test_modules_record_what_they_compute_in_order_and_only_when_asked():
    config, params, x, tissue, library, eps = vae_case()
    model = NBVAE(config, params)
    with recording() as values:
        model(*tensors(x, tissue, library, eps))
    assert list(values) == [
        "vae.encoder.hidden",
        "vae.encoder.mean",
        "vae.encoder.logvar",
        "vae.z",
        "vae.decoder.hidden",
        "vae.decoder.mean",
        "vae.r",
    ]
    assert not any(value.requires_grad for value in values.values())
    value = torch.ones(2)
    assert record("anything", value) is value
    assert "anything" not in values
