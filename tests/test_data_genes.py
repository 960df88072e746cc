"""Genes: highly variable on training cells only, and aligned by name."""

import numpy as np
import pytest
from scipy import sparse
from small_data import real, small

from pf_core.config import DataConfig
from pf_core.data import load
from pf_core.errors import DataError
from pf_core.genes import align_genes, highly_variable

CONFIG = DataConfig()


def dispersed(n_cells=307, n_genes=101):
    rng = np.random.default_rng(0)
    mean = np.exp(rng.normal(0, 1.3, n_genes))
    r = np.exp(rng.normal(1, 1, n_genes))
    counts = rng.poisson(mean * rng.gamma(r, 1 / r, (n_cells, n_genes))).astype(np.float32)
    counts[:, 11] = 0  # never seen
    counts[:, 13] = 2  # seen, never varies
    adata = small(n_cells, n_genes)
    adata.X = sparse.csr_matrix(counts)
    return adata


def by_hand(counts, n):
    """The dense textbook form, gene by gene."""
    mean, variance = counts.mean(0), counts.var(0, ddof=1)
    varies = variance > 0
    fit = np.polyfit(np.log10(mean[varies]), np.log10(variance[varies]), 2)
    score = np.zeros(counts.shape[1])
    for gene in np.flatnonzero(varies):
        spread = np.sqrt(10 ** np.polyval(fit, np.log10(mean[gene])))
        clipped = np.minimum((counts[:, gene] - mean[gene]) / spread, np.sqrt(len(counts)))
        score[gene] = (clipped**2).sum() / (len(counts) - 1)
    return set(np.argsort(-score)[:n])


@pytest.mark.parametrize("n", [3, 29])
def test_highly_variable_genes_are_those_of_the_dense_form(n):
    adata = dispersed()
    cells = np.random.default_rng(1).permutation(307)[:211]
    wanted = by_hand(adata.X.toarray().astype(np.float64)[cells], n) | {3}  # GENE3 is perturbed
    found = highly_variable(load(adata, CONFIG), cells, n)
    assert found == [f"GENE{i}" for i in sorted(wanted)]


def test_cells_that_are_not_for_training_do_not_matter():
    adata = dispersed()
    cells = np.arange(200)
    found = highly_variable(load(adata, CONFIG), cells, 17)
    other = adata.copy()
    other.X = sparse.vstack([adata.X[:200], adata.X[200:] * 31]).tocsr()
    assert highly_variable(load(other, CONFIG), cells, 17) == found


def test_every_perturbed_gene_and_those_to_keep_are_among_them():
    found = highly_variable(load(dispersed(), CONFIG), np.arange(307), 5, keep=["GENE11", "absent"])
    assert {"GENE3", "GENE11"} <= set(found)
    assert len(found) <= 7


@pytest.mark.parametrize("n", [0, 101, 999])
def test_all_genes_are_kept_where_no_choice_is_asked_for(n):
    assert len(highly_variable(load(dispersed(), CONFIG), np.arange(307), n)) == 101


def test_genes_that_do_not_vary_are_chosen_last():
    adata = small(60, 7)
    adata.X = sparse.csr_matrix(np.tile(np.arange(7, dtype=np.float32) + 1, (60, 1)))
    assert len(highly_variable(load(adata, CONFIG), np.arange(60), 3)) == 4  # and the perturbed one


def test_one_cell_has_no_variance():
    with pytest.raises(DataError, match="2 training cells"):
        highly_variable(load(small(), CONFIG), np.array([1]), 3)


@pytest.mark.parametrize("backed", [False, True])
def test_genes_are_aligned_by_name_and_missing_ones_are_zeros(backed, tmp_path):
    adata = small()
    path = tmp_path / "a.h5ad"
    adata.write_h5ad(path)
    wanted = ["GENE9", "new", "GENE2", "GENE20"]
    dataset, report = align_genes(load(path, CONFIG, backed=backed), wanted)
    assert report == {"wanted": 4, "found": 3, "missing": ["new"], "unused": 20}
    assert dataset.genes.tolist() == wanted
    dense = dataset.dense(np.arange(211))
    np.testing.assert_array_equal(dense[:, [0, 2, 3]], adata.X.toarray()[:, [9, 2, 20]])
    assert not dense[:, 1].any()
    np.testing.assert_array_equal(dataset.totals, dense.sum(1))
    again, _ = align_genes(dataset, ["GENE2", "new", "GENE9", "GENE3"])
    assert not again.dense(np.arange(211))[:, [1, 3]].any()
    np.testing.assert_array_equal(again.dense(np.arange(211))[:, [0, 2]], dense[:, [2, 0]])


def test_fewer_than_half_of_the_genes_are_too_few():
    with pytest.raises(DataError, match=r"only 1 of the model's 3 genes.*'Gene4' is missing, did you mean 'GENE4'"):
        align_genes(load(small(), CONFIG), ["GENE1", "Gene4", "ENSG0"])


def test_the_variable_genes_of_kang_hold_the_interferon_response():
    dataset = load(real("kang2018_pbmc_ifnb.h5ad"), CONFIG)
    found = highly_variable(dataset, np.arange(dataset.n_cells), 500)
    assert {"ISG15", "IFIT1", "IFIT3", "CXCL10", "ISG20"} <= set(found)
