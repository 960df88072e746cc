"""Counts travel to a device without their zeros and are there what they were."""

import numpy as np
import pytest
from scipy import sparse

from pf_core import backends
from pf_core.sparse_counts import ALIGNMENT, SparseCounts, aligned, stack

RNG = np.random.default_rng(5)


def counts_of(*shape: int, density: float = 0.2) -> np.ndarray:
    return RNG.poisson(3.0, shape).astype(np.float32) * (RNG.random(shape) < density)


def without_zeros(dense: np.ndarray) -> SparseCounts:
    return SparseCounts(dense.shape, (sparse.csr_matrix(dense.reshape(-1, dense.shape[-1])),))


@pytest.mark.parametrize("shape", [(7, 11), (1, 1), (3, 5, 11), (2, 0, 11)])
def test_counts_without_their_zeros_are_the_counts(shape):
    dense = counts_of(*shape)
    found = without_zeros(dense)
    np.testing.assert_array_equal(found.dense(), dense)
    np.testing.assert_array_equal(np.asarray(found, np.float64), dense)
    assert found.dense().dtype == np.float32
    assert found.nbytes == dense.nbytes


def test_rows_that_are_wanting_are_zeros():
    dense = counts_of(3, 11)
    found = SparseCounts((5, 11), (sparse.csr_matrix(dense, dtype=np.float64),))
    wanted = np.pad(dense, ((0, 2), (0, 0)))
    np.testing.assert_array_equal(found.dense(), wanted)
    assert found.dense().dtype == np.float64
    np.testing.assert_array_equal(wanted.ravel()[found.places()], found.values())
    twice = SparseCounts((2, 5, 11), found.rows * 2)
    np.testing.assert_array_equal(twice.dense(), np.stack([wanted, wanted]))
    np.testing.assert_array_equal(twice.dense().ravel()[twice.places()], twice.values())


def test_a_stack_of_batches_is_the_stack_of_their_arrays():
    whole = [[counts_of(5, 7) for _ in range(2)] for _ in range(3)]
    tissues = RNG.integers(0, 4, (3, 2, 5)).astype(np.int32)
    steps = [
        stack([{"counts": without_zeros(whole[i][j]), "tissue": tissues[i, j]} for j in range(2)]) for i in range(3)
    ]
    found = stack(steps)
    assert found["counts"].shape == (3, 2, 5, 7)
    np.testing.assert_array_equal(np.asarray(found["counts"]), np.stack([np.stack(parts) for parts in whole]))
    np.testing.assert_array_equal(found["tissue"], tissues)
    assert found["tissue"].dtype == np.int32


@pytest.mark.parametrize("shape", [(), (1,), (3, 7), (64, 50)])
def test_memory_begins_where_devices_want_it(shape):
    found = aligned(shape, np.dtype("float32"))
    assert found.shape == shape
    assert found.ctypes.data % ALIGNMENT == 0
    assert found.flags.c_contiguous


def test_what_is_half_full_travels_as_it_is():
    assert without_zeros(np.eye(9, dtype=np.float32)).travels_lighter
    assert not without_zeros(np.ones((9, 9), np.float32)).travels_lighter
    beyond = SparseCounts((2**16, 2**15), (sparse.csr_matrix(np.ones((1, 2**15), np.float32)),))
    assert not beyond.travels_lighter, "32-bit places do not reach its end"


@pytest.fixture(params=["jax", "torch"])
def twin(request):
    return backends.load(request.param)


@pytest.mark.parametrize("scatters", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.003, 0.2, 0.9])
@pytest.mark.parametrize("shape", [(13, 29), (4, 1, 13, 29), (1, 2, 3, 5, 29)])
def test_a_device_holds_what_was_sent(twin, monkeypatch, shape, density, scatters):
    assert not twin.scatters, "on a processor nothing travels"
    monkeypatch.setattr(twin, "scatters", scatters)
    dense = counts_of(*shape, density=density)
    leaves = {"counts": without_zeros(dense), "eps": RNG.normal(size=3), "tissue": np.arange(4)}
    sent = twin.send(leaves)
    np.testing.assert_array_equal(np.asarray(sent["counts"]), dense)
    assert {str(sent[name].dtype).removeprefix("torch.") for name in ("counts", "eps")} == {"float32"}
    assert sent["tissue"] is leaves["tissue"], "run checks it before it goes"
    assert twin.send(sent).keys() == sent.keys()
    np.testing.assert_array_equal(np.asarray(twin.send(sent)["counts"]), dense)


def test_a_processor_reads_arrays_where_they_lie(twin):
    leaf = aligned((64, 500), np.dtype("float32"))
    sent = twin.send({"counts": leaf})["counts"]
    place = sent.unsafe_buffer_pointer() if twin.name == "jax" else sent.data_ptr()
    assert place == leaf.ctypes.data
    fixed = np.broadcast_to(np.float32(2.0), (3, 4))  # neither contiguous nor writeable
    np.testing.assert_array_equal(np.asarray(twin.send({"x": fixed})["x"]), fixed)


def test_batches_of_about_as_many_values_share_a_program(monkeypatch):
    from pf_jax import bridge

    twin = backends.load("jax")
    monkeypatch.setattr(twin, "scatters", True)
    before = bridge._scatter._cache_size()
    for n in range(1000, 1100, 10):
        flat = np.zeros(64 * 101, np.float32)
        flat[RNG.permutation(64 * 101)[:n]] = RNG.integers(1, 9, n)
        found = without_zeros(flat.reshape(64, 101))
        np.testing.assert_array_equal(np.asarray(twin.send({"counts": found})["counts"]), found.dense())
    assert bridge._scatter._cache_size() - before <= 4
