"""Nothing public is left out, and both twins offer the same."""

from __future__ import annotations

import importlib
import inspect

import pytest

from parity_tests.cases import all_cases
from parity_tests.sides import MODULES

# Names that no Case calls, and the test that holds them to account instead.
ELSEWHERE = {
    "Backend": "test_trajectories, test_audit, test_backend",
    "value_and_grad": "test_backend",
    "gradient_health": "test_backend",
    "to_backend": "test_backend",
    "to_numpy": "test_backend",
    "synchronize": "test_backend",
    "record": "test_backend",
    "recording": "test_backend",
    "entropic_plan": "test_coupling",
    "run_steps": "test_backend",
    "evaluate": "test_backend",
    "init_state": "every step case",
    "TrainState": "every step case",
    "Table": "ConditionEncoder cases (JAX: a lookup; PyTorch holds its tables as buffers)",
    "Matrix": "ConditionalEncoder and GraphAttention cases",
    "MLP": "OperatorFamily cases (PyTorch)",
    "matmul": "every matrix product of the JAX twin",
    "dense": "Linear cases; below float32 tests/test_precision.py",
    "dense_precision": "tests/test_precision.py",
    "PRECISION": "a constant of JAX",
    "one_hot": "NBVAE cases (PyTorch)",
    "own": "every module (PyTorch)",
    "select": "every module (PyTorch)",
    "softplus": "NBVAE cases with scale softplus (PyTorch)",
}


def public(module: str, twin: str) -> set[str]:
    return set(importlib.import_module(f"{twin}.{module}").__all__)


@pytest.mark.parametrize("twin", ["pf_jax", "pf_torch"])
def test_every_public_name_has_a_case_or_a_named_test(twin: str) -> None:
    covered = {part for case in all_cases() for part in case.function.split(".")[1:]}
    names = set(importlib.import_module(twin).__all__) | {name for module in MODULES for name in public(module, twin)}
    assert not names - covered - set(ELSEWHERE) - set(MODULES)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "layers"])
def test_twins_have_the_same_public_names(module: str) -> None:
    """layers.py is each framework's own bottom; everything above it is the same."""
    assert public(module, "pf_jax") == public(module, "pf_torch")


def test_twin_packages_have_the_same_public_names() -> None:
    one, two = (set(importlib.import_module(twin).__all__) for twin in ("pf_jax", "pf_torch"))
    assert one == two


@pytest.mark.parametrize("module", [name for name in MODULES if name not in ("layers", "bridge", "probe")])
def test_twins_have_the_same_signatures(module: str) -> None:
    """Argument names, order, kinds and defaults. PyTorch may have options of its own after them."""
    own = {"compile", "device"}
    for name in sorted(public(module, "pf_jax")):
        one, two = (getattr(importlib.import_module(f"{twin}.{module}"), name) for twin in ("pf_jax", "pf_torch"))
        if inspect.isclass(one) or not callable(one):
            continue
        one, two = (inspect.signature(getattr(f, "__wrapped__", f)).parameters for f in (one, two))
        plain = [(p.name, p.kind, p.default) for p in one.values()]
        assert plain == [(p.name, p.kind, p.default) for p in two.values() if p.name not in own], name


def test_every_quantity_left_out_has_a_reason() -> None:
    derivative_free = ("adam_update", "clip_by_global_norm", "power_iteration", "operator_norm", "spectral_radius")
    for case in all_cases():
        short = set(case.quantities) != {"value", "gradient", "jvp", "hvp"} or len(case.dtypes) < 2
        steps = case.group.endswith("_step") or case.group in derivative_free
        no_path = bool(case.none or case.zero)
        assert case.reason or not short or steps or no_path or case.group.endswith("_loss"), case.name
