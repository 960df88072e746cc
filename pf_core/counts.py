"""Count matrices: what is checked before SciPy's compiled code sees them, and how they are cut."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used as given. One line: what came, what was wanted, the remedy."""
