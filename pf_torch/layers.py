"""The pieces that modules are made of: parameters given by name, dense layers, one-hot codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pf_core.config import LEAKY_SLOPE
from pf_core.initial import select

__all__ = ["MLP", "Linear", "Matrix", "leaky_relu", "one_hot", "own", "softplus"]


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
        return torch.matmul(x, self.weight) + self.bias


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
        return torch.matmul(x, self.weight)


class MLP(nn.Module):
    """Two dense layers with a relu between them."""

    def __init__(self, params: Mapping[str, Any]):
        super().__init__()
        self.hidden = Linear(select(params, "hidden"))
        self.out = Linear(select(params, "out"))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(x)))
