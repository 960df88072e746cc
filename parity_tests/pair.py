"""The suite for a pair that is not ours: `check` for two functions, `check_modules` for two modules.

There is no third writing of your model here, so the reference is what the two float64 runs share, and the scale of
rounding is measured: the inputs are moved by known relative amounts, and what the outputs do says how much of an error
rounding explains. Where the two differ, each gradient is held against differences of its own function, which says whose
gradient is not the derivative of its value; an `oracle` in NumPy says whose value is wrong.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parity_tests.case import Case
from parity_tests.compare import (
    BOTH_WRONG,
    EQUAL,
    JAX_WRONG,
    TORCH_WRONG,
    Report,
    Result,
    floor_unit,
    judge,
    structural,
)
from parity_tests.sides import LOW, TIERS, Evaluation, Side
from parity_tests.trees import flatten

__all__ = ["PairReport", "check", "check_modules", "note"]

UNDECIDED = "they differ"
C, TERMS = 100.0, 16
NUDGE = 2.0**-30  # relative, for the scale of rounding: far above float64's, far below any feature of a function
STEP = 2.0**-14  # relative, for differences of a function
_notes: ContextVar[dict[str, Any] | None] = ContextVar("parity_notes", default=None)


def note(name: str, value: Any) -> Any:
    """Call this in both functions at matching places: a failure then names the first place that differs."""
    notes = _notes.get()
    if notes is not None:
        notes[name] = value
    return value


@dataclass
class PairReport(Report):
    """Results of a pair, and where it first parts."""

    divergence: str = ""
    remarks: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [super().__str__()]
        if self.divergence:
            lines.append(f"first divergence: {self.divergence}")
        return "\n".join(lines + self.remarks)


@dataclass(frozen=True)
class _PairSide(Side):
    """A side whose function is the caller's."""

    function: Callable[..., Any] = print
    forward_mode: bool = False

    @property
    def namespace(self) -> Any:  # type: ignore[override]
        return self.function

    @property
    def matmul(self) -> tuple[str, str]:
        return TIERS[self.tier][2:]

    def dense(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def check(
    torch_fn: Callable[..., Any],
    jax_fn: Callable[..., Any],
    *,
    params: Mapping[str, Any],
    inputs: Mapping[str, Any],
    differentiate: Sequence[str] = ("params/*",),
    oracle: Callable[..., Any] | None = None,
    dtypes: Sequence[str] = ("float64", "float32"),
    quantities: Sequence[str] = ("value", "gradient", "jvp"),
    devices: tuple[str, str] = ("cpu", "cpu"),
) -> PairReport:
    """Compare fn(params, **inputs) of a PyTorch and a JAX function: values, gradients, Jacobian-vector products.

    Args:
        torch_fn: takes tensors, returns tensors in any nesting.
        jax_fn: the same with JAX arrays; it is compiled.
        params: nested dict of NumPy arrays, one layout for both.
        inputs: NumPy arrays by argument name.
        differentiate: leaves to differentiate in, as paths with wildcards: "params/*", "inputs/x".
        oracle: a NumPy function of the same arguments in float64, which decides who is wrong.
        dtypes: "float64", "float32", "tf32", "bf16". The last two are asked of the devices; a processor that multiplies
            in float32 nevertheless is named in the remarks.
        quantities: of "value", "gradient", "jvp", "hvp".
        devices: JAX's and PyTorch's.

    Returns:
        PairReport: `.passed`, `.results`, and as text what differs, by how much, who is wrong and where it starts.

    Raises:
        ValueError: a leaf in `differentiate` is not there.
    """
    case = Case(
        "pair/given",
        "pair.given",
        {"params": params, "inputs": inputs},
        differentiate=tuple(differentiate),
        quantities=tuple(quantities),
        run=lambda function, a: function(a["params"], **a["inputs"]),
    )
    report = PairReport()
    sides = tuple(
        _PairSide(name, device, "float64", compiled=compiled, function=function)
        for name, device, compiled, function in (
            ("jax", devices[0], True, jax_fn),
            ("torch", devices[1], False, torch_fn),
        )
    )
    base = tuple(side.evaluate(case) for side in sides)
    scale = _scale(sides[1], case, base[1])
    rounded = case.arguments(case.leaves())
    truth = None if oracle is None else flatten(oracle(rounded["params"], **rounded["inputs"]))
    if "float64" in dtypes:
        for quantity in case.quantities:
            report.results += _compare64(case, quantity, sides, base, scale, truth)
    low = [tier for tier in dtypes if tier in LOW]
    if low and "cpu" in devices:
        report.remarks.append(f"{' and '.join(low)}: a processor may multiply in float32, and JAX's does")
    for tier in (tier for tier in dtypes if tier != "float64"):
        lower = tuple(
            _PairSide(s.framework, s.device, tier, compiled=s.compiled, function=s.function).evaluate(case)
            for s in sides
        )
        for quantity in case.quantities:
            report.results += _compare_low(quantity, tier, lower, base, scale)
    if not report.passed:
        report.divergence = _first_note(sides, case)
        report.remarks += _remarks(sides, case, base)
    return report


def _array(value: Any, like: Any) -> np.ndarray:
    return np.zeros(np.shape(like)) if value is None else np.asarray(value)


def _scale(side: Side, case: Case, base: Evaluation, draws: int = 3) -> dict[tuple[str, str], float]:
    """(quantity, leaf) -> S: the largest entry, and the largest move per relative move of the arguments."""
    scale = {
        (q, n): float(np.abs(v).max(initial=0.0))
        for q in case.quantities
        for n, v in base.quantity(q).items()
        if v is not None
    }
    for draw in range(draws):
        moved = _Moved(
            case,
            lambda name, value, draw=draw: value * (1 + NUDGE * np.sign(case.draw(f"nudge {draw}", name, value.shape))),
        )
        other = side.evaluate(moved)
        for (quantity, name), size in scale.items():
            gap = np.abs(_array(other.quantity(quantity)[name], 0) - _array(base.quantity(quantity)[name], 0)).max(
                initial=0.0
            )
            scale[quantity, name] = max(size, float(np.nan_to_num(gap)) / NUDGE)
    # A gradient that cancels to zero (a bias in front of a softmax) has the rounding of its neighbours, not its own.
    for quantity in ("gradient", "hvp"):
        largest = max((size for (q, _), size in scale.items() if q == quantity), default=0.0)
        scale |= {key: largest for key in scale if key[0] == quantity}
    return scale


class _Moved(Case):
    """A case whose leaves are changed on the way in."""

    def __init__(self, case: Case, change: Callable[[str, np.ndarray], np.ndarray]):
        for name, value in vars(case).items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "change", change)

    def leaves(self) -> dict[str, np.ndarray]:
        change: Any = vars(self)["change"]
        return {name: change(name, v) if v.dtype.kind == "f" else v for name, v in super().leaves().items()}


def _same_leaves(quantity: str, tier: str, one: Mapping[str, Any], two: Mapping[str, Any]) -> list[Result]:
    odd = sorted(set(one) ^ set(two))
    return (
        [Result("pair", quantity, "*", tier, ("jax", "torch"), UNDECIDED, f"leaves {odd} are on one side only")]
        if odd
        else []
    )


def _compare64(case: Case, quantity: str, sides: Any, base: Any, scale: Any, truth: Any) -> list[Result]:
    one, two = (side.quantity(quantity) for side in base)
    results = _same_leaves(quantity, "float64", one, two)
    for name in (name for name in one if name in two):
        make = lambda verdict, detail="", errors=(0.0, 0.0), index=(), values=(), name=name: Result(
            "pair", quantity, name, "float64", ("jax", "torch"), verdict, detail, errors, index, values
        )
        if (one[name] is None) != (two[name] is None) and quantity == "gradient":
            absent = "JAX" if one[name] is None else "PyTorch"
            results.append(make(UNDECIDED, f"{absent} has no gradient path to it, the other side has"))
            continue
        a, b = _array(one[name], two[name]), _array(two[name], one[name])
        fault = structural(b, a, str(b.dtype))
        if fault or b.dtype.kind != "f":
            results.append(make(UNDECIDED if fault else EQUAL, f"JAX has {fault}" if fault else ""))
            continue
        unit = 2.0**-53 * max(scale.get((quantity, name), 0.0), 1e-300)
        gap = np.nan_to_num(np.abs(a - b)) / unit
        worst = float(gap.max(initial=0.0))
        place = tuple(int(i) for i in np.unravel_index(int(gap.argmax()), gap.shape)) if gap.size else ()
        if truth is not None and quantity == "value" and name in truth:
            right = np.asarray(truth[name], np.float64)
            errors = tuple(float(np.abs(x - right).max(initial=0.0)) / unit for x in (a, b))
            results.append(
                make(
                    judge(errors, "float64", C),
                    "",
                    errors,
                    place,
                    (a[place].item(), b[place].item(), float(right[place])),
                )
            )  # type: ignore[arg-type]
            continue
        verdict = EQUAL if worst <= C else UNDECIDED
        if verdict == UNDECIDED and quantity == "gradient":
            verdict = _whose_gradient(case, sides, base)
        values = (a[place].item(), b[place].item()) if gap.size else ()
        results.append(make(verdict, "", (worst, worst), place, values))
    return results


def _slopes(case: Case, side: Any, evaluation: Evaluation) -> tuple[float, float]:
    """<gradient, direction>, and the same from central differences of the side's own values (Richardson)."""
    directions = case.directions()
    told = sum(float(np.sum(_array(evaluation.gradient[n], d) * d)) for n, d in directions.items())
    values_only = Case(**{**vars(case), "quantities": ("value",)})

    def scalar(step: float) -> float:
        moved = _Moved(values_only, lambda name, v: v + step * directions[name] if name in directions else v)
        found = side.evaluate(moved).value
        return sum(float(np.sum(v * case.weight(n, v.shape))) for n, v in found.items() if v.dtype.kind == "f")

    central = [(scalar(h) - scalar(-h)) / (2 * h) for h in (STEP, STEP / 2)]
    return told, (4 * central[1] - central[0]) / 3


def _whose_gradient(case: Case, sides: Any, base: Any) -> str:
    wrong = []
    for side, evaluation in zip(sides, base, strict=True):
        told, measured = _slopes(case, side, evaluation)
        wrong.append(abs(told - measured) > 1e-5 * max(abs(told), abs(measured), 1e-12))
    return {(True, False): JAX_WRONG, (False, True): TORCH_WRONG, (True, True): BOTH_WRONG}.get(
        (wrong[0], wrong[1]), UNDECIDED
    )


def _remarks(sides: Any, case: Case, base: Any) -> list[str]:
    if "gradient" not in case.quantities or not case.active():
        return []
    remarks = []
    for side, evaluation in zip(sides, base, strict=True):
        told, measured = _slopes(case, side, evaluation)
        agrees = abs(told - measured) <= 1e-5 * max(abs(told), abs(measured), 1e-12)
        word = "is" if agrees else "is not (a stop-gradient, a custom rule, or a kink)"
        remarks.append(
            f"{side.name}: its gradient {word} the derivative of its own value: {told:.8g} and {measured:.8g}"
        )
    return remarks


def _compare_low(quantity: str, tier: str, lower: Any, base: Any, scale: Any) -> list[Result]:
    results = _same_leaves(quantity, tier, *(side.quantity(quantity) for side in lower))
    for name in (name for name in lower[0].quantity(quantity) if name in lower[1].quantity(quantity)):
        if any(side.quantity(quantity)[name] is None for side in lower):
            continue  # float64 has told that a path is missing
        low = [_array(side.quantity(quantity)[name], base[i].quantity(quantity)[name]) for i, side in enumerate(lower)]
        high = [_array(side.quantity(quantity)[name], low[i]) for i, side in enumerate(base)]
        faults = [structural(h, x, "float32") if h.dtype.kind == "f" else "" for h, x in zip(high, low, strict=True)]
        if any(faults):
            verdict = BOTH_WRONG if all(faults) else JAX_WRONG if faults[0] else TORCH_WRONG
            results.append(
                Result("pair", quantity, name, tier, ("jax", "torch"), verdict, "; ".join(filter(None, faults)))
            )
            continue
        unit = floor_unit(tier, TERMS) * max(scale.get((quantity, name), 0.0), 1e-300)
        # Each side against its own float64: a fault that float64 has already shown is not shown twice.
        errors = [float(np.nan_to_num(np.abs(x - h)).max(initial=0.0)) / unit for x, h in zip(low, high, strict=True)]
        results.append(
            Result(
                "pair",
                quantity,
                name,
                tier,
                ("jax", "torch"),
                judge((errors[0], errors[1]), tier, C),
                "",
                (errors[0], errors[1]),
            )
        )
    return results


@contextlib.contextmanager
def _noting() -> Any:
    notes: dict[str, Any] = {}
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def _first_note(sides: Any, case: Case) -> str:
    """The first noted value that differs."""
    found = []
    for side in sides:
        with side.context(), _noting() as notes:
            case.call(side.namespace, {name: side.array(value) for name, value in case.leaves().items()})
        found.append({k: np.asarray(v.detach().cpu() if hasattr(v, "detach") else v) for k, v in notes.items()})
    shared = [name for name in found[1] if name in found[0]]
    if not shared:
        return "not known: note(name, value) in both functions, or check_modules, would say"
    for name in shared:
        a, b = found[0][name], found[1][name]
        if a.shape != b.shape:
            return f"{name}: shapes {a.shape} (JAX) and {b.shape} (PyTorch)"
        gap = np.abs(a - b)
        if not np.all(gap <= 1e-9 * max(float(np.abs(b).max(initial=0.0)), 1e-300)):
            place = tuple(int(i) for i in np.unravel_index(int(np.nan_to_num(gap, nan=np.inf).argmax()), gap.shape))
            return f"{name}, at {list(place)}: {a[place]!r} (JAX) and {b[place]!r} (PyTorch)"
    return f"all {len(shared)} noted values agree: it is after {shared[-1]}, or in the gradient only"


# --- modules -----------------------------------------------------------------------------------------------------


def check_modules(
    torch_module: Any,
    flax_module: Any,
    *,
    inputs: Mapping[str, Any],
    rename: Mapping[str, str] | Callable[[str], str] | None = None,
    convert: Mapping[str, Callable[[Any], Any]] | None = None,
    **options: Any,
) -> PairReport:
    """Compare a torch.nn.Module and a flax.nnx.Module that get the PyTorch module's parameters.

    Dense and convolution kernels are transposed, norms and embeddings are renamed (weight to kernel, scale or
    embedding); gradients are compared in PyTorch's names and layout. Put both into evaluation mode: nothing may be
    drawn.

    Args:
        torch_module: as it is; its parameters are the ones used.
        flax_module: its parameters are replaced, its other state is kept.
        inputs: keyword arguments of both calls, NumPy arrays.
        rename: PyTorch's names to Flax's dotted paths where they differ, as a dict of prefixes or a function.
        convert: by PyTorch's name, what turns its value into Flax's, where the rule above does not hold.
        options: of `check`; `differentiate` names leaves as "params/NAME".

    Returns:
        As `check`; the first divergence is named by submodule.

    Raises:
        ValueError: a parameter without a partner on the other side, or partners of different shapes.
    """
    import torch
    from flax import nnx

    names = {name: p.detach().cpu().double().numpy() for name, p in torch_module.named_parameters()}
    buffers = {name: b.detach() for name, b in torch_module.named_buffers()}
    graph, state, rest = nnx.split(flax_module, nnx.Param, ...)
    flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    partner = _partners(names, flat, rename, convert or {})

    def torch_fn(params: Any, **given: Any) -> Any:
        weights = {name.replace("/", "."): value for name, value in params.items()}
        like = next(iter(weights.values()))
        moved = {n: b.to(like) if b.is_floating_point() else b.to(like.device) for n, b in buffers.items()}
        with _torch_notes(torch_module):
            return _plain(torch.func.functional_call(torch_module, {**moved, **weights}, kwargs=given))

    def jax_fn(params: Any, **given: Any) -> Any:
        import jax

        leaves = {path: change(params[name]) for name, (path, change) in partner.items()}
        like = next(iter(leaves.values())).dtype
        other = jax.tree.map(lambda x: x.astype(like) if hasattr(x, "dtype") and "float" in str(x.dtype) else x, rest)
        fresh = nnx.from_flat_state(
            [(path, leaf.replace(leaves[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
        )
        model = nnx.merge(graph, fresh, other)
        with _flax_notes(model, nnx):
            return _plain(model(**given))

    return check(torch_fn, jax_fn, params=names, inputs=inputs, **options)


def _plain(output: Any) -> Any:
    """Outputs of any class as nested dicts: model outputs that are mappings, dataclasses or tuples."""
    return flatten(output)


def _partners(
    names: Mapping[str, np.ndarray], flat: Mapping[str, Any], rename: Any, convert: Mapping[str, Any]
) -> dict[str, Any]:
    partner: dict[str, Any] = {}
    for name, value in names.items():
        path = _renamed(name, rename)
        stem, _, last = path.rpartition(".")
        options = [path] + [
            f"{stem}.{word}".lstrip(".") for word in ("kernel", "scale", "embedding") if last == "weight"
        ]
        found = next((option for option in options if option in flat), None)
        if found is None:
            near = difflib.get_close_matches(path, flat, n=1)
            raise ValueError(
                f"{name} of the PyTorch module has no partner ({', '.join(options)}); nearest is {near}; use rename"
            )
        change = convert.get(name) or (_transposed if found.endswith("kernel") else lambda v: v)
        if tuple(change(value).shape) != tuple(flat[found].shape):
            shape = tuple(flat[found].shape)
            raise ValueError(f"{name} becomes {change(value).shape}, but {found} has shape {shape}; use convert")
        partner[name] = (found, change)
    left = sorted(set(flat) - {path for path, _ in partner.values()})
    if left:
        raise ValueError(f"{', '.join(left)} of the Flax module have no partner in the PyTorch module; use rename")
    return partner


def _renamed(name: str, rename: Any) -> str:
    if callable(rename):
        return str(rename(name))
    for old, new in sorted((rename or {}).items(), key=lambda item: -len(item[0])):
        if name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    return name


def _transposed(value: Any) -> Any:
    """(out, in, *kernel) to (*kernel, in, out)."""
    axes = (*range(2, value.ndim), 1, 0)
    return value.transpose(axes) if isinstance(value, np.ndarray) else value.transpose(*axes)


@contextlib.contextmanager
def _torch_notes(module: Any) -> Any:
    def hook(name: str) -> Any:
        return lambda _module, _inputs, output: None if not hasattr(output, "detach") else (note(name, output), None)[1]

    handles = (
        [sub.register_forward_hook(hook(name)) for name, sub in module.named_modules() if name]
        if _notes.get() is not None
        else []
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _flax_notes(model: Any, nnx: Any) -> Any:
    """Submodules note what they return; their classes' __call__ is wrapped while it runs."""
    if _notes.get() is None:
        yield
        return
    paths = {id(sub): ".".join(map(str, path)) for path, sub in nnx.iter_modules(model) if path}
    classes = {type(sub) for _, sub in nnx.iter_modules(model) if "__call__" in vars(type(sub))}
    originals = {cls: cls.__call__ for cls in classes}

    def wrapped(original: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(self, *args, **kwargs)
            return note(paths[id(self)], output) if id(self) in paths and hasattr(output, "shape") else output

        return call

    try:
        for cls, original in originals.items():
            cls.__call__ = wrapped(original)
        yield
    finally:
        for cls, original in originals.items():
            cls.__call__ = original
