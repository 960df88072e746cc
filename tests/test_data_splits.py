"""Splits: what is held out, what is drawn, and the audit that finds every planted leak."""

import json

import anndata
import numpy as np
import pytest
from scipy import sparse
from small_data import real, small

from pf_core.config import DataConfig
from pf_core.data import load
from pf_core.errors import DataError
from pf_core.splits import Split, leak_audit, split


@pytest.fixture(scope="module")
def dataset():
    return load(small(607), DataConfig())


def held(dataset, *expressions, **options):
    return split(dataset, DataConfig(holdout=expressions, validation_share=0.0, **options), 0).heldout


def test_an_expression_is_a_conjunction_and_several_add_up(dataset):
    one = (dataset.label == "A") & (dataset.cell_type == "y")
    two = (dataset.label == "B") & (dataset.tissue == "t1")
    np.testing.assert_array_equal(held(dataset, "perturbation=A,cell_type=y"), np.flatnonzero(one))
    found = held(dataset, " perturbation = A , cell_type = y", "tissue=t1,perturbation=B")
    np.testing.assert_array_equal(found, np.flatnonzero(one | two))


@pytest.mark.parametrize("value", ["A+B", "B+A", "B + A", "ctrl+A+B"])
def test_a_combination_is_held_out_in_any_order(dataset, value):
    np.testing.assert_array_equal(held(dataset, f"perturbation={value}"), np.flatnonzero(dataset.label == "A+B"))


def test_a_context_is_held_out_with_its_controls_but_a_perturbation_never(dataset):
    found = held(dataset, "cell_type=y,tissue=t2")
    np.testing.assert_array_equal(found, np.flatnonzero((dataset.cell_type == "y") & (dataset.tissue == "t2")))
    with pytest.raises(DataError, match="controls cannot be held out"):
        held(dataset, "perturbation=control")


@pytest.mark.parametrize(
    ("expression", "column", "value"),
    [("time=10.5", "time", 10.5), ("time=10", "time", 10.0), ("time=10.0", "time", 10.0), ("batch=2", "batch", 2)],
)
def test_numeric_columns_are_matched_as_numbers(dataset, expression, column, value):
    np.testing.assert_array_equal(held(dataset, expression), np.flatnonzero(dataset.obs[column] == value))


def test_roles_name_their_columns_and_values_may_hold_commas():
    adata = small()
    adata.obs = adata.obs.rename(columns={"perturbation": "guide"})
    adata.obs["cell_type"] = np.where(adata.obs["cell_type"] == "x", "T cells, CD4", "NK")
    dataset = load(adata, DataConfig(perturbation="guide"))
    for name in ("guide", "perturbation"):
        config = DataConfig(perturbation="guide", holdout=(f"cell_type=T cells, CD4,{name}=A",))
        wanted = (dataset.label == "A") & (dataset.cell_type == "T cells, CD4")
        np.testing.assert_array_equal(split(dataset, config, 0).heldout, np.flatnonzero(wanted))


def test_a_perturbation_is_held_out_at_every_dose_or_at_one():
    adata = small()
    adata.obs["dose"] = np.resize([1.0, 0.5], 211)
    dataset = load(adata, DataConfig(dose="dose"))
    every = np.flatnonzero(np.isin(dataset.label, ["A", "A@0.5"]))
    np.testing.assert_array_equal(held(dataset, "perturbation=A"), every)
    np.testing.assert_array_equal(held(dataset, "perturbation=A@0.5"), np.flatnonzero(dataset.label == "A@0.5"))


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("perturbation=GENE33", "did you mean 'GENE3'"),
        ("celltype=x", "did you mean 'cell_type'"),
        ("tissue=T1", "did you mean 't1'"),
        ("time=12", "there is 10, 10.5, 11|did you mean"),
        ("perturbation", "column=value"),
        ("=A", "column=value"),
        ("tissue=t1,tissue=t2", "no cell meets all parts"),
    ],
)
def test_an_expression_that_no_cell_meets_is_explained(dataset, expression, says):
    with pytest.raises(DataError, match=says) as caught:
        held(dataset, expression)
    assert "\n" not in str(caught.value)


def test_a_share_of_the_conditions_is_drawn_by_the_seed(dataset):
    config = DataConfig(holdout_share=0.25)
    first, again, other = (split(dataset, config, seed) for seed in (3, 3, 4))
    assert len(first.conditions) == 4  # of 4 labels x 2 tissues x 2 cell types
    assert first.conditions == again.conditions != other.conditions
    np.testing.assert_array_equal(first.train, again.train)
    assert not dataset.is_control[first.heldout].any()
    for condition in first.conditions:
        rows = (dataset.label == condition[0]) & (dataset.tissue == condition[1]) & (dataset.cell_type == condition[2])
        assert np.isin(np.flatnonzero(rows), first.heldout).all()


def test_every_cell_is_in_one_part_and_every_condition_is_validated(dataset):
    found = split(dataset, DataConfig(holdout=("perturbation=A,tissue=t2",), validation_share=0.2), 7)
    parts = np.concatenate([found.train, found.validation, found.heldout])
    np.testing.assert_array_equal(np.sort(parts), np.arange(607))
    names = np.stack([dataset.label, dataset.tissue, dataset.cell_type], axis=1).astype(str)
    for condition in np.unique(names[found.train], axis=0):
        of = [int((names[part] == condition).all(1).sum()) for part in (found.train, found.validation)]
        assert of[1] == round(0.2 * sum(of))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (DataConfig(holdout=("tissue=t1", "tissue=t2")), "leave no control cell"),
        (DataConfig(holdout=tuple(f"perturbation={name}" for name in ("A", "B", "A+B", "GENE3"))), "no perturbed cell"),
        (DataConfig(holdout_share=0.99), "no perturbed cell"),
        (DataConfig(validation_share=0.001), "raise it or set it to 0"),
    ],
)
def test_a_split_that_leaves_nothing_is_refused(dataset, config, says):
    with pytest.raises(DataError, match=says):
        split(dataset, config, 0)


# --- the audit -------------------------------------------------------------------------------------------------------
def test_a_clean_split_is_found_clean(dataset):
    found = split(dataset, DataConfig(holdout=("perturbation=A",)), 0)
    audit = leak_audit(dataset, found)
    assert audit["clean"]
    assert (audit["shared_names"], audit["shared_contents"]) == (0, 0)
    assert audit["heldout"] == len(found.heldout)
    json.dumps(audit)


@pytest.mark.parametrize("backed", [False, True])
def test_a_copy_of_a_heldout_cell_under_another_name_is_found(backed, tmp_path):
    adata = small(101, n_genes=211)
    copied = adata[[7, 8]].copy()
    copied.obs_names = ["other7", "other8"]
    both = anndata.concat([adata, copied])
    both.X = both.X.astype(np.float64)  # stored otherwise, but equal
    path = tmp_path / "leak.h5ad"
    both.write_h5ad(path)
    dataset = load(path, DataConfig(), backed=backed)
    audit = leak_audit(dataset, Split(np.arange(10, 103), np.array([9]), np.arange(9), []))
    assert not audit["clean"]
    assert (audit["shared_names"], audit["shared_contents"]) == (0, 2)
    assert audit["examples"] == ["cell7", "cell8"]


def test_a_heldout_cell_that_training_drew_is_found_by_name(dataset):
    found = split(dataset, DataConfig(holdout=("perturbation=A",)), 0)
    drawn = np.concatenate([found.train, found.heldout[:3]])
    audit = leak_audit(dataset, found, seen=drawn)
    assert (audit["shared_names"], audit["clean"]) == (3, False)


def test_cells_with_few_counts_are_counted_apart():
    adata = small(60, n_genes=5)
    counts = np.zeros((60, 5), np.float32)
    counts[:, 0] = 1
    adata.X = sparse.csr_matrix(counts)
    audit = leak_audit(load(adata, DataConfig()), Split(np.arange(30), np.arange(30, 40), np.arange(40, 60), []))
    assert (audit["trivial"], audit["shared_trivial"], audit["shared_contents"]) == (20, 20, 0)
    assert audit["clean"]


def test_kang_is_split_and_audited():
    dataset = load(real("kang2018_pbmc_ifnb.h5ad"), DataConfig())
    found = split(dataset, DataConfig(holdout=("cell_type=NK cells,perturbation=IFNB",)), 0)
    assert found.conditions == [("IFNB", "PBMC", "NK cells")]
    assert leak_audit(dataset, found)["clean"]
