"""Whole trainings side by side (docs/parity.md rule 9): gap after K steps, restarts, swaps in mid-run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from parity_tests import synthetic as syn
from pf_core.config import Config
from pf_core.noise import generator

CHUNK = 50  # steps per call; the state is exported between chunks only when asked
NUDGE_EVERY = 5
# About the defaults of the stages.
LEARNING_RATE = {"vae": 2.0**-10, "operator": 2.0**-10, "joint": 2.0**-13, "cvae": 2.0**-10, "flow": 2.0**-10}


def backend_of(framework: str, dtype: str, device: str = "cpu") -> Any:
    """A twin's Backend."""
    if framework == "jax":
        from pf_jax.bridge import Backend
    else:
        from pf_torch.bridge import Backend

        device = "cuda" if device == "gpu" else device
    return Backend(dtype=dtype, device=device)


def start(stage: str, config: Config) -> dict[str, Any]:
    """An export as at step 0: parameters off their initial values, moments zero."""
    params = syn.parameters_of(stage, config, off=0.1)
    moving = syn.trainable(stage, params)
    zeros = {name: np.zeros_like(value) for name, value in moving.items()}
    return {"params": params, "m": zeros, "v": dict(zeros), "count": 0, "carry": syn.carry_of(stage, config)}


def _inputs(stage: str, config: Config, first: int, n: int) -> tuple[Any, Any, Any]:
    """Batches, noise and learning rates of steps first, ..., first + n - 1: pure functions of the step."""
    steps = range(first, first + n)
    batches = syn.stacked([syn.stacked([syn.batch_of(stage, config, i)]) for i in steps])
    noises = syn.stacked([syn.stacked([syn.noise_of(stage, config, i)]) for i in steps])
    beta = np.minimum(1.0, np.array([i / 100 for i in steps]))
    return batches, noises, {"lr": np.full(n, LEARNING_RATE[stage]), "beta": beta}


def advance(
    backend: Any, stage: str, exported: dict[str, Any], first: int, n: int, config: Config
) -> tuple[dict[str, Any], np.ndarray]:
    """n steps from an export: the new export with frozen parameters in it, and the losses."""
    frozen = {name: value for name, value in exported["params"].items() if name not in exported["m"]}
    state = backend.init(
        stage,
        exported["params"],
        trainable=tuple(exported["m"]),
        m=exported["m"],
        v=exported["v"],
        count=exported["count"],
        carry=exported["carry"],
    )
    losses = []
    for begin in range(first, first + n, CHUNK):
        inputs = _inputs(stage, config, begin, min(CHUNK, first + n - begin))
        state, metrics = backend.run(stage, state, *inputs, config)
        losses.append(np.asarray(metrics["loss"], np.float64))
        if not np.all(metrics["ok"]):
            raise FloatingPointError(f"{backend.name} refused a step of {stage} at {begin} to {begin + CHUNK}")
    out = backend.export(state)
    return {**out, "params": {**frozen, **out["params"]}}, np.concatenate(losses)


def gap(one: dict[str, Any], two: dict[str, Any]) -> float:
    """Largest difference of a trained parameter or a running statistic, relative to its largest entry."""
    worst = 0.0
    statistics = [("carry", name) for name in one["carry"] if name.startswith("cvae.")]
    for place, name in [("params", name) for name in one["m"]] + statistics:
        a, b = (np.asarray(tree[place][name], np.float64) for tree in (one, two))
        worst = max(worst, float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-12)))
    return worst


def nudged(exported: dict[str, Any], seed: int, dtype: str) -> dict[str, Any]:
    """Every parameter moved by one ulp, up or down."""
    params = {}
    for name, value in exported["params"].items():
        value = value.astype(dtype)
        up = generator(seed, "ulp." + name).uniform(size=value.shape) < 0.5
        params[name] = np.where(up, np.nextafter(value, np.inf, dtype=dtype), np.nextafter(value, -np.inf, dtype=dtype))
    return {**exported, "params": params}


def _restless(
    backend: Any, stage: str, state: dict[str, Any], steps: int, config: Config, seed: int, dtype: str
) -> dict[str, Any]:
    """A run whose parameters are moved by one ulp every few steps, as another order of summation would move them."""
    for first in range(0, steps, NUDGE_EVERY):
        state = nudged(state, 1000 * seed + first, dtype)
        state, _ = advance(backend, stage, state, first, min(NUDGE_EVERY, steps - first), config)
    return state


@dataclass(frozen=True)
class Trajectory:
    """A stage trained by both twins from one start."""

    stage: str
    dtype: str
    steps: int
    gap: float  # between the twins after all steps
    spread: float  # between PyTorch and PyTorch with its parameters moved by one ulp now and then
    loss_gap: float  # largest relative difference of a step's loss
    first_loss: float
    last_loss: float

    @property
    def passed(self) -> bool:
        """Rule 9: the twins differ by no more than one twin differs from itself. A quiet run may be at rounding."""
        return bool(self.gap <= 3 * max(self.spread, np.finfo(self.dtype).eps))


def compare(
    stage: str, dtype: str, steps: int, *, devices: tuple[str, str] = ("cpu", "cpu"), nudges: int = 2
) -> Trajectory:
    """Train both twins and the nudged PyTorch runs."""
    config = syn.configuration()
    begin = start(stage, config)
    jax, torch = backend_of("jax", dtype, devices[0]), backend_of("torch", dtype, devices[1])
    one, losses_one = advance(jax, stage, begin, 0, steps, config)
    two, losses_two = advance(torch, stage, begin, 0, steps, config)
    spread = max(gap(_restless(torch, stage, begin, steps, config, seed, dtype), two) for seed in range(nudges))
    loss_gap = float(np.max(np.abs(losses_one - losses_two) / np.maximum(np.abs(losses_two), 1e-12)))
    return Trajectory(stage, dtype, steps, gap(one, two), spread, loss_gap, float(losses_two[0]), float(losses_two[-1]))


def restarts(stage: str, dtype: str, at: tuple[int, ...]) -> dict[int, float]:
    """One-step gap between the twins, from PyTorch's state at each of the steps."""
    config = syn.configuration()
    state, done, gaps = start(stage, config), 0, {}
    jax, torch = backend_of("jax", dtype), backend_of("torch", dtype)
    for step in at:
        if step > done:
            state, _ = advance(torch, stage, state, done, step - done, config)
            done = step
        one, two = (advance(backend, stage, state, step, 1, config)[0] for backend in (jax, torch))
        gaps[step] = gap(one, two)
    return gaps


def swapped(stage: str, dtype: str, steps: int, order: tuple[str, str]) -> float:
    """Half the steps in one twin and half in the other, against all of them in the second."""
    config = syn.configuration()
    begin, half = start(stage, config), steps // 2
    first, second = (backend_of(name, dtype) for name in order)
    middle, _ = advance(first, stage, begin, 0, half, config)
    mixed, _ = advance(second, stage, middle, half, steps - half, config)
    whole, _ = advance(second, stage, begin, 0, steps, config)
    return gap(mixed, whole)
