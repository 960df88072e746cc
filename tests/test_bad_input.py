"""Bad input: every fault is one line that says what came and the remedy, and nothing outside the file is read."""

import json
import pickle
import random
import shutil
import sys
import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from small_data import REAL, small, written

from pf_core import rehearsal
from pf_core.config import DataConfig
from pf_core.data import load
from pf_core.errors import DataError

CONFIG = DataConfig()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A real file where there is one, else a small made one."""
    folder = tmp_path_factory.mktemp("original")
    name = "semrau2017_mesc_ra_timecourse.h5ad"
    if (REAL / name).exists():
        return REAL / name
    return written(small(), folder, compression="gzip")


@pytest.fixture
def path(original, tmp_path):
    """A copy to be corrupted."""
    return shutil.copy(original, tmp_path / "bad.h5ad") and tmp_path / "bad.h5ad"


def refused(source, says, *, config=CONFIG, training=False, both=True):
    """Loading raises one line that matches, in memory and backed."""
    for backed in (False, True) if both else (False,):
        with pytest.raises(DataError, match=says) as caught:
            load(source, config, backed=backed, training=training)
        assert "\n" not in str(caught.value)


def replaced(path, name, values, **options):
    """Write another array in place of one, keeping its attributes."""
    with h5py.File(path, "r+") as file:
        attributes = dict(file[name].attrs)
        del file[name]
        file.create_dataset(name, data=values, **options).attrs.update(attributes)


def read(path, name):
    with h5py.File(path) as file:
        return file[name][:]


# --- what is no h5ad -------------------------------------------------------------------------------------------------
def test_the_copy_that_is_corrupted_below_is_sound(path):
    for backed in (False, True):
        assert load(path, CONFIG, backed=backed, training=False).n_cells > 100


def test_a_missing_file_is_named_with_its_nearest(path):
    refused(path.parent / "bat.h5ad", r"is no file; did you mean 'bad.h5ad'")
    refused(path.parent / "no" / "bad.h5ad", "is no file")
    refused(path.parent, "is no file")


@pytest.mark.parametrize("content", [b"", b"\x89HDF", b"cell,gene\n1,2\n", pickle.dumps({"X": 1}), b"PK\x03\x04" * 50])
def test_a_file_of_another_kind_is_refused(path, content):
    path.write_bytes(content)
    refused(path, "is no HDF5 file")


def test_a_source_of_another_kind_is_refused():
    refused(pd.DataFrame({"a": [1]}), "DataFrame; the path of an h5ad, or an AnnData", both=False)
    refused(None, "NoneType", both=False)


@pytest.mark.parametrize("share", [0.0005, 0.05, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file_is_refused(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    refused(path, "is damaged or was cut short|is no HDF5 file|reading it")


def test_an_hdf5_that_is_no_h5ad_is_refused(path):
    with h5py.File(path, "w") as file:
        file["a"] = [1, 2]
    refused(path, "there is no X and no layer")
    with h5py.File(path, "a") as file:
        file["X"] = np.ones((2, 2))
    refused(path, "there is no table obs; write the file again with anndata 0.8")


def test_flipped_bytes_end_in_a_data_set_or_one_line(tmp_path):
    """Never in another exception, a crash or a hang. The seed is fixed; thousands more were run by hand."""
    whole = written(small(61, 11), tmp_path, compression="gzip").read_bytes()
    rng = random.Random(2)
    for number in range(12):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 2, 8])):
            content[rng.randrange(20_000)] = rng.randrange(256)
        path = tmp_path / f"{number}.h5ad"
        path.write_bytes(content)
        try:
            load(path, CONFIG, backed=bool(number % 2)).fingerprint()
        except DataError as error:
            message = str(error)
        else:
            message = ""
        assert "\n" not in message


def test_a_damaged_heap_that_hdf5_never_finishes_reading_is_refused(tmp_path, monkeypatch):
    """The first text's size in the global heap wraps around: HDF5 2.0 and older loop forever."""
    path = written(small(61, 11), tmp_path)
    content = bytearray(path.read_bytes())
    heap = content.index(b"GCOL")
    content[heap + 24 : heap + 32] = (2**64 - 16).to_bytes(8, "little")
    path.write_bytes(content)
    monkeypatch.setattr(rehearsal, "SECONDS", 2.0)
    refused(path, "is damaged", both=False)


# --- what the file declares or links to ------------------------------------------------------------------------------
def test_a_matrix_of_terabytes_in_kilobytes_is_refused(path):
    with h5py.File(path, "r+") as file:
        del file["X/data"]
        file.create_dataset("X/data", shape=(2**40,), dtype="f4", chunks=(2**16,), compression="gzip")
    refused(path, r"/X/data declares 4398046511104 bytes and stores 0, so it is damaged or hostile")


def test_a_dense_matrix_of_terabytes_in_kilobytes_is_refused(path):
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.create_dataset("X", shape=(2**31, 2**20), dtype="f4", chunks=(64, 64))
    refused(path, "/X declares")


def test_a_chunk_of_gigabytes_is_refused(path):
    with h5py.File(path, "r+") as file:
        del file["obs/time"]
        file.create_dataset("obs/time", shape=(1842,), maxshape=(None,), dtype="f8", chunks=(2**28,))
    refused(path, "/obs/time declares")


def test_a_declared_shape_that_obs_and_var_do_not_have_is_refused(path):
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = [2**40, 2**40]
    refused(path, r"X has shape \(1099511627776, 1099511627776\) but obs and var have")


def test_a_matrix_larger_than_memory_is_to_be_backed(original, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 16)
    with pytest.raises(DataError, match="load it with backed=True"):
        load(original, CONFIG, training=False)
    assert load(original, CONFIG, training=False, backed=True).n_cells > 100


@pytest.fixture
def secret(tmp_path):
    """A file beside the data set, which must not be read."""
    place = tmp_path / "secret.bin"
    place.write_bytes(np.ones(10_000, "f4").tobytes())
    return place


@pytest.mark.parametrize("name", ["X/data", "obs/cell_type/codes", "uns/other"])
def test_external_storage_is_refused(path, secret, name):
    with h5py.File(path, "r+") as file:
        if name in file:
            del file[name]
        file.create_dataset(name, shape=(1000,), dtype="f4", external=[(str(secret), 0, 4000)])
    refused(path, f"/{name} keeps its values in other files")


def test_a_virtual_dataset_is_refused(path, tmp_path):
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["d"] = np.ones(7)
    layout = h5py.VirtualLayout(shape=(7,), dtype="f8")
    layout[:] = h5py.VirtualSource(str(other), "d", shape=(7,))
    with h5py.File(path, "r+") as file:
        del file["X/data"]
        file.create_virtual_dataset("X/data", layout)
    refused(path, "/X/data keeps its values in other files")


@pytest.mark.parametrize("link", ["external", "soft", "dangling"])
def test_links_are_refused(path, tmp_path, link):
    shutil.copy(path, tmp_path / "other.h5ad")
    targets = {
        "external": h5py.ExternalLink(str(tmp_path / "other.h5ad"), "/X"),
        "soft": h5py.SoftLink("/var"),
        "dangling": h5py.SoftLink("/nowhere"),
    }
    with h5py.File(path, "r+") as file:
        del file["X"]
        file["X"] = targets[link]
    refused(path, "/X is a link")


def test_a_ring_of_hard_links_ends(path):
    with h5py.File(path, "r+") as file:
        file["uns/ring"] = file["/"]
        file["uns/self"] = file["uns"]
    assert load(path, CONFIG, training=False).n_cells > 100


def test_many_objects_are_refused(path, monkeypatch):
    monkeypatch.setattr("pf_core.hdf5.MAX_OBJECTS", 20)
    refused(path, "more than 20 objects")


def test_objects_and_references_are_refused(path):
    n = len(read(path, "X/data"))
    replaced(path, "X/data", np.zeros(n, dtype="V8"))
    refused(path, "X/data holds objects of type")
    with h5py.File(path, "r+") as file:
        del file["X/data"]
        file.create_dataset("X/data", (n,), dtype=h5py.ref_dtype)
    refused(path, "X/data holds objects of type object")


def test_nothing_is_unpickled(path, tmp_path):
    """uns may hold anything: it is not read."""

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    with h5py.File(path, "r+") as file:
        file["uns/evil"] = np.frombuffer(pickle.dumps(Evil()), "u1")
    load(path, CONFIG, training=False)
    assert not (tmp_path / "touched").exists()


def test_compression_that_is_missing_here_is_named(path, monkeypatch):
    monkeypatch.setattr("pf_core.hdf5.h5z.filter_avail", lambda code: False)
    refused(path, "is compressed by HDF5 filter 1, missing here")


# --- a child reads first ---------------------------------------------------------------------------------------------
def test_a_file_that_hangs_or_crashes_its_reader_is_refused(path, monkeypatch):
    for code, says in (
        ("import time; print(); time.sleep(60)", "does not come to an end"),
        ("import os; os.kill(os.getpid(), 11)", "HDF5 crashes reading it"),
    ):
        rehearsal._rehearse.cache_clear()
        script = path.parent / "reader"
        script.write_text(f"#!{sys.executable}\n{code}\n")
        script.chmod(0o755)
        monkeypatch.setattr(rehearsal, "SECONDS", 0.3)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(script))
            refused(path, says)


def test_a_rehearsal_that_cannot_run_is_said(path, monkeypatch):
    rehearsal._rehearse.cache_clear()
    monkeypatch.setattr(sys, "executable", str(path.parent / "nothing"))
    with pytest.warns(UserWarning, match="without a rehearsal"):
        load(path, CONFIG, training=False)


def test_a_rehearsal_is_held_once_per_state_of_a_file(path, monkeypatch):
    rehearsal._rehearse.cache_clear()
    load(path, CONFIG, training=False)
    with warnings.catch_warnings(), monkeypatch.context() as patch:
        warnings.simplefilter("error")
        patch.setattr(sys, "executable", "/nothing")
        load(path, CONFIG, training=False)
    with h5py.File(path, "r+") as file:
        file["uns/new"] = 1
    monkeypatch.setattr(sys, "executable", "/nothing")
    with pytest.warns(UserWarning, match="without a rehearsal"):
        load(path, CONFIG, training=False)


# --- broken CSR ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [-1, 2**31 - 1, 41 * 10**6])
def test_indices_out_of_range_are_refused(path, value):
    indices = read(path, "X/indices")
    indices[len(indices) // 2] = value
    replaced(path, "X/indices", indices)
    refused(path, f"X is broken: index {value} is outside")


def breaks(indptr):
    n = len(indptr)
    yield "falls", np.concatenate([indptr[:5], indptr[3:4], indptr[6:]])
    yield "negative", np.concatenate([[0, -7], indptr[2:]])
    yield "begins late", np.concatenate([[1], indptr[1:]])
    yield "ends early", np.concatenate([indptr[:-1], [indptr[-2]]])
    yield "ends late", np.concatenate([indptr[:-1], [2**40]])
    yield "huge", np.where(np.arange(n) == 9, 2**63 - 1, indptr)
    yield "unsigned", np.where(np.arange(n) == 9, np.uint64(2**64 - 1), indptr.astype(np.uint64))
    yield "short", indptr[:-1]
    yield "long", np.append(indptr, indptr[-1])
    yield "no integers", indptr.astype(np.float64)
    yield "empty", indptr[:0]


def test_every_broken_indptr_is_refused_from_disk_and_from_memory(path):
    indptr = read(path, "X/indptr").astype(np.int64)
    adata = small()
    for what, broken in breaks(indptr):
        replaced(path, "X/indptr", broken)
        refused(path, "X is broken")
        if what not in ("short", "long", "empty"):
            other = adata.copy()
            other.X.indptr = next(b for name, b in breaks(adata.X.indptr.astype(np.int64)) if name == what)
            refused(other, "X is broken", both=False)


def test_values_and_indices_of_unequal_number_are_refused(path):
    replaced(path, "X/data", read(path, "X/data")[:-3])
    refused(path, "X is broken: .* values for .* indices")


def test_broken_indices_of_an_anndata_are_refused_before_scipy_sees_them():
    adata = small()
    adata.X.indices[100] = 10**9
    refused(adata, "X is broken: index 1000000000", both=False)
    adata = small()
    adata.layers["counts"] = adata.X.tocsc()
    adata.layers["counts"].indices[100] = -5
    refused(adata, r"index -5 is outside", both=False)


@pytest.mark.parametrize("kind", ["coo_matrix", "bsr_matrix", "", None])
def test_a_matrix_that_anndata_does_not_write_is_refused(path, kind):
    with h5py.File(path, "r+") as file:
        if kind is None:
            del file["X"].attrs["encoding-type"]
        else:
            file["X"].attrs["encoding-type"] = kind
    refused(path, "X has encoding")


def test_parts_of_the_matrix_that_are_missing_or_no_arrays_are_refused(path):
    with h5py.File(path, "r+") as file:
        del file["X/indices"]
    refused(path, "X/indices is no one-dimensional array")
    with h5py.File(path, "r+") as file:
        file.create_group("X/indices")
    refused(path, "X/indices is no one-dimensional array")


def test_a_matrix_stored_by_genes_cannot_be_backed(tmp_path):
    adata = small()
    adata.X = adata.X.tocsc()
    with pytest.raises(DataError, match="stored gene by gene"):
        load(written(adata, tmp_path), CONFIG, backed=True)


# --- values that are no counts ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "says"),
    [
        (0.5, "holds 0.5, so it is normalised or logged, and counts are integers; give raw counts in layers"),
        (-1.0, "holds -1, so it is scaled"),
        (float("nan"), "NaN or infinite"),
        (float("inf"), "NaN or infinite"),
        (1e9, "more than the 16777216"),
    ],
)
@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_values_that_are_no_counts_are_refused(tmp_path, value, says, form):
    adata = small()
    counts = adata.X.toarray()
    counts[101, 7] = value
    adata.X = counts if form == "dense" else sparse.csr_matrix(counts).asformat(form)
    refused(adata, says, both=False)
    refused(written(adata, tmp_path), says, both=form != "csc")


def test_float64_values_just_off_an_integer_are_refused(tmp_path):
    adata = small()
    adata.X = adata.X.astype(np.float64)
    adata.X.data[5] += 1e-9
    refused(written(adata, tmp_path), "counts are integers")


def test_matrices_of_objects_or_text_are_refused():
    adata = small()
    adata.X = np.full(adata.shape, "a", dtype=object)
    refused(adata, "X holds object, numbers were wanted", both=False)


def test_a_missing_matrix_is_said():
    adata = small()
    refused(anndata.AnnData(obs=adata.obs, var=adata.var), "there is no X and no layer 'counts'", both=False)


def test_a_missing_layer_is_named_with_its_nearest(tmp_path):
    adata = small()
    adata.layers["raw_counts"] = adata.X
    for source in (adata, written(adata, tmp_path)):
        refused(
            source, "no layer 'raw_count'; did you mean 'raw_counts'", config=DataConfig(layer="raw_count"), both=False
        )


# --- cells, genes and columns ----------------------------------------------------------------------------------------
def test_empty_cells_are_counted_and_min_counts_leaves_them_out():
    adata = small()
    adata.X = sparse.diags(np.where(np.arange(211) < 8, 0.0, 1.0)).dot(adata.X).astype(np.float32).tocsr()
    refused(adata, "8 of 211 cells have no counts; leave them out with min_counts=1", training=True, both=False)
    assert load(adata, DataConfig(min_counts=1)).n_cells == 203
    assert load(adata, CONFIG, training=False).summary["empty_cells"] == 8
    refused(adata, "no cell is left", config=DataConfig(min_counts=10**6), both=False)


@pytest.mark.parametrize("names", ["obs_names", "var_names"])
def test_repeated_names_are_refused(names):
    adata = small()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        setattr(adata, names, ["same", "same", *getattr(adata, names)[2:]])
        refused(adata, f"'same'; make them unique with adata.{names}_make_unique", both=False)


def test_a_missing_column_is_named_with_its_nearest():
    adata = small()
    for config, says in (
        (DataConfig(perturbation="perturbatoin"), "no column 'perturbatoin'; did you mean 'perturbation'"),
        (DataConfig(tissue="Tissues"), "did you mean 'tissue'.*setting tissue"),
        (DataConfig(dose="doze"), "no column 'doze'"),
        (DataConfig(covariates=("agee",)), "did you mean 'age'"),
    ):
        refused(adata, says, config=config, both=False)


def test_no_controls_are_said_with_what_there_is():
    adata = small()
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).replace("control", "vehicle")
    refused(adata, "no control cells .*'vehicle'.*setting control", training=True, both=False)
    assert load(adata, DataConfig(control=("vehicle",))).is_control.any()


def test_a_single_condition_is_said():
    adata = small()
    refused(adata[adata.obs["perturbation"] == "control"], "single condition, 'control'", training=True, both=False)


@pytest.mark.parametrize("values", [["1", "x", "3"], [1.0, np.nan, 2.0], [1.0, np.inf, 2.0], [1e300, 1.0, 1.0]])
def test_covariates_that_are_no_finite_numbers_are_refused(values):
    adata = small()
    adata.obs["score"] = np.resize(np.array(values, dtype=object), 211)
    refused(
        adata,
        "covariate 'score' has 7[01] values that are no finite number",
        config=DataConfig(covariates=("score",)),
        both=False,
    )


def test_a_perturbed_cell_without_dose_is_refused():
    adata = small()
    adata.obs["dose"] = np.where(adata.obs["perturbation"] == "A", np.nan, 1.0)
    refused(adata, "'A' has dose nan", config=DataConfig(dose="dose"), both=False)


def test_columns_that_are_damaged_are_refused(path):
    with h5py.File(path, "r+") as file:
        codes = file["obs/cell_type/codes"]
        codes[3] = 100
    refused(path, "/obs/cell_type has category codes outside -1..")
    with h5py.File(path, "r+") as file:
        file["obs/cell_type/codes"][3] = 0
        file["obs/cell_type/categories"][0] = file["obs/cell_type/categories"][1]
    refused(path, "names a category twice")
    replaced(path, "obs/time", np.ones(5))
    with h5py.File(path, "r+") as file:
        del file["obs/cell_type"]
    refused(path, "lists column 'cell_type' but does not hold it|has 5 values for")


def test_a_matrix_without_cells_or_genes_is_refused():
    adata = small()
    refused(adata[:0], "0 cells", both=False)
    refused(adata[:, :0], "0 genes", both=False)


# --- zarr ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def store(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small().write_zarr(tmp_path / "a.zarr")
    return tmp_path / "a.zarr"


def test_a_zarr_store_with_code_links_or_terabytes_is_refused(store, tmp_path):
    refused(tmp_path / "b.zarr", "is no folder; did you mean 'a.zarr'", both=False)
    with pytest.raises(DataError, match="only an h5ad can stay on disk"):
        load(store, CONFIG, backed=True)
    folder = store / "X" / "data"
    meta = next(folder / name for name in (".zarray", "zarr.json") if (folder / name).exists())  # formats 2 and 3
    text = meta.read_text()
    table = json.loads(text)
    meta.write_text(json.dumps(table | {"filters": [{"id": "pickle"}]}).replace("pickle", "p\\u0069ckle"))
    refused(store, "names a codec that runs code", both=False)
    meta.write_text(json.dumps(table | {"shape": [2**40]}))
    refused(store, "more than the store can hold", both=False)
    meta.write_text(text[:-10])
    refused(store, "is no JSON", both=False)
    meta.write_text(text)
    for chunk in (store / "X" / "indptr").rglob("*"):
        if chunk.is_file() and chunk.name not in (".zarray", ".zattrs", "zarr.json"):
            chunk.write_bytes(b"no chunk")
    refused(store, "is damaged or no zarr store|broken", both=False)
    (store / "link").symlink_to(tmp_path)
    refused(store, "is a link", both=False)
