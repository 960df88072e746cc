"""Norms and spectral penalties of the JAX twin, against SciPy's decompositions and closed forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pf_core.config import EPS_NORMALISE, EPS_SIGMA
from pf_jax import spectral


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def matrices(seed: int = 0, n: int = 3, d: int = 5):
    rng = np.random.default_rng(seed)
    return np.eye(d) + 0.4 * rng.normal(size=(n, d, d)), rng.normal(size=(n, d))


def iterate_by_hand(A, v, n_iter):
    for _ in range(n_iter):
        v = A.T @ (A @ v)
        v = v / (np.linalg.norm(v) + EPS_NORMALISE)
    return v


@pytest.mark.parametrize("n_iter", [0, 1, 5])
def test_power_iteration_is_the_written_recursion(n_iter):
    A, v0 = matrices()
    found = spectral.power_iteration(jnp.asarray(A), jnp.asarray(v0), n_iter=n_iter)
    wanted = [iterate_by_hand(a, v, n_iter) for a, v in zip(A, v0, strict=True)]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_spectral_norm_converges_to_the_largest_singular_value():
    A, v0 = matrices(1)
    found = spectral.spectral_norm(jnp.asarray(A), jnp.asarray(v0), n_iter=2000)
    # v is shorter than 1 by EPS_NORMALISE over its length before normalisation.
    np.testing.assert_allclose(found, np.sqrt(np.linalg.norm(A, 2, axis=(1, 2)) ** 2 + EPS_SIGMA), rtol=2e-8)


@pytest.mark.parametrize("n_iter", [1, 2])
def test_spectral_norm_differentiates_only_the_last_product(n_iter):
    A, v0 = matrices(2)
    found = jax.grad(lambda A: spectral.spectral_norm(A, jnp.asarray(v0), n_iter=n_iter).sum())(jnp.asarray(A))
    for a, v, gradient in zip(A, v0, found, strict=True):
        v = iterate_by_hand(a, v, n_iter)
        sigma = np.sqrt(((a @ v) ** 2).sum() + EPS_SIGMA)
        np.testing.assert_allclose(gradient, np.outer(a @ v, v) / sigma, rtol=1e-11)
    assert (jax.grad(lambda v: spectral.spectral_norm(jnp.asarray(A), v).sum())(jnp.asarray(v0)) == 0).all()


def test_spectral_norm_of_zero_has_a_finite_gradient():
    value, gradient = jax.value_and_grad(lambda A: spectral.spectral_norm(A, jnp.ones(3)))(jnp.zeros((3, 3)))
    assert float(value) == pytest.approx(EPS_SIGMA**0.5)
    assert (gradient == 0).all()


def test_spectral_penalty_is_the_weighted_sum_of_squared_excesses():
    A, v0 = matrices(3)
    A[1] *= 0.1
    weight = np.array([0.5, 2.0, 3.0])
    penalty, v = spectral.spectral_penalty(
        jnp.asarray(A), jnp.asarray(v0), rho_max=0.9, n_iter=2, weight=jnp.asarray(weight)
    )
    vectors = [iterate_by_hand(a, u, 2) for a, u in zip(A, v0, strict=True)]
    sigma = np.array([np.sqrt(((a @ u) ** 2).sum() + EPS_SIGMA) for a, u in zip(A, vectors, strict=True)])
    assert float(penalty) == pytest.approx((weight * np.maximum(sigma - 0.9, 0) ** 2).sum(), rel=1e-12)
    np.testing.assert_allclose(v, vectors, rtol=1e-12)
    plain, _ = spectral.spectral_penalty(jnp.asarray(A), jnp.asarray(v0), rho_max=0.9, n_iter=2)
    assert float(plain) == pytest.approx((np.maximum(sigma - 0.9, 0) ** 2).sum(), rel=1e-12)


def test_spectral_penalty_second_derivative_freezes_the_vector():
    A, v0 = (jnp.asarray(a) for a in matrices(4))
    v = spectral.power_iteration(A, v0, n_iter=1)

    def surrogate(A):
        image = jnp.einsum("pij,pj->pi", A, v)
        return (jnp.maximum(jnp.sqrt((image**2).sum(-1) + EPS_SIGMA) - 0.5, 0) ** 2).sum()

    direction = jnp.sin(jnp.arange(75.0)).reshape(3, 5, 5)
    penalty = lambda A: spectral.spectral_penalty(A, v0, rho_max=0.5, n_iter=1)[0]
    for derivative in (lambda f: jax.grad(f)(A), lambda f: jax.jvp(jax.grad(f), (A,), (direction,))[1]):
        np.testing.assert_allclose(derivative(penalty), derivative(surrogate), rtol=1e-10, atol=1e-13)


def test_generator_penalty_is_the_sum_of_squared_positive_eigenvalues():
    A, _ = matrices(5)
    generator = (A - np.eye(5)) / 0.5
    wanted = (np.maximum(np.linalg.eigvalsh((generator + generator.transpose(0, 2, 1)) / 2), 0) ** 2).sum()
    assert float(spectral.generator_penalty(jnp.asarray(A), dt=0.5)) == pytest.approx(wanted, rel=1e-12)


def test_generator_penalty_derivatives_agree_with_central_differences():
    A = jnp.asarray(matrices(6)[0])
    direction = jnp.cos(jnp.arange(75.0)).reshape(3, 5, 5)
    gradient = jax.grad(spectral.generator_penalty)
    h = 1e-6
    slope = (spectral.generator_penalty(A + h * direction) - spectral.generator_penalty(A - h * direction)) / (2 * h)
    assert float((gradient(A) * direction).sum()) == pytest.approx(float(slope), rel=1e-7)
    second = jax.jvp(gradient, (A,), (direction,))[1]
    wanted = (gradient(A + h * direction) - gradient(A - h * direction)) / (2 * h)
    np.testing.assert_allclose(second, wanted, rtol=1e-6, atol=1e-7)


def test_generator_penalty_derivatives_exist_where_eigenvalues_coincide():
    A = 1.5 * jnp.eye(4)
    np.testing.assert_allclose(jax.grad(spectral.generator_penalty)(A), np.eye(4), rtol=1e-12, atol=1e-14)
    direction = jnp.arange(16.0).reshape(4, 4)
    second = jax.jvp(jax.grad(spectral.generator_penalty), (A,), (direction,))[1]
    np.testing.assert_allclose(second, direction + direction.T, rtol=1e-12)
    assert (jax.grad(spectral.generator_penalty)(jnp.eye(4)) == 0).all()


def test_operator_norm_and_spectral_radius_are_linear_algebras():
    A, _ = matrices(7)
    np.testing.assert_allclose(spectral.operator_norm(jnp.asarray(A)), np.linalg.norm(A, 2, axis=(1, 2)), rtol=1e-12)
    frobenius = spectral.operator_norm(jnp.asarray(A), kind="frobenius")
    np.testing.assert_allclose(frobenius, np.linalg.norm(A, axis=(1, 2)), rtol=1e-12)
    radius = spectral.spectral_radius(jnp.asarray(A))
    np.testing.assert_allclose(radius, np.abs(np.linalg.eigvals(A)).max(1), rtol=1e-12)


def test_monitoring_norms_carry_no_gradient():
    A = jnp.asarray(matrices(8)[0])
    for function in (
        spectral.operator_norm,
        lambda A: spectral.operator_norm(A, kind="frobenius"),
        spectral.spectral_radius,
    ):
        assert (jax.grad(lambda A, function=function: function(A).sum())(A) == 0).all()


def test_spectral_functions_name_what_does_not_fit():
    with pytest.raises(ValueError, match="A has shape"):
        spectral.spectral_norm(jnp.ones((3, 4)), jnp.ones(3))
    with pytest.raises(ValueError, match="v0 has shape"):
        spectral.power_iteration(jnp.ones((2, 3, 3)), jnp.ones(3))
    with pytest.raises(ValueError, match="'spectral' or 'frobenius'"):
        spectral.operator_norm(jnp.ones((3, 3)), kind="nuclear")  # type: ignore[arg-type]
