"""A side is one twin on one device in one precision; it runs a case and gives NumPy.

The oracle is a side too. What each side computes: the value of every output; the gradient of the scalar <w, outputs>
(None where there is no path); the Jacobian-vector product of every output; the Hessian-vector product of the scalar.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from parity_tests.case import Case
from parity_tests.trees import flatten

Leaves = dict[str, Any]
MODULES = (
    "likelihood",
    "layers",
    "vae",
    "conditions",
    "operators",
    "distances",
    "spectral",
    "cvae",
    "discriminator",
    "flow",
    "integrate",
    "coupling",
    "steps",
    "flow_steps",
    "probe",
    "bridge",
)

# Precision tiers: dtype of the arrays, unit roundoff, and the name each framework gives its matmul precision.
TIERS = {
    "float64": ("float64", 2.0**-53, "highest", "highest"),
    "float32": ("float32", 2.0**-24, "highest", "highest"),
    "tf32": ("float32", 2.0**-11, "tensorfloat32", "high"),
    "bf16": ("float32", 2.0**-8, "bfloat16", "medium"),
}
LOW = ("tf32", "bf16")  # of accelerators: XLA multiplies in float32 on processors, whatever is asked of it


# A rule of differentiation has a value of its own in JAX, and a forward mode in PyTorch: neither is seen otherwise.
ANOTHER_WAY = {"jax": ("value", "while differentiating"), "torch": ("jvp", "forward mode")}


class MissingDevice(RuntimeError):
    """A device was asked for that this machine does not have."""


@dataclass
class Evaluation:
    """What a side computed for a case. `errors` has the oracle's running errors under the same keys."""

    value: dict[str, np.ndarray]
    gradient: dict[str, Any] = field(default_factory=dict)
    jvp: dict[str, Any] = field(default_factory=dict)
    hvp: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    again: dict[str, dict[str, Any]] = field(default_factory=dict)  # a quantity found another way, see ANOTHER_WAY

    def quantity(self, name: str) -> dict[str, Any]:
        return getattr(self, name)


class Namespace:
    """The modules of a twin (or of a mutated copy of it) as attributes, imported when first used."""

    def __init__(self, package: str):
        self._package = package

    def __getattr__(self, name: str) -> types.ModuleType:
        if name not in MODULES:
            raise AttributeError(f"{self._package} has no module {name}; its modules are {', '.join(MODULES)}")
        return importlib.import_module(f"{self._package}.{name}")


@dataclass(frozen=True)
class Side:
    """One twin, device and precision tier."""

    framework: str  # "jax" or "torch"
    device: str = "cpu"
    tier: str = "float64"
    package: str = ""  # a mutated copy's name; the twin itself by default
    compiled: bool = True  # JAX: under jit, as users run it
    forward_mode: bool = True  # PyTorch: J u by dual numbers too, which not every function can

    @property
    def name(self) -> str:
        return f"{self.framework}-{self.device}"

    @property
    def dtype(self) -> str:
        return TIERS[self.tier][0]

    @cached_property
    def namespace(self) -> Namespace:
        return Namespace(self.package or f"pf_{self.framework}")

    def evaluate(self, case: Case, skip: tuple[str, ...] = ()) -> Evaluation:
        """Everything that the case names, without the quantities in `skip`."""
        quantities = tuple(name for name in case.quantities if name not in skip)
        return (_evaluate_jax if self.framework == "jax" else _evaluate_torch)(self, case, quantities)

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Device, width and matmul precision, set here and put back afterwards."""
        with (_jax_context if self.framework == "jax" else _torch_context)(self), self.dense():
            yield

    @property
    def matmul(self) -> tuple[str, str]:
        """JAX's and PyTorch's setting of the process; of the twins no tier lowers it, their dense layers alone."""
        return TIERS["float32" if self.tier in LOW else self.tier][2:]

    def dense(self) -> contextlib.AbstractContextManager[None]:
        """What makes the twin's dense layers multiply as the tier says."""
        return self.namespace.layers.dense_precision(self.tier) if self.tier in LOW else contextlib.nullcontext()

    def array(self, value: Any) -> Any:
        """A NumPy array on the device: floats in the side's dtype, integers as int32."""
        value = np.asarray(value)
        kind = {"f": self.dtype, "i": "int32", "u": "int32", "b": "bool"}[value.dtype.kind]
        if self.framework == "jax":
            import jax

            return jax.device_put(value.astype(kind), _jax_device(self.device))
        import torch

        return torch.tensor(value.astype(kind), device=_torch_device(self.device))


# --- JAX -------------------------------------------------------------------------------------------------------
def _jax_device(device: str) -> Any:
    import jax

    try:
        return jax.devices(device)[0]
    except RuntimeError:
        raise MissingDevice(f"JAX has no {device} here; it has {sorted({d.platform for d in jax.devices()})}") from None


@contextlib.contextmanager
def _jax_context(side: Side) -> Iterator[None]:
    import jax

    with (
        jax.enable_x64(side.dtype == "float64"),
        jax.default_device(_jax_device(side.device)),
        jax.default_matmul_precision(side.matmul[0]),
    ):
        yield


def _is_float(value: Any) -> bool:
    return "float" in str(value.dtype)


def _evaluate_jax(side: Side, case: Case, quantities: tuple[str, ...]) -> Evaluation:
    import jax
    import jax.numpy as jnp

    active = case.active()
    with side.context():
        leaves = {name: side.array(value) for name, value in case.leaves().items()}
        fixed = {name: value for name, value in leaves.items() if name not in active}
        moving = {name: leaves[name] for name in active}
        directions = {name: side.array(value) for name, value in case.directions().items()}

        def outputs(moving: Leaves) -> Leaves:
            return {
                name: jnp.asarray(value)
                for name, value in flatten(case.call(side.namespace, {**fixed, **moving})).items()
            }

        def scalar(moving: Leaves) -> tuple[Any, Leaves]:
            found = outputs(moving)
            parts = [
                jnp.sum(value * side.array(case.weight(name, value.shape)))
                for name, value in found.items()
                if _is_float(value)
            ]
            return sum(parts[1:], parts[0]), found

        def gradient(moving: Leaves) -> Leaves:
            return jax.grad(scalar, has_aux=True)(moving)[0]

        def forward(moving: Leaves) -> Leaves:
            # Only floats have tangents; integer outputs (a step count) are values alone.
            return {name: value for name, value in outputs(moving).items() if _is_float(value)}

        def slope(moving: Leaves) -> Any:
            found = gradient(moving)
            return sum(jnp.sum(found[name] * directions[name]) for name in active)

        def everything(moving: Leaves) -> Leaves:
            out: Leaves = {"value": outputs(moving)}
            if "gradient" in quantities and active:
                out["gradient"], out["again"] = jax.grad(scalar, has_aux=True)(moving)
            if "jvp" in quantities and active:
                out["jvp"] = jax.jvp(forward, (moving,), (directions,))[1]
            if "hvp" in quantities and active:
                out["hvp"] = jax.grad(slope)(moving)
            return out

        result = (jax.jit(everything) if side.compiled else everything)(moving)
        result = jax.tree.map(np.asarray, result)
        without = jax_without_path(gradient, moving, result["gradient"]) if "gradient" in result else set()
    paths = {name: None if name in without else value for name, value in result.get("gradient", {}).items()}
    again = {"value": result["again"]} if "again" in result else {}
    return Evaluation(result["value"], paths, result.get("jvp", {}), result.get("hvp", {}), again=again)


def jax_without_path(gradient: Any, moving: Leaves, values: Leaves) -> set[str]:
    """Leaves whose gradient is a constant zero in the program itself: the input has no path to the output."""
    import jax

    closed, shapes = jax.make_jaxpr(gradient, return_shape=True)(moving)
    reached = _reached(closed.jaxpr, [True] * len(closed.jaxpr.invars))
    names = sorted(shapes)  # a dict's leaves come out in sorted order
    return {name for name, flag in zip(names, reached, strict=True) if not flag and not np.any(values[name])}


def _reached(jaxpr: Any, inputs: list[bool]) -> list[bool]:
    """For each output of a jaxpr, whether it depends on an input that is flagged."""
    flags = dict(zip(jaxpr.invars, inputs, strict=True))

    def flag(atom: Any) -> bool:
        return not hasattr(atom, "val") and flags.get(atom, False)

    for equation in jaxpr.eqns:
        given = [flag(atom) for atom in equation.invars]
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        inner = getattr(inner, "jaxpr", inner)
        if (
            inner is not None
            and equation.primitive.name not in ("scan", "while", "cond")
            and len(inner.invars) == len(given)
        ):
            out = _reached(inner, given)
        else:
            out = [any(given)] * len(equation.outvars)
        flags.update(zip(equation.outvars, out, strict=True))
    return [flag(atom) for atom in jaxpr.outvars]


# --- PyTorch ---------------------------------------------------------------------------------------------------
def _torch_device(device: str) -> str:
    import torch

    if device == "cpu":
        return "cpu"
    if device == "gpu" and torch.cuda.is_available():
        return "cuda"
    raise MissingDevice(f"PyTorch has no {device} here")


@contextlib.contextmanager
def _torch_context(side: Side) -> Iterator[None]:
    import torch

    _torch_device(side.device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(side.matmul[1])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _evaluate_torch(side: Side, case: Case, quantities: tuple[str, ...]) -> Evaluation:
    import torch

    active = case.active()

    def numpy(tensor: Any) -> np.ndarray | None:
        return None if tensor is None else tensor.detach().cpu().numpy()

    with side.context():
        leaves = {name: side.array(value) for name, value in case.leaves().items()}
        moving = {name: leaves[name].requires_grad_() for name in active}
        raw = flatten(case.call(side.namespace, {**leaves, **moving}))
        outputs = {name: torch.as_tensor(value) for name, value in raw.items()}
        floats = {name: value for name, value in outputs.items() if _is_float(value)}
        result = Evaluation({name: numpy(value) for name, value in outputs.items()})  # type: ignore[misc]
        if not active or quantities == ("value",):
            return result
        # The weights are variables, so that <J^T w, u> can be differentiated in them: that is J u.
        weights = {
            name: side.array(case.weight(name, tuple(value.shape))).requires_grad_() for name, value in floats.items()
        }
        scalar: Any = sum((value * weights[name]).sum() for name, value in floats.items())
        directions = {name: side.array(value) for name, value in case.directions().items()}
        twice = "jvp" in quantities or "hvp" in quantities
        inputs = list(moving.values())
        # First as training does it, then with a graph: a custom rule may take another way for second derivatives.
        gradients = torch.autograd.grad(scalar, inputs, retain_graph=twice, allow_unused=True)
        # A leaf that only the weights reach has no path; autograd says None for it.
        result.gradient = {name: numpy(grad) for name, grad in zip(active, gradients, strict=True)}
        if twice:
            gradients = torch.autograd.grad(scalar, inputs, create_graph=True, allow_unused=True)
            pieces = [
                (grad * directions[name]).sum()
                for name, grad in zip(active, gradients, strict=True)
                if grad is not None and grad.requires_grad
            ]
            slope: Any = sum(pieces[1:], pieces[0]) if pieces else None
            names, chosen = list(weights), list(weights.values())
            seconds: tuple[Any, ...] = (None,) * (len(inputs) + len(chosen))
            if slope is not None:
                seconds = torch.autograd.grad(slope, inputs + chosen, allow_unused=True)
            if "hvp" in quantities:
                result.hvp = {name: numpy(grad) for name, grad in zip(active, seconds, strict=False)}
            if "jvp" in quantities:
                if side.forward_mode:
                    result.again = {"jvp": _forward_mode(side, case, leaves, directions)}
                tangents = zip(names, seconds[len(inputs) :], strict=True)
                result.jvp = {
                    name: np.zeros_like(result.value[name]) if grad is None else numpy(grad)  # type: ignore[misc]
                    for name, grad in tangents
                }
    return result


def _forward_mode(side: Side, case: Case, leaves: Leaves, directions: Leaves) -> dict[str, np.ndarray]:
    """J u of the floating outputs of the PyTorch side, by dual numbers."""
    import torch
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(leaves[name].detach(), directions[name]) for name in case.active()}
        outputs = {
            name: torch.as_tensor(value)
            for name, value in flatten(case.call(side.namespace, {**leaves, **duals})).items()
        }
        pairs = {name: forward_ad.unpack_dual(value) for name, value in outputs.items() if _is_float(value)}
        return {
            name: (torch.zeros_like(pair.primal) if pair.tangent is None else pair.tangent).detach().cpu().numpy()
            for name, pair in pairs.items()
        }


# --- oracle ----------------------------------------------------------------------------------------------------
def oracle_namespace() -> types.SimpleNamespace:
    from parity_tests import oracle_flow, oracle_steps, oracles

    everything = types.SimpleNamespace(**{**vars(oracle_flow), **vars(oracle_steps), **vars(oracles)})
    return types.SimpleNamespace(**dict.fromkeys(MODULES, everything))


def evaluate_oracle(case: Case, *, shift: float = 0.0, derivatives: bool = True) -> Evaluation:
    """The case in extended precision with running errors.

    Without `derivatives` only the scalar <w, outputs>, with the leaves moved by `shift` along the case's directions.
    """
    from parity_tests import jets
    from parity_tests.jets import WIDE, Jet, jet

    active = case.active()
    leaves: Leaves = case.leaves()
    directions = case.directions()
    for name in active if shift else ():
        leaves[name] = leaves[name].astype(WIDE) + WIDE(shift) * directions[name]
    second = any(quantity in case.quantities for quantity in ("jvp", "hvp"))
    if active and derivatives and case.quantities != ("value",):
        leaves.update(jets.seed({name: leaves[name] for name in active}, directions, second))
    outputs = flatten(case.oracle(case.arguments(leaves)) if case.oracle else case.call(oracle_namespace(), leaves))
    floats = {name: jet(value) for name, value in outputs.items() if isinstance(value, Jet) or value.dtype.kind == "f"}
    total = jet(0.0)
    for name, value in floats.items():
        if not derivatives and any(fnmatch.fnmatchcase(name, rule) for rule in case.zero_outputs):
            continue  # under stop-gradient: its change is not in the derivative
        weight = case.weight(name, value.shape)
        total = total + ((value * weight).sum() if weight.shape else value)
    if not derivatives:
        return Evaluation({"value": total.value})
    result = Evaluation(
        {n: value.value if isinstance(value, Jet) else np.asarray(value) for n, value in outputs.items()}
    )
    result.errors["value"] = {name: value.v.error for name, value in floats.items()}
    result.errors["scalar"] = {"value": total.v.error}
    if not active:
        return result
    for quantity, number in (("gradient", total.a), ("hvp", total.ab)):
        if quantity not in case.quantities:
            continue
        start, found, errors = 0, {}, {}
        for name in active:
            shape, stop = leaves[name].shape, start + int(np.prod(leaves[name].shape))
            zeros = np.zeros(shape)
            found[name] = zeros if number is None else number.value[start:stop].reshape(shape)
            errors[name] = zeros if number is None else number.error[start:stop].reshape(shape)
            start = stop
        setattr(result, quantity, found)
        result.errors[quantity] = errors
    if "jvp" in case.quantities:
        zero = {name: np.zeros(value.shape) for name, value in floats.items()}
        result.jvp = {name: zero[name] if v.b is None else v.b.value for name, v in floats.items()}
        result.errors["jvp"] = {name: zero[name] if v.b is None else v.b.error for name, v in floats.items()}
    return result
