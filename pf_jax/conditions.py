"""The condition encoder (docs/math.md 3): perturbations, tissue, batch and covariates to theta."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pf_core.initial import select
from pf_jax.layers import Linear, Table, matmul
from pf_jax.probe import record

__all__ = ["ConditionEncoder"]


class Fixed(nnx.Variable):
    """Numbers that belong to a module and are not trained."""


class FeatureMap(nnx.Module):
    """Fixed features of a perturbation followed by a learned linear map.

    Args:
        params: `map` (n_features, n_embedding).
        features: (n_perturbations, n_features), not trained.
    """

    def __init__(self, params: Mapping[str, Any], features: Any):
        self.map = nnx.Param(jnp.asarray(params["map"]))
        self.features = Fixed(jnp.asarray(features))

    def __call__(self, index: jax.Array) -> jax.Array:
        return matmul(self.features[...][index].astype(self.map.dtype), self.map[...])


class ConditionEncoder(nnx.Module):
    """theta = W [emb(perturbations), emb(tissue), batch, covariates] + b.

    Args:
        params: canonical parameters below "conditions.", with that prefix cut off: `perturbation.table`, or
            `perturbation.map` with the fixed `features` (n_perturbations, n_features); `tissue.table`; `theta.weight`
            and `theta.bias`.
    """

    def __init__(self, params: Mapping[str, Any]):
        if "perturbation.table" not in params and not {"perturbation.map", "features"} <= set(params):
            raise ValueError(
                f"condition parameters are {', '.join(sorted(params))}; "
                "perturbation.table, or perturbation.map with features, was wanted"
            )
        perturbation = select(params, "perturbation")
        self.perturbation = (
            FeatureMap(perturbation, params["features"]) if "map" in perturbation else Table(perturbation)
        )
        self.tissue = Table(select(params, "tissue"))
        self.theta = Linear(select(params, "theta"))

    def __call__(
        self,
        perturbations: jax.Array,
        doses: jax.Array,
        tissue: jax.Array,
        batch: jax.Array,
        covariates: jax.Array,
    ) -> jax.Array:
        """The vector of every condition; a combination is the sum of its members' embeddings times their doses.

        Differentiated in the parameters, doses, batch and covariates.

        Args:
            perturbations: (n_conditions, n_members) indices; 0 is "unknown".
            doses: (n_conditions, n_members); dose 0 is padding, and control, all doses 0, is the zero vector.
            tissue: (n_conditions,) index into the tissues; 0 is "unknown".
            batch: (n_conditions, n_batches) one-hot, or zeros for pooled cells.
            covariates: (n_conditions, n_covariates).

        Returns:
            theta (n_conditions, n_theta).

        Raises:
            ValueError: widths that do not add up to the rows of theta.weight.
        """
        embedding = (doses[..., None] * self.perturbation(perturbations)).sum(-2)
        x = jnp.concatenate([embedding, self.tissue(tissue), batch, covariates], axis=-1)
        if x.shape[-1] != self.theta.weight.shape[0]:
            raise ValueError(
                f"a condition has {x.shape[-1]} numbers ({batch.shape[-1]} for the batch, {covariates.shape[-1]} "
                f"covariates) but theta.weight expects {self.theta.weight.shape[0]}; use the vocabularies of training"
            )
        return record("conditions.theta", self.theta(x.astype(self.theta.weight.dtype)))
