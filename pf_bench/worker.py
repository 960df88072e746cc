"""The process that measures: one suite on one device under one setting of the allocator, or the memory of one side.

    python -m pf_bench.worker REQUEST.json RESULT.json

The request is {"task": "suite", "memory" or "probe", "suite", "context", "case", "side"}. Rows are written as they
come, so that a crash keeps those before it.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pf_bench import machine
from pf_bench.agree import compare
from pf_bench.case import OURS, Absent, Case, Context, Side, Skipped
from pf_bench.timing import take_turns, timed

__all__ = ["main", "measure", "measure_memory", "suite_cases"]

TWINS = (OURS, "torch")
HEAVY_ROUNDS = 3


def suite_cases(suite: str, context: Context) -> list[Case]:
    """The cases of a suite.

    Raises:
        Skipped: it cannot run as asked.
    """
    return importlib.import_module(f"pf_bench.{suite}").cases(context)


def measure(case: Case, context: Context, patience: machine.Patience) -> dict[str, Any]:
    """One row: who agrees, who does not, and the times of those who do. Twins that differ are not timed at all."""
    built = case.build()
    absent = {name: side.reason for name, side in built.items() if isinstance(side, Absent)}
    sides = {name: side for name, side in built.items() if isinstance(side, Side)}
    row: dict[str, Any] = {
        "case": case.key,
        "name": case.name,
        "sizes": dict(case.sizes),
        "series": case.series,
        "tolerance": case.tolerance,
        "flop": case.flop,
        "bytes": case.bytes,
        "memory": case.memory,
        "targets": [asdict(target) for target in case.targets],
        "notes": {name: side.note for name, side in sides.items() if side.note},
        "sides": {},
        "differences": {},
        "refused": {},
        "absent": absent,
    }
    first: dict[str, float] | None = None
    if not case.heavy:
        first = _first_calls(sides, absent)
        row["differences"], row["refused"] = compare(sides, case.tolerance)
        if any(name in row["refused"] for name in TWINS):
            return row
        sides = {name: side for name, side in sides.items() if name not in row["refused"]}
    calm = patience.wait()
    rounds = min(context.rounds, 1 if context.quick else HEAVY_ROUNDS) if case.heavy else context.rounds
    timings = take_turns(sides, rounds=rounds, sample=context.sample, patience=patience, first=first)
    if case.heavy:
        row["differences"], row["refused"] = compare(sides, case.tolerance)
        if row["refused"]:
            return row
    ours = timings[OURS].samples
    for name, timing in timings.items():
        ratios = [theirs / own for theirs, own in zip(timing.samples, ours, strict=False)]
        spread = {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)}
        row["sides"][name] = timing.summary() | {"ratio": spread, "steps": sides[name].steps}
    row["quiet"] = calm
    return row


def _first_calls(sides: dict[str, Side], absent: dict[str, str]) -> dict[str, float]:
    """Seconds of every side's first call, which compiles. Others' code may break; what fails becomes absent."""
    seconds = {}
    for name in list(sides):
        try:
            seconds[name] = timed(sides[name])
        except Exception as error:
            if name in TWINS:
                raise
            absent[name] = f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            del sides[name]
    return seconds


def measure_memory(case: Case, name: str, context: Context) -> dict[str, Any]:
    """Peak memory of one call beyond what was held before it, in bytes, after a call that compiled and warmed up."""
    side = case.build().get(name)
    if not isinstance(side, Side):
        return {"reason": side.reason if side else f"there is no side {name!r}"}
    side.call()
    if context.device == "gpu":
        return _device_memory(side, name)
    machine.release()
    before = machine.memory()
    if before is None or not machine.forget_peak():
        return {"reason": "this system does not let a process forget its peak of memory (/proc/self/clear_refs)"}
    before = machine.memory()
    side.call()
    after = machine.memory()
    assert before is not None
    assert after is not None
    return {"extra": max(0, after[1] - before[0]), "held": before[0]}


def _device_memory(side: Side, name: str) -> dict[str, Any]:
    """The framework's own counters. JAX's peak goes back to the start of the process, the compilation included."""
    if "jax" in name:
        import jax

        stats = jax.devices("gpu")[0].memory_stats()
        return {"extra": stats["peak_bytes_in_use"] - stats["bytes_in_use"], "held": stats["bytes_in_use"]}
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    side.call()
    return {"extra": torch.cuda.max_memory_allocated() - held, "held": held}


def probe(device: str) -> dict[str, Any]:
    """Versions, and what both frameworks say of the device.

    Raises:
        ConfigError: a framework or the device is missing.
    """
    from pf_core import backends

    described = {name: backends.load(name, device=device).describe() for name in ("jax", "torch")}
    return {"versions": machine.versions(), "devices": described}


def _rows(request: dict[str, Any], context: Context, patience: machine.Patience) -> Iterator[dict[str, Any]]:
    for case in suite_cases(request["suite"], context):
        row = measure(case, context, patience)
        shown = row["sides"].get(OURS, {}).get("median")
        print(f"{case.key}: " + (f"{1e3 * shown:.4g} ms" if shown else f"refused: {row['refused']}"), flush=True)
        yield row


def main(request_path: str, result_path: str) -> None:
    """Do what the request says and write the result."""
    from pf_core.errors import PfError

    request = json.loads(Path(request_path).read_text())
    context = Context(**request["context"])
    result: dict[str, Any] = {}

    def write() -> None:
        temporary = Path(result_path + ".partial")
        temporary.write_text(json.dumps(result))
        os.replace(temporary, result_path)

    try:
        if request["task"] == "probe":
            result = probe(context.device)
        elif request["task"] == "memory":
            result = {"reason": f"there is no case {request['case']!r}"}
            # Without peers first: their imports are memory too.
            for variant in (replace(context, peers=False), context):
                [case] = [c for c in suite_cases(request["suite"], variant) if c.key == request["case"]]
                result = measure_memory(case, request["side"], variant)
                if "extra" in result:
                    break
        else:
            result = {"rows": [], "waited": 0.0}
            patience = machine.Patience(context.wait)
            for row in _rows(request, context, patience):
                result["rows"].append(row)
                result["waited"] = patience.waited
                write()
    except Skipped as reason:
        result["skipped"] = str(reason)
    except PfError as error:
        result["error"] = str(error)
    write()


if __name__ == "__main__":
    main(*sys.argv[1:])
