"""`python -m pf_bench.plain_fit train ...`: `pf` whose PyTorch twin keeps to its plain forms, for the benchmark.

The twin's fast forms are one call for all conditions, tiles without whole matrices of distances, and the count table.
In their place come a loop over conditions with `energy_distance(method="plain")`, and the likelihood without a table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pf_torch.steps
from pf_core.cli import main
from pf_torch import elbo_loss, energy_distance

__all__ = ["energies", "plain_elbo"]


def energies(x: Tensor, y: Tensor, *, wx: Tensor, wy: Tensor, estimator: str = "v") -> Tensor:
    """`energy_distance_grouped` as a loop over conditions."""
    options: dict[str, Any] = {"estimator": estimator, "method": "plain"}
    groups = zip(x, y, wx, wy, strict=True)
    return torch.stack([energy_distance(a, b, wx=u, wy=v, **options) for a, b, u, v in groups])


def plain_elbo(*arrays: Tensor, table: Any = None, tail: Any = None, **options: Any) -> Any:
    """`elbo_loss` without the count table."""
    return elbo_loss(*arrays, **options)


if __name__ == "__main__":
    pf_torch.steps.energy_distance_grouped = energies
    pf_torch.steps.elbo_loss = plain_elbo
    main()
