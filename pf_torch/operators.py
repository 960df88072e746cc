"""Affine operators on latent space, one per condition (docs/math.md 4).

Row convention: cells are rows, z' = z A^T + b, which is K(z) = A z + b for a column z.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pf_torch.layers import MLP, own, select
from pf_torch.probe import record

__all__ = ["OperatorFamily", "apply_operator", "commutator_norm", "compose", "identity_penalty", "response_profile"]


class OperatorFamily(nn.Module):
    """K_theta(z) = A z + b, A = A0[tissue] + sum_k alpha_k(theta) B_k, b = b0[tissue] + sum_k beta_k(theta) u_k.

    Args:
        params: canonical parameters without the prefix `operators.`: A0 (n_tissues, d, d), b0 (n_tissues, d),
            B (K, d, d), u (K, d), and the two-layer networks alpha and beta.
    """

    A0: Tensor
    b0: Tensor
    B: Tensor
    u: Tensor

    def __init__(self, params: Mapping[str, Any]):
        super().__init__()
        for name in ("A0", "b0", "B", "u"):
            own(self, name, params[name])
        self.alpha = MLP(select(params, "alpha"))
        self.beta = MLP(select(params, "beta"))

    def coefficients(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and beta, (P, K) each, of condition vectors (P, n_theta)."""
        return record("operators.alpha", self.alpha(theta)), record("operators.beta", self.beta(theta))

    def operator(self, theta: Tensor, tissue: Tensor) -> tuple[Tensor, Tensor]:
        """The operators of P conditions. Differentiable in the parameters and theta.

        Args:
            theta: (P, n_theta).
            tissue: (P,) integers.

        Returns:
            A (P, d, d) and b (P, d).
        """
        alpha, beta = self.coefficients(theta)
        A = self.A0[tissue] + torch.einsum("pk,kij->pij", alpha, self.B)
        b = self.b0[tissue] + torch.matmul(beta, self.u)
        return record("operators.A", A), record("operators.b", b)

    def forward(self, z: Tensor, theta: Tensor, tissue: Tensor) -> Tensor:
        """Images of grouped cells: one matrix product per condition. Differentiable in everything but tissue.

        Args:
            z: (P, n, d), the cells of P conditions.
            theta: (P, n_theta).
            tissue: (P,) integers.

        Returns:
            (P, n, d).
        """
        A, b = self.operator(theta, tissue)
        return record("operators.image", apply_operator(A, b, z))

    def per_cell(self, z: Tensor, theta: Tensor, tissue: Tensor) -> Tensor:
        """Images of cells that each have a condition of their own, without building A for each.

        Differentiable in everything but tissue.

        Args:
            z: (C, d).
            theta: (C, n_theta).
            tissue: (C,) integers.

        Returns:
            (C, d).
        """
        alpha, beta = self.coefficients(theta)
        base = torch.einsum("cd,ted->cte", z, self.A0)[torch.arange(z.shape[0], device=z.device), tissue]
        moved = torch.einsum("ck,cke->ce", alpha, torch.einsum("cd,ked->cke", z, self.B))
        return record("operators.image", base + moved + self.b0[tissue] + torch.matmul(beta, self.u))


def apply_operator(A: Tensor, b: Tensor, z: Tensor) -> Tensor:
    """z A^T + b. Differentiable in all three.

    Args:
        A: (..., d, d).
        b: (..., d).
        z: (..., n, d).

    Returns:
        (..., n, d).
    """
    return torch.matmul(z, A.mT) + b[..., None, :]


def compose(operators: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The affine map that applies several operators, first to last. Differentiable in all of them.

    Args:
        operators: pairs of A (..., d, d) and b (..., d), at least one.

    Returns:
        A (..., d, d) and b (..., d).

    Raises:
        ValueError: no operator was given.
    """
    if not operators:
        raise ValueError("compose got no operators; at least one was wanted")
    A, b = operators[0]
    for A_next, b_next in operators[1:]:
        b = torch.matmul(A_next, b[..., None])[..., 0] + b_next
        A = torch.matmul(A_next, A)
    return A, b


def commutator_norm(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Frobenius norm of K_a K_b - K_b K_a as affine maps: how far the order of two perturbations matters.

    sqrt(|A_a A_b - A_b A_a|^2 + |A_a b_b + b_a - A_b b_a - b_b|^2). Differentiable, with gradient 0 where the
    operators commute exactly.

    Args:
        first, second: pairs of A (..., d, d) and b (..., d).

    Returns:
        (...) norm.
    """
    A_ab, b_ab = compose([second, first])
    A_ba, b_ba = compose([first, second])
    squared = ((A_ab - A_ba) ** 2).sum((-2, -1)) + ((b_ab - b_ba) ** 2).sum(-1)
    positive = squared > 0
    root = torch.sqrt(torch.where(positive, squared, 1.0))  # double where: the root of 0 has no finite derivative
    return torch.where(positive, root, 0.0)


def response_profile(family: OperatorFamily, theta: Tensor) -> Tensor:
    """What a condition does, as coordinates: alpha and beta side by side, (P, 2K). Differentiable in theta."""
    return torch.cat(family.coefficients(theta), dim=-1)


def identity_penalty(A: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over conditions of |A - I|_F^2. Differentiable in A; weight is data.

    Args:
        A: (P, d, d).
        weight: (P,) non-negative; None for equal ones.

    Returns:
        scalar, sum(weight |A - I|^2) / sum(weight).
    """
    squared = ((A - torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)) ** 2).sum((-2, -1))
    return squared.mean() if weight is None else (weight * squared).sum() / weight.sum()
