"""The negative binomial VAE (docs/math.md 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pf_core.config import MU_FLOOR, VAEConfig
from pf_torch.layers import Linear, one_hot, own, select, softplus
from pf_torch.likelihood import inverse_dispersion, reparameterize
from pf_torch.probe import record

__all__ = ["NBVAE", "Decoder", "Encoder"]


class Encoder(nn.Module):
    """Counts to the mean and log variance of the latent posterior.

    Args:
        config: `input` says whether the network sees log1p counts or counts.
        params: hidden (n_genes, n_hidden), mean and logvar (n_hidden + n_tissues, n_latent), weights and biases.
    """

    def __init__(self, config: VAEConfig, params: Mapping[str, Any]):
        super().__init__()
        self.config = config
        self.hidden = Linear(select(params, "hidden"))
        self.mean = Linear(select(params, "mean"))
        self.logvar = Linear(select(params, "logvar"))

    def forward(self, x: Tensor, tissue: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior of each cell. Differentiable in the parameters and in x.

        Args:
            x: (C, n_genes) counts.
            tissue: (C,) integers.

        Returns:
            z_mu and z_logvar, (C, n_latent) each, the log variance unclipped.

        Raises:
            ValueError: x has another number of genes than the parameters.
        """
        n_genes, n_hidden = self.hidden.weight.shape
        if x.ndim != 2 or x.shape[1] != n_genes:
            raise ValueError(
                f"counts have shape {tuple(x.shape)} but the model expects (n_cells, {n_genes}); "
                "align the genes with pf_core.data.align_genes"
            )
        x = x.to(self.hidden.weight.dtype)
        inputs = torch.log1p(x) if self.config.input == "log1p" else x
        h = record("vae.encoder.hidden", torch.relu(self.hidden(inputs)))
        h = torch.cat([h, one_hot(tissue, self.mean.weight.shape[0] - n_hidden, h.dtype)], dim=-1)
        return record("vae.encoder.mean", self.mean(h)), record("vae.encoder.logvar", self.logvar(h))


class Decoder(nn.Module):
    """Latent vectors to the mean counts, and the inverse dispersion of every gene.

    Args:
        config: `scale` says how the mean is formed.
        params: hidden (n_latent + n_tissues, n_hidden), mean (n_hidden, n_genes), weights and biases, and log_r
            (n_genes,) or (n_tissues, n_genes).
    """

    log_r: Tensor

    def __init__(self, config: VAEConfig, params: Mapping[str, Any]):
        super().__init__()
        self.config = config
        self.hidden = Linear(select(params, "hidden"))
        self.mean = Linear(select(params, "mean"))
        own(self, "log_r", params["log_r"])

    def forward(self, z: Tensor, tissue: Tensor, library: Tensor) -> Tensor:
        """Mean counts. Differentiable in the parameters, z and library.

        Args:
            z: (C, n_latent).
            tissue: (C,) integers.
            library: (C,) total counts; only scale "library" looks at it.

        Returns:
            (C, n_genes) counts: softplus(.) + MU_FLOOR, or library * softmax(.) + MU_FLOOR.
        """
        code = one_hot(tissue, self.hidden.weight.shape[0] - z.shape[-1], z.dtype)
        h = record("vae.decoder.hidden", torch.relu(self.hidden(torch.cat([z, code], dim=-1))))
        if self.config.scale == "softplus":
            mu = softplus(self.mean(h))
        else:
            mu = library.to(h.dtype)[:, None] * torch.softmax(self.mean(h), dim=-1)
        return record("vae.decoder.mean", mu + MU_FLOOR)

    def dispersion(self, tissue: Tensor) -> Tensor:
        """Inverse dispersion r: (n_genes,), or (C, n_genes) where it depends on the tissue."""
        r = inverse_dispersion(self.log_r)
        return record("vae.r", r if self.log_r.ndim == 1 else r[tissue])


class NBVAE(nn.Module):
    """Negative binomial VAE (Lopez et al. 2018, doi:10.1038/s41592-018-0229-2), tissue as a one-hot code.

    Args:
        config: how counts enter and means leave.
        params: canonical parameters without the prefix `vae.`. NumPy arrays and nn.Parameters become parameters of the
            module; other tensors are used as they are, so that gradients reach whoever made them.
    """

    def __init__(self, config: VAEConfig, params: Mapping[str, Any]):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, select(params, "encoder"))
        self.decoder = Decoder(config, select(params, "decoder"))

    def encode(self, x: Tensor, tissue: Tensor) -> tuple[Tensor, Tensor]:
        """(z_mu, z_logvar) of counts (C, n_genes); see `Encoder`."""
        return self.encoder(x, tissue)

    def decode(self, z: Tensor, tissue: Tensor, library: Tensor) -> Tensor:
        """Mean counts (C, n_genes) of latent vectors (C, n_latent); see `Decoder`."""
        return self.decoder(z, tissue, library)

    def dispersion(self, tissue: Tensor) -> Tensor:
        """Inverse dispersion (n_genes,) or (C, n_genes)."""
        return self.decoder.dispersion(tissue)

    def forward(self, x: Tensor, tissue: Tensor, library: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode, sample, decode. Differentiable in the parameters.

        Args:
            x: (C, n_genes) counts.
            tissue: (C,) integers.
            library: (C,) total counts.
            eps: (C, n_latent) standard normal, drawn by the caller.

        Returns:
            mu (C, n_genes), r (n_genes,) or (C, n_genes), z_mu and z_logvar (C, n_latent).
        """
        z_mu, z_logvar = self.encode(x, tissue)
        z = record("vae.z", reparameterize(z_mu, z_logvar, eps))
        return self.decode(z, tissue, library), self.dispersion(tissue), z_mu, z_logvar
