"""A launcher as data: its settings, and for each action the steps that it takes."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from experiments.configfile import ConfigError
from experiments.launch.description import Launch
from experiments.launch.steps import Step

Action = Callable[[Launch], Sequence[Step]]


@dataclass(frozen=True)
class Setting:
    """Something that a launcher has to know beside the description.

    Attributes:
      name: of the option, `--name`.
      meaning: for errors and `--help`.
      variable: of the environment, which stands for the option; "" for none.
      needed: whether there is no launching without it.
      default: of one that is not needed.
      flag: whether it takes no value; "yes" if given.
      hint: a command or a place that tells it, for errors.
    """

    name: str
    meaning: str
    variable: str = ""
    needed: bool = False
    default: str = ""
    flag: bool = False
    hint: str = ""

    @property
    def option(self) -> str:
        """As it stands on the command line."""
        return "--" + self.name.replace("_", "-")


@dataclass(frozen=True)
class Launcher:
    """A way to machines.

    Attributes:
      name: on the command line.
      meaning: one line of help.
      settings: of its own.
      actions: steps of each action; the first one is taken where `--do` says nothing.
      check: raises a ConfigError where the launcher cannot do what a description says.
      remote: whether it needs machines: an accelerator, a shared folder, and a commit that they check out.
      clones: whether machines clone the repository from its address, so that the commit has to be pushed.
    """

    name: str
    meaning: str
    settings: tuple[Setting, ...]
    actions: Mapping[str, Action]
    check: Callable[[Launch], None]
    remote: bool = True
    clones: bool = True


def settled(launcher: Launcher, given: Mapping[str, str | None]) -> dict[str, str]:
    """Settings of a launcher, from options, else from the environment, else their defaults.

    Args:
      launcher: whose they are.
      given: values of the options; None or "" where there was none.

    Raises:
      ConfigError: naming each one that is needed and not there, and how it is set.
    """
    found, missing = {}, []
    for setting in launcher.settings:
        value = given.get(setting.name) or (os.environ.get(setting.variable, "") if setting.variable else "")
        if not value and setting.needed:
            set_by = setting.option + (f" or {setting.variable}" if setting.variable else "")
            missing.append(f"{set_by}: {setting.meaning}" + (f" ({setting.hint})" if setting.hint else ""))
        found[setting.name] = value or setting.default
    if missing:
        raise ConfigError(f"{launcher.name} needs " + "; ".join(missing))
    return found
