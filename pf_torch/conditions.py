"""From a condition (perturbations, doses, tissue, batch, covariates) to the vector theta (docs/math.md 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pf_core.initial import select
from pf_torch.layers import Linear, own
from pf_torch.probe import record

__all__ = ["ConditionEncoder"]


class _Perturbations(nn.Module):
    """The learned table (n_perturbations, f), or the learned map (n_features, f) of fixed features."""

    table: Tensor | None
    map: Tensor | None

    def __init__(self, params: Mapping[str, Any]):
        super().__init__()
        for name in ("table", "map"):
            own(self, name, params.get(name))


class _Tissues(nn.Module):
    table: Tensor

    def __init__(self, params: Mapping[str, Any]):
        super().__init__()
        own(self, "table", params["table"])


class ConditionEncoder(nn.Module):
    """theta = W [emb(perturbations), emb(tissue), batch, covariates] + b.

    Args:
        params: canonical parameters below "conditions.", with that prefix cut off: `perturbation.table`, or
            `perturbation.map` with the fixed `features` (n_perturbations, n_features); `tissue.table`; `theta.weight`
            and `theta.bias`.
    """

    features: Tensor | None

    def __init__(self, params: Mapping[str, Any]):
        super().__init__()
        if "perturbation.table" not in params and not {"perturbation.map", "features"} <= set(params):
            raise ValueError(
                f"condition parameters are {', '.join(sorted(params))}; "
                "perturbation.table, or perturbation.map with features, was wanted"
            )
        self.perturbation = _Perturbations(select(params, "perturbation"))
        self.tissue = _Tissues(select(params, "tissue"))
        self.theta = Linear(select(params, "theta"))
        own(self, "features", params.get("features"), trainable=False)

    def forward(
        self, perturbations: Tensor, doses: Tensor, tissue: Tensor, batch: Tensor, covariates: Tensor
    ) -> Tensor:
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
        table = self.perturbation.table
        if table is None:
            assert self.features is not None  # the constructor has seen to it
            assert self.perturbation.map is not None
            table = torch.matmul(self.features, self.perturbation.map)
        perturbation = (doses.to(table.dtype)[..., None] * table[perturbations]).sum(-2)
        blocks = [perturbation, self.tissue.table[tissue], batch.to(table.dtype), covariates.to(table.dtype)]
        width, wanted = sum(block.shape[-1] for block in blocks), self.theta.weight.shape[0]
        if width != wanted:
            raise ValueError(
                f"conditions have {batch.shape[-1]} batches and {covariates.shape[-1]} covariates, {width} inputs "
                f"with the embeddings, but the model expects {wanted}; use the vocabularies of training"
            )
        return record("conditions.theta", self.theta(torch.cat(blocks, dim=-1)))
