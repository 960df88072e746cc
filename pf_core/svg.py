"""The base of the report's figures: matplotlib figures under fixed settings, and their way to inline SVG.

Ink, grid and text colours are CSS variables of the page, so that one file reads in light and in dark, and text
stays text in the page's font.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["INK", "MUTED", "PAPER", "RULE", "figure", "plain", "set_ticks", "short", "svg", "tick"]

# Sentinels, replaced by CSS variables once the SVG is written.
INK, MUTED, RULE, PAPER = "#010203", "#020304", "#030405", "#fdfcfb"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", PAPER: "var(--paper)"}


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of width x height CSS pixels under fixed settings, whatever the user's matplotlibrc says."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "pf",
                "font.size": 10,
                "axes.titlesize": 10.5,
                "axes.titlelocation": "left",
                "axes.titleweight": "bold",
                "axes.labelsize": 9.5,
                "xtick.labelsize": 9,
                "ytick.labelsize": 9,
                "text.color": INK,
                "axes.titlecolor": INK,
                "axes.labelcolor": MUTED,
                "axes.edgecolor": RULE,
                "xtick.color": MUTED,
                "ytick.color": MUTED,
                "xtick.major.size": 3,
                "ytick.major.size": 3,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.facecolor": "none",
                "figure.facecolor": "none",
                "grid.color": RULE,
                "grid.linewidth": 0.6,
                "legend.frameon": False,
                "legend.fontsize": 9,
            }
        )
        yield Figure(figsize=(width / 72, height / 72))


def svg(drawing: Figure, alt: str) -> str:
    """The figure as an <svg> element: no date, no unused ids, page fonts and colours, `alt` as its accessible name."""
    from markupsafe import escape

    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    drawing.savefig(buffer, format="svg", dpi=160, metadata=metadata, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: m.group(0) if m.group(1) in used else "", text)
    # Ids of different figures share one page; a prefix made of the figure's own content keeps them apart.
    prefix = f"f{_crc(text):08x}"
    for name in sorted(used):
        text = re.sub(rf'(id="|href="#|url\(#)({re.escape(name)})(?=["\)])', rf"\g<1>{prefix}\g<2>", text)
    # The page's font; matplotlib writes the family it measured with.
    text = re.sub(r"font: (?:(\d+) )?([\d.]+)px [^;\"]*", lambda m: _font(m.group(1), m.group(2)), text)
    for sentinel, variable in VARIABLES.items():
        text = text.replace(sentinel, variable)
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    widest = 1.3 * 72 * drawing.get_figwidth()  # larger, the text would outgrow the page's
    opening = (
        f'<svg {box.group(0) if box else ""} role="img" aria-label="{escape(alt)}" style="max-width:{widest:.0f}px" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return opening + re.sub(r">\s+<", "><", rest).strip()


def _crc(text: str) -> int:
    return zlib.crc32(text.encode())


def _font(weight: str | None, size: str) -> str:
    return f"font-size: {size}px" + (f"; font-weight: {weight}" if weight else "")


def short(text: str, length: int = 40) -> str:
    """The text with its middle left out where it is longer than `length`."""
    text = " ".join(text.split())
    if len(text) <= length:
        return plain(text)
    keep = length - 1
    return plain(text[: (keep + 1) // 2] + "…" + text[len(text) - keep // 2 :])


def plain(text: str) -> str:
    """The text with dollar signs escaped, which would start mathematics in matplotlib."""
    return text.replace("$", r"\$")


def set_ticks(axis: Any, log: bool) -> None:
    """Few ticks with short labels on one axis, linear or logarithmic."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    if log:
        axis.set_major_locator(LogLocator(numticks=5))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(4))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))


def tick(value: float) -> str:
    """A short tick label without mathematics, which would bring its own fonts."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"
