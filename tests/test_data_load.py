"""Loading: the same data set from memory, from disk and backed; columns of every type; counts kept sparse."""

import pickle
import tracemalloc
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from small_data import real, small, written

from pf_core.backed import BackedCounts
from pf_core.config import DataConfig
from pf_core.data import load
from pf_core.errors import DataError
from pf_core.labels import UNKNOWN

CONFIG = DataConfig()


@pytest.fixture(scope="module")
def adata():
    return small()


@pytest.fixture(scope="module")
def path(adata, tmp_path_factory):
    return written(adata, tmp_path_factory.mktemp("data"), compression="gzip")


@pytest.mark.parametrize("form", ["csr", "csc", "dense", "float64", "int64", "uint8", "unsorted", "repeats", "zeros"])
def test_every_way_of_storing_the_counts_gives_the_same_data_set(adata, form, tmp_path):
    counts = adata.X.copy()
    if form in ("float64", "int64", "uint8"):
        counts = counts.astype(form)
    elif form == "unsorted":
        rows = [counts.indices[a:b][::-1] for a, b in zip(counts.indptr[:-1], counts.indptr[1:], strict=True)]
        values = [counts.data[a:b][::-1] for a, b in zip(counts.indptr[:-1], counts.indptr[1:], strict=True)]
        counts = sparse.csr_matrix((np.concatenate(values), np.concatenate(rows), counts.indptr), counts.shape)
    elif form == "repeats":  # every count of 2 or more as 1 and the rest
        coo = counts.tocoo()
        many = coo.data >= 2
        values = np.concatenate([np.where(many, 1, coo.data), coo.data[many] - 1])
        order = np.argsort(np.concatenate([coo.row, coo.row[many]]), kind="stable")
        columns = np.concatenate([coo.col, coo.col[many]])[order]
        lengths = np.bincount(np.concatenate([coo.row, coo.row[many]]), minlength=counts.shape[0])
        counts = sparse.csr_matrix((values[order], columns, np.r_[0, np.cumsum(lengths)]), counts.shape)
    elif form == "zeros":
        counts.data[::7] = 0
        adata = adata.copy()
        adata.X = sparse.csr_matrix(counts.toarray())
    elif form == "csc":
        counts = counts.tocsc()
    elif form == "dense":
        counts = counts.toarray()
    other = anndata.AnnData(counts, obs=adata.obs, var=adata.var)
    wanted = adata.X.toarray()
    place = written(other, tmp_path)
    found = [load(other, CONFIG), load(place, CONFIG)] + ([load(place, CONFIG, backed=True)] if form != "csc" else [])
    for dataset in found:
        matrix = dataset.rows(np.arange(dataset.n_cells))
        assert matrix.format == "csr"
        assert matrix.dtype == np.float32
        assert matrix.has_canonical_format
        np.testing.assert_array_equal(matrix.toarray(), wanted)
    assert len({dataset.fingerprint() for dataset in found}) == 1


def test_an_anndata_that_is_canonical_is_shared_and_no_anndata_is_changed(adata):
    assert np.shares_memory(load(adata, CONFIG).counts.data, adata.X.data)
    other = adata.copy()
    other.X.indices[: other.X.indptr[1]] = other.X.indices[: other.X.indptr[1]][::-1]
    other.X.has_sorted_indices = False
    before = other.X.indices.copy()
    load(other, CONFIG)
    np.testing.assert_array_equal(other.X.indices, before)


def test_counts_come_from_the_layer_counts_then_x_or_the_layer_named(adata, tmp_path):
    other = adata.copy()
    other.layers["counts"] = other.X * 2
    other.layers["third"] = other.X * 3
    for source in (other, written(other, tmp_path)):
        for layer, factor in (("", 2), ("X", 1), ("third", 3), ("counts", 2)):
            totals = load(source, DataConfig(layer=layer)).totals
            np.testing.assert_array_equal(totals, factor * adata.X.toarray().sum(1))


def test_a_layer_serves_where_x_is_missing(adata, tmp_path):
    other = anndata.AnnData(obs=adata.obs, var=adata.var, layers={"counts": adata.X})
    assert load(other, CONFIG).fingerprint() == load(written(other, tmp_path), CONFIG).fingerprint()


def test_a_zarr_store_and_a_backed_anndata_are_the_same_data_set(adata, path, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the default format of later versions
        adata.write_zarr(tmp_path / "a.zarr")
    wanted = load(adata, CONFIG).fingerprint()
    assert load(tmp_path / "a.zarr", CONFIG).fingerprint() == wanted
    opened = anndata.read_h5ad(path, backed="r")
    try:
        assert load(opened, CONFIG).fingerprint() == wanted
        assert isinstance(load(opened, CONFIG, backed=True).counts, BackedCounts)
        with pytest.raises(DataError, match="to_memory"):
            load(opened[:50], CONFIG)
    finally:
        opened.file.close()


def test_a_view_is_read_as_what_it_shows(adata):
    view = adata[adata.obs["tissue"] == "t1", 3:]
    np.testing.assert_array_equal(load(view, CONFIG).totals, view.X.toarray().sum(1))


def test_labels_contexts_and_vocabularies_are_read(adata):
    dataset = load(adata, DataConfig(covariates=("age", "time")))
    assert dataset.perturbations == (UNKNOWN, "A", "B", "GENE3")
    assert dataset.tissues == (UNKNOWN, "t1", "t2")
    assert dataset.batches == (UNKNOWN, "1", "2", "3")
    both = np.flatnonzero(dataset.label == "A+B")[0]
    assert dataset.members[both].tolist() == [1, 2]
    assert dataset.doses[both].tolist() == [1.0, 1.0]
    np.testing.assert_array_equal(dataset.is_control, adata.obs["perturbation"] == "control")
    assert not dataset.members[dataset.is_control].any()
    assert not dataset.doses[dataset.is_control].any()
    np.testing.assert_array_equal(dataset.covariates, adata.obs[["age", "time"]].to_numpy(np.float32))
    np.testing.assert_array_equal(dataset.cells, adata.obs_names)
    np.testing.assert_array_equal(dataset.genes, adata.var_names)


def test_columns_of_another_name_are_read_and_absent_default_columns_are_all(adata):
    other = adata.copy()
    other.obs = other.obs.rename(columns={"perturbation": "guide", "cell_type": "kind"}).drop(columns=["batch"])
    dataset = load(other, DataConfig(perturbation="guide", cell_type="kind", tissue=""))
    assert set(dataset.tissue) == {"all"} == set(dataset.batch)
    assert set(dataset.cell_type) == {"x", "y"}


def test_a_missing_context_is_unknown_and_a_missing_perturbation_drops_the_cell(adata, tmp_path):
    other = adata.copy()
    other.obs.loc[other.obs_names[:40], "cell_type"] = np.nan
    other.obs.loc[other.obs_names[37:44], "perturbation"] = np.nan
    for source in (other, written(other, tmp_path)):
        dataset = load(source, CONFIG)
        assert dataset.n_cells == 211 - 7
        assert dataset.summary["dropped"] == {"no perturbation": 7}
        assert dataset.summary["without_cell_type"] == 37
        assert (dataset.cell_type[:37] == UNKNOWN).all()
        assert (dataset.cell_type[37:] != UNKNOWN).all()
        assert len(dataset.obs) == dataset.n_cells


def test_nullable_old_and_numeric_columns_survive_the_disk(adata, tmp_path):
    other = adata.copy()
    other.obs["tissue"] = pd.array(np.resize([7, 8], 211), dtype="Int64")
    other.obs["batch"] = pd.array(np.resize([1, 2, None], 211), dtype="Int64")
    other.obs["flag"] = pd.array(np.resize([True, None], 211), dtype="boolean")
    place = written(other, tmp_path)
    memory, disk = load(other, CONFIG), load(place, CONFIG)
    assert memory.tissues == disk.tissues == (UNKNOWN, "7", "8")
    assert memory.batches == disk.batches == (UNKNOWN, "1", "2")
    assert memory.batch.tolist() == disk.batch.tolist()
    assert disk.obs["flag"].isna().sum() == 105


def test_doses_are_read_beside_their_perturbations(adata):
    other = adata.copy()
    other.obs["dose"] = np.where(other.obs["perturbation"] == "A+B", "1+0.5", "2")
    dataset = load(other, DataConfig(dose="dose"))
    assert set(dataset.label) == {"control", "A@2", "B@2", "A+B@0.5", "GENE3@2"}
    both = np.flatnonzero(dataset.label == "A+B@0.5")[0]
    assert dataset.doses[both].tolist() == [1.0, 0.5]


def test_a_label_keeps_the_notation_of_the_data_and_may_carry_doses(adata):
    other = adata.copy()
    other.obs["perturbation"] = np.resize(["ctrl", "B_A@0.5", "A_ctrl"], 211)
    dataset = load(other, DataConfig(separator="_", cell_type=""))
    assert set(dataset.label) == {"control", "A@0.5_B", "A"}
    both = np.flatnonzero(dataset.label == "A@0.5_B")[0]
    assert dataset.doses[both].tolist() == [0.5, 1.0]


def test_nullable_text_as_newer_versions_write_it_is_read(adata, tmp_path):
    other = adata.copy()
    other.obs["tissue"] = pd.array(np.resize(["t1", "t2", None], 211), dtype="string")
    with anndata.settings.override(allow_write_nullable_strings=True):
        dataset = load(written(other, tmp_path), CONFIG)
    assert dataset.tissue.tolist() == load(other, CONFIG).tissue.tolist()


def test_cells_with_few_counts_are_left_out_and_counted(adata):
    totals = adata.X.toarray().sum(1)
    dataset = load(adata, DataConfig(min_counts=15))
    assert dataset.summary["dropped"] == {"fewer than min_counts": int((totals < 15).sum())}
    np.testing.assert_array_equal(dataset.totals, totals[totals >= 15])


def test_library_is_at_least_1_and_exact(adata):
    dataset = load(adata, CONFIG).select_genes(["GENE5"])
    np.testing.assert_array_equal(dataset.library(), np.maximum(adata.X.toarray()[:, 5].astype(np.float64), 1.0))


def test_data_of_one_condition_or_without_controls_serve_prediction_only(adata):
    for label in ("control", "A"):
        part = adata[adata.obs["perturbation"] == label]
        with pytest.raises(DataError, match="control"):
            load(part, CONFIG)
        assert set(load(part, CONFIG, training=False).label) == {label}


@pytest.mark.parametrize("backed", [False, True])
def test_cells_and_genes_are_selected_by_index_and_name(adata, path, backed):
    dataset = load(path, CONFIG, backed=backed)
    dense = adata.X.toarray()
    cells, genes = np.array([5, 200, 3, 3, 77]), ["GENE7", "GENE2", "GENE22"]
    np.testing.assert_array_equal(dataset.dense(cells), dense[cells])
    assert dataset.dense(cells, "float64").dtype == np.float64
    chosen = dataset.select_genes(genes)
    np.testing.assert_array_equal(chosen.dense(cells), dense[cells][:, [7, 2, 22]])
    np.testing.assert_array_equal(chosen.totals, dense[:, [7, 2, 22]].sum(1))
    cells = cells[[0, 1, 2, 4]]
    part = chosen.select_cells(cells).select_genes(["GENE2", "GENE7"])
    np.testing.assert_array_equal(part.dense(np.arange(4)), dense[cells][:, [2, 7]])
    assert part.cells.tolist() == adata.obs_names[cells].tolist() == part.obs.index.tolist()
    assert part.rows(np.array([], dtype=int)).shape == (0, 2)
    np.testing.assert_array_equal(np.concatenate([i for i, _ in dataset.blocks(cells)]), cells)


@pytest.mark.parametrize(
    "indices", [np.array([-1]), np.array([211]), np.array([0.5]), np.array([[1]]), np.array([True])]
)
@pytest.mark.parametrize("backed", [False, True])
def test_indices_outside_the_cells_are_refused(path, backed, indices):
    with pytest.raises(ValueError, match="indices"):
        load(path, CONFIG, backed=backed).rows(indices)


def test_an_unknown_gene_is_named_with_its_nearest(adata):
    with pytest.raises(DataError, match=r"no gene 'gene1O'; did you mean 'GENE1"):
        load(adata, CONFIG).select_genes(["gene1O"])


@pytest.mark.parametrize("change", ["gene", "cell", "count", "swap"])
def test_the_fingerprint_differs_where_names_or_counts_differ(adata, change):
    other = adata.copy()
    if change == "gene":
        other.var_names = ["other", *other.var_names[1:]]
    elif change == "cell":
        other.obs_names = ["other", *other.obs_names[1:]]
    elif change == "count":
        other.X.data[-1] += 1
    else:
        other = anndata.AnnData(other.X[[1, 0, *range(2, 211)]], obs=other.obs, var=other.var)
    assert load(other, CONFIG).fingerprint() != load(adata, CONFIG).fingerprint()


def test_backed_counts_open_again_after_close_and_in_another_process(path):
    dataset = load(path, CONFIG, backed=True)
    wanted = dataset.dense(np.array([7, 11]))
    dataset.counts.close()
    np.testing.assert_array_equal(dataset.dense(np.array([7, 11])), wanted)
    copy = pickle.loads(pickle.dumps(dataset.counts))  # as a worker process receives it
    np.testing.assert_array_equal(copy.rows(np.array([7, 11])).toarray(), wanted)


def test_backed_counts_refuse_a_file_that_was_replaced(adata, tmp_path):
    place = written(adata, tmp_path)
    dataset = load(place, CONFIG, backed=True)
    dataset.counts.close()
    other = adata.copy()
    other.X.data[0] += 1
    written(other[:100].copy(), tmp_path)
    with pytest.raises(DataError, match="changed since it was loaded"):
        dataset.dense(np.array([0]))


def test_no_matrix_is_ever_dense_or_whole(tmp_path):
    """A matrix of 1.5 GiB if dense, 8 MiB sparse: loading and summing it stays within a few times the latter."""
    n_cells, n_genes, per_cell = 20_011, 20_011, 50
    rng = np.random.default_rng(0)
    indices = np.sort(
        rng.integers(0, n_genes // per_cell, (n_cells, per_cell)) + np.arange(per_cell) * (n_genes // per_cell)
    )
    counts = sparse.csr_matrix(
        (np.ones(indices.size, np.float32), indices.ravel().astype(np.int32), np.arange(n_cells + 1) * per_cell),
        shape=(n_cells, n_genes),
    )
    obs = pd.DataFrame({"perturbation": np.resize(["control", "A"], n_cells)}, index=[str(i) for i in range(n_cells)])
    place = written(
        anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)])), tmp_path
    )
    for backed, limit in ((True, 40), (False, 50)):
        tracemalloc.start()
        dataset = load(place, CONFIG, backed=backed)
        dataset.fingerprint()
        dataset.select_genes([f"g{i}" for i in range(0, n_genes, 3)])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < limit * 2**20


@pytest.mark.parametrize("backed", [False, True])
def test_kang_is_read(backed):
    dataset = load(real("kang2018_pbmc_ifnb.h5ad"), CONFIG, backed=backed)
    assert (dataset.n_cells, dataset.n_genes) == (2393, 5000)
    assert int(dataset.is_control.sum()) == 1234
    assert dataset.perturbations == (UNKNOWN, "IFNB")
    assert np.median(dataset.totals) == 1239


def test_datlinger_is_read_with_its_combinations():
    dataset = load(real("datlinger2021_jurkat_ko_tcr.h5ad"), CONFIG)
    assert len(set(dataset.label)) == 37
    assert int((dataset.label == "EGR4+TCR").sum()) == 237
    assert dataset.members.shape == (6417, 2)
    assert len(dataset.perturbations) == 22
