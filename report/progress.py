"""Progress on stderr: on a terminal a bar with rate and remaining time, in a log a line every 15 seconds."""

import sys
import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from .terminal import say

_LOG_EVERY = 15.0  # seconds


class _RateColumn(ProgressColumn):
    def __init__(self, things: str) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self.things = things

    def render(self, task: Task) -> Text:
        return Text(f"{_rate(task.speed or 0)} {self.things}/s")


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


class ProgressLine:
    """Progress of one piece of work. Call it with (done, total); before the first call it shows nothing.

    ``what`` is the name of the work, ``things`` the name of what is counted.
    """

    def __init__(self, what: str, things: str = "pairs") -> None:
        self.what, self.things = what, things
        self.started = self.last = 0.0
        self.done = self.first = -1  # the first call says what was finished before, which is no part of the rate
        self.bar: Progress | None = None

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` are finished."""
        now = time.monotonic()
        first, self.done = self.done < 0, done
        if first:
            self.started = self.last = now
            self.first = done
        if sys.stderr.isatty():
            self._show(done, total)
        elif first or done >= total or now - self.last >= _LOG_EVERY:
            self.last = now
            line = f"{self.what}: {done}/{total} {self.things}"
            elapsed = now - self.started
            since = done - self.first
            if since and elapsed >= 1:  # over a shorter time, a rate is noise
                left = timedelta(seconds=round((total - done) * elapsed / since))
                line += f", {_rate(since / elapsed)} {self.things}/s" + (f", {left} left" if done < total else "")
            say(line)

    def _show(self, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),  # as wide as the text leaves room for
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                _RateColumn(self.things),
                TimeRemainingColumn(table_column=Column(no_wrap=True)),
                console=Console(stderr=True),
                expand=True,
            )
            self.bar.add_task(self.what, total=total)
            self.bar.start()
        self.bar.update(self.bar.task_ids[0], completed=done, total=total)
