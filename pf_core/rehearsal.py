"""A first reading of an HDF5 file in a process of its own.

HDF5's C code can loop forever or crash on a damaged heap of texts (one in a few hundred files with some flipped
bytes), and neither can be caught from inside. So a child process first reads what the parent is about to read; if it
does not come back, the parent never touches the file.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import h5py

from pf_core.errors import DataError

__all__ = ["rehearse"]

SECONDS = 6.0  # for reading a small file
BYTES_PER_SECOND = 2e7  # slower than any disk in use


def rehearse(path: Path) -> None:
    """Refuse a file whose texts and attributes HDF5 cannot read without crashing or hanging."""
    status = path.stat()
    _rehearse(path.resolve(), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)  # once per state of a file; a refusal raises and is not kept
def _rehearse(path: Path, size: int, _changed: int) -> None:
    command = [sys.executable, "-m", "pf_core.rehearsal", str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    quiet = subprocess.DEVNULL
    try:
        with subprocess.Popen(command, env=environment, stdin=quiet, stdout=subprocess.PIPE, stderr=quiet) as child:
            assert child.stdout is not None
            child.stdout.readline()  # its imports are done: the clock starts
            try:
                code = child.wait(SECONDS + size / BYTES_PER_SECOND)
            except subprocess.TimeoutExpired:
                child.kill()
                what = "HDF5 does not come to an end reading it"
                raise DataError(f"{path} is damaged ({what}); copy or download it again") from None
    except OSError as error:
        warnings.warn(f"{path} is read without a rehearsal, no child process could be started: {error}", stacklevel=2)
        return
    if code == 1:
        warnings.warn(f"{path} is read without a rehearsal, pf_core.rehearsal failed in {sys.executable}", stacklevel=2)
    elif code:
        raise DataError(f"{path} is damaged (HDF5 crashes reading it); copy or download it again")


def _main(path: Path) -> None:
    from pf_core.hdf5 import is_text, opened, strings, walk  # which imports this module

    print("ready", flush=True)
    with contextlib.suppress(DataError), opened(path, rehearsed=False) as file:  # the parent will explain any fault
        for where, item in walk(file):
            _ = dict(item.attrs)
            # Only the texts of the tables are read later; others may be large.
            if isinstance(item, h5py.Dataset) and is_text(item) and where.startswith(("/obs/", "/var/")):
                strings(item)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
