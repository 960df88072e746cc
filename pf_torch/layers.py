"""The pieces that modules are made of: parameters given by name, dense layers, one-hot codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pf_core.config import LEAKY_SLOPE
from pf_core.initial import select

__all__ = ["MLP", "Linear", "Matrix", "dense", "dense_precision", "leaky_relu", "one_hot", "own", "softplus"]


def own(module: nn.Module, name: str, value: Any, *, trainable: bool = True) -> None:
    """Give a module one of its named weights.

    NumPy arrays and nn.Parameters become parameters of the module, so that `.parameters()` and torch.optim see them.
    Any other tensor is used as it is, so that inside a functional step gradients flow to whoever made it.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = torch.tensor(value)
        if trainable:
            value = nn.Parameter(value)
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    else:
        module.register_buffer(name, value)


def one_hot(index: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """One-hot code (..., n) of integers in [0, n)."""
    return nn.functional.one_hot(index.long(), n).to(dtype)


class _Softplus(torch.autograd.Function):
    """logaddexp(0, x) with derivative sigmoid(x): torch's own second derivative is inf * 0 below -89 in float32."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.logaddexp(x, torch.zeros((), dtype=x.dtype, device=x.device))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * torch.sigmoid(ctx.saved_tensors[0])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        return tangent * torch.sigmoid(ctx.saved_tensors[0])


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) as logaddexp(0, x), which never turns linear as torch's own softplus does above 20."""
    return _Softplus.apply(x)  # type: ignore[return-value]


def leaky_relu(x: Tensor) -> Tensor:
    """x where x > 0, else LEAKY_SLOPE x.

    Differentiated in x: 1 above 0, LEAKY_SLOPE below 0 and at it.

    Args:
        x: (...) values.

    Returns:
        (...) same dtype as x.
    """
    return torch.where(x > 0, x, LEAKY_SLOPE * x)


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


def dense(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight` as `dense_precision` says.

    Differentiated in both.

    Args:
        x: (..., n_in).
        weight: (n_in, n_out).

    Returns:
        (..., n_out).
    """
    if _asked == "float32":
        return torch.matmul(x, weight)
    return _Product.apply(x, weight, _asked)  # type: ignore[return-value]


class _Product(torch.autograd.Function):
    """A product below float32 whose derivatives are such products too."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, name: str) -> Tensor:
        return _product(x, weight, name)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, ctx.name = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        by_x, by_weight = None, None
        if ctx.needs_input_grad[0]:
            by_x = _Product.apply(grad, weight.mT, ctx.name)
        if ctx.needs_input_grad[1]:
            rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
            by_weight = _Product.apply(rows.mT, grads, ctx.name)
        return by_x, by_weight, None

    @staticmethod
    def jvp(ctx: Any, x_t: Any, weight_t: Any, _: Any) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        parts = [] if x_t is None else [_product(x_t, weight, ctx.name)]
        parts += [] if weight_t is None else [_product(x, weight_t, ctx.name)]
        return sum(parts[1:], parts[0])


def _product(x: Tensor, weight: Tensor, name: str) -> Tensor:
    if name == "bf16":
        # twin: JAX keeps the sums in float32; here they are rounded once more.
        return torch.matmul(x.bfloat16(), weight.bfloat16()).to(x.dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # PyTorch's name for TF32
    try:
        return torch.matmul(x, weight)
    finally:
        torch.set_float32_matmul_precision(before)


class Linear(nn.Module):
    """A dense layer `x @ weight + bias`, weight (in, out).

    Args:
        params: `weight` (n_in, n_out) and `bias` (n_out,).
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, params: Mapping[str, Any]):
        super().__init__()
        own(self, "weight", params["weight"])
        own(self, "bias", params["bias"])

    def forward(self, x: Tensor) -> Tensor:
        return dense(x, self.weight) + self.bias


class Matrix(nn.Module):
    """A dense layer without bias, `x @ weight`, weight (in, out).

    Args:
        params: `weight` (n_in, n_out).
    """

    weight: Tensor

    def __init__(self, params: Mapping[str, Any]):
        super().__init__()
        own(self, "weight", params["weight"])

    def forward(self, x: Tensor) -> Tensor:
        """x @ weight.

        Differentiated in weight and x.

        Args:
            x: (..., n_in).

        Returns:
            (..., n_out).
        """
        return dense(x, self.weight)


class MLP(nn.Module):
    """Two dense layers with a relu between them."""

    def __init__(self, params: Mapping[str, Any]):
        super().__init__()
        self.hidden = Linear(select(params, "hidden"))
        self.out = Linear(select(params, "out"))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(x)))
