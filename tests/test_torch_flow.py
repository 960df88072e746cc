"""The PyTorch twin's flow models against torch.nn, NumPy loops, SciPy's solver and finite differences."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg

torch = pytest.importorskip("torch")

from torch_flow_data import (  # noqa: E402
    UNITS,
    C,
    D,
    G,
    H,
    K,
    P,
    T,
    cvae_arrays,
    cvae_batch,
    flow_arrays,
    flow_batch,
    network,
    statistics_arrays,
    tensors,
)

from pf_core.config import ATTENTION_EPS  # noqa: E402
from pf_core.initial import select  # noqa: E402
from pf_torch.cvae import CVAE, ConditionalDecoder, ConditionalEncoder, batch_norm  # noqa: E402
from pf_torch.discriminator import Discriminator, adversary_loss, cross_entropy  # noqa: E402
from pf_torch.flow import GraphAttention, VectorField, flow_matching_loss, gatv2  # noqa: E402
from pf_torch.integrate import integrate  # noqa: E402
from pf_torch.layers import leaky_relu  # noqa: E402

F = torch.nn.functional
STATISTICS = ("norm1.mean", "norm1.var", "norm2.mean", "norm2.var")


def close(a, b, rtol=1e-12, atol=1e-13, name=""):
    a, b = (x.detach().numpy() if isinstance(x, torch.Tensor) else x for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=name)


def normal(*shape, seed=0):
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape))


# --- leaky relu -------------------------------------------------------------------------------------------------------


def test_leaky_relu_is_that_of_torch_and_has_the_slope_at_zero():
    x = torch.tensor([-2.0, -1e-30, -0.0, 0.0, 1e-30, 3.0], dtype=torch.float64, requires_grad=True)
    close(leaky_relu(x), F.leaky_relu(x, 0.2), rtol=0, atol=0)
    (slope,) = torch.autograd.grad(leaky_relu(x).sum(), x)
    assert slope.tolist() == [0.2, 0.2, 0.2, 0.2, 1.0, 1.0]
    _, forward = torch.func.jvp(leaky_relu, (x.detach(),), (torch.ones_like(x),))
    assert forward.tolist() == slope.tolist()


def test_leaky_relu_passes_nan_on():
    assert torch.isnan(leaky_relu(torch.tensor([torch.nan]))).all()


# --- batch norm -------------------------------------------------------------------------------------------------------


def norm_case():
    x, scale, shift = 3 * normal(C, H) + 5, 1 + 0.3 * normal(H, seed=1), normal(H, seed=2)
    peer = torch.nn.BatchNorm1d(H, eps=1e-5, momentum=0.1, dtype=torch.float64)
    with torch.no_grad():
        peer.weight.copy_(scale)
        peer.bias.copy_(shift)
        peer.running_mean.copy_(normal(H, seed=3))
        peer.running_var.copy_(normal(H, seed=4).exp())
    return x, scale, shift, peer.running_mean.clone(), peer.running_var.clone(), peer


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_is_that_of_torch_with_its_gradients(train):
    x, scale, shift, mean, var, peer = norm_case()
    leaves = [value.requires_grad_() for value in (x, scale, shift)]
    y, new_mean, new_var = batch_norm(*leaves, mean, var, train=train)
    peer.train(train)
    want = peer(x)
    close(y, want)
    close(new_mean, peer.running_mean)
    close(new_var, peer.running_var)
    direction = normal(C, H, seed=5)
    ours = torch.autograd.grad((y * direction).sum(), leaves)
    theirs = torch.autograd.grad((want * direction).sum(), [x, peer.weight, peer.bias])
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, rtol=1e-10)


def test_batch_norm_with_weights_is_that_of_the_cells_that_count():
    x, scale, shift, mean, var, _ = norm_case()
    keep = torch.arange(C) % 3 > 0
    y, new_mean, new_var = batch_norm(x, scale, shift, mean, var, weight=keep.double(), train=True)
    want = batch_norm(x[keep], scale, shift, mean, var, train=True)
    for ours, theirs in zip((y[keep], new_mean, new_var), want, strict=True):
        close(ours, theirs)


def test_weighted_running_statistics_are_those_of_numpy():
    x, scale, shift, mean, var, _ = norm_case()
    weight = np.random.default_rng(6).uniform(0.1, 2, C)
    _, new_mean, new_var = batch_norm(x, scale, shift, mean, var, weight=torch.tensor(weight), train=True)
    close(new_mean, 0.9 * mean.numpy() + 0.1 * np.average(x, axis=0, weights=weight))
    close(new_var, 0.9 * var.numpy() + 0.1 * np.diag(np.cov(x.numpy().T, aweights=weight, ddof=1)))


def test_weighted_batch_norm_gradient_matches_differences():
    x, scale, shift, mean, var, _ = norm_case()
    weight = torch.tensor(np.random.default_rng(6).uniform(0.1, 2, C))
    y = lambda *leaves: batch_norm(*leaves, mean, var, weight=weight, train=True)[0]
    assert torch.autograd.gradcheck(y, [value.requires_grad_() for value in (x, scale, shift)])


def test_running_statistics_carry_no_gradient_and_stay_in_evaluation():
    x, scale, shift, mean, var, _ = norm_case()
    mean.requires_grad_(), var.requires_grad_(), x.requires_grad_()
    for train in (True, False):
        y, *new = batch_norm(x, scale, shift, mean, var, train=train)
        assert not any(value.requires_grad for value in new)
        assert torch.autograd.grad(y.sum(), [mean, var], allow_unused=True) == (None, None)
    assert [torch.equal(a, b) for a, b in zip(new, (mean, var), strict=True)] == [True, True]


def test_batch_norm_of_one_cell_is_refused_in_training_only():
    x, *rest, _ = norm_case()
    with pytest.raises(ValueError, match="batch norm got 1 cells; at least 2"):
        batch_norm(x[:1], *rest, train=True)
    assert batch_norm(x[:1], *rest, train=False)[0].shape == (1, H)


# --- the conditional VAE ----------------------------------------------------------------------------------------------


def dense(params, name):
    """A layer of torch with these weights; theirs are (out, in)."""
    weight = params[f"{name}.weight"]
    layer = torch.nn.Linear(*weight.shape, bias=f"{name}.bias" in params, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight.T)
        if f"{name}.bias" in params:
            layer.bias.copy_(params[f"{name}.bias"])
    return layer


def peer_norm(params, statistics, name):
    layer = torch.nn.BatchNorm1d(H, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(params[f"{name}.scale"])
        layer.bias.copy_(params[f"{name}.shift"])
        layer.running_mean.copy_(statistics[f"{name}.mean"])
        layer.running_var.copy_(statistics[f"{name}.var"])
    return layer


def vae_case():
    params, statistics = tensors(select(cvae_arrays(), "cvae")), tensors(select(statistics_arrays(), "cvae.encoder"))
    return params, statistics, tensors(cvae_batch()[0]), tensors(cvae_batch()[1])


@pytest.mark.parametrize("train", [True, False])
def test_encoder_is_the_same_net_built_of_torch_layers(train):
    params, statistics, batch, _ = vae_case()
    params = select(params, "encoder")
    norms = [peer_norm(params, statistics, name).train(train) for name in ("norm1", "norm2")]
    act = torch.nn.LeakyReLU(0.2)
    trunk = torch.nn.Sequential(
        dense(params, "block1"), norms[0], act, dense(params, "block2"), norms[1], torch.nn.LeakyReLU(0.2)
    )
    code = F.one_hot(batch["tissue"].long(), T).double()
    h = trunk(torch.cat([torch.log1p(batch["counts"]), code], 1))
    z_mu, z_logvar, new = ConditionalEncoder(params)(batch["counts"], batch["tissue"], statistics, train=train)
    close(z_mu, dense(params, "mean")(h))
    close(z_logvar, dense(params, "logvar")(h))
    assert tuple(new) == STATISTICS
    for norm, peer in zip(("norm1", "norm2"), norms, strict=True):
        close(new[f"{norm}.mean"], peer.running_mean)
        close(new[f"{norm}.var"], peer.running_var)


def test_decoder_is_the_same_net_built_of_torch_layers():
    params, _, batch, noise = vae_case()
    params = select(params, "decoder")
    act = torch.nn.LeakyReLU(0.2)
    net = torch.nn.Sequential(dense(params, "block1"), act, dense(params, "block2"), act, dense(params, "mean"))
    code = F.one_hot(batch["tissue"].long(), T).double()
    want = batch["library"][:, None] * torch.softmax(net(torch.cat([noise["eps"], code], 1)), 1) + 1e-8
    close(ConditionalDecoder(params)(noise["eps"], batch["tissue"], batch["library"]), want)


def test_the_whole_model_encodes_samples_and_decodes():
    params, statistics, batch, noise = vae_case()
    model = CVAE(params)
    x, tissue, library, eps = batch["counts"], batch["tissue"], batch["library"], noise["eps"]
    mu, r, z_mu, _, z, new = model(x, tissue, library, eps, statistics, weight=batch["weight"], train=True)
    want = model.encode(x, tissue, statistics, weight=batch["weight"], train=True)
    close(z_mu, want[0], rtol=0)
    close(z, want[0] + torch.exp(want[1] / 2) * eps)
    close(mu, model.decode(z, tissue, library), rtol=0)
    close(r, params["decoder.log_r"].exp())
    assert r.shape == model.dispersion(tissue).shape == (G,)
    assert all(torch.equal(new[name], want[2][name]) for name in STATISTICS)
    assert not torch.equal(new["norm1.mean"], statistics["norm1.mean"])


def test_padding_cells_have_no_part_in_the_statistics_of_training():
    params, statistics, batch, _ = vae_case()
    model, weight = CVAE(params), (torch.arange(C) < C - 3).double()
    other = batch["counts"].clone()
    other[C - 3 :] = 1000.0
    encode = lambda x: model.encode(x, batch["tissue"], statistics, weight=weight, train=True)
    one, two = encode(batch["counts"]), encode(other)
    close(one[0][: C - 3], two[0][: C - 3], rtol=0)
    close(one[2]["norm2.var"], two[2]["norm2.var"], rtol=0)


def test_parameters_of_the_modules_have_the_canonical_names():
    params = cvae_arrays()
    assert {f"cvae.{name}" for name, _ in CVAE(select(params, "cvae")).named_parameters()} == {
        name for name in params if name.startswith("cvae.")
    }
    found = {f"discriminator.{name}" for name, _ in Discriminator(select(params, "discriminator")).named_parameters()}
    assert found == {name for name in params if name.startswith("discriminator.")}
    for graph in (True, False):
        params = flow_arrays(graph=graph)
        assert {f"flow.{name}" for name, _ in VectorField(select(params, "flow")).named_parameters()} == set(params)


def test_models_name_widths_that_do_not_fit():
    params, statistics, batch, noise = vae_case()
    model = CVAE(params)
    for counts in (batch["counts"][:, :-1], batch["counts"][0]):
        with pytest.raises(ValueError, match=rf"counts have shape .* expects \(n_cells, {G}\); align with"):
            model.encode(counts, batch["tissue"], statistics)
    with pytest.raises(ValueError, match="counts have shape"):
        model.encoder(torch.ones(C, G + T), batch["tissue"], statistics)
    with pytest.raises(ValueError, match=rf"latents have shape .* expects \(n_cells, {D}\)"):
        model.decode(noise["eps"][:, :-1], batch["tissue"], batch["library"])
    with pytest.raises(ValueError, match="latents have shape"):
        model.decoder(torch.ones(C, D + T), batch["tissue"], batch["library"])
    with pytest.raises(ValueError, match="batch norm got 1 cells"):
        model.encode(batch["counts"][:1], batch["tissue"][:1], statistics, train=True)


# --- discriminator ----------------------------------------------------------------------------------------------------


def test_discriminator_is_the_same_net_built_of_torch_layers():
    params, z = tensors(select(cvae_arrays(), "discriminator")), normal(C, D)
    act = torch.nn.LeakyReLU(0.2)
    net = torch.nn.Sequential(dense(params, "hidden1"), act, dense(params, "hidden2"), act, dense(params, "out"))
    close(Discriminator(params)(z), net(z))
    close(Discriminator(params)(z, dropout=0.3), net(z))  # no mask, no dropout


def test_dropout_multiplies_each_hidden_layer_by_its_own_mask():
    params, z = tensors(select(cvae_arrays(), "discriminator")), normal(C, D)
    keep1, keep2 = (normal(C, UNITS, seed=seed) > 0 for seed in (1, 2))
    h = F.leaky_relu(dense(params, "hidden1")(z), 0.2) * keep1 / 0.7
    h = F.leaky_relu(dense(params, "hidden2")(h), 0.2) * keep2 / 0.7
    close(Discriminator(params)(z, keep1.double(), keep2.double(), dropout=0.3), dense(params, "out")(h))


def labelled():
    logits = 3 * normal(C, T - 1)
    tissue, weight = torch.arange(C) % T, torch.tensor(np.random.default_rng(1).uniform(0, 2, C))
    return logits.requires_grad_(), tissue, weight


def test_cross_entropy_is_that_of_torch_over_the_cells_of_known_tissue():
    logits, tissue, weight = labelled()
    each = F.cross_entropy(logits, tissue - 1, ignore_index=-1, reduction="none")
    want = (weight * each).sum() / weight[tissue > 0].sum()
    close(cross_entropy(logits, tissue, weight), want)
    ours, theirs = (torch.autograd.grad(value, logits)[0] for value in (cross_entropy(logits, tissue, weight), want))
    close(ours, theirs)
    assert bool((ours[tissue == 0] == 0).all())


def test_adversary_is_minus_the_entropy_or_minus_the_cross_entropy():
    logits, tissue, weight = labelled()
    close(adversary_loss(logits, tissue, weight, kind="minimax"), -cross_entropy(logits, tissue, weight))
    entropy = torch.distributions.Categorical(logits=logits[tissue > 0]).entropy()
    known = weight[tissue > 0]
    close(adversary_loss(logits, tissue, weight, kind="entropy"), -(known * entropy).sum() / known.sum())
    assert torch.autograd.gradcheck(lambda x: adversary_loss(x, tissue, weight, kind="entropy"), logits)


def test_uniform_logits_are_the_least_of_the_entropy_form():
    _, tissue, weight = labelled()
    close(adversary_loss(torch.zeros(C, T - 1), tissue, weight.float(), kind="entropy"), -np.log(T - 1), rtol=1e-6)


@pytest.mark.parametrize("kind", ["entropy", "minimax"])
def test_without_a_cell_of_known_tissue_loss_and_gradient_are_zero(kind):
    logits, tissue, weight = labelled()
    for unknown, w in ((torch.zeros_like(tissue), weight), (tissue, torch.zeros_like(weight))):
        value = adversary_loss(logits, unknown, w, kind=kind)
        assert value.item() == 0
        assert bool((torch.autograd.grad(value, logits)[0] == 0).all())


def test_entropy_of_a_certain_discriminator_has_a_finite_gradient():
    logits = torch.tensor([[2000.0, 0.0, -2000.0]], requires_grad=True)
    value = adversary_loss(logits, torch.ones(1), torch.ones(1), kind="entropy")
    (grad,) = torch.autograd.grad(value, logits)
    assert value.item() == 0
    assert bool((grad == 0).all())


def test_discriminator_names_what_does_not_fit():
    params, (logits, tissue, weight) = tensors(select(cvae_arrays(), "discriminator")), labelled()
    with pytest.raises(ValueError, match="latents have shape"):
        Discriminator(params)(normal(C, D + 1))
    with pytest.raises(ValueError, match=r"dropout is 1\.0"):
        Discriminator(params)(normal(C, D), dropout=1.0)
    with pytest.raises(ValueError, match="kind is 'both'; 'entropy' or 'minimax' was wanted"):
        adversary_loss(logits, tissue, weight, kind="both")


# --- graph attention --------------------------------------------------------------------------------------------------


def attention_case(seed=0):
    rng = np.random.default_rng(seed)
    left, right, edge = (rng.standard_normal((n, K, 5)) for n in (G, G, 23))
    graph = network(seed)
    return left, right, rng.standard_normal((K, 5)), graph["source"], graph["target"], edge


def numpy_gatv2(left, right, attention, source, target, edge):
    out = np.zeros_like(left)
    for i in range(len(left)):
        into = np.flatnonzero(target == i)
        for k in range(left.shape[1]):
            scores = []
            for e in into:
                h = left[source[e], k] + right[i, k] + edge[e, k]
                scores.append(float(attention[k] @ np.where(h > 0, h, 0.2 * h)))
            shares = np.exp(np.array(scores)) / np.exp(np.array(scores)).sum()
            for e, share in zip(into, shares, strict=True):
                out[i, k] += share * left[source[e], k]
    return out


def as_tensors(arrays):
    return [torch.tensor(x) for x in arrays]


def test_graph_attention_is_the_loop_over_genes_heads_and_edges():
    case = attention_case()
    out = gatv2(*as_tensors(case))
    close(out, numpy_gatv2(*case))
    without = np.setdiff1d(np.arange(G), case[4])
    assert len(without) >= 2
    assert bool((out[without] == 0).all())


def test_graph_attention_gradient_matches_differences_in_both_modes():
    left, right, attention, source, target, edge = as_tensors(attention_case())
    leaves = [x.requires_grad_() for x in (left, right, attention, edge)]
    assert torch.autograd.gradcheck(
        lambda left, right, attention, edge: gatv2(left, right, attention, source, target, edge),
        leaves,
        check_forward_ad=True,
    )


def test_graph_attention_holds_for_scores_that_exponentials_do_not():
    left, right, attention, source, target, edge = as_tensors(attention_case())
    attention = (1e5 * attention).requires_grad_()
    out = gatv2(left, right, attention, source, target, edge)
    assert bool(torch.isfinite(out).all())
    assert bool(torch.isfinite(torch.autograd.grad(out.sum(), attention)[0]).all())


def test_an_edge_with_no_rival_passes_its_source_on():
    left, right, attention, edge = (normal(*shape) for shape in ((3, 1, 2), (3, 1, 2), (1, 2), (1, 1, 2)))
    out = gatv2(left, right, attention, torch.tensor([2]), torch.tensor([0]), edge)
    close(out[0], left[2] / (1 + ATTENTION_EPS), rtol=1e-15)


def numpy_graph(params, x, source, target, sign):
    """The layer in NumPy: transforms, self loops of sign 0, heads side by side."""
    heads = params["attention"].shape
    source, target = np.append(source, np.arange(len(x))), np.append(target, np.arange(len(x)))
    edge = np.append(sign, np.zeros(len(x)))[:, None] * params["edge.weight"]
    left = (x @ params["source.weight"]).reshape(-1, *heads)
    right = (x @ params["target.weight"] + params["target.bias"]).reshape(-1, *heads)
    out = numpy_gatv2(left, right, params["attention"], source, target, edge.reshape(-1, *heads))
    return out.reshape(len(x), -1) + params["bias"]


def test_the_layer_adds_self_loops_of_sign_zero():
    params, graph = select(flow_arrays(), "flow"), network()
    layer = GraphAttention(tensors(select(params, "graph")))
    x = params["genes"]
    out = layer(torch.tensor(x), *as_tensors(graph.values()))
    close(out, numpy_graph(select(params, "graph"), x, *graph.values()))
    reversed_ = layer(torch.tensor(x), *as_tensors([graph["target"], graph["source"], graph["sign"]]))
    flipped = layer(torch.tensor(x), *as_tensors([graph["source"], graph["target"], -graph["sign"]]))
    assert all(float((out - other).detach().abs().max()) > 1e-3 for other in (reversed_, flipped))


def test_a_network_without_edges_leaves_every_gene_to_itself():
    params = select(flow_arrays(), "flow")
    empty = [torch.zeros(0, dtype=torch.int32)] * 2 + [torch.zeros(0, dtype=torch.float64)]
    out = GraphAttention(tensors(select(params, "graph")))(torch.tensor(params["genes"]), *empty)
    close(out, params["genes"] @ params["graph.source.weight"] + params["graph.bias"])


# --- vector field -----------------------------------------------------------------------------------------------------


def silu(x):
    return x / (1 + np.exp(-x))


def numpy_field(params, times, z, condition, nodes):
    """Cell by cell."""
    layer = lambda x, name: x @ params[f"{name}.weight"] + params[f"{name}.bias"]
    out = []
    for s, cell, code in zip(times, z, condition, strict=True):
        q = layer(cell, "query")
        scores = np.array([q @ node / np.sqrt(len(q)) for node in nodes])
        shares = np.exp(scores) / np.exp(scores).sum()
        context = sum(share * node for share, node in zip(shares, nodes, strict=True))
        time = layer(silu(layer(np.array([s]), "time.hidden")), "time.out")
        h = np.concatenate([cell, context, time, layer(code, "condition")])
        out.append(layer(silu(layer(h, "head.hidden")), "head.out"))
    return np.array(out)


@pytest.mark.parametrize("graph", [True, False])
def test_vector_field_is_the_loop_over_cells(graph):
    params, batch = select(flow_arrays(graph=graph), "flow"), flow_batch()[0]
    field = VectorField(tensors(params))
    nodes = field.nodes(tensors(network()) if graph else {})
    if graph:
        want_nodes = numpy_graph(select(params, "graph"), params["genes"], *network().values())
    else:
        want_nodes = params["genes"] @ params["graph.linear.weight"] + params["graph.linear.bias"]
    close(nodes, want_nodes)
    times = np.linspace(0, 1, C)
    given = as_tensors([times, batch["z0"], batch["condition"]])
    close(field(*given, nodes), numpy_field(params, times, batch["z0"], batch["condition"], want_nodes))


def test_one_time_serves_all_cells():
    field, batch = VectorField(tensors(select(flow_arrays(), "flow"))), tensors(flow_batch()[0])
    nodes = field.nodes(tensors(network()))
    one = field(torch.tensor(0.3), batch["z0"], batch["condition"], nodes)
    close(one, field(torch.full((C,), 0.3, dtype=torch.float32), batch["z0"], batch["condition"], nodes), rtol=0)


@pytest.mark.parametrize("graph", [True, False])
def test_every_parameter_of_the_field_has_the_gradient_of_differences(graph):
    names, values = zip(*tensors(select(flow_arrays(graph=graph), "flow")).items(), strict=True)
    batch, edges = tensors(flow_batch()[0]), tensors(network())

    def velocity(*leaves):
        field = VectorField(dict(zip(names, leaves, strict=True)))
        return field(batch["start"], batch["z0"], batch["condition"], field.nodes(edges))[:3]

    leaves = [value.requires_grad_() for value in values]
    assert torch.autograd.gradcheck(velocity, leaves, fast_mode=True)
    grads = torch.autograd.grad(velocity(*leaves).square().sum(), leaves)
    assert all(float(grad.abs().max()) > 1e-6 for grad in grads)


def test_the_field_ignores_the_scaling_of_latents_that_travels_with_it():
    params, batch = tensors(select(flow_arrays(), "flow")), tensors(flow_batch()[0])
    given = batch["start"], batch["z0"], batch["condition"]
    with_scaling = params | {"center": torch.ones(D), "scale": torch.full((D,), 7.0)}
    one, two = (field(*given, field.nodes(tensors(network()))) for field in map(VectorField, (params, with_scaling)))
    assert torch.equal(one, two)


def test_the_field_names_what_does_not_fit():
    field, batch = VectorField(tensors(select(flow_arrays(), "flow"))), tensors(flow_batch()[0])
    with pytest.raises(ValueError, match="the graph lacks source, target, sign"):
        field.nodes({})
    nodes = field.nodes(tensors(network()))
    with pytest.raises(ValueError, match=rf"latents have shape .*; \(n_cells, {D}\) was wanted"):
        field(batch["start"], batch["z0"][:, 1:], batch["condition"], nodes)
    with pytest.raises(ValueError, match=rf"conditions have shape .*; \(n_cells, {P}\) was wanted"):
        field(batch["start"], batch["z0"], batch["condition"][:-1], nodes)


# --- flow matching ----------------------------------------------------------------------------------------------------


def test_flow_matching_is_the_loop_over_cells_and_dimensions():
    batch, noise = flow_batch()
    A = np.random.default_rng(3).standard_normal((D, D))
    total = 0.0
    for c in range(C):
        z0, z1, tau = batch["z0"][c], batch["z1"][c], noise["tau"][c]
        span = batch["stop"][c] - batch["start"][c]
        psi, s = (1 - tau) * z0 + tau * z1, batch["start"][c] + tau * span
        total += batch["weight"][c] * np.mean((span * (A @ psi + s) - (z1 - z0)) ** 2)
    given, tau = tensors(batch), torch.tensor(noise["tau"])
    velocity = lambda s, z: z @ torch.tensor(A).T + s[:, None]
    options = {name: given[name] for name in ("start", "stop", "weight")}
    close(flow_matching_loss(velocity, given["z0"], given["z1"], tau, **options), total / batch["weight"].sum())


def test_flow_matching_defaults_to_the_whole_unit_of_time_and_equal_cells():
    given, noise = (tensors(tree) for tree in flow_batch())
    velocity = lambda s, z: z * s[:, None]
    one = flow_matching_loss(velocity, given["z0"], given["z1"], noise["tau"])
    ones = torch.ones(C, dtype=torch.float64)
    two = flow_matching_loss(velocity, given["z0"], given["z1"], noise["tau"], start=0 * ones, stop=ones, weight=ones)
    close(one, two)


def test_the_velocity_of_the_pairs_themselves_has_no_loss():
    given, noise = (tensors(tree) for tree in flow_batch())
    straight = (given["z1"] - given["z0"]) / (given["stop"] - given["start"])[:, None]
    loss = flow_matching_loss(
        lambda s, z: straight, given["z0"], given["z1"], noise["tau"], start=given["start"], stop=given["stop"]
    )
    assert float(loss) < 1e-30


# --- integration ------------------------------------------------------------------------------------------------------

A = np.array([[-0.6, 2.0, 0.0], [-2.0, -0.6, 0.3], [0.1, 0.0, 0.4]])


def linear(s, z):
    return z @ torch.tensor(A, dtype=z.dtype).T


def twisting(s, z):
    """Not linear, and different at every time."""
    return torch.stack([torch.sin(3 * s + z[:, 1]), z[:, 0] * z[:, 2] - s, torch.cos(z[:, 0]) - z[:, 2] * s], 1)


def solved(z, times):
    """SciPy's answer, cell by cell."""
    out = np.empty((len(times), *z.shape))
    for c, cell in enumerate(z):
        rate = lambda s, y: twisting(torch.tensor(s), torch.tensor(y)[None])[0].numpy()
        found = scipy.integrate.solve_ivp(
            rate, (times[0], times[-1]), cell, t_eval=times, rtol=1e-12, atol=1e-12, method="DOP853"
        )
        out[:, c] = found.y.T
    return out


TIMES = {"rising": [0.0, 0.13, 0.5, 1.0], "falling": [1.0, 0.7, 0.0], "beyond": [-0.5, 1.5]}


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
def test_rk4_is_scipys_solution(times):
    z = normal(5, D)
    path = integrate(twisting, z, torch.tensor(times, dtype=torch.float64), n_steps=200)
    assert torch.equal(path[0], z)
    close(path, solved(z.numpy(), np.array(times)), rtol=1e-8, atol=1e-8)


def test_rk4_of_a_linear_field_is_the_exponential_of_the_matrix_and_so_is_its_derivative():
    z, times = normal(1, D), torch.tensor([0.2, 0.9], dtype=torch.float64)
    end = lambda z: integrate(linear, z, times, n_steps=400)[-1]
    want = scipy.linalg.expm(0.7 * A)
    close(end(z)[0], want @ z[0].numpy(), rtol=0, atol=1e-11)
    jacobian = torch.autograd.functional.jacobian(end, z)[0, :, 0]
    close(jacobian, want, rtol=0, atol=1e-11)


def test_the_error_of_rk4_falls_with_the_fourth_power_of_the_step():
    z, times = normal(5, D), torch.tensor([0.0, 1.0], dtype=torch.float64)
    want = torch.tensor(solved(z.numpy(), times.numpy())[-1])
    errors = [float((integrate(twisting, z, times, n_steps=n)[-1] - want).norm()) for n in (5, 10, 20, 40)]
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.all((slopes > 3.6) & (slopes < 4.4)), slopes


def test_one_rk4_step_is_the_classical_formula():
    z, h = normal(5, D).numpy(), 0.3
    f = lambda s, y: twisting(torch.tensor(s, dtype=torch.float64), torch.tensor(y)).numpy()
    k1 = f(0.1, z)
    k2 = f(0.1 + h / 2, z + h / 2 * k1)
    k3 = f(0.1 + h / 2, z + h / 2 * k2)
    k4 = f(0.1 + h, z + h * k3)
    path = integrate(twisting, torch.tensor(z), torch.tensor([0.1, 0.4], dtype=torch.float64), n_steps=1)
    close(path[1], z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4))


def test_the_way_back_ends_where_the_way_began():
    z, times = normal(5, D), torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    there = integrate(twisting, z, times, n_steps=50)
    back = integrate(twisting, there[-1], times.flip(0), n_steps=50)
    close(back, there.flip(0), rtol=1e-6, atol=1e-7)


def test_requested_times_in_between_are_on_the_same_path():
    z = normal(5, D)
    many = integrate(twisting, z, torch.linspace(0, 1, 5, dtype=torch.float64), n_steps=25)
    one = integrate(twisting, z, torch.tensor([0.0, 1.0], dtype=torch.float64), n_steps=100)
    close(many[-1], one[-1], rtol=1e-12)


def test_one_time_is_where_it_begins():
    z = normal(5, D)
    assert torch.equal(integrate(twisting, z, torch.tensor([0.3])), z[None])


def test_gradients_reach_what_the_velocity_is_made_of():
    z, times = normal(5, D), torch.tensor([0.0, 0.6], dtype=torch.float64)
    end = lambda z, W: integrate(lambda s, y: torch.tanh(y @ W) * (1 + s), z, times, n_steps=3)[-1]
    leaves = [z.requires_grad_(), normal(D, D, seed=1).requires_grad_()]
    assert torch.autograd.gradcheck(end, leaves, check_forward_ad=True)


def test_dopri5_is_rk4_to_its_tolerance_forward_and_backward_with_gradients():
    pytest.importorskip("torchdiffeq", reason="torchdiffeq is not installed")
    z = normal(5, D).requires_grad_()
    for given in TIMES.values():
        times = torch.tensor(given, dtype=torch.float64)
        fixed = integrate(twisting, z, times, n_steps=200)
        adaptive = integrate(twisting, z, times, method="dopri5", rtol=1e-9, atol=1e-9)
        close(adaptive, fixed, rtol=1e-6, atol=1e-6)
        ours, theirs = (torch.autograd.grad(path[-1].square().sum(), z)[0] for path in (fixed, adaptive))
        close(theirs, ours, rtol=1e-5, atol=1e-5)
    loose = integrate(twisting, z, times, method="dopri5", rtol=1e-2, atol=1e-2)
    assert float((loose - fixed).detach().abs().max()) > 1e-5  # the tolerances do arrive
    assert torch.equal(integrate(twisting, z, times[:1], method="dopri5"), z[None])


def test_dopri5_without_its_solver_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r'pip install "perturb-forecast\[flow\]"'):
        integrate(twisting, normal(5, D), torch.tensor([0.0, 1.0]), method="dopri5")


@pytest.mark.parametrize("times", [[], [0.0, 0.5, 0.5], [0.0, 1.0, 0.5], [0.0, float("nan")], [[0.0, 1.0]]])
def test_times_that_neither_rise_nor_fall_are_refused(times):
    with pytest.raises(ValueError, match="strictly rising or strictly falling"):
        integrate(twisting, normal(5, D), torch.tensor(times))


def test_integration_names_what_it_does_not_know():
    z, times = normal(5, D), torch.tensor([0.0, 1.0])
    with pytest.raises(ValueError, match="method is 'euler'; 'rk4' or 'dopri5' was wanted"):
        integrate(twisting, z, times, method="euler")
    with pytest.raises(ValueError, match="n_steps is 0; at least 1"):
        integrate(twisting, z, times, n_steps=0)
