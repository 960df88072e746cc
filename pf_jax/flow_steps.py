"""Losses and steps of the flow system (docs/math.md 7): the alternating step of stage "cvae", and stage "flow"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from pf_core.config import Config
from pf_core.initial import select
from pf_jax.cvae import CVAE
from pf_jax.discriminator import Discriminator, adversary_loss, cross_entropy, known_mean, labels
from pf_jax.flow import GRAPH, VectorField, cell_mean, flow_matching_loss
from pf_jax.likelihood import elbo_loss, reparameterize
from pf_jax.probe import record

if TYPE_CHECKING:
    from pf_jax.steps import TrainState

__all__ = ["cvae_loss", "cvae_step", "discriminator_loss", "flow_loss", "flow_step"]

Arrays = dict[str, jax.Array]
ENCODER = "cvae.encoder"


def discriminator_loss(
    params: Mapping[str, Any], batch: Arrays, noise: Arrays, carry: Arrays, *, config: Config
) -> tuple[jax.Array, tuple[Arrays, Arrays]]:
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
    return _discriminator_loss(params, batch, noise, carry, config=config, train=True)


def _discriminator_loss(params, batch, noise, carry, *, config: Config, train: bool):
    """`discriminator_loss`, or with running statistics and without dropout."""
    cvae, tissue, weight = CVAE(select(params, "cvae")), batch["tissue"], batch["weight"]
    statistics = select(carry, ENCODER)
    z_mu, z_logvar, _ = cvae.encode(batch["counts"], tissue, statistics, weight=weight, train=train)
    z = jax.lax.stop_gradient(record("cvae.z", reparameterize(z_mu, z_logvar, noise["eps"])))
    keep = (noise["keep1"], noise["keep2"]) if train else (None, None)
    logits = Discriminator(select(params, "discriminator"))(z, *keep, dropout=config.adversary.dropout)
    loss = record("discriminator", cross_entropy(logits, tissue, weight))
    hit = (logits.argmax(-1) == labels(tissue)).astype(logits.dtype)
    parts = {"discriminator": jax.lax.stop_gradient(loss), "accuracy": known_mean(hit, tissue, weight)}
    return loss, (parts, carry)


def cvae_loss(
    params: Mapping[str, Any],
    batch: Arrays,
    noise: Arrays,
    carry: Arrays,
    *,
    config: Config,
    beta: float | jax.Array,
    train: bool = True,
) -> tuple[jax.Array, tuple[Arrays, Arrays]]:
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
        counts, tissue, batch["library"], noise["eps"], select(carry, ENCODER), weight=weight, train=train
    )
    loss, parts = elbo_loss(counts, mu, r, z_mu, z_logvar, beta=beta, weight=weight)
    logits = Discriminator(jax.lax.stop_gradient(select(params, "discriminator")))(z)
    adversary = adversary_loss(logits, tissue, weight, kind=config.adversary.kind)
    parts = {name: record(name, part) for name, part in (parts | {"adversary": adversary}).items()}
    carry = {f"{ENCODER}.{name}": value for name, value in statistics.items()}
    return loss + config.adversary.weight * adversary, (parts | {"adversary": jax.lax.stop_gradient(adversary)}, carry)


def players_loss(params, batch, noise, carry, *, config: Config, beta, train: bool = True):
    """Both players at the same parameters: the value is the second's, the gradient of a parameter its own player's."""
    rival, (rival_parts, _) = _discriminator_loss(params, batch, noise, carry, config=config, train=train)
    loss, (parts, carry) = cvae_loss(params, batch, noise, carry, config=config, beta=beta, train=train)
    return loss + (rival - jax.lax.stop_gradient(rival)), (rival_parts | parts, carry)


def flow_loss(
    params: Mapping[str, Any], batch: Arrays, noise: Arrays, *, config: Config
) -> tuple[jax.Array, tuple[Arrays, Arrays]]:
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
    z0, z1, weight = batch["z0"], batch["z1"], batch["weight"]
    field = VectorField(select(params, "flow"))
    nodes = field.nodes({name: batch[name] for name in GRAPH if name in batch})
    loss = flow_matching_loss(
        lambda s, z: field(s, z, batch["condition"], nodes),
        z0,
        z1,
        noise["tau"],
        start=batch["start"],
        stop=batch["stop"],
        weight=weight,
    )
    return loss, ({"displacement": cell_mean(((z1 - z0) ** 2).mean(-1), weight)}, {})


def cvae_step(state: TrainState, batch: Arrays, noise: Arrays, hyper: Arrays, *, config: Config):
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
    from pf_jax.steps import one_step  # steps.py is made of the losses above

    return one_step("cvae", state, batch, noise, hyper, config)


def flow_step(state: TrainState, batch: Arrays, noise: Arrays, hyper: Arrays, *, config: Config):
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
    from pf_jax.steps import one_step  # steps.py is made of the losses above

    return one_step("flow", state, batch, noise, hyper, config)
