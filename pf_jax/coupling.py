"""Entropic optimal-transport plans (docs/math.md 7), by ott-jax."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["entropic_plan"]

# Largest sum of absolute errors of the marginals. In float32 a plan is exp of potentials of some ten times the cost.
THRESHOLD = {"float64": 1e-9, "float32": 1e-5}
ITERATIONS = 200_000


def entropic_plan(x: Any, y: Any, *, epsilon: float, unbalanced: float = 0.0) -> jax.Array:
    """Entropic optimal-transport plan between two sets of cells of equal weights.

    Nothing is differentiated. With C the squared Euclidean distance divided by its mean, the plan u exp(-C / epsilon) v
    is the minimum of <P, C> + epsilon sum P (log P - 1) under marginals 1/n and 1/m; or, unbalanced, with the penalty
    unbalanced (KL(P 1 | 1/n) + KL(P' 1 | 1/m)) in their place, so that cells can grow and die. Source: Cuturi 2013,
    arXiv:1306.0895; Chizat et al. 2018, arXiv:1607.05816.

    Args:
        x: (n, n_latent).
        y: (m, n_latent).
        epsilon: regularisation, in units of the mean cost.
        unbalanced: strength of the marginals, in units of the mean cost; 0 holds them exactly.

    Returns:
        (n, m) plan, dtype of x.

    Raises:
        ValueError: shapes that do not fit, an epsilon that is not above 0, a negative strength, values that are not
            finite, or no convergence.
        ImportError: without the extra "flow".
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not (x.size and y.size):
        raise ValueError(f"x and y have shapes {x.shape} and {y.shape}; (n, n_latent) and (m, n_latent) were wanted")
    if not (epsilon > 0 and unbalanced >= 0):
        raise ValueError(f"epsilon is {epsilon} and unbalanced {unbalanced}; above 0 and at least 0 were wanted")
    if not bool(jnp.isfinite(x).all() & jnp.isfinite(y).all()):
        raise ValueError("x or y has values that are not finite; look at the latents they come from")
    try:
        import ott  # noqa: F401
    except ImportError as error:
        raise ImportError('a plan needs ott-jax, which is missing: pip install "perturb-forecast[flow]"') from error
    tau = unbalanced / (unbalanced + epsilon) if unbalanced else 1.0
    plan, converged = _sinkhorn(x, y, float(epsilon), tau)
    if not bool(converged):
        raise ValueError(f"no plan within {ITERATIONS} iterations at epsilon {epsilon}; a larger epsilon was wanted")
    return plan


@partial(jax.jit, static_argnames=("epsilon", "tau"))
def _sinkhorn(x: jax.Array, y: jax.Array, epsilon: float, tau: float) -> tuple[jax.Array, jax.Array]:
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    # A constant beside the cost scales an unbalanced plan as a whole. This one keeps its mass near 1, so that the
    # threshold means the same for any number of cells; the factor takes it off again.
    n_pairs = x.shape[0] * y.shape[0]
    problem = LinearProblem(Geometry(_cost(x, y) + epsilon * math.log(n_pairs), epsilon=epsilon), tau_a=tau, tau_b=tau)
    solution = Sinkhorn(threshold=THRESHOLD[str(x.dtype)], max_iterations=ITERATIONS)(problem)
    return solution.matrix * n_pairs ** ((1.0 - tau) / (1.0 + tau)), jnp.asarray(solution.converged)


def _cost(x: jax.Array, y: jax.Array) -> jax.Array:
    """Squared distances in units of their mean; zeros where all cells coincide."""
    cost = sum((x[:, None, k] - y[None, :, k]) ** 2 for k in range(x.shape[1]))
    mean = jnp.asarray(cost).mean()
    return cost / jnp.where(mean > 0, mean, 1.0)
