"""Slurm: a batch script for nodes with GPUs, whose home or project folder all nodes see.

This is the login node: the commit is checked out here, into the folder of the launcher's files, and the job has a
Python environment that is there already. One node is one process with all its GPUs; several nodes have a process for
each GPU, which is how JAX finds its way under `srun`.

Slurm sends SIGTERM 120 seconds before the time limit. A job that then ends with 75 is put back into the queue.

Source: the manual pages of sbatch, srun and scontrol.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from experiments.configfile import ConfigError
from experiments.launch import scripts
from experiments.launch.description import Launch
from experiments.launch.exits import GRACE, RESTARTED
from experiments.launch.launcher import Launcher, Setting
from experiments.launch.steps import Run, Step, Write


def _files(launch: Launch) -> Path:
    return launch.files.absolute()


def _source(launch: Launch) -> Path:
    return _files(launch) / f"source-{launch.commit[:12]}"


def batch(launch: Launch) -> str:
    """The batch script."""
    gpus, several = launch.hardware.devices, launch.count > 1
    head = {
        "job-name": launch.name,
        "partition": launch.settings["partition"],
        "account": launch.settings["account"],
        "nodes": str(launch.count),
        "ntasks-per-node": str(gpus if several else 1),
        "gpus-per-node": str(gpus),
        "time": launch.settings["time"],
        "signal": f"TERM@{GRACE}",
        "output": f"{_files(launch)}/%j.log",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in head.items() if value] + ["#SBATCH --requeue"]
    train = launch.train(f"{launch.settings['venv']}/bin/python", distributed=several)
    again = " || ".join(f'[ "$code" -eq {code} ]' for code in RESTARTED)
    return "\n".join(["#!/usr/bin/env bash", *lines, ""]) + scripts.script(
        f"cd {shlex.quote(str(_source(launch)))}",
        scripts.exports(launch.variables()),
        'job="${SLURM_JOB_ID:?submit this file by sbatch}"',
        "code=0",
        f"srun --kill-on-bad-exit=1 {scripts.quoted(train)} || code=$?",
        f'if {again}; then\n  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {launch.restarts} ]; then\n'
        '    scontrol requeue "$job"\n  else\n'
        f'    echo "given up after {launch.restarts} restarts; sbatch the same file to go on" >&2\n  fi\nfi',
        'exit "$code"',
    )


def _checkout(launch: Launch) -> tuple[str, ...]:
    text = scripts.script(scripts.checkout(launch, shlex.quote(str(_source(launch)))))
    return ("bash", "-c", text)


def _check(launch: Launch) -> None:
    if launch.hardware.tpu:
        raise ConfigError(f"slurm: {launch.hardware.given!r} is a TPU: use tpu or gke")
    if launch.folder.store:
        raise ConfigError(
            f"slurm: --folder {launch.folder.given!r} is a bucket: give an absolute path that all nodes see"
        )
    if launch.spot:
        raise ConfigError("slurm: it has no --spot: choose a partition whose jobs are preempted, if there is one")
    spoilt = [name for name in ("partition", "account", "time") if "\n" in launch.settings[name]]
    if spoilt or " " in str(_files(launch)):
        raise ConfigError(
            f"slurm: {', '.join(spoilt) or '--files'} cannot stand in an #SBATCH line: spaces or line breaks"
        )
    scripts.check_shared(launch)


def _launch(launch: Launch) -> Sequence[Step]:
    path = _files(launch) / "job.sbatch"
    return [Run(_checkout(launch)), Write(path, batch(launch)), Run(("sbatch", str(path)))]


def _logs(launch: Launch) -> Sequence[Step]:
    logs = f"find {shlex.quote(str(_files(launch)))} -maxdepth 1 -name '*.log' -printf '%T@ %p\\n'"
    newest = f'tail -n 100 -F "$({logs} | sort -n | tail -n 1 | cut -d " " -f 2-)"'
    return [Run(("bash", "-c", scripts.script(newest)))]


LAUNCHER = Launcher(
    "slurm",
    "a batch script for a cluster of GPUs",
    (
        Setting("partition", "partition of the cluster", "SBATCH_PARTITION", needed=True, hint="sinfo"),
        Setting(
            "venv",
            "Python environment that all nodes see, with jlora[finetune] and jax[cuda12]",
            "JLORA_VENV",
            needed=True,
        ),
        Setting("account", "account that is charged", "SBATCH_ACCOUNT"),
        Setting("time", "time limit, such as 12:00:00", "SBATCH_TIMELIMIT"),
    ),
    {
        "launch": _launch,
        "logs": _logs,
        "status": lambda launch: [Run(("squeue", "--me", "--name", launch.name))],
        "delete": lambda launch: [Run(("scancel", "--me", "--name", launch.name))],
    },
    _check,
    clones=False,
)
