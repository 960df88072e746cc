"""The training loop, once for both twins: schedules, early stop, guards, checkpoint cadence.

Every decision is a pure function of the step, the seed and what a backend returned, so that the twins decide alike and
a resumed run continues bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pf_core.backends import STAGES, Arrays, Backend, stage_label, stage_of
from pf_core.checkpoint import Checkpoint, Run, save_arrays, write_atomic
from pf_core.config import BAD_STEPS_IN_A_ROW, MAX_RETURNS, RETURN_LR_FACTOR, Config, StageConfig
from pf_core.errors import TrainingError
from pf_core.health import judge
from pf_core.sparse_counts import Batch, stack

CALL_BYTES = 256 << 20  # most bytes of batches handed to a backend at once; as many wait for the next call


class Source(Protocol):
    """Batches of one stage, each a pure function of (seed, step, attempt)."""

    def batch(self, step: int, attempt: int) -> tuple[Batch, Batch]:
        """Batch and noise of a step; leaves have a leading axis of micro-batches."""
        ...

    def validation(self) -> list[tuple[Batch, Batch, float]]:
        """Fixed batches without the micro-batch axis, their noise, and the weight of each."""
        ...


@dataclass
class Position:
    """Where the loop stands: everything a checkpoint needs beside the arrays."""

    step: int = 0
    attempt: int = 0  # how often training returned to a checkpoint; enters the names of draws
    lr_scale: float = 1.0
    bad_in_row: int = 0
    bad_steps: int = 0
    best_value: float | None = None
    best_step: int = 0
    waited: int = 0  # evaluations since the best
    history_length: int = 0
    done: bool = False


def stage_settings(config: Config, stage: str) -> StageConfig:
    """The settings of a stage."""
    return getattr(config, f"stage_{stage}")


def learning_rate(settings: StageConfig, step: int) -> float:
    """Linear warm-up, then constant or a cosine to zero."""
    warm = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    if settings.schedule == "constant":
        return settings.learning_rate * warm
    return settings.learning_rate * warm * 0.5 * (1.0 + math.cos(math.pi * step / settings.max_steps))


def kl_weight(config: Config, stage: str, step: int) -> float:
    """beta of the ELBO: linear from 0 in the first stage of either system, its final value afterwards."""
    if stage not in ("vae", "cvae") or not config.vae.kl_warmup:
        return config.vae.beta
    return config.vae.beta * min(1.0, step / config.vae.kl_warmup)


def next_stop(settings: StageConfig, step: int, per_call: int) -> int:
    """End of the call that starts at this step: calls never straddle an evaluation or a checkpoint."""
    boundaries = [settings.max_steps]
    boundaries += [
        (step // every + 1) * every for every in (settings.evaluate_every, settings.checkpoint_every, per_call)
    ]
    return min(boundaries)


class Ahead:
    """A source read by one thread, which makes and sends the batches of the next call while the backend computes."""

    def __init__(self, source: Source, send: Callable[[Batch], dict[str, Any]]) -> None:
        self.source, self.send = source, send
        self.thread = ThreadPoolExecutor(1)
        self.made: dict[tuple[int, int, int], Future[tuple[dict[str, Any], dict[str, Any]]]] = {}

    def begin(self, start: int, stop: int, attempt: int) -> None:
        """Start on the batches of the steps from start to stop; others that nobody took are dropped."""
        if (start, stop, attempt) not in self.made:
            for future in self.made.values():
                future.cancel()
            self.made = {(start, stop, attempt): self.thread.submit(self._make, start, stop, attempt)}

    def take(self, start: int, stop: int, attempt: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Batches and noise of the steps from start to stop, as the backend takes them."""
        self.begin(start, stop, attempt)
        return self.made.pop((start, stop, attempt)).result()

    def look(self, step: int, attempt: int) -> tuple[Arrays, Arrays]:
        """Batch and noise of a step as NumPy has them."""
        batch, noise = self.thread.submit(self.source.batch, step, attempt).result()
        return {n: np.asarray(leaf) for n, leaf in batch.items()}, {n: np.asarray(leaf) for n, leaf in noise.items()}

    def validation(self) -> list[tuple[Batch, Batch, float]]:
        return self.thread.submit(self.source.validation).result()

    def _make(self, start: int, stop: int, attempt: int) -> tuple[dict[str, Any], dict[str, Any]]:
        pairs = [self.source.batch(step, attempt) for step in range(start, stop)]
        return self.send(stack([batch for batch, _ in pairs])), self.send(stack([noise for _, noise in pairs]))

    def close(self) -> None:
        """Wait for the thread; what it made is dropped."""
        self.thread.shutdown(cancel_futures=True)


def _hypers(config: Config, stage: str, position: Position, stop: int) -> Arrays:
    """Hyperparameters of the steps from position.step to stop."""
    settings = stage_settings(config, stage)
    steps = range(position.step, stop)
    return {
        "lr": np.array([learning_rate(settings, s) * position.lr_scale for s in steps], config.dtype),
        "beta": np.array([kl_weight(config, stage, s) for s in steps], config.dtype),
    }


def steps_per_call(source: Source, settings: StageConfig) -> int:
    """The configured number, or fewer where the batches of a call would not fit into CALL_BYTES."""
    batch, _ = source.batch(0, 0)
    size = sum(array.nbytes for array in batch.values())
    return max(1, min(settings.steps_per_call, CALL_BYTES // max(size, 1)))


def validate(backend: Backend, stage: str, state: Any, source: Ahead, config: Config) -> dict[str, float]:
    """Weighted mean of loss and parts over the validation batches, at the final KL weight."""
    totals: dict[str, float] = {}
    weights = 0.0
    for batch, noise, weight in source.validation():
        parts = backend.evaluate(stage, state, batch, noise, config, config.vae.beta)
        weights += weight
        for name, value in parts.items():
            totals[name] = totals.get(name, 0.0) + weight * value
    return {name: total / weights for name, total in totals.items()} if weights else {}


def run_stage(
    backend: Backend,
    stage: str,
    source: Source,
    params: Mapping[str, np.ndarray],
    *,
    member: int = 0,
    trainable: Callable[[str], bool],
    carry: Arrays,
    config: Config,
    run: Run,
    last: Checkpoint | None,
    progress: Callable[[str, int, int, dict[str, float]], None] = lambda *_: None,
) -> dict[str, np.ndarray]:
    """A stage of a run that may be a resumed one: trained, continued, or taken as it ended before.

    Args:
        trainable: which parameters are optimised, by name.
        last: the last checkpoint that the run had when it was opened; None for a new run.
        member: which of several models that this stage trains one after the other.

    The other arguments and what is returned are those of `train_stage`.
    """
    label = stage_label(stage, member)

    def place(label: str) -> tuple[int, int]:
        stage, member = stage_of(label)
        return STAGES[config.system].index(stage), member

    done = last is not None and place(last.stage) > place(label)
    if done or not stage_settings(config, stage).max_steps:
        best = run.best(label)
        trained = best.group("params") if best else {}
        return {name: np.asarray(value, config.dtype) for name, value in {**params, **trained}.items()}
    return train_stage(
        backend,
        stage,
        source,
        params,
        label=label,
        trainable=tuple(sorted(filter(trainable, params))),
        carry=carry,
        config=config,
        run=run,
        resume=last if last is not None and last.stage == label else None,
        history_length=run.history_length(),
        progress=progress,
    )


def train_stage(
    backend: Backend,
    stage: str,
    source: Source,
    params: Mapping[str, np.ndarray],
    *,
    label: str,
    trainable: tuple[str, ...],
    carry: Arrays,
    config: Config,
    run: Run,
    resume: Checkpoint | None = None,
    history_length: int = 0,
    progress: Callable[[str, int, int, dict[str, float]], None] = lambda *_: None,
) -> dict[str, np.ndarray]:
    """Train one stage and return all parameters, the trained ones at their best validation loss.

    Args:
        backend: a twin.
        stage: a name of `STAGES`.
        source: the stage's batches.
        params: canonical parameters, trainable and frozen.
        label: the name of this training in checkpoints and history (`stage_label`).
        trainable: names that are optimised.
        carry: state beside the parameters that steps carry along (vectors of the power iteration).
        config: the run's configuration.
        run: where checkpoints, history and a crash bundle go.
        resume: a checkpoint of this very stage to continue from.
        history_length: bytes of history before this stage.
        progress: called with (stage, step, max_steps, values) after every call of the backend.

    Raises:
        TrainingError: three non-finite steps in a row after the last permitted return to a checkpoint.
    """
    settings = stage_settings(config, stage)
    dtype = np.dtype(config.dtype)
    params = {name: np.asarray(value, dtype) for name, value in params.items()}

    def restore(checkpoint: Checkpoint) -> tuple[Any, Position]:
        position = dict(checkpoint.position)
        state = backend.init(
            stage,
            {**params, **checkpoint.group("params")},
            trainable=trainable,
            m=checkpoint.group("m"),
            v=checkpoint.group("v"),
            count=position.pop("count"),
            carry=checkpoint.group("carry"),
        )
        return state, Position(**position)

    def save(state: Any, position: Position, *, best: bool = False) -> None:
        exported = backend.export(state)
        checkpoint = Checkpoint.from_export(label, position.step, exported, dataclasses.asdict(position))
        run.save_checkpoint(checkpoint, best=best)

    if resume is None:
        position = Position(history_length=history_length)
        state = backend.init(stage, params, trainable=trainable, carry=carry)
        save(state, position, best=True)
    else:
        state, position = restore(resume)

    per_call = steps_per_call(source, settings)
    names = sorted(trainable)
    with closing(Ahead(source, backend.send)) as ahead:
        batch, noise = ({name: array[0] for name, array in tree.items()} for tree in ahead.look(0, 0))
        unreached = backend.unreached(stage, params, trainable, batch, noise, carry, config)
        while not position.done and position.step < settings.max_steps:
            stop = next_stop(settings, position.step, per_call)
            batches, noises = ahead.take(position.step, stop, position.attempt)
            if stop < settings.max_steps:
                ahead.begin(stop, next_stop(settings, stop, per_call), position.attempt)
            hypers = _hypers(config, stage, position, stop)
            state, metrics = backend.run(stage, state, batches, noises, hypers, config)
            crash_step = _count_bad_steps(position, metrics["ok"])
            if crash_step is not None:
                good = run.last()
                assert good is not None, "a stage begins with a checkpoint"
                if position.attempt == MAX_RETURNS:
                    _crash(backend, stage, ahead, good, restore, per_call, crash_step, config, run, params, trainable)
                bad_steps, attempt = position.bad_steps, position.attempt + 1
                scale = position.lr_scale * RETURN_LR_FACTOR
                state, position = restore(good)
                position.attempt, position.lr_scale = attempt, scale
                position.bad_steps, position.bad_in_row = bad_steps, 0
                event = (
                    f"returned to step {good.step} after {BAD_STEPS_IN_A_ROW} non-finite steps, the first at step"
                    f" {crash_step}; learning rate x {scale:g}"
                )
                run.log(f"{label}: {event}")
                record = {"stage": label, "step": position.step, "event": event, "bad_steps": bad_steps}
                position.history_length = run.append_history(record)
                save(state, position)
                continue
            position.step = stop
            values = _mean_metrics(metrics, hypers, names)
            record = {"stage": label, "step": stop, **values, "bad_steps": position.bad_steps}
            # In the middle of a row of bad steps nothing is saved: a return must lead back to before the first of them.
            healthy, is_best = position.bad_in_row == 0, False
            if stop % settings.evaluate_every == 0 or stop == settings.max_steps:
                record["validation"] = validate(backend, stage, state, ahead, config)
                record["health"] = _health(metrics["param_grad_norm"][-1], backend.export(state)["params"], unreached)
                if healthy:
                    is_best = _judge(position, record["validation"], values["loss"], settings, stop)
            position.history_length = run.append_history(record)
            if stop == settings.max_steps:
                position.done = True
            if is_best or position.done or (healthy and stop % settings.checkpoint_every == 0):
                save(state, position, best=is_best)
            progress(label, stop, settings.max_steps, _shown(record))
    best = run.best(label)
    assert best is not None, "a stage begins with a checkpoint"
    return {**params, **best.group("params")}


def _count_bad_steps(position: Position, ok: np.ndarray) -> int | None:
    """Count steps that were not applied; the first step of three in a row, or None."""
    for offset, good in enumerate(np.asarray(ok)):
        position.bad_in_row = 0 if good else position.bad_in_row + 1
        position.bad_steps += not good
        if position.bad_in_row == BAD_STEPS_IN_A_ROW:
            return position.step + offset - BAD_STEPS_IN_A_ROW + 1
    return None


def _judge(position: Position, validation: dict[str, float], loss: float, settings: StageConfig, step: int) -> bool:
    """Early stopping: whether this is the best evaluation so far. Without validation cells the training loss judges."""
    value = validation.get("loss", loss)
    if math.isfinite(value) and (position.best_value is None or value < position.best_value):
        position.best_value, position.best_step, position.waited = value, step, 0
        return True
    position.waited += 1
    position.done = bool(settings.patience) and position.waited >= settings.patience
    return False


def _mean_metrics(metrics: dict[str, Any], hypers: Arrays, names: list[str]) -> dict[str, Any]:
    """Means over the applied steps of a call, as plain floats."""
    ok = np.asarray(metrics["ok"], bool)
    keep = ok if ok.any() else np.ones_like(ok)

    def mean(array: np.ndarray) -> Any:
        return np.mean(np.asarray(array, np.float64)[keep], axis=0)

    return {
        "loss": float(mean(metrics["loss"])),
        "parts": {name: float(mean(array)) for name, array in sorted(metrics["parts"].items())},
        "lr": float(hypers["lr"][-1]),
        "grad_norm": float(mean(metrics["grad_norm"])),
        "grad_norms": dict(zip(names, map(float, mean(metrics["param_grad_norm"])), strict=True)),
    }


def _shown(record: dict[str, Any]) -> dict[str, float]:
    values = {"loss": record["loss"]}
    if record.get("validation"):
        values["validation"] = record["validation"]["loss"]
    return values


def _health(norms: np.ndarray, params: Mapping[str, np.ndarray], unreached: set[str]) -> dict[str, str]:
    """Verdict on each parameter's gradient at the last step (none, zero, tiny, huge, non-finite, ok), from its norm."""
    verdicts = {}
    for name, norm in zip(sorted(params), map(float, norms), strict=True):
        size = float(np.linalg.norm(params[name].astype(np.float64)))
        verdicts[name] = judge(norm, norm, int(not math.isfinite(norm)), size, name not in unreached).verdict
    return verdicts


def _crash(
    backend: Backend,
    stage: str,
    ahead: Ahead,
    good: Checkpoint,
    restore: Callable[[Checkpoint], tuple[Any, Position]],
    per_call: int,
    crash_step: int,
    config: Config,
    run: Run,
    params: Mapping[str, np.ndarray],
    trainable: tuple[str, ...],
) -> None:
    """Bring back the state before the failing step, leave it with its batch and noise as a bundle, and stop."""
    state, position = restore(good)
    settings = stage_settings(config, stage)
    while position.step < crash_step:
        stop = min(next_stop(settings, position.step, per_call), crash_step)
        made = ahead.take(position.step, stop, position.attempt)
        state, _ = backend.run(stage, state, *made, _hypers(config, stage, position, stop), config)
        position.step = stop
    exported = backend.export(state)
    everything = {**params, **exported["params"]}
    batch, noise = ahead.look(crash_step, position.attempt)
    hyper = {
        "lr": learning_rate(settings, crash_step) * position.lr_scale,
        "beta": kl_weight(config, stage, crash_step),
    }
    quantity, where = locate(backend, stage, everything, trainable, batch, noise, hyper, exported["carry"], config)
    folder = run.path / "crash"
    folder.mkdir(exist_ok=True)
    checkpoint = Checkpoint.from_export(stage, crash_step, exported, {})
    frozen = {f"frozen/{name}": value for name, value in params.items() if name not in trainable}
    save_arrays(folder / "state.safetensors", {**checkpoint.arrays, **frozen})
    save_arrays(folder / "batch.safetensors", batch)
    save_arrays(folder / "noise.safetensors", noise)
    write_atomic(folder / "config.toml", config.to_toml())
    facts = {
        "stage": stage,
        "step": crash_step,
        "hyper": hyper,
        "quantity": quantity,
        "first_non_finite": where,
        "trainable": list(trainable),
        "count": int(exported["count"]),
        "backend": backend.describe(),
    }
    write_atomic(folder / "crash.json", json.dumps(facts, indent=1, sort_keys=True) + "\n")
    message = (
        f"stage {stage}, step {crash_step}: {quantity} is not finite, first seen in {where}; training had returned to a"
        f" checkpoint {MAX_RETURNS} times before. Look at it with: pf replay {folder}"
    )
    run.log(message)
    raise TrainingError(message)


def locate(
    backend: Backend,
    stage: str,
    params: Mapping[str, np.ndarray],
    trainable: tuple[str, ...],
    batch: Arrays,
    noise: Arrays,
    hyper: Mapping[str, float],
    carry: Arrays,
    config: Config,
) -> tuple[str, str]:
    """Which quantity of a step is not finite ("loss", "gradient" or "update") and where that is first seen."""
    for micro in range(len(next(iter(batch.values())))):
        inputs = ({k: v[micro] for k, v in batch.items()}, {k: v[micro] for k, v in noise.items()})
        loss, grads = backend.gradients(stage, params, trainable, *inputs, hyper, carry, config)
        finite = all(grad is None or np.isfinite(grad).all() for grad in grads.values())
        if not (math.isfinite(loss) and finite):
            where = backend.diagnose(stage, params, trainable, *inputs, hyper, carry, config)
            return ("loss" if not math.isfinite(loss) else "gradient"), where or "the sum of its parts"
    return "update", "Adam's moments or the new parameters"
