"""The negative-binomial likelihood, value and gradient in mean and dispersion; making the count table counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import sparse

import pf_jax
import pf_torch
from pf_bench.case import Absent, Case, Context, Side, Target
from pf_bench.frameworks import jax_grad, jax_put, names, torch_grad, torch_put, torch_side
from pf_bench.problems import SEED, counts
from pf_core.count_table import count_table, tail_sizes
from pf_core.noise import generator

__all__ = ["cases"]


def cases(context: Context) -> list[Case]:
    """The suite."""
    if context.quick:
        return [likelihood(context, 7, 11, ""), likelihood(context, 13, 11, "cells")]
    cells = [likelihood(context, n, 2000, "cells") for n in (128, 512, 2048)]
    return cells + [likelihood(context, 512, n, "genes") for n in (500, 5000, 10000)]


def _mean(log_prob: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda x, mu, r: log_prob(x, mu, r, **options).mean()


NOTE = "by the count table, which every call makes of CSR rows, as the data loader does"


def jax_table(x: np.ndarray, mu: np.ndarray, r: np.ndarray, device: str) -> Side:
    """Mean log probability by the count table and its gradient, in the JAX twin."""
    import jax

    make = _maker(x)
    counts, mean, dispersion = jax_put((x, mu, r), device)

    @jax.jit
    def both(counts: Any, mean: Any, dispersion: Any, made: Any) -> Any:
        total = lambda mu, r: pf_jax.nb_log_prob_sum(counts, mu, r, method="table", **made) / len(x)
        value, grads = jax.value_and_grad(total, (0, 1))(mean, dispersion)
        return (value, *grads)

    call = lambda: jax.block_until_ready(both(counts, mean, dispersion, jax_put(make(), device)))
    return Side(call, lambda: names(call()), note=NOTE)


def torch_table(x: np.ndarray, mu: np.ndarray, r: np.ndarray, device: str) -> Side:
    """Mean log probability by the count table and its gradient, in the PyTorch twin."""
    import torch

    make = _maker(x)
    counts, mean, dispersion = torch_put([x, mu, r], device)
    leaves = [mean.requires_grad_(), dispersion.requires_grad_()]

    def call() -> Any:
        made = torch_put(make(), device)
        value = pf_torch.nb_log_prob_sum(counts, *leaves, method="table", **made) / len(x)
        return (value, *torch.autograd.grad(value, leaves))

    return torch_side(call, device=device, note=NOTE)


LEAST = "log(mu + r) and the two quotients of the gradient, and no log-gamma: a floor, not a likelihood"


def jax_least(x: np.ndarray, mu: np.ndarray, r: np.ndarray, device: str) -> Side:
    """What value and gradient take of every entry, however the log-gammas are had."""
    import jax
    import jax.numpy as jnp

    arrays = jax_put((x, mu, r), device)

    @jax.jit
    def least(x: Any, mu: Any, r: Any) -> Any:
        total, quotient = jnp.log(mu + r), (x + r) / (mu + r)
        return ((x + r) * total).sum(), x / mu - quotient, (total + quotient).sum(0)

    return Side(lambda: jax.block_until_ready(least(*arrays)), None, note=LEAST)


def table_alone(x: np.ndarray) -> Side:
    """Making the count table of CSR rows, on the host."""
    return Side(_maker(x), None, note="the count table alone, made of CSR rows on the host")


def _maker(x: np.ndarray) -> Callable[[], dict[str, np.ndarray]]:
    """What makes the table of these counts anew."""
    rows: Any = sparse.csr_matrix(x)
    weight, n_tail = np.ones(len(x), np.float32), int(tail_sizes(rows).sum())
    return lambda: count_table(rows, weight, n_tail)


def likelihood(context: Context, n_cells: int, n_genes: int, series: str) -> Case:
    """Mean log probability of cells and its gradient in mu (cells, genes) and r (genes,)."""

    def build() -> dict[str, Side | Absent]:
        x = counts(n_cells, n_genes)
        rng = generator(SEED, "bench.likelihood", n_genes)
        mu = (x.mean(0) + 0.01) * rng.lognormal(0.0, 0.5, x.shape)
        r = rng.lognormal(0.0, 1.0, n_genes)
        arrays = x, mu.astype(np.float32), r.astype(np.float32)
        given = {"of": (1, 2), "device": context.device}
        return {
            "jax": jax_table(*arrays, context.device),
            "torch": torch_table(*arrays, context.device),
            "jax, without table": jax_grad(_mean(pf_jax.nb_log_prob), *arrays, **given),
            "torch, without table": torch_grad(_mean(pf_torch.nb_log_prob), *arrays, **given),
            "plain jax": jax_grad(_mean(pf_jax.nb_log_prob, method="plain"), *arrays, **given),
            "plain torch": torch_grad(_mean(pf_torch.nb_log_prob, method="plain"), *arrays, **given),
            "jax, least": jax_least(*arrays, context.device),
            "the table": table_alone(x),
        }

    targets: tuple[Target, ...] = ()
    if (n_cells, n_genes) == (512, 2000) and context.device == "cpu":
        targets = Target("faster", 4.5, "plain jax"), Target("faster", 3.5, "plain torch")
    sizes = {"cells": n_cells, "genes": n_genes}
    return Case("NB likelihood, value and gradient", sizes, build, 1e-3, targets, n_cells in (7, 512), series)
