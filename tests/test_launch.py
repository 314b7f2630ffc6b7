"""Launchers as text: their dry runs beside golden files, what they refuse, and the description that they are made from."""

import doctest
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import train
from experiments.configfile import ConfigError
from experiments.folder import is_run_folder
from experiments.launch import __main__ as command
from experiments.launch import accelerators, description, exits, local
from experiments.launch.description import Checkout, check_clean, check_has, checkout, name_of
from experiments.launch.launcher import Launcher, Setting
from experiments.launch.steps import Run, Write, perform, yaml_of
from experiments.launch.table import LAUNCHERS
from tests.golden import make_launch
from tests.golden.make_launch import CASES, COMMIT, GKE, SKY, SLURM, TPU

ROOT = Path(__file__).parent.parent
TOLD = ("TPU_", "GKE_", "SBATCH_", "SKYPILOT_", "JLORA_")  # variables of launchers


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch):
    """Here is the repository, and no variable of a launcher is set."""
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith(TOLD)]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", CASES)
def test_dry_runs_are_those_of_the_golden_files(name: str):
    """After `python -m tests.golden.make_launch` they are again: read the difference then."""
    assert make_launch.printed(*CASES[name]) == (make_launch.FOLDER / f"{name}.txt").read_text()


def test_there_is_a_golden_file_for_each_case_and_a_case_for_each_action():
    assert {path.stem for path in make_launch.FOLDER.iterdir()} == set(CASES)
    assert {arguments[0] for arguments in CASES.values()} == set(LAUNCHERS)
    actions = {(launcher.name, action) for launcher in LAUNCHERS.values() for action in launcher.actions}
    done = {(words[0], words[words.index("--do") + 1] if "--do" in words else "launch") for words in CASES.values()}
    assert done == actions


def test_a_dry_run_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def refuse(*arguments, **keywords):
        raise AssertionError(arguments)

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    for words in CASES.values():
        assert command.main([*words, "--dry-run", "--files", str(tmp_path / "files")]) == 0
    assert list(tmp_path.iterdir()) == []


# -- what is refused ---------------------------------------------------------------------------------------------------

V5E, H100 = ("--accelerator", "v5e-16"), ("--accelerator", "h100:8")
QUICK = ("configs/quickstart.py", *COMMIT)
CLONE = (*QUICK, "--repository", "r")
ON_DISK = (*CLONE, "--folder", "/disk/run")
SHARED = "give gs://bucket/folder or a path"
WRONG = {
    "no field": (("tpu", "configs/quickstart.py", "train.step=3"), "there is no field 'train.step'; the nearest is 'train.steps'"),
    "no config": (("local", "configs/quickstar.py"), "config file 'configs/quickstar.py' does not exist; the nearest is 'configs/quickstart.py'"),
    "tpu settings": (
        ("tpu", *CLONE, *V5E),
        "tpu needs --project or TPU_PROJECT: Google Cloud's project (gcloud config get-value project); --zone or TPU_ZONE: "
        "zone of the TPUs (gcloud compute tpus locations list)",
    ),
    "gke settings": (("gke", *CLONE, *V5E), "gke needs --image or GKE_IMAGE: container image with Python 3.11 or newer, git and JAX"),
    "slurm settings": (
        ("slurm", *QUICK, *H100, "--venv", "/v"), "slurm needs --partition or SBATCH_PARTITION: partition of the cluster (sinfo)",
    ),
    "xpk settings": (
        ("gke", *ON_DISK, *V5E, "--image", "i", "--xpk", "--zone", "z"), "gke: --xpk needs --cluster or GKE_CLUSTER, --project or GKE_PROJECT",
    ),
    "no folder": (
        ("skypilot", *CLONE, *H100),
        "skypilot needs --folder or JLORA_FOLDER: the run's folder, which all machines see and which outlives them: "
        "gs://bucket/runs/quickstart, or an absolute path on a shared disk",
    ),
    "relative folder": (
        ("skypilot", *CLONE, *H100, "--folder", "runs/a"),
        "skypilot: --folder 'runs/a' is relative, and every machine has to see the same folder: gs://bucket/folder, or an "
        "absolute path on a shared disk (NFS, Filestore, Lustre)",
    ),
    "bucket": ((*SKY, *H100, "--folder", "gs://bucket"), "--folder: 'gs://bucket' is a whole bucket: name a folder in it, gs://bucket/runs/NAME"),
    "store": ((*SKY, *H100, "--folder", "ftp://a/b"), "--folder: 'ftp://a/b' is no gs://bucket/folder, s3://bucket/folder or path"),
    "tpu store": ((*TPU, *V5E, "--folder", "s3://bkt/b"), f"tpu: --folder 's3://bkt/b' cannot be mounted there: {SHARED}"),
    "gke store": ((*GKE, *V5E, "--folder", "s3://bkt/b"), f"gke: --folder 's3://bkt/b' cannot be mounted here: {SHARED}"),
    "xpk store": (
        (*GKE, *V5E, "--folder", "gs://bkt/b", "--xpk"),
        "gke: --folder 'gs://bkt/b' cannot be mounted here: give a path in a storage that `xpk storage attach` mounts",
    ),
    "gke claim": (
        (*GKE, *V5E, "--folder", "/disk/a"),
        "gke: --folder '/disk/a' is a path: give --claim, a PersistentVolumeClaim (ReadWriteMany) that has it, and "
        "--claim-at, where it is mounted; or a folder gs://bucket/folder",
    ),
    "gke claim at": ((*GKE, *V5E, "--folder", "/disk/a", "--claim", "c"), "gke: --folder '/disk/a' is not below --claim-at /mnt/runs"),
    "slurm bucket": (
        (*SLURM, *H100, "--folder", "gs://bkt/b"), "slurm: --folder 'gs://bkt/b' is a bucket: give an absolute path that all nodes see",
    ),
    "slurm relative": (
        (*SLURM, *H100, "--folder", "a"),
        "slurm: --folder 'a' is relative, and every machine has to see the same folder: gs://bucket/folder, or an "
        "absolute path on a shared disk (NFS, Filestore, Lustre)",
    ),
    "local bucket": (("local", *QUICK, "--folder", "gs://bkt/b"), "local: --folder 'gs://bkt/b' is a bucket: give a folder of this machine"),
    "no accelerator": (TPU, "tpu: give --accelerator, such as v5e-16 or h100:8"),
    "unknown accelerator": ((*TPU, "--accelerator", "v5f-16"), None),
    "no number": ((*TPU, "--accelerator", "v5e"), "--accelerator: 'v5e' says no number: write 'v5litepod-16'"),
    "slices by the name": ((*TPU, "--accelerator", "2xv5e-16"), "--accelerator: '2xv5e-16' are 2 slices: write 'v5e-16' --slices 2"),
    "slices, as people write them": ((*TPU, "--accelerator", "4 x v5p-128"), "--accelerator: '4 x v5p-128' are 4 slices: write 'v5p-128' --slices 4"),
    "none": ((*SKY, "--accelerator", "h100:0"), "--accelerator: 'h100:0' says no number: write 'h100:8'"),
    "no number of GPUs": ((*SKY, "--accelerator", "H100"), "--accelerator: 'H100' says no number: write 'h100:8'"),
    "no topology": (
        (*TPU, "--accelerator", "v5e-17"),
        "--accelerator: 'v5e-17': no topology has 17 chips of v5e: whole hosts of 4 do, such as 20",
    ),
    "cpu": ((*TPU, "--accelerator", "cpu"), "--accelerator: 'cpu' is this machine: python -m experiments.launch local CONFIG --processes 2"),
    "GPU on TPU VMs": ((*TPU, *H100), "tpu: 'h100:8' is no TPU: use gke, slurm or skypilot"),
    "7x on TPU VMs": ((*TPU, "--accelerator", "7x-16"), "tpu: '7x-16' is not to be had by `gcloud compute tpus`: use gke"),
    "7x of SkyPilot": ((*SKY, "--accelerator", "7x-16"), "skypilot: '7x-16' is not to be had by TPU VMs: use gke"),
    "slices of SkyPilot": ((*SKY, *V5E, "--slices", "2"), "skypilot: several slices are not joined by it: use tpu or gke"),
    "GPU of SkyPilot": (
        (*SKY, "--accelerator", "mi300x:8"),
        "skypilot: 'mi300x:8' has no name here; there are a100, a100-40gb, h100, h200, b200, l4, t4, v100-16gb, v100, l40s, "
        "a6000, rtx4090",
    ),
    "GPU of GKE": (
        (*GKE, "--folder", "gs://bkt/b", "--accelerator", "rtx4090:8"),
        "gke: it has no 'rtx4090:8'; GPUs there are a100, a100-40gb, h100, h200, b200, l4, t4, v100-16gb",
    ),
    "GPU of xpk": (
        (*GKE, "--folder", "/disk/a", "--accelerator", "l4:8", "--xpk", "--cluster", "c", "--project", "p", "--zone", "z"),
        "gke: xpk has no 'l4:8': leave out --xpk",
    ),
    "nodes of xpk": (
        (*GKE, "--folder", "/disk/a", "--accelerator", "h100:8", "--nodes", "2", "--xpk"),
        "gke: xpk names pods in its own way, and nodes with GPUs find each other by name: leave out --xpk",
    ),
    "small slices": (
        (*GKE, "--folder", "gs://bkt/b", "--accelerator", "v5e-8", "--slices", "2"),
        "gke: several slices are of several machines each; 'v5e-8' is one machine",
    ),
    "TPU under Slurm": ((*SLURM, *V5E), "slurm: 'v5e-16' is a TPU: use tpu or gke"),
    "spot under Slurm": ((*SLURM, *H100, "--spot"), "slurm: it has no --spot: choose a partition whose jobs are preempted, if there is one"),
    "line of Slurm": ((*SLURM, *H100, "--files", "/a b"), "slurm: --files cannot stand in an #SBATCH line: spaces or line breaks"),
    "plain slices": ((*TPU, *V5E, "--plain", "--slices", "2"), "tpu: --plain makes one slice: leave it out for --slices 2 or more"),
    "spot and reserved": ((*TPU, *V5E, "--spot", "--reserved"), "tpu: --spot and --reserved exclude each other"),
    "local accelerator": (("local", *QUICK, *V5E), "local: processes of this machine have no --accelerator, --slices, --nodes or --spot"),
    "local processes": (("local", *QUICK, "--processes", "0"), "local: --processes is a number from 1, got '0'"),
    "local devices": (("local", *QUICK, "--devices-per-process", "x"), "local: --devices-per-process is a number from 1, got 'x'"),
    "slices": ((*TPU, *V5E, "--slices", "0"), "--slices is a number from 1, got 0"),
    "restarts": ((*TPU, *V5E, "--restarts", "-1"), "--restarts is a number from 0, got -1"),
    "name": (
        (*TPU, *V5E, "--name", "My_Run"),
        "--name: 'My_Run' is no name for all launchers: 1 to 28 small letters, digits and '-', a letter first and no '-' last",
    ),
    "variable": ((*TPU, *V5E, "--env", "A"), "--env has the form NAME=VALUE, got 'A'"),
    "secret": (
        (*TPU, *V5E, "--env", "HF_TOKEN=hf_x"),
        "--env HF_TOKEN: looks like a secret, and commands are printed and written to files. Put it on the machines by "
        "their own means (hf auth login, a Kubernetes secret, sky --secret)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_what_to_set(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    words, message = WRONG[name]
    monkeypatch.setattr(
        Write, "perform", lambda step: pytest.fail("done")
    )  # not a dry run: refused before anything is done
    monkeypatch.setattr(Run, "perform", lambda step: pytest.fail("done"))
    assert command.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    if message is None:
        assert err.startswith("error: --accelerator: device='v5f-16' is unknown; the nearest is 'v5p'. ")
    else:
        assert err == f"error: {message}\n"


def test_variables_stand_for_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name, value in {"TPU_PROJECT": "mine", "TPU_ZONE": "there", "JLORA_FOLDER": "gs://bkt/b"}.items():
        monkeypatch.setenv(name, value)
    assert command.main(["tpu", *CLONE, *V5E, "--do", "status", "--zone", "here", "--dry-run"]) == 0
    assert "describe quickstart --project=mine --zone=here" in capsys.readouterr().out
    assert command.main(["local", *QUICK, "--dry-run"]) == 0  # the folder of machines is not that of this one
    assert "--folder runs/quickstart " in capsys.readouterr().out


def test_an_unknown_launcher_lists_all(capsys: pytest.CaptureFixture[str]):
    assert command.main(["k8s", "configs/quickstart.py"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: there is no launcher 'k8s'\n\npython -m experiments.launch LAUNCHER"
    )
    assert command.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {launcher.name} " in listed for launcher in LAUNCHERS.values())
    assert command.main([]) == 2


def test_a_command_that_is_not_installed_is_found_before_anything_is_done(tmp_path: Path):
    steps = [Write(tmp_path / "a", "a\n"), Run(("no-such-command", "x"))]
    with pytest.raises(
        ConfigError, match=r"^no-such-command: not on the PATH of this machine; install it, or look with --dry-run$"
    ):
        perform(steps, dry_run=False, say=lambda text: None)
    assert list(tmp_path.iterdir()) == []


def test_steps_are_said_then_done_up_to_the_first_that_fails(tmp_path: Path):
    said: list[str] = []
    steps = [Write(tmp_path / "below" / "a", "a\n"), Run(("sh", "-c", "exit 7")), Run(("touch", str(tmp_path / "b")))]
    assert perform(steps, dry_run=False, say=said.append) == 7
    assert said == [f"# writes {tmp_path}/below/a", "$ sh -c 'exit 7'", "ended with code 7: $ sh -c 'exit 7'"]
    assert (tmp_path / "below" / "a").read_text() == "a\n" and not (tmp_path / "b").exists()
    assert perform([Run(("sh", "-c", "kill -9 $$"))], dry_run=False, say=said.append) == 137


def test_a_stranger_adds_a_launcher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    mine = Launcher(
        "mine", "my machines", (Setting("host", "its name", "MY_HOST", needed=True),),
        {"launch": lambda launch: [Run(("ssh", launch.settings["host"], *launch.train("python")))]}, lambda launch: None,
    )  # fmt: skip
    monkeypatch.setitem(LAUNCHERS, "mine", mine)
    assert command.main(["mine", *ON_DISK]) == 2
    assert capsys.readouterr().err == "error: mine needs --host or MY_HOST: its name\n"
    assert command.main(["mine", *ON_DISK, "--host", "here", "--dry-run"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "$ ssh here python -m experiments.train configs/quickstart.py --folder /disk/run --resume-if-there"


def test_yaml_keeps_scripts_readable_and_texts_texts():
    assert yaml_of({"b": "x: 1\ny\n", "a": ["true", True, 1]}) == "b: |\n  x: 1\n  y\na:\n- 'true'\n- true\n- 1\n"
    same = {"x": 1}
    assert yaml_of([same, same]) == "- x: 1\n- x: 1\n"


def commands_of_the_readme() -> list[str]:
    """Each launch in its blocks, after the variables that were set before it."""
    found, variables = [], ""
    text = (ROOT / "experiments" / "launch" / "README.md").read_text().replace("\\\n", " ")
    for line in text.split("\n```bash\n")[1:]:
        for part in line.split("\n```")[0].splitlines():
            if part.startswith("export "):
                variables = part.removeprefix("export ")
            elif part.startswith("python -m experiments.launch "):
                found.append(f"{variables} {part}")
    return found


@pytest.mark.parametrize("line", commands_of_the_readme())
def test_commands_of_the_readme_can_be_launched(line: str, monkeypatch: pytest.MonkeyPatch):
    before, _, after = line.partition("python -m experiments.launch ")
    for variable in shlex.split(before):
        monkeypatch.setenv(*variable.split("=", 1))
    words = shlex.split(after, comments=True)
    cloned = ("--repository", "https://example.com/jlora.git") if LAUNCHERS[words[0]].clones else ()
    assert make_launch.printed(*words, *COMMIT, *cloned)


def test_the_readme_has_a_command_for_each_launcher():
    words = [line.split("experiments.launch ")[1].split()[0] for line in commands_of_the_readme()]
    assert set(words) == set(LAUNCHERS) and len(words) >= 15


# -- the description ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cloud", "topology", "hosts", "chips"),
    [
        ("v5e-16", "v5litepod-16", "4x4", 4, 16), ("v5litepod-16", "v5litepod-16", "4x4", 4, 16),
        ("v5e:16x16", "v5litepod-256", "16x16", 64, 256), ("v5e-8", "v5litepod-8", "2x4", 1, 8),
        ("v5e-1", "v5litepod-1", "1x1", 1, 1), ("v5e-4", "v5litepod-4", "2x2", 1, 4), ("v6e-32", "v6e-32", "4x8", 8, 32),
        ("v5p-8", "v5p-8", "2x2x1", 1, 4), ("v5p-16", "v5p-16", "2x2x2", 2, 8), ("v5p-128", "v5p-128", "4x4x4", 16, 64),
        ("v4-32", "v4-32", "2x2x4", 4, 16), ("tpu7x-16", "tpu7x-16", "2x2x2", 2, 8), ("7x:4x4x4", "tpu7x-128", "4x4x4", 16, 64),
    ],
)  # fmt: skip
def test_slices(text: str, cloud: str, topology: str, hosts: int, chips: int):
    found = accelerators.read(text)
    assert (found.cloud, found.topology, found.hosts, found.chips) == (cloud, topology, hosts, chips)
    assert found.per_host == chips // hosts and found.tpu


@pytest.mark.parametrize("text", ["h100:8", "H100:8", "8xh100", "h100-8", "NVIDIA H100 80GB:8"])
def test_nodes(text: str):
    found = accelerators.read(text)
    assert (found.kind, found.devices, found.hosts, found.topology, found.tpu) == ("h100", 8, 1, "", False)


@pytest.mark.parametrize("module", [accelerators, description, local])
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0 < doctest.testmod(module).attempted


def test_names_after_config_files():
    assert {name_of(str(path)) for path in (ROOT / "configs").glob("*.py")} >= {"quickstart", "own-data"}
    assert name_of("configs/2nd.py") == "run-2nd"


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-c", "init.defaultBranch=main")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_commit_is_clean_and_pushed(tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r" is in no git repository with a commit: machines check out a commit, so run "
    ):
        checkout(tmp_path)
    there, here = tmp_path / "there", tmp_path / "here"
    git(tmp_path, "init", "-q", "--bare", str(there))
    git(tmp_path, "init", "-q", str(here))
    (here / "a").write_text("a")
    git(here, "add", "a")
    git(here, "commit", "-q", "-m", "a")
    found = checkout(here)
    assert found == Checkout(str(here.resolve()), found.commit, (), "", False)
    git(here, "remote", "add", "origin", str(there))
    with pytest.raises(ConfigError) as unpushed:
        check_clean(checkout(here), pushed=True)
    assert str(unpushed.value) == (
        f"commit {found.commit[:12]} is on no remote branch, and machines clone from there: git push first, or "
        "--allow-dirty if it is there all the same"
    )
    check_clean(checkout(here), pushed=False)
    git(here, "push", "-q", "origin", "HEAD:main")
    check_clean(checkout(here), pushed=True)
    for name in "abcde":
        (here / name).write_text("changed")
    with pytest.raises(ConfigError) as dirty:
        check_clean(checkout(here), pushed=True)
    assert str(dirty.value) == (
        f"a, b, c and 2 more: not committed, and machines check out commit {found.commit[:12]}. Commit first, or launch "
        "the commit as it is by --allow-dirty"
    )


def test_machines_have_the_config(tmp_path: Path):
    git(tmp_path, "init", "-q", ".")
    (tmp_path / "mine.py").write_text("")
    git(tmp_path, "add", "mine.py")
    git(tmp_path, "commit", "-q", "-m", "a")
    found = checkout(tmp_path)
    check_has(found, found.commit, "mine.py")
    for commit, config in ((found.commit, "other.py"), ("c" * 40, "mine.py")):
        with pytest.raises(ConfigError) as error:
            check_has(found, commit, config)
        assert str(error.value) == (
            f"commit {commit[:12]} has no '{config}', or is not here: commit the config file (git add -f if it is ignored), "
            "or git fetch"
        )


def test_a_dirty_tree_is_refused_unless_it_is_allowed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    state = Checkout(str(ROOT), "c" * 40, ("README.md",), "", False)
    monkeypatch.setattr(command, "checkout", lambda folder: state)
    asked = []
    monkeypatch.setattr(command, "check_has", lambda found, commit, config: asked.append((commit, config)))
    words = ["skypilot", "configs/quickstart.py", *H100, "--folder", "gs://bkt/b", "--dry-run"]
    assert command.main(words) == 2
    assert capsys.readouterr().err.startswith(
        "error: README.md: not committed, and machines check out commit cccccccccccc. "
    )
    assert command.main([*words, "--allow-dirty"]) == 2
    assert capsys.readouterr().err == (
        "error: skypilot needs --repository: the address that machines clone, as this repository has no 'origin'\n"
    )
    assert command.main([*words, "--allow-dirty", "--repository", "r"]) == 0
    out = capsys.readouterr().out
    assert (
        f'"commit": "{"c" * 40}"' in out
        and '"dirty": true' in out
        and f"git checkout --quiet --detach {'c' * 40}" in out
    )
    assert asked == [("c" * 40, "configs/quickstart.py")]
    assert command.main(["local", "configs/quickstart.py", "--dry-run"]) == 0  # nothing is checked out
    assert '"dirty": true' in capsys.readouterr().out


def test_a_local_launch_needs_no_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs" / "quickstart.py")
    assert command.main(["local", config, "--dry-run", "--folder", "there/run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# file there/run.launch/launch.json\n") and "JLORA_COMMIT" not in out
    assert (
        command.main(["skypilot", config, *H100, "--folder", "gs://bkt/b", "--dry-run", *COMMIT, "--repository", "r"])
        == 2
    )
    assert capsys.readouterr().err == (
        f"error: config file '{config}' is not in the repository, which is all that machines have: put it there\n"
    )


def test_launch_json_is_the_whole_description(capsys: pytest.CaptureFixture[str]):
    out = make_launch.printed(*CASES["tpu"])
    read = json.loads(out.split("launch.json\n", 1)[1].split("# end of", 1)[0])
    assert (read["config"], read["commit"], read["accelerator"]["topology"]) == (CASES["tpu"][1], COMMIT[1], "4x4")
    assert read["environment"] == [["JAX_COMPILATION_CACHE_DIR", "/mnt/gs/bucket/compiled"]]


# -- the program that is launched --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "there", "resumes"),
    [
        ([], False, False), (["--resume"], False, True), (["--resume-if-there"], False, False),
        (["--resume-if-there"], True, True), ([], True, False),
    ],
)  # fmt: skip
def test_the_same_command_begins_and_resumes(options, there, resumes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if there:
        (tmp_path / "experiment.json").write_text("{}")
    assert is_run_folder(tmp_path) == there
    seen: list[bool] = []
    monkeypatch.setattr(train, "run", lambda experiment, folder, *, resume, console: seen.append(resume))
    assert train.main(["configs/quickstart.py", "--folder", str(tmp_path), *options]) == 0
    assert seen == [resumes]


def test_a_preempted_run_ends_with_the_code_that_launchers_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    before, cleaned = signal.getsignal(signal.SIGTERM), []

    def preempted(*arguments, **keywords):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("SIGTERM did nothing")
        except Exception:
            pytest.fail("taken for an error")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append("although it came twice")

    monkeypatch.setattr(train, "run", preempted)
    assert train.main(["configs/quickstart.py", "--folder", str(tmp_path)]) == exits.PREEMPTED == 75
    assert capsys.readouterr().err == "preempted; the same command with --resume continues\n"
    assert signal.getsignal(signal.SIGTERM) is before and cleaned == ["although it came twice"]


def test_training_says_what_is_wrong_with_the_variables_of_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("JLORA_PROCESS", "0")
    assert train.main(["configs/quickstart.py"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: JLORA_COORDINATOR, JLORA_PROCESSES not set, though JLORA_PROCESS is: "
    )


@pytest.mark.parametrize(
    ("said", "status"), [("UNKNOWN: Gloo AllGather failed: Connection closed by peer", None), ("no such axis", 2)]
)
def test_a_process_that_loses_another_has_no_wrong_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said, status
):
    def fail(*_):
        raise ValueError(said)

    monkeypatch.setattr(train.devices, "of", fail)
    command = ["configs/quickstart.py", "--folder", str(tmp_path / "run")]
    if status is None:  # a traceback and 1: see `_as_one_of_several`
        with pytest.raises(ValueError, match=f"^{said}$"):
            train.main(command)
    else:
        assert train.main(command) == status


def test_a_process_whose_coordinator_never_came_is_started_again_where_a_dead_node_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    given = {"JLORA_COORDINATOR": "127.0.0.1:1", "JLORA_PROCESSES": "2", "JLORA_PROCESS": "1", "JLORA_TIMEOUT": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert train.main(["configs/quickstart.py"]) == 1  # and no 2, after which GKE ends the job for good
    assert capsys.readouterr().err.startswith("error: the coordinator 127.0.0.1:1 was not reached within 1 seconds")


def test_the_command_line_starts(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.launch", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.startswith("python -m experiments.launch LAUNCHER CONFIG")
