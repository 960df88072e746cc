"""What the device can do at best, measured: one large matrix product, one large copy, in float32."""

from __future__ import annotations

import numpy as np

from pf_bench.case import Absent, Case, Context, Side
from pf_bench.frameworks import jax_put, jax_side, torch_put, torch_side
from pf_bench.problems import SEED
from pf_core.noise import normal

__all__ = ["cases"]


def cases(context: Context) -> list[Case]:
    """The suite."""
    gpu = context.device == "gpu"
    return [
        product(context, 67 if context.quick else 8192 if gpu else 2048),
        copy(context, 1009 if context.quick else (1 << 30 if gpu else 1 << 26)),
    ]


def product(context: Context, n: int) -> Case:
    """A square matrix product, float32 with full precision."""

    def build() -> dict[str, Side | Absent]:
        import torch

        from pf_jax.layers import matmul

        arrays = [normal(SEED, f"bench.product.{k}", n, (n, n)) for k in range(2)]
        left, right = torch_put(arrays, context.device)
        return {
            "jax": jax_side(matmul, *jax_put(arrays, context.device)),
            "torch": torch_side(lambda: torch.matmul(left, right), device=context.device),
        }

    return Case("matrix product", {"n": n}, build, 1e-4, flop=2.0 * n**3)


def copy(context: Context, n: int) -> Case:
    """A copy of n float32 numbers, written anew with the sign changed so that no compiler leaves it out."""

    def build() -> dict[str, Side | Absent]:
        import torch

        array = np.arange(n, dtype=np.float32)
        tensor = torch_put(array, context.device)
        return {
            "jax": jax_side(lambda a: -a, jax_put(array, context.device)),
            "torch": torch_side(lambda: torch.neg(tensor), device=context.device),
        }

    return Case("copy", {"numbers": n}, build, 0.0, bytes=8.0 * n)
