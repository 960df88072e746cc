"""Trajectories dz/ds = v(s, z) through requested times (docs/math.md 7)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pf_core.config import RK4_STEPS

__all__ = ["integrate"]

Velocity = Callable[[jax.Array, jax.Array], jax.Array]
METHODS = ("rk4", "dopri5")


def integrate(
    velocity: Velocity,
    z: jax.Array,
    times: jax.Array,
    *,
    method: str = "rk4",
    n_steps: int = RK4_STEPS,
    rtol: float = 1e-5,
    atol: float = 1e-6,
) -> jax.Array:
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
    check_request(times, method, n_steps)
    times = jnp.asarray(times, z.dtype)
    if method == "rk4":
        return _rk4(velocity, z, times, n_steps)
    return _dopri5(velocity, z, times, rtol, atol) if times.shape[0] > 1 else z[None]


def _rk4(velocity: Velocity, z: jax.Array, times: jax.Array, n_steps: int) -> jax.Array:
    # Only the ends of a step are kept for the way back; what the velocity computes inside is computed again.
    @jax.checkpoint
    def step(z: jax.Array, s: jax.Array, h: jax.Array) -> jax.Array:
        k1 = velocity(s, z)
        k2 = velocity(s + 0.5 * h, z + 0.5 * h * k1)
        k3 = velocity(s + 0.5 * h, z + 0.5 * h * k2)
        k4 = velocity(s + h, z + h * k3)
        return z + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)

    def interval(z: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start, stop = ends
        h = (stop - start) / n_steps
        z, _ = jax.lax.scan(lambda z, k: (step(z, start + k * h, h), None), z, jnp.arange(n_steps, dtype=times.dtype))
        return z, z

    _, path = jax.lax.scan(interval, z, (times[:-1], times[1:]))
    return jnp.concatenate([z[None], path])


def _dopri5(velocity: Velocity, z: jax.Array, times: jax.Array, rtol: float, atol: float) -> jax.Array:
    try:
        import diffrax
    except ImportError as error:
        raise ImportError(
            'dopri5 needs diffrax, which is not installed: pip install "perturb-forecast[flow]"'
        ) from error
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda s, z, args: velocity(jnp.asarray(s), z)),
        diffrax.Dopri5(),
        t0=times[0],
        t1=times[-1],
        dt0=None,
        y0=z,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        max_steps=1 << 14,
    )
    return jnp.asarray(solution.ys)


def check_request(times: Any, method: str, n_steps: int) -> None:
    """Raise ValueError for times, a method or a number of steps that `integrate` cannot take."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; one of {', '.join(map(repr, METHODS))} was wanted")
    if n_steps < 1:
        raise ValueError(f"n_steps is {n_steps}; at least 1 was wanted")
    if np.ndim(times) != 1 or not np.shape(times)[0]:
        raise ValueError(f"times have shape {np.shape(times)}; (n_times,) with at least one time was wanted")
    # twin: inside compiled code times have no values yet; Backend looks at them before.
    if isinstance(times, Tracer):
        return
    values = np.asarray(times, np.float64).tolist()
    rising, falling = (all(sign * b > sign * a for a, b in pairwise(values)) for sign in (1, -1))
    if not (all(map(math.isfinite, values)) and (rising or falling)):
        raise ValueError(f"times are {values}; strictly rising or strictly falling ones were wanted")
