"""The base of the report's figures: matplotlib figures under fixed settings, and their way to inline SVG.

Ink, grid and text colours are CSS variables of the page, so that one file reads in light and in dark, and text
stays text in the page's font.
"""

from __future__ import annotations

import io
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["INK", "MUTED", "PAPER", "RULE", "figure", "plain", "set_ticks", "short", "standalone", "svg", "tick"]

# Sentinels, replaced by CSS variables once the SVG is written.
INK, MUTED, RULE, PAPER = "#010203", "#020304", "#030405", "#fdfcfb"
LIGHT = {INK: "#1b1f24", MUTED: "#5b6570", RULE: "#d5dae0", PAPER: "#ffffff"}  # of files of their own
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
    with warnings.catch_warnings():
        # Text stays text: a glyph that matplotlib's own font lacks is the reader's browser's to draw.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        drawing.savefig(buffer, format="svg", dpi=160, metadata=metadata, transparent=True)
    body = buffer.getvalue()
    body = body[body.index("<svg") :].split(">", 1)[1]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", body, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    # Ids of different figures share one page; a prefix made of the figure's own content keeps them apart.
    prefix = f"f{zlib.crc32(body.encode()):08x}"
    # Only tags are rewritten. matplotlib escapes < and > in text and attributes, so no user text can pass for a tag.
    body = re.sub(r"<[^>]+>", lambda match: _tag(match.group(), used, prefix), body)
    width, height = 72 * drawing.get_size_inches()
    widest = 1.3 * width  # larger, the text would outgrow the page's
    opening = (
        f'<svg viewBox="0 0 {width:g} {height:g}" style="max-width:{widest:.0f}px" role="img" '
        f'aria-label="{escape(alt)}" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return opening + re.sub(r">\s+<", "><", body).strip()


def standalone(drawing: Figure, alt: str) -> str:
    """The figure as an SVG file of its own, in fixed colours on white."""
    text = svg(drawing, alt)
    for sentinel, variable in VARIABLES.items():
        text = text.replace(variable, LIGHT[sentinel])
    end = text.index(">") + 1
    width, height = 72 * drawing.get_size_inches()
    opening = text[:end].replace(' style="', f' width="{width:g}" height="{height:g}" style="font-family:sans-serif;')
    return f'{opening}<rect width="100%" height="100%" fill="{LIGHT[PAPER]}"/>{text[end:]}\n'


def _tag(tag: str, used: set[str], prefix: str) -> str:
    tag = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}{m.group(1)}"' if m.group(1) in used else "", tag)
    tag = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", tag)
    # The page's font instead of the family that matplotlib measured with.
    tag = re.sub(r"font: (?:(\d+) )?([\d.]+)px [^;\"]*", lambda m: _font(m.group(1), m.group(2)), tag)
    for sentinel, variable in VARIABLES.items():
        tag = tag.replace(sentinel, variable)
    return tag


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


def set_ticks(axis: Any, log: bool, *, whole: bool = False) -> None:
    """Few ticks with short labels on one axis, linear or logarithmic."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    if log:
        axis.set_major_locator(LogLocator(numticks=5))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(4, integer=whole))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))


def tick(value: float) -> str:
    """A short tick label without mathematics, which would bring its own fonts."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"
