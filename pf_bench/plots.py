"""Pictures of a record, as SVG files that read on light and on dark pages."""

from __future__ import annotations

from typing import Any

from pf_bench.case import OURS
from pf_core.svg import INK, MUTED, RULE, figure, plain, set_ticks, svg

__all__ = ["pictures"]

# The pages of this project: JAX violet, PyTorch orange; the others in Okabe and Ito's hues.
COLOURS = {"jax": "#8e5bd0", "torch": "#d2601a", "plain torch": "#8d9299", "plain jax": "#1f7fc4"}
OTHERS = ("#2a9d7c", "#c05f9b", "#b58900", "#6c71c4", "#5b8c3a", "#3f9fb5")
STYLE = (
    "<style>svg{--ink:#1c1e21;--muted:#6b7078;--rule:#d8dbe0;--paper:#fff;font-family:system-ui,sans-serif}"
    "@media(prefers-color-scheme:dark){svg{--ink:#e6e7ea;--muted:#8d939d;--rule:#3a3e46;--paper:#16181c}}</style>"
)


def pictures(record: dict[str, Any]) -> dict[str, str]:
    """Name -> SVG: the ratios of the rows that have targets, and time over size of every series."""
    found = {}
    if any(target["kind"] == "faster" for row in record["rows"] for target in row["targets"]):
        found["ratios"] = _standalone(_ratios(record))
    for (device, malloc, name, axis), rows in _series(record).items():
        if len(rows) > 1:
            parts = f"{device}-{malloc}-{name}-{axis}".replace(",", "").replace(" ", "-").lower()
            found[parts] = _standalone(_curve(name, axis, f"{device}, {malloc}", rows))
    return found


def _standalone(drawing: str) -> str:
    """An inline drawing with the colours that its page would have set."""
    opening, rest = drawing.split(">", 1)
    return f"{opening}>{STYLE}{rest}\n"


def _series(record: dict[str, Any]) -> dict[tuple[str, str, str, str], list[dict[str, Any]]]:
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for row in record["rows"]:
        if row["series"] and row["sides"]:
            groups.setdefault((row["device"], row["malloc"], row["name"], row["series"]), []).append(row)
    # A case in the middle of two series belongs to both, where all other sizes are equal.
    for (device, malloc, name, axis), rows in groups.items():
        fixed = {size: value for size, value in rows[0]["sizes"].items() if size != axis}
        for row in record["rows"]:
            same = (row["device"], row["malloc"], row["name"]) == (device, malloc, name) and row["sides"]
            if same and row not in rows and {**row["sizes"], axis: 0} == {**fixed, axis: 0}:
                rows.append(row)
        rows.sort(key=lambda row: row["sizes"][axis])
    return groups


def _colour(name: str, names: list[str]) -> str:
    others = [other for other in names if other not in COLOURS]
    return COLOURS.get(name) or OTHERS[others.index(name) % len(OTHERS)]


def _curve(name: str, axis: str, where: str, rows: list[dict[str, Any]]) -> str:
    """Time over size, logarithmic, a line a side, a band from minimum to maximum."""
    names = list(dict.fromkeys(side for row in rows for side in row["sides"]))
    with figure(520, 300) as drawing:
        axes = drawing.add_axes((0.12, 0.16, 0.55, 0.72))
        for side in names:
            points = [(row["sizes"][axis], row["sides"][side]) for row in rows if side in row["sides"]]
            x = [size for size, _ in points]
            colour = _colour(side, names)
            axes.plot(x, [1e3 * p["median"] for _, p in points], "o-", ms=3.5, lw=1.6, color=colour, label=plain(side))
            low, high = ([1e3 * p[word] for _, p in points] for word in ("min", "max"))
            axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms a step", title=f"{name} ({where})")
        axes.grid(color=RULE)
        axes.set_xticks([row["sizes"][axis] for row in rows], [str(row["sizes"][axis]) for row in rows])
        axes.minorticks_off()
        set_ticks(axes.yaxis, True)
        axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), labelcolor=INK)
        return svg(drawing, f"time of {name} over {axis}, {where}")


def _ratios(record: dict[str, Any]) -> str:
    """Every ratio with a target: a dot and its range, the target as a line."""
    entries = []
    for row in record["rows"]:
        for target in row["targets"]:
            side = row["sides"].get(target["side"])
            if target["kind"] == "faster" and side:
                label = f"{row['case']} / {target['side']} ({row['malloc']})"
                entries.append((label, side["ratio"], target["value"], row["malloc"]))
    height = 60 + 20 * max(len(entries), 1)
    with figure(900, height) as drawing:
        axes = drawing.add_axes((0.56, 44 / height, 0.42, (height - 74) / height))
        for place, (_, ratio, wanted, malloc) in enumerate(entries):
            colour = COLOURS[OURS] if malloc == "tuned" else COLOURS["plain jax"]
            axes.plot([ratio["min"], ratio["max"]], [place, place], color=colour, lw=2, alpha=0.5)
            axes.plot([ratio["median"]], [place], "o", color=colour, ms=5)
            axes.plot([wanted, wanted], [place - 0.35, place + 0.35], color=MUTED, lw=1.6)
        axes.set(xscale="log", ylim=(len(entries) - 0.4, -0.6), xlabel="times as fast as the other side; | is wanted")
        axes.set_yticks(range(len(entries)), [plain(label) for label, *_ in entries])
        axes.grid(axis="x", color=RULE)
        set_ticks(axes.xaxis, True)
        return svg(drawing, "how many times as fast as others the JAX twin is, with targets")
