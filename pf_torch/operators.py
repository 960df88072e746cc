"""Affine operators on latent space, one per condition (docs/math.md 4).

Row convention: cells are rows, z' = z A^T + b, which is K(z) = A z + b for a column z.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pf_core.initial import select
from pf_torch.layers import MLP, own
from pf_torch.probe import record

__all__ = ["OperatorFamily", "apply_operator", "commutator_norm", "compose", "identity_penalty", "response_profile"]


class OperatorFamily(nn.Module):
    """K_theta(z) = A z + b with A = A0[tissue] + sum_k alpha_k(theta) B_k and b = b0[tissue] + sum_k beta_k(theta) u_k.

    Args:
        params: canonical parameters below "operators.", with that prefix cut off: `A0` (n_tissues, n_latent,
            n_latent), `b0` (n_tissues, n_latent), `B` (n_bases, n_latent, n_latent), `u` (n_bases, n_latent), and
            the two-layer networks `alpha` and `beta`.
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
        """The weights of the bases.

        Differentiated in the parameters and theta.

        Args:
            theta: (n_conditions, n_theta).

        Returns:
            alpha and beta, each (n_conditions, n_bases).
        """
        return record("operators.alpha", self.alpha(theta)), record("operators.beta", self.beta(theta))

    def operator(self, theta: Tensor, tissue: Tensor) -> tuple[Tensor, Tensor]:
        """The operator of every condition.

        Differentiated in the parameters and theta.

        Args:
            theta: (n_conditions, n_theta).
            tissue: (n_conditions,) index into the tissues.

        Returns:
            A (n_conditions, n_latent, n_latent) and b (n_conditions, n_latent).
        """
        alpha, beta = self.coefficients(theta)
        A = self.A0[tissue] + torch.einsum("pk,kij->pij", alpha, self.B)
        b = self.b0[tissue] + torch.matmul(beta, self.u)
        return record("operators.A", A), record("operators.b", b)

    def forward(self, z: Tensor, theta: Tensor, tissue: Tensor) -> Tensor:
        """Images of cells that are grouped by condition: one matrix product per condition.

        Differentiated in the parameters, z and theta.

        Args:
            z: (n_conditions, n_cells, n_latent).
            theta: (n_conditions, n_theta).
            tissue: (n_conditions,) index into the tissues.

        Returns:
            (n_conditions, n_cells, n_latent).
        """
        A, b = self.operator(theta, tissue)
        return record("operators.image", apply_operator(A, b, z))

    def per_cell(self, z: Tensor, theta: Tensor, tissue: Tensor) -> Tensor:
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
        base = torch.einsum("cd,ted->cte", z, self.A0)[torch.arange(z.shape[0], device=z.device), tissue]
        moved = torch.einsum("ck,cke->ce", alpha, torch.einsum("cd,ked->cke", z, self.B))
        return record("operators.image", base + moved + self.b0[tissue] + torch.matmul(beta, self.u))


def apply_operator(A: Tensor, b: Tensor, z: Tensor) -> Tensor:
    """A z + b for every cell z of a group; cells are rows, so this is z A^T + b.

    Differentiated in all three.

    Args:
        A: (..., n_latent, n_latent).
        b: (..., n_latent).
        z: (..., n_cells, n_latent).

    Returns:
        (..., n_cells, n_latent).
    """
    return torch.matmul(z, A.mT) + b[..., None, :]


def compose(operators: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
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
        raise ValueError("compose got no operators; at least one was wanted")
    A, b = operators[0]
    for A_next, b_next in operators[1:]:
        b = torch.matmul(A_next, b[..., None])[..., 0] + b_next
        A = torch.matmul(A_next, A)
    return A, b


def commutator_norm(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Frobenius norm of K_a K_b - K_b K_a as an affine map: does the order of two perturbations matter?

    It is sqrt(|A_a A_b - A_b A_a|^2 + |A_a b_b + b_a - A_b b_a - b_b|^2). Differentiated in both; the gradient is 0
    where the operators commute exactly.

    Args:
        first: (A, b), A (..., n_latent, n_latent) and b (..., n_latent).
        second: the same.

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
    """The coefficients of a condition side by side, a short description of its response.

    Differentiated in the parameters and theta.

    Args:
        family: the operators.
        theta: (n_conditions, n_theta).

    Returns:
        (n_conditions, 2 n_bases), alpha before beta.
    """
    return torch.cat(family.coefficients(theta), dim=-1)


def identity_penalty(A: Tensor, weight: Tensor | None = None) -> Tensor:
    """Weighted mean over conditions of |A - I|_F^2.

    Differentiated in A.

    Args:
        A: (n_conditions, n_latent, n_latent).
        weight: (n_conditions,) >= 0; None for a plain mean.

    Returns:
        () penalty, sum(weight |A - I|_F^2) / sum(weight).
    """
    squared = ((A - torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)) ** 2).sum((-2, -1))
    return squared.mean() if weight is None else (weight * squared).sum() / weight.sum()
