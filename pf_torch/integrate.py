"""Trajectories of a velocity: Runge-Kutta of fixed steps, or dopri5 with step control (docs/math.md 7)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from pf_core.config import RK4_STEPS

__all__ = ["integrate"]


def integrate(
    velocity: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    times: Tensor,
    *,
    method: str = "rk4",
    n_steps: int = RK4_STEPS,
    rtol: float = 1e-5,
    atol: float = 1e-6,
) -> Tensor:
    """Solve dz/ds = velocity(s, z) from z at the first time.

    Differentiated in z and in whatever velocity is made of. With "rk4" both frameworks do the same arithmetic; with
    "dopri5" (Dormand & Prince 1980) each has its own step control.

    Args:
        velocity: (s (), z (n_cells, n_latent)) -> (n_cells, n_latent).
        z: (n_cells, n_latent) where it begins.
        times: (n_times,) strictly rising, or strictly falling for the way back.
        method: "rk4", classical Runge-Kutta of fixed steps, or "dopri5".
        n_steps: equal steps of "rk4" between neighbouring times.
        rtol: relative tolerance of "dopri5".
        atol: absolute tolerance of "dopri5".

    Returns:
        (n_times, n_cells, n_latent); the first are z itself.

    Raises:
        ValueError: an unknown method, times that are not strictly monotonic, or n_steps below 1.
        ImportError: "dopri5" without the extra that brings its solver.
    """
    if method not in ("rk4", "dopri5"):
        raise ValueError(f"method is {method!r}; 'rk4' or 'dopri5' was wanted")
    if n_steps < 1:
        raise ValueError(f"n_steps is {n_steps}; at least 1 was wanted")
    steps = times.diff() if times.ndim == 1 and len(times) else None
    if steps is None or not (bool((steps > 0).all()) or bool((steps < 0).all())):
        raise ValueError(f"times are {times.tolist()}; one or more, strictly rising or strictly falling, were wanted")
    times = times.to(z.dtype)
    if method == "dopri5":
        return _dopri5(velocity, z, times, rtol, atol)
    path = [z]
    for first, last in pairwise(times):
        h = (last - first) / n_steps
        for k in range(n_steps):
            z = _rk4_step(velocity, first + k * h, z, h)
        path.append(z)
    return torch.stack(path)


def _rk4_step(velocity: Callable[[Tensor, Tensor], Tensor], s: Tensor, z: Tensor, h: Tensor) -> Tensor:
    k1 = velocity(s, z)
    k2 = velocity(s + h / 2, z + h / 2 * k1)
    k3 = velocity(s + h / 2, z + h / 2 * k2)
    k4 = velocity(s + h, z + h * k3)
    return z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def _dopri5(velocity: Callable[[Tensor, Tensor], Tensor], z: Tensor, times: Tensor, rtol: float, atol: float) -> Tensor:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(
            "method 'dopri5' needs torchdiffeq, which is not installed: pip install \"perturb-forecast[flow]\""
        ) from error
    if len(times) == 1:  # the solver wants an interval
        return z[None]
    return odeint(velocity, z, times, rtol=rtol, atol=atol, method="dopri5")  # type: ignore[return-value]
