"""What the documentation says: the example files, the commands of docs/howto.md, the messages of docs/data.md."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import anndata
import pytest

from pf_core.config import Config

ROOT = Path(__file__).resolve().parents[1]
PF = [sys.executable, "-m", "pf_core"]
FAILS = {"pf train screen.h5ad --out broken": 3}  # commands whose point is to fail
FAST = "--set stage_vae.max_steps=8 --set stage_operator.max_steps=4 --set vae.n_hidden=16 --set vae.n_latent=4"
FAST += " --set stage_cvae.max_steps=8 --set stage_flow.max_steps=4"


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command.replace("EXAMPLES", str(ROOT / "examples")))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run([*PF, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE)


def test_the_default_settings_file_says_what_the_defaults_are():
    written = tomllib.loads((ROOT / "examples/default.toml").read_text())
    assert written == tomllib.loads(Config().to_toml()), "write the changed setting into examples/default.toml"


def test_the_small_settings_file_is_read():
    assert Config.from_toml(ROOT / "examples/small.toml").stage_vae.max_steps < Config().stage_vae.max_steps


@pytest.mark.slow
def test_the_messages_of_the_data_page_are_those_of_the_program(tmp_path):
    run("pf simulate cells.h5ad --genes 20", tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/something").touch()
    commands = (
        "pf train cell.h5ad",
        "pf train cells.h5ad --out new --perturbation-column drug",
        "pf train cells.h5ad --out new --set vae.n_laten=3",
        "pf train cells.h5ad --out new --holdout celltype=x",
        "pf train cells.h5ad --out run",
    )
    [page] = [block for block in blocks("data.md", "") if block.startswith("pf: ")]
    for command, wanted in zip(commands, page.splitlines(), strict=True):
        done = run(command, tmp_path)
        assert (done.returncode, done.stderr.strip()) == (2, wanted)


@pytest.mark.slow
def test_cells_are_chosen_by_values_as_the_data_layer_reads_them(tmp_path):
    assert run("pf simulate screen.h5ad --genes 30", tmp_path).returncode == 0
    cells = anndata.read_h5ad(tmp_path / "screen.h5ad")
    cells.obs["plate"] = cells.obs["batch"].map({"batch1": 1.0, "batch2": 2.0}).astype(float)
    cells.write_h5ad(tmp_path / "plates.h5ad")
    assert run(quick("pf train plates.h5ad --out run --backend torch"), tmp_path).returncode == 0
    predict = "pf predict run plates.h5ad --backend torch --perturbation TF1"
    assert run(f"{predict} --cells plate=1 --out one.h5ad", tmp_path).returncode == 0
    assert set(anndata.read_h5ad(tmp_path / "one.h5ad").obs["plate"]) == {1.0}
    done = run(f"{predict} --cells tissue=tisue1 --out two.h5ad", tmp_path)
    assert (done.returncode, done.stderr) == (2, "pf: no cell has tissue=tisue1; did you mean 'tissue1'?\n")


def quick(command: str) -> str:
    """The command with few steps where it trains."""
    trains = command.startswith("pf train") and "--resume" not in command
    return f"{command} {FAST}" if trains else command


@pytest.mark.slow
def test_the_howto_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/howto.md").read_text()
    n_commands = 0
    for language, text in re.findall(r"^```(bash|python)\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        if language == "python":
            if "Model.train" not in text:  # its steps cannot be made fewer from here
                exec(compile(text, "docs/howto.md", "exec"), {})
            continue
        for command in filter(None, text.replace("\\\n", " ").splitlines()):
            done = run(quick(command), tmp_path)
            expected = next((code for start, code in FAILS.items() if command.startswith(start)), 0)
            assert done.returncode == expected, f"{command}\n{done.stderr}"
            n_commands += 1
    assert n_commands > 15
    assert set(anndata.read_h5ad("both.h5ad").obs["counterfactual"]) == {"TF5", "TF6"}


@pytest.mark.slow
@pytest.mark.parametrize("page", ["response.md", "mloy.md", "flow.md"])
def test_the_commands_on_simulated_cells_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / page).read_text()
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if " cells.h5ad" in block or "held_out_donor" in block:
            continue  # cells of the reader
        if language == "python":
            exec(compile(block, page, "exec"), {})
            continue
        for command in filter(None, block.replace("\\\n", " ").splitlines()):
            done = run(quick(command), tmp_path)
            assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.slow
def test_the_example_script_finds_the_change_of_a_held_out_pair(tmp_path):
    path = ROOT / "examples/operator_system.py"
    spec = importlib.util.spec_from_file_location("operator_system", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.main(tmp_path, "torch") > 0.8
    assert (tmp_path / "predicted.h5ad").exists()
    assert (tmp_path / "run/report.html").exists()
