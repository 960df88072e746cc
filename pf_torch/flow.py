"""The vector field: graph attention over genes, cells that attend to genes, and flow matching (docs/math.md 7)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pf_core.config import ATTENTION_EPS
from pf_core.initial import select
from pf_torch.layers import Linear, Matrix, leaky_relu, own
from pf_torch.probe import record

__all__ = ["GraphAttention", "VectorField", "flow_matching_loss", "gatv2"]


def gatv2(left: Tensor, right: Tensor, attention: Tensor, source: Tensor, target: Tensor, edge: Tensor) -> Tensor:
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
    source, target = source.long(), target.long()
    score = (attention * leaky_relu(left[source] + right[target] + edge)).sum(-1)  # (n_edges, n_heads)
    index = target[:, None].expand_as(score)
    lowest = torch.full(left.shape[:2], -math.inf, dtype=score.dtype, device=score.device)
    largest = lowest.scatter_reduce(0, index, score.detach(), "amax")
    share = torch.exp(score - largest[target])
    total = torch.zeros_like(lowest).index_add(0, target, share)
    share = share / (total[target] + ATTENTION_EPS)
    return torch.zeros_like(left).index_add(0, target, share[:, :, None] * left[source])


class GraphAttention(nn.Module):
    """A layer of signed graph attention over a gene regulatory network.

    Args:
        params: `source.weight` (n, n_heads * h), `target.weight` (n, n_heads * h) and `target.bias`, `edge.weight`
            (1, n_heads * h), `attention` (n_heads, h) and `bias` (n_heads * h,).
    """

    attention: Tensor
    bias: Tensor

    def __init__(self, params: Mapping[str, Any]):
        super().__init__()
        self.source = Matrix(select(params, "source"))
        self.target = Linear(select(params, "target"))
        self.edge = Matrix(select(params, "edge"))
        own(self, "attention", params["attention"])
        own(self, "bias", params["bias"])

    def forward(self, x: Tensor, source: Tensor, target: Tensor, sign: Tensor) -> Tensor:
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
            shapes = ", ".join(str(tuple(edges.shape)) for edges in (source, target, sign))
            raise ValueError(f"source, target and sign have shapes {shapes}; (n_edges,) three times was wanted")
        heads = self.attention.shape  # (n_heads, h)
        loops = torch.arange(x.shape[0], device=x.device)
        source, target = torch.cat([source.long(), loops]), torch.cat([target.long(), loops])
        sign = torch.cat([sign.to(x.dtype), torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)])
        edge = self.edge(sign[:, None]).unflatten(1, heads)
        left, right = self.source(x).unflatten(1, heads), self.target(x).unflatten(1, heads)
        return gatv2(left, right, self.attention, source, target, edge).flatten(1) + self.bias


class VectorField(nn.Module):
    """The velocity of latents, guided by a gene regulatory network where there is one.

    Args:
        params: canonical parameters below "flow.", with that prefix cut off: `genes` (n_genes, h) embeddings, `graph`
            as for `GraphAttention` or `graph.linear` (h, n_heads * h) for no network, `query` (n_latent, n_heads * h),
            `time.hidden` (1, n_time), `time.out` (n_time, n_time), `condition` (n_conditions, n_condition),
            `head.hidden` (n_latent + n_heads * h + n_time + n_condition, n_hidden) and `head.out` (n_hidden, n_latent),
            each with `weight` and `bias`. Others are not used.
    """

    genes: Tensor

    def __init__(self, params: Mapping[str, Any]):
        super().__init__()
        own(self, "genes", params["genes"])
        if "graph.linear.weight" in params:
            self.graph = nn.ModuleDict({"linear": Linear(select(params, "graph.linear"))})
        else:
            self.graph = GraphAttention(select(params, "graph"))
        self.query = Linear(select(params, "query"))
        self.time = nn.ModuleDict({name: Linear(select(params, f"time.{name}")) for name in ("hidden", "out")})
        self.condition = Linear(select(params, "condition"))
        self.head = nn.ModuleDict({name: Linear(select(params, f"head.{name}")) for name in ("hidden", "out")})

    def nodes(self, graph: Mapping[str, Tensor]) -> Tensor:
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
        if not isinstance(self.graph, GraphAttention):
            return record("flow.nodes", self.graph["linear"](self.genes))
        missing = [name for name in ("source", "target", "sign") if name not in graph]
        if missing:
            raise ValueError(f"the graph lacks {', '.join(missing)}; pass the network that the model was trained with")
        return record("flow.nodes", self.graph(self.genes, graph["source"], graph["target"], graph["sign"]))

    def forward(self, times: Tensor, z: Tensor, condition: Tensor, nodes: Tensor) -> Tensor:
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
        for name, value, width in (("latents", z, n_latent), ("conditions", condition, n_conditions)):
            if value.shape != (len(z), width):
                raise ValueError(f"{name} have shape {tuple(value.shape)}; (n_cells, {width}) was wanted")
        if times.shape not in ((), (len(z),)):
            raise ValueError(f"times have shape {tuple(times.shape)}; (), or ({len(z)},) for as many cells, was wanted")
        q = self.query(z)
        attention = torch.softmax(torch.matmul(q, nodes.T) / math.sqrt(nodes.shape[1]), dim=-1)
        context = record("flow.context", torch.matmul(attention, nodes))
        s = times.to(z.dtype).expand(len(z))[:, None]
        time = self.time["out"](nn.functional.silu(self.time["hidden"](s)))
        h = torch.cat([z, context, time, self.condition(condition)], dim=-1)
        return record("flow.velocity", self.head["out"](nn.functional.silu(self.head["hidden"](h))))


def flow_matching_loss(
    velocity: Callable[[Tensor, Tensor], Tensor],
    z0: Tensor,
    z1: Tensor,
    tau: Tensor,
    *,
    start: float | Tensor = 0.0,
    stop: float | Tensor = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
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
        shapes = ", ".join(str(tuple(value.shape)) for value in (z0, z1, tau))
        raise ValueError(f"z0, z1 and tau have shapes {shapes}; (n_cells, n_latent) twice and (n_cells,) were wanted")
    span = torch.as_tensor(stop - start, dtype=z0.dtype, device=z0.device).expand(tau.shape)
    psi = (1.0 - tau)[:, None] * z0 + tau[:, None] * z1
    difference = span[:, None] * velocity(start + tau * span, psi) - (z1 - z0)
    of_cells = (difference * difference).mean(-1)
    return of_cells.mean() if weight is None else (weight * of_cells).sum() / weight.sum()
