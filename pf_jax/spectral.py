"""Norms of operators, and the penalties that bound them (docs/math.md 6)."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from pf_core.config import EPS_NORMALISE, EPS_SIGMA, POWER_ITERATIONS, RHO_MAX
from pf_jax.layers import PRECISION, matmul

__all__ = [
    "generator_penalty",
    "operator_norm",
    "power_iteration",
    "spectral_norm",
    "spectral_penalty",
    "spectral_radius",
]


_UNROLLED = 8  # iterations


def power_iteration(A: jax.Array, v0: jax.Array, *, n_iter: int = POWER_ITERATIONS) -> jax.Array:
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
    _check_square(A, v0)
    A, v0 = jax.lax.stop_gradient((A, v0))

    def iterate(_, v):
        v = jnp.einsum("...ji,...j->...i", A, _times(A, v), precision=PRECISION)
        return v / (jnp.sqrt((v * v).sum(-1, keepdims=True)) + EPS_NORMALISE)

    # Unrolled, the products of large matrices take half the time; the usual counts compile as fast.
    v = jax.lax.fori_loop(0, n_iter, iterate, v0, unroll=0 < n_iter <= _UNROLLED)
    return jax.lax.stop_gradient(v)


def spectral_norm(A: jax.Array, v0: jax.Array, *, n_iter: int = POWER_ITERATIONS) -> jax.Array:
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
    return _sigma(A, power_iteration(A, v0, n_iter=n_iter))


def spectral_penalty(
    A: jax.Array,
    v0: jax.Array,
    *,
    rho_max: float = RHO_MAX,
    n_iter: int = POWER_ITERATIONS,
    weight: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
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
    penalty = jax.nn.relu(_sigma(A, v) - rho_max) ** 2
    return (penalty if weight is None else weight * penalty).sum(), v


def generator_penalty(A: jax.Array, *, dt: float = 1.0) -> jax.Array:
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
    generator = (A - jnp.eye(A.shape[-1], dtype=A.dtype)) / dt
    return _positive_square(0.5 * (generator + jnp.swapaxes(generator, -1, -2)))


def operator_norm(A: jax.Array, *, kind: Literal["spectral", "frobenius"] = "spectral") -> jax.Array:
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
    A = jax.lax.stop_gradient(A)
    if kind == "spectral":
        return jnp.linalg.svd(A, compute_uv=False)[..., 0]
    return jnp.sqrt((A * A).sum((-2, -1)))


def spectral_radius(A: jax.Array) -> jax.Array:
    """Largest modulus of the eigenvalues of A, for monitoring.

    Nothing is differentiated. It is not a norm: a matrix of radius below 1 can still grow states for a while.

    Args:
        A: (..., n_latent, n_latent).

    Returns:
        (...) radius.

    Raises:
        ValueError: A is not square.
    """
    return jnp.abs(jnp.linalg.eigvals(jax.lax.stop_gradient(A))).max(-1)


def _sigma(A: jax.Array, v: jax.Array) -> jax.Array:
    """sqrt(max(|A v|^2, 0) + eps); a sum of squares needs no maximum."""
    image = _times(A, v)
    return jnp.sqrt((image * image).sum(-1) + EPS_SIGMA)


def _times(A: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.einsum("...ij,...j->...i", A, v, precision=PRECISION)


@jax.custom_jvp
def _positive_square(S: jax.Array) -> jax.Array:
    """Sum of relu(eigenvalue)^2 of symmetric S, whose gradient is 2 relu(S)."""
    return (jax.nn.relu(jnp.linalg.eigvalsh(S)) ** 2).sum()


@_positive_square.defjvp
def _positive_square_jvp(primals, tangents):
    return _positive_square(*primals), 2.0 * (_positive_part(*primals) * tangents[0]).sum()


@jax.custom_jvp
def _positive_part(S: jax.Array) -> jax.Array:
    """relu(S) = V relu(L) V^T of symmetric S = V L V^T."""
    values, vectors = jnp.linalg.eigh(S)
    return matmul(vectors * jax.nn.relu(values)[..., None, :], jnp.swapaxes(vectors, -1, -2))


@_positive_part.defjvp
def _positive_part_jvp(primals, tangents):
    # Daleckii-Krein: divided differences of relu, which exist where the derivative of eigenvectors does not.
    (S,), (dS,) = primals, tangents
    values, vectors = jnp.linalg.eigh(S)
    transposed = jnp.swapaxes(vectors, -1, -2)
    positive, step = jax.nn.relu(values), (values > 0).astype(S.dtype)
    gap = values[..., :, None] - values[..., None, :]
    equal = gap == 0
    difference = jnp.where(
        equal, step[..., :, None], (positive[..., :, None] - positive[..., None, :]) / jnp.where(equal, 1.0, gap)
    )
    inner = difference * matmul(matmul(transposed, dS), vectors)
    return _positive_part(S), matmul(matmul(vectors, inner), transposed)


def _check_square(A: jax.Array, v0: jax.Array | None = None) -> None:
    if A.ndim < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"A has shape {A.shape}; (..., n_latent, n_latent) was wanted")
    if v0 is not None and v0.shape != A.shape[:-1]:
        raise ValueError(f"v0 has shape {v0.shape} but A has shape {A.shape}; {A.shape[:-1]} was wanted")
