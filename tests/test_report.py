"""The run report: what it says, that it says it safely, and that the same run gives the same bytes."""

import io
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pf_core import history, plots, report, verdict
from pf_core.config import Config
from pf_core.errors import RunError
from pf_core.report import (
    Audit,
    Condition,
    DataSummary,
    Group,
    HeldOutCells,
    MetricRow,
    Operator,
    Record,
    Report,
    metrics_json,
    print_metrics,
    read_history,
    write_report,
)

NASTY = '</svg><script>alert(\'x\')</script>&"q" $a$ id="z" fill: #010203'
ROOT = Path(__file__).parents[1]
VOID = {"meta", "br", "img", "hr", "input", "link"}


def row(condition, method, energy, kind="baseline", **more):
    return MetricRow(condition, method, {"energy_pca_u": energy} | more, kind)


def judged(*energies, declined=()):
    """Rows of conditions C0, C1, ...: the model's value first, then those of the simple answers s0, s1, ..."""
    rows = []
    for i, values in enumerate(energies):
        condition = Condition(f"C{i}", n_cells=10 + i)
        rows.append(row(condition, "model", values[0], "model"))
        rows += [row(condition, f"s{j}", value) for j, value in enumerate(values[1:])]
        rows += [MetricRow(condition, method, declined="no other context") for method in declined]
    return rows


def payload(n_conditions=3, name="KO", stages=("vae", "operator")):
    rng = np.random.default_rng(5)
    conditions = [Condition(f"{name}{i}", "blood", "T cells", 20 + 7 * i) for i in range(n_conditions)]
    rows, cells, operators = [], [], []
    for i, condition in enumerate(conditions):
        rows.append(row(condition, "model", 0.5 + i, "model", pearson_delta=0.7, r2=0.9, mse=1e-4))
        rows.append(row(condition, "no change", 1.25, pearson_delta=math.nan, r2=0.8, mse=2e-4))
        rows.append(MetricRow(condition, "additive", declined=f"{name} is not a combination"))
        cells.append(HeldOutCells(condition, *(rng.standard_normal((n, 2)) + n / 9 for n in (31, 29, 23))))
        A = 0.95 * np.eye(5) + 0.1 * rng.standard_normal((5, 5))
        operators.append(Operator(condition, A, rng.standard_normal(5), rng.standard_normal(3), rng.standard_normal(3)))
    records = []
    for stage in stages:
        for step in range(20, 301, 20):
            evaluation = step % 100 == 0
            records.append(
                Record(
                    stage,
                    step,
                    loss=100.0 / step,
                    parts={"nll": 90.0 / step, "sigma_max": 1.01},
                    lr=1e-3,
                    grad_norm=2.0,
                    grad_norms={f"{stage}.weight": 1.0 / step, f"{stage}.bias": 0.0},
                    validation={"loss": 120.0 / step} if evaluation else {},
                    health={f"{stage}.weight": "ok", f"{stage}.bias": "zero"} if evaluation else {},
                )
            )
    groups = tuple(Group(condition, condition.n_cells, 31) for condition in conditions)
    data = DataSummary(f"{name}.h5ad", 300, 50, 31, 200, 20, 80, {"empty cells": 3}, {"layer": "counts"}, groups)
    return Report(
        title=f"run of {name}",
        config=Config(),
        metrics=tuple(rows),
        cells=tuple(cells),
        data=data,
        audit=Audit(n_seen=220, n_heldout=80, shared_names=0, shared_contents=0, trivial=2),
        history=tuple(records),
        operators=tuple(operators),
        versions={"perturb-forecast": "0.1.0"},
        facts={"backend": "jax"},
        notes=("Same output mode for every method.",),
    )


class Page(HTMLParser):
    """Elements, text and balance of a page."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def page():
    return Page(report.render(payload()))


# --- the verdict --------------------------------------------------------------------------------------------------
def test_verdict_is_yes_when_the_model_is_lowest_everywhere():
    found = verdict.judge(judged((0.9, 9.3, 2.4), (13.9, 26.0, 14.1)))
    assert found.outcome == "yes"
    assert found.sentence == "The model beats every simple answer in all 2 held-out conditions."


def test_verdict_names_the_conditions_that_are_lost_and_to_what():
    found = verdict.judge(judged((0.9, 9.3, 2.4), (5.0, 26.0, 4.0)))
    assert found.outcome == "mixed"
    assert "in 1 of 2 held-out conditions. It loses in C1 (to s1)." in found.sentence


def test_verdict_says_plainly_when_the_model_never_wins():
    found = verdict.judge(judged((3.0, 2.0), (5.0, 4.0)))
    assert found.outcome == "no"
    assert found.sentence == "The model does not beat the simple answers in any of the 2 held-out conditions."


def test_a_tie_is_not_a_win():
    assert verdict.judge(judged((1.0, 1.0))).outcome == "no"


def test_verdict_without_held_out_conditions_claims_nothing():
    found = verdict.judge([])
    assert found.outcome == "unknown"
    assert found.sentence.startswith("No condition was held out")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_without_a_finite_value_is_not_judged_and_is_counted(value):
    found = verdict.judge(judged((value, 1.0), (0.5, 1.0)))
    assert [one.outcome for one in found.conditions] == ["unknown", "better"]
    assert found.sentence.endswith("1 of 2 conditions could not be judged.")


def test_a_declined_baseline_is_not_compared():
    found = verdict.judge(judged((0.5, 1.0), declined=("additive",)))
    assert found.outcome == "yes"
    assert [one.baseline for one in found.against] == ["s0"]


def test_a_reference_is_neither_beaten_nor_best():
    condition = Condition("C")
    rows = [*judged((0.5, 1.0)), row(condition, "half of the real cells", 0.01, "reference")]
    assert verdict.judge(rows).outcome == "yes"
    assert verdict.best(rows, verdict.METRICS[0]) == {"model"}


def test_means_against_a_baseline_are_over_the_conditions_both_have():
    found = verdict.judge(judged((1.0, 2.0, 4.0), (3.0, 8.0, math.nan)))
    assert [(one.wins, one.n_conditions, one.model_mean, one.baseline_mean) for one in found.against] == [
        (2, 2, 2.0, 5.0),
        (1, 1, 1.0, 4.0),
    ]


def test_best_takes_the_largest_where_more_is_better():
    condition = Condition("C")
    rows = [row(condition, "a", 1.0, r2=0.1), row(condition, "b", 2.0, r2=0.7), row(condition, "c", 3.0, r2=math.nan)]
    r2 = next(metric for metric in verdict.METRICS if metric.key == "r2")
    assert verdict.best(rows, r2) == {"b"}


def test_two_rows_of_one_method_are_refused():
    with pytest.raises(ValueError, match="two rows of the method s0"):
        verdict.judge([*judged((1.0, 2.0)), row(Condition("C0"), "s0", 3.0)])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.9, "0.900"), (13.94, "13.9"), (99.96, "100"), (1234.5, "1,234"), (0.0, "0"), (-0.0131, "-0.0131"),
        (2.46e-5, "2.5e-05"), (123456.0, "1.2e+05"), (math.nan, "n/a"), (None, "n/a"), (-math.inf, "-inf"),
    ],
)  # fmt: skip
def test_numbers_have_three_significant_digits(value, text):
    assert verdict.number(value) == text


# --- metrics.json and the screen ----------------------------------------------------------------------------------
def test_metrics_json_is_strict_json_with_null_for_what_is_not_finite():
    rows = judged((math.nan, 1.0), (0.5, math.inf), declined=("additive",))
    found = json.loads(json.dumps(metrics_json(rows), allow_nan=False))
    assert [one["energy_pca_u"] for one in found["metrics"] if not one["declined"]] == [None, 1.0, 0.5, None]
    assert [one["declined"] for one in found["metrics"] if one["method"] == "additive"] == ["no other context"] * 2
    assert found["verdict"]["sentence"] == verdict.judge(rows).sentence


def test_metrics_json_keeps_full_precision_and_the_context():
    condition = Condition("A+B", "blood", "T cells", 7)
    found = metrics_json([row(condition, "model", 1 / 3, "model")])["metrics"][0]
    assert found == {
        "condition": "A+B in T cells, blood",
        "label": "A+B",
        "tissue": "blood",
        "cell_type": "T cells",
        "cells": 7,
        "method": "model",
        "kind": "model",
        "declined": None,
        "energy_pca_u": 1 / 3,
    }


def printed(rows, width=100):
    stream = io.StringIO()
    print_metrics(Console(file=stream, width=width), rows)
    return stream.getvalue()


def test_screen_and_report_show_the_same_numbers():
    rows = judged((0.876543, 9.3, 2.4), (5.0, 26.0, 1 / 3))
    screen = printed(rows)
    shown = Page(report.render(Report("t", Config(), tuple(rows)))).words
    for one in rows:
        text = verdict.number(one.values["energy_pca_u"])
        assert text in screen
        assert text in shown
    assert verdict.judge(rows).sentence in " ".join(screen.split())
    assert verdict.judge(rows).sentence in shown


def test_screen_marks_the_best_and_gives_the_reason_of_a_declined_baseline():
    text = printed(judged((0.5, 1.0), declined=("additive",)))
    assert "0.500*" in text
    assert "additive: declined, no other context" in " ".join(text.split())


def test_screen_takes_names_literally_and_fits_80_columns():
    rows = [
        row(Condition("[bold]KO[/bold]"), "[red]m", 1.0, "model", **dict.fromkeys(("r2", "mse", "pearson_delta"), 0.5))
    ]
    text = printed(rows, width=80)
    assert "[bold]KO[/bold]" in text
    assert "[red]m" in text
    assert max(map(len, text.splitlines())) <= 80


def test_screen_of_many_conditions_shows_the_largest_and_says_so():
    text = printed(judged(*[(1.0, 2.0)] * 31))
    assert "The 12 largest of 31 conditions are shown" in text
    assert "C30" in text
    assert "C5\n" not in text


# --- history ------------------------------------------------------------------------------------------------------
def written(tmp_path, *lines, end="\n"):
    path = tmp_path / "history.jsonl"
    path.write_text("\n".join(lines) + end)
    return path


def test_history_reads_every_field_and_null_as_not_finite(tmp_path):
    line = {
        "stage": "vae", "step": 7, "loss": None, "parts": {"nll": 2.0}, "lr": 1e-3, "grad_norm": 3.0,
        "grad_norms": {"w": None}, "bad_steps": 2, "validation": {"loss": 4.0}, "health": {"w": "ok"},
        "event": "returned",
    }  # fmt: skip
    (record,) = read_history(written(tmp_path, json.dumps(line)))
    assert math.isnan(record.loss)
    assert math.isnan(record.grad_norms["w"])
    assert (record.stage, record.step, record.bad_steps, record.event) == ("vae", 7, 2, "returned")
    assert (record.parts, record.validation, record.health) == ({"nll": 2.0}, {"loss": 4.0}, {"w": "ok"})


def test_history_leaves_out_a_last_line_that_was_cut_off(tmp_path):
    path = written(tmp_path, '{"stage": "vae", "step": 1}', '{"stage": "vae", "st', end="")
    assert [record.step for record in read_history(path)] == [1]


@pytest.mark.parametrize(
    "line", ['{"stage": "vae", "st', '{"step": 1}', "[1]", '{"stage": "vae", "step": 1, "typo": 2}']
)
def test_history_names_a_line_that_is_no_record(tmp_path, line):
    with pytest.raises(RunError, match="line 1"):
        read_history(written(tmp_path, line, '{"stage": "vae", "step": 2}'))


def test_history_of_an_empty_file_is_empty(tmp_path):
    assert read_history(written(tmp_path, end="")) == ()


def test_after_a_return_the_newer_record_counts_and_the_event_keeps_its_numbers():
    records = [
        Record("vae", 100, loss=3.0),
        Record("vae", 120, loss=2.0),
        Record("vae", 100, event="returned to step 100", bad_steps=3),
        Record("vae", 120, loss=1.0, bad_steps=3),
    ]
    assert [(record.step, record.loss) for record in history.by_stage(records)["vae"]] == [(100, 3.0), (120, 1.0)]
    assert history.bad_steps(records) == {"vae": [(100, 3)]}


def test_bad_steps_are_counted_anew_in_every_stage():
    records = [Record("vae", 20, bad_steps=2), Record("vae", 40, bad_steps=2), Record("operator", 20, bad_steps=3)]
    assert history.bad_steps(records) == {"vae": [(20, 2)], "operator": [(20, 3)]}


# --- figures ------------------------------------------------------------------------------------------------------
def test_a_long_curve_is_reduced_to_means_with_their_range():
    steps, values = np.arange(1000.0), np.tile([1.0, 3.0], 500)
    values[:10] = math.nan
    x, mean, low, high = plots.binned(steps, values, bins=100)
    assert len(x) == 100
    assert np.isnan(mean[0])
    np.testing.assert_allclose([mean[1:], low[1:], high[1:]], np.repeat([[2.0], [1.0], [3.0]], 99, axis=1))


@pytest.mark.parametrize(
    ("value", "text"), [(7.5e-4, "7.5e-4"), (1e-3, "0.001"), (0.0, "0"), (2e6, "2e6"), (-0.25, "-0.25")]
)
def test_tick_labels_are_not_rounded_to_another_value(value, text):
    assert plots.tick(value) == text


def test_shared_limits_ignore_a_stray_cell_and_cells_that_are_not_finite():
    points = np.random.default_rng(3).standard_normal((1000, 2))
    points[0] = 1e6
    points[1] = math.nan
    (x0, x1), (y0, y1) = plots.shared_limits([points])
    assert -6 < x0 < -1 < 1 < x1 < 6
    assert -6 < y0 < -1 < 1 < y1 < 6


def test_a_figure_does_not_depend_on_the_users_matplotlib_settings():
    import matplotlib

    def draw():
        return plots.curve("loss", (np.arange(5.0), np.arange(5.0)))

    plain = draw()
    with matplotlib.rc_context({"font.size": 31, "axes.grid": True, "text.usetex": False, "axes.facecolor": "red"}):
        assert draw() == plain
        assert matplotlib.rcParams["font.size"] == 31


# --- the page -----------------------------------------------------------------------------------------------------
def test_page_is_self_contained_and_runs_nothing(page):
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attrs in page.elements:
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href", "srcset", "data"):
                assert value.startswith(("#", "data:image/png;base64,"))
            elif not name.startswith("xmlns"):
                assert "://" not in (value or "")


def test_every_reference_of_the_page_resolves_to_one_element(page):
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    used = [
        m for _, attrs in page.elements for v in attrs.values() for m in re.findall(r"^#(.+)|url\(#(.+?)\)", v or "")
    ]
    assert used
    assert {a or b for a, b in used} <= set(ids)
    doubled = {one for one in ids if ids.count(one) > 1}
    # Two figures of the same content may share their definitions, and nothing else.
    assert all(re.match(r"f[0-9a-f]{8}", one) for one in doubled)


def test_every_figure_has_an_accessible_name_and_every_table_a_caption(page):
    assert len(page.all("svg")) > 15
    assert all(attrs["role"] == "img" and attrs["aria-label"].strip() for attrs in page.all("svg"))
    assert len(page.all("caption")) == len(page.all("table")) > 5
    assert page.all("html")[0]["lang"] == "en"


def test_page_opens_with_the_verdict_and_holds_every_section(page):
    words = page.words
    assert words.index("The model beats every simple answer in 1 of 3") < words.index("All metrics")
    texts = ("declined: KO is not a combination", "no leak found", "Stage 1, latent model", "Stage 2, operators",
             "Response profiles", "Spectra", "vae.weight", "zero 3× (first at step 100)", "kl_warmup = 400",
             "0.1.0")  # fmt: skip
    assert [text for text in texts if text not in words] == []


def test_the_best_value_is_marked_by_more_than_colour():
    text = report.render(payload(1))
    assert re.search(r'<td class="n best" title="best">0\.500</td>', text)
    assert r'content: "\2009★"' in text


def test_text_from_outside_is_escaped_everywhere():
    found = payload(2, name=NASTY)
    found = Report(
        **{name: getattr(found, name) for name in Report.__dataclass_fields__}
        | {
            "history": (
                Record(NASTY, 1, 1.0, {NASTY: 1.0}, grad_norms={NASTY: 1.0}, health={NASTY: NASTY}, event=NASTY),
            ),
            "versions": {NASTY: NASTY},
            "facts": {NASTY: NASTY},
            "notes": (NASTY,),
            "audit": Audit(1, 1, 1, 1, examples=(NASTY,)),
        }
    )
    page = Page(report.render(found))
    assert not page.all("script")
    assert "z" not in {attrs.get("id") for _, attrs in page.elements}
    assert NASTY in page.words


def test_a_leak_is_called_a_leak():
    text = Page(report.render(Report("t", Config(), audit=Audit(10, 5, shared_names=0, shared_contents=2)))).words
    assert "✗ leak" in text
    assert "2 their counts" in text


def test_the_audit_reads_what_the_leak_audit_returns():
    found = {"seen": 10, "heldout": 5, "shared_names": 0, "shared_contents": 1, "trivial": 3, "shared_trivial": 2}
    audit = Audit.of(found | {"examples": ["c7"], "clean": False})
    assert audit == Audit(10, 5, 0, 1, 3, 2, ("c7",))
    assert not audit.clean


def test_an_empty_run_gives_a_report_that_claims_nothing():
    words = Page(report.render(Report("t", Config()))).words
    for text in ("No condition was held out", "No leak audit was recorded", "No training history was recorded"):
        assert text in words


def test_a_hundred_conditions_are_capped_with_the_count_stated():
    found = payload(101, stages=())
    page = Page(report.render(found))
    words = page.words
    assert "The 12 conditions with the most cells of 101 are shown" in words
    assert "12 of 101 conditions" in words
    assert "The 60 strongest of 101 conditions" in words
    assert all(one.condition.name in words for one in found.metrics)
    assert len(page.all("svg")) == 1 + 12 + 1 + 13


def test_values_that_are_not_finite_are_shown_as_such():
    condition = Condition("KO", n_cells=1)
    nothing = np.full((4, 2), np.nan)
    found = Report(
        "t",
        Config(),
        metrics=(row(condition, "model", math.nan, "model"), row(condition, "no change", math.inf)),
        cells=(HeldOutCells(condition, np.zeros((3, 2)), np.ones((1, 2)), nothing),),
        history=(Record("operator", 20, grad_norms={"w": math.inf}, health={"w": "non-finite"}, bad_steps=1),),
        operators=(Operator(condition, np.full((2, 2), np.nan), np.zeros(2), np.full(3, np.nan), np.zeros(3)),),
    )
    words = Page(report.render(found)).words
    assert "No held-out condition could be judged" in words
    assert "n/a" in words
    assert "✗ non-finite" in words
    assert "1 step was not applied" in words


def test_a_model_that_declined_has_a_panel_without_cells():
    condition = Condition("KO", n_cells=5)
    found = Report("t", Config(), cells=(HeldOutCells(condition, np.eye(2), np.eye(2), None),))
    assert "predicted, 0 cells" in Page(report.render(found)).words


def test_operator_norms_are_those_of_the_matrix():
    A = np.array([[0.0, 2.0], [0.5, 0.0]])  # singular values 2 and 1/2, eigenvalues +1 and -1
    measured = report._measures(Operator(Condition("KO"), A, np.array([3.0, 4.0]), np.ones(1), np.ones(1)))
    assert measured["norm"] == pytest.approx(2.0)
    assert measured["radius"] == pytest.approx(1.0)
    assert measured["shift"] == pytest.approx(5.0)
    assert measured["distance"] == pytest.approx(math.sqrt(1 + 4 + 0.25 + 1))


MAKE = """
import sys
sys.path[:0] = [{tests!r}]
import test_report
test_report.write_report({out!r}, test_report.payload())
"""


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        code = MAKE.format(tests=str(ROOT / "tests"), out=str(tmp_path / f"{name}.html"))
        settings = {"PYTHONHASHSEED": {"a": "1", "b": "2"}[name], "TZ": {"a": "UTC", "b": "Asia/Tokyo"}[name]}
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, **settings})
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_a_file_name_that_is_not_utf8_does_not_cost_the_report(tmp_path):
    data = DataSummary("cells\udcff.h5ad", 1, 1, 0, 1, 0, 0)
    write_report(tmp_path / "r.html", Report("t", Config(), data=data))
    assert "cells" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_importing_the_report_loads_no_framework_and_no_plotting():
    code = "import sys, pf_core.report; print({'jax', 'torch', 'matplotlib', 'jinja2', 'rich'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.strip() == "set()"
