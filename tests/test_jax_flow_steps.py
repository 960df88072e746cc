"""Losses, steps and Backend of the flow system in JAX, against Optax, differences and their own plain form."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_flow_data import (
    STAGES,
    A,
    C,
    D,
    E,
    G,
    P,
    S,
    batches,
    hypers,
    network,
    parameters,
    pick,
    run_config,
    statistics,
    trainable,
)

from pf_core.config import ADAM_B1, ADAM_B2, ADAM_EPS, CLIP_EPS, NORMALISED_TOTAL
from pf_core.initial import select
from pf_jax import (
    CVAE,
    Discriminator,
    VectorField,
    adversary_loss,
    bridge,
    cross_entropy,
    cvae_loss,
    cvae_step,
    discriminator_loss,
    elbo_loss,
    flow_loss,
    flow_step,
    steps,
)

RIVAL = "discriminator."
SINGLE = {"cvae": cvae_step, "flow": flow_step}


# Compiling each step anew takes minutes; the parity suite runs the same steps in the fast tier.
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _double():
    before = jax.config.jax_enable_x64  # Backend(dtype="float64") turns 64-bit numbers on for the process
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_enable_x64", before)


def on_device(tree, dtype="float64"):
    return {k: jnp.asarray(v, dtype if v.dtype.kind == "f" else None) for k, v in tree.items()}


def start(stage, config, dtype="float64", names=None):
    params = parameters(config)
    carry = statistics() if stage == "cvae" else None
    names = trainable(stage, params) if names is None else names
    return steps.init_state(params, trainable=names, carry=carry, dtype=dtype)


def inputs(stage, *index, dtype="float64", seed=1):
    return tuple(on_device(pick(tree, *index) if index else tree, dtype) for tree in batches(stage, seed))


def hyper(k=0):
    return {name: jnp.asarray(value[k]) for name, value in hypers().items()}


def assert_trees_equal(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


def close(found, wanted, rtol=1e-10, atol=1e-13, message=""):
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=atol, err_msg=message)


def micro(tree, k):
    return jax.tree.map(lambda leaf: leaf[k], tree)


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["entropy", "minimax"])
@pytest.mark.parametrize("train", [True, False])
def test_the_second_players_loss_is_the_elbo_and_the_adversary(kind, train):
    config = run_config(kind)
    params, carry, (batch, noise) = on_device(parameters(config)), on_device(statistics()), inputs("cvae", 0, 0)
    loss, (parts, after) = cvae_loss(params, batch, noise, carry, config=config, beta=0.4, train=train)
    mu, r, z_mu, z_logvar, z, new = CVAE(select(params, "cvae"))(
        batch["counts"], batch["tissue"], batch["library"], noise["eps"], select(carry, "cvae.encoder"),
        weight=batch["weight"], train=train,
    )  # fmt: skip
    elbo, _ = elbo_loss(batch["counts"], mu, r, z_mu, z_logvar, beta=0.4, weight=batch["weight"])
    logits = Discriminator(select(params, "discriminator"))(z)
    adversary = adversary_loss(logits, batch["tissue"], batch["weight"], kind=kind)
    close(loss, elbo + 0.7 * adversary)
    assert list(parts) == ["nll", "kl", "adversary"]
    close(parts["nll"] + 0.4 * parts["kl"], elbo)
    close(parts["adversary"], adversary)
    assert after.keys() == carry.keys()
    for name, value in after.items():
        close(value, new[name.removeprefix("cvae.encoder.")])
        assert bool((value == carry[name]).all()) != train


def test_the_discriminators_loss_is_the_cross_entropy_on_samples_with_dropout():
    config = run_config()
    params, carry, (batch, noise) = on_device(parameters(config)), on_device(statistics()), inputs("cvae", 0, 0)
    loss, (parts, after) = discriminator_loss(params, batch, noise, carry, config=config)
    *_, z, _ = CVAE(select(params, "cvae"))(
        batch["counts"], batch["tissue"], batch["library"], noise["eps"], select(carry, "cvae.encoder"),
        weight=batch["weight"], train=True,
    )  # fmt: skip
    logits = Discriminator(select(params, "discriminator"))(z, noise["keep1"], noise["keep2"], dropout=0.4)
    tissue, weight = np.asarray(batch["tissue"]), np.asarray(batch["weight"])
    close(loss, cross_entropy(logits, tissue, weight))
    known = tissue > 0
    hit = np.argmax(logits, axis=1) == tissue - 1
    close(parts["accuracy"], np.average(hit[known], weights=weight[known]))
    close(parts["discriminator"], loss)
    assert_trees_equal(after, carry)


@pytest.mark.parametrize("kind", ["entropy", "minimax"])
def test_each_players_loss_has_a_gradient_in_its_own_parameters_only(kind):
    config = run_config(kind)
    params, carry, (batch, noise) = parameters(config), on_device(statistics()), inputs("cvae", 0, 0)
    params = on_device({name: params[name] for name in trainable("cvae", params)})
    first = lambda p: discriminator_loss(p, batch, noise, carry, config=config)[0]
    second = lambda p: cvae_loss(p, batch, noise, carry, config=config, beta=0.4)[0]
    for loss, rival in ((first, True), (second, False)):
        _, grads = bridge.value_and_grad(jax.jit(loss), params)
        for name, grad in grads.items():
            assert (grad is not None) == (name.startswith(RIVAL) == rival), name
            assert grad is None or float(jnp.abs(grad).max()) > 1e-8, name


def test_the_adversary_reaches_the_encoder_alone():
    batch, noise = inputs("cvae", 0, 0)
    grads = []
    for weight in (0.0, 0.7):
        config = run_config()
        config = dataclasses.replace(config, adversary=dataclasses.replace(config.adversary, weight=weight))
        carry = on_device(statistics())
        loss = lambda p, config=config, carry=carry: cvae_loss(p, batch, noise, carry, config=config, beta=0.4)[0]
        grads.append(jax.jit(jax.grad(loss))(on_device(parameters(config))))
    for name in grads[0]:
        same = bool((grads[0][name] == grads[1][name]).all())
        assert same != name.startswith("cvae.encoder."), name


@pytest.mark.parametrize("graph", [True, False])
def test_the_flow_loss_is_that_of_the_field_and_displacement_that_of_no_field(graph):
    config = run_config()
    params = on_device(parameters(config, graph=graph))
    batch, noise = (on_device(pick(tree, 0, 0)) for tree in batches("flow", graph=graph))
    loss, (parts, carry) = flow_loss(params, batch, noise, config=config)
    field = VectorField(select(params, "flow"))
    nodes = field.nodes(on_device(network()) if graph else {})
    tau, length = noise["tau"], batch["stop"] - batch["start"]
    psi = (1 - tau)[:, None] * batch["z0"] + tau[:, None] * batch["z1"]
    v = field(batch["start"] + tau * length, psi, batch["condition"], nodes)
    gap = batch["z1"] - batch["z0"]
    close(loss, np.average(((length[:, None] * v - gap) ** 2).mean(1), weights=batch["weight"]))
    close(parts["displacement"], np.average((gap**2).mean(1), weights=batch["weight"]))
    assert carry == {}


def player_losses(stage, frozen, batch, noise, carry, config):
    if stage == "flow":
        return [lambda p: flow_loss(frozen | p, batch, noise, config=config)[0]]
    return [
        lambda p: discriminator_loss(frozen | p, batch, noise, carry, config=config)[0],
        lambda p: cvae_loss(frozen | p, batch, noise, carry, config=config, beta=0.4)[0],
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_and_hessian_products_agree_with_central_differences(stage):
    config = run_config("minimax")
    state, h = start(stage, config), 1e-6
    for turn, loss in enumerate(player_losses(stage, state.frozen, *inputs(stage, 0, 0), state.carry, config)):
        own = {k: v for k, v in state.params.items() if stage == "flow" or k.startswith(RIVAL) == (turn == 0)}
        others = {k: v for k, v in state.params.items() if k not in own}
        value = jax.jit(lambda p, loss=loss, others=others: loss(others | p))
        gradient = jax.jit(jax.grad(value))
        product = jax.jit(lambda p, d, gradient=gradient: jax.jvp(gradient, (p,), (d,))[1])
        grads, everywhere = gradient(own), {}
        for k, name in enumerate(sorted(own)):
            direction = jnp.asarray(np.random.default_rng(k).normal(size=own[name].shape))
            everywhere[name] = direction
            up, down = (value(own | {name: own[name] + s * h * direction}) for s in (1, -1))
            found = float((grads[name] * direction).sum())
            assert found == pytest.approx(float(up - down) / (2 * h), rel=2e-5, abs=1e-8), name
        up, down = (gradient(jax.tree.map(lambda p, d, s=s: p + s * h * d, own, everywhere)) for s in (1, -1))
        for name, found in product(own, everywhere).items():
            wanted = (up[name] - down[name]) / (2 * h)
            close(found, wanted, 2e-4, 2e-6 * max(1.0, float(jnp.abs(wanted).max())), name)


# --- steps ------------------------------------------------------------------------------------------------------------


def adamw_by_optax(params, grads, max_norm=0.5, lr=0.01):
    norm = float(optax.global_norm(grads))
    assert norm > max_norm  # the clip takes part
    grads = jax.tree.map(lambda g: g * max_norm / (norm + CLIP_EPS), grads)
    optimiser = optax.adamw(lr, b1=ADAM_B1, b2=ADAM_B2, eps=ADAM_EPS, weight_decay=0.02)
    updates, _ = optimiser.update(grads, optimiser.init(params), params)
    return optax.apply_updates(params, updates), norm


@pytest.mark.parametrize("kind", ["entropy", "minimax"])
def test_the_alternating_step_is_two_steps_of_optax_the_second_against_the_updated_discriminator(kind):
    config = run_config(kind)
    state, (batch, noise) = start("cvae", config), inputs("cvae", 0)
    mine = {k: v for k, v in state.params.items() if k.startswith(RIVAL)}
    theirs = {k: v for k, v in state.params.items() if not k.startswith(RIVAL)}
    first = jax.jit(
        jax.value_and_grad(
            lambda p, rest, carry, b, n: discriminator_loss(p | rest, b, n, carry, config=config), has_aux=True
        )
    )
    second = jax.jit(
        jax.value_and_grad(
            lambda p, rest, carry, b, n: cvae_loss(p | rest, b, n, carry, config=config, beta=0.3), has_aux=True
        )
    )
    found = [first(mine, theirs, state.carry, micro(batch, k), micro(noise, k)) for k in range(A)]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / A, *[grads for _, grads in found])
    updated, norm_1 = adamw_by_optax(mine, mean)
    parts = [aux[0] for (_, aux), _ in found]
    carry, totals, losses, more = state.carry, [], [], []
    for k in range(A):
        (loss, (part, carry)), grads = second(theirs, updated, carry, micro(batch, k), micro(noise, k))
        totals, losses, more = [*totals, grads], [*losses, loss], [*more, part]
    means = jax.tree.map(lambda *leaves: sum(leaves) / A, *totals)
    moved, norm_2 = adamw_by_optax(theirs, means)

    new, metrics = cvae_step(state, batch, noise, hyper(), config=config)
    assert bool(metrics["ok"])
    assert int(new.count) == 1
    for name, value in (updated | moved).items():
        close(new.params[name], value, 1e-9, 1e-12, name)
    for name, value in carry.items():
        close(new.carry[name], value, message=name)
    close(metrics["loss"], np.mean(losses))
    close(metrics["grad_norm"], np.hypot(norm_1, norm_2))
    grads = mean | means
    close(metrics["param_grad_norm"], [float(jnp.linalg.norm(grads[name])) for name in sorted(grads)])
    assert set(metrics["parts"]) == {"discriminator", "accuracy", "nll", "kl", "adversary"}
    for name, value in metrics["parts"].items():
        source = parts if name in parts[0] else more
        close(value, np.mean([part[name] for part in source]), message=name)
    assert_trees_equal(new.frozen, state.frozen)


def test_the_flow_step_is_a_step_of_optax():
    config = run_config()
    state, (batch, noise) = start("flow", config), inputs("flow", 0)
    batch = batch | {"z1": 5.0 * batch["z1"]}  # so that the clip takes part
    loss = jax.jit(jax.value_and_grad(lambda p, b, n: flow_loss(state.frozen | p, b, n, config=config)[0]))
    found = [loss(state.params, micro(batch, k), micro(noise, k)) for k in range(A)]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / A, *[grads for _, grads in found])
    wanted, norm = adamw_by_optax(state.params, mean)
    new, metrics = flow_step(state, batch, noise, hyper(), config=config)
    close(metrics["loss"], np.mean([value for value, _ in found]))
    close(metrics["grad_norm"], norm)
    for name, value in wanted.items():
        close(new.params[name], value, 1e-9, 1e-12, name)
    assert new.carry == {}
    assert_trees_equal(new.frozen, state.frozen)


@pytest.mark.parametrize("rival", [True, False])
def test_a_player_without_trained_parameters_is_skipped(rival):
    config = run_config()
    params = parameters(config)
    names = tuple(name for name in trainable("cvae", params) if name.startswith(RIVAL) == rival)
    state, (batch, noise) = start("cvae", config, names=names), inputs("cvae", 0)
    new, metrics = cvae_step(state, batch, noise, hyper(), config=config)
    both, _ = cvae_step(start("cvae", config), batch, noise, hyper(), config=config)
    assert bool(metrics["ok"])
    assert int(new.count) == 1
    assert set(metrics["parts"]) == {"discriminator", "accuracy", "nll", "kl", "adversary"}
    assert metrics["param_grad_norm"].shape == (len(names),)
    for name in names:
        assert bool((new.params[name] != state.params[name]).any()), name
        if rival:  # the first player does not see the second's step
            close(new.params[name], both.params[name], message=name)
    for name, value in new.carry.items():
        assert bool((value == state.carry[name]).all()) == rival, name


@pytest.mark.parametrize("stage", STAGES)
def test_many_steps_in_one_call_equal_single_steps(stage):
    config = run_config()
    state, (batch, noise) = start(stage, config), inputs(stage)
    many, metrics = steps.run_steps(stage, start(stage, config), batch, noise, on_device(hypers()), config=config)
    for k in range(S):
        state, single = SINGLE[stage](state, micro(batch, k), micro(noise, k), hyper(k), config=config)
        close(metrics["loss"][k], single["loss"], rtol=1e-11)
    assert int(many.count) == S
    for one, two in zip(jax.tree.leaves(many), jax.tree.leaves(state), strict=True):
        close(one, two, 1e-8, 1e-12)


@pytest.mark.parametrize(
    ("stage", "spoil"),
    [
        ("cvae", lambda b, n: (b | {"library": b["library"] * np.nan}, n)),  # player 2 alone
        ("cvae", lambda b, n: (b, n | {"keep1": n["keep1"] * np.nan})),  # player 1 alone
        # One cell with weight: the batch's loss is finite, the variance of the running statistics is not.
        ("cvae", lambda b, n: (b | {"weight": b["weight"] * (np.arange(C) == 2)}, n)),
        ("flow", lambda b, n: (b | {"z1": b["z1"] * np.nan}, n)),
    ],
)
def test_one_bad_value_refuses_the_whole_step(stage, spoil):
    config = run_config()
    state, (batch, noise) = start(stage, config), inputs(stage, 0)
    new, metrics = SINGLE[stage](state, *spoil(batch, noise), hyper(), config=config)
    assert not bool(metrics["ok"])
    assert_trees_equal(new, state)


@pytest.mark.parametrize("stage", STAGES)
def test_steps_are_traced_once_per_shape(stage):
    config = dataclasses.replace(run_config(), seed=19)  # a configuration that no other test has compiled
    before = steps._many_steps._cache_size()
    state = start(stage, config, "float32")
    for seed in (1, 2, 3):
        given = (*inputs(stage, dtype="float32", seed=seed), on_device(hypers(), "float32"))
        state, _ = steps.run_steps(stage, state, *given, config=config)
    assert steps._many_steps._cache_size() == before + 1
    for leaf in jax.tree.leaves(state._replace(count=())):
        assert leaf.dtype == jnp.float32


def test_evaluation_takes_running_statistics_and_no_dropout():
    config = run_config()
    state, (batch, noise) = start("cvae", config), inputs("cvae", 0, 0)
    found = steps.evaluate("cvae", state, batch, {"eps": noise["eps"]}, config=config, beta=0.4)
    params = state.frozen | state.params
    loss, (parts, _) = cvae_loss(params, batch, noise, state.carry, config=config, beta=0.4, train=False)
    *_, z, _ = CVAE(select(params, "cvae"))(
        batch["counts"], batch["tissue"], batch["library"], noise["eps"], select(state.carry, "cvae.encoder")
    )
    logits = Discriminator(select(params, "discriminator"))(z)
    wanted = parts | {"loss": loss, "discriminator": cross_entropy(logits, batch["tissue"], batch["weight"])}
    assert found.keys() == wanted.keys() | {"accuracy"}
    for name, value in wanted.items():
        close(found[name], value, message=name)


def test_cells_of_weight_zero_do_not_enter_the_losses_or_the_statistics():
    config = run_config()
    params, carry, (batch, noise) = on_device(parameters(config)), on_device(statistics()), inputs("cvae", 0, 0)

    def seen(batch):
        rival = discriminator_loss(params, batch, noise, carry, config=config)
        return rival, cvae_loss(params, batch, noise, carry, config=config, beta=0.4)

    moved = batch | {"counts": batch["counts"].at[C - 1].add(5.0)}
    for one, two in zip(jax.tree.leaves(seen(batch)), jax.tree.leaves(seen(moved)), strict=True):
        close(one, two, 1e-12)


def test_cells_of_unknown_tissue_have_no_part_in_the_game():
    config = run_config()
    params, carry, (batch, noise) = on_device(parameters(config)), on_device(statistics()), inputs("cvae", 0, 0)
    unknown = batch | {"tissue": jnp.zeros_like(batch["tissue"])}
    rival, (parts, _) = discriminator_loss(params, unknown, noise, carry, config=config)
    _, (others, _) = cvae_loss(params, unknown, noise, carry, config=config, beta=0.4)
    assert [float(value) for value in (rival, parts["accuracy"], others["adversary"])] == [0.0, 0.0, 0.0]


# --- Backend ----------------------------------------------------------------------------------------------------------


def backend_and_state(stage, dtype="float32"):
    config = run_config()
    backend, params = bridge.Backend(dtype), parameters(config)
    carry = statistics() if stage == "cvae" else None
    return config, backend, params, backend.init(stage, params, trainable=trainable(stage, params), carry=carry)


@pytest.mark.parametrize("stage", STAGES)
def test_training_lowers_the_loss(stage):
    config, backend, _, state = backend_and_state(stage)
    batch, noise = batches(stage)
    still = [{name: np.repeat(value[:1], 80, axis=0) for name, value in tree.items()} for tree in (batch, noise)]
    _, metrics = backend.run(stage, state, *still, {"lr": np.full(80, 0.02), "beta": np.ones(80)}, config)
    assert metrics["ok"].all()
    assert metrics["loss"][-5:].mean() < 0.8 * metrics["loss"][0]


@pytest.mark.parametrize("stage", STAGES)
def test_twenty_steps_in_one_call_equal_twenty_calls_with_the_state_taken_out_and_put_back_between(stage):
    config, backend, params, state = backend_and_state(stage)
    batch, noise = batches(stage, lead=(20, 1))
    names, rates = trainable(stage, params), hypers(20)
    whole, _ = backend.run(stage, backend_and_state(stage)[3], batch, noise, rates, config)
    for k in range(20):
        one = [{name: value[k : k + 1] for name, value in tree.items()} for tree in (batch, noise, rates)]
        state, _ = backend.run(stage, state, *one, config)
        exported = backend.export(state)
        back = backend.init(
            stage,
            params | exported["params"],
            trainable=names,
            **{key: exported[key] for key in ("m", "v", "count", "carry")},
        )
        assert_trees_equal(back, state)
        state = back
    for one, two in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
        close(one, two, 2e-5, 2e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_each_players_own_and_the_loss_the_second_players(stage):
    config, backend, params, _ = backend_and_state(stage, "float64")
    batch, noise = (pick(tree, 0, 0) for tree in batches(stage))
    carry = statistics() if stage == "cvae" else {}
    loss, grads = backend.gradients(stage, params, tuple(params), batch, noise, {"beta": 0.4}, carry, config)
    given = on_device(params), on_device(batch), on_device(noise), on_device(carry)
    wanted = [jax.value_and_grad(one)(given[0]) for one in player_losses(stage, {}, *given[1:], config)]
    assert loss == pytest.approx(float(wanted[-1][0]), rel=1e-12)
    for name, grad in grads.items():
        assert (grad is not None) == (name in trainable(stage, params)), name
        if grad is not None:
            close(grad, wanted[0 if name.startswith(RIVAL) else -1][1][name], message=name)
    assert backend.diagnose(stage, params, tuple(params), batch, noise, {"beta": 0.4}, carry, config) == ""


@pytest.mark.parametrize(
    ("stage", "name", "first"),
    [
        ("cvae", "cvae.encoder.norm1.shift", "cvae.encoder.norm1"),
        ("cvae", "cvae.encoder.logvar.bias", "cvae.encoder.logvar"),
        ("cvae", "discriminator.out.bias", "discriminator.logits"),
        ("cvae", "cvae.decoder.log_r", "cvae.r"),
        ("flow", "flow.graph.bias", "flow.nodes"),
        ("flow", "flow.query.bias", "flow.context"),
        ("flow", "flow.head.out.bias", "flow.velocity"),
    ],
)
def test_diagnose_names_the_first_thing_that_is_not_finite(stage, name, first):
    config, backend, params, _ = backend_and_state(stage)
    batch, noise = (pick(tree, 0, 0) for tree in batches(stage))
    carry = statistics() if stage == "cvae" else {}
    params[name] = params[name] * np.nan
    found = backend.diagnose(stage, params, trainable(stage, params), batch, noise, {"beta": 0.4}, carry, config)
    assert found == first


def model(graph=True):
    """Everything a trained flow model has, cells to use it on, and a Backend."""
    config = run_config()
    params = parameters(config, graph=graph) | statistics()
    rng = np.random.default_rng(5)
    x, tissue = rng.negative_binomial(0.7, 0.2, (C, G)).astype(float), np.arange(C) % 4
    condition = rng.normal(size=(C, P))
    return config, bridge.Backend("float64"), params, x, tissue, condition, network() if graph else {}


def test_a_flow_model_is_used_through_its_running_statistics():
    config, backend, params, x, tissue, _, _ = model()
    rng = np.random.default_rng(0)
    z, direction, library = rng.normal(size=(C, D)), rng.normal(size=(C, D)), 100 * rng.random(C)
    cvae = CVAE(select(params, "cvae"))
    wanted = cvae.encode(jnp.asarray(x), tissue, select(statistics(), "cvae.encoder"))
    for found, value in zip(backend.encode(params, x, tissue, config), wanted, strict=False):
        close(found, value)
    close(backend.decode(params, z, tissue, library, config), cvae.decode(jnp.asarray(z), tissue, jnp.asarray(library)))
    close(backend.dispersion(params, tissue, config), np.exp(params["cvae.decoder.log_r"]))
    h = 1e-6
    up, down = (backend.decode(params, z + s * h * direction, tissue, library, config) for s in (1, -1))
    found = backend.decode_jacobian_vector(params, z, direction, tissue, library, config)
    close(found, (up - down) / (2 * h), 1e-6, 1e-7)


@pytest.mark.parametrize("graph", [True, False])
def test_trajectories_and_velocities_are_those_of_raw_latents(graph):
    config, backend, params, _, _, condition, edges = model(graph)
    z, times = np.random.default_rng(0).normal(size=(C, D)), [0.1, 0.5, 0.8]
    params = {name: value for name, value in params.items() if name.startswith("flow.")}
    path = backend.trajectory(params, z, times, condition, edges, config, n_steps=30)
    assert path.shape == (3, C, D)
    np.testing.assert_array_equal(path[0], z)
    # The derivative of the path is the velocity, at its places and times.
    h = 1e-4
    near = backend.trajectory(params, path[1], [0.5, 0.5 + h], condition, edges, config, n_steps=1)[-1]
    back = backend.trajectory(params, path[1], [0.5, 0.5 - h], condition, edges, config, n_steps=1)[-1]
    velocity = backend.velocity(params, np.full(C, 0.5), path[1], condition, edges, config)
    close((near - back) / (2 * h), velocity, 1e-6, 1e-7)
    home = backend.trajectory(params, path[-1], times[::-1], condition, edges, config, n_steps=30)[-1]
    close(home, z, 1e-6, 1e-7)
    # In standardised latents: v / scale at (z - center) / scale.
    field = VectorField(select(params, "flow"))
    standard = (jnp.asarray(path[1]) - params["flow.center"]) / params["flow.scale"]
    wanted = field(jnp.asarray(0.5), standard, jnp.asarray(condition), field.nodes(on_device(edges)))
    close(velocity, params["flow.scale"] * np.asarray(wanted))


def test_the_endpoint_jacobian_agrees_with_central_differences():
    config, backend, params, _, _, condition, edges = model()
    z, times, h = np.random.default_rng(0).normal(size=(C, D)), [0.1, 0.5, 0.8], 1e-5
    found = backend.endpoint_jacobian(params, z, times, condition, edges, config, n_steps=4)
    for j in range(D):
        up, down = (
            backend.trajectory(params, z + s * h * np.eye(D)[j], times, condition, edges, config, n_steps=4)[-1]
            for s in (1, -1)
        )
        close(found[:, :, j], (up - down) / (2 * h), 1e-6, 1e-8)


def test_the_endpoint_gradient_agrees_with_central_differences_in_log_counts():
    config, backend, params, x, tissue, condition, edges = model()
    weights, times, h = np.random.default_rng(1).normal(size=G), [0.9, 0.2], 1e-5

    def score(log_counts):
        z, _ = backend.encode(params, np.expm1(log_counts), tissue, config)
        end = backend.trajectory(params, z, times, condition, edges, config, n_steps=3)[-1]
        return np.log1p(NORMALISED_TOTAL * backend.decode(params, end, tissue, np.ones(C), config)) @ weights

    found = backend.endpoint_gradient(params, x, tissue, times, condition, edges, weights, config, n_steps=3)
    assert found.shape == (C, G)
    for g in range(G):
        step = h * np.eye(G)[g]
        close(found[:, g], (score(np.log1p(x) + step) - score(np.log1p(x) - step)) / (2 * h), 1e-5, 1e-7)


def test_derivatives_at_the_end_do_not_depend_on_how_cells_are_grouped(monkeypatch):
    config, backend, params, x, tissue, condition, edges = model()
    whole = backend.endpoint_gradient(params, x, tissue, [0, 1], condition, edges, np.ones(G), config, n_steps=2)
    monkeypatch.setattr(bridge, "_CELLS", 3)
    bridge._endpoint_gradient.clear_cache()
    parts = backend.endpoint_gradient(params, x, tissue, [0, 1], condition, edges, np.ones(G), config, n_steps=2)
    bridge._endpoint_gradient.clear_cache()
    close(parts, whole)


def test_the_flow_model_refuses_what_does_not_fit():
    config, backend, params, x, tissue, condition, edges = model()
    z, times = np.zeros((C, D)), [0.0, 1.0]
    with pytest.raises(ValueError, match="tissue has indices from 0 to 5"):
        backend.encode(params, x, np.arange(C) % 6, config)
    with pytest.raises(ValueError, match=f"expects \\(n_cells, {G}\\)"):
        backend.encode(params, x[:, 1:], tissue, config)
    without = {name: value for name, value in params.items() if name not in statistics()}
    with pytest.raises(ValueError, match="no running statistics"):
        backend.encode(without, x, tissue, config)
    far = edges | {"target": np.full(E, G)}
    uses = (
        lambda graph, times, condition: backend.trajectory(params, z, times, condition, graph, config),
        lambda graph, times, condition: backend.endpoint_jacobian(params, z, times, condition, graph, config),
        lambda graph, times, condition: backend.endpoint_gradient(
            params, x, tissue, times, condition, graph, np.ones(G), config
        ),
    )
    for use in uses:
        with pytest.raises(ValueError, match=f"target has indices from {G}"):
            use(far, times, condition)
        with pytest.raises(ValueError, match="strictly"):
            use(edges, [0.0, 0.0], condition)
        with pytest.raises(ValueError, match="condition have shapes"):
            use(edges, times, condition[:, 1:])
        with pytest.raises(ValueError, match="the model has a network"):
            use({}, times, condition)
    with pytest.raises(ValueError, match="method is 'euler'"):
        backend.trajectory(params, z, times, condition, edges, config, method="euler")
    batch, noise = batches("flow")
    state = backend.init("flow", params, trainable=trainable("flow", params))
    with pytest.raises(ValueError, match="source has indices"):
        backend.run("flow", state, batch | {"source": batch["source"] - 1 - G}, noise, hypers(), config)
