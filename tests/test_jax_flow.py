"""Functions and modules of the flow system in JAX, against NumPy, Flax, Optax and SciPy."""

from __future__ import annotations

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.test_util import check_grads
from jax_flow_data import C, D, E, G, K, P, T, batches, network, parameters, pick, run_config, statistics
from scipy import stats
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from scipy.special import softmax

from pf_core.config import BATCH_NORM_EPS, LEAKY_SLOPE, MU_FLOOR
from pf_core.initial import select
from pf_jax import (
    CVAE,
    ConditionalDecoder,
    ConditionalEncoder,
    Discriminator,
    GraphAttention,
    VectorField,
    adversary_loss,
    batch_norm,
    cross_entropy,
    flow_matching_loss,
    gatv2,
    integrate,
    leaky_relu,
)
from pf_jax.coupling import entropic_plan

# JAX compiles for minutes here; in the fast tier the parity suite holds the same functions to the oracle.
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def rng(seed=0):
    return np.random.default_rng(seed)


def array(*shape, seed=0):
    return jnp.asarray(rng(seed).normal(size=shape))


def dense(params, name, x):
    return x @ params[f"{name}.weight"] + params.get(f"{name}.bias", 0.0)


def act(x):
    return np.where(x > 0, x, LEAKY_SLOPE * x)


def silu(x):
    return x / (1 + np.exp(-x))


def close(found, wanted, rtol=1e-11, atol=1e-13):
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=atol)


# --- leaky relu -------------------------------------------------------------------------------------------------------


def test_leaky_relu_has_derivative_0_2_at_zero_in_every_mode():
    x = jnp.asarray([-2.0, 0.0, 3.0])
    close(leaky_relu(x), [-0.4, 0.0, 3.0])
    wanted = [0.2, 0.2, 1.0]
    close(jax.grad(lambda x: leaky_relu(x).sum())(x), wanted)
    close(jax.jvp(leaky_relu, (x,), (jnp.ones(3),))[1], wanted)
    assert bool(jnp.isnan(leaky_relu(jnp.asarray(jnp.nan))))


# --- batch norm -------------------------------------------------------------------------------------------------------


def norm_inputs():
    return [array(C, 3, seed=1) * 2 + 5, array(3, seed=2), array(3, seed=3), array(3, seed=4), array(3, seed=5) ** 2]


def test_batch_norm_in_training_is_that_of_flax_but_for_the_unbiased_running_variance():
    x, scale, shift, mean, var = norm_inputs()
    layer = nnx.BatchNorm(3, momentum=0.9, epsilon=BATCH_NORM_EPS, use_fast_variance=False, rngs=nnx.Rngs(0))
    layer.scale, layer.bias = nnx.Param(scale), nnx.Param(shift)
    layer.mean, layer.var = nnx.BatchStat(mean), nnx.BatchStat(var)
    y, new_mean, new_var = batch_norm(x, scale, shift, mean, var, train=True)
    close(y, layer(x, use_running_average=False))
    close(new_mean, layer.mean[...])
    close(new_var, 0.9 * var + 0.1 * np.var(x, axis=0, ddof=1))


def test_batch_norm_in_evaluation_is_that_of_flax_and_keeps_the_running_statistics():
    x, scale, shift, mean, var = norm_inputs()
    layer = nnx.BatchNorm(3, epsilon=BATCH_NORM_EPS, use_running_average=True, rngs=nnx.Rngs(0))
    layer.scale, layer.bias = nnx.Param(scale), nnx.Param(shift)
    layer.mean, layer.var = nnx.BatchStat(mean), nnx.BatchStat(var)
    y, new_mean, new_var = batch_norm(x[:1], scale, shift, mean, var, train=False)
    close(y, layer(x[:1]))
    np.testing.assert_array_equal(new_mean, mean)
    np.testing.assert_array_equal(new_var, var)


def test_weighted_batch_norm_is_the_written_formula():
    x, scale, shift, mean, var = map(np.asarray, norm_inputs())
    w = rng(6).random(C)
    y, new_mean, new_var = batch_norm(
        *map(jnp.asarray, (x, scale, shift, mean, var)), weight=jnp.asarray(w), train=True
    )
    m = np.average(x, axis=0, weights=w)
    v = np.average((x - m) ** 2, axis=0, weights=w)
    n = w.sum() ** 2 / (w**2).sum()
    close(y, (x - m) / np.sqrt(v + BATCH_NORM_EPS) * scale + shift)
    close(new_mean, 0.9 * mean + 0.1 * m)
    close(new_var, 0.9 * var + 0.1 * v * n / (n - 1))


def test_cells_of_weight_zero_do_not_enter_the_statistics():
    x, *others = norm_inputs()
    w = jnp.asarray([1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    live = w > 0
    found = batch_norm(x.at[2].set(1e3), *others, weight=w, train=True)
    wanted = batch_norm(x[live], *others, train=True)
    close(found[0][live], wanted[0])
    close(found[1], wanted[1])
    close(found[2], wanted[2])


def test_batch_norm_is_differentiated_through_the_batch_and_not_through_running_statistics():
    x, scale, shift, mean, var = norm_inputs()
    up = array(C, 3, seed=7)

    def plain(x, scale, shift):
        m, v = x.mean(0), ((x - x.mean(0)) ** 2).mean(0)
        return (up * ((x - m) / jnp.sqrt(v + BATCH_NORM_EPS) * scale + shift)).sum()

    def ours(x, scale, shift, mean, var, train=True):
        return (up * batch_norm(x, scale, shift, mean, var, train=train)[0]).sum()

    found = jax.grad(ours, argnums=(0, 1, 2, 3, 4))(x, scale, shift, mean, var)
    for one, two in zip(found, jax.grad(plain, argnums=(0, 1, 2))(x, scale, shift), strict=False):
        close(one, two, rtol=1e-9, atol=1e-12)
    assert not any(np.any(leaf) for leaf in found[3:])
    assert not any(np.any(leaf) for leaf in jax.grad(ours, argnums=(3, 4))(x, scale, shift, mean, var, False))
    after = lambda x: sum(leaf.sum() for leaf in batch_norm(x, scale, shift, mean, var, train=True)[1:])
    assert not np.any(jax.grad(after)(x))
    w = jnp.asarray(rng(8).random(C))
    weighted = lambda x, scale: batch_norm(x, scale, shift, mean, var, weight=w, train=True)[0]
    check_grads(weighted, (x, scale), order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


def test_batch_norm_needs_two_cells_in_training_also_when_compiled():
    x, *others = norm_inputs()
    for function in (batch_norm, jax.jit(batch_norm, static_argnames="train")):
        with pytest.raises(ValueError, match="1 cells in training, at least 2"):
            function(x[:1], *others, train=True)


# --- the conditional VAE ----------------------------------------------------------------------------------------------


def numpy_norm(x, params, name, running, w, train):
    if train:
        m = np.average(x, axis=0, weights=w)
        v = np.average((x - m) ** 2, axis=0, weights=w)
        n = w.sum() ** 2 / (w**2).sum()
        new = {f"{name}.mean": 0.9 * running[f"{name}.mean"] + 0.1 * m}
        new[f"{name}.var"] = 0.9 * running[f"{name}.var"] + 0.1 * v * n / (n - 1)
    else:
        m, v = running[f"{name}.mean"], running[f"{name}.var"]
        new = {f"{name}.mean": m, f"{name}.var": v}
    return (x - m) / np.sqrt(v + BATCH_NORM_EPS) * params[f"{name}.scale"] + params[f"{name}.shift"], new


def numpy_encode(params, x, tissue, running, w, train):
    params, new = select(params, "cvae.encoder"), {}
    h = np.concatenate([np.log1p(x), np.eye(T)[tissue]], axis=1)
    for k in (1, 2):
        h, after = numpy_norm(dense(params, f"block{k}", h), params, f"norm{k}", running, w, train)
        h, new = act(h), new | after
    return dense(params, "mean", h), dense(params, "logvar", h), new


def numpy_decode(params, z, tissue, library):
    params = select(params, "cvae.decoder")
    h = np.concatenate([z, np.eye(T)[tissue]], axis=1)
    for k in (1, 2):
        h = act(dense(params, f"block{k}", h))
    return library[:, None] * softmax(dense(params, "mean", h), axis=1) + MU_FLOOR


@pytest.mark.parametrize("train", [True, False])
def test_the_conditional_vae_is_the_written_formula(train):
    params, running = parameters(run_config()), select(statistics(), "cvae.encoder")
    batch, noise = (pick(tree, 0, 0) for tree in batches("cvae"))
    x, tissue, library, w = (batch[name] for name in ("counts", "tissue", "library", "weight"))
    model = CVAE(select(params, "cvae"))
    mu, r, z_mu, z_logvar, z, new = model(
        jnp.asarray(x), tissue, jnp.asarray(library), noise["eps"], running, weight=jnp.asarray(w), train=train
    )
    m, lv, after = numpy_encode(params, x, tissue, running, w, train)
    sample = m + np.exp(lv / 2) * noise["eps"]
    assert new.keys() == after.keys() == running.keys()
    wanted = (numpy_decode(params, sample, tissue, library), np.exp(params["cvae.decoder.log_r"]), m, lv, sample)
    for one, two in zip((mu, r, z_mu, z_logvar, z), wanted, strict=True):
        close(one, two)
    for name, value in after.items():
        close(new[name], value)


def test_encoder_and_decoder_stand_alone():
    params, running = parameters(run_config()), select(statistics(), "cvae.encoder")
    x, tissue, z = jnp.asarray(rng().poisson(2.0, (C, G))), jnp.arange(C) % T, array(C, D)
    model = CVAE(select(params, "cvae"))
    alone = ConditionalEncoder(select(params, "cvae.encoder"))(x, tissue, running)
    for one, two in zip(jax.tree.leaves(alone), jax.tree.leaves(model.encode(x, tissue, running)), strict=True):
        np.testing.assert_array_equal(one, two)
    mu = ConditionalDecoder(select(params, "cvae.decoder"))(z, tissue, jnp.ones(C))
    np.testing.assert_array_equal(mu, model.decode(z, tissue, jnp.ones(C)))


def test_the_conditional_vae_refuses_what_does_not_fit_also_when_compiled():
    model, running = CVAE(select(parameters(run_config()), "cvae")), select(statistics(), "cvae.encoder")
    tissue = jnp.zeros(C, int)
    for wrap in (lambda function: function, jax.jit):
        for n in (G - 1, G + 1):
            with pytest.raises(ValueError, match=f"expects \\(n_cells, {G}\\)"):
                wrap(model.encode)(jnp.ones((C, n)), tissue, running)
        with pytest.raises(ValueError, match=f"expects \\(n_cells, {D}\\)"):
            wrap(model.decode)(jnp.ones((C, D + 1)), tissue, jnp.ones(C))
        with pytest.raises(ValueError, match="1 cells in training"):
            wrap(lambda x: model.encode(x, tissue[:1], running, train=True))(jnp.ones((1, G)))
        with pytest.raises(ValueError, match="genes and tissues together"):
            wrap(model.encoder)(jnp.ones((C, G + T)), tissue, running)


# --- discriminator ----------------------------------------------------------------------------------------------------


def numpy_logits(params, z, keeps=(1.0, 1.0), dropout=0.0):
    params, h = select(params, "discriminator"), z
    for k, keep in ((1, keeps[0]), (2, keeps[1])):
        h = act(dense(params, f"hidden{k}", h)) * keep / (1 - dropout)
    return dense(params, "out", h)


def test_the_discriminator_is_the_written_formula_with_and_without_dropout():
    params, z = parameters(run_config()), rng().normal(size=(C, D))
    keeps = [rng(k).integers(0, 2, (C, K)).astype(float) for k in (1, 2)]
    model = Discriminator(select(params, "discriminator"))
    close(model(jnp.asarray(z)), numpy_logits(params, z))
    close(model(jnp.asarray(z), dropout=0.4), numpy_logits(params, z))
    close(model(jnp.asarray(z), *map(jnp.asarray, keeps), dropout=0.4), numpy_logits(params, z, keeps, 0.4))


def test_the_discriminator_refuses_what_does_not_fit():
    model = Discriminator(select(parameters(run_config()), "discriminator"))
    with pytest.raises(ValueError, match="latents have shape"):
        model(jnp.ones((C, D + 1)))
    with pytest.raises(ValueError, match="keep2 has shape"):
        jax.jit(model)(jnp.ones((C, D)), jnp.ones((C, K)), jnp.ones((1, K)))
    with pytest.raises(ValueError, match=r"dropout is 1\.0"):
        model(jnp.ones((C, D)), dropout=1.0)


TISSUE = np.array([1, 0, 2, 3, 1, 0, 2])


def test_cross_entropy_is_that_of_optax_over_known_tissues():
    logits, w = 3 * array(C, 3), rng(1).random(C)
    known = TISSUE > 0
    wanted = optax.softmax_cross_entropy_with_integer_labels(logits[known], TISSUE[known] - 1)
    found = cross_entropy(logits, jnp.asarray(TISSUE), jnp.asarray(w))
    close(found, np.average(wanted, weights=w[known]))


def test_the_adversary_is_minus_the_entropy_or_minus_the_cross_entropy():
    logits, w = 3 * array(C, 3), jnp.asarray(rng(1).random(C))
    known = TISSUE > 0
    entropy = stats.entropy(softmax(np.asarray(logits), axis=1), axis=1)[known]
    tissue = jnp.asarray(TISSUE)
    close(adversary_loss(logits, tissue, w, kind="entropy"), -np.average(entropy, weights=w[known]))
    close(adversary_loss(logits, tissue, w, kind="minimax"), -cross_entropy(logits, tissue, w))
    with pytest.raises(ValueError, match="kind is 'both'"):
        adversary_loss(logits, tissue, w, kind="both")


@pytest.mark.parametrize(("tissue", "weight"), [(np.zeros(C, int), np.ones(C)), (TISSUE, np.zeros(C))])
def test_without_a_cell_of_known_tissue_the_losses_and_their_gradients_are_zero(tissue, weight):
    tissue, weight = jnp.asarray(tissue), jnp.asarray(weight)
    for loss in (
        lambda logits: cross_entropy(logits, tissue, weight),
        lambda logits: adversary_loss(logits, tissue, weight, kind="entropy"),
    ):
        value, grad = jax.value_and_grad(loss)(array(C, 3))
        assert float(value) == 0.0
        assert not np.any(grad)


def test_a_confident_discriminator_has_finite_losses_and_gradients():
    logits = jnp.asarray([[0.0, 1e4, -1e4]] * C)
    for kind in ("entropy", "minimax"):
        value, grad = jax.value_and_grad(lambda x, k=kind: adversary_loss(x, jnp.asarray(TISSUE), jnp.ones(C), kind=k))(
            logits
        )
        assert bool(jnp.isfinite(value))
        assert bool(jnp.isfinite(grad).all())


# --- graph attention --------------------------------------------------------------------------------------------------


def numpy_gatv2(left, right, attention, source, target, edge):
    n_genes, n_heads, h = left.shape
    out = np.zeros((n_genes, n_heads, h))
    for i in range(n_genes):
        into = [e for e in range(len(target)) if target[e] == i]
        for k in range(n_heads):
            scores = [attention[k] @ act(left[source[e], k] + right[i, k] + edge[e, k]) for e in into]
            for e, share in zip(into, softmax(scores) if into else [], strict=True):
                out[i, k] += share * left[source[e], k]
    return out


def gat_inputs(n_heads=2, h=3):
    edges = network()
    left, right, edge = array(G, n_heads, h, seed=1), array(G, n_heads, h, seed=2), array(E, n_heads, h, seed=3)
    return left, right, array(n_heads, h, seed=4), edges["source"], edges["target"], edge


def test_gatv2_is_a_plain_loop_over_genes_and_edges():
    inputs = gat_inputs()
    found = gatv2(*inputs)
    close(found, numpy_gatv2(*map(np.asarray, inputs)))
    assert not np.any(found[G - 1])  # no edge goes there


def test_gatv2_has_derivatives_of_both_modes_and_second_order():
    left, right, attention, source, target, edge = gat_inputs(h=2)
    function = lambda *given: (gatv2(*given[:3], source, target, given[3]) ** 2).sum()
    check_grads(function, (left, right, attention, edge), order=2, modes=("fwd", "rev"), atol=1e-4, rtol=1e-4)


def test_gatv2_survives_large_scores_in_float32():
    left, right, attention, source, target, edge = gat_inputs()
    inputs = [leaf.astype(jnp.float32) for leaf in (left, right, 1e4 * attention, edge)]
    value, grads = jax.value_and_grad(lambda *given: gatv2(*given[:3], source, target, given[3]).sum(), (0, 1, 2, 3))(
        *inputs
    )
    assert value.dtype == jnp.float32
    wanted = numpy_gatv2(
        *(np.asarray(leaf, float) for leaf in inputs[:3]), source, target, np.asarray(inputs[3], float)
    )
    assert float(value) == pytest.approx(wanted.sum(), rel=1e-4)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in grads)


def numpy_graph(params, x, edges):
    loops = np.arange(G)
    source, target = np.append(edges["source"], loops), np.append(edges["target"], loops)
    sign = np.append(edges["sign"], np.zeros(G))
    heads = lambda values: values.reshape(len(values), *params["attention"].shape)
    left, right = heads(dense(params, "source", x)), heads(dense(params, "target", x))
    edge = heads(sign[:, None] * params["edge.weight"])
    return numpy_gatv2(left, right, params["attention"], source, target, edge).reshape(G, -1) + params["bias"]


def test_graph_attention_adds_self_loops_of_sign_zero():
    params, x = select(parameters(run_config()), "flow.graph"), rng().normal(size=(G, 3))
    layer = GraphAttention(params)
    edges = network()
    close(
        layer(jnp.asarray(x), *(jnp.asarray(edges[name]) for name in ("source", "target", "sign"))),
        numpy_graph(params, x, edges),
    )
    none = jnp.zeros(0, jnp.int32)
    close(layer(jnp.asarray(x), none, none, jnp.zeros(0)), dense(params, "source", x) + params["bias"])
    with pytest.raises(ValueError, match="source, target and sign"):
        layer(jnp.asarray(x), none, none, jnp.zeros(1))


def test_a_reversed_edge_is_another_network():
    params, x, edges = select(parameters(run_config()), "flow.graph"), array(G, 3), network()
    layer = GraphAttention(params)
    there, back = (
        layer(x, edges["source"], edges["target"], edges["sign"]),
        layer(x, edges["target"], edges["source"], edges["sign"]),
    )
    assert float(jnp.abs(there - back).max()) > 1e-2


# --- vector field -----------------------------------------------------------------------------------------------------


def numpy_velocity(params, times, z, condition, edges):
    params = select(params, "flow")
    nodes = (
        numpy_graph(select(params, "graph"), params["genes"], edges)
        if edges
        else dense(params, "graph.linear", params["genes"])
    )
    scores = dense(params, "query", z) @ nodes.T / np.sqrt(nodes.shape[1])
    time = dense(params, "time.out", silu(dense(params, "time.hidden", times[:, None])))
    h = np.concatenate([z, softmax(scores, axis=1) @ nodes, time, dense(params, "condition", condition)], axis=1)
    return dense(params, "head.out", silu(dense(params, "head.hidden", h)))


@pytest.mark.parametrize("graph", [True, False])
def test_the_vector_field_is_the_written_formula(graph):
    params, edges = parameters(run_config(), graph=graph), network() if graph else {}
    times, z, condition = rng(1).random(C), rng(2).normal(size=(C, D)), rng(3).normal(size=(C, P))
    field = VectorField(select(params, "flow"))
    nodes = field.nodes({name: jnp.asarray(value) for name, value in edges.items()})
    found = field(jnp.asarray(times), jnp.asarray(z), jnp.asarray(condition), nodes)
    close(found, numpy_velocity(params, times, z, condition, edges))
    same = field(jnp.asarray(0.3), jnp.asarray(z), jnp.asarray(condition), nodes)
    close(same, field(jnp.full(C, 0.3), jnp.asarray(z), jnp.asarray(condition), nodes))


def test_the_vector_field_refuses_what_does_not_fit_also_when_compiled():
    with_graph, without = (VectorField(select(parameters(run_config(), graph=g), "flow")) for g in (True, False))
    with pytest.raises(ValueError, match="the model has a network"):
        with_graph.nodes({})
    nodes = without.nodes({})
    np.testing.assert_array_equal(without.nodes(network()), nodes)
    for wrap in (lambda function: function, jax.jit):
        for shapes in (
            ((C,), (C, D + 1), (C, P)),
            ((C,), (C, D), (C, P + 1)),
            ((C + 1,), (C, D), (C, P)),
            ((C,), (C, D), (P,)),
        ):
            with pytest.raises(ValueError, match="times, z and condition have shapes"):
                wrap(without)(*map(jnp.ones, shapes), nodes)


def test_the_flow_loss_is_the_written_formula():
    z0, z1 = array(C, D, seed=1), array(C, D, seed=2)
    tau, start, stop, w = (jnp.asarray(rng(k).random(C)) for k in (3, 4, 5, 6))
    velocity = lambda s, z: jnp.sin(z) * s[:, None]
    found = flow_matching_loss(velocity, z0, z1, tau, start=start, stop=stop, weight=w)
    psi = (1 - tau)[:, None] * z0 + tau[:, None] * z1
    error = (stop - start)[:, None] * np.sin(psi) * (start + tau * (stop - start))[:, None] - (z1 - z0)
    close(found, np.average((error**2).mean(1), weights=w))
    error = np.sin(psi) * tau[:, None] - (z1 - z0)
    close(flow_matching_loss(velocity, z0, z1, tau), (error**2).mean())


def test_the_flow_loss_is_zero_for_the_velocity_of_the_pairs():
    z0, shift = array(C, D), jnp.asarray([1.0, -2.0, 0.5])
    start, stop = jnp.asarray(rng(1).random(C)), 1.5 + jnp.asarray(rng(2).random(C))
    length = (stop - start)[:, None]
    loss = flow_matching_loss(
        lambda s, z: jnp.broadcast_to(shift, z.shape), z0, z0 + length * shift, jnp.full(C, 0.4), start=start, stop=stop
    )
    assert float(loss) < 1e-28


def test_the_flow_loss_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="z0, z1 and tau have shapes"):
        jax.jit(lambda z0, z1: flow_matching_loss(lambda s, z: z, z0, z1, jnp.ones(C)))(
            jnp.ones((C, D)), jnp.ones((C, 1))
        )


# --- trajectories -----------------------------------------------------------------------------------------------------

MATRIX = np.array([[-0.4, 1.1, 0.0], [-0.9, 0.2, 0.3], [0.5, 0.0, -0.7]])
METHODS = [
    "rk4",
    pytest.param(
        "dopri5",
        marks=pytest.mark.skipif(importlib.util.find_spec("diffrax") is None, reason="diffrax is not installed"),
    ),
]
SETTINGS = {"n_steps": 50, "rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("times", [[0.0, 0.3, 1.0], [1.0, 0.5, -0.2], [0.4]])
def test_a_linear_field_is_solved_by_the_matrix_exponential(method, times):
    z = array(C, D)
    found = integrate(lambda s, z: z @ MATRIX.T, z, jnp.asarray(times), method=method, **SETTINGS)
    for path, time in zip(found, times, strict=True):
        close(path, z @ expm(MATRIX * (time - times[0])).T, rtol=1e-7, atol=1e-8)
    np.testing.assert_array_equal(found[0], z)


def test_rk4_is_its_own_polynomial_of_a_linear_field():
    h = 0.3 / 7
    term, polynomial = np.eye(3), np.eye(3)
    for k in (1, 2, 3, 4):
        term = term @ MATRIX * h / k
        polynomial = polynomial + term
    z = array(C, D)
    found = integrate(lambda s, z: z @ MATRIX.T, z, jnp.asarray([0.2, 0.5]), n_steps=7)[-1]
    close(found, z @ np.linalg.matrix_power(polynomial, 7).T, rtol=1e-13)


def test_rk4_is_of_fourth_order_where_the_field_depends_on_time():
    z, times = array(C, D), jnp.asarray([0.1, 1.3])
    velocity = lambda s, z: jnp.sin(3.0 * s + z)
    exact = integrate(velocity, z, times, n_steps=640)[-1]
    errors = [float(jnp.abs(integrate(velocity, z, times, n_steps=n)[-1] - exact).max()) for n in (10, 20, 40)]
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(16, rel=0.1)


def field_and_cells(graph=True):
    params = parameters(run_config(), graph=graph)
    field = VectorField(select(params, "flow"))
    return params, field, field.nodes(network() if graph else {}), array(C, D, seed=2), array(C, P, seed=3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("times", [[0.0, 0.4, 1.0], [1.0, 0.2]])
def test_trajectories_of_the_vector_field_are_those_of_scipy(method, times):
    params, field, nodes, z, condition = field_and_cells()
    by_hand = lambda s, y: numpy_velocity(
        params, np.full(C, s), y.reshape(C, D), np.asarray(condition), network()
    ).ravel()
    wanted = solve_ivp(by_hand, (times[0], times[-1]), np.ravel(z), t_eval=times, rtol=1e-9, atol=1e-10)
    found = integrate(lambda s, z: field(s, z, condition, nodes), z, jnp.asarray(times), method=method, **SETTINGS)
    close(found, wanted.y.T.reshape(len(times), C, D), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_trajectories_are_differentiated_in_z_and_in_what_the_velocity_captures(method):
    z, times = array(C, D), jnp.asarray([0.0, 0.3, 1.0])

    def end(matrix, z):
        path = integrate(lambda s, z: z @ matrix.T, z, times, method=method, **SETTINGS)
        return (path[-1] ** 2).sum() + path[1].sum()

    by_matrix, by_z = jax.jit(jax.grad(end, (0, 1)))(jnp.asarray(MATRIX), z)
    last, middle = expm(MATRIX), expm(0.3 * MATRIX)
    close(by_z, 2 * np.asarray(z) @ last.T @ last + middle.sum(0), rtol=1e-6)
    value = lambda matrix: ((np.asarray(z) @ expm(matrix).T) ** 2).sum() + (np.asarray(z) @ expm(0.3 * matrix).T).sum()
    for i, j in np.ndindex(3, 3):
        step = np.zeros((3, 3))
        step[i, j] = 1e-5
        assert float(by_matrix[i, j]) == pytest.approx((value(MATRIX + step) - value(MATRIX - step)) / 2e-5, rel=1e-6)


def test_rk4_has_derivatives_of_both_modes_and_second_order():
    _, field, nodes, z, condition = field_and_cells(graph=False)
    times = jnp.asarray([0.0, 0.7])
    end = lambda z, condition, nodes: jnp.tanh(
        integrate(lambda s, z: field(s, z, condition, nodes), z, times, n_steps=2)[-1]
    ).sum()
    check_grads(jax.jit(end), (z, condition, nodes), order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


def test_trajectories_batch_over_conditions():
    _, field, nodes, z, _ = field_and_cells(graph=False)
    conditions, times = array(3, C, P, seed=9), jnp.asarray([0.0, 0.5, 1.0])
    end = lambda condition: integrate(lambda s, z: field(s, z, condition, nodes), z, times, n_steps=3)
    found = jax.vmap(end)(conditions)
    for one, condition in zip(found, conditions, strict=True):
        close(one, end(condition), rtol=1e-10)


def test_a_velocity_is_traced_and_compiled_once_whatever_the_times():
    traces = []

    @jax.jit
    def path(z, times):
        return integrate(lambda s, z: (traces.append(1), -z)[1], z, times, n_steps=3)

    for times in ([0.0, 0.2, 1.0], [0.0, 0.1, 0.2], [3.0, 2.0, 0.0]):
        path(array(C, D), jnp.asarray(times))
        n = len(traces)
    assert n == 4  # the stages of one step


@pytest.mark.parametrize("times", [[0.0, 0.0], [0.0, 1.0, 0.5], [0.0, np.nan], [], 1.0, [[0.0, 1.0]]])
def test_times_must_be_strictly_monotonic(times):
    with pytest.raises(ValueError, match="times"):
        integrate(lambda s, z: z, jnp.ones((2, 2)), jnp.asarray(times))


def test_integrate_refuses_unknown_methods_and_no_steps_also_when_compiled():
    for wrap in (lambda function: function, jax.jit):
        with pytest.raises(ValueError, match="method is 'euler'"):
            wrap(lambda z: integrate(lambda s, z: z, z, jnp.asarray([0.0, 1.0]), method="euler"))(jnp.ones((2, 2)))
        with pytest.raises(ValueError, match="n_steps is 0"):
            wrap(lambda z: integrate(lambda s, z: z, z, jnp.asarray([0.0, 1.0]), n_steps=0))(jnp.ones((2, 2)))


def test_what_needs_the_extra_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match=r"perturb-forecast\[flow\]"):
        integrate(lambda s, z: z, jnp.ones((2, 2)), jnp.asarray([0.0, 1.0]), method="dopri5")
    monkeypatch.setitem(sys.modules, "ott", None)
    with pytest.raises(ImportError, match=r"perturb-forecast\[flow\]"):
        entropic_plan(jnp.ones((2, 2)), jnp.ones((2, 2)), epsilon=0.1)


# --- coupling ---------------------------------------------------------------------------------------------------------

needs_ott = pytest.mark.skipif(importlib.util.find_spec("ott") is None, reason="ott-jax is not installed")


def numpy_plan(x, y, epsilon, unbalanced):
    cost = ((x[:, None] - y[None]) ** 2).sum(-1)
    kernel = np.exp(-cost / cost.mean() / epsilon)
    u, v = np.ones(len(x)), np.ones(len(y))
    tau = unbalanced / (unbalanced + epsilon) if unbalanced else 1.0
    for _ in range(20000):
        u = (1 / len(x) / (kernel @ v)) ** tau
        v = (1 / len(y) / (kernel.T @ u)) ** tau
    return u[:, None] * kernel * v


@needs_ott
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("epsilon", "unbalanced"), [(0.1, 0.0), (0.1, 1.0), (0.5, 0.1)])
def test_the_entropic_plan_is_the_scaling_of_its_kernel_in_float64_whatever_the_cells_are(epsilon, unbalanced, dtype):
    x, y = ((rng(k).normal(size=(n, D)) + 0.4 * (k > 1)).astype(dtype) for k, n in ((1, 13), (2, 17)))
    plan = entropic_plan(x, y, epsilon=epsilon, unbalanced=unbalanced)
    assert plan.dtype == "float64"
    wanted, tolerance = numpy_plan(x.astype("float64"), y.astype("float64"), epsilon, unbalanced), 1e-7
    np.testing.assert_allclose(plan, wanted, rtol=tolerance, atol=tolerance * wanted.max())
    if not unbalanced:
        np.testing.assert_allclose(plan.sum(0), 1 / 17, rtol=10 * tolerance)
        np.testing.assert_allclose(plan.sum(1), 1 / 13, rtol=10 * tolerance)


@needs_ott
def test_the_entropic_plan_of_coincident_cells_is_uniform_and_bad_input_is_refused():
    np.testing.assert_allclose(
        entropic_plan(jnp.ones((3, 2)), jnp.ones((5, 2)), epsilon=0.1), np.full((3, 5), 1 / 15), rtol=1e-9
    )
    x = jnp.ones((3, 2))
    for bad, settings in (
        ((x, jnp.ones((5, 3))), {"epsilon": 0.1}),
        ((x, jnp.ones((0, 2))), {"epsilon": 0.1}),
        ((x, x), {"epsilon": 0.0}),
        ((x, x), {"epsilon": 0.1, "unbalanced": -1.0}),
        ((x, x.at[0, 0].set(jnp.nan)), {"epsilon": 0.1}),
    ):
        with pytest.raises(ValueError, match=r"wanted|finite"):
            entropic_plan(*bad, **settings)
