"""Follows parameters through a traced function, on shapes alone: where each of them meets an input, along which axes.

An abstract interpretation of the jaxpr. For every value it knows which axes of which parameters its own axes come from;
operations that no lazy weight survives (a rounding, a norm, a concatenation) do not end a trail, they are noted in it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core as jex

from jlora.transform import axes as ax
from jlora.transform.jaxprs import line_of, open_jaxpr, scan_counts
from jlora.transform.rules import PLACES, PRODUCTS, UNARY, stays_in_form
from jlora.transform.trace import Use

Origin = frozenset[int]


@dataclasses.dataclass(frozen=True)
class Trail:
    """Part of one parameter that a value holds.

    Attributes:
      axes: for each axis of the value, the axes of the stored parameter that it comes from.
      stack: axes that scans and indexing have consumed.
      gathered: axes that a batched look-up has consumed.
      through: the first operation that materialises the parameter; "" while it stays in its form.
    """

    axes: tuple[Origin, ...]
    stack: Origin = frozenset()
    gathered: Origin = frozenset()
    through: str = ""

    def on(self, axes: Sequence[int]) -> tuple[int, ...]:
        """The stored axes behind these axes of the value."""
        return tuple(sorted(frozenset().union(*(self.axes[i] for i in axes))))

    def moved(self, axes: Sequence[Origin], through: str = "", **changes: Any) -> "Trail":
        """The trail behind an operation, with the axes of its result."""
        return dataclasses.replace(self, axes=tuple(axes), through=self.through or through, **changes)


@dataclasses.dataclass(frozen=True)
class Flow:
    """A value: the parameters in it, and whether an input is in it too."""

    trails: Mapping[str, Trail] = dataclasses.field(default_factory=dict)
    mixed: bool = False

    @property
    def pure(self) -> bool:
        """Made of parameters alone."""
        return bool(self.trails) and not self.mixed

    @property
    def width(self) -> tuple[bool, int]:
        """Smaller for what is rather a matrix than rows that meet one: of two weights in a product."""
        gathered = any(trail.gathered for trail in self.trails.values())
        return gathered, -max((len(t.on(range(len(t.axes)))) for t in self.trails.values()), default=0)


Operand = tuple[Flow, Sequence[int | None]]  # for each axis of a result, the operand's own
INPUT, CONSTANT = Flow(mixed=True), Flow()


def follow(fn: Callable[..., Any], weights: Mapping[str, jax.Array]) -> list[Use]:
    """Every operation of `fn(weights)` at which a parameter meets an input, is materialised, or ends.

    Args:
      fn: a function of a dict of arrays, by path; whatever else it reads is an input.
      weights: the parameters to follow.

    Returns:
      In program order; a use is factored where no operation between has materialised the parameter.
    """
    closed = jax.make_jaxpr(lambda weights: jax.tree.leaves(fn(weights)))(weights)
    jaxpr, consts = open_jaxpr(closed)
    paths = sorted(weights)  # as JAX flattens a dict
    start = [Flow({p: Trail(tuple(frozenset((i,)) for i in range(weights[p].ndim)))}) for p in paths]
    walk = _Walk(shapes={p: tuple(weights[p].shape) for p in paths})
    for flow in map(walk.ended, walk.run(jaxpr, [INPUT] * len(consts), start)):
        for path, trail in flow.trails.items():
            if not trail.through:
                walk.note(path, trail, "return")
    return walk.uses


@dataclasses.dataclass
class _Walk:
    """One walk through a program: the uses that it has noted, and the equations around the one at hand."""

    shapes: Mapping[str, tuple[int, ...]]
    uses: list[Use] = dataclasses.field(default_factory=list)
    around: list[Any] = dataclasses.field(default_factory=list)
    silent: bool = False

    def note(self, path: str, trail: Trail, op: str, in_axes: Sequence[int] = (), out_axes: Sequence[int] = ()) -> None:
        """A use, unless a loop's body is only walked to see what it carries."""
        if self.silent:
            return
        line = next(filter(None, map(line_of, reversed(self.around))), "")
        stack = tuple(sorted(trail.stack | (trail.gathered if op != "gather" else frozenset())))
        factored = not trail.through and op in PRODUCTS
        reason = "" if factored else trail.through or op
        self.uses.append(Use(path, op, tuple(in_axes), tuple(out_axes), stack, factored, 0, 0, line, reason))

    def run(self, jaxpr: Any, consts: Sequence[Flow], args: Sequence[Flow]) -> list[Flow]:
        """The flows that come out of a jaxpr."""
        env: dict[Any, Flow] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        read = lambda atom: CONSTANT if isinstance(atom, jex.Literal) else env[atom]
        for eqn in jaxpr.eqns:
            flows = [read(atom) for atom in eqn.invars]
            self.around.append(eqn)
            env.update(zip(eqn.outvars, self.step(eqn, flows), strict=True))
            self.around.pop()
        return [read(atom) for atom in jaxpr.outvars]

    def step(self, eqn: Any, flows: list[Flow]) -> list[Flow]:
        """The flows behind one equation."""
        name = eqn.primitive.name
        if name.startswith("random_") or name == "threefry2x32":
            return [CONSTANT] * len(eqn.outvars)  # noise is no input
        if not any(flow.trails for flow in flows):
            return [INPUT if any(flow.mixed for flow in flows) else CONSTANT] * len(eqn.outvars)
        shapes = [tuple(getattr(atom.aval, "shape", ())) for atom in (*eqn.invars, *eqn.outvars)]
        before, after = shapes[: len(flows)], shapes[len(flows) :]
        if name in _HIGHER_ORDER:
            return _HIGHER_ORDER[name](self, eqn, flows)
        if name in _MEETINGS:
            return _MEETINGS[name](self, eqn, flows, before, after)
        flows = [self.ended(flow) if name not in _IN_FORM else flow for flow in flows]
        if name == "reduce_sum" and flows[0].mixed:
            flows = [self.summed(flows[0], eqn.params["axes"], before[0])]
        if name in _MOVES:
            results = _MOVES[name](eqn, flows, before, after)
            for path, trail in results[0].trails.items():
                if trail.through == name:
                    self.note(path, trail, name)
            return results
        if all(_fits(shape, after[0]) for shape in before) and all(shape == after[0] for shape in after):
            return [self.elementwise(eqn, flows, before, after[0])] * len(after)
        return self.unknown(name, flows, before, after)

    def ended(self, flow: Flow) -> Flow:
        """Rows that a look-up has found are activations for whatever is no product."""
        rows = {path: trail for path, trail in flow.trails.items() if trail.gathered}
        for path, trail in rows.items():
            self.note(path, trail, "gather", sorted(trail.gathered), trail.on(range(len(trail.axes))))
        return Flow({p: t for p, t in flow.trails.items() if p not in rows}, flow.mixed or bool(rows))

    def summed(self, flow: Flow, gone: Sequence[int], shape: tuple[int, ...]) -> Flow:
        """A product that is written as a product by elements and a sum: of a weight with an input."""
        left = [i for i in range(len(shape)) if i not in gone]
        met = {path for path, trail in flow.trails.items() if trail.on(gone) and trail.on(left)}
        for path in met:
            trail = flow.trails[path]
            self.note(path, trail, "reduce_sum", trail.on(gone), trail.on(left))
        return Flow({path: trail for path, trail in flow.trails.items() if path not in met}, True)

    def elementwise(self, eqn: Any, flows: list[Flow], before: Any, shape: tuple[int, ...]) -> Flow:
        """An operation that keeps the axes: each comes from where it came from in any of the operands."""
        name = eqn.primitive.name
        operands = [(flow, _stretched(s, shape)) for flow, s in zip(flows, before, strict=True)]
        kept = self.kept(eqn, flows, before, shape)
        merged = _joined(operands, "" if kept is not None else name)
        if kept is not None:  # what it is scaled by may have been made of it: an array by now
            lazy = {path for path, trail in flows[kept].trails.items() if not trail.through}
            merged |= {path: dataclasses.replace(merged[path], through="") for path in lazy}
        for path, trail in merged.items():
            if trail.through == name:
                self.note(path, trail, name)
        if name in _SUMS and any(f.mixed and s == shape != () for f, s in zip(flows, before, strict=True)):
            return INPUT  # a bias, a table of positions: what it is added to is an input
        return Flow(merged, any(flow.mixed for flow in flows))

    def kept(self, eqn: Any, flows: list[Flow], before: Any, shape: tuple[int, ...]) -> int | None:
        """The operand that stays a lazy weight: one that is cast, negated, scaled by what spans fewer axes."""
        name = eqn.primitive.name
        lazy = [i for i, flow in enumerate(flows) if any(not trail.through for trail in flow.trails.values())]
        if len(lazy) != 1 or name not in (*_IN_FORM, "mul", "div"):
            return None
        if name == "convert_element_type" and not stays_in_form(eqn.invars[0].aval.dtype, eqn.params["new_dtype"]):
            return None
        if name in ("mul", "div"):
            mine, other = before[lazy[0]], before[1 - lazy[0]]
            fits = mine == shape and (other != shape or shape == ())
            return lazy[0] if fits and not (name == "div" and lazy == [1]) else None
        return lazy[0]

    def unknown(self, name: str, flows: list[Flow], before: Any, after: Any) -> list[Flow]:
        """An operation of unknown axes: beside an input it is a meeting; else every axis may come from any."""
        trails: dict[str, Trail] = {}
        for flow in flows:
            for path, trail in flow.trails.items():
                trails[path] = dataclasses.replace(trail, through=trail.through or name)
        if any(flow.mixed and not flow.trails and shape for flow, shape in zip(flows, before, strict=True)):
            for path, trail in trails.items():
                ndim = len(self.shapes[path])
                self.note(path, trail, name, tuple(range(ndim - 1)), (ndim - 1,) if ndim else ())
            return [INPUT] * len(after)
        for path, trail in trails.items():
            self.note(path, trail, name)
        smeared = lambda trail, shape: trail.moved([frozenset(trail.on(range(len(trail.axes))))] * len(shape))
        mixed = any(flow.mixed for flow in flows)
        return [Flow({p: smeared(t, shape) for p, t in trails.items()}, mixed) for shape in after]

    def fixed_point(self, start: list[Flow], body: Callable[[list[Flow]], list[Flow]]) -> list[Flow]:
        """Values that a loop carries: joined with what its body makes of it until nothing is new."""
        silent, self.silent = self.silent, True
        carry = start
        while (after := [_join(old, new) for old, new in zip(carry, body(carry), strict=True)]) != carry:
            carry = after  # every pass adds an axis or a path, of which there are few
        self.silent = silent
        return carry


# -- axes -------------------------------------------------------------------------------------------------------------


def _fits(shape: tuple[int, ...], into: tuple[int, ...]) -> bool:
    return shape == () or (len(shape) == len(into) and all(n in (1, m) for n, m in zip(shape, into, strict=True)))


def _stretched(shape: tuple[int, ...], into: tuple[int, ...]) -> list[int | None]:
    """For every axis of the result, the operand's axis that it is; None where the operand has none."""
    return [None] * len(into) if shape == () else list(range(len(into)))


def _joined(operands: Sequence[Operand], through: str) -> dict[str, Trail]:
    """The trails of several operands in one result, whose axes are those of each operand that are given."""
    found: dict[str, Trail] = {}
    for flow, axes in operands:
        for path, trail in flow.trails.items():
            moved = trail.moved([frozenset() if i is None else trail.axes[i] for i in axes])
            found[path] = _union(found[path], moved) if path in found else moved
    return {path: trail.moved(trail.axes, through) for path, trail in found.items()}


def _union(one: Trail, other: Trail) -> Trail:
    if len(one.axes) != len(other.axes):
        return one
    axes = [x | y for x, y in zip(one.axes, other.axes, strict=True)]
    through = one.through or other.through
    return Trail(tuple(axes), one.stack | other.stack, one.gathered | other.gathered, through)


def _join(one: Flow, other: Flow) -> Flow:
    trails = dict(one.trails)
    for path, trail in other.trails.items():
        trails[path] = _union(trails[path], trail) if path in trails else trail
    return Flow(trails, one.mixed or other.mixed)


def _picked(trail: Trail, axes: Sequence[int]) -> Trail:
    """One index was chosen along `axes`: what of the parameter no other axis comes from is a stack."""
    left = [frozenset() if i in axes else origin for i, origin in enumerate(trail.axes)]
    gone = frozenset().union(*(trail.axes[i] for i in axes)) - frozenset().union(*left)
    return trail.moved(left, stack=trail.stack | gone)


def _each(flow: Flow, act: Callable[[Trail], Trail]) -> Flow:
    return Flow({path: act(trail) for path, trail in flow.trails.items()}, flow.mixed)


# -- operations that move axes: (equation, flows, shapes before, shapes after) -> flows --------------------------------


def _transpose(eqn: Any, flows: list[Flow], before: Any, after: Any) -> list[Flow]:
    order = eqn.params["permutation"]
    return [_each(flows[0], lambda t: t.moved([t.axes[i] for i in order]))]


def _reshape(eqn: Any, flows: list[Flow], before: Any, after: Any) -> list[Flow]:
    order = eqn.params["dimensions"] or range(len(before[0]))
    shape = [before[0][i] for i in order]
    groups = ax.reshape_groups(shape, after[0])

    def act(trail: Trail) -> Trail:
        trail = trail.moved([trail.axes[i] for i in order])
        axes: list[Origin] = [frozenset()] * len(after[0])
        for old, new in groups:
            source = frozenset(trail.on(old))
            for axis in new:
                axes[axis] = source if after[0][axis] != 1 or all(shape[i] == 1 for i in old) else frozenset()
        return trail.moved(axes)

    return [_each(flows[0], act)]


def _broadcast(eqn: Any, flows: list[Flow], before: Any, after: Any) -> list[Flow]:
    place = {new: old for old, new in enumerate(eqn.params["broadcast_dimensions"])}
    act = lambda t: t.moved([t.axes[place[i]] if i in place else frozenset() for i in range(len(after[0]))])
    return [_each(flows[0], act)]


def _squeeze(eqn: Any, flows: list[Flow], before: Any, after: Any) -> list[Flow]:
    gone = [i % len(before[0]) for i in eqn.params["dimensions"]]
    return [_each(flows[0], lambda t: t.moved([o for i, o in enumerate(t.axes) if i not in gone]))]


def _slice(eqn: Any, flows: list[Flow], before: Any, after: Any) -> list[Flow]:
    one = [i for i, (n, m) in enumerate(zip(before[0], after[0], strict=True)) if m == 1 != n]
    return [_each(flows[0], lambda trail: _picked(trail, one))]


def _split(eqn: Any, flows: list[Flow], before: Any, after: Any) -> list[Flow]:
    return [_slice(eqn, flows, before, [shape])[0] for shape in after]


def _same_axes(eqn: Any, flows: list[Flow], before: Any, after: Any) -> list[Flow]:
    """A padding, a concatenation, an update: axes stay, and change their lengths."""
    name, ndim = eqn.primitive.name, len(after[0])
    operands: list[Operand] = [
        (f, _stretched(s, after[0])) for f, s in zip(flows, before, strict=True) if len(s) == ndim
    ]
    joined = _joined(operands, "" if name in _IN_FORM else name)
    return [Flow(joined, any(flow.mixed for flow in flows))]


def _unstack(eqn: Any, flows: list[Flow], before: Any, after: Any) -> list[Flow]:
    axis = eqn.params["axis"]
    drop = lambda trail: trail.moved([*trail.axes[:axis], *trail.axes[axis + 1 :]])
    return [_each(flows[0], lambda trail: drop(_picked(trail, [axis])))] * len(after)


def _stack(eqn: Any, flows: list[Flow], before: Any, after: Any) -> list[Flow]:
    axes: list[int | None] = list(range(len(before[0])))
    axes.insert(eqn.params["axis"], None)
    return [Flow(_joined([(flow, axes) for flow in flows], "stack"), any(flow.mixed for flow in flows))]


def _reduce(eqn: Any, flows: list[Flow], before: Any, after: Any) -> list[Flow]:
    gone = eqn.params["axes"]
    operands: list[Operand] = [
        (flow, [i for i in range(len(shape)) if i not in gone])
        for flow, shape in zip(flows, before, strict=True)
        if shape
    ]
    return [Flow(_joined(operands, eqn.primitive.name), any(flow.mixed for flow in flows))] * len(after)


def _scatter(eqn: Any, flows: list[Flow], before: Any, after: Any) -> list[Flow]:
    operand, _, updates = flows
    numbers = eqn.params["dimension_numbers"]
    inserted = {*numbers.inserted_window_dims, *getattr(numbers, "operand_batching_dims", ())}
    window = [i for i in range(len(after[0])) if i not in inserted]
    place = dict(zip(window, numbers.update_window_dims, strict=True))
    rows = [i for i in range(len(before[2])) if i not in numbers.update_window_dims]

    def landed(trail: Trail) -> Trail:
        """Rows go to where the indices say: along the axes that are inserted."""
        where = frozenset(trail.on(rows))
        return trail.moved([trail.axes[place[i]] if i in place else where for i in range(len(after[0]))])

    same: list[int | None] = list(range(len(after[0])))
    operands: list[Operand] = [(operand, same), (_each(updates, landed), same)]
    return [Flow(_joined(operands, eqn.primitive.name), any(flow.mixed for flow in flows))]


_MOVES: dict[str, Callable[..., list[Flow]]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "slice": _slice,
    "dynamic_slice": _slice,
    "split": _split,
    "unstack": _unstack,  # stack, unstack and tile: from JAX 0.12
    "tile": _same_axes,
    "pad": _same_axes,
    "concatenate": _same_axes,
    "stack": _stack,
    "dynamic_update_slice": _same_axes,
    "optimization_barrier": lambda eqn, flows, before, after: flows,
    **dict.fromkeys(
        ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin"),
        _reduce,
    ),
    **dict.fromkeys(
        ("scatter", "scatter_add", "scatter-add", "scatter_mul", "scatter_min", "scatter_max", "scatter_sub"), _scatter
    ),
}
_IN_FORM = {*UNARY, *PLACES, "broadcast_in_dim", "dynamic_slice", "pad", "optimization_barrier"}
_SUMS = ("add", "sub", "add_any")


# -- where a weight meets an input: (walk, equation, flows, shapes before, shapes after) -> flows ----------------------


def _dot(walk: _Walk, eqn: Any, flows: list[Flow], before: Any, after: Any) -> list[Flow]:
    contracted, batch = eqn.params["dimension_numbers"]
    free = [[i for i in range(len(s)) if i not in (*contracted[k], *batch[k])] for k, s in enumerate(before)]
    sides = [k for k in (0, 1) if flows[k].trails]
    pure = [k for k in sides if flows[k].pure]
    if len(pure) == 2 and flows[0].trails.keys() & flows[1].trails.keys():
        matrices = [1]  # a weight with itself
    else:
        matrices = [min(pure, key=lambda k: flows[k].width)] if pure else sides
    for k in matrices:
        for path, trail in flows[k].trails.items():
            _note_product(walk, eqn, path, trail, contracted[k], free[k], batch[k], lone=flows[k].pure)
    if len(pure) < 2:
        return [INPUT]
    k = 1 - matrices[0]  # of two weights, the other one goes on: what it was contracted with lies on the matrix's axes
    shared = {path for path in flows[k].trails if path in flows[1 - k].trails}

    def act(trail: Trail) -> Trail:
        through = frozenset(trail.on(contracted[k]))
        mine, theirs = [trail.axes[i] for i in free[k]], [through] * len(free[1 - k])
        rest = [*mine, *theirs] if k == 0 else [*theirs, *mine]
        return trail.moved([*(trail.axes[i] for i in batch[k]), *rest], "dot_general")

    rows = walk.ended(Flow({p: t for p, t in flows[k].trails.items() if p not in shared}))
    return [_each(rows, act) if rows.trails else INPUT]


def _note_product(
    walk: _Walk, eqn: Any, path: str, trail: Trail, contracted: Any, free: Any, batch: Any, *, lone: bool = False
) -> None:
    """A product of rows with a matrix; rows of a table that are no matrices themselves are a look-up.

    A lone weight, no activation that has something of one, may have its one input or output squeezed away.
    """
    inputs, outputs = trail.on(contracted), trail.on(free)
    if lone and bool(inputs) != bool(outputs):
        taken = {*inputs, *outputs, *trail.stack, *trail.gathered, *trail.on(batch)}
        ones = tuple(i for i, n in enumerate(walk.shapes[path]) if n == 1 and i not in taken)
        inputs, outputs = inputs or ones, outputs or ones
    if trail.gathered and not (inputs and outputs):
        walk.note(path, trail, "gather", sorted(trail.gathered), trail.on(range(len(trail.axes))))
        return
    stacked = dataclasses.replace(trail, stack=trail.stack | frozenset(trail.on(batch)))
    walk.note(path, stacked, eqn.primitive.name, inputs, outputs)


def _conv(walk: _Walk, eqn: Any, flows: list[Flow], before: Any, after: Any) -> list[Flow]:
    numbers = eqn.params["dimension_numbers"]
    (batch, *inputs), (out, *window) = numbers.lhs_spec, numbers.rhs_spec
    plain = eqn.params["batch_group_count"] == 1
    for k, free, contracted in ((0, [batch], inputs), (1, [out], window)):
        if k == 0 and flows[1].pure:
            continue
        for path, trail in flows[k].trails.items():
            trail = trail if k == 1 and plain else trail.moved(trail.axes, eqn.primitive.name)
            # Of an ensemble under vmap, groups are the members: each has a kernel of its own.
            members = [i for i in trail.on(free) if walk.shapes[path][i] == eqn.params["feature_group_count"] > 1]
            if k == 1 and len(members) == 1 < len(trail.on(free)):
                axes = [origin - {members[0]} for origin in trail.axes]
                trail = trail.moved(axes, eqn.primitive.name, stack=trail.stack | {members[0]})
            _note_product(walk, eqn, path, trail, contracted, free, ())
    return [INPUT]


def _ragged(walk: _Walk, eqn: Any, flows: list[Flow], before: Any, after: Any) -> list[Flow]:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracted, batch = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    for k, group in ((0, ()), (1, groups)):
        stack = (*batch[k], *group)
        free = [i for i in range(len(before[k])) if i not in (*contracted[k], *stack)]
        for path, trail in flows[k].trails.items():
            if k == 1 or not flows[1].pure:
                _note_product(walk, eqn, path, trail, contracted[k], free, stack)
    return [INPUT]


def _gather(walk: _Walk, eqn: Any, flows: list[Flow], before: Any, after: Any) -> list[Flow]:
    table, indices = flows
    if not table.trails:  # a parameter decides which rows: it has no gradient
        for path, trail in indices.trails.items():
            walk.note(path, trail, "gather")
        return [INPUT]
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    batching = dict(
        zip(
            getattr(numbers, "start_indices_batching_dims", ()),
            getattr(numbers, "operand_batching_dims", ()),
            strict=True,
        )
    )
    gone = {*numbers.collapsed_slice_dims, *batching.values()}
    kept = [i for i in range(len(before[0])) if i not in gone]
    found = [i for i in numbers.start_index_map if i in gone or sizes[i] != before[0][i]]
    offset = dict(zip(numbers.offset_dims, kept, strict=True))
    rows = iter(range(len(before[1]) - 1))
    source = [offset[i] if i in offset else batching.get(next(rows)) for i in range(len(after[0]))]

    def act(trail: Trail) -> Trail:
        looked_up = frozenset(trail.on(found))
        axes = [frozenset() if i is None or i in found else trail.axes[i] for i in source]
        odd = bool(batching) or any(sizes[i] not in (1, before[0][i]) for i in found)
        where = "gathered" if len(before[1]) > 1 else "stack"
        return trail.moved(axes, eqn.primitive.name if odd else "", **{where: getattr(trail, where) | looked_up})

    return [_each(table, act)]


_MEETINGS: dict[str, Callable[..., list[Flow]]] = {
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "ragged_dot_general": _ragged,
    "gather": _gather,
}


# -- higher-order primitives: (walk, equation, flows) -> flows ---------------------------------------------------------


def _call(walk: _Walk, eqn: Any, flows: list[Flow]) -> list[Flow]:
    (body, *_) = [open_jaxpr(eqn.params[name]) for name in ("jaxpr", "call_jaxpr") if name in eqn.params]
    jaxpr, consts = body
    return walk.run(jaxpr, [CONSTANT] * len(consts), flows)


def _custom(walk: _Walk, eqn: Any, flows: list[Flow]) -> list[Flow]:
    """A function with a derivative of its own takes arrays."""
    name = eqn.primitive.name
    for flow in flows:
        for path, trail in flow.trails.items():
            if not trail.through:
                walk.note(path, trail, name)
    return _call(walk, eqn, [_built(walk.ended(flow), name) for flow in flows])


def _scan(walk: _Walk, eqn: Any, flows: list[Flow]) -> list[Flow]:
    jaxpr, closed = open_jaxpr(eqn.params["jaxpr"])
    num_consts, num_carry = scan_counts(eqn.params)
    consts, start, xs = flows[:num_consts], flows[num_consts : num_consts + num_carry], flows[num_consts + num_carry :]
    popped: dict[str, Origin] = {}
    for flow in xs:
        for path, trail in flow.trails.items():
            popped[path] = popped.get(path, frozenset()) | trail.axes[0]
    rows = [_each(flow, lambda t: t.moved(t.axes[1:], stack=t.stack | t.axes[0])) for flow in xs]
    body = lambda carry: walk.run(jaxpr, [CONSTANT] * len(closed), [*consts, *carry, *rows])
    moving = jaxpr.invars[num_consts : num_consts + num_carry]
    start = _loop_carry(start, moving, jaxpr.outvars[:num_carry], "scan")
    carry = walk.fixed_point(start, lambda carry: body(carry)[:num_carry])
    results = body(carry)

    def stacked(flow: Flow) -> Flow:
        back = lambda path, t: t.moved([t.stack & popped.get(path, frozenset()), *t.axes])
        return Flow({path: back(path, trail) for path, trail in flow.trails.items()}, flow.mixed)

    return [_join(c, r) for c, r in zip(carry, results[:num_carry], strict=True)] + list(
        map(stacked, results[num_carry:])
    )


def _while(walk: _Walk, eqn: Any, flows: list[Flow]) -> list[Flow]:
    params = eqn.params
    (test, test_closed), (body, body_closed) = open_jaxpr(params["cond_jaxpr"]), open_jaxpr(params["body_jaxpr"])
    edges = [0, *itertools.accumulate((params["cond_nconsts"], params["body_nconsts"])), len(flows)]
    test_consts, body_consts, start = (flows[i:j] for i, j in itertools.pairwise(edges))
    start = _loop_carry(start, body.invars[len(body_consts) :], body.outvars, "while")
    run = lambda carry: walk.run(body, [CONSTANT] * len(body_closed), [*body_consts, *carry])
    carry = walk.fixed_point(start, run)
    walk.run(test, [CONSTANT] * len(test_closed), [*test_consts, *carry])
    return [_join(before, after) for before, after in zip(carry, run(carry), strict=True)]


def _cond(walk: _Walk, eqn: Any, flows: list[Flow]) -> list[Flow]:
    branches = [open_jaxpr(branch) for branch in eqn.params["branches"]]
    results = [walk.run(jaxpr, [CONSTANT] * len(consts), flows[1:]) for jaxpr, consts in branches]
    joined = [functools.reduce(_join, each) for each in zip(*results, strict=True)]
    given = [[_position(jaxpr.invars, out) for out in jaxpr.outvars] for jaxpr, _ in branches]
    passed = [len(set(each)) == 1 and each[0] is not None for each in zip(*given, strict=True)]
    return [flow if same else _built(flow, "cond") for flow, same in zip(joined, passed, strict=True)]


def _loop_carry(start: Sequence[Flow], before: Sequence[Any], after: Sequence[Any], name: str) -> list[Flow]:
    """A carry that the body returns as it came stays a weight; any other is an array."""
    return [f if v is w else _built(f, name) for f, v, w in zip(start, before, after, strict=True)]


def _built(flow: Flow, name: str) -> Flow:
    return _each(flow, lambda trail: trail.moved(trail.axes, name))


def _position(variables: Sequence[Any], variable: Any) -> int | None:
    return next((i for i, v in enumerate(variables) if v is variable), None)


_HIGHER_ORDER: dict[str, Callable[..., list[Flow]]] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "shard_map"), _call),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call", "custom_lin"), _custom),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
