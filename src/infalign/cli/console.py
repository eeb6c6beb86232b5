"""Progress on stderr: bars on a terminal, a line now and then elsewhere; results on stdout."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from infalign._io.wording import json_text, visible

SECONDS_BETWEEN_LINES = 15.0


class ConsoleReporter:
    """Tells what the pipeline is doing; hands each stage a progress callback.

    Args:
        quiet: Say nothing, as all but one of several processes do.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, emoji=False, quiet=quiet)

    def say(self, text: str) -> None:
        """One plain line, whatever a model, a file or a server put into it."""
        self.console.print(visible(text), markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str) -> Iterator[Callable[[int, int, str], None]]:
        """A stage in progress: yields the callback (done, total, text)."""
        started = time.monotonic()
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.fields[title]}", style="bold", markup=False, justify="left"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}", markup=False),
            )
            with Progress(*columns, console=self.console, transient=True) as bar:
                task = bar.add_task("", total=None, title=visible(title), text="")
                yield lambda done, total, text: bar.update(task, completed=done, total=total, text=visible(text))
        else:
            last, first = started, None

            def line(done: int, total: int, text: str) -> None:
                nonlocal last, first
                now = time.monotonic()
                if first is None:
                    first = (now, done)  # what an earlier run had done says nothing about the speed of this one
                if now - last >= SECONDS_BETWEEN_LINES:
                    last = now
                    left = time_left(now - first[0], done - first[1], total - done)
                    self.say("  ".join(part for part in (f"  {title}: {done}/{total}", text, left) if part))

            self.say(f"{title} …")
            yield line
        self.say(f"{title}: done in {time.monotonic() - started:.0f} s")


def time_left(seconds: float, done: int, remaining: int) -> str:
    """`2:05 left` at the pace so far; empty while there is none."""
    if done <= 0 or remaining <= 0:
        return ""
    minutes, rest = divmod(round(seconds * remaining / done), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} left" if hours else f"{minutes}:{rest:02} left"


def print_result(result: dict[str, object], as_json: bool) -> None:
    """JSON alone, or the text meant for a person, on stdout."""
    if as_json:
        typer.echo(json_text(result))
    else:
        typer.echo(visible(str(result["text"])))


def silence_libraries() -> None:
    """The pipeline shows its own progress; the libraries' bars and notes to their own developers would drown it."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|torch|peft)\.")
