"""Bytes that a compiled program sends between devices, and which devices take part: its HLO text, from ENTRY on."""

import functools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jlora.planning.fabric import Fabric
from jlora.planning.hlo import Instruction, Program, branches, called, loop, parts, read, size

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast", "send", "recv",
)  # fmt: skip
Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a program.

    Attributes:
      count: how many are run.
      bytes: of their results, per device.
      wire: bytes that a device receives where the algorithm is a ring: of a result R over n devices (n-1)/n R for an
        all-gather or an all-to-all, 2 (n-1)/n R for an all-reduce, (n-1) R for a reduce-scatter, R for others.
      dcn: those of them that come from another node or slice, if each byte enters it once: of a gathered R over n
        devices on k nodes (k-1)/n R.
    """

    count: int
    bytes: int
    wire: int
    dcn: int = 0


class Sent(NamedTuple):
    """A collective of a program.

    Attributes:
      kind: of `KINDS`.
      times: how often it is run.
      bytes: of its result, on a device.
      groups: the devices that take part together, numbered as in the program; of a permutation its pairs.
    """

    kind: str
    times: int
    bytes: int
    groups: Groups


def collectives(hlo: str, devices: int) -> dict[str, Collective]:
    """Collectives of a compiled program, by kind.

    Loops count as often as they run: `known_trip_count`, or the constant that the condition compares with, as TPUs'
    programs have it, and once where neither is there. Of a conditional the branch with the most bytes counts.

    Args:
      hlo: `compiled.as_text()`.
      devices: of the whole program, for groups that name none.

    Raises:
      ValueError: if the text has no ENTRY.
    """
    return summed(sent(read(hlo), devices))


def sent(program: Program, devices: int) -> list[Sent]:
    """All collectives that a program runs."""
    found = _once(list(_walk(program, program.entry, 1)))
    return [Sent(kind_of(line.op), times, _bytes(line), groups_of(line.rest, devices)) for times, line in found]


def summed(found: Iterable[Sent], fabric: Fabric | None = None) -> dict[str, Collective]:
    """The sum of each kind, in the order of `KINDS`."""
    sums: dict[str, list[float]] = {}
    for one in found:
        here, there = received(one, fabric)
        add = (one.times, one.times * one.bytes, one.times * (here + there), one.times * there)
        sums[one.kind] = [a + b for a, b in zip(sums.get(one.kind, [0.0] * 4), add, strict=True)]
    return {kind: Collective(*map(round, sums[kind])) for kind in KINDS if kind in sums}


def received(one: Sent, fabric: Fabric | None = None) -> tuple[float, float]:
    """Bytes that a device receives: from its own node, and from others.

    A ring over n = k m devices, m on each of k nodes, whose bytes enter a node once and are passed on inside of it:

        V = the whole array; gather and scatter V (m-1)/m and V (k-1)/(k m); all-reduce twice both
        all-to-all of R bytes a device: R (m-1)/n and R (n-m)/n

    Of several groups the one counts that receives most from other nodes.
    """
    kind, _, r, groups = one
    if kind == "send":
        return 0.0, 0.0
    if kind == "recv" and (fabric is None or not groups):
        return 0.0 if fabric else r, r if fabric else 0.0  # between slices
    if kind in ("recv", "collective-permute", "collective-broadcast", "ragged-all-to-all"):
        far = fabric is not None and any(fabric.nodes_of(group) > 1 for group in groups)
        return (0.0, r) if far else (r, 0.0)
    n = max(map(len, groups), default=1)
    k = max((fabric.nodes_of(group) for group in groups), default=1) if fabric else 1
    m = n / k
    if kind == "all-to-all":
        return r * (m - 1) / n, r * (n - m) / n
    whole, passes = (r * n if kind == "reduce-scatter" else r), (2 if kind == "all-reduce" else 1)
    return passes * whole * (m - 1) / m, passes * whole * (k - 1) / n


# -- the text ----------------------------------------------------------------------------------------------------------


def _walk(program: Program, name: str, times: int) -> Iterator[tuple[int, Instruction]]:
    for line in program.computations.get(name, ()):
        if line.op == "while":
            body, trips = loop(program, line)
            yield from _walk(program, body, times * trips)
        elif line.op == "conditional":
            found = [list(_walk(program, inner, times)) for inner in branches(line.rest)]
            yield from max(found, key=lambda found: sum(n * _bytes(x) for n, x in found), default=[])
        elif kind_of(line.op):
            yield times, line
        elif not line.op.endswith(("-update", "-done")):  # of an async pair, the start has it
            for inner in called(line.rest, "calls") or (called(line.rest, "to_apply") if line.op == "call" else []):
                yield from _walk(program, inner, times)


def kind_of(op: str) -> str:
    """The collective of an operation's name; "" if it is none."""
    name = op.removesuffix("-start")
    return name if name in KINDS else ""


def _once(found: list[tuple[int, Instruction]]) -> list[tuple[int, Instruction]]:
    """Counts what a TPU's fusions repeat, at an async collective's start, steps and end, where it is run least."""
    kept: list[tuple[int, Instruction]] = []
    least: dict[tuple[str, ...], tuple[int, Instruction]] = {}
    for times, line in found:
        config = re.search(r'"async_collective_fusion_config":\{([^}]*)\}', line.rest)
        channel = re.search(r"channel_id=(\d+)", line.rest)
        if not config or not channel:
            kept.append((times, line))
            continue
        key = (kind_of(line.op), channel[1])
        if key not in least or times < least[key][0]:
            least[key] = (times, line)
    return [*kept, *least.values()]


def _bytes(line: Instruction) -> int:
    """Bytes of the results. A start's type is (operands, results, ...); an all-reduce's may be that of its results."""
    of = parts(line.type)
    if line.op in ("send", "recv"):
        return size(of[0])
    flat = line.op == "all-reduce-start" and not of[0].startswith("(")
    if line.op.endswith("-start") and len(of) > 1 and not flat:
        return size(of[1])
    return size(line.type)


# -- groups ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _listed(text: str) -> Groups:
    return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", text))


def groups_of(rest: str, devices: int) -> Groups:
    """The devices that take part together, of an instruction's attributes.

    HLO lists them, {{0,1},{2,3}}; or counts and turns them, [2,2]<=[2,2]T(1,0) (groups of two, of a matrix of two by
    two that is transposed); or names axes of a mesh, mesh['x'=2,'y'=4] {'y'}, also parts of axes, 'y':(2)2. Where
    nothing is said all devices are one group.

    >>> groups_of("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", 4)
    ((0, 2), (1, 3))
    >>> groups_of("replica_groups=mesh['x'=2,'y'=4] {'x'}", 8)
    ((0, 4), (1, 5), (2, 6), (3, 7))
    """
    if found := re.search(r"(?:replica_groups|source_target_pairs)=(\{\{.*?\}\})", rest):
        return _listed(found[1])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return _counted(_numbers(found[1])[-1], _numbers(found[2]), _numbers(found[3] or ""))
    mesh = r"replica_groups=(?:@?\w*)?mesh\[([^\]]*)\](?:,\s*device_ids=\(([^)]*(?:\([^)]*\))?)\))?\s*\{([^}]*)\}"
    if found := re.search(mesh, rest):
        return _named(found[1], found[2] or "", found[3])
    return (tuple(range(devices)),)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


@functools.lru_cache(maxsize=1024)
def _counted(each: int, sizes: tuple[int, ...], turned: tuple[int, ...]) -> Groups:
    array = np.arange(math.prod(sizes)).reshape(sizes)
    return _rows(array.transpose(turned or range(array.ndim)).reshape(-1, each))


@functools.lru_cache(maxsize=1024)
def _named(mesh: str, ids: str, axes: str) -> Groups:
    """A part of an axis, 'y':(2)4, are four steps of it that are two times as coarse as the whole."""
    whole = {name: int(n) for name, n in re.findall(r"'([^']*)'=(\d+)", mesh)}
    order = _order(ids, math.prod(whole.values()))
    wanted = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes)
    sizes: list[int] = []
    taken: list[int] = []
    for name, n in whole.items():
        own = [(int(before), int(many)) for axis, before, many in wanted if axis == name and before]
        if own:
            before, many = own[0]
            taken.append(len(sizes) + 1)
            sizes += [before, many, n // before // many]
        else:
            taken += [len(sizes)] if any(axis == name for axis, *_ in wanted) else []
            sizes.append(n)
    rest = [axis for axis in range(len(sizes)) if axis not in taken]
    each = math.prod(sizes[axis] for axis in taken)
    return _rows(order.reshape(sizes).transpose(*rest, *taken).reshape(-1, each))


def _order(ids: str, devices: int) -> np.ndarray:
    """The devices of a mesh where they are not 0, 1, ...: "0,2,1,3", or "[4,2]T(1,0)"."""
    if found := re.match(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", ids):
        array = np.arange(devices).reshape(_numbers(found[2] or found[1]))
        return array.transpose(_numbers(found[3] or "") or range(array.ndim)).reshape(-1)
    return np.array(_numbers(ids)) if ids else np.arange(devices)


def _rows(array: Sequence[Sequence[int]] | np.ndarray) -> Groups:
    return tuple(tuple(map(int, row)) for row in array)
