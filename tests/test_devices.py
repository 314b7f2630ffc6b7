"""The devices of a run and its processes, as far as one process shows them; batches read ahead; a SIGTERM held back."""

import re
import signal
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from experiments import devices, hosts, loop, train
from experiments.ahead import Ahead
from experiments.configfile import ConfigError
from experiments.launch.exits import Preempted, has_come, held_back, preemptible
from experiments.loop import _Position
from jlora.models.gpt2 import GPT2, GPT2Config
from tests import pod

# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "shape"),
    [
        (None, None), ({"fsdp": 4, "tp": 2}, {"fsdp": 4, "tp": 2}), ("fsdp=4, tp=2", {"fsdp": 4, "tp": 2}),
        ("data=2,fsdp=-1", {"data": 2, "fsdp": 4}), ({"fsdp": -1}, {"fsdp": 8}), ("tp=1", {"tp": 1}),
    ],
)  # fmt: skip
def test_a_mesh_by_its_axes(mesh, shape):
    found = devices.of(mesh)
    assert (found.mesh and dict(found.mesh.shape)) == shape


@pytest.mark.parametrize(
    ("mesh", "error"),
    [
        ({"model": 2}, "mesh: there is no axis 'model'; the axes are dcn, data, fsdp, sequence, tp"),
        ({"fsdp": 0}, "mesh.fsdp is a number of devices, or -1 for all that are left; got 0"),
        ({"fsdp": -1, "tp": -1}, "mesh: fsdp and tp cannot both have all devices that are left"),
        ({"fsdp": 16}, "mesh={'fsdp': 16} has 16 devices, and there are 8"),
        ({"fsdp": 16, "tp": -1}, "mesh={'fsdp': 16, 'tp': -1} has 16 devices at least, and there are 8"),
        ("fsdp:8", "mesh is name=size, several with commas: mesh=fsdp=8,tp=2; got 'fsdp:8'"),
        ("=8", "mesh is name=size, several with commas: mesh=fsdp=8,tp=2; got '=8'"),
    ],
)
def test_a_mesh_that_cannot_be(mesh, error):
    with pytest.raises(ConfigError, match=f"^{re.escape(error)}$"):
        devices.of(mesh)


def test_rows_are_dealt_out_where_they_can_be_and_results_come_back_whole():
    here = devices.of("fsdp=4,tp=2")
    assert (here.parts, here.fitting(6), here.fitting(8), str(here)) == (4, 8, 8, "8 devices: fsdp 4, tp 2")
    assert devices.of("tp=2,sequence=4").parts == 1 and devices.of("data=2,fsdp=2").parts == 4
    batch = {"x": np.arange(16).reshape(8, 2), "odd": np.arange(3), "of": np.float32(2)}
    put = here.put(batch)
    assert put["x"].sharding.spec == PartitionSpec("fsdp")
    assert put["odd"].sharding.is_fully_replicated and put["of"].sharding.is_fully_replicated
    fetched = here.fetched(put)
    for name, value in batch.items():
        assert isinstance(fetched[name], np.ndarray | np.generic)
        np.testing.assert_array_equal(fetched[name], value)
    model = GPT2(GPT2Config(vocab_size=8, context=8, width=16, layers=1, heads=2))
    params = here.placed(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    kernel = params["h_0"]["mlp"]["fc"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec("fsdp", "tp")
    factors = here.beside({"kernel": kernel, "A": jnp.ones(3), "name": "x"})
    assert factors["kernel"] is kernel and factors["name"] == "x" and factors["A"].sharding.mesh == here.mesh


def test_one_device_changes_nothing():
    here = devices.current()
    assert (here.mesh, here.parts, here.fitting(7), here.loading, str(here)) == (None, 1, 7, {}, "one device")
    batch = {"x": np.arange(4)}
    assert here.placed(batch) is batch and here.beside(batch) is batch
    assert here.put(batch)["x"].devices() == {jax.devices()[0]}
    with devices.used(devices.of("fsdp=2")) as inside:
        assert devices.current() is inside
    assert devices.current() is here


def test_accelerators_that_are_left_idle_are_spoken_of(monkeypatch):
    assert devices.unused() == ""  # eight devices of the CPU, which are one
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert devices.unused() == "1 of 8: mesh=fsdp=-1 uses all of them"
    with devices.used(devices.of("fsdp=2")):
        assert devices.unused() == ""


def test_a_batch_that_the_devices_do_not_divide(tmp_path, capsys):
    code = train.main([pod.__file__, "--small", "--folder", str(tmp_path / "run"), "mesh=data=4,tp=2"])
    assert (code, capsys.readouterr().err) == (
        2,
        "error: train.batch=4 in 2 micro-batches is not a multiple of 4, the devices that its rows are dealt out to "
        "(mesh: 8 devices: data 4, tp 2): take a multiple of 8, or more devices along tp\n",
    )
    code = train.main([pod.__file__, "--small", "--folder", str(tmp_path / "run"), "mesh=fsdp=2", "base.train.batch=2"])
    assert code == 2 and capsys.readouterr().err.startswith("error: base.train.batch=2 in 2 micro-batches is not a ")
    assert not (tmp_path / "run").exists()


def test_the_tokens_of_pictures_are_not_split():
    rows = lambda *shape: SimpleNamespace(new=SimpleNamespace(batches=lambda batch, seed: lambda step: np.zeros(shape)))
    experiment = pod.config()
    with devices.used(devices.of("data=2,sequence=2")):
        train._check_devices(experiment, rows(4, 6))
        error = "^mesh: sequence is for rows of tokens, and the rows of this task are pictures: leave it out$"
        with pytest.raises(ConfigError, match=error):
            train._check_devices(experiment, rows(4, 8, 8, 3))
    with devices.used(devices.of("data=2")):
        train._check_devices(experiment, rows(4, 8, 8, 3))


def test_one_of_several_processes_reads_its_rows_alone(monkeypatch):
    """As the second of two processes with two of four devices each would."""
    here = devices.of("fsdp=4")
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(devices.sharding, "row_numbers", lambda place, rows: np.arange(rows // 2, rows))
    batches = SimpleNamespace(rows_of=lambda step, numbers: {"x": 10 * step + numbers})
    assert list(here.own(batches, 4)(1)["x"]) == [12, 13]
    assert list(here.own(lambda step: {"x": np.arange(4) + step, "of": 1}, 4)(3)["x"]) == [5, 6]


# -- processes ---------------------------------------------------------------------------------------------------------


def test_one_process_is_the_first_and_asks_nobody():
    assert hosts.is_first() and not hosts.several() and not hosts.is_told_to_stop()
    assert hosts.said_by_first({"a": (1,)}) == {"a": (1,)}  # as it is, and not as JSON has it
    assert hosts.by_first(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        hosts.by_first(lambda: 1 // 0)
    hosts.wait_for_all("here"), hosts.check_same(config={})


def test_the_code_that_runs_has_a_hash():
    found = hosts.code()
    assert re.fullmatch("[0-9a-f]{16}", found["files"]) and found["jax"] == jax.__version__ and found == hosts.code()


# -- batches ahead -----------------------------------------------------------------------------------------------------


def test_batches_come_in_order_and_are_made_while_a_step_runs():
    made, second = [], threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if step == 4:
            second.set()
        return 10 * step

    with Ahead(make, 3, 8) as batches:
        assert second.wait(10) and made[:2] == [3, 4]  # nobody has asked yet
        assert (next(batches), batches.given) == (30, 4)
        assert list(batches) == [40, 50, 60, 70] and batches.given == 8
    assert made == [3, 4, 5, 6, 7]


def test_what_reading_raises_comes_out_and_the_thread_ends():
    def make(step: int) -> int:
        if step == 1:
            raise OSError("the disk is gone")
        return step

    before = threading.active_count()
    with pytest.raises(OSError, match="^the disk is gone$"), Ahead(make, 0, 5) as batches:
        list(batches)
    assert threading.active_count() == before


def test_a_slow_reader_is_spoken_of():
    def slow(step: int) -> int:
        time.sleep(0.05)
        return step

    with Ahead(slow, 0, 4, ahead=1) as batches:
        list(batches)
        assert batches.waited > 0.1
    assert _Position(seconds=10.0, waited=4.0).waiting == "  40 % of the time waiting for data"
    assert _Position(seconds=10.0, waited=0.4).waiting == _Position().waiting == ""


def test_a_position_comes_back_as_it_was():
    run = _Position(1.5, 70, [jnp.float32(0.1), np.float32(1 / 3)], 0.25)
    again = _Position.of(run.as_json())
    assert (again.seconds, again.tokens, again.waited) == (1.5, 70, 0.25)
    assert [x.dtype for x in again.losses] == [np.float32] * 2 and again.losses == [np.float32(0.1), np.float32(1 / 3)]
    assert _Position.of(None) == _Position() and _Position.of([2.0, 5]) == _Position(
        2.0, 5
    )  # as runs of before kept it


def test_losses_are_reported_late_and_all_of_them(monkeypatch):
    """As a step of the loop reports them: two steps late, and what is left at an evaluation."""
    said: list[tuple[int, float]] = []
    points = SimpleNamespace(training=lambda step, loss, run, phase: said.append((step, loss)))
    phase, run = SimpleNamespace(advance=lambda step: None), _Position()
    trainer = SimpleNamespace(
        step=lambda state, batch: (state, {"loss": np.float32(batch)}),
        is_evaluated=lambda step: step == 6,
        tokens=lambda batch: 1,
    )
    state = SimpleNamespace(check=lambda: None)
    with Ahead(lambda step: 10 * step, 0, 6) as batches:
        for i in range(6):
            before = len(said)
            loop._stepped(trainer, state, batches, run, i == 0, points, phase)
            assert len(said) - before == [1, 0, 0, 1, 1, 3][i]
    assert said == [(step, 10.0 * (step - 1)) for step in range(1, 7)]


# -- SIGTERM -----------------------------------------------------------------------------------------------------------


def test_a_sigterm_is_held_back_while_a_step_runs():
    with preemptible():
        with held_back(), held_back():
            signal.raise_signal(signal.SIGTERM)
            assert has_come() and hosts.is_told_to_stop()
    with preemptible():
        assert not has_come()
        with pytest.raises(Preempted):
            signal.raise_signal(signal.SIGTERM)
