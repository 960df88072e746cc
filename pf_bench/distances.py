"""Energy distances: value and gradient over n, value only, squared, sliced."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

import pf_jax
import pf_torch
from pf_bench import peers, plain
from pf_bench.case import Absent, Case, Context, Side, Target
from pf_bench.frameworks import jax_grad, jax_put, jax_value, torch_grad, torch_value
from pf_bench.problems import SEED, clouds
from pf_core.config import TILE
from pf_core.noise import normal

__all__ = ["cases", "jax_group_gemm"]

LARGEST_MATRIX = 8192  # cells beyond which whole matrices of distances are left out
GRADIENT = "energy distance, value and gradient"


def cases(context: Context) -> list[Case]:
    """The suite."""
    if context.quick:
        return [
            gradient(context, 67, 16),
            gradient(context, 131, 16),
            value(context, 67, 10),
            squared(context, 67, 10),
        ] + [sliced(context, 131, 16, 17)]
    gpu = context.device == "gpu"
    sizes = (2048, 8192, 32768, 100_000) if gpu else (512, 2048, 8192, 32768)
    found = [gradient(context, n, 32) for n in sizes]
    found += [value(context, 8192, 50), squared(context, 8192, 50)]
    return found + [sliced(context, n, 32, 256) for n in (8192, 32768)]


def gradient(context: Context, n: int, d: int) -> Case:
    """Value and gradient in both sets."""

    def build() -> dict[str, Side | Absent]:
        x, y = clouds(n, n, d)
        given = {"of": (0, 1), "device": context.device}
        sides: dict[str, Side | Absent] = {
            "jax": jax_grad(pf_jax.energy_distance, x, y, **given),
            "torch": torch_grad(pf_torch.energy_distance, x, y, **given),
        }
        if context.device == "gpu":
            fused = partial(pf_torch.energy_distance, method="fused")
            sides["torch fused"] = torch_grad(fused, x, y, **given)
        whole: dict[str, Side | Absent] = {}
        if n <= LARGEST_MATRIX:
            whole = {
                "plain torch": torch_grad(plain.torch_energy, x, y, **given),
                "torch.cdist": torch_grad(plain.torch_cdist_energy, x, y, **given),
                "plain jax": jax_grad(plain.jax_energy, x, y, **given),
            }
            if context.peers:
                whole["geomloss"] = peers.geomloss_energy(x, y, backend="tensorized", device=context.device)
            if context.device == "cpu":
                whole["jax GEMM"] = jax_gemm(x, y, context.device)
        else:
            reason = Absent(f"whole matrices of {n} x {n} distances are left out")
            whole = dict.fromkeys(("plain torch", "torch.cdist", "plain jax", "geomloss"), reason)
        if context.peers and context.device == "cpu" and n > LARGEST_MATRIX:
            whole["geomloss online"] = Absent(f"minutes a call at n = {n} on a processor: left out")
        elif context.peers:
            whole["geomloss online"] = peers.geomloss_energy(x, y, backend="online", device=context.device)
        return sides | whole

    targets: tuple[Target, ...] = ()
    if context.device == "cpu" and n == 8192:
        factors = {"plain torch": 11.0, "torch.cdist": 4.5, "plain jax": 6.0, "geomloss": 10.0}
        targets = (*(Target("faster", factor, side) for side, factor in factors.items()), Target("memory", 40.0))
    if context.device == "cpu" and n == 32768:
        smaller = Case(GRADIENT, {"n": 8192, "d": d}, build).key
        # Sixteen times the pairs; a quarter more covers what timing scatters.
        targets = (Target("memory", 64.0), Target("growth", 20.0, f"distances/{smaller}"))
    # 2 n^2 pairs (half of each square side, and the rectangle), each in three products of 2 d operations.
    # The plain formulas round the distances of near pairs; the twins do not.
    return Case(GRADIENT, {"n": n, "d": d}, build, 5e-3, targets, memory=n != 67, series="n", flop=12.0 * n * n * d)


def jax_gemm(x: np.ndarray, y: np.ndarray, device: str) -> Side:
    """The products of matrices of all tiles by XLA, with the tile in the place of what is made of it.

    Args:
        x: (n, d).
        y: (m, d).
        device: "cpu" or "gpu".
    """
    import jax
    import jax.numpy as jnp

    from pf_jax.layers import matmul

    cells = np.concatenate([x, y])
    n_tiles = -(-len(cells) // TILE["jax"])
    tile = min(TILE["jax"], len(cells), 16 * -(-len(cells) // (16 * n_tiles)))  # as in pf_jax
    cells = np.pad(cells, [(0, n_tiles * tile - len(cells)), (0, 0)])
    rows, columns = np.triu_indices(n_tiles)

    @jax.jit
    def products(cells: jax.Array) -> jax.Array:
        def step(total: Any, pair: Any) -> tuple[Any, None]:
            a, b = (jax.lax.dynamic_slice_in_dim(cells, at * tile, tile) for at in pair)
            pairs = matmul(a, b.T)
            for at, part in zip(pair, (matmul(pairs, b), matmul(a.T, pairs).T), strict=True):
                part = part + jax.lax.dynamic_slice_in_dim(total, at * tile, tile)
                total = jax.lax.dynamic_update_slice_in_dim(total, part, at * tile, axis=0)
            return total, None

        return jax.lax.scan(step, jnp.zeros_like(cells), (rows.astype(np.int32), columns.astype(np.int32)))[0]

    given = jax_put(cells, device)
    note = "the matrix products of all tiles alone: a ceiling, not a distance"
    return Side(lambda: jax.block_until_ready(products(given)), None, note=note)


def jax_group_gemm(x: np.ndarray, y: np.ndarray, device: str, *, calls: int) -> Side:
    """The products of matrices of groups by XLA, group by group, where x alone has a gradient.

    Of a group there are three: x with all cells, y with itself, and what is made of the first with all cells.

    Args:
        x: (n_groups, n, d).
        y: (n_groups, m, d).
        device: "cpu" or "gpu".
        calls: how often in one call.
    """
    import jax
    import jax.numpy as jnp

    from pf_jax.layers import matmul

    def products(sides: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, y = sides
        cells = jnp.concatenate([x, y])
        return matmul(matmul(x, cells.T), cells), matmul(y, y.T)

    @jax.jit
    def all_products(x: jax.Array, y: jax.Array) -> jax.Array:
        def once(_: Any, total: jax.Array) -> jax.Array:
            # What comes out goes in again, so that no call can be left out.
            pull, own = jax.lax.map(products, (x + 1e-30 * total, y))
            return pull + own.max()

        return jax.lax.fori_loop(0, calls, once, jnp.zeros_like(x))

    given = jax_put((x, y), device)
    note = "the matrix products of the energy distances alone: a ceiling, not a step"
    return Side(lambda: jax.block_until_ready(all_products(*given)), None, steps=calls, note=note)


def value(context: Context, n: int, d: int) -> Case:
    """The value only, unbiased, beside pertpy's."""

    def build() -> dict[str, Side | Absent]:
        x, y = clouds(n, n, d)
        sides: dict[str, Side | Absent] = {
            "jax": jax_value(pf_jax.energy_distance, x, y, device=context.device),
            "torch": torch_value(pf_torch.energy_distance, x, y, device=context.device),
            "torch.cdist": torch_value(plain.torch_cdist_energy, x, y, device=context.device),
        }
        return sides | ({"pertpy": peers.pertpy_energy(x, y)} if context.peers else {})

    targets = (Target("faster", 2.5, "pertpy"),) if n == 8192 and context.device == "cpu" else ()
    return Case("energy distance, value", {"n": n, "d": d}, build, 1e-3, targets)


def squared(context: Context, n: int, d: int) -> Case:
    """Squared distances, unbiased, in closed form beside scPerturb's."""

    def build() -> dict[str, Side | Absent]:
        x, y = clouds(n, n, d)
        given = {"power": 2, "estimator": "u"}
        sides: dict[str, Side | Absent] = {
            "jax": jax_value(partial(pf_jax.energy_distance, **given), x, y, device=context.device),
            "torch": torch_value(partial(pf_torch.energy_distance, **given), x, y, device=context.device),
        }
        return sides | ({"scperturb": peers.scperturb_energy(x, y)} if context.peers else {})

    targets = (Target("faster", 500.0, "scperturb"),) if n == 8192 and context.device == "cpu" else ()
    return Case("squared energy distance, value", {"n": n, "d": d}, build, 1e-3, targets)


def sliced(context: Context, n: int, d: int, directions: int) -> Case:
    """The sliced form, value and gradient."""

    def build() -> dict[str, Side | Absent]:
        x, y = clouds(n, n, d)
        w = normal(SEED, "bench.directions", directions, (directions, d))
        w = w / np.linalg.norm(w, axis=1, keepdims=True)
        given = {"of": (0, 1), "device": context.device}
        return {
            "jax": jax_grad(pf_jax.sliced_energy_distance, x, y, w, **given),
            "torch": torch_grad(pf_torch.sliced_energy_distance, x, y, w, **given),
        }

    return Case("sliced energy distance, value and gradient", {"n": n, "d": d, "directions": directions}, build, 1e-3)
