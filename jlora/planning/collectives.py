"""Bytes that a compiled program sends between devices: its HLO text, walked from ENTRY."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast", "send", "recv",
)  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a program.

    Attributes:
      count: how many are run.
      bytes: of their results, per device.
      wire: bytes that a device receives where the algorithm is a ring: of a result R over n devices (n-1)/n R for an
        all-gather or an all-to-all, 2 (n-1)/n R for an all-reduce, (n-1) R for a reduce-scatter, R for others.
    """

    count: int
    bytes: int
    wire: int


class Instruction(NamedTuple):
    """One line of HLO."""

    name: str
    type: str
    op: str
    rest: str


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
    computations, entry = _computations(hlo)
    found = _once(list(_walk(computations, entry, 1)))
    out: dict[str, Collective] = {}
    for kind in KINDS:
        own = [(times, line) for times, line in found if _kind(line.op) == kind]
        if own:
            sizes = [(times, _bytes(line), _group(line.rest, devices)) for times, line in own]
            out[kind] = Collective(
                sum(times for times, _, _ in sizes),
                sum(times * size for times, size, _ in sizes),
                round(sum(times * _wire(kind, size, n) for times, size, n in sizes)),
            )
    return out


def _wire(kind: str, size: int, n: int) -> float:
    match kind:
        case "all-gather" | "all-to-all":
            return size * (n - 1) / n
        case "all-reduce":
            return 2 * size * (n - 1) / n
        case "reduce-scatter":
            return size * (n - 1)
        case "send":
            return 0
        case _:
            return size


# -- the text ----------------------------------------------------------------------------------------------------------

_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)")
_OP = re.compile(r" ([a-z][\w-]*)\(")
_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{$")


def _computations(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
    found: dict[str, list[Instruction]] = {}
    entry, current = "", ""
    for line in hlo.splitlines():
        if line[:1] not in (" ", "}", "") and (head := _HEAD.match(line.rstrip())):
            current = head[2]
            found[current] = []
            entry = current if head[1] else entry
        elif current and (match := _LINE.match(line)):
            found[current].append(_instruction(match[1], match[2]))
    if not entry:
        raise ValueError("this text has no ENTRY: pass compiled.as_text(), the HLO of a compiled program")
    return found, entry


def _instruction(name: str, text: str) -> Instruction:
    """A type may be a tuple, with comments and layouts in it, whose brackets are closed before the operation's name."""
    depth, end = 0, -1
    for place, char in enumerate(text if text.startswith("(") else ""):
        depth += (char == "(") - (char == ")")
        if not depth:
            end = place
            break
    op = _OP.search(text, end + 1)
    if op is None:
        return Instruction(name, text, "", "")
    return Instruction(name, text[: op.start()], op[1], text[op.end() :])


def _walk(computations: dict[str, list[Instruction]], name: str, times: int) -> Iterator[tuple[int, Instruction]]:
    for line in computations.get(name, ()):
        if line.op == "while":
            body, condition = _called(line.rest, "body")[0], _called(line.rest, "condition")[0]
            yield from _walk(computations, body, times * _trips(line, computations.get(condition, [])))
        elif line.op == "conditional":
            branches = [list(_walk(computations, inner, times)) for inner in _branches(line.rest)]
            yield from max(branches, key=lambda found: sum(n * _bytes(x) for n, x in found), default=[])
        elif _kind(line.op):
            yield times, line
        elif not line.op.endswith(("-update", "-done")):  # of an async pair, the start has it
            for inner in _called(line.rest, "calls") or (_called(line.rest, "to_apply") if line.op == "call" else []):
                yield from _walk(computations, inner, times)


def _called(rest: str, attribute: str) -> list[str]:
    return re.findall(rf"\b{attribute}=%?([\w.-]+)", rest)


def _branches(rest: str) -> list[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", rest):
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return [*_called(rest, "true_computation"), *_called(rest, "false_computation")]


def _trips(loop: Instruction, condition: list[Instruction]) -> int:
    if known := re.search(r'known_trip_count"?\s*[:=]\s*\{"?n"?\s*[:=]\s*"?(\d+)', loop.rest):
        return int(known[1])
    constants = {
        x.name: int(found[1]) for x in condition if x.op == "constant" and (found := re.match(r"(\d+)\)", x.rest))
    }
    for line in condition:
        if line.op in ("compare", "fusion") and ("direction=LT" in line.rest or line.op == "fusion"):
            for operand in re.findall(r"%?([\w.-]+)", line.rest.partition(")")[0]):
                if operand in constants:
                    return constants[operand]
    return 1


def _kind(op: str) -> str:
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
        key = (_kind(line.op), channel[1])
        if key not in least or times < least[key][0]:
            least[key] = (times, line)
    return [*kept, *least.values()]


# -- sizes -------------------------------------------------------------------------------------------------------------


def _bytes(line: Instruction) -> int:
    """Bytes of the results. A start's type is (operands, results, ...); an all-reduce's may be that of its results."""
    parts = _parts(line.type)
    if line.op in ("send", "recv"):
        return _size(parts[0])
    flat = line.op == "all-reduce-start" and not parts[0].startswith("(")
    if line.op.endswith("-start") and len(parts) > 1 and not flat:
        return _size(parts[1])
    return _size(line.type)


def _parts(text: str) -> list[str]:
    """The elements of a tuple's type; a type that is none alone."""
    text = text.strip()
    if not text.startswith("("):
        return [text]
    depth, parts = 0, [""]
    for char in text[1:-1]:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _size(text: str) -> int:
    total = 0
    for dtype, sizes in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", text):
        width = re.search(r"\d+", dtype)
        bits = 8 if dtype == "pred" else int(width[0]) if width else 0
        total += math.ceil(bits * math.prod(int(n) for n in sizes.split(",") if n) / 8)
    return total


def _group(rest: str, devices: int) -> int:
    """Devices that take part together: {{0,1},{2,3}}, [2,4]<=[8] (groups, size), or mesh['x'=2,'y'=4] {'y'}."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=(?:@?\w*)?mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", found[1])}
        return math.prod(sizes[name] for name in re.findall(r"'([^']*)'", found[2]) if name in sizes)
    return devices
