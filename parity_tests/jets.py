"""Numbers that carry their derivatives and a bound on their rounding, in extended precision.

`Number` is an array with a running error: to first order, the same operations done in an arithmetic of unit roundoff u
differ from `value` by at most u * `error`. For a sum of products that is the sum of absolute terms; it is the scale S
of the floor gamma_n S that the comparer measures errors in.

`Jet` is a truncated Taylor polynomial v + a s + b t + ab s t. `a` has a leading axis with one entry per differentiated
coordinate, `b` is one direction. One pass therefore gives the value, the whole gradient, one Jacobian-vector and one
Hessian-vector product, each with its error. None stands for "no path": structurally zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WIDE = np.longdouble  # 64 bits of mantissa on x86; where it is a double the oracle is as good as float64
Array = np.ndarray


@dataclass(frozen=True)
class Number:
    value: Array
    error: Array

    @property
    def ndim(self) -> int:
        return self.value.ndim

    def map(self, function: Callable[[Array], Array]) -> Number:
        """Apply something that moves entries about and does no arithmetic."""
        return Number(function(self.value), function(self.error))


def exact(value: Any) -> Number:
    value = np.asarray(value, dtype=WIDE)
    return Number(value, np.zeros(value.shape))


def _magnitude(value: Array) -> Array:
    return np.abs(value).astype(np.float64)


def _add(p: Number, q: Number) -> Number:
    value = p.value + q.value
    # Adding an exact zero is exact; so a sum with a structural zero stays without error.
    rounding = np.where((p.value == 0) | (q.value == 0), 0.0, _magnitude(value))
    return Number(value, p.error + q.error + rounding)


def _multiply(p: Number, q: Number) -> Number:
    value = p.value * q.value
    return Number(value, p.error * _magnitude(q.value) + _magnitude(p.value) * q.error + _magnitude(value))


def _einsum(spec: str, p: Number, q: Number) -> Number:
    size_p, size_q = _magnitude(p.value), _magnitude(q.value)
    error = np.einsum(spec, size_p, q.error + size_q) + np.einsum(spec, p.error, size_q)
    return Number(np.einsum(spec, p.value, q.value), error)


def _sum(p: Number, axes: tuple[int, ...]) -> Number:
    return Number(p.value.sum(axis=axes), (p.error + _magnitude(p.value)).sum(axis=axes))


def _plus(p: Number | None, q: Number | None) -> Number | None:
    if p is None or q is None:
        return q if p is None else p
    return _add(p, q)


class Jet:
    """v + a s + b t + ab s t; see the module's text."""

    __array_ufunc__ = None  # NumPy must not take these apart

    def __init__(self, v: Number, a: Number | None = None, b: Number | None = None, ab: Number | None = None):
        self.v, self.a, self.b, self.ab = v, a, b, ab

    @property
    def shape(self) -> tuple[int, ...]:
        return self.v.value.shape

    @property
    def ndim(self) -> int:
        return self.v.value.ndim

    @property
    def value(self) -> Array:
        return self.v.value

    def stop(self) -> Jet:
        """The same number without derivatives."""
        return Jet(self.v)

    # --- linear maps that do no arithmetic -------------------------------------------------------------------
    def rearranged(self, function: Callable[[Array, tuple[int, ...]], Array]) -> Jet:
        """Apply function(array, lead) to each part; `lead` is the extra leading shape of that part."""

        def part(number: Number | None, lead: int) -> Number | None:
            return None if number is None else number.map(lambda array: function(array, array.shape[:lead]))

        return Jet(part(self.v, 0), part(self.a, 1), part(self.b, 0), part(self.ab, 1))  # type: ignore[arg-type]

    def reshape(self, *shape: int) -> Jet:
        return self.rearranged(lambda array, lead: array.reshape(lead + shape))

    def broadcast(self, shape: tuple[int, ...]) -> Jet:
        padded = (1,) * (len(shape) - self.ndim) + self.shape
        return self.reshape(*padded).rearranged(lambda array, lead: np.broadcast_to(array, lead + shape))

    def transpose(self) -> Jet:
        """Swap the last two axes."""
        return self.rearranged(lambda array, lead: np.swapaxes(array, -1, -2))

    def __getitem__(self, key: Any) -> Jet:
        key = key if isinstance(key, tuple) else (key,)
        return self.rearranged(lambda array, lead: array[(slice(None),) * len(lead) + key])

    # --- arithmetic ------------------------------------------------------------------------------------------
    def __add__(self, other: Any) -> Jet:
        return self._combine(other, 1)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Jet:
        return self._combine(other, -1)

    def __rsub__(self, other: Any) -> Jet:
        return jet(other)._combine(self, -1)

    def __neg__(self) -> Jet:
        def part(number: Number | None) -> Number | None:
            return None if number is None else Number(-number.value, number.error)

        return Jet(part(self.v), part(self.a), part(self.b), part(self.ab))  # type: ignore[arg-type]

    def _combine(self, other: Any, sign: int) -> Jet:
        p, q = self, jet(other)
        shape = np.broadcast_shapes(p.shape, q.shape)
        # Broadcast first: a derivative that only one of them has must get the shape of the sum.
        p, q = p.broadcast(shape), q.broadcast(shape)
        q = q if sign == 1 else -q
        return Jet(_add(p.v, q.v), _plus(p.a, q.a), _plus(p.b, q.b), _plus(p.ab, q.ab))

    def __mul__(self, other: Any) -> Jet:
        return _product(*_aligned(self, jet(other)), lambda p, q, lead_p, lead_q: _multiply(p, q))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Jet:
        return self * reciprocal(jet(other))

    def __rtruediv__(self, other: Any) -> Jet:
        return jet(other) * reciprocal(self)

    def sum(self, *axes: int) -> Jet:
        """Sum over negative axes; over everything without axes."""
        axes = axes or tuple(range(-self.ndim, 0))

        def part(number: Number | None) -> Number | None:
            return None if number is None else _sum(number, axes)

        return Jet(_sum(self.v, axes), part(self.a), part(self.b), part(self.ab))

    def mean(self, *axes: int) -> Jet:
        axes = axes or tuple(range(-self.ndim, 0))
        return self.sum(*axes) / WIDE(np.prod([self.shape[axis] for axis in axes]))


def jet(value: Any) -> Jet:
    return value if isinstance(value, Jet) else Jet(exact(value))


def _aligned(p: Jet, q: Jet) -> tuple[Jet, Jet]:
    ndim = max(p.ndim, q.ndim)
    return p.reshape(*(1,) * (ndim - p.ndim), *p.shape), q.reshape(*(1,) * (ndim - q.ndim), *q.shape)


def _product(p: Jet, q: Jet, times: Callable[[Number, Number, int, int], Number]) -> Jet:
    """Leibniz' rule for any bilinear `times`; its integers say which factor has the leading coordinate axis."""

    def term(x: Number | None, y: Number | None, lead_x: int, lead_y: int) -> Number | None:
        return None if x is None or y is None else times(x, y, lead_x, lead_y)

    a = _plus(term(p.a, q.v, 1, 0), term(p.v, q.a, 0, 1))
    b = _plus(term(p.b, q.v, 0, 0), term(p.v, q.b, 0, 0))
    ab = _plus(_plus(term(p.ab, q.v, 1, 0), term(p.v, q.ab, 0, 1)), _plus(term(p.a, q.b, 1, 0), term(p.b, q.a, 0, 1)))
    return Jet(times(p.v, q.v, 0, 0), a, b, ab)


def einsum(spec: str, p: Any, q: Any) -> Jet:
    """Contraction of two jets; lower-case letters only, no ellipsis."""
    left, rest = spec.split(",")
    right, out = rest.split("->")

    def times(x: Number, y: Number, lead_x: int, lead_y: int) -> Number:
        lead = "N" if lead_x or lead_y else ""
        return _einsum(f"{'N' * lead_x}{left},{'N' * lead_y}{right}->{lead}{out}", x, y)

    return _product(jet(p), jet(q), times)


def compose(inputs: Sequence[Jet], value: Number, first: Sequence[Number], second: Sequence[Sequence[Number]]) -> Jet:
    """An elementwise function of equally shaped jets, from its first and second partial derivatives."""
    a = b = ab = None
    for i, x in enumerate(inputs):
        a = _plus(a, None if x.a is None else _multiply(first[i], x.a))
        b = _plus(b, None if x.b is None else _multiply(first[i], x.b))
        ab = _plus(ab, None if x.ab is None else _multiply(first[i], x.ab))
        for j, y in enumerate(inputs):
            if x.a is not None and y.b is not None:
                ab = _plus(ab, _multiply(_multiply(second[i][j], x.a), y.b))
    return Jet(value, a, b, ab)


def elementwise(x: Jet, *derivatives: Callable[[Array], Array]) -> Jet:
    """f(x), from f, f', f'' and f''' (the last one only for the error of f'')."""
    f = [np.asarray(function(x.value), dtype=WIDE) + np.zeros(x.shape, WIDE) for function in derivatives]
    number = [Number(f[k], _magnitude(f[k + 1]) * x.v.error + _magnitude(f[k])) for k in range(3)]
    return compose([x], number[0], [number[1]], [[number[2]]])


def reciprocal(x: Jet) -> Jet:
    return elementwise(x, lambda v: 1 / v, lambda v: -1 / v**2, lambda v: 2 / v**3, lambda v: -6 / v**4)


def exp(x: Jet) -> Jet:
    return elementwise(x, np.exp, np.exp, np.exp, np.exp)


def log(x: Jet) -> Jet:
    return elementwise(x, np.log, lambda v: 1 / v, lambda v: -1 / v**2, lambda v: 2 / v**3)


def log1p(x: Jet) -> Jet:
    return elementwise(x, np.log1p, lambda v: 1 / (1 + v), lambda v: -1 / (1 + v) ** 2, lambda v: 2 / (1 + v) ** 3)


def softplus(x: Jet) -> Jet:
    """log(1 + exp(x))."""
    v = x.value
    p, q = 1 / (1 + np.exp(-v)), 1 / (1 + np.exp(v))
    value, first, second = np.logaddexp(WIDE(0), v), p, p * q
    error = x.v.error
    return compose(
        [x],
        Number(value, _magnitude(first) * error + _magnitude(value)),
        [Number(first, _magnitude(second) * error + _magnitude(first))],
        # p (1 - p) term by term, as frameworks have it: where p rounds to 1 what is left is the rounding of p.
        [[Number(second, _magnitude(second) * error + _magnitude(p * (1 + p)))]],
    )


def sqrt(x: Jet) -> Jet:
    """Square root whose derivatives are zero at zero: the convention for coincident points."""
    safe = np.where(x.value > 0, x.value, WIDE(1))
    inside = (x.value > 0).astype(WIDE)
    powers = [
        inside * c * safe**p for c, p in ((1, WIDE(0.5)), (0.5, WIDE(-0.5)), (-0.25, WIDE(-1.5)), (0.375, WIDE(-2.5)))
    ]
    return elementwise(x, *[lambda v, power=power: power for power in powers])


def relu(x: Jet) -> Jet:
    """max(x, 0) with derivative 0 at 0."""
    inside = (x.value > 0).astype(WIDE)
    zero = np.zeros(x.shape, WIDE)
    out = elementwise(x, lambda v: v * inside, lambda v: inside, lambda v: zero, lambda v: zero)
    # A selection rounds nothing: its error is that of its input where it passes, and none where it does not.
    mask = inside.astype(np.float64)

    def part(number: Number | None, source: Number | None) -> Number | None:
        return None if number is None or source is None else Number(number.value, source.error * mask)

    return Jet(part(out.v, x.v), part(out.a, x.a), part(out.b, x.b), part(out.ab, x.ab))  # type: ignore[arg-type]


def leaky_relu(x: Jet, slope: float) -> Jet:
    """x above 0, slope x below; the derivative at 0 is the slope."""
    above = x.value > 0
    factor = np.where(above, WIDE(1), WIDE(slope))

    def part(number: Number | None) -> Number | None:
        if number is None:
            return None
        value = number.value * factor
        return Number(value, number.error * _magnitude(factor) + np.where(above, 0.0, _magnitude(value)))

    return Jet(part(x.v), part(x.a), part(x.b), part(x.ab))  # type: ignore[arg-type]


def silu(x: Jet) -> Jet:
    """x sigmoid(x)."""
    v, error = x.value, x.v.error
    p, q = 1 / (1 + np.exp(-v)), 1 / (1 + np.exp(v))
    slope, bend = p * q, p * q * (q - p)  # first and second derivative of the sigmoid
    value, first, second = v * p, p + v * slope, 2 * slope + v * bend
    third = 3 * bend + v * slope * (1 - 6 * slope)
    # Frameworks form these sums term by term: where the terms cancel, their sizes are what is rounded.
    return compose(
        [x],
        Number(value, _magnitude(first) * error + _magnitude(value)),
        [Number(first, _magnitude(second) * error + _magnitude(p + np.abs(v) * slope))],
        [[Number(second, _magnitude(third) * error + _magnitude(2 * slope + np.abs(v) * p * q * (p + q)))]],
    )


def clip(x: Jet, low: float, high: float) -> Jet:
    """Clip with derivative 1 strictly inside, 0 outside and at the bounds."""
    inside = ((x.value > low) & (x.value < high)).astype(np.float64)
    value = np.clip(x.value, WIDE(low), WIDE(high))

    def part(number: Number | None) -> Number | None:
        return None if number is None else Number(number.value * inside, number.error * inside)

    return Jet(Number(value, x.v.error * inside), part(x.a), part(x.b), part(x.ab))


def concatenate(jets: Sequence[Any]) -> Jet:
    """Join along the last axis; leading shapes are equal."""
    parts = [jet(item) for item in jets]

    def join(name: str, lead: int) -> Number | None:
        numbers = [getattr(part, name) for part in parts]
        if all(number is None for number in numbers):
            return None
        n = next(number.value.shape[0] for number in numbers if number is not None) if lead else 0
        filled = [
            exact(np.zeros(((n,) if lead else ()) + part.shape)) if number is None else number
            for number, part in zip(numbers, parts, strict=True)
        ]
        return Number(
            np.concatenate([item.value for item in filled], axis=-1),
            np.concatenate([item.error for item in filled], axis=-1),
        )

    return Jet(join("v", 0), join("a", 1), join("b", 0), join("ab", 1))  # type: ignore[arg-type]


def stack(jets: Sequence[Jet]) -> Jet:
    """Stack along a new first axis of the value."""
    joined = concatenate([item.reshape(*item.shape, 1) for item in jets])
    return joined.rearranged(lambda array, lead: np.moveaxis(array, -1, len(lead)))


def seed(leaves: dict[str, Array], directions: dict[str, Array] | None, second: bool = True) -> dict[str, Jet]:
    """Leaves as jets: the identity in `a`, block by block in the order of the dict, and the direction in `b`."""
    total = sum(value.size for value in leaves.values())
    jets, start = {}, 0
    for name, value in leaves.items():
        identity = np.zeros((total, value.size), WIDE)
        identity[start : start + value.size] = np.eye(value.size)
        start += value.size
        b = exact(directions[name]) if directions is not None and second else None
        jets[name] = Jet(exact(value), exact(identity.reshape(total, *value.shape)), b)
    return jets
