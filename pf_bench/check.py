"""The guard against losses of speed: ratios of this run against the committed ones, never absolute times."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pf_bench.result import FORMAT, ratios
from pf_core.errors import ConfigError

__all__ = ["LOSS", "Verdict", "compare", "read"]

LOSS = 0.25  # of a ratio, that fails


@dataclass(frozen=True)
class Verdict:
    """What the guard found.

    Args:
        compared: ratios that both records hold.
        lost: lines that name the ratios which fell by more than LOSS.
        missing: lines that name what was committed, was asked for, and was not found now.
    """

    compared: int
    lost: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not (self.lost or self.missing)


def read(path: str | Path) -> dict[str, Any]:
    """A committed record.

    Raises:
        ConfigError: there is none at this path, or it is not one.
    """
    try:
        record = json.loads(Path(path).read_text())
        if record["format"] != FORMAT:
            raise ConfigError(f"{path} has format {record['format']}; this version reads format {FORMAT}")
    except OSError as error:
        raise ConfigError(f"no committed results at {path} ({error.strerror}); name them with --against") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not a record of pf bench") from None
    return record


def compare(found: dict[str, Any], committed: dict[str, Any]) -> Verdict:
    """Hold the ratios of a run against committed ones.

    A ratio of a twin or a plain formula that the same rows had and that is gone counts as missing; peers may be absent.

    Raises:
        ConfigError: the two records share no ratio.
    """
    now, before = ratios(found), ratios(committed)
    common = [name for name in before if name in now]
    if not common:
        raise ConfigError(
            "the committed results share no ratio with this run; measure the same suites, device and sizes"
        )
    lost = tuple(
        f"{name}: {now[name]:.3g}, committed {before[name]:.3g} ({now[name] / before[name] - 1.0:+.0%})"
        for name in common
        if now[name] < (1.0 - LOSS) * before[name]
    )
    rows = {f"{row['device']}/{row['malloc']}/{row['suite']}/{row['case']}": row for row in found["rows"]}
    missing = []
    for name in before:
        row_name, _, side = name.rpartition(": ")
        if name in now or row_name not in rows:
            continue
        reason = rows[row_name]["refused"].get(side) or rows[row_name]["absent"].get(side) or "not measured"
        if "not installed" not in reason:
            missing.append(f"{name}: {reason}")
    return Verdict(len(common), lost, tuple(missing))
