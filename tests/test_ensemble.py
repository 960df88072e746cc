"""Several operator models as one (pf_core/ensemble.py)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pf_core import backends
from pf_core.config import Config, OperatorConfig, VAEConfig
from pf_core.ensemble import member_seed, merged
from pf_core.initial import Sizes, operator_parameters, vae_parameters

SIZES = Sizes(n_genes=7, n_tissues=3, n_perturbations=5, n_batches=2, n_covariates=1)


def member(seed: int, sizes: Sizes) -> dict[str, np.ndarray]:
    """A model with random operators, on the VAE of seed 0."""
    config = Config(vae=VAEConfig(n_hidden=6, n_latent=4), operator=OperatorConfig(n_theta=6, n_bases=3, n_hidden=5))
    params = operator_parameters(config.operator, 4, sizes, seed)
    rng = np.random.default_rng(seed)
    for name in ("operators.A0", "operators.b0"):
        params[name] = params[name] + rng.normal(size=params[name].shape)
    if sizes.n_features:
        features = np.random.default_rng(99).normal(size=(sizes.n_perturbations, sizes.n_features))
        params["conditions.features"] = features
    return vae_parameters(config.vae, sizes, 0) | params


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("n_features", [0, 4])
def test_operators_are_the_means(backend: str, n_features: int) -> None:
    sizes = dataclasses.replace(SIZES, n_features=n_features)
    members = [member(seed, sizes) for seed in (1, 2, 3)]
    rng = np.random.default_rng(0)
    conditions = {
        "perturbations": np.array([[1, 2], [3, 0], [4, 4], [0, 0]], np.int32),
        "doses": np.array([[1.0, 0.5], [2.0, 0.0], [1.0, 1.0], [0.0, 0.0]]),
        "tissue": np.array([0, 1, 2, 1], np.int32),
        "batch": np.eye(2)[[0, 1, 1, 0]],
        "covariates": rng.normal(size=(4, 1)),
    }
    twin = backends.load(backend, dtype="float64", device="cpu")
    config = Config(dtype="float64")
    each = [twin.operators(params, conditions, config) for params in members]
    one = twin.operators(merged(members), conditions, config)
    for name in ("A", "b"):
        np.testing.assert_allclose(one[name], np.mean([found[name] for found in each], axis=0), rtol=0, atol=1e-14)
    for name in ("alpha", "beta"):
        side_by_side = np.concatenate([found[name] for found in each], axis=1) / 3
        np.testing.assert_allclose(one[name], side_by_side, rtol=0, atol=1e-14)


def test_one_member_is_itself() -> None:
    params = member(1, SIZES)
    assert all(value is params[name] for name, value in merged([params]).items())


def test_members_have_seeds_of_their_own() -> None:
    seeds = [member_seed(run, index) for run in range(3) for index in range(5)]
    assert len(set(seeds)) == 15
    assert [member_seed(run, 0) for run in range(3)] == [0, 1, 2]  # the first is the run without an ensemble
    assert seeds == [member_seed(run, index) for run in range(3) for index in range(5)]


def test_unknown_parameters_are_not_dropped() -> None:
    members = [{**member(seed, SIZES), "operators.new": np.zeros(2)} for seed in (1, 2)]
    with pytest.raises(ValueError, match=r"operators\.new"):
        merged(members)
