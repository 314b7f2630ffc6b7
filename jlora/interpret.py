"""The interpreter that runs a traced JAX function on lazy weights. The one file that reads and evaluates jaxprs."""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex
from jax.sharding import PartitionSpec

from jlora import rules
from jlora.rules import Product, Use
from jlora.weight import NotSeparable, Weight

_LIBRARIES = (
    contextlib.__file__,
    functools.__file__,
    *(
        os.path.dirname(spec.origin) + os.sep
        for name in ("jax", "jaxlib", "flax", "haiku", "equinox", "jlora", "optax")
        if (spec := importlib.util.find_spec(name)) and spec.origin
    ),
)  # whose lines are not the model's own


UNTOUCHED = "returned as it is by the function"  # why a weight is materialised that nothing has read


class MaterialisedError(ValueError):
    """Raised by `lift(fn, strict=True)` where a weight would be materialised."""


@dataclasses.dataclass
class Trace:
    """What one evaluation of a lifted function needs to know, and what it notes down.

    Attributes:
      strict: raise where a weight would be materialised.
      forward_mode: use products that forward-mode differentiation can pass.
      uses: every operation that read a weight, in program order.
      repeat: how often the code at hand runs: the product of the lengths of the scans around it.
      around: the equations being evaluated, outermost first.
      extras: of the leaves trained as they are, by path: whether an operation reads them.
    """

    strict: bool = False
    forward_mode: bool = False
    uses: list[Use] = dataclasses.field(default_factory=list)
    repeat: int = 1
    around: list[Any] = dataclasses.field(default_factory=list)
    extras: dict[str, bool] = dataclasses.field(default_factory=dict)

    @property
    def line(self) -> str:
        """The model's line, of the innermost equation that knows one: what is cached inside a jit does not."""
        return next(filter(None, map(_line, reversed(self.around))), "")

    def note(self, weight: Weight, op: str, product: Product) -> None:
        """A factored use."""
        stack = tuple(sorted(set(product.stack_axes)))
        self.uses.append(
            Use(weight.path, op, product.in_axes, product.out_axes, stack, True, weight.rank,
                product.flops * self.repeat, self.line)
        )  # fmt: skip

    def note_dense(self, weight: Weight, op: str, reason: str) -> None:
        """A use that materialises the weight."""
        line = self.line
        if weight.key is not None:
            reason = f"{reason or f'`{op}` has no factored form'}; dropout is not applied"
        if self.strict:
            raise MaterialisedError(
                f"strict: {weight.path!r} would be materialised by `{op}` at {line}"
                f"{' (' + reason + ')' if reason else ''}; leave it out with targets=, or lift without strict=True"
            )
        axes = tuple(sorted({i for origin in weight.origin for i in origin}))
        flops = 2 * weight.rank * weight.w.size * self.repeat
        self.uses.append(
            Use(weight.path, op, (), axes, weight.stack, False, weight.rank, flops, line,
                reason or f"`{op}` has no factored form")
        )  # fmt: skip

    @contextlib.contextmanager
    def inside(self, eqn: Any) -> Iterator[None]:
        """Marks the equation that is being evaluated."""
        self.around.append(eqn)
        try:
            yield
        finally:
            self.around.pop()

    @contextlib.contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        """Counts the FLOPs of a loop's body `times` times."""
        self.repeat *= times
        try:
            yield
        finally:
            self.repeat //= times


def trace_weights(fn: Callable[..., Any], weights: Sequence[Weight], trace: Trace) -> Any:
    """`fn(*weights)` for a function of plain arrays, evaluated on lazy weights.

    `fn` is traced once with `jax.make_jaxpr` on the weights' shapes; everything else that it reads is closed over.
    """
    out_tree = None

    def flat(*arrays: jax.Array) -> list[Any]:
        nonlocal out_tree
        leaves, out_tree = jax.tree.flatten(fn(*arrays))
        return leaves

    closed = jax.make_jaxpr(flat)(*[weight.w for weight in weights])
    jaxpr, consts = _open(closed)
    adapters = {weight.path for weight in weights if weight.trained and not weight.optional}
    if adapters:
        trace.uses.extend(use for use in _applications(jaxpr) if use.path in adapters)
    operands = {v for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, jex.Literal)}
    pairs = list(zip(jaxpr.invars, weights, strict=True))
    trace.extras |= {weight.path: variable in operands for variable, weight in pairs if weight.optional}
    arguments = [weight.w if weight.trained else weight for weight in weights]
    return jax.tree.unflatten(out_tree, _all_dense(evaluate(jaxpr, consts, arguments, trace), arguments, trace))


# -- adapters of activations: applied while the function is traced, found again in its jaxpr ---------------------------

_MARK = re.compile(r"adapter\[([^\[\]|]*)\|([^|]*)\|(\d+)\|(\d+)\|([^\]]*)\]")


def mark(path: str, op: str, rank: int, flops: int, where: str) -> contextlib.AbstractContextManager[Any]:
    """Marks the operations that apply an adapter, in their name stack: what JAX has traced before is found, too."""
    return jax.named_scope(f"adapter[{path}|{op}|{rank}|{flops}|{where}]")


def _applications(jaxpr: Any, repeat: int = 1) -> Iterator[Use]:
    """A use for every run of operations with one mark.

    Raises:
      ValueError: for one inside a function with a derivative of its own, whose rule is traced when the interceptors are
        gone: the gradient would be that of the base.
    """
    before = None
    for eqn in jaxpr.eqns:
        found = _MARK.search(str(eqn.source_info.name_stack))
        label = found[0] if found else None
        if found and label != before:
            yield Use(found[1], found[2], (), (), (), True, int(found[3]), int(found[4]) * repeat, found[5])
        before = label
        if found:
            continue
        times = repeat * eqn.params["length"] if eqn.primitive.name == "scan" else repeat
        for use in (use for body in _bodies(eqn) for use in _applications(body, times)):
            if eqn.primitive.name in ("custom_vjp_call", "custom_jvp_call"):
                raise ValueError(
                    f"the adapter of {use.path!r} is applied inside a function with a derivative of its own "
                    f"({eqn.primitive.name}), whose rule JAX traces later, without the adapter; leave the model out of "
                    "that function, or the weight out with targets="
                )
            yield use


def _bodies(eqn: Any) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    values = [v for value in eqn.params.values() for v in (value if isinstance(value, tuple) else (value,))]
    return [body for body in (_open(v)[0] for v in values) if hasattr(body, "eqns")]


# -- the interpreter --------------------------------------------------------------------------------------------------


def evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], trace: Trace) -> list[Any]:
    """Runs a jaxpr whose arguments may be lazy weights; results may be, too.

    Equations without a lazy operand run as they are, in segments.
    """
    env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    if not any(isinstance(value, Weight) for value in env.values()):
        plain = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
        return list(jex.jaxpr_as_fun(jex.ClosedJaxpr(plain, []))(*env.values()))
    last_use = _last_uses(jaxpr)
    materialised: dict[int, tuple[Weight, jax.Array]] = {}

    def read(atom: Any) -> Any:
        if isinstance(atom, jex.Literal):
            return np.asarray(atom.val, dtype=getattr(atom.aval, "dtype", None))
        value = env[atom]
        return materialised[id(value)][1] if id(value) in materialised else value

    def make_dense(weight: Weight, eqn: Any, reason: str) -> jax.Array:
        if id(weight) not in materialised:
            materialised[id(weight)] = (weight, _dense(weight, eqn.primitive.name, reason, trace))
        return materialised[id(weight)][1]

    pending: list[Any] = []
    for position, eqn in enumerate(jaxpr.eqns):
        if not any(isinstance(env.get(v), Weight) for v in eqn.invars if not isinstance(v, jex.Literal)):
            pending.append(eqn)
            continue
        env.update(_run_segment(jaxpr, pending, env, last_use, position))
        pending = []
        values = [read(v) for v in eqn.invars]
        with eqn.ctx.manager, _scope(eqn), trace.inside(eqn):
            results = _apply(eqn, values, trace, functools.partial(make_dense, eqn=eqn))
        env.update(zip(eqn.outvars, results, strict=True))
    env.update(_run_segment(jaxpr, pending, env, last_use, len(jaxpr.eqns)))
    return [read(v) for v in jaxpr.outvars]


def _apply(eqn: Any, values: list[Any], trace: Trace, make_dense: Callable[..., jax.Array]) -> list[Any]:
    """One equation with at least one operand that was lazy when it was reached."""
    name, reason = eqn.primitive.name, ""
    lazy = [v for v in values if isinstance(v, Weight)]
    if not lazy:
        return _bind(eqn, values)
    if name in HIGHER_ORDER:
        return HIGHER_ORDER[name](eqn, values, trace, make_dense)
    try:
        kept = rules.structural(name, values, eqn.params)
        if kept is not None:
            return list(kept)
        if name in rules.PRODUCTS:
            matrix = min(lazy, key=_is_rather_an_input)
            if matrix.observed and name != "dot_general":
                raise NotSeparable("not a product of rows with a matrix")
            kept_at = max(i for i, v in enumerate(values) if v is matrix)
            values = [
                make_dense(v, reason="product of two adapted weights") if isinstance(v, Weight) and i != kept_at else v
                for i, v in enumerate(values)
            ]
            product = rules.PRODUCTS[name](matrix, values, eqn.params, trace.forward_mode)
            if not isinstance(product.value, Weight):
                trace.note(matrix, name, product)
            return [product.value]
    except NotSeparable as error:
        reason = str(error)
    return _bind(eqn, [make_dense(v, reason=reason) if isinstance(v, Weight) else v for v in values])


def _is_rather_an_input(weight: Weight) -> tuple[bool, int]:
    """Of two weights in a product, rows of a table come first, then what has fewer axes (a norm's scale)."""
    return bool(weight.gathered), -len({axis for axes in weight.origin for axis in axes})


def _dense(weight: Weight, op: str, reason: str, trace: Trace) -> jax.Array:
    """The array of a weight: rows of a table are a look-up, anything else is materialised."""
    if weight.gathered:
        rows = rules.table_rows(weight)
        trace.note(weight, "gather", rows)
        return rows.value
    trace.note_dense(weight, op, reason)
    return weight.dense()


def _all_dense(values: Sequence[Any], arguments: Sequence[Any], trace: Trace) -> list[Any]:
    """Results of the lifted function are arrays: a weight that it returns is materialised."""
    untouched = {id(weight) for weight in arguments}

    def result(value: Weight) -> jax.Array:
        return _dense(value, "return", UNTOUCHED if id(value) in untouched else "returned by the function", trace)

    return [result(value) if isinstance(value, Weight) else value for value in values]


def _bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Runs one equation on plain values, with no knowledge of its parameters."""
    variables: list[Any] = []
    operands: list[Any] = []
    for atom, value in zip(eqn.invars, values, strict=True):
        if not isinstance(atom, jex.Literal) and atom not in variables:
            variables.append(atom)
            operands.append(value)
    return _run([eqn], variables, list(eqn.outvars), operands)


def _run(eqns: Sequence[Any], variables: Sequence[Any], outvars: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
    template = _template()
    kept = [v for v in outvars if not isinstance(v, jex.DropVar)] if hasattr(jex, "DropVar") else list(outvars)
    segment = template.replace(
        invars=list(variables),
        outvars=kept,
        eqns=list(eqns),
        effects=set().union(*(eqn.effects for eqn in eqns)),
        debug_info=template.debug_info.with_unknown_names(),
    )
    results = dict(zip(kept, jex.jaxpr_as_fun(jex.ClosedJaxpr(segment, []))(*operands), strict=True))
    return [results.get(v) for v in outvars]


@functools.cache
def _template() -> Any:
    """An empty jaxpr, to be filled with `replace`."""
    return _open(jax.make_jaxpr(lambda: ())())[0]


def _run_segment(
    jaxpr: Any, eqns: list[Any], env: dict[Any, Any], last_use: dict[Any, int], end: int
) -> dict[Any, Any]:
    """Runs equations that have no lazy operand; returns the values that are read at or after position `end`."""
    if not eqns:
        return {}
    made = {v for eqn in eqns for v in eqn.outvars}
    needed = dict.fromkeys(
        v for eqn in eqns for v in eqn.invars if not isinstance(v, jex.Literal) and v not in made
    )  # fmt: skip
    outvars = [v for eqn in eqns for v in eqn.outvars if last_use.get(v, -1) >= end]
    return dict(zip(outvars, _run(eqns, list(needed), outvars, [env[v] for v in needed]), strict=True))


def _last_uses(jaxpr: Any) -> dict[Any, int]:
    last = {}
    for position, eqn in enumerate(jaxpr.eqns):
        for v in eqn.invars:
            if not isinstance(v, jex.Literal):
                last[v] = position
    for v in jaxpr.outvars:
        if not isinstance(v, jex.Literal):
            last[v] = len(jaxpr.eqns)
    return last


def _open(jaxpr: Any) -> tuple[Any, tuple[Any, ...]]:
    """A jaxpr and its constants. Sub-jaxprs are `ClosedJaxpr` in JAX 0.10 and `Jaxpr` with constants in 0.12."""
    return getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ()))


def _scope(eqn: Any) -> contextlib.AbstractContextManager[Any]:
    """The name stack of the equation, for profiles."""
    name = str(eqn.source_info.name_stack)
    return jax.named_scope(name) if name else contextlib.nullcontext()


def _line(eqn: Any) -> str:
    """The innermost line of the traceback that is not a library's."""
    traceback = getattr(eqn.source_info, "traceback", None)
    if traceback is None:
        return ""
    for frame in traceback.frames:
        if not frame.file_name.startswith(_LIBRARIES):
            return f"{frame.file_name.rsplit('/', 1)[-1]}:{frame.line_num}"
    return ""


# -- higher-order primitives: (equation, values, trace, make_dense) -> results -----------------------------------------


def _jit(eqn: Any, values: list[Any], trace: Trace, make_dense: Any) -> list[Any]:
    # Evaluated in place: XLA inlines nested jits in any case, and a lazy weight can pass in and out. The name stays.
    jaxpr, consts = _open(eqn.params["jaxpr"])
    with jax.named_scope(eqn.params["name"]):
        return evaluate(jaxpr, consts, values, trace)


def _call(eqn: Any, values: list[Any], trace: Trace, make_dense: Any) -> list[Any]:
    jaxpr, consts = _open(eqn.params["call_jaxpr"])
    return evaluate(jaxpr, consts, values, trace)


def _remat(eqn: Any, values: list[Any], trace: Trace, make_dense: Any) -> list[Any]:
    jaxpr, consts = _open(eqn.params["jaxpr"])
    forwarded = _forwarded(jaxpr, values)

    def body(*args: Any) -> list[Any]:
        results = evaluate(jaxpr, consts, args, trace)
        return [None if i in forwarded else r for i, r in enumerate(results)]

    results = jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])(*values)
    return [forwarded.get(i, r) for i, r in enumerate(results)]


def _forwarded(jaxpr: Any, values: Sequence[Any]) -> dict[int, Weight]:
    """Results that are arguments passed through, as NNX threads parameters: they stay the weights that they were."""
    lazy = {var: value for var, value in zip(jaxpr.invars, values, strict=True) if isinstance(value, Weight)}
    return {i: lazy[v] for i, v in enumerate(jaxpr.outvars) if not isinstance(v, jex.Literal) and v in lazy}


def _scan(eqn: Any, values: list[Any], trace: Trace, make_dense: Any) -> list[Any]:
    params = eqn.params
    jaxpr, jaxpr_consts = _open(params["jaxpr"])
    num_consts, num_carry = _scan_counts(params)
    consts, carry, xs = _partition(values, num_consts, num_carry)
    body_carry = jaxpr.invars[num_consts : num_consts + num_carry]
    # A carry that the body returns as it came is a constant; another lazy carry would change its type.
    fixed = {i: w for i, w in enumerate(carry) if isinstance(w, Weight) and jaxpr.outvars[i] is body_carry[i]}
    carry = [
        make_dense(w, reason="carry of a scan") if isinstance(w, Weight) and i not in fixed else w
        for i, w in enumerate(carry)
    ]
    rows = [x.unstack() if isinstance(x, Weight) else (x, lambda row: row) for x in xs]
    passed = _forwarded(jaxpr, [None] * (num_consts + num_carry) + xs)

    def body(moving: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
        full = [fixed.get(i, m) for i, m in enumerate(moving)]
        complete = [rebuild(x) for x, (_, rebuild) in zip(row, rows, strict=True)]
        results = evaluate(jaxpr, jaxpr_consts, [*consts, *full, *complete], trace)
        moved = [None if i in fixed else _plain(r, eqn, trace) for i, r in enumerate(results[:num_carry])]
        return moved, [None if num_carry + i in passed else r for i, r in enumerate(results[num_carry:])]

    start = [None if i in fixed else _typed(c, v) for i, (c, v) in enumerate(zip(carry, body_carry, strict=True))]
    with trace.repeated(params["length"]):
        end, ys = lax.scan(
            body,
            start,
            [varies for varies, _ in rows],
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
    ys = [y.restack(y.stack[-1:]) if isinstance(y, Weight) else y for y in ys]
    return [fixed.get(i, e) for i, e in enumerate(end)] + [passed.get(num_carry + i, y) for i, y in enumerate(ys)]


def _scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # JAX 0.12: flat trees of constants, carry, xs
    return len(consts), len(carry)


def _while(eqn: Any, values: list[Any], trace: Trace, make_dense: Any) -> list[Any]:
    params = eqn.params
    cond, cond_closed = _open(params["cond_jaxpr"])
    body, body_closed = _open(params["body_jaxpr"])
    cond_consts, body_consts, carry = _partition(values, params["cond_nconsts"], params["body_nconsts"])
    moving = body.invars[len(body_consts) :]
    fixed = {i: w for i, w in enumerate(carry) if isinstance(w, Weight) and body.outvars[i] is moving[i]}
    carry = [
        make_dense(w, reason="carry of a while loop") if isinstance(w, Weight) and i not in fixed else w
        for i, w in enumerate(carry)
    ]

    def complete(state: list[Any]) -> list[Any]:
        return [fixed.get(i, s) for i, s in enumerate(state)]

    def condition(state: list[Any]) -> Any:
        (go,) = evaluate(cond, cond_closed, [*cond_consts, *complete(state)], trace)
        return go

    def step(state: list[Any]) -> list[Any]:
        results = evaluate(body, body_closed, [*body_consts, *complete(state)], trace)
        return [None if i in fixed else _plain(r, eqn, trace) for i, r in enumerate(results)]

    start = [None if i in fixed else _typed(c, v) for i, (c, v) in enumerate(zip(carry, moving, strict=True))]
    return complete(lax.while_loop(condition, step, start))


def _cond(eqn: Any, values: list[Any], trace: Trace, make_dense: Any) -> list[Any]:
    if eqn.params.get("branches_platforms"):
        reason = "branches by platform, of which this one cannot lower all"
        return _bind(eqn, [make_dense(v, reason=reason) if isinstance(v, Weight) else v for v in values])
    index, *operands = values
    branches = [_open(branch) for branch in eqn.params["branches"]]
    passed = [_forwarded(jaxpr, operands) for jaxpr, _ in branches]
    common = {i: w for i, w in passed[0].items() if all(other.get(i) is w for other in passed[1:])}
    # What only some branches return is an array in all of them: built once, before the choice.
    returned = {id(w) for some in passed for i, w in some.items() if i not in common}
    operands = [make_dense(v, reason="result of a branch") if id(v) in returned else v for v in operands]

    def branch(jaxpr: Any, consts: Any) -> Callable[[], list[Any]]:
        def run() -> list[Any]:
            results = evaluate(jaxpr, consts, operands, trace)
            return [None if i in common else _plain(r, eqn, trace) for i, r in enumerate(results)]

        return run

    results = lax.switch(index, [branch(*b) for b in branches])
    return [common.get(i, r) for i, r in enumerate(results)]


def _shard_map(eqn: Any, values: list[Any], trace: Trace, make_dense: Any) -> list[Any]:
    params = eqn.params
    jaxpr, consts = _open(params["jaxpr"])
    leaves, tree = jax.tree.flatten(list(values))
    specs = jax.tree.leaves(
        [
            _part_specs(v, spec) if isinstance(v, Weight) else spec
            for v, spec in zip(values, params["in_specs"], strict=True)
        ],
        is_leaf=lambda s: isinstance(s, PartitionSpec),
    )  # fmt: skip

    def body(*args: Any) -> tuple[Any, ...]:
        results = evaluate(jaxpr, consts, jax.tree.unflatten(tree, args), trace)
        return tuple(_plain(r, eqn, trace) for r in results)

    name = "newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"  # JAX 0.10.0
    mapped = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(specs),
        out_specs=tuple(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=params[name],
    )
    return list(mapped(*leaves))


def _part_specs(weight: Weight, spec: PartitionSpec) -> Weight:
    """The partition of each part: that of the axes which it spans."""
    names = tuple(spec) + (None,) * (weight.ndim - len(spec))

    def part(x: jax.Array, extra: int) -> Any:
        mine = [name if n == m else None for name, n, m in zip(names, x.shape, weight.shape, strict=False)]
        return PartitionSpec(*mine, *[None] * extra)

    return weight.map(part)


def _partition(values: Sequence[Any], *counts: int) -> tuple[list[Any], ...]:
    edges = [0, *itertools.accumulate(counts), len(values)]
    return tuple(list(values[i:j]) for i, j in itertools.pairwise(edges))


def _plain(value: Any, eqn: Any, trace: Trace) -> Any:
    """A result of a loop's or a branch's body."""
    if not isinstance(value, Weight):
        return value
    return _dense(value, eqn.primitive.name, "result of a loop or a branch", trace)


def _typed(value: Any, var: Any) -> Any:
    """A carry with the dtype that the body expects: literals arrive as NumPy scalars."""
    return jnp.asarray(value, var.aval.dtype) if isinstance(value, np.ndarray) else value


HIGHER_ORDER: dict[str, Callable[..., list[Any]]] = {
    "jit": _jit,
    "pjit": _jit,
    "closed_call": _call,
    "core_call": _call,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
