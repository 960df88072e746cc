"""What one would write first: the competitors of the twins, in as few lines as the formulas take.

They are no part of the model. Each computes what a twin computes; `agree` sees to that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pf_core.config import EPS_NORMALISE, EPS_SIGMA, LOGVAR_MAX, LOGVAR_MIN, MU_FLOOR, R_MAX, R_MIN, Config

__all__ = [
    "jax_energy",
    "torch_cdist_energy",
    "torch_energy",
    "torch_operator_step",
    "torch_spectral",
    "torch_vae_step",
]

_LEAST = 1e-12  # of a squared distance, so that the root has a derivative


def torch_energy(x: Any, y: Any) -> Any:
    """Energy distance from whole matrices of distances, by |x|^2 + |y|^2 - 2 x y."""
    import torch

    def mean(a: Any, b: Any) -> Any:
        squared = (a * a).sum(-1)[:, None] + (b * b).sum(-1)[None] - 2.0 * a @ b.T
        if a is b:
            squared = squared * (1.0 - torch.eye(len(a), dtype=a.dtype, device=a.device))
        return torch.sqrt(torch.clamp(squared, min=_LEAST)).mean()

    return 2.0 * mean(x, y) - mean(x, x) - mean(y, y)


def torch_cdist_energy(x: Any, y: Any) -> Any:
    """Energy distance by torch.cdist."""
    import torch

    return 2.0 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()


def jax_energy(x: Any, y: Any) -> Any:
    """Energy distance from whole matrices of distances, for jax.jit."""
    import jax
    import jax.numpy as jnp

    def mean(a: Any, b: Any) -> Any:
        product = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
        squared = (a * a).sum(-1)[:, None] + (b * b).sum(-1)[None] - 2.0 * product
        if a is b:
            squared = squared * (1.0 - jnp.eye(len(a), dtype=a.dtype))
        return jnp.sqrt(jnp.maximum(squared, _LEAST)).mean()

    return 2.0 * mean(x, y) - mean(x, x) - mean(y, y)


def torch_spectral(A: Any, v0: Any, rho_max: float, n_iter: int) -> Any:
    """Sum of relu(spectral norm - rho_max)^2 and the vectors of the iteration, a loop over matrices and iterations."""
    import torch

    total, vectors = torch.zeros((), dtype=A.dtype, device=A.device), []
    for matrix, start in zip(A, v0, strict=True):
        with torch.no_grad():
            v = start
            for _ in range(n_iter):
                v = matrix.T @ (matrix @ v)
                v = v / (torch.linalg.vector_norm(v) + EPS_NORMALISE)
        sigma = torch.sqrt(((matrix @ v) ** 2).sum() + EPS_SIGMA)
        total = total + torch.relu(sigma - rho_max) ** 2
        vectors.append(v)
    return total, torch.stack(vectors)


def _adam(leaves: list[Any], rate: float) -> Any:
    import torch

    return torch.optim.Adam(leaves, lr=rate, betas=(0.9, 0.999), eps=1e-8)


def _stepper(loss: Callable[[], Any], leaves: list[Any], rate: float, max_norm: float) -> Callable[[], tuple[Any, Any]]:
    """A step of torch.optim.Adam after clip_grad_norm_; returns loss and gradient norm."""
    import torch

    optimiser = _adam(leaves, rate)

    def step() -> tuple[Any, Any]:
        optimiser.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(leaves, max_norm)
        optimiser.step()
        return value.detach(), norm

    return step


def torch_vae_step(params: dict, batch: dict, noise: dict, config: Config, *, compile: bool = False) -> Callable:
    """A step of the NB-VAE: textbook likelihood with log-gammas, autograd, torch.optim.Adam.

    Args:
        params: tensors of stage "vae" by canonical name; they are trained in place.
        batch, noise: as for `vae_loss`.
        config: scale "library", input "log1p", one dispersion per gene.
        compile: torch.compile the loss.
    """
    import torch
    from torch.nn.functional import one_hot, softmax

    p = {name: value.requires_grad_() for name, value in params.items()}
    n_tissues = p["vae.decoder.hidden.weight"].shape[0] - config.vae.n_latent
    x, library, weight = batch["counts"], batch["library"], batch["weight"]

    def dense(name: str, value: Any) -> Any:
        return value @ p[f"vae.{name}.weight"] + p[f"vae.{name}.bias"]

    def loss() -> Any:
        tissue = one_hot(batch["tissue"].long(), n_tissues).to(x.dtype)
        h = torch.cat([torch.relu(dense("encoder.hidden", torch.log1p(x))), tissue], 1)
        mean, logvar = dense("encoder.mean", h), dense("encoder.logvar", h).clamp(LOGVAR_MIN, LOGVAR_MAX)
        z = mean + torch.exp(0.5 * logvar) * noise["eps"]
        h = torch.relu(dense("decoder.hidden", torch.cat([z, tissue], 1)))
        mu = library[:, None] * softmax(dense("decoder.mean", h), -1) + MU_FLOOR
        r = torch.exp(p["vae.decoder.log_r"].clamp(math.log(R_MIN), math.log(R_MAX)))
        total = torch.log(r + mu)
        log_p = torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(x + 1.0)
        log_p = log_p + r * (torch.log(r) - total) + x * (torch.log(mu) - total)
        kl = 0.5 * (mean * mean + torch.exp(logvar) - 1.0 - logvar).sum(-1)
        return (weight * (config.vae.beta * kl - log_p.sum(-1))).sum() / weight.sum()

    settings = config.stage_vae
    return _stepper(
        torch.compile(loss) if compile else loss, list(p.values()), settings.learning_rate, settings.max_norm
    )


def torch_operator_step(params: dict, batch: dict, carry: dict, config: Config) -> Callable:
    """A step of the operators: a loop over conditions with whole matrices of distances, a loop for the penalty.

    The condition encoder and the operators are those of the twin; energies, penalty and optimiser are plain.
    """
    import torch

    from pf_core.initial import select
    from pf_torch.conditions import ConditionEncoder
    from pf_torch.operators import OperatorFamily

    p = {name: value.requires_grad_() for name, value in params.items()}
    settings, v = config.operator, carry["v"].clone()
    identity = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
    keys = ("perturbations", "doses", "tissue", "batch", "covariates")

    def loss() -> Any:
        theta = ConditionEncoder(select(p, "conditions"))(*(batch[key] for key in keys))
        A, b = OperatorFamily(select(p, "operators")).operator(theta, batch["tissue"])
        total = torch.zeros((), dtype=v.dtype, device=v.device)
        for index in range(len(A)):
            energy = torch_energy(batch["x"][index] @ A[index].T + b[index], batch["y"][index])
            total = total + energy + settings.shrinkage * ((A[index] - identity) ** 2).sum()
        start = v[batch["slot"].long()]
        spectral, start = torch_spectral(A, start, settings.rho_max, settings.power_iterations)
        v[batch["slot"].long()] = start  # where the next step starts from
        return total / len(A) + settings.spectral_weight * spectral

    stage = config.stage_operator
    return _stepper(loss, list(p.values()), stage.learning_rate, stage.max_norm)
