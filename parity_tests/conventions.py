"""The differences between the frameworks that touch this project, measured on the installed versions.

A row is one convention: what the table of docs/parity.md says, and a function that measures it on each side. The
project's own rule is in the twins; this says what would happen without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Convention:
    """A row of the table. expected holds the texts of the table, PyTorch first."""

    name: str
    expected: tuple[str, str]
    torch: Callable[[], Any]
    jax: Callable[[], Any]


@dataclass(frozen=True)
class Measured:
    """What the installed versions do."""

    name: str
    expected: tuple[str, str]
    found: tuple[str, str]

    @property
    def differs(self) -> tuple[bool, bool]:
        return (self.expected[0] != self.found[0], self.expected[1] != self.found[1])


def _torch_grad(function: Callable[[Any], Any], at: float | list[float]) -> Any:
    import torch

    x = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(function(x).sum(), x)[0].tolist()


def _jax_grad(function: Callable[[Any], Any], at: float | list[float]) -> Any:
    import jax
    import jax.numpy as jnp

    with jax.enable_x64(True):
        return np.asarray(jax.grad(lambda x: jnp.sum(function(x)))(jnp.asarray(at, jnp.float64))).tolist()


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    return str(value)


def _raises(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return f"raises {type(error).__name__}"


def _adam_error_torch() -> str:
    import torch

    p = torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.Adam([p], lr=1.0)
    p.grad = torch.ones(1)
    optimiser.step()
    return _order(float(-p.detach()[0]) - 1.0 / (1 + 1e-8))


def _adam_error_jax() -> str:
    import jax
    import jax.numpy as jnp
    import optax

    with jax.enable_x64(False):
        adam = optax.adam(1.0)
        updates, _ = adam.update(jnp.ones(1), adam.init(jnp.zeros(1)))
        step = -float(jnp.asarray(updates)[0])
    return _order(step - 1.0 / (1 + 1e-8))


def _order(error: float) -> str:
    """The digit itself depends on the machine; the power of ten does not."""
    return (
        "exact to 1e-6" if abs(error) < 1e-6 else "off by 1e-6 to 1e-5" if abs(error) < 1e-5 else f"off by {error:.0e}"
    )


def _torch_batch_norm() -> list[float]:
    import torch

    layer = torch.nn.BatchNorm1d(1, dtype=torch.float64)
    layer(torch.tensor([[0.0], [2.0]], dtype=torch.float64))
    return [float(layer.running_mean[0]), float(layer.running_var[0]), layer.eps]  # type: ignore[index]


def _flax_batch_norm() -> list[float]:
    import jax.numpy as jnp
    from flax import nnx

    layer = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
    layer(jnp.array([[0.0], [2.0]]))
    return [float(layer.mean[...][0]), float(layer.var[...][0]), layer.epsilon]


def _flax_eps() -> float:
    from flax import nnx

    return nnx.LayerNorm(3, rngs=nnx.Rngs(0)).epsilon


def _torch_bias() -> str:
    import torch

    return "random" if bool(torch.nn.Linear(3, 5).bias.abs().max() > 0) else "zero"


def _flax_bias() -> str:
    from flax import nnx

    bias = nnx.Linear(3, 5, rngs=nnx.Rngs(0)).bias
    return "zero" if bias is None or not np.any(np.asarray(bias[...])) else "random"


def _torch_denormal() -> str:
    import torch

    return "kept" if float(torch.tensor(1e-39) * torch.tensor(1.0)) > 0 else "flushed"


def _jax_denormal() -> str:
    import jax
    import jax.numpy as jnp

    with jax.enable_x64(False):
        return "kept" if float(jax.jit(lambda x: x * jnp.float32(0.5))(jnp.float32(2e-38))) > 0 else "flushed"


def _torch_trigamma() -> str:
    import torch

    error = abs(float(torch.polygamma(1, torch.tensor(7.3, dtype=torch.float64))) / 0.146795768131427102 - 1)
    return "float64" if error < 1e-14 else "1e-10 or worse"


def _jax_trigamma() -> str:
    import jax
    import jax.numpy as jnp

    with jax.enable_x64(True):
        error = abs(float(jax.scipy.special.polygamma(1, jnp.float64(7.3))) / 0.146795768131427102 - 1)
    return "float64" if error < 1e-14 else "1e-10 or worse"


def _torch_index() -> Any:
    import torch

    return torch.arange(3)[torch.tensor([7])].tolist()


def _jax_index() -> Any:
    import jax.numpy as jnp

    return jnp.arange(3)[jnp.array([7])].tolist()


def _jax_scatter() -> Any:
    import jax.numpy as jnp

    return jnp.arange(3).at[jnp.array([7])].set(9).tolist()


def _torch_scatter() -> Any:
    import torch

    values = torch.arange(3)
    values[torch.tensor([7])] = 9
    return values.tolist()


def _torch_double() -> str:
    import torch

    return str(torch.tensor(1.0, dtype=torch.float64).dtype).removeprefix("torch.")


def _jax_double() -> str:
    import warnings

    import jax
    import jax.numpy as jnp

    with jax.enable_x64(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return str(jnp.asarray(1.0, dtype="float64").dtype)


def _torch_std() -> float:
    import torch

    return float(torch.tensor([0.0, 2.0], dtype=torch.float64).var())


def _jax_std() -> float:
    import jax.numpy as jnp

    return float(jnp.array([0.0, 2.0]).var())


def _matmul(framework: str) -> str:
    """The unit roundoff of a float32 product on the default device, from one that TF32 would round."""
    one = np.array([[1.0 + 2.0**-12]], np.float32)
    if framework == "torch":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        a = torch.tensor(np.tile(one, (64, 64)), device=device)
        value = float((a @ torch.eye(64, device=device))[0, 0])
    else:
        import jax.numpy as jnp

        value = float((jnp.asarray(np.tile(one, (64, 64))) @ jnp.eye(64))[0, 0])
    return "float32" if value == float(one[0, 0]) else "TF32 or less"


def _where(framework: str) -> str:
    if framework == "torch":
        import torch

        gradient = _torch_grad(lambda x: torch.where(x > 0, torch.sqrt(x), torch.zeros_like(x)), 0.0)
    else:
        import jax.numpy as jnp

        gradient = _jax_grad(lambda x: jnp.where(x > 0, jnp.sqrt(x), 0.0), 0.0)
    return _text(gradient)


def table() -> list[Convention]:
    """The table of docs/parity.md, row by row, as it stood for PyTorch 2.13, JAX 0.10 and Flax 0.12."""
    import jax
    import jax.numpy as jnp
    import torch
    import torch.nn.functional as F

    bounds = [-1.0, 2.0]
    large = 30.0
    return [
        Convention(
            "clamp: gradient at the bounds",
            ("[1, 1]", "[0.5, 0.5]"),
            lambda: _torch_grad(lambda x: x.clamp(-1, 2), bounds),
            lambda: _jax_grad(lambda x: jnp.clip(x, -1.0, 2.0), bounds),
        ),
        Convention(
            "lax.clamp: gradient at the bounds",
            ("[1, 1]", "[0, 0]"),
            lambda: _torch_grad(lambda x: x.clamp(-1, 2), bounds),
            lambda: _jax_grad(lambda x: jax.lax.clamp(-1.0, x, 2.0), bounds),
        ),
        Convention("relu'(0)", ("0", "0"), lambda: _torch_grad(torch.relu, 0.0), lambda: _jax_grad(jax.nn.relu, 0.0)),
        Convention(
            "maximum(x, 0)' at 0",
            ("0.5", "0.5"),
            lambda: _torch_grad(lambda x: torch.maximum(x, torch.zeros_like(x)), 0.0),
            lambda: _jax_grad(lambda x: jnp.maximum(x, 0.0), 0.0),
        ),
        Convention(
            "leaky_relu'(0), slope 0.2",
            ("0.2", "1"),
            lambda: _torch_grad(lambda x: F.leaky_relu(x, 0.2), 0.0),
            lambda: _jax_grad(lambda x: jax.nn.leaky_relu(x, 0.2), 0.0),
        ),
        Convention("abs'(0)", ("0", "1"), lambda: _torch_grad(torch.abs, 0.0), lambda: _jax_grad(jnp.abs, 0.0)),
        Convention(
            "norm'(0)",
            ("[0, 0]", "[nan, nan]"),
            lambda: _torch_grad(torch.linalg.vector_norm, [0.0, 0.0]),
            lambda: _jax_grad(jnp.linalg.norm, [0.0, 0.0]),
        ),
        Convention(
            "softplus(30) - 30",
            ("0", "9.2e-14"),
            lambda: float(f"{float(F.softplus(torch.tensor(large, dtype=torch.float64))) - large:.1e}"),
            lambda: _softplus_jax(large),
        ),
        Convention("trigamma in float64", ("1e-10 or worse", "float64"), _torch_trigamma, _jax_trigamma),
        Convention("bias of a fresh linear layer", ("random", "zero"), _torch_bias, _flax_bias),
        Convention(
            "batch norm: running mean, variance after [0, 2]; eps",
            ("[0.1, 1.1, 1e-05]", "[0.01, 1, 1e-05]"),
            _torch_batch_norm,
            _flax_batch_norm,
        ),
        Convention("layer norm: eps", ("1e-05", "1e-06"), lambda: torch.nn.LayerNorm(3).eps, _flax_eps),
        Convention("var of [0, 2]", ("2", "1"), _torch_std, _jax_std),
        Convention(
            "Adam's first step in float32", ("exact to 1e-6", "off by 1e-6 to 1e-5"), _adam_error_torch, _adam_error_jax
        ),
        Convention(
            "default weight decay of AdamW",
            ("0.01", "0.0001"),
            lambda: torch.optim.AdamW([torch.zeros(1)]).defaults["weight_decay"],
            _optax_decay,
        ),
        Convention(
            "float32 product of matrices",
            ("float32", "float32" if _cpu_only() else "TF32 or less"),
            lambda: _matmul("torch"),
            lambda: _matmul("jax"),
        ),
        Convention(
            "index out of range, read",
            ("raises IndexError", "[2]"),
            lambda: _raises(_torch_index),
            lambda: _raises(_jax_index),
        ),
        Convention(
            "index out of range, written",
            ("raises IndexError", "[0, 1, 2]"),
            lambda: _raises(_torch_scatter),
            lambda: _raises(_jax_scatter),
        ),
        Convention("denormals on CPU", ("kept", "flushed"), _torch_denormal, _jax_denormal),
        Convention("float64 asked for without further ado", ("float64", "float32"), _torch_double, _jax_double),
        Convention("where(x > 0, sqrt(x), 0)' at 0", ("nan", "nan"), lambda: _where("torch"), lambda: _where("jax")),
    ]


def _softplus_jax(at: float) -> float:
    import jax
    import jax.numpy as jnp

    with jax.enable_x64(True):
        return float(f"{float(jax.nn.softplus(jnp.float64(at))) - at:.1e}")


def _optax_decay() -> Any:
    import inspect

    try:
        import optax
    except ImportError:
        return "optax is not installed"
    return inspect.signature(optax.adamw).parameters["weight_decay"].default


def _cpu_only() -> bool:
    import jax

    return jax.default_backend() == "cpu"


def measure() -> list[Measured]:
    """Every row on the installed versions; a row that cannot be measured says why."""
    rows = []
    for row in table():
        found = tuple(_text(_raises(side)) for side in (row.torch, row.jax))
        rows.append(Measured(row.name, row.expected, (found[0], found[1])))
    return rows
