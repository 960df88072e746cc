"""The flow system of docs/math.md 7 on jets: the oracle of cvae, discriminator, flow, integrate and of their losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from parity_tests import jets
from parity_tests.jets import WIDE, Array, Jet, concatenate, einsum, jet
from parity_tests.oracles import (
    Linear,
    Parameters,
    _below,
    data,
    elbo_loss,
    inverse_dispersion,
    one_hot,
    reparameterize,
    weighted_mean,
)
from pf_core.config import (
    ATTENTION_EPS,
    BATCH_NORM_EPS,
    BATCH_NORM_MOMENTUM,
    LEAKY_SLOPE,
    MU_FLOOR,
    RK4_STEPS,
    Config,
)

Tree = Mapping[str, Any]
Losses = tuple[Jet, tuple[dict[str, Jet], dict[str, Any]]]


def leaky_relu(x: Any) -> Jet:
    return jets.leaky_relu(jet(x), LEAKY_SLOPE)


def _row_maximum(x: Jet) -> Array:
    """A constant: it cancels from value and derivatives alike."""
    return x.value.max(axis=-1, keepdims=True)


def softmax(x: Jet) -> Jet:
    powers = jets.exp(x - _row_maximum(x))
    total = powers.sum(-1)
    return powers / total.reshape(*total.shape, 1)


def log_softmax(x: Jet) -> Jet:
    shifted = x - _row_maximum(x)
    total = jets.log(jets.exp(shifted).sum(-1))
    return shifted - total.reshape(*total.shape, 1)


# --- the conditional NB-VAE ------------------------------------------------------------------------------------
def batch_norm(
    x: Any, scale: Any, shift: Any, mean: Any, var: Any, *, weight: Any = None, train: bool
) -> tuple[Jet, Jet, Jet]:
    x, running_mean, running_var = jet(x), jet(mean).stop(), jet(var).stop()
    if not train:
        y = (x - running_mean) / jets.sqrt(running_var + BATCH_NORM_EPS) * jet(scale) + jet(shift)
        return y, running_mean, running_var
    w = np.ones(x.shape[0], WIDE) if weight is None else data(weight).astype(WIDE)
    total = w.sum()
    here_mean = einsum("n,nh->h", w, x) / total
    gap = x - here_mean
    here_var = einsum("n,nh->h", w, gap * gap) / total
    n = total**2 / (w**2).sum()
    y = gap / jets.sqrt(here_var + BATCH_NORM_EPS) * jet(scale) + jet(shift)
    old, new = 1 - BATCH_NORM_MOMENTUM, BATCH_NORM_MOMENTUM
    unbiased = here_var.stop() * (n / (n - 1))
    return y, running_mean * old + here_mean.stop() * new, running_var * old + unbiased * new


class ConditionalEncoder:
    def __init__(self, params: Parameters):
        self.params = params
        self.mean, self.logvar = Linear(_below(params, "mean")), Linear(_below(params, "logvar"))

    def __call__(
        self, x: Any, tissue: Any, statistics: Tree, *, weight: Any = None, train: bool = False
    ) -> tuple[Jet, Jet, dict[str, Jet]]:
        return self.of_log_counts(jets.log1p(jet(data(x))), tissue, statistics, weight=weight, train=train)

    def of_log_counts(
        self, x: Jet, tissue: Any, statistics: Tree, *, weight: Any = None, train: bool = False
    ) -> tuple[Jet, Jet, dict[str, Jet]]:
        n_codes = jet(self.params["block1.weight"]).shape[0] - x.shape[-1]
        h, new = concatenate([x, one_hot(tissue, n_codes)]), {}
        for block, norm in (("block1", "norm1"), ("block2", "norm2")):
            before = einsum("ni,io->no", h, self.params[f"{block}.weight"])
            settings = [self.params[f"{norm}.scale"], self.params[f"{norm}.shift"]]
            running = [statistics[f"{norm}.mean"], statistics[f"{norm}.var"]]
            y, new[f"{norm}.mean"], new[f"{norm}.var"] = batch_norm(
                before, *settings, *running, weight=weight, train=train
            )
            h = leaky_relu(y)
        return self.mean(h), self.logvar(h), new


class ConditionalDecoder:
    def __init__(self, params: Parameters):
        self.block1, self.block2, self.mean = (Linear(_below(params, k)) for k in ("block1", "block2", "mean"))
        self.log_r = jet(params["log_r"])

    def __call__(self, z: Any, tissue: Any, library: Any) -> Jet:
        z, library = jet(z), jet(library)
        code = one_hot(tissue, self.block1.weight.shape[0] - z.shape[-1])
        h = leaky_relu(self.block2(leaky_relu(self.block1(concatenate([z, code])))))
        return library.reshape(*library.shape, 1) * softmax(self.mean(h)) + MU_FLOOR


class CVAE:
    def __init__(self, params: Parameters):
        self.encoder = ConditionalEncoder(_below(params, "encoder"))
        self.decoder = ConditionalDecoder(_below(params, "decoder"))
        self.encode, self.decode = self.encoder, self.decoder

    def dispersion(self, tissue: Any) -> Jet:
        return inverse_dispersion(self.decoder.log_r)

    def __call__(
        self, x: Any, tissue: Any, library: Any, eps: Any, statistics: Tree, *, weight: Any = None, train: bool = False
    ) -> tuple[Jet, Jet, Jet, Jet, Jet, dict[str, Jet]]:
        z_mu, z_logvar, new = self.encode(x, tissue, statistics, weight=weight, train=train)
        z = reparameterize(z_mu, z_logvar, eps)
        return self.decode(z, tissue, library), self.dispersion(tissue), z_mu, z_logvar, z, new


# --- the discriminator -----------------------------------------------------------------------------------------
class Discriminator:
    def __init__(self, params: Parameters):
        self.hidden = [Linear(_below(params, name)) for name in ("hidden1", "hidden2")]
        self.out = Linear(_below(params, "out"))

    def __call__(self, z: Any, keep1: Any = None, keep2: Any = None, *, dropout: float = 0.0) -> Jet:
        h = jet(z)
        for layer, keep in zip(self.hidden, (keep1, keep2), strict=True):
            h = leaky_relu(layer(h))
            h = h if keep is None else h * data(keep) / (1 - dropout)
        return self.out(h)


def _known(tissue: Any, weight: Any) -> Array:
    return data(weight).astype(WIDE) * (np.asarray(data(tissue)) > 0)


def _mean_over_known(values: Jet, tissue: Any, weight: Any) -> Jet:
    w = _known(tissue, weight)
    return weighted_mean(values, w) if w.sum() > 0 else (values * 0.0).sum()


def cross_entropy(logits: Any, tissue: Any, weight: Any) -> Jet:
    logits = jet(logits)
    label = np.maximum(np.asarray(data(tissue), dtype=np.int64) - 1, 0)
    chosen = (log_softmax(logits) * one_hot(label, logits.shape[-1])).sum(-1)
    return _mean_over_known(-chosen, tissue, weight)


def adversary_loss(logits: Any, tissue: Any, weight: Any, *, kind: str) -> Jet:
    if kind == "minimax":
        return -cross_entropy(logits, tissue, weight)
    logs = log_softmax(jet(logits))
    return _mean_over_known((jets.exp(logs) * logs).sum(-1), tissue, weight)


def _accuracy(logits: Jet, tissue: Any, weight: Any) -> Jet:
    right = logits.value.argmax(axis=-1) == np.asarray(data(tissue)) - 1
    return _mean_over_known(jet(right.astype(WIDE)), tissue, weight)


# --- the vector field ------------------------------------------------------------------------------------------
def gatv2(left: Any, right: Any, attention: Any, source: Any, target: Any, edge: Any) -> Jet:
    left, right = jet(left), jet(right)
    source, target = (np.asarray(data(index), dtype=np.int64) for index in (source, target))
    into = one_hot(target, left.shape[0])  # (n_edges, n_genes)
    score = einsum("ekh,kh->ek", leaky_relu(left[source] + right[target] + jet(edge)), attention)
    largest = np.array([score.value[target == gene].max(axis=0) for gene in target])
    powers = jets.exp(score - largest)
    total = einsum("eg,ek->gk", into, powers) + ATTENTION_EPS
    share = powers / total[target]
    return einsum("eg,ekh->gkh", into, share.reshape(*share.shape, 1) * left[source])


class GraphAttention:
    def __init__(self, params: Parameters):
        self.params = params
        self.target = Linear(_below(params, "target"))

    def __call__(self, x: Any, source: Any, target: Any, sign: Any) -> Jet:
        x = jet(x)
        heads = jet(self.params["attention"]).shape
        itself = np.arange(x.shape[0])
        source, target = (np.concatenate([np.asarray(data(index)), itself]) for index in (source, target))
        signs = concatenate([jet(sign), np.zeros(len(itself))])
        left = einsum("gi,io->go", x, self.params["source.weight"]).reshape(len(itself), *heads)
        right = self.target(x).reshape(len(itself), *heads)
        edge = einsum("ei,io->eo", signs.reshape(-1, 1), self.params["edge.weight"]).reshape(len(source), *heads)
        node = gatv2(left, right, self.params["attention"], source, target, edge)
        return node.reshape(len(itself), heads[0] * heads[1]) + jet(self.params["bias"])


class VectorField:
    def __init__(self, params: Parameters):
        self.genes, self.params = jet(params["genes"]), params
        self.query, self.condition = Linear(_below(params, "query")), Linear(_below(params, "condition"))
        self.time, self.head = (
            [Linear(_below(params, f"{name}.{layer}")) for layer in ("hidden", "out")] for name in ("time", "head")
        )

    def nodes(self, graph: Tree) -> Jet:
        if "graph.linear.weight" in self.params:
            return Linear(_below(self.params, "graph.linear"))(self.genes)
        return GraphAttention(_below(self.params, "graph"))(self.genes, graph["source"], graph["target"], graph["sign"])

    def __call__(self, times: Any, z: Any, condition: Any, nodes: Any) -> Jet:
        z, nodes, times = jet(z), jet(nodes), jet(times)
        scores = einsum("nw,gw->ng", self.query(z), nodes) / WIDE(math.sqrt(nodes.shape[-1]))
        context = einsum("ng,gw->nw", softmax(scores), nodes)
        clock = times.broadcast((z.shape[0],)).reshape(-1, 1)
        code = self.time[1](jets.silu(self.time[0](clock)))
        joined = concatenate([z, context, code, self.condition(condition)])
        return self.head[1](jets.silu(self.head[0](joined)))


def _column(values: Any, n: int) -> Jet:
    """A number, or one per cell, as (n_cells, 1)."""
    return jet(values).broadcast((n,)).reshape(n, 1)


def flow_matching_loss(
    velocity: Callable[[Any, Any], Any],
    z0: Any,
    z1: Any,
    tau: Any,
    *,
    start: Any = 0.0,
    stop: Any = 1.0,
    weight: Any = None,
) -> Jet:
    z0, z1 = jet(z0), jet(z1)
    n = z0.shape[0]
    way, first = _column(tau, n), _column(start, n)
    length = _column(stop, n) - first
    point = (1.0 - way) * z0 + way * z1
    when = first + way * length
    gap = length * velocity(when.reshape(n), point) - (z1 - z0)
    return weighted_mean((gap * gap).mean(-1), weight)


def integrate(
    velocity: Callable[[Any, Any], Any], z: Any, times: Any, *, method: str = "rk4", n_steps: int = RK4_STEPS
) -> Jet:
    if method != "rk4":
        raise ValueError("the oracle knows rk4 alone: the adaptive methods have a step control each")
    z, times = jet(z), jet(times)
    reached = [z]
    for i in range(times.shape[0] - 1):
        step = (times[i + 1] - times[i]) / n_steps
        for k in range(n_steps):
            now = times[i] + step * k
            half = now + step * 0.5
            k1 = velocity(now, z)
            k2 = velocity(half, z + step * 0.5 * k1)
            k3 = velocity(half, z + step * 0.5 * k2)
            k4 = velocity(now + step, z + step * k3)
            z = z + step / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
        reached.append(z)
    return jets.stack(reached)


# --- losses ----------------------------------------------------------------------------------------------------
def _of_norms(carry: Tree) -> dict[str, Any]:
    return _below(carry, "cvae.encoder")


def _detached(params: Tree, prefix: str) -> dict[str, Jet]:
    return {name: jet(value).stop() for name, value in _below(params, prefix).items()}


def cvae_loss(
    params: Tree, batch: Tree, noise: Tree, carry: Tree, *, config: Config, beta: Any, train: bool = True
) -> Losses:
    tissue, weight = batch["tissue"], batch["weight"]
    mu, r, z_mu, z_logvar, z, new = CVAE(_below(params, "cvae"))(
        batch["counts"], tissue, batch["library"], noise["eps"], _of_norms(carry), weight=weight, train=train
    )
    elbo, parts = elbo_loss(batch["counts"], mu, r, z_mu, z_logvar, beta=beta, weight=weight)
    logits = Discriminator(_detached(params, "discriminator"))(z)
    adversary = adversary_loss(logits, tissue, weight, kind=config.adversary.kind)
    loss = elbo + config.adversary.weight * adversary
    new_carry = {f"cvae.encoder.{name}": value for name, value in new.items()}
    return loss, ({**parts, "adversary": adversary.stop()}, new_carry)


def discriminator_loss(
    params: Tree, batch: Tree, noise: Tree, carry: Tree, *, config: Config, train: bool = True
) -> Losses:
    tissue, weight = batch["tissue"], batch["weight"]
    encoder = ConditionalEncoder(_detached(params, "cvae.encoder"))
    z_mu, z_logvar, _ = encoder(batch["counts"], tissue, _of_norms(carry), weight=weight, train=train)
    z = reparameterize(z_mu, z_logvar, data(noise["eps"])).stop()
    masks = (noise["keep1"], noise["keep2"]) if train else (None, None)
    logits = Discriminator(_below(params, "discriminator"))(z, *masks, dropout=config.adversary.dropout)
    loss = cross_entropy(logits, tissue, weight)
    return loss, ({"discriminator": loss.stop(), "accuracy": _accuracy(logits, tissue, weight)}, dict(carry))


def flow_loss(params: Tree, batch: Tree, noise: Tree, *, config: Config) -> Losses:
    field = VectorField(_below(params, "flow"))
    nodes = field.nodes({name: batch[name] for name in ("source", "target", "sign") if name in batch})
    loss = flow_matching_loss(
        lambda s, z: field(s, z, batch["condition"], nodes),
        batch["z0"],
        batch["z1"],
        noise["tau"],
        start=batch["start"],
        stop=batch["stop"],
        weight=batch["weight"],
    )
    gap = jet(batch["z1"]) - jet(batch["z0"])
    return loss, ({"displacement": weighted_mean((gap * gap).mean(-1), batch["weight"]).stop()}, {})
