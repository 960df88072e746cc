"""The linear and the kernel baseline are their closed forms, and decline where they know nothing."""

import numpy as np
import pytest
from scipy import sparse
from scipy.spatial.distance import cdist

from pf_core import regressions
from pf_core.baselines import Declined, Prediction, Profile, Task, control_profile, log_profile
from pf_core.config import MIN_MATCHED
from pf_core.noise import generator

N_GENES = 13
GENES = [f"G{i}" for i in range(N_GENES)]
LABELS = ("G1", "G3", "G1+G4", "G7", "G8")
MEMBERS = {label: tuple(label.split("+")) for label in (*LABELS, "drug")} | {"control": ()}


def _profile(name):
    return generator(19, f"test_regressions.{name}").dirichlet(np.ones(N_GENES))


def _known(*labels, contexts=("c1", "c2")):
    return [
        Profile(label, "t", context, 31 + 7 * place, _profile(f"{label}.{context}"))
        for context in contexts
        for place, label in enumerate(("control", *labels))
    ]


def _task(label, cell_type="c1"):
    counts = sparse.csr_matrix(1 + generator(19, "controls").poisson(5.0, (11, N_GENES)).astype(np.float32))
    members = tuple(label.split("+"))
    return Task(label, "t", cell_type, members, members, counts, np.asarray(counts.sum(axis=1), float).ravel())


def _change(prediction, task):
    """log1p(1e4 p1) - log1p(1e4 p0), up to the rescaling of p1 to the sum of p0."""
    assert isinstance(prediction, Prediction)
    assert prediction.means is not None
    _, mu1 = prediction.means(slice(0, 1))
    return mu1[0] / task.library[0]


def _moved(task, change):
    p0 = control_profile(task)
    p1 = np.maximum(np.expm1(log_profile(p0) + change), 0)
    return p1 * p0.sum() / p1.sum()


def _logs(known):
    controls = {item.cell_type: log_profile(item.mean) for item in known if item.label == "control"}
    return [(item, log_profile(item.mean) - controls[item.cell_type]) for item in known]


def test_linear_is_the_formula_of_the_paper():
    known, task = _known(*LABELS), _task("G5")
    X = np.array([log_profile(item.mean) for item in known]).T
    X = X - X.mean(axis=0)  # prcomp centres the columns
    values, vectors = np.linalg.eigh(X.T @ X)
    G = X @ vectors[:, np.argsort(-values)[:3]]
    Y = np.array([change for _, change in _logs(known)]).T
    P = np.array([sum((G[GENES.index(name)] for name in MEMBERS[item.label]), np.zeros(3)) for item in known])
    b = Y.mean(axis=1)
    W = np.linalg.inv(G.T @ G + 0.1 * np.eye(3)) @ G.T @ (Y - b[:, None]) @ P @ np.linalg.inv(P.T @ P + 0.1 * np.eye(3))
    found = regressions.linear(known, MEMBERS, GENES, n_components=3)(task)
    np.testing.assert_allclose(_change(found, task), _moved(task, G @ W @ G[5] + b), rtol=1e-9)


def test_linear_reads_features_instead_of_genes():
    features = {name: generator(19, f"feature.{name}").standard_normal(4) for name in ("G1", "G3", "G4", "drug")}
    known, task = _known("G1", "G3", "drug"), _task("G4")
    found = regressions.linear(known, MEMBERS, GENES, features=features, n_components=2)(task)
    other = regressions.linear(known, MEMBERS, GENES, features={**features, "G4": features["G3"]}, n_components=2)(task)
    assert not np.allclose(_change(found, task), _change(other, task))


@pytest.mark.parametrize(
    ("labels", "label", "reason"),
    [
        (LABELS, "drug", "drug is not among the genes and has no features"),
        (("drug",), "drug", "fewer than two training conditions are named after a gene or have features"),
    ],
)
def test_linear_declines_without_an_embedding(labels, label, reason):
    assert regressions.linear(_known(*labels), MEMBERS, GENES)(_task(label)) == Declined(reason)


@pytest.mark.parametrize("label", ["G3", "G1+G3"])
def test_kernel_ridge_is_its_closed_form(label):
    known, task = _known("G1", "G3", "G1+G4", contexts=("c1", "c2", "c3")), _task(label, "new")
    rows = [(item, change) for item, change in _logs(known) if item.label != "control"]
    controls = {item.cell_type: item for item in known if item.label == "control"}
    names = ["G1", "G3", "G4"]
    P = np.array([[float(name in MEMBERS[item.label]) for name in names] for item, _ in rows])
    C = np.array([log_profile(controls[item.cell_type].mean) for item, _ in rows])
    Y = np.array([change for _, change in rows])
    n = np.array([1 / (1 / item.n_cells + 1 / controls[item.cell_type].n_cells) for item, _ in rows])
    w = n / (n + MIN_MATCHED)
    centre = (w[:, None] * Y).sum(0) / w.sum()
    squares = cdist(C, C) ** 2
    gamma = 1 / np.median(squares[squares > 0])
    K = P @ P.T * np.exp(-gamma * squares)
    p = np.array([float(name in label.split("+")) for name in names])
    c = log_profile(control_profile(task))
    k = (P @ p) * np.exp(-gamma * ((C - c) ** 2).sum(1))
    change = centre + k @ np.linalg.solve(K + 0.1 * np.diag(1 / w), Y - centre)
    found = regressions.kernel_ridge(known, MEMBERS)(task)
    np.testing.assert_allclose(_change(found, task), _moved(task, change), rtol=1e-8)


def test_kernel_ridge_of_an_unseen_perturbation_wants_features():
    known, task = _known("G1", "G3"), _task("G7")
    reason = "G7 is not among the training perturbations and has no features"
    assert regressions.kernel_ridge(known, MEMBERS)(task) == Declined(reason)
    features = {name: generator(19, f"feature.{name}").standard_normal(4) for name in ("G1", "G3", "G7")}
    assert isinstance(regressions.kernel_ridge(known, MEMBERS, features=features)(task), Prediction)


def test_kernel_ridge_without_training_conditions_declines():
    found = regressions.kernel_ridge(_known(), MEMBERS)(_task("G1"))
    assert found == Declined("there is no training condition with controls in its context")
