"""The bridge and the Backend of the JAX twin."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_data import STAGES, C, D, P, S, batches, carry, hypers, parameters, pick, run_config, trainable

from pf_core.initial import select
from pf_jax import bridge, vae
from pf_jax.operators import OperatorFamily

HYPER = {"lr": 0.01, "beta": 0.4}


@pytest.fixture(autouse=True)
def _x64_put_back():
    """Backend(dtype="float64") turns 64-bit numbers on for the process."""
    before = jax.config.jax_enable_x64
    yield
    jax.config.update("jax_enable_x64", before)


def backend_and_state(stage, dtype="float32", **options):
    config = run_config(**options)
    backend, params = bridge.Backend(dtype), parameters(config)
    vectors = None if stage == "vae" else carry(config)
    return config, backend, params, backend.init(stage, params, trainable=trainable(stage, params), carry=vectors)


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value.dtype == two[name].dtype
        np.testing.assert_array_equal(value, two[name])


# --- arrays ---


def test_to_backend_keeps_structure_casts_floats_and_narrows_integers():
    tree = {"a": np.ones((2, 3)), "b": [np.arange(3), np.array([True])], "c": jnp.ones(2)}
    found = bridge.to_backend(tree, dtype="float32")
    assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [jnp.float32, jnp.int32, jnp.bool_, jnp.float32]
    assert jax.tree.structure(found) == jax.tree.structure(tree)


def test_to_backend_gives_float64_where_it_is_asked_for():
    assert bridge.to_backend(np.ones(2), dtype="float64").dtype == jnp.float64


def test_to_backend_copies_and_to_numpy_owns():
    source = np.ones(1024, np.float32)
    array = bridge.to_backend(source)
    source[:] = 2.0
    back = bridge.to_numpy(array)
    assert (back == 1.0).all()
    assert back.flags.owndata
    assert back.flags.writeable


def test_to_backend_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="32-bit integers"):
        bridge.to_backend(np.array([2**40]))
    with pytest.raises(ValueError, match="dtype is 'float16'"):
        bridge.to_backend(np.ones(2), dtype="float16")
    with pytest.raises(ValueError, match="device is 'abacus'"):
        bridge.to_backend(np.ones(2), device="abacus")


# --- gradients ---


def test_value_and_grad_tells_no_path_from_zero():
    params = {"used": jnp.asarray([1.0, 2.0]), "absent": jnp.ones(3), "stopped": jnp.ones(2), "flat": jnp.zeros(2)}
    params |= {"linear": jnp.ones(2), "masked": jnp.ones(2)}

    def function(p, data):
        inside = jax.jit(lambda used, flat: (used**2).sum() + (jax.nn.relu(flat) ** 2).sum())(p["used"], p["flat"])
        looped = jax.lax.scan(lambda total, x: (total + x * data, None), 0.0, p["masked"])[0]
        return inside + jax.lax.stop_gradient(p["stopped"]).sum() + p["linear"].sum() + looped

    value, grads = bridge.value_and_grad(function, params, jnp.asarray(0.0))
    assert float(value) == 9.0
    assert list(grads) == list(params)
    assert grads["absent"] is None
    assert grads["stopped"] is None
    np.testing.assert_array_equal(grads["used"], [2.0, 4.0])
    np.testing.assert_array_equal(grads["linear"], [1.0, 1.0])
    for name in ("flat", "masked"):
        assert (grads[name] == 0).all()


def test_a_gradient_that_is_zero_by_the_data_a_function_closes_over_has_a_path():
    data = jnp.zeros(2)
    for function in (lambda p: (p["a"] * data).sum(), jax.jit(lambda p: (p["a"] * data).sum())):
        _, grads = bridge.value_and_grad(function, {"a": jnp.ones(2)})
        assert (grads["a"] == 0).all()


def test_gradient_health_gives_a_verdict_to_every_parameter():
    grads = {"none": None, "zero": jnp.zeros(2), "ok": jnp.asarray([3.0, 4.0]), "nan": jnp.asarray([1.0, jnp.nan])}
    found = bridge.gradient_health(grads, {name: jnp.ones(2) for name in grads})
    assert {name: health.verdict for name, health in found.items()} == {
        "none": "none",
        "zero": "zero",
        "ok": "ok",
        "nan": "non-finite",
    }
    assert found["ok"].norm == pytest.approx(5.0)
    assert found["nan"].n_nonfinite == 1


# --- training ---


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_export_and_init_round_trip_bit_for_bit_and_the_run_goes_on_the_same(dtype):
    config, backend, params, state = backend_and_state("operator", dtype)
    batch, noise = batches("operator")
    state, _ = backend.run("operator", state, batch, noise, hypers(), config)
    kept = backend.export(state)
    assert kept["count"] == S
    frozen = {name: value for name, value in params.items() if name not in kept["params"]}
    again = backend.init(
        "operator",
        frozen | kept["params"],
        trainable=tuple(kept["params"]),
        **{name: kept[name] for name in ("m", "v", "count", "carry")},
    )
    back = backend.export(again)
    assert back["count"] == S
    for tree in ("params", "m", "v", "carry"):
        assert_same(back[tree], kept[tree])
        assert all(value.dtype == dtype for value in back[tree].values())
    one, metrics = backend.run("operator", state, batch, noise, hypers(), config)
    two, metrics_again = backend.run("operator", again, batch, noise, hypers(), config)
    np.testing.assert_array_equal(metrics["loss"], metrics_again["loss"])
    assert_same(backend.export(one)["params"], backend.export(two)["params"])


def test_run_returns_numpy_metrics_of_every_step():
    config, backend, params, state = backend_and_state("vae")
    _, metrics = backend.run("vae", state, *batches("vae"), hypers(), config)
    assert metrics["param_grad_norm"].shape == (S, len(trainable("vae", params)))
    leaves = [metrics[name] for name in ("loss", "grad_norm", "ok")] + list(metrics["parts"].values())
    assert all(isinstance(leaf, np.ndarray) and leaf.shape == (S,) for leaf in leaves)
    assert metrics["ok"].dtype == bool


def test_training_lowers_the_loss():
    config, backend, _, state = backend_and_state("vae")
    batch, noise = batches("vae")
    still = {name: np.repeat(value[:1], 60, axis=0) for name, value in (batch | noise).items()}
    batch, noise = ({name: still[name] for name in tree} for tree in (batch, noise))
    _, metrics = backend.run("vae", state, batch, noise, {"lr": np.full(60, 0.02), "beta": np.ones(60)}, config)
    assert metrics["loss"][-1] < 0.9 * metrics["loss"][0]


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_and_evaluate_agree_on_the_loss_and_unused_parameters_have_no_gradient(stage):
    config, backend, params, state = backend_and_state(stage)
    batch, noise = (pick(tree, 0, 0) for tree in batches(stage))
    found = backend.evaluate(stage, state, batch, noise, config, 0.4)
    vectors = {} if stage == "vae" else carry(config)
    loss, grads = backend.gradients(stage, params, tuple(params), batch, noise, HYPER, vectors, config)
    assert loss == pytest.approx(found["loss"], rel=1e-5)
    prefix = {"vae": "vae.", "operator": ("conditions.", "operators."), "joint": ""}[stage]
    for name, grad in grads.items():
        assert (grad is not None) == name.startswith(prefix), name
        assert grad is None or np.abs(grad).max() > 0, name


def test_diagnose_names_the_first_thing_that_is_not_finite():
    config, backend, params, _ = backend_and_state("joint")

    def first(stage, params):
        batch, noise = (pick(tree, 0, 0) for tree in batches(stage))
        return backend.diagnose(stage, params, tuple(params), batch, noise, HYPER, carry(config), config)

    assert first("vae", params) == ""
    bad = {name: value.copy() for name, value in params.items()}
    bad["operators.A0"][:] = np.inf
    assert first("operator", bad) == "operators.A"
    bad = {name: value.copy() for name, value in params.items()}
    bad["vae.decoder.log_r"][0] = np.nan
    assert first("vae", bad) == "vae.r"


# --- using a model ---


def test_backend_functions_are_the_modules():
    config, backend, params, _ = backend_and_state("vae", "float64")
    rng = np.random.default_rng(0)
    x, tissue, z = rng.poisson(2.0, (C, 11)), rng.integers(0, 3, C), rng.normal(size=(C, D))
    library, direction = rng.random(C) * 100, rng.normal(size=(C, D))
    model = vae.NBVAE(config.vae, select(params, "vae"))
    for found, wanted in zip(
        backend.encode(params, x, tissue, config), model.encode(jnp.asarray(x), tissue), strict=True
    ):
        assert isinstance(found, np.ndarray)
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
    mu = backend.decode(params, z, tissue, library, config)
    np.testing.assert_allclose(mu, model.decode(jnp.asarray(z), tissue, jnp.asarray(library)), rtol=1e-12)
    np.testing.assert_allclose(backend.dispersion(params, tissue, config), model.dispersion(tissue), rtol=1e-12)
    h = 1e-6
    up, down = (backend.decode(params, z + s * h * direction, tissue, library, config) for s in (1, -1))
    found = backend.decode_jacobian_vector(params, z, direction, tissue, library, config)
    np.testing.assert_allclose(found, (up - down) / (2 * h), rtol=1e-6, atol=1e-7)


def test_backend_operators_agree_with_the_family():
    config, backend, params, _ = backend_and_state("operator", "float64")
    batch = pick(batches("operator")[0], 0, 0)
    conditions = {name: batch[name] for name in ("perturbations", "doses", "tissue", "batch", "covariates")}
    found = backend.operators(params, conditions, config)
    family = OperatorFamily(select(params, "operators"))
    for name, value in zip(("A", "b"), family.operator(jnp.asarray(found["theta"]), batch["tissue"]), strict=True):
        np.testing.assert_allclose(found[name], value, rtol=1e-12)
    assert {name: value.shape[0] for name, value in found.items()} == dict.fromkeys(
        ("theta", "alpha", "beta", "A", "b"), P
    )


def test_parameters_that_change_are_not_served_from_the_cache():
    config, backend, params, _ = backend_and_state("vae")
    tissue = np.zeros(2, int)
    before = backend.dispersion(params, tissue, config)
    changed = params | {"vae.decoder.log_r": params["vae.decoder.log_r"] + 1.0}
    np.testing.assert_allclose(backend.dispersion(changed, tissue, config), np.e * before, rtol=1e-5)
    np.testing.assert_array_equal(backend.dispersion(params, tissue, config), before)


def test_an_index_beyond_its_table_is_refused_instead_of_clamped():
    config, backend, params, state = backend_and_state("operator")
    with pytest.raises(ValueError, match="tissue has indices from 3 to 3"):
        backend.dispersion(params, np.array([3]), config)
    batch, noise = batches("operator")
    for name, bad in (("perturbations", 5), ("slot", 4), ("tissue", -1)):
        spoiled = batch | {name: np.full_like(batch[name], bad)}
        with pytest.raises(ValueError, match=f"{name} has indices"):
            backend.run("operator", state, spoiled, noise, hypers(), config)


def test_backend_refuses_unknown_dtypes_devices_and_stages():
    with pytest.raises(ValueError, match="dtype is 'bfloat16'"):
        bridge.Backend("bfloat16")
    with pytest.raises(ValueError, match="device is 'abacus'"):
        bridge.Backend(device="abacus")
    config, backend, params, state = backend_and_state("vae")
    with pytest.raises(ValueError, match="'cvae', 'flow' was wanted"):
        backend.run("flaw", state, {}, {}, {}, config)
    with pytest.raises(ValueError, match="are not parameters"):
        backend.init("vae", params, trainable=("vae.nothing",))


def test_describe_says_what_computes_and_how():
    found = bridge.Backend().describe()
    assert found["dtype"] == "float32"
    assert found["precision"] == "highest"
    assert {"jax", "jaxlib", "flax", "device"} <= found.keys()


def test_importing_the_twin_needs_no_torch_and_changes_no_setting():
    program = (
        "import sys; sys.modules['torch'] = None; import jax; before = dict(jax.config.values); import pf_jax; "
        "assert dict(jax.config.values) == before; assert 'anndata' not in sys.modules; "
        "assert not any(name.startswith('pf_torch') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
