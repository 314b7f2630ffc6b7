"""SkyPilot: a managed job, on the cloud that has the machines, started again elsewhere when they are taken away.

Source: SkyPilot's pages on its YAML, on managed jobs and on distributed jobs.
"""

from collections.abc import Sequence
from typing import Any

from experiments.configfile import ConfigError
from experiments.launch import scripts
from experiments.launch.accelerators import GPUS, TPUS
from experiments.launch.description import Launch
from experiments.launch.exits import RESTARTED
from experiments.launch.launcher import Launcher, Setting
from experiments.launch.steps import Run, Step, Write, yaml_of

_PROCESSES = """
first=$(head -n 1 <<<"${SKYPILOT_NODE_IPS:?is set by SkyPilot}")
export JLORA_COORDINATOR="$first:PORT"
export JLORA_PROCESSES="${SKYPILOT_NUM_NODES:?is set by SkyPilot}"
export JLORA_PROCESS="${SKYPILOT_NODE_RANK:?is set by SkyPilot}"
""".strip().replace("PORT", str(scripts.PORT))


def task(launch: Launch) -> dict[str, Any]:
    """The task: its YAML as a value."""
    accelerator, folder, where = launch.hardware, launch.folder, launch.settings["infra"]
    resources: dict[str, Any] = {"infra": where} if where else {}
    if accelerator.tpu:
        resources["accelerators"] = f"tpu-{accelerator.cloud}"
        resources["accelerator_args"] = {"runtime_version": TPUS[accelerator.kind].runtime}
    else:
        resources["accelerators"] = f"{GPUS[accelerator.kind].sky}:{accelerator.devices}"
    resources |= {"use_spot": launch.spot, "job_recovery": {"recover_on_exit_codes": list(RESTARTED)}}
    bucket = {folder.mount: {"source": f"{folder.store}://{folder.bucket}", "mode": "MOUNT"}} if folder.store else {}
    several = launch.hosts > 1
    train = launch.train(".venv/bin/python", distributed=several and accelerator.tpu)
    return {
        "name": launch.name,
        "num_nodes": launch.count,
        "resources": resources,
        **({"file_mounts": bucket} if bucket else {}),
        "setup": scripts.script(scripts.checkout(launch, scripts.home(launch)), scripts.install(launch)),
        "run": scripts.script(
            f"cd {scripts.home(launch)}",
            scripts.exports(launch.variables()),
            _PROCESSES if several and not accelerator.tpu else "",
            scripts.quoted(train),
        ),
    }


def _check(launch: Launch) -> None:
    accelerator = launch.hardware
    if accelerator.tpu and launch.count > 1:
        raise ConfigError("skypilot: several slices are not joined by it: use tpu or gke")
    if accelerator.tpu and not TPUS[accelerator.kind].runtime:
        raise ConfigError(f"skypilot: {accelerator.given!r} is not to be had by TPU VMs: use gke")
    if not accelerator.tpu and accelerator.kind not in GPUS:
        raise ConfigError(f"skypilot: {accelerator.given!r} has no name here; there are {', '.join(GPUS)}")
    scripts.check_shared(launch)


def _launch(launch: Launch) -> Sequence[Step]:
    path = launch.files / "task.yaml"
    return [
        Write(path, yaml_of(task(launch))),
        Run(("sky", "jobs", "launch", "--yes", "--name", launch.name, str(path))),
    ]


LAUNCHER = Launcher(
    "skypilot",
    "a managed job of SkyPilot, on any cloud",
    (Setting("infra", "cloud, region and zone: gcp/us-west4; any if not given", "SKYPILOT_INFRA"),),
    {
        "launch": _launch,
        "logs": lambda launch: [Run(("sky", "jobs", "logs", "--name", launch.name))],
        "status": lambda launch: [Run(("sky", "jobs", "queue"))],
        "delete": lambda launch: [Run(("sky", "jobs", "cancel", "--yes", "--name", launch.name))],
    },
    _check,
)
