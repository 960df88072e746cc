"""The simulation has the operators that it says it has, and draws the cells that it says it draws."""

import numpy as np
import pytest

from pf_core.config import RHO_MAX
from pf_core.labels import CONTROL
from pf_core.metrics import energy_distance, real_pca
from pf_core.noise import generator
from pf_core.simulate import CELL_TYPES, TISSUES, demo_holdout, draw, operator, simulate


@pytest.fixture(scope="module")
def data():
    return simulate(seed=5)


def _labels(data):
    return sorted(set(data.obs["perturbation"]))


def test_counts_are_non_negative_integers_in_csr(data):
    assert data.X.format == "csr"
    assert data.X.dtype == np.float32
    assert np.all((data.X.data >= 0) & (data.X.data == np.rint(data.X.data)))
    assert 5000 < data.n_obs < 7000


def test_columns_follow_the_naming_of_scperturb(data):
    assert {"tissue", "cell_type", "perturbation", "nperts", "batch"} <= set(data.obs.columns)
    members = data.obs["perturbation"].map(lambda label: 0 if label == CONTROL else len(label.split("+")))
    assert (members == data.obs["nperts"]).all()
    assert sum("+" in label for label in _labels(data)) == 10


def test_perturbed_genes_are_among_the_genes_and_names_are_unique(data):
    assert set(data.uns["truth"]["perturbations"]) <= set(data.var_names)
    assert data.var_names.is_unique
    assert data.obs_names.is_unique


def test_a_seed_gives_the_same_cells_and_another_gives_others():
    first, again, other = (simulate(seed, n_genes=41, n_control=5, n_single=3, n_pair=2) for seed in (1, 1, 2))
    assert (first.X != again.X).nnz == 0
    assert first.obs.equals(again.obs)
    assert (first.X != other.X).nnz > 0


def test_truth_survives_a_file(data, tmp_path):
    import anndata

    data.write_h5ad(tmp_path / "simulated.h5ad")
    truth = anndata.read_h5ad(tmp_path / "simulated.h5ad").uns["truth"]
    ours, theirs = (draw(t, "TF1+TF3", "tissue2", "type1", 7, seed=3) for t in (data.uns["truth"], truth))
    assert (ours != theirs).nnz == 0


def test_operators_are_within_the_norm_that_training_allows(data):
    for label in _labels(data):
        A, _ = operator(data.uns["truth"], label)
        assert np.linalg.svd(A, compute_uv=False)[0] <= RHO_MAX + 1e-12


def test_opposites_cancel_and_the_last_perturbation_does_nothing(data):
    for label in (CONTROL, "TF1+TF2", "TF3+TF4", "TF8"):
        A, b = operator(data.uns["truth"], label)
        np.testing.assert_array_equal(A, np.eye(len(b)))
        np.testing.assert_array_equal(b, 0.0)


def test_members_of_a_pair_add_before_they_saturate(data):
    truth = data.uns["truth"]
    norms = np.sum(truth["u"] ** 2, axis=1)  # the u_k are orthogonal
    raw = {label: np.arctanh(truth["u"] @ operator(truth, label)[1] / norms) for label in ("TF5", "TF6", "TF5+TF6")}
    np.testing.assert_allclose(raw["TF5+TF6"], raw["TF5"] + raw["TF6"], rtol=1e-9)


def test_the_same_perturbation_moves_cell_types_in_different_directions(data):
    truth = data.uns["truth"]
    A, b = operator(truth, "TF5")
    moves = truth["cell_types"] @ (A - np.eye(len(b))).T + b
    unit = moves / np.linalg.norm(moves, axis=1, keepdims=True)
    assert np.min(unit @ unit.T) < 0.8


def test_effects_are_far_above_the_null_but_for_those_that_cancel(data):
    truth, pca = data.uns["truth"], real_pca(data.X)
    for label in _labels(data):
        silent = label in (CONTROL, "TF8", "TF1+TF2", "TF3+TF4")
        for tissue in TISSUES:
            found = [
                pca.transform(draw(truth, which, tissue, "type2", 200, seed))
                for which, seed in ((label, 1), (CONTROL, 2), (CONTROL, 3))
            ]
            effect, null = energy_distance(found[0], found[1]), energy_distance(found[2], found[1])
            assert abs(null) < 0.15
            assert abs(effect) < 0.15 if silent else effect > 0.3, (label, tissue)


def test_fresh_draws_come_from_the_distribution_of_the_simulated_cells(data):
    obs, pca, rng = data.obs, real_pca(data.X), generator(5, "test_simulate.permutation")
    chosen = (obs["perturbation"] == "TF5+TF6") & (obs["tissue"] == "tissue1") & (obs["cell_type"] == "type3")
    both = np.vstack(
        [
            pca.transform(data.X[chosen.to_numpy()]),
            pca.transform(draw(data.uns["truth"], "TF5+TF6", "tissue1", "type3", 97, seed=1)),
        ]
    )
    n = int(chosen.sum())
    observed = energy_distance(both[:n], both[n:])
    null = [
        energy_distance(both[order[:n]], both[order[n:]]) for order in (rng.permutation(len(both)) for _ in range(99))
    ]
    assert observed < np.quantile(null, 0.99)


def test_the_held_out_conditions_exist_and_their_members_are_seen_elsewhere(data):
    obs = data.obs
    held = np.zeros(data.n_obs, dtype=bool)
    for clause in demo_holdout(data):
        wanted = dict(part.split("=") for part in clause.split(","))
        chosen = np.all([obs[column] == value for column, value in wanted.items()], axis=0)
        assert chosen.any(), clause
        held |= chosen
    seen = set(obs["perturbation"][~held])
    pairs = {label for label in set(obs["perturbation"][held]) if "+" in label}
    assert len(pairs) == 3
    assert not pairs & seen
    for pair in pairs:
        for member in pair.split("+"):
            assert member in seen
            assert any(member in label.split("+") for label in seen if "+" in label)


def test_impossible_sizes_and_unknown_names_are_refused(data):
    with pytest.raises(ValueError, match="n_perturbations=3"):
        simulate(n_perturbations=3)
    with pytest.raises(ValueError, match="n_pairs=29"):
        simulate(n_pairs=29)
    with pytest.raises(ValueError, match="'TF99'"):
        draw(data.uns["truth"], "TF99", TISSUES[0], CELL_TYPES[0], 3, seed=0)
    with pytest.raises(ValueError, match="'liver'"):
        draw(data.uns["truth"], "TF1", "liver", CELL_TYPES[0], 3, seed=0)
