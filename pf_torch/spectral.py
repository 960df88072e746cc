"""Spectral norms by power iteration, and penalties on operators that grow (docs/math.md 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from pf_core.config import EPS_NORMALISE, EPS_SIGMA, POWER_ITERATIONS, RHO_MAX

__all__ = [
    "generator_penalty",
    "operator_norm",
    "power_iteration",
    "spectral_norm",
    "spectral_penalty",
    "spectral_radius",
]


def _check_square(A: Tensor) -> None:
    if A.ndim < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"A has shape {tuple(A.shape)}; square matrices (..., n_latent, n_latent) were wanted")


def _check(A: Tensor, v0: Tensor) -> None:
    _check_square(A)
    if v0.shape != A.shape[:-1]:
        wanted = tuple(A.shape[:-1])
        raise ValueError(f"v0 has shape {tuple(v0.shape)}; one start per matrix, {wanted}, was wanted")


def power_iteration(A: Tensor, v0: Tensor, *, n_iter: int = POWER_ITERATIONS) -> Tensor:
    """Leading right singular vector of A, by power iteration on A^T A.

    Nothing is differentiated: the iteration v <- A^T A v, v <- v / (|v| + EPS_NORMALISE) is under stop-gradient.

    Args:
        A: (..., n_latent, n_latent).
        v0: (..., n_latent) non-zero start, drawn by the caller.
        n_iter: fixed count, so that both frameworks do equal work; 0 returns v0.

    Returns:
        (..., n_latent) unit vectors.

    Raises:
        ValueError: A is not square, or v0 has another shape.
    """
    _check(A, v0)
    A, v = A.detach(), v0.detach()
    for _ in range(n_iter):
        # As rows: products of matrices with single columns are twenty times slower here.
        v = torch.matmul(torch.matmul(v[..., None, :], A.mT), A)[..., 0, :]
        v = v / (torch.linalg.vector_norm(v, dim=-1, keepdim=True) + EPS_NORMALISE)
    return v


def _norm_along(A: Tensor, v: Tensor) -> Tensor:
    """sqrt(max(|A v|^2, 0) + EPS_SIGMA), differentiated in A only."""
    image = torch.matmul(v.detach()[..., None, :], A.mT)[..., 0, :]
    return torch.sqrt((image * image).sum(-1) + EPS_SIGMA)  # a sum of squares is never below 0


def spectral_norm(A: Tensor, v0: Tensor, *, n_iter: int = POWER_ITERATIONS) -> Tensor:
    """Largest singular value of A, by power iteration on A^T A.

    The iteration is under stop-gradient; only |A v| is differentiated, so
    d sigma / dA = (A v) v^T / sigma (Miyato et al. 2018, arXiv:1802.05957).

    Args:
        A: (..., n_latent, n_latent).
        v0: (..., n_latent) non-zero start, drawn by the caller.
        n_iter: fixed count, so that both frameworks do equal work.

    Returns:
        (...) norm, same dtype as A.

    Raises:
        ValueError: A is not square, or v0 has another shape.
    """
    return _norm_along(A, power_iteration(A, v0, n_iter=n_iter))


def spectral_penalty(
    A: Tensor,
    v0: Tensor,
    *,
    rho_max: float = RHO_MAX,
    n_iter: int = POWER_ITERATIONS,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over matrices of weight * relu(spectral norm - rho_max)^2.

    Differentiated in A as `spectral_norm` is; the returned vectors carry no gradient.

    Args:
        A: (..., n_latent, n_latent).
        v0: (..., n_latent) non-zero start, drawn by the caller or carried from the step before.
        rho_max: largest norm that is not penalised.
        n_iter: fixed count, so that both frameworks do equal work.
        weight: (...) weight of each matrix; None for 1.

    Returns:
        penalty (), and the vectors (..., n_latent) to start from next time.

    Raises:
        ValueError: A is not square, or v0 has another shape.
    """
    v = power_iteration(A, v0, n_iter=n_iter)
    excess = torch.relu(_norm_along(A, v) - rho_max) ** 2
    return (excess if weight is None else weight * excess).sum(), v


def generator_penalty(A: Tensor, *, dt: float = 1.0) -> Tensor:
    """Sum over matrices of the squared positive eigenvalues of the symmetric part of (A - I) / dt.

    An operator without such eigenvalues moves no two states apart. Differentiated in A, also where eigenvalues
    coincide; a second derivative in PyTorch needs them distinct.

    Args:
        A: (..., n_latent, n_latent).
        dt: time that the operator stands for, in the caller's unit.

    Returns:
        () penalty.

    Raises:
        ValueError: A is not square.
    """
    _check_square(A)
    generator = (A - torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)) / dt
    eigenvalues = torch.linalg.eigvalsh(0.5 * (generator + generator.mT))
    return (torch.relu(eigenvalues) ** 2).sum()


def operator_norm(A: Tensor, *, kind: str = "spectral") -> Tensor:
    """Exact norm of A, for monitoring.

    Nothing is differentiated.

    Args:
        A: (..., n_latent, n_latent).
        kind: "spectral" for the largest singular value, "frobenius" for the root of the sum of squares.

    Returns:
        (...) norm.

    Raises:
        ValueError: an unknown kind, or A is not square.
    """
    _check_square(A)
    if kind not in ("spectral", "frobenius"):
        raise ValueError(f"kind is {kind!r}; 'spectral' or 'frobenius' was wanted")
    return torch.linalg.matrix_norm(A.detach(), ord=2 if kind == "spectral" else "fro")


def spectral_radius(A: Tensor) -> Tensor:
    """Largest modulus of the eigenvalues of A, for monitoring.

    Nothing is differentiated. It is not a norm: a matrix of radius below 1 can still grow states for a while.

    Args:
        A: (..., n_latent, n_latent).

    Returns:
        (...) radius.

    Raises:
        ValueError: A is not square.
    """
    _check_square(A)
    return torch.linalg.eigvals(A.detach()).abs().amax(-1)
