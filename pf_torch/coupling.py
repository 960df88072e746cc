"""Entropic optimal transport between two groups of cells (docs/math.md 7)."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

__all__ = ["entropic_plan"]

TOLERANCE = 1e-11  # marginals of a balanced plan, and change of an unbalanced plan's potentials in units of epsilon
MAX_ITERATIONS = 20_000


def entropic_plan(x: Any, y: Any, *, epsilon: float, unbalanced: float = 0.0) -> Tensor:
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
    x, y = (torch.as_tensor(side).detach().to(torch.float64) for side in (x, y))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not len(x) or not len(y):
        raise ValueError(
            f"x and y have shapes {tuple(x.shape)} and {tuple(y.shape)}; (n, n_latent) and (m, n_latent), with a cell "
            "on each side, were wanted"
        )
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon is {epsilon!r}; a number above 0 was wanted: for an exact plan use coupling 'exact'")
    if not (math.isfinite(unbalanced) and unbalanced >= 0):
        raise ValueError(f"unbalanced is {unbalanced!r}; a finite number of at least 0 was wanted")
    cost = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    if not bool(torch.isfinite(cost).all()):
        raise ValueError("x or y is not finite; finite latents were wanted")
    mean = cost.mean()
    cost = cost / torch.where(mean > 0, mean, 1.0)  # coincident cells have no cost at all
    return _unbalanced(cost, epsilon, unbalanced) if unbalanced else _balanced(cost, epsilon)


def _balanced(cost: Tensor, epsilon: float) -> Tensor:
    try:
        import ot
    except ImportError as error:
        raise ImportError(
            'entropic plans need POT, which is not installed: pip install "perturb-forecast[flow]"'
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of is checked below
        plan, log = ot.sinkhorn(
            [],
            [],
            cost.cpu().numpy(),
            epsilon,
            method="sinkhorn_log",
            stopThr=TOLERANCE,
            numItermax=MAX_ITERATIONS,
            log=True,
        )
    if not log["err"][-1] < TOLERANCE:
        raise _not_converged(epsilon, log["err"][-1])
    return torch.as_tensor(plan, device=cost.device)


def _unbalanced(cost: Tensor, epsilon: float, unbalanced: float) -> Tensor:
    """u = (a / (K v))^tau and v = (b / (K^T u))^tau with tau = unbalanced / (unbalanced + epsilon), in logarithms.

    POT's own solvers add 1e-16 to K v, which decides the rows of cells far from all others, and its stabilised one does
    not converge (0.9.7). Between two rounds log u and log v are shifted against each other so that both marginals have
    the same mass (Séjourné et al. 2022, arXiv:2201.00730): the solution is the same, and found much sooner.
    """
    n, m = cost.shape
    kernel, ratio = -cost / epsilon, unbalanced / epsilon
    tau = unbalanced / (unbalanced + epsilon)
    log_u, log_v = cost.new_zeros(n), cost.new_zeros(m)
    for _ in range(MAX_ITERATIONS):
        old = torch.cat([log_u, log_v])
        log_u = tau * (-math.log(n) - torch.logsumexp(kernel + log_v, dim=1))
        log_v = tau * (-math.log(m) - torch.logsumexp(kernel.T + log_u, dim=1))
        mass_1 = torch.logsumexp(-log_u / ratio, dim=0) - math.log(n)
        mass_2 = torch.logsumexp(-log_v / ratio, dim=0) - math.log(m)
        shift = 0.5 * ratio * (mass_1 - mass_2)
        log_u, log_v = log_u + shift, log_v - shift
        change = float((torch.cat([log_u, log_v]) - old).abs().max())
        if change < TOLERANCE:
            return torch.exp(log_u[:, None] + kernel + log_v)
    raise _not_converged(epsilon, change)


def _not_converged(epsilon: float, error: float) -> RuntimeError:
    return RuntimeError(
        f"the entropic plan did not converge in {MAX_ITERATIONS} rounds (error {error:.1e}); "
        f"raise epsilon, which is {epsilon}, or use coupling 'exact'"
    )
