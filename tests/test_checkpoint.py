"""Run directories: whole or absent, checked on load, never written over."""

import contextlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from pf_core.checkpoint import Checkpoint, Run, RunError, load_arrays, save_arrays, write_atomic


def make_checkpoint(step: int) -> Checkpoint:
    rng = np.random.default_rng(step)
    arrays = {
        "params/vae.decoder.log_r": rng.standard_normal(7).astype(np.float32),
        "m/vae.decoder.log_r": rng.standard_normal(7),
        "carry/v": rng.standard_normal((2, 3)),
    }
    return Checkpoint("vae", step, arrays, {"count": step, "best_value": 0.1 + 0.2, "history_length": 5})


def new_run(tmp_path) -> Run:
    return Run.create(tmp_path / "run", {"config.toml": "seed = 1\n", "split.safetensors": {"train": np.arange(3)}})


def test_a_checkpoint_is_read_back_bit_for_bit(tmp_path):
    run = new_run(tmp_path)
    written = make_checkpoint(3)
    run.save_checkpoint(written, best=True)
    read = Run.open(run.path).last()
    assert read is not None
    assert (read.stage, read.step, read.position) == ("vae", 3, written.position)
    for name, array in written.arrays.items():
        assert read.arrays[name].dtype == array.dtype
        assert read.arrays[name].tobytes() == array.tobytes()


def test_only_the_last_and_the_best_checkpoints_are_kept(tmp_path):
    run = new_run(tmp_path)
    for step in range(5):
        run.save_checkpoint(make_checkpoint(step), best=step == 2)
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == [
        "vae-00000002.safetensors",
        "vae-00000004.safetensors",
    ]
    best, last = run.best("vae"), run.last()
    assert best is not None
    assert last is not None
    assert (best.step, last.step) == (2, 4)


def test_a_directory_that_holds_something_is_refused_and_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="nothing was written"):
        new_run(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "thesis.txt"]


@pytest.mark.parametrize("name", ["checkpoints/vae-00000003.safetensors", "config.toml", "split.safetensors"])
def test_a_flipped_bit_in_any_file_is_noticed(tmp_path, name):
    run = new_run(tmp_path)
    run.save_checkpoint(make_checkpoint(3), best=True)
    path = run.path / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    reopened = Run.open(run.path)
    with pytest.raises(RunError, match="does not match its checksum"):
        reopened.last() if name.startswith("checkpoints") else reopened.read_text(name)


def test_a_changed_manifest_is_noticed(tmp_path):
    run = new_run(tmp_path)
    path = run.path / "manifest.json"
    table = json.loads(path.read_text())
    table["manifest"]["files"]["config.toml"] = "0" * 64
    path.write_text(json.dumps(table))
    with pytest.raises(RunError, match="damaged"):
        Run.open(run.path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"manifest": 3, "sha256": 4}', "\x00\xff"])
def test_a_manifest_that_is_no_manifest_is_named(tmp_path, content):
    run = new_run(tmp_path)
    (run.path / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(RunError, match="damaged"):
        Run.open(run.path)


def test_opening_something_else_says_what_is_missing(tmp_path):
    with pytest.raises(RunError, match=r"not a run directory.*--out"):
        Run.open(tmp_path)


def test_history_is_cut_back_to_what_the_checkpoint_knew(tmp_path):
    run = new_run(tmp_path)
    length = run.append_history({"step": 1})
    run.append_history({"step": 2})
    run.truncate_history(length)
    assert (run.path / "history.jsonl").read_text() == '{"step": 1}\n'
    run.truncate_history(0)
    assert run.history_length() == 0


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"


def test_a_process_killed_while_saving_leaves_a_readable_run(tmp_path):
    """SIGKILL at any point of save_checkpoint: the manifest names files that exist and match."""
    run = new_run(tmp_path)
    run.save_checkpoint(make_checkpoint(0), best=True)
    script = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from test_checkpoint import make_checkpoint\n"
        "from pf_core.checkpoint import Run\n"
        f"run = Run.open({str(run.path)!r}); print('ready', flush=True)\n"
        "for step in range(1, 100000): run.save_checkpoint(make_checkpoint(step), best=step % 3 == 0)\n"
    )
    for delay in (0.0, 0.011, 0.023):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        process.kill()
        process.wait()
        reopened = Run.open(run.path)
        assert reopened.last() is not None
        assert reopened.best("vae") is not None


def test_no_pickle_is_ever_read(tmp_path):
    path = tmp_path / "state.safetensors"
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(RunError, match="not a readable safetensors file"):
        load_arrays(path)


def test_arrays_keep_dtype_and_shape(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.int32).reshape(2, 3), "b": np.array(1.5), "c": np.zeros((0, 4), np.float32)}
    digest = save_arrays(tmp_path / "x.safetensors", arrays)
    for name, array in load_arrays(tmp_path / "x.safetensors", digest).items():
        np.testing.assert_array_equal(array, arrays[name], strict=True)
