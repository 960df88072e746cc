"""A small flow system for the tests of the JAX twin: parameters off their initial values, batches, and a network."""

from __future__ import annotations

import numpy as np

from pf_core.config import AdversaryConfig, Config, FlowConfig, StageConfig, VAEConfig
from pf_core.initial import Sizes, cvae_parameters, flow_parameters, running_statistics

# Steps, micro-batches, cells, genes, tissues, latents, width of the condition code, hidden units of the conditional VAE
# and of the discriminator, edges.
S, A, C, G, T, D, P, H, K, E = 3, 2, 7, 11, 5, 3, 2, 13, 6, 17
STAGES = ("cvae", "flow")


def run_config(kind: str = "entropy", **options) -> Config:
    stage = StageConfig(max_norm=0.5, weight_decay=0.02)
    return Config(
        system="flow",
        vae=VAEConfig(n_hidden=H, n_latent=D),
        adversary=AdversaryConfig(kind=kind, weight=0.7, n_hidden=K, dropout=0.4),
        flow=FlowConfig(n_embedding=3, n_heads=2, n_time=4, n_condition=2, n_hidden=7),
        stage_cvae=stage,
        stage_flow=stage,
        **options,
    )


def statistics(seed: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    start = running_statistics(run_config().vae)
    return {name: value + rng.random(value.shape) for name, value in start.items()}


def parameters(config: Config, seed: int = 0, *, graph: bool = True) -> dict[str, np.ndarray]:
    """All parameters of a flow model, without running statistics."""
    rng = np.random.default_rng(seed)
    sizes = Sizes(n_genes=G, n_tissues=T, n_perturbations=1)
    params = cvae_parameters(config.vae, config.adversary, sizes, seed)
    params |= flow_parameters(config.flow, D, P, G, seed, graph=graph)
    params = {name: value + 0.2 * rng.normal(size=value.shape) for name, value in params.items()}
    return params | {"flow.center": rng.normal(size=D), "flow.scale": 0.5 + rng.random(D)}


def trainable(stage: str, params: dict[str, np.ndarray]) -> tuple[str, ...]:
    units = ("flow.center", "flow.scale")
    return tuple(name for name in params if name.startswith("flow.") == (stage == "flow") and name not in units)


def network(seed: int = 4) -> dict[str, np.ndarray]:
    """Edges with a gene that none goes to, parallel edges, and a self loop."""
    rng = np.random.default_rng(seed)
    edges = {"source": rng.integers(0, G, E), "target": rng.integers(0, G - 1, E)}
    edges["source"][1], edges["target"][1] = edges["source"][0], edges["target"][0]
    edges["source"][2] = edges["target"][2]
    return {name: value.astype(np.int32) for name, value in edges.items()} | {"sign": rng.normal(size=E)}


def batches(stage: str, seed: int = 1, lead: tuple[int, ...] = (S, A), *, graph: bool = True) -> tuple[dict, dict]:
    """Batches and noises with the leading axes; the last cell of every batch is padding."""
    rng = np.random.default_rng(seed)
    weight = rng.random((*lead, C)) * (np.arange(C) < C - 1)
    if stage == "cvae":
        x = rng.negative_binomial(0.7, 0.2, (*lead, C, G)).astype(float)
        tissue = rng.permuted(np.broadcast_to(np.arange(C) % T, (*lead, C)), axis=-1).astype(np.int32)
        batch = {"counts": x, "tissue": tissue, "library": x.sum(-1) + 1, "weight": weight}
        keep = {f"keep{k}": rng.integers(0, 2, (*lead, C, K)).astype(float) for k in (1, 2)}
        return batch, {"eps": rng.normal(size=(*lead, C, D))} | keep
    batch = {name: rng.normal(size=(*lead, C, D)) for name in ("z0", "z1")}
    batch |= {"condition": rng.normal(size=(*lead, C, P)), "weight": weight, "start": rng.random((*lead, C))}
    batch["stop"] = batch["start"] + 0.2 + rng.random((*lead, C))
    if graph:
        batch |= {name: np.broadcast_to(value, (*lead, E)).copy() for name, value in network().items()}
    return batch, {"tau": rng.random((*lead, C))}


def hypers(n: int = S) -> dict[str, np.ndarray]:
    return {"lr": np.linspace(0.01, 0.02, n), "beta": np.linspace(0.3, 1.0, n)}


def pick(tree: dict, *index: int) -> dict:
    return {name: value[index] for name, value in tree.items()}
