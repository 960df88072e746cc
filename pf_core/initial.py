"""Initial values of every parameter, drawn once in NumPy, so that both twins start equal.

Parameters have one canonical form: dotted names, dense weights (in, out). The names are the attribute paths of the
modules in both twins. Dense layers start at U(-1/sqrt(fan_in), 1/sqrt(fan_in)), weights and biases alike; the hidden
biases of alpha and beta lie HIDDEN_START higher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pf_core.config import AdversaryConfig, FlowConfig, OperatorConfig, VAEConfig
from pf_core.noise import generator

Parameters = dict[str, np.ndarray]
HIDDEN_START = 3.0


@dataclass(frozen=True)
class Sizes:
    """Sizes that come from the data. Index 0 of every vocabulary is "unknown" and is counted in."""

    n_genes: int
    n_tissues: int
    n_perturbations: int
    n_batches: int = 0
    n_covariates: int = 0
    n_features: int = 0  # width of the fixed perturbation features; 0 for a learned table


def _dense(params: Parameters, seed: int, name: str, n_in: int, n_out: int) -> None:
    bound = 1.0 / np.sqrt(n_in)
    params[f"{name}.weight"] = generator(seed, f"{name}.weight").uniform(-bound, bound, (n_in, n_out))
    params[f"{name}.bias"] = generator(seed, f"{name}.bias").uniform(-bound, bound, n_out)


def vae_parameters(config: VAEConfig, sizes: Sizes, seed: int) -> Parameters:
    """Parameters of the NB-VAE, float64, canonical names."""
    n_genes, n_tissues, n_hidden, n_latent = sizes.n_genes, sizes.n_tissues, config.n_hidden, config.n_latent
    params: Parameters = {}
    _dense(params, seed, "vae.encoder.hidden", n_genes, n_hidden)
    _dense(params, seed, "vae.encoder.mean", n_hidden + n_tissues, n_latent)
    _dense(params, seed, "vae.encoder.logvar", n_hidden + n_tissues, n_latent)
    _dense(params, seed, "vae.decoder.hidden", n_latent + n_tissues, n_hidden)
    _dense(params, seed, "vae.decoder.mean", n_hidden, n_genes)
    shape = (n_genes,) if config.dispersion == "gene" else (n_tissues, n_genes)
    params["vae.decoder.log_r"] = np.zeros(shape)
    return params


def operator_parameters(config: OperatorConfig, n_latent: int, sizes: Sizes, seed: int) -> Parameters:
    """Parameters of the condition encoder and the operator family, float64, canonical names."""
    params: Parameters = {}
    if sizes.n_features:
        bound = 1.0 / np.sqrt(sizes.n_features)
        params["conditions.perturbation.map"] = generator(seed, "conditions.perturbation.map").uniform(
            -bound, bound, (sizes.n_features, config.n_embedding)
        )
    else:
        params["conditions.perturbation.table"] = generator(seed, "conditions.perturbation.table").standard_normal(
            (sizes.n_perturbations, config.n_embedding)
        )
    params["conditions.tissue.table"] = generator(seed, "conditions.tissue.table").standard_normal(
        (sizes.n_tissues, config.n_tissue_embedding)
    )
    n_in = config.n_embedding + config.n_tissue_embedding + sizes.n_batches + sizes.n_covariates
    _dense(params, seed, "conditions.theta", n_in, config.n_theta)
    params["operators.A0"] = np.tile(np.eye(n_latent), (sizes.n_tissues, 1, 1))
    params["operators.b0"] = np.zeros((sizes.n_tissues, n_latent))
    for name, shape in (("B", (config.n_bases, n_latent, n_latent)), ("u", (config.n_bases, n_latent))):
        params[f"operators.{name}"] = 0.01 * generator(seed, f"operators.{name}").standard_normal(shape)
    for name in ("alpha", "beta"):
        _dense(params, seed, f"operators.{name}.hidden", config.n_theta, config.n_hidden)
        # Nearly all units start active, so the profile starts linear in theta: members add until data say otherwise.
        params[f"operators.{name}.hidden.bias"] += HIDDEN_START
        _dense(params, seed, f"operators.{name}.out", config.n_hidden, config.n_bases)
    return params


def cvae_parameters(config: VAEConfig, adversary: AdversaryConfig, sizes: Sizes, seed: int) -> Parameters:
    """Parameters of the flow system's conditional NB-VAE and its discriminator, float64, canonical names."""
    n_hidden, n_latent, n_code = config.n_hidden, config.n_latent, sizes.n_tissues
    params: Parameters = {}
    _dense(params, seed, "cvae.encoder.block1", sizes.n_genes + n_code, n_hidden)
    _dense(params, seed, "cvae.encoder.block2", n_hidden, n_hidden)
    for block, norm in (("block1", "norm1"), ("block2", "norm2")):
        del params[f"cvae.encoder.{block}.bias"]  # the norm takes the mean off again
        params[f"cvae.encoder.{norm}.scale"] = np.ones(n_hidden)
        params[f"cvae.encoder.{norm}.shift"] = np.zeros(n_hidden)
    _dense(params, seed, "cvae.encoder.mean", n_hidden, n_latent)
    _dense(params, seed, "cvae.encoder.logvar", n_hidden, n_latent)
    _dense(params, seed, "cvae.decoder.block1", n_latent + n_code, n_hidden)
    _dense(params, seed, "cvae.decoder.block2", n_hidden, n_hidden)
    _dense(params, seed, "cvae.decoder.mean", n_hidden, sizes.n_genes)
    params["cvae.decoder.log_r"] = np.zeros(sizes.n_genes)
    n_classes = max(sizes.n_tissues - 1, 1)  # without "unknown"
    _dense(params, seed, "discriminator.hidden1", n_latent, adversary.n_hidden)
    _dense(params, seed, "discriminator.hidden2", adversary.n_hidden, adversary.n_hidden)
    _dense(params, seed, "discriminator.out", adversary.n_hidden, n_classes)
    return params


def running_statistics(config: VAEConfig) -> Parameters:
    """What the batch norms carry from step to step, at their start."""
    starts = {"mean": np.zeros(config.n_hidden), "var": np.ones(config.n_hidden)}
    return {f"cvae.encoder.{norm}.{kind}": start for norm in ("norm1", "norm2") for kind, start in starts.items()}


def flow_parameters(
    config: FlowConfig, n_latent: int, n_conditions: int, n_genes: int, seed: int, *, graph: bool
) -> Parameters:
    """Parameters of the vector field, float64, canonical names. n_conditions is the width of the condition code."""
    params: Parameters = {}
    h, width = config.n_embedding, config.n_embedding * config.n_heads
    bound = np.sqrt(6.0 / (n_genes + h))
    params["flow.genes"] = generator(seed, "flow.genes").uniform(-bound, bound, (n_genes, h))
    if graph:
        _dense(params, seed, "flow.graph.source", h, width)
        del params["flow.graph.source.bias"]  # attention sums to 1: it would be the bias after it
        _dense(params, seed, "flow.graph.target", h, width)
        _dense(params, seed, "flow.graph.edge", 1, width)
        del params["flow.graph.edge.bias"]  # it would be that of the target
        bound = 1.0 / np.sqrt(h)
        params["flow.graph.attention"] = generator(seed, "flow.graph.attention").uniform(
            -bound, bound, (config.n_heads, h)
        )
        params["flow.graph.bias"] = np.zeros(width)
    else:
        _dense(params, seed, "flow.graph.linear", h, width)
    _dense(params, seed, "flow.query", n_latent, width)
    _dense(params, seed, "flow.time.hidden", 1, config.n_time)
    _dense(params, seed, "flow.time.out", config.n_time, config.n_time)
    _dense(params, seed, "flow.condition", n_conditions, config.n_condition)
    _dense(params, seed, "flow.head.hidden", n_latent + width + config.n_time + config.n_condition, config.n_hidden)
    _dense(params, seed, "flow.head.out", config.n_hidden, n_latent)
    return params


def select(params: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The parameters below a dotted prefix, with the prefix cut off."""
    return {name[len(prefix) + 1 :]: value for name, value in params.items() if name.startswith(prefix + ".")}
