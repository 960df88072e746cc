"""Losses and optimiser steps of docs/math.md on jets: the oracle of `steps.py` in both twins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from parity_tests import jets
from parity_tests.jets import WIDE, Array, Jet, Number, jet
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
from pf_core.config import NORMALISED_TOTAL, Config, StageConfig

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
    return joint_loss(params, batch, noise, carry, config=config, beta=beta)


def stage_config(stage: str, config: Config) -> StageConfig:
    return {"vae": config.stage_vae, "operator": config.stage_operator, "joint": config.stage_joint}[stage]


def step(stage: str, state: Tree, batch: Tree, noise: Tree, hyper: Tree, *, config: Config) -> dict[str, Any]:
    """One step on the state {params, frozen, m, v, count, carry}: the new state and the metrics, as a tree of jets.

    Leaves of batch and noise have a leading micro-batch axis, over which gradients, loss and parts are averaged.
    """
    trainable = {name: np.asarray(value) for name, value in state["params"].items()}
    n_micro = next(iter(batch.values())).shape[0]
    carry, losses, parts, grads = dict(state["carry"]), [], [], []
    for i in range(n_micro):
        seeded = jets.seed(trainable, None)
        micro, draws = ({k: v[i] for k, v in tree.items()} for tree in (batch, noise))
        loss, (part, carry) = loss_of(stage, {**state["frozen"], **seeded}, micro, draws, carry, config, hyper["beta"])
        losses.append(loss.stop())
        parts.append(part)
        grads.append(_gradient(loss, trainable))
    mean = lambda items: jets.stack(items).mean(-items[0].ndim - 1) if n_micro > 1 else items[0]
    gradient = {name: mean([g[name] for g in grads]) for name in trainable}
    settings = stage_config(stage, config)
    clipped, norm = clip_by_global_norm(gradient, settings.max_norm)
    params, m, v, count = adam_update(
        trainable, clipped, state["m"], state["v"], state["count"], lr=hyper["lr"], weight_decay=settings.weight_decay
    )
    norms = [jets.sqrt((g * g).sum()).reshape(1) for _, g in sorted(gradient.items())]
    metrics = {
        "loss": mean(losses),
        "grad_norm": norm,
        "parts": {name: mean([part[name] for part in parts]) for name in parts[0]},
        "param_grad_norm": jets.concatenate(norms),
    }
    return {"params": params, "m": m, "v": v, "count": count, "carry": carry, "metrics": metrics}


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
