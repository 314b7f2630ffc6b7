"""Bytes that a compiled program moves to and from a device's memory, counted in its text.

Compilers' own figure, `cost_analysis()["bytes accessed"]`, counts the body of a loop once.
"""

from jlora.planning.hlo import Instruction, Program, branches, called, loop, operands, parts, size

# What names an array or waits for one, and moves nothing.
_FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "optimization-barrier", "add-dependency", "domain", "iota", "",
})  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")


def moved(program: Program) -> int:
    """Bytes that the kernels of a program read and write in the device's main memory, on one device.

        moved = sum over all instructions outside of fusions of  times x (operands + result)

    A fusion, a product, a copy, a collective, a kernel of a library: each reads its operands once and writes its
    result, as often as the loops around it run (see `collectives`); of an array of which it takes a slice (the weights
    of one layer), or into which it writes one, the slice counts. A kernel's caches, and what it reads twice since it
    does not fit there, are not known: so this is less than what a device really moves. What lies in a TPU's VMEM
    between two kernels counts as nothing. Of a conditional the branch that moves most counts.
    """
    return _of(program, program.entry)


def _of(program: Program, name: str) -> int:
    total, lines = 0, program.computations.get(name, [])
    types = {line.name: line.type for line in lines}
    for line in lines:
        if line.op == "while":
            body, trips = loop(program, line)
            total += trips * _of(program, body)
        elif line.op == "conditional":
            total += max((_of(program, inner) for inner in branches(line.rest)), default=0)
        elif line.op in ("call", "async-start"):
            total += sum(_of(program, inner) for inner in called(line.rest, "to_apply") + called(line.rest, "calls"))
        elif line.op not in _FREE and not line.op.endswith(("-done", "-update")):
            total += _of_instruction(program, line, types)
    return total


def _of_instruction(program: Program, line: Instruction, types: dict[str, str]) -> int:
    line = _plain(line)
    sizes = [size(types.get(name, ""), main=True) for name in operands(line)]
    if line.op == "fusion":
        (inner,) = called(line.rest, "calls")
        reads = sum(min(n, _read(program, inner, place, n)) for place, n in enumerate(sizes))
        return reads + _written(program, inner, line.type)
    if line.op == "dynamic-update-slice":
        return 2 * sum(sizes[1:2])
    result = size(line.type, main=True)
    if line.op in _SLICES:
        return (size(line.type) if sizes[0] else 0) + result + sum(sizes[1:])
    return sum(sizes) + result


def _plain(line: Instruction) -> Instruction:
    """Of an asynchronous pair the start as the instruction itself: its type is (operands, result, ...).

    A copy's is (result, operand, ...), that of a reduction the type of its results.
    """
    if not line.op.endswith("-start"):
        return line
    of, op = parts(line.type), line.op.removesuffix("-start")
    if op == "copy":
        return line._replace(op=op, type=of[0])
    return line._replace(op=op, type=of[1] if len(of) > 1 and of[0].startswith("(") else line.type)


def _read(program: Program, name: str, place: int, whole: int) -> int:
    """Bytes of the parameter at a place that a fusion reads: of slices those, of what is written in place none."""
    lines = program.computations.get(name, [])
    start = next((line.name for line in lines if line.op == "parameter" and line.rest.startswith(f"{place})")), None)
    return whole if start is None else _used(program, lines, start, whole)


def _used(program: Program, lines: list[Instruction], value: str, whole: int) -> int:
    total = 0
    for line in lines:
        names = operands(line) if line.op not in ("parameter", "constant", "") else []
        for place, name in enumerate(names):
            if name != value:
                continue
            if line.op in _SLICES and place == 0:
                total += size(line.type, main=True)
            elif line.op == "bitcast" and not line.root:
                total += _used(program, lines, line.name, whole)
            elif line.op == "fusion":
                total += _read(program, called(line.rest, "calls")[0], place, whole)
            elif line.op != "dynamic-update-slice" or place:
                return whole
    return min(total, whole)


def _written(program: Program, name: str, whole: str) -> int:
    """Bytes that a fusion writes: of an array that is changed in place, the slice."""
    lines = {line.name: line for line in program.computations.get(name, [])}
    root = next((line for line in lines.values() if line.root), None)
    return size(whole, main=True) if root is None else _result(program, lines, root, whole)


def _result(program: Program, lines: dict[str, Instruction], line: Instruction, whole: str) -> int:
    names = operands(line) if line.op in ("tuple", "bitcast", "dynamic-update-slice") else []
    if line.op == "tuple":
        types = parts(whole)
        own = [lines.get(name) for name in names]
        return sum(
            size(of, main=True) if one is None else _result(program, lines, one, of)
            for one, of in zip(own, types, strict=True)
        )
    if line.op == "bitcast" and names[0] in lines:
        return _result(program, lines, lines[names[0]], whole)
    if line.op == "dynamic-update-slice" and names[1] in lines:
        return min(size(lines[names[1]].type), size(whole, main=True))
    if line.op == "fusion":
        return _written(program, called(line.rest, "calls")[0], whole)
    return size(whole, main=True)
