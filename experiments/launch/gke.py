"""GKE: a JobSet, applied by kubectl, or xpk's command line with `--xpk`.

Each pod checks out the commit into its own disk and runs the experiment. A pod that fails is not started again by
itself: the JobSet starts all of them anew, at most `restarts` times, for processes that have lost one of them hang. A
config that cannot be (exit code 2) or an image without Python (127) ends the JobSet at once.

Source: JobSet's API v1alpha2, the pages on TPUs, GPUs and Cloud Storage FUSE of GKE's documentation, xpk's `--help`.
"""

import shlex
from collections.abc import Sequence
from typing import Any

from experiments.configfile import ConfigError
from experiments.launch import scripts
from experiments.launch.accelerators import GPUS, TPUS
from experiments.launch.description import Launch
from experiments.launch.exits import GRACE, RESTARTED
from experiments.launch.launcher import Launcher, Setting
from experiments.launch.steps import Run, Step, Write, yaml_of

_HOPELESS = (2, 126, 127)  # a config that cannot be; a program that is not in the image
_CHECKOUT = "/tmp/jlora"
_SPOT = "cloud.google.com/gke-spot"


def _xpk(launch: Launch) -> bool:
    return launch.settings["xpk"] == "yes"


def _job(launch: Launch) -> str:
    return "slice" if launch.hardware.tpu else "nodes"


def program(launch: Launch) -> str:
    """The script of each pod."""
    tpu, several = launch.hardware.tpu, launch.hosts > 1
    variables = launch.variables()
    if several and not tpu:  # JAX would ask Kubernetes itself, which takes a client library and a right to do so
        first = f"{launch.name}-{_job(launch)}-0-0.{launch.name}"
        variables |= {"JLORA_COORDINATOR": f"{first}:{scripts.PORT}", "JLORA_PROCESSES": str(launch.hosts)}
    index = 'export JLORA_PROCESS="${JOB_COMPLETION_INDEX:?is set by Kubernetes in the pods of an indexed Job}"'
    train = launch.train("python", distributed=several and tpu)
    return scripts.script(
        scripts.checkout(launch, _CHECKOUT),
        f"python -m pip install --quiet -e '.[finetune]' '{scripts.extra(launch)}'",
        scripts.exports(variables),
        index if several and not tpu else "",
        f"exec {scripts.quoted(train)}",  # SIGTERM goes to the container's first process
    )


def jobset(launch: Launch) -> dict[str, Any]:
    """The JobSet: one Job per slice of TPUs, or one for all nodes of GPUs; one pod per machine."""
    accelerator, folder = launch.hardware, launch.folder
    tpu = accelerator.tpu
    pods = accelerator.hosts if tpu else launch.count
    if tpu:
        names = TPUS[accelerator.kind]
        nodes = {
            "cloud.google.com/gke-tpu-accelerator": names.label,
            "cloud.google.com/gke-tpu-topology": accelerator.topology,
        }
        resource = {"google.com/tpu": accelerator.per_host}
    else:
        nodes = {"cloud.google.com/gke-accelerator": GPUS[accelerator.kind].label}
        resource = {"nvidia.com/gpu": accelerator.per_host}
    container: dict[str, Any] = {
        "name": "jax",
        "image": launch.settings["image"],
        "command": ["bash", "-c", program(launch)],
        "resources": {"requests": resource, "limits": resource},
    }
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": GRACE,
        "nodeSelector": nodes | ({_SPOT: "true"} if launch.spot else {}),
        "containers": [container],
    }
    if launch.spot:
        spec["tolerations"] = [{"key": _SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
    if launch.settings["service_account"]:
        spec["serviceAccountName"] = launch.settings["service_account"]
    if folder.store:
        where, source = folder.mount, _bucket(folder.bucket)
    else:
        where, source = launch.settings["claim_at"], {"persistentVolumeClaim": {"claimName": launch.settings["claim"]}}
    container["volumeMounts"] = [{"name": "runs", "mountPath": where}]
    spec["volumes"] = [{"name": "runs", **source}]
    if not tpu:  # NCCL's shared memory; a container has 64 MiB of it
        container["volumeMounts"].append({"name": "memory", "mountPath": "/dev/shm"})
        spec["volumes"].append({"name": "memory", "emptyDir": {"medium": "Memory"}})
    pod = ({"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}} if folder.store else {}) | {"spec": spec}
    job = {
        "parallelism": pods,
        "completions": pods,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "jax", "operator": "In", "values": list(_HOPELESS)},
                }
            ]
        },
        "template": pod,
    }
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": launch.name} | ({"annotations": exclusive} if tpu else {}),
        "spec": {
            "failurePolicy": {
                "maxRestarts": launch.restarts,
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [
                {"name": _job(launch), "replicas": launch.count if tpu else 1, "template": {"spec": job}}
            ],
        },
    }


def _bucket(name: str) -> dict[str, Any]:
    attributes = {
        "bucketName": name,
        "mountOptions": ",".join(scripts.MOUNT_OPTIONS),
        "hostNetworkPodKSA": "true",  # without it a pod in the host's network has the node's rights, not its own
    }
    return {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}


def _xpk_create(launch: Launch) -> tuple[str, ...]:
    accelerator = launch.hardware
    number = ("--num-slices" if accelerator.tpu else "--num-nodes", str(launch.count))
    kind = ("--tpu-type", accelerator.cloud) if accelerator.tpu else ("--device-type", _xpk_gpu(launch))
    return (
        "xpk", "workload", "create", *_xpk_place(launch), "--workload", launch.name,
        "--docker-image", launch.settings["image"], *kind, *number, *(("--spot",) if launch.spot else ()),
        "--max-restarts", str(launch.restarts), "--restart-on-exit-codes", ",".join(map(str, RESTARTED)),
        "--termination-grace-period-seconds", str(GRACE), "--command", f"bash -c {shlex.quote(program(launch))}",
    )  # fmt: skip


def _xpk_gpu(launch: Launch) -> str:
    accelerator = launch.hardware
    memory = {"h100": "h100-80gb", "h200": "h200-141gb", "b200": "b200"}
    if accelerator.kind not in memory:
        raise ConfigError(f"gke: xpk has no {accelerator.given!r}: leave out --xpk")
    return f"{memory[accelerator.kind]}-{accelerator.devices}"


def _xpk_place(launch: Launch) -> tuple[str, ...]:
    names = ("cluster", "project", "zone")
    missing = [f"--{name} or GKE_{name.upper()}" for name in names if not launch.settings[name]]
    if missing:
        raise ConfigError(f"gke: --xpk needs {', '.join(missing)}")
    return tuple(word for name in names for word in (f"--{name}", launch.settings[name]))


def _check(launch: Launch) -> None:
    accelerator, folder = launch.hardware, launch.folder
    if not accelerator.tpu and not (accelerator.kind in GPUS and GPUS[accelerator.kind].label):
        have = ", ".join(kind for kind, names in GPUS.items() if names.label)
        raise ConfigError(f"gke: it has no {accelerator.given!r}; GPUs there are {have}")
    if accelerator.tpu and launch.count > 1 and accelerator.hosts == 1:
        raise ConfigError(f"gke: several slices are of several machines each; {accelerator.given!r} is one machine")
    if _xpk(launch) and not accelerator.tpu and launch.count > 1:
        raise ConfigError(
            "gke: xpk names pods in its own way, and nodes with GPUs find each other by name: leave out --xpk"
        )
    scripts.check_shared(launch)
    if folder.store and (_xpk(launch) or folder.store != "gs"):
        instead = (
            "a path in a storage that `xpk storage attach` mounts" if _xpk(launch) else "gs://bucket/folder or a path"
        )
        raise ConfigError(f"gke: --folder {folder.given!r} cannot be mounted here: give {instead}")
    if _xpk(launch):
        _xpk_create(launch)
    elif not folder.store:
        if not launch.settings["claim"]:
            raise ConfigError(
                f"gke: --folder {folder.given!r} is a path: give --claim, a PersistentVolumeClaim (ReadWriteMany) that "
                "has it, and --claim-at, where it is mounted; or a folder gs://bucket/folder"
            )
        if not folder.path.startswith(launch.settings["claim_at"].rstrip("/") + "/"):
            raise ConfigError(f"gke: --folder {folder.given!r} is not below --claim-at {launch.settings['claim_at']}")


def _launch(launch: Launch) -> Sequence[Step]:
    if _xpk(launch):
        return [Run(_xpk_create(launch))]
    path = launch.files / "jobset.yaml"
    return [Write(path, yaml_of(jobset(launch))), Run(("kubectl", "apply", "-f", str(path)))]


def _chosen(launch: Launch) -> str:
    return f"jobset.sigs.k8s.io/jobset-name={launch.name}"


def _logs(launch: Launch) -> Sequence[Step]:
    streams = str(max(5, launch.hosts + 1))
    return [
        Run(("kubectl", "logs", "-l", _chosen(launch), "-c", "jax", "--prefix", "-f", "--max-log-requests", streams))
    ]


def _delete(launch: Launch) -> Sequence[Step]:
    if _xpk(launch):
        return [Run(("xpk", "workload", "delete", *_xpk_place(launch), "--workload", launch.name))]
    return [Run(("kubectl", "delete", "jobset", launch.name))]


LAUNCHER = Launcher(
    "gke",
    "a JobSet on Google Kubernetes Engine, TPUs or GPUs",
    (
        Setting("image", "container image with Python 3.11 or newer, git and JAX", "GKE_IMAGE", needed=True),
        Setting("service_account", "Kubernetes' account of the pods, with access to the bucket", "GKE_SERVICE_ACCOUNT"),
        Setting("claim", "PersistentVolumeClaim that has the run's folder", "GKE_CLAIM"),
        Setting("claim_at", "where the claim is mounted", "GKE_CLAIM_AT", default="/mnt/runs"),
        Setting("xpk", "by xpk instead of kubectl", flag=True),
        Setting("cluster", "cluster, for xpk", "GKE_CLUSTER"),
        Setting("project", "Google Cloud's project, for xpk", "GKE_PROJECT"),
        Setting("zone", "zone of the cluster, for xpk", "GKE_ZONE"),
    ),
    {
        "launch": _launch,
        "logs": _logs,
        "status": lambda launch: [
            Run(("kubectl", "get", "jobset", launch.name)),
            Run(("kubectl", "get", "pods", "-o", "wide", "-l", _chosen(launch))),
        ],
        "delete": _delete,
    },
    _check,
)
