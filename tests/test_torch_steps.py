"""The PyTorch twin's losses and steps against formulas, torch.optim and finite differences."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pf_core.config import Config, OperatorConfig, StageConfig, VAEConfig  # noqa: E402
from pf_core.initial import Sizes, operator_parameters, select, vae_parameters  # noqa: E402
from pf_torch.conditions import ConditionEncoder  # noqa: E402
from pf_torch.distances import energy_distance  # noqa: E402
from pf_torch.likelihood import elbo_loss  # noqa: E402
from pf_torch.operators import OperatorFamily  # noqa: E402
from pf_torch.spectral import spectral_norm  # noqa: E402
from pf_torch.steps import (  # noqa: E402
    adam_update,
    clip_by_global_norm,
    evaluate,
    init_state,
    joint_loss,
    joint_step,
    operator_loss,
    operator_step,
    run_steps,
    vae_loss,
    vae_step,
)
from pf_torch.vae import NBVAE  # noqa: E402

C, G, P, N, M, D, T = 11, 13, 5, 7, 6, 3, 2
STEPS = {"vae": vae_step, "operator": operator_step, "joint": joint_step}


def config(**operator):
    settings = {"n_embedding": 4, "n_theta": 5, "n_bases": 2, "n_hidden": 6, "rho_max": 0.6, "shrinkage": 0.2}
    stage = StageConfig(max_norm=0.5, weight_decay=0.01)
    return Config(
        dtype="float64",
        vae=VAEConfig(n_hidden=8, n_latent=D),
        operator=OperatorConfig(**{**settings, **operator}),
        stage_vae=stage,
        stage_operator=stage,
        stage_joint=stage,
    )


def case(seed=0, dtype=torch.float64, **operator):
    """Everything off its initial value, so that no term and no gradient vanishes."""
    rng = np.random.default_rng(seed)
    settings = config(**operator)
    sizes = Sizes(G, T, 4, n_batches=2, n_covariates=1)
    params = vae_parameters(settings.vae, sizes, 1) | operator_parameters(settings.operator, D, sizes, 1)
    params = {name: value + 0.1 * rng.standard_normal(value.shape) for name, value in params.items()}
    counts = lambda *shape: rng.integers(0, 31, (*shape, G)).astype(float)
    cells = {
        "counts": counts(C),
        "tissue": rng.integers(0, T, C),
        "library": rng.uniform(100, 300, C),
        "weight": np.array([1.0] * (C - 2) + [0.0, 0.5]),
    }
    groups = {
        "perturbations": rng.integers(0, 4, (P, 2)),
        "doses": rng.uniform(0, 1, (P, 2)),
        "tissue": rng.integers(0, T, P),
        "batch": np.eye(2)[rng.integers(0, 2, P)],
        "covariates": rng.standard_normal((P, 1)),
        "wx": rng.uniform(0.1, 1, (P, N)),
        "wy": rng.uniform(0.1, 1, (P, M)),
        "weight": np.array([1.0, 2.0, 1.0, 1.0, 0.0]),
        "slot": np.array([1, 2, 3, 4, 0]),
        "distinct": np.array([1.0, 1.0, 1.0, 1.0, 0.0]),
    }
    latents = {"x": rng.standard_normal((P, N, D)), "y": rng.standard_normal((P, M, D)) + 1}
    sides = {"x_counts": counts(P, N), "y_counts": counts(P, M)}
    sides |= {"x_library": np.ones((P, N)), "y_library": np.ones((P, M))}
    batches = {
        "vae": cells,
        "operator": groups | latents,
        "joint": groups | sides | {f"cells_{name}": value for name, value in cells.items()},
    }
    noise = {"eps": rng.standard_normal((C, D)), "v0": rng.standard_normal((P, D))}
    carry = {"v": rng.standard_normal((P + 1, D)), "v_bases": rng.standard_normal((T + 2, D))}
    convert = lambda tree: {
        name: torch.tensor(x).to(dtype) if np.asarray(x).dtype.kind == "f" else torch.tensor(x)
        for name, x in tree.items()
    }
    batches = {stage: convert(batch) for stage, batch in batches.items()}
    return settings, convert(params), batches, convert(noise), convert(carry)


def loss_of(stage, params, batches, noise, carry, settings, beta=0.7):
    if stage == "vae":
        return vae_loss(params, batches["vae"], noise, config=settings, beta=beta)
    if stage == "operator":
        return operator_loss(params, batches["operator"], noise, carry, config=settings)
    return joint_loss(params, batches["joint"], noise, carry, config=settings, beta=beta)


def micro(tree, n=1):
    return {name: torch.stack([value] * n) for name, value in tree.items()}


def numpy_tree(tree):
    return {name: value.detach().numpy() for name, value in tree.items()}


def assert_same_trees(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name].detach(), b[name].detach(), err_msg=name)


def test_adam_is_torch_optim_adamw_over_many_steps():
    rng = np.random.default_rng(1)
    params = {name: torch.tensor(rng.standard_normal(shape)) for name, shape in (("a", (3, 5)), ("b", (7,)))}
    for decay in (0.0, 0.1):
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        peer = torch.optim.AdamW(leaves.values(), lr=0.03, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
        ours, m, v, count = dict(params), *({k: torch.zeros_like(p) for k, p in params.items()} for _ in "mv"), 0
        for _ in range(53):
            grads = {name: torch.tensor(rng.standard_normal(p.shape)) for name, p in params.items()}
            for name, leaf in leaves.items():
                leaf.grad = grads[name].clone()
            peer.step()
            ours, m, v, count = adam_update(ours, grads, m, v, count, lr=0.03, weight_decay=decay)
        assert count == 53
        for name, leaf in leaves.items():
            np.testing.assert_allclose(ours[name], leaf.detach(), rtol=1e-11, atol=1e-13)


def test_first_adam_step_is_lr_times_the_sign_of_the_gradient_in_float32():
    params, zeros = {"a": torch.zeros(3)}, {"a": torch.zeros(3)}
    grads = {"a": torch.tensor([1e-3, -5.0, 2e4])}
    new, *_ = adam_update(params, grads, zeros, zeros, 0, lr=1e-3)
    np.testing.assert_allclose(new["a"], [-1e-3 / (1 + 1e-5), 1e-3, -1e-3], rtol=3e-7)


def test_adam_leaves_its_arguments_alone():
    trees = [{"a": torch.ones(3)} for _ in range(4)]
    adam_update(*trees, 3, lr=0.1, weight_decay=0.1)
    assert all(torch.equal(tree["a"], torch.ones(3)) for tree in trees)


@pytest.mark.parametrize("max_norm", [0.1, 1e3])
def test_clip_is_that_of_torch_over_all_parameters_together(max_norm):
    rng = np.random.default_rng(2)
    grads = {name: torch.tensor(rng.standard_normal(shape)) for name, shape in (("a", (3, 5)), ("b", (7,)))}
    leaves = [torch.zeros_like(g).requires_grad_() for g in grads.values()]
    for leaf, g in zip(leaves, grads.values(), strict=True):
        leaf.grad = g.clone()
    want_norm = torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    clipped, norm = clip_by_global_norm(grads, max_norm)
    np.testing.assert_allclose(norm, want_norm, rtol=1e-14)
    for leaf, g in zip(leaves, clipped.values(), strict=True):
        np.testing.assert_allclose(g, leaf.grad, rtol=1e-14)


def test_vae_loss_is_the_elbo_of_the_model():
    settings, params, batches, noise, carry = case()
    loss, (parts, _) = loss_of("vae", params, batches, noise, carry, settings)
    b, model = batches["vae"], NBVAE(settings.vae, select(params, "vae"))
    mu, r, z_mu, z_logvar = model(b["counts"], b["tissue"], b["library"], noise["eps"])
    want, want_parts = elbo_loss(b["counts"], mu, r, z_mu, z_logvar, beta=0.7, weight=b["weight"])
    np.testing.assert_allclose(loss, want, rtol=1e-14)
    np.testing.assert_allclose([parts["nll"], parts["kl"]], [want_parts["nll"], want_parts["kl"]], rtol=1e-14)


def operators_of(params, b):
    theta = ConditionEncoder(select(params, "conditions"))(
        b["perturbations"], b["doses"], b["tissue"], b["batch"], b["covariates"]
    )
    return OperatorFamily(select(params, "operators")).operator(theta, b["tissue"])


def numpy_power(A, v, n_iter):
    for _ in range(n_iter):
        v = A.T @ (A @ v)
        v = v / (np.linalg.norm(v) + 1e-8)
    return v


@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize("estimator", ["v", "u"])
def test_operator_loss_is_the_sum_of_its_terms(warm_start, estimator):
    settings, params, batches, noise, carry = case(warm_start=warm_start, estimator=estimator, power_iterations=2)
    b = batches["operator"]
    loss, (parts, new_carry) = loss_of("operator", params, batches, noise, carry, settings)
    A, shift = operators_of(params, b)
    A, weight = A.numpy(), b["weight"].numpy()
    energy = [
        energy_distance(
            b["x"][p] @ torch.tensor(A[p]).T + shift[p], b["y"][p], wx=b["wx"][p], wy=b["wy"][p], estimator=estimator
        ).item()
        for p in range(P)
    ]
    start = carry["v"][b["slot"]] if warm_start else noise["v0"]
    v = np.stack([numpy_power(A[p], start[p].numpy(), 2) for p in range(P)])
    sigma = np.sqrt((np.einsum("pij,pj->pi", A, v) ** 2).sum(1) + 1e-8)
    want = {
        "energy": np.average(energy, weights=weight),
        "spectral": (np.maximum(sigma - 0.6, 0) ** 2)[:4].sum(),
        "shrinkage": np.average(((A - np.eye(D)) ** 2).sum((1, 2)), weights=weight),
        "sigma_max": sigma[:4].max(),
    }
    assert parts.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-10, err_msg=name)
    np.testing.assert_allclose(loss, want["energy"] + 1.0 * want["spectral"] + 0.2 * want["shrinkage"], rtol=1e-10)
    table = carry["v"].numpy().copy()
    if warm_start:
        table[b["slot"].numpy()] = v
    np.testing.assert_allclose(new_carry["v"], table, rtol=1e-12)


def test_bases_are_bounded_when_they_are_the_target():
    settings, params, batches, noise, carry = case(spectral_target="bases", rho_max=0.1)
    _, (parts, new_carry) = loss_of("operator", params, batches, noise, carry, settings)
    matrices = torch.cat([params["operators.A0"], params["operators.B"]]).numpy()
    v = np.stack([numpy_power(A, v, 5) for A, v in zip(matrices, carry["v_bases"].numpy(), strict=True)])
    sigma = np.sqrt((np.einsum("pij,pj->pi", matrices, v) ** 2).sum(1) + 1e-8)
    np.testing.assert_allclose(parts["spectral"], (np.maximum(sigma - 0.1, 0) ** 2).sum(), rtol=1e-10)
    np.testing.assert_allclose(parts["sigma_max"], sigma.max(), rtol=1e-12)
    np.testing.assert_allclose(new_carry["v_bases"], v, rtol=1e-12)


def test_an_operator_met_twice_is_penalised_once():
    settings, params, batches, noise, carry = case()
    b = batches["operator"]
    b["weight"] = torch.ones(P).double()
    b["distinct"] = torch.ones(P).double()
    each = [
        loss_of("operator", params, {"operator": {**b, "distinct": torch.eye(P).double()[p]}}, noise, carry, settings)
        for p in range(P)
    ]
    _, (parts, _) = loss_of("operator", params, batches, noise, carry, settings)
    np.testing.assert_allclose(parts["spectral"], sum(one[1][0]["spectral"] for one in each), rtol=1e-12)


def test_padding_groups_change_nothing():
    settings, params, batches, noise, carry = case()
    b = batches["operator"]
    short = {"operator": {name: value[:4] for name, value in b.items()}}
    with_padding = loss_of("operator", params, batches, noise, carry, settings)
    without = loss_of("operator", params, short, {**noise, "v0": noise["v0"][:4]}, carry, settings)
    np.testing.assert_allclose(with_padding[0], without[0], rtol=1e-13)
    np.testing.assert_array_equal(with_padding[1][1]["v"][1:], without[1][1]["v"][1:])


@pytest.mark.parametrize("scale", ["library", "softplus"])
def test_joint_loss_is_the_sum_of_its_terms(scale):
    settings, params, batches, noise, carry = case(gene_weight=0.3, elbo_weight=0.05)
    settings = dataclasses.replace(settings, vae=dataclasses.replace(settings.vae, scale=scale))
    b, model = batches["joint"], NBVAE(settings.vae, select(params, "vae"))
    loss, (parts, _) = loss_of("joint", params, batches, noise, carry, settings)
    encode = lambda counts, p: model.encode(counts[p], b["tissue"][p].expand(len(counts[p])))[0]
    x = torch.stack([encode(b["x_counts"], p) for p in range(P)])
    y = torch.stack([encode(b["y_counts"], p) for p in range(P)])
    latent, (latent_parts, _) = operator_loss(params, {**b, "x": x, "y": y}, noise, carry, config=settings)
    A, shift = operators_of(params, b)
    factor = 1e4 if scale == "library" else 1.0

    def profile(z, p):
        return torch.log1p(factor * model.decode(z, b["tissue"][p].expand(len(z)), torch.ones(len(z)).double()))

    gene = [
        energy_distance(profile(x[p] @ A[p].T + shift[p], p), profile(y[p], p), wx=b["wx"][p], wy=b["wy"][p]).item()
        for p in range(P)
    ]
    gene = np.average(gene, weights=b["weight"])
    elbo, (cell_parts, _) = vae_loss(params, batches["vae"], noise, config=settings, beta=0.7)
    np.testing.assert_allclose(loss, latent + 0.3 * gene + 0.05 * elbo, rtol=1e-10)
    np.testing.assert_allclose(parts["gene_energy"], gene, rtol=1e-9)
    for name, value in (latent_parts | cell_parts).items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-10, err_msg=name)


@pytest.mark.parametrize("stage", STEPS)
def test_gradient_matches_differences_and_reaches_every_parameter(stage):
    # rho_max out of reach: the power iteration is under stop-gradient, which differences cannot judge
    settings, params, batches, noise, carry = case(rho_max=1e3)
    used = [n for n in params if stage == "joint" or n.startswith("vae.") == (stage == "vae")]
    leaves = {name: params[name].clone().requires_grad_() for name in used}
    value = lambda changed: loss_of(stage, {**params, **changed}, batches, noise, carry, settings)[0]
    grads = torch.autograd.grad(value(leaves), list(leaves.values()))
    rng = np.random.default_rng(3)
    for name, grad in zip(used, grads, strict=True):
        direction = torch.tensor(rng.standard_normal(grad.shape))
        h = 1e-6
        ahead, behind = (value({name: params[name] + s * h * direction}).item() for s in (1, -1))
        slope = (grad * direction).sum().item()
        assert slope != 0, name
        assert abs((ahead - behind) / (2 * h) - slope) <= 1e-5 * (abs(slope) + grad.norm().item()), name


def test_spectral_gradient_is_that_of_the_surrogate_with_frozen_vectors():
    settings, params, batches, noise, carry = case(power_iterations=1)
    b = batches["operator"]
    leaf = params["operators.B"].clone().requires_grad_()
    given = {**params, "operators.B": leaf}
    loss, (_, new_carry) = loss_of("operator", given, batches, noise, carry, settings)
    unbounded = dataclasses.replace(settings, operator=dataclasses.replace(settings.operator, rho_max=1e3))
    rest, _ = loss_of("operator", given, batches, noise, carry, unbounded)
    (got,) = torch.autograd.grad(loss - rest, leaf)
    A, _ = operators_of(given, b)
    sigma = spectral_norm(A, new_carry["v"][b["slot"]], n_iter=0)
    (want,) = torch.autograd.grad((torch.relu(sigma - 0.6) ** 2)[:4].sum(), leaf)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("stage", STEPS)
def test_losses_have_hessian_vector_products(stage):
    settings, params, batches, noise, carry = case()
    used = [n for n in params if stage == "joint" or n.startswith("vae.") == (stage == "vae")]
    rng = np.random.default_rng(4)
    direction = {name: torch.tensor(rng.standard_normal(params[name].shape)) for name in used}
    # the carried vectors at their fixed point would change with the parameters: keep them out of reach
    settings = dataclasses.replace(settings, operator=dataclasses.replace(settings.operator, rho_max=1e3))

    def gradient(step, create_graph=False):
        leaves = {name: (params[name] + step * direction[name]).requires_grad_() for name in used}
        loss, _ = loss_of(stage, {**params, **leaves}, batches, noise, carry, settings)
        return leaves, torch.autograd.grad(loss, list(leaves.values()), create_graph=create_graph)

    leaves, grads = gradient(0.0, create_graph=True)
    slope = sum((g * direction[name]).sum() for name, g in zip(leaves, grads, strict=True))
    products = torch.autograd.grad(slope, list(leaves.values()))
    ahead, behind = gradient(1e-6)[1], gradient(-1e-6)[1]
    scale = max(product.abs().max().item() for product in products)
    for product, a, b in zip(products, ahead, behind, strict=True):
        np.testing.assert_allclose(product, (a - b) / 2e-6, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("stage", STEPS)
def test_losses_have_forward_derivatives_of_both_orders(stage):
    settings, params, batches, noise, carry = (
        case()
    )  # the penalty is active: its derivative is defined by stop-gradient
    used = {n: p for n, p in params.items() if stage == "joint" or n.startswith("vae.") == (stage == "vae")}
    rng = np.random.default_rng(6)
    direction = {name: torch.tensor(rng.standard_normal(p.shape)) for name, p in used.items()}
    value = lambda changed: loss_of(stage, {**params, **changed}, batches, noise, carry, settings)[0]
    _, slope = torch.func.jvp(value, (used,), (direction,))
    grads, products = torch.func.jvp(torch.func.grad(value), (used,), (direction,))
    np.testing.assert_allclose(slope, sum((grads[n] * direction[n]).sum() for n in used), rtol=1e-10)
    leaves = {name: p.clone().requires_grad_() for name, p in used.items()}
    first = torch.autograd.grad(value(leaves), list(leaves.values()), create_graph=True)
    along = sum((g * direction[name]).sum() for name, g in zip(leaves, first, strict=True))
    second = torch.autograd.grad(along, list(leaves.values()))
    scale = max(product.abs().max().item() for product in second)
    for name, g, product in zip(leaves, first, second, strict=True):
        np.testing.assert_allclose(grads[name], g.detach(), rtol=1e-9, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(products[name], product, rtol=1e-8, atol=1e-10 * scale, err_msg=name)


@pytest.mark.slow
def test_compiled_steps_are_the_same_steps():
    settings, params, batches, noise, carry = case()
    hypers = {"lr": np.array([0.01, 0.02]), "beta": np.array([0.1, 0.5])}
    for stage in STEPS:
        batch, noises = micro(micro(batches[stage]), 2), micro(micro(noise), 2)
        state = start(params, carry, stage)
        plain, compiled = (
            run_steps(stage, state, batch, noises, hypers, config=settings, compile=flag)[0] for flag in (False, True)
        )
        for name, value in plain.params.items():
            np.testing.assert_allclose(compiled.params[name], value, rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("stage", STEPS)
def test_parts_and_carry_carry_no_gradient(stage):
    settings, params, batches, noise, carry = case()
    leaves = {name: value.requires_grad_() for name, value in params.items()}
    _, (parts, new_carry) = loss_of(stage, leaves, batches, noise, carry, settings)
    assert not any(value.requires_grad for value in (parts | new_carry).values())


def start(params, carry, stage):
    trainable = [n for n in params if stage == "joint" or n.startswith("vae.") == (stage == "vae")]
    return init_state(params, trainable=trainable, carry=carry, dtype="float64")


@pytest.mark.parametrize("stage", STEPS)
def test_step_is_gradient_clip_and_adamw(stage):
    settings, params, batches, noise, carry = case()
    state = start(params, carry, stage)
    hyper = {"lr": 0.01, "beta": 0.7}
    new, metrics = STEPS[stage](state, micro(batches[stage]), micro(noise), hyper, config=settings)
    leaves = {name: p.clone().requires_grad_() for name, p in state.params.items()}
    loss, (parts, new_carry) = loss_of(stage, {**params, **leaves}, batches, noise, carry, settings)
    loss.backward()
    norms = [leaves[name].grad.norm().item() for name in sorted(leaves)]
    norm = torch.nn.utils.clip_grad_norm_(leaves.values(), 0.5)
    torch.optim.AdamW(leaves.values(), lr=0.01, weight_decay=0.01).step()
    assert norm > 0.5
    assert metrics["ok"]
    assert new.count == 1
    np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-13)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-12)
    np.testing.assert_allclose(metrics["param_grad_norm"], norms, rtol=1e-12)
    assert metrics["parts"].keys() == parts.keys()
    for name, leaf in leaves.items():
        np.testing.assert_allclose(new.params[name], leaf.detach(), rtol=1e-9, atol=1e-12, err_msg=name)
    assert_same_trees(new.frozen, state.frozen)
    if stage != "vae":
        assert_same_trees(new.carry, new_carry)


def test_micro_batches_average_gradients_losses_and_parts():
    settings, params, batches, noise, carry = case()
    _, _, others, other_noise, _ = case(seed=5)
    state, hyper = start(params, carry, "vae"), {"lr": 0.01, "beta": 0.7}
    both = {name: torch.stack([value, others["vae"][name]]) for name, value in batches["vae"].items()}
    both_noise = {name: torch.stack([value, other_noise[name]]) for name, value in noise.items()}
    new, metrics = vae_step(state, both, both_noise, hyper, config=settings)
    leaves = {name: p.clone().requires_grad_() for name, p in state.params.items()}
    first, (first_parts, _) = loss_of("vae", {**params, **leaves}, batches, noise, carry, settings)
    second, (second_parts, _) = loss_of("vae", {**params, **leaves}, others, other_noise, carry, settings)
    (0.5 * (first + second)).backward()
    torch.nn.utils.clip_grad_norm_(leaves.values(), 0.5)
    torch.optim.AdamW(leaves.values(), lr=0.01, weight_decay=0.01).step()
    for name, leaf in leaves.items():
        np.testing.assert_allclose(new.params[name], leaf.detach(), rtol=1e-9, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(metrics["loss"], 0.5 * (first + second).item(), rtol=1e-13)
    np.testing.assert_allclose(metrics["parts"]["nll"], 0.5 * (first_parts["nll"] + second_parts["nll"]), rtol=1e-13)


def test_carry_threads_through_micro_batches():
    settings, params, batches, noise, carry = case()
    state = start(params, carry, "operator")
    batch = batches["operator"]
    new, _ = operator_step(state, micro(batch, 3), micro(noise, 3), {"lr": 0.01, "beta": 1.0}, config=settings)
    threaded = carry
    for _ in range(3):
        _, (_, threaded) = operator_loss(params, batch, noise, threaded, config=settings)
    assert_same_trees(new.carry, threaded)


@pytest.mark.parametrize("where", ["batch", "parameter", "moment", "learning rate"])
def test_a_step_that_is_not_finite_leaves_the_state_untouched(where):
    settings, params, batches, noise, carry = case()
    batch, hyper = micro(batches["operator"]), {"lr": 0.01, "beta": 1.0}
    state = start(params, carry, "operator")
    state, _ = operator_step(state, batch, micro(noise), hyper, config=settings)
    if where == "batch":
        batch["y"][0, 1, 2, 0] = float("nan")
    elif where == "parameter":
        state.params["operators.b0"][0, 0] = float("inf")
    elif where == "moment":
        state.v["operators.B"][0, 0, 0] = float("nan")
    else:
        hyper["lr"] = float("inf")
    new, metrics = operator_step(state, batch, micro(noise), hyper, config=settings)
    assert metrics["ok"] is False
    assert new is state
    assert new.count == 1


def test_a_step_does_not_change_the_state_it_was_given():
    settings, params, batches, noise, carry = case()
    state = start(params, carry, "joint")
    copies = [{name: x.clone() for name, x in tree.items()} for tree in (state.params, state.m, state.carry)]
    joint_step(state, micro(batches["joint"]), micro(noise), {"lr": 0.1, "beta": 1.0}, config=settings)
    for tree, copy in zip((state.params, state.m, state.carry), copies, strict=True):
        assert_same_trees(tree, copy)
    assert state.count == 0


@pytest.mark.parametrize("stage", STEPS)
def test_run_steps_is_the_loop_over_steps(stage):
    settings, params, batches, noise, carry = case()
    state = start(params, carry, stage)
    hypers = {"lr": np.array([0.01, 0.02, 0.005]), "beta": np.array([0.1, 0.5, 1.0])}
    batch, noises = micro(batches[stage]), micro(noise)
    ran, metrics = run_steps(stage, state, micro(batch, 3), micro(noises, 3), hypers, config=settings)
    losses = []
    for i in range(3):
        hyper = {name: values[i] for name, values in hypers.items()}
        state, one = STEPS[stage](state, batch, noises, hyper, config=settings)
        losses.append(one["loss"])
    assert_same_trees(ran.params, state.params)
    np.testing.assert_array_equal(metrics["loss"], losses)
    assert metrics["ok"].tolist() == [True] * 3
    assert metrics["param_grad_norm"].shape == (3, len(state.params))


def test_steps_lower_the_loss():
    settings, params, batches, noise, carry = case()
    for stage in STEPS:
        batch, noises = micro(micro(batches[stage]), 40), micro(micro(noise), 40)
        hypers = {"lr": np.full(40, 0.01), "beta": np.ones(40)}
        _, metrics = run_steps(stage, start(params, carry, stage), batch, noises, hypers, config=settings)
        assert metrics["loss"][-1] < 0.95 * metrics["loss"][0], stage


@pytest.mark.parametrize("stage", STEPS)
def test_evaluate_is_the_loss_without_an_update(stage):
    settings, params, batches, noise, carry = case()
    values = evaluate(stage, start(params, carry, stage), batches[stage], noise, config=settings, beta=0.7)
    loss, (parts, _) = loss_of(stage, params, batches, noise, carry, settings)
    assert values.keys() == parts.keys() | {"loss"}
    np.testing.assert_allclose(values["loss"], loss, rtol=1e-14)


def test_state_names_what_does_not_fit():
    _, params, *_ = case()
    with pytest.raises(ValueError, match=r"trainable names vae\.nothing are not parameters"):
        init_state(params, trainable=["vae.nothing"])
    with pytest.raises(ValueError, match="names and shapes of m do not fit"):
        init_state(params, trainable=["operators.B"], m={"operators.B": torch.zeros(3)})
    with pytest.raises(ValueError, match="stage is 'nothing'"):
        run_steps("nothing", start(params, {}, "vae"), {}, {}, {"lr": [1.0], "beta": [1.0]}, config=config())
