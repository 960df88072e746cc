"""Rule 6: what stop-gradient holds back, and which parameters each term reaches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from parity_tests import audit, jets
from parity_tests import oracles as oracle
from parity_tests import synthetic as syn
from parity_tests.cases import by_name
from parity_tests.sides import Side
from parity_tests.trajectories import backend_of


# JAX compiles for minutes here. In the fast tier PyTorch is audited; that the gradients are the same is in test_cases.
@pytest.fixture(scope="module", params=[pytest.param("jax", marks=pytest.mark.slow), "torch"])
def backend(request: pytest.FixtureRequest) -> Any:
    return backend_of(request.param, "float64")


@pytest.mark.parametrize("term", audit.REACH)
def test_each_loss_term_reaches_exactly_the_declared_parameters(backend: Any, term: str) -> None:
    names = sorted(syn.parameters_of(term.split(":")[0], syn.configuration()))
    assert audit.reached(backend, term) == audit.declared(term, names)


def test_frozen_parameters_are_neither_stepped_nor_decayed(backend: Any) -> None:
    assert audit.frozen_stay(backend) == []


def spectral_gradients(n_iter: int) -> tuple[np.ndarray, np.ndarray]:
    """d sigma / dA with the vector frozen, and with the gradient leaking through the iteration."""
    case = by_name("spectral_norm/small gap, one step")
    A, v0 = case.leaves()["A"], case.leaves()["v0"]
    frozen = jets.seed({"A": A}, None)["A"]
    image = oracle.einsum("ij,j->i", frozen, oracle.power_iteration(A, v0, n_iter=n_iter))
    surrogate = jets.sqrt((image * image).sum(-1) + 1e-8)
    leaking = v = jets.jet(v0)
    for _ in range(n_iter):
        v = oracle.einsum("ji,j->i", frozen, oracle.einsum("ij,j->i", frozen, v))
        v = v / (jets.sqrt((v * v).sum(-1)) + 1e-8)
    image = oracle.einsum("ij,j->i", frozen, v)
    leaking = jets.sqrt((image * image).sum(-1) + 1e-8)
    return tuple(np.asarray(s.a.value, float).reshape(A.shape) for s in (surrogate, leaking))  # type: ignore[union-attr, return-value]


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_the_gradient_of_the_spectral_norm_is_that_of_the_frozen_vector(framework: str) -> None:
    """One iteration and a small gap: at convergence the envelope theorem would make the two equal."""
    surrogate, leaked = spectral_gradients(1)
    found = Side(framework).evaluate(by_name("spectral_norm/small gap, one step")).gradient["A"]
    assert np.abs(surrogate - leaked).max() > 1e-2
    np.testing.assert_allclose(found, surrogate, rtol=1e-13)  # type: ignore[arg-type]


def test_detach_after_no_grad_changes_nothing_but_dropping_both_does() -> None:
    """docs/math.md 9."""
    torch = pytest.importorskip("torch")
    case = by_name("spectral_norm/small gap, one step")
    gradients = []
    for no_grad, detach in ((True, True), (True, False), (False, False)):
        A, v = (torch.tensor(case.leaves()[name]) for name in ("A", "v0"))
        A.requires_grad_()
        with torch.set_grad_enabled(not no_grad):
            v = A.T @ (A @ v)
            v = v / (v.norm() + 1e-8)
        v = v.detach() if detach else v
        gradients.append(torch.autograd.grad((A @ v).norm(), A)[0].numpy())
    np.testing.assert_array_equal(gradients[0], gradients[1])
    assert np.abs(gradients[2] - gradients[0]).max() > 1e-2


def test_summing_in_a_loop_has_the_gradient_of_the_sum() -> None:
    """docs/math.md 9: the original said that only the last block keeps its gradient."""
    torch = pytest.importorskip("torch")
    x = torch.arange(7.0, dtype=torch.float64, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64)
    for block in (x**2).split(3):
        total = total + block.sum()
    (looped,), (whole,) = (torch.autograd.grad(value, x) for value in (total, (x**2).sum()))
    np.testing.assert_array_equal(looped.numpy(), whole.numpy())
