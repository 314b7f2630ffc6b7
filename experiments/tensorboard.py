"""Scalars for TensorBoard, beside what a run prints."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tensorboardX import SummaryWriter

from experiments import hosts


class TensorBoard:
    """Writes event files into a folder: `tensorboard --logdir runs` shows all runs below it side by side.

    A thread of its own writes them; of several processes the first one has it.
    """

    def __init__(self, folder: Path) -> None:
        self._writer = SummaryWriter(str(folder), flush_secs=10) if hosts.is_first() else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values by name, "train/loss", after a step."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
