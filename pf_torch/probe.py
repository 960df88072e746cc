"""Looking at intermediate values: a recording that is off unless somebody asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

__all__ = ["record", "recording"]

_active: ContextVar[dict[str, Tensor] | None] = ContextVar("pf_torch_recording", default=None)


def record(name: str, value: Tensor) -> Tensor:
    """Note an intermediate under a name, if a recording is active.

    A name met again in one recording gets a running number: `vae.decoder.mean`, `vae.decoder.mean.2`.

    Args:
        name: dotted name, for example "vae.encoder.hidden".
        value: what was computed.

    Returns:
        value, unchanged.
    """
    values = _active.get()
    if values is not None:
        key, n = name, 1
        while key in values:
            n += 1
            key = f"{name}.{n}"
        values[key] = value.detach()
    return value


@contextmanager
def recording() -> Iterator[dict[str, Tensor]]:
    """Collect what `record` is given inside the `with` block, in order and without gradient.

    Returns:
        An ordered dict of name -> value, filled while the block runs.
    """
    values: dict[str, Tensor] = {}
    token = _active.set(values)
    try:
        yield values
    finally:
        _active.reset(token)
