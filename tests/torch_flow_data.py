"""Small cases of the flow system for the tests of the PyTorch twin: everything off its initial value."""

from __future__ import annotations

import numpy as np
import torch

from pf_core.config import AdversaryConfig, Config, FlowConfig, StageConfig, VAEConfig
from pf_core.initial import Sizes, cvae_parameters, flow_parameters, running_statistics

C, G, D, T, H = 17, 13, 3, 4, 7  # cells, genes, latents, tissues, hidden units of the VAE
K, P, E, UNITS = 2, 6, 23, 5  # heads, width of the condition code, edges, hidden units of the discriminator


def config(*, dtype="float64", kind="entropy", weight=1.0, dropout=0.2, **stage):
    stages = StageConfig(**{"max_norm": 0.5, "weight_decay": 0.01, **stage})
    return Config(
        dtype=dtype,
        system="flow",
        vae=VAEConfig(n_hidden=H, n_latent=D),
        adversary=AdversaryConfig(kind=kind, weight=weight, n_hidden=UNITS, dropout=dropout),
        flow=FlowConfig(n_embedding=5, n_heads=K, n_time=2, n_condition=4, n_hidden=11),
        stage_cvae=stages,
        stage_flow=stages,
    )


def moved(params, seed=0):
    rng = np.random.default_rng(seed)
    return {name: value + 0.2 * rng.standard_normal(value.shape) for name, value in params.items()}


def cvae_arrays(seed=0):
    settings = config()
    return moved(cvae_parameters(settings.vae, settings.adversary, Sizes(G, T, 1), seed), seed)


def statistics_arrays(seed=0):
    rng = np.random.default_rng(seed)
    start = running_statistics(config().vae)
    return {name: value + rng.uniform(0.1, 0.6, value.shape) for name, value in start.items()}


def flow_arrays(*, graph=True, seed=0):
    return moved(flow_parameters(config().flow, D, P, G, seed, graph=graph), seed)


def network(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "source": rng.integers(0, G, E).astype("int32"),
        "target": rng.integers(0, G - 2, E).astype("int32"),  # two genes without a regulator
        "sign": rng.choice([-1.0, 1.0], E),
    }


def cvae_batch(seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(1.0, 4.0, (C, G))).astype(float)
    batch = {
        "counts": counts,
        "tissue": np.arange(C).astype("int32") % T,
        "library": counts.sum(1).clip(1),
        "weight": np.array([1.0] * (C - 2) + [0.0, 0.5]),
    }
    noise = {"eps": rng.standard_normal((C, D))}
    noise |= {name: (rng.random((C, UNITS)) > 0.2).astype(float) for name in ("keep1", "keep2")}
    return batch, noise


def flow_batch(seed=0, *, graph=True):
    rng = np.random.default_rng(seed)
    z0 = rng.standard_normal((C, D))
    batch = {
        "z0": z0,
        "z1": z0 + rng.standard_normal((C, D)) + 1,
        "condition": rng.uniform(0, 1, (C, P)),
        "start": np.linspace(0, 0.5, C),
        "stop": np.linspace(0.5, 1.0, C),
        "weight": np.array([1.0] * (C - 2) + [0.0, 0.5]),
    }
    return batch | (network(seed) if graph else {}), {"tau": rng.random(C)}


def tensors(tree, dtype=torch.float64):
    """Floating arrays as tensors of one dtype, integers as they are."""
    made = {name: torch.tensor(np.asarray(value)) for name, value in tree.items()}
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in made.items()}


def steps(tree, n_steps, n_micro=1):
    """The same batch in every step and micro-batch."""
    return {name: np.stack([np.stack([value] * n_micro)] * n_steps) for name, value in tree.items()}
