"""What a person sees while an experiment runs: one live bar per phase, and a line per evaluation."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from experiments.evaluate import Point


class Live:
    """Bars for all phases of an experiment, from the start, so that one sees how much is still to come.

    Where the output is no terminal there are no bars, and the lines say the same.
    """

    def __init__(self, console: Console, phases: dict[str, int]) -> None:
        """`phases` maps the label of each phase to its number of steps."""
        self.console = console
        self._phases = phases
        self._width = max(map(len, phases))
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", style="cyan"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {
            label: self._bars.add_task(label.ljust(self._width), total=steps, start=False, note="")
            for label, steps in phases.items()
        }
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, label: str, done: int = 0) -> None:
        """Starts a phase's clock, `done` of its steps having been taken before."""
        self._bars.start_task(self._tasks[label])
        self._bars.update(self._tasks[label], completed=done)

    def advance(self, label: str, done: int) -> None:
        """Moves a phase's bar."""
        self._bars.update(self._tasks[label], completed=done)

    def point(self, label: str, point: Point) -> None:
        """Shows an evaluation: beside the bar, or as a line."""
        scores = f"new {point.new:.3f}  old {point.old:.3f} bits/byte"
        self.note(label, scores)
        if not self.console.is_terminal:
            self.line(label, point.step, scores)

    def line(self, label: str, step: int, text: str) -> None:
        """Prints what an evaluation found."""
        self.say(f"{label.ljust(self._width)}  step {step:5d}  {text}")

    def note(self, label: str, text: str) -> None:
        """Shows a word beside a phase's bar."""
        self._bars.update(self._tasks[label], note=text)

    def skip(self, label: str, reason: str) -> None:
        """Fills the bar of a phase that need not run again."""
        self._bars.start_task(self._tasks[label])
        self._bars.update(self._tasks[label], completed=self._phases[label], note=reason)
        if not self.console.is_terminal:
            self.say(f"{label.ljust(self._width)}  {reason}")

    def say(self, line: str) -> None:
        """Prints a line above the bars, with the time since the start."""
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        self.console.print(f"[dim]{minutes:d}:{seconds:02d}[/]  {line}", highlight=False, soft_wrap=True)
