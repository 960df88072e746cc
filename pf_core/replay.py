"""A crash bundle, run again in either twin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pf_core import backends
from pf_core.checkpoint import Checkpoint, load_arrays
from pf_core.config import Config
from pf_core.errors import RunError
from pf_core.training import locate

if TYPE_CHECKING:
    from rich.console import Console


def replay(path: Path, *, backend: str, device: str, console: Console) -> tuple[str, str]:
    """Run the failing step of a bundle and say which quantity is not finite and where that is first seen.

    Args:
        path: the bundle, RUN/crash.
        backend: "jax" or "torch", whichever wrote it.

    Returns:
        (quantity, first intermediate or gradient); ("", "") where every value is finite in this twin.

    Raises:
        RunError: not a crash bundle.
    """
    try:
        facts = json.loads((path / "crash.json").read_text())
        config = Config.from_toml(path / "config.toml")
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{path} is not a crash bundle (it has no crash.json); give RUN/crash") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path}/crash.json is damaged: {error}") from None
    state = Checkpoint(facts["stage"], facts["step"], load_arrays(path / "state.safetensors"))
    batch, noise = load_arrays(path / "batch.safetensors"), load_arrays(path / "noise.safetensors")
    twin = backends.load(backend, dtype=config.dtype, device=device)
    params = {**state.group("frozen"), **state.group("params")}
    trainable, carry = tuple(facts["trainable"]), state.group("carry")
    stage, hyper = facts["stage"], facts["hyper"]
    before = twin.init(
        stage,
        params,
        trainable=trainable,
        m=state.group("m"),
        v=state.group("v"),
        count=facts["count"],
        carry=carry,
    )
    one = lambda tree: {name: np.asarray(array)[None] for name, array in tree.items()}
    rates = {name: np.array([value], config.dtype) for name, value in hyper.items()}
    _, metrics = twin.run(stage, before, one(batch), one(noise), rates, config)
    quantity, where = "", ""
    if not np.asarray(metrics["ok"])[0]:
        quantity, where = locate(twin, stage, params, trainable, batch, noise, hyper, carry, config)
    console.print(f"stage {stage}, step {facts['step']}, in {twin.name}:", highlight=False)
    if quantity == "":
        console.print("every value is finite")
    else:
        console.print(f"{quantity} is not finite, first seen in {where}", highlight=False)
    return quantity, where
