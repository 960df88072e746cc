"""Sides of either framework from plain functions: arrays on the device, gradients, calls that wait for the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pf_bench.case import Side

__all__ = ["jax_grad", "jax_side", "jax_value", "names", "torch_grad", "torch_side", "torch_value"]

Arrays = Mapping[str, np.ndarray]


def jax_put(tree: Any, device: str) -> Any:
    """NumPy arrays on the device, committed to it."""
    import jax

    return jax.device_put(jax.tree.map(np.asarray, tree), jax.devices(device)[0])


def torch_put(tree: Any, device: str) -> Any:
    """NumPy arrays on the device."""
    from pf_torch.bridge import to_backend

    return to_backend(tree, device="cuda" if device == "gpu" else device)


def names(values: Any) -> dict[str, np.ndarray]:
    """(value, gradients ...) by name: "value", "gradient 1", ...; a single array is "value"."""
    values = values if isinstance(values, tuple | list) else (values,)
    labels = ("value", *(f"gradient {k}" for k in range(1, len(values))))
    return dict(zip(labels, (np.asarray(value, np.float64) for value in values), strict=True))


def jax_side(function: Callable[..., Any], *args: Any, note: str = "") -> Side:
    """A compiled function of arrays that are on the device; returns (value, gradients ...) or a value."""
    import jax

    compiled = jax.jit(function)
    call = lambda: jax.block_until_ready(compiled(*args))
    return Side(call, lambda: names(call()), note=note)


def jax_value(function: Callable[..., Any], *args: Any, device: str, note: str = "") -> Side:
    """The value of a function, compiled."""
    return jax_side(function, *jax_put(args, device), note=note)


def jax_grad(function: Callable[..., Any], *args: Any, of: tuple[int, ...], device: str, note: str = "") -> Side:
    """The value of a function and its gradients in the arguments at places `of`, compiled."""
    import jax

    both = jax.value_and_grad(function, argnums=of)

    def flat(*args: Any) -> Any:
        value, grads = both(*args)
        return (value, *grads)

    return jax_side(flat, *jax_put(args, device), note=note)


def torch_side(call: Callable[[], Any], *, device: str, note: str = "") -> Side:
    """A call whose result is tensors, waited for."""
    import torch

    def waited() -> Any:
        result = call()
        if device == "gpu":
            torch.cuda.synchronize()
        return result

    def output() -> dict[str, np.ndarray]:
        result = waited()
        result = result if isinstance(result, tuple | list) else (result,)
        return names(tuple(value.detach().cpu().numpy() for value in result))

    return Side(waited, output, note=note)


def torch_value(function: Callable[..., Any], *args: Any, device: str, note: str = "") -> Side:
    """The value of a function, without a graph."""
    import torch

    tensors = torch_put(list(args), device)

    def call() -> Any:
        with torch.no_grad():
            return function(*tensors)

    return torch_side(call, device=device, note=note)


def torch_grad(function: Callable[..., Any], *args: Any, of: tuple[int, ...], device: str, note: str = "") -> Side:
    """The value of a function and its gradients in the arguments at places `of`."""
    import torch

    tensors = torch_put(list(args), device)
    leaves = [tensors[k].requires_grad_() for k in of]

    def call() -> Any:
        value = function(*tensors)
        return (value, *torch.autograd.grad(value, leaves))

    return torch_side(call, device=device, note=note)
