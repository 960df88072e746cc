"""Energy distances between sets of cells: in tiles, by group, and sliced (docs/math.md 5).

    E(X, Y) = 2 sum_ij wx_i wy_j |x_i - y_j| - sx sum_ii' wx_i wx_i' |x_i - x_i'| - sy sum_jj' wy_j wy_j' |y_j - y_j'|

with weights that sum to 1; sx = sy = 1 is the V-statistic, and the U-statistic leaves out i = i' and has
sx = 1 / (1 - sum wx^2) (Szekely and Rizzo 2013, doi:10.1016/j.jspi.2013.03.018).

The tiled form visits blocks of pairs, keeps none, and leaves with value and gradient. A block's squared distances
come from a Gram product of centred rows; pairs for which that cancels (near ones, coincident ones, the diagonal) are
computed again from their difference, so that float32 holds for any data and |0| is exactly 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pf_core.config import TILE

__all__ = ["energy_distance", "energy_distance_grouped", "sliced_energy_distance"]

_NEAR = 1e-2  # |x-y|^2 below this share of |x|^2 + |y|^2 has lost two digits in a Gram product
_FAR = 1e30  # a squared distance
_NEAR_ELEMENTS = 1 << 22  # numbers held at once when near pairs are computed again


def _check(
    x: Tensor,
    y: Tensor,
    wx: Tensor | None,
    wy: Tensor | None,
    estimator: str,
    power: int,
    ndim: int,
    smoothing: float = 0.0,
) -> None:
    if x.ndim != ndim or y.ndim != ndim or x.shape[-1] != y.shape[-1] or x.shape[:-2] != y.shape[:-2]:
        wanted = "(n, d) and (m, d)" if ndim == 2 else "(P, n, d) and (P, m, d)"
        raise ValueError(f"x and y have shapes {tuple(x.shape)} and {tuple(y.shape)}; {wanted} were wanted")
    for name, points, weights in (("wx", x, wx), ("wy", y, wy)):
        if weights is not None and weights.shape != points.shape[:-1]:
            shape = tuple(weights.shape)
            raise ValueError(f"{name} has shape {shape}; one weight per cell, {tuple(points.shape[:-1])}, was wanted")
        if points.shape[-2] < (2 if estimator == "u" else 1):
            raise ValueError(f"{points.shape[-2]} cells are too few for estimator {estimator!r}; use more, or 'v'")
    if estimator not in ("v", "u"):
        raise ValueError(f"estimator is {estimator!r}; 'v' or 'u' was wanted")
    if power not in (1, 2):
        raise ValueError(f"power is {power!r}; 1 or 2 was wanted")
    if smoothing < 0:
        raise ValueError(f"smoothing is {smoothing}; a number >= 0 was wanted")


def _normalise(points: Tensor, weights: Tensor | None) -> Tensor:
    """Weights (P, n) that sum to 1, or to 0 where all are 0; float64, so that their rounding is in no distance."""
    if weights is None:
        return torch.full(points.shape[:-1], 1.0 / points.shape[-2], dtype=torch.float64, device=points.device)
    weights = weights.detach().double()
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)


def _self_factor(w: Tensor, estimator: str) -> Tensor:
    """sx of the module's formula, (P,); 0 for a U-statistic of a single cell, which has no pairs."""
    if estimator == "v":
        return torch.ones_like(w[..., 0])
    rest = 1.0 - (w * w).sum(-1)
    return torch.where(rest > 0, 1.0 / torch.where(rest > 0, rest, 1.0), 0.0)


def _mean(points: Tensor, w: Tensor) -> Tensor:
    """Weighted mean (P, 1, d)."""
    return torch.matmul(w.to(points.dtype)[:, None], points)


def _centred(points: Tensor, w: Tensor, centre: Tensor) -> Tensor:
    """points - centre, and 0 for cells of weight 0."""
    return torch.where(w[..., None] > 0, points - centre, 0.0)


def _distances(difference: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """sqrt(|difference|^2 + smoothing) and its reciprocal, both 0 where that is 0 (double where)."""
    squared = (difference * difference).sum(-1) + smoothing
    positive = squared > 0
    distance = torch.sqrt(torch.where(positive, squared, 1.0))
    return torch.where(positive, distance, 0.0), torch.where(positive, 1.0 / distance, 0.0)


def _without_diagonal(w: Tensor, estimator: str) -> Tensor:
    """Weights (P, n, n) of the pairs within one set."""
    pairs = w[..., :, None] * w[..., None, :]
    return pairs if estimator == "v" else pairs * (1.0 - torch.eye(w.shape[-1], dtype=w.dtype, device=w.device))


def _plain_terms(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor, estimator: str) -> list[tuple[Tensor, Tensor]]:
    """Differences and signed pair weights of the three terms, every pair at once."""
    fx, fy = _self_factor(wx, estimator)[:, None, None], _self_factor(wy, estimator)[:, None, None]
    return [
        (x[:, :, None] - y[:, None], (2.0 * wx[:, :, None] * wy[:, None]).to(x.dtype)),
        (x[:, :, None] - x[:, None], (-fx * _without_diagonal(wx, estimator)).to(x.dtype)),
        (y[:, :, None] - y[:, None], (-fy * _without_diagonal(wy, estimator)).to(x.dtype)),
    ]


def _plain(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor, estimator: str, smoothing: float) -> Tensor:
    """The definition, (P,), with all pairs in memory."""
    terms = _plain_terms(x, y, wx, wy, estimator)
    return sum(((w * _distances(diff, smoothing)[0]).sum((-2, -1)) for diff, w in terms), torch.zeros_like(x[:, 0, 0]))


def _plain_gradient(
    x: Tensor, y: Tensor, wx: Tensor, wy: Tensor, estimator: str, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Gradients of `_plain` in closed form, themselves differentiable."""
    pulls = [
        (w * _distances(diff, smoothing)[1])[..., None] * diff for diff, w in _plain_terms(x, y, wx, wy, estimator)
    ]
    return pulls[0].sum(2) + 2.0 * pulls[1].sum(2), -pulls[0].sum(1) + 2.0 * pulls[2].sum(2)


def _block(
    x: Tensor, y: Tensor, wx: Tensor, wy: Tensor, centre: Tensor, smoothing: float, own: str = ""
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One block of pairs: sum_ij wx_i wy_j |x_i - y_j|, and its gradients in x and y.

    Args:
        x, y: (P, a, d) and (P, b, d).
        wx, wy: (P, a) and (P, b), float64.
        centre: (P, 1, d), subtracted for the Gram product; near pairs are taken as they came, where it would round.
        smoothing: added to the squared distances.
        own: "" for two different blocks; else y is x and its gradient is not wanted twice: "v" counts the pairs (i, i),
            whose distance is the root of the smoothing, and "u" leaves them out.

    Returns:
        (P,) float64, (P, a, d) and (P, b, d), the last None for a block with itself.
    """
    # Cells of weight 0 are put far away, where their pairs are neither near nor infinite.
    cx, cy = _centred(x, wx, centre), _centred(y, wy, centre)
    xx, yy = (torch.where(w > 0, (p * p).sum(-1), _FAR) for p, w in ((cx, wx), (cy, wy)))
    scale = xx[:, :, None] + yy[:, None]
    squared = torch.baddbmm(scale, cx, cy.mT, alpha=-2.0)
    near = squared <= scale.mul_(_NEAR)
    if own:
        squared.diagonal(dim1=1, dim2=2).zero_()
        near.diagonal(dim1=1, dim2=2).fill_(False)
    group, i, j = near.nonzero(as_tuple=True)
    chunk = max(1, _NEAR_ELEMENTS // x.shape[-1])
    near_pairs = list(zip(group.split(chunk), i.split(chunk), j.split(chunk), strict=True))
    for g, a, b in near_pairs:
        difference = x[g, a] - y[g, b]
        squared[g, a, b] = (difference * difference).sum(-1)
    distance = squared.add_(smoothing).sqrt_()
    pull = torch.reciprocal(distance)
    if own:
        pull.diagonal(dim1=1, dim2=2).zero_()
    if own == "u":
        distance.diagonal(dim1=1, dim2=2).zero_()
    value = (wx * torch.matmul(distance.double(), wy[..., None])[..., 0]).sum(-1)

    # sum_j (x_i - y_j)/d_ij is x_i sum_j 1/d_ij - sum_j y_j/d_ij, but near pairs, which may coincide, by difference.
    pull.mul_(wx.to(x.dtype)[:, :, None]).mul_(wy.to(x.dtype)[:, None])
    forces = []
    for g, a, b in near_pairs:
        strength = torch.where(distance[g, a, b] > 0, pull[g, a, b], 0.0)
        forces.append((g, a, b, (x[g, a] - y[g, b]) * strength[:, None]))
    pull[group, i, j] = 0.0
    gx = cx * pull.sum(2)[..., None] - torch.matmul(pull, cy)
    gy = None if own else cy * pull.sum(1)[..., None] - torch.matmul(pull.mT, cx)
    for g, a, b, force in forces:
        gx.index_put_((g, a), force, accumulate=True)
        if gy is not None:
            gy.index_put_((g, b), -force, accumulate=True)
    return value, gx, gy


def _between(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor, smoothing: float, tile: int) -> tuple[Tensor, ...]:
    """sum_ij wx_i wy_j |x_i - y_j| over all tiles, and its gradients."""
    centre = 0.5 * (_mean(x, wx) + _mean(y, wy))
    value, gx, gy = torch.zeros_like(wx[:, 0]), torch.zeros_like(x), torch.zeros_like(y)
    for i in range(0, x.shape[1], tile):
        for j in range(0, y.shape[1], tile):
            a, b = slice(i, i + tile), slice(j, j + tile)
            part, part_x, part_y = _block(x[:, a], y[:, b], wx[:, a], wy[:, b], centre, smoothing)
            value += part
            gx[:, a] += part_x
            gy[:, b] += part_y  # type: ignore[operator]
    return value, gx, gy


def _within(x: Tensor, w: Tensor, smoothing: float, tile: int, estimator: str) -> tuple[Tensor, Tensor]:
    """sum_ii' w_i w_i' |x_i - x_i'| over the upper tiles, each of which stands for its mirror image; its gradient."""
    centre = _mean(x, w)
    value, gx = torch.zeros_like(w[:, 0]), torch.zeros_like(x)
    for i in range(0, x.shape[1], tile):
        for j in range(i, x.shape[1], tile):
            a, b = slice(i, i + tile), slice(j, j + tile)
            own = estimator if i == j else ""
            part, part_a, part_b = _block(x[:, a], x[:, b], w[:, a], w[:, b], centre, smoothing, own)
            value += part if i == j else 2.0 * part
            gx[:, a] += 2.0 * part_a
            if part_b is not None:
                gx[:, b] += 2.0 * part_b
    return value, gx


def _tiled_pass(
    x: Tensor, y: Tensor, wx: Tensor, wy: Tensor, estimator: str, smoothing: float, tile: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Value (P,) and gradients in x and y, tile by tile."""
    fx, fy = _self_factor(wx, estimator), _self_factor(wy, estimator)
    xy, gx, gy = _between(x, y, wx, wy, smoothing, tile)
    xx, gxx = _within(x, wx, smoothing, tile, estimator)
    yy, gyy = _within(y, wy, smoothing, tile, estimator)
    value = (2.0 * xy - fx * xx - fy * yy).to(x.dtype)
    gx = 2.0 * gx - fx.to(x.dtype)[:, None, None] * gxx
    gy = 2.0 * gy - fy.to(x.dtype)[:, None, None] * gyy
    return value, gx, gy


def _fused_pass(
    x: Tensor, y: Tensor, wx: Tensor, wy: Tensor, estimator: str, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the kernel, which meets x and y as one set of cells and what cancels pair by pair."""
    from pf_torch.fused import pulls

    n, m = x.shape[1], y.shape[1]
    fx, fy = (_self_factor(w, estimator)[:, None] for w in (wx, wy))
    centre = 0.5 * (_mean(x, wx) + _mean(y, wy))
    # Cells without weight may be anywhere, but nowhere infinite.
    cells = torch.cat([torch.where(w[..., None] > 0, p, centre) for p, w in ((x, wx), (y, wy))], 1)
    on_x, on_y = (torch.cat(parts, 1).to(x.dtype) for parts in ((-fx * wx, wy), (wx, -fy * wy)))
    sum_x, pull_x = pulls(cells, on_x, 0, n, smoothing)
    sum_y, pull_y = pulls(cells, on_y, n, m, smoothing)
    value = (wx * sum_x).sum(-1) + (wy * sum_y).sum(-1)
    if estimator == "v":  # pairs of a cell with itself
        value = value - math.sqrt(smoothing) * ((wx * wx).sum(-1) + (wy * wy).sum(-1))
    gx, gy = (2.0 * w.to(x.dtype)[..., None] * pull for w, pull in ((wx, pull_x), (wy, pull_y)))
    return value.to(x.dtype), gx, gy


class _OnePass(torch.autograd.Function):
    """Value and gradient in one pass over the pairs: by tiles, or by the kernel where tile is None.

    A second derivative, and every derivative under torch.func, takes the gradient from `_plain_gradient` instead, which
    holds all pairs: Hessian-vector products need (P, n, m, d) of memory.
    """

    @staticmethod
    def forward(
        x: Tensor, y: Tensor, wx: Tensor, wy: Tensor, estimator: str, smoothing: float, tile: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if tile is None:
            return _fused_pass(x, y, wx, wy, estimator, smoothing)
        return _tiled_pass(x, y, wx, wy, estimator, smoothing, tile)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, y, wx, wy, ctx.estimator, ctx.smoothing, _ = inputs
        _, gx, gy = output
        ctx.mark_non_differentiable(gx, gy)
        ctx.save_for_backward(x, y, wx, wy, gx, gy)
        ctx.save_for_forward(gx, gy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:  # type: ignore[override]
        x, y, wx, wy, gx, gy = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody will differentiate the gradient
            gx, gy = _plain_gradient(x, y, wx, wy, ctx.estimator, ctx.smoothing)
        grad = grad[:, None, None]
        return grad * gx, grad * gy, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, x_t: Any, y_t: Any, *_: Any) -> Any:  # type: ignore[override]
        gx, gy = ctx.saved_tensors
        tangent = torch.zeros_like(gx[:, 0, 0])
        if x_t is not None:
            tangent = tangent + (gx * x_t).sum((-2, -1))
        if y_t is not None:
            tangent = tangent + (gy * y_t).sum((-2, -1))
        return tangent, None, None


def _squared(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor, estimator: str) -> Tensor:
    """The energy distance with squared norms, (P,), from means and variances: no pairs."""
    centre = _mean(y.detach(), wy)
    x, y = x - centre, y - centre
    a, b = wx.to(x.dtype)[..., None], wy.to(x.dtype)[..., None]
    mean_x, mean_y = (a * x).sum(1), (b * y).sum(1)
    value = 2.0 * ((mean_x - mean_y) ** 2).sum(-1)
    if estimator == "u":
        for points, mean, w, w64 in ((x, mean_x, a, wx), (y, mean_y, b, wy)):
            variance = (w * (points - mean[:, None]) ** 2).sum((1, 2))
            value = value + 2.0 * (1.0 - _self_factor(w64, estimator)).to(x.dtype) * variance
    return value


def _energy(
    x: Tensor,
    y: Tensor,
    wx: Tensor | None,
    wy: Tensor | None,
    estimator: str,
    power: int,
    smoothing: float,
    method: str,
    tile: int,
) -> Tensor:
    y = y.to(x.dtype)
    a, b = _normalise(x, wx), _normalise(y, wy)
    filled = ((a.sum(-1) > 0) & (b.sum(-1) > 0)).double()[:, None]
    a, b = a * filled, b * filled  # a group that is empty on one side has no distance
    if power == 2:  # a constant added to every squared distance cancels, so smoothing has no effect
        return _squared(x, y, a, b, estimator)
    if method == "plain":
        return _plain(x, y, a, b, estimator, smoothing)
    tile_or_none = None if method == "fused" else tile
    return _OnePass.apply(x, y, a, b, estimator, smoothing, tile_or_none)[0]  # type: ignore[index]


def energy_distance(
    x: Tensor,
    y: Tensor,
    *,
    wx: Tensor | None = None,
    wy: Tensor | None = None,
    estimator: str = "v",
    power: int = 1,
    smoothing: float = 0.0,
    method: str = "tiled",
    tile: int | None = None,
) -> Tensor:
    """Energy distance 2 E|x - y| - E|x - x'| - E|y - y'| between two weighted sets of cells.

    Differentiated in x and y; weights are data. Coincident cells have distance 0 and gradient 0. All is 0 when
    the weights of a side are. Tiled, value and gradient need the memory of n + m cells and one tile of pairs; second
    derivatives exist, and in PyTorch they hold all pairs.

    Args:
        x: (n, n_latent).
        y: (m, n_latent).
        wx: (n,) weights >= 0, normalised here; None for equal weights.
        wy: (m,) the same for y.
        estimator: "v" (pairs of a cell with itself count; never negative) or "u" (they do not; unbiased). A side with
            one cell of positive weight has no pairs, and its term of "u" is 0.
        power: 1 for distances, 2 for squared distances (from moments, without pairs).
        smoothing: s >= 0 of sqrt(d^2 + s), in units of x squared, also between a cell and itself; power 2 cancels it.
        method: "tiled", "plain" for whole matrices of distances, or "fused" for one kernel on a CUDA device, which
            PyTorch alone has.
        tile: most rows and columns of a tile; None for what is fast, TILE.

    Returns:
        () distance, in units of x (squared for power 2).

    Raises:
        ValueError: shapes that do not fit, fewer than two cells a side for "u", an unknown option, or "fused" where it
            is not.
    """
    _check(x, y, wx, wy, estimator, power, 2, smoothing)
    if method not in ("tiled", "plain", "fused"):
        raise ValueError(f"method is {method!r}; 'tiled', 'plain' or 'fused' was wanted")
    if method == "fused" and not x.is_cuda:
        raise ValueError(f"method is 'fused', a kernel for CUDA devices, and x is on {x.device}; use 'tiled'")
    tile = TILE["torch"] if tile is None else tile
    if tile < 1:
        raise ValueError(f"tile is {tile}; a positive number of rows was wanted")
    a, b = (None if w is None else w[None] for w in (wx, wy))
    return _energy(x[None], y[None], a, b, estimator, power, smoothing, method, tile)[0]


def energy_distance_grouped(
    x: Tensor,
    y: Tensor,
    *,
    wx: Tensor,
    wy: Tensor,
    estimator: str = "v",
    power: int = 1,
    smoothing: float = 0.0,
) -> Tensor:
    """Energy distance of every condition, on padded groups: one call, no pair across conditions.

    Differentiated in x and y; weights are data. A group with a side whose weights are all 0 gives 0 with gradient 0.

    Args:
        x: (n_conditions, n, n_latent); padding must be finite.
        y: (n_conditions, m, n_latent); padding must be finite.
        wx: (n_conditions, n) weights >= 0, 0 for padding; normalised here.
        wy: (n_conditions, m) the same for y.
        estimator: "v" or "u", as in `energy_distance`.
        power: 1 for distances, 2 for squared distances.
        smoothing: s >= 0 of sqrt(d^2 + s), in units of x squared.

    Returns:
        (n_conditions,) distances, in units of x (squared for power 2).

    Raises:
        ValueError: shapes that do not fit, fewer than two cells a side for "u", or an unknown option.
    """
    _check(x, y, wx, wy, estimator, power, 3, smoothing)
    return _energy(x, y, wx, wy, estimator, power, smoothing, "tiled", TILE["torch"])


def _sign_sums(points: Tensor, others: Tensor) -> Tensor:
    """sum_j sign(points_i - others_j) along rows, ties counting 0, from ranks."""
    ordered = others.sort(dim=-1).values
    below = torch.searchsorted(ordered, points, right=False)
    return (below + torch.searchsorted(ordered, points, right=True) - others.shape[-1]).double()


def sliced_energy_distance(x: Tensor, y: Tensor, directions: Tensor, *, estimator: str = "v") -> Tensor:
    """Energy distance by one-dimensional projections: |x| = c_d E_w |<w, x>| over unit vectors w.

    c_d = sqrt(pi) Gamma((d + 1) / 2) / Gamma(d / 2), d = n_latent. Along one direction the sum of |a_i - b_j| is linear
    between crossings, its slopes differences of ranks: differentiated in x and y exactly, coincident projections with
    slope 0 and the second derivative 0. Each direction costs O((n + m) log(n + m)).

    Args:
        x: (n, n_latent).
        y: (m, n_latent).
        directions: (n_directions, n_latent) unit rows, drawn by the caller.
        estimator: "v" or "u", as in `energy_distance`.

    Returns:
        () distance, mean over directions, in units of x.

    Raises:
        ValueError: shapes that do not fit, fewer than two cells a side for "u", or an unknown estimator.
    """
    _check(x, y, None, None, estimator, 1, 2)
    d, n, m = x.shape[1], x.shape[0], y.shape[0]
    if directions.ndim != 2 or directions.shape[1] != d:
        raise ValueError(f"directions have shape {tuple(directions.shape)}; (n_directions, {d}) was wanted")
    centre = x.detach().mean(0)
    px, py = torch.matmul(directions, (x - centre).mT), torch.matmul(directions, (y - centre).mT)
    sx, sy = px.detach().contiguous(), py.detach().contiguous()
    one = 1 if estimator == "u" else 0
    slope_x = 2.0 * (_sign_sums(sx, sy) / (n * m) - _sign_sums(sx, sx) / (n * (n - one)))
    slope_y = 2.0 * (_sign_sums(sy, sx) / (n * m) - _sign_sums(sy, sy) / (m * (m - one)))
    total = (slope_x * px).sum() + (slope_y * py).sum()
    c = math.sqrt(math.pi) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
    return (c / directions.shape[0] * total).to(x.dtype)
