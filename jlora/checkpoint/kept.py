"""Where checkpoints are kept, seen from a run: which there are, which is damaged, which another takes the place of."""

import abc
from typing import Any

from jlora.checkpoint.resume import DamagedCheckpoint


class Kept(abc.ABC):
    """The checkpoints of a run, in a folder or an object store.

    Of several processes all make one. `damage`, `record`, `found` and `replaced_by` are asked in the first one alone;
    the other methods are called in all of them, and each raises what happens to it. `steps` says the same in all where
    nothing is being written, which is looked at when they are made.

    Attributes:
      name: of the folder.
      damaged: steps of checkpoints that were found damaged.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.damaged: set[int] = set()

    @abc.abstractmethod
    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending, of one too that is being written."""

    @abc.abstractmethod
    def damage(self, step: int) -> str | None:
        """Fault of a checkpoint in one line; None if it is whole."""

    @abc.abstractmethod
    def record(self, step: int) -> dict[str, Any]:
        """The record of a checkpoint that is whole."""

    @abc.abstractmethod
    def delete(self, steps: list[int]) -> None:
        """Deletes checkpoints that `replaced_by` named."""

    @abc.abstractmethod
    def write(self, step: int, arrays: Any, record: dict[str, Any]) -> None:
        """Begins to write a checkpoint. The arrays may be donated as soon as this returns."""

    @abc.abstractmethod
    def read(self, step: int, like: Any) -> Any:
        """The arrays of a checkpoint, of the shapes and in the places of `like`."""

    @abc.abstractmethod
    def wait(self) -> None:
        """Waits until what is being written is there, and raises what went wrong."""

    @abc.abstractmethod
    def forget(self) -> None:
        """Looks anew at what there is, after another process failed to write its part."""

    @abc.abstractmethod
    def close(self) -> None:
        """Lets go of the folder."""

    def found(self, step: int | None) -> tuple[int, dict[str, Any]]:
        """The newest checkpoint, or that of `step`, and its record.

        Raises:
          FileNotFoundError: if there is none.
          DamagedCheckpoint: if it is not what was written.
        """
        there = self.steps()
        step = max(there, default=None) if step is None else step
        if step is None or step not in there:
            raise FileNotFoundError(f"no checkpoint{'' if step is None else f' of step {step}'} in '{self.name}'")
        wrong = self.damage(step)
        if wrong is not None:
            raise self.damaged_one(step, wrong)
        return step, self.record(step)

    def damaged_one(self, step: int, wrong: str) -> DamagedCheckpoint:
        """The error for a damaged checkpoint, which names the one before it that is whole."""
        self.damaged.add(step)
        earlier = (s for s in reversed(self.steps()) if s < step)
        before = next((s for s in earlier if self.damage(s) is None), None)
        return DamagedCheckpoint(self.name, step, wrong, before)

    def replaced_by(self, step: int) -> list[int]:
        """The damaged checkpoints that a new one of `step` takes the place of.

        One that is whole and not older would be taken for the newest when the run goes on, though it is of another.

        Raises:
          ValueError: if there is such a one.
        """
        later = [s for s in self.steps() if s >= step]
        if later:
            self.wait()
            whole = [s for s in later if self.damage(s) is None]
            if step in whole:
                raise ValueError(f"'{self.name}' holds a checkpoint of step {step} already")
            if whole:
                raise ValueError(
                    f"'{self.name}' holds a checkpoint of step {whole[-1]}, which would still be the newest after "
                    f"this one of step {step}: keep this run in another folder, or delete the later ones"
                )
        return sorted({*self.damaged, *later} & set(self.steps()))
