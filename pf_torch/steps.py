"""Losses, and the steps that lower them: gradient, clip, Adam, guard (docs/math.md 8)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pf_core.backends import STAGES
from pf_core.config import ADAM_B1, ADAM_B2, ADAM_EPS, CLIP_EPS, NORMALISED_TOTAL, Config
from pf_core.initial import select
from pf_torch.conditions import ConditionEncoder
from pf_torch.distances import energy_distance_grouped
from pf_torch.layers import dense_precision
from pf_torch.likelihood import elbo_loss
from pf_torch.operators import OperatorFamily, apply_operator, identity_penalty
from pf_torch.probe import record
from pf_torch.spectral import spectral_norm, spectral_penalty
from pf_torch.vae import NBVAE

__all__ = [
    "TrainState",
    "adam_update",
    "clip_by_global_norm",
    "evaluate",
    "init_state",
    "joint_loss",
    "joint_step",
    "operator_loss",
    "operator_step",
    "run_steps",
    "vae_loss",
    "vae_step",
]

Tensors = dict[str, Tensor]
LossOutput = tuple[Tensor, tuple[Tensors, Tensors]]


@dataclass(frozen=True)
class TrainState:
    """Everything a step reads and writes, keyed by canonical names.

    params are the trained parameters and frozen the others; m and v are Adam's moments, shaped as params, and count its
    updates so far; carry holds the vectors of the power iteration: {"v": (n_slots, n_latent)},
    {"v_bases": (n_tissues + n_bases, n_latent)} or {}; in stage "cvae" the running statistics by canonical name.
    """

    params: Tensors
    frozen: Tensors
    m: Tensors
    v: Tensors
    count: int
    carry: Tensors


def init_state(
    params: Mapping[str, Any],
    *,
    trainable: Collection[str],
    m: Mapping[str, Any] | None = None,
    v: Mapping[str, Any] | None = None,
    count: int = 0,
    carry: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
) -> TrainState:
    """The state of a run, from canonical parameters. Everything is copied.

    Args:
        params: all parameters by canonical name.
        trainable: names of those that are trained; the others are frozen.
        m: first moments by name; None for zeros.
        v: second moments by name; None for zeros.
        count: updates done so far.
        carry: what passes from step to step, see `TrainState`; None for none.
        dtype: "float32" or "float64", of every array.
        device: where the state lives.

    Returns:
        TrainState.

    Raises:
        ValueError: a trainable name that is not a parameter, moments of other names or shapes, or float64 in a
            process where JAX has 64-bit numbers off.
    """
    check_trainable(trainable, params)

    def copy(tree: Mapping[str, Any]) -> Tensors:
        kind = getattr(torch, dtype)
        return {name: torch.as_tensor(x).detach().to(device=device, dtype=kind, copy=True) for name, x in tree.items()}

    trained = copy({name: params[name] for name in sorted(trainable)})
    moments = []
    for name, moment in (("m", m), ("v", v)):
        if moment is None:
            moments.append({key: torch.zeros_like(x) for key, x in trained.items()})
            continue
        if {key: np.shape(x) for key, x in moment.items()} != {key: tuple(x.shape) for key, x in trained.items()}:
            raise ValueError(
                f"names and shapes of {name} do not fit the trainable parameters; pass those of one export"
            )
        moments.append({key: copy(moment)[key] for key in trained})
    frozen = copy({name: x for name, x in params.items() if name not in trained})
    return TrainState(trained, frozen, moments[0], moments[1], int(count), copy(carry or {}))


# --- losses -------------------------------------------------------------------------------------------------------


def vae_loss(params: Tensors, batch: Tensors, noise: Tensors, *, config: Config, beta: float | Tensor) -> LossOutput:
    """Negative ELBO of the NB-VAE, the loss of stage "vae".

    Differentiated in the parameters below "vae."; the parts carry no gradient.

    Args:
        params: all canonical parameters.
        batch: counts (n_cells, n_genes), tissue (n_cells,), library (n_cells,), weight (n_cells,), 0 for padding; and,
            where they are, table and tail of `nb_log_prob_sum`.
        noise: eps (n_cells, n_latent).
        config: the run's configuration.
        beta: weight of the KL divergence.

    Returns:
        loss (), nats per cell, and (parts {"nll", "kl"}, carry {}).
    """
    model = NBVAE(config.vae, select(params, "vae"))
    counts, tissue = batch["counts"], batch["tissue"]
    mu, r, z_mu, z_logvar = model(counts, tissue, batch["library"], noise["eps"])
    table, tail = batch.get("table"), batch.get("tail")
    loss, parts = elbo_loss(counts, mu, r, z_mu, z_logvar, beta=beta, weight=batch["weight"], table=table, tail=tail)
    return loss, ({name: record(name, value) for name, value in parts.items()}, {})


def _weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    return (weight * values).sum() / weight.sum()


def _operator_terms(
    params: Tensors, x: Tensor, y: Tensor, batch: Tensors, noise: Tensors, carry: Tensors, config: Config
) -> tuple[Tensor, Tensor, Tensors, Tensors]:
    """Loss of the operators on latents x and y, the images of x, the parts, and the new carry."""
    settings, weight = config.operator, batch["weight"]
    conditions = ConditionEncoder(select(params, "conditions"))
    family = OperatorFamily(select(params, "operators"))
    theta = conditions(batch["perturbations"], batch["doses"], batch["tissue"], batch["batch"], batch["covariates"])
    A, b = family.operator(theta, batch["tissue"])
    image = record("operators.image", apply_operator(A, b, x))
    distances = energy_distance_grouped(image, y, wx=batch["wx"], wy=batch["wy"], estimator=settings.estimator)
    energy = record("energy", _weighted_mean(distances, weight))

    if settings.spectral_target == "bases":
        bounded, counted, start = torch.cat([family.A0, family.B]), None, carry["v_bases"]
    else:
        # Each operator is bounded once: padding does not count, nor does a second group of the same operator.
        counted = (weight > 0).to(A.dtype) * batch["distinct"]
        bounded, start = A, carry["v"][batch["slot"]] if settings.warm_start else noise["v0"]
    penalty, v = spectral_penalty(
        bounded, start, rho_max=settings.rho_max, n_iter=settings.power_iterations, weight=counted
    )
    spectral = record("spectral", penalty)
    sigma = spectral_norm(bounded.detach(), v, n_iter=0)
    sigma_max = (sigma if counted is None else torch.where(counted > 0, sigma, 0.0)).max()
    if settings.spectral_target == "bases":
        carry = {**carry, "v_bases": v}
    elif settings.warm_start:
        carry = {**carry, "v": carry["v"].index_put((batch["slot"],), v)}

    shrinkage = record("shrinkage", identity_penalty(A, weight))
    loss = energy + settings.spectral_weight * spectral + settings.shrinkage * shrinkage
    parts = {"energy": energy, "spectral": spectral, "shrinkage": shrinkage, "sigma_max": sigma_max}
    return loss, image, {name: value.detach() for name, value in parts.items()}, carry


def operator_loss(params: Tensors, batch: Tensors, noise: Tensors, carry: Tensors, *, config: Config) -> LossOutput:
    """Energy distance between moved controls and perturbed cells, with the spectral and identity penalties.

    Differentiated in the parameters below "conditions." and "operators.", and in x and y; the power iteration is under
    stop-gradient, and parts and carry have no gradient.

    Args:
        params: all canonical parameters.
        batch: perturbations, doses (n_conditions, n_members), tissue (n_conditions,), batch (n_conditions,
            n_batches), covariates (n_conditions, n_covariates), latents x (n_conditions, n, n_latent) of controls and
            y (n_conditions, m, n_latent) of perturbed cells with weights wx and wy, weight (n_conditions,) of the
            groups (0 for padding), slot (n_conditions,) row of carry["v"] (row 0 is for padding), and distinct
            (n_conditions,) 1 where a group's operator stands first in the batch, 0 where it stood before.
        noise: v0 (n_conditions, n_latent), the power iteration's start where nothing is carried.
        carry: {"v": (n_slots, n_latent)}, {"v_bases": (n_tissues + n_bases, n_latent)}, or {}.
        config: the run's configuration.

    Returns:
        loss () and (parts {"energy", "spectral", "shrinkage", "sigma_max"}, carry), the parts before their weights.
    """
    loss, _, parts, carry = _operator_terms(params, batch["x"], batch["y"], batch, noise, carry, config)
    return loss, (parts, carry)


def joint_loss(
    params: Tensors, batch: Tensors, noise: Tensors, carry: Tensors, *, config: Config, beta: float | Tensor
) -> LossOutput:
    """The operator loss on live latents, the energy distance of decoded profiles, and the VAE's own loss.

    Differentiated in all parameters, through encoder, operators and decoder; parts and carry have no gradient.

    Args:
        params: all canonical parameters.
        batch: as for `operator_loss`, with counts x_counts (n_conditions, n, n_genes) and x_library (n_conditions, n)
            in the place of x, and y_counts and y_library in the place of y; and the batch of `vae_loss` with every
            name prefixed "cells_".
        noise: eps (n_cells, n_latent) and v0 (n_conditions, n_latent).
        carry: as for `operator_loss`.
        config: the run's configuration.
        beta: weight of the KL divergence.

    Returns:
        loss () and (parts {"energy", "gene_energy", "spectral", "shrinkage", "sigma_max", "nll", "kl"}, carry), the
        parts before their weights.
    """
    model = NBVAE(config.vae, select(params, "vae"))

    def encode(counts: Tensor) -> Tensor:
        mean, _ = model.encode(counts.flatten(0, 1), batch["tissue"].repeat_interleave(counts.shape[1]))
        return mean.unflatten(0, counts.shape[:2])

    def profile(z: Tensor) -> Tensor:
        tissue = batch["tissue"].repeat_interleave(z.shape[1])
        mu = model.decode(z.flatten(0, 1), tissue, torch.ones(tissue.shape, dtype=z.dtype, device=z.device))
        scale = NORMALISED_TOTAL if config.vae.scale == "library" else 1.0
        return torch.log1p(scale * mu).unflatten(0, z.shape[:2])

    x, y = encode(batch["x_counts"]), encode(batch["y_counts"])
    loss, image, parts, carry = _operator_terms(params, x, y, batch, noise, carry, config)
    distances = energy_distance_grouped(
        profile(image), profile(y), wx=batch["wx"], wy=batch["wy"], estimator=config.operator.estimator
    )
    gene_energy = record("gene_energy", _weighted_mean(distances, batch["weight"]))
    cells = {name.removeprefix("cells_"): value for name, value in batch.items() if name.startswith("cells_")}
    elbo, (cell_parts, _) = vae_loss(params, cells, noise, config=config, beta=beta)
    loss = loss + config.operator.gene_weight * gene_energy + config.operator.elbo_weight * elbo
    return loss, ({**parts, "gene_energy": gene_energy.detach(), **cell_parts}, carry)


def check_trainable(trainable: Collection[str], params: Mapping[str, Any]) -> None:
    """Raise ValueError for names that are not parameters."""
    missing = sorted(set(trainable) - set(params))
    if missing:
        raise ValueError(f"trainable names {', '.join(missing)} are not parameters; known: {', '.join(params)}")


def check_stage(stage: str) -> None:
    """Raise ValueError unless the stage is one of `pf_core.backends.STAGES`."""
    known = [name for stages in STAGES.values() for name in stages]
    if stage not in known:
        raise ValueError(f"stage is {stage!r}; one of {', '.join(map(repr, known))} was wanted")


def stage_loss(
    stage: str, params: Tensors, batch: Tensors, noise: Tensors, carry: Tensors, beta: float | Tensor, config: Config
) -> LossOutput:
    """loss, (parts, carry) of one micro-batch of a stage, of "cvae" that of player 2; unused carry passes through."""
    from pf_torch.flow_steps import cvae_loss, flow_loss  # built on this module

    check_stage(stage)
    if stage == "vae":
        loss, (parts, _) = vae_loss(params, batch, noise, config=config, beta=beta)
        return loss, (parts, carry)
    if stage == "flow":
        loss, (parts, _) = flow_loss(params, batch, noise, config=config)
        return loss, (parts, carry)
    if stage == "cvae":
        return cvae_loss(params, batch, noise, carry, config=config, beta=beta)
    if stage == "operator":
        return operator_loss(params, batch, noise, carry, config=config)
    return joint_loss(params, batch, noise, carry, config=config, beta=beta)


# --- optimiser ----------------------------------------------------------------------------------------------------


def clip_by_global_norm(grads: Tensors, max_norm: float) -> tuple[Tensors, Tensor]:
    """Scale all gradients by min(1, max_norm / (norm + CLIP_EPS)), norm over all of them together.

    Not meant to be differentiated.

    Args:
        grads: gradients by name.
        max_norm: largest Euclidean norm.

    Returns:
        the scaled gradients, and the norm () before.
    """
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads.values()]))
    scale = torch.clamp(max_norm / (norm + CLIP_EPS), max=1.0)
    return {name: g * scale for name, g in grads.items()}, norm


def adam_update(
    params: Tensors,
    grads: Tensors,
    m: Tensors,
    v: Tensors,
    count: int,
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
) -> tuple[Tensors, Tensors, Tensors, int]:
    """One step of AdamW: Adam with bias correction, eps outside the root, and decoupled weight decay.

    The corrections 1 - b^(count + 1) are exact to rounding. Not meant to be differentiated. Source: Kingma & Ba 2015,
    arXiv:1412.6980; Loshchilov & Hutter 2019, arXiv:1711.05101.

    Args:
        params: parameters by name.
        grads: gradients by name.
        m: first moments by name.
        v: second moments by name.
        count: () updates done so far.
        lr: learning rate.
        weight_decay: every parameter p also loses lr * weight_decay * p.

    Returns:
        params, m, v and count after the step.
    """
    count, lr = int(count) + 1, float(lr)  # an integer tensor would take the corrections to float32
    correct_m, correct_v = (-float(np.expm1(count * np.log(b))) for b in (ADAM_B1, ADAM_B2))
    new_params, new_m, new_v = {}, {}, {}
    for name, p in params.items():
        g = grads[name]
        new_m[name] = ADAM_B1 * m[name] + (1.0 - ADAM_B1) * g
        new_v[name] = ADAM_B2 * v[name] + (1.0 - ADAM_B2) * (g * g)
        step = (new_m[name] / correct_m) / (torch.sqrt(new_v[name] / correct_v) + ADAM_EPS)
        new_params[name] = p - lr * (step + weight_decay * p) if weight_decay else p - lr * step
    return new_params, new_m, new_v, count


def all_finite(*trees: Tensors) -> bool:
    extremes = [bound for tree in trees for x in tree.values() for bound in torch.aminmax(x)]
    return bool(torch.isfinite(torch.stack(extremes)).all())


# --- steps --------------------------------------------------------------------------------------------------------


def micro(tree: Tensors, index: int) -> Tensors:
    return {name: value[index] for name, value in tree.items()}


def train_step(
    stage: str,
    state: TrainState,
    batch: Tensors,
    noise: Tensors,
    hyper: Mapping[str, Any],
    config: Config,
    loss_function: Callable[..., LossOutput] = stage_loss,
) -> tuple[TrainState, dict[str, Any]]:
    """Mean gradient over micro-batches, clip, Adam; the old state where anything is not finite."""
    settings = getattr(config, f"stage_{stage}")
    leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}
    n, carry = len(next(iter(batch.values()))), state.carry
    losses, all_parts, grads = [], [], {name: torch.zeros_like(p) for name, p in state.params.items()}
    for index in range(n):
        given = {**state.frozen, **leaves}, micro(batch, index), micro(noise, index), carry, hyper["beta"], config
        with dense_precision(config.precision):
            loss, (parts, carry) = loss_function(stage, *given)
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for (name, total), g in zip(grads.items(), found, strict=True):
            grads[name] = total if g is None else total + g / n
        losses.append(loss.detach())
        all_parts.append(parts)
    loss = torch.stack(losses).mean()
    names = sorted(grads)
    norms = torch.stack([torch.linalg.vector_norm(grads[name]) for name in names])
    clipped, norm = clip_by_global_norm(grads, settings.max_norm)
    params, m, v, count = adam_update(
        state.params, clipped, state.m, state.v, state.count, lr=hyper["lr"], weight_decay=settings.weight_decay
    )
    ok = bool(torch.isfinite(loss + norm)) and all_finite(params, m, v, carry)
    parts = {name: torch.stack([parts[name] for parts in all_parts]).mean() for name in all_parts[0]}
    metrics = {"loss": loss, "grad_norm": norm, "ok": ok, "parts": parts, "param_grad_norm": norms}
    return (replace(state, params=params, m=m, v=v, count=count, carry=carry) if ok else state), metrics


def vae_step(
    state: TrainState, batch: Tensors, noise: Tensors, hyper: Mapping[str, Any], *, config: Config
) -> tuple[TrainState, dict[str, Any]]:
    """One step of stage "vae": loss, gradient, clip, AdamW, guard.

    Not meant to be differentiated. When the loss, the gradient norm or anything new is not finite, the state is
    returned as it came and metrics["ok"] is False.

    Args:
        state: the run; it is not changed.
        batch: as for `vae_loss`, with a leading axis of micro-batches, over which gradients and losses are
            averaged.
        noise: the same.
        hyper: {"lr": (), "beta": ()}.
        config: the run's configuration; `stage_vae` holds max_norm and weight_decay.

    Returns:
        state, and metrics {"loss", "grad_norm", "ok", "parts", "param_grad_norm"}; the last holds the norms before
        clipping of the trained parameters, sorted by name.
    """
    return train_step("vae", state, batch, noise, hyper, config)


def operator_step(
    state: TrainState, batch: Tensors, noise: Tensors, hyper: Mapping[str, Any], *, config: Config
) -> tuple[TrainState, dict[str, Any]]:
    """One step of stage "operator": loss, gradient, clip, AdamW, guard.

    Not meant to be differentiated. When the loss, the gradient norm or anything new is not finite, the state is
    returned as it came and metrics["ok"] is False.

    Args:
        state: the run; it is not changed.
        batch: as for `operator_loss`, with a leading axis of micro-batches, over which gradients and losses are
            averaged.
        noise: the same.
        hyper: {"lr": (), "beta": ()}.
        config: the run's configuration; `stage_operator` holds max_norm and weight_decay.

    Returns:
        state, and metrics {"loss", "grad_norm", "ok", "parts", "param_grad_norm"}; the last holds the norms before
        clipping of the trained parameters, sorted by name.
    """
    return train_step("operator", state, batch, noise, hyper, config)


def joint_step(
    state: TrainState, batch: Tensors, noise: Tensors, hyper: Mapping[str, Any], *, config: Config
) -> tuple[TrainState, dict[str, Any]]:
    """One step of stage "joint": loss, gradient, clip, AdamW, guard.

    Not meant to be differentiated. When the loss, the gradient norm or anything new is not finite, the state is
    returned as it came and metrics["ok"] is False.

    Args:
        state: the run; it is not changed.
        batch: as for `joint_loss`, with a leading axis of micro-batches, over which gradients and losses are
            averaged.
        noise: the same.
        hyper: {"lr": (), "beta": ()}.
        config: the run's configuration; `stage_joint` holds max_norm and weight_decay.

    Returns:
        state, and metrics {"loss", "grad_norm", "ok", "parts", "param_grad_norm"}; the last holds the norms before
        clipping of the trained parameters, sorted by name.
    """
    return train_step("joint", state, batch, noise, hyper, config)


def _stack(trees: list[Any]) -> Any:
    first = trees[0]
    if isinstance(first, dict):
        return {name: _stack([tree[name] for tree in trees]) for name in first}
    return torch.stack(trees) if isinstance(first, Tensor) else torch.tensor(trees)


def run_steps(
    stage: str,
    state: TrainState,
    batches: Tensors,
    noises: Tensors,
    hypers: Mapping[str, Any],
    *,
    config: Config,
    compile: bool = False,
) -> tuple[TrainState, dict[str, Any]]:
    """Many steps of one stage in one call.

    Not meant to be differentiated. The state that is passed in is used up: in JAX its memory holds the result.

    Args:
        stage: a name of `pf_core.backends.STAGES`.
        state: the run.
        batches: as for the single step, with a leading axis of steps before that of the micro-batches.
        noises: the same.
        hypers: {"lr": (n_steps,), "beta": (n_steps,)}.
        config: the run's configuration.
        compile: run the loss through torch.compile.

    Returns:
        state, and the metrics of every step, stacked.

    Raises:
        ValueError: an unknown stage.
    """
    from pf_torch.flow_steps import alternating_step, cvae_loss, discriminator_loss  # built on this module

    check_stage(stage)
    prepare = torch.compile if compile else lambda function: function
    players, loss_function = (prepare(discriminator_loss), prepare(cvae_loss)), prepare(stage_loss)
    collected = []
    for index in range(len(hypers["lr"])):
        hyper = {name: torch.as_tensor(values[index]) for name, values in hypers.items()}
        data = micro(batches, index), micro(noises, index), hyper, config
        if stage == "cvae":
            state, metrics = alternating_step(state, *data, players)
        else:
            state, metrics = train_step(stage, state, *data, loss_function)
        collected.append(metrics)
    return state, _stack(collected)


def evaluate(
    stage: str, state: TrainState, batch: Tensors, noise: Tensors, *, config: Config, beta: float
) -> dict[str, Tensor]:
    """The loss of a stage and its parts, without an update.

    Nothing is differentiated.

    Args:
        stage: a name of `pf_core.backends.STAGES`.
        state: the run.
        batch: as for the stage's loss, without an axis of micro-batches.
        noise: the same.
        config: the run's configuration.
        beta: weight of the KL divergence.

    Returns:
        the parts and "loss", each ().

    Raises:
        ValueError: an unknown stage.
    """
    from pf_torch.flow_steps import evaluate_players  # built on this module

    params = {**state.frozen, **state.params}
    with torch.no_grad():
        if stage == "cvae":
            loss, parts = evaluate_players(params, batch, noise, state.carry, config=config, beta=beta)
        else:
            loss, (parts, _) = stage_loss(stage, params, batch, noise, state.carry, beta, config)
    return {**parts, "loss": loss}
