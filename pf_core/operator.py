"""The operator of one condition as plain NumPy, for looking at, composing and monitoring."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Operator"]


@dataclass(frozen=True)
class Operator:
    """K(z) = A z + b of one condition, with the response profile (alpha, beta) it came from."""

    label: str
    A: np.ndarray  # (n_latent, n_latent)
    b: np.ndarray  # (n_latent,)
    alpha: np.ndarray  # (n_bases,)
    beta: np.ndarray  # (n_bases,)

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """Move latents (n_cells, n_latent)."""
        return z @ self.A.T + self.b

    def then(self, other: Operator) -> Operator:
        """The composition: this operator first, the other after it. Its profile is the sum of both."""
        return Operator(
            f"{self.label} then {other.label}",
            other.A @ self.A,
            other.A @ self.b + other.b,
            self.alpha + other.alpha,
            self.beta + other.beta,
        )

    def norm(self, kind: str = "spectral") -> float:
        """The spectral (largest singular value) or Frobenius norm of A."""
        orders = {"spectral": 2, "frobenius": "fro"}
        if kind not in orders:
            raise ValueError(f"kind is {kind!r}; 'spectral' or 'frobenius' was wanted")
        return float(np.linalg.norm(self.A, orders[kind]))

    def eigenvalues(self) -> np.ndarray:
        """Complex eigenvalues of A, (n_latent,)."""
        return np.linalg.eigvals(self.A)

    def spectral_radius(self) -> float:
        """The largest absolute eigenvalue of A."""
        return float(np.abs(self.eigenvalues()).max())

    def commutator_norm(self, other: Operator) -> float:
        """Frobenius norm of K_a K_b - K_b K_a as affine maps; 0 where the order does not matter."""
        first, second = other.then(self), self.then(other)
        return float(np.hypot(np.linalg.norm(first.A - second.A), np.linalg.norm(first.b - second.b)))
