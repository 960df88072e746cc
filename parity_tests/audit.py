"""Which parameters each loss term reaches, and what stop-gradient holds back (docs/parity.md rule 6)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from parity_tests import synthetic as syn
from pf_core.config import Config

# What docs/math.md says each term reaches, by prefix; "-" takes back.
REACH: dict[str, tuple[str, ...]] = {
    "vae: nll": ("vae.",),
    "vae: kl": ("vae.encoder.",),
    "operator: energy": ("conditions.", "operators."),
    "operator: spectral, of operators": ("conditions.", "operators.A0", "operators.B", "operators.alpha."),
    "operator: spectral, of bases": ("operators.A0", "operators.B"),
    "operator: shrinkage": ("conditions.", "operators.A0", "operators.B", "operators.alpha."),
    "joint: energy": ("vae.encoder.hidden.", "vae.encoder.mean.", "conditions.", "operators."),
    "joint: gene energy": (
        "vae.encoder.hidden.",
        "vae.encoder.mean.",
        "vae.decoder.hidden.",
        "vae.decoder.mean.",
        "conditions.",
        "operators.",
    ),
    "joint: elbo": ("vae.",),
    # Of the players' gradients each parameter gets its own player's: the adversary reaches the encoder alone.
    "cvae: nll, beside the discriminator": ("cvae.", "discriminator."),
    "cvae: kl": ("cvae.encoder.",),
    "cvae: adversary": ("cvae.encoder.",),
    "flow: matching": ("flow.",),
}
# What is left of a loss when every weight is 0.
ALONE = ("vae: nll", "operator: energy", "joint: energy", "cvae: nll, beside the discriminator", "flow: matching")
FIXED = ("flow.center", "flow.scale")


def declared(term: str, names: list[str]) -> set[str]:
    """The parameters that a term is declared to reach."""
    return {name for name in names if name.startswith(REACH[term]) and name not in FIXED}


def _config(**changes: Any) -> Config:
    off = {
        "operator__spectral_weight": 0.0,
        "operator__shrinkage": 0.0,
        "operator__gene_weight": 0.0,
        "operator__elbo_weight": 0.0,
        "adversary__weight": 0.0,
    }
    return syn.configuration(**(off | changes))


def gradients(backend: Any, stage: str, config: Config, beta: float) -> dict[str, np.ndarray | None]:
    """Gradient of a stage's loss in every parameter, frozen ones too."""
    params = syn.parameters_of(stage, config)
    batch, noise, carry = syn.batch_of(stage, config), syn.noise_of(stage, config), syn.carry_of(stage, config)
    names = tuple(sorted(params))
    _, grads = backend.gradients(stage, params, names, batch, noise, {"lr": 0.0, "beta": beta}, carry, config)
    return grads


def _settings(term: str) -> tuple[str, Config, float, Config, float]:
    """The stage, and two settings whose losses differ by the term alone."""
    stage, part = term.split(": ")
    base = _config()
    if part == "kl":
        return stage, base, 1.0, base, 0.0
    if part == "adversary":
        return stage, _config(adversary__weight=1.0), 0.0, base, 0.0
    if term in ALONE:
        return stage, base, 0.0, base, 0.0
    if part == "spectral, of bases":
        base = _config(operator__spectral_target="bases")
    key = {"shrinkage": "shrinkage", "gene energy": "gene_weight", "elbo": "elbo_weight"}.get(part, "spectral_weight")
    return stage, replace(base, operator=replace(base.operator, **{key: 1.0})), 1.0, base, 1.0


def reached(backend: Any, term: str) -> set[str]:
    """The parameters whose gradient a term changes."""
    stage, with_term, beta_with, without, beta_without = _settings(term)
    one = gradients(backend, stage, with_term, beta_with)
    if term in ALONE:
        return {name for name, grad in one.items() if grad is not None and np.any(grad)}
    two = gradients(backend, stage, without, beta_without)
    found = set()
    for name, grad in one.items():
        other = two[name]
        if grad is not None and np.abs(grad - (0 if other is None else other)).max() > 1e-9 * np.abs(grad).max(
            initial=1e-30
        ):
            found.add(name)
    return found


def frozen_stay(backend: Any) -> list[str]:
    """Names of frozen parameters that an operator step changed: none, with weight decay on."""
    config = syn.configuration(stage_operator__weight_decay=0.5)
    params = syn.parameters(config)
    moving = syn.trainable("operator", params)
    state = backend.init("operator", params, trainable=tuple(moving), carry=syn.carry_of("operator", config))
    batch, noise = (
        syn.stacked([syn.stacked([tree])]) for tree in (syn.operator_batch(config), syn.noise_of("operator", config))
    )
    hyper = {"lr": np.array([0.01]), "beta": np.array([1.0])}
    state, _ = backend.run("operator", state, batch, noise, hyper, config)
    exported = backend.export(state)["params"]
    return [
        name
        for name in params
        if name not in moving and name in exported and not np.array_equal(exported[name], params[name])
    ]
