"""Progress on the screen: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from pf_core.backends import stage_of

Reporter = Callable[[str, int, int, dict[str, float]], None]
TITLES = {
    "vae": "1 latent space",
    "operator": "2 operators",
    "joint": "3 joint fine-tuning",
    "cvae": "1 latent space and discriminator",
    "flow": "2 vector field",
}


def title(label: str) -> str:
    """What a stage is called on the screen."""
    stage, member = stage_of(label)
    return f"{TITLES[stage]}, member {member + 1}" if member else TITLES[stage]


@contextmanager
def reporter(console: Console | None) -> Iterator[Reporter]:
    """A function (stage, step, max_steps, values) that shows where training stands; silent without a console."""
    if console is None:
        yield lambda *_: None
    elif console.is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("stage {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
        )
        with Progress(*columns, console=console) as progress:
            tasks = {}

            def show(stage: str, step: int, most: int, values: dict[str, float]) -> None:
                if stage not in tasks:
                    tasks[stage] = progress.add_task(title(stage), total=most, values="")
                progress.update(tasks[stage], completed=step, values=_text(values))

            yield show
    else:
        shown: dict[str, int] = {}

        def line(stage: str, step: int, most: int, values: dict[str, float]) -> None:
            tenth = 10 * step // most
            if shown.get(stage) != tenth:
                shown[stage] = tenth
                console.print(f"stage {title(stage)}: step {step} of {most}, {_text(values)}", highlight=False)

        yield line


def _text(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
