"""`experiments.train` in two real processes: the numbers of one, one report, and what comes of their ends."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import loop, train
from experiments.launch.exits import Preempted
from tests import pod
from tests.pod import EVERY, STEPS, Started

pytestmark = pytest.mark.once

FIRST = f"step {EVERY:5d}"


def curve(folder: Path) -> list[tuple[int, float, float]]:
    points = json.loads((folder / "lora" / "seed_0" / "curve.json").read_text())
    return [(point["step"], point["loss"] or 0.0, point["scores"]["loss"]) for point in points]


def factors(folder: Path) -> dict[str, np.ndarray]:
    (file,) = (folder / "lora" / "seed_0" / "adapter").glob("factors-*.safetensors")
    return load_file(file)


def check_alike(folder: Path, other: Path, tolerance: float) -> None:
    """The same losses, and the same factors to ten times as much; 0 is to the last bit.

    Sums over devices round otherwise, and 240 steps of Adam at 1e-2 carry that on in the factors: 2e-5 was seen.
    """
    here, there = curve(folder), curve(other)
    assert [point[0] for point in here] == [point[0] for point in there] == [0, 80, 160, 240]
    np.testing.assert_allclose(here, there, rtol=0, atol=tolerance)
    found, expected = factors(folder), factors(other)
    assert found.keys() == expected.keys() and len(found) == 12
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=10 * tolerance)


def saving(folder: Path) -> tuple[str, str]:
    """Overrides: files of other programs, beside the run."""
    return f"save.merged={folder.parent / 'merged'}", f"save.adapter={folder.parent / 'adapter'}"


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """A run of one process on one device."""
    folder = tmp_path_factory.mktemp("one") / "run"
    started = Started(folder, 1, *saving(folder))
    assert started.codes() == [0], started.said(0)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, Started]:
    """The same of two processes, one device each."""
    folder = tmp_path_factory.mktemp("two") / "run"
    started = Started(folder, 2, *saving(folder))
    assert started.codes() == [0, 0], started.said(0) + started.said(1)
    return folder, started


def test_two_processes_have_the_numbers_of_one_and_give_one_report(one, two):
    """Also in a mean over micro-batches, and in a running average of the factors."""
    folder, started = two
    check_alike(folder, one, 1e-5)
    assert "devices   2 processes, 2 devices: fsdp 2" in started.lines[0]
    assert sum("test bits per byte" in line for line in started.lines[0]) == 1
    assert [line for line in started.lines[1] if "Gloo" not in line] == []
    (events,) = (folder / "lora" / "seed_0" / "events").iterdir()
    assert events.stat().st_size > 0
    assert {path.name for path in folder.iterdir()} >= {"results.json", "results.md", "experiment.json"}
    assert not (folder / "lora" / "seed_0" / "training").exists()


def test_what_other_programs_read_is_gathered_and_written_once(one, two):
    for kind, file in (("merged", "model.safetensors"), ("adapter", "adapter_model.safetensors")):
        here, there = (load_file(folder.parent / kind / file) for folder in (two[0], one))
        assert here.keys() == there.keys() and len(here) >= 8
        for name, value in there.items():
            np.testing.assert_allclose(here[name], value, rtol=0, atol=1e-4)
    assert [line.split()[0] for line in two[1].lines[0] if str(two[0].parent) in line][-2:] == ["merged", "adapter"]


def test_sigterm_to_one_of_two_keeps_the_state_of_both_and_one_goes_on(one, tmp_path):
    """The run is stopped between two evaluations: no step is made twice, and their losses are not forgotten."""
    started = Started(tmp_path / "run", 2)
    started.wait_for(FIRST)
    started.send(signal.SIGTERM, to=1)
    assert started.codes() == [75, 75], started.said(0) + started.said(1)
    assert started.said(0).endswith("preempted; the same command with --resume continues")
    (state,) = sorted((tmp_path / "run" / "lora" / "seed_0" / "training").glob("[0-9]*"), key=lambda p: int(p.name))[
        -1:
    ]
    assert EVERY < int(state.name) < STEPS and int(state.name) % EVERY
    again = Started(tmp_path / "run", 1)
    assert again.codes() == [0], again.said(0)
    check_alike(tmp_path / "run", one, 1e-5)


@pytest.mark.loose_promotion  # of Optax
def test_sigterm_behind_an_evaluation_is_no_other_than_before_it(one, tmp_path, monkeypatch):
    """The curve is on disk, and the losses behind its point are not those of the next one."""
    add = loop._Points.add

    def preempted(points, step, *rest):
        add(points, step, *rest)
        if step == EVERY:
            raise Preempted

    command = [pod.__file__, "--small", "--folder", str(tmp_path / "run"), "--resume-if-there"]
    with monkeypatch.context() as patch:
        patch.setattr(loop._Points, "add", preempted)
        assert train.main(command) == 75
    assert train.main(command) == 0
    check_alike(tmp_path / "run", one, 1e-6)


@pytest.mark.thorough("test_sigterm_to_one_of_two_keeps_the_state_of_both_and_one_goes_on")
def test_sigterm_before_anything_is_trained_is_heard_after_the_first_step(tmp_path):
    """Both load the state that is kept, and have asked JAX's service nothing when the signal comes."""
    started = Started(tmp_path / "run", 2)
    started.wait_for(FIRST)
    started.send(signal.SIGTERM, to=0)
    assert started.codes() == [75, 75], started.said(0)
    again = Started(tmp_path / "run", 2)
    again.wait_for("devices   2 processes")
    again.send(signal.SIGTERM, to=1)
    assert again.codes() == [75, 75], again.said(0) + again.said(1)


def test_processes_that_disagree_all_end_and_say_in_what(tmp_path):
    check_disagreement(tmp_path, "train.batch=8", "config")


@pytest.mark.thorough("test_processes_that_disagree_all_end_and_say_in_what")
def test_processes_that_disagree_on_the_mesh(tmp_path):
    check_disagreement(tmp_path, "mesh=data=2", "mesh")


def check_disagreement(tmp_path: Path, other: str, what: str) -> None:
    started = Started(tmp_path / "run", 2, each=[(), (other,)])
    assert started.codes() == [2, 2], started.said(0) + started.said(1)
    for number in range(2):
        assert (
            f"error: the processes of this run are not the same: the {what} of process 1 differs from that of process 0. "
            "Start all of them with the same command, from the same commit, on the same data and versions"
        ) in started.lines[number]
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough("test_sigterm_to_one_of_two_keeps_the_state_of_both_and_one_goes_on")
def test_kill_9_of_one_ends_the_other_and_the_same_command_goes_on_bit_for_bit(two, tmp_path):
    started = Started(tmp_path / "run", 2)
    started.wait_for(FIRST)
    started.send(signal.SIGKILL, to=1)
    codes = started.codes(seconds=60)  # no hang
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, 75)
    assert "error: this process of several cannot go on" in started.said(0) or "another task died" in started.said(0)
    again = Started(tmp_path / "run", 2)
    assert again.codes() == [0, 0], again.said(0) + again.said(1)
    check_alike(tmp_path / "run", two[0], 0.0)
