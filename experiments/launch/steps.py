"""Things that a launcher does, one by one: writing a file, running a command. Printed first, then done."""

import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import yaml

from experiments.configfile import ConfigError


class Step(Protocol):
    """Something that a launcher does.

    `text()` says all of it, `headline()` what is printed before it is done; `program` is the command that has to be
    installed, "" where none has to be; `perform()` does it and returns an exit code.
    """

    @property
    def program(self) -> str: ...

    def text(self) -> str: ...

    def headline(self) -> str: ...

    def perform(self) -> int: ...


@dataclass(frozen=True)
class Write:
    """A file that is written, with the folders above it."""

    path: Path
    content: str
    program: str = ""

    def text(self) -> str:
        """The file's name and all that is in it."""
        return f"# file {self.path}\n{self.content}# end of {self.path}"

    def headline(self) -> str:
        """The file's name."""
        return f"# writes {self.path}"

    def perform(self) -> int:
        """Writes the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(self.content)
        return 0


@dataclass(frozen=True)
class Run:
    """A command, run without a shell, in the foreground."""

    command: tuple[str, ...]

    @property
    def program(self) -> str:
        """The command's first word."""
        return self.command[0]

    def text(self) -> str:
        """The command, as a shell takes it."""
        return f"$ {shlex.join(self.command)}"

    def headline(self) -> str:
        """The whole command, too."""
        return self.text()

    def perform(self) -> int:
        """Runs it; 130 after Ctrl-C."""
        try:
            return subprocess.run(self.command, check=False).returncode
        except KeyboardInterrupt:
            return 130


def perform(steps: Sequence[Step], *, dry_run: bool, say: Callable[[str], None]) -> int:
    """Prints each step and does it, up to the first that fails.

    Args:
      steps: in their order.
      dry_run: only print.
      say: prints a text.

    Returns:
      The exit code of the last step that was done.

    Raises:
      ConfigError: before anything is done, if a command is not installed.
    """
    absent = sorted({step.program for step in steps if step.program and shutil.which(step.program) is None})
    if absent and not dry_run:
        raise ConfigError(f"{', '.join(absent)}: not on the PATH of this machine; install it, or look with --dry-run")
    code = 0
    for step in steps:
        say(step.text() if dry_run else step.headline())
        if not dry_run and (code := step.perform()) != 0:
            say(f"ended with code {code}: {step.headline().splitlines()[0]:.100}")
            break
    return code if code >= 0 else 128 - code


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, and nothing said by reference to another place."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def yaml_of(value: object) -> str:
    """A value as YAML, in the order of its keys, scripts as blocks that read like scripts."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=1000))
