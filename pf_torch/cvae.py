"""The conditional negative-binomial VAE of the flow system, with batch norm in its encoder (docs/math.md 7)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pf_core.config import BATCH_NORM_EPS, BATCH_NORM_MOMENTUM, MU_FLOOR
from pf_core.initial import select
from pf_torch.layers import Linear, Matrix, leaky_relu, one_hot, own
from pf_torch.likelihood import inverse_dispersion, reparameterize
from pf_torch.probe import record

__all__ = ["CVAE", "ConditionalDecoder", "ConditionalEncoder", "batch_norm"]

Statistics = dict[str, Tensor]


def batch_norm(
    x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, var: Tensor, *, weight: Tensor | None = None, train: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Every column to mean 0 and variance 1 over the cells, then scaled and shifted.

    In training with the weighted mean and biased variance of these cells, through which gradients flow; the running
    statistics move towards them by BATCH_NORM_MOMENTUM, the variance as an unbiased one, times n / (n - 1) with
    n = (sum w)^2 / sum w^2. In evaluation with the running statistics. Differentiated in x, scale and shift; running
    statistics, old and new, carry no gradient. Source: Ioffe & Szegedy 2015, arXiv:1502.03167.

    Args:
        x: (n_cells, n) values.
        scale: (n,) factor.
        shift: (n,) summand.
        mean: (n,) running mean.
        var: (n,) running variance.
        weight: (n_cells,) >= 0, 0 for padding; None for ones. Used in training only.
        train: whether the statistics are those of x.

    Returns:
        y (n_cells, n), and the running mean and variance after it, each (n,); unchanged in evaluation.

    Raises:
        ValueError: fewer than 2 cells in training.
    """
    mean, var = mean.detach(), var.detach()
    if not train:
        return (x - mean) / torch.sqrt(var + BATCH_NORM_EPS) * scale + shift, mean, var
    if x.shape[0] < 2:
        raise ValueError(f"batch norm got {x.shape[0]} cells; at least 2 were wanted in training: use a larger batch")
    w = torch.ones_like(x[:, 0]) if weight is None else weight.to(x.dtype)
    total = w.sum()
    batch_mean = (w[:, None] * x).sum(0) / total
    centred = x - batch_mean
    batch_var = (w[:, None] * centred * centred).sum(0) / total
    y = centred / torch.sqrt(batch_var + BATCH_NORM_EPS) * scale + shift
    n = total * total / (w * w).sum()
    unbiased = batch_var * (n / (n - 1.0))
    new_mean = (1.0 - BATCH_NORM_MOMENTUM) * mean + BATCH_NORM_MOMENTUM * batch_mean
    new_var = (1.0 - BATCH_NORM_MOMENTUM) * var + BATCH_NORM_MOMENTUM * unbiased
    return y, new_mean.detach(), new_var.detach()


class _Norm(nn.Module):
    """Scale and shift of a batch norm; its running statistics come and go as arguments."""

    scale: Tensor
    shift: Tensor

    def __init__(self, params: Mapping[str, Any]):
        super().__init__()
        own(self, "scale", params["scale"])
        own(self, "shift", params["shift"])

    def forward(
        self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, train: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return batch_norm(x, self.scale, self.shift, mean, var, weight=weight, train=train)


class ConditionalEncoder(nn.Module):
    """Counts and tissue to the posterior's mean and log variance, by two layers with batch norm.

    Args:
        params: `block1.weight` (n_genes + n_tissues, n_hidden) and `block2.weight` (n_hidden, n_hidden), without bias;
            `norm1` and `norm2`, each with `scale` and `shift` (n_hidden,); `mean` and `logvar` (n_hidden, n_latent),
            each with `weight` and `bias`.
    """

    def __init__(self, params: Mapping[str, Any]):
        super().__init__()
        self.block1 = Matrix(select(params, "block1"))
        self.norm1 = _Norm(select(params, "norm1"))
        self.block2 = Matrix(select(params, "block2"))
        self.norm2 = _Norm(select(params, "norm2"))
        self.mean = Linear(select(params, "mean"))
        self.logvar = Linear(select(params, "logvar"))

    def forward(
        self,
        x: Tensor,
        tissue: Tensor,
        statistics: Mapping[str, Tensor],
        *,
        weight: Tensor | None = None,
        train: bool = False,
    ) -> tuple[Tensor, Tensor, Statistics]:
        """Posterior mean, unclipped log variance, and the running statistics.

        Differentiated in the parameters and in x, in training through the statistics of the batch too; running
        statistics carry no gradient.

        Args:
            x: (n_cells, n_genes) counts.
            tissue: (n_cells,) index into the tissues.
            statistics: running "norm1.mean", "norm1.var", "norm2.mean" and "norm2.var", each (n_hidden,).
            weight: (n_cells,) of the cells in the batch's statistics, 0 for padding; None for ones.
            train: whether the norms take the statistics of the batch and move the running ones.

        Returns:
            z_mu and z_logvar, each (n_cells, n_latent), and the running statistics afterwards, named as before.

        Raises:
            ValueError: more genes than the model has, or fewer than 2 cells in training.
        """
        n_inputs = self.block1.weight.shape[0]
        if x.ndim != 2 or x.shape[1] >= n_inputs:
            raise ValueError(
                f"counts have shape {tuple(x.shape)} but the model expects (n_cells, fewer than {n_inputs}); "
                "align with pf_core.genes.align_genes"
            )
        x = x.to(self.block1.weight.dtype)
        h = torch.cat([torch.log1p(x), one_hot(tissue, n_inputs - x.shape[1], x.dtype)], dim=-1)
        new: Statistics = {}
        for number, block, norm in (("1", self.block1, self.norm1), ("2", self.block2, self.norm2)):
            mean, var = statistics[f"norm{number}.mean"], statistics[f"norm{number}.var"]
            y, new[f"norm{number}.mean"], new[f"norm{number}.var"] = norm(block(h), mean, var, weight, train)
            y = record(f"cvae.encoder.norm{number}", y)
            h = record(f"cvae.encoder.hidden{number}", leaky_relu(y))
        return record("cvae.encoder.mean", self.mean(h)), record("cvae.encoder.logvar", self.logvar(h)), new


class ConditionalDecoder(nn.Module):
    """Latents, tissue and library size to the mean count of every gene.

    Args:
        params: `block1` (n_latent + n_tissues, n_hidden), `block2` (n_hidden, n_hidden) and `mean` (n_hidden, n_genes),
            each with `weight` and `bias`, and `log_r` (n_genes,).
    """

    log_r: Tensor

    def __init__(self, params: Mapping[str, Any]):
        super().__init__()
        self.block1 = Linear(select(params, "block1"))
        self.block2 = Linear(select(params, "block2"))
        self.mean = Linear(select(params, "mean"))
        own(self, "log_r", params["log_r"])

    def forward(self, z: Tensor, tissue: Tensor, library: Tensor) -> Tensor:
        """Mean counts.

        Differentiated in the parameters, z and library.

        Args:
            z: (n_cells, n_latent) latents.
            tissue: (n_cells,) index into the tissues.
            library: (n_cells,) total counts.

        Returns:
            (n_cells, n_genes) mean counts, library * softmax(.) + MU_FLOOR.

        Raises:
            ValueError: more latents than the model has.
        """
        n_inputs = self.block1.weight.shape[0]
        if z.ndim != 2 or z.shape[1] >= n_inputs:
            raise ValueError(
                f"latents have shape {tuple(z.shape)} but the model expects (n_cells, fewer than {n_inputs})"
            )
        code = one_hot(tissue, n_inputs - z.shape[1], z.dtype)
        h = record("cvae.decoder.hidden1", leaky_relu(self.block1(torch.cat([z, code], dim=-1))))
        h = record("cvae.decoder.hidden2", leaky_relu(self.block2(h)))
        mu = library.to(h.dtype)[:, None] * torch.softmax(self.mean(h), dim=-1)
        return record("cvae.decoder.mean", mu + MU_FLOOR)


class CVAE(nn.Module):
    """The conditional negative-binomial VAE, tissue as a one-hot code on both sides (docs/math.md 7).

    Args:
        params: canonical parameters below "cvae.", with that prefix cut off. NumPy arrays become trainable parameters
            of the module; in a functional step the gradients reach whoever made the arrays.
    """

    def __init__(self, params: Mapping[str, Any]):
        super().__init__()
        self.encoder = ConditionalEncoder(select(params, "encoder"))
        self.decoder = ConditionalDecoder(select(params, "decoder"))

    def encode(
        self,
        x: Tensor,
        tissue: Tensor,
        statistics: Mapping[str, Tensor],
        *,
        weight: Tensor | None = None,
        train: bool = False,
    ) -> tuple[Tensor, Tensor, Statistics]:
        """Posterior mean, unclipped log variance, and the running statistics.

        Differentiated in the parameters and in x, in training through the statistics of the batch too; running
        statistics carry no gradient.

        Args:
            x: (n_cells, n_genes) counts.
            tissue: (n_cells,) index into the tissues.
            statistics: running "norm1.mean", "norm1.var", "norm2.mean" and "norm2.var", each (n_hidden,).
            weight: (n_cells,) of the cells in the batch's statistics, 0 for padding; None for ones.
            train: whether the norms take the statistics of the batch and move the running ones.

        Returns:
            z_mu and z_logvar, each (n_cells, n_latent), and the running statistics afterwards, named as before.

        Raises:
            ValueError: another number of genes than the model has, or fewer than 2 cells in training.
        """
        n_genes = self.decoder.log_r.shape[0]
        if x.ndim != 2 or x.shape[1] != n_genes:
            raise ValueError(
                f"counts have shape {tuple(x.shape)} but the model expects (n_cells, {n_genes}); "
                "align with pf_core.genes.align_genes"
            )
        return self.encoder(x, tissue, statistics, weight=weight, train=train)

    def decode(self, z: Tensor, tissue: Tensor, library: Tensor) -> Tensor:
        """Mean counts.

        Differentiated in the parameters, z and library.

        Args:
            z: (n_cells, n_latent) latents.
            tissue: (n_cells,) index into the tissues.
            library: (n_cells,) total counts.

        Returns:
            (n_cells, n_genes) mean counts, library * softmax(.) + MU_FLOOR.

        Raises:
            ValueError: another number of latents than the model has.
        """
        n_latent = self.encoder.mean.weight.shape[1]
        if z.ndim != 2 or z.shape[1] != n_latent:
            raise ValueError(f"latents have shape {tuple(z.shape)} but the model expects (n_cells, {n_latent})")
        return self.decoder(z, tissue, library)

    def dispersion(self, tissue: Tensor) -> Tensor:
        """Inverse dispersion of every gene.

        Differentiated in log_r.

        Args:
            tissue: (n_cells,) index into the tissues; not used, r is one per gene.

        Returns:
            (n_genes,).
        """
        return record("cvae.r", inverse_dispersion(self.decoder.log_r))

    def forward(
        self,
        x: Tensor,
        tissue: Tensor,
        library: Tensor,
        eps: Tensor,
        statistics: Mapping[str, Tensor],
        *,
        weight: Tensor | None = None,
        train: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Statistics]:
        """Encode, sample, decode.

        Differentiated in the parameters, x, library and eps; running statistics carry no gradient.

        Args:
            x: (n_cells, n_genes) counts.
            tissue: (n_cells,) index into the tissues.
            library: (n_cells,) total counts.
            eps: (n_cells, n_latent) standard normal draws of the caller.
            statistics: running statistics as for `encode`.
            weight: (n_cells,) of the cells in the batch's statistics, 0 for padding; None for ones.
            train: whether the norms take the statistics of the batch and move the running ones.

        Returns:
            mu (n_cells, n_genes), r (n_genes,), z_mu, z_logvar and the sample z, each (n_cells, n_latent), and the
            running statistics afterwards.

        Raises:
            ValueError: another number of genes than the model has, or fewer than 2 cells in training.
        """
        z_mu, z_logvar, new = self.encode(x, tissue, statistics, weight=weight, train=train)
        z = record("cvae.z", reparameterize(z_mu, z_logvar, eps))
        return self.decode(z, tissue, library), self.dispersion(tissue), z_mu, z_logvar, z, new
