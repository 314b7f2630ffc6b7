"""The text of a compiled program (HLO): its computations, what of them is run and how often, sizes of its arrays."""

import math
import re
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of HLO.

    Attributes:
      name: of its result.
      type: of its result, a tuple's in brackets.
      op: the operation, "all-gather-start".
      rest: operands and attributes.
      root: whether it is the result of its computation.
    """

    name: str
    type: str
    op: str
    rest: str
    root: bool = False


class Program(NamedTuple):
    """Computations by name, and the name of the one that is run."""

    computations: dict[str, list[Instruction]]
    entry: str


def read(hlo: str) -> Program:
    """The program of a text.

    Args:
      hlo: `compiled.as_text()`.

    Raises:
      ValueError: if the text has no ENTRY.
    """
    found: dict[str, list[Instruction]] = {}
    entry, current = "", ""
    for line in hlo.splitlines():
        if line[:1] not in (" ", "}", "") and (head := _HEAD.match(line.rstrip())):
            current = head[2]
            found[current] = []
            entry = current if head[1] else entry
        elif current and (match := _LINE.match(line)):
            found[current].append(_instruction(match[2], match[3], bool(match[1])))
    if not entry:
        raise ValueError("this text has no ENTRY: pass compiled.as_text(), the HLO of a compiled program")
    return Program(found, entry)


_LINE = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*)")
_OP = re.compile(r" ([a-z][\w-]*)\(")
_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{$")


def _instruction(name: str, text: str, root: bool) -> Instruction:
    """A type may be a tuple, with comments and layouts in it, whose brackets are closed before the operation's name."""
    end = closing(text) if text.startswith("(") else -1
    op = _OP.search(text, end + 1)
    if op is None:
        return Instruction(name, text, "", "", root)
    return Instruction(name, text[: op.start()], op[1], text[op.end() :], root)


def closing(text: str, depth: int = 0) -> int:
    """The place of the bracket that closes the first one of a text, or one of `depth` that are open before it."""
    for place, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if not depth:
            return place
    return -1


def called(rest: str, attribute: str) -> list[str]:
    """The computations that an attribute names."""
    return re.findall(rf"\b{attribute}=%?([\w.-]+)", rest)


def branches(rest: str) -> list[str]:
    """The computations of a conditional."""
    if listed := re.search(r"branch_computations=\{([^}]*)\}", rest):
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return [*called(rest, "true_computation"), *called(rest, "false_computation")]


def operands(line: Instruction) -> list[str]:
    """The names of the arrays that an instruction takes."""
    inside = line.rest[: closing(line.rest, 1)]
    return [part.split()[-1].lstrip("%") for part in parts(f"({inside})") if part.strip()]


def loop(program: Program, line: Instruction) -> tuple[str, int]:
    """The body of a while loop, and how often it runs: once where its text does not say it."""
    body, condition = called(line.rest, "body")[0], called(line.rest, "condition")[0]
    return body, _trips(line, program.computations.get(condition, []))


def _trips(line: Instruction, condition: list[Instruction]) -> int:
    if known := re.search(r'known_trip_count"?\s*[:=]\s*\{"?n"?\s*[:=]\s*"?(\d+)', line.rest):
        return int(known[1])
    constants = {
        x.name: int(found[1]) for x in condition if x.op == "constant" and (found := re.match(r"(\d+)\)", x.rest))
    }
    for own in condition:
        if own.op in ("compare", "fusion") and ("direction=LT" in own.rest or own.op == "fusion"):
            for operand in re.findall(r"%?([\w.-]+)", own.rest.partition(")")[0]):
                if operand in constants:
                    return constants[operand]
    return 1


# -- sizes -------------------------------------------------------------------------------------------------------------


def parts(text: str) -> list[str]:
    """The elements of a tuple's type; a type that is none alone.

    >>> parts("(f32[2,3]{1,0}, (s32[], pred[4]))")
    ['f32[2,3]{1,0}', ' (s32[], pred[4])']
    """
    text = text.strip()
    if not text.startswith("("):
        return [text]
    depth, found = 0, [""]
    for char in text[1:-1]:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            found.append("")
        else:
            found[-1] += char
    return found


_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


def size(text: str, *, main: bool = False) -> int:
    """Bytes of all arrays of a type.

    Args:
      text: of the type.
      main: of those alone that lie in the device's main memory: TPUs' programs name others in an array's layout, S(1).
    """
    total = 0
    for dtype, sizes, layout in _ARRAY.findall(text):
        if main and re.search(r"S\([1-9]", layout):
            continue
        width = re.search(r"\d+", dtype)
        bits = 8 if dtype == "pred" else int(width[0]) if width else 0
        total += math.ceil(bits * math.prod(int(n) for n in sizes.split(",") if n) / 8)
    return total
