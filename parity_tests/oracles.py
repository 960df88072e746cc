"""A third writing of every public function of the twins, from docs/math.md, on jets: neither JAX nor PyTorch.

Names and argument order are the twins', so that a case names one function for all three.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from parity_tests import jets, special
from parity_tests.jets import WIDE, Array, Jet, Number, concatenate, einsum, jet
from pf_core.config import (
    ADAM_B1,
    ADAM_B2,
    ADAM_EPS,
    CLIP_EPS,
    EPS_NORMALISE,
    EPS_SIGMA,
    LOGVAR_MAX,
    LOGVAR_MIN,
    MU_FLOOR,
    POWER_ITERATIONS,
    R_MAX,
    R_MIN,
    RHO_MAX,
    VAEConfig,
)

Parameters = Mapping[str, Any]


def data(value: Any) -> Array:
    """The numbers of an argument that nothing is differentiated in."""
    return value.value if isinstance(value, Jet) else np.asarray(value)


def one_hot(index: Any, n: int) -> Array:
    return np.eye(n)[np.asarray(data(index), dtype=np.int64)]


def weighted_mean(values: Jet, weight: Any) -> Jet:
    if weight is None:
        return values.mean()
    w = data(weight).astype(WIDE)
    return (values * w).sum() / w.sum()


# --- likelihood (1) --------------------------------------------------------------------------------------------
def strict_clip(x: Any, low: float, high: float) -> Jet:
    return jets.clip(jet(x), low, high)


def lgamma_difference(x: Any, r: Any) -> Jet:
    return special.lgamma_difference(data(x), jet(r))


def digamma_difference(x: Any, r: Any) -> Jet:
    return special.lgamma_difference(data(x), jet(r), 1)


def nb_log_prob_elements(x: Any, mu: Any, r: Any, *, method: str = "stable") -> Jet:
    return special.nb_log_prob_elements(data(x), jet(mu), jet(r), method)


def nb_log_prob(x: Any, mu: Any, r: Any, *, method: str = "stable") -> Jet:
    return nb_log_prob_elements(x, mu, r, method=method).sum(-1)


def nb_log_prob_sum(
    x: Any, mu: Any, r: Any, *, weight: Any = None, method: str = "stable", table: Any = None, tail: Any = None
) -> Jet:
    """The sum that the table stands for, from all counts; table and tail are not looked at."""
    elements = special.nb_log_prob_elements(data(x), jet(mu), jet(r), method).sum(-1)
    return (elements if weight is None else elements * data(weight)).sum()


def inverse_dispersion(log_r: Any) -> Jet:
    return jets.exp(strict_clip(log_r, math.log(R_MIN), math.log(R_MAX)))


def gaussian_kl(mu: Any, logvar: Any) -> Jet:
    mu, lv = jet(mu), strict_clip(logvar, LOGVAR_MIN, LOGVAR_MAX)
    return 0.5 * (mu * mu + jets.exp(lv) - 1.0 - lv).sum(-1)


def reparameterize(mu: Any, logvar: Any, eps: Any) -> Jet:
    lv = strict_clip(logvar, LOGVAR_MIN, LOGVAR_MAX)
    return jet(mu) + jets.exp(lv * 0.5) * jet(eps)


def elbo_loss(
    x: Any,
    mu: Any,
    r: Any,
    z_mu: Any,
    z_logvar: Any,
    *,
    beta: Any = 1.0,
    weight: Any = None,
    table: Any = None,
    tail: Any = None,
) -> tuple[Jet, dict[str, Jet]]:
    nll = weighted_mean(-nb_log_prob(x, mu, r), weight)
    kl = weighted_mean(gaussian_kl(z_mu, z_logvar), weight)
    return nll + data(beta) * kl, {"nll": nll.stop(), "kl": kl.stop()}


# --- layers and the latent model (2) ---------------------------------------------------------------------------
def _below(params: Parameters, prefix: str) -> dict[str, Any]:
    return {name[len(prefix) + 1 :]: value for name, value in params.items() if name.startswith(prefix + ".")}


class Linear:
    def __init__(self, params: Parameters):
        self.weight, self.bias = jet(params["weight"]), jet(params["bias"])

    def __call__(self, x: Any) -> Jet:
        x = jet(x)
        letters = "abcde"[: x.ndim - 1]
        return einsum(f"{letters}i,io->{letters}o", x, self.weight) + self.bias


class Encoder:
    def __init__(self, config: VAEConfig, params: Parameters):
        self.config = config
        self.hidden, self.mean, self.logvar = (Linear(_below(params, k)) for k in ("hidden", "mean", "logvar"))

    def __call__(self, x: Any, tissue: Any) -> tuple[Jet, Jet]:
        counts = jet(data(x))
        h = jets.relu(self.hidden(jets.log1p(counts) if self.config.input == "log1p" else counts))
        n_tissues = self.mean.weight.shape[0] - h.shape[-1]
        joined = concatenate([h, one_hot(tissue, n_tissues)])
        return self.mean(joined), self.logvar(joined)


class Decoder:
    def __init__(self, config: VAEConfig, params: Parameters):
        self.config = config
        self.hidden, self.mean = Linear(_below(params, "hidden")), Linear(_below(params, "mean"))
        self.log_r = jet(params["log_r"])

    def __call__(self, z: Any, tissue: Any, library: Any) -> Jet:
        z = jet(z)
        n_tissues = self.hidden.weight.shape[0] - z.shape[-1]
        logits = self.mean(jets.relu(self.hidden(concatenate([z, one_hot(tissue, n_tissues)]))))
        if self.config.scale == "softplus":
            return jets.softplus(logits) + MU_FLOOR
        # exp(logit - max): the maximum is a constant here, as it cancels from value and derivatives alike.
        powers = jets.exp(logits - logits.value.max(axis=-1, keepdims=True))
        library = jet(library)
        total = powers.sum(-1)
        return library.reshape(*library.shape, 1) * powers / total.reshape(*total.shape, 1) + MU_FLOOR

    def dispersion(self, tissue: Any) -> Jet:
        if self.config.dispersion == "gene":
            return inverse_dispersion(self.log_r)
        return inverse_dispersion(self.log_r[np.asarray(data(tissue), dtype=np.int64)])


class NBVAE:
    def __init__(self, config: VAEConfig, params: Parameters):
        self.encoder = Encoder(config, _below(params, "encoder"))
        self.decoder = Decoder(config, _below(params, "decoder"))
        self.encode, self.decode, self.dispersion = self.encoder, self.decoder, self.decoder.dispersion

    def __call__(self, x: Any, tissue: Any, library: Any, eps: Any) -> tuple[Jet, Jet, Jet, Jet]:
        z_mu, z_logvar = self.encode(x, tissue)
        mu = self.decode(reparameterize(z_mu, z_logvar, eps), tissue, library)
        return mu, self.dispersion(tissue), z_mu, z_logvar


# --- conditions (3) --------------------------------------------------------------------------------------------
class ConditionEncoder:
    def __init__(self, params: Parameters):
        if "perturbation.table" in params:
            self.perturbation = jet(params["perturbation.table"])
        else:
            self.perturbation = einsum("pf,fe->pe", params["features"], params["perturbation.map"])
        self.tissue, self.theta = jet(params["tissue.table"]), Linear(_below(params, "theta"))

    def __call__(self, perturbations: Any, doses: Any, tissue: Any, batch: Any, covariates: Any) -> Jet:
        n, n_t = self.perturbation.shape[0], self.tissue.shape[0]
        doses = jet(doses)
        chosen = one_hot(perturbations, n)
        # A (P, M) dose times a (P, M, n) one-hot, summed over members: the amount of each perturbation.
        amount = einsum("pm,pmn->pn", doses, chosen)
        combined = einsum("pn,ne->pe", amount, self.perturbation)
        embedded = einsum("pt,te->pe", one_hot(tissue, n_t), self.tissue)
        return self.theta(concatenate([combined, embedded, batch, covariates]))


# --- operators (4) ---------------------------------------------------------------------------------------------
class OperatorFamily:
    def __init__(self, params: Parameters):
        self.A0, self.b0, self.B, self.u = (jet(params[name]) for name in ("A0", "b0", "B", "u"))
        self.layers = {
            name: [Linear(_below(params, f"{name}.{layer}")) for layer in ("hidden", "out")]
            for name in ("alpha", "beta")
        }

    def coefficients(self, theta: Any) -> tuple[Jet, Jet]:
        alpha, beta = (second(jets.relu(first(theta))) for first, second in self.layers.values())
        return alpha, beta

    def operator(self, theta: Any, tissue: Any) -> tuple[Jet, Jet]:
        alpha, beta = self.coefficients(theta)
        hot = one_hot(tissue, self.A0.shape[0])
        A = einsum("pt,tij->pij", hot, self.A0) + einsum("pk,kij->pij", alpha, self.B)
        return A, einsum("pt,ti->pi", hot, self.b0) + einsum("pk,ki->pi", beta, self.u)

    def __call__(self, z: Any, theta: Any, tissue: Any) -> Jet:
        return apply_operator(*self.operator(theta, tissue), z)

    def per_cell(self, z: Any, theta: Any, tissue: Any) -> Jet:
        z = jet(z)
        image = self(z.reshape(z.shape[0], 1, z.shape[1]), theta, tissue)
        return image.reshape(*z.shape)


def apply_operator(A: Any, b: Any, z: Any) -> Jet:
    A, b = jet(A), jet(b)
    if A.ndim == 2:
        return einsum("nj,ij->ni", z, A) + b
    return einsum("pnj,pij->pni", z, A) + b.reshape(b.shape[0], 1, b.shape[1])


def compose(operators: Sequence[tuple[Any, Any]]) -> tuple[Jet, Jet]:
    A, b = (jet(part) for part in operators[0])
    batch = "p" * (A.ndim - 2)
    for next_A, next_b in operators[1:]:
        A, b = (
            einsum(f"{batch}ij,{batch}jk->{batch}ik", next_A, A),
            einsum(f"{batch}ij,{batch}j->{batch}i", next_A, b) + jet(next_b),
        )
    return A, b


def commutator_norm(first: tuple[Any, Any], second: tuple[Any, Any]) -> Jet:
    (A, b), (C, d) = compose([second, first]), compose([first, second])
    linear, shift = A - C, b - d
    return jets.sqrt((linear * linear).sum(-2, -1) + (shift * shift).sum(-1))


def response_profile(family: OperatorFamily, theta: Any) -> Jet:
    return concatenate(family.coefficients(theta))


def identity_penalty(A: Any, weight: Any = None) -> Jet:
    gap = jet(A) - np.eye(jet(A).shape[-1])
    return weighted_mean((gap * gap).sum(-2, -1), weight)


# --- distances (5) ---------------------------------------------------------------------------------------------
def _powers(x: Jet, y: Jet, power: int, smoothing: float) -> Jet:
    """|x_i - y_j|^power for (n, d) and (m, d), as (n, m)."""
    gap = x.reshape(x.shape[0], 1, x.shape[1]) - y.reshape(1, *y.shape)
    squared = (gap * gap).sum(-1)
    if power == 2:
        return squared
    return jets.sqrt(squared + smoothing) if smoothing else jets.sqrt(squared)


def _pair_mean(x: Jet, y: Jet, w: Array, v: Array, power: int, smoothing: float) -> Jet:
    return (_powers(x, y, power, smoothing) * np.outer(w, v)).sum()


def _within(x: Jet, w: Array, estimator: str, power: int, smoothing: float) -> Jet:
    products = np.outer(w, w)
    total = WIDE(1)
    if estimator == "u":
        total = 1 - (w**2).sum()
        products = products - np.diag(np.diag(products))
        if np.count_nonzero(w) == 1:  # no pairs: nothing is added, and nothing divided
            total = WIDE(1)
    return (_powers(x, x, power, smoothing) * (products / total)).sum()


def _normalised(weight: Any, n: int) -> Array:
    w = np.ones(n, WIDE) if weight is None else data(weight).astype(WIDE)
    return w / w.sum()


def energy_distance(
    x: Any,
    y: Any,
    *,
    wx: Any = None,
    wy: Any = None,
    estimator: str = "v",
    power: int = 1,
    smoothing: float = 0.0,
    method: str = "tiled",
    tile: int = 0,
) -> Jet:
    x, y = jet(x), jet(y)
    w, v = _normalised(wx, x.shape[0]), _normalised(wy, y.shape[0])
    cross = 2.0 * _pair_mean(x, y, w, v, power, smoothing)
    return cross - _within(x, w, estimator, power, smoothing) - _within(y, v, estimator, power, smoothing)


def energy_distance_grouped(
    x: Any, y: Any, *, wx: Any, wy: Any, estimator: str = "v", power: int = 1, smoothing: float = 0.0
) -> Jet:
    x, y, wx, wy = jet(x), jet(y), data(wx), data(wy)
    options = {"estimator": estimator, "power": power, "smoothing": smoothing}
    distances = []
    for p in range(x.shape[0]):
        if wx[p].sum() == 0 or wy[p].sum() == 0:
            distances.append(jet(0.0))
            continue
        i, j = wx[p] > 0, wy[p] > 0
        distances.append(energy_distance(x[p][i], y[p][j], wx=wx[p][i], wy=wy[p][j], **options))
    filled = next((item for item in distances if item.b is not None or item.a is not None), None)
    if filled is not None:  # give empty groups the zero derivatives that stacking wants
        distances = [item + filled * 0.0 if item.a is None else item for item in distances]
    return jets.stack(distances)


def sliced_energy_distance(x: Any, y: Any, directions: Any, *, estimator: str = "v") -> Jet:
    x, y = jet(x), jet(y)
    directions = data(directions).astype(WIDE)
    d = directions.shape[1]
    factor = WIDE(math.sqrt(math.pi) * math.gamma((d + 1) / 2) / math.gamma(d / 2))
    lines = [
        energy_distance(einsum("nd,de->ne", x, w[:, None]), einsum("nd,de->ne", y, w[:, None]), estimator=estimator)
        for w in directions
    ]
    return jets.stack(lines).mean() * factor


# --- spectral (6) ----------------------------------------------------------------------------------------------
def _matrices(A: Any) -> tuple[Jet, tuple[int, ...]]:
    A = jet(A)
    return A.reshape(-1, *A.shape[-2:]), A.shape[:-2]


def power_iteration(A: Any, v0: Any, *, n_iter: int = POWER_ITERATIONS) -> Jet:
    A, lead = _matrices(A)
    A, v = A.stop(), jet(v0).stop().reshape(-1, A.shape[-1])
    for _ in range(n_iter):
        v = einsum("pji,pj->pi", A, einsum("pij,pj->pi", A, v))
        norm = jets.sqrt((v * v).sum(-1)) + EPS_NORMALISE
        v = v / norm.reshape(-1, 1)
    return v.reshape(*lead, v.shape[-1])


def spectral_norm(A: Any, v0: Any, *, n_iter: int = POWER_ITERATIONS) -> Jet:
    flat, lead = _matrices(A)
    image = einsum("pij,pj->pi", flat, power_iteration(flat, v0, n_iter=n_iter))
    return jets.sqrt((image * image).sum(-1) + EPS_SIGMA).reshape(*lead)


def spectral_penalty(
    A: Any, v0: Any, *, rho_max: float = RHO_MAX, n_iter: int = POWER_ITERATIONS, weight: Any = None
) -> tuple[Jet, Jet]:
    excess = jets.relu(spectral_norm(A, v0, n_iter=n_iter) - rho_max)
    w = np.ones(excess.shape) if weight is None else data(weight)
    return (excess * excess * w).sum(), power_iteration(A, v0, n_iter=n_iter)


def generator_penalty(A: Any, *, dt: float = 1.0) -> Jet:
    """sum relu(eig)^2 of the symmetric part; derivatives by the Daleckii-Krein formula for f(t) = relu(t)^2."""
    flat, _ = _matrices(A)
    gap = (flat - np.eye(flat.shape[-1])) / dt
    symmetric = (gap + gap.transpose()) * 0.5
    total = jet(0.0)
    for p in range(symmetric.shape[0]):
        total = total + _trace_of_square_positive_part(symmetric[p])
    return total


def _trace_of_square_positive_part(S: Jet) -> Jet:
    eigenvalues, vectors = np.linalg.eigh(S.value.astype(np.float64))
    positive = np.maximum(eigenvalues, 0)
    slope = 2 * positive
    gaps = eigenvalues[:, None] - eigenvalues[None, :]
    near = np.abs(gaps) < 1e-9
    divided = np.where(
        near, 2.0 * (eigenvalues[:, None] > 0), (slope[:, None] - slope[None, :]) / np.where(near, 1, gaps)
    )
    gradient = (vectors * slope) @ vectors.T
    size = float(np.abs(S.value).sum()) + 1e-300
    d = len(eigenvalues)
    # An eigensolver is backward stable: absolute errors of d |S| u in eigenvalues, of the same order in the gradient.
    value = Number(np.asarray((positive**2).sum(), WIDE), np.asarray(2 * positive.sum() * size + (positive**2).sum()))
    first = Number(gradient.astype(WIDE), np.full((d, d), 2.0 * size))
    a = None if S.a is None else jets._einsum("ij,Nij->N", first, S.a)
    b = None if S.b is None else jets._einsum("ij,ij->", first, S.b)
    ab = None
    if S.a is not None and S.b is not None:
        rotated = vectors.T @ S.b.value.astype(np.float64) @ vectors
        second = vectors @ (divided * rotated) @ vectors.T
        ab = jets._einsum("ij,Nij->N", Number(second.astype(WIDE), np.full((d, d), 4.0 * np.abs(rotated).sum())), S.a)
        if S.ab is not None:
            ab = jets._add(ab, jets._einsum("ij,Nij->N", first, S.ab))
    return Jet(value, a, b, ab)


def operator_norm(A: Any, *, kind: str = "spectral") -> Jet:
    flat, lead = _matrices(A)
    flat = flat.stop()
    if kind == "frobenius":
        return jets.sqrt((flat * flat).sum(-2, -1)).reshape(*lead)
    singular = np.linalg.svd(flat.value.astype(np.float64), compute_uv=False)[:, 0]
    return Jet(Number(singular.astype(WIDE), np.abs(flat.value).sum(axis=(1, 2)).astype(float))).reshape(*lead)


def spectral_radius(A: Any) -> Jet:
    flat, lead = _matrices(A)
    radius = np.abs(np.linalg.eigvals(flat.value.astype(np.float64))).max(axis=-1)
    # Non-symmetric eigenvalues can be worse conditioned than the matrix; the cases use well-separated ones.
    return Jet(Number(radius.astype(WIDE), 10 * np.abs(flat.value).sum(axis=(1, 2)).astype(float))).reshape(*lead)


# --- optimiser (8) ---------------------------------------------------------------------------------------------
def clip_by_global_norm(grads: Parameters, max_norm: float) -> tuple[dict[str, Jet], Jet]:
    norm = jets.sqrt(_total([(jet(g) * jet(g)).sum() for g in grads.values()]))
    factor = jet(max_norm) / (norm + CLIP_EPS)
    if factor.value >= 1:
        return {name: jet(g) for name, g in grads.items()}, norm
    return {name: jet(g) * factor for name, g in grads.items()}, norm


def _total(terms: Sequence[Jet]) -> Jet:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def adam_update(
    params: Parameters,
    grads: Parameters,
    m: Parameters,
    v: Parameters,
    count: Any,
    *,
    lr: Any,
    weight_decay: float = 0.0,
) -> tuple[dict[str, Jet], dict[str, Jet], dict[str, Jet], Array]:
    count = data(count) + 1
    rate = data(lr).astype(WIDE)
    corrections = [-np.expm1(WIDE(count) * np.log1p(WIDE(b) - 1)) for b in (ADAM_B1, ADAM_B2)]
    new_params, new_m, new_v = {}, {}, {}
    for name, value in params.items():
        p, g = jet(value), jet(grads[name])
        new_m[name] = jet(m[name]) * ADAM_B1 + g * (1 - WIDE(ADAM_B1))
        new_v[name] = jet(v[name]) * ADAM_B2 + g * g * (1 - WIDE(ADAM_B2))
        step = (new_m[name] / corrections[0]) / (jets.sqrt(new_v[name] / corrections[1]) + ADAM_EPS)
        new_params[name] = p - rate * (step + p * weight_decay)
    return new_params, new_m, new_v, count
