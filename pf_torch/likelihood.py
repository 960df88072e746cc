"""The negative binomial likelihood and the ELBO, accurate in float32 (docs/math.md 1).

lgamma loses float32: at r = 1e4 one ulp of lgamma(r) is 0.0078. Nothing here evaluates it at a large argument.
With Stirling's series lgamma(y) = (y - 1/2) log y - y + log(2 pi)/2 + c(y), c(y) = 1/(12 y) - ..., and s = r + N a
shift at which the series is exact to rounding, lgamma(r) = lgamma(s) - log prod_{k<N} (r + k) and what is large cancels
by algebra before anything is rounded:

    lgamma(x+r) - lgamma(r) = x log(x+s) - x + (s - 1/2) log1p(x/s) + c(x+s) - c(s) + log prod_{k<N} (r+k)/(x+r+k)

The same shift in lgamma(x+1), at t = x + N + 1, gives the log probability as terms none of which exceeds
x + mu + |log p| by more than a constant:

    log p = x log(mu (x+s) / ((r+mu) t)) + (s - 1/2) log1p(x/s) - r log1p(mu/r) + c(x+s) - c(s) - c(t)
            + log[ e^(N+1) / sqrt(2 pi t) * prod_{k<N} (x+k+1)(r+k) / (t (x+r+k)) ]

At x = 0 all but - r log1p(mu/r) vanishes, so the rest is evaluated where x > 0 only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pf_core.config import LOGVAR_MAX, LOGVAR_MIN, R_MAX, R_MIN

__all__ = [
    "digamma_difference",
    "elbo_loss",
    "gaussian_kl",
    "inverse_dispersion",
    "lgamma_difference",
    "nb_log_prob",
    "nb_log_prob_elements",
    "nb_log_prob_sum",
    "reparameterize",
    "strict_clip",
]

# B_2k / (2k (2k-1)): c(y) = sum_k of these over y^(2k-1).
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156, -3617 / 122400)
# N, the smallest shift from which eight terms are exact to rounding: the ninth is 6e-15 at 4 and 2e-18 at 10.
_SHIFT = {torch.float32: 4, torch.float64: 10}


def _shift(dtype: torch.dtype) -> int:
    if dtype not in _SHIFT:
        raise ValueError(f"the likelihood got {dtype}; float32 or float64 was wanted: cast before the call")
    return _SHIFT[dtype]


def strict_clip(x: Tensor, low: float, high: float) -> Tensor:
    """x within [low, high].

    The gradient in x is 1 strictly inside and 0 outside and at the bounds, to any order. The bounds carry no gradient.

    Args:
        x: (...) values; NaN stays NaN.
        low: lower bound.
        high: upper bound.

    Returns:
        (...) same dtype as x.
    """
    inside = (x > low) & (x < high)
    return torch.where(inside, x, x.detach().clamp(low, high))


def inverse_dispersion(log_r: Tensor) -> Tensor:
    """r = exp(clip(log_r, ln R_MIN, ln R_MAX)).

    Differentiated in log_r: r strictly inside the bounds, 0 outside and at them.

    Args:
        log_r: (...) unbounded.

    Returns:
        (...) inverse dispersion within [R_MIN, R_MAX].
    """
    return torch.exp(strict_clip(log_r, math.log(R_MIN), math.log(R_MAX)))


def _series(y: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """sum_k coefficients[k] / y^(2k) by Horner's rule."""
    w = 1.0 / (y * y)
    total = torch.full_like(y, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = total * w + c
    return total


def _stirling_rest(y: Tensor) -> Tensor:
    """c(y) = lgamma(y) - [(y - 1/2) log y - y + log(2 pi)/2] for y >= N."""
    return _series(y, _STIRLING) / y


def _lgamma_difference(x: Tensor, r: Tensor) -> Tensor:
    n = _shift(r.dtype)
    s = r + n
    product = torch.ones_like(x)
    for k in range(n):
        product = product * ((r + k) / (x + r + k))
    large = x * torch.log(x + s) + ((s - 0.5) * torch.log1p(x / s) - x)
    return large + (torch.log(product) + (_stirling_rest(x + s) - _stirling_rest(s)))


def digamma_difference(x: Tensor, r: Tensor) -> Tensor:
    """digamma(x + r) - digamma(r), without the cancellation of the two; exactly 0 where x is 0.

    Differentiated in r, with derivative the difference of trigammas; x is data and carries no gradient.

    Args:
        x: counts, integer-valued, >= 0; broadcasts with r.
        r: inverse dispersion, > 0, float32 or float64.

    Returns:
        Elementwise difference, dtype of r.
    """
    x = x.detach().to(r.dtype)
    n = _shift(r.dtype)
    s, xs = r + n, x + r + n
    total = torch.log1p(x / s) + 0.5 * x / (s * xs)
    coefficients = tuple((2 * k + 1) * c for k, c in enumerate(_STIRLING))  # B_2k / (2k)
    total = total + (_series(s, coefficients) / (s * s) - _series(xs, coefficients) / (xs * xs))
    for k in range(n):
        total = total + x / ((r + k) * (x + r + k))
    return total


def _where_counted(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(x, ...) where x > 0, and 0 elsewhere: nine of ten counts are zero, where all of it vanishes."""
    counted = (tensors[0] > 0).nonzero(as_tuple=True) if tensors[0].ndim else tensors[0] > 0
    out = torch.zeros_like(tensors[0])
    out[counted] = function(*(tensor[counted] for tensor in tensors))
    return out


class _LgammaDifference(torch.autograd.Function):
    """Value in the stable form; derivative in r the digamma difference, itself differentiable."""

    @staticmethod
    def forward(x: Tensor, r: Tensor) -> Tensor:
        return _lgamma_difference(x, r)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, r = ctx.saved_tensors
        return None, grad * digamma_difference(x, r)

    @staticmethod
    def jvp(ctx: Any, x_t: Any, r_t: Any) -> Any:  # type: ignore[override]
        x, r = ctx.saved_tensors
        return torch.zeros_like(x) if r_t is None else r_t * digamma_difference(x, r)


def lgamma_difference(x: Tensor, r: Tensor) -> Tensor:
    """lgamma(x + r) - lgamma(r), without the cancellation of the two; exactly 0 where x is 0.

    Differentiated in r, with derivative `digamma_difference`; x is data and carries no gradient.

    Args:
        x: counts, integer-valued, >= 0; broadcasts with r.
        r: inverse dispersion, > 0, float32 or float64.

    Returns:
        Elementwise difference, dtype of r.
    """
    _shift(r.dtype)
    x, r = torch.broadcast_tensors(x.detach().to(r.dtype), r)
    return _LgammaDifference.apply(x, r)  # type: ignore[return-value]


def _counted_terms(x: Tensor, mu: Tensor, r: Tensor) -> Tensor:
    """log p + r log1p(mu/r) for x > 0, as in the module's docstring."""
    n = _shift(r.dtype)
    s, t = r + n, x + (n + 1)
    xs = x + s
    product = math.exp(n + 1) / math.sqrt(2 * math.pi) / torch.sqrt(t)
    for k in range(n):
        product = product * (((x + (k + 1)) * (r + k)) / (t * (x + r + k)))
    large = x * torch.log((mu / t) * (xs / (r + mu))) + (s - 0.5) * torch.log1p(x / s)
    return large + (torch.log(product) + (_stirling_rest(xs) - _stirling_rest(s) - _stirling_rest(t)))


class _NBLogProb(torch.autograd.Function):
    """Value in the stable form; derivatives in mu and r in closed form, themselves differentiable."""

    @staticmethod
    def forward(x: Tensor, mu: Tensor, r: Tensor) -> Tensor:
        return _where_counted(_counted_terms, x, mu, r) - r * torch.log1p(mu / r)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, mu, r = ctx.saved_tensors
        d_mu = grad * _d_mu(x, mu, r) if ctx.needs_input_grad[1] else None
        d_r = grad * _d_r(x, mu, r) if ctx.needs_input_grad[2] else None
        return None, d_mu, d_r

    @staticmethod
    def jvp(ctx: Any, x_t: Any, mu_t: Any, r_t: Any) -> Any:  # type: ignore[override]
        x, mu, r = ctx.saved_tensors
        tangent = torch.zeros_like(x)
        if mu_t is not None:
            tangent = tangent + mu_t * _d_mu(x, mu, r)
        if r_t is not None:
            tangent = tangent + r_t * _d_r(x, mu, r)
        return tangent


def _closed_form(value: Callable[..., Tensor], partials: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """value(x, mu, r) with its derivatives in mu and r given, where the product rule would cancel."""

    class Closed(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor, mu: Tensor, r: Tensor) -> Tensor:
            return value(x, mu, r)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
            by_mu, by_r = partials(*ctx.saved_tensors)
            return None, grad * by_mu, grad * by_r

        @staticmethod
        def jvp(ctx: Any, x_t: Any, mu_t: Any, r_t: Any) -> Any:  # type: ignore[override]
            by_mu, by_r = partials(*ctx.saved_tensors)
            return (0 if mu_t is None else mu_t * by_mu) + (0 if r_t is None else r_t * by_r)

    return Closed.apply  # type: ignore[return-value]


def _mixed(x: Tensor, mu: Tensor, r: Tensor) -> Tensor:
    """d^2 log p / d mu d r."""
    total = r + mu
    return (x - mu) / (total * total)


# r (x - mu) / (mu (r + mu)), in an order that neither overflows nor underflows.
_d_mu = _closed_form(
    lambda x, mu, r: ((x - mu) / mu) * (r / (r + mu)),
    lambda x, mu, r: ((x + r) / (r + mu) ** 2 - x / (mu * mu), _mixed(x, mu, r)),
)
# (mu - x)/(r + mu) - log1p(mu/r)
_mean_part = _closed_form(
    lambda x, mu, r: (mu - x) / (r + mu) - torch.log1p(mu / r),
    lambda x, mu, r: (_mixed(x, mu, r), mu / (r * (r + mu)) + _mixed(x, mu, r)),
)


def _d_r(x: Tensor, mu: Tensor, r: Tensor) -> Tensor:
    """[psi(x+r) - psi(r)] - log1p(mu/r) + (mu - x)/(r + mu)."""
    return _where_counted(digamma_difference, x, r) + _mean_part(x, mu, r)


def _plain(x: Tensor, mu: Tensor, r: Tensor) -> Tensor:
    """The textbook form, for comparison: float32 loses it at large r."""
    coefficient = torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(x + 1.0)
    return coefficient + r * torch.log(r / (r + mu)) + x * torch.log(mu / (r + mu))


def nb_log_prob_elements(x: Tensor, mu: Tensor, r: Tensor, *, method: str = "stable") -> Tensor:
    """Negative-binomial log probability of every cell and gene.

    Differentiated in mu and r, twice, by closed forms; x is data and carries no gradient. In float32 the error of the
    value is below 1e-6 (1 + x + mu + |log p|), and that of the derivative in log r below 1e-6 (1 + x + mu), for r in
    [1e-4, 1e4], mu in [1e-8, 1e5] and x in [0, 1e6].

    Args:
        x: (n_cells, n_genes) counts, integer-valued, >= 0.
        mu: (n_cells, n_genes) mean, > 0.
        r: (n_genes,) or (n_cells, n_genes) inverse dispersion, > 0; the variance is mu + mu^2 / r.
        method: "stable", or "plain" for the textbook form with log-gammas, which float32 loses at large r.

    Returns:
        (n_cells, n_genes) nats.

    Raises:
        ValueError: an unknown method, or shapes that do not fit.
    """
    if method not in ("stable", "plain"):
        raise ValueError(f"method is {method!r}; 'stable' or 'plain' was wanted")
    x = x.detach().to(mu.dtype)
    try:
        x, mu, r = torch.broadcast_tensors(x, mu, r)
    except RuntimeError:
        shapes = f"x {tuple(x.shape)}, mu {tuple(mu.shape)} and r {tuple(r.shape)}"
        raise ValueError(f"{shapes} do not broadcast; (C, G), (C, G) and (G,) or (C, G) were wanted") from None
    if method == "plain":
        return _plain(x, mu, r)
    _shift(r.dtype)
    return _NBLogProb.apply(x, mu, r)  # type: ignore[return-value]


def nb_log_prob(x: Tensor, mu: Tensor, r: Tensor, *, method: str = "stable") -> Tensor:
    """Negative-binomial log probability of every cell, summed over genes.

    Differentiated in mu and r; x is data and carries no gradient. See `nb_log_prob_elements`.

    Args:
        x: (n_cells, n_genes) counts, integer-valued, >= 0.
        mu: (n_cells, n_genes) mean, > 0.
        r: (n_genes,) or (n_cells, n_genes) inverse dispersion, > 0; the variance is mu + mu^2 / r.
        method: "stable", or "plain" for the textbook form with log-gammas.

    Returns:
        (n_cells,) nats per cell.

    Raises:
        ValueError: an unknown method, or shapes that do not fit.
    """
    return nb_log_prob_elements(x, mu, r, method=method).sum(-1)


# --- sums over cells, by the count table ---------------------------------------------------------------------------


def nb_log_prob_sum(
    x: Tensor,
    mu: Tensor,
    r: Tensor,
    *,
    weight: Tensor | None = None,
    method: str = "stable",
    table: Tensor | None = None,
    tail: Tensor | None = None,
) -> Tensor:
    """Weighted sum over cells of the negative-binomial log probability.

    Differentiated in mu and r, twice; x, weight and table are data and carry no gradient. With one r per gene, "table"
    needs no log-gamma: sum_c w_c [lgamma(x + r) - lgamma(r)] is a sum over the table's rows, and one dense pass gives
    the rest. Counts beyond the table are taken one by one, so that nothing is dropped.

    Args:
        x: (n_cells, n_genes) counts, integer-valued, >= 0.
        mu: (n_cells, n_genes) mean, > 0.
        r: (n_genes,) inverse dispersion, > 0; (n_cells, n_genes) too, but for "table".
        weight: (n_cells,) >= 0; None for 1.
        method: "table", or one of `nb_log_prob_elements`.
        table: (n_rows, n_genes) weight of the cells with more than j and at most n_rows counts of a gene, made of these
            x and weight by pf_core.count_table; for "table" only.
        tail: (n_tail,) cell * n_genes + gene of every larger count, then -1; for "table" only.

    Returns:
        () nats.

    Raises:
        ValueError: an unknown method, shapes that do not fit, or "table" without table and tail.
    """
    if weight is None:
        weight = torch.ones(x.shape[0], dtype=mu.dtype, device=mu.device)
    if method != "table":
        return (weight * nb_log_prob(x, mu, r, method=method)).sum()
    if table is None or tail is None:
        raise ValueError("method 'table' needs table and tail; make them of x and weight by pf_core.count_table")
    if r.ndim != 1 or table.ndim != 2 or table.shape[1:] != r.shape or x.shape != mu.shape or x.shape[1:] != r.shape:
        shapes = f"x {tuple(x.shape)}, mu {tuple(mu.shape)}, r {tuple(r.shape)} and table {tuple(table.shape)}"
        raise ValueError(f"{shapes} do not fit; (C, G) twice, (G,) and (n_rows, G) were wanted")
    _shift(r.dtype)
    x, weight, table = (data.detach().to(mu.dtype) for data in (x, weight, table))
    return _TableSum.apply(x, mu, r, weight, table, tail.long())  # type: ignore[return-value]


def _rows_of(table: Tensor) -> Tensor:
    return torch.arange(table.shape[0], dtype=table.dtype, device=table.device)[:, None]


def _in_table(x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """Weights (n_cells, n_genes) of the entries that the table holds."""
    return torch.where(x <= table.shape[0], weight[:, None], 0.0)


def _of_tail(
    x: Tensor, mu: Tensor, r: Tensor, weight: Tensor, tail: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
    """Weights, (x, mu, r) and genes of the tail."""
    place = tail.clamp(min=0)
    cell, gene = place // x.shape[1], place % x.shape[1]
    return torch.where(tail >= 0, weight[cell], 0.0), (x[cell, gene], mu[cell, gene], r[gene]), gene


class _TableSum(torch.autograd.Function):
    """log p = sum_{j<x} log((r + j) / ((r + 1) (j + 1))) + x log(mu (r + 1) / (r + mu)) - r log1p(mu / r), summed.

    Neither logarithm grows with r or 1 / r, which cancel between the sum and the rest without the factor r + 1.
    """

    @staticmethod
    def forward(x: Tensor, mu: Tensor, r: Tensor, weight: Tensor, table: Tensor, tail: Tensor) -> Tensor:
        j = _rows_of(table)
        few = (table * torch.log((r + j) / ((r + 1.0) * (j + 1.0)))).sum()
        dense = x * torch.log(mu * ((r + 1.0) / (r + mu))) - r * torch.log1p(mu / r)
        weights, entries, _ = _of_tail(x, mu, r, weight, tail)
        rest = _where_counted(_counted_terms, *entries) - entries[2] * torch.log1p(entries[1] / entries[2])
        return few + (_in_table(x, weight, table) * dense).sum() + (weights * rest).sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        by_mu = grad * _table_sum_mu(*ctx.saved_tensors) if ctx.needs_input_grad[1] else None
        by_r = grad * _table_sum_r(*ctx.saved_tensors) if ctx.needs_input_grad[2] else None
        return None, by_mu, by_r, None, None, None

    @staticmethod
    def jvp(ctx: Any, x_t: Any, mu_t: Any, r_t: Any, *_: Any) -> Any:  # type: ignore[override]
        tangent = torch.zeros_like(ctx.saved_tensors[2][0])
        if mu_t is not None:
            tangent = tangent + (mu_t * _table_sum_mu(*ctx.saved_tensors)).sum()
        if r_t is not None:
            tangent = tangent + (r_t * _table_sum_r(*ctx.saved_tensors)).sum()
        return tangent


def _table_sum_mu(x: Tensor, mu: Tensor, r: Tensor, weight: Tensor, table: Tensor, tail: Tensor) -> Tensor:
    """(n_cells, n_genes) derivative in mu."""
    return weight[:, None] * _d_mu(x, mu, r.expand_as(mu))


def _table_sum_r(x: Tensor, mu: Tensor, r: Tensor, weight: Tensor, table: Tensor, tail: Tensor) -> Tensor:
    """(n_genes,) derivative in r."""
    few = (table / (r + _rows_of(table))).sum(0)
    dense = (_in_table(x, weight, table) * _mean_part(x, mu, r.expand_as(mu))).sum(0)
    weights, entries, gene = _of_tail(x, mu, r, weight, tail)
    return (few + dense).index_add(0, gene, weights * _d_r(*entries))


def gaussian_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence from N(mu, exp(logvar)) to N(0, 1), summed over latents.

    Differentiated in both. logvar is clipped to [LOGVAR_MIN, LOGVAR_MAX], which passes no gradient outside and at its
    bounds.

    Args:
        mu: (n_cells, n_latent) posterior mean.
        logvar: (n_cells, n_latent) posterior log variance, unclipped.

    Returns:
        (n_cells,) nats per cell.
    """
    lv = strict_clip(logvar, LOGVAR_MIN, LOGVAR_MAX)
    return 0.5 * (mu * mu + (torch.expm1(lv) - lv)).sum(-1)


def reparameterize(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """A sample z = mu + exp(logvar / 2) eps of the posterior, logvar clipped as in `gaussian_kl`.

    Differentiated in mu, logvar and eps.

    Args:
        mu: (n_cells, n_latent) posterior mean.
        logvar: (n_cells, n_latent) posterior log variance, unclipped.
        eps: (n_cells, n_latent) standard normal draws of the caller.

    Returns:
        (n_cells, n_latent) latents.
    """
    return mu + torch.exp(0.5 * strict_clip(logvar, LOGVAR_MIN, LOGVAR_MAX)) * eps


def elbo_loss(
    x: Tensor,
    mu: Tensor,
    r: Tensor,
    z_mu: Tensor,
    z_logvar: Tensor,
    *,
    beta: float | Tensor = 1.0,
    weight: Tensor | None = None,
    table: Tensor | None = None,
    tail: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative evidence lower bound: mean over cells of -log p plus beta times the mean KL divergence.

    Differentiated in mu, r, z_mu and z_logvar; x is data, and the parts carry no gradient.

    Args:
        x: (n_cells, n_genes) counts.
        mu: (n_cells, n_genes) mean.
        r: (n_genes,) or (n_cells, n_genes) inverse dispersion.
        z_mu: (n_cells, n_latent) posterior mean.
        z_logvar: (n_cells, n_latent) posterior log variance, unclipped.
        beta: weight of the KL divergence.
        weight: (n_cells,) >= 0, for weighted means sum(w f) / sum(w); None for plain means.
        table: (n_rows, n_genes) of these x and weight, as for `nb_log_prob_sum`; used where r is one per gene.
        tail: (n_tail,) the same.

    Returns:
        loss (), nats per cell, and parts {"nll", "kl"}, its two means before beta.

    Raises:
        ValueError: shapes that do not fit.
    """
    weight = torch.ones(x.shape[0], dtype=mu.dtype, device=mu.device) if weight is None else weight
    total = weight.sum()
    method = "stable" if table is None or r.ndim != 1 else "table"
    nll = -nb_log_prob_sum(x, mu, r, weight=weight, method=method, table=table, tail=tail) / total
    kl = (weight * gaussian_kl(z_mu, z_logvar)).sum() / total
    return nll + beta * kl, {"nll": nll.detach(), "kl": kl.detach()}
