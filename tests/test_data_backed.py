"""Rows on disk: spans of the file are chosen well and change nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import small, written

from pf_core import backed
from pf_core.config import DataConfig
from pf_core.data import load

CONFIG = DataConfig()


@pytest.fixture(scope="module", params=["csr", "dense"])
def both(request, tmp_path_factory):
    adata = small(311)
    dense = adata.X.toarray()
    if request.param == "dense":
        adata.X = dense
    path = written(adata, tmp_path_factory.mktemp("rows"))
    return load(path, CONFIG, backed=True).counts, dense


@given(indices=st.lists(st.integers(0, 310), max_size=60))
@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize(("gap", "block"), [(2**14, 2**22), (0, 7), (40, 100)])
def test_rows_are_those_asked_for_in_any_order_however_they_are_read(both, gap, block, indices):
    counts, dense = both
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backed, "GAP", gap)
        patch.setattr(backed, "BLOCK_VALUES", block)
        found = counts.rows(np.array(indices, dtype=np.int64))
    assert found.has_canonical_format
    np.testing.assert_array_equal(found.toarray(), dense[np.array(indices, dtype=np.int64)])


def test_distant_rows_are_not_read_through(both, monkeypatch):
    counts, _ = both
    read = []
    block = counts.stored.block
    monkeypatch.setattr(backed, "GAP", 100)
    monkeypatch.setattr(counts.stored, "block", lambda start, stop: read.append((start, stop)) or block(start, stop))
    counts.rows(np.array([300, 2, 1, 2]))
    assert read == [(1, 3), (300, 301)]
