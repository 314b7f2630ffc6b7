"""Training checkpoints that are spoilt, in each of their files and in several ways; and folders with two users."""

import gc
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest

import jlora
from experiments.config import ConfigError
from experiments.resume import loaded, restored
from jlora.checkpoint import Checkpoints, DamagedCheckpoint, seal
from jlora.checkpoint.lock import Lock
from tests.conformance import normal

# Where a state cannot be read Orbax closes its loop, and tensorstore's threads still report to it (Python 3.13).
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ADAPTED = jlora.apply({"kernel": normal(4, 3)}, rank=2)


def state(step: int = 0) -> jlora.TrainState:
    made = jlora.TrainState.create(ADAPTED, optax.adam(1e-2))
    factors = jax.tree.map(lambda x: x + step, made.adapted.factors)
    return jlora.TrainState(
        made.adapted.replace(factors=factors), made.opt_state, jnp.int32(step), made.key, jnp.float32(step)
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Two checkpoints, of steps 3 and 12."""
    folder = tmp_path_factory.mktemp("written") / "run"
    with Checkpoints(folder) as checkpoints:
        for step in (3, 12):
            checkpoints.save(state(step), step)
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "run")


def files(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def become(make):
    def spoil(file: Path, rng: random.Random) -> None:
        file.unlink()
        make(file)

    return spoil


SPOILT = {
    "cut": lambda file, rng: os.truncate(file, rng.randrange(file.stat().st_size)),
    "emptied": lambda file, rng: os.truncate(file, 0),
    "a bit": flip,
    "longer": lambda file, rng: file.write_bytes(file.read_bytes() + b" "),
    "zeros": lambda file, rng: file.write_bytes(bytes(file.stat().st_size)),
    "gone": lambda file, rng: file.unlink(),
    "a folder": become(Path.mkdir),
    "a pipe": become(os.mkfifo),  # opened, it would be waited for
    "a link": become(lambda file: file.symlink_to("/dev/zero")),  # read, it would have no end
}


@pytest.mark.parametrize("step", [None, 3])
def test_a_collective_that_fails_is_no_damage(written, monkeypatch, step):
    """Another process has died: nothing is said to be damaged, no older state is taken, nobody is told to delete it."""
    lost = ValueError("UNKNOWN: Gloo AllGather failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:32670")

    def fail(*_, **__):
        raise lost

    with Checkpoints(written) as checkpoints:
        monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
        with pytest.raises(ValueError, match="^UNKNOWN: Gloo") as caught:
            checkpoints.restore(state(), step)
        assert caught.value is lost
    monkeypatch.setattr(jlora, "load", fail)
    with pytest.raises(ValueError, match="^UNKNOWN: Gloo") as caught:
        loaded(written, {})
    assert caught.value is lost


# -- damage ------------------------------------------------------------------------------------------------------------


def test_every_file_of_a_checkpoint_is_watched(written, caplog):
    """Every file is damaged in every way, three of its bits among them: loading never gives a state, always one error of one line."""
    seen = 0
    with Checkpoints(written) as checkpoints:
        for file in files(written / "12"):
            content, name = file.read_bytes(), file.relative_to(written / "12").as_posix()
            for kind, seed in [(kind, 0) for kind in SPOILT] + [("a bit", 1), ("a bit", 2)]:
                SPOILT[kind](file, random.Random(f"{name} {kind} {seed}"))
                with pytest.raises(DamagedCheckpoint) as caught:
                    checkpoints.restore(state())
                text = str(caught.value)
                assert re.fullmatch(
                    rf"the checkpoint of step 12 in '{written}' is damaged: '{name}' (is|has) [^\n]*; "
                    r"restore\(state, step=3\) takes the one before it",
                    text,
                ), (kind, text)
                assert (caught.value.step, caught.value.before) == (12, 3)
                seen += 1
                shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
                file.write_bytes(content)
        checkpoints._kept.damaged.clear()
        assert int(checkpoints.restore(state())[0].step) == 12  # all is as it was
    names = {file.relative_to(written / "12").parts[0] for file in files(written / "12")}
    assert seen > 100 and names == {"_CHECKPOINT_METADATA", "seal.json", "state", "record"}
    assert any("ocdbt" in str(file) for file in files(written / "12")) and caplog.records == []


@pytest.mark.parametrize("kind", ["cut", "a bit", "gone"])
@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "seal.json", "record/metadata", "state/manifest.ocdbt"])
def test_a_spoilt_folder_is_opened_without_a_sound(name, kind, folder, caplog, capfd):
    SPOILT[kind](folder / "12" / name, random.Random(0))
    with caplog.at_level(logging.INFO, "absl"), Checkpoints(folder) as checkpoints:
        assert checkpoints.latest == 12
        with pytest.raises(ValueError, match=f"the checkpoint of step 12 in '{folder}' is damaged: '{name}' "):
            checkpoints.restore(state())
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert capfd.readouterr() == ("", "")


def test_the_step_before_is_whole_or_there_is_none(folder):
    with Checkpoints(folder) as checkpoints:
        SPOILT["cut"](folder / "12" / "record" / "metadata", random.Random(0))
        got, position = checkpoints.restore(state(), step=3)
        assert position == 3
        chex.assert_trees_all_equal(got.adapted.factors, state(3).adapted.factors)
        SPOILT["gone"](folder / "3" / "seal.json", random.Random(0))
        for step in (None, 12, 3):
            with pytest.raises(DamagedCheckpoint, match="; there is none before it that is whole$") as caught:
                checkpoints.restore(state(), step=step)
            assert caught.value.before is None


def test_a_damaged_checkpoint_is_replaced(folder):
    """A run that goes on from an earlier step replaces the damaged checkpoint when it comes to that step again, or before it."""
    for step in (12, 7):
        with Checkpoints(folder) as checkpoints:
            SPOILT["a bit"](files(folder / str(checkpoints.latest))[0], random.Random(0))
            with pytest.raises(DamagedCheckpoint, match=f"of step 12 .*; {re.escape('restore(state, step=3)')}"):
                checkpoints.restore(state())
            checkpoints.save(state(step), step)
            checkpoints.wait()
            assert checkpoints.latest == step and checkpoints.restore(state())[1] == step
            assert sorted(path.name for path in folder.iterdir()) == [".lock", *sorted(["3", str(step)])]


@pytest.mark.parametrize(
    "text",
    ["[]", "null", "{}", '{"files": 1}', '{"files": {"a": [1, 2, 3]}}', "[" * 100_000, '{"files": {"a": [1, ""]}}'],
)
def test_a_list_of_files_that_is_none(text, folder):
    (folder / "12" / "seal.json").write_text(text)
    with Checkpoints(folder) as checkpoints, pytest.raises(DamagedCheckpoint, match="'seal.json' is not what was"):
        checkpoints.restore(state())


def test_what_was_said_to_be_before_can_be_gone_on_from_at_once(folder):
    """The step that the error names is restored by another process, and by one that goes back on its own."""
    SPOILT["a bit"](folder / "12" / "record" / "metadata", random.Random(0))
    with Checkpoints(folder) as checkpoints:
        checkpoints.restore(state(), step=3)
        checkpoints.save(state(7), 7)
        checkpoints.wait()
        assert checkpoints.latest == 7
        checkpoints.restore(state(), step=3)
        with pytest.raises(ValueError, match="of step 7, which") as caught:
            checkpoints.save(state(5))
        assert str(caught.value) == (
            f"'{folder}' holds a checkpoint of step 7, which would still be the newest after this one of step 5: keep this "
            "run in another folder, or delete the later ones"
        )
        with pytest.raises(ValueError, match="holds a checkpoint of step 7 already"):
            checkpoints.save(state(7))
        assert checkpoints.restore(state())[1] == 7


def test_only_files_inside_are_opened(tmp_path):
    (tmp_path / "step").mkdir()
    (tmp_path / "outside").write_text("x")
    for name in ("../outside", str(tmp_path / "outside"), "a/../../outside"):
        (tmp_path / "step" / "seal.json").write_text(seal._text({name: [1, seal._digest(tmp_path / "outside")]}))
        assert seal.damage(tmp_path / "step") == "'seal.json' is not what was written"


def test_checkpoints_of_before_the_list_are_read(folder):
    """Checkpoints of earlier versions have neither the list of files nor the nodes of the optimizer's state."""
    record = folder / "12" / "record" / "metadata"
    content = json.loads(record.read_text())
    del content["sealed"], content["key"]
    content["optimizer"] = str(jax.tree.structure(state().opt_state))
    record.write_text(json.dumps(content))
    (folder / "12" / "seal.json").unlink()
    with Checkpoints(folder) as checkpoints:
        got, position = checkpoints.restore(state())
        chex.assert_trees_all_equal(got, state(12))
        assert position == 12
        with pytest.raises(ValueError, match="was written with another optimizer, and by a version of jlora that did"):
            checkpoints.restore(jlora.TrainState.create(ADAPTED, optax.sgd(0.1)))
        record.write_text("{")
        with pytest.raises(DamagedCheckpoint, match="of step 12 .* is damaged: 'record/metadata' is no JSON; "):
            checkpoints.restore(state())


UNSEALED = {
    "no record": lambda step: (step / "record" / "metadata").unlink(),
    "an empty record": lambda step: (step / "record" / "metadata").write_text("{}"),
    "another record": lambda step: change(step, optimizer=[1]),
    "another adapter": lambda step: change(step, adapter={}),
    "another key": lambda step: change(step, key=[3]),
    "a deep record": lambda step: (step / "record" / "metadata").write_text("[" * 100_000),
    "a record that is a pipe": lambda step: become(os.mkfifo)(step / "record" / "metadata", None),
    "no state": lambda step: shutil.rmtree(step / "state"),
    "a cut state": lambda step: [os.truncate(file, 3) for file in files(step / "state")],
    "a state without a file": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "metadata of Orbax that is a pipe": lambda step: become(os.mkfifo)(step / "_CHECKPOINT_METADATA", None),
    "metadata of Orbax without an end": lambda step: os.truncate(step / "_CHECKPOINT_METADATA", 2**40),
    "nothing": lambda step: (shutil.rmtree(step), step.mkdir()),
}


def change(step: Path, **values) -> None:
    record = step / "record" / "metadata"
    content = json.loads(record.read_text()) | values
    record.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.mark.parametrize("name", UNSEALED)
def test_without_the_list_damage_is_an_error_of_the_same_kind(name, folder):
    """Nothing hangs, also not in the constructor, and a run goes back to the step before."""
    for step in (3, 12):
        (folder / str(step) / "seal.json").unlink()
        change(folder / str(step), sealed=None)
    UNSEALED[name](folder / "12")
    printed = []
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(DamagedCheckpoint) as caught:
            checkpoints.restore(state())
        assert re.fullmatch(
            rf"the checkpoint of step 12 in '{folder}' is damaged: [^\n]*; restore\(.*=3\) .*", str(caught.value)
        )
        assert restored(checkpoints, state(), printed.append)[1] == 3 and len(printed) == 1
    gc.collect()  # what Orbax leaves behind is reported here


@pytest.mark.parametrize("kind", ["a pipe", "a link", "a folder", "deep"])
@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "seal.json", "record/metadata", "state/_METADATA"])
def test_a_folder_is_opened_whatever_lies_in_it(name, kind, folder):
    file = folder / "12" / name
    if kind == "deep":
        file.write_text("[" * 100_000)
    else:
        SPOILT[kind](file, random.Random(0))
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest == 12
        with pytest.raises(DamagedCheckpoint, match=f"of step 12 in '{folder}' is damaged: '{name}' (is|has) "):
            checkpoints.restore(state())
        assert checkpoints.restore(state(), step=3)[1] == 3
        checkpoints.save(state(12), 12)
        assert checkpoints.restore(state())[1] == 12


def test_what_is_not_a_checkpoint_stays(folder):
    """A folder that is no checkpoint is left alone; in the place of the newest checkpoint it is an error, below that it is ignored."""
    for name in ("02", "\u00b2", "1\u0663", "0", "notes"):
        (folder / name).mkdir()
        (folder / name / "notes.txt").write_text("mine")
    with Checkpoints(folder, keep=1) as checkpoints:
        assert checkpoints.latest == 12
        with pytest.raises(
            DamagedCheckpoint, match="'record/metadata' is missing; there is none before it that is whole$"
        ):
            checkpoints.restore(state(), step=0)
        checkpoints.save(state(13), 13)
        checkpoints.wait()
        (folder / "2024").mkdir()
        (folder / "2024" / "notes.txt").write_text("mine")
        with pytest.raises(DamagedCheckpoint, match=r"of step 2024 .*; restore\(state, step=13\) takes"):
            checkpoints.restore(state())
        with pytest.raises(ValueError, match="is no checkpoint of jlora") as caught:
            checkpoints.save(state(14))
        assert str(caught.value) == (
            f"'{folder / '2024'}' is no checkpoint of jlora, and has the name of one that is not older than this one of "
            "step 14: move it to another place, or keep this run in another folder"
        )
        shutil.rmtree(folder / "2024")
        for make in (Path.touch, os.mkfifo, lambda place: place.symlink_to(folder / "13")):
            make(folder / "15")
            with pytest.raises(ValueError, match="(15' is no checkpoint of jlora, and has)|(of step 15 already)"):
                checkpoints.save(state(15))
            (folder / "15").unlink()
        assert checkpoints.restore(state())[1] == 13
    assert len(list(folder.glob("*/notes.txt"))) == 5


# -- --resume ----------------------------------------------------------------------------------------------------------


def test_resume_takes_the_step_before_with_a_warning(folder):
    printed = []
    with Checkpoints(folder) as checkpoints:
        assert restored(checkpoints, state(), printed.append)[1] == 12 and printed == []
        file = folder / "12" / "state" / "_METADATA"
        SPOILT["gone"](file, random.Random(0))
        got, position = restored(checkpoints, state(), printed.append)
        assert (int(got.step), position) == (3, 3)
        assert printed == [
            f"warning: the checkpoint of step 12 in '{folder}' is damaged: 'state/_METADATA' is missing; going on from "
            "step 3"
        ]
        SPOILT["cut"](folder / "3" / "state" / "_METADATA", random.Random(0))
        with pytest.raises(ConfigError) as caught:
            restored(checkpoints, state(), printed.append)
    assert str(caught.value) == (
        f"the checkpoint of step 12 in '{folder}' is damaged: 'state/_METADATA' is missing; there is none before it that "
        "is whole. Delete that folder to begin this run anew"
    )


def test_there_may_be_nothing_to_go_on_from(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        start = state()
        assert restored(checkpoints, start, print) == (start, None)


# -- one user ----------------------------------------------------------------------------------------------------------


def test_two_on_one_folder(tmp_path):
    with Checkpoints(tmp_path / "a") as checkpoints:
        with pytest.raises(ValueError, match="is in use") as caught:
            Checkpoints(tmp_path / "a")
        assert str(caught.value) == (
            f"'{tmp_path}/a' is in use by this process ({os.getpid()}): two that write there would spoil each other's files. "
            "Wait for the other one, close it, or choose another folder"
        )
        checkpoints.save(state(1))  # the first is as it was
        Checkpoints(tmp_path / "b").close()
    assert not (tmp_path / "a" / ".lock").exists()
    with Checkpoints(tmp_path / "a") as checkpoints:
        assert checkpoints.latest == 1


HOLDS = """
import sys
from pathlib import Path
from jlora.checkpoint.lock import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_ends_with_its_process(tmp_path):
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"'{tmp_path}' is in use by process {other.pid} on "):
            Checkpoints(tmp_path)
        other.send_signal(signal.SIGKILL)
        other.wait(timeout=60)
    assert (tmp_path / ".lock").exists()  # a killed one leaves it behind
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest is None
    assert list(tmp_path.iterdir()) == []


def test_a_lock_ends_with_its_object(tmp_path):
    Lock(tmp_path)  # nobody keeps it
    with Lock(tmp_path) as lock:
        lock.close()
        with Lock(tmp_path):
            lock.close()  # is not the second one's
            with pytest.raises(ValueError, match="is in use by this process"):
                Lock(tmp_path)


def test_a_lock_that_was_removed_while_it_was_opened_is_none(tmp_path, monkeypatch):
    """The lock's last holder removed the file between our opening and our locking it: that lock keeps nobody out."""
    calls, opened = [], os.open

    def late(path, *arguments):
        descriptor = opened(path, *arguments)
        calls.append(path)
        if len(calls) == 1:
            Path(path).unlink()
        return descriptor

    monkeypatch.setattr("os.open", late)
    with Lock(tmp_path):
        assert len(calls) == 2 and (tmp_path / ".lock").exists()
        with pytest.raises(ValueError, match="is in use by this process"):
            Lock(tmp_path)


def test_a_constructor_that_fails_lets_go(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("jlora.checkpoint.on_disk._Manager", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Checkpoints(tmp_path)
    Checkpoints(tmp_path).close()


def test_what_cannot_be_locked_is_said(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(RuntimeWarning, match=f"^'{tmp_path}' cannot be locked \\(No locks available\\): see to it that"):
        Checkpoints(tmp_path).close()


def test_addresses_are_refused(tmp_path):
    for address in ("az://bucket/run", Path("gs://bucket/run")):
        with pytest.raises(ValueError, match="is no local folder: jlora reads and writes local folders and file:// "):
            Checkpoints(address)
    with Checkpoints((tmp_path / "my run").as_uri()) as checkpoints:
        checkpoints.save(state(2))
    with Checkpoints(tmp_path / "my run") as checkpoints:
        assert checkpoints.latest == 2
    assert not Path("gs:").exists()
