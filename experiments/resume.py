"""Going on after an interruption: from the newest state that is whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jlora
from experiments import devices, hosts
from experiments.configfile import ConfigError
from jlora.checkpoint import Checkpoints, DamagedCheckpoint
from jlora.state import TrainState


def loaded(folder: Path, base: Any) -> jlora.Adapted:
    """The adapter of a run that came to its end in an earlier start.

    Raises:
      ConfigError: if it is damaged.
    """
    try:
        return devices.current().beside(jlora.load(folder / "adapter", base))
    except (ValueError, FileNotFoundError) as error:
        if hosts.collective_failed(error):
            raise
        raise ConfigError(f"{error}. Delete '{folder}' to run it anew") from error


def restored(checkpoints: Checkpoints, start: TrainState, say: Callable[[str], None]) -> tuple[TrainState, Any]:
    """The newest state that a run left, or one before it where that is damaged, and the position kept with it.

    Args:
      checkpoints: of the run.
      start: the state before its first step; it comes back, with None, where the run left nothing.
      say: shows the warning.

    Raises:
      ConfigError: if the newest is damaged and there is none before it.
    """
    if checkpoints.latest is None:
        return start, None
    step = None
    while True:
        try:
            return checkpoints.restore(start, step)
        except DamagedCheckpoint as error:
            if error.before is None:
                raise ConfigError(f"{error}. Delete that folder to begin this run anew") from error
            step = error.before
            say(f"warning: {str(error).rsplit('; ', 1)[0]}; going on from step {step}")
