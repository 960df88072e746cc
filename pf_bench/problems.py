"""The numbers that all sides work on: cells, counts as sparse as real ones, models off their initial values."""

from __future__ import annotations

from typing import Any

import numpy as np

from pf_core.config import Config, OperatorConfig, StageConfig, VAEConfig
from pf_core.initial import Sizes, operator_parameters, vae_parameters
from pf_core.noise import generator, normal

__all__ = ["clouds", "configuration", "counts", "operator_problem", "parameters", "repeat", "trainable", "vae_problem"]

SEED = 0
Arrays = dict[str, np.ndarray]


def clouds(n: int, m: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of cells whose means differ, (n, d) and (m, d) float32."""
    shift = normal(SEED, "bench.shift", d, (d,))
    return normal(SEED, "bench.x", n, (n, d)), normal(SEED, "bench.y", m, (m, d)) * np.float32(1.1) + 0.3 * shift


def counts(n_cells: int, n_genes: int, *lead: int) -> np.ndarray:
    """Negative-binomial counts of genes with very different means, (*lead, n_cells, n_genes); about 91 % are zero."""
    rng = generator(SEED, "bench.counts", n_cells * 1_000_003 + n_genes)
    mean = rng.lognormal(-3.2, 1.5, n_genes)
    rate = rng.gamma(2.0, mean / 2.0, (*lead, n_cells, n_genes))
    return rng.poisson(rate).astype(np.float32)


def configuration(n_hidden: int, n_latent: int, *, n_conditions: int = 32, n_cells: int = 128) -> Config:
    """The default configuration with these widths."""
    stage = StageConfig(schedule="constant", warmup=0)
    operator = OperatorConfig(conditions_per_step=n_conditions, cells_per_condition=n_cells)
    vae = VAEConfig(n_hidden=n_hidden, n_latent=n_latent)
    return Config(vae=vae, operator=operator, stage_vae=stage, stage_operator=stage, stage_joint=stage)


def parameters(config: Config, n_genes: int, n_perturbations: int = 33) -> Arrays:
    """All parameters float32, operators away from the identity."""
    sizes = Sizes(n_genes, n_tissues=3, n_perturbations=n_perturbations, n_batches=2)
    params = vae_parameters(config.vae, sizes, SEED)
    params |= operator_parameters(config.operator, config.vae.n_latent, sizes, SEED)
    for name in ("operators.A0", "operators.B", "operators.u", "operators.b0"):
        params[name] = params[name] + 0.03 * generator(SEED, f"bench.{name}").standard_normal(params[name].shape)
    return {name: value.astype(np.float32) for name, value in params.items()}


def trainable(stage: str, params: Arrays) -> tuple[str, ...]:
    """Names that a stage trains."""
    return tuple(name for name in params if stage == "joint" or name.startswith("vae.") == (stage == "vae"))


def vae_problem(n_cells: int, n_genes: int, n_latent: int) -> tuple[Arrays, Arrays]:
    """Batch and noise of one step of stage "vae", without leading axes."""
    x = counts(n_cells, n_genes)
    tissue = generator(SEED, "bench.tissue", n_cells).integers(1, 3, n_cells).astype(np.int32)
    library = np.maximum(x.sum(-1), 1.0).astype(np.float32)
    batch = {"counts": x, "tissue": tissue, "library": library, "weight": np.ones(n_cells, np.float32)}
    return batch, {"eps": normal(SEED, "bench.eps", n_cells, (n_cells, n_latent))}


def operator_problem(n_conditions: int, n_cells: int, n_latent: int, n_genes: int = 0) -> tuple[Arrays, Arrays, Arrays]:
    """Batch, noise and carry of one step of stage "operator"; with genes, the groups of stage "joint"."""
    rng = generator(SEED, "bench.operator", n_conditions * 1_000_003 + n_cells)
    shape = (n_conditions, n_cells)
    batch: Arrays = {
        "perturbations": np.stack([1 + np.arange(n_conditions), np.zeros(n_conditions)], 1).astype(np.int32),
        "doses": np.tile(np.array([1.0, 0.0], np.float32), (n_conditions, 1)),
        "tissue": rng.integers(1, 3, n_conditions).astype(np.int32),
        "batch": np.zeros((n_conditions, 2), np.float32),
        "covariates": np.zeros((n_conditions, 0), np.float32),
        **{name: np.ones(shape, np.float32) for name in ("wx", "wy")},
        "weight": np.ones(n_conditions, np.float32),
        "slot": (1 + np.arange(n_conditions)).astype(np.int32),
        "distinct": np.ones(n_conditions, np.float32),
    }
    for side in ("x", "y"):
        if n_genes:
            x = counts(n_cells, n_genes, n_conditions)
            batch[f"{side}_counts"] = x if side == "x" else x[:, ::-1].copy()
            batch[f"{side}_library"] = np.maximum(batch[f"{side}_counts"].sum(-1), 1.0).astype(np.float32)
        else:
            shift = 0.0 if side == "x" else 0.5
            batch[side] = (rng.standard_normal((*shape, n_latent)) + shift).astype(np.float32)
    v = normal(SEED, "bench.v", n_conditions, (1 + n_conditions, n_latent))
    v0 = normal(SEED, "bench.v0", n_conditions, (n_conditions, n_latent))
    return batch, {"v0": v0}, {"v": v / np.linalg.norm(v, axis=1, keepdims=True)}


def repeat(tree: Arrays, *lead: int) -> Arrays:
    """The same arrays with leading axes."""
    return {name: np.ascontiguousarray(np.broadcast_to(value, (*lead, *value.shape))) for name, value in tree.items()}


def hypers(config: Config, stage: str, steps: int) -> Arrays:
    """Constant learning rate and KL weight."""
    settings: Any = getattr(config, f"stage_{stage}")
    return {"lr": np.full(steps, settings.learning_rate, np.float32), "beta": np.ones(steps, np.float32)}
