"""Intermediates by name, for diagnosis: what a loss computed on its way, in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from jax.core import Tracer

__all__ = ["record", "recording"]

Value = TypeVar("Value")
_active: ContextVar[dict[str, object] | None] = ContextVar("pf_jax_recording", default=None)


def record(name: str, value: Value) -> Value:
    """Note an intermediate under a name, if a recording is active.

    A name met again in one recording gets a running number: `vae.decoder.mean`, `vae.decoder.mean.2`.

    Args:
        name: dotted name, for example "vae.encoder.hidden".
        value: what was computed.

    Returns:
        value, unchanged.
    """
    store = _active.get()
    # twin: a value that is being traced has no numbers yet, and keeping it would leak the tracer.
    if store is not None and not isinstance(value, Tracer):
        key, n = name, 1
        while key in store:
            n += 1
            key = f"{name}.{n}"
        store[key] = value
    return value


@contextmanager
def recording() -> Iterator[dict[str, object]]:
    """Collect what `record` is given inside the `with` block, in order and without gradient.

    Returns:
        An ordered dict of name -> value, filled while the block runs.
    """
    store: dict[str, object] = {}
    token = _active.set(store)
    try:
        yield store
    finally:
        _active.reset(token)
