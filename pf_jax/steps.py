"""Losses and training steps (docs/math.md 8), pure functions compiled once per shape.

A step is loss, gradient, clip, AdamW and a guard; `run_steps` fuses many of them into one call. Noise, learning rate
and beta are arguments. Everything about a parameter is keyed by its canonical name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from pf_core.config import ADAM_B1, ADAM_B2, ADAM_EPS, CLIP_EPS, NORMALISED_TOTAL, Config, StageConfig
from pf_core.initial import select
from pf_jax.conditions import ConditionEncoder
from pf_jax.distances import energy_distance_grouped
from pf_jax.flow_steps import cvae_loss, discriminator_loss, flow_loss, players_loss
from pf_jax.layers import dense_precision
from pf_jax.likelihood import elbo_loss
from pf_jax.operators import OperatorFamily, apply_operator, identity_penalty
from pf_jax.probe import record
from pf_jax.spectral import spectral_norm, spectral_penalty
from pf_jax.vae import NBVAE

__all__ = [
    "TrainState",
    "adam_update",
    "clip_by_global_norm",
    "evaluate",
    "init_state",
    "joint_loss",
    "joint_step",
    "operator_loss",
    "operator_step",
    "run_steps",
    "vae_loss",
    "vae_step",
]

Arrays = dict[str, jax.Array]
_LARGE = 1 << 16  # elements; smaller arrays are updated together, as one vector
_RIVAL = "discriminator."  # how names of the first player of stage "cvae" begin; the second player is ""
Stage = Literal["vae", "operator", "joint", "cvae", "flow"]


class TrainState(NamedTuple):
    """Everything a step reads and writes, keyed by canonical names.

    params are the trained parameters and frozen the others; m and v are Adam's moments, shaped as params, and count its
    updates so far; carry holds the vectors of the power iteration: {"v": (n_slots, n_latent)},
    {"v_bases": (n_tissues + n_bases, n_latent)} or {}; in stage "cvae" the running statistics by canonical name.
    """

    params: Arrays
    frozen: Arrays
    m: Arrays
    v: Arrays
    count: jax.Array
    carry: Arrays


def init_state(
    params: Mapping[str, Any],
    *,
    trainable: Any,
    m: Mapping[str, Any] | None = None,
    v: Mapping[str, Any] | None = None,
    count: int = 0,
    carry: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> TrainState:
    """The state of a run, from canonical parameters. Everything is copied.

    Args:
        params: all parameters by canonical name.
        trainable: names of those that are trained; the others are frozen.
        m: first moments by name; None for zeros.
        v: second moments by name; None for zeros.
        count: updates done so far.
        carry: what passes from step to step, see `TrainState`; None for none.
        dtype: "float32" or "float64", of every array.

    Returns:
        TrainState.

    Raises:
        ValueError: a trainable name that is not a parameter, moments of other names or shapes, or float64 in a
            process where JAX has 64-bit numbers off.
    """
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        raise ValueError(f"dtype is {dtype} but 64-bit numbers are off; use Backend(dtype='float64') or jax_enable_x64")
    trainable = sorted(trainable)
    unknown = [name for name in trainable if name not in params]
    if unknown:
        raise ValueError(f"trainable names {unknown} are not parameters; known: {sorted(params)}")

    def own(value: Any) -> jax.Array:
        # A copy always: run_steps donates its state, which must not take the caller's arrays with it.
        return jnp.array(value, dtype=dtype, copy=True)

    trained = {name: own(params[name]) for name in trainable}

    def moments(given: Mapping[str, Any] | None, label: str) -> Arrays:
        if given is None:
            return {name: jnp.zeros_like(value) for name, value in trained.items()}
        shapes = {name: tuple(jnp.shape(value)) for name, value in given.items()}
        wanted = {name: value.shape for name, value in trained.items()}
        if shapes != wanted:
            different = sorted(name for name in shapes.keys() | wanted if shapes.get(name) != wanted.get(name))
            raise ValueError(f"moments {label} differ from the trainable parameters in name or shape: {different}")
        return {name: own(given[name]) for name in trainable}

    return TrainState(
        params=trained,
        frozen={name: own(value) for name, value in sorted(params.items()) if name not in trained},
        m=moments(m, "m"),
        v=moments(v, "v"),
        count=jnp.array(count, jnp.int32),
        carry={name: own(value) for name, value in sorted((carry or {}).items())},
    )


# --- optimiser ---------------------------------------------------------------------------------------------------


def adam_update(
    params: Arrays,
    grads: Arrays,
    m: Arrays,
    v: Arrays,
    count: jax.Array,
    *,
    lr: float | jax.Array,
    weight_decay: float = 0.0,
) -> tuple[Arrays, Arrays, Arrays, jax.Array]:
    """One step of AdamW: Adam with bias correction, eps outside the root, and decoupled weight decay.

    The corrections 1 - b^(count + 1) are exact to rounding. Not meant to be differentiated. Source: Kingma & Ba 2015,
    arXiv:1412.6980; Loshchilov & Hutter 2019, arXiv:1711.05101.

    Args:
        params: parameters by name.
        grads: gradients by name.
        m: first moments by name.
        v: second moments by name.
        count: () updates done so far.
        lr: learning rate.
        weight_decay: every parameter p also loses lr * weight_decay * p.

    Returns:
        params, m, v and count after the step.
    """
    count = jnp.asarray(count) + 1

    def update(p, g, m, v):
        m = ADAM_B1 * m + (1.0 - ADAM_B1) * g
        v = ADAM_B2 * v + (1.0 - ADAM_B2) * (g * g)
        steps = count.astype(p.dtype)
        # 1 - b^t by expm1: the power in float32 is 6e-6 off on the first step.
        correct_m, correct_v = -jnp.expm1(steps * math.log(ADAM_B1)), -jnp.expm1(steps * math.log(ADAM_B2))
        rate = jnp.asarray(lr, p.dtype)
        step = (m / correct_m) / (jnp.sqrt(v / correct_v) + ADAM_EPS)
        return p - rate * step - rate * weight_decay * p, m, v

    updated = {name: update(params[name], grads[name], m[name], v[name]) for name in params}
    first, second, third = ({name: item[k] for name, item in updated.items()} for k in range(3))
    return first, second, third, count


def clip_by_global_norm(grads: Arrays, max_norm: float) -> tuple[Arrays, jax.Array]:
    """Scale all gradients by min(1, max_norm / (norm + CLIP_EPS)), norm over all of them together.

    Not meant to be differentiated.

    Args:
        grads: gradients by name.
        max_norm: largest Euclidean norm.

    Returns:
        the scaled gradients, and the norm () before.
    """
    norm = jnp.sqrt(sum((grads[name] ** 2).sum() for name in sorted(grads)))
    scale = jnp.minimum(1.0, max_norm / (norm + CLIP_EPS))
    return {name: grad * scale for name, grad in grads.items()}, norm


# --- losses ------------------------------------------------------------------------------------------------------


def vae_loss(
    params: Mapping[str, Any], batch: Arrays, noise: Arrays, *, config: Config, beta: float | jax.Array
) -> tuple[jax.Array, tuple[Arrays, Arrays]]:
    """Negative ELBO of the NB-VAE, the loss of stage "vae".

    Differentiated in the parameters below "vae."; the parts carry no gradient.

    Args:
        params: all canonical parameters.
        batch: counts (n_cells, n_genes), tissue (n_cells,), library (n_cells,), weight (n_cells,), 0 for padding; and,
            where they are, table and tail of `nb_log_prob_sum`.
        noise: eps (n_cells, n_latent).
        config: the run's configuration.
        beta: weight of the KL divergence.

    Returns:
        loss (), nats per cell, and (parts {"nll", "kl"}, carry {}).
    """
    vae = NBVAE(config.vae, select(params, "vae"))
    mu, r, z_mu, z_logvar = vae(batch["counts"], batch["tissue"], batch["library"], noise["eps"])
    table, tail = batch.get("table"), batch.get("tail")
    loss, parts = elbo_loss(
        batch["counts"], mu, r, z_mu, z_logvar, beta=beta, weight=batch["weight"], table=table, tail=tail
    )
    return loss, ({name: record(name, value) for name, value in parts.items()}, {})


def operator_loss(
    params: Mapping[str, Any], batch: Arrays, noise: Arrays, carry: Arrays, *, config: Config
) -> tuple[jax.Array, tuple[Arrays, Arrays]]:
    """Energy distance between moved controls and perturbed cells, with the spectral and identity penalties.

    Differentiated in the parameters below "conditions." and "operators.", and in x and y; the power iteration is under
    stop-gradient, and parts and carry have no gradient.

    Args:
        params: all canonical parameters.
        batch: perturbations, doses (n_conditions, n_members), tissue (n_conditions,), batch (n_conditions,
            n_batches), covariates (n_conditions, n_covariates), latents x (n_conditions, n, n_latent) of controls and
            y (n_conditions, m, n_latent) of perturbed cells with weights wx and wy, weight (n_conditions,) of the
            groups (0 for padding), slot (n_conditions,) row of carry["v"] (row 0 is for padding), and distinct
            (n_conditions,) 1 where a group's operator stands first in the batch, 0 where it stood before.
        noise: v0 (n_conditions, n_latent), the power iteration's start where nothing is carried.
        carry: {"v": (n_slots, n_latent)}, {"v_bases": (n_tissues + n_bases, n_latent)}, or {}.
        config: the run's configuration.

    Returns:
        loss () and (parts {"energy", "spectral", "shrinkage", "sigma_max"}, carry), the parts before their weights.
    """
    A, b = _operators(params, batch)
    image = record("operators.image", apply_operator(A, b, batch["x"]))
    return _operator_terms(params, batch, noise, carry, A, image, batch["y"], config)


def joint_loss(
    params: Mapping[str, Any],
    batch: Arrays,
    noise: Arrays,
    carry: Arrays,
    *,
    config: Config,
    beta: float | jax.Array,
) -> tuple[jax.Array, tuple[Arrays, Arrays]]:
    """The operator loss on live latents, the energy distance of decoded profiles, and the VAE's own loss.

    Differentiated in all parameters, through encoder, operators and decoder; parts and carry have no gradient.

    Args:
        params: all canonical parameters.
        batch: as for `operator_loss`, with counts x_counts (n_conditions, n, n_genes) and x_library (n_conditions, n)
            in the place of x, and y_counts and y_library in the place of y; and the batch of `vae_loss` with every
            name prefixed "cells_".
        noise: eps (n_cells, n_latent) and v0 (n_conditions, n_latent).
        carry: as for `operator_loss`.
        config: the run's configuration.
        beta: weight of the KL divergence.

    Returns:
        loss () and (parts {"energy", "gene_energy", "spectral", "shrinkage", "sigma_max", "nll", "kl"}, carry), the
        parts before their weights.
    """
    vae = NBVAE(config.vae, select(params, "vae"))
    x, y = (_grouped(vae.encode, batch[f"{side}_counts"], batch["tissue"])[0] for side in ("x", "y"))
    A, b = _operators(params, batch)
    image = record("operators.image", apply_operator(A, b, x))
    loss, (parts, carry) = _operator_terms(params, batch, noise, carry, A, image, y, config)
    moved, target = (_grouped(partial(_profile, vae), z, batch["tissue"]) for z in (image, y))
    gene_energy = record("gene_energy", _energy(moved, target, batch, config))
    cells = {name.removeprefix("cells_"): value for name, value in batch.items() if name.startswith("cells_")}
    elbo, (elbo_parts, _) = vae_loss(params, cells, noise, config=config, beta=beta)
    loss = loss + config.operator.gene_weight * gene_energy + config.operator.elbo_weight * elbo
    return loss, (parts | {"gene_energy": jax.lax.stop_gradient(gene_energy)} | elbo_parts, carry)


def _operators(params: Mapping[str, Any], batch: Arrays) -> tuple[jax.Array, jax.Array]:
    theta = ConditionEncoder(select(params, "conditions"))(
        batch["perturbations"], batch["doses"], batch["tissue"], batch["batch"], batch["covariates"]
    )
    return OperatorFamily(select(params, "operators")).operator(theta, batch["tissue"])


def _operator_terms(params, batch, noise, carry, A, image, y, config: Config):
    weight, operator = batch["weight"], config.operator
    energy = record("energy", _energy(image, y, batch, config))
    settings: dict[str, Any] = {"rho_max": operator.rho_max, "n_iter": operator.power_iterations}
    if operator.spectral_target == "bases":
        matrices = jnp.concatenate([params["operators.A0"], params["operators.B"]])
        mask = jnp.ones(matrices.shape[0], matrices.dtype)
        spectral, v = spectral_penalty(matrices, carry["v_bases"], **settings)
        carry = {"v_bases": v}
    else:
        # Each operator is bounded once: padding does not count, nor does a second group of the same operator.
        matrices, mask = A, (weight > 0).astype(A.dtype) * batch["distinct"]
        v0 = carry["v"][batch["slot"]] if operator.warm_start else noise["v0"]
        spectral, v = spectral_penalty(A, v0, weight=mask, **settings)
        if operator.warm_start:
            carry = {"v": carry["v"].at[batch["slot"]].set(v)}
    sigma = spectral_norm(matrices, v, n_iter=0)
    spectral, shrinkage = record("spectral", spectral), record("shrinkage", identity_penalty(A, weight))
    loss = energy + operator.spectral_weight * spectral + operator.shrinkage * shrinkage
    parts = {"energy": energy, "spectral": spectral, "shrinkage": shrinkage, "sigma_max": (mask * sigma).max()}
    return loss, (jax.lax.stop_gradient(parts), jax.lax.stop_gradient(carry))


def _energy(x, y, batch: Arrays, config: Config) -> jax.Array:
    weight = batch["weight"]
    energies = energy_distance_grouped(x, y, wx=batch["wx"], wy=batch["wy"], estimator=config.operator.estimator)
    return (weight * energies).sum() / weight.sum()


def _profile(vae: NBVAE, z: jax.Array, tissue: jax.Array) -> jax.Array:
    """Decoded log-normalised expression of a cell of any depth."""
    mu = vae.decode(z, tissue, jnp.ones(z.shape[0], z.dtype))
    return jnp.log1p(NORMALISED_TOTAL * mu if vae.config.scale == "library" else mu)


def _grouped(function: Callable, x: jax.Array, tissue: jax.Array) -> Any:
    """Apply a function of (cells, tissue) to (n_conditions, n, ...) cells."""
    n_conditions, n = x.shape[:2]
    result = function(x.reshape(n_conditions * n, *x.shape[2:]), jnp.repeat(tissue, n))
    return jax.tree.map(lambda value: value.reshape(n_conditions, n, *value.shape[1:]), result)


# --- steps -------------------------------------------------------------------------------------------------------


def stage_loss(stage: str, params, batch, noise, carry, beta, config: Config):
    """loss, (parts, carry) of one micro-batch of a stage, of "cvae" that of player 2; unused carry passes through."""
    if stage == "operator":
        return operator_loss(params, batch, noise, carry, config=config)
    if stage == "joint":
        return joint_loss(params, batch, noise, carry, config=config, beta=beta)
    if stage == "cvae":
        return cvae_loss(params, batch, noise, carry, config=config, beta=beta)
    if stage == "flow":
        loss, (parts, _) = flow_loss(params, batch, noise, config=config)
    else:
        loss, (parts, _) = vae_loss(params, batch, noise, config=config, beta=beta)
    return loss, (parts, carry)


def _player(name: str) -> str:
    return _RIVAL if name.startswith(_RIVAL) else ""


def _settings(stage: str, config: Config) -> StageConfig:
    return getattr(config, f"stage_{stage}")


def _pack(tree: Arrays) -> Arrays:
    """The small arrays as one vector per player, the large ones as they are."""
    # The time to compile and to dispatch grows with the number of arrays; copying the large ones would cost more.
    small: dict[str, list[jax.Array]] = {}
    for name in sorted(tree):
        if tree[name].size < _LARGE:
            small.setdefault(_player(name), []).append(tree[name].ravel())
    large = {name: value for name, value in tree.items() if value.size >= _LARGE}
    return large | {player: jnp.concatenate(parts) for player, parts in small.items()}


def _unpack(packed: Arrays, like: Arrays) -> Arrays:
    """The arrays of `_pack`, by name, with the shapes of like."""
    tree, starts = {}, {_RIVAL: 0, "": 0}
    for name in sorted(like):
        shape, size, player = like[name].shape, like[name].size, _player(name)
        if name in packed:
            tree[name] = packed[name]
            continue
        tree[name] = packed[player][starts[player] : starts[player] + size].reshape(shape)
        starts[player] += size
    return tree


class _Bounds(NamedTuple):
    """Upper bounds of the sizes of everything in params, m and v, each ()."""

    params: jax.Array
    m: jax.Array
    v: jax.Array


def _moving(state: TrainState) -> tuple[TrainState, _Bounds]:
    """What a step changes, packed."""
    state = state._replace(params=_pack(state.params), frozen={}, m=_pack(state.m), v=_pack(state.v))
    largest = lambda tree: jnp.stack([jnp.abs(leaf).max() for leaf in tree.values()]).max()
    return state, _Bounds(largest(state.params), largest(state.m), largest(state.v))


def _settled(moving: tuple[TrainState, _Bounds], like: TrainState) -> TrainState:
    """The state of `_moving`, with the names and the frozen parameters of like."""
    state, _ = moving
    params, m, v = (_unpack(tree, like.params) for tree in (state.params, state.m, state.v))
    return state._replace(params=params, frozen=like.frozen, m=m, v=v)


def _step(stage: str, moving: tuple[TrainState, _Bounds], like: TrainState, batch, noise, hyper, config: Config):
    """One step of what `_moving` returns; like gives names, shapes and frozen parameters."""
    before, bounds = moving
    dtype = next(iter(before.params.values())).dtype
    lr, beta = jnp.asarray(hyper["lr"], dtype), jnp.asarray(hyper["beta"], dtype)
    n_micro = jax.tree.leaves(batch)[0].shape[0]
    settings = _settings(stage, config)
    ok, new, parts, raw, values, norms = jnp.array(True), before, {}, {}, [], []
    for turn in (_RIVAL, "") if stage == "cvae" else (None,):
        trained = _unpack(new.params, like.params)
        own = {name: value for name, value in trained.items() if turn in (None, _player(name))}

        def loss(own, carry, micro_batch, micro_noise, turn=turn, trained=trained):
            params = like.frozen | trained | own
            if turn == _RIVAL:
                return discriminator_loss(params, micro_batch, micro_noise, carry, config=config)
            return stage_loss(stage, params, micro_batch, micro_noise, carry, beta, config)

        def accumulate(totals, micro, loss=loss, own=own):
            carry, sums = totals
            (value, (parts, carry)), grads = jax.value_and_grad(loss, has_aux=True)(own, carry, *micro)
            return (carry, jax.tree.map(jnp.add, sums, _pack(grads))), (value, parts)

        # A scan with one turn is unrolled by the compiler; one body serves any number of micro-batches.
        zeros = jax.tree.map(jnp.zeros_like, _pack(own))
        with dense_precision(config.precision):
            (carry, sums), reported = jax.lax.scan(accumulate, (new.carry, zeros), (batch, noise))
        value, found = jax.tree.map(lambda leaf: leaf.mean(0), reported)
        parts |= found
        values.append(value)
        ok &= _finite(value, *jax.tree.leaves(carry))
        if not own:  # a player without trained parameters reports, and changes nothing
            continue
        grads = {name: total / n_micro for name, total in sums.items()}
        _, norm = clip_by_global_norm(grads, settings.max_norm)
        old = [{name: tree[name] for name in grads} for tree in (new.params, new.m, new.v)]

        def update(old, grads):
            clipped, _ = clip_by_global_norm(grads, settings.max_norm)
            params, m, v = old
            return adam_update(params, clipped, m, v, before.count, lr=lr, weight_decay=settings.weight_decay)

        # The guard: a step that is not finite leaves no trace, not even in the count or what is carried. Looking at new
        # arrays keeps them from being written in place, which costs more than Adam; where bounds do not say that they
        # are finite, they are computed for the look alone.
        look = lambda old, grads, update=update: _finite(*jax.tree.leaves(update(old, grads)))
        bounds = _after_adam(bounds, norm, lr, settings)
        sure = jnp.isfinite(4.0 * (bounds.params + bounds.m + bounds.v))  # 4 for rounding
        ok &= jnp.isfinite(norm) & jax.lax.cond(sure, lambda *_: jnp.array(True), look, old, grads)
        params, m, v, count = update(old, grads)
        new = TrainState(new.params | params, {}, new.m | m, new.v | v, count, carry)
        raw |= _unpack(grads, own)
        norms.append(norm)

    each = jnp.sqrt(jnp.stack([(raw[name] ** 2).sum() for name in sorted(raw)]))
    metrics = {"loss": values[-1], "grad_norm": reduce(jnp.hypot, norms), "ok": ok, "parts": parts}
    kept, bounds = jax.tree.map(partial(jnp.where, ok), (new, bounds), moving)
    return (kept, bounds), metrics | {"param_grad_norm": each}


def _finite(*leaves: jax.Array) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def _after_adam(bounds: _Bounds, norm: jax.Array, lr: jax.Array, settings: StageConfig) -> _Bounds:
    """Bounds of Adam's results; that of the parameters grows fast, and every call begins with the sizes as they are."""
    m, v = jnp.maximum(bounds.m, norm), jnp.maximum(bounds.v, norm * norm)
    # The correction of the first step may make m ten times as large.
    step = 10.0 * m / ADAM_EPS + settings.weight_decay * bounds.params
    return _Bounds(bounds.params + lr * step, m, v)


@partial(jax.jit, static_argnames=("stage", "config"))
def one_step(stage: str, state: TrainState, batch, noise, hyper, config: Config):
    """One step of any stage; the steps by name say what it does."""
    moving, metrics = _step(stage, _moving(state), state, batch, noise, hyper, config)
    return _settled(moving, state), metrics


@partial(jax.jit, static_argnames=("stage", "config"), donate_argnames=("state",))
def _many_steps(stage: str, state: TrainState, batches, noises, hypers, config: Config):
    step = lambda moving, inputs: _step(stage, moving, state, *inputs, config=config)
    moving, metrics = jax.lax.scan(step, _moving(state), (batches, noises, hypers))
    return _settled(moving, state), metrics


@partial(jax.jit, static_argnames=("stage", "config"))
def _evaluate(stage: str, state: TrainState, batch, noise, beta, config: Config):
    params = state.frozen | state.params
    if stage == "cvae":
        loss, (parts, _) = players_loss(params, batch, noise, state.carry, config=config, beta=beta, train=False)
    else:
        loss, (parts, _) = stage_loss(stage, params, batch, noise, state.carry, beta, config)
    return parts | {"loss": loss}


def vae_step(state: TrainState, batch: Arrays, noise: Arrays, hyper: Arrays, *, config: Config):
    """One step of stage "vae": loss, gradient, clip, AdamW, guard.

    Not meant to be differentiated. When the loss, the gradient norm or anything new is not finite, the state is
    returned as it came and metrics["ok"] is False.

    Args:
        state: the run; it is not changed.
        batch: as for `vae_loss`, with a leading axis of micro-batches, over which gradients and losses are
            averaged.
        noise: the same.
        hyper: {"lr": (), "beta": ()}.
        config: the run's configuration; `stage_vae` holds max_norm and weight_decay.

    Returns:
        state, and metrics {"loss", "grad_norm", "ok", "parts", "param_grad_norm"}; the last holds the norms before
        clipping of the trained parameters, sorted by name.
    """
    return one_step("vae", state, batch, noise, hyper, config)


def operator_step(state: TrainState, batch: Arrays, noise: Arrays, hyper: Arrays, *, config: Config):
    """One step of stage "operator": loss, gradient, clip, AdamW, guard.

    Not meant to be differentiated. When the loss, the gradient norm or anything new is not finite, the state is
    returned as it came and metrics["ok"] is False.

    Args:
        state: the run; it is not changed.
        batch: as for `operator_loss`, with a leading axis of micro-batches, over which gradients and losses are
            averaged.
        noise: the same.
        hyper: {"lr": (), "beta": ()}.
        config: the run's configuration; `stage_operator` holds max_norm and weight_decay.

    Returns:
        state, and metrics {"loss", "grad_norm", "ok", "parts", "param_grad_norm"}; the last holds the norms before
        clipping of the trained parameters, sorted by name.
    """
    return one_step("operator", state, batch, noise, hyper, config)


def joint_step(state: TrainState, batch: Arrays, noise: Arrays, hyper: Arrays, *, config: Config):
    """One step of stage "joint": loss, gradient, clip, AdamW, guard.

    Not meant to be differentiated. When the loss, the gradient norm or anything new is not finite, the state is
    returned as it came and metrics["ok"] is False.

    Args:
        state: the run; it is not changed.
        batch: as for `joint_loss`, with a leading axis of micro-batches, over which gradients and losses are
            averaged.
        noise: the same.
        hyper: {"lr": (), "beta": ()}.
        config: the run's configuration; `stage_joint` holds max_norm and weight_decay.

    Returns:
        state, and metrics {"loss", "grad_norm", "ok", "parts", "param_grad_norm"}; the last holds the norms before
        clipping of the trained parameters, sorted by name.
    """
    return one_step("joint", state, batch, noise, hyper, config)


def run_steps(stage: Stage, state: TrainState, batches: Arrays, noises: Arrays, hypers: Arrays, *, config: Config):
    """Many steps of one stage in one call.

    Not meant to be differentiated. The state that is passed in is used up: in JAX its memory holds the result.

    Args:
        stage: a name of `pf_core.backends.STAGES`.
        state: the run.
        batches: as for the single step, with a leading axis of steps before that of the micro-batches.
        noises: the same.
        hypers: {"lr": (n_steps,), "beta": (n_steps,)}.
        config: the run's configuration.

    Returns:
        state, and the metrics of every step, stacked.

    Raises:
        ValueError: an unknown stage.
    """
    check_stage(stage)
    return _many_steps(stage, state, batches, noises, hypers, config)


def evaluate(
    stage: Stage, state: TrainState, batch: Arrays, noise: Arrays, *, config: Config, beta: float | jax.Array
) -> Arrays:
    """The loss of a stage and its parts, without an update.

    Nothing is differentiated.

    Args:
        stage: a name of `pf_core.backends.STAGES`.
        state: the run.
        batch: as for the stage's loss, without an axis of micro-batches.
        noise: the same.
        config: the run's configuration.
        beta: weight of the KL divergence.

    Returns:
        the parts and "loss", each ().

    Raises:
        ValueError: an unknown stage.
    """
    check_stage(stage)
    dtype = next(iter((state.params or state.frozen).values())).dtype
    return _evaluate(stage, state, batch, noise, jnp.asarray(beta, dtype), config)


def check_stage(stage: str) -> None:
    """Raise ValueError unless the stage is one of `pf_core.backends.STAGES`."""
    if stage not in get_args(Stage):
        raise ValueError(f"stage is {stage!r}; one of {', '.join(map(repr, get_args(Stage)))} was wanted")
