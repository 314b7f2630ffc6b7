"""Layouts that are tried: which meshes, what cannot be and why, what is recommended."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jlora.cli import workload
from jlora.planning import DEVICES, Layouts, Roofline, layouts, planned, trials
from jlora.planning.devices import Speed
from jlora.planning.trials import Trial, meshes
from tests.test_plan import plain
from tests.test_plan_command import command as command
from tests.test_plan_command import gpt2

pytestmark = pytest.mark.once

MESHES = {
    ("h100", 8): [{"data": 8}, {"fsdp": 8}, {"fsdp": 4, "tp": 2}, {"fsdp": 2, "tp": 4}, {"tp": 8}],
    ("h100", 64): [{"data": 64}, {"fsdp": 64}, {"data": 8, "fsdp": 8}, {"fsdp": 16, "tp": 4}, {"fsdp": 8, "tp": 8}],
    ("v5e", 4): [{"data": 4}, {"fsdp": 4}, {"fsdp": 2, "tp": 2}, {"tp": 4}],
    ("v5e", 256): [{"data": 256}, {"fsdp": 256}, {"fsdp": 64, "tp": 4}, {"fsdp": 32, "tp": 8}, {"fsdp": 16, "tp": 16}],
    ("v5p", 12): [{"data": 12}, {"fsdp": 12}, {"fsdp": 6, "tp": 2}, {"fsdp": 3, "tp": 4}],
}


@pytest.mark.parametrize(("name", "count"), MESHES)
def test_the_meshes_that_are_tried(name: str, count: int):
    assert meshes(count, DEVICES[name]) == MESHES[name, count]


def test_of_several_slices_only_rows_go_over_the_network_and_all_weights_in_one():
    found = meshes(512, DEVICES["v5e"], slices=2)
    assert found[:2] == [{"dcn": 2, "data": 256}, {"dcn": 2, "fsdp": 256}] and found[-1] == {"fsdp": 512}
    assert [mesh.get("dcn") for mesh in found] == [2] * 5 + [None]


ROWS = "'batch/inputs' has shape (4, 8), and its axis 0 of 4 is not a multiple of 8, the devices of {}: the nearest that fits is 4"
REASONS = [
    ({"data": 8}, ROWS.format("data")), ({"fsdp": 8}, ROWS.format("fsdp")), ({"fsdp": 4, "tp": 2}, ""),
    ({"fsdp": 2, "tp": 4}, "tp=4 does not divide 2 heads"), ({"tp": 8}, "tp=8 does not divide 2 heads"),
]  # fmt: skip


def step(folder: Path) -> workload.Workload:
    """GPT-2 of two layers and two heads, four rows."""
    return workload.of_model(gpt2(folder), "lora(2)", "4x8")


def found_on(step: workload.Workload, device: str = "cpu-8", **options: Any) -> Layouts:
    return layouts(step.loss, step.adapted, step.tx, step.batch, device, heads=step.heads, **options)


@pytest.mark.loose_promotion
def test_a_layout_that_cannot_be_is_a_row_with_its_reason(tmp_path: Path):
    seen: list[Trial] = []
    found = found_on(step(tmp_path), progress=seen.append)
    assert [(dict(one.mesh), one.reason) for one in found.trials] == REASONS and tuple(seen) == found.trials
    assert (
        found.best is found.trials[2] and found.best.plan is not None and found.best.plan.mesh == {"fsdp": 4, "tp": 2}
    )
    lines = str(found).splitlines()
    assert lines[0] == "Layouts of 8 cpu; per device and step:" and lines[1].split()[:4] == [
        "mesh",
        "peak",
        "fits",
        "TFLOP",
    ]
    assert lines[2] == f"  data=8       {REASONS[0][1]}"
    assert lines[4].split()[:2] == ["fsdp=4", "tp=2"] and " yes " in lines[4] and "?" in lines[4]
    assert lines[-1] == "Take --mesh fsdp=4,tp=2: of those that fit it receives least; no speeds of cpu are known here."
    told = json.loads(json.dumps(found.as_dict()))
    assert told["recommended"] == {"fsdp": 4, "tp": 2} and told["layouts"][3]["reason"] == REASONS[3][1]
    assert told["layouts"][2]["plan"]["compiled_in"] > 0 and told["layouts"][0]["plan"] is None


def test_heads_are_those_of_queries_and_of_keys():
    called: list[Any] = []
    found = trials._trial({"fsdp": 16, "tp": 16}, (64, 8), called.append)  # Llama 2 70B
    assert (found.reason, called) == ("tp=16 does not divide 8 heads", [])


@pytest.mark.loose_promotion
def test_none_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tried = [{"fsdp": 4, "tp": 2}]
    of = step(tmp_path)
    monkeypatch.setattr(planned, "_memory_here", lambda: 8 * 100)
    found = found_on(of, tried=tried)
    assert found.best is None and found.trials[0].plan is None
    held = found.trials[0].reason.removeprefix("weights, factors and optimizer state alone are ")
    assert held.endswith(", and the memory is 100 B")
    assert str(found).splitlines()[-1] == "None of them fits 8 cpu: see each one's reason."
    monkeypatch.setattr(planned, "_memory_here", lambda: 8 * 30_000)  # the arguments, and not the rest
    found = found_on(of, tried=tried)
    plan = found.trials[0].plan
    assert plan is not None and not plan.fits and found.best is None and " no " in str(found)
    assert (
        f"None of them fits 8 cpu: fsdp=4,tp=2 comes nearest, {(plan.peak - 30_000) / 1024:.3g} KiB too much a device."
        in str(found)
    )
    assert all(f"- {sentence}" in str(found).splitlines() for sentence in plan.advice)


def trial(name: str, seconds: float, *, fits: bool = True, compute: float = 1.0) -> Trial:
    best = Roofline(compute, 0.5, seconds, 0.0)
    found = dataclasses.replace(plain(), roofline=best, limit=10**9 if fits else 1)
    return Trial({name: 8}, found)


def test_the_fastest_that_fits_is_recommended():
    slow, fast, large = trial("slow", 3.0), trial("fast", 2.0), trial("large", 1.0, fits=False)
    assert Layouts("v5e", 8, (slow, fast, large, Trial({"odd": 8}, None, "no"))).best is fast
    even, less = trial("even", 0.9), trial("less", 0.2)  # both limited by what they compute
    assert Layouts("v5e", 8, (even, less)).best is less
    assert str(Layouts("v5e", 8, (slow, fast))).endswith(
        "Take --mesh fast=8: of those that fit it is the fastest at best, limited by ici."
    )


@pytest.mark.loose_promotion
def test_the_command_tries_layouts(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    speed = Speed(flops=1e9, memory=1e9, link=1e6, dcn=1e5, node=4)
    monkeypatch.setitem(DEVICES, "cpu", dataclasses.replace(DEVICES["cpu"], speed=speed))
    model = (gpt2(tmp_path), "--method", "lora(2)", "--batch", "4x8", "--device", "cpu-8")
    told = json.loads(command(*model, "--json"))
    assert (told["command"], told["device"], told["devices"], told["recommended"]) == (
        "plan",
        "cpu",
        8,
        {"fsdp": 4, "tp": 2},
    )
    assert (
        told["batch_shapes"] == {"inputs": [4, 8]} and len(told["layouts"]) == 5
    )  # data 2 x fsdp 4, and no tp 8 over two nodes
    best = next(one["plan"] for one in told["layouts"] if one["plan"])
    assert best["roofline"]["limiting"] in ("ici", "dcn")
    one = json.loads(command(*model, "--mesh", "fsdp=4,tp=2", "--json"))
    same = {name: value for name, value in one.items() if name in best and name != "compiled_in"}
    assert same == {name: best[name] for name in same}  # the same layout, MODELS, as when it was tried


@pytest.mark.loose_promotion
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--mesh", "fsdp=8"), ROWS.format("fsdp")),
        (("--mesh", "rows=4"), "the mesh has the axis 'rows', and the layout knows 'dcn', 'data', 'fsdp', 'sequence', 'tp': rename it, or name it in the layout's rules or its batch="),
    ],
)  # fmt: skip
def test_a_mesh_that_cannot_be(command: Any, tmp_path: Path, arguments: tuple[str, ...], text: str):
    assert command(gpt2(tmp_path), "--method", "lora(2)", "--batch", "4x8", *arguments, status=2) == text


@pytest.mark.loose_promotion
def test_layouts_are_of_several_devices(tmp_path: Path):
    with pytest.raises(
        ValueError,
        match=r"^layouts are of several devices, as in 'v5e-16', 'v5e:4x4' or '8xh100'; device='v5e' is one$",
    ):
        found_on(step(tmp_path), device="v5e")
