"""Backend, training loop, bad input: each twin against the oracle, and the twins against each other."""

from __future__ import annotations

import numpy as np
import pytest

from parity_tests import synthetic as syn
from parity_tests.bisect import trace
from parity_tests.cases import by_name
from parity_tests.mutants import CHECKS
from parity_tests.sides import Namespace, Side
from parity_tests.trajectories import advance, backend_of, start


@pytest.fixture(autouse=True)
def _x64_put_back():
    """Backend(dtype="float64") turns 64-bit numbers on for the process; the float32 cases must run without."""
    import jax

    before = jax.config.values["jax_enable_x64"]
    yield
    jax.config.update("jax_enable_x64", before)


# Checks of the JAX twin that compile for ten seconds and more.
LONG = ("three_steps", "the_guard", "flow_steps", "flow_guard", "flow_movement", "flow_diagnosis")


@pytest.mark.parametrize(
    ("twin", "check"),
    [
        pytest.param(twin, check, marks=pytest.mark.slow if twin == "pf_jax" and check in LONG else ())
        for twin in ("pf_jax", "pf_torch")
        for check in CHECKS
    ],
)
def test_backend(twin: str, check: str) -> None:
    assert CHECKS[check](Namespace(twin)) == ""


@pytest.mark.parametrize(
    "name",
    [
        "vae_loss/library, gene, log1p",
        pytest.param("operator_loss/penalty active", marks=pytest.mark.slow),
        pytest.param("joint_loss/library", marks=pytest.mark.slow),
        "cvae_loss/entropy, training",
        "discriminator_loss/dropout",
        "flow_loss/network",
        "flow_loss/no network",
    ],
)
def test_twins_record_the_same_intermediates_in_the_same_order(name: str) -> None:
    one, two = (list(trace(Side(framework), by_name(name))[0]) for framework in ("jax", "torch"))
    assert one == two


@pytest.mark.parametrize("stage", ["operator", "cvae"])
@pytest.mark.parametrize(("writer", "reader"), [("jax", "torch"), ("torch", "jax")])
def test_a_checkpoint_of_one_twin_is_read_by_the_other_bit_for_bit(
    writer: str, reader: str, stage: str, tmp_path
) -> None:
    from pf_core.checkpoint import load_arrays, save_arrays

    config = syn.configuration()
    one, two = (backend_of(name, "float32") for name in (writer, reader))
    export, _ = advance(one, stage, start(stage, config), 0, 3, config)
    trees = ("params", "m", "v", "carry")
    flat = {f"{tree}/{name}": value for tree in trees for name, value in export[tree].items()}
    digest = save_arrays(tmp_path / "state.safetensors", flat)
    read = load_arrays(tmp_path / "state.safetensors", digest)
    back = {tree: {k.split("/", 1)[1]: v for k, v in read.items() if k.startswith(tree + "/")} for tree in trees}
    state = two.init(
        stage,
        back["params"],
        trainable=tuple(back["m"]),
        m=back["m"],
        v=back["v"],
        count=export["count"],
        carry=back["carry"],
    )
    again = two.export(state)
    assert again["count"] == export["count"] == 3
    for tree in ("m", "v", "carry"):
        for name, value in export[tree].items():
            np.testing.assert_array_equal(again[tree][name], value)
    for name in export["m"]:
        np.testing.assert_array_equal(again["params"][name], export["params"][name])
