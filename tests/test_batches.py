"""Batches are pure functions of the step, see every cell once an epoch, and pad without adding weight."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from pf_core.batches import CellSource, ConditionSource, JointSource, conditions, draw, epoch_slice
from pf_core.config import TABLE_ROWS, Config, DataConfig, OperatorConfig, StageConfig, VAEConfig
from pf_core.count_table import count_table, tail_sizes
from pf_core.data import load
from pf_core.fit import make_vocabulary, training_groups, validation_groups
from pf_core.labels import CONTROL
from pf_core.simulate import simulate
from pf_core.splits import split

CONFIG = Config(
    data=DataConfig(genes=0),
    vae=VAEConfig(n_hidden=7, n_latent=3),
    operator=OperatorConfig(conditions_per_step=5, cells_per_condition=11),
    stage_vae=StageConfig(batch_size=13, accumulate=2),
)


@pytest.fixture(scope="module")
def parts():
    dataset = load(simulate(0, n_genes=23, n_control=17, n_single=11, n_pair=7), CONFIG.data)
    cells = split(dataset, CONFIG.data, 0)
    groups = training_groups(dataset, cells)
    return dataset, cells, groups, make_vocabulary(dataset, groups)


def latents_of(dataset) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((dataset.n_cells, 3))


def test_an_epoch_takes_every_item_at_most_once_and_another_epoch_another_order():
    taken = np.concatenate([epoch_slice(17, 5, 0, "x", index) for index in range(3)])
    assert len(set(taken)) == 15
    following = np.concatenate([epoch_slice(17, 5, 0, "x", index) for index in range(3, 6)])
    assert list(taken) != list(following)


def test_a_batch_does_not_depend_on_the_batches_before_it(parts):
    dataset, cells, _, vocabulary = parts
    first = CellSource(dataset, cells.train, cells.validation, vocabulary, CONFIG, 13)
    second = CellSource(dataset, cells.train, cells.validation, vocabulary, CONFIG, 13)
    for step in range(4):
        first.batch(step, 0)
    for one, other in zip(first.batch(9, 0), second.batch(9, 0), strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_a_return_to_a_checkpoint_draws_other_batches(parts):
    dataset, cells, _, vocabulary = parts
    source = CellSource(dataset, cells.train, cells.validation, vocabulary, CONFIG, 13)
    (first, eps), (again, eps_again) = source.batch(0, 0), source.batch(0, 1)
    assert not np.array_equal(np.asarray(first["counts"]), np.asarray(again["counts"]))
    assert not np.array_equal(eps["eps"], eps_again["eps"])


def test_counts_tissue_and_library_of_a_batch_belong_to_the_same_cells(parts):
    dataset, cells, _, vocabulary = parts
    source = CellSource(dataset, cells.train, cells.validation, vocabulary, CONFIG, 13)
    batch = source.cells(np.array([29, 3, 31]), 5)
    np.testing.assert_array_equal(batch["library"][:3], np.asarray(batch["counts"])[:3].sum(1))
    assert [vocabulary.tissues[code] for code in batch["tissue"][:3]] == list(dataset.tissue[[29, 3, 31]])
    assert list(batch["weight"]) == [1, 1, 1, 0, 0]
    assert (batch["library"] > 0).all()


def test_validation_covers_every_validation_cell_once(parts):
    dataset, cells, _, vocabulary = parts
    source = CellSource(dataset, cells.train, cells.validation, vocabulary, CONFIG, 13)
    blocks = source.validation()
    assert sum(weight for _, _, weight in blocks) == len(cells.validation)
    counts = np.concatenate([np.asarray(batch["counts"])[batch["weight"] > 0] for batch, _, _ in blocks])
    np.testing.assert_array_equal(counts, dataset.dense(cells.validation))


def test_conditions_sum_to_the_members_of_their_group(parts):
    dataset, _, groups, vocabulary = parts
    rows = conditions(groups, dataset.perturbations, vocabulary, "float64")
    for row, group in enumerate(groups):
        names = {
            vocabulary.perturbations[code]
            for code, dose in zip(rows["perturbations"][row], rows["doses"][row], strict=True)
            if dose
        }
        assert names == (set() if group.label == CONTROL else set(group.label.split("+")))
        assert vocabulary.tissues[rows["tissue"][row]] == group.tissue


def test_both_sides_of_a_condition_come_from_its_own_cells_and_controls(parts):
    dataset, _, groups, vocabulary = parts
    latents = np.arange(dataset.n_cells, dtype=np.float64)[:, None].repeat(3, 1)  # a cell's latent is its index
    config = replace(CONFIG, dtype="float64")
    source = ConditionSource(latents, groups, [], dataset.perturbations, vocabulary, config)
    batch, _ = source.batch(0, 0)
    keys = {tuple(source.conditions["perturbations"][i]) + tuple(source.conditions["doses"][i]) for i in range(3)}
    assert keys
    for row in range(5):
        x = batch["x"][0, row, batch["wx"][0, row] > 0, 0].astype(int)
        y = batch["y"][0, row, batch["wy"][0, row] > 0, 0].astype(int)
        assert dataset.is_control[x].all()
        assert len(set(dataset.label[y])) == 1
        assert set(dataset.cell_type[x]) == set(dataset.cell_type[y])
        assert set(dataset.tissue[x]) == set(dataset.tissue[y])
        assert not set(x) & set(y)
        assert len(set(x)) == len(x)


def test_contexts_that_share_an_operator_share_a_slot_and_count_once(parts):
    dataset, _, groups, vocabulary = parts
    source = ConditionSource(latents_of(dataset), groups, [], dataset.perturbations, vocabulary, CONFIG)
    table = {}
    for group, slot in zip(groups, source.slots, strict=True):
        table.setdefault((group.label, group.tissue, group.batch), set()).add(slot)
    assert all(len(slots) == 1 for slots in table.values())
    assert len({next(iter(slots)) for slots in table.values()}) == len(table)
    assert 0 not in source.slots
    batch, _ = source.batch(0, 0)
    used = batch["slot"][0][batch["distinct"][0] > 0]
    assert len(set(used)) == len(used)
    assert (batch["slot"][0][batch["distinct"][0] == 0] == 0).all()


def test_validation_of_conditions_weighs_padding_with_nothing(parts):
    dataset, cells, groups, vocabulary = parts
    held = validation_groups(dataset, cells)
    source = ConditionSource(latents_of(dataset), groups, held, dataset.perturbations, vocabulary, CONFIG)
    for batch, _, weight in source.validation():
        assert batch["weight"].sum() == weight
        assert ((batch["wy"].sum(1) >= 5) | (batch["weight"] == 0)).all()


def test_joint_batches_hold_the_counts_of_the_cells_they_name(parts):
    dataset, cells, groups, vocabulary = parts
    source = CellSource(dataset, cells.train, cells.validation, vocabulary, CONFIG, 13)
    joint = JointSource(source, latents_of(dataset), groups, [], vocabulary, CONFIG)
    batch, noise = joint.batch(0, 0)
    assert batch["x_counts"].shape == (1, 5, 11, 23)
    np.testing.assert_array_equal(np.asarray(batch["x_counts"]).sum(-1), batch["x_library"])
    assert batch["cells_counts"].shape == (1, 13, 23)
    assert noise["eps"].shape == (1, 13, 3)


def test_draw_is_without_replacement_and_pads_with_weight_zero():
    chosen, weight = draw(np.array([4, 7, 9]), 5, np.random.default_rng(0))
    assert sorted(chosen[:3]) == [4, 7, 9]
    assert list(weight) == [1, 1, 1, 0, 0]
    chosen, weight = draw(np.arange(100), 5, np.random.default_rng(0))
    assert len(set(chosen)) == 5
    assert weight.sum() == 5


def test_what_the_encoder_reads_does_not_depend_on_the_units_of_doses_and_covariates():
    def rows(dose_unit: float, year: float) -> dict:
        adata = simulate(0, n_genes=23, n_control=17, n_single=11, n_pair=7)
        draw = np.random.default_rng(3)
        adata.obs["dose"] = dose_unit * draw.choice([0.25, 1.0], adata.n_obs)
        adata.obs["age"] = 1950.0 * year + year * draw.normal(size=adata.n_obs)
        dataset = load(adata, DataConfig(genes=0, dose="dose", covariates=("age",)))
        found = training_groups(dataset, split(dataset, CONFIG.data, 0))
        return conditions(found, dataset.perturbations, make_vocabulary(dataset, found), "float64")

    plain, scaled = rows(1.0, 1.0), rows(1000.0, 365.0)
    assert plain["doses"].max() == 1.0
    np.testing.assert_allclose(plain["covariates"].mean(axis=0), 0.0, atol=1e-9)
    np.testing.assert_allclose(plain["covariates"].std(axis=0), 1.0, rtol=1e-9)
    np.testing.assert_allclose(scaled["doses"], plain["doses"], rtol=1e-12)
    np.testing.assert_allclose(scaled["covariates"], plain["covariates"], atol=2e-2)  # read as float32 of 1950 years


def test_a_covariate_that_does_not_vary_is_read_as_zero(parts):
    adata = simulate(0, n_genes=23, n_control=17, n_single=11, n_pair=7)
    adata.obs["age"] = 41.0
    dataset = load(adata, DataConfig(genes=0, covariates=("age",)))
    found = training_groups(dataset, split(dataset, CONFIG.data, 0))
    rows = conditions(found, dataset.perturbations, make_vocabulary(dataset, found), "float32")
    assert not rows["covariates"].any()


# --- the count table ----------------------------------------------------------------------------------------------


def test_a_count_table_and_its_tail_hold_every_count():
    rng = np.random.default_rng(2)
    x = rng.poisson(rng.gamma(0.4, 20.0, (19, 7))).astype(np.float32)
    x[4, 3] = 1e6
    weight = rng.integers(0, 5, 19) / 4
    found = count_table(sparse.csr_matrix(x), weight, 61, rows=11)
    low = np.where(x <= 11, x, 0)
    wanted = [(weight[:, None] * (low > j)).sum(0) for j in range(11)]
    np.testing.assert_array_equal(found["table"], wanted)
    tail = found["tail"]
    np.testing.assert_array_equal(np.sort(tail[tail >= 0]), np.flatnonzero(x > 11))
    assert (tail[(tail >= 0).sum() :] == -1).all()
    np.testing.assert_array_equal(tail_sizes(sparse.csr_matrix(x), 11), (x > 11).sum(1))


def test_a_count_table_of_stored_zeros_and_of_no_cells_is_empty():
    stored = sparse.csr_matrix((np.zeros(3, np.float32), np.array([0, 2, 1]), np.array([0, 2, 3])), (2, 5))
    for cells in (stored, sparse.csr_matrix((0, 5), dtype=np.float32)):
        found = count_table(cells, np.ones(cells.shape[0]), 0)
        assert found["table"].shape == (TABLE_ROWS, 5)
        assert not found["table"].any()
        assert found["tail"].shape == (0,)


def test_a_tail_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="the tail has 1 places"):
        count_table(sparse.csr_matrix(np.full((2, 1), 99.0)), np.ones(2), 1)


def test_batches_bring_their_count_table_in_one_shape(parts):
    dataset, cells, groups, vocabulary = parts
    source = CellSource(dataset, cells.train, cells.validation, vocabulary, CONFIG, 13)
    shapes = set()
    for batch in (*(source.batch(step, 0)[0] for step in range(3)), *(batch for batch, _, _ in source.validation())):
        batch = {name: np.asarray(leaf) for name, leaf in batch.items()}
        rows = [batch] if batch["counts"].ndim == 2 else [{k: v[i] for k, v in batch.items()} for i in range(2)]
        for one in rows:
            wanted = count_table(sparse.csr_matrix(one["counts"]), one["weight"], source.n_tail)
            np.testing.assert_array_equal(one["table"], wanted["table"])
            assert set(one["tail"]) == set(wanted["tail"])
            shapes.add((one["table"].shape, one["tail"].shape))
    assert len(shapes) == 1
    joint = JointSource(source, latents_of(dataset), groups, [], vocabulary, CONFIG)
    assert joint.batch(0, 0)[0]["cells_table"].shape == (1, TABLE_ROWS, 23)


def test_a_dispersion_per_tissue_needs_no_count_table(parts):
    dataset, cells, _, vocabulary = parts
    config = replace(CONFIG, vae=replace(CONFIG.vae, dispersion="gene-tissue"))
    source = CellSource(dataset, cells.train, cells.validation, vocabulary, config, 13)
    assert not {"table", "tail"} & set(source.batch(0, 0)[0])
