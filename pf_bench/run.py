"""`pf bench`: a fresh process for every suite, device and setting of the allocator; then JSON, Markdown and plots."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pf_bench import machine
from pf_bench.case import DEVICES, OURS, SUITES, Context
from pf_bench.check import compare, read
from pf_bench.plots import pictures
from pf_bench.result import FORMAT, judged, markdown
from pf_core.errors import ConfigError, nearest

__all__ = ["COMMITTED", "bench"]

COMMITTED = Path("benchmarks/results")
QUICK = {"rounds": 3, "sample": 0.0, "wait": 0.0}
ROOT = Path(__file__).resolve().parents[1]  # of the packages, which a child must import from where this one did


def bench(
    *,
    devices: Sequence[str] = ("cpu",),
    suites: Sequence[str] = (),
    mallocs: Sequence[str] = ("tuned", "default"),
    quick: bool = False,
    peers: bool = True,
    data: Path | None = None,
    rounds: int = 7,
    wait: float = 600.0,
    out: Path = Path("pf-bench"),
    against: Path | None = None,
    command: str = "pf bench",
    say: Callable[[str], None] = print,
) -> int:
    """Measure, write OUT/bench.json, OUT/bench.md and plots, and judge.

    Where OUT holds results of the same machine and versions, those of other suites, devices and settings stay.

    Args:
        devices: "cpu", "gpu".
        suites: names of suites; none for all.
        mallocs: settings of the allocator, "tuned" and "default".
        quick: tiny sizes and few rounds.
        peers: measure other packages too.
        data: h5ad file for whole trainings.
        rounds: turns of every side.
        wait: seconds that every child waits in all for a quiet machine.
        out: folder to be written.
        against: a committed record to hold the ratios against.
        command: what was typed, for the record.
        say: prints a line.

    Returns:
        0, or 1 when sides do not agree, a suite failed, or a ratio was lost.

    Raises:
        ConfigError: an unknown name, a device or a framework that is missing, data or committed results that are, or
            some suites for an OUT that holds results of another machine or of other versions.
    """
    suites = tuple(suites) or SUITES
    for label, given, known in (("suite", suites, SUITES), ("device", devices, DEVICES), ("malloc", mallocs, _MALLOCS)):
        for name in given:
            if name not in known:
                raise ConfigError(f"{label} {name!r} is unknown; {nearest(name, known)}")
    if not devices or not mallocs:
        raise ConfigError("no device or no setting of the allocator is left to measure; name at least one of each")
    if data is not None and not data.exists():
        raise ConfigError(f"no file {data}; give --data an h5ad file")
    committed = read(against) if against is not None else None
    options = QUICK if quick else {"rounds": rounds, "wait": wait}
    contexts = {
        device: Context(device=device, quick=quick, peers=peers, data=str(data.resolve()) if data else "", **options)
        for device in devices
    }
    probes = {device: _child({"task": "probe"}, context, "default") for device, context in contexts.items()}
    for found in probes.values():
        if "error" in found or "crash" in found:
            raise ConfigError(found.get("error") or f"the frameworks do not start: {found['crash']}")
    record: dict[str, Any] = {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "quick": quick,
        "machine": machine.describe(),
        "versions": probes[devices[0]]["versions"],
        "devices": {device: found["devices"] for device, found in probes.items()},
        "waited": 0.0,
        "rows": [],
        "memory": {},
        "skipped": [],
        "failed": [],
    }
    kept = _kept(out / "bench.json", record, devices, suites, mallocs)
    for context in contexts.values():
        for suite in suites:
            _suite(record, suite, context, mallocs, say)
    record["targets"] = judged(record)
    whole = _joined(kept, record) if kept else record
    _write(out, whole, pictures(whole))
    return _summary(record, committed, out, say)


def _kept(
    path: Path, record: dict[str, Any], devices: Sequence[str], suites: Sequence[str], mallocs: Sequence[str]
) -> dict[str, Any] | None:
    """What an earlier record has of the same machine and versions and what this run will not measure; None for nothing.

    Raises:
        ConfigError: this run is of some suites only, and what lies there cannot stand beside it.
    """
    if not path.exists():
        return None
    try:
        before = read(path)
        different = [name for name in ("machine", "versions", "quick") if before.get(name) != record[name]]
    except ConfigError:
        different = ["format"]
    if different:
        if set(suites) == set(SUITES):
            return None
        raise ConfigError(
            f"{path} has other {', '.join(different)} than this run, which is of some suites only; choose another --out"
        )
    again = lambda entry: entry["device"] in devices and entry["suite"] in suites
    parts = lambda name: dict(zip(("device", "suite"), name.split("/"), strict=False))
    before["rows"] = [row for row in before["rows"] if not (again(row) and row["malloc"] in mallocs)]
    before["memory"] = {name: found for name, found in before["memory"].items() if not again(parts(name))}
    for word in ("skipped", "failed"):
        before[word] = [entry for entry in before[word] if not again(entry)]
    return before


def _joined(before: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Both records as one, suites in their usual order."""
    place = lambda entry: SUITES.index(entry["suite"])
    commands = dict.fromkeys([*before["command"].split("; "), record["command"]])
    whole = record | {
        "command": "; ".join(commands),
        "devices": before["devices"] | record["devices"],
        "waited": before["waited"] + record["waited"],
        "memory": before["memory"] | record["memory"],
        **{word: sorted(before[word] + record[word], key=place) for word in ("rows", "skipped", "failed")},
    }
    return whole | {"targets": judged(whole)}


_MALLOCS = ("tuned", "default")


def _suite(record: dict[str, Any], suite: str, context: Context, mallocs: Iterable[str], say: Callable) -> None:
    """One suite on one device: times under every setting of the allocator, then memory."""
    flagged: dict[str, list[str]] = {}
    for malloc in mallocs:
        say(f"{suite} on {context.device}, malloc {malloc}")
        found = _child({"task": "suite", "suite": suite}, context, malloc, say)
        record["waited"] += found.get("waited", 0.0)
        where = {"suite": suite, "device": context.device}
        for row in found.get("rows", []):
            record["rows"].append({**where, "malloc": malloc, **row})
            if row["memory"] and row["sides"]:
                flagged[row["case"]] = [name for name in row["sides"] if name == OURS or name in row["differences"]]
        for word, entries in (("skipped", record["skipped"]), ("error", record["failed"]), ("crash", record["failed"])):
            if word in found:
                entries.append({**where, "reason": found[word]})
                say(f"  {word}: {found[word]}")
        if "skipped" in found:
            return
    for case, sides in flagged.items():
        say(f"memory of {case}")
        found = {
            side: _child({"task": "memory", "suite": suite, "case": case, "side": side}, context, "exact")
            for side in sides
        }
        record["memory"][f"{context.device}/{suite}/{case}"] = {
            side: result if "extra" in result else {"reason": next(iter(result.values()), "no answer")}
            for side, result in found.items()
        }


def _child(request: dict[str, Any], context: Context, malloc: str, say: Callable | None = None) -> dict[str, Any]:
    """What a fresh process answers; "crash" holds the last line of one that died, beside what it wrote before."""
    environment = os.environ | machine.MALLOC[malloc]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    if context.device == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"  # or JAX would take most of a GPU that nobody asked for
    else:
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # both frameworks share the device
    with tempfile.TemporaryDirectory() as folder:
        asked, answer, errors = (Path(folder) / name for name in ("request.json", "result.json", "errors.txt"))
        asked.write_text(json.dumps({**request, "context": asdict(context)}))
        with errors.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "pf_bench.worker", str(asked), str(answer)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
            )
            assert process.stdout is not None
            for line in process.stdout:
                if say:
                    say(f"  {line.rstrip()}")
            code = process.wait()
        result = json.loads(answer.read_text()) if answer.exists() else {}
        if code:
            last = (errors.read_text().strip().splitlines() or ["no message"])[-1]
            result["crash"] = f"the process ended with {code}: {last}"
        return result


def _write(out: Path, record: dict[str, Any], drawings: dict[str, str]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "bench.json").write_text(json.dumps(record, indent=1) + "\n")
        (out / "bench.md").write_text(markdown(record, drawings))
        for name, drawing in drawings.items():
            (out / f"{name}.svg").write_text(drawing)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}; choose another --out") from None


def _summary(record: dict[str, Any], committed: dict[str, Any] | None, out: Path, say: Callable) -> int:
    refused = [
        f"refused: {row['device']}/{row['malloc']}/{row['suite']}/{row['case']}: {name} {reason}"
        for row in record["rows"]
        for name, reason in row["refused"].items()
    ]
    for line in refused:
        say(line)
    for target in record["targets"]:
        found = "" if target["found"] is None else f"{target['found']:.3g}, "
        say(f"{target['row']}: {target['wanted']}: {found}{target['verdict']}")
    say(f"results: {out / 'bench.md'}")
    bad = bool(refused or record["failed"])
    if committed is not None:
        verdict = compare(record, committed)
        for line in verdict.lost:
            say(f"lost: {line}")
        for line in verdict.missing:
            say(f"missing: {line}")
        say(f"{verdict.compared} ratios against the committed ones: {'passed' if verdict.passed else 'FAILED'}")
        bad = bad or not verdict.passed
    return int(bad)
