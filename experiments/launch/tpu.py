"""TPU VMs of Google Cloud: queued resources, or plain ones with `--plain`.

`launch` writes three scripts and runs one of them, `keep.sh`, which makes the TPU, waits for it, prepares every worker,
runs the experiment on all of them at once, and makes another TPU when this one is preempted. The other actions are its
parts, one command each.

The program runs in the background of each worker (`nohup`), so that a lost connection ends nothing: `run` shows its log
and ends with its exit code, and finds it again when it is called twice.

Source: the pages on queued resources and TPU VMs of Cloud TPU's documentation; README.md has the errors.
"""

import shlex
from collections.abc import Sequence

from experiments.configfile import ConfigError
from experiments.launch import scripts
from experiments.launch.accelerators import TPUS
from experiments.launch.description import Launch
from experiments.launch.exits import KILLED, PREEMPTED, RESTARTED
from experiments.launch.launcher import Launcher, Setting
from experiments.launch.steps import Run, Step, Write

Command = tuple[str, ...]
_TPUS = ("gcloud", "compute", "tpus")


def _plain(launch: Launch) -> bool:
    return launch.settings["plain"] == "yes"


def _resource(launch: Launch) -> str:
    return "tpu-vm" if _plain(launch) else "queued-resources"


def _place(launch: Launch) -> Command:
    return (f"--project={launch.settings['project']}", f"--zone={launch.settings['zone']}")


def _create(launch: Launch) -> Command:
    slice_, version = launch.hardware, TPUS[launch.hardware.kind].runtime
    command = [*_TPUS, _resource(launch), "create", launch.name]
    if not _plain(launch):
        several = (f"--node-count={launch.count}", f"--node-prefix={launch.name}")
        command += several if launch.count > 1 else (f"--node-id={launch.name}",)
    command += [*_place(launch), f"--accelerator-type={slice_.cloud}"]
    command += [f"--version={version}" if _plain(launch) else f"--runtime-version={version}"]
    command += ["--spot"] if launch.spot else []
    command += ["--reserved"] if launch.settings["reserved"] else []
    if launch.settings["service_account"]:
        command += [f"--service-account={launch.settings['service_account']}"]
    return tuple(command)


def _state(launch: Launch) -> Command:
    field = "state" if _plain(launch) else "state.state"
    return (*_TPUS, _resource(launch), "describe", launch.name, *_place(launch), f"--format=value({field})")


def _delete(launch: Launch) -> Command:
    force = () if _plain(launch) else ("--force",)
    return (*_TPUS, _resource(launch), "delete", launch.name, *_place(launch), *force, "--quiet")


def _on_all(launch: Launch, *text: str) -> Command:
    """A script on every worker of every slice, at once; without one, the command that still lacks it."""
    slices = (
        ("queued-resources", "ssh", launch.name, "--node=all") if launch.count > 1 else ("tpu-vm", "ssh", launch.name)
    )
    return (*_TPUS, *slices, *_place(launch), "--worker=all", "--quiet", *(f"--command={one}" for one in text))


def program(launch: Launch) -> str:
    """The script that each worker runs in the background: the experiment, and its exit code in a file."""
    train = launch.train(".venv/bin/python", distributed=launch.hosts > 1)
    return scripts.script(
        f"cd {scripts.home(launch)}",
        scripts.exports(launch.variables()),
        f"code=0\n{scripts.quoted(train)} || code=$?",
        'echo "$code" >"$HOME"/jlora.code',
    )


def setup(launch: Launch) -> str:
    """The script that prepares a worker."""
    end = "JLORA_PROGRAM"
    return scripts.script(
        scripts.checkout(launch, scripts.home(launch)),
        scripts.install(launch),
        scripts.mount(launch),
        f"cat >\"$HOME\"/jlora.sh <<'{end}'\n{program(launch)}{end}",
    )


RUN = scripts.script(
    'cd "$HOME"',
    """\
if ! { [ -f jlora.pid ] && kill -0 "$(cat jlora.pid)" 2>/dev/null; }; then
  rm -f jlora.code
  touch jlora.log
  nohup setsid bash jlora.sh >>jlora.log 2>&1 </dev/null &
  echo "$!" >jlora.pid
fi
tail -n +1 --pid="$(cat jlora.pid)" -F jlora.log
if [ ! -f jlora.code ]; then exit %d; fi  # killed with the machine, before it could say why
exit "$(cat jlora.code)"
""".strip()
    % KILLED,
)
"""The script that starts the program, or finds it running, shows its log, and ends with its exit code."""

LOGS = scripts.script('tail -n 100 "$HOME"/jlora.log')

_KEEP = r"""
here=$(dirname "$0")

state() { %(state)s 2>/dev/null || echo ABSENT; }
create() { %(create)s; }
delete() { %(delete)s; }
setup() { %(on_all)s --command="$(cat "$here"/setup.sh)"; }
run() { %(on_all)s --command="$(cat "$here"/run.sh)"; }
say() { printf '%%s  %%s\n' "$(date -u +%%FT%%TZ)" "$*"; }

restarts=%(restarts)d
pause="${JLORA_PAUSE:-30}"  # seconds between two looks

ready() {  # waits for the machines: 0 they are there, 1 they were taken away, 2 they will not come
  local now before=
  while true; do
    now=$(state)
    if [ "$now" != "$before" ]; then say "%(name)s is $now"; fi
    before=$now
    case "$now" in
      ACTIVE | READY) return 0 ;;
      SUSPENDING | SUSPENDED | PREEMPTED | TERMINATED | STOPPED | ABSENT) return 1 ;;
      FAILED) return 2 ;;
    esac
    sleep "$pause"
  done
}

for ((start = 0; start <= restarts; start++)); do
  if [ "$(state)" = ABSENT ]; then create; fi
  there=0
  ready || there=$?
  if [ "$there" -eq 2 ]; then
    say %(failed)s
    exit 1
  fi
  if [ "$there" -eq 0 ]; then
    code=0
    if setup; then run || code=$?; else code=$?; fi
    if [ "$code" -eq 0 ]; then
      say "done; the machines are deleted"
      delete
      exit 0
    fi
    say "ended with code $code"
    sleep "$pause"  # a machine that is being taken away says so some seconds later
    case "$(state)" in
      ACTIVE | READY)
        case "$code" in
          %(again)s) continue ;;  # preempted, or the connection was lost: the machines are still there
        esac
        say %(left)s
        exit "$code" ;;
    esac
  fi
  say "preempted (start $((start + 1)) of $((restarts + 1)))"
  delete || true
done
say "given up after $((restarts + 1)) starts; the same command goes on"
exit %(preempted)d
"""


def keep(launch: Launch) -> str:
    """The script that makes a TPU, runs the experiment, and makes another TPU after a preemption."""
    words = {
        "state": _state(launch),
        "create": _create(launch),
        "delete": _delete(launch),
        "on_all": _on_all(launch),
    }
    describe = (*_TPUS, _resource(launch), "describe", launch.name, *_place(launch))
    body = _KEEP % {
        **{name: shlex.join(command) for name, command in words.items()},
        "name": launch.name,
        "restarts": launch.restarts,
        "failed": shlex.quote(f"the request failed: {shlex.join(describe)}"),
        "left": shlex.quote(
            "this is no preemption. The machines are still there, and cost money until they are deleted: "
            + shlex.join(_delete(launch))
        ),
        "again": " | ".join(map(str, (*RESTARTED, 255))),
        "preempted": PREEMPTED,
    }
    return f"#!/usr/bin/env bash\n{scripts.script(body.strip())}"


def _check(launch: Launch) -> None:
    if not launch.hardware.tpu:
        raise ConfigError(f"tpu: {launch.hardware.given!r} is no TPU: use gke, slurm or skypilot")
    if not TPUS[launch.hardware.kind].runtime:
        raise ConfigError(f"tpu: {launch.hardware.given!r} is not to be had by `gcloud compute tpus`: use gke")
    if _plain(launch) and launch.count > 1:
        raise ConfigError("tpu: --plain makes one slice: leave it out for --slices 2 or more")
    if launch.spot and launch.settings["reserved"]:
        raise ConfigError("tpu: --spot and --reserved exclude each other")
    scripts.check_shared(launch)


def _launch(launch: Launch) -> Sequence[Step]:
    texts = {"setup.sh": setup(launch), "run.sh": RUN, "keep.sh": keep(launch)}
    written = [Write(launch.files / name, text) for name, text in texts.items()]
    return [*written, Run(("bash", str(launch.files / "keep.sh")))]


LAUNCHER = Launcher(
    "tpu",
    "TPU VMs of Google Cloud, by queued resources or plain",
    (
        Setting(
            "project", "Google Cloud's project", "TPU_PROJECT", needed=True, hint="gcloud config get-value project"
        ),
        Setting("zone", "zone of the TPUs", "TPU_ZONE", needed=True, hint="gcloud compute tpus locations list"),
        Setting("plain", "tpu-vm create, without a queue", flag=True),
        Setting("reserved", "machines of a reservation", flag=True),
        Setting("service_account", "account of the machines, with access to the bucket", "TPU_SERVICE_ACCOUNT"),
    ),
    {
        "launch": _launch,
        "create": lambda launch: [Run(_create(launch))],
        "setup": lambda launch: [Run(_on_all(launch, setup(launch)))],
        "run": lambda launch: [Run(_on_all(launch, RUN))],
        "logs": lambda launch: [Run(_on_all(launch, LOGS))],
        "status": lambda launch: [Run(_state(launch))],
        "delete": lambda launch: [Run(_delete(launch))],
    },
    _check,
)
