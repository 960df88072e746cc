"""A self-contained HTML page of figures and tables, in the style of the run report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pf_core.checkpoint import write_atomic
from pf_core.verdict import number

__all__ = ["Drawing", "Page", "Section", "Table", "cell", "template", "write"]

ROWS_OPEN = 24  # rows of a table that stand open; a longer one is folded


@dataclass(frozen=True)
class Drawing:
    """An inline SVG made by pf_core.svg."""

    svg: str
    title: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers; the first column names the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    words: tuple[int, ...] = ()  # columns that hold text, aligned left


@dataclass(frozen=True)
class Section:
    """A heading, what it says, its figures and tables. `grid` is a class of the style sheet."""

    title: str
    texts: tuple[str, ...] = ()
    figures: tuple[Drawing, ...] = ()
    tables: tuple[Table, ...] = ()
    grid: str = "two"


@dataclass(frozen=True)
class Page:
    """Title, facts in one line, one sentence that sums up, sections."""

    title: str
    sections: tuple[Section, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    sentence: str = ""
    footer: str = ""


def template(name: str, **filters: Callable[..., Any]) -> Any:
    """One of the package's jinja templates; everything is escaped but figures."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("pf_core", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    # svg.py made the figures and escaped what came from outside.
    environment.filters |= {"figure": Markup, **filters}
    return environment.get_template(name)


def write(path: Path, page: Page) -> None:
    """Write the page as one file, whole or not at all."""
    html = template("page.html.jinja", cell=cell).render(page=page, rows_open=ROWS_OPEN)
    write_atomic(path, html.encode(errors="xmlcharrefreplace"))


def cell(value: float | int) -> str:
    """Whole numbers that count something as they are, others to three digits."""
    return f"{value:,}" if isinstance(value, int) else number(float(value)).replace("-", "−")
