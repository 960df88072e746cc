"""Affine operators on the latent space that depend on the condition (docs/math.md 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pf_core.initial import select
from pf_jax.layers import PRECISION, Linear, matmul
from pf_jax.probe import record

__all__ = [
    "OperatorFamily",
    "apply_operator",
    "commutator_norm",
    "compose",
    "identity_penalty",
    "response_profile",
]

Operator = tuple[jax.Array, jax.Array]


class Coefficients(nnx.Module):
    """A two-layer relu network from theta to one coefficient per basis.

    Args:
        params: `hidden` and `out`, each with `weight` and `bias`.
    """

    def __init__(self, params: Mapping[str, Any]):
        self.hidden = Linear(select(params, "hidden"))
        self.out = Linear(select(params, "out"))

    def __call__(self, theta: jax.Array) -> jax.Array:
        return self.out(jax.nn.relu(self.hidden(theta)))


class OperatorFamily(nnx.Module):
    """K_theta(z) = A z + b with A = A0[tissue] + sum_k alpha_k(theta) B_k and b = b0[tissue] + sum_k beta_k(theta) u_k.

    Args:
        params: canonical parameters below "operators.", with that prefix cut off: `A0` (n_tissues, n_latent,
            n_latent), `b0` (n_tissues, n_latent), `B` (n_bases, n_latent, n_latent), `u` (n_bases, n_latent), and
            the two-layer networks `alpha` and `beta`.
    """

    def __init__(self, params: Mapping[str, Any]):
        self.A0 = nnx.Param(jnp.asarray(params["A0"]))
        self.b0 = nnx.Param(jnp.asarray(params["b0"]))
        self.B = nnx.Param(jnp.asarray(params["B"]))
        self.u = nnx.Param(jnp.asarray(params["u"]))
        self.alpha = Coefficients(select(params, "alpha"))
        self.beta = Coefficients(select(params, "beta"))

    def coefficients(self, theta: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The weights of the bases.

        Differentiated in the parameters and theta.

        Args:
            theta: (n_conditions, n_theta).

        Returns:
            alpha and beta, each (n_conditions, n_bases).
        """
        return record("operators.alpha", self.alpha(theta)), record("operators.beta", self.beta(theta))

    def operator(self, theta: jax.Array, tissue: jax.Array) -> Operator:
        """The operator of every condition.

        Differentiated in the parameters and theta.

        Args:
            theta: (n_conditions, n_theta).
            tissue: (n_conditions,) index into the tissues.

        Returns:
            A (n_conditions, n_latent, n_latent) and b (n_conditions, n_latent).
        """
        alpha, beta = self.coefficients(theta)
        A = self.A0[...][tissue] + jnp.einsum("pk,kij->pij", alpha, self.B[...], precision=PRECISION)
        b = self.b0[...][tissue] + matmul(beta, self.u[...])
        return record("operators.A", A), record("operators.b", b)

    def __call__(self, z: jax.Array, theta: jax.Array, tissue: jax.Array) -> jax.Array:
        """Images of cells that are grouped by condition: one matrix product per condition.

        Differentiated in the parameters, z and theta.

        Args:
            z: (n_conditions, n_cells, n_latent).
            theta: (n_conditions, n_theta).
            tissue: (n_conditions,) index into the tissues.

        Returns:
            (n_conditions, n_cells, n_latent).
        """
        return record("operators.image", apply_operator(*self.operator(theta, tissue), z))

    def per_cell(self, z: jax.Array, theta: jax.Array, tissue: jax.Array) -> jax.Array:
        """Images of ungrouped cells, each with its own theta, without building a matrix per cell.

        Differentiated in the parameters, z and theta.

        Args:
            z: (n_cells, n_latent).
            theta: (n_cells, n_theta).
            tissue: (n_cells,) index into the tissues.

        Returns:
            (n_cells, n_latent).
        """
        alpha, beta = self.coefficients(theta)
        n_tissues = self.A0.shape[0]
        bases = jnp.concatenate([self.A0[...], self.B[...]])
        weights = jnp.concatenate([jax.nn.one_hot(tissue, n_tissues, dtype=alpha.dtype), alpha], axis=-1)
        products = jnp.einsum("cj,kij->cki", z, bases, precision=PRECISION)
        shift = self.b0[...][tissue] + matmul(beta, self.u[...])
        return record("operators.image", jnp.einsum("ck,cki->ci", weights, products, precision=PRECISION) + shift)


def apply_operator(A: jax.Array, b: jax.Array, z: jax.Array) -> jax.Array:
    """A z + b for every cell z of a group; cells are rows, so this is z A^T + b.

    Differentiated in all three.

    Args:
        A: (..., n_latent, n_latent).
        b: (..., n_latent).
        z: (..., n_cells, n_latent).

    Returns:
        (..., n_cells, n_latent).
    """
    return matmul(z, jnp.swapaxes(A, -1, -2)) + b[..., None, :]


def compose(operators: Sequence[Operator]) -> Operator:
    """One operator that applies the given ones, first to last.

    Differentiated in all of them.

    Args:
        operators: (A, b) pairs, A (..., n_latent, n_latent) and b (..., n_latent); at least one.

    Returns:
        (A, b).

    Raises:
        ValueError: no operator.
    """
    if not operators:
        raise ValueError("operators is empty; at least one (A, b) was wanted")
    A, b = operators[0]
    for A_next, b_next in operators[1:]:
        A, b = matmul(A_next, A), _times(A_next, b) + b_next
    return A, b


def commutator_norm(first: Operator, second: Operator) -> jax.Array:
    """Frobenius norm of K_a K_b - K_b K_a as an affine map: does the order of two perturbations matter?

    It is sqrt(|A_a A_b - A_b A_a|^2 + |A_a b_b + b_a - A_b b_a - b_b|^2). Differentiated in both; the gradient is 0
    where the operators commute exactly.

    Args:
        first: (A, b), A (..., n_latent, n_latent) and b (..., n_latent).
        second: the same.

    Returns:
        (...) norm.
    """
    (A_ab, b_ab), (A_ba, b_ba) = compose([second, first]), compose([first, second])
    squared = ((A_ab - A_ba) ** 2).sum((-2, -1)) + ((b_ab - b_ba) ** 2).sum(-1)
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)


def response_profile(family: OperatorFamily, theta: jax.Array) -> jax.Array:
    """The coefficients of a condition side by side, a short description of its response.

    Differentiated in the parameters and theta.

    Args:
        family: the operators.
        theta: (n_conditions, n_theta).

    Returns:
        (n_conditions, 2 n_bases), alpha before beta.
    """
    return jnp.concatenate(family.coefficients(theta), axis=-1)


def identity_penalty(A: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """Weighted mean over conditions of |A - I|_F^2.

    Differentiated in A.

    Args:
        A: (n_conditions, n_latent, n_latent).
        weight: (n_conditions,) >= 0; None for a plain mean.

    Returns:
        () penalty, sum(weight |A - I|_F^2) / sum(weight).
    """
    squared = ((A - jnp.eye(A.shape[-1], dtype=A.dtype)) ** 2).sum((-2, -1))
    return squared.mean() if weight is None else (weight * squared).sum() / weight.sum()


def _times(A: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.einsum("...ij,...j->...i", A, v, precision=PRECISION)
