"""The errors a user can cause, one line each, and the nearest names they suggest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["ConfigError", "DataError", "PfError", "PredictionError", "RunError", "TrainingError", "nearest"]


class PfError(ValueError):
    """Input that cannot be used as given. One line: what came, what was wanted, the remedy."""


class ConfigError(PfError):
    """A setting or an option."""


class DataError(PfError):
    """Data."""


class RunError(PfError):
    """A run directory."""


class PredictionError(PfError):
    """A prediction that the model cannot make."""


class TrainingError(RuntimeError):
    """Training stopped because values stayed non-finite; the message names where, and the crash bundle."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest known one, else the known ones."""
    known = [str(item) for item in known]
    folded = {item.casefold(): item for item in reversed(known)}
    close = difflib.get_close_matches(name.casefold(), folded, n=1)
    if close:
        return f"did you mean {folded[close[0]]!r}?"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"there is {shown}" if known else "there is none"
