"""`pf parity`: run the suite on the devices and precisions asked for, and write what was compared, where and how close.

certificate.json is the record, certificate.md its summary, certificate.html one page with a picture per case group.
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parity_tests import doctor, mutants
from parity_tests.bisect import first_divergence
from parity_tests.cases import all_cases
from parity_tests.certificate_page import page
from parity_tests.compare import Result, run_case
from parity_tests.sides import LOW, TIERS, MissingDevice, Side

DEVICES = {"jax": ("cpu", "gpu", "tpu"), "torch": ("cpu", "gpu")}
EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


def present() -> dict[str, list[str]]:
    """Devices of each framework on this machine."""
    found: dict[str, list[str]] = {}
    for framework, names in DEVICES.items():
        found[framework] = []
        for name in names:
            try:
                with Side(framework, name).context():
                    found[framework].append(name)
            except MissingDevice:
                continue
    return found


def pairs(devices: Sequence[str]) -> list[tuple[str, str]]:
    """Every pair (JAX's device, PyTorch's device) among those asked for; PyTorch's CPU stands in for a missing TPU."""
    jax = [name for name in DEVICES["jax"] if name in devices]
    torch = [name for name in DEVICES["torch"] if name in devices] or ["cpu"]
    return list(itertools.product(jax, torch))


def run(
    devices: Sequence[str] = ("cpu",),
    dtypes: Sequence[str] = ("float64", "float32"),
    out: str | Path = "parity",
    mutants_too: bool = False,
    *,
    only: str = "",
    all_checks: bool = False,
) -> int:
    """Run every case on every pair of devices and every precision, and write the certificate.

    Args:
        devices: "cpu", "gpu", "tpu". One that this machine lacks is an error; one not asked for is listed as not run.
        dtypes: "float64", "float32"; "tf32" and "bf16" for the dense layers of pairs without a "cpu".
        out: directory of certificate.json, certificate.md and certificate.html.
        mutants_too: plant the mutants as well, and write mutants.json with the kill matrix.
        only: a part of the names of the cases to run; the certificate says that it is partial.
        all_checks: run every check on every mutant, not up to the first that notices it.

    Returns:
        0 when everything agrees (and every mutant is noticed), 1 when not, 2 for a device or dtype that is not there.
    """
    unknown = [name for name in devices if name not in DEVICES["jax"]] + [name for name in dtypes if name not in TIERS]
    if unknown or not devices or not dtypes:
        print(f"unknown device or dtype {unknown}; devices are cpu, gpu, tpu and dtypes {', '.join(TIERS)}")
        return EXIT_USAGE
    if set(dtypes) & set(LOW) and set(devices) <= {"cpu"}:
        print(f"{' and '.join(LOW)} are of accelerators, and the devices are {', '.join(devices)}; add gpu")
        return EXIT_USAGE
    here = present()
    missing = [name for name in devices if name not in here["jax"] or (name != "tpu" and name not in here["torch"])]
    if missing:
        print(f"{', '.join(missing)} was asked for, but JAX has {here['jax']} and PyTorch has {here['torch']}")
        return EXIT_USAGE
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    results = _compare(pairs(devices), dtypes, only)

    def written(verdicts: list[mutants.Verdict] | None) -> dict[str, Any]:
        record = _record(results, devices, dtypes, here, only, verdicts, all_checks, time.perf_counter() - begin)
        (folder / "certificate.json").write_text(json.dumps(record, indent=1, allow_nan=False))
        (folder / "certificate.md").write_text(markdown(record))
        (folder / "certificate.html").write_text(page(record, markdown(record)))
        return record

    record = written(None)
    if mutants_too:  # they take longer than the cases, whose certificate is not lost when they are cut off
        record = written(mutants.run(all_checks=all_checks, out=folder))
    print(markdown(record))
    return EXIT_OK if record["passed"] else EXIT_FAILED


def _compare(chosen: list[tuple[str, str]], dtypes: Sequence[str], only: str) -> list[Result]:
    results = []
    for (on_jax, on_torch), tier in itertools.product(chosen, dtypes):
        if tier in LOW and "cpu" in (on_jax, on_torch):
            continue
        sides = (Side("jax", on_jax, tier), Side("torch", on_torch, tier))
        for case in all_cases():
            if only not in case.name or TIERS[tier][0] not in case.dtypes:
                continue
            found = run_case(case, sides)
            results += found
            bad = [result for result in found if not result.passed]
            for result in bad:
                print(result.line(), flush=True)
            if bad and not any("raised" in result.detail for result in bad):
                print(f"  first divergence: {first_divergence(case, sides)}", flush=True)
    return results


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 1e300


def _record(
    results: list[Result],
    devices: Sequence[str],
    dtypes: Sequence[str],
    here: dict[str, list[str]],
    only: str,
    verdicts: list[mutants.Verdict] | None,
    all_checks: bool,
    seconds: float,
) -> dict[str, Any]:
    groups = {case.name: (case.module, case.group) for case in all_cases()}
    rows = []
    for result in results:
        module, group = groups[result.case]
        row = {k: v for k, v in asdict(result).items() if k not in ("values", "index")}
        row |= {"errors": [_finite(error) for error in result.errors], "module": module, "group": group}
        if not result.passed:
            row |= {"index": list(result.index), "values": [repr(value) for value in result.values]}
        rows.append(row)
    examined = doctor.examine()
    asked = {f"jax-{a} with torch-{b}" for a, b in pairs(devices)}
    possible = {f"jax-{a} with torch-{b}" for a in DEVICES["jax"] for b in DEVICES["torch"]}
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "passed": bool(results) and all(result.passed for result in results),
        "partial": only,
        "seconds": round(seconds, 1),
        "machine": {"system": platform.system(), "processor": platform.machine(), "devices": examined.devices},
        "present": here,
        "versions": examined.versions,
        "precision": {
            tier: {
                "unit roundoff": TIERS[tier][1],
                "dense layers": tier,
                **dict(zip(("jax", "torch"), Side("jax", tier=tier).matmul, strict=True)),
            }
            for tier in dtypes
        },
        "flags": examined.flags,
        "run": sorted(asked),
        "not run": sorted(possible - asked) + [f"dtype {tier}" for tier in TIERS if tier not in dtypes],
        "cases": len({result.case for result in results}),
        "leaves": len(rows),
        "verdicts": {
            word: sum(row["verdict"] == word for row in rows) for word in sorted({row["verdict"] for row in rows})
        },
        "worst": _worst(rows),
        "conventions": [asdict(row) for row in examined.conventions],
        "results": rows,
    }
    if verdicts is not None:
        add_mutants(record, verdicts, all_checks)
    return record


def add_mutants(record: dict[str, Any], verdicts: list[mutants.Verdict], all_checks: bool) -> None:
    """What became of the mutants, written into a record of the cases.

    Only a run of all checks knows which of them are indispensable.
    """
    killed, total = mutants.score(verdicts)
    record["mutants"] = {
        "noticed": killed,
        "of": total,
        "equivalent": {verdict.mutant: verdict.equivalent for verdict in verdicts if verdict.equivalent},
        "survived": [v.mutant for v in verdicts if not v.killed and not v.equivalent],
    }
    if all_checks:
        record["mutants"]["indispensable"] = mutants.indispensable(verdicts)
    record["passed"] = record["passed"] and killed == total


def _worst(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Pair -> precision -> module -> worst error of each side, in floors."""
    worst: dict[str, Any] = {}
    for row in rows:
        pair = " with ".join(row["sides"])
        cell = worst.setdefault(pair, {}).setdefault(row["tier"], {}).setdefault(row["module"], [0.0, 0.0])
        cell[:] = [max(a, b) for a, b in zip(cell, row["errors"], strict=True)]
    return worst


def markdown(record: dict[str, Any]) -> str:
    """The summary."""
    word = "PASSED" if record["passed"] else "FAILED"
    lines = [f"# Parity certificate: {word}", ""]
    if record["partial"]:
        lines += [f"**Partial**: only cases whose name contains `{record['partial']}`.", ""]
    lines += [
        f"{record['date']}, {record['cases']} cases, {record['leaves']} leaves in {record['seconds']:.0f} s.",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in record["versions"].items()) + ".",
        f"Machine: {record['machine']['system']} {record['machine']['processor']}; "
        + "; ".join(f"{k}: {', '.join(v)}" for k, v in record["machine"]["devices"].items())
        + ".",
        "Flags: " + (", ".join(f"{k}={v}" for k, v in record["flags"].items()) or "none set") + ".",
        "",
        "Verdicts: " + ", ".join(f"{count} {word}" for word, count in record["verdicts"].items()) + ".",
        "",
        "Worst error of any leaf against the oracle. In float64 the unit is u S, and 100 are allowed (rule 1);",
        "otherwise it is the floor gamma_n S, and the sides may differ by 3 above it (rule 2).",
        "",
        "| pair | precision | module | JAX | PyTorch |",
        "|---|---|---|---|---|",
    ]
    for pair, tiers in record["worst"].items():
        for tier, modules in tiers.items():
            lines += [f"| {pair} | {tier} | {module} | {a:.3g} | {b:.3g} |" for module, (a, b) in modules.items()]
    lines += ["", "Not run: " + (", ".join(record["not run"]) or "nothing") + "."]
    if "mutants" in record:
        found = record["mutants"]
        lines += [
            "",
            f"Mutants: {found['noticed']} of {found['of']} noticed, {len(found['equivalent'])} declared equivalent.",
        ]
        lines += [f"- survived: {name}" for name in found["survived"]]
    failures = [row for row in record["results"] if row["verdict"] not in ("equal", "both at noise")]
    if failures:
        lines += ["", "## Failures", ""]
        lines += [
            f"- {r['case']}: {r['quantity']} {r['leaf']} in {r['tier']}, {r['verdict']} {r['detail']}" for r in failures
        ]
    changed = [row for row in record["conventions"] if tuple(row["expected"]) != tuple(row["found"])]
    lines += ["", "## Conventions that differ from the table", ""]
    lines += [f"- {row['name']}: PyTorch {row['found'][0]}, JAX {row['found'][1]}" for row in changed] or ["None."]
    return "\n".join(lines) + "\n"
