"""Progress of an experiment on the terminal: one live bar per phase, and a line per evaluation."""

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars


class Progress:
    """Bars for all phases of an experiment, from the start, so that one sees how much is still to come.

    Where the output is no terminal there are no bars, and the lines say the same.
    """

    def __init__(self, console: Console, phases: dict[str, int]) -> None:
        """`phases` maps the label of each phase to its number of steps."""
        self.console = console
        self._phases = phases
        self._width = max(map(len, phases))
        self._bars = Bars(
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

    def phase(self, label: str, done: int = 0, title: str | None = None, steps: int | None = None) -> "Phase":
        """A part of a phase: it begins after `done` steps, has a title of its own, and as many steps."""
        return Phase(self, label, done, title or label, self._phases[label] if steps is None else steps)

    def move(self, label: str, done: int, note: str | None = None) -> None:
        """Moves a phase's bar, and starts its clock."""
        self._bars.start_task(self._tasks[label])
        self._bars.update(self._tasks[label], completed=done)
        if note is not None:
            self.remark(label, note)

    def remark(self, label: str, note: str) -> None:
        """Shows a word beside a phase's bar."""
        self._bars.update(self._tasks[label], note=note)

    def say(self, line: str) -> None:
        """Prints a line above the bars, with the time since the start."""
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        self.console.print(f"[dim]{minutes:d}:{seconds:02d}[/]  {line}", highlight=False, soft_wrap=True)

    def print(self, text: str) -> None:
        """Prints lines above the bars."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @property
    def width(self) -> int:
        """Width of the longest label."""
        return self._width

    @property
    def interactive(self) -> bool:
        """Whether there are bars."""
        return self.console.is_terminal


@dataclass(frozen=True)
class Phase:
    """One training among those that a bar counts.

    Attributes:
      progress, label: the bar.
      before: steps of the bar that are taken by others.
      title: of the training, for lines.
      steps: of the training.
    """

    progress: Progress
    label: str
    before: int
    title: str
    steps: int

    def begin(self, done: int = 0) -> None:
        """Starts, `done` of the steps having been taken in an earlier start."""
        self.progress.move(self.label, self.before + done)

    def advance(self, done: int) -> None:
        """Moves the bar."""
        self.progress.move(self.label, self.before + done)

    def note(self, text: str) -> None:
        """Shows a word beside the bar."""
        self.progress.remark(self.label, text)

    def line(self, step: int, text: str) -> None:
        """Says what an evaluation found."""
        self.say(f"{self.title.ljust(self.progress.width)}  step {step:5d}  {text}")

    def skip(self, reason: str) -> None:
        """Fills the part of a training that need not run again."""
        self.progress.move(self.label, self.before + self.steps, reason)
        if not self.progress.interactive:
            self.say(f"{self.title.ljust(self.progress.width)}  {reason}")

    def say(self, line: str) -> None:
        """Prints a line above the bars, with the time since the start."""
        self.progress.say(line)
