"""Devices of `jlora.plan`: their names and memory, topologies, what is refused, the real compilers."""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from jax.sharding import PartitionSpec as P

from jlora.planning import DEVICES, Layouts, advice, placing, targets
from jlora.planning.devices import find
from tests.test_plan import BATCH, GIB, ROOT, TX, adapt, loss_fn, mlp, on_cpu


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h100", ("h100", None, "")), ("H100 80GB", ("h100", None, "")), ("NVIDIA H100 SXM5 80 GB", ("h100", None, "")),
        ("8xH100", ("h100", 8, "")), ("h100-8", ("h100", 8, "")), ("A100-40GB", ("a100-40gb", None, "")),
        ("NVIDIA A100-SXM4-80GB", ("a100", None, "")), ("RTX 4090", ("rtx4090", None, "")),
        ("GeForce RTX 4090", ("rtx4090", None, "")), ("RTX A6000", ("a6000", None, "")), ("Tesla V100", ("v100", None, "")),
        ("v5e", ("v5e", None, "")), ("v5e-16", ("v5e", 16, "")), ("v5litepod-16", ("v5e", 16, "")),
        ("TPU v5 lite", ("v5e", None, "")), ("v5e:4x4", ("v5e", None, "4x4")), ("v5p-128", ("v5p", 64, "")),
        ("v4-8", ("v4", 4, "")), ("7x", ("7x", None, "")), ("tpu7x-16", ("7x", 16, "")), ("trillium", ("v6e", None, "")),
        ("cpu", ("cpu", None, "")),
    ],
)  # fmt: skip
def test_names_of_devices(name: str, expected: tuple[str, int | None, str]):
    found = find(name)
    assert (found.device.name, found.number, found.topology) == expected and found.slices == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("2xv5e-16", ("v5e", 2, 32, "")), ("4 x v5p-128", ("v5p", 4, 256, "")), ("2xv5e:4x4", ("v5e", 2, 32, "4x4")),
        ("2x7x-16", ("7x", 2, 32, "")), ("2xtpu7x:2x2x1", ("7x", 2, 16, "2x2x1")), ("1xv6e-8", ("v6e", 1, 8, "")),
    ],
)  # fmt: skip
def test_names_of_slices(name: str, expected: tuple[str, int, int, str]):
    found = find(name)
    assert (found.device.name, found.slices, found.total, found.topology) == expected


def test_the_axis_over_slices_comes_first():
    for mesh in ({"fsdp": 16, "dcn": 2}, {"dcn": 4, "fsdp": 8}):
        with pytest.raises(
            ValueError, match="^the mesh's axis 'dcn' goes over the 2 slices: it comes first and has their "
        ):
            placing.places(find("2xv5e-16"), mesh)


def test_plans_and_layouts_say_in_how_many_slices_the_devices_are():
    assert str(Layouts("v5e", 512, (), 2)).startswith("Layouts of 512 v5e in 2 slices; per device and step:")
    assert Layouts("v5e", 512, (), 2).as_dict()["slices"] == 2
    found = dataclasses.replace(on_cpu(loss_fn, adapt(mlp()), TX, BATCH), devices=512, slices=2, peak=2**50)
    assert str(found).startswith("A training step on cpu (512 devices in 2 slices); per device:")
    assert "(mesh={'dcn': 2, 'fsdp': " in advice._on_devices(found)[0]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("h1000", "h100"),
        ("v5ee-16", "v5e"),
        ("a600", "a6000"),
        ("h100:4x4", "h100"),
        ("gpu", "cpu"),
        ("2x4xv5e-16", "v5e"),
        ("8xh100-96gb", "h100-nvl"),
        ("2xv5ee-16", "v5e"),
        ("0xv5e-16", "v5e"),
    ],
)
def test_an_unknown_device_has_a_nearest_one(name: str, near: str):
    with pytest.raises(ValueError, match=rf"^device='{name}' is unknown; the nearest is '{near}'. There are cpu, v4, "):
        on_cpu(loss_fn, adapt(mlp()), TX, BATCH, device=name)


@pytest.mark.parametrize(("name", "extra"), [("v5e", "plan"), ("h100", "plan-gpu")])
def test_a_compiler_that_is_not_there(name: str, extra: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=rf"^a plan for '{name}' is made by its own .*pip install \"jlora\[{extra}\]\""
    ):
        on_cpu(loss_fn, adapt(mlp()), TX, BATCH, device=name)


def test_a_device_of_the_table_is_compiled_for_the_cpu_where_no_compiler_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(targets, "has_compiler", lambda device: device.compiler == "cpu")
    found = on_cpu(loss_fn, adapt(mlp()), TX, BATCH, device="RTX A6000")
    assert (found.device, found.compiler, found.limit) == ("a6000", "cpu", int(47.5 * GIB))
    assert found.notes == (
        "compiled for the CPU, whose temporaries are others, and judged by a6000's memory: pip install "
        '"jlora[plan-gpu]" for the compiler of a100',
    )


def test_every_device_has_a_target_that_can_be_compiled_for():
    own = {name for name, device in DEVICES.items() if device.target == name}
    assert own == {"cpu", "v4", "v5e", "v5p", "v6e", "7x", "a100", "h100", "h200", "b200"}
    assert {device.target for device in DEVICES.values()} == own
    assert all(device.memory > 9 * GIB for name, device in DEVICES.items() if name != "cpu")


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("v5e", 1, "v5e:1x1"), ("v5e", 2, "v5e:1x2"), ("v5e", 8, "v5e:2x4"), ("v5e", 16, "v5e:4x4"),
        ("v6e", 256, "v6e:16x16"), ("v5p", 1, "v5p:1x1x1"), ("v5p", 4, "v5p:2x2x1"), ("v5p", 8, "v5p:2x2x2"),
        ("v4", 64, "v4:4x4x4"), ("v5p", 12, "v5p:2x2x3"), ("7x", 2, "tpu7x:1x1x1"), ("7x", 8, "tpu7x:2x2x1"),
    ],
)  # fmt: skip
def test_topologies(name: str, count: int, expected: str):
    found, options = targets._tpu(name, count, "")
    assert found == expected
    assert ("chips_per_host_bounds" in options) == (count * (0.5 if name == "7x" else 1) < 4)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no adapted": ({"adapted": {}}, TypeError, r"plan takes an Adapted, jlora.apply\(params, ...\), or a TrainState"),
    "pmap": ({"parallel": "pmap"}, ValueError, "a plan is made for parallel='jit': give it a mesh"),
    "mesh": ({"mesh": 8}, TypeError, r"mesh is a jax.sharding.Mesh, an AbstractMesh or a dict .* got 8"),
    "zero": ({"mesh": {"x": 0}}, TypeError, "mesh is a jax.sharding.Mesh"),
    "size": ({"mesh": {"x": 4}, "device": "cpu-8"}, ValueError, "the device's name says 8 devices, and mesh x=4 has 4"),
    "many": ({"mesh": {"x": 64}}, ValueError, "a plan for 64 CPU devices, and this process has 8: start it with XLA"),
    "divides": (
        {"mesh": {"x": 3}, "rule": lambda path, x: P("x") if path == "base/up" else None}, ValueError,
        r"'base/up' has shape \(16, 32\), and its axis 0 of 16 is not a multiple of 3, the devices of x: the nearest that fits is 2$",
    ),
    "axis": (
        {"mesh": {"x": 2}, "rule": lambda path, x: P("y")}, ValueError, r"base/\w+: .* names 'y', and the mesh has 'x'",
    ),
    "spec": (
        {"mesh": {"x": 2}, "rule": lambda path, x: P(None, None, None, "x") if path == "batch/x" else None}, ValueError,
        r"batch/x has shape \(64, 16\), and its spec .* has more axes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str):
    options, kind, text = REFUSED[name]
    adapted = options.get("adapted", adapt(mlp()))
    with pytest.raises(kind, match=f"^{text}"):
        on_cpu(loss_fn, adapted, TX, BATCH, **{key: value for key, value in options.items() if key != "adapted"})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("v5e-6", "no topology has 6 chips of v5e: whole hosts of 4 do, such as 8"),
        ("v5e:2x2x2", "v5e:2x2x2: a topology of v5e has 2 axes"),
    ],
)
def test_refused_topologies(name: str, text: str):
    wanted = find(name)
    with pytest.raises(ValueError, match=f"^{text}$"):
        targets._tpu(wanted.device.name, wanted.number or 1, wanted.topology)


# -- real compilers, each in a process of its own ----------------------------------------------------------------------

CHILD = """
import json, sys
import jax, jax.numpy as jnp, optax
import jlora
from jlora.models.sizes import model_of
module, inputs = model_of("gpt2", scan=True, remat=True, layers=2, width=64, heads=2, vocab_size=128, context=64,
                          dtype="bfloat16", param_dtype="bfloat16")
params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
def loss(params, tokens):
    logits = module.apply({"params": params}, tokens)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()
tokens = jax.ShapeDtypeStruct((8, 32), jnp.int32)
adapted = jlora.apply(params, rank=4, sites=jlora.sites(loss, params, tokens))
out = []
for device in sys.argv[1:]:
    out.append(jlora.plan(loss, adapted, optax.adamw(1e-3), tokens, device=device).as_dict())
print(json.dumps(out))
"""


def real(*names: str) -> list[dict[str, Any]]:
    if not targets.has_compiler(DEVICES[find(names[0]).device.target]):
        pytest.skip(f"the compiler of {names[0]} is not installed")
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment["PYTHONPATH"] = str(ROOT)  # as a person would: JAX looks for devices itself
    found = subprocess.run(
        [sys.executable, "-c", CHILD, *names], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def _check_real(one: dict[str, Any], many: dict[str, Any]) -> None:
    parts = ("weights", "factors", "optimizer_state", "batch")
    padding = one["arguments"] - sum(one[part] for part in parts)
    assert 0 <= padding <= 24 or (one["device"] == "v5e" and 0 <= padding < one["arguments"] / 2)  # tiles of 8 x 128
    assert one["fits"] and one["arguments"] < one["peak"] and one["collectives"] == {}
    assert (
        many["devices"] == 4
        and many["mesh"] == {"fsdp": 4}
        and many["flops"] == pytest.approx(one["flops"] / 4, rel=0.02)
    )
    assert many["weights"] < one["weights"] / 3 and many["factors"] == one["factors"]
    gathered = many["collectives"]["all-gather"]["bytes"]
    assert one["weights"] < gathered < 2.5 * one["weights"]  # forward, backward
    assert many["collectives"]["all-reduce"]["bytes"] <= one["factors"] + 1024


def test_h100():
    one, many = real("h100", "4xh100")
    _check_real(one, many)
    assert one["limit"] == 84942979072 and one["compiler"] == "h100" and one["notes"] == []


@pytest.mark.thorough("test_h100")
def test_other_gpus():
    table, *others = real("a6000", "h200", "b200")
    assert table["compiler"] == "a100" and table["limit"] == int(47.5 * GIB)
    assert table["notes"] == ["compiled for a100, whose compiler is nearest, and judged by a6000's memory"]
    assert all(one["fits"] and one["compiler"] == one["device"] for one in others)


@pytest.mark.thorough("test_h100")
def test_v5e():
    _check_real(*real("v5e", "v5e-4"))
