"""Labels: combinations, doses, missing values, vocabularies."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pf_core.config import DataConfig
from pf_core.errors import DataError
from pf_core.labels import UNKNOWN, codes, condition_label, parse_condition, texts, vocabulary

CONFIG = DataConfig()


@pytest.mark.parametrize(
    ("written", "label"),
    [
        ("control", "control"),
        ("ctrl", "control"),
        ("Non-Targeting", "control"),
        (" A ", "A"),
        ("B+A", "A+B"),
        ("B + A", "A+B"),
        ("ctrl+A", "A"),
        ("A+control", "A"),
        ("ctrl+ctrl", "control"),
        ("A+A", "A"),
        ("A++B+", "A+B"),
        ("C+B+A", "A+B+C"),
        ("A@0.5+B", "A@0.5+B"),
        ("B+A@.50", "A@0.5+B"),
        ("A@1", "A"),
        ("A@0+B", "B"),
        ("siRNA@home", "siRNA@home"),
    ],
)
def test_a_condition_has_one_label_however_it_is_written(written, label):
    assert condition_label(parse_condition(written, CONFIG)) == label


@pytest.mark.parametrize(
    ("condition", "dose", "label"),
    [
        ("A", 1, "A"),
        ("A", 0.5, "A@0.5"),
        ("A+B", 2, "A@2+B@2"),
        ("B+A", "1+0.5", "A@0.5+B"),
        ("ctrl+A", "0+5", "A@5"),
        ("control", float("nan"), "control"),
        ("A", "0", "control"),
        ("A", "1e-05", "A@1e-05"),
    ],
)
def test_doses_follow_their_members_as_written(condition, dose, label):
    assert condition_label(parse_condition(condition, CONFIG, dose)) == label


@pytest.mark.parametrize(
    ("condition", "dose", "says"),
    [
        ("A+B", "1+2+3", "one dose per part"),
        ("A", "much", "is no number"),
        ("A", -1, "not negative"),
        ("A", float("nan"), "finite"),
        ("A", float("inf"), "finite"),
        ("A+A", "1+2", "two doses"),
    ],
)
def test_a_dose_that_means_nothing_is_refused(condition, dose, says):
    with pytest.raises(DataError, match=says):
        parse_condition(condition, CONFIG, dose)


def test_another_separator_leaves_plus_signs_in_names():
    config = DataConfig(separator="_", control=("ctrl",))
    members = parse_condition("IL2_ctrl_CD4+", config)
    assert members == (("CD4+", 1.0), ("IL2", 1.0))
    assert condition_label(members, "_") == "CD4+_IL2"


names = st.text(st.characters(codec="ascii", exclude_characters="+@", categories=("L", "N")), min_size=1, max_size=5)


@given(st.dictionaries(names, st.floats(0.001, 1000), max_size=4))
def test_every_label_reads_back_as_what_it_was_made_of(members):
    members = {name: float(f"{dose:.10g}") for name, dose in members.items() if name.casefold() not in CONFIG.control}
    label = condition_label(tuple(sorted(members.items())))
    assert dict(parse_condition(label, CONFIG)) == members


@pytest.mark.parametrize(
    ("column", "wanted"),
    [
        ([1, 2, 2], ["1", "2", "2"]),
        ([10.0, 10.5, float("nan")], ["10", "10.5", UNKNOWN]),
        (["a", None, " "], ["a", UNKNOWN, UNKNOWN]),
        (["nan", "NaN", "x "], [UNKNOWN, UNKNOWN, "x"]),
        ([b"a", "a", b"b"], ["a", "a", "b"]),
        (pd.Categorical(["a", None, "b"], categories=["b", "a", "unused"]), ["a", UNKNOWN, "b"]),
        (pd.array([1, None, 3], dtype="Int64"), ["1", UNKNOWN, "3"]),
        (pd.array(["a", None, "b"], dtype="string"), ["a", UNKNOWN, "b"]),
        (pd.array([True, None, False], dtype="boolean"), ["True", UNKNOWN, "False"]),
        (np.array([True, False, True]), ["True", "False", "True"]),
    ],
)
def test_a_column_of_any_type_becomes_text(column, wanted):
    found, n_missing = texts(column, "name")
    assert found.tolist() == wanted
    assert n_missing == wanted.count(UNKNOWN)


def test_a_column_of_objects_is_refused():
    with pytest.raises(DataError, match=r"'name'.*convert"):
        texts(pd.Series([["a"], {"b": 1}], dtype=object), "name")
    with pytest.raises(DataError, match="objects of type tuple"):
        texts(pd.Series([(1, 2)], dtype=object), "name")


def test_names_never_seen_have_code_0():
    known = vocabulary(["b", "a", UNKNOWN, "b"])
    assert known == (UNKNOWN, "a", "b")
    assert codes(["b", "c", "a", UNKNOWN], known).tolist() == [2, 0, 1, 0]
