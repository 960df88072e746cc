"""Entropic optimal-transport plans (docs/math.md 7), by ott-jax."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["entropic_plan"]

# Largest sum of absolute errors of the marginals. In float32 a plan is exp of potentials of some ten times the cost.
THRESHOLD = {"float64": 1e-11, "float32": 1e-5}
ITERATIONS = 200_000


def entropic_plan(x: Any, y: Any, *, epsilon: float, unbalanced: float = 0.0) -> jax.Array:
    """Entropic optimal-transport plan between cells, of uniform marginals, under the squared distance.

    With C the squared Euclidean distances divided by their mean, the plan is P = u exp(-C / epsilon) v. Balanced, it
    has row sums 1 / n and column sums 1 / m. Unbalanced, it minimises sum P C + epsilon sum P (log P - 1)
    + unbalanced [KL(P 1, 1/n) + KL(P^T 1, 1/m)], so that cells may gain and lose mass. Computed with logarithms of
    u and v, in float64 where the framework has it on. Nothing is differentiated. Source: Cuturi 2013, arXiv:1306.0895;
    Chizat et al. 2018, arXiv:1607.05816.

    Args:
        x: (n, n_latent) cells on one side.
        y: (m, n_latent) cells on the other.
        epsilon: strength of the entropy, in units of the mean cost.
        unbalanced: strength of the marginals, in units of the mean cost; 0 holds them exactly.

    Returns:
        (n, m) plan, >= 0.

    Raises:
        ValueError: shapes that do not fit, no cells on one side, an epsilon that is not above 0, or an unbalanced below
            0.
        RuntimeError: the iteration did not converge.
        ImportError: without the extra that brings the solver.
    """
    dtype = jax.dtypes.canonicalize_dtype("float64")
    x, y = jnp.asarray(x, dtype), jnp.asarray(y, dtype)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not (x.size and y.size):
        raise ValueError(f"x and y have shapes {x.shape} and {y.shape}; (n, n_latent) and (m, n_latent) were wanted")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon is {epsilon!r}; a number above 0 was wanted: for an exact plan use coupling 'exact'")
    if not (math.isfinite(unbalanced) and unbalanced >= 0):
        raise ValueError(f"unbalanced is {unbalanced!r}; a finite number of at least 0 was wanted")
    if not bool(jnp.isfinite(x).all() & jnp.isfinite(y).all()):
        raise ValueError("x or y is not finite; finite latents were wanted")
    try:
        import ott  # noqa: F401
    except ImportError as error:
        raise ImportError('a plan needs ott-jax, which is missing: pip install "perturb-forecast[flow]"') from error
    tau = unbalanced / (unbalanced + epsilon) if unbalanced else 1.0
    plan, converged = _sinkhorn(x, y, float(epsilon), tau)
    if not bool(converged):
        raise RuntimeError(
            f"the entropic plan did not converge in {ITERATIONS} rounds; raise epsilon, which is {epsilon}, "
            "or use coupling 'exact'"
        )
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
