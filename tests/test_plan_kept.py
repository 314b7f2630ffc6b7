"""Compiled programs that are kept: nothing is compiled twice, and what differs is not taken for the same."""

import gzip
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, SingleDeviceSharding

from jlora.cli import plan as command_plan
from jlora.planning import DEVICES, compiled
from tests.test_plan import BATCH, IN, TX, adapt, loss_fn, mlp, on_cpu, plain, shape


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Counts them."""
    seen: list[Any] = []
    plain()  # what it has is not counted
    make = compiled._compile
    monkeypatch.setattr(compiled, "_compile", lambda *args: (seen.append(args), make(*args))[1])
    return seen


def test_a_program_that_is_kept_is_not_compiled_again(tmp_path: Path, compilations: list[Any]):
    plans = lambda batch=BATCH: on_cpu(loss_fn, adapt(mlp()), TX, batch, cache=tmp_path / "new")
    assert plans() == plans() == plain() and len(compilations) == 1
    (file,) = (tmp_path / "new").iterdir()
    plans({"x": shape(32, IN, dtype=jnp.bfloat16)})
    assert len(compilations) == 2
    for damage in (b"", b"no gzip", gzip.compress(b"[]"), file.read_bytes()[:99]):
        file.write_bytes(damage)
        assert plans() == plain()
    assert len(compilations) == 6 and plans() == plain() and len(compilations) == 6


def test_a_refusal_is_kept_too(tmp_path: Path):
    refusal, file = compiled.Outcome("", None, 99, ["too large"]), tmp_path / "x"
    compiled._keep(file, refusal)
    assert compiled._kept(file) == refusal and compiled._kept(tmp_path / "y") is None


class Lowered:
    """A program by its text alone."""

    def __init__(self, text: str) -> None:
        self.as_text = lambda: text


def test_the_name_is_that_of_the_program_and_of_its_devices(monkeypatch: pytest.MonkeyPatch):
    one, other = jax.devices("cpu")[:2]
    place = SingleDeviceSharding(one)
    name = lambda text="f", device="cpu", place=place: compiled._name(Lowered(text), DEVICES[device], place)
    plain = name()
    mesh, turned = Mesh([one, other], ("x",)), Mesh([other, one], ("x",))
    names = {plain, name("g"), name(device="h100"), name(place=mesh), name(place=turned)}
    monkeypatch.setenv("XLA_FLAGS", "--of_another_run")
    assert len({*names, name()}) == 6
    monkeypatch.undo()
    call = '%2 = stablehlo.custom_call @CustomSPMDPartitioning(%0, %1) {{api_version = 2 : i32, backend_config = "{}"}}'
    assert name(call.format(140532675347520)) == name(call.format(140390717424704)) != plain  # an address
    assert name(call.format("a")) != name(call.format("b"))
    monkeypatch.setattr(compiled, "_versions", lambda: ["jax 99"])
    assert name() != plain


def test_where_the_command_keeps_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    of = command_plan._folder
    assert of(None, "v5e-16") == compiled.folder() == tmp_path / "jlora" / "plans"
    assert (of(None, "cpu"), of("off", "v5e"), of("here", "cpu")) == (None, None, Path("here"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compiled.folder() == Path.home() / ".cache" / "jlora" / "plans"
