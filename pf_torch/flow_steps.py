"""Losses and steps of the flow system: VAE against discriminator, and flow matching (docs/math.md 7)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pf_core.config import Config
from pf_core.initial import select
from pf_torch.cvae import CVAE
from pf_torch.discriminator import Discriminator, adversary_loss, cross_entropy
from pf_torch.flow import VectorField, flow_matching_loss
from pf_torch.layers import dense_precision
from pf_torch.likelihood import elbo_loss, reparameterize
from pf_torch.probe import record
from pf_torch.steps import (
    LossOutput,
    Tensors,
    TrainState,
    adam_update,
    all_finite,
    clip_by_global_norm,
    micro,
    train_step,
)

__all__ = ["cvae_loss", "cvae_step", "discriminator_loss", "flow_loss", "flow_step"]

PLAYER_1 = "discriminator."  # what player 1 trains; player 2 trains everything else
STATISTICS = "cvae.encoder"  # the running statistics stand below this name in the carry


def _discriminator_terms(
    params: Tensors, batch: Tensors, noise: Tensors, carry: Tensors, *, config: Config, train: bool
) -> tuple[Tensor, Tensors]:
    """Cross-entropy of the discriminator and its parts; in evaluation without dropout."""
    model, weight = CVAE(select(params, "cvae")), batch["weight"]
    z_mu, z_logvar, _ = model.encode(
        batch["counts"], batch["tissue"], select(carry, STATISTICS), weight=weight, train=train
    )
    z = record("cvae.z", reparameterize(z_mu, z_logvar, noise["eps"])).detach()
    masks = (noise["keep1"], noise["keep2"]) if train else (None, None)
    logits = Discriminator(select(params, "discriminator"))(z, *masks, dropout=config.adversary.dropout)
    loss = record("discriminator", cross_entropy(logits, batch["tissue"], weight))
    right = (logits.argmax(-1) == batch["tissue"] - 1).to(logits.dtype)
    known = weight * (batch["tissue"] > 0)
    accuracy = (known * right).sum() / torch.where(known.sum() > 0, known.sum(), 1.0)
    return loss, {"discriminator": loss.detach(), "accuracy": accuracy}


def discriminator_loss(
    params: Tensors, batch: Tensors, noise: Tensors, carry: Tensors, *, config: Config
) -> LossOutput:
    """Cross-entropy of the discriminator on sampled latents: what player 1 of stage "cvae" lowers.

    Differentiated in the parameters below "discriminator."; the latents, of an encoder in training mode, are under
    stop-gradient, and the parts carry no gradient.

    Args:
        params: all canonical parameters.
        batch: counts (n_cells, n_genes), tissue (n_cells,), library (n_cells,), weight (n_cells,), 0 for padding.
        noise: eps (n_cells, n_latent), and keep1 and keep2 (n_cells, n_hidden), 1 for units of the discriminator that
            are kept and 0 for those that are left out.
        carry: running statistics by canonical name, "cvae.encoder.norm1.mean" and so on.
        config: the run's configuration.

    Returns:
        loss (), nats per cell, and (parts {"discriminator", "accuracy"}, carry as it came). Both parts are means over
        the cells of known tissue.
    """
    loss, parts = _discriminator_terms(params, batch, noise, carry, config=config, train=True)
    return loss, (parts, carry)


def cvae_loss(
    params: Tensors,
    batch: Tensors,
    noise: Tensors,
    carry: Tensors,
    *,
    config: Config,
    beta: float | Tensor,
    train: bool = True,
) -> LossOutput:
    """Negative ELBO of the conditional VAE plus the adversary: what player 2 of stage "cvae" lowers.

    Differentiated in the parameters below "cvae."; those of the discriminator are under stop-gradient, and parts and
    carry have no gradient. Without dropout.

    Args:
        params: all canonical parameters.
        batch: as for `discriminator_loss`.
        noise: eps (n_cells, n_latent).
        carry: running statistics by canonical name.
        config: the run's configuration.
        beta: weight of the KL divergence.
        train: whether the norms take the statistics of the batch and move the running ones.

    Returns:
        loss (), nats per cell, and (parts {"nll", "kl", "adversary"}, carry), the parts before their weights, the carry
        with the running statistics afterwards.
    """
    counts, tissue, weight = batch["counts"], batch["tissue"], batch["weight"]
    mu, r, z_mu, z_logvar, z, statistics = CVAE(select(params, "cvae"))(
        counts, tissue, batch["library"], noise["eps"], select(carry, STATISTICS), weight=weight, train=train
    )
    loss, parts = elbo_loss(counts, mu, r, z_mu, z_logvar, beta=beta, weight=weight)
    frozen = {name: value.detach() for name, value in select(params, "discriminator").items()}
    adversary = adversary_loss(Discriminator(frozen)(z), tissue, weight, kind=config.adversary.kind)
    parts = {**parts, "adversary": adversary.detach()}
    parts = {name: record(name, value) for name, value in parts.items()}
    carry = {f"{STATISTICS}.{name}": value for name, value in statistics.items()}
    return loss + config.adversary.weight * adversary, (parts, carry)


def flow_loss(params: Tensors, batch: Tensors, noise: Tensors, *, config: Config) -> LossOutput:
    """Flow matching of pairs, the loss of stage "flow".

    Differentiated in the parameters below "flow." but for "flow.center" and "flow.scale", which it does not use; the
    parts carry no gradient.

    Args:
        params: all canonical parameters.
        batch: standardised z0 and z1 (n_cells, n_latent), condition (n_cells, n_conditions), start and stop (n_cells,),
            weight (n_cells,), 0 for padding; with a network source, target and sign (n_edges,).
        noise: tau (n_cells,) in [0, 1).
        config: the run's configuration.

    Returns:
        loss () and (parts {"displacement"}, carry {}). The displacement is the mean of (z1 - z0)^2, the loss of a
        velocity that is 0.
    """
    field = VectorField(select(params, "flow"))
    nodes = field.nodes({name: batch[name] for name in ("source", "target", "sign") if name in batch})
    z0, z1, weight = batch["z0"], batch["z1"], batch["weight"]
    loss = flow_matching_loss(
        lambda s, z: field(s, z, batch["condition"], nodes),
        z0,
        z1,
        noise["tau"],
        start=batch["start"],
        stop=batch["stop"],
        weight=weight,
    )
    displacement = (weight * ((z1 - z0) ** 2).mean(-1)).sum() / weight.sum()
    return loss, ({"displacement": displacement.detach()}, {})


# --- steps --------------------------------------------------------------------------------------------------------


def _gradients(
    loss_function: Callable[[Tensors, int, Tensors], LossOutput], n: int, trained: Tensors, carry: Tensors
) -> tuple[Tensor, Tensors, Tensors, Tensors]:
    """Loss, parts and gradients averaged over n micro-batches, and the carry after the last of them."""
    leaves = {name: value.detach().requires_grad_() for name, value in trained.items()}
    losses, all_parts, grads = [], [], {name: torch.zeros_like(value) for name, value in trained.items()}
    for index in range(n):
        loss, (parts, carry) = loss_function(leaves, index, carry)
        if leaves:
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for (name, total), g in zip(grads.items(), found, strict=True):
                grads[name] = total if g is None else total + g / n
        losses.append(loss.detach())
        all_parts.append(parts)
    means = {name: torch.stack([parts[name] for parts in all_parts]).mean() for name in all_parts[0]}
    return torch.stack(losses).mean(), means, grads, carry


def alternating_step(
    state: TrainState,
    batch: Tensors,
    noise: Tensors,
    hyper: Mapping[str, Any],
    config: Config,
    losses: tuple[Callable[..., LossOutput], Callable[..., LossOutput]] = (discriminator_loss, cvae_loss),
) -> tuple[TrainState, dict[str, Any]]:
    """A step of player 1, then one of player 2 against the discriminator as just updated; both or neither."""
    settings, n = config.stage_cvae, len(batch["counts"])
    fixed = {**state.frozen, **state.params}
    names = (
        [name for name in state.params if name.startswith(PLAYER_1)],
        [name for name in state.params if not name.startswith(PLAYER_1)],
    )

    def first(leaves: Tensors, index: int, carry: Tensors) -> LossOutput:
        return losses[0]({**fixed, **leaves}, micro(batch, index), micro(noise, index), carry, config=config)

    def second(leaves: Tensors, index: int, carry: Tensors) -> LossOutput:
        given = micro(batch, index), micro(noise, index)
        return losses[1]({**fixed, **leaves}, *given, carry, config=config, beta=hyper["beta"])

    new_params, new_m, new_v, grads, results = {}, {}, {}, {}, []
    for player, loss_function in zip(names, (first, second), strict=True):
        trained, m, v = ({name: tree[name] for name in player} for tree in (state.params, state.m, state.v))
        with dense_precision(config.precision):
            loss, parts, raw, carry = _gradients(loss_function, n, trained, state.carry)
        results.append((loss, parts, carry))
        if not player:  # nothing to train: its losses are reported, and nothing moves
            continue
        clipped, _ = clip_by_global_norm(raw, settings.max_norm)
        trained, m, v, _ = adam_update(
            trained, clipped, m, v, state.count, lr=hyper["lr"], weight_decay=settings.weight_decay
        )
        new_params, new_m, new_v, grads = {**new_params, **trained}, {**new_m, **m}, {**new_v, **v}, {**grads, **raw}
        fixed = {**fixed, **trained}

    (loss_1, parts_1, _), (loss_2, parts_2, carry) = results
    norms = torch.stack([torch.linalg.vector_norm(grads[name]) for name in sorted(grads)])
    norm = torch.linalg.vector_norm(norms)
    carry = carry if names[1] else state.carry
    ok = bool(torch.isfinite(loss_1 + loss_2 + norm)) and all_finite(new_params, new_m, new_v, carry)
    metrics = {"loss": loss_2, "grad_norm": norm, "ok": ok, "parts": {**parts_1, **parts_2}, "param_grad_norm": norms}
    if not ok:
        return state, metrics
    ordered = ({name: tree[name] for name in state.params} for tree in (new_params, new_m, new_v))
    params, m, v = ordered
    return replace(state, params=params, m=m, v=v, count=state.count + 1, carry=carry), metrics


def cvae_step(
    state: TrainState, batch: Tensors, noise: Tensors, hyper: Mapping[str, Any], *, config: Config
) -> tuple[TrainState, dict[str, Any]]:
    """One step of stage "cvae": the discriminator, then encoder and decoder against it as just updated.

    Each player has its own gradient, clip and AdamW; both share the count. Player 1 trains the names that begin with
    "discriminator.", player 2 the others; a player without trained names is left out, and the running statistics move
    with player 2 only. Not meant to be differentiated. When a loss, the gradient norm or anything new is not finite,
    the state is returned as it came and metrics["ok"] is False.

    Args:
        state: the run, its carry the running statistics by canonical name; it is not changed.
        batch: as for `discriminator_loss`, with a leading axis of micro-batches, over which gradients and losses are
            averaged; the running statistics pass through them in turn.
        noise: the same.
        hyper: {"lr": (), "beta": ()}.
        config: the run's configuration; `stage_cvae` holds max_norm and weight_decay.

    Returns:
        state, and metrics {"loss" of player 2, "grad_norm" of both players together, "ok", "parts" of both,
        "param_grad_norm"}; the last holds the norms before clipping of the trained parameters, sorted by name.
    """
    return alternating_step(state, batch, noise, hyper, config)


def evaluate_players(
    params: Tensors, batch: Tensors, noise: Tensors, carry: Tensors, *, config: Config, beta: float
) -> tuple[Tensor, Tensors]:
    """Player 2's loss and the parts of both, with the running statistics and without dropout."""
    _, first = _discriminator_terms(params, batch, noise, carry, config=config, train=False)
    loss, (second, _) = cvae_loss(params, batch, noise, carry, config=config, beta=beta, train=False)
    return loss, {**first, **second}


def flow_step(
    state: TrainState, batch: Tensors, noise: Tensors, hyper: Mapping[str, Any], *, config: Config
) -> tuple[TrainState, dict[str, Any]]:
    """One step of stage "flow": loss, gradient, clip, AdamW, guard.

    Not meant to be differentiated. When the loss, the gradient norm or anything new is not finite, the state is
    returned as it came and metrics["ok"] is False.

    Args:
        state: the run; it is not changed.
        batch: as for `flow_loss`, with a leading axis of micro-batches, over which gradients and losses are averaged.
        noise: the same.
        hyper: {"lr": (), "beta": ()}.
        config: the run's configuration; `stage_flow` holds max_norm and weight_decay.

    Returns:
        state, and metrics {"loss", "grad_norm", "ok", "parts", "param_grad_norm"}; the last holds the norms before
        clipping of the trained parameters, sorted by name.
    """
    return train_step("flow", state, batch, noise, hyper, config)
