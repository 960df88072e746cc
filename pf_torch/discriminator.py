"""The discriminator that looks for the tissue in the latents, and the losses of the two players (docs/math.md 7)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pf_core.initial import select
from pf_torch.layers import Linear, leaky_relu
from pf_torch.probe import record

__all__ = ["Discriminator", "adversary_loss", "cross_entropy"]


class Discriminator(nn.Module):
    """Latents to one logit per known tissue.

    Args:
        params: `hidden1` (n_latent, n), `hidden2` (n, n) and `out` (n, n_classes), each with `weight` and `bias`.
    """

    def __init__(self, params: Mapping[str, Any]):
        super().__init__()
        self.hidden1 = Linear(select(params, "hidden1"))
        self.hidden2 = Linear(select(params, "hidden2"))
        self.out = Linear(select(params, "out"))

    def forward(
        self, z: Tensor, keep1: Tensor | None = None, keep2: Tensor | None = None, *, dropout: float = 0.0
    ) -> Tensor:
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
            raise ValueError(f"latents have shape {tuple(z.shape)} but the model expects (n_cells, {n_latent})")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout!r}; a share from 0 up to, not including, 1 was wanted")
        h = z
        for number, layer, keep in ((1, self.hidden1, keep1), (2, self.hidden2, keep2)):
            h = leaky_relu(layer(h))
            if keep is not None:
                if keep.shape != h.shape:
                    raise ValueError(f"keep{number} has shape {tuple(keep.shape)}; {(len(z), n_hidden)} was wanted")
                h = h * keep.to(h.dtype) / (1.0 - dropout)
        return record("discriminator.logits", self.out(h))


def _mean_of_known(values: Tensor, tissue: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over the cells of known tissue; 0 where there is none."""
    w = weight.to(values.dtype) * (tissue > 0)
    total = w.sum()
    return (w * values).sum() / torch.where(total > 0, total, 1.0)


def cross_entropy(logits: Tensor, tissue: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of -log softmax(logits)[tissue - 1] over the cells of known tissue.

    Differentiated in logits; cells of tissue 0, "unknown", have no part in it.

    Args:
        logits: (n_cells, n_classes).
        tissue: (n_cells,) index into the tissues, at most n_classes.
        weight: (n_cells,) >= 0, 0 for padding.

    Returns:
        () nats per cell; 0 where no cell has a known tissue.
    """
    label = (tissue.long() - 1).clamp(min=0)
    of_cells = -torch.log_softmax(logits, dim=-1).gather(1, label[:, None])[:, 0]
    return _mean_of_known(of_cells, tissue, weight)


def adversary_loss(logits: Tensor, tissue: Tensor, weight: Tensor, *, kind: str) -> Tensor:
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
    log_p = torch.log_softmax(logits, dim=-1)
    return _mean_of_known((torch.exp(log_p) * log_p).sum(-1), tissue, weight)
