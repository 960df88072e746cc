"""The certificate says what ran and what did not; a device that is asked for and missing is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parity_tests import certificate, compare, doctor
from parity_tests.sides import Side


def test_a_partial_certificate_says_that_it_is_partial(tmp_path: Path) -> None:
    assert certificate.run(("cpu",), ("float64", "float32"), tmp_path, only="gaussian_kl") == 0
    record = json.loads((tmp_path / "certificate.json").read_text())
    assert record["partial"] == "gaussian_kl"
    assert record["run"] == ["jax-cpu with torch-cpu"]
    assert {"jax-gpu with torch-gpu", "dtype tf32"} <= set(record["not run"])
    assert {(row["quantity"], row["leaf"]) for row in record["results"]} >= {("gradient", "logvar"), ("hvp", "mu")}
    assert "Partial" in (tmp_path / "certificate.md").read_text()
    page = (tmp_path / "certificate.html").read_text()
    assert "<svg" in page
    assert "http" not in page


def test_precision_of_accelerators_is_refused_on_processors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert certificate.run(("cpu",), ("float32", "tf32"), tmp_path) == 2
    assert "tf32 and bf16 are of accelerators" in capsys.readouterr().out


def test_a_failure_is_in_the_certificate_and_in_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "judge", lambda errors, tier, c: compare.JAX_WRONG)
    assert certificate.run(("cpu",), ("float64",), tmp_path, only="gaussian_kl") == 1
    assert "FAILED" in (tmp_path / "certificate.md").read_text()


def test_a_run_that_is_cut_off_among_the_mutants_leaves_the_certificate_of_its_cases(tmp_path, monkeypatch) -> None:
    def cut_off(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(certificate.mutants, "run", cut_off)
    with pytest.raises(KeyboardInterrupt):
        certificate.run(("cpu",), ("float64",), tmp_path, True, only="gaussian_kl")
    record = json.loads((tmp_path / "certificate.json").read_text())
    assert record["passed"]
    assert "mutants" not in record


@pytest.mark.parametrize("all_checks", [False, True])
@pytest.mark.parametrize("noticed_by", [["a check"], []])
def test_a_fault_that_no_check_notices_fails_the_certificate(tmp_path, monkeypatch, all_checks, noticed_by) -> None:
    """Which checks are indispensable is known only where all were run, not up to the first that notices."""
    verdict = certificate.mutants.Verdict("a fault", "jax", "vae", noticed_by, tried=1)
    monkeypatch.setattr(certificate.mutants, "run", lambda **_: [verdict])
    arguments = (("cpu",), ("float64",), tmp_path, True)
    assert certificate.run(*arguments, only="gaussian_kl", all_checks=all_checks) == (0 if noticed_by else 1)
    record = json.loads((tmp_path / "certificate.json").read_text())
    assert record["mutants"]["survived"] == ([] if noticed_by else ["a fault"])
    assert record["mutants"].get("indispensable") == (
        {name: ["a fault"] for name in noticed_by} if all_checks else None
    )


def test_no_case_at_all_is_a_failure(tmp_path: Path) -> None:
    assert certificate.run(("cpu",), ("float64",), tmp_path, only="no such case") == 1


@pytest.mark.parametrize(("devices", "dtypes"), [(("abacus",), ("float64",)), (("cpu",), ("float16",)), ((), ())])
def test_unknown_devices_and_dtypes_are_errors(devices: tuple, dtypes: tuple, tmp_path: Path) -> None:
    assert certificate.run(devices, dtypes, tmp_path) == 2


def test_a_device_that_is_asked_for_and_missing_is_an_error(tmp_path: Path) -> None:
    here = certificate.present()
    missing = [name for name in ("gpu", "tpu") if name not in here["jax"]]
    if not missing:
        pytest.skip("this machine has every device")
    assert certificate.run(("cpu", missing[0]), ("float64",), tmp_path) == 2
    assert not (tmp_path / "certificate.json").exists()


def test_doctor_measures_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run() == 0
    text = capsys.readouterr().out
    assert "leaky_relu" in text
    rows = doctor.examine().conventions
    assert len(rows) >= 20
    assert not [row for row in rows if any("raises" in found and "Index" not in found for found in row.found)]


def test_sides_are_cpu_without_a_word_about_others() -> None:
    assert Side("jax").name == "jax-cpu"
