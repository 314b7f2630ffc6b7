"""Scalars for TensorBoard, beside what a run prints."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tensorboardX import SummaryWriter


class TensorBoard:
    """Writes event files into a folder: `tensorboard --logdir runs` shows all runs below it side by side."""

    def __init__(self, folder: Path) -> None:
        self._writer = SummaryWriter(str(folder), flush_secs=10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values by name, "train/loss", after a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
