"""Training steps of every stage: many in one call, one in one call, eager, compiled, and their ceilings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from scipy import sparse

import pf_jax.steps
import pf_torch.steps
from pf_bench import peers, plain
from pf_bench.case import Absent, Case, Context, Side, Target
from pf_bench.distances import jax_group_gemm
from pf_bench.frameworks import jax_put, torch_put
from pf_bench.problems import (
    SEED,
    configuration,
    hypers,
    operator_problem,
    parameters,
    repeat,
    trainable,
    vae_problem,
)
from pf_core.config import Config
from pf_core.count_table import count_table, tail_sizes
from pf_core.noise import normal

__all__ = ["cases"]

STEPS = 16  # in one call of a compiled loop
Problem = tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]


def cases(context: Context) -> list[Case]:
    """The suite."""
    if context.quick:
        return [
            vae(context, 13, 17, 7, 3, ""),
            operator(context, 3, 5, 3, "conditions"),
            joint(context, 2, 5, 11, 7, 3),
            overhead(context, 4),
        ]
    if context.device == "gpu":
        found = [vae(context, n, 2000, 512, 32, "cells") for n in (512, 2048, 8192, 16384)]
        found += [vae(context, 2048, n, 512, 32, "genes") for n in (5000, 10000, 20000)]
    else:
        found = [vae(context, n, 2000, 512, 32, "cells") for n in (128, 512, 2048)]
        found += [vae(context, 512, n, 512, 32, "genes") for n in (500, 8000)]
        found += [vae(context, 1024, 5000, 512, 32, "")]
    found += [operator(context, n, 128, 32, "conditions") for n in (8, 32, 128)]
    return found + [joint(context, 16, 64, 2000, 256, 32), overhead(context, 64)]


# --- the twins ----------------------------------------------------------------------------------------------------

TABLES = "a call makes the count tables of its steps of CSR rows, as the data loader does"


def _tables(batch: dict[str, np.ndarray], *lead: int) -> Callable[[], dict[str, np.ndarray]]:
    """What makes the count tables of a batch that has counts of cells, one for each of the leading axes' steps."""
    prefix = next((prefix for prefix in ("", "cells_") if f"{prefix}counts" in batch), None)
    if prefix is None:
        return dict
    rows: Any = sparse.csr_matrix(batch[f"{prefix}counts"])
    weight, n_tail = batch[f"{prefix}weight"], int(tail_sizes(rows).sum())

    def make() -> dict[str, np.ndarray]:
        made = [count_table(rows, weight, n_tail) for _ in range(math.prod(lead))]
        stacked = {name: np.stack([one[name] for one in made]) for name in made[0]}
        return {prefix + name: value.reshape(*lead, *value.shape[1:]) for name, value in stacked.items()}

    return make


def jax_steps(
    stage: str, params: Any, problem: Problem, config: Config, steps: int, device: str, *, tables: bool = True
) -> Side:
    """`steps` steps of the JAX twin in one call; with 0, one step by its own function."""
    import jax

    batch, noise, carry = problem
    count = max(steps, 1)
    lead = (count, 1) if steps else (1,)
    data = jax_put((repeat(batch, *lead), repeat(noise, *lead), hypers(config, stage, count)), device)
    make = _tables(batch, *lead) if tables else dict
    single = {"vae": pf_jax.vae_step, "operator": pf_jax.operator_step, "joint": pf_jax.joint_step}[stage]
    hyper = {name: value[0] for name, value in data[2].items()}

    def fresh() -> Any:
        state = pf_jax.steps.init_state(params, trainable=trainable(stage, params), carry=carry)
        return jax.device_put(state, jax.devices(device)[0])

    def run(state: Any) -> tuple[Any, Any]:
        batches = data[0] | jax_put(make(), device)
        if steps:
            return pf_jax.run_steps(stage, state, batches, *data[1:], config=config)  # type: ignore[arg-type]
        return single(state, batches, data[1], hyper, config=config)

    return _stateful(fresh, run, jax.block_until_ready, count, TABLES if make() else "")


def torch_steps(
    stage: str,
    params: Any,
    problem: Problem,
    config: Config,
    steps: int,
    device: str,
    *,
    compile: bool = False,
    tables: bool = True,
) -> Side:
    """`steps` steps of the PyTorch twin."""
    batch, noise, carry = problem
    data = torch_put((repeat(batch, steps, 1), repeat(noise, steps, 1), hypers(config, stage, steps)), device)
    make = _tables(batch, steps, 1) if tables else dict
    place = "cuda" if device == "gpu" else device

    def fresh() -> Any:
        names = trainable(stage, params)
        return pf_torch.steps.init_state(params, trainable=names, carry=carry, device=place)

    def run(state: Any) -> tuple[Any, Any]:
        batches = data[0] | torch_put(make(), device)
        return pf_torch.run_steps(stage, state, batches, *data[1:], config=config, compile=compile)

    return _stateful(fresh, run, lambda result: _finished(result, device), steps, TABLES if make() else "")


def _finished(result: Any, device: str) -> Any:
    if device == "gpu":
        import torch

        torch.cuda.synchronize()
    return result


def _stateful(fresh: Callable, run: Callable, wait: Callable, steps: int, note: str = "") -> Side:
    """A side whose state goes on from call to call; its output is loss and gradient norm of the first steps."""
    held: list[Any] = []

    def call() -> None:
        state, _ = wait(run(held.pop() if held else fresh()))  # the state that goes in is used up
        held.append(state)

    def output() -> dict[str, np.ndarray]:
        state, losses, norms = fresh(), [], []
        for _ in range(STEPS // steps if steps < STEPS else 1):
            state, metrics = wait(run(state))
            losses.append(np.atleast_1d(_numpy(metrics["loss"])))
            norms.append(np.atleast_1d(_numpy(metrics["grad_norm"])))
        return {"loss": np.concatenate(losses)[:STEPS], "gradient norm": np.concatenate(norms)[:STEPS]}

    return Side(call, output, steps, note)


def _numpy(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def plain_steps(make: Callable[[], Callable], device: str) -> Side:
    """A plain step, which trains its own parameters in place."""
    held: list[Callable] = []

    def call() -> None:
        if not held:
            held.append(make())
        _finished(held[0](), device)

    def output() -> dict[str, np.ndarray]:
        step = make()
        found = [step() for _ in range(STEPS)]
        losses, norms = zip(*found, strict=True)
        return {"loss": np.stack([_numpy(v) for v in losses]), "gradient norm": np.stack([_numpy(v) for v in norms])}

    return Side(call, output)


def twins(stage: str, params: Any, problem: Problem, config: Config, context: Context) -> dict[str, Side | Absent]:
    """Both twins in every form they have."""
    device = context.device
    sides: dict[str, Side | Absent] = {
        "jax": jax_steps(stage, params, problem, config, STEPS, device),
        "jax, one step a call": jax_steps(stage, params, problem, config, 0, device),
        "torch": torch_steps(stage, params, problem, config, 1, device),
    }
    if context.quick:
        sides["torch compiled"] = Absent("torch.compile is left out of --quick")
    else:
        sides["torch compiled"] = torch_steps(stage, params, problem, config, 1, device, compile=True)
    return sides


# --- cases --------------------------------------------------------------------------------------------------------


def vae(context: Context, n_cells: int, n_genes: int, n_hidden: int, n_latent: int, series: str) -> Case:
    """A step of the NB-VAE."""
    device = context.device

    def build() -> dict[str, Side | Absent]:
        config = configuration(n_hidden, n_latent)
        params = {name: value for name, value in parameters(config, n_genes).items() if name.startswith("vae.")}
        batch, noise = vae_problem(n_cells, n_genes, n_latent)
        sides = twins("vae", params, (batch, noise, {}), config, context)

        def make(compile: bool) -> Callable:
            weights, data, eps = torch_put((params, batch, noise), device)
            return plain.torch_vae_step(weights, data, eps, config, compile=compile)

        sides["plain torch"] = plain_steps(lambda: make(False), device)
        sides["plain torch compiled"] = (
            Absent("torch.compile is left out of --quick") if context.quick else plain_steps(lambda: make(True), device)
        )
        if context.peers:
            sides["SCVI"] = peers.scvi_step(batch, n_hidden, n_latent, device=device)
        sides["jax, least"] = jax_least(batch["counts"], n_hidden, device)
        sides["jax GEMM"] = jax_gemm(n_cells, n_genes, n_hidden, device)
        sides["torch GEMM"] = torch_gemm(n_cells, n_genes, n_hidden, device)
        return sides

    targets: tuple[Target, ...] = ()
    if device == "cpu" and (n_cells, n_genes) in ((512, 2000), (1024, 5000)):
        factors = {"plain torch": 2.1, "plain torch compiled": 1.6, "SCVI": 2.5}
        targets = (
            *(Target("faster", factor, side) for side, factor in factors.items()),
            Target("within", 1.25, "jax GEMM"),
        )
    sizes = {"cells": n_cells, "genes": n_genes, "hidden": n_hidden, "latent": n_latent}
    return Case(
        "NB-VAE training step",
        sizes,
        build,
        1e-3,
        targets,
        memory=(n_cells, n_genes) == (512, 2000),
        series=series,
        flop=10.0 * n_cells * n_genes * n_hidden,
    )


def operator(context: Context, n_conditions: int, n_cells: int, d: int, series: str) -> Case:
    """A step of the operators on latents."""
    device = context.device

    def build() -> dict[str, Side | Absent]:
        config = configuration(8, d, n_conditions=n_conditions, n_cells=n_cells)
        params = parameters(config, 5, n_conditions + 1)
        params = {name: value for name, value in params.items() if not name.startswith("vae.")}
        problem = operator_problem(n_conditions, n_cells, d)
        sides = twins("operator", params, problem, config, context)

        def make() -> Callable:
            weights, data, carry = torch_put((params, problem[0], problem[2]), device)
            return plain.torch_operator_step(weights, data, carry, config)

        sides["plain torch"] = plain_steps(make, device)
        sides["jax GEMM"] = jax_group_gemm(problem[0]["x"], problem[0]["y"], device, calls=STEPS)
        return sides

    wanted = device == "cpu" and (n_conditions, n_cells, d) == (32, 128, 32)
    targets = (Target("faster", 8.0, "plain torch"),) if wanted else ()
    sizes = {"conditions": n_conditions, "cells": n_cells, "d": d}
    return Case("operator training step", sizes, build, 5e-3, targets, series=series)


def joint(context: Context, n_conditions: int, n_cells: int, n_genes: int, n_hidden: int, n_latent: int) -> Case:
    """A step of the joint fine-tuning on counts."""

    def build() -> dict[str, Side | Absent]:
        config = configuration(n_hidden, n_latent, n_conditions=n_conditions, n_cells=n_cells)
        params = parameters(config, n_genes, n_conditions + 1)
        batch, noise, carry = operator_problem(n_conditions, n_cells, n_latent, n_genes)
        cells, eps = vae_problem(4 * n_cells, n_genes, n_latent)
        batch |= {f"cells_{name}": value for name, value in cells.items()}
        return twins("joint", params, (batch, noise | eps, carry), config, context)

    sizes = {"conditions": n_conditions, "cells": n_cells, "genes": n_genes}
    return Case("joint training step", sizes, build, 1e-3, series="")


def overhead(context: Context, steps: int) -> Case:
    """A model so small that what is left is the way to the device: 64 steps in one call."""

    def build() -> dict[str, Side | Absent]:
        config = configuration(8, 4)
        params = {name: value for name, value in parameters(config, 16).items() if name.startswith("vae.")}
        batch, noise = vae_problem(8, 16, 4)
        problem = batch, noise, {}
        # Without the loader's count table: what is measured is the way to the device.
        jax = partial(jax_steps, "vae", params, problem, config, device=context.device, tables=False)
        note = f"a call with a single step, its time spread over {steps}: what a call costs itself, Python included"
        return {
            "jax": jax(steps=steps),
            "jax, a call": replace(jax(steps=1), output=None, steps=steps, note=note),
            "jax, one step a call": jax(steps=0),
            "torch": torch_steps("vae", params, problem, config, steps, context.device, tables=False),
        }

    targets = (Target("seconds", 20e-6, "jax, a call"),) if steps == 64 and context.device == "cpu" else ()
    return Case("step of a tiny model", {"steps a call": steps}, build, 1e-3, targets)


# --- ceilings -----------------------------------------------------------------------------------------------------


def _matrices(n_cells: int, n_genes: int, n_hidden: int) -> list[np.ndarray]:
    shapes = (n_cells, n_genes), (n_genes, n_hidden), (n_cells, n_hidden), (n_hidden, n_genes)
    return [normal(SEED, f"bench.gemm.{k}", n_cells, shape) for k, shape in enumerate(shapes)]


NOTE = "the large matrix products of a step alone: a ceiling, not a step"


def _products(matmul: Callable[[Any, Any], Any], transpose: Callable[[Any], Any]) -> Callable[..., tuple[Any, ...]]:
    """The five large products of a step: two forward, three backward (the counts have no gradient)."""

    def run(x: Any, first: Any, h: Any, last: Any) -> tuple[Any, ...]:
        hidden, out = matmul(x, first), matmul(h, last)
        return hidden, matmul(transpose(x), h), matmul(out, transpose(last)), matmul(transpose(h), out)

    return run


def jax_gemm(n_cells: int, n_genes: int, n_hidden: int, device: str) -> Side:
    """The products of a step by XLA."""
    import jax

    from pf_jax.layers import matmul

    arrays = jax_put(_matrices(n_cells, n_genes, n_hidden), device)
    compiled = jax.jit(_products(matmul, lambda a: a.T))
    return Side(lambda: jax.block_until_ready(compiled(*arrays)), None, note=NOTE)


LEAST = "products, log1p, softmax, a log and two quotients of every entry, Adam of two matrices: a floor, not a step"


def jax_least(x: np.ndarray, n_hidden: int, device: str) -> Side:
    """What a step takes at least: the passes that no way of writing it avoids, many steps in one call.

    There is one hidden layer and no latent between, and neither bias, table, clip, guard nor metrics.
    """
    import jax
    import jax.numpy as jnp

    from pf_jax.layers import matmul

    n_cells, n_genes = x.shape
    shapes = (n_genes, n_hidden), (n_hidden, n_genes)
    weights = [0.01 * normal(SEED, f"bench.least.{k}", n_hidden, shape) for k, shape in enumerate(shapes)]
    batches, library = jax_put((repeat({"x": x}, STEPS)["x"], x.sum(1, keepdims=True) + 1.0), device)

    def step(state: Any, x: Any) -> tuple[Any, Any]:
        (first, last), *_ = state
        inputs = jnp.log1p(x)
        h = jnp.maximum(matmul(inputs, first), 0.0)
        share = jax.nn.softmax(matmul(h, last))
        mu = library * share
        by_mu = x / mu - (x + 1.0) / (mu + 1.0)
        loss = ((x + 1.0) * jnp.log(mu + 1.0)).sum()
        out = (mu * by_mu - share * (mu * by_mu).sum(1, keepdims=True)) / n_cells
        inner = jnp.where(h > 0.0, matmul(out, last.T), 0.0)
        grads = matmul(inputs.T, inner), matmul(h.T, out)

        def adam(p: Any, m: Any, v: Any, g: Any) -> tuple[Any, Any, Any]:
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            return p - 1e-4 * m / (jnp.sqrt(v) + 1e-8), m, v

        updated = [adam(*each) for each in zip(*state, grads, strict=True)]
        return tuple(zip(*updated, strict=True)), loss

    run = jax.jit(lambda state: jax.lax.scan(step, state, batches), donate_argnums=0)
    held = [tuple(tuple(f(w) for w in jax_put(weights, device)) for f in (jnp.array, jnp.zeros_like, jnp.zeros_like))]

    def call() -> None:
        held.append(jax.block_until_ready(run(held.pop()))[0])

    return Side(call, None, STEPS, LEAST)


def torch_gemm(n_cells: int, n_genes: int, n_hidden: int, device: str) -> Side:
    """The products of a step by PyTorch."""
    import torch

    arrays = torch_put(_matrices(n_cells, n_genes, n_hidden), device)
    products = _products(torch.matmul, lambda a: a.T)
    return Side(lambda: _finished(products(*arrays), device), None, note=NOTE)
