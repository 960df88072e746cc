"""Adaptive integration: diffrax under JAX and torchdiffeq under PyTorch against fine Runge-Kutta steps and each other.

Each library has its own step control, so that they agree to its tolerance and not to rounding.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

from parity_tests import synthetic as syn
from parity_tests.case import Case
from parity_tests.sides import Evaluation, Side
from pf_core.initial import select

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("diffrax", "torchdiffeq")),
    reason="diffrax or torchdiffeq is not installed: dopri5 needs the extra 'flow'",
)
N = 3
WAYS = {"forth": [0.0, 0.375, 1.0], "back": [1.0, 0.25]}


def trajectory(framework: str, times: list[float], **options: Any) -> Evaluation:
    """Cells on their way, and the gradient of a weighted sum of where they are."""
    params = select(syn.parameters_of_flow(syn.configuration()), "flow")

    def run(f: Any, a: Any) -> Any:
        field = f.flow.VectorField(a["params"])
        nodes = field.nodes(a["graph"])
        velocity = lambda s, z: field(s, z, a["condition"], nodes)
        return f.integrate.integrate(velocity, a["z"], a["times"], **options)[1:]

    case = Case(
        "integrate/adaptive",
        "integrate.integrate",
        {
            "params": {name: value for name, value in params.items() if name not in ("center", "scale")},
            "graph": syn.network(),
            "z": np.random.default_rng(7).normal(size=(N, 5)),
            "condition": syn.condition_codes(N),
            "times": np.array(times),
        },
        differentiate=("params/*", "z", "condition"),
        quantities=("value", "gradient"),
        run=run,
    )
    return Side(framework).evaluate(case)


@pytest.mark.parametrize("way", WAYS)
def test_trajectories_and_gradients_of_their_ends_are_those_of_small_steps(way: str) -> None:
    fine = trajectory("torch", WAYS[way], n_steps=100)
    assert {"z", "condition", "params/genes"} <= set(fine.gradient)
    for framework in ("jax", "torch"):
        found = trajectory(framework, WAYS[way], method="dopri5", rtol=1e-9, atol=1e-10)
        for quantity in ("value", "gradient"):
            wanted = fine.quantity(quantity)
            assert set(found.quantity(quantity)) == set(wanted)
            for name, array in found.quantity(quantity).items():
                np.testing.assert_allclose(array, wanted[name], rtol=0, atol=1e-6 * np.abs(wanted[name]).max())
