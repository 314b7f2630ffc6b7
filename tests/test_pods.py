"""The table of pods: what is trained, the layout that is shown, lines and plot, and that nothing is planned twice."""

from typing import Any

import matplotlib.pyplot as plt
import pytest

import jlora
from experiments.bench import pods
from experiments.bench.pods import FULL, METHODS, MODELS, Case, key

GB = 10**9


def plan(mesh: dict[str, int], seconds: float = 1.0, **other: Any) -> dict[str, Any]:
    """A plan of 20 GB of 40, that computes for a second."""
    times = {"compute": 1.0, "memory": 0.5, "ici": seconds, "dcn": 0.1, "seconds": max(1.0, seconds)}
    sizes = {"weights": 8 * GB, "factors": 1 * GB, "optimizer_state": 2 * GB, "temporaries": 12 * GB, "unused": 0}
    return {
        "trained": 18_874_368, "mesh": mesh, "limit": 40 * GB, "peak": 20 * GB, "fits": True, "flops": 2e12, **sizes,
        "wire": 30 * GB, "dcn": 3 * GB, "roofline": {**times, "limiting": "compute" if seconds <= 1 else "ici"},
        "collectives": {}, "compiled_in": 9.0, **other,
    }  # fmt: skip


CASE = Case("gpt3-175b", "LoRA r=4", "64xh100")


@pytest.mark.loose_promotion  # Flax's own norms
@pytest.mark.parametrize(("method", "trained"), [("LoRA r=4", 18_874_368), ("LoRA r=8", 37_748_736)])
def test_gpt3_trains_what_the_paper_says(method: str, trained: int):
    step = Case("gpt3-175b", method, "v5e-256").step()
    assert jlora.count(step.adapted).trainable == trained == 96 * 2 * 2 * 12288 * int(method[-1])
    assert pods.TRAINED["gpt3-175b", method] == trained
    assert (step.batch.shape, step.heads) == ((256, 2048), (96,))


def test_the_steps_and_their_meshes():
    assert CASE.meshes()[1:3] == [{"fsdp": 64}, {"data": 8, "fsdp": 8}]
    assert Case("llama-2-7b", "LoRA", "v5p-64").meshes() == [{"fsdp": 32}, {"fsdp": 8, "tp": 4}]
    slices = Case("gpt3-175b", "LoRA r=4", "2xv5e-256")
    assert slices.many == 512 and slices.meshes() == [{"dcn": 2, "fsdp": 256}, {"dcn": 2, "fsdp": 64, "tp": 4}]
    assert set(METHODS) == set(MODELS) and all(FULL in methods for methods in METHODS.values())
    devices = [case.device for case, _ in pods.scaling()]
    assert len(devices) == 20 and devices[0] == "8xh100" and devices[-1] == "512xh100"
    assert all(case.many == pods.math.prod(mesh.values()) for case, mesh in pods.scaling())


def test_the_layout_that_is_shown_is_the_fastest_that_fits():
    meshes = CASE.meshes()
    found = {key(CASE, meshes[1]): plan(meshes[1], 3.0), key(CASE, meshes[2]): plan(meshes[2], 2.0)}
    found[key(CASE, meshes[0])] = {"trained": 1, "mesh": meshes[0], "reason": "too large", "fits": False}
    found[key(CASE, meshes[3])] = plan(meshes[3], 0.5, fits=False, peak=90 * GB)
    assert pods.best(found, CASE) == plan(meshes[2], 2.0)
    found[key(CASE, meshes[4])] = plan(meshes[4], 0.9)
    assert pods.best(found, CASE) == plan(meshes[4], 0.9)
    large = {name: {**one, "fits": False} for name, one in found.items()}
    assert pods.best(large, CASE) in (large[key(CASE, mesh)] for mesh in meshes[1:3])  # 20 GB, and not 90
    assert pods.best({}, CASE) is None


def test_lines_and_plot(tmp_path):
    mesh = {"fsdp": 64}
    found = {key(CASE, mesh): plan(mesh)}
    none = Case("gpt3-175b", FULL, "v5e-16")
    found[key(none, {"fsdp": 16})] = {"trained": 9, "mesh": {"fsdp": 16}, "reason": "too large", "fits": False}
    head, row, other = pods.table(found)
    assert len(head) == len(row) == len(other) == 17
    assert row == [
        "64xh100", "gpt3-175b", "LoRA r=4", "18,874,368", "fsdp 64", "8.0", "2.0", "**20.0**", "yes", "2", "30.0", "3.0",
        "1.00", "0.50", "1.00", "0.10", "compute",
    ]  # fmt: skip
    assert other[:5] == ["v5e-16", "gpt3-175b", FULL, "9", "none"]
    assert pods.layouts_of(found)[1:] == [
        ["64xh100", "gpt3-175b", "LoRA r=4", "fsdp 64", "**20.0**", "30.0", "3.0", "1.00", "compute"],
        ["v5e-16", "gpt3-175b", FULL, "fsdp 16", "does not divide", "", "", "", ""],
    ]
    refused = plan(mesh, fits=False, roofline=None, peak=90 * GB)
    assert pods.layouts_of({key(CASE, mesh): refused})[1][4:] == ["90.0", "", "", "", "refused"]
    for n in (8, 16):
        for method, mesh, wire in ((FULL, {"fsdp": n}, 40), ("LoRA", {"fsdp": n}, 30)):
            found[key(Case("llama-2-70b", method, f"{n}xh100"), mesh)] = plan(mesh, wire=wire * GB)
    found[key(Case("llama-2-70b", FULL, "8xh100"), {"fsdp": 8})] = {"reason": "too large", "fits": False}
    copies = {"data": 2, "fsdp": 8}
    found[key(Case("llama-2-70b", "LoRA", "16xh100"), copies)] = plan(copies, wire=28 * GB, dcn=GB)
    assert pods.scaled(found)[1:] == [
        ["8", "", "", "30.0", "3.0", "", "30.0", "3.0"],
        ["16", "40.0", "3.0", "30.0", "3.0", "0.75", "28.0", "1.0"],
    ]
    pods.draw(tmp_path / "pods.png", found)
    assert plt.imread(tmp_path / "pods.png").shape[0] > 300


def test_it_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch):
    compiled: list[Any] = []
    monkeypatch.setattr(Case, "tried", lambda case, mesh: compiled.append(mesh) or plan(mesh))
    found: dict[str, Any] = {}
    kept: list[int] = []
    wanted = [(CASE, mesh) for mesh in CASE.meshes()]
    pods.fill(found, wanted[:3], lambda found: kept.append(len(found)))
    pods.fill(found, wanted, lambda found: kept.append(len(found)))
    assert compiled == CASE.meshes() and kept == [1, 2, 3, 4, 5]
