"""`check` and `check_modules` on small ports with planted mistakes: the tool names each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from parity_tests import check, check_modules, note
from parity_tests.sides import TIERS, Side

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")
nnx = pytest.importorskip("flax.nnx")
DRAW = np.random.default_rng(3)
PARAMS = {"w": DRAW.normal(size=(5, 5)), "b": DRAW.normal(size=5)}
INPUTS = {"x": DRAW.normal(size=(7, 5))}


def torch_layer(p: Any, x: Any) -> Any:
    return (torch.relu(note("layer", x @ p["w"] + p["b"])) ** 2).mean()


def jax_layer(p: Any, x: Any) -> Any:
    return (jax.nn.relu(note("layer", x @ p["w"] + p["b"])) ** 2).mean()


def test_a_right_port_passes() -> None:
    report = check(torch_layer, jax_layer, params=PARAMS, inputs=INPUTS, quantities=("value", "gradient", "jvp", "hvp"))
    assert report.passed, str(report)
    assert {result.tier for result in report.results} == {"float64", "float32"}


@pytest.mark.parametrize("tier", ["tf32", "bf16"])
def test_tiers_below_float32_are_those_of_the_process_for_given_functions(tier: str) -> None:
    seen = []

    def watched(p: Any, x: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return torch_layer(p, x)

    report = check(watched, jax_layer, params=PARAMS, inputs=INPUTS, dtypes=("float64", tier))
    assert report.passed, str(report)
    assert {"highest", TIERS[tier][3]} == set(seen)
    assert f"{tier}: a processor may multiply in float32" in str(report)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_they_are_those_of_dense_layers_alone_for_the_twins(framework: str) -> None:
    side = Side(framework, tier="bf16")
    layers = side.namespace.layers
    with side.context():
        assert layers._asked == "bf16"
        assert torch.get_float32_matmul_precision() == "highest"
    assert layers._asked == "float32"


def test_a_transposed_square_kernel_is_found_and_located() -> None:
    wrong = lambda p, x: (jax.nn.relu(note("layer", x @ p["w"].T + p["b"])) ** 2).mean()
    report = check(torch_layer, wrong, params=PARAMS, inputs=INPUTS)
    assert not report.passed
    assert report.divergence.startswith("layer, at")


def test_a_detached_gradient_is_found_and_the_culprit_named() -> None:
    wrong = lambda p, x: (
        jax.nn.relu(x @ p["w"] + p["b"]) * jax.lax.stop_gradient(jax.nn.relu(x @ p["w"] + p["b"]))
    ).mean()
    report = check(torch_layer, wrong, params=PARAMS, inputs=INPUTS)
    failed = [result for result in report.failures if result.tier == "float64"]
    assert {(r.quantity, r.verdict) for r in failed if r.quantity == "gradient"} == {("gradient", "JAX wrong")}
    assert not [r for r in failed if r.quantity == "value"]


def test_a_missing_path_is_not_a_zero_gradient() -> None:
    wrong = lambda p, x: (jax.nn.relu(x @ p["w"] + jax.lax.stop_gradient(p["b"])) ** 2).mean()
    report = check(torch_layer, wrong, params=PARAMS, inputs=INPUTS)
    assert any("no gradient path" in r.detail and r.leaf == "params/b" for r in report.failures)


def test_an_oracle_decides_whose_value_is_wrong() -> None:
    right = lambda p, x: (np.maximum(x @ p["w"] + p["b"], 0) ** 2).mean()
    wrong = lambda p, x: (torch.relu(x @ p["w"] + p["b"]) ** 2).sum() / 34
    report = check(wrong, jax_layer, params=PARAMS, inputs=INPUTS, oracle=right)
    assert report.failures[0].verdict == "PyTorch wrong"


def test_a_nan_is_not_masked() -> None:
    wrong = lambda p, x: jnp.where(x > 0, (x @ p["w"] + p["b"]) / 0.0 * 0.0, x @ p["w"] + p["b"])
    report = check(lambda p, x: x @ p["w"] + p["b"], wrong, params=PARAMS, inputs=INPUTS)
    assert not report.passed


class TorchBlock(torch.nn.Module):
    """Attention with a dictionary as output, as in Hugging Face models."""

    def __init__(self, eps: float = 1e-6):
        super().__init__()
        torch.manual_seed(3)
        self.embed = torch.nn.Embedding(11, 6)
        self.query, self.key, self.value = (torch.nn.Linear(6, 6) for _ in range(3))
        self.norm = torch.nn.LayerNorm(6, eps=eps)
        self.head = torch.nn.Linear(6, 3)
        for p in self.parameters():
            torch.nn.init.normal_(p, 0.0, 0.5)

    def forward(self, input_ids: Any, mask: Any) -> dict[str, Any]:
        h = self.embed(input_ids)
        scores = self.query(h) @ self.key(h).transpose(-1, -2) / 6**0.5
        weights = torch.softmax(scores + (1 - mask[:, None, :]) * -1e9, dim=-1)
        h = self.norm(h + weights @ self.value(h))
        return {"logits": self.head(h), "last_hidden_state": h}


class FlaxBlock(nnx.Module):
    def __init__(self, eps: float = 1e-6, scale: float = 6**0.5):
        rngs = nnx.Rngs(0)
        self.scale = scale
        self.embeddings = nnx.Embed(11, 6, rngs=rngs)
        self.query, self.key, self.value = (nnx.Linear(6, 6, rngs=rngs) for _ in range(3))
        self.norm = nnx.LayerNorm(6, epsilon=eps, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, input_ids: Any, mask: Any) -> dict[str, Any]:
        h = self.embeddings(input_ids)
        scores = self.query(h) @ jnp.swapaxes(self.key(h), -1, -2) / self.scale
        weights = jax.nn.softmax(scores + (1 - mask[:, None, :]) * -1e9, axis=-1)
        h = self.norm(h + weights @ self.value(h))
        return {"logits": self.head(h), "last_hidden_state": h}


TOKENS = {
    "input_ids": DRAW.integers(0, 11, (3, 7)).astype(np.int32),
    "mask": (np.arange(7) < [[7], [4], [5]]).astype(float),
}
RENAME = {"embed": "embeddings"}


def test_a_right_port_of_modules_passes() -> None:
    report = check_modules(TorchBlock(), FlaxBlock(), inputs=TOKENS, rename=RENAME)
    assert report.passed, str(report)


def test_flax_default_eps_of_layer_norm_is_found_at_the_norm() -> None:
    report = check_modules(TorchBlock(eps=1e-5), FlaxBlock(), inputs=TOKENS, rename=RENAME)
    assert not report.passed
    assert report.divergence.startswith("norm, at")


def test_a_forgotten_square_root_is_found() -> None:
    report = check_modules(TorchBlock(), FlaxBlock(scale=6.0), inputs=TOKENS, rename=RENAME)
    assert not report.passed
    assert report.divergence.startswith("norm, at")


def test_a_parameter_without_partner_is_named() -> None:
    with pytest.raises(ValueError, match=r"embed.weight .* use rename"):
        check_modules(TorchBlock(), FlaxBlock(), inputs=TOKENS)
