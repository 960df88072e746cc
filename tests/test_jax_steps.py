"""Losses and steps of the JAX twin, against NumPy, Optax and their own plain form."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_data import STAGES, A, C, P, S, batches, carry, hypers, parameters, pick, run_config, trainable
from scipy import stats
from scipy.spatial.distance import cdist

from pf_core.config import ADAM_B1, ADAM_B2, ADAM_EPS, CLIP_EPS, EPS_NORMALISE, EPS_SIGMA, MU_FLOOR, NORMALISED_TOTAL
from pf_jax import steps

# JAX compiles for minutes here; in the fast tier the parity suite holds the same functions to the oracle.
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def on_device(tree, dtype="float64"):
    return {k: jnp.asarray(v, dtype if v.dtype.kind == "f" else None) for k, v in tree.items()}


def start(stage, config, dtype="float64", **moments):
    params = parameters(config)
    vectors = None if stage == "vae" else carry(config)
    return steps.init_state(params, trainable=trainable(stage, params), carry=vectors, dtype=dtype, **moments)


def inputs(stage, *index, dtype="float64", seed=1):
    batch, noise = batches(stage, seed)
    return tuple(on_device(pick(tree, *index) if index else tree, dtype) for tree in (batch, noise))


def hyper(k, dtype="float64"):
    return {name: jnp.asarray(value[k], dtype) for name, value in hypers().items()}


SINGLE = {"vae": steps.vae_step, "operator": steps.operator_step, "joint": steps.joint_step}


def assert_trees_equal(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# --- optimiser ---


@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
def test_adam_update_is_adamw_of_optax_in_float64(weight_decay):
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(3, 2))), "b": jnp.asarray(rng.normal(size=5))}
    # Optax holds b^t as it is, which float64 represents well enough for this comparison.
    optimiser = optax.adamw(0.01, b1=ADAM_B1, b2=ADAM_B2, eps=ADAM_EPS, weight_decay=weight_decay)
    wanted, state = params, optimiser.init(params)
    m = v = {name: jnp.zeros_like(value) for name, value in params.items()}
    count = jnp.asarray(0)
    for _ in range(7):
        grads = {name: jnp.asarray(rng.normal(size=value.shape)) for name, value in params.items()}
        updates, state = optimiser.update(grads, state, wanted)
        wanted = optax.apply_updates(wanted, updates)
        params, m, v, count = steps.adam_update(params, grads, m, v, count, lr=0.01, weight_decay=weight_decay)
    assert int(count) == 7
    for name in params:
        np.testing.assert_allclose(params[name], wanted[name], rtol=1e-12)


@pytest.mark.parametrize("count", [0, 1, 9, 999, 200000])
def test_adam_bias_correction_in_float32_is_accurate_to_rounding(count):
    g, m, v = np.float32(0.3), np.float32(0.1), np.float32(0.02)
    trees = [{"p": jnp.asarray([value])} for value in (np.float32(0), g, m, v)]
    params, *_ = jax.jit(steps.adam_update, static_argnames=("lr",))(*trees, jnp.asarray(count), lr=1.0)
    g, m, v = (float(value) for value in (g, m, v))
    m, v = ADAM_B1 * m + (1 - ADAM_B1) * g, ADAM_B2 * v + (1 - ADAM_B2) * g * g
    wanted = -(m / (1 - ADAM_B1 ** (count + 1))) / (np.sqrt(v / (1 - ADAM_B2 ** (count + 1))) + ADAM_EPS)
    assert params["p"].dtype == jnp.float32
    assert float(params["p"][0]) == pytest.approx(wanted, rel=4e-7)


def test_clip_by_global_norm_scales_all_leaves_by_one_factor():
    grads = {"a": jnp.asarray([3.0, 4.0]), "b": jnp.asarray([[12.0]])}
    clipped, norm = steps.clip_by_global_norm(grads, 6.5)
    assert float(norm) == pytest.approx(13.0)
    for name, grad in grads.items():
        np.testing.assert_allclose(clipped[name], grad * 6.5 / (13.0 + CLIP_EPS), rtol=1e-13)
    unchanged, _ = steps.clip_by_global_norm(grads, 20.0)
    assert_trees_equal(unchanged, grads)


# --- losses ---


def one_hot(tissue):
    return np.eye(3)[tissue]


def dense(params, name, x):
    return x @ params[f"{name}.weight"] + params[f"{name}.bias"]


def encode(params, x, tissue):
    h = np.maximum(dense(params, "vae.encoder.hidden", np.log1p(x)), 0)
    h = np.concatenate([h, one_hot(tissue)], axis=1)
    return dense(params, "vae.encoder.mean", h), dense(params, "vae.encoder.logvar", h)


def decode(params, z, tissue, library):
    h = np.maximum(dense(params, "vae.decoder.hidden", np.concatenate([z, one_hot(tissue)], axis=1)), 0)
    logits = np.exp(dense(params, "vae.decoder.mean", h))
    return library[:, None] * logits / logits.sum(1, keepdims=True) + MU_FLOOR


def vae_loss_by_hand(params, batch, noise, beta):
    x, tissue, w = batch["counts"], batch["tissue"], batch["weight"]
    z_mu, z_logvar = encode(params, x, tissue)
    mu = decode(params, z_mu + np.exp(z_logvar / 2) * noise["eps"], tissue, batch["library"])
    r = np.exp(params["vae.decoder.log_r"])
    nll = -stats.nbinom.logpmf(x, r, r / (r + mu)).sum(1)
    kl = 0.5 * (z_mu**2 + np.exp(z_logvar) - 1 - z_logvar).sum(1)
    parts = {"nll": np.average(nll, weights=w), "kl": np.average(kl, weights=w)}
    return parts["nll"] + beta * parts["kl"], parts


def energy_by_hand(x, y, wx, wy):
    wx, wy = wx / wx.sum(), wy / wy.sum()
    return 2 * wx @ cdist(x, y) @ wy - wx @ cdist(x, x) @ wx - wy @ cdist(y, y) @ wy


def operators_by_hand(params, batch):
    tissue = batch["tissue"]
    embedding = (batch["doses"][..., None] * params["conditions.perturbation.table"][batch["perturbations"]]).sum(1)
    known = [embedding, params["conditions.tissue.table"][tissue], batch["batch"], batch["covariates"]]
    theta = dense(params, "conditions.theta", np.concatenate(known, axis=1))

    def network(name):
        hidden = np.maximum(dense(params, f"operators.{name}.hidden", theta), 0)
        return dense(params, f"operators.{name}.out", hidden)

    A_ = params["operators.A0"][tissue] + np.einsum("pk,kij->pij", network("alpha"), params["operators.B"])
    return A_, params["operators.b0"][tissue] + network("beta") @ params["operators.u"]


def iterate(matrices, vectors, n):
    for _ in range(n):
        vectors = np.einsum("pji,pj->pi", matrices, np.einsum("pij,pj->pi", matrices, vectors))
        vectors = vectors / (np.linalg.norm(vectors, axis=1, keepdims=True) + EPS_NORMALISE)
    sigma = np.sqrt((np.einsum("pij,pj->pi", matrices, vectors) ** 2).sum(1) + EPS_SIGMA)
    return vectors, sigma


def operator_loss_by_hand(params, batch, noise, vectors, config, x, y):
    A_, b = operators_by_hand(params, batch)
    weight, live = batch["weight"], batch["weight"] > 0
    image = np.einsum("pij,pnj->pni", A_, x) + b[:, None]
    sides = zip(image, y, batch["wx"], batch["wy"], live, strict=True)
    energies = [energy_by_hand(*side) if use else 0.0 for *side, use in sides]
    if config.operator.spectral_target == "bases":
        matrices = np.concatenate([params["operators.A0"], params["operators.B"]])
        v, sigma = iterate(matrices, vectors["v_bases"], config.operator.power_iterations)
        mask, new = np.ones(len(matrices)), {"v_bases": v}
    else:
        mask = live * batch["distinct"]
        v0 = vectors["v"][batch["slot"]] if config.operator.warm_start else noise["v0"]
        v, sigma = iterate(A_, v0, config.operator.power_iterations)
        new = {"v": vectors["v"].copy()}
        if config.operator.warm_start:
            new["v"][batch["slot"][mask > 0]] = v[mask > 0]
    parts = {
        "energy": np.average(energies, weights=weight),
        "spectral": (mask * np.maximum(sigma - config.operator.rho_max, 0) ** 2).sum(),
        "shrinkage": np.average(((A_ - np.eye(A_.shape[-1])) ** 2).sum((1, 2)), weights=weight),
        "sigma_max": (mask * sigma).max(),
    }
    operator = config.operator
    loss = parts["energy"] + operator.spectral_weight * parts["spectral"] + operator.shrinkage * parts["shrinkage"]
    return loss, parts, new, image


def assert_parts(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-9), name


def test_vae_loss_is_the_written_formula():
    config = run_config()
    batch, noise = (pick(tree, 0, 0) for tree in batches("vae"))
    params = parameters(config)
    loss, (parts, vectors) = steps.vae_loss(
        on_device(params), on_device(batch), on_device(noise), config=config, beta=0.4
    )
    wanted, wanted_parts = vae_loss_by_hand(params, batch, noise, 0.4)
    assert float(loss) == pytest.approx(wanted, rel=1e-11)
    assert_parts(parts, wanted_parts)
    assert vectors == {}


@pytest.mark.parametrize("options", [{}, {"warm_start": False}, {"spectral_target": "bases"}, {"shrinkage": 0.0}])
def test_operator_loss_is_the_written_formula(options):
    config = run_config(**options)
    batch, noise = (pick(tree, 0, 0) for tree in batches("operator"))
    params, vectors = parameters(config), carry(config)
    loss, (parts, new) = steps.operator_loss(
        on_device(params), on_device(batch), on_device(noise), on_device(vectors), config=config
    )
    wanted, wanted_parts, wanted_new, _ = operator_loss_by_hand(
        params, batch, noise, vectors, config, batch["x"], batch["y"]
    )
    assert wanted_parts["spectral"] > 0
    assert float(loss) == pytest.approx(wanted, rel=1e-10)
    assert_parts(parts, wanted_parts)
    for name, value in wanted_new.items():
        rows = slice(None) if name == "v_bases" else slice(1, None)  # slot 0 belongs to the padding
        np.testing.assert_allclose(new[name][rows], value[rows], rtol=1e-7)


def test_joint_loss_is_the_written_formula():
    config = run_config(gene_weight=0.7, elbo_weight=0.3)
    batch, noise = (pick(tree, 0, 0) for tree in batches("joint"))
    params, vectors = parameters(config), carry(config)
    loss, (parts, _) = steps.joint_loss(
        on_device(params), on_device(batch), on_device(noise), on_device(vectors), config=config, beta=0.4
    )
    tissue = batch["tissue"]
    x, y = (
        np.stack(
            [
                encode(params, one, np.full(len(one), t))[0]
                for one, t in zip(batch[f"{side}_counts"], tissue, strict=True)
            ]
        )
        for side in ("x", "y")
    )
    wanted, wanted_parts, _, image = operator_loss_by_hand(params, batch, noise, vectors, config, x, y)

    def profile(z):
        means = [decode(params, one, np.full(len(one), t), np.ones(len(one))) for one, t in zip(z, tissue, strict=True)]
        return np.log1p(NORMALISED_TOTAL * np.stack(means))

    sides = zip(profile(image), profile(y), batch["wx"], batch["wy"], batch["weight"] > 0, strict=True)
    energies = [energy_by_hand(*side) if use else 0.0 for *side, use in sides]
    gene_energy = np.average(energies, weights=batch["weight"])
    cells = {name: batch[f"cells_{name}"] for name in ("counts", "tissue", "library", "weight")}
    elbo, elbo_parts = vae_loss_by_hand(params, cells, noise, 0.4)
    assert float(loss) == pytest.approx(wanted + 0.7 * gene_energy + 0.3 * elbo, rel=1e-9)
    assert_parts(parts, wanted_parts | {"gene_energy": gene_energy} | elbo_parts)


@pytest.mark.parametrize("stage", STAGES)
def test_loss_gradient_agrees_with_central_differences_in_every_parameter(stage):
    config = run_config(power_iterations=3000)  # at convergence the frozen vector has the norm's own gradient
    state = start(stage, config)
    batch, noise = inputs(stage, 0, 0)
    loss = jax.jit(lambda p: steps.stage_loss(stage, state.frozen | p, batch, noise, state.carry, 0.4, config)[0])
    grads = jax.grad(loss)(state.params)
    for k, name in enumerate(sorted(grads)):
        direction = jnp.asarray(np.random.default_rng(k).normal(size=grads[name].shape))
        h = 1e-6
        up, down = (loss(state.params | {name: state.params[name] + s * h * direction}) for s in (1, -1))
        found, wanted = float((grads[name] * direction).sum()), float(up - down) / (2 * h)
        assert found == pytest.approx(wanted, rel=2e-5, abs=1e-8), name
        assert np.abs(grads[name]).max() > 1e-9, name


@pytest.mark.parametrize("stage", STAGES)
def test_hessian_vector_product_of_the_loss_agrees_with_differences_of_the_gradient(stage):
    # Without the penalty: its vector is frozen, and a difference that moves A would move it (see the spectral tests).
    config = run_config(spectral_weight=0.0)
    state = start(stage, config)
    batch, noise = inputs(stage, 0, 0)
    loss = lambda p: steps.stage_loss(stage, state.frozen | p, batch, noise, state.carry, 0.4, config)[0]
    gradient = jax.jit(jax.grad(loss))
    rng = np.random.default_rng(5)
    direction = {name: jnp.asarray(rng.normal(size=value.shape)) for name, value in state.params.items()}
    _, found = jax.jit(lambda p, d: jax.jvp(gradient, (p,), (d,)))(state.params, direction)
    h = 1e-6
    up, down = (gradient(jax.tree.map(lambda p, d, s=s: p + s * h * d, state.params, direction)) for s in (1, -1))
    for name, value in found.items():
        wanted = (up[name] - down[name]) / (2 * h)
        np.testing.assert_allclose(
            value, wanted, rtol=2e-4, atol=2e-6 * max(1.0, float(jnp.abs(wanted).max())), err_msg=name
        )


@pytest.mark.parametrize("stage", STAGES)
def test_parts_and_carry_leak_no_gradient(stage):
    config = run_config()
    state = start(stage, config)
    batch, noise = inputs(stage, 0, 0)

    def reported(p):
        _, (parts, vectors) = steps.stage_loss(stage, state.frozen | p, batch, noise, state.carry, 0.4, config)
        return sum(jax.tree.leaves(parts)) + sum(leaf.sum() for leaf in jax.tree.leaves(vectors))

    assert all((leaf == 0).all() for leaf in jax.tree.leaves(jax.grad(reported)(state.params)))


# --- steps ---


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_is_the_mean_gradient_clipped_and_given_to_adam(stage):
    config = run_config()
    state = start(stage, config)
    batch, noise = inputs(stage, 0)
    new, metrics = SINGLE[stage](state, batch, noise, hyper(0), config=config)
    loss = lambda p, one, vectors: steps.stage_loss(stage, state.frozen | p, *one, vectors, hypers()["beta"][0], config)
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    vectors, total, value = state.carry, None, 0.0
    for k in range(A):
        one = jax.tree.map(lambda leaf, k=k: leaf[k], (batch, noise))
        (part, (_, vectors)), grads = gradient(state.params, one, vectors)
        value += float(part) / A
        total = grads if total is None else jax.tree.map(jnp.add, total, grads)
    mean = jax.tree.map(lambda leaf: leaf / A, total)
    clipped, norm = steps.clip_by_global_norm(mean, 0.5)
    params, m, v, count = steps.adam_update(
        state.params, clipped, state.m, state.v, state.count, lr=hypers()["lr"][0], weight_decay=0.02
    )
    assert float(norm) > 0.5
    assert bool(metrics["ok"])
    assert float(metrics["loss"]) == pytest.approx(value, rel=1e-12)
    assert float(metrics["grad_norm"]) == pytest.approx(float(norm), rel=1e-12)
    norms = [float(jnp.linalg.norm(mean[name])) for name in sorted(mean)]
    np.testing.assert_allclose(metrics["param_grad_norm"], norms, rtol=1e-11)
    assert int(new.count) == int(count) == 1
    for name in params:
        for one, two in ((new.params, params), (new.m, m), (new.v, v)):
            np.testing.assert_allclose(one[name], two[name], rtol=1e-9, atol=1e-13, err_msg=name)
    for name, value in vectors.items():
        np.testing.assert_allclose(new.carry[name], value, rtol=1e-10)
    assert_trees_equal(new.frozen, state.frozen)


@pytest.mark.parametrize("stage", STAGES)
def test_many_steps_in_one_call_equal_single_steps(stage):
    config = run_config()
    state = start(stage, config)
    batch, noise = inputs(stage)
    many, metrics = steps.run_steps(stage, start(stage, config), batch, noise, on_device(hypers()), config=config)
    for k in range(S):
        one = jax.tree.map(lambda leaf, k=k: leaf[k], (batch, noise))
        state, single = SINGLE[stage](state, *one, hyper(k), config=config)
        assert float(metrics["loss"][k]) == pytest.approx(float(single["loss"]), rel=1e-11)
    assert int(many.count) == S
    for one, two in zip(jax.tree.leaves(many), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_that_is_not_finite_leaves_no_trace(stage):
    config = run_config()
    batch, noise = inputs(stage)
    spoiled = {"vae": "library", "operator": "x", "joint": "cells_library"}[stage]
    batch[spoiled] = batch[spoiled].at[1].set(jnp.nan)
    state, metrics = steps.run_steps(stage, start(stage, config), batch, noise, on_device(hypers()), config=config)
    assert metrics["ok"].tolist() == [True, False, True]
    wanted = start(stage, config)
    for k in (0, 2):
        one = jax.tree.map(lambda leaf, k=k: leaf[k], (batch, noise))
        wanted, _ = SINGLE[stage](wanted, *one, hyper(k), config=config)
    assert int(state.count) == S - 1
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-8, atol=1e-12)


def test_a_single_step_that_is_not_finite_returns_the_state_bit_for_bit():
    config = run_config()
    state = start("operator", config)
    batch, noise = inputs("operator", 0)
    for spoiled in ({**hyper(0), "lr": jnp.asarray(jnp.inf)}, {**hyper(0), "lr": jnp.asarray(jnp.nan)}):
        new, metrics = steps.operator_step(state, batch, noise, spoiled, config=config)
        assert not bool(metrics["ok"])
        assert_trees_equal(new, state)


def test_steps_are_traced_once_per_shape():
    config = dataclasses.replace(run_config(), seed=17)  # a configuration that no other test has compiled
    before = steps._many_steps._cache_size()
    state = start("operator", config, "float32")
    for seed in (1, 2, 3):
        batch, noise = inputs("operator", dtype="float32", seed=seed)
        state, _ = steps.run_steps("operator", state, batch, noise, on_device(hypers(), "float32"), config=config)
    assert steps._many_steps._cache_size() == before + 1


def test_everything_stays_float32_in_a_float32_run_even_where_64_bit_numbers_are_on():
    config = run_config()
    state = start("joint", config, "float32")
    batch, noise = inputs("joint", 0, dtype="float32")
    state, metrics = steps.joint_step(state, batch, noise, hyper(0, "float32"), config=config)
    for leaf in jax.tree.leaves((state._replace(count=()), metrics | {"ok": ()})):
        assert leaf.dtype == jnp.float32


@pytest.mark.parametrize("stage", STAGES)
def test_steps_work_without_64_bit_numbers_and_agree_with_float64(stage):
    config = run_config()
    exact, exact_metrics = steps.run_steps(
        stage, start(stage, config), *inputs(stage), on_device(hypers()), config=config
    )
    with jax.enable_x64(False):
        state, metrics = steps.run_steps(
            stage,
            start(stage, config, "float32"),
            *inputs(stage, dtype="float32"),
            on_device(hypers(), "float32"),
            config=config,
        )
        np.testing.assert_allclose(metrics["loss"], exact_metrics["loss"], rtol=2e-5)
        for name, value in exact.params.items():
            np.testing.assert_allclose(state.params[name], value, atol=2e-3, err_msg=name)


def test_evaluate_returns_the_loss_and_its_parts_and_changes_nothing():
    config = run_config()
    state = start("vae", config)
    batch, noise = inputs("vae", 0, 0)
    found = steps.evaluate("vae", state, batch, noise, config=config, beta=0.4)
    loss, (parts, _) = steps.vae_loss(state.params, batch, noise, config=config, beta=0.4)
    assert float(found.pop("loss")) == pytest.approx(float(loss), rel=1e-12)
    assert_parts(found, {name: float(value) for name, value in parts.items()})


def test_init_state_copies_and_names_what_does_not_fit():
    config = run_config()
    params = parameters(config)
    state = steps.init_state(params, trainable=("operators.u",), dtype="float64")
    params["operators.u"][:] = 0
    assert (state.params["operators.u"] != 0).any()
    assert state.frozen.keys() == params.keys() - {"operators.u"}
    with pytest.raises(ValueError, match="are not parameters"):
        steps.init_state(params, trainable=("operators.w",))
    with pytest.raises(ValueError, match="differ from the trainable"):
        steps.init_state(params, trainable=("operators.u",), m={"operators.u": np.zeros(3)})
    with jax.enable_x64(False), pytest.raises(ValueError, match="64-bit"):
        steps.init_state(params, trainable=("operators.u",), dtype="float64")
    with pytest.raises(ValueError, match="'cvae', 'flow' was wanted"):
        steps.run_steps("flaw", state, {}, {}, {}, config=config)  # type: ignore[arg-type]


def test_padding_groups_change_nothing():
    config = run_config()
    params, vectors = on_device(parameters(config)), on_device(carry(config))
    batch, noise = inputs("operator", 0, 0)
    function = jax.value_and_grad(lambda p, b: steps.operator_loss(p, b, noise, vectors, config=config)[0])
    moved = batch | {name: batch[name].at[P - 1].add(3.0) for name in ("x", "y", "doses")}
    assert_trees_equal(function(params, batch), function(params, moved))


def test_cells_of_weight_zero_do_not_enter_the_vae_loss():
    config = run_config()
    params = on_device(parameters(config))
    batch, noise = inputs("vae", 0, 0)
    batch["weight"] = batch["weight"].at[C - 1].set(0.0)
    value = steps.vae_loss(params, batch, noise, config=config, beta=1.0)[0]
    batch["counts"] = batch["counts"].at[C - 1].add(5.0)
    assert float(steps.vae_loss(params, batch, noise, config=config, beta=1.0)[0]) == pytest.approx(
        float(value), rel=1e-13
    )
