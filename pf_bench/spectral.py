"""The spectral penalty of operators, batched beside a loop."""

from __future__ import annotations

import numpy as np

import pf_jax
import pf_torch
from pf_bench import plain
from pf_bench.case import Absent, Case, Context, Side, Target
from pf_bench.frameworks import jax_grad, torch_grad
from pf_bench.problems import SEED
from pf_core.config import POWER_ITERATIONS, RHO_MAX
from pf_core.noise import normal

__all__ = ["cases"]


def cases(context: Context) -> list[Case]:
    """The suite."""
    return [penalty(context, 3 if context.quick else 8, d) for d in ((5, 11) if context.quick else (32, 128, 512))]


def penalty(context: Context, n: int, d: int) -> Case:
    """Penalty of n matrices of norm about 2 and its gradient, five iterations."""

    def build() -> dict[str, Side | Absent]:
        A = normal(SEED, "bench.A", d, (n, d, d)) / np.float32(np.sqrt(d))
        v0 = normal(SEED, "bench.v0", d, (n, d))
        v0 = v0 / np.linalg.norm(v0, axis=1, keepdims=True)
        given = {"of": (0,), "device": context.device}
        loop = lambda A, v0: plain.torch_spectral(A, v0, RHO_MAX, POWER_ITERATIONS)[0]
        return {
            "jax": jax_grad(lambda A, v0: pf_jax.spectral_penalty(A, v0)[0], A, v0, **given),
            "torch": torch_grad(lambda A, v0: pf_torch.spectral_penalty(A, v0)[0], A, v0, **given),
            "torch loop": torch_grad(loop, A, v0, **given),
        }

    targets = () if context.quick or context.device != "cpu" else (Target("faster", 10.0, "torch loop"),)
    return Case("spectral penalty, value and gradient", {"matrices": n, "d": d}, build, 1e-3, targets, series="d")
