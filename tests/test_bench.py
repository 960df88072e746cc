"""pf bench: taking turns, refusing what disagrees, the guard on ratios, and a quick run of every suite.

No test looks at how long anything took: clocks and loads are made up, or the numbers are only read back.
"""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from pf_bench import check, machine, run, worker
from pf_bench.agree import compare, difference
from pf_bench.case import SUITES, Absent, Case, Context, Side, Target
from pf_bench.result import judged, markdown, ratios
from pf_bench.timing import RETRIES, take_turns
from pf_core import cli
from pf_core.errors import ConfigError
from pf_core.simulate import simulate


class Clock:
    """Seconds that pass only when a side works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def side(self, log: list, name: str, seconds: float) -> Side:
        def call() -> None:
            log.append(name)
            self.now += seconds

        return Side(call, lambda: {"value": np.ones(3)})


class Watch:
    """A load that says, turn by turn, what others used."""

    def __init__(self, shares):
        self.shares = shares

    def others(self):
        return next(self.shares, 0.0)


class Calm(machine.Patience):
    """Patience that counts how often it was asked."""

    def __init__(self, ends: bool = True):
        super().__init__(0.0)
        self.asked, self.ends = 0, ends

    def wait(self) -> bool:
        self.asked += 1
        return self.ends


def turns(sides, *, shares=(), rounds=3, sample=0.0, patience=None, clock=None):
    shares = iter(shares)
    return take_turns(
        sides,
        rounds=rounds,
        sample=sample,
        patience=patience or Calm(),
        first=dict.fromkeys(sides, 1.0),
        clock=clock,
        load=lambda: Watch(shares),
    )


def test_sides_take_turns_in_rotated_order():
    clock, log = Clock(), []
    sides = {name: clock.side(log, name, 0.5) for name in "abc"}
    turns(sides, clock=clock)
    assert "".join(log[3:]) == "abc" + "bca" + "cab", "after one warming call each"


def test_short_calls_are_repeated_within_a_turn_and_times_are_per_step():
    clock, log = Clock(), []
    sides = {"a": clock.side(log, "a", 0.01)}
    sides["a"] = Side(sides["a"].call, sides["a"].output, steps=5)
    found = turns(sides, clock=clock, sample=0.2)["a"]
    assert len(log) == 1 + 3 * 20
    np.testing.assert_allclose(found.samples, 0.01 / 5)


def test_a_disturbed_turn_is_done_again():
    clock, log, patience = Clock(), [], Calm()
    found = turns({"a": clock.side(log, "a", 1.0)}, shares=[0.5, 0.0], clock=clock, patience=patience)["a"]
    assert (found.repeated, found.disturbed, len(found.samples), patience.asked) == (1, 0, 3, 1)
    assert len(log) == 1 + 4


def test_a_turn_that_stays_disturbed_counts_and_says_so():
    clock, log = Clock(), []
    found = turns({"a": clock.side(log, "a", 1.0)}, shares=[0.5] * (RETRIES + 1), clock=clock)["a"]
    assert (found.repeated, found.disturbed, len(found.samples)) == (RETRIES, 1, 3)


def test_a_machine_that_never_becomes_quiet_ends_the_repeats():
    clock, log = Clock(), []
    found = turns({"a": clock.side(log, "a", 1.0)}, shares=[0.5], clock=clock, patience=Calm(ends=False))["a"]
    assert (found.repeated, found.disturbed) == (1, 1)


def test_calls_that_take_minutes_are_made_once_a_turn_and_never_to_warm_up():
    clock, log = Clock(), []
    sides = {name: clock.side(log, name, 90.0) for name in "ab"}
    found = take_turns(sides, rounds=2, sample=0.2, patience=Calm(), clock=clock, load=lambda: Watch(iter(())))
    assert "".join(log) == "ab" + "ba"
    assert found["a"].first == 90.0


def test_the_load_of_others_leaves_out_our_own(tmp_path):
    load = machine.Load()
    np.linalg.svd(np.random.default_rng(0).normal(size=(211, 211)))
    share = load.others()
    assert share is None or 0.0 <= share <= 1.0


def test_waiting_for_a_quiet_machine_has_a_limit(monkeypatch):
    monkeypatch.setattr(machine.Load, "others", lambda _: 0.9)
    patience = machine.Patience(0.1)
    assert not patience.wait()
    assert patience.left <= 0 < patience.waited


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="not run: /proc is not there")
def test_peak_memory_sees_a_temporary_array():
    def call():
        np.ones((40 << 20) // 8).sum()

    case = Case("temporary", {}, lambda: {"jax": Side(call, None)})
    found = worker.measure_memory(case, "jax", Context())
    if "reason" in found:
        pytest.skip(f"not run: {found['reason']}")
    assert 39 << 20 <= found["extra"] <= 60 << 20


# --- agreement ----------------------------------------------------------------------------------------------------


def sides_of(**values):
    return {name: Side(lambda: None, lambda value=value: {"value": np.array(value)}) for name, value in values.items()}


def test_difference_is_relative_to_the_norm_and_names_the_worst():
    off, where = difference({"a": np.array([3.0, 4.1]), "b": np.ones(2)}, {"a": np.array([3.0, 4.0]), "b": np.ones(2)})
    assert (off, where) == (pytest.approx(0.02), "a")


@pytest.mark.parametrize("found", [{"b": np.ones(2)}, {"a": np.ones(3)}, {"a": np.array([1.0, np.nan])}])
def test_other_names_other_shapes_and_nan_are_infinitely_different(found):
    assert difference(found, {"a": np.ones(2)})[0] == np.inf


def test_a_side_beyond_the_tolerance_is_refused():
    differences, refused = compare(sides_of(jax=[1.0, 2.0], torch=[1.0, 2.0], other=[1.0, 2.1]), 1e-3)
    assert set(refused) == {"other"}
    assert differences["torch"] == 0.0


def measured(sides, **options):
    case = Case("planted", {"n": 3}, lambda: sides, 1e-3, **options)
    return worker.measure(case, Context(rounds=3, sample=0.0, wait=0.0), machine.Patience(0.0))


def test_twins_that_disagree_are_not_timed():
    row = measured(sides_of(jax=[1.0], torch=[1.1], other=[1.0]))
    assert row["sides"] == {}
    assert "differs by 0.1" in row["refused"]["torch"]


def test_another_side_that_disagrees_is_left_out_and_the_rest_is_timed():
    row = measured(sides_of(jax=[1.0], torch=[1.0], other=[1.1]))
    assert set(row["sides"]) == {"jax", "torch"}
    assert "other" in row["refused"]


def test_a_result_that_is_not_finite_is_refused():
    assert "not finite" in measured(sides_of(jax=[np.nan], torch=[np.nan]))["refused"]["jax"]


def test_a_side_that_breaks_is_absent_with_its_reason_and_a_twin_that_breaks_is_an_error():
    def broken():
        raise TypeError("no such option\nmore")

    row = measured(sides_of(jax=[1.0], torch=[1.0]) | {"peer": Side(broken, None)})
    assert row["absent"]["peer"] == "failed: TypeError: no such option"
    with pytest.raises(TypeError):
        measured(sides_of(jax=[1.0]) | {"torch": Side(broken, None)})


def test_what_is_not_installed_is_said():
    row = measured(sides_of(jax=[1.0], torch=[1.0]) | {"peer": Absent("peer not installed")})
    assert row["absent"] == {"peer": "peer not installed"}


# --- targets and the guard ----------------------------------------------------------------------------------------


def side(median: float, ratio: float) -> dict:
    spread = {"min": ratio, "median": ratio, "max": ratio}
    times = dict.fromkeys(("first", "min", "median", "max"), median)
    return {**times, "rounds": 3, "disturbed": 0, "repeated": 0, "ratio": spread, "steps": 1}


def record(ratio: float, **changes) -> dict:
    row = {
        "device": "cpu", "malloc": "tuned", "suite": "steps", "case": "planted, n=3", "name": "planted",
        "sizes": {"n": 3}, "series": "",
        "tolerance": 1e-3, "flop": 0.0, "bytes": 0.0, "memory": False, "targets": [], "notes": {},
        "sides": {"jax": side(1e-3, 1.0), "torch": side(ratio * 1e-3, ratio), "jax GEMM": side(5e-4, 0.5)},
        "differences": {"torch": 1e-7}, "refused": {}, "absent": {}, "quiet": True,
    }  # fmt: skip
    return {"format": 1, "rows": [row | changes], "memory": {}}


def test_a_ratio_that_lost_thirty_percent_fails():
    verdict = check.compare(record(2.8), record(4.0))
    assert not verdict.passed
    assert "committed 4 (-30%)" in verdict.lost[0]


def test_a_ratio_that_lost_twenty_percent_passes():
    verdict = check.compare(record(3.2), record(4.0))
    assert verdict.passed
    assert verdict.compared == 1, "ceilings are no ratios to guard"


def test_the_guard_does_not_look_at_absolute_times():
    slow = record(4.0)
    for one in slow["rows"][0]["sides"].values():
        one.update({word: 100 * one[word] for word in ("min", "median", "max")})
    assert check.compare(slow, record(4.0)).passed


def test_a_side_that_is_refused_now_fails_the_guard():
    found = record(4.0)
    del found["rows"][0]["sides"]["torch"]
    found["rows"][0]["refused"] = {"torch": "differs"}
    found["rows"].append(record(4.0)["rows"][0] | {"case": "other, n=3"})
    committed = record(4.0)
    committed["rows"].append(committed["rows"][0] | {"case": "other, n=3"})
    assert check.compare(found, committed).missing == ("cpu/tuned/steps/planted, n=3: torch: differs",)


def test_a_peer_that_is_not_installed_now_does_not_fail_the_guard():
    committed = record(4.0)
    committed["rows"][0]["sides"]["geomloss"] = side(1e-2, 10.0)
    assert check.compare(record(4.0, absent={"geomloss": "geomloss not installed: ..."}), committed).passed


def test_records_without_a_common_ratio_are_bad_input():
    with pytest.raises(ConfigError, match="share no ratio"):
        check.compare(record(4.0, device="gpu"), record(4.0))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}'])
def test_what_is_no_record_is_bad_input(tmp_path, text):
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bench\.json"):
        check.read(path)


@pytest.mark.parametrize(
    ("target", "found", "verdict"),
    [
        (Target("faster", 4.0, "torch"), 4.0, "met"),
        (Target("faster", 4.1, "torch"), 4.0, "missed"),
        (Target("within", 1.9, "jax GEMM"), 2.0, "missed"),
        (Target("within", 2.1, "jax GEMM"), 2.0, "met"),
        (Target("seconds", 1.1e-3), 1000.0, "met"),
        (Target("seconds", 3.9e-3, "torch"), 4000.0, "missed"),
        (Target("seconds", 1.0, "jax, a call"), None, "not measured"),
        (Target("growth", 2.0, "steps/planted, n=3"), 1.0, "met"),
        (Target("growth", 2.0, "steps/planted, n=1"), None, "the smaller case was not measured"),
        (Target("memory", 40.0), 39.0, "met"),
        (Target("memory", 38.0), 39.0, "missed"),
        (Target("faster", 2.0, "peer"), None, "peer not installed"),
    ],
)
def test_targets_are_judged(target, found, verdict):
    given = record(4.0, targets=[vars(target)], absent={"peer": "peer not installed"})
    given["memory"] = {"cpu/steps/planted, n=3": {"jax": {"extra": 39 << 20}}}
    [judgement] = judged(given)
    assert (judgement["found"], judgement["verdict"]) == (found if found is None else pytest.approx(found), verdict)


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "cells.h5ad"
    simulate(3, n_genes=29, n_control=23, n_single=13, n_pair=11).write_h5ad(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_a_quick_run_writes_what_can_be_read_back(suite, cells, tmp_path):
    mallocs = ("tuned", "default") if suite == "ceilings" else ("default",)
    options = {"quick": True, "suites": (suite,), "mallocs": mallocs, "peers": False, "out": tmp_path / "out"}
    lines: list[str] = []
    code = run.bench(data=cells if suite == "training" else None, say=lines.append, **options)
    written = json.loads((tmp_path / "out/bench.json").read_text())
    assert (code, written["failed"], written["skipped"]) == (0, [], []), lines
    assert {row["malloc"] for row in written["rows"]} == set(mallocs)
    for row in written["rows"]:
        assert row["refused"] == {}
        assert set(row["sides"]) >= {"jax", "torch"}
        assert all(0 < one["min"] <= one["median"] <= one["max"] for one in row["sides"].values())
    page = (tmp_path / "out/bench.md").read_text()
    assert all(row["case"] in page for row in written["rows"])
    for path in (tmp_path / "out").glob("*.svg"):
        assert xml.parse(path).getroot().tag.endswith("svg")
        assert path.name in page
    assert check.compare(written, written).passed, "a record holds against itself"
    flagged = [row for row in written["rows"] if row["memory"]]
    assert len(written["memory"]) == len({row["case"] for row in flagged})


def test_the_plain_fit_takes_the_steps_of_the_twin(monkeypatch):
    import pf_torch.steps
    from pf_bench import plain_fit, problems
    from pf_bench.steps import _tables, torch_steps

    config = problems.configuration(9, 5, n_conditions=3, n_cells=7)
    params = problems.parameters(config, 11, 4)
    batch, noise, carry = problems.operator_problem(3, 7, 5, 11)
    cells, eps = problems.vae_problem(13, 11, 5)
    problem = batch | {f"cells_{name}": value for name, value in cells.items()}, noise | eps, carry
    assert _tables(problem[0], 1)(), "the fast side has a count table"
    fast = torch_steps("joint", params, problem, config, 1, "cpu").output()
    monkeypatch.setattr(pf_torch.steps, "energy_distance_grouped", plain_fit.energies)
    monkeypatch.setattr(pf_torch.steps, "elbo_loss", plain_fit.plain_elbo)
    plain = torch_steps("joint", params, problem, config, 1, "cpu").output()
    for name, value in fast.items():
        np.testing.assert_allclose(plain[name], value, rtol=2e-3, err_msg=name)
        assert not np.array_equal(plain[name], value), "another way of computing"


def test_trainings_without_data_are_skipped_with_a_reason(tmp_path, capsys):
    options = {"quick": True, "mallocs": ("default",), "out": tmp_path / "out"}
    assert run.bench(suites=("training",), **options) == 0
    [entry] = json.loads((tmp_path / "out/bench.json").read_text())["skipped"]
    assert "--data" in entry["reason"]
    assert "no data were given" in (tmp_path / "out/bench.md").read_text()


def test_a_suite_that_dies_is_a_failure_and_keeps_its_rows(tmp_path, monkeypatch):
    rows = record(4.0)["rows"]
    answers = iter([{"versions": {}, "devices": {}}, {"rows": rows, "crash": "the process ended with -9: killed"}])
    monkeypatch.setattr(run, "_child", lambda *_: next(answers))
    assert run.bench(suites=("steps",), mallocs=("tuned",), out=tmp_path / "out", say=lambda _: None) == 1
    written = json.loads((tmp_path / "out/bench.json").read_text())
    assert (len(written["rows"]), len(written["failed"])) == (1, 1)
    assert "killed" in (tmp_path / "out/bench.md").read_text()


def partial(monkeypatch, out, suite: str, ratio: float, *, mallocs=("tuned",), against=None, **probe) -> int:
    """A run of one suite whose process answers what is given."""
    row = {key: value for key, value in record(ratio)["rows"][0].items() if key not in ("device", "malloc", "suite")}
    answers = {"probe": {"versions": {}, "devices": {}} | probe, "suite": {"rows": [row], "waited": 1.0}}
    answers["memory"] = {"extra": 5, "held": 7}
    monkeypatch.setattr(run, "_child", lambda request, *_: answers[request["task"]])
    options = {"suites": (suite,), "mallocs": mallocs, "out": out, "against": against, "say": lambda _: None}
    return run.bench(command=f"pf bench --suite {suite}", **options)


def test_suites_measured_one_by_one_end_in_one_record(tmp_path, monkeypatch):
    partial(monkeypatch, tmp_path, "steps", 4.0, mallocs=("tuned", "default"))
    partial(monkeypatch, tmp_path, "spectral", 3.0)
    partial(monkeypatch, tmp_path, "steps", 5.0)
    written = json.loads((tmp_path / "bench.json").read_text())
    found = {(row["suite"], row["malloc"]): row["sides"]["torch"]["ratio"]["median"] for row in written["rows"]}
    assert found == {("spectral", "tuned"): 3.0, ("steps", "default"): 4.0, ("steps", "tuned"): 5.0}
    assert [row["suite"] for row in written["rows"]] == ["spectral", "steps", "steps"], "in their usual order"
    assert written["command"] == "pf bench --suite steps; pf bench --suite spectral"
    assert written["waited"] == 4.0
    assert "## Spectral" in (tmp_path / "bench.md").read_text()


def test_a_suite_of_other_versions_does_not_join_a_record(tmp_path, monkeypatch):
    partial(monkeypatch, tmp_path, "steps", 4.0)
    before = (tmp_path / "bench.json").read_text()
    with pytest.raises(ConfigError, match="other versions"):
        partial(monkeypatch, tmp_path, "spectral", 3.0, versions={"jax": "99"})
    assert (tmp_path / "bench.json").read_text() == before


def test_the_guard_on_one_suite_does_not_look_at_the_others(tmp_path, monkeypatch):
    partial(monkeypatch, tmp_path / "committed", "steps", 4.0)
    partial(monkeypatch, tmp_path / "committed", "spectral", 4.0)
    against = tmp_path / "committed/bench.json"
    partial(monkeypatch, tmp_path / "now", "spectral", 1.0)
    assert partial(monkeypatch, tmp_path / "now", "steps", 4.0, against=against) == 0
    assert partial(monkeypatch, tmp_path / "now", "spectral", 1.0, against=against) == 1


def test_the_allocator_is_set_before_the_process_starts():
    show = "import os; print(os.environ.get('MALLOC_MMAP_THRESHOLD_', ''))"
    for name, wanted in (("tuned", machine.LARGE), ("default", "")):
        environment = {**os.environ, **machine.MALLOC[name]}
        done = subprocess.run([sys.executable, "-c", show], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "distance"], "did you mean 'distances'"),
        (["--device", "gpuu"], "did you mean 'gpu'"),
        (["--malloc", "tund"], "did you mean 'tuned'"),
        (["--device", ","], "no device"),
        (["--data", "missing.h5ad"], "no file missing.h5ad"),
        (["--check"], "no committed results at"),
        (["--device", "gpu", "--quick"], "gpu"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, arguments, message):
    if arguments[:2] == ["--device", "gpu"] and Path("/dev/nvidia0").exists():
        pytest.skip("not run: there is a GPU")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pf", "bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error = capsys.readouterr().err.strip()
    assert ended.value.code == 2
    assert len(error.splitlines()) == 1
    assert message in error
    assert not list(tmp_path.iterdir())


def test_ratios_leave_out_the_twin_itself_and_the_ceilings():
    assert set(ratios(record(4.0))) == {"cpu/tuned/steps/planted, n=3: torch"}


def test_a_missed_target_stands_out_on_the_page():
    given = record(4.0, targets=[vars(Target("faster", 5.0, "torch"))]) | {
        "quick": False, "date": "", "command": "", "waited": 0.0, "machine": machine.describe(), "versions": {},
        "skipped": [], "failed": [],
    }  # fmt: skip
    given["targets"] = judged(given)
    assert "**missed**" in markdown(given)
