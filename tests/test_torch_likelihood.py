"""The PyTorch twin's likelihood against mpmath, SciPy and closed forms."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import sparse

torch = pytest.importorskip("torch")

from pf_core.config import LOGVAR_MAX, LOGVAR_MIN, R_MAX, R_MIN, TABLE_ROWS  # noqa: E402
from pf_core.count_table import count_table  # noqa: E402
from pf_torch.likelihood import (  # noqa: E402
    digamma_difference,
    elbo_loss,
    gaussian_kl,
    inverse_dispersion,
    lgamma_difference,
    nb_log_prob,
    nb_log_prob_elements,
    nb_log_prob_sum,
    reparameterize,
    strict_clip,
)

mpmath.mp.dps = 40
F32, F64 = torch.float32, torch.float64


def exact(x: float, mu: float, r: float) -> tuple[float, float, float]:
    """log p, its derivative in log r and in mu, to 40 digits before rounding."""
    x_, mu_, r_ = mpmath.mpf(float(x)), mpmath.mpf(float(mu)), mpmath.mpf(float(r))
    difference = mpmath.loggamma(x_ + r_) - mpmath.loggamma(r_)
    log_p = difference - mpmath.loggamma(x_ + 1) - r_ * mpmath.log1p(mu_ / r_) - x_ * mpmath.log1p(r_ / mu_)
    psi = mpmath.digamma(x_ + r_) - mpmath.digamma(r_)
    d_log_r = r_ * (psi - mpmath.log1p(mu_ / r_) + (mu_ - x_) / (r_ + mu_))
    return float(log_p), float(d_log_r), float(r_ * (x_ - mu_) / (mu_ * (r_ + mu_)))


def computed(x, mu, r, dtype):
    """The inputs as the dtype holds them, and value, d/dlog r and d/dmu of the twin, in float64."""
    x_, mu_, r_ = (torch.tensor(np.asarray(a), dtype=dtype) for a in (x, mu, r))
    mu_.requires_grad_()
    r_.requires_grad_()
    value = nb_log_prob_elements(x_, mu_, r_)
    d_mu, d_r = torch.autograd.grad(value.sum(), (mu_, r_))
    results = (x_, mu_, r_, value, d_r * r_, d_mu)
    return [result.detach().double().numpy() for result in results]


def grid() -> np.ndarray:
    r = [1e-4, 3e-3, 0.7, 1.0, 8.9, 211.0, 1e4]
    mu = [1e-8, 1e-3, 0.31, 1.0, 5.3, 97.0, 4999.0, 1e5]
    x = [0, 1, 2, 3, 5, 11, 31, 32, 211, 5003, 100_003, 1_000_000]
    return np.array(np.meshgrid(x, mu, r)).reshape(3, -1)


def check_float32(x, mu, r) -> None:
    x, mu, r, value, d_log_r, d_mu = computed(x, mu, r, F32)
    for i in range(x.size):
        log_p, want_log_r, want_mu = exact(x[i], mu[i], r[i])
        where = f"x={x[i]!r} mu={mu[i]!r} r={r[i]!r}"
        assert abs(value[i] - log_p) <= 1e-6 * (1 + x[i] + mu[i] + abs(log_p)), where
        assert abs(d_log_r[i] - want_log_r) <= 1e-6 * (1 + x[i] + mu[i]), where
        assert abs(d_mu[i] - want_mu) <= 1e-5 * abs(want_mu), where


def test_float32_likelihood_and_gradients_are_accurate_on_the_whole_domain():
    check_float32(*grid())


def test_float32_likelihood_is_accurate_where_the_mean_meets_the_count():
    rng = np.random.default_rng(3)
    x = np.floor(10 ** rng.uniform(0, 4.9, 211))
    check_float32(x, x * (1 + 1e-3 * rng.standard_normal(211)), 10 ** rng.uniform(-4, 4, 211))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 1_000_000), st.floats(-8.0, 5.0), st.floats(-4.0, 4.0))
@example(1, -8.0, -4.0)
@example(1_000_000, 5.0, 4.0)
def test_float32_likelihood_is_accurate_anywhere(x, log_mu, log_r):
    check_float32([x], [10.0**log_mu], [10.0**log_r])


def test_float64_likelihood_is_accurate_to_rounding():
    x, mu, r, value, d_log_r, d_mu = computed(*grid(), F64)
    want = np.array([exact(*row) for row in zip(x, mu, r, strict=True)])
    scale = 1 + x + mu
    assert np.all(np.abs(value - want[:, 0]) <= 1e-14 * (scale + np.abs(want[:, 0])))
    assert np.all(np.abs(d_log_r - want[:, 1]) <= 1e-14 * scale)
    assert np.all(np.abs(d_mu - want[:, 2]) <= 1e-14 * np.abs(want[:, 2]))


def test_likelihood_is_the_distribution_that_scipy_knows():
    rng = np.random.default_rng(5)
    x, mu, r = rng.integers(0, 61, (7, 11)), rng.uniform(0.1, 50, (7, 11)), rng.uniform(0.1, 20, 11)
    got = nb_log_prob(torch.tensor(x), torch.tensor(mu), torch.tensor(r))
    want = scipy.stats.nbinom.logpmf(x, r, r / (r + mu)).sum(1)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12)


def test_probabilities_of_all_counts_sum_to_one():
    x = torch.arange(20_011, dtype=F64)
    log_p = nb_log_prob_elements(x, torch.tensor(37.0, dtype=F64), torch.tensor(0.9, dtype=F64))
    assert abs(float(log_p.exp().sum()) - 1) < 1e-12


def test_plain_form_is_the_same_function_and_loses_float32():
    rng = np.random.default_rng(7)
    x, mu = torch.tensor(rng.integers(0, 31, (5, 13))), torch.tensor(rng.uniform(0.1, 20, (5, 13)))
    r = torch.full((13,), 1e4, dtype=F64)
    stable, plain = nb_log_prob(x, mu, r), nb_log_prob(x, mu, r, method="plain")
    np.testing.assert_allclose(stable, plain, rtol=1e-10)
    error = [(nb_log_prob(x, mu.float(), r.float(), method=m) - stable).abs().max() for m in ("stable", "plain")]
    assert error[0] < 1e-4 < 1e-3 < error[1]


def test_lgamma_and_digamma_differences_match_mpmath():
    x, _, r = grid()
    got_l, got_d = (f(torch.tensor(x), torch.tensor(r)).numpy() for f in (lgamma_difference, digamma_difference))
    for i in range(x.size):
        a, b = mpmath.mpf(x[i]), mpmath.mpf(r[i])
        want = float(mpmath.loggamma(a + b) - mpmath.loggamma(b))
        assert abs(got_l[i] - want) <= 1e-14 * (1 + x[i] + abs(want))
        want = float(mpmath.digamma(a + b) - mpmath.digamma(b))
        assert abs(got_d[i] - want) <= 1e-14 * abs(want)


def test_differences_are_exactly_zero_at_zero_counts():
    r = torch.logspace(-4, 4, 97)
    assert torch.equal(lgamma_difference(torch.zeros(97), r), torch.zeros(97))
    assert torch.equal(digamma_difference(torch.zeros(97), r), torch.zeros(97))


def test_second_derivative_of_the_lgamma_difference_is_the_trigamma_difference():
    rng = np.random.default_rng(11)
    x, r = rng.integers(0, 1009, 53), 10 ** rng.uniform(-3, 3, 53)
    r_ = torch.tensor(r, requires_grad=True)
    (first,) = torch.autograd.grad(lgamma_difference(torch.tensor(x), r_).sum(), r_, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r_)
    # scipy's own difference cancels: it is exact to 1e-16 of the larger trigamma only
    want = scipy.special.polygamma(1, x + r) - scipy.special.polygamma(1, r)
    np.testing.assert_allclose(second, want, atol=1e-13 * scipy.special.polygamma(1, r).max(), rtol=1e-11)


def test_likelihood_has_all_derivatives_forward_backward_and_second():
    rng = np.random.default_rng(13)
    x = torch.tensor(rng.integers(0, 7, (3, 5)))
    mu = torch.tensor(rng.uniform(0.5, 5, (3, 5)), requires_grad=True)
    r = torch.tensor(rng.uniform(0.5, 5, 5), requires_grad=True)
    function = lambda mu, r: nb_log_prob(x, mu, r)
    assert torch.autograd.gradcheck(function, (mu, r), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (mu, r))
    assert torch.autograd.gradcheck(lambda r: lgamma_difference(x, r), (r,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda r: lgamma_difference(x, r), (r,))


def test_hessian_vector_product_is_the_same_forward_over_reverse():
    rng = np.random.default_rng(17)
    x, mu = torch.tensor(rng.integers(0, 7, (3, 5))), torch.tensor(rng.uniform(0.5, 5, (3, 5)))
    direction = torch.tensor(rng.standard_normal((3, 5)))
    function = lambda mu: nb_log_prob(x, mu, torch.full((5,), 2.0, dtype=F64)).sum()
    _, forward = torch.func.jvp(torch.func.grad(function), (mu,), (direction,))
    # d^2/dmu^2 of r log(r/(r+mu)) + x log(mu/(r+mu)) at r = 2
    np.testing.assert_allclose(forward, ((x + 2.0) / (2 + mu) ** 2 - x / mu**2) * direction, rtol=1e-12)


def test_counts_get_no_gradient():
    x = torch.tensor([[3.0, 0.0]], requires_grad=True)
    mu = torch.tensor([[2.0, 1.0]], requires_grad=True)
    value = nb_log_prob(x, mu, torch.ones(2)).sum()
    assert torch.autograd.grad(value, (x, mu), allow_unused=True)[0] is None


def test_gradient_in_a_gene_wise_r_sums_over_cells():
    rng = np.random.default_rng(19)
    x, mu = torch.tensor(rng.integers(0, 7, (5, 3))), torch.tensor(rng.uniform(0.5, 5, (5, 3)))
    r = torch.tensor([0.5, 2.0, 11.0], dtype=F64, requires_grad=True)
    (got,) = torch.autograd.grad(nb_log_prob(x, mu, r).sum(), r)
    want = [sum(exact(x[c, g], mu[c, g], r[g].item())[1] for c in range(5)) / r[g].item() for g in range(3)]
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_likelihood_names_what_is_wrong():
    x = torch.ones(3, 5)
    with pytest.raises(ValueError, match="method is 'exact'"):
        nb_log_prob(x, x, torch.ones(5), method="exact")
    with pytest.raises(ValueError, match=r"x \(3, 5\), mu \(3, 5\) and r \(4,\) do not broadcast"):
        nb_log_prob(x, x, torch.ones(4))
    with pytest.raises(ValueError, match="float32 or float64 was wanted"):
        nb_log_prob(x, x.half(), torch.ones(5).half())


@pytest.mark.parametrize("dtype", [F32, F64])
def test_strict_clip_passes_gradient_strictly_inside_only(dtype):
    low, high = math.log(R_MIN), math.log(R_MAX)
    x = torch.tensor([-50.0, low, math.nextafter(low, 0) * 0.9999, 0.0, high, 50.0], dtype=dtype, requires_grad=True)
    y = strict_clip(x, low, high)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.tolist() == [0, 0, 1, 1, 0, 0]
    assert torch.equal(y.detach(), x.detach().clamp(low, high))


def test_strict_clip_has_forward_and_second_derivatives_and_keeps_nan():
    x = torch.tensor([-2.0, -1.0, 0.3, 1.0, 2.0], dtype=F64, requires_grad=True)
    _, tangent = torch.func.jvp(lambda x: strict_clip(x, -1.0, 1.0), (x.detach(),), (torch.ones(5, dtype=F64),))
    assert tangent.tolist() == [0, 0, 1, 0, 0]
    (first,) = torch.autograd.grad((strict_clip(x, -1.0, 1.0) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    np.testing.assert_allclose(second, [0, 0, 1.8, 0, 0])
    assert math.isnan(strict_clip(torch.tensor(math.nan), -1.0, 1.0).item())


def test_inverse_dispersion_stays_within_its_bounds():
    r = inverse_dispersion(torch.tensor([-100.0, 0.0, 100.0], dtype=F64))
    np.testing.assert_allclose(r, [R_MIN, 1.0, R_MAX], rtol=1e-14)


def test_kl_is_the_divergence_from_the_standard_normal():
    rng = np.random.default_rng(23)
    mu, logvar = torch.tensor(rng.standard_normal((7, 3))), torch.tensor(rng.uniform(-3, 3, (7, 3)))
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(normal(mu, (logvar / 2).exp()), normal(0.0, 1.0)).sum(1)
    np.testing.assert_allclose(gaussian_kl(mu, logvar), want, rtol=1e-12)


def test_kl_and_sample_share_one_clipped_log_variance():
    logvar = torch.tensor([[-99.0, LOGVAR_MIN, LOGVAR_MAX, 99.0]], dtype=F64, requires_grad=True)
    zero = torch.zeros(1, 4, dtype=F64)
    kl, z = gaussian_kl(zero, logvar), reparameterize(zero, logvar, torch.ones(1, 4, dtype=F64))
    np.testing.assert_allclose(z.detach(), np.exp([[-5.0, -5.0, 5.0, 5.0]]), rtol=1e-14)
    np.testing.assert_allclose(kl.detach(), 0.5 * (2 * (math.exp(-10) + 9) + 2 * (math.exp(10) - 11)), rtol=1e-14)
    assert torch.autograd.grad(kl.sum() + z.sum(), logvar)[0].tolist() == [[0.0] * 4]


def test_elbo_is_the_weighted_mean_and_its_parts_carry_no_gradient():
    rng = np.random.default_rng(29)
    x, mu = torch.tensor(rng.integers(0, 7, (5, 3))), torch.tensor(rng.uniform(0.5, 5, (5, 3)), requires_grad=True)
    r, z_mu, z_logvar = torch.ones(3, dtype=F64), torch.tensor(rng.standard_normal((5, 2))), torch.zeros(5, 2)
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5, 3.0], dtype=F64)
    loss, parts = elbo_loss(x, mu, r, z_mu, z_logvar.double(), beta=0.3, weight=weight)
    nll, kl = -nb_log_prob(x, mu, r).detach().numpy(), gaussian_kl(z_mu, z_logvar.double()).numpy()
    want = np.average(nll, weights=weight), np.average(kl, weights=weight)
    np.testing.assert_allclose([parts["nll"], parts["kl"]], want, rtol=1e-14)
    np.testing.assert_allclose(loss.item(), want[0] + 0.3 * want[1], rtol=1e-14)
    assert loss.requires_grad
    assert not any(part.requires_grad for part in parts.values())
    unweighted, _ = elbo_loss(x, mu, r, z_mu, z_logvar.double())
    np.testing.assert_allclose(unweighted.item(), nll.mean() + kl.mean(), rtol=1e-14)


# --- by the count table -------------------------------------------------------------------------------------------


def tabled(x, weight, dtype=F64) -> dict:
    cells = sparse.csr_matrix(np.asarray(x, np.float64))
    found = count_table(cells, np.asarray(weight), int((np.asarray(x) > TABLE_ROWS).sum()) + 5, dtype="float64")
    return {"method": "table", "table": torch.tensor(found["table"]).to(dtype), "tail": torch.tensor(found["tail"])}


@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_count_table_keeps_the_demanded_accuracy_over_the_whole_domain(dtype):
    unit = 1.0 if dtype == F32 else 2.0**-29
    for point in grid().T:
        x, mu, r = (torch.tensor([[v]], dtype=dtype) for v in point)
        mu.requires_grad_()
        r = r[0].requires_grad_()
        value = nb_log_prob_sum(x, mu, r, **tabled(x, np.ones(1), dtype))
        d_mu, d_r = torch.autograd.grad(value, (mu, r))
        x_, mu_, r_ = x.item(), mu.item(), r.item()
        log_p, want_log_r, want_mu = exact(x_, mu_, r_)
        where = f"x={x_!r} mu={mu_!r} r={r_!r}"
        assert abs(value.item() - log_p) <= 1e-6 * unit * (1 + x_ + mu_ + abs(log_p)), where
        assert abs(d_r.item() * r_ - want_log_r) <= 1e-6 * unit * (1 + x_ + mu_), where
        assert abs(d_mu.item() - want_mu) <= 1e-6 * unit * abs(want_mu), where


def test_the_count_table_is_the_weighted_sum_whatever_the_counts():
    rng = np.random.default_rng(31)
    x = rng.poisson(rng.gamma(0.5, 30.0, (23, 17))).astype(float)
    x[3, 2], x[7, 2], x[0, 16], x[22, 0] = 1e6, 99991, TABLE_ROWS, TABLE_ROWS + 1
    mu, r, weight = rng.gamma(1, 20, x.shape) + 0.01, np.exp(rng.uniform(-8, 8, 17)), rng.integers(0, 9, 23) / 4
    want = (weight[:, None] * scipy.stats.nbinom.logpmf(x, r, r / (r + mu))).sum()
    for method in (tabled(x, weight), {"method": "stable"}):
        got = nb_log_prob_sum(torch.tensor(x), torch.tensor(mu), torch.tensor(r), weight=torch.tensor(weight), **method)
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_the_count_table_has_all_derivatives_forward_backward_and_second():
    rng = np.random.default_rng(37)
    x, weight = rng.integers(0, 50, (5, 3)), np.array([1.0, 0.0, 2.0, 0.25, 1.0])
    mu = torch.tensor(rng.uniform(0.5, 50, (5, 3)), requires_grad=True)
    r = torch.tensor(rng.uniform(0.5, 5, 3), requires_grad=True)
    given = {"weight": torch.tensor(weight), **tabled(x, weight)}
    function = lambda mu, r: nb_log_prob_sum(torch.tensor(x), mu, r, **given)
    assert torch.autograd.gradcheck(function, (mu, r), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (mu, r))


def test_the_elbo_is_the_same_with_and_without_the_count_table():
    rng = np.random.default_rng(41)
    x, mu, r = rng.poisson(20.0, (7, 5)), rng.gamma(2, 10, (7, 5)), rng.gamma(1, 2, 5) + 0.1
    weight = torch.tensor([1.0, 0, 2, 0.5, 0, 1, 1], dtype=F64)
    x, mu, r, z_mu, z_logvar = (torch.tensor(a) for a in (x, mu, r, *rng.normal(size=(2, 7, 3))))
    for weights in (weight, None):
        table = tabled(x, np.ones(7) if weights is None else weight)
        del table["method"]
        for r_ in (r, r.expand_as(mu)):
            one, _ = elbo_loss(x, mu, r_, z_mu, z_logvar, weight=weights, **table)
            two, _ = elbo_loss(x, mu, r_, z_mu, z_logvar, weight=weights)
            np.testing.assert_allclose(one, two, rtol=1e-12)


def test_the_count_table_refuses_what_does_not_fit():
    x = torch.ones(3, 5)
    with pytest.raises(ValueError, match="needs table and tail"):
        nb_log_prob_sum(x, x, torch.ones(5), method="table")
    table = {"method": "table", "table": torch.zeros(7, 5), "tail": torch.full((2,), -1)}
    with pytest.raises(ValueError, match="do not fit"):
        nb_log_prob_sum(x, x, x, **table)
    with pytest.raises(ValueError, match="method is 'exact'"):
        nb_log_prob_sum(x, x, torch.ones(5), method="exact")
