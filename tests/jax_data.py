"""A small run for the tests of the JAX twin: parameters off their initial values, and batches of every stage."""

from __future__ import annotations

import numpy as np

from pf_core.config import Config, OperatorConfig, StageConfig, VAEConfig
from pf_core.initial import Sizes, operator_parameters, vae_parameters

S, A, C, G, T, P, M, N, L, D = 3, 2, 7, 11, 3, 5, 2, 6, 4, 3
STAGES = ("vae", "operator", "joint")


def run_config(**operator) -> Config:
    stage = StageConfig(max_norm=0.5, weight_decay=0.02)
    return Config(
        vae=VAEConfig(n_hidden=13, n_latent=D),
        operator=OperatorConfig(
            n_embedding=3, n_tissue_embedding=2, n_theta=8, n_bases=4, n_hidden=9, rho_max=0.9, **operator
        ),
        stage_vae=stage,
        stage_operator=stage,
        stage_joint=stage,
    )


def parameters(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    sizes = Sizes(n_genes=G, n_tissues=T, n_perturbations=5, n_batches=2, n_covariates=1)
    rng = np.random.default_rng(seed)
    params = vae_parameters(config.vae, sizes, seed) | operator_parameters(config.operator, D, sizes, seed)
    return {name: value + 0.2 * rng.normal(size=value.shape) for name, value in params.items()}


def trainable(stage: str, params: dict[str, np.ndarray]) -> tuple[str, ...]:
    return tuple(name for name in params if stage == "joint" or name.startswith("vae.") == (stage == "vae"))


def batches(stage: str, seed: int = 1, lead: tuple[int, ...] = (S, A)) -> tuple[dict, dict]:
    """Batches and noises with the leading axes; the last group of every batch is padding."""
    rng = np.random.default_rng(seed)

    def counts(*shape):
        return rng.negative_binomial(0.7, 0.2, (*lead, *shape, G)).astype(float)

    def cells():
        x = counts(C)
        tissue = rng.integers(0, T, (*lead, C)).astype(np.int32)
        return {"counts": x, "tissue": tissue, "library": x.sum(-1) + 1, "weight": rng.random((*lead, C))}

    noise = {"eps": rng.normal(size=(*lead, C, D)), "v0": rng.normal(size=(*lead, P, D))}
    if stage == "vae":
        return cells(), {"eps": noise["eps"]}
    live = np.arange(P) < P - 1
    batch = {
        "perturbations": rng.integers(0, 5, (*lead, P, M)).astype(np.int32),
        "doses": rng.random((*lead, P, M)),
        "tissue": rng.integers(0, T, (*lead, P)).astype(np.int32),
        "batch": rng.random((*lead, P, 2)),
        "covariates": rng.normal(size=(*lead, P, 1)),
        "wx": rng.random((*lead, P, N)) * live[:, None],
        "wy": rng.random((*lead, P, L)) * live[:, None],
        "weight": np.broadcast_to(live * np.array([1.0, 2.0, 0.5, 1.0, 0.0]), (*lead, P)).copy(),
        "distinct": np.broadcast_to(np.array([1.0, 1.0, 0.0, 1.0, 0.0]), (*lead, P)).copy(),
        "slot": np.broadcast_to(np.array([2, 1, 0, 3, 0], np.int32), (*lead, P)).copy(),
    }
    if stage == "operator":
        batch |= {"x": rng.normal(size=(*lead, P, N, D)), "y": rng.normal(size=(*lead, P, L, D))}
        return batch, {"v0": noise["v0"]}
    x, y = counts(P, N), counts(P, L)
    batch |= {"x_counts": x, "y_counts": y, "x_library": x.sum(-1) + 1, "y_library": y.sum(-1) + 1}
    return batch | {f"cells_{name}": value for name, value in cells().items()}, noise


def carry(config: Config, seed: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    if config.operator.spectral_target == "bases":
        return {"v_bases": rng.normal(size=(T + config.operator.n_bases, D))}
    return {"v": rng.normal(size=(4, D))}


def hypers(n: int = S) -> dict[str, np.ndarray]:
    return {"lr": np.linspace(0.01, 0.02, n), "beta": np.linspace(0.3, 1.0, n)}


def pick(tree: dict, *index: int) -> dict:
    return {name: value[index] for name, value in tree.items()}
