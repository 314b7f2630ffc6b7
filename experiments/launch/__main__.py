"""The command line: `python -m experiments.launch LAUNCHER CONFIG [overrides...] [options]`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import configfile
from experiments.config import Experiment, Study
from experiments.configfile import ConfigError
from experiments.launch import accelerators
from experiments.launch.description import (
    Checkout,
    Folder,
    Launch,
    check_clean,
    check_has,
    check_name,
    checkout,
    name_of,
    variables_of,
)
from experiments.launch.launcher import Launcher, settled
from experiments.launch.steps import Step, Write, perform
from experiments.launch.table import LAUNCHERS


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 2 for what cannot be launched, else that of the last command."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] not in LAUNCHERS:
        return _usage(words)
    launcher = LAUNCHERS[words[0]]
    options = parser_of(launcher).parse_intermixed_args(words[1:])
    try:
        return perform(steps(launcher, options), dry_run=options.dry_run, say=_say)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def steps(launcher: Launcher, options: argparse.Namespace) -> list[Step]:
    """All that an action does, launch.json first where something is started.

    Raises:
      ConfigError: for what cannot be launched. Nothing has been done then.
    """
    launch = described(launcher, options)
    launcher.check(launch)
    action = options.do or next(iter(launcher.actions))
    record = [Write(launch.files / "launch.json", launch.as_json())] if action in ("launch", "run") else []
    return [*record, *launcher.actions[action](launch)]


def described(launcher: Launcher, options: argparse.Namespace) -> Launch:
    """The description that a command line comes to.

    Raises:
      ConfigError: for a config that cannot be, an accelerator that is not there, files that are not committed, or a
        setting that is missing.
    """
    configfile.load((Experiment, Study), options.config, options.overrides, small=options.small)
    settings = settled(launcher, {setting.name: getattr(options, setting.name) for setting in launcher.settings})
    name = check_name(options.name or name_of(options.config))
    found = _checkout(launcher, options)
    return Launch(
        launcher=launcher.name,
        config=_config(options.config, found.root) if launcher.remote else options.config,
        overrides=tuple(options.overrides),
        small=options.small,
        name=name,
        folder=_folder(launcher, options.folder, name),
        accelerator=accelerators.read(options.accelerator) if options.accelerator else None,
        count=_at_least(1, "--slices", options.count),
        spot=options.spot,
        restarts=_at_least(0, "--restarts", options.restarts),
        repository=found.repository if launcher.clones else found.root,
        commit=found.commit,
        dirty=bool(found.changed),
        environment=variables_of(options.env),
        files=_files(launcher, options, name),
        settings=settings,
    )


def _folder(launcher: Launcher, given: str | None, name: str) -> Folder:
    if launcher.remote:
        given = given or os.environ.get("JLORA_FOLDER")
    if not given and launcher.remote:
        raise ConfigError(
            f"{launcher.name} needs --folder or JLORA_FOLDER: the run's folder, which all machines see and which "
            f"outlives them: gs://bucket/runs/{name}, or an absolute path on a shared disk"
        )
    return Folder.of(given or f"runs/{name}")


def _files(launcher: Launcher, options: argparse.Namespace, name: str) -> Path:
    """Folder of the launcher's files, beside the run's where that is on this machine."""
    if options.files:
        return Path(options.files)
    beside = f"runs/{name}" if launcher.remote or not options.folder else options.folder.rstrip("/")
    return Path(f"{beside}.launch")


def _checkout(launcher: Launcher, options: argparse.Namespace) -> Checkout:
    """The repository and the commit that are launched: those named, or those here."""
    if options.commit and (options.repository or not launcher.clones):
        return Checkout(options.repository or str(Path.cwd()), options.commit, (), options.repository or "", True)
    try:
        found = checkout(Path())
    except ConfigError:
        if launcher.remote:
            raise
        found = Checkout(str(Path.cwd()), "", (), "", False)  # a copy of the files: nothing is checked out here
    commit, repository = options.commit or found.commit, options.repository or found.repository
    if launcher.remote and not options.allow_dirty and not options.commit:
        check_clean(found, pushed=launcher.clones and not options.repository)
    if launcher.clones and not repository:
        raise ConfigError(
            f"{launcher.name} needs --repository: the address that machines clone, as this repository has no 'origin'"
        )
    if launcher.remote:
        check_has(found, commit, _config(options.config, found.root))
    return Checkout(options.repository or found.root, commit, found.changed, repository, found.pushed)


def _config(path: str, root: str) -> str:
    """The config file as machines have it: relative to the repository's root."""
    absolute, above = Path(path).resolve(), Path(root).resolve()
    if above.is_dir() and absolute.is_relative_to(above):
        return absolute.relative_to(above).as_posix()
    if Path(path).is_absolute():
        raise ConfigError(
            f"config file '{path}' is not in the repository, which is all that machines have: put it there"
        )
    return Path(path).as_posix()


def _at_least(least: int, option: str, value: int) -> int:
    if value < least:
        raise ConfigError(f"{option} is a number from {least}, got {value}")
    return value


def _say(text: str) -> None:
    print(text, flush=True)


def _usage(words: Sequence[str]) -> int:
    known = "\n".join(f"  {launcher.name:<10}{launcher.meaning}" for launcher in LAUNCHERS.values())
    text = "python -m experiments.launch LAUNCHER CONFIG [overrides...] [options]\n\n"
    text += f"{known}\n\nLAUNCHER --help has its options"
    asked = bool(words) and words[0] in ("-h", "--help")
    if words and not asked:
        text = f"error: there is no launcher {words[0]!r}\n\n{text}"
    print(text, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def parser_of(launcher: Launcher) -> argparse.ArgumentParser:
    """Options that all launchers have, and those of one."""
    parser = argparse.ArgumentParser(f"python -m experiments.launch {launcher.name}", description=launcher.meaning)
    add = parser.add_argument
    add("config", help="a Python file with `def config() -> Experiment`")
    add("overrides", nargs="*", help="dotted: train.steps=200 runs.lora_r4.method='lora(8)'")
    add("--dry-run", action="store_true", help="print every command and file, do nothing")
    add("--do", choices=list(launcher.actions), help=f"{next(iter(launcher.actions))} if not given")
    add("--name", help="of the job and the machines; after the config file if not given")
    add("--folder", help="the run's folder, gs://bucket/folder or a path that all machines see (JLORA_FOLDER)")
    add("--small", action="store_true", help="the config's small form, which ends in seconds")
    add("--accelerator", help="of a slice or a node: v5e-16, v5p-128, h100:8")
    add("--slices", "--nodes", dest="count", type=int, default=1, help="number of TPU slices, or of nodes with GPUs")
    add("--spot", action="store_true", help="machines that may be taken away, at a lower price")
    add("--restarts", type=int, default=10, help="after preemptions, at most (10)")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable of the run; no secrets")
    add("--repository", help="address that machines clone; that of origin if not given")
    add("--commit", help="that machines check out; HEAD if not given")
    add("--allow-dirty", action="store_true", help="launch HEAD although files here differ, or it is not pushed")
    add("--files", help="folder of the launcher's own files; runs/NAME.launch if not given")
    own = parser.add_argument_group(launcher.name)
    for setting in launcher.settings:
        said = setting.meaning + (f" ({setting.variable})" if setting.variable else "")
        said += f"; {setting.default} if not given" if setting.default else ""
        if setting.flag:
            own.add_argument(setting.option, dest=setting.name, action="store_const", const="yes", help=said)
        else:
            own.add_argument(setting.option, dest=setting.name, help=said)
    return parser


if __name__ == "__main__":
    sys.exit(main())
