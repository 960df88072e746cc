"""Small made-up problems with prime sizes: configurations, parameters off their initial values, batches and noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from scipy import sparse

from pf_core.config import AdversaryConfig, Config, FlowConfig, OperatorConfig, StageConfig, VAEConfig
from pf_core.count_table import count_table
from pf_core.initial import (
    Sizes,
    cvae_parameters,
    flow_parameters,
    operator_parameters,
    running_statistics,
    vae_parameters,
)
from pf_core.noise import generator

Arrays = dict[str, np.ndarray]

N_GENES, N_TISSUES, N_PERTURBATIONS, N_BATCHES, N_COVARIATES = 13, 3, 7, 2, 1
N_CELLS, N_CONDITIONS, N_X, N_Y, N_MEMBERS = 11, 5, 7, 3, 2
SIZES = Sizes(N_GENES, N_TISSUES, N_PERTURBATIONS, N_BATCHES, N_COVARIATES)

# The flow system: tissues with "unknown", width of the condition code, and regulatory edges (source, target, sign).
# Gene 0 regulates and is not regulated, genes 1 and 4 have many regulators, 2 and 3 regulate each other, 11 and 12 are
# alone.
N_CODES, N_CODE = 4, 9
EDGES = (
    *((0, 1, 1), (0, 2, -1), (0, 3, 1), (2, 1, -1), (4, 1, 1), (5, 1, -1), (2, 3, 1), (3, 2, -1), (6, 4, 1)),
    *((7, 4, 1), (8, 4, -1), (9, 4, -1), (10, 4, 1), (1, 5, -1), (9, 7, 1), (8, 10, -1), (4, 6, 1)),
)


def configuration(**changes: Any) -> Config:
    """A tiny configuration; keys with a dot change a field of a section, as in vae.scale."""
    stage = StageConfig(max_norm=1.7, weight_decay=0.01, learning_rate=3e-3)
    config = Config(
        vae=VAEConfig(n_hidden=17, n_latent=5),
        operator=OperatorConfig(
            n_embedding=3, n_tissue_embedding=2, n_theta=5, n_bases=2, n_hidden=7, power_iterations=2, rho_max=0.9
        ),
        adversary=AdversaryConfig(n_hidden=7, weight=0.7, dropout=0.3),
        flow=FlowConfig(n_embedding=3, n_heads=2, n_time=7, n_condition=4, n_hidden=19),
        stage_vae=stage,
        stage_operator=stage,
        stage_joint=stage,
        stage_cvae=stage,
        stage_flow=stage,
    )
    for key, value in changes.items():
        section, name = key.split("__")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def parameters(config: Config, seed: int = 1, *, off: float = 0.3, features: bool = False) -> Arrays:
    """Every parameter, moved away from its initial value by `off` times a normal draw."""
    sizes = replace(SIZES, n_features=4) if features else SIZES
    params = vae_parameters(config.vae, sizes, seed)
    params |= operator_parameters(config.operator, config.vae.n_latent, sizes, seed)
    for name, value in params.items():
        # Square matrices must not be symmetric, or a transposed one would pass: the draw sees to that.
        params[name] = value + off * generator(seed, "off." + name).standard_normal(value.shape)
    if config.vae.input == "counts":
        # As training would leave it: raw counts reach hundreds, and a latent of 1e9 would leave one gene all the mass.
        params["vae.encoder.hidden.weight"] *= 0.02
    if features:
        params["conditions.features"] = generator(seed, "features").standard_normal((N_PERTURBATIONS, 4))
    return params


def parameters_of_flow(config: Config, seed: int = 1, *, off: float = 0.3, graph: bool = True) -> Arrays:
    """Every parameter of the flow system, moved away likewise, and the standardisation of its latents."""
    sizes, d = replace(SIZES, n_tissues=N_CODES), config.vae.n_latent
    params = cvae_parameters(config.vae, config.adversary, sizes, seed)
    params |= flow_parameters(config.flow, d, N_CODE, N_GENES, seed, graph=graph)
    for name, value in params.items():
        params[name] = value + off * generator(seed, "off." + name).standard_normal(value.shape)
    params["flow.center"] = generator(seed, "flow.center").normal(0.3, 1.0, d)
    params["flow.scale"] = generator(seed, "flow.scale").uniform(0.5, 2.0, d)
    return params


def parameters_of(stage: str, config: Config, **options: Any) -> Arrays:
    """The parameters of the system that a stage belongs to."""
    return (parameters_of_flow if stage in ("cvae", "flow") else parameters)(config, **options)


def trainable(stage: str, params: Arrays) -> Arrays:
    """The parameters that a stage trains."""
    prefixes = {
        "vae": ("vae.",),
        "operator": ("conditions.", "operators."),
        "joint": ("vae.", "conditions.", "operators."),
        "cvae": ("cvae.", "discriminator."),
        "flow": ("flow.",),
    }
    fixed = ("conditions.features", "flow.center", "flow.scale")
    return {k: v for k, v in params.items() if k.startswith(prefixes[stage]) and k not in fixed}


def _counts(draw: np.random.Generator, *shape: int) -> np.ndarray:
    """Counts of uneven depth, with zeros and a few large ones."""
    rate = np.exp(draw.normal(0.5, 1.2, (*shape, N_GENES)))
    return draw.poisson(rate * draw.gamma(1.5, 1.0, (*shape, 1))).astype(np.float64)


def vae_batch(index: int = 0, *, n_cells: int = N_CELLS) -> Arrays:
    draw = generator(7, "vae.batch", index)
    counts = _counts(draw, n_cells)
    weight = draw.uniform(0.5, 1.5, n_cells)
    weight[-1] = 0.0  # a padding row
    return {
        "counts": counts,
        "tissue": draw.integers(0, N_TISSUES, n_cells).astype(np.int32),
        "library": np.maximum(counts.sum(axis=1), 1.0),
        "weight": weight,
    }


def tabled(counts: np.ndarray, weight: np.ndarray, *, rows: int = 5) -> Arrays:
    """weight, table and tail of counts, with the larger counts and padding in the tail.

    Weights are multiples of 1/64, so that float32 holds their sums.
    """
    weight = np.round(64 * weight) / 64
    cells: Any = sparse.csr_matrix(counts)
    n_tail = int((counts > rows).sum()) + 3
    return {"weight": weight} | count_table(cells, weight, n_tail, dtype="float64", rows=rows)


def condition_batch(index: int = 0, n_conditions: int = N_CONDITIONS) -> Arrays:
    """Conditions with a control (doses 0), a pair, an unknown member, a fractional dose and a pooled batch."""
    draw = generator(7, "conditions.batch", index)
    members = draw.integers(1, N_PERTURBATIONS, (n_conditions, N_MEMBERS)).astype(np.int32)
    doses = draw.uniform(0.25, 2.0, (n_conditions, N_MEMBERS))
    doses[0] = 0.0
    doses[1, 1] = 0.0
    members[2, 0] = 0
    batch = np.eye(N_BATCHES)[draw.integers(0, N_BATCHES, n_conditions)]
    batch[1] = 0.0
    return {
        "perturbations": members,
        "doses": doses,
        "tissue": draw.permutation(n_conditions).astype(np.int32) % N_TISSUES,
        "batch": batch,
        "covariates": draw.normal(0, 1, (n_conditions, N_COVARIATES)),
    }


def operator_batch(config: Config, index: int = 0, *, offset: float = 0.0) -> Arrays:
    """Groups of unequal size; the last group is padding (weight 0, slot 0)."""
    draw = generator(7, "operator.batch", index)
    batch = condition_batch(index)
    d, n = config.vae.n_latent, N_CONDITIONS
    wx = draw.uniform(0.5, 1.5, (n, N_X)) * (np.arange(N_X) < draw.integers(3, N_X + 1, (n, 1)))
    wy = (np.arange(N_Y) < draw.integers(2, N_Y + 1, (n, 1))).astype(float)
    weight = draw.uniform(0.5, 1.5, n)
    slot = draw.permutation(n).astype(np.int32) + 1
    weight[-1], wx[-1], wy[-1], slot[-1] = 0.0, 0.0, 0.0, 0
    return batch | {
        "x": offset + draw.normal(0, 1, (n, N_X, d)),
        "y": offset + draw.normal(0.3, 1.4, (n, N_Y, d)),
        "wx": wx,
        "wy": wy,
        "weight": weight,
        "slot": slot,
        "distinct": (weight > 0).astype(float),
    }


def joint_batch(config: Config, index: int = 0) -> Arrays:
    draw = generator(7, "joint.batch", index)
    batch = operator_batch(config, index)
    for side, n in (("x", N_X), ("y", N_Y)):
        del batch[side]
        counts = _counts(draw, N_CONDITIONS, n)
        batch[f"{side}_counts"] = counts
        batch[f"{side}_library"] = np.maximum(counts.sum(axis=-1), 1.0)
    return batch | {f"cells_{name}": value for name, value in vae_batch(index).items()}


def cvae_batch(index: int = 0) -> Arrays:
    """Cells of every tissue, two of them of unknown tissue; the padding row has a tissue that is known."""
    batch, draw = vae_batch(index), generator(7, "cvae.batch", index)
    tissue = draw.permutation(np.arange(N_CELLS) % (N_CODES - 1) + 1).astype(np.int32)
    tissue[:2] = 0
    return batch | {"tissue": tissue}


def network() -> Arrays:
    """The regulatory network."""
    source, target, sign = zip(*EDGES, strict=True)
    return {
        "source": np.array(source, np.int32),
        "target": np.array(target, np.int32),
        "sign": np.array(sign, np.float64),
    }


def condition_codes(n_cells: int, index: int = 0) -> np.ndarray:
    """Doses by perturbation, then the one-hot tissue; the first cell is a control."""
    draw = generator(7, "condition.codes", index)
    doses = draw.uniform(0.25, 2.0, (n_cells, N_CODE - N_CODES)) * (draw.uniform(size=(n_cells, 1)) < 0.7)
    doses[0] = 0.0
    return np.concatenate([doses, np.eye(N_CODES)[draw.integers(0, N_CODES, n_cells)]], axis=1)


def flow_batch(config: Config, index: int = 0, *, graph: bool = True) -> Arrays:
    """Pairs between neighbouring times of three; the last one is padding."""
    draw = generator(7, "flow.batch", index)
    shape = (N_CELLS, config.vae.n_latent)
    interval = draw.integers(0, 2, N_CELLS)
    weight = draw.uniform(0.5, 1.5, N_CELLS)
    weight[-1] = 0.0
    return {
        "z0": draw.normal(0.0, 1.0, shape),
        "z1": draw.normal(0.5, 1.3, shape),
        "condition": condition_codes(N_CELLS, index),
        "start": np.array([0.0, 0.375])[interval],
        "stop": np.array([0.375, 1.0])[interval],
        "weight": weight,
        **(network() if graph else {}),
    }


def batch_of(stage: str, config: Config, index: int = 0) -> Arrays:
    if stage in ("vae", "cvae"):
        return vae_batch(index) if stage == "vae" else cvae_batch(index)
    makers = {"operator": operator_batch, "joint": joint_batch, "flow": flow_batch}
    return makers[stage](config, index)


def noise_of(stage: str, config: Config, index: int = 0) -> Arrays:
    d = config.vae.n_latent
    noise = {}
    if stage in ("vae", "joint", "cvae"):
        noise["eps"] = generator(7, "eps", index).standard_normal((N_CELLS, d))
    if stage in ("operator", "joint"):
        noise["v0"] = generator(7, "v0", index).standard_normal((N_CONDITIONS, d))
    if stage == "cvae":
        kept = generator(7, "keep", index).uniform(size=(2, N_CELLS, config.adversary.n_hidden))
        noise["keep1"], noise["keep2"] = (kept >= config.adversary.dropout).astype(float)
    if stage == "flow":
        noise["tau"] = generator(7, "tau", index).uniform(size=N_CELLS)
    return noise


def carry_of(stage: str, config: Config) -> Arrays:
    """The carried vectors of the power iteration (row 0 is for padding), or the running statistics off their start."""
    d = config.vae.n_latent
    if stage == "cvae":
        away = lambda name, start: generator(7, "carry." + name).uniform(0.2, 1.4, start.shape)
        return {name: start + away(name, start) for name, start in running_statistics(config.vae).items()}
    if stage in ("vae", "flow"):
        return {}
    if config.operator.spectral_target == "operators":
        return {"v": generator(7, "carry.v").standard_normal((N_CONDITIONS + 2, d))}
    return {"v_bases": generator(7, "carry.v").standard_normal((N_TISSUES + config.operator.n_bases, d))}


def moments(params: Arrays, seed: int = 5) -> tuple[Arrays, Arrays]:
    """Adam's moments as after some steps: neither zero nor equal."""
    m = {name: 0.1 * generator(seed, "m." + name).standard_normal(p.shape) for name, p in params.items()}
    v = {name: generator(seed, "v." + name).uniform(0.01, 0.2, p.shape) for name, p in params.items()}
    return m, v


def stacked(trees: list[Arrays]) -> Arrays:
    """Leaves stacked along a new first axis."""
    return {name: np.stack([tree[name] for tree in trees]) for name in trees[0]}
