"""Networks: every edge is kept, merged or left out for a reason that the report counts; bad files are one line."""

import numpy as np
import pandas as pd
import pytest
from small_data import REAL, real

from pf_core.config import DataConfig
from pf_core.data import load
from pf_core.errors import DataError
from pf_core.networks import load_network

GENES = ["A", "B", "C", "D", "E"]


def network(tmp_path, text, genes=GENES):
    path = tmp_path / "network.csv"
    path.write_text(text)
    return load_network(path, genes)


def edges(found) -> list[tuple[str, str, float]]:
    return [(GENES[i], GENES[j], float(e)) for i, j, e in zip(found.source, found.target, found.sign, strict=True)]


def test_edges_are_aligned_by_name_merged_and_counted(tmp_path):
    found = network(
        tmp_path,
        "target,source,sign,confidence\nB,A,1,x\nB,C,-1,\nB,A,1,y\nD,D,1,z\nZ,A,1,z\nA,Y,-1,z\nC,B,-1,q\nC,B,1,q\n",
    )
    assert edges(found) == [("A", "B", 1.0), ("C", "B", -1.0), ("B", "C", 0.0)]  # contradictory signs cancel
    assert found.report == {
        "file": "network.csv",
        "edges_read": 8,
        "edges_kept": 3,
        "edges_outside": 2,
        "duplicates_merged": 2,
        "self_loops_dropped": 1,
        "regulators": 3,
        "targets": 2,
        "genes_without_edges": 2,
        "names_matched": "exactly",
    }
    assert {name: array.dtype.name for name, array in found.arrays("float32").items()} == {
        "source": "int32",
        "target": "int32",
        "sign": "float32",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("source,target\nA,B\n", 1.0),
        ("source,target,sign\nA,B,-1\n", -1.0),
        ("source,target,weight\nA,B,0.25\n", 0.25),
        ("source,target,sign,weight\nA,B,-1,0.25\n", -0.25),
        ("Source , TARGET,Sign\n A ,B, +1\n", 1.0),
        ("source,target,weight\nA,B,0\n", 0.0),
        ("source,target,weight\nA,B,0.5\nA,B,0.25\n", 0.375),
    ],
)
def test_sign_and_weight_make_the_value_of_an_edge(tmp_path, text, expected):
    assert edges(network(tmp_path, text)) == [("A", "B", expected)]


def test_names_that_look_like_missing_values_are_names(tmp_path):
    found = network(tmp_path, "source,target\nNA,nan\n", ["nan", "NA", "x"])
    assert (int(found.source[0]), int(found.target[0])) == (1, 0)


def test_case_is_disregarded_only_where_no_edge_matches_exactly_and_the_report_says_so(tmp_path):
    genes = ["a", "b", "C", "d", "D"]
    found = network(tmp_path, "source,target\nA,B\nD,c\n", genes)
    assert (found.source.tolist(), found.target.tolist()) == ([0], [1])  # d and D are one name: neither is meant
    assert found.report["names_matched"] == "without regard to case"
    found = network(tmp_path, "source,target\nA,B\na,C\n", genes)
    assert (found.source.tolist(), found.target.tolist()) == ([0], [2])
    assert found.report["names_matched"] == "exactly"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("source,target,weight\nA,B,-0.5\n", r"weight as '-0.5' \(A to B\); at least 0 .* column sign"),
        ("source,target,sign\nA,B,1\nC,B,2\nC,A,0\n", r"2 edges with such a sign as '2' \(C to B\); -1 or 1"),
        ("source,target,sign\nA,B,up\n", "sign as 'up' .* a finite number"),
        ("source,target,weight\nA,B,inf\n", "weight as 'inf'"),
        ("source,target,weight\nA,B,\n", "weight as ''"),
        ("source,gene\nA,B\n", "needs one column 'target'; there is source, gene"),
        ("regulator\ttarget\nA\tB\n", "needs one column 'source'"),
        ("source,target\n", "has no edges"),
        ("", "is no CSV"),
        ('source,target\nA,B,C\nD\n"', "is no CSV"),
        ("source,target\nA,\n", "1 edges without a target"),
        (
            "source,target\nX1,X2\n",
            r"none of its names is among the 5 genes\. The network has 'X1', 'X2', the data 'A'",
        ),
        (
            "source,target\nA,X2\nX1,B\nX1,C\n",
            "1 of its regulators and 2 of its targets are among the 5 genes, never both",
        ),
        ("source,target\nA,A\n", "all 1 edges .* self loops"),
    ],
)
def test_a_network_that_cannot_be_used_is_one_line_that_says_why(tmp_path, text, says):
    with pytest.raises(DataError, match=says) as caught:
        network(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.csv does not exist"):
        load_network(tmp_path / "none.csv", GENES)
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)) * 10)
    with pytest.raises(DataError, match=r"binary\.csv (is no CSV|needs one column)"):
        load_network(tmp_path / "binary.csv", GENES)
    with pytest.raises(DataError, match="is no CSV"):
        load_network(tmp_path, GENES)


@pytest.mark.parametrize(
    ("cells", "edges", "name"),
    [
        ("schiebinger2019_reprogramming_d10_d11.h5ad", 277, "grn_mouse_dorothea_abc.csv"),
        ("semrau2017_mesc_ra_timecourse.h5ad", 3, "grn_mouse_dorothea_abc.csv"),
        ("kameneva2021_sympathoadrenal_timecourse.h5ad", 24, "grn_human_collectri.csv"),
    ],
)
def test_real_networks_have_the_known_number_of_edges(cells, edges, name):
    genes = load(real(cells), DataConfig(), training=False).genes
    found = load_network(real(name), genes)
    report = found.report
    assert report["edges_kept"] + report["duplicates_merged"] + report["self_loops_dropped"] == edges
    assert report["names_matched"] == "exactly"
    assert len(pd.read_csv(REAL / name)) == report["edges_read"]
    assert set(np.unique(found.sign)) <= {-1.0, 1.0}


def test_a_network_of_another_species_is_matched_without_case_or_refused():
    genes = load(real("packer2019_celegans_neurons_timecourse.h5ad"), DataConfig(), training=False).genes
    with pytest.raises(DataError, match=r"none of its names is among the 5000 genes.* 'WBGene"):
        load_network(real("grn_human_collectri.csv"), genes)
