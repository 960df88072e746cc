"""A small PyTorch model ported to JAX with two mistakes, and what `parity_tests` says about them.

The model is a gated autoencoder with a layer norm. Run it: python examples/port_with_two_mistakes.py
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from parity_tests import check_modules


class TorchModel(torch.nn.Module):
    """The original."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encode = torch.nn.Linear(13, 7)
        self.gate = torch.nn.Linear(7, 7)
        self.norm = torch.nn.LayerNorm(7)
        self.decode = torch.nn.Linear(7, 13)

    def forward(self, x: Any) -> Any:
        h = torch.relu(self.encode(x))
        h = self.norm(h * torch.sigmoid(self.gate(h)))
        return ((self.decode(h) - x) ** 2).sum(-1).mean()


class FlaxModel(nnx.Module):
    """The port. `eps` and `frozen_gate` are its two mistakes, so that each can be put right."""

    def __init__(self, eps: float = 1e-6, *, frozen_gate: bool = True) -> None:
        rngs = nnx.Rngs(0)
        self.frozen_gate = frozen_gate
        self.encode = nnx.Linear(13, 7, rngs=rngs)
        self.gate = nnx.Linear(7, 7, rngs=rngs)
        self.norm = nnx.LayerNorm(7, epsilon=eps, rngs=rngs)  # Flax's default: PyTorch's is 1e-5
        self.decode = nnx.Linear(7, 13, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        h = jax.nn.relu(self.encode(x))
        gate = jax.nn.sigmoid(self.gate(h))
        if self.frozen_gate:  # left over from a debugging session
            gate = jax.lax.stop_gradient(gate)
        h = self.norm(h * gate)
        return ((self.decode(h) - x) ** 2).sum(-1).mean()


def main() -> None:
    inputs = {"x": np.random.default_rng(1).normal(size=(11, 13))}
    ports = {
        "as ported": FlaxModel(),
        "eps put right": FlaxModel(1e-5),
        "the gate put right too": FlaxModel(1e-5, frozen_gate=False),
    }
    for name, port in ports.items():
        report = check_modules(TorchModel(), port, inputs=inputs)
        print(f"--- {name}: {'passed' if report.passed else 'failed'}\n{report}\n")


if __name__ == "__main__":
    main()
