"""Dense layers and tables built from canonical parameters, and the matmul precision that everything uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pf_core.config import LEAKY_SLOPE

__all__ = ["PRECISION", "Linear", "Matrix", "Table", "dense", "dense_precision", "leaky_relu", "matmul"]

# Named on every product: the default of recent accelerators is TF32, and a caller's setting must not change results.
PRECISION = jax.lax.Precision.HIGHEST


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x @ y` in full precision. Differentiated in both."""
    return jnp.matmul(x, y, precision=PRECISION)


# What an accelerator rounds the factors of a product to; sums are float32. A processor would ignore "bf16".
_DENSE = {
    "float32": PRECISION,
    "tf32": jax.lax.DotAlgorithmPreset.TF32_TF32_F32,
    "bf16": jax.lax.DotAlgorithmPreset.BF16_BF16_F32,
}
_asked = "float32"


@contextmanager
def dense_precision(name: str) -> Iterator[None]:
    """Within it, products of dense layers and those of their derivatives are made as named; other products are not.

    What is traced (JAX) or computed (PyTorch) within it keeps it, derivatives that are taken later too.

    Args:
        name: "float32", "tf32" or "bf16": what the factors are rounded to, on devices that have it.
    """
    global _asked
    before, _asked = _asked, name
    try:
        yield
    finally:
        _asked = before


def dense(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x @ weight` as `dense_precision` says.

    Differentiated in both.

    Args:
        x: (..., n_in).
        weight: (n_in, n_out).

    Returns:
        (..., n_out).
    """
    return jnp.matmul(x, weight, precision=_DENSE[_asked])


def leaky_relu(x: jax.Array) -> jax.Array:
    """x where x > 0, else LEAKY_SLOPE x.

    Differentiated in x: 1 above 0, LEAKY_SLOPE below 0 and at it.

    Args:
        x: (...) values.

    Returns:
        (...) same dtype as x.
    """
    return jnp.where(x > 0, x, LEAKY_SLOPE * x)


class Linear(nnx.Module):
    """A dense layer `x @ weight + bias`, weight (in, out).

    Args:
        params: `weight` (n_in, n_out) and `bias` (n_out,).
    """

    def __init__(self, params: Mapping[str, Any]):
        self.weight = nnx.Param(jnp.asarray(params["weight"]))
        self.bias = nnx.Param(jnp.asarray(params["bias"]))

    def __call__(self, x: jax.Array) -> jax.Array:
        return dense(x, self.weight[...]) + self.bias[...]


class Matrix(nnx.Module):
    """A dense layer without bias, `x @ weight`, weight (in, out).

    Args:
        params: `weight` (n_in, n_out).
    """

    def __init__(self, params: Mapping[str, Any]):
        self.weight = nnx.Param(jnp.asarray(params["weight"]))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x @ weight.

        Differentiated in weight and x.

        Args:
            x: (..., n_in).

        Returns:
            (..., n_out).
        """
        return dense(x, self.weight[...])


class Table(nnx.Module):
    """Rows looked up by index; row 0 is "unknown".

    Args:
        params: `table` (n_rows, n_embedding).
    """

    def __init__(self, params: Mapping[str, Any]):
        self.table = nnx.Param(jnp.asarray(params["table"]))

    def __call__(self, index: jax.Array) -> jax.Array:
        return self.table[...][index]
