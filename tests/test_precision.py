"""Products below float32: only where asked for, only of dense layers, and refused where they would be ignored."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from pf_core import backends
from pf_core.config import Config, from_dict
from pf_core.errors import ConfigError
from pf_core.noise import generator


@pytest.mark.parametrize(("device", "precision"), [("cpu", "tf32"), ("cpu", "bf16"), ("tpu", "tf32")])
def test_a_precision_that_the_device_would_ignore_is_refused(device: str, precision: str) -> None:
    with pytest.raises(ConfigError, match=f"precision is '{precision}' on device '{device}', which computes float32"):
        backends.load("torch", device=device, precision=precision)


def test_it_is_a_setting_of_float32_runs() -> None:
    with pytest.raises(ConfigError, match="precision is 'bf16' with dtype 'float64'"):
        Config(dtype="float64", precision="bf16")
    with pytest.raises(ConfigError, match="precision"):
        from_dict(Config, {"precision": "half"})


def _problem(n_latent: int = 3) -> tuple[dict[str, np.ndarray], Any]:
    from pf_core.config import VAEConfig
    from pf_core.initial import Sizes, vae_parameters

    vae = VAEConfig(n_hidden=7, n_latent=n_latent)
    params = vae_parameters(vae, Sizes(n_genes=11, n_tissues=2, n_perturbations=1, n_batches=1), 0)
    rng = generator(83, "test_precision")
    counts = rng.poisson(2.0, (1, 13, 11)).astype(np.float32)
    batch = {
        "counts": counts,
        "tissue": np.ones((1, 13), np.int32),
        "library": counts.sum(-1),
        "weight": np.ones((1, 13), np.float32),
    }
    return params, (batch, {"eps": rng.standard_normal((1, 13, n_latent)).astype(np.float32)}, vae)


@pytest.mark.parametrize(("precision", "kind"), [("tf32", "tf32"), ("bf16", "bf16"), ("float32", None)])
def test_the_jax_program_for_gpus_has_such_products_in_dense_layers_alone(precision: Any, kind: str | None) -> None:
    pytest.importorskip("jax")
    from pf_jax import steps

    params, (batch, noise, vae) = _problem()
    config = Config(vae=vae, precision=precision)
    state = steps.init_state(params, trainable=list(params))
    hyper = {"lr": np.float32(1e-3), "beta": np.float32(1.0)}
    traced = steps.one_step.trace("vae", state, batch, noise, hyper, config)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    products = re.findall(r"stablehlo.dot_general.*", text)
    asked = [line for line in products if kind and f"lhs_precision_type = {kind}" in line]
    # Five dense layers forward; backward in the weights of all, and in the inputs of all but the first.
    assert len(asked) == (14 if kind else 0)
    assert all("HIGHEST" in line for line in products if line not in asked)


def test_torch_multiplies_dense_layers_as_asked_and_puts_the_setting_back(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from pf_torch import steps
    from pf_torch.bridge import to_backend

    params, (batch, noise, vae) = _problem()
    seen: list[str] = []
    matmul = torch.matmul

    def watched(*args: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return matmul(*args)

    monkeypatch.setattr(torch, "matmul", watched)
    before = torch.get_float32_matmul_precision()
    state = steps.init_state(params, trainable=list(params))
    hyper = {"lr": torch.tensor(1e-3), "beta": torch.tensor(1.0)}
    given = to_backend(batch), to_backend(noise), hyper
    steps.vae_step(state, *given, config=Config(vae=vae, precision="tf32"))
    assert seen.count("high") == 14
    assert torch.get_float32_matmul_precision() == before
    seen.clear()
    steps.vae_step(state, *given, config=Config(vae=vae))
    assert set(seen) == {before}


def test_bf16_products_of_torch_and_their_derivatives_are_of_rounded_factors() -> None:
    torch = pytest.importorskip("torch")
    from pf_torch.layers import dense, dense_precision

    rng = generator(89, "test_precision.bf16")
    x, weight, cotangent = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 7), (7, 3), (5, 3)))
    a, b = (torch.tensor(value, requires_grad=True) for value in (x, weight))
    with dense_precision("bf16"):
        out = dense(a, b)
    by_a, by_b = torch.autograd.grad(out, (a, b), torch.tensor(cotangent))

    def rounded(value: np.ndarray) -> np.ndarray:
        return torch.tensor(value).bfloat16().double().numpy()

    # The sums are rounded to bf16 once more: half a unit in the last place, 2^-9.
    for found, factors in ((out, (x, weight)), (by_a, (cotangent, weight.T)), (by_b, (x.T, cotangent))):
        left, right = map(rounded, factors)
        error = np.abs(found.detach().double().numpy() - left @ right)
        assert (error <= 2.0**-8 * (np.abs(left) @ np.abs(right))).all()
        assert not np.allclose(found.detach().numpy(), factors[0] @ factors[1], rtol=1e-5)
