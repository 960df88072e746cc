"""Labels of cells: text from any column type, combinations and doses, vocabularies.

Missing values (NaN, None, NA, empty text, the text "nan") of a tissue, cell type or batch become UNKNOWN; whole
numbers lose their ".0", so that a column 1, 2, 3 means the same as integers, as floats and as text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pf_core.config import DataConfig
from pf_core.errors import DataError

__all__ = ["CONTROL", "UNKNOWN", "Members", "codes", "condition_label", "parse_condition", "texts", "vocabulary"]

UNKNOWN = "<unknown>"  # index 0 of every vocabulary
CONTROL = "control"
MISSING = ("", "nan", "<na>")

Members = tuple[tuple[str, float], ...]  # (name, dose), sorted by name; () is control


def text(value: Any) -> str:
    """One value of a column as text: bytes decoded, 10.0 as "10", missing as ""."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if isinstance(value, float | np.floating):
        value = float(value)
        return "" if math.isnan(value) else f"{int(value)}" if value.is_integer() else f"{value!r}"
    if not isinstance(value, str | int | np.integer | np.bool_):
        import pandas as pd

        if value is None or value is pd.NA or value is pd.NaT:
            return ""
        if not isinstance(value, pd.Timestamp | pd.Timedelta):
            raise DataError(f"holds objects of type {type(value).__name__}; text or numbers were wanted")
    stripped = str(value).strip()
    return "" if stripped.casefold() in MISSING else stripped


def texts(column: Any, name: str, missing: str = UNKNOWN) -> tuple[np.ndarray, int]:
    """A column of any type as an object array of shared strings, and how many values were missing."""
    import pandas as pd

    try:
        index, levels = pd.factorize(pd.Series(column), use_na_sentinel=True)
        words = [text(level) for level in list(levels)]
    except (DataError, TypeError) as error:
        raise DataError(f"obs column {name!r} {error}; convert it to text or numbers") from None
    table = np.array([word or missing for word in words] + [missing], dtype=object)
    absent = np.array([not word for word in words] + [True])
    return table[index], int(absent[index].sum())


def parse_condition(condition: str, config: DataConfig, doses: Any = None) -> Members:
    """Members and doses of a condition as written: "B+A", "ctrl + A", "A@0.5+B".

    Whitespace, order, empty parts and repeats do not matter; control members and members of dose 0 are left out.

    Args:
        condition: text with the separator of the config.
        doses: None reads "@dose" behind a name, else dose 1; a number is the dose of every member; text such as
            "1+0.5" gives one dose per part as written.

    Raises:
        DataError: another number of doses than parts, a dose that is no finite non-negative number, or a member
            that is named twice with two doses.
    """
    controls = {name.casefold() for name in config.control}
    whole = condition.strip()
    if whole.casefold() in controls:
        return ()
    parts = [part.strip() for part in (whole.split(config.separator) if config.separator else [whole])]
    if doses is None:
        pairs = [_dosed(part) for part in parts]
    else:
        amounts = _amounts(doses, config.separator)
        if len(amounts) == 1:
            amounts = amounts * len(parts)
        if len(amounts) != len(parts):
            raise DataError(
                f"condition {condition!r} has {len(parts)} parts and doses {doses!r}; give one dose per part"
            )
        pairs = list(zip(parts, amounts, strict=True))
    members: dict[str, float] = {}
    for name, dose in pairs:
        if not name or name.casefold() in controls:
            continue
        if not (math.isfinite(dose) and dose >= 0):
            raise DataError(
                f"condition {condition!r} has dose {dose:g}; a finite number that is not negative was wanted"
            )
        if dose and members.setdefault(name, dose) != dose:
            raise DataError(f"condition {condition!r} names {name} with two doses; give one")
    return tuple(sorted(members.items()))


def _dosed(part: str) -> tuple[str, float]:
    name, at, dose = part.rpartition("@")
    try:
        return (name.strip(), float(dose)) if at and name.strip() else (part, 1.0)
    except ValueError:
        return part, 1.0  # the @ belongs to the name


def _amounts(doses: Any, separator: str) -> list[float]:
    try:
        return [float(doses)]
    except (TypeError, ValueError):
        pass
    try:
        return [float(part) for part in str(doses).split(separator or None)]
    except ValueError:
        raise DataError(f"dose {doses!r} is no number; give a number, or one per member such as '1+0.5'") from None


def condition_label(members: Members, separator: str = "+") -> str:
    """The canonical label, which parse_condition reads back: "control", "A", "A+B", "A@0.5+B" where a dose is not 1."""
    return separator.join(name if dose == 1 else f"{name}@{dose:.10g}" for name, dose in members) or CONTROL


def vocabulary(names: Sequence[str] | np.ndarray) -> tuple[str, ...]:
    """UNKNOWN first, then every other name once, sorted."""
    return (UNKNOWN, *sorted(set(names) - {UNKNOWN}))


def codes(names: Sequence[str] | np.ndarray, known: Sequence[str]) -> np.ndarray:
    """(n,) int32 index of every name in a vocabulary; 0, unknown, for names that are not in it."""
    position = {name: index for index, name in enumerate(known)}
    return np.fromiter((position.get(name, 0) for name in names), dtype=np.int32, count=len(names))
