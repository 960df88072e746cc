"""Opening an HDF5 file that nobody vouches for.

A file can declare terabytes in a few kilobytes, name other files of this machine as its storage, and be cut or
damaged anywhere. The whole tree is therefore looked at before any array is read, and whatever HDF5 raises becomes a
DataError of one line.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5o, h5z  # pyright: ignore[reportAttributeAccessIssue]

from pf_core.errors import DataError, nearest
from pf_core.rehearsal import rehearse

__all__ = ["array", "check_filters", "explained", "is_text", "open_file", "opened", "strings", "values", "walk"]

MAX_OBJECTS = 100_000  # groups and arrays of one file
MAX_RATIO = 2000  # declared bytes per stored byte; gzip cannot pass 1032
SLACK = 2**24  # bytes that an array may declare whatever it stores
TEXT_BLOCK = 4096  # texts read at once
CACHE = 2**27  # bytes of decompressed chunks kept per array
FAULTS = (OSError, LookupError, RuntimeError, ValueError, TypeError, AttributeError, ArithmeticError, MemoryError)


def open_file(path: Path) -> h5py.File:
    # Decompressed chunks are kept: rows at random would otherwise decompress a chunk each.
    return h5py.File(path, "r", locking="best-effort", rdcc_nbytes=CACHE, rdcc_nslots=10_007)


@contextmanager
def opened(path: Path, *, rehearsed: bool = True) -> Iterator[Any]:
    """The checked file, open for reading; messages of DataErrors raised inside name it.

    Args:
        path: the file.
        rehearsed: let a child process read it first (rehearsal.py).
    """
    if not path.is_file():
        others = [item.name for item in path.parent.glob("*.h5ad")] if path.parent.is_dir() else []
        raise DataError(f"{path} is no file; {nearest(path.name, others)}")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path} may not be read; change its permissions")
    if rehearsed:
        rehearse(path)
    with explained(path), open_file(path) as file:
        check_tree(file)
        yield file


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what HDF5 raises into one line that names the file and the remedy."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except FAULTS as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        what = "is damaged or was cut short" if _is_hdf5(path) else "is no HDF5 file, or lost its beginning"
        raise DataError(f"{path} {what} ({line}); copy or download it again") from error


def _is_hdf5(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(8) == b"\x89HDF\r\n\x1a\n"
    except OSError:
        return False


def check_tree(file: h5py.File) -> None:
    """Refuse storage outside the file, and sizes that it cannot hold, in everything the file has."""
    n_bytes = os.path.getsize(file.filename)
    for where, item in walk(file):
        if isinstance(item, h5py.Dataset):
            _check_storage(item, where, n_bytes)


def walk(file: h5py.File) -> Iterator[tuple[str, Any]]:
    """Every object of the file once, with its path. Links other than hard ones are refused, not followed."""
    seen: set[int] = set()
    waiting: list[Any] = [file]
    while waiting:
        group = waiting.pop()
        for key in group:
            where = f"{group.name}/{key}".replace("//", "/")
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                raise DataError(f"{where} is a link, perhaps to another file; write the file again without links")
            item = group[key]
            address = h5o.get_info(item.id).addr
            if address in seen:  # hard links can form a ring
                continue
            seen.add(address)
            if len(seen) > MAX_OBJECTS:
                raise DataError(f"the file holds more than {MAX_OBJECTS} objects; write obs, var and the counts only")
            yield where, item
            if isinstance(item, h5py.Group):
                waiting.append(item)


def _check_storage(item: h5py.Dataset, where: str, n_bytes: int) -> None:
    if item.external or item.is_virtual:
        raise DataError(f"{where} keeps its values in other files; write the file again with its values inside")
    # Python integers: a declared shape can overflow any other.
    sizes = [math.prod(map(int, shape)) for shape in (item.shape or (0,), item.chunks or (0,))]
    declared = max(sizes) * max(item.dtype.itemsize, 1)
    stored = item.id.get_storage_size()
    if stored > n_bytes:
        raise DataError(f"{where} claims {stored} stored bytes in a file of {n_bytes}; copy or download it again")
    if declared > SLACK + MAX_RATIO * stored:
        raise DataError(
            f"{where} declares {declared} bytes and stores {stored}, so it is damaged or hostile; write it again"
        )


def is_text(item: h5py.Dataset) -> bool:
    return h5py.check_string_dtype(item.dtype) is not None


def array(item: Any, where: str) -> h5py.Dataset:
    """A one-dimensional array of text or numbers, whose compression can be read here."""
    if not isinstance(item, h5py.Dataset) or len(item.shape or ()) != 1:
        raise DataError(f"{where} is no one-dimensional array; write the file again with anndata 0.8 or newer")
    if not is_text(item) and item.dtype.kind not in "biuf":
        raise DataError(f"{where} holds objects of type {item.dtype}; text or numbers were wanted")
    check_filters(item, where)
    return item


def check_filters(item: h5py.Dataset, where: str) -> None:
    """Refuse compression that this HDF5 lacks."""
    plan = item.id.get_create_plist()
    for position in range(plan.get_nfilters()):
        code = plan.get_filter(position)[0]
        if not h5z.filter_avail(code):
            raise DataError(f"{where} is compressed by HDF5 filter {code}, missing here; write it again with gzip")


def values(item: Any, where: str) -> np.ndarray:
    """The values of a one-dimensional array; text as an object array of str."""
    found = array(item, where)
    return strings(found) if is_text(found) else found[:]


def strings(item: h5py.Dataset) -> np.ndarray:
    """Text as an object array of str, read in blocks: many entries can share one long text on disk."""
    words = np.empty(len(item), dtype=object)
    room = SLACK + MAX_RATIO * os.path.getsize(item.file.filename)
    for start in range(0, len(item), TEXT_BLOCK):
        block = item[start : start + TEXT_BLOCK]
        room -= sum(map(len, block))
        if room < 0:
            raise DataError(f"{item.name} holds more text than the file has room for; it is damaged or hostile")
        words[start : start + len(block)] = [decoded(word) for word in block]
    return words


def decoded(word: Any) -> str:
    return word.decode("utf-8", "replace") if isinstance(word, bytes) else str(word)
