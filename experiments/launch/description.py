"""One description of a run, from which every launcher makes its commands and files."""

import dataclasses
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.configfile import ConfigError
from experiments.launch.accelerators import Accelerator

NAME = re.compile(r"[a-z]([a-z0-9-]{0,26}[a-z0-9])?")
_ADDRESS = re.compile(r"(gs|s3)://([a-z0-9][a-z0-9._-]+)(/.*)?")


@dataclass(frozen=True)
class Folder:
    """The run's folder, which all machines see: the same path on each.

    jlora writes into file systems (it renames and locks), so that a bucket is mounted and the run has the path of the
    mount.

    Attributes:
      given: an address, `gs://bucket/runs/a`, or a path.
      store: "gs", "s3", or "" of a path.
      bucket: of an address.
      path: that the run has.
    """

    given: str
    store: str
    bucket: str
    path: str

    @classmethod
    def of(cls, text: str) -> "Folder":
        """The folder of an address or a path.

        Raises:
          ConfigError: for other addresses, and for a bucket without a folder in it.

        Example:
          >>> Folder.of("gs://bucket/runs/a").path
          '/mnt/gs/bucket/runs/a'
        """
        found = _ADDRESS.fullmatch(text)
        if found is None:
            if "://" in text:
                raise ConfigError(f"--folder: {text!r} is no gs://bucket/folder, s3://bucket/folder or path")
            return cls(text, "", "", text)
        store, bucket, rest = found[1], found[2], (found[3] or "").strip("/")
        if not rest:
            raise ConfigError(
                f"--folder: {text!r} is a whole bucket: name a folder in it, {text.rstrip('/')}/runs/NAME"
            )
        return cls(text, store, bucket, f"/mnt/{store}/{bucket}/{rest}")

    @property
    def mount(self) -> str:
        """Where the bucket is mounted; "" of a path."""
        return f"/mnt/{self.store}/{self.bucket}" if self.store else ""


@dataclass(frozen=True)
class Launch:
    """A run, and the machines that it gets.

    Attributes:
      launcher: its name in `table.LAUNCHERS`.
      config: the config file, relative to the repository's root.
      overrides: of its fields.
      small: whether its small form is run.
      name: of the job and of the machines.
      folder: of the run.
      accelerator: a slice or a node; None for processes of this machine.
      count: number of slices or nodes.
      spot: whether machines may be taken away, at a lower price.
      restarts: after a preemption, at most.
      repository: that machines clone.
      commit: that they check out.
      dirty: whether the files here differ from the commit.
      environment: variables of the run, (name, value).
      files: folder, on this machine, of what the launcher writes.
      settings: of the launcher, by name.
    """

    launcher: str
    config: str
    overrides: tuple[str, ...]
    small: bool
    name: str
    folder: Folder
    accelerator: Accelerator | None
    count: int
    spot: bool
    restarts: int
    repository: str
    commit: str
    dirty: bool
    environment: tuple[tuple[str, str], ...]
    files: Path
    settings: Mapping[str, str]

    @property
    def hardware(self) -> Accelerator:
        """The accelerator, of launchers that cannot do without.

        Raises:
          ConfigError: where none is named.
        """
        if self.accelerator is None:
            raise ConfigError(f"{self.launcher}: give --accelerator, such as v5e-16 or h100:8")
        return self.accelerator

    @property
    def hosts(self) -> int:
        """Machines, of all slices or nodes."""
        return self.count * self.hardware.hosts

    def train(self, python: str, *, distributed: bool = False) -> list[str]:
        """The command that trains; the same one begins and resumes.

        Args:
          python: interpreter.
          distributed: whether JAX looks for the other processes by itself, as on TPUs and under Slurm.
        """
        options = ["--folder", self.folder.path, "--resume-if-there"]
        options += ["--small"] if self.small else []
        options += ["--distributed"] if distributed else []
        return [python, "-m", "experiments.train", self.config, *self.overrides, *options]

    def variables(self) -> dict[str, str]:
        """Environment of the run: the commit, for the record, and what the command line asks for."""
        return ({"JLORA_COMMIT": self.commit} if self.commit else {}) | dict(self.environment)

    def as_json(self) -> str:
        """The description as text, the file launch.json."""

        def plain(value: Any) -> Any:
            return str(value) if isinstance(value, Path) else dict(value)

        return json.dumps(dataclasses.asdict(self), indent=2, default=plain) + "\n"


def check_name(name: str) -> str:
    """The name itself, where every launcher takes it.

    Raises:
      ConfigError: if it is no name of 1 to 28 small letters, digits and hyphens.
    """
    if NAME.fullmatch(name) is None:
        raise ConfigError(
            f"--name: {name!r} is no name for all launchers: 1 to 28 small letters, digits and '-', a letter first and "
            "no '-' last"
        )
    return name


def name_of(config: str) -> str:
    """A name after a config file: "configs/own_data.py" is "own-data".

    >>> name_of("configs/llama2_7b_gsm8k_lora.py"), name_of("configs/deberta_xxl_glue_lora_on_everything.py")
    ('llama2-7b-gsm8k-lora', 'deberta-xxl-glue-lora-on-eve')
    """
    text = re.sub(r"[^a-z0-9]+", "-", Path(config).stem.lower()).strip("-")
    return check_name((text if text[:1].isalpha() else f"run-{text}")[:28].rstrip("-"))


# -- the repository ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkout:
    """State of a repository.

    Attributes:
      root: its folder.
      commit: HEAD.
      changed: files that differ from it.
      repository: address of `origin`; "" where there is none.
      pushed: whether a remote branch has the commit.
    """

    root: str
    commit: str
    changed: tuple[str, ...]
    repository: str
    pushed: bool


def checkout(folder: Path) -> Checkout:
    """State of the repository that a folder is in.

    Raises:
      ConfigError: if it is in none.
    """
    try:
        root, commit = _git(folder, "rev-parse", "--show-toplevel", "HEAD").splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"'{folder.resolve()}' is in no git repository with a commit: machines check out a commit, so run this "
            "in a clone of jlora, or name one by --repository and --commit"
        ) from error
    changed = tuple(line[3:] for line in _git(folder, "status", "--porcelain").splitlines())
    try:
        repository = _git(folder, "remote", "get-url", "origin").strip()
    except subprocess.CalledProcessError:
        repository = ""
    return Checkout(root, commit, changed, repository, bool(_git(folder, "branch", "-r", "--contains", commit)))


def check_has(found: Checkout, commit: str, config: str) -> None:
    """Refuses a config file that machines would not have.

    Raises:
      ConfigError: if the commit is not known here, or has no such file.
    """
    try:
        _git(Path(found.root), "cat-file", "-e", f"{commit}:{config}")
    except subprocess.CalledProcessError as error:
        raise ConfigError(
            f"commit {commit[:12]} has no '{config}', or is not here: commit the config file (git add -f if it is "
            "ignored), or git fetch"
        ) from error


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def check_clean(found: Checkout, *, pushed: bool) -> None:
    """Refuses a tree that machines would not see.

    Args:
      found: the repository.
      pushed: whether the commit has to be on a remote branch, as machines clone from there.

    Raises:
      ConfigError: if files differ from the commit, or the commit is on no remote branch.
    """
    if found.changed:
        more = f" and {len(found.changed) - 3} more" if len(found.changed) > 3 else ""
        raise ConfigError(
            f"{', '.join(found.changed[:3])}{more}: not committed, and machines check out commit {found.commit[:12]}. "
            "Commit first, or launch the commit as it is by --allow-dirty"
        )
    if pushed and not found.pushed:
        raise ConfigError(
            f"commit {found.commit[:12]} is on no remote branch, and machines clone from there: git push first, or "
            "--allow-dirty if it is there all the same"
        )


def variables_of(items: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The variables of `--env NAME=VALUE`.

    Raises:
      ConfigError: for another form, or for what looks like a secret: what is launched is printed and written down.
    """
    found = []
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or re.fullmatch(r"[A-Za-z_]\w*", name) is None:
            raise ConfigError(f"--env has the form NAME=VALUE, got {item!r}")
        if re.search(r"TOKEN|SECRET|PASSWORD|API_?KEY", name.upper()):
            raise ConfigError(
                f"--env {name}: looks like a secret, and commands are printed and written to files. Put it on the "
                "machines by their own means (hf auth login, a Kubernetes secret, sky --secret)"
            )
        found.append((name, value))
    return tuple(found)
