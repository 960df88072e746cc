"""The PyTorch twin's flow steps and Backend against torch.optim on nets of torch layers, and finite differences."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch_flow_data import (  # noqa: E402
    UNITS,
    C,
    D,
    G,
    P,
    T,
    config,
    cvae_arrays,
    cvae_batch,
    flow_arrays,
    flow_batch,
    network,
    statistics_arrays,
    steps,
    tensors,
)

from pf_core.config import MU_FLOOR  # noqa: E402
from pf_core.initial import select  # noqa: E402
from pf_torch.bridge import Backend  # noqa: E402
from pf_torch.flow_steps import cvae_loss, cvae_step, discriminator_loss, flow_loss, flow_step  # noqa: E402
from pf_torch.steps import evaluate, init_state, run_steps  # noqa: E402

F = torch.nn.functional
TIMES = np.array([0.0, 0.3, 1.0])
JUDGE = ("hidden1", "hidden2", "out")  # layers of the discriminator


def close(a, b, rtol=1e-11, atol=1e-13, name=""):
    a, b = (x.detach().numpy() if isinstance(x, torch.Tensor) else x for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=name)


def micro(tree, n=1):
    return {name: torch.stack([value] * n) for name, value in tree.items()}


def cvae_case(dtype=torch.float64):
    batch, noise = cvae_batch()
    return tuple(tensors(tree, dtype) for tree in (cvae_arrays(), batch, noise, statistics_arrays()))


def start(params, carry, trainable=None, dtype="float64"):
    return init_state(params, trainable=params if trainable is None else trainable, carry=carry, dtype=dtype)


HYPER = {"lr": 0.01, "beta": 0.7}


# --- the alternating step against nets, losses and optimisers of torch -----------------------------------------------


class Peer(torch.nn.Module):
    """Both players of torch's own layers and losses, their weights (out, in)."""

    def __init__(self, params, statistics):
        super().__init__()
        dense = lambda name: self._dense(params, name)
        norms = []
        for name in ("cvae.encoder.norm1", "cvae.encoder.norm2"):
            norms.append(torch.nn.BatchNorm1d(len(params[f"{name}.scale"]), dtype=torch.float64))
            norms[-1].load_state_dict(
                {
                    "weight": params[f"{name}.scale"],
                    "bias": params[f"{name}.shift"],
                    "running_mean": statistics[f"{name}.mean"],
                    "running_var": statistics[f"{name}.var"],
                    "num_batches_tracked": torch.tensor(0),
                }
            )
        act = torch.nn.LeakyReLU(0.2)
        self.norms = norms
        self.trunk = torch.nn.Sequential(
            dense("cvae.encoder.block1"), norms[0], act, dense("cvae.encoder.block2"), norms[1], act
        )
        self.mean, self.logvar = dense("cvae.encoder.mean"), dense("cvae.encoder.logvar")
        self.decoder = torch.nn.Sequential(
            dense("cvae.decoder.block1"), act, dense("cvae.decoder.block2"), act, dense("cvae.decoder.mean")
        )
        self.log_r = torch.nn.Parameter(params["cvae.decoder.log_r"].clone())
        self.judge = torch.nn.ModuleList(dense(f"discriminator.{name}") for name in JUDGE)

    @staticmethod
    def _dense(params, name):
        weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
        layer = torch.nn.Linear(*weight.shape, bias=bias is not None, dtype=torch.float64)
        layer.load_state_dict({"weight": weight.T} | ({} if bias is None else {"bias": bias}))
        return layer

    def canonical(self):
        """Parameters and statistics under our names, weights (in, out)."""
        layers = {
            "cvae.encoder.block1": self.trunk[0],
            "cvae.encoder.block2": self.trunk[3],
            "cvae.encoder.mean": self.mean,
            "cvae.encoder.logvar": self.logvar,
            **{f"cvae.decoder.{name}": self.decoder[k] for k, name in ((0, "block1"), (2, "block2"), (4, "mean"))},
            **{f"discriminator.{name}": layer for name, layer in zip(JUDGE, self.judge, strict=True)},
        }
        out = {"cvae.decoder.log_r": self.log_r}
        for name, layer in layers.items():
            out[f"{name}.weight"] = layer.weight.T
            if layer.bias is not None:
                out[f"{name}.bias"] = layer.bias
        statistics = {}
        for number, norm in enumerate(self.norms, 1):
            name = f"cvae.encoder.norm{number}"
            out |= {f"{name}.scale": norm.weight, f"{name}.shift": norm.bias}
            statistics |= {f"{name}.mean": norm.running_mean, f"{name}.var": norm.running_var}
        return out, statistics

    def latents(self, batch, noise):
        code = F.one_hot(batch["tissue"].long(), T).double()
        h = self.trunk(torch.cat([torch.log1p(batch["counts"]), code], 1))
        z_mu, z_logvar = self.mean(h), self.logvar(h)
        return z_mu, z_logvar, z_mu + torch.exp(z_logvar / 2) * noise["eps"], code

    def logits(self, z, masks=None):
        for layer, mask in zip(self.judge[:2], masks or (None, None), strict=True):
            z = F.leaky_relu(layer(z), 0.2)
            z = z if mask is None else z * mask / 0.8
        return self.judge[2](z)

    def first(self, batch, noise):
        """The discriminator's loss; the running statistics stay as they are."""
        kept = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in self.norms]
        z = self.latents(batch, noise)[2].detach()
        for norm, (mean, var) in zip(self.norms, kept, strict=True):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
        logits = self.logits(z, (noise["keep1"], noise["keep2"]))
        return F.cross_entropy(logits, batch["tissue"].long() - 1, ignore_index=-1)

    def second(self, batch, noise, settings, beta):
        z_mu, z_logvar, z, code = self.latents(batch, noise)
        mu = batch["library"][:, None] * torch.softmax(self.decoder(torch.cat([z, code], 1)), 1) + 1e-8
        r = self.log_r.exp()
        likelihood = torch.distributions.NegativeBinomial(total_count=r, logits=mu.log() - r.log())
        nll = -likelihood.log_prob(batch["counts"]).sum(1).mean()
        q = torch.distributions.Normal(z_mu, torch.exp(z_logvar / 2))
        kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
        known = batch["tissue"] > 0
        logits = self.logits(z)[known]
        if settings.adversary.kind == "entropy":
            adversary = -torch.distributions.Categorical(logits=logits).entropy().mean()
        else:
            adversary = -F.cross_entropy(logits, batch["tissue"][known].long() - 1)
        return nll + beta * kl + settings.adversary.weight * adversary


def two_micro_batches():
    """Two different ones; all cells count the same, as torch's layers have no weights."""
    both = [cvae_batch(seed) for seed in (3, 4)]
    batches, noises = ([tensors(pair[k]) for pair in both] for k in (0, 1))
    for batch in batches:
        batch["weight"] = torch.ones(C, dtype=torch.float64)
    stack = lambda trees: {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}
    return batches, noises, stack(batches), stack(noises)


@pytest.mark.parametrize("kind", ["entropy", "minimax"])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_the_alternating_step_is_two_optimisers_of_torch_in_turn(kind, max_norm):
    settings = config(kind=kind, weight=0.7, max_norm=max_norm)
    params, _, _, carry = cvae_case()
    batches, noises, stacked, noise = two_micro_batches()
    peer = Peer(params, carry)
    players = list(peer.judge.parameters()), [p for name, p in peer.named_parameters() if not name.startswith("judge")]
    options = {"lr": HYPER["lr"], "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    optimisers = [torch.optim.AdamW(player, **options) for player in players]
    state = start(params, carry)
    for _ in range(7):
        state, metrics = cvae_step(state, stacked, noise, HYPER, config=settings)
        norms = []
        for player, optimiser in zip(players, optimisers, strict=True):
            optimiser.zero_grad()
            losses = [
                peer.first(*pair) if player is players[0] else peer.second(*pair, settings, HYPER["beta"])
                for pair in zip(batches, noises, strict=True)
            ]
            total = sum(losses) / 2
            for p, g in zip(player, torch.autograd.grad(total, player), strict=True):
                p.grad = g
            norms.append(torch.nn.utils.clip_grad_norm_(player, max_norm))
            optimiser.step()
        assert metrics["ok"]
        close(metrics["loss"], total, rtol=1e-9)
        close(metrics["grad_norm"], np.hypot(*norms), rtol=1e-8)
    want, statistics = peer.canonical()
    assert want.keys() == state.params.keys()
    for name, value in want.items():
        close(state.params[name], value, rtol=1e-7, atol=1e-9, name=name)
    for name, value in statistics.items():
        close(state.carry[name], value, rtol=1e-8, atol=1e-10, name=name)


# --- the two losses ---------------------------------------------------------------------------------------------------


def gradients_of(loss, params):
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    return dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values()), allow_unused=True), strict=True))


def test_each_player_has_gradients_in_its_own_parameters_only():
    params, batch, noise, carry = cvae_case()
    first = gradients_of(lambda p: discriminator_loss(p, batch, noise, carry, config=config())[0], params)
    second = gradients_of(lambda p: cvae_loss(p, batch, noise, carry, config=config(), beta=0.7)[0], params)
    for name in params:
        own, other = (first, second) if name.startswith("discriminator.") else (second, first)
        assert other[name] is None, name
        assert float(own[name].abs().max()) > 1e-8, name


@pytest.mark.parametrize("player", [1, 2])
def test_gradient_of_each_player_matches_differences(player):
    params, batch, noise, carry = cvae_case()
    names = [name for name in params if name.startswith("discriminator.") == (player == 1)]

    def loss(*leaves):
        given = params | dict(zip(names, leaves, strict=True))
        if player == 1:
            return discriminator_loss(given, batch, noise, carry, config=config())[0]
        return cvae_loss(given, batch, noise, carry, config=config(), beta=0.7)[0]

    leaves = [params[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True, check_forward_ad=True)


def test_losses_of_both_stages_have_hessian_vector_products():
    params, batch, noise, carry = cvae_case()
    flow, (pairs, tau) = tensors(flow_arrays()), map(tensors, flow_batch())
    for given, names, loss in (
        (params, "discriminator.", lambda p: discriminator_loss(p, batch, noise, carry, config=config())[0]),
        (params, "cvae.", lambda p: cvae_loss(p, batch, noise, carry, config=config(), beta=0.7)[0]),
        (flow, "flow.", lambda p: flow_loss(p, pairs, tau, config=config())[0]),
    ):
        own = {name: value for name, value in given.items() if name.startswith(names)}
        gradient = torch.func.grad(lambda own, given=given, loss=loss: loss(given | own))
        rng = np.random.default_rng(1)
        along = {name: torch.tensor(rng.standard_normal(value.shape)) for name, value in own.items()}
        _, product = torch.func.jvp(gradient, (own,), (along,))
        h = 1e-6
        shifted = [gradient({name: own[name] + k * h * along[name] for name in own}) for k in (1, -1)]
        for name in own:
            scale = 1 + float(product[name].abs().max())
            close(product[name], (shifted[0][name] - shifted[1][name]) / (2 * h), rtol=0, atol=1e-6 * scale, name=name)


def test_parts_and_running_statistics_carry_no_gradient_and_the_parts_make_up_the_loss():
    params, batch, noise, carry = cvae_case()
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    settings = config(weight=0.3)
    loss, (parts, new) = cvae_loss(leaves, batch, noise, carry, config=settings, beta=0.7)
    assert not any(value.requires_grad for value in (parts | new).values())
    assert parts.keys() == {"nll", "kl", "adversary"}
    assert new.keys() == carry.keys()
    close(loss, parts["nll"] + 0.7 * parts["kl"] + 0.3 * parts["adversary"])
    loss, (parts, same) = discriminator_loss(leaves, batch, noise, carry, config=settings)
    assert same is carry
    assert not any(value.requires_grad for value in parts.values())
    close(loss, parts["discriminator"])


def test_accuracy_is_the_share_of_known_cells_whose_tissue_is_the_largest_logit():
    params, batch, noise, carry = cvae_case()
    certain = {name: torch.zeros_like(value) for name, value in params.items() if name.startswith("discriminator.")}
    certain["discriminator.out.bias"] = torch.tensor([0.0, 5.0, 0.0], dtype=torch.float64)  # always tissue 2
    _, (parts, _) = discriminator_loss(params | certain, batch, noise, carry, config=config())
    w, tissue = batch["weight"], batch["tissue"]
    close(parts["accuracy"], w[tissue == 2].sum() / w[tissue > 0].sum())


def test_padding_changes_neither_loss_nor_statistics():
    params, batch, noise, carry = cvae_case()
    padding = batch["weight"] == 0
    other = dict(batch)
    other["counts"] = torch.where(padding[:, None], 77.0, batch["counts"])
    other["tissue"] = torch.where(padding, 1, batch["tissue"])
    for loss in (
        lambda b: cvae_loss(params, b, noise, carry, config=config(), beta=0.7),
        lambda b: discriminator_loss(params, b, noise, carry, config=config()),
    ):
        (one, (_, carry_1)), (two, (_, carry_2)) = loss(batch), loss(other)
        close(one, two, rtol=1e-14)
        for name in carry:
            close(carry_1[name], carry_2[name], rtol=1e-14)


def test_an_adversary_of_weight_zero_leaves_the_encoder_alone():
    params, batch, noise, carry = cvae_case()
    blind = {name: 3 * value if name.startswith("discriminator.") else value for name, value in params.items()}
    one, two = (
        gradients_of(lambda p: cvae_loss(p, batch, noise, carry, config=config(weight=0.0), beta=1.0)[0], given)
        for given in (params, blind)
    )
    name = "cvae.encoder.block1.weight"
    assert torch.equal(one[name], two[name])


# --- the step ---------------------------------------------------------------------------------------------------------


def test_running_statistics_pass_through_the_micro_batches():
    params, _, _, carry = cvae_case()
    batches, noises, stacked, noise = two_micro_batches()
    state, _ = cvae_step(start(params, carry), stacked, noise, HYPER, config=config())
    judge = {name: value for name, value in state.params.items() if name.startswith("discriminator.")}
    for batch, eps in zip(batches, noises, strict=True):
        _, (_, carry) = cvae_loss(params | judge, batch, eps, carry, config=config(), beta=0.7)
    for name, value in carry.items():
        close(state.carry[name], value, rtol=1e-14)


def test_the_encoder_meets_the_discriminator_as_just_updated():
    params, batch, noise, carry = cvae_case()
    state, metrics = cvae_step(start(params, carry), micro(batch), micro(noise), HYPER, config=config())
    judge = {name: value for name, value in state.params.items() if name.startswith("discriminator.")}
    after, before = (
        cvae_loss(given, batch, noise, carry, config=config(), beta=0.7)[0] for given in (params | judge, params)
    )
    close(metrics["loss"], after, rtol=1e-14)
    assert abs(float(after - before)) > 1e-6


def test_metrics_hold_both_players():
    params, batch, noise, carry = cvae_case()
    _, metrics = cvae_step(start(params, carry), micro(batch, 2), micro(noise, 2), HYPER, config=config())
    assert metrics["parts"].keys() == {"discriminator", "accuracy", "nll", "kl", "adversary"}
    first = gradients_of(lambda p: discriminator_loss(p, batch, noise, carry, config=config())[0], params)
    names = sorted(params)
    assert metrics["param_grad_norm"].shape == (len(names),)
    at = names.index("discriminator.out.weight")
    close(metrics["param_grad_norm"][at], first["discriminator.out.weight"].norm())
    close(metrics["grad_norm"], metrics["param_grad_norm"].norm())


@pytest.mark.parametrize("player", ["discriminator.", "cvae."])
def test_a_player_without_trained_names_is_left_out(player):
    params, batch, noise, carry = cvae_case()
    trainable = [name for name in params if name.startswith(player)]
    state, metrics = cvae_step(start(params, carry, trainable), micro(batch), micro(noise), HYPER, config=config())
    assert metrics["ok"]
    assert metrics["parts"].keys() == {"discriminator", "accuracy", "nll", "kl", "adversary"}
    assert metrics["param_grad_norm"].shape == (len(trainable),)
    assert state.count == 1
    moved = {name for name in trainable if not torch.equal(state.params[name], params[name])}
    assert moved == set(trainable)
    assert all(torch.equal(state.frozen[name], params[name]) for name in state.frozen)
    same = all(torch.equal(state.carry[name], carry[name]) for name in carry)
    assert same == (player == "discriminator.")


def test_a_frozen_encoder_is_not_decayed_by_the_discriminators_step():
    params, batch, noise, carry = cvae_case()
    settings = config(weight_decay=0.5)
    state, _ = cvae_step(start(params, carry), micro(batch), micro(noise), HYPER | {"lr": 0.0}, config=settings)
    assert all(torch.equal(state.params[name], params[name]) for name in params)


def spoiled_counts(batch, noise):
    batch["counts"][0, 0] = torch.nan


def spoiled_mask(batch, noise):  # reaches the discriminator alone
    noise["keep1"][1, 0] = torch.inf


def spoiled_weight(batch, noise):  # one cell that counts: finite losses, and a running variance that is not
    batch["weight"] = torch.zeros(C, dtype=torch.float64)
    batch["weight"][1] = 1.0


@pytest.mark.parametrize("spoil", [spoiled_counts, spoiled_mask, spoiled_weight])
def test_one_bad_value_refuses_both_updates(spoil):
    params, batch, noise, carry = cvae_case()
    state = start(params, carry)
    spoil(batch, noise)
    after, metrics = cvae_step(state, micro(batch), micro(noise), HYPER, config=config())
    assert not metrics["ok"]
    assert after is state


def test_a_step_does_not_change_the_state_it_was_given():
    params, batch, noise, carry = cvae_case()
    state = start(params, carry)
    kept = [{name: value.clone() for name, value in tree.items()} for tree in (state.params, state.m, state.carry)]
    cvae_step(state, micro(batch), micro(noise), HYPER, config=config())
    for tree, copy in zip((state.params, state.m, state.carry), kept, strict=True):
        assert all(torch.equal(tree[name], copy[name]) for name in tree)


def test_moments_and_parameters_keep_one_order():
    params, batch, noise, carry = cvae_case()
    state = start(params, carry)
    after, _ = cvae_step(state, micro(batch), micro(noise), HYPER, config=config())
    assert list(after.params) == list(after.m) == list(after.v) == list(state.params)


@pytest.mark.parametrize("graph", [True, False])
def test_flow_step_is_gradient_clip_and_adamw(graph):
    settings = config()
    params = tensors(flow_arrays(graph=graph))
    batch, noise = (tensors(tree) for tree in flow_batch(graph=graph))
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    loss, (parts, carry) = flow_loss(leaves, batch, noise, config=settings)
    assert carry == {}
    for leaf, grad in zip(leaves.values(), torch.autograd.grad(loss, list(leaves.values())), strict=True):
        leaf.grad = grad
    norm = torch.nn.utils.clip_grad_norm_(list(leaves.values()), 0.5)
    torch.optim.AdamW(leaves.values(), lr=0.01, weight_decay=0.01).step()
    state, metrics = flow_step(start(params, {}), micro(batch), micro(noise), HYPER, config=settings)
    close(metrics["loss"], loss)
    close(metrics["grad_norm"], norm)
    for name, leaf in leaves.items():
        close(state.params[name], leaf, rtol=1e-10, name=name)
    w, way = batch["weight"].numpy(), (batch["z1"] - batch["z0"]).numpy()
    close(parts["displacement"], np.average((way**2).mean(1), weights=w))


def test_run_steps_is_the_loop_over_steps():
    params, batch, noise, carry = cvae_case()
    state = start(params, carry)
    for _ in range(3):
        state, metrics = cvae_step(state, micro(batch), micro(noise), HYPER, config=config())
    data = [{name: torch.stack([value] * 3) for name, value in micro(tree).items()} for tree in (batch, noise)]
    hypers = {"lr": np.full(3, 0.01), "beta": np.full(3, 0.7)}
    run, collected = run_steps("cvae", start(params, carry), *data, hypers, config=config())
    assert all(torch.equal(run.params[name], state.params[name]) for name in params)
    assert all(torch.equal(run.carry[name], state.carry[name]) for name in carry)
    assert collected["parts"]["accuracy"].shape == collected["loss"].shape == (3,)
    assert torch.equal(collected["loss"][-1], metrics["loss"])


@pytest.mark.slow
def test_compiled_steps_are_the_same_steps():
    params, batch, noise, carry = cvae_case()
    data = [micro(micro(tree)) for tree in (batch, noise)]
    hypers = {"lr": np.full(1, 0.01), "beta": np.full(1, 0.7)}
    flow, pairs = tensors(flow_arrays()), [micro(micro(tensors(tree))) for tree in flow_batch()]
    for stage, given, carried, what in (("cvae", params, carry, data), ("flow", flow, {}, pairs)):
        plain, compiled = (
            run_steps(stage, start(given, carried), *what, hypers, config=config(), compile=flag)[0]
            for flag in (False, True)
        )
        for name in given:
            close(compiled.params[name], plain.params[name], rtol=1e-6, atol=1e-8, name=name)


def test_evaluation_uses_the_running_statistics_and_no_dropout_and_changes_nothing():
    params, batch, noise, carry = cvae_case()
    state = start(params, carry)
    found = evaluate("cvae", state, batch, noise, config=config(), beta=0.7)
    assert found.keys() == {"loss", "discriminator", "accuracy", "nll", "kl", "adversary"}
    peer = Peer(params, carry).eval()
    z_mu, z_logvar, z, _ = peer.latents(batch, noise)
    each = F.cross_entropy(peer.logits(z), batch["tissue"].long() - 1, ignore_index=-1, reduction="none")
    w = batch["weight"]
    close(found["discriminator"], (w * each).sum() / w[batch["tissue"] > 0].sum())
    kl = 0.5 * (z_mu**2 + z_logvar.exp() - 1 - z_logvar).sum(1)
    close(found["kl"], (w * kl).sum() / w.sum())
    masks = noise | {"keep1": 0 * noise["keep1"]}
    again = evaluate("cvae", state, batch, masks, config=config(), beta=0.7)
    assert all(torch.equal(found[name], again[name]) for name in found)


# --- trainings through the Backend ------------------------------------------------------------------------------------


def trained(dtype="float64", n=150):
    """Both stages, the second on the standardised latents of the first."""
    backend, settings = Backend(dtype), config(dtype=dtype, weight_decay=0.0, max_norm=10.0)
    arrays = cvae_arrays()
    batch, noise = cvae_batch()
    batch["weight"] = np.ones(C)
    hypers = {"lr": np.full(n, 0.01), "beta": np.full(n, 0.1)}
    state = backend.init("cvae", arrays, trainable=tuple(arrays), carry=statistics_arrays())
    state, first = backend.run("cvae", state, steps(batch, n), steps(noise, n), hypers, settings)
    done = backend.export(state)
    params = done["params"] | done["carry"]
    z, _ = backend.encode(params, batch["counts"], batch["tissue"], settings)
    center, scale = z.mean(0), z.std(0)
    pairs, tau = flow_batch()
    z = (z - center) / scale
    pairs |= {"z0": z, "z1": np.roll(z, 1, 0), "weight": np.ones(C)}
    fixed = {"flow.center": center, "flow.scale": scale}
    flow = backend.init("flow", flow_arrays() | fixed, trainable=tuple(flow_arrays()))
    flow, second = backend.run("flow", flow, steps(pairs, n), steps(tau, n), hypers, settings)
    return backend, settings, params | backend.export(flow)["params"] | fixed, first, second


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_training_lowers_the_loss_of_both_stages(dtype):
    _, _, params, first, second = trained(dtype)
    assert first["ok"].all()
    assert second["ok"].all()
    assert first["parts"]["nll"][-1] < 0.9 * first["parts"]["nll"][0]
    assert second["loss"][-1] < 0.5 * second["loss"][0]
    assert second["loss"][-1] < second["parts"]["displacement"][-1]  # better than staying where one is
    assert {value.dtype.name for value in params.values()} == {dtype}


def test_a_discriminator_alone_learns_the_tissue_and_an_encoder_alone_hides_it():
    backend, n = Backend("float64"), 200
    settings = config(weight_decay=0.0, max_norm=10.0, weight=50.0, dropout=0.0)
    arrays, (batch, noise) = cvae_arrays(), cvae_batch()
    batch["weight"] = np.ones(C)
    hypers = {"lr": np.full(n, 0.02), "beta": np.full(n, 0.0)}
    state = {"params": {}, "carry": statistics_arrays()}
    parts = []
    for player in ("discriminator.", "cvae."):
        params = arrays | state["params"]
        names = tuple(name for name in params if name.startswith(player))
        opened = backend.init("cvae", params, trainable=names, carry=state["carry"])
        opened, metrics = backend.run("cvae", opened, steps(batch, n), steps(noise, n), hypers, settings)
        state = backend.export(opened)
        parts.append(metrics["parts"])
    assert parts[0]["discriminator"][-1] < 0.3 * parts[0]["discriminator"][0]
    assert parts[0]["accuracy"][-1] > 0.9
    assert parts[1]["adversary"][-1] < parts[1]["adversary"][0] - 0.3
    assert parts[1]["adversary"][-1] >= -np.log(T - 1) - 1e-12


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("stage", ["cvae", "flow"])
def test_a_run_that_is_exported_and_resumed_continues_bit_for_bit(stage, dtype):
    backend, settings = Backend(dtype), config(dtype=dtype)
    params = cvae_arrays() if stage == "cvae" else flow_arrays()
    carry = statistics_arrays() if stage == "cvae" else {}
    batch, noise = cvae_batch() if stage == "cvae" else flow_batch()
    run = lambda state, n: backend.run(
        stage, state, steps(batch, n, 2), steps(noise, n, 2), {"lr": np.full(n, 0.01), "beta": np.ones(n)}, settings
    )[0]
    whole = backend.export(run(backend.init(stage, params, trainable=tuple(params), carry=carry), 5))
    half = backend.export(run(backend.init(stage, params, trainable=tuple(params), carry=carry), 2))
    again = backend.init(
        stage,
        half["params"],
        trainable=tuple(params),
        m=half["m"],
        v=half["v"],
        count=half["count"],
        carry=half["carry"],
    )
    resumed = backend.export(run(again, 3))
    assert whole["count"] == resumed["count"] == 5
    for tree in ("params", "m", "v", "carry"):
        assert whole[tree].keys() == resumed[tree].keys()
        for name, value in whole[tree].items():
            np.testing.assert_array_equal(resumed[tree][name], value, err_msg=name)
            assert value.dtype == dtype


def test_gradients_are_those_of_the_player_who_trains_the_parameter():
    arrays, (batch, noise), settings = cvae_arrays(), cvae_batch(), config()
    loss, grads = Backend("float64").gradients(
        "cvae", arrays, tuple(arrays), batch, noise, {"beta": 0.7}, statistics_arrays(), settings
    )
    params, batch, noise, carry = cvae_case()
    first = gradients_of(lambda p: discriminator_loss(p, batch, noise, carry, config=settings)[0], params)
    second = gradients_of(lambda p: cvae_loss(p, batch, noise, carry, config=settings, beta=0.7)[0], params)
    close(loss, cvae_loss(params, batch, noise, carry, config=settings, beta=0.7)[0])
    assert grads.keys() == set(params)
    for name, grad in grads.items():
        close(grad, (first if name.startswith("discriminator.") else second)[name], name=name)


def test_diagnose_names_what_is_first_not_finite():
    backend, arrays, (batch, noise) = Backend("float64"), cvae_arrays(), cvae_batch()
    diagnose = lambda params, noise: backend.diagnose(
        "cvae", params, tuple(params), batch, noise, {"beta": 1.0}, statistics_arrays(), config()
    )
    assert diagnose(arrays, noise) == ""
    assert diagnose(arrays, noise | {"keep1": np.full((C, UNITS), np.inf)}) == "discriminator.logits"
    spoiled = arrays | {"cvae.encoder.norm2.scale": np.full(7, np.nan)}
    assert diagnose(spoiled, noise) == "cvae.encoder.norm2"
    pairs, tau = flow_batch()
    params = flow_arrays() | {"flow.query.bias": np.full(10, np.nan)}
    found = backend.diagnose("flow", params, tuple(params), pairs, tau, {"beta": 1.0}, {}, config())
    assert found == "flow.context"


# --- the trained model ------------------------------------------------------------------------------------------------


def model():
    """Parameters of both parts off their initial values, with latents that are far from standardised."""
    params = cvae_arrays() | statistics_arrays() | flow_arrays()
    return params | {"flow.center": np.array([1.0, -2.0, 0.5]), "flow.scale": np.array([0.5, 3.0, 1.7])}


CONDITION = flow_batch()[0]["condition"]


def test_encode_decode_and_dispersion_are_those_of_the_conditional_model_in_evaluation():
    backend, settings, params = Backend("float64"), config(), model()
    batch, noise = cvae_batch()
    peer = Peer(tensors(params), tensors(statistics_arrays())).eval()
    z_mu, z_logvar, _, code = peer.latents(tensors(batch), tensors(noise))
    found = backend.encode(params, batch["counts"], batch["tissue"], settings)
    close(found[0], z_mu)
    close(found[1], z_logvar)
    mu = backend.decode(params, found[0], batch["tissue"], batch["library"], settings)
    profile = torch.softmax(peer.decoder(torch.cat([z_mu, code], 1)), 1)
    close(mu, torch.tensor(batch["library"])[:, None] * profile + MU_FLOOR)
    close(backend.dispersion(params, batch["tissue"], settings), peer.log_r.exp())
    direction = noise["eps"]
    given = batch["tissue"], batch["library"], settings
    slope = backend.decode_jacobian_vector(params, found[0], direction, *given)
    h = 1e-6
    ends = [backend.decode(params, found[0] + k * h * direction, *given) for k in (1, -1)]
    close(slope, (ends[0] - ends[1]) / (2 * h), rtol=0, atol=1e-7)


def test_velocity_is_the_derivative_of_the_trajectory_and_both_are_in_latents_as_they_are():
    backend, settings, params = Backend("float64"), config(), model()
    z, graph = flow_batch()[0]["z0"], network()
    h = 1e-4
    path = backend.trajectory(params, z, np.array([0.3, 0.3 + h, 0.3 + 2 * h]), CONDITION, graph, settings)
    np.testing.assert_array_equal(path[0], z)
    speed = backend.velocity(params, np.array(0.3 + h), path[1], CONDITION, graph, settings)
    close(speed, (path[2] - path[0]) / (2 * h), rtol=0, atol=1e-7)
    each = backend.velocity(params, np.full(C, 0.3 + h), path[1], CONDITION, graph, settings)
    close(each, speed, rtol=1e-14)
    other = params | {"flow.center": np.zeros(D), "flow.scale": np.ones(D)}
    standard = backend.velocity(
        other, np.array(0.3), (z - params["flow.center"]) / params["flow.scale"], CONDITION, graph, settings
    )
    speed = backend.velocity(params, np.array(0.3), z, CONDITION, graph, settings)
    close(speed, params["flow.scale"] * standard)


def test_trajectories_there_and_back_by_both_methods():
    pytest.importorskip("torchdiffeq", reason="torchdiffeq is not installed")
    backend, settings, params = Backend("float64"), config(), model()
    z, graph = flow_batch()[0]["z0"], network()
    there = backend.trajectory(params, z, TIMES, CONDITION, graph, settings)
    back = backend.trajectory(params, there[-1], TIMES[::-1].copy(), CONDITION, graph, settings)
    close(back[-1], z, rtol=0, atol=1e-4)
    adaptive = backend.trajectory(params, z, TIMES, CONDITION, graph, settings, method="dopri5", rtol=1e-9, atol=1e-9)
    close(adaptive, there, rtol=0, atol=1e-5)


@pytest.mark.parametrize("graph", [True, False])
def test_endpoint_jacobian_is_that_of_autograd_and_of_differences(graph):
    backend, settings = Backend("float64"), config()
    params = {name: value for name, value in model().items() if not name.startswith("flow.graph")}
    params |= {name: value for name, value in flow_arrays(graph=graph).items() if name.startswith("flow.graph")}
    z, edges = flow_batch()[0]["z0"], network() if graph else {}
    found = backend.endpoint_jacobian(params, z, TIMES, CONDITION, edges, settings, n_steps=3)
    assert found.shape == (C, D, D)
    end = lambda z: backend.trajectory(params, z, TIMES, CONDITION, edges, settings, n_steps=3)[-1]
    h = 1e-6
    for j in range(D):
        unit = h * np.eye(D)[j]
        close(found[:, :, j], (end(z + unit) - end(z - unit)) / (2 * h), rtol=0, atol=1e-7)
    flow = backend._flow(params, CONDITION, edges)
    path = lambda z: flow.path(z, torch.tensor(TIMES), n_steps=3)[-1]
    whole = torch.autograd.functional.jacobian(path, torch.tensor(z))
    for c in range(C):
        close(found[c], whole[c, :, c], rtol=1e-10)
    whole[range(C), :, range(C)] = 0.0
    assert float(whole.abs().max()) == 0  # no cell has an influence on another


def test_endpoint_gradient_matches_differences_in_log1p_counts():
    backend, settings, params = Backend("float64"), config(), model()
    batch, graph = cvae_batch()[0], network()
    weights = np.random.default_rng(5).standard_normal(G)
    found = backend.endpoint_gradient(
        params, batch["counts"], batch["tissue"], TIMES, CONDITION, graph, weights, settings, n_steps=3
    )

    def score(log_counts):
        z, _ = backend.encode(params, np.expm1(log_counts), batch["tissue"], settings)
        end = backend.trajectory(params, z, TIMES, CONDITION, graph, settings, n_steps=3)[-1]
        mu = backend.decode(params, end, batch["tissue"], np.ones(C), settings)
        return np.log1p(1e4 * mu) @ weights

    u, h = np.log1p(batch["counts"]), 1e-5
    differences = np.stack(
        [(score(u + h * np.eye(G)[g]) - score(u - h * np.eye(G)[g])) / (2 * h) for g in range(G)], axis=1
    )
    close(found, differences, rtol=0, atol=1e-6)
    assert np.abs(found).max() > 1e-2


def test_what_is_missing_or_beyond_its_table_is_named():
    backend, settings, params = Backend("float64"), config(), model()
    (batch, _), graph, z = cvae_batch(), network(), flow_batch()[0]["z0"]
    with pytest.raises(ValueError, match=r"params lack the running statistics cvae\.encoder\.norm1\.mean.*carry of"):
        backend.encode(cvae_arrays(), batch["counts"], batch["tissue"], settings)
    with pytest.raises(ValueError, match=rf"tissue holds indices from {T} to {T}, but the model has {T}"):
        backend.encode(params, batch["counts"], np.full(C, T), settings)
    wrong = graph | {"source": np.append(graph["source"][1:] * 0, G)}
    with pytest.raises(ValueError, match=rf"source holds indices from 0 to {G}, but the model has {G}"):
        backend.trajectory(params, z, TIMES, CONDITION, wrong, settings)
    wrong = graph | {"target": graph["target"] * 0 - 1}
    with pytest.raises(ValueError, match="target holds indices from -1"):
        backend.velocity(params, np.array(0.0), z, CONDITION, wrong, settings)
    with pytest.raises(ValueError, match="the graph lacks source, target, sign"):
        backend.velocity(params, np.array(0.0), z, CONDITION, {}, settings)
    with pytest.raises(ValueError, match=r"params lack flow\.center, flow\.scale"):
        backend.trajectory(flow_arrays(), z, TIMES, CONDITION, graph, settings)
    with pytest.raises(ValueError, match="strictly rising or strictly falling"):
        backend.endpoint_jacobian(params, z, np.array([0.0, 1.0, 1.0]), CONDITION, graph, settings)
    with pytest.raises(ValueError, match=rf"conditions have shape .*; \(n_cells, {P}\)"):
        backend.velocity(params, np.array(0.0), z, CONDITION[:, 1:], graph, settings)
    with pytest.raises(ValueError, match="align with"):
        backend.encode(params, batch["counts"][:, 1:], batch["tissue"], settings)
    pairs, tau = flow_batch()
    state = backend.init("flow", flow_arrays(), trainable=("flow.genes",))
    with pytest.raises(ValueError, match="source holds indices"):
        backend.evaluate("flow", state, pairs | {"source": pairs["source"] + G}, tau, settings, 1.0)
    with pytest.raises(ValueError, match="stage is 'flows'; one of 'vae', 'operator', 'joint', 'cvae', 'flow'"):
        backend.init("flows", params, trainable=())


def test_standardisation_of_the_flow_is_not_trained():
    backend, settings, params = Backend("float64"), config(), model()
    pairs, tau = flow_batch()
    names = tuple(name for name in params if name.startswith("flow."))
    _, grads = backend.gradients("flow", params, names, pairs, tau, {"beta": 1.0}, {}, settings)
    assert {name for name, grad in grads.items() if grad is None} == {"flow.center", "flow.scale"}
    assert select(params, "flow").keys() >= {"center", "scale"}
