"""Losses and optimiser steps of docs/math.md on jets: the oracle of `steps.py` in both twins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from parity_tests import jets
from parity_tests.jets import WIDE, Array, Jet, Number, jet
from parity_tests.oracle_flow import cvae_loss, discriminator_loss, flow_loss
from parity_tests.oracles import (
    NBVAE,
    ConditionEncoder,
    OperatorFamily,
    _below,
    adam_update,
    clip_by_global_norm,
    data,
    elbo_loss,
    energy_distance_grouped,
    identity_penalty,
    spectral_norm,
    spectral_penalty,
    weighted_mean,
)
from pf_core.config import NORMALISED_TOTAL, Config

Tree = Mapping[str, Any]
Losses = tuple[Jet, tuple[dict[str, Jet], dict[str, Any]]]


def vae_loss(params: Tree, batch: Tree, noise: Tree, *, config: Config, beta: Any) -> Losses:
    model = NBVAE(config.vae, _below(params, "vae"))
    mu, r, z_mu, z_logvar = model(batch["counts"], batch["tissue"], batch["library"], noise["eps"])
    loss, parts = elbo_loss(batch["counts"], mu, r, z_mu, z_logvar, beta=beta, weight=batch["weight"])
    return loss, (parts, {})


def _operator_terms(
    params: Tree, batch: Tree, noise: Tree, carry: Tree, x: Any, y: Any, config: Config
) -> tuple[Jet, dict[str, Jet], dict[str, Any], Jet]:
    """Loss, parts, carry and the image of x."""
    options = config.operator
    theta = ConditionEncoder(_below(params, "conditions"))(
        batch["perturbations"], batch["doses"], batch["tissue"], batch["batch"], batch["covariates"]
    )
    family = OperatorFamily(_below(params, "operators"))
    A, _ = family.operator(theta, batch["tissue"])
    image = family(x, theta, batch["tissue"])
    weight = data(batch["weight"])
    distances = energy_distance_grouped(image, y, wx=batch["wx"], wy=batch["wy"], estimator=options.estimator)
    energy = weighted_mean(distances, weight)

    new_carry = dict(carry)
    if options.spectral_target == "operators":
        slot = np.asarray(data(batch["slot"]), dtype=np.int64)
        start = jet(carry["v"])[slot] if options.warm_start else jet(noise["v0"])
        matrices, mask = A, (weight > 0) * (data(batch["distinct"]) if "distinct" in batch else 1.0)
    else:
        start = jet(carry["v_bases"])
        matrices = jets.concatenate([family.A0.rearranged(_last), family.B.rearranged(_last)]).rearranged(_first)
        mask = np.ones(matrices.shape[0])
    settings = {"n_iter": options.power_iterations}
    spectral, v = spectral_penalty(matrices, start, rho_max=options.rho_max, weight=mask, **settings)
    if options.spectral_target == "bases":
        new_carry["v_bases"] = v
    elif options.warm_start:
        table = np.array(data(carry["v"]), dtype=WIDE)
        table[slot] = v.value
        error = np.zeros(table.shape)
        error[slot] = v.v.error
        new_carry["v"] = Jet(Number(table, error))
    sigma = spectral_norm(matrices, start, **settings)
    largest = int(np.argmax(np.where(mask > 0, sigma.value, -np.inf)))
    shrinkage = identity_penalty(A, weight)
    loss = energy + options.spectral_weight * spectral + options.shrinkage * shrinkage
    parts = {"energy": energy, "spectral": spectral, "shrinkage": shrinkage, "sigma_max": sigma[largest]}
    return loss, {name: part.stop() for name, part in parts.items()}, new_carry, image


def _last(array: Array, lead: tuple[int, ...]) -> Array:
    return np.moveaxis(array, len(lead), -1)


def _first(array: Array, lead: tuple[int, ...]) -> Array:
    return np.moveaxis(array, -1, len(lead))


def operator_loss(params: Tree, batch: Tree, noise: Tree, carry: Tree, *, config: Config) -> Losses:
    loss, parts, carry, _ = _operator_terms(params, batch, noise, carry, batch["x"], batch["y"], config)
    return loss, (parts, carry)


def joint_loss(params: Tree, batch: Tree, noise: Tree, carry: Tree, *, config: Config, beta: Any) -> Losses:
    model = NBVAE(config.vae, _below(params, "vae"))
    tissue = np.asarray(data(batch["tissue"]), dtype=np.int64)

    def per_cell(values: Any) -> tuple[Any, Array]:
        n = values.shape[1]
        return values.reshape(-1, *values.shape[2:]), np.repeat(tissue, n)

    def encode(counts: Any) -> Jet:
        flat, tissues = per_cell(data(counts))
        mean, _ = model.encode(flat, tissues)
        return mean.reshape(*data(counts).shape[:2], mean.shape[-1])

    def profile(z: Jet) -> Jet:
        flat, tissues = per_cell(z)
        mu = model.decode(flat, tissues, np.ones(flat.shape[0]))
        scaled = mu * NORMALISED_TOTAL if config.vae.scale == "library" else mu
        return jets.log1p(scaled).reshape(*z.shape[:2], mu.shape[-1])

    x, y = encode(batch["x_counts"]), encode(batch["y_counts"])
    loss, parts, carry, image = _operator_terms(params, batch, noise, carry, x, y, config)
    distances = energy_distance_grouped(
        profile(image), profile(y), wx=batch["wx"], wy=batch["wy"], estimator=config.operator.estimator
    )
    gene_energy = weighted_mean(distances, batch["weight"])
    cells = {name[len("cells_") :]: value for name, value in batch.items() if name.startswith("cells_")}
    elbo, (elbo_parts, _) = vae_loss(params, cells, noise, config=config, beta=beta)
    loss = loss + config.operator.gene_weight * gene_energy + config.operator.elbo_weight * elbo
    return loss, ({**parts, "gene_energy": gene_energy.stop(), **elbo_parts}, carry)


def loss_of(stage: str, params: Tree, batch: Tree, noise: Tree, carry: Tree, config: Config, beta: Any) -> Losses:
    if stage == "vae":
        loss, (parts, _) = vae_loss(params, batch, noise, config=config, beta=beta)
        return loss, (parts, dict(carry))
    if stage == "operator":
        return operator_loss(params, batch, noise, carry, config=config)
    if stage == "flow":
        loss, (parts, _) = flow_loss(params, batch, noise, config=config)
        return loss, (parts, dict(carry))
    if stage == "discriminator":  # the first player of stage "cvae"
        return discriminator_loss(params, batch, noise, carry, config=config)
    if stage == "cvae":
        return cvae_loss(params, batch, noise, carry, config=config, beta=beta)
    return joint_loss(params, batch, noise, carry, config=config, beta=beta)


def evaluation(stage: str, params: Tree, batch: Tree, noise: Tree, carry: Tree, config: Config, beta: Any) -> Tree:
    """The parts and the loss as `evaluate` reports them: stage "cvae" with running statistics, both players' parts."""
    if stage != "cvae":
        loss, (parts, _) = loss_of(stage, params, batch, noise, carry, config, beta)
        return {**parts, "loss": loss}
    _, (first, _) = discriminator_loss(params, batch, noise, carry, config=config, train=False)
    loss, (second, _) = cvae_loss(params, batch, noise, carry, config=config, beta=beta, train=False)
    return {**first, **second, "loss": loss}


def _averaged(
    stage: str, params: Tree, names: list[str], batch: Tree, noise: Tree, carry: Tree, config: Config, beta: Any
) -> tuple[dict[str, Jet], Jet, dict[str, Jet], dict[str, Any]]:
    """Gradient, loss and parts, averaged over micro-batches, and the carry that passed through them."""
    n_micro = next(iter(batch.values())).shape[0]
    trained = {name: np.asarray(params[name]) for name in names}
    losses, parts, grads = [], [], []
    for i in range(n_micro):
        micro, draws = ({k: v[i] for k, v in tree.items()} for tree in (batch, noise))
        seeded = {**params, **jets.seed(trained, None)}
        loss, (part, carry) = loss_of(stage, seeded, micro, draws, carry, config, beta)
        losses.append(loss.stop())
        parts.append(part)
        grads.append(_gradient(loss, trained))
    mean = lambda items: jets.stack(items).mean(-items[0].ndim - 1) if n_micro > 1 else items[0]
    gradient = {name: mean([g[name] for g in grads]) for name in names}
    return gradient, mean(losses), {name: mean([part[name] for part in parts]) for name in parts[0]}, dict(carry)


def step(stage: str, state: Tree, batch: Tree, noise: Tree, hyper: Tree, *, config: Config) -> dict[str, Any]:
    """One step on the state {params, frozen, m, v, count, carry}: the new state and the metrics, as a tree of jets.

    Leaves of batch and noise have a leading micro-batch axis, over which gradients, loss and parts are averaged. Stage
    "cvae" has two players: the second sees what the first has become, and each has its own clip.
    """
    settings = getattr(config, f"stage_{stage}")
    players = {stage: list(state["params"])}
    if stage == "cvae":
        first = [name for name in state["params"] if name.startswith("discriminator.")]
        players = {"discriminator": first, "cvae": [name for name in state["params"] if name not in first]}
    params, carry = {**state["frozen"], **state["params"]}, dict(state["carry"])
    new: dict[str, Any] = {"params": {}, "m": {}, "v": {}}
    loss, parts, gradient, norms = None, {}, {}, []
    for player, names in players.items():
        found, loss, part, after = _averaged(player, params, names, batch, noise, carry, config, hyper["beta"])
        parts = parts | part
        if not names:  # it reports, and changes nothing
            continue
        clipped, norm = clip_by_global_norm(found, settings.max_norm)
        old = ({name: tree[name] for name in names} for tree in (state["params"], clipped, state["m"], state["v"]))
        moved, m, v, new["count"] = adam_update(
            *old, state["count"], lr=hyper["lr"], weight_decay=settings.weight_decay
        )
        params |= moved
        for key, tree in (("params", moved), ("m", m), ("v", v)):
            new[key] |= tree
        carry, gradient, norms = after, gradient | found, [*norms, norm]
    metrics = {
        "loss": loss,
        "grad_norm": norms[0] if len(norms) == 1 else jets.sqrt(norms[0] * norms[0] + norms[1] * norms[1]),
        "parts": parts,
        "param_grad_norm": jets.concatenate([jets.sqrt((g * g).sum()).reshape(1) for _, g in sorted(gradient.items())]),
    }
    return {**new, "carry": carry, "metrics": metrics}


def _gradient(loss: Jet, leaves: Mapping[str, Array]) -> dict[str, Jet]:
    gradient, start = {}, 0
    for name, value in leaves.items():
        if loss.a is None:
            gradient[name] = jet(np.zeros(value.shape))
        else:
            part = loss.a.map(lambda array, s=start, value=value: array[s : s + value.size].reshape(value.shape))
            gradient[name] = Jet(part)
        start += value.size
    return gradient
