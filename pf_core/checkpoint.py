"""Run directories: atomic writes, a SHA-256 manifest, checkpoints that either twin reads.

The manifest is the commit point. Every other file is written first, under a name of its own; then manifest.json is
replaced in one rename. A process that is killed at any moment leaves either the old state or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pf_core.errors import RunError

FORMAT = 4  # 1: another calibration, flow.pace a word; 2: one member, not said; 3: no change of the library
MANIFEST = "manifest.json"


def write_atomic(path: Path, content: bytes | str) -> str:
    """Write a file so that it is either whole or absent, and return its SHA-256."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return hashlib.sha256(data).hexdigest()


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> str:
    """Write arrays as safetensors, atomically, and return the SHA-256."""
    from safetensors.numpy import save

    return write_atomic(path, save({name: np.asarray(array, order="C") for name, array in sorted(arrays.items())}))


def load_arrays(path: Path, sha256: str | None = None) -> dict[str, np.ndarray]:
    """Read safetensors after its checksum has been verified.

    Raises:
        RunError: the file is missing, or its content is not what was written.
    """
    from safetensors.numpy import load

    try:
        return load(_verified(path, sha256))
    except RunError:
        raise
    except Exception as error:
        raise RunError(f"{path} is not a readable safetensors file ({error}); restore it from a copy") from None


def _verified(path: Path, sha256: str | None) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RunError(f"{path} is missing; the run directory is incomplete, restore it from a copy") from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise RunError(f"{path} does not match its checksum: it was changed or damaged; restore it from a copy")
    return data


@dataclass
class Checkpoint:
    """A training state on disk: arrays in canonical form, and the loop's position as plain values."""

    stage: str
    step: int
    arrays: dict[str, np.ndarray]  # "params/NAME", "m/NAME", "v/NAME", "carry/NAME"
    position: dict[str, Any] = field(default_factory=dict)

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(prefix + "/"): v for k, v in self.arrays.items() if k.startswith(prefix + "/")}

    @classmethod
    def from_export(cls, stage: str, step: int, exported: Mapping[str, Any], position: dict[str, Any]) -> Checkpoint:
        arrays = {
            f"{group}/{name}": array
            for group in ("params", "m", "v", "carry")
            for name, array in exported[group].items()
        }
        return cls(stage, step, arrays, {**position, "count": int(exported["count"])})


class Run:
    """A run directory.

    config.toml, vocabulary.json, split.safetensors and data.json are written once; checkpoints/ holds the last good
    checkpoint and the best of every stage; history.jsonl grows; model.safetensors, metrics.json and report.html end it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest: dict[str, Any] = {"format": FORMAT, "files": {}, "last": None, "best": {}}

    @classmethod
    def create(cls, path: str | Path, files: Mapping[str, str | bytes | Mapping[str, np.ndarray]]) -> Run:
        """A new run directory with its first files. It appears whole, in one rename, or not at all.

        Raises:
            RunError: the path holds something already, or cannot be written; nothing is written over.
        """
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(
                f"{path} exists and is not empty; nothing was written. Choose another --out, or continue that run"
                f" with --resume {path}"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = cls(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            (draft.path / "checkpoints").mkdir()
            for name, content in files.items():
                draft.write(name, content)
            draft.commit()
            draft.path.chmod(0o755)
            os.replace(draft.path, path)
        except OSError as error:
            raise RunError(f"{path} cannot be created: {error.strerror}; choose another --out") from None
        draft.path = path
        return draft

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run directory, its manifest verified.

        Raises:
            RunError: not a run directory, another format, or a damaged manifest.
        """
        run = cls(path)
        try:
            text = (run.path / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise RunError(
                f"{path} is not a run directory (it has no {MANIFEST}); give the --out of a training run"
            ) from None
        try:
            outer = json.loads(text)
            body = outer["manifest"]
            intact = hashlib.sha256(_json(body).encode()).hexdigest() == outer["sha256"]
        except (ValueError, KeyError, TypeError):
            intact, body = False, {}
        if not intact:
            raise RunError(f"{path}/{MANIFEST} is damaged; restore it from a copy")
        if body["format"] != FORMAT:
            raise RunError(f"{path} has format {body['format']}; this version reads format {FORMAT}: train again")
        run.manifest = body
        return run

    def commit(self) -> None:
        """Make the manifest's present content the state of the run."""
        body = _json(self.manifest)
        digest = hashlib.sha256(body.encode()).hexdigest()
        write_atomic(self.path / MANIFEST, _json({"manifest": self.manifest, "sha256": digest}) + "\n")

    def write(self, name: str, content: str | bytes | Mapping[str, np.ndarray]) -> None:
        """Write a file of the run and enter its checksum; commit() makes it count."""
        if isinstance(content, str | bytes):
            digest = write_atomic(self.path / name, content)
        else:
            digest = save_arrays(self.path / name, content)
        self.manifest["files"][name] = digest

    def read_text(self, name: str) -> str:
        return _verified(self.path / name, self._digest(name)).decode()

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_text(name))

    def read_arrays(self, name: str) -> dict[str, np.ndarray]:
        return load_arrays(self.path / name, self._digest(name))

    def has(self, name: str) -> bool:
        return name in self.manifest["files"]

    def _digest(self, name: str) -> str:
        if not self.has(name):
            raise RunError(
                f"{self.path} has no {name}; its training did not get that far (pf train --resume {self.path})"
            )
        return self.manifest["files"][name]

    def save_checkpoint(self, checkpoint: Checkpoint, *, best: bool) -> None:
        """Make this the last checkpoint, and the best of its stage if it is."""
        name = f"checkpoints/{checkpoint.stage}-{checkpoint.step:08d}.safetensors"
        digest = save_arrays(self.path / name, checkpoint.arrays)
        entry = {
            "file": name,
            "sha256": digest,
            "stage": checkpoint.stage,
            "step": checkpoint.step,
            "position": checkpoint.position,
        }
        self.manifest["last"] = entry
        if best:
            self.manifest["best"][checkpoint.stage] = entry
        self.commit()
        keep = {entry["file"] for entry in (self.manifest["last"], *self.manifest["best"].values())}
        for path in (self.path / "checkpoints").iterdir():  # older ones, and what a killed process left half written
            if f"checkpoints/{path.name}" not in keep:
                path.unlink()

    def last(self) -> Checkpoint | None:
        return self._load(self.manifest["last"])

    def best(self, stage: str) -> Checkpoint | None:
        return self._load(self.manifest["best"].get(stage))

    def _load(self, entry: dict[str, Any] | None) -> Checkpoint | None:
        if entry is None:
            return None
        arrays = load_arrays(self.path / entry["file"], entry["sha256"])
        return Checkpoint(entry["stage"], entry["step"], arrays, dict(entry["position"]))

    def append_history(self, record: Mapping[str, Any]) -> int:
        """Append one line and return the length of the file, which a checkpoint remembers."""
        with (self.path / "history.jsonl").open("ab") as stream:
            stream.write((json.dumps(record) + "\n").encode())
            stream.flush()
            return stream.tell()

    def history_length(self) -> int:
        """Bytes of history.jsonl."""
        path = self.path / "history.jsonl"
        return path.stat().st_size if path.exists() else 0

    def truncate_history(self, length: int) -> None:
        """Drop what was written after the checkpoint that remembers this length."""
        path = self.path / "history.jsonl"
        if length == 0:
            path.unlink(missing_ok=True)
        elif path.exists():
            os.truncate(path, length)

    def log(self, line: str) -> None:
        with (self.path / "log.txt").open("a") as stream:
            stream.write(line + "\n")


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, indent=1)
