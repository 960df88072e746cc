"""The PyTorch twin's bridge: NumPy in, NumPy out, and nothing lost on the way."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pf_core.backends import load  # noqa: E402
from pf_core.config import Config, OperatorConfig, VAEConfig  # noqa: E402
from pf_core.initial import Sizes, operator_parameters, vae_parameters  # noqa: E402
from pf_torch.bridge import (  # noqa: E402
    Backend,
    gradient_health,
    synchronize,
    to_backend,
    to_numpy,
    value_and_grad,
)

G, D, T = 13, 3, 2
CONFIG = Config(vae=VAEConfig(n_hidden=7, n_latent=D), operator=OperatorConfig(n_bases=2, n_theta=5, n_embedding=4))
TRAINABLE = {"vae": "vae.", "operator": ("conditions.", "operators."), "joint": ("vae.", "conditions.", "operators.")}


def parameters(dtype="float32"):
    sizes = Sizes(G, T, 4)
    params = vae_parameters(CONFIG.vae, sizes, 1) | operator_parameters(CONFIG.operator, D, sizes, 1)
    rng = np.random.default_rng(1)
    return {name: (value + 0.1 * rng.standard_normal(value.shape)).astype(dtype) for name, value in params.items()}


def batch(stage="vae"):
    rng = np.random.default_rng(2)
    cells = {
        "counts": rng.integers(0, 9, (11, G)).astype("float32"),
        "tissue": rng.integers(0, T, 11).astype("int32"),
        "library": np.full(11, 50.0, "float32"),
        "weight": np.ones(11, "float32"),
    }
    groups = {
        "perturbations": rng.integers(0, 4, (5, 2)).astype("int32"),
        "doses": np.ones((5, 2), "float32"),
        "tissue": rng.integers(0, T, 5).astype("int32"),
        "batch": np.zeros((5, 0), "float32"),
        "covariates": np.zeros((5, 0), "float32"),
        "x": rng.standard_normal((5, 7, D)).astype("float32"),
        "y": rng.standard_normal((5, 6, D)).astype("float32"),
        "wx": np.ones((5, 7), "float32"),
        "wy": np.ones((5, 6), "float32"),
        "weight": np.ones(5, "float32"),
        "slot": np.arange(1, 6, dtype="int32"),
        "distinct": np.ones(5),
    }
    noise = {"eps": rng.standard_normal((11, D)), "v0": rng.standard_normal((5, D))}
    return (cells if stage == "vae" else groups), noise, {"v": rng.standard_normal((6, D))}


def names(stage, params):
    return tuple(name for name in params if name.startswith(TRAINABLE[stage]))


def steps(tree, n):
    return {name: np.stack([value[None]] * n) for name, value in tree.items()}


def ran(backend, stage, state, n):
    data, noise, _ = batch(stage)
    hypers = {"lr": np.full(n, 0.01), "beta": np.ones(n)}
    return backend.run(stage, state, steps(data, n), steps(noise, n), hypers, CONFIG)


def assert_bitwise(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype
        assert value.tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_export_and_init_round_trip_bit_for_bit(dtype):
    backend, params = Backend(dtype), parameters(dtype)
    trainable, carry = names("operator", params), {"v": batch()[2]["v"].astype(dtype)}
    fresh = backend.export(backend.init("operator", params, trainable=trainable, carry=carry))
    assert_bitwise(fresh["params"], {name: params[name] for name in fresh["params"]})
    assert set(fresh["params"]) == set(trainable)
    state, _ = ran(backend, "operator", backend.init("operator", params, trainable=trainable, carry=carry), 3)
    first = backend.export(state)
    again = backend.init(
        "operator",
        {**params, **first["params"]},
        trainable=trainable,
        m=first["m"],
        v=first["v"],
        count=first["count"],
        carry=first["carry"],
    )
    second = backend.export(again)
    assert second["count"] == 3
    for key in ("params", "m", "v", "carry"):
        assert_bitwise(first[key], second[key])


@pytest.mark.parametrize("stage", ["vae", "operator"])
def test_a_run_that_is_exported_and_resumed_continues_bit_for_bit(stage):
    backend, params = Backend(), parameters()
    start = backend.init(stage, params, trainable=names(stage, params), carry=batch()[2])
    straight, _ = ran(backend, stage, start, 5)
    half = backend.export(ran(backend, stage, start, 2)[0])
    given = {key: half[key] for key in ("m", "v", "count", "carry")}
    resumed = backend.init(stage, {**params, **half["params"]}, trainable=names(stage, params), **given)
    resumed, _ = ran(backend, stage, resumed, 3)
    for key in ("params", "m", "v", "carry"):
        assert_bitwise(backend.export(straight)[key], backend.export(resumed)[key])


def test_exported_arrays_are_copies():
    backend, params = Backend(), parameters()
    state = backend.init("vae", params, trainable=names("vae", params))
    backend.export(state)["params"]["vae.decoder.log_r"][:] = 99
    assert backend.export(state)["params"]["vae.decoder.log_r"].max() < 99


def test_metrics_are_numpy_with_a_row_per_step():
    backend, params = Backend(), parameters()
    trainable = names("operator", params)
    _, metrics = ran(backend, "operator", backend.init("operator", params, trainable=trainable, carry=batch()[2]), 3)
    assert {name: np.shape(value) for name, value in metrics.items() if name != "parts"} == {
        "loss": (3,),
        "grad_norm": (3,),
        "ok": (3,),
        "param_grad_norm": (3, len(trainable)),
    }
    assert set(metrics["parts"]) == {"energy", "spectral", "shrinkage", "sigma_max"}
    assert all(isinstance(value, np.ndarray) for value in metrics["parts"].values())
    assert metrics["ok"].dtype == bool


def test_no_path_is_another_thing_than_a_gradient_of_zero():
    params = {"used": torch.ones(3), "unused": torch.ones(2), "cancelled": torch.ones(2)}
    function = lambda p, scale: ((scale * p["used"] ** 2).sum() + 0.0 * p["cancelled"].sum(), "aux")
    (value, aux), grads = value_and_grad(function, params, 2.0)
    assert (value.item(), aux) == (6.0, "aux")
    assert grads["unused"] is None
    assert grads["cancelled"].tolist() == [0.0, 0.0]
    assert grads["used"].tolist() == [4.0] * 3
    assert not params["used"].requires_grad
    constant, grads = value_and_grad(lambda p: torch.tensor(1.0), params)
    assert constant.item() == 1.0
    assert set(grads.values()) == {None}


def test_health_tells_the_states_of_a_gradient_apart():
    grads = {
        "none": None,
        "zero": torch.zeros(3),
        "tiny": torch.full((3,), 1e-12),
        "huge": torch.full((3,), 1e9),
        "non-finite": torch.tensor([1.0, math.nan, math.inf]),
        "ok": torch.tensor([3.0, -4.0, 0.0]),
    }
    health = gradient_health(grads, {name: torch.ones(3) for name in grads})
    assert {name: one.verdict for name, one in health.items()} == {name: name for name in grads}
    assert (health["ok"].norm, health["ok"].max_abs, health["ok"].n_nonfinite) == (5.0, 4.0, 0)
    assert (health["non-finite"].n_nonfinite, health["non-finite"].norm) == (2, 1.0)


def test_backend_gradients_are_none_where_no_path_leads():
    backend, params = Backend("float64"), parameters("float64")
    data, noise, carry = batch("operator")
    trainable = (*names("operator", params), "vae.decoder.log_r")
    loss, grads = backend.gradients("operator", params, trainable, data, noise, {"beta": 1.0}, carry, CONFIG)
    assert math.isfinite(loss)
    assert [name for name, grad in grads.items() if grad is None] == ["vae.decoder.log_r"]
    assert all(isinstance(grad, np.ndarray) for grad in grads.values() if grad is not None)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("nowhere", ""),
        ("vae.encoder.logvar.bias", "vae.encoder.logvar"),
        ("vae.decoder.log_r", "vae.r"),
        ("counts", "vae.encoder.hidden"),
    ],
)
def test_diagnose_names_what_is_first_not_finite(where, expected):
    backend, params = Backend(), parameters()
    data, noise, _ = batch()
    target = data if where in data else params
    if where != "nowhere":
        target[where].flat[0] = np.nan
    trainable = names("vae", params)
    assert backend.diagnose("vae", params, trainable, data, noise, {"beta": 1.0}, {}, CONFIG) == expected


def test_diagnose_names_a_gradient_when_all_values_are_finite():
    backend, params = Backend(), parameters()
    data, noise, carry = batch("operator")
    # alpha is its bias, but the gradient of its last weight is a hidden layer of 1e30 times a slope of 1e18
    params["operators.alpha.out.weight"] *= 0
    params["operators.alpha.hidden.weight"] *= 1e30
    params["operators.B"] *= 1e9
    trainable = names("operator", params)
    found = backend.diagnose("operator", params, trainable, data, noise, {"beta": 1.0}, carry, CONFIG)
    _, grads = backend.gradients("operator", params, trainable, data, noise, {"beta": 1.0}, carry, CONFIG)
    bad = [name for name, grad in grads.items() if grad is not None and not np.isfinite(grad).all()]
    assert found == f"gradient of {bad[0]}"


def test_decoder_derivative_along_a_direction_matches_differences():
    backend, params = Backend("float64"), parameters("float64")
    rng = np.random.default_rng(3)
    z, direction = rng.standard_normal((5, D)), rng.standard_normal((5, D))
    tissue, library = np.array([0, 1, 1, 0, 1]), np.full(5, 100.0)
    got = backend.decode_jacobian_vector(params, z, direction, tissue, library, CONFIG)
    ends = [backend.decode(params, z + s * 1e-6 * direction, tissue, library, CONFIG) for s in (1, -1)]
    np.testing.assert_allclose(got, (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-7)


def test_model_outputs_are_numpy_of_the_expected_shapes():
    backend, params = Backend(), parameters()
    data, _, _ = batch()
    z_mu, z_logvar = backend.encode(params, data["counts"], data["tissue"], CONFIG)
    mu = backend.decode(params, z_mu, data["tissue"], data["library"], CONFIG)
    r = backend.dispersion(params, data["tissue"], CONFIG)
    assert (z_mu.shape, z_logvar.shape, mu.shape, r.shape) == ((11, D), (11, D), (11, G), (G,))
    np.testing.assert_allclose(mu.sum(1), data["library"], rtol=1e-5)
    groups, _, _ = batch("operator")
    keys = ("perturbations", "doses", "tissue", "batch", "covariates")
    found = backend.operators(params, {key: groups[key] for key in keys}, CONFIG)
    assert {name: value.shape for name, value in found.items()} == {
        "theta": (5, 5),
        "alpha": (5, 2),
        "beta": (5, 2),
        "A": (5, D, D),
        "b": (5, D),
    }


def test_parameters_changed_between_calls_are_seen():
    backend, params = Backend(), parameters()
    tissue = np.zeros(1, int)
    before = backend.dispersion(params, tissue, CONFIG)
    params["vae.decoder.log_r"] += 1
    np.testing.assert_allclose(backend.dispersion(params, tissue, CONFIG), np.e * before, rtol=1e-5)


def test_indices_out_of_range_are_named():
    backend, params = Backend(), parameters()
    data, noise, carry = batch("operator")
    for name, n in (("tissue", 2), ("perturbations", 4), ("slot", 6)):
        wrong = {**data, name: data[name] + 7}
        with pytest.raises(ValueError, match=rf"{name} holds indices from \d+ to \d+, but the model has {n}"):
            backend.gradients("operator", params, names("operator", params), wrong, noise, {"beta": 1.0}, carry, CONFIG)
    with pytest.raises(ValueError, match="tissue has dtype float64; integers were wanted"):
        backend.dispersion(params, np.zeros(3), CONFIG)


def test_backend_names_what_it_cannot_do():
    with pytest.raises(ValueError, match="dtype is 'bfloat16'"):
        Backend(dtype="bfloat16")
    with pytest.raises(ValueError, match="device 'abacus' is not usable"):
        Backend(device="abacus")
    with pytest.raises(ValueError, match="stage is 'nothing'"):
        Backend().init("nothing", parameters(), trainable=())


def test_backend_is_the_one_that_the_core_loads_and_describes_itself():
    backend = load("torch", dtype="float64")
    described = backend.describe()
    assert isinstance(backend, Backend)
    assert described["torch"] == torch.__version__
    assert (described["dtype"], described["device"], described["precision"]) == ("float64", "cpu", "highest")


def test_trees_keep_their_nesting_and_integers_their_type():
    tree = {"a": np.arange(3), "b": [np.ones(2), (1.5, np.float32(2))]}
    there = to_backend(tree, "float32")
    assert there["a"].dtype == torch.int64
    assert there["b"][0].dtype == there["b"][1][0].dtype == torch.float32
    back = to_numpy(synchronize(there))
    assert back["a"].tolist() == [0, 1, 2]
    assert isinstance(back["b"][1], tuple)


def test_pf_torch_imports_without_jax():
    code = (
        "import sys; sys.modules.update({name: None for name in ('jax', 'flax', 'optax', 'anndata')});"
        "import pf_torch; assert all(hasattr(pf_torch, name) for name in pf_torch.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
