"""The record of a benchmark: targets judged, JSON and Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pf_bench.case import OURS

__all__ = ["FORMAT", "judged", "key", "markdown", "ratios"]

FORMAT = 1
Record = dict[str, Any]
MIB = float(1 << 20)


def key(row: dict[str, Any]) -> str:
    """device/malloc/suite/case."""
    return f"{row['device']}/{row['malloc']}/{row['suite']}/{row['case']}"


def ratios(record: Record) -> dict[str, float]:
    """Median time of every side over that of the JAX twin, by row and side; ceilings and the twin itself left out."""
    return {
        f"{key(row)}: {name}": side["ratio"]["median"]
        for row in record["rows"]
        for name, side in row["sides"].items()
        if name != OURS and not name.endswith("GEMM")
    }


# --- targets ------------------------------------------------------------------------------------------------------


def judged(record: Record) -> list[dict[str, Any]]:
    """Every target of every row: what was wanted, what was found, and "met", "missed" or why it is open."""
    rows = {key(row): row for row in record["rows"]}
    out = []
    for name, row in rows.items():
        for target in row["targets"]:
            if target["kind"] == "memory" and f"{row['device']}/{row['suite']}/{row['case']}" in {
                t["row"] for t in out
            }:
                continue  # memory is measured once, not under every setting of the allocator
            out.append(_judge(name, row, target, rows, record["memory"]))
    return out


def _judge(name: str, row: dict, target: dict, rows: dict[str, dict], memory: dict[str, dict]) -> dict[str, Any]:
    kind, value, side = target["kind"], target["value"], target["side"]
    ours = row["sides"].get(OURS)
    found, open_because = None, ""
    if kind == "memory":
        name = f"{row['device']}/{row['suite']}/{row['case']}"
        measured = memory.get(name, {}).get(OURS, {"reason": "not measured"})
        text = f"at most {value:g} MiB beyond what was held"
        found = measured["extra"] / MIB if "extra" in measured else None
        open_because = measured.get("reason", "")
    elif ours is None:
        text, open_because = _wanted(kind, value, side), "refused: the twins do not agree"
    elif kind == "seconds":
        measured = row["sides"].get(side or OURS)
        text, found = _wanted(kind, value, side), 1e6 * measured["median"] if measured else None
        open_because = "not measured"
    elif kind == "growth":
        other = rows.get(f"{row['device']}/{row['malloc']}/{side}", {}).get("sides", {}).get(OURS)
        text, open_because = _wanted(kind, value, side), "the smaller case was not measured"
        found = ours["median"] / other["median"] if other else None
    else:
        theirs = row["sides"].get(side)
        text = _wanted(kind, value, side)
        reasons = {**row["absent"], **{name: f"refused: {why}" for name, why in row["refused"].items()}}
        open_because = reasons.get(side, "not measured")
        if theirs:
            found = theirs["ratio"]["median"] if kind == "faster" else 1.0 / theirs["ratio"]["median"]
    if found is None:
        verdict = open_because
    else:
        limit = 1e6 * value if kind == "seconds" else value
        verdict = "met" if (found >= limit if kind == "faster" else found <= limit) else "missed"
    disturbed = ours["disturbed"] if ours else 0
    return {"row": name, "wanted": text, "found": found, "verdict": verdict, "disturbed": disturbed}


def _wanted(kind: str, value: float, side: str) -> str:
    return {
        "faster": f"at least {value:g} x as fast as {side}",
        "within": f"within {value:g} x of {side}",
        "seconds": f"at most {1e6 * value:g} us a step" + (f" ({side})" if side else ""),
        "growth": f"at most {value:g} x the time of {side.partition('/')[2]}",
    }[kind]


# --- Markdown -----------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Seconds with a unit that suits them."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def markdown(record: Record, pictures: Iterable[str] = ()) -> str:
    """The whole record for a reader."""
    lines = ["# Benchmark", ""]
    if record["quick"]:
        lines += ["**Quick**: tiny sizes, to see that everything runs. These numbers say nothing about speed.", ""]
    machine = record["machine"]
    lines += [
        f"{record['date']}; {machine['processor']}, {machine['cores']} cores, {machine['memory']}, "
        f"{machine['system']}; threads: {machine['threads']}.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()) + ".",
        f"Command: `{record['command']}`. Waited {record['waited']:.0f} s for a quiet machine.",
        "",
        "Times are per step. A ratio is the time of a side over that of the JAX twin, paired by rounds:",
        "median (minimum to maximum). `tuned` and `default` are settings of the allocator. See docs/benchmark.md.",
        "",
    ]
    disturbed = sum(side["disturbed"] for row in record["rows"] for side in row["sides"].values())
    if disturbed:
        lines += [f"**{disturbed} rounds were disturbed by other processes to the end**, and count all the same.", ""]
    lines += _target_table(record)
    for name in pictures:
        lines += [f"![{name}]({name}.svg)", ""]
    for suite in dict.fromkeys(row["suite"] for row in record["rows"]):
        lines += [f"## {suite.capitalize()}", ""]
        for row in record["rows"]:
            if row["suite"] == suite:
                lines += _row_table(row, record)
    lines += _memory_table(record)
    for title, entries in (("Not run", record["skipped"]), ("Failed", record["failed"])):
        if entries:
            lines += [
                f"## {title}",
                "",
                *(f"- {entry['suite']} on {entry['device']}: {entry['reason']}" for entry in entries),
            ]
            lines += [""]
    return "\n".join(lines).rstrip() + "\n"


def _target_table(record: Record) -> list[str]:
    if not record["targets"]:
        return []
    lines = ["## Targets", "", "| what | wanted | found | |", "|---|---|---|---|"]
    for target in record["targets"]:
        found = "" if target["found"] is None else f"{target['found']:.3g}"
        note = " (disturbed)" if target["disturbed"] else ""
        word = f"**{target['verdict']}**" if target["verdict"] == "missed" else target["verdict"]
        lines.append(f"| {target['row']} | {target['wanted']} | {found} | {word}{note} |")
    return [*lines, ""]


def _row_table(row: dict[str, Any], record: Record) -> list[str]:
    lines = [f"### {row['case']} ({row['device']}, {row['malloc']})", ""]
    if row["sides"]:
        ceiling = _ceiling(record, row)
        head = "| side | min | median | max | ratio | first call | differs by |"
        lines += [head + (" rate |" if ceiling else ""), "|---|---|---|---|---|---|---|" + ("---|" if ceiling else "")]
        for name, side in row["sides"].items():
            spread = side["ratio"]
            ratio = "1" if name == OURS else f"{spread['median']:.3g} ({spread['min']:.3g} to {spread['max']:.3g})"
            off = row["differences"].get(name)
            agreed = f"{off:.1g}" if off is not None else "" if name == OURS else "own"
            cells = [
                name,
                *(duration(side[word]) for word in ("min", "median", "max")),
                ratio,
                duration(side["first"]),
                agreed,
            ]
            lines.append("| " + " | ".join(cells) + " |" + (f" {ceiling(side)} |" if ceiling else ""))
        lines.append("")
    lines += [f"- {name} refused: {reason}" for name, reason in row["refused"].items()]
    lines += [f"- {name}: {reason}" for name, reason in row["absent"].items()]
    lines += [f"- {name}: {note}" for name, note in row["notes"].items()]
    if not row.get("quiet", True):
        lines.append("- The machine was not quiet when this began.")
    return [*lines, ""]


def _ceiling(record: Record, row: dict[str, Any]) -> Any:
    """side -> rate text, with the share of the fastest matrix product or copy of this run where there is one."""
    for what, unit in (("flop", "GF/s"), ("bytes", "GB/s")):
        if row[what]:
            same = [
                other[what] / side["median"]
                for other in record["rows"]
                if other["suite"] == "ceilings"
                and other[what]
                and (other["device"], other["malloc"]) == (row["device"], row["malloc"])
                for side in other["sides"].values()
            ]
            amount, best = row[what], max(same, default=0.0)

            def rate(side: dict[str, Any], amount: float = amount, best: float = best, unit: str = unit) -> str:
                found = amount / side["median"]
                return f"{found / 1e9:.3g} {unit}" + (f", {found / best:.0%} of the ceiling" if best else "")

            return rate
    return None


def _memory_table(record: Record) -> list[str]:
    if not record["memory"]:
        return []
    lines = ["## Memory", "", "Peak of one call beyond what a fresh process held before it.", ""]
    lines += ["| case | side | extra |", "|---|---|---|"]
    for name, sides in record["memory"].items():
        for side, found in sides.items():
            text = f"{found['extra'] / MIB:.1f} MiB" if "extra" in found else found["reason"]
            lines.append(f"| {name} | {side} | {text} |")
    return [*lines, ""]
