"""Shell text that machines run: everything in it is quoted, and it stops at the first error."""

import shlex
from collections.abc import Mapping, Sequence

from experiments.configfile import ConfigError
from experiments.launch.description import Launch

STRICT = "set -euo pipefail"
PORT = 8482
"""Port of the coordinator: the one that JAX takes on TPUs since 0.8.1."""
PYTHON = "3.12"
_GCSFUSE = """\
if ! command -v gcsfuse >/dev/null; then
  repository="gcsfuse-$(lsb_release -c -s)"
  key=/usr/share/keyrings/cloud.google.asc
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt $repository main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -qq
  sudo apt-get install -qq -y gcsfuse
fi"""
MOUNT_OPTIONS = ("implicit-dirs", "rename-dir-limit=200000")
"""Of gcsfuse: folders copied there by others are seen, and folders can be renamed, as whole checkpoints are."""


def script(*parts: str) -> str:
    """Parts of a script after the line that stops it at the first error."""
    return "\n".join([STRICT, *filter(None, parts)]) + "\n"


def quoted(command: Sequence[str]) -> str:
    """A command as a line of shell."""
    return shlex.join(command)


def exports(variables: Mapping[str, str]) -> str:
    """Lines that set variables of the environment."""
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items())


def extra(launch: Launch) -> str:
    """JAX with the libraries of the accelerator."""
    return "jax[tpu]" if launch.hardware.tpu else "jax[cuda12]"


def checkout(launch: Launch, folder: str) -> str:
    """Lines that leave the commit in a folder, which becomes the working one, however often they are run.

    Args:
      launch: names the repository and the commit.
      folder: shell text, quoted.
    """
    repository, commit = shlex.quote(launch.repository), shlex.quote(launch.commit)
    return (
        f"if [ ! -d {folder}/.git ]; then git clone --quiet {repository} {folder}; fi\n"
        f"cd {folder}\n"
        f"git cat-file -e {commit} 2>/dev/null || git fetch --quiet origin\n"
        f"git checkout --quiet --detach {commit}"
    )


def install(launch: Launch) -> str:
    """Lines that make `.venv` in the working folder: images of TPU VMs have Python 3.10, which is too old."""
    return (
        "python3 -m pip install --quiet --user uv\n"
        f"python3 -m uv venv --quiet --allow-existing --python {PYTHON} .venv\n"
        f"python3 -m uv pip install --quiet --python .venv/bin/python -e '.[finetune]' '{extra(launch)}'"
    )


def mount(launch: Launch) -> str:
    """Lines that mount the bucket of the run's folder by gcsfuse, on a machine that is ours; "" for a path.

    Raises:
      ConfigError: for a bucket of another store.
    """
    folder = launch.folder
    if not folder.store:
        return ""
    if folder.store != "gs":
        raise ConfigError(
            f"{launch.launcher}: --folder {folder.given!r} cannot be mounted there: give gs://bucket/folder or a path"
        )
    options = quoted([f"--{option}" for option in MOUNT_OPTIONS])
    place, bucket = shlex.quote(folder.mount), shlex.quote(folder.bucket)
    return (
        f"{_GCSFUSE}\n"
        f"if ! mountpoint -q {place}; then\n"
        f"  sudo mkdir -p {place}\n"
        f'  sudo chown "$(id -u):$(id -g)" {place}\n'
        f"  gcsfuse {options} {bucket} {place}\n"
        "fi"
    )


def home(launch: Launch) -> str:
    """Folder of the checkout in the home of a machine that is ours, as shell text."""
    return f'"$HOME"/jlora-{launch.name}'


def check_shared(launch: Launch) -> None:
    """Refuses a folder that is not the same on every machine.

    Raises:
      ConfigError: for a relative path.
    """
    if not launch.folder.path.startswith("/"):
        raise ConfigError(
            f"{launch.launcher}: --folder {launch.folder.given!r} is relative, and every machine has to see the same "
            "folder: gs://bucket/folder, or an absolute path on a shared disk (NFS, Filestore, Lustre)"
        )
