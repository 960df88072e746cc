"""The command line, `pf`: every command is one function here and imports what it needs when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pf_core import __version__
from pf_core.config import Output

app = typer.Typer(
    name="pf",
    help="Perturbation forecasting for single cells: train in JAX or PyTorch, predict what was not measured.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Backend = Annotated[Literal["jax", "torch"], typer.Option(help="the twin that computes")]
Device = Annotated[Literal["cpu", "gpu", "tpu"], typer.Option(help="where it computes; tpu with jax only")]
Mode = Annotated[Output, typer.Option(help="how predicted means become cells")]


def main() -> None:
    """Run a command. Bad input ends in one line on stderr and exit code 2; training that broke down in exit code 3."""
    from pf_core.errors import PfError, TrainingError

    try:
        app()
    except TrainingError as error:
        print(f"pf: {error}", file=sys.stderr)
        sys.exit(3)
    except PfError as error:
        print(f"pf: {error}", file=sys.stderr)
        sys.exit(2)


def _version(value: bool) -> None:
    if value:
        print(f"pf {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _console() -> Any:
    from rich.console import Console

    return Console()


def _config(path: Path | None, sets: list[str], data: dict[str, Any], top: dict[str, Any]) -> Any:
    """Defaults, then the TOML file, then --set, then named options; the later ones win."""
    import tomllib

    from pf_core.config import Config, from_dict, to_dict
    from pf_core.errors import ConfigError

    config = Config.from_toml(path) if path else Config()
    table = to_dict(config)
    for item in sets:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item!r}: KEY=VALUE was wanted, for example vae.n_latent=16")
        try:
            parsed = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed = value
        *path_keys, last = key.strip().split(".")
        node = table
        for part in path_keys:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--set {item!r}: {part} is a value, not a table")
        node[last] = parsed
    table["data"].update({key: value for key, value in data.items() if value is not None})
    table.update({key: value for key, value in top.items() if value is not None})
    return from_dict(Config, table)


@app.command()
def train(
    data: Annotated[Path | None, typer.Argument(help="h5ad file (or zarr store) with raw counts")] = None,
    out: Annotated[Path, typer.Option(help="run directory to be written")] = Path("pf-run"),
    resume: Annotated[Path | None, typer.Option(help="continue this run instead")] = None,
    backend: Backend = "jax",
    device: Device = "cpu",
    system: Annotated[
        Literal["operator", "flow"] | None, typer.Option(help="operator (default): perturbations; flow: time courses")
    ] = None,
    holdout: Annotated[
        list[str] | None, typer.Option(help='conditions kept out, "column=value,column=value"; repeatable')
    ] = None,
    holdout_share: Annotated[float | None, typer.Option(help="share of conditions kept out at random")] = None,
    genes: Annotated[int | None, typer.Option(help="highly variable genes kept; 0 keeps all")] = None,
    features: Annotated[Path | None, typer.Option(help="CSV of perturbation features")] = None,
    grn: Annotated[Path | None, typer.Option(help="CSV of a regulatory network (flow)")] = None,
    beside: Annotated[
        Path | None, typer.Option(help="finished flow run whose tissue information is shown beside this one's")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="one setting, KEY=VALUE; repeatable")] = None,
    seed: Annotated[int | None, typer.Option(help="fixes every draw")] = None,
    perturbation_column: Annotated[str | None, typer.Option(help="obs column of perturbations")] = None,
    control: Annotated[list[str] | None, typer.Option(help="name of control; repeatable")] = None,
    dose_column: Annotated[str | None, typer.Option(help="obs column of doses")] = None,
    tissue_column: Annotated[str | None, typer.Option(help="obs column of tissues")] = None,
    cell_type_column: Annotated[str | None, typer.Option(help="obs column of cell types")] = None,
    batch_column: Annotated[str | None, typer.Option(help="obs column of batches")] = None,
    time_column: Annotated[str | None, typer.Option(help="numeric obs column of times (flow)")] = None,
    timepoint_column: Annotated[str | None, typer.Option(help="obs column of time points or bins (flow)")] = None,
    covariate: Annotated[list[str] | None, typer.Option(help="numeric obs column; repeatable")] = None,
    layer: Annotated[str | None, typer.Option(help="layer that holds counts")] = None,
    min_counts: Annotated[int | None, typer.Option(help="leave out cells with fewer counts")] = None,
    backed: Annotated[bool, typer.Option("--backed", help="leave the counts in the file")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the PyTorch steps")] = False,
) -> None:
    """Train on control and perturbed cells, or a time course; judge what was held out, write a run directory."""
    from pf_core import fit, flow_fit
    from pf_core.checkpoint import Run
    from pf_core.errors import ConfigError
    from pf_core.model import read_config

    console = _console()
    where: dict[str, Any] = {"backend": backend, "device": device, "compile": compile, "console": console}
    if resume is not None:
        flows = read_config(Run.open(resume)).system == "flow"
        resumed = flow_fit.resume_flow if flows else fit.resume
        run = resumed(resume, source=data, **where).run
    else:
        if data is None:
            raise ConfigError("no data: give an h5ad file, or --resume RUN; pf demo needs no file")
        settings = _config(
            config,
            set_ or [],
            {
                "holdout": holdout,
                "holdout_share": holdout_share,
                "genes": genes,
                "perturbation": perturbation_column,
                "control": control,
                "dose": dose_column,
                "tissue": tissue_column,
                "cell_type": cell_type_column,
                "batch": batch_column,
                "time": time_column,
                "timepoint": timepoint_column,
                "covariates": covariate,
                "layer": layer,
                "min_counts": min_counts,
            },
            {"seed": seed, "system": system},
        )
        strangers = {"grn": grn, "beside": beside} if settings.system == "operator" else {"features": features}
        for name, value in strangers.items():
            if value is not None:
                raise ConfigError(
                    f"--{name} does not go with the {settings.system} system; leave it out, or see --system"
                )
        where |= {"out": out, "config": settings, "backed": backed}
        if settings.system == "flow":
            run = flow_fit.fit_flow(data, network=grn, beside=beside, **where).run
        else:
            run = fit.fit(data, features=features, **where).run
    console.print(f"run directory: {run.path} (open report.html)", highlight=False)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="run directory")],
    data: Annotated[Path, typer.Argument(help="h5ad file with control cells")],
    perturbation: Annotated[str, typer.Option(help='"A", "A+B", or with doses "A@0.5+B"')],
    then: Annotated[list[str] | None, typer.Option(help="a perturbation applied after it; repeatable")] = None,
    out: Annotated[Path, typer.Option(help="h5ad file to be written")] = Path("predicted.h5ad"),
    output: Mode = "transport",
    cells: Annotated[list[str] | None, typer.Option(help="only these controls, column=value; repeatable")] = None,
    times: Annotated[str | None, typer.Option(help="a trajectory instead, START:STOP:STEP, e.g. 0:1:0.25")] = None,
    counterfactual: Annotated[str | None, typer.Option(help="also these cells under another perturbation")] = None,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    backend: Backend = "jax",
    device: Device = "cpu",
) -> None:
    """Predict cells for a condition, from control cells."""
    from pf_core.errors import ConfigError
    from pf_core.model import Model

    if out.exists():
        raise ConfigError(f"{out} exists; nothing was written. Choose another --out")
    if times and (then or counterfactual):
        raise ConfigError("--times goes with neither --then nor --counterfactual; run them apart")
    model = Model.load(run, backend=backend, device=device)
    options: dict[str, Any] = {"output": output, "seed": seed, "keep": _keep(cells)}
    if times:
        predicted = model.trajectory(data, perturbation, times=_times(times), **options)
    else:
        predicted = model.predict(data, perturbation, then=then or (), **options)
    if counterfactual:
        import anndata

        other = model.predict(data, counterfactual, then=then or (), **options)
        pairs = {perturbation: predicted, counterfactual: other}
        predicted = anndata.concat(pairs, label="counterfactual", index_unique="-", merge="same", uns_merge="same")
    _write_h5ad(predicted, out)
    missing = predicted.uns["pf"]["n_genes_missing"]
    note = f"; {missing} of the model's genes are not in {data} and count as 0" if missing else ""
    print(f"{out}: {predicted.n_obs} cells, {predicted.n_vars} genes{note}")


def _keep(cells: list[str] | None) -> dict[str, str]:
    from pf_core.errors import ConfigError

    keep = {}
    for item in cells or []:
        column, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--cells {item!r}: column=value was wanted")
        keep[column.strip()] = value.strip()
    return keep


def _real_times(text: str) -> list[float]:
    """A grid, or times with commas."""
    from pf_core.errors import ConfigError

    if ":" in text:
        return [float(f"{time:.12g}") for time in _times(text)]  # 10.15, not 10.150000000000002
    try:
        return [float(part) for part in _commas(text)]
    except ValueError:
        raise ConfigError(f"--times {text!r}: START:STOP:STEP, or times with commas, was wanted") from None


def _times(text: str) -> list[float]:
    import numpy as np

    from pf_core.errors import ConfigError

    try:
        start, stop, step = map(float, text.split(":"))
        if not (step > 0 and stop >= start and (stop - start) / step < 10_000):
            raise ValueError
    except ValueError:
        raise ConfigError(f"--times {text!r}: START:STOP:STEP was wanted, for example 0:1:0.25") from None
    return [float(time) for time in start + step * np.arange(int((stop - start) / step + 1e-9) + 1)]


def _write_h5ad(adata: Any, path: Path) -> None:
    """Write by way of a temporary file, so that the name never holds half a file."""
    import os

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    adata.write_h5ad(temporary, compression="gzip")
    os.replace(temporary, path)


@app.command()
def trajectory(
    run: Annotated[Path, typer.Argument(help="run directory of the flow system")],
    times: Annotated[str, typer.Option(help="START:STOP:STEP or times with commas, in the units of the data")],
    condition: Annotated[str, typer.Option(help='under which cells move: "A", "A+B", "control"')] = "control",
    start: Annotated[
        str | None, typer.Option("--from", help="time point whose cells are followed; else cells come from both sides")
    ] = None,
    counterfactual: Annotated[str | None, typer.Option(help="also the same cells under another condition")] = None,
    data: Annotated[Path | None, typer.Option(help="h5ad file of cells, else the data of the run")] = None,
    tissue: Annotated[str | None, typer.Option(help="only cells of this tissue")] = None,
    cells: Annotated[list[str] | None, typer.Option(help="only these cells, column=value; repeatable")] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="a draw of so many starting cells")] = None,
    sides: Annotated[
        Literal["both", "previous", "next"],
        typer.Option(help="without --from: neighbours that cells come from"),
    ] = "both",
    output: Mode = "transport",
    out: Annotated[Path, typer.Option(help="h5ad file to be written")] = Path("trajectory.h5ad"),
    page: Annotated[bool, typer.Option("--page", help="also an HTML page of figures beside it")] = False,
    gene: Annotated[list[str] | None, typer.Option(help="gene that the page shows; repeatable")] = None,
    method: Annotated[Literal["rk4", "dopri5"], typer.Option(help="integrator; dopri5 needs the extra flow")] = "rk4",
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    backend: Backend = "jax",
    device: Device = "cpu",
) -> None:
    """Move cells through time with a trained flow: from one time point, or to times between measured ones."""
    from pf_core.errors import ConfigError

    at, keep = _real_times(times), _keep(cells)
    drawn = out.with_suffix(".html")
    for path in (out, *([drawn] if page else [])):
        if path.exists():
            raise ConfigError(f"{path} exists; nothing was written. Choose another --out")
    for name, value in {"counterfactual": counterfactual, "sample": sample}.items():
        if value is not None and start is None:
            raise ConfigError(f"--{name} needs --from: without it every time has cells of its own")
    from pf_core.flow_model import FlowModel
    from pf_core.trajectory_page import predict_and_draw
    from pf_core.verdict import count

    model = FlowModel.load(run, backend=backend, device=device)
    options: dict[str, Any] = {"tissue": tissue, "keep": keep, "output": output, "seed": seed, "method": method}
    options |= {"most": sample} if start is not None else {"sides": sides}
    adata = predict_and_draw(
        model,
        data,
        condition,
        at,
        start=start,
        counterfactual=counterfactual,
        genes=tuple(gene or ()),
        page=drawn if page else None,
        options=options,
    )
    _write_h5ad(adata, out)
    missing = adata.uns["pf"]["n_genes_missing"]
    note = f"; {missing} of the model's genes are not in {data} and count as 0" if missing else ""
    print(f"{out}: {count(adata.n_obs, 'cell')} at {count(len(at), 'time')}{f', page {drawn}' if page else ''}{note}")


@app.command()
def evaluate(
    run: Annotated[Path | None, typer.Argument(help="run directory")] = None,
    data: Annotated[Path | None, typer.Argument(help="the data, where they have moved")] = None,
    task: Annotated[Path | None, typer.Option(help="TOML file of a task: train and judge over its folds")] = None,
    data_folder: Annotated[Path | None, typer.Option("--data", help="folder of the task's data")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the task's results, pf-task by default")] = None,
    seeds: Annotated[int | None, typer.Option(help="only the first so many seeds of the task")] = None,
    folds: Annotated[str | None, typer.Option(help="only these folds of the task, from 1, with commas")] = None,
    output: Annotated[Output | None, typer.Option(help="how predicted means become cells")] = None,
    backend: Backend = "jax",
    device: Device = "cpu",
) -> None:
    """Judge a run's held-out conditions again, or run a task (--task), beside the simple answers."""
    from pf_core.errors import ConfigError

    if (run is None) == (task is None):
        came = "neither" if run is None else "both"
        raise ConfigError(f"{came} of a run directory and --task were given; give one of them")
    if task is not None:
        if output is not None:
            raise ConfigError("--output goes with a run directory; a task is judged in count transport")
        from pf_core import task_run, tasks

        task_run.run(
            tasks.load(task),
            data=data_folder,
            out=out or Path("pf-task"),
            backend=backend,
            device=device,
            seeds=seeds,
            folds=None if folds is None else _numbers(folds),
            console=_console(),
        )
        return
    for name, value in {"data": data_folder, "out": out, "seeds": seeds, "folds": folds}.items():
        if value is not None:
            raise ConfigError(f"--{name} goes with --task; a run directory takes only --output, --backend, --device")
    from pf_core import fit, flow_fit
    from pf_core.checkpoint import Run
    from pf_core.model import read_config

    assert run is not None
    judge = flow_fit.judge_again if read_config(Run.open(run)).system == "flow" else fit.judge_again
    judge(run, source=data, backend=backend, device=device, output=output or "transport", console=_console())


def _numbers(text: str) -> list[int]:
    from pf_core.errors import ConfigError

    try:
        return [int(part) for part in _commas(text)]
    except ValueError:
        raise ConfigError(f"--folds {text!r}: numbers with commas were wanted, for example 1,3") from None


@app.command()
def response(
    run: Annotated[Path, typer.Argument(help="run directory")],
    data: Annotated[Path | None, typer.Argument(help="the data, where they have moved, or other cells")] = None,
    out: Annotated[Path, typer.Option(help="folder of response.html, response.json and figures")] = Path("response"),
    perturbation: Annotated[
        list[str] | None, typer.Option(help="condition to look at closely; repeatable. The strongest otherwise")
    ] = None,
    undo: Annotated[str | None, typer.Option(help="move the real cells of this condition back, as in LOY")] = None,
    backend: Backend = "jax",
    device: Device = "cpu",
) -> None:
    """Read a trained model: axes and genes, similar and opposite conditions, epistasis, tissues."""
    from pf_core import data as cells
    from pf_core.errors import ConfigError, RunError
    from pf_core.genes import align_genes
    from pf_core.model import Model
    from pf_core.response_page import analyse, write_response

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; nothing was written. Choose another --out")
    model = Model.load(run, backend=backend, device=device)
    if data is None:
        recorded = model.run.read_json("data.json")["source"]
        data = None if recorded is None else model.run.path / recorded
        if data is None or not data.exists():
            raise RunError(f"{run} does not say where its data are, or they have moved; give the file as an argument")
    dataset, _ = align_genes(cells.load(data, model.config.data, training=False), model.vocabulary.genes)
    found = analyse(model, dataset, perturbations=perturbation or (), undo=undo, source=data)
    write_response(out, found, title=f"Responses of {run.resolve().name}", facts={"data": data.name})
    print(f"{out / 'response.html'}: {len(found.labels)} conditions on {len(found.controls.z)} control cells")


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(help="h5ad file to be written")],
    seed: Annotated[int, typer.Option(help="fixes every draw")] = 0,
    genes: Annotated[int | None, typer.Option(help="number of genes")] = None,
    loy: Annotated[
        float | None, typer.Option(help="donors instead of a screen, whose cells have lost their Y at this share")
    ] = None,
    flow: Annotated[bool, typer.Option("--flow", help="a time course instead of a screen, on a known flow")] = False,
    network: Annotated[Path | None, typer.Option(help="CSV for the network of the time course, with --flow")] = None,
    tissues: Annotated[int | None, typer.Option(help="number of tissues, with --flow")] = None,
) -> None:
    """Simulate Perturb-seq counts with known operators, donors with known loss of Y, or a course on a known flow."""
    from pf_core.errors import ConfigError
    from pf_core.simulate import simulate as draw
    from pf_core.simulate_flow import network as edges
    from pf_core.simulate_flow import simulate_flow

    for path in filter(None, (out, network)):
        if path.exists():
            raise ConfigError(f"{path} exists; nothing was written. Choose another name")
    if flow and loy is not None:
        raise ConfigError("--flow and --loy are different cells; give one of them")
    for name, value in {"network": network, "tissues": tissues}.items():
        if value is not None and not flow:
            raise ConfigError(f"--{name} goes with --flow")
    sizes: dict[str, Any] = {name: n for name, n in {"n_genes": genes, "n_tissues": tissues}.items() if n is not None}
    try:
        adata = simulate_flow(seed, **sizes) if flow else draw(seed, loy=loy, **sizes)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    _write_h5ad(adata, out)
    if network is not None:
        edges(adata.uns["truth"]).to_csv(network, index=False)
    what = f"{adata.obs['donor'].nunique()} donors" if loy is not None else ""
    what = f"{adata.obs['time'].nunique()} time points" if flow else what
    what = what or f"{adata.obs['perturbation'].nunique()} conditions"
    print(f"{out}: {adata.n_obs} cells, {adata.n_vars} genes, {what}")


@app.command()
def loy(
    cells: Annotated[Path, typer.Argument(help="h5ad file with raw counts of all genes")],
    out: Annotated[Path, typer.Option(help="h5ad file to be written, with LOY labels in obs")] = Path("loy.h5ad"),
    cell_type_column: Annotated[str, typer.Option(help="obs column of cell types; '' for one type")] = "cell_type",
    donor_column: Annotated[str, typer.Option(help="obs column of donors; '' for one donor")] = "donor",
    xy: Annotated[
        list[str] | None, typer.Option(help="cells known to be XY, column=value; repeatable. Otherwise estimated")
    ] = None,
    layer: Annotated[str, typer.Option(help="layer that holds counts")] = "",
    gene: Annotated[list[str] | None, typer.Option(help="Y gene to use instead of the list; repeatable")] = None,
    ambient: Annotated[float | None, typer.Option(help="Y counts of a cell without Y, relative to XY cells")] = None,
    level: Annotated[float, typer.Option(help="posterior probability that a call needs")] = 0.95,
    keep_y: Annotated[bool, typer.Option("--keep-y", help="leave the Y genes among the genes")] = False,
) -> None:
    """Call loss of the Y chromosome per cell, and write labels that pf train reads as a perturbation."""
    from pf_core.data import read_cells
    from pf_core.errors import ConfigError
    from pf_core.loy_cells import label_loy
    from pf_core.loy_plots import print_calls, write_page
    from pf_core.y_genes import Y_GENES

    page = out.with_suffix(".html")
    for path in (out, page):
        if path.exists():
            raise ConfigError(f"{path} exists; nothing was written. Choose another --out")
    labelled, scores = label_loy(
        read_cells(cells, layer),
        cell_type=cell_type_column,
        donor=donor_column,
        xy=xy or (),
        y_genes=tuple(gene) if gene else Y_GENES,
        ambient=ambient,
        level=level,
        keep_y=keep_y,
    )
    _write_h5ad(labelled, out)
    write_page(page, labelled, scores, title=f"LOY calls of {cells.name}")
    print_calls(scores, console=_console())
    print(f"{out}: {labelled.n_obs} cells, labels in obs['loy']; see {page}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="run directory to be written")] = Path("pf-demo"),
    backend: Backend = "jax",
    seed: Annotated[int, typer.Option(help="fixes every draw")] = 0,
) -> None:
    """Simulate, train, predict held-out pairs, compare with the truth and with simple answers. No file needed."""
    from pf_core.demo import demo as run_demo

    run_demo(out, backend=backend, seed=seed, console=_console())


@app.command()
def replay(
    crash: Annotated[Path, typer.Argument(help="crash bundle, RUN/crash")],
    backend: Backend = "jax",
    device: Device = "cpu",
) -> None:
    """Run the step of a crash bundle again, in either twin, and say where values stop being finite."""
    from pf_core.replay import replay as run_replay

    run_replay(crash, backend=backend, device=device, console=_console())


@app.command()
def parity(
    device: Annotated[str, typer.Option(help="cpu, gpu, tpu; several with commas")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float64, float32, tf32, bf16; several with commas")] = "float64,float32",
    out: Annotated[Path, typer.Option(help="folder of the certificate")] = Path("pf-parity"),
    mutants: Annotated[bool, typer.Option("--mutants", help="also plant faults; every one must be noticed")] = False,
) -> None:
    """Prove on this machine that the twins are one function with the same gradients; write the certificate."""
    from pf_core.errors import ConfigError

    try:
        from parity_tests import certificate
    except ModuleNotFoundError as error:
        raise ConfigError(f'pf parity needs {error.name}; install both frameworks: "perturb-forecast[torch]"') from None
    code = certificate.run(_commas(device), _commas(dtype), out, mutants)
    print(f"certificate: {out / 'certificate.html'}")
    raise typer.Exit(code)


def _commas(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


@app.command()
def bench(
    device: Annotated[str, typer.Option(help="cpu, gpu; several with commas")] = "cpu",
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="ceilings, distances, likelihood, spectral, batches, steps, inference, training; repeatable; all"
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="tiny sizes, to see that everything runs")] = False,
    out: Annotated[Path, typer.Option(help="folder of JSON, Markdown and plots")] = Path("pf-bench"),
    check: Annotated[bool, typer.Option("--check", help="fail where a ratio lost 25 % of the committed one")] = False,
    against: Annotated[Path | None, typer.Option(help="the committed results, where they are elsewhere")] = None,
    data: Annotated[Path | None, typer.Option(help="h5ad file for whole trainings, else they are skipped")] = None,
    peers: Annotated[bool, typer.Option(help="measure other packages too")] = True,
    malloc: Annotated[str, typer.Option(help="settings of the allocator, tuned and default")] = "tuned,default",
    rounds: Annotated[int, typer.Option(min=1, help="turns of every side")] = 7,
    wait: Annotated[float, typer.Option(min=0, help="seconds a suite waits in all for a quiet machine")] = 600.0,
) -> None:
    """Time the twins and their peers head to head, on the same numbers, once they agree."""
    from pf_bench import run as benchmark

    devices = _commas(device)
    if check and against is None:
        against = benchmark.COMMITTED / f"{'-'.join(devices)}{'-quick' if quick else ''}" / "bench.json"
    code = benchmark.bench(
        devices=devices,
        suites=suite or (),
        mallocs=_commas(malloc),
        quick=quick,
        peers=peers,
        data=data,
        rounds=rounds,
        wait=wait,
        out=out,
        against=against,
        command=" ".join(["pf", *sys.argv[1:]]),
    )
    raise typer.Exit(code)


@app.command()
def doctor() -> None:
    """Measure the conventions of the installed frameworks and say which differ from its own table."""
    from pf_core.errors import ConfigError

    try:
        from parity_tests import doctor as examination
    except ModuleNotFoundError as error:
        raise ConfigError(f'pf doctor needs {error.name}; install both frameworks: "perturb-forecast[torch]"') from None
    raise typer.Exit(examination.run())
