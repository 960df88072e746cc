"""The likelihood of the JAX twin, against mpmath, SciPy and closed forms."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, special, stats

from pf_core.config import LOGVAR_MAX, LOGVAR_MIN, R_MAX, R_MIN, TABLE_ROWS
from pf_core.count_table import count_table
from pf_jax import likelihood

# JAX compiles for minutes here; in the fast tier the parity suite holds the same functions to the oracle.
pytestmark = pytest.mark.slow

mpmath.mp.dps = 40


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def exact(x: float, mu: float, r: float) -> tuple[float, float, float, float]:
    """log p, r dlogp/dr, dlogp/dmu and r^2 d^2 logp/dr^2 to 40 digits."""
    x_, mu_, r_ = (mpmath.mpf(float(value)) for value in (x, mu, r))
    log_p = mpmath.loggamma(x_ + r_) - mpmath.loggamma(r_) - mpmath.loggamma(x_ + 1)
    log_p -= r_ * mpmath.log1p(mu_ / r_) + x_ * mpmath.log1p(r_ / mu_)
    slope = mpmath.digamma(x_ + r_) - mpmath.digamma(r_) - mpmath.log1p(mu_ / r_) + (mu_ - x_) / (r_ + mu_)
    curvature = mpmath.polygamma(1, x_ + r_) - mpmath.polygamma(1, r_)
    curvature += 1 / r_ - 1 / (r_ + mu_) - (mu_ - x_) / (r_ + mu_) ** 2
    d_mu = r_ * (x_ - mu_) / (mu_ * (r_ + mu_))
    return float(log_p), float(r_ * slope), float(d_mu), float(r_ * r_ * curvature)


def grid(dtype: str) -> np.ndarray:
    """(3, n) x, mu, r over the whole domain, with means next to the counts and both ends of every branch."""
    r = np.concatenate([10.0 ** np.linspace(-4, 4, 13), [1.0, 2.0, 3.0, 2.999, 9.99, 10.0, 10.01]])
    mu = 10.0 ** np.linspace(-8, 5, 12)
    x = np.array([0, 1, 2, 3, 4, 7, 9, 10, 11, 101, 9973, 1e5, 1e6])
    points = [np.stack([a.ravel() for a in np.meshgrid(x, mu, r, indexing="ij")])]
    for shift in (1e-6, 1e-3, 0.2, 0.3):
        for sign in (-1, 1):
            near = np.stack([a.ravel() for a in np.meshgrid(x[1:-1], r[::3], indexing="ij")])
            points.append(np.stack([near[0], near[0] * (1 + sign * shift), near[1]]))
    # Points are of the dtype itself: the rounding of the inputs is not the function's error.
    return np.concatenate(points, axis=1).astype(dtype).clip(min=np.array([[0], [1e-8], [R_MIN]], dtype))


@jax.jit
def one_element(mu, r, x):
    function = lambda mu, r: likelihood.nb_log_prob_elements(x[None, None], mu[None, None], r[None])[0, 0]
    return jax.value_and_grad(function, (0, 1))(mu, r)


def derivatives(x, mu, r):
    def elements(mu, r):
        return likelihood.nb_log_prob_elements(x[None], mu[None], r[None])[0]

    ones = jnp.ones_like(mu), jnp.ones_like(r)
    value, by_mu = jax.jvp(lambda mu: elements(mu, r), (mu,), ones[:1])
    slope = lambda r: jax.jvp(lambda r: elements(mu, r), (r,), ones[1:])[1]
    by_r, curvature = jax.jvp(slope, (r,), ones[1:])
    return [np.asarray(item, np.float64) for item in jax.jit(lambda: (value, by_r, by_mu, curvature))()]


@pytest.fixture(scope="module", params=["float32", "float64"])
def evaluated(request):
    points = grid(request.param)
    with jax.enable_x64(True):
        found = derivatives(*(jnp.asarray(row) for row in points))
    wanted = np.array([exact(*point) for point in points.T.tolist()]).T
    return request.param, points.astype(np.float64), found, wanted


def test_nb_log_prob_value_is_within_the_demanded_error_over_the_whole_domain(evaluated):
    dtype, (x, mu, _), found, wanted = evaluated
    error = np.abs(found[0] - wanted[0]) / (1 + x + mu + np.abs(wanted[0]))
    assert error.max() < {"float32": 5e-7, "float64": 1e-15}[dtype]


def test_nb_log_prob_gradient_in_log_r_is_within_the_demanded_error_over_the_whole_domain(evaluated):
    dtype, (x, mu, r), found, wanted = evaluated
    error = np.abs(found[1] * r - wanted[1]) / (1 + x + mu)
    assert error.max() < {"float32": 5e-7, "float64": 2e-15}[dtype]


def test_nb_log_prob_gradient_in_mu_is_relatively_accurate_over_the_whole_domain(evaluated):
    dtype, _, found, wanted = evaluated
    error = np.abs(found[2] - wanted[2]) / np.maximum(np.abs(wanted[2]), 1e-300)
    assert error[wanted[2] != 0].max() < {"float32": 1e-6, "float64": 2e-15}[dtype]
    assert (found[2][wanted[2] == 0] == 0).all()


def test_nb_log_prob_curvature_in_r_is_accurate_over_the_whole_domain(evaluated):
    dtype, (x, mu, r), found, wanted = evaluated
    error = np.abs(found[3] * r * r - wanted[3]) / (1 + x + mu)
    assert error.max() < {"float32": 1e-6, "float64": 3e-15}[dtype]


@settings(max_examples=150, deadline=None)
@given(
    x=st.integers(0, 1_000_000),
    log_mu=st.floats(math.log(1e-8), math.log(1e5)),
    log_r=st.floats(math.log(1.001e-4), math.log(0.999e4)),
)
def test_nb_log_prob_in_float32_holds_for_any_point_of_the_domain(x, log_mu, log_r):
    x, mu, r = np.float32(x), np.float32(math.exp(log_mu)), np.float32(math.exp(log_r))
    value, (by_mu, by_r) = one_element(mu, r, x)
    log_p, slope, d_mu, _ = exact(x, mu, r)
    scale = 1 + float(x) + float(mu)
    assert abs(float(value) - log_p) <= 1e-6 * (scale + abs(log_p))
    assert abs(float(by_r) * float(r) - slope) <= 1e-6 * scale
    assert abs(float(by_mu) - d_mu) <= 1e-5 * abs(d_mu)


def test_nb_log_prob_agrees_with_scipy_and_sums_over_genes():
    rng = np.random.default_rng(0)
    x, mu, r = rng.negative_binomial(1, 0.1, (7, 11)), rng.gamma(1.0, 5.0, (7, 11)), rng.gamma(1.0, 3.0, 11)
    wanted = stats.nbinom.logpmf(x, r, r / (r + mu)).sum(1)
    np.testing.assert_allclose(
        likelihood.nb_log_prob(jnp.asarray(x), jnp.asarray(mu), jnp.asarray(r)), wanted, rtol=1e-12
    )


@pytest.mark.parametrize("per_cell", [False, True])
def test_many_cells_are_taken_in_blocks_and_nothing_changes(per_cell):
    rng = np.random.default_rng(4)
    n, n_genes = 2 * likelihood._ROWS + 3, 5
    x, mu = rng.poisson(3.0, (n, n_genes)), rng.gamma(1, 3, (n, n_genes)) + 0.01
    r, weight = rng.gamma(1, 2, (n, n_genes) if per_cell else n_genes) + 0.01, rng.normal(size=n)
    loss = lambda mu, r: (weight * likelihood.nb_log_prob(jnp.asarray(x), mu, r)).sum()
    value, (by_mu, by_r) = jax.jit(jax.value_and_grad(loss, (0, 1)))(jnp.asarray(mu), jnp.asarray(r))
    assert float(value) == pytest.approx((weight[:, None] * stats.nbinom.logpmf(x, r, r / (r + mu))).sum(), rel=1e-11)
    np.testing.assert_allclose(by_mu, weight[:, None] * r * (x - mu) / (mu * (r + mu)), rtol=1e-12)
    slope = special.digamma(x + r) - special.digamma(r) - np.log1p(mu / r) + (mu - x) / (r + mu)
    slope = weight[:, None] * slope
    np.testing.assert_allclose(by_r, slope if per_cell else slope.sum(0), rtol=1e-9)


def test_nb_log_prob_sums_to_one_over_the_counts():
    x = jnp.arange(5000.0)[:, None]
    for mu, r in ((3.0, 0.7), (40.0, 2.3), (0.2, 900.0)):
        mass = jnp.exp(likelihood.nb_log_prob(x, jnp.full_like(x, mu), jnp.full((1,), r))).sum()
        assert abs(float(mass) - 1) < 1e-12


def test_nb_log_prob_plain_method_is_the_same_function():
    rng = np.random.default_rng(1)
    x, mu, r = (
        jnp.asarray(a) for a in (rng.poisson(3.0, (5, 13)) * 1.0, rng.gamma(1, 3, (5, 13)), rng.gamma(1, 2, 13))
    )
    plain = likelihood.nb_log_prob_elements(x, mu, r, method="plain")
    np.testing.assert_allclose(likelihood.nb_log_prob_elements(x, mu, r), plain, rtol=1e-10)


def test_nb_log_prob_takes_a_dispersion_per_cell_and_integer_counts():
    rng = np.random.default_rng(2)
    x, mu, r = rng.poisson(3.0, (5, 7)), rng.gamma(1, 3, (5, 7)), rng.gamma(1, 2, (5, 7))
    wanted = stats.nbinom.logpmf(x, r, r / (r + mu))
    found = likelihood.nb_log_prob_elements(jnp.asarray(x, jnp.int32), jnp.asarray(mu), jnp.asarray(r))
    np.testing.assert_allclose(found, wanted, rtol=1e-11)


@pytest.mark.parametrize("method", ["stable", "plain"])
def test_nb_log_prob_passes_no_gradient_to_the_counts(method):
    x, r = jnp.asarray([[0.0, 2.0, 30.0]]), jnp.ones(3)
    both = jax.grad(lambda x: likelihood.nb_log_prob(x, x + 1.0, r, method=method).sum())(x)
    only_mu = jax.grad(lambda mu: likelihood.nb_log_prob(x, mu, r, method=method).sum())(x + 1.0)
    np.testing.assert_array_equal(both, only_mu)


def test_nb_log_prob_second_derivatives_agree_with_central_differences():
    x, mu = jnp.asarray([[0.0, 1.0, 5.0, 40.0]]), jnp.asarray([[0.3, 2.0, 4.0, 55.0]])
    r = jnp.asarray([0.2, 3.0, 7.0, 90.0])
    gradient = jax.jit(jax.grad(lambda mu, r: likelihood.nb_log_prob(x, mu, r).sum(), (0, 1)))
    h = 1e-6
    for d_mu, d_r in ((mu, 0 * r), (0 * mu, r)):
        _, found = jax.jvp(gradient, (mu, r), (d_mu, d_r))
        up, down = gradient(mu + h * d_mu, r + h * d_r), gradient(mu - h * d_mu, r - h * d_r)
        for one, high, low in zip(found, up, down, strict=True):
            np.testing.assert_allclose(one, (high - low) / (2 * h), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lgamma_and_digamma_differences_agree_with_mpmath(dtype):
    x, _, r = grid(dtype)
    r, x = r[r >= R_MIN], x[r >= R_MIN]
    for function, special_function, scale in (
        (likelihood.lgamma_difference, mpmath.loggamma, 1.0),
        (likelihood.digamma_difference, mpmath.digamma, 0.0),
    ):
        found = np.asarray(jax.jit(function)(jnp.asarray(x), jnp.asarray(r)), np.float64)
        pairs = [(mpmath.mpf(a), mpmath.mpf(b)) for a, b in zip(x.tolist(), r.tolist(), strict=True)]
        wanted = np.array([float(special_function(a + b) - special_function(b)) for a, b in pairs])
        error = np.abs(found - wanted) / np.maximum(np.abs(wanted) + scale, 1e-300)
        assert error[x > 0].max() < {"float32": 1e-6, "float64": 4e-15}[dtype]
        assert (found[x == 0] == 0).all()


def test_lgamma_difference_has_the_digamma_and_trigamma_differences_as_derivatives():
    x, r = jnp.asarray([0.0, 1.0, 3.0, 8.0, 12.0, 400.0]), jnp.asarray([0.01, 0.4, 5.0, 9.9, 10.1, 77.0])
    first = jax.jvp(lambda r: likelihood.lgamma_difference(x, r), (r,), (jnp.ones_like(r),))[1]
    np.testing.assert_allclose(first, special.digamma(x + r) - special.digamma(r), rtol=1e-11, atol=1e-14)
    second = jax.jvp(lambda r: likelihood.digamma_difference(x, r), (r,), (jnp.ones_like(r),))[1]
    np.testing.assert_allclose(second, special.polygamma(1, x + r) - special.polygamma(1, r), rtol=1e-11, atol=1e-14)


def test_strict_clip_passes_gradient_strictly_inside_only():
    x = jnp.asarray([-3.0, -2.0, -1.0, 4.0, 5.0, 6.0])
    value, vjp = jax.vjp(lambda x: likelihood.strict_clip(x, -2.0, 5.0), x)
    np.testing.assert_array_equal(value, [-2.0, -2.0, -1.0, 4.0, 5.0, 5.0])
    np.testing.assert_array_equal(vjp(jnp.ones(6))[0], [0, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(
        jax.jvp(lambda x: likelihood.strict_clip(x, -2.0, 5.0) ** 2, (x,), (x,))[1], [0, 0, 2, 32, 0, 0]
    )
    hessian = jax.hessian(lambda x: (likelihood.strict_clip(x, -2.0, 5.0) ** 3).sum())(x)
    np.testing.assert_array_equal(np.diag(hessian), [0, 0, -6.0, 24.0, 0, 0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_inverse_dispersion_is_bounded_and_flat_at_the_bounds(dtype):
    bounds = np.array([math.log(R_MIN), math.log(R_MAX)]).astype(dtype)
    log_r = jnp.asarray(np.concatenate([[-50.0], bounds, [0.5, 50.0]]).astype(dtype))
    value, slope = jax.jvp(likelihood.inverse_dispersion, (log_r,), (jnp.ones_like(log_r),))
    assert value.dtype == dtype
    np.testing.assert_allclose(value, [R_MIN, R_MIN, R_MAX, math.exp(0.5), R_MAX], rtol=1e-6)
    np.testing.assert_allclose(slope, [0, 0, 0, math.exp(0.5), 0], rtol=1e-6)


def test_gaussian_kl_is_the_integral_of_the_log_ratio():
    mu, logvar = np.array([[0.7, -1.3]]), np.array([[0.4, -2.0]])
    found = likelihood.gaussian_kl(jnp.asarray(mu), jnp.asarray(logvar))
    wanted = 0.0
    for m, s in zip(mu[0], np.exp(logvar[0] / 2), strict=True):
        z = np.linspace(m - 40 * s, m + 40 * s, 200001)
        wanted += np.trapezoid(stats.norm.pdf(z, m, s) * (stats.norm.logpdf(z, m, s) - stats.norm.logpdf(z)), z)
    np.testing.assert_allclose(found, [wanted], rtol=1e-9)


def test_gaussian_kl_and_reparameterize_clip_logvar_without_gradient_at_the_bounds():
    logvar = jnp.asarray([[LOGVAR_MIN - 1, LOGVAR_MIN, 0.3, LOGVAR_MAX, LOGVAR_MAX + 1]])
    mu, eps = jnp.zeros_like(logvar), jnp.ones_like(logvar)
    slope = jax.grad(lambda lv: likelihood.gaussian_kl(mu, lv).sum())(logvar)[0]
    np.testing.assert_allclose(slope, [0, 0, 0.5 * math.expm1(0.3), 0, 0], rtol=1e-12)
    sample, slope = jax.jvp(lambda lv: likelihood.reparameterize(mu, lv, eps), (logvar,), (eps,))
    np.testing.assert_allclose(sample[0], np.exp(0.5 * np.array([-10, -10, 0.3, 10, 10])), rtol=1e-12)
    np.testing.assert_allclose(slope[0], [0, 0, 0.5 * math.exp(0.15), 0, 0], rtol=1e-12)


def test_elbo_loss_weights_cells_and_reports_parts_without_gradient():
    rng = np.random.default_rng(3)
    x, mu, r = rng.poisson(2.0, (5, 3)), rng.gamma(1, 2, (5, 3)) + 0.1, rng.gamma(1, 2, 3) + 0.1
    z_mu, z_logvar, weight = rng.normal(size=(5, 2)), rng.normal(size=(5, 2)), np.array([1.0, 0, 2, 0.5, 0])
    nll = -stats.nbinom.logpmf(x, r, r / (r + mu)).sum(1)
    kl = 0.5 * (z_mu**2 + np.exp(z_logvar) - 1 - z_logvar).sum(1)
    arrays = [jnp.asarray(a) for a in (x, mu, r, z_mu, z_logvar)]
    loss, parts = likelihood.elbo_loss(*arrays, beta=0.3, weight=jnp.asarray(weight))
    assert float(loss) == pytest.approx(
        np.average(nll, weights=weight) + 0.3 * np.average(kl, weights=weight), rel=1e-12
    )
    assert float(parts["nll"]) == pytest.approx(np.average(nll, weights=weight), rel=1e-12)
    loss, parts = likelihood.elbo_loss(*arrays)
    assert float(loss) == pytest.approx(nll.mean() + kl.mean(), rel=1e-12)
    leak = jax.grad(lambda mu: sum(likelihood.elbo_loss(arrays[0], mu, *arrays[2:])[1].values()))(arrays[1])
    assert (leak == 0).all()


def test_nb_log_prob_refuses_shapes_that_do_not_fit():
    x = jnp.ones((3, 5))
    with pytest.raises(ValueError, match="align the genes"):
        likelihood.nb_log_prob(x, jnp.ones((3, 4)), jnp.ones(5))
    with pytest.raises(ValueError, match="align the genes"):
        likelihood.nb_log_prob(x, x, jnp.ones(3))
    with pytest.raises(ValueError, match="'stable' or 'plain'"):
        likelihood.nb_log_prob(x, x, jnp.ones(5), method="exact")


# --- by the count table -------------------------------------------------------------------------------------------


def tabled(x, weight, dtype: str = "float64") -> dict:
    cells = sparse.csr_matrix(np.asarray(x, np.float64))
    return {
        k: jnp.asarray(v) for k, v in count_table(cells, weight, int((x > TABLE_ROWS).sum()) + 5, dtype=dtype).items()
    }


@pytest.fixture(scope="module", params=["float32", "float64"])
def summed(request):
    """Every point of the domain as a batch of one cell and one gene."""
    points = grid(request.param)
    x, mu, r = points
    low = np.where(x <= TABLE_ROWS, x, 0)
    table = (np.arange(TABLE_ROWS)[None, :, None] < low[:, None, None]).astype(request.param)
    tail = np.where(x > TABLE_ROWS, 0, -1)[:, None].astype(np.int32)

    def one(x, mu, r, table, tail):
        given = {"method": "table", "table": table, "tail": tail}
        both = jax.value_and_grad(lambda mu, r: likelihood.nb_log_prob_sum(x[None, None], mu, r, **given), (0, 1))
        return both(mu[None, None], r[None])

    with jax.enable_x64(True):
        value, (by_mu, by_r) = jax.jit(jax.vmap(one))(*map(jnp.asarray, (x, mu, r, table, tail)))
    found = [np.asarray(item, np.float64).ravel() for item in (value, by_r, by_mu)]
    return (
        request.param,
        points.astype(np.float64),
        found,
        np.array([exact(*point)[:3] for point in points.T.tolist()]).T,
    )


def test_the_count_table_keeps_the_demanded_accuracy_over_the_whole_domain(summed):
    dtype, (x, mu, r), (value, by_r, by_mu), wanted = summed
    unit = {"float32": 1.0, "float64": 2.0**-29}[dtype]
    assert (np.abs(value - wanted[0]) / (1 + x + mu + np.abs(wanted[0]))).max() < 1e-6 * unit
    assert (np.abs(by_r * r - wanted[1]) / (1 + x + mu)).max() < 1e-6 * unit
    counted = wanted[2] != 0
    assert (np.abs(by_mu - wanted[2])[counted] / np.abs(wanted[2])[counted]).max() < 1e-6 * unit


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_count_table_is_the_weighted_sum_whatever_the_counts(dtype):
    rng = np.random.default_rng(5)
    x = rng.poisson(rng.gamma(0.5, 30.0, (23, 17))).astype(dtype)
    x[3, 2], x[7, 2], x[0, 16], x[22, 0] = 1e6, 99991, TABLE_ROWS, TABLE_ROWS + 1
    mu, r = rng.gamma(1, 20, x.shape) + 0.01, np.exp(rng.uniform(-8, 8, 17))
    weight = rng.integers(0, 9, 23) / 4
    value, (by_mu, by_r) = jax.jit(
        jax.value_and_grad(
            lambda mu, r: likelihood.nb_log_prob_sum(
                jnp.asarray(x), mu, r, weight=jnp.asarray(weight, dtype), method="table", **tabled(x, weight, dtype)
            ),
            (0, 1),
        )
    )(jnp.asarray(mu, dtype), jnp.asarray(r, dtype))
    scale = {"float32": 1e-5, "float64": 1e-12}[dtype]
    wanted = (weight[:, None] * stats.nbinom.logpmf(x, r, r / (r + mu))).sum()
    assert float(value) == pytest.approx(wanted, rel=scale)
    np.testing.assert_allclose(by_mu, weight[:, None] * r * (x - mu) / (mu * (r + mu)), rtol=scale, atol=scale)
    slope = special.digamma(x + r) - special.digamma(r) - np.log1p(mu / r) + (mu - x) / (r + mu)
    size = (weight[:, None] * (1 + x + mu)).sum(0)
    assert (np.abs(by_r - (weight[:, None] * slope).sum(0)) * r / size).max() < scale


def test_the_count_table_has_second_derivatives():
    rng = np.random.default_rng(6)
    x, mu, r = rng.poisson(20.0, (7, 5)), rng.gamma(2, 10, (7, 5)), rng.gamma(1, 2, 5) + 0.1
    weight = rng.integers(0, 9, 7) / 4
    table = tabled(x, weight)
    by_table = lambda mu, r: likelihood.nb_log_prob_sum(x, mu, r, weight=weight, method="table", **table)
    plain = lambda mu, r: (weight * likelihood.nb_log_prob(x, mu, r)).sum()
    point = jnp.asarray(mu), jnp.asarray(r)
    product = lambda f: jax.jvp(jax.grad(f, (0, 1)), point, (point[0] ** 2, 1 + point[1]))[1]
    for found, wanted in zip(product(by_table), product(plain), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)


def test_the_elbo_is_the_same_with_and_without_the_count_table():
    rng = np.random.default_rng(8)
    x, mu, r = rng.poisson(20.0, (7, 5)), rng.gamma(2, 10, (7, 5)), rng.gamma(1, 2, 5) + 0.1
    z, weight = rng.normal(size=(2, 7, 3)), np.array([1.0, 0, 2, 0.5, 0, 1, 1])
    arrays = [jnp.asarray(a) for a in (x, mu, r, *z)]
    for weights in (jnp.asarray(weight), None):
        table = tabled(x, np.ones(7) if weights is None else weight)
        for r_ in (arrays[2], jnp.broadcast_to(arrays[2], x.shape)):
            one, _ = likelihood.elbo_loss(arrays[0], arrays[1], r_, *arrays[3:], weight=weights, **table)
            two, _ = likelihood.elbo_loss(arrays[0], arrays[1], r_, *arrays[3:], weight=weights)
            assert float(one) == pytest.approx(float(two), rel=1e-12)


def test_the_count_table_refuses_what_does_not_fit():
    x = jnp.ones((3, 5))
    with pytest.raises(ValueError, match="needs table and tail"):
        likelihood.nb_log_prob_sum(x, x, jnp.ones(5), method="table")
    table = {"method": "table", "table": jnp.zeros((7, 5)), "tail": jnp.full(2, -1)}
    with pytest.raises(ValueError, match="n_rows, n_genes"):
        likelihood.nb_log_prob_sum(x, x, x, **table)
    with pytest.raises(ValueError, match="'stable' or 'plain'"):
        likelihood.nb_log_prob_sum(x, x, jnp.ones(5), method="exact")
