"""The flow system's conditional NB-VAE (docs/math.md 7): batch norm, and modules that own weights and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pf_core.config import BATCH_NORM_EPS, BATCH_NORM_MOMENTUM, MU_FLOOR
from pf_core.initial import select
from pf_jax.layers import Linear, Matrix, leaky_relu
from pf_jax.likelihood import inverse_dispersion, reparameterize
from pf_jax.probe import record

__all__ = ["CVAE", "ConditionalDecoder", "ConditionalEncoder", "batch_norm"]

Statistics = Mapping[str, jax.Array]


def batch_norm(
    x: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    *,
    weight: jax.Array | None = None,
    train: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
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
    mean, var = jax.lax.stop_gradient((mean, var))
    if not train:
        return (x - mean) / jnp.sqrt(var + BATCH_NORM_EPS) * scale + shift, mean, var
    if x.shape[0] < 2:
        raise ValueError(
            f"batch norm got {x.shape[0]} cells in training, at least 2 were wanted; give larger batches or train=False"
        )
    w = (jnp.ones(x.shape[0], x.dtype) if weight is None else weight.astype(x.dtype))[:, None]
    total = w.sum()
    batch_mean = (w * x).sum(0) / total
    centred = x - batch_mean
    batch_var = (w * centred * centred).sum(0) / total
    y = centred / jnp.sqrt(batch_var + BATCH_NORM_EPS) * scale + shift
    # n / (n - 1) with n = S^2 / sum w^2.
    unbiased = total * total / (total * total - (w * w).sum()) * batch_var
    keep, new = 1.0 - BATCH_NORM_MOMENTUM, BATCH_NORM_MOMENTUM
    after = keep * mean + new * batch_mean, keep * var + new * unbiased
    return y, *jax.lax.stop_gradient(after)


class _Norm(nnx.Module):
    """Scale and shift of a batch norm; its running statistics belong to the caller."""

    def __init__(self, params: Mapping[str, Any]):
        self.scale = nnx.Param(jnp.asarray(params["scale"]))
        self.shift = nnx.Param(jnp.asarray(params["shift"]))

    def __call__(self, x, mean, var, weight, train):
        return batch_norm(x, self.scale[...], self.shift[...], mean, var, weight=weight, train=train)


class ConditionalEncoder(nnx.Module):
    """Counts and tissue to the posterior's mean and log variance, by two layers with batch norm.

    Args:
        params: `block1.weight` (n_genes + n_tissues, n_hidden) and `block2.weight` (n_hidden, n_hidden), without bias;
            `norm1` and `norm2`, each with `scale` and `shift` (n_hidden,); `mean` and `logvar` (n_hidden, n_latent),
            each with `weight` and `bias`.
    """

    def __init__(self, params: Mapping[str, Any]):
        self.block1 = Matrix(select(params, "block1"))
        self.norm1 = _Norm(select(params, "norm1"))
        self.block2 = Matrix(select(params, "block2"))
        self.norm2 = _Norm(select(params, "norm2"))
        self.mean = Linear(select(params, "mean"))
        self.logvar = Linear(select(params, "logvar"))

    def __call__(
        self,
        x: jax.Array,
        tissue: jax.Array,
        statistics: Statistics,
        *,
        weight: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
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
        n_rows = self.block1.weight.shape[0]
        if x.ndim != 2 or x.shape[1] >= n_rows:
            raise ValueError(
                f"counts have shape {x.shape} but the model has {n_rows} genes and tissues together; "
                "align with pf_core.genes.align_genes"
            )
        x = x.astype(self.block1.weight.dtype)
        h = jnp.concatenate([jnp.log1p(x), _one_hot(tissue, n_rows - x.shape[1], x.dtype)], axis=-1)
        after = {}
        for number, block, norm in ((1, self.block1, self.norm1), (2, self.block2, self.norm2)):
            mean, var = f"norm{number}.mean", f"norm{number}.var"
            h, after[mean], after[var] = norm(block(h), statistics[mean], statistics[var], weight, train)
            h = leaky_relu(record(f"cvae.encoder.norm{number}", h))
            h = record(f"cvae.encoder.hidden{number}", h)
        return record("cvae.encoder.mean", self.mean(h)), record("cvae.encoder.logvar", self.logvar(h)), after


class ConditionalDecoder(nnx.Module):
    """Latents, tissue and library size to the mean count of every gene.

    Args:
        params: `block1` (n_latent + n_tissues, n_hidden), `block2` (n_hidden, n_hidden) and `mean` (n_hidden, n_genes),
            each with `weight` and `bias`, and `log_r` (n_genes,).
    """

    def __init__(self, params: Mapping[str, Any]):
        self.block1 = Linear(select(params, "block1"))
        self.block2 = Linear(select(params, "block2"))
        self.mean = Linear(select(params, "mean"))
        self.log_r = nnx.Param(jnp.asarray(params["log_r"]))

    def __call__(self, z: jax.Array, tissue: jax.Array, library: jax.Array) -> jax.Array:
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
        n_rows = self.block1.weight.shape[0]
        if z.ndim != 2 or z.shape[1] >= n_rows:
            raise ValueError(f"latents have shape {z.shape} but the model has {n_rows} latents and tissues together")
        h = jnp.concatenate([z, _one_hot(tissue, n_rows - z.shape[1], z.dtype)], axis=-1)
        h = record("cvae.decoder.hidden1", leaky_relu(self.block1(h)))
        h = record("cvae.decoder.hidden2", leaky_relu(self.block2(h)))
        share = jax.nn.softmax(self.mean(h), axis=-1)
        return record("cvae.decoder.mean", library.astype(z.dtype)[:, None] * share + MU_FLOOR)


class CVAE(nnx.Module):
    """The conditional negative-binomial VAE, tissue as a one-hot code on both sides (docs/math.md 7).

    Args:
        params: canonical parameters below "cvae.", with that prefix cut off. NumPy arrays become trainable parameters
            of the module; in a functional step the gradients reach whoever made the arrays.
    """

    def __init__(self, params: Mapping[str, Any]):
        self.encoder = ConditionalEncoder(select(params, "encoder"))
        self.decoder = ConditionalDecoder(select(params, "decoder"))

    def encode(
        self,
        x: jax.Array,
        tissue: jax.Array,
        statistics: Statistics,
        *,
        weight: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
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
        n_genes = self.decoder.mean.weight.shape[1]
        if x.ndim != 2 or x.shape[1] != n_genes:
            raise ValueError(
                f"counts have shape {x.shape} but the model expects (n_cells, {n_genes}); "
                "align with pf_core.genes.align_genes"
            )
        return self.encoder(x, tissue, statistics, weight=weight, train=train)

    def decode(self, z: jax.Array, tissue: jax.Array, library: jax.Array) -> jax.Array:
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
            raise ValueError(f"latents have shape {z.shape} but the model expects (n_cells, {n_latent})")
        return self.decoder(z, tissue, library)

    def dispersion(self, tissue: jax.Array) -> jax.Array:
        """Inverse dispersion of every gene.

        Differentiated in log_r.

        Args:
            tissue: (n_cells,) index into the tissues; not used, r is one per gene.

        Returns:
            (n_genes,).
        """
        return record("cvae.r", inverse_dispersion(self.decoder.log_r[...]))

    def __call__(
        self,
        x: jax.Array,
        tissue: jax.Array,
        library: jax.Array,
        eps: jax.Array,
        statistics: Statistics,
        *,
        weight: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, dict[str, jax.Array]]:
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
        z_mu, z_logvar, after = self.encode(x, tissue, statistics, weight=weight, train=train)
        z = record("cvae.z", reparameterize(z_mu, z_logvar, eps))
        return self.decode(z, tissue, library), self.dispersion(tissue), z_mu, z_logvar, z, after


def _one_hot(index: jax.Array, n: int, dtype) -> jax.Array:
    return jax.nn.one_hot(index, n, dtype=dtype)
