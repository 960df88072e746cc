"""Groups: every perturbed cell once, against the controls of its own context."""

from collections import defaultdict

import numpy as np
import pytest
from small_data import real, small

from pf_core.config import MIN_MATCHED, DataConfig
from pf_core.data import groups, load
from pf_core.errors import DataError

CONFIG = DataConfig()


def naive(dataset, cells, controls):
    """label, tissue, cell type, batch -> (cells, controls), by loops."""
    sides = defaultdict(lambda: defaultdict(list)), defaultdict(lambda: defaultdict(list))
    for cell in cells:
        if not dataset.is_control[cell]:
            key = (dataset.label[cell], dataset.tissue[cell], dataset.cell_type[cell])
            sides[0][key][dataset.batch[cell]].append(cell)
    for cell in controls:
        sides[1][dataset.tissue[cell], dataset.cell_type[cell]][dataset.batch[cell]].append(cell)
    found = {}
    for key, by_batch in sides[0].items():
        against, rest = sides[1][key[1:]], []
        for batch, members in by_batch.items():
            if min(len(members), len(against[batch])) >= MIN_MATCHED:
                found[(*key, batch)] = (sorted(members), sorted(against[batch]))
            else:
                rest += members
        if rest:
            found[(*key, "")] = (sorted(rest), sorted(c for some in against.values() for c in some))
    return found


@pytest.mark.parametrize("n_cells", [211, 1009])
def test_groups_are_those_of_the_plain_loops(n_cells):
    rng = np.random.default_rng(n_cells)
    adata = small(n_cells)
    adata.obs["batch"] = rng.choice(["b1", "b2", "b3"], n_cells, p=[0.6, 0.35, 0.05])
    dataset = load(adata, CONFIG)
    cells = rng.permutation(n_cells)[: n_cells * 4 // 5]
    controls = cells[dataset.is_control[cells]]
    found = groups(dataset, cells)
    wanted = naive(dataset, cells, controls)
    assert {(g.label, g.tissue, g.cell_type, g.batch): (g.cells.tolist(), g.controls.tolist()) for g in found} == wanted
    keys = [(g.label, g.tissue, g.cell_type, g.batch) for g in found]
    assert keys == sorted(keys)
    assert n_cells == 211 or any(key[3] for key in keys)


def test_controls_are_taken_from_where_they_may_be():
    dataset = load(small(), CONFIG)
    cells = np.arange(100)
    for group in groups(dataset, cells):
        assert group.controls.max() < 100
    others = np.arange(100, 211)
    for group in groups(dataset, cells, controls=others):
        assert group.controls.min() >= 100
        assert dataset.is_control[group.controls].all()


def test_control_groups_are_compared_with_themselves_when_asked_for():
    dataset = load(small(), CONFIG)
    found = [group for group in groups(dataset, np.arange(211), include_control=True) if group.label == "control"]
    assert sum(len(group.cells) for group in found) == int(dataset.is_control.sum())
    for group in found:
        assert group.cells is group.controls
        assert not group.doses.any()


def test_a_group_carries_its_members_doses_and_mean_covariates():
    dataset = load(small(), DataConfig(covariates=("age",)))
    group = next(group for group in groups(dataset, np.arange(211)) if group.label == "A+B")
    assert [dataset.perturbations[i] for i in group.members] == ["A", "B"]
    assert group.doses.tolist() == [1.0, 1.0]
    wanted = dataset.obs["age"].to_numpy()[group.cells].mean()
    assert group.covariates[0] == pytest.approx(wanted, rel=1e-5)


def test_cells_without_a_batch_are_pooled():
    adata = small(1009)
    adata.obs["batch"] = np.where(np.arange(1009) % 7 == 0, None, np.resize(["b1", "b2"], 1009))
    dataset = load(adata, CONFIG)
    pooled = {cell for group in groups(dataset, np.arange(1009)) if not group.batch for cell in group.cells}
    assert pooled >= {cell for cell in range(0, 1009, 7) if not dataset.is_control[cell]}
    assert all(group.batch != "<unknown>" for group in groups(dataset, np.arange(1009)))


def test_one_batch_is_no_batch():
    adata = small(1009)
    adata.obs["batch"] = "only"
    assert {group.batch for group in groups(load(adata, CONFIG), np.arange(1009))} == {""}


def test_a_context_without_controls_is_named_with_the_remedy():
    adata = small()
    keep = ~((adata.obs["perturbation"] == "control") & (adata.obs["tissue"] == "t2") & (adata.obs["cell_type"] == "y"))
    adata = adata[keep].copy()
    with pytest.raises(DataError, match=r"tissue 't2', cell type 'y' have no controls; .*cell_type=''"):
        load(adata, CONFIG)
    dataset = load(adata, DataConfig(cell_type=""))
    assert {group.cell_type for group in groups(dataset, np.arange(dataset.n_cells))} == {"all"}


def test_kang_controls_are_matched_within_cell_type_and_batch():
    dataset = load(real("kang2018_pbmc_ifnb.h5ad"), CONFIG)
    found = groups(dataset, np.arange(dataset.n_cells))
    assert sum(len(group.cells) for group in found) == 1159
    for group in found:
        assert set(dataset.cell_type[group.controls]) == {group.cell_type}
        assert not group.batch or set(dataset.batch[group.controls]) == {group.batch}
    assert {group.batch for group in found if group.cell_type == "CD4 T cells"} == {"harmony", "seuratTools"}
