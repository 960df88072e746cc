"""Cases of the models, the losses and the optimiser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from parity_tests import oracle_steps
from parity_tests import synthetic as syn
from parity_tests.case import QUANTITIES, Case
from parity_tests.cases_math import FIRST, normal
from pf_core.config import Config
from pf_core.initial import select

PARAMS = ("params/*",)


def vae() -> Iterator[Case]:
    n, d = syn.N_CELLS, 5
    batch = syn.vae_batch()
    cells = {"x": batch["counts"], "tissue": batch["tissue"]}
    latent = {"z": normal("z", n, d), "tissue": batch["tissue"], "library": batch["library"]}
    for scale in ("library", "softplus"):
        for dispersion, kind in (("gene", "log1p"), ("gene-tissue", "counts")):
            whole = syn.configuration(vae__scale=scale, vae__dispersion=dispersion, vae__input=kind)
            config, params = whole.vae, select(syn.parameters(whole), "vae")
            if dispersion == "gene-tissue":
                params["decoder.log_r"] = params["decoder.log_r"] * 40.0  # some beyond their bounds
            label = f"{scale}, {dispersion}, {kind}"
            static = {"config": config}
            unused = "params/encoder.*"
            everything = {"x": batch["counts"], "eps": normal("eps", n, d)} | {
                k: latent[k] for k in ("tissue", "library")
            }
            library_flows = ("library",) if scale == "library" else ()
            yield Case(
                f"NBVAE/whole, {label}",
                "vae.NBVAE",
                {"params": params, **everything},
                static,
                (*PARAMS, "eps", *library_flows),
            )
            encoder = {"params": params, **cells}
            none = ("params/decoder.*",)
            yield Case(f"NBVAE/encode, {label}", "vae.NBVAE.encode", encoder, static, PARAMS, none=none)
            decoder = {"params": params, **latent}
            none = (unused, "params/decoder.log_r")
            yield Case(
                f"NBVAE/decode, {label}", "vae.NBVAE.decode", decoder, static, (*PARAMS, "z", *library_flows), none=none
            )
            none = (unused, "params/decoder.hidden.*", "params/decoder.mean.*")
            dispersions = {"params": params, "tissue": batch["tissue"]}
            yield Case(f"NBVAE/dispersion, {label}", "vae.NBVAE.dispersion", dispersions, static, PARAMS, none=none)
    config = syn.configuration().vae
    params = select(syn.parameters(syn.configuration()), "vae")
    yield Case(
        "Encoder/alone", "vae.Encoder", {"params": select(params, "encoder"), **cells}, {"config": config}, PARAMS
    )
    none = ("params/log_r",)
    yield Case(
        "Decoder/alone",
        "vae.Decoder",
        {"params": select(params, "decoder"), **latent},
        {"config": config},
        (*PARAMS, "z"),
        none=none,
    )
    kink = {name: value.copy() for name, value in select(params, "encoder").items()}
    kink["hidden.weight"][:, :9], kink["hidden.bias"][:9] = 0.0, 0.0
    yield Case(
        "Encoder/hidden units exactly at the kink",
        "vae.Encoder",
        {"params": kink, **cells},
        {"config": config},
        PARAMS,
        taylor=False,
    )
    steep = {
        name: value * (30.0 if name.startswith("mean") else 1.0) for name, value in select(params, "decoder").items()
    }
    for scale in ("library", "softplus"):
        config = syn.configuration(vae__scale=scale).vae
        yield Case(
            f"Decoder/large logits, {scale}",
            "vae.Decoder",
            {"params": steep, **latent},
            {"config": config},
            (*PARAMS, "z"),
            none=none,
        )
    yield Case(
        "Linear/affine",
        "layers.Linear",
        {"params": {"weight": normal("w", 3, 7), "bias": normal("b", 7)}, "x": normal("x", 5, 3)},
        differentiate=("*",),
        run=lambda f, a: f.layers.Linear(a["params"])(a["x"]),
    )
    square = {"params": {"weight": normal("w2", 5, 5), "bias": normal("b2", 5)}, "x": normal("x2", 3, 5)}
    yield Case(
        "Linear/square",
        "layers.Linear",
        square,
        differentiate=("*",),
        run=lambda f, a: f.layers.Linear(a["params"])(a["x"]),
    )


def conditions() -> Iterator[Case]:
    config = syn.configuration()
    batch = syn.condition_batch()
    inputs = {"params": select(syn.parameters(config), "conditions"), **batch}
    moving = (*PARAMS, "doses", "covariates", "batch")
    yield Case("ConditionEncoder/table", "conditions.ConditionEncoder", inputs, differentiate=moving)
    featured = select(syn.parameters(config, features=True), "conditions")
    learned = ("params/perturbation.map", "params/tissue.table", "params/theta.*", "doses", "covariates")
    yield Case(
        "ConditionEncoder/features", "conditions.ConditionEncoder", inputs | {"params": featured}, differentiate=learned
    )
    repeated = {name: np.array(value) for name, value in batch.items()}
    repeated["perturbations"][:] = 3
    repeated["tissue"][:] = 0
    repeated["doses"][2] = (1.0, 2.0)
    yield Case(
        "ConditionEncoder/one member twice", "conditions.ConditionEncoder", inputs | repeated, differentiate=moving
    )
    ended = {name: np.array(value) for name, value in batch.items()}
    ended["perturbations"][:, 0] = syn.N_PERTURBATIONS - 1
    ended["tissue"][:] = syn.N_TISSUES - 1
    yield Case(
        "ConditionEncoder/last rows of the tables", "conditions.ConditionEncoder", inputs | ended, differentiate=moving
    )


def families() -> Iterator[Case]:
    params = select(syn.parameters(syn.configuration()), "operators")
    n, d = syn.N_CONDITIONS, 5
    tissue = np.array([2, 0, 1, 2, 0], np.int32)
    theta = normal("theta", n, d)
    grouped = {"params": params, "theta": theta, "tissue": tissue}
    none = ("params/A0", "params/b0", "params/B", "params/u")
    yield Case(
        "OperatorFamily/coefficients",
        "operators.OperatorFamily.coefficients",
        {"params": params, "theta": theta},
        differentiate=("*",),
        none=none,
    )
    yield Case(
        "OperatorFamily/operator", "operators.OperatorFamily.operator", grouped, differentiate=(*PARAMS, "theta")
    )
    z = normal("z", n, 7, d)
    yield Case(
        "OperatorFamily/grouped", "operators.OperatorFamily", grouped | {"z": z}, differentiate=(*PARAMS, "theta", "z")
    )
    cells = {"z": normal("z2", 11, d), "theta": normal("theta2", 11, d), "tissue": np.arange(11, dtype=np.int32) % 3}
    yield Case(
        "OperatorFamily/per cell",
        "operators.OperatorFamily.per_cell",
        {"params": params, **cells},
        differentiate=(*PARAMS, "theta", "z"),
    )
    yield Case(
        "response_profile/of a family",
        "operators.response_profile",
        {"params": params, "theta": theta},
        differentiate=("*",),
        none=none,
        run=lambda f, a: f.operators.response_profile(f.operators.OperatorFamily(a["params"]), a["theta"]),
    )


def _loss(stage: str, label: str, config: Config, beta: float = 0.375, **changes: Any) -> Case:
    quantities = changes.pop("quantities", ("value", "gradient", "jvp", "hvp"))
    params = changes.pop("params", None) or syn.parameters(config)
    inputs = {"params": params, "batch": syn.batch_of(stage, config), "noise": syn.noise_of(stage, config)}
    inputs["batch"] |= changes.pop("batch", {})
    static: dict[str, Any] = {"config": config}
    if stage != "vae":
        inputs["carry"] = syn.carry_of(stage, config)
    if stage != "operator":
        static["beta"] = beta
    differentiate = tuple(f"params/{name}" for name in syn.trainable(stage, params))
    parts = ("1/0/*", "1/1/*")
    return Case(
        f"{stage}_loss/{label}",
        f"steps.{stage}_loss",
        inputs,
        static,
        differentiate,
        zero_outputs=parts,
        quantities=quantities,
        taylor=stage == "vae",
        terms=64,
        **changes,
    )


def losses() -> Iterator[Case]:
    for scale in ("library", "softplus"):
        for dispersion, kind in (("gene", "log1p"), ("gene-tissue", "counts")):
            config = syn.configuration(vae__scale=scale, vae__dispersion=dispersion, vae__input=kind)
            quantities = QUANTITIES if scale == "library" else FIRST
            yield _loss("vae", f"{scale}, {dispersion}, {kind}", config, quantities=quantities)
    for stage, prefix in (("vae", ""), ("joint", "cells_")):
        cells = syn.vae_batch()
        table = {f"{prefix}{name}": value for name, value in syn.tabled(cells["counts"], cells["weight"]).items()}
        yield _loss(stage, "count table", syn.configuration(), batch=table, quantities=FIRST)
        yield _loss(
            stage,
            "count table that a dispersion per tissue does not use",
            syn.configuration(vae__dispersion="gene-tissue"),
            batch=table,
            quantities=FIRST,
        )
    yield _loss("vae", "beta zero", syn.configuration(), beta=0.0, quantities=FIRST)
    settings: dict[str, dict[str, Any]] = {
        "penalty active": {},
        "u estimator": {"operator__estimator": "u"},
        "cold start": {"operator__warm_start": False},
        "bases": {"operator__spectral_target": "bases"},
        "penalty inactive": {"operator__rho_max": 100.0},
        "one power iteration": {"operator__power_iterations": 1},
        "energy only": {"operator__spectral_weight": 0.0, "operator__shrinkage": 0.0},
    }
    for label, changes in settings.items():
        config = syn.configuration(**changes)
        enough = {"wy": np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 0], [0, 0, 0.0]])} if "u est" in label else {}
        quantities = QUANTITIES if label in ("penalty active", "bases") else FIRST
        yield _loss("operator", label, config, batch=enough, quantities=quantities)
    yield _repeated_operator(syn.configuration())
    config = syn.configuration()
    yield _loss("operator", "fixed features", config, params=syn.parameters(config, features=True), quantities=FIRST)
    for scale in ("library", "softplus"):
        quantities = QUANTITIES if scale == "library" else FIRST
        config = syn.configuration(vae__scale=scale, vae__dispersion="gene-tissue")
        yield _loss("joint", scale, config, quantities=quantities)
    yield _loss(
        "joint",
        "bases, u",
        syn.configuration(operator__spectral_target="bases", operator__estimator="u"),
        quantities=FIRST,
    )


def _repeated_operator(config: Config) -> Case:
    """Two groups share an operator: the penalty counts it once, and the second group's slot is 0, as for padding."""
    case = _loss("operator", "a repeated operator", config, quantities=FIRST)
    batch = case.inputs["batch"]
    for name in ("perturbations", "doses", "tissue", "batch", "covariates"):
        batch[name][3] = batch[name][2]
    batch["distinct"] = np.array([1.0, 1.0, 1.0, 0.0, 0.0])
    batch["slot"] = np.array([2, 1, 4, 0, 0], np.int32)

    def run(f: Any, a: Any) -> Any:
        loss, (parts, carry) = f.steps.operator_loss(**a, config=config)
        return loss, (parts, {"v": carry["v"][1:]})  # row 0 is written twice, and nobody reads it

    return replace(case, run=run)


def _state_tree(state: Any) -> dict[str, Any]:
    return {name: getattr(state, name) for name in ("params", "m", "v", "count", "carry")}


def step_case(
    stage: str,
    label: str,
    config: Config,
    *,
    n_micro: int = 1,
    count: int = 3,
    trained: tuple[str, ...] = (),
    **changes: Any,
) -> Case:
    """One step of a stage from a shared state; `trained` names the parameters where not all of the stage's are."""
    params = syn.parameters_of(stage, config)
    moving = {name: p for name, p in syn.trainable(stage, params).items() if not trained or name in trained}
    m, v = syn.moments(moving)
    module = "flow_steps" if stage in ("cvae", "flow") else "steps"
    inputs = {
        "params": params,
        "m": m,
        "v": v,
        "carry": syn.carry_of(stage, config),
        "batch": syn.stacked([syn.batch_of(stage, config, i) for i in range(n_micro)]),
        "noise": syn.stacked([syn.noise_of(stage, config, i) for i in range(n_micro)]),
        "hyper": {"lr": np.array(2.0**-7), "beta": np.array(0.375)},
    }

    def run(f: Any, a: Any) -> Any:
        state = f.steps.init_state(
            a["params"], trainable=tuple(moving), m=a["m"], v=a["v"], count=count, carry=a["carry"], dtype=_dtype(a)
        )
        state, metrics = getattr(getattr(f, module), f"{stage}_step")(
            state, a["batch"], a["noise"], a["hyper"], config=config
        )
        return {**_state_tree(state), "metrics": {k: v for k, v in metrics.items() if k != "ok"}}

    def oracle(a: Any) -> Any:
        state = {k: a[k] for k in ("m", "v", "carry")} | {"count": np.array(count)}
        state["params"] = {k: a["params"][k] for k in moving}
        state["frozen"] = {k: p for k, p in a["params"].items() if k not in moving}
        return oracle_steps.step(stage, state, a["batch"], a["noise"], a["hyper"], config=config)

    return Case(
        f"{stage}_step/{label}",
        f"{module}.{stage}_step",
        inputs,
        quantities=("value",),
        run=run,
        oracle=oracle,
        terms=64,
        **changes,
    )


def _dtype(arguments: Any) -> str:
    return str(arguments["hyper"]["lr"].dtype).removeprefix("torch.")


def steps() -> Iterator[Case]:
    config = syn.configuration()
    for stage in ("vae", "operator", "joint"):
        yield step_case(stage, "shared state, clipped, decayed", config)
        loose = syn.configuration(**{f"stage_{stage}__max_norm": 1e6, f"stage_{stage}__weight_decay": 0.0})
        yield step_case(stage, "two micro-batches, not clipped", loose, n_micro=2, count=40)
    yield step_case("operator", "bases", syn.configuration(operator__spectral_target="bases"), n_micro=2)
    yield step_case("vae", "first step", config, count=0)

    names = {"a": (3, 5), "b": (7,)}
    tree = lambda what, scale=1.0: {k: normal(f"{what}.{k}", *shape, scale=scale) for k, shape in names.items()}
    squares = {k: v**2 + 0.01 for k, v in tree("v", 0.3).items()}
    adam = {"params": tree("p"), "grads": tree("g"), "m": tree("m", 0.1), "v": squares}
    for label, count, decay in (
        ("first step", 0, 0.0),
        ("step 4, decayed", 3, 0.25),
        ("step 1000", 999, 0.01),
        ("late", 10**6, 0.0),
    ):
        yield Case(
            f"adam_update/{label}",
            "steps.adam_update",
            adam | {"count": np.array(count, np.int32), "lr": np.array(0.0078125)},
            {"weight_decay": decay},
            quantities=("value",),
            terms=32,
        )
    fresh = adam | {"m": {k: 0 * p for k, p in adam["m"].items()}, "v": {k: 0 * p for k, p in adam["v"].items()}}
    fresh["grads"] = {"a": tree("g")["a"] * 1e-3, "b": np.array([0.0, 1e-8, -1e-8, 1e-6, 3e-8, 1e3, -1e-4])}
    yield Case(
        "adam_update/fresh moments, tiny and zero gradients",
        "steps.adam_update",
        fresh | {"count": np.array(0, np.int32), "lr": np.array(0.0078125)},
        quantities=("value",),
        terms=32,
    )
    for label, limit in (("active", 0.5), ("inactive", 1e3), ("just above the norm", None)):
        grads = tree("g")
        norm = float(np.sqrt(sum((g**2).sum() for g in grads.values())))
        yield Case(
            f"clip_by_global_norm/{label}",
            "steps.clip_by_global_norm",
            {"grads": grads},
            {"max_norm": limit or norm * 1.001},
            quantities=("value",),
            terms=32,
        )
    zeros = {"grads": {k: np.zeros(shape) for k, shape in names.items()}}
    yield Case(
        "clip_by_global_norm/zero gradients",
        "steps.clip_by_global_norm",
        zeros,
        {"max_norm": 1.0},
        quantities=("value",),
    )


def all_cases() -> list[Case]:
    return [*vae(), *conditions(), *families(), *losses(), *steps()]
