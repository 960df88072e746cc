"""The discriminator that tells tissues from latents, and the two forms of its adversary (docs/math.md 7)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pf_core.initial import select
from pf_jax.layers import Linear, leaky_relu
from pf_jax.probe import record

__all__ = ["Discriminator", "adversary_loss", "cross_entropy"]


class Discriminator(nnx.Module):
    """Latents to one logit per known tissue.

    Args:
        params: `hidden1` (n_latent, n), `hidden2` (n, n) and `out` (n, n_classes), each with `weight` and `bias`.
    """

    def __init__(self, params: Mapping[str, Any]):
        self.hidden1 = Linear(select(params, "hidden1"))
        self.hidden2 = Linear(select(params, "hidden2"))
        self.out = Linear(select(params, "out"))

    def __call__(
        self,
        z: jax.Array,
        keep1: jax.Array | None = None,
        keep2: jax.Array | None = None,
        *,
        dropout: float = 0.0,
    ) -> jax.Array:
        """Logits.

        Differentiated in the parameters and z; the masks are data.

        Args:
            z: (n_cells, n_latent) latents.
            keep1: (n_cells, n) 1 where a unit of the first hidden layer is kept, 0 where not; None keeps all.
            keep2: (n_cells, n) the same for the second.
            dropout: share of units left out; what is kept is divided by 1 - dropout where there is a mask.

        Returns:
            (n_cells, n_classes), class k for tissue k + 1.

        Raises:
            ValueError: another number of latents than the model has, masks of another shape, or a dropout outside
                [0, 1).
        """
        n_latent, n_hidden = self.hidden1.weight.shape
        if z.ndim != 2 or z.shape[1] != n_latent:
            raise ValueError(f"latents have shape {z.shape} but the discriminator expects (n_cells, {n_latent})")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout!r}; a share from 0 up to, not including, 1 was wanted")
        h = z
        for number, layer, keep in ((1, self.hidden1, keep1), (2, self.hidden2, keep2)):
            h = leaky_relu(layer(h))
            if keep is not None:
                if keep.shape != h.shape:
                    raise ValueError(f"keep{number} has shape {keep.shape}; {(z.shape[0], n_hidden)} was wanted")
                h = h * (keep.astype(h.dtype) / (1.0 - dropout))
        return record("discriminator.logits", self.out(h))


def cross_entropy(logits: jax.Array, tissue: jax.Array, weight: jax.Array) -> jax.Array:
    """Weighted mean of -log softmax(logits)[tissue - 1] over the cells of known tissue.

    Differentiated in logits; cells of tissue 0, "unknown", have no part in it.

    Args:
        logits: (n_cells, n_classes).
        tissue: (n_cells,) index into the tissues, at most n_classes.
        weight: (n_cells,) >= 0, 0 for padding.

    Returns:
        () nats per cell; 0 where no cell has a known tissue.
    """
    log_p = jax.nn.log_softmax(logits, axis=-1)
    truth = jnp.take_along_axis(log_p, labels(tissue)[:, None], axis=-1)[:, 0]
    return known_mean(-truth, tissue, weight)


def adversary_loss(logits: jax.Array, tissue: jax.Array, weight: jax.Array, *, kind: str) -> jax.Array:
    """What the encoder lowers so that the discriminator is left guessing.

    Differentiated in logits; cells of tissue 0, "unknown", have no part in it.

    Args:
        logits: (n_cells, n_classes).
        tissue: (n_cells,) index into the tissues, at most n_classes.
        weight: (n_cells,) >= 0, 0 for padding.
        kind: "entropy" for minus the mean entropy of softmax(logits), "minimax" for minus the cross-entropy.

    Returns:
        () nats per cell; 0 where no cell has a known tissue.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "minimax":
        return -cross_entropy(logits, tissue, weight)
    if kind != "entropy":
        raise ValueError(f"kind is {kind!r}; 'entropy' or 'minimax' was wanted")
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return known_mean((jnp.exp(log_p) * log_p).sum(-1), tissue, weight)


def labels(tissue: jax.Array) -> jax.Array:
    """Class of each tissue; any class for "unknown", which has no weight."""
    return jnp.maximum(tissue - 1, 0)


def known_mean(values: jax.Array, tissue: jax.Array, weight: jax.Array) -> jax.Array:
    """Weighted mean over cells of known tissue, 0 where there is none."""
    w = jnp.where(tissue > 0, weight.astype(values.dtype), 0.0)
    total = w.sum()
    return (w * values).sum() / jnp.where(total > 0, total, 1.0)
