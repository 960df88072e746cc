"""Batches on their way to the device: what the thread that makes them does while the steps before them run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import sparse

import pf_jax
import pf_torch
from pf_bench.case import Absent, Case, Context, Side
from pf_bench.frameworks import jax_put, torch_put
from pf_bench.problems import vae_problem
from pf_core.sparse_counts import SparseCounts, stack

__all__ = ["cases"]

STEPS = 16  # whose batches are sent in one call


def cases(context: Context) -> list[Case]:
    """The suite."""
    if context.quick:
        return [sending(context, 13, 17)]
    return [sending(context, 512, n_genes) for n_genes in (500, 2000, 8000)]


def sending(context: Context, n_cells: int, n_genes: int) -> Case:
    """The counts of a call's batches from CSR rows to dense arrays on the device."""

    def build() -> dict[str, Side | Absent]:
        dense = vae_problem(n_cells, n_genes, 1)[0]["counts"]
        rows = sparse.csr_matrix(dense)

        def side(framework: Any, send: Callable[[], Any], note: str = "") -> Side:
            call = lambda: framework.synchronize(send())
            return Side(call, lambda: {"counts": framework.to_numpy(call())}, STEPS, note)

        def twin(framework: Any, **chosen: bool) -> Side:
            backend = framework.Backend(device=context.device)
            vars(backend).update(chosen)
            one = {"counts": SparseCounts(dense.shape, (rows,))}
            send = lambda: backend.send(stack([stack([one])] * STEPS))["counts"]
            return side(framework, send, "made dense by the processor" if chosen else "")

        def plain(framework: Any, put: Callable[[Any, str], Any]) -> Side:
            send = lambda: put(np.stack([np.stack([rows.toarray()]) for _ in range(STEPS)]), context.device)
            return side(framework, send, "every batch is made dense, stacked, stacked again and copied")

        sides: dict[str, Side | Absent] = {"jax": twin(pf_jax), "torch": twin(pf_torch)}
        if context.device != "cpu":
            sides |= {"jax, dense": twin(pf_jax, scatters=False), "torch, dense": twin(pf_torch, scatters=False)}
        return sides | {"plain jax": plain(pf_jax, jax_put), "plain torch": plain(pf_torch, torch_put)}

    sizes = {"cells": n_cells, "genes": n_genes}
    return Case("counts on their way to the device", sizes, build, 0.0, series="genes", bytes=4.0 * n_cells * n_genes)
