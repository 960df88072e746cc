"""Using a trained model: cells in and out as NumPy, the way `pf predict` does it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pf_bench.case import Absent, Case, Context, Side
from pf_bench.problems import SEED, configuration, parameters, vae_problem
from pf_core import backends
from pf_core.config import Config
from pf_core.noise import normal

__all__ = ["cases"]


def cases(context: Context) -> list[Case]:
    """The suite."""
    if context.quick:
        return [inference(context, 13, 11, 7, 3, "cells"), jacobian(context, 7, 11, 7, 3)]
    found = [inference(context, n, 2000, 256, 32, "cells") for n in (512, 4096, 16384)]
    return found + [jacobian(context, 512, 2000, 256, 32)]


def _sides(
    context: Context,
    sizes: tuple[int, int, int, int],
    output: Callable[[backends.Backend, Config, dict, dict], dict[str, np.ndarray]],
) -> dict[str, Side | Absent]:
    n_cells, n_genes, n_hidden, n_latent = sizes
    config = configuration(n_hidden, n_latent)
    params = parameters(config, n_genes)
    batch, _ = vae_problem(n_cells, n_genes, n_latent)

    def side(name: str) -> Side:
        twin = backends.load(name, device=context.device)
        run = lambda: output(twin, config, params, batch)
        return Side(run, run, note="NumPy in and out, transfers included")

    return {name: side(name) for name in ("jax", "torch")}


def inference(context: Context, n_cells: int, n_genes: int, n_hidden: int, n_latent: int, series: str) -> Case:
    """Encode counts, move the latents by the operators of two conditions, decode."""

    def output(twin: backends.Backend, config: Config, params: dict, batch: dict) -> dict[str, np.ndarray]:
        z, _ = twin.encode(params, batch["counts"], batch["tissue"], config)
        conditions = {
            "perturbations": np.array([[1, 2], [3, 0]], np.int32),
            "doses": np.array([[1, 1], [1, 0]], np.float32),
            "tissue": np.array([1, 2], np.int32),
            "batch": np.zeros((2, 2), np.float32),
            "covariates": np.zeros((2, 0), np.float32),
        }
        found = twin.operators(params, conditions, config)
        row = batch["tissue"] - 1
        moved = np.empty_like(z)
        for index in range(2):
            moved[row == index] = z[row == index] @ found["A"][index].T + found["b"][index]
        return {"mu": twin.decode(params, moved, batch["tissue"], batch["library"], config)}

    def build() -> dict[str, Side | Absent]:
        return _sides(context, (n_cells, n_genes, n_hidden, n_latent), output)

    sizes = {"cells": n_cells, "genes": n_genes, "hidden": n_hidden}
    return Case("prediction of cells", sizes, build, 1e-4, memory=n_cells in (13, 4096), series=series)


def jacobian(context: Context, n_cells: int, n_genes: int, n_hidden: int, n_latent: int) -> Case:
    """Derivative of the decoded mean along a latent direction, as the report's gene maps use it."""

    def output(twin: backends.Backend, config: Config, params: dict, batch: dict) -> dict[str, np.ndarray]:
        z, direction = (normal(SEED, f"bench.{name}", n_cells, (n_cells, n_latent)) for name in ("z", "direction"))
        return {
            "derivative": twin.decode_jacobian_vector(params, z, direction, batch["tissue"], batch["library"], config)
        }

    def build() -> dict[str, Side | Absent]:
        return _sides(context, (n_cells, n_genes, n_hidden, n_latent), output)

    return Case("derivative of decoded means", {"cells": n_cells, "genes": n_genes}, build, 1e-4)
