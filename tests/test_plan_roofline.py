"""The least time of a step: groups of devices, bytes over links and networks, bytes moved in memory."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest

from jlora.planning import DEVICES, targets
from jlora.planning.collectives import Sent, groups_of, received, summed
from jlora.planning.devices import Speed, find
from jlora.planning.fabric import Fabric, fabric_of
from jlora.planning.hlo import read
from jlora.planning.moved import moved
from jlora.planning.roofline import Roofline, Work, roofline
from tests.test_plan import BATCH, TX, adapt, loss_fn, mlp, on_cpu, shape

# -- groups ------------------------------------------------------------------------------------------------------------

GROUPS = {
    "replica_groups={{0,1},{2,3}}, to_apply=%add": ((0, 1), (2, 3)),
    "replica_groups={}, to_apply=%add": ((0, 1, 2, 3, 4, 5, 6, 7),),
    "replica_groups=[2,4]<=[8], dimensions={2}": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "replica_groups=[4,2]<=[2,4]T(1,0)": ((0, 4), (1, 5), (2, 6), (3, 7)),
    "replica_groups=[4,2]<=[2,2,2]T(0,2,1)": ((0, 2), (1, 3), (4, 6), (5, 7)),
    "replica_groups=mesh['fsdp'=4,'tp'=2] {'fsdp'}, dimensions={0}": ((0, 2, 4, 6), (1, 3, 5, 7)),
    "replica_groups=mesh['fsdp'=4,'tp'=2] {'tp'}": ((0, 1), (2, 3), (4, 5), (6, 7)),
    "replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}": ((0, 1, 4, 5), (2, 3, 6, 7)),
    "replica_groups=mesh['x'=8] {'x':(1)2}": ((0, 4), (1, 5), (2, 6), (3, 7)),
    "replica_groups=mesh['x'=8] {'x':(4)2}": ((0, 1), (2, 3), (4, 5), (6, 7)),
    "replica_groups=mesh['x'=2,'y'=2], device_ids=(0,2,1,3) {'y'}": ((0, 2), (1, 3)),
    "replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}": ((0, 2, 4, 6), (1, 3, 5, 7)),
    "channel_id=1, source_target_pairs={{0,4},{4,0}}": ((0, 4), (4, 0)),
}


@pytest.mark.parametrize("text", GROUPS)
def test_the_devices_that_take_part(text: str):
    assert groups_of(f"%p), channel_id=1, {text}", 8) == GROUPS[text]


# -- traffic -----------------------------------------------------------------------------------------------------------

TWO_NODES = Fabric((0,) * 8 + (1,) * 8)
NODE, ACROSS = tuple(range(8)), (0, 8)
ALL = tuple(range(16))
RECEIVED = {
    "a node": (("all-gather", NODE), 1600 * 7 / 8, 0.0),
    "between nodes": (("all-gather", ACROSS), 0.0, 800.0),
    "gather": (("all-gather", ALL), 1600 * 7 / 8, 1600 / 16),
    "reduce": (("all-reduce", ALL), 2 * 1600 * 7 / 8, 2 * 1600 / 16),
    "scatter": (("reduce-scatter", ALL), 16 * 1600 * 7 / 8, 16 * 1600 / 16),
    "to all": (("all-to-all", ALL), 1600 * 7 / 16, 1600 * 8 / 16),
    "permute": (("collective-permute", (1, 0)), 1600.0, 0.0),
    "permute between nodes": (("collective-permute", (1, 9)), 0.0, 1600.0),
    "send": (("send", ACROSS), 0.0, 0.0),
}


@pytest.mark.parametrize("name", RECEIVED)
def test_bytes_from_the_own_node_and_from_others(name: str):
    """Of a ring over n devices (n-1)/n, of which 1/m enters the node for each of its m devices."""
    (kind, group), near, far = RECEIVED[name]
    one = Sent(kind, 1, 1600, (group,))
    assert received(one, TWO_NODES) == pytest.approx((near, far))
    assert sum(received(one)) == pytest.approx(near + far)  # what a ring sends, wherever


def test_bytes_between_slices_are_received_from_others():
    assert received(Sent("recv", 3, 100, ()), TWO_NODES) == (0.0, 100)
    found = summed([Sent("recv", 3, 100, ()), Sent("all-gather", 2, 1600, (ALL,))], TWO_NODES)
    assert (found["recv"].dcn, found["all-gather"].wire, found["all-gather"].dcn) == (300, 3000, 200)


def torus(*sizes: int, ring: int) -> Fabric:
    coords = [()]
    for n in sizes:
        coords = [(*place, i) for place in coords for i in range(n)]
    return Fabric((0,) * len(coords), tuple(coords), ring)


def test_links_of_a_torus():
    small, pod, cube = torus(4, 4, ring=16), torus(16, 16, ring=16), torus(4, 4, 4, ring=4)
    assert small.links((0, 1, 2, 3)) == 1 and small.links(tuple(range(16))) == 2  # lines
    assert pod.links(tuple(range(16))) == 2 and pod.links(tuple(range(8))) == 1 and pod.links(tuple(range(256))) == 4
    assert [cube.links(tuple(range(n))) for n in (1, 2, 4, 16, 64)] == [1, 1, 2, 4, 6]
    assert TWO_NODES.links(ALL) == 1 and pod.longest(tuple(range(256))) == 16


def test_where_devices_are():
    class Chip:
        def __init__(self, slice_index: int | None) -> None:
            self.id, self.slice_index, self.coords = 11, slice_index, [1, 2, 0]

    assert fabric_of(DEVICES["h100"], [Chip(None)]) == Fabric((1,))  # node by node
    assert fabric_of(DEVICES["v5e"], [Chip(None), Chip(3)]) == Fabric((0, 3), ((1, 2, 0),) * 2, 16)
    assert fabric_of(DEVICES["cpu"], [Chip(None)]) is None


# -- speeds ------------------------------------------------------------------------------------------------------------


def test_every_device_that_can_be_compiled_for_has_its_speeds():
    own = {name: device.speed for name, device in DEVICES.items() if device.speed}
    assert set(own) == {name for name, device in DEVICES.items() if device.target == name != "cpu"}
    assert own["7x"] == Speed(2307e12 / 2, 7380e9 / 2, 100e9 / 2, 12.5e9 / 2, ring=4)  # half a chip
    assert (own["v5e"].dcn, own["v4"].dcn, own["h100"].dcn) == (25e9 / 8, 25e9 / 4, 400e9 / 8)
    assert all((speed.node == 8) == (speed.ring == 0) for speed in own.values())


H100, V5E = DEVICES["h100"].speed, DEVICES["v5e"].speed


def test_the_least_times_of_gpus():
    """Llama 7B fully sharded over 16 H100: 24.5 GB of gathers, of which each byte enters a node once."""
    work = Work(84.2e12, 335 * 10**9, [Sent("all-gather", 64, 409_600_000, (ALL,))])
    found = roofline(work, H100, TWO_NODES)
    whole = 64 * 409_600_000
    assert found.compute == pytest.approx(84.2 / 989) and found.memory == pytest.approx(335 / 3352)
    assert found.ici == pytest.approx(whole * 7 / 8 / 450e9) and found.dcn == pytest.approx(whole / 16 / 50e9)
    assert found.limiting == "memory" and found.seconds == found.memory
    assert roofline(work, H100, None) == Roofline(found.compute, found.memory, 0.0, 0.0)


def test_the_least_times_of_a_torus():
    gather, everywhere = Sent("all-gather", 1, 10**9, (tuple(range(16)),)), Sent("all-to-all", 1, 10**9, (ALL,))
    ring, line = torus(16, 16, ring=16), torus(4, 4, ring=16)
    one = lambda sent, fabric: roofline(Work(0.0, 0, [sent]), V5E, fabric)
    assert one(gather, ring).ici == pytest.approx(15 / 16 * 1e9 / 100e9)  # a ring, both ways
    assert one(gather, line).ici == pytest.approx(15 / 16 * 1e9 / 100e9)  # two lines
    assert one(everywhere, ring).ici == pytest.approx(15 / 16 * 1e9 * 4 / 100e9)  # by up to a quarter of it
    assert one(gather, ring).dcn == 0 and one(gather, ring).limiting == "ici"


# -- memory ------------------------------------------------------------------------------------------------------------

N = 64
X = shape(N, N)


@pytest.mark.parametrize(
    "fn", [lambda x: x @ x, lambda x: jnp.tanh(x @ x) @ x, jax.grad(lambda x: jnp.sum(jnp.tanh(x @ x) @ x))]
)
def test_bytes_moved_are_xlas_own_where_there_is_no_loop(fn):
    made = jax.jit(fn).lower(X).compile()
    assert moved(read(made.as_text())) == made.cost_analysis()["bytes accessed"] > 4 * N * N


def test_a_loop_moves_as_often_as_it_runs():
    """Of the stack of weights one layer at a time, which XLA's own figure counts once."""
    step = jax.jit(lambda x, w: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0])
    of = lambda layers: moved(read(step.lower(X, shape(layers, N, N)).compile().as_text()))
    layer = (of(20) - of(10)) / 10
    assert 3 * 4 * N * N < layer < 8 * 4 * N * N  # read, cut out, multiplied, tanh; never all layers
    assert of(10) == pytest.approx(10 * layer, rel=0.1)


KERNELS = """HloModule jit_program

%cut (p: bf16[32,8,8], i: s32[]) -> bf16[8,8] {
  %p = bf16[32,8,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %dynamic-slice = bf16[1,8,8]{2,1,0} dynamic-slice(%p, %i, %i, %i), dynamic_slice_sizes={1,8,8}
  ROOT %bitcast = bf16[8,8]{1,0} bitcast(%dynamic-slice)
}

%put (s: bf16[32,8,8], x: bf16[1,8,8], j: s32[]) -> bf16[32,8,8] {
  %s = bf16[32,8,8]{2,1,0} parameter(0)
  %x = bf16[1,8,8]{2,1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %update = bf16[32,8,8]{2,1,0} dynamic-update-slice(%s, %x, %j, %j, %j)
}

ENTRY %main (a: bf16[32,8,8]) -> bf16[8,8] {
  %a = bf16[32,8,8]{2,1,0} parameter(0)
  %k = s32[] constant(3)
  %fusion-start = ((bf16[32,8,8]{2,1,0}, s32[]), bf16[8,8]{1,0}, u32[]) fusion-start(%a, %k), kind=kLoop, calls=%cut
  %fusion-done = bf16[8,8]{1,0} fusion-done(%fusion-start)
  %one = bf16[1,8,8]{2,1,0} bitcast(%fusion-done)
  %put.1 = bf16[32,8,8]{2,1,0} fusion(%a, %one, %k), kind=kLoop, calls=%put
  %copy-start = (bf16[8,8]{1,0:T(8,128)S(1)}, bf16[8,8]{1,0}, u32[]) copy-start(%fusion-done)
  %near = bf16[8,8]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  ROOT %dot = bf16[8,8]{1,0} dot(%near, %fusion-done), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_slices_what_is_written_in_place_and_what_stays_near():
    part, index = 2 * 8 * 8, 4
    assert moved(read(KERNELS)) == (2 * part + index) + (2 * part + index) + part + 2 * part


# -- a plan ------------------------------------------------------------------------------------------------------------


def slow(node: int) -> Speed:
    return Speed(flops=1e6, memory=1e6, link=1e4, dcn=1e3, node=node)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch):
    """CPUs with speeds, in nodes of four."""
    monkeypatch.setitem(DEVICES, "cpu", dataclasses.replace(DEVICES["cpu"], speed=slow(4)))


def test_a_plan_has_the_four_times(known: None):
    found = on_cpu(loss_fn, adapt(mlp()), TX, BATCH, mesh={"fsdp": 8})
    best, ways = found.roofline, found.collectives.values()
    assert best is not None and found.dcn == sum(one.dcn for one in ways) > 0
    assert best.compute == found.flops / 1e6 and best.memory == found.moved / 1e6
    assert best.dcn == pytest.approx(found.dcn / 1e3, rel=0.01)
    assert best.ici == pytest.approx((found.wire - found.dcn) / 1e4, rel=0.01)
    told = json.loads(json.dumps(found.as_dict()))
    assert told["roofline"]["limiting"] == best.limiting == "dcn" and told["roofline"]["seconds"] == best.seconds
    assert (told["moved"], told["wire"], told["dcn"]) == (found.moved, found.wire, found.dcn)
    lines = [" ".join(line.split()) for line in str(found).splitlines()]
    assert f"compute {best.compute * 1e3:.3g} ms {found.flops:.3e} FLOPs at 1e-06 TFLOP/s" in lines
    assert any(line.startswith("ici ") and line.endswith("received over NVLink, 1e-05 GB/s") for line in lines)
    assert any(line.startswith("dcn ") and line.endswith("received from other nodes, 1e-06 GB/s") for line in lines)
    assert any(line.startswith("A step takes ") and line.endswith(" at best, limited by dcn.") for line in lines)


def test_one_device_computes_and_moves(known: None):
    found = on_cpu(loss_fn, adapt(mlp()), TX, BATCH)
    assert found.roofline == Roofline(found.flops / 1e6, found.moved / 1e6, 0.0, 0.0)
    assert not any(line.startswith(("  ici", "  dcn")) for line in str(found).splitlines())


def test_a_device_whose_speeds_are_not_known(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(targets, "has_compiler", lambda device: device.compiler == "cpu")
    found = on_cpu(loss_fn, adapt(mlp()), TX, BATCH, device="a6000")
    assert found.roofline is None and found.moved > 0 and found.as_dict()["roofline"] is None


def test_traffic_stays_in_the_nodes_where_copies_do(known: None):
    """Sharded inside of nodes, copies between: gradients alone leave a node."""
    copies = on_cpu(loss_fn, adapt(mlp()), TX, BATCH, mesh={"data": 2, "fsdp": 4})
    assert find("cpu").device.speed == slow(4) and math.prod(copies.mesh.values()) == 8
    assert all(one.dcn <= one.wire for one in copies.collectives.values())
