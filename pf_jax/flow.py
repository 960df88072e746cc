"""The vector field over latents and its flow-matching loss (docs/math.md 7)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pf_core.config import ATTENTION_EPS
from pf_core.initial import select
from pf_jax.layers import Linear, Matrix, leaky_relu, matmul
from pf_jax.probe import record

__all__ = ["GraphAttention", "VectorField", "flow_matching_loss", "gatv2"]

GRAPH = ("source", "target", "sign")


def gatv2(
    left: jax.Array,
    right: jax.Array,
    attention: jax.Array,
    source: jax.Array,
    target: jax.Array,
    edge: jax.Array,
) -> jax.Array:
    """Attention of every gene over the edges into it.

    An edge j -> i has the score a . leaky_relu(left_j + right_i + edge), per head. Differentiated in left, right,
    attention and edge; the largest score of a gene is taken off under stop-gradient. Source: Brody et al. 2022,
    arXiv:2105.14491.

    Args:
        left: (n_genes, n_heads, h) what a gene sends.
        right: (n_genes, n_heads, h) what it brings to the scores of the edges into it.
        attention: (n_heads, h) the vector a of each head.
        source: (n_edges,) index j of the gene that sends.
        target: (n_edges,) index i of the gene that receives.
        edge: (n_edges, n_heads, h) what the edge brings; self loops, where wanted, are among the edges.

    Returns:
        (n_genes, n_heads, h), the sum of left_j weighted by the softmax over the edges into i, with ATTENTION_EPS in
        its denominator; 0 for a gene without an edge.
    """
    n_genes = left.shape[0]
    sent = left[source]
    score = (attention * leaky_relu(sent + right[target] + edge)).sum(-1)
    largest = jax.ops.segment_max(jax.lax.stop_gradient(score), target, n_genes)
    share = jnp.exp(score - largest[target])
    total = jax.ops.segment_sum(share, target, n_genes) + ATTENTION_EPS
    return jax.ops.segment_sum((share / total[target])[..., None] * sent, target, n_genes)


class GraphAttention(nnx.Module):
    """A layer of signed graph attention over a gene regulatory network.

    Args:
        params: `source.weight` (n, n_heads * h), `target.weight` (n, n_heads * h) and `target.bias`, `edge.weight`
            (1, n_heads * h), `attention` (n_heads, h) and `bias` (n_heads * h,).
    """

    def __init__(self, params: Mapping[str, Any]):
        self.source = Matrix(select(params, "source"))
        self.target = Linear(select(params, "target"))
        self.edge = Matrix(select(params, "edge"))
        self.attention = nnx.Param(jnp.asarray(params["attention"]))
        self.bias = nnx.Param(jnp.asarray(params["bias"]))

    def __call__(self, x: jax.Array, source: jax.Array, target: jax.Array, sign: jax.Array) -> jax.Array:
        """What every gene gathers from its regulators and from itself.

        Differentiated in the parameters and x; the network is data. A self loop of sign 0 is added to every gene.

        Args:
            x: (n_genes, n) embeddings.
            source: (n_edges,) index of the regulator.
            target: (n_edges,) index of the regulated gene.
            sign: (n_edges,) of the regulation.

        Returns:
            (n_genes, n_heads * h), heads side by side.

        Raises:
            ValueError: source, target and sign of different lengths.
        """
        if not source.shape == target.shape == sign.shape or source.ndim != 1:
            shapes = source.shape, target.shape, sign.shape
            raise ValueError(f"source, target and sign have shapes {shapes}; (n_edges,) three times was wanted")
        attention = self.attention[...]
        heads = lambda values: values.reshape(-1, *attention.shape)
        loops = jnp.arange(x.shape[0], dtype=source.dtype)
        source, target = jnp.concatenate([source, loops]), jnp.concatenate([target, loops])
        sign = jnp.concatenate([sign.astype(x.dtype), jnp.zeros(x.shape[0], x.dtype)])
        left, right, edge = heads(self.source(x)), heads(self.target(x)), heads(self.edge(sign[:, None]))
        return gatv2(left, right, attention, source, target, edge).reshape(x.shape[0], -1) + self.bias[...]


class _Plain(nnx.Module):
    """What stands in for the graph layer without a network."""

    def __init__(self, params: Mapping[str, Any]):
        self.linear = Linear(select(params, "linear"))


class _MLP(nnx.Module):
    """Two dense layers with silu between."""

    def __init__(self, params: Mapping[str, Any]):
        self.hidden = Linear(select(params, "hidden"))
        self.out = Linear(select(params, "out"))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jax.nn.silu(self.hidden(x)))


class VectorField(nnx.Module):
    """The velocity of latents, guided by a gene regulatory network where there is one.

    Args:
        params: canonical parameters below "flow.", with that prefix cut off: `genes` (n_genes, h) embeddings, `graph`
            as for `GraphAttention` or `graph.linear` (h, n_heads * h) for no network, `query` (n_latent, n_heads * h),
            `time.hidden` (1, n_time), `time.out` (n_time, n_time), `condition` (n_conditions, n_condition),
            `head.hidden` (n_latent + n_heads * h + n_time + n_condition, n_hidden) and `head.out` (n_hidden, n_latent),
            each with `weight` and `bias`. Others are not used.
    """

    def __init__(self, params: Mapping[str, Any]):
        self.genes = nnx.Param(jnp.asarray(params["genes"]))
        graph = select(params, "graph")
        self.graph = _Plain(graph) if "linear.weight" in graph else GraphAttention(graph)
        self.query = Linear(select(params, "query"))
        self.time = _MLP(select(params, "time"))
        self.condition = Linear(select(params, "condition"))
        self.head = _MLP(select(params, "head"))

    def nodes(self, graph: Mapping[str, jax.Array]) -> jax.Array:
        """The genes as cells see them; the same for all cells and times.

        Differentiated in the parameters.

        Args:
            graph: "source" and "target" (n_edges,), indices of genes, and "sign" (n_edges,); not used, and may be {},
                where the model has no network.

        Returns:
            (n_genes, n_heads * h).

        Raises:
            ValueError: the model has a network and none was given.
        """
        genes = self.genes[...]
        if isinstance(self.graph, GraphAttention):
            if not set(GRAPH) <= set(graph):
                raise ValueError(f"graph has {sorted(graph)} but the model has a network; {list(GRAPH)} was wanted")
            return record("flow.nodes", self.graph(genes, *(graph[name] for name in GRAPH)))
        return record("flow.nodes", self.graph.linear(genes))

    def __call__(self, times: jax.Array, z: jax.Array, condition: jax.Array, nodes: jax.Array) -> jax.Array:
        """Velocity dz/ds of standardised latents.

        Differentiated in the parameters, times, z, condition and nodes.

        Args:
            times: (n_cells,) or () time s, 0 at the first and 1 at the last time point.
            z: (n_cells, n_latent) standardised latents.
            condition: (n_cells, n_conditions) code of each cell's condition: doses, then the one-hot tissue.
            nodes: (n_genes, n_heads * h) from `nodes`.

        Returns:
            (n_cells, n_latent).

        Raises:
            ValueError: another number of latents or conditions than the model has, or times of other cells.
        """
        n_latent, n_conditions = self.query.weight.shape[0], self.condition.weight.shape[0]
        times = jnp.asarray(times, z.dtype)
        wanted = (z.shape[:1] + (n_latent,), z.shape[:1] + (n_conditions,))
        if z.ndim != 2 or (z.shape, condition.shape) != wanted or times.shape not in ((), z.shape[:1]):
            raise ValueError(
                f"times, z and condition have shapes {times.shape}, {z.shape} and {condition.shape}; (n_cells,) or (), "
                f"(n_cells, {n_latent}) and (n_cells, {n_conditions}) were wanted"
            )
        query = self.query(z)
        attention = jax.nn.softmax(matmul(query, nodes.T) / math.sqrt(nodes.shape[1]), axis=-1)
        context = record("flow.context", matmul(attention, nodes))
        time = jnp.broadcast_to(self.time(times.reshape(-1, 1)), (z.shape[0], self.time.out.weight.shape[1]))
        inputs = jnp.concatenate([z, context, time, self.condition(condition.astype(z.dtype))], axis=-1)
        return record("flow.velocity", self.head(inputs))


def flow_matching_loss(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    z0: jax.Array,
    z1: jax.Array,
    tau: jax.Array,
    *,
    start: float | jax.Array = 0.0,
    stop: float | jax.Array = 1.0,
    weight: jax.Array | None = None,
) -> jax.Array:
    """Squared difference of the velocity and the displacement of pairs, at a point on the straight line between them.

    With psi = (1 - tau) z0 + tau z1 and s = start + tau (stop - start), the mean over dimensions and the weighted mean
    over cells of ((stop - start) velocity(s, psi) - (z1 - z0))^2. Differentiated in all but the weight. Source: Lipman
    et al. 2023, arXiv:2210.02747; Tong et al. 2024, arXiv:2302.00482.

    Args:
        velocity: (s (n_cells,), z (n_cells, n_latent)) -> (n_cells, n_latent).
        z0: (n_cells, n_latent) first of each pair.
        z1: (n_cells, n_latent) second of each pair.
        tau: (n_cells,) place between them, in [0, 1).
        start: () or (n_cells,) time of z0.
        stop: () or (n_cells,) time of z1.
        weight: (n_cells,) >= 0, for weighted means sum(w f) / sum(w); None for the plain mean.

    Returns:
        ().

    Raises:
        ValueError: z0, z1 and tau of different cells or latents.
    """
    if z0.ndim != 2 or z0.shape != z1.shape or tau.shape != z0.shape[:1]:
        raise ValueError(
            f"z0, z1 and tau have shapes {z0.shape}, {z1.shape} and {tau.shape}; (n_cells, n_latent) twice and "
            "(n_cells,) were wanted"
        )
    length = jnp.broadcast_to(jnp.asarray(stop, z0.dtype) - start, tau.shape)
    between = tau[:, None]
    moved = velocity(start + tau * length, (1.0 - between) * z0 + between * z1)
    return cell_mean(((length[:, None] * moved - (z1 - z0)) ** 2).mean(-1), weight)


def cell_mean(values: jax.Array, weight: jax.Array | None) -> jax.Array:
    """Mean over cells, weighted where there are weights."""
    return values.mean() if weight is None else (weight * values).sum() / weight.sum()
