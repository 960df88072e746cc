"""The PyTorch twin's spectral norms and penalties against NumPy's decompositions."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pf_core.config import EPS_NORMALISE, EPS_SIGMA, RHO_MAX  # noqa: E402
from pf_torch.spectral import (  # noqa: E402
    generator_penalty,
    operator_norm,
    power_iteration,
    spectral_norm,
    spectral_penalty,
    spectral_radius,
)


def case(seed=1, n=3, d=7, spread=1.0):
    rng = np.random.default_rng(seed)
    return torch.tensor(spread * rng.standard_normal((n, d, d))), torch.tensor(rng.standard_normal((n, d)))


def test_power_iteration_is_the_loop_of_its_definition():
    A, v0 = case()
    got = power_iteration(A, v0, n_iter=4)
    for k in range(3):
        v = v0[k].numpy()
        for _ in range(4):
            v = A[k].numpy().T @ (A[k].numpy() @ v)
            v = v / (np.linalg.norm(v) + EPS_NORMALISE)
        np.testing.assert_allclose(got[k], v, rtol=1e-12)


def test_spectral_norm_converges_to_the_largest_singular_value():
    A, v0 = case()
    want = np.sqrt(np.linalg.svd(A.numpy(), compute_uv=False)[:, 0] ** 2 + EPS_SIGMA)
    # v is shorter than 1 by EPS_NORMALISE over the norm of its last image
    np.testing.assert_allclose(spectral_norm(A, v0, n_iter=500), want, rtol=1e-8)


def test_carried_vectors_converge_over_steps():
    A, v = case()
    for _ in range(100):
        _, v = spectral_penalty(A, v, n_iter=5)
    want = np.linalg.svd(A.numpy(), compute_uv=False)[:, 0]
    np.testing.assert_allclose(spectral_norm(A, v, n_iter=0), want, rtol=1e-6)


def test_gradient_is_that_of_the_last_line_alone():
    A, v0 = case()  # one iteration from a random start: a leak through it would show
    A.requires_grad_()
    sigma = spectral_norm(A, v0, n_iter=1)
    (grad,) = torch.autograd.grad(sigma.sum(), A)
    v = power_iteration(A, v0, n_iter=1).numpy()
    for k in range(3):
        image = A[k].detach().numpy() @ v[k]
        np.testing.assert_allclose(grad[k], np.outer(image, v[k]) / sigma[k].item(), rtol=1e-10)

    def leaky(A):
        v = (A.mT @ (A @ v0[..., None]))[..., 0]
        return (A @ (v / (v.norm(dim=-1, keepdim=True) + EPS_NORMALISE))[..., None]).norm(dim=(-2, -1)).sum()

    (leaked,) = torch.autograd.grad(leaky(A), A)
    assert (leaked - grad).norm() > 0.1 * grad.norm()


def test_nothing_reaches_the_start_and_the_vector_carries_no_gradient():
    A, v0 = case()
    A.requires_grad_()
    v0.requires_grad_()
    penalty, v = spectral_penalty(A, v0)
    assert not v.requires_grad
    assert torch.autograd.grad(penalty, (A, v0), allow_unused=True)[1] is None


def test_penalty_sums_weighted_squared_excess():
    A, v0 = case()
    weight = torch.tensor([1.0, 0.0, 2.5], dtype=torch.float64)
    penalty, v = spectral_penalty(A, v0, rho_max=1.5, n_iter=3, weight=weight)
    sigma = spectral_norm(A, v0, n_iter=3).numpy()
    want = (weight.numpy() * np.maximum(sigma - 1.5, 0) ** 2).sum()
    np.testing.assert_allclose(penalty, want, rtol=1e-12)
    np.testing.assert_allclose(v, power_iteration(A, v0, n_iter=3), rtol=1e-14)


def test_penalty_and_gradient_are_exactly_zero_within_the_bound():
    A = torch.eye(5).expand(3, 5, 5).clone().requires_grad_()
    penalty, _ = spectral_penalty(A, torch.ones(3, 5))
    assert RHO_MAX > 1
    assert penalty.item() == 0
    assert not torch.autograd.grad(penalty, A)[0].any()


def test_spectral_norm_of_a_zero_matrix_is_finite_with_gradient_zero():
    A = torch.zeros(3, 3, requires_grad=True)
    sigma = spectral_norm(A, torch.ones(3))
    np.testing.assert_allclose(sigma.item(), np.sqrt(EPS_SIGMA))
    assert not torch.autograd.grad(sigma, A)[0].any()


def test_spectral_norm_surrogate_has_forward_and_second_derivatives():
    A, v0 = case(n=1, d=3)
    v = power_iteration(A, v0)
    function = lambda A: spectral_norm(A, v, n_iter=0)
    assert torch.autograd.gradcheck(function, (A.requires_grad_(),), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (A,))


def test_generator_penalty_sums_squared_positive_eigenvalues():
    A, _ = case()
    want = sum(
        (np.maximum(np.linalg.eigvalsh(((a - np.eye(7)) + (a - np.eye(7)).T) / (2 * 0.5)), 0) ** 2).sum()
        for a in A.numpy()
    )
    np.testing.assert_allclose(generator_penalty(A, dt=0.5), want, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda A: generator_penalty(A, dt=0.5), (A.requires_grad_(),))


def test_generator_penalty_of_identities_is_zero_with_finite_gradient():
    A = torch.eye(4).requires_grad_()
    penalty = generator_penalty(A)
    assert penalty.item() == 0
    assert not torch.autograd.grad(penalty, A)[0].any()


def test_monitored_norms_are_exact_and_carry_no_gradient():
    A, _ = case()
    A.requires_grad_()
    numpy = A.detach().numpy()
    for got, want in (
        (operator_norm(A), np.linalg.norm(numpy, 2, axis=(1, 2))),
        (operator_norm(A, kind="frobenius"), np.linalg.norm(numpy, axis=(1, 2))),
        (spectral_radius(A), np.abs(np.linalg.eigvals(numpy)).max(1)),
    ):
        assert not got.requires_grad
        np.testing.assert_allclose(got, want, rtol=1e-10)


def test_wrong_shapes_and_kinds_are_named():
    A, v0 = case()
    with pytest.raises(ValueError, match=r"A has shape \(3, 7, 6\)"):
        spectral_norm(A[:, :, :6], v0)
    with pytest.raises(ValueError, match=r"v0 has shape \(3, 6\)"):
        power_iteration(A, v0[:, :6])
    with pytest.raises(ValueError, match="kind is 'nuclear'"):
        operator_norm(A, kind="nuclear")
