"""The negative binomial VAE (docs/math.md 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pf_core.config import MU_FLOOR, VAEConfig
from pf_core.initial import select
from pf_torch.layers import Linear, one_hot, own, softplus
from pf_torch.likelihood import inverse_dispersion, reparameterize
from pf_torch.probe import record

__all__ = ["NBVAE", "Decoder", "Encoder"]


class Encoder(nn.Module):
    """Counts and tissue to the posterior's mean and log variance.

    Args:
        config: the VAE's settings; `input` decides whether log1p counts or counts enter.
        params: `hidden` (n_genes, n_hidden), `mean` and `logvar` (n_hidden + n_tissues, n_latent), each with `weight`
            and `bias`.
    """

    def __init__(self, config: VAEConfig, params: Mapping[str, Any]):
        super().__init__()
        self.config = config
        self.hidden = Linear(select(params, "hidden"))
        self.mean = Linear(select(params, "mean"))
        self.logvar = Linear(select(params, "logvar"))

    def forward(self, x: Tensor, tissue: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and unclipped log variance.

        Differentiated in the parameters and in x.

        Args:
            x: (n_cells, n_genes) counts.
            tissue: (n_cells,) index into the tissues.

        Returns:
            z_mu and z_logvar, each (n_cells, n_latent).

        Raises:
            ValueError: another number of genes than the model has.
        """
        n_genes, n_hidden = self.hidden.weight.shape
        if x.ndim != 2 or x.shape[1] != n_genes:
            raise ValueError(
                f"counts have shape {tuple(x.shape)} but the model expects (n_cells, {n_genes}); "
                "align with pf_core.genes.align_genes"
            )
        x = x.to(self.hidden.weight.dtype)
        inputs = torch.log1p(x) if self.config.input == "log1p" else x
        h = record("vae.encoder.hidden", torch.relu(self.hidden(inputs)))
        h = torch.cat([h, one_hot(tissue, self.mean.weight.shape[0] - n_hidden, h.dtype)], dim=-1)
        return record("vae.encoder.mean", self.mean(h)), record("vae.encoder.logvar", self.logvar(h))


class Decoder(nn.Module):
    """Latents, tissue and library size to the mean count of every gene.

    Args:
        config: the VAE's settings; `scale` decides how the mean is formed.
        params: `hidden` (n_latent + n_tissues, n_hidden) and `mean` (n_hidden, n_genes), each with `weight` and `bias`,
            and `log_r` (n_genes,) or (n_tissues, n_genes).
    """

    log_r: Tensor

    def __init__(self, config: VAEConfig, params: Mapping[str, Any]):
        super().__init__()
        self.config = config
        self.hidden = Linear(select(params, "hidden"))
        self.mean = Linear(select(params, "mean"))
        own(self, "log_r", params["log_r"])

    def forward(self, z: Tensor, tissue: Tensor, library: Tensor) -> Tensor:
        """Mean counts.

        Differentiated in the parameters, z and library.

        Args:
            z: (n_cells, n_latent) latents.
            tissue: (n_cells,) index into the tissues.
            library: (n_cells,) total counts; not used when `scale` is "softplus".

        Returns:
            (n_cells, n_genes) mean counts: softplus(.) + MU_FLOOR, or library * softmax(.) + MU_FLOOR.

        Raises:
            ValueError: another number of latents than the model has.
        """
        n_latent = self.config.n_latent
        if z.ndim != 2 or z.shape[1] != n_latent:
            raise ValueError(f"latents have shape {tuple(z.shape)} but the model expects (n_cells, {n_latent})")
        code = one_hot(tissue, self.hidden.weight.shape[0] - n_latent, z.dtype)
        h = record("vae.decoder.hidden", torch.relu(self.hidden(torch.cat([z, code], dim=-1))))
        if self.config.scale == "softplus":
            mu = softplus(self.mean(h))
        else:
            mu = library.to(h.dtype)[:, None] * torch.softmax(self.mean(h), dim=-1)
        return record("vae.decoder.mean", mu + MU_FLOOR)

    def _dispersion(self, tissue: Tensor) -> Tensor:
        """Inverse dispersion r: (n_genes,), or (C, n_genes) where it depends on the tissue."""
        r = inverse_dispersion(self.log_r)
        return record("vae.r", r if self.log_r.ndim == 1 else r[tissue])


class NBVAE(nn.Module):
    """The negative-binomial VAE, tissue as a one-hot code (Lopez et al. 2018, doi:10.1038/s41592-018-0229-2).

    Args:
        config: the VAE's settings.
        params: canonical parameters below "vae.", with that prefix cut off. NumPy arrays become trainable parameters of
            the module; in a functional step the gradients reach whoever made the arrays.
    """

    def __init__(self, config: VAEConfig, params: Mapping[str, Any]):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, select(params, "encoder"))
        self.decoder = Decoder(config, select(params, "decoder"))

    def encode(self, x: Tensor, tissue: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and unclipped log variance.

        Differentiated in the parameters and in x.

        Args:
            x: (n_cells, n_genes) counts.
            tissue: (n_cells,) index into the tissues.

        Returns:
            z_mu and z_logvar, each (n_cells, n_latent).

        Raises:
            ValueError: another number of genes than the model has.
        """
        return self.encoder(x, tissue)

    def decode(self, z: Tensor, tissue: Tensor, library: Tensor) -> Tensor:
        """Mean counts.

        Differentiated in the parameters, z and library.

        Args:
            z: (n_cells, n_latent) latents.
            tissue: (n_cells,) index into the tissues.
            library: (n_cells,) total counts; not used when `scale` is "softplus".

        Returns:
            (n_cells, n_genes) mean counts: softplus(.) + MU_FLOOR, or library * softmax(.) + MU_FLOOR.
        """
        return self.decoder(z, tissue, library)

    def dispersion(self, tissue: Tensor) -> Tensor:
        """Inverse dispersion of every gene.

        Differentiated in log_r.

        Args:
            tissue: (n_cells,) index into the tissues; used when `dispersion` is "gene-tissue".

        Returns:
            (n_genes,) for "gene", (n_cells, n_genes) for "gene-tissue".
        """
        return self.decoder._dispersion(tissue)

    def forward(self, x: Tensor, tissue: Tensor, library: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode, sample, decode.

        Differentiated in the parameters, x, library and eps.

        Args:
            x: (n_cells, n_genes) counts.
            tissue: (n_cells,) index into the tissues.
            library: (n_cells,) total counts.
            eps: (n_cells, n_latent) standard normal draws of the caller.

        Returns:
            mu (n_cells, n_genes), r as `dispersion`, z_mu and z_logvar (n_cells, n_latent).

        Raises:
            ValueError: another number of genes than the model has.
        """
        z_mu, z_logvar = self.encode(x, tissue)
        z = record("vae.z", reparameterize(z_mu, z_logvar, eps))
        return self.decode(z, tissue, library), self.dispersion(tissue), z_mu, z_logvar
