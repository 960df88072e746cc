"""The training history: one JSON record per line of history.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pf_core.errors import RunError

__all__ = ["Record", "bad_steps", "by_stage", "read_history"]


@dataclass(frozen=True)
class Record:
    """One line of the history.

    `bad_steps` is the stage's running count; `validation` and `health` exist on evaluation steps. A record of a guard
    event may hold nothing but `stage`, `step`, `event` and `bad_steps`.
    """

    stage: str
    step: int
    loss: float = math.nan
    parts: Mapping[str, float] = field(default_factory=dict)
    lr: float = math.nan
    grad_norm: float = math.nan
    grad_norms: Mapping[str, float] = field(default_factory=dict)
    bad_steps: int = 0
    validation: Mapping[str, float] = field(default_factory=dict)
    health: Mapping[str, str] = field(default_factory=dict)
    event: str = ""

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Record:
        """Read one decoded line; null stands for a value that was not finite. Unknown keys raise ValueError."""
        unknown = set(record) - set(cls.__dataclass_fields__)
        if unknown or not {"stage", "step"} <= set(record):
            raise ValueError(f"keys {', '.join(sorted(record))}; stage, step and the fields of Record were wanted")
        values: dict[str, Any] = {"stage": str(record["stage"]), "step": int(record["step"])}
        for name in ("loss", "lr", "grad_norm"):
            values[name] = _number(record.get(name))
        for name in ("parts", "grad_norms", "validation"):
            values[name] = {key: _number(value) for key, value in (record.get(name) or {}).items()}
        values["health"] = {key: str(value) for key, value in (record.get("health") or {}).items()}
        values["bad_steps"] = int(record.get("bad_steps") or 0)
        values["event"] = str(record.get("event") or "")
        return cls(**values)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def read_history(path: str | Path) -> tuple[Record, ...]:
    """Read history.jsonl. A last line without an end that is not JSON is a write that was cut off, and is left out.

    Raises:
        RunError: any other line is not a record; the message names the line.
    """
    text = Path(path).read_text(encoding="utf-8")
    lines = text.split("\n")
    records = []
    for i, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if i == len(lines):
                break
            raise RunError(f"{path} line {i} is not JSON ({error}); restore the file or remove the line") from None
        try:
            records.append(Record.from_json(record))
        except (TypeError, ValueError, AttributeError) as error:
            raise RunError(f"{path} line {i} is not a record of a training history: {error}") from None
    return tuple(records)


def by_stage(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records per stage in the order of steps, those of events alone left out.

    After a return to a checkpoint the newer record of a step counts.
    """
    stages: dict[str, dict[int, Record]] = {}
    for record in records:
        found = stages.setdefault(record.stage, {})
        if not record.event or record.parts or math.isfinite(record.loss):
            found[record.step] = record
    return {stage: [found[step] for step in sorted(found)] for stage, found in stages.items()}


def bad_steps(records: Sequence[Record]) -> dict[str, list[tuple[int, int]]]:
    """Per stage, (step of the record, how many steps were refused since the record before)."""
    found: dict[str, list[tuple[int, int]]] = {}
    before, stage = 0, ""
    for record in records:
        if record.stage != stage:
            before, stage = 0, record.stage
        if record.bad_steps > before:
            found.setdefault(record.stage, []).append((record.step, record.bad_steps - before))
        before = record.bad_steps
    return found
