"""The certificate as one self-contained HTML page, with a picture of errors against floors per case group."""

from __future__ import annotations

import html
import math
from typing import Any

STYLE = """
:root{color-scheme:light dark;--ink:#1c1e21;--faint:#8a8f98;--line:#d8dbe0;--ground:#fff}
:root{--jax:#7a3db8;--torch:#d2601a;--bad:#c3232f}
@media(prefers-color-scheme:dark){:root{--ink:#e6e7ea;--faint:#8d939d;--line:#3a3e46;--ground:#16181c}
:root{--jax:#b88af0;--torch:#f09a5e;--bad:#ff6b76}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--ground)}
body{max-width:62rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem}h2{font-size:1.1rem;margin:2rem 0 .3rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.15rem .8rem .15rem 0;text-align:left;border-bottom:1px solid var(--line)}td.n{text-align:right}
.bad{color:var(--bad);font-weight:600}small,.faint{color:var(--faint)}svg{width:100%;height:auto;display:block}
svg text{font:11px system-ui,sans-serif;fill:var(--ink)}.jax{fill:var(--jax)}.torch{fill:var(--torch)}
.axis{stroke:var(--line)}.limit{stroke:var(--bad);stroke-dasharray:3 3}pre{white-space:pre-wrap}.scroll{overflow-x:auto}
"""


def page(record: dict[str, Any], summary: str) -> str:
    """One self-contained page."""
    word = "passed" if record["passed"] else "<span class=bad>failed</span>"
    head = summary.split("\n| pair")[0].split("\n", 1)[1]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>Parity certificate</title><style>{STYLE}</style><h1>Parity certificate: {word}</h1>",
        *(f"<p>{html.escape(text)}</p>" for text in head.split("\n") if text.strip()),
        _worst_table(record),
        f"<p>Not run: {html.escape(', '.join(record['not run']) or 'nothing')}.</p>",
    ]
    if "mutants" in record:
        found = record["mutants"]
        parts.append(f"<p>Mutants: {found['noticed']} of {found['of']} noticed.</p>")
        parts += [f"<p class=bad>survived: {html.escape(name)}</p>" for name in found["survived"]]
    failures = [row for row in record["results"] if row["verdict"] not in ("equal", "both at noise")]
    if failures:
        parts.append("<h2 class=bad>Failures</h2>" + "".join(_failure(row) for row in failures))
    parts.append(
        "<h2>Errors against floors</h2><p class=faint>One row per case, one dot per leaf and quantity: "
        "<b style='color:var(--jax)'>JAX</b> above, <b style='color:var(--torch)'>PyTorch</b> below. The axis is the "
        "error against the oracle, in floors, from 10<sup>-4</sup>; exact leaves sit at its left end. Dashed: what is "
        "allowed.</p>"
    )
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in record["results"]:
        groups.setdefault((" with ".join(row["sides"]), row["tier"], row["group"]), []).append(row)
    for (pair, tier, group), rows in groups.items():
        where = f"<small>{html.escape(tier)}, {html.escape(pair)}</small>"
        parts.append(f"<h2>{html.escape(group)} {where}</h2>{_picture(rows, tier)}")
    return "\n".join([*parts, _conventions(record), "</html>"])


def _worst_table(record: dict[str, Any]) -> str:
    rows = [
        f"<tr><td>{html.escape(pair)}<td>{tier}<td>{module}<td class=n>{a:.3g}<td class=n>{b:.3g}"
        for pair, tiers in record["worst"].items()
        for tier, modules in tiers.items()
        for module, (a, b) in modules.items()
    ]
    return (
        "<div class=scroll><table><tr><th>pair<th>precision<th>module<th>JAX<th>PyTorch"
        + "".join(rows)
        + "</table></div>"
    )


def _failure(row: dict[str, Any]) -> str:
    text = f"{row['case']}: {row['quantity']} {row['leaf']}, {row['tier']}: {row['verdict']} {row['detail']}"
    return f"<pre class=bad>{html.escape(text)} {html.escape(', '.join(row.get('values', [])))}</pre>"


def _picture(rows: list[dict[str, Any]], tier: str) -> str:
    """Dots on a logarithmic axis of floors, a row per case."""
    low, high, left, right = -4.0, 3.0, 330, 980
    cases = sorted({row["case"] for row in rows})
    at = lambda error: left + (right - left) * (min(max(math.log10(max(error, 1e-30)), low), high) - low) / (high - low)
    height = 22 * len(cases) + 24
    parts = [
        f"<svg viewBox='0 0 1000 {height}' role=img aria-label='errors of {html.escape(rows[0]['group'])} in floors'>"
    ]
    for power in range(int(low), int(high) + 1):
        x = at(10.0**power)
        parts.append(f"<line class=axis x1={x:.1f} x2={x:.1f} y1=0 y2={height - 18} />")
        parts.append(f"<text x={x:.1f} y={height - 4} text-anchor=middle>1e{power}</text>")
    limit = at(100.0 if tier == "float64" else 3.0)
    parts.append(f"<line class=limit x1={limit:.1f} x2={limit:.1f} y1=0 y2={height - 18} />")
    for i, case in enumerate(cases):
        y = 22 * i + 12
        label = case.split("/", 1)[1]
        parts.append(f"<text x=0 y={y + 4}>{html.escape(label[:52])}</text>")
        for row in rows:
            if row["case"] != case:
                continue
            title = html.escape(f"{row['quantity']} {row['leaf']}: {row['verdict']}")
            for k, side in enumerate(("jax", "torch")):
                x, up = at(row["errors"][k]), y + (4 if k else -4)
                parts.append(
                    f"<circle class={side} cx={x:.1f} cy={up} r=2.6 fill-opacity=.55><title>{title}</title></circle>"
                )
    return "".join([*parts, "</svg>"])


def _conventions(record: dict[str, Any]) -> str:
    rows = []
    for row in record["conventions"]:
        cells = [
            f"<td>{html.escape(found)}"
            + ("" if found == wanted else f" <span class=bad>(table: {html.escape(wanted)})</span>")
            for found, wanted in zip(row["found"], row["expected"], strict=True)
        ]
        rows.append(f"<tr><td>{html.escape(row['name'])}{''.join(cells)}")
    return (
        "<h2>Conventions, measured</h2><div class=scroll><table><tr><th><th>PyTorch<th>JAX"
        + "".join(rows)
        + "</table></div>"
    )
