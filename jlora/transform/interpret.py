"""The interpreter that runs a traced JAX function on lazy weights. It knows no method."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex
from jax.sharding import PartitionSpec

from jlora import tree
from jlora.transform import rules
from jlora.transform.dequantised import on_arrays
from jlora.transform.explicit import explicit_mesh
from jlora.transform.jaxprs import bind, constant, last_uses, open_jaxpr, opened_end, run_segment, scan_counts, scope
from jlora.transform.marks import applications
from jlora.transform.mean import count_of_mean
from jlora.transform.product import ADAPTED, PLAIN, is_placed
from jlora.transform.trace import UNTOUCHED, Product, Trace
from jlora.transform.view import View
from jlora.transform.weight import NOBODYS, NotSeparable, Place, Trained, Weight


def trace_weights(fn: Callable[..., Any], weights: Sequence[Weight | Trained | tree.Stored], trace: Trace) -> Any:
    """`fn(*weights)` for a function of plain arrays, evaluated on lazy weights.

    A stored leaf is a weight without factors, and what is trained as it is is an array from here on. `fn` is traced
    once with `jax.make_jaxpr` on the weights' shapes; everything else that it reads is closed over.
    """
    out_tree: Any = None
    leaves: list[Any] = []

    def flat(*arrays: jax.Array) -> list[Any]:
        nonlocal out_tree, leaves
        leaves, out_tree = jax.tree.flatten(fn(*arrays))
        return [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

    arguments = [_argument(weight, trace) for weight in weights]
    closed = jax.make_jaxpr(flat)(*map(_array, arguments))
    jaxpr, consts = open_jaxpr(closed)
    trained = [(x, variable) for x, variable in zip(weights, jaxpr.invars, strict=True) if isinstance(x, Trained)]
    adapters = {(x.tree, x.path) for x, _ in trained if not x.optional}
    if adapters:
        trace.uses.extend(use for use in applications(jaxpr) if (use.tree, use.path) in adapters)
    operands = {v for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, jex.Literal)}
    trace.extras |= {(x.tree, x.path): variable in operands for x, variable in trained if x.optional}
    trace.program = (jaxpr, weights)
    count = None
    if trace.counted:
        jaxpr, given = opened_end(jaxpr, consts)
        count, consts, arguments = count_of_mean(jaxpr, len(given)), (), [*given, *arguments]
    asked = jaxpr if count is None else jaxpr.replace(outvars=[*jaxpr.outvars, count[0]])
    results = _all_dense(evaluate(asked, consts, arguments, trace), arguments, trace)
    if count is not None:
        trace.count = (results.pop(), count[1])
    arrays = (constant(v) if isinstance(v, jex.Literal) else x for v, x in zip(jaxpr.outvars, results, strict=True))
    # What the function returns beside arrays (a number, a string, a NumPy array) passes through as it is.
    full = [next(arrays) if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
    return jax.tree.unflatten(out_tree, full)


def _array(argument: Any) -> Any:
    """Array or shape that the function is traced on: a stored weight is an array to it, where its type says."""
    w = argument.w if isinstance(argument, Weight) else argument
    if not tree.is_stored(w):
        return w
    return jax.ShapeDtypeStruct(w.shape, w.dtype) if explicit_mesh(w) is None else jax.eval_shape(tree.dense, w)


def _argument(weight: Any, trace: Trace) -> Any:
    if isinstance(weight, Trained):
        return weight.value
    if tree.is_stored(weight):
        weight = Weight(weight, place=Place("", tuple((i,) for i in range(len(weight.shape))), tree=NOBODYS))
    return weight.replace(multiply=PLAIN) if trace.forward_mode and weight.multiply is ADAPTED else weight


# -- the interpreter --------------------------------------------------------------------------------------------------


def evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], trace: Trace) -> list[Any]:
    """Runs a jaxpr whose arguments may be lazy weights; results may be, too.

    Equations without a lazy operand run as they are, in segments.
    """
    env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    if not any(isinstance(value, Weight) for value in env.values()):
        plain = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
        return list(jex.jaxpr_as_fun(jex.ClosedJaxpr(plain, []))(*env.values()))
    last_use, met = last_uses(jaxpr), _Met(jaxpr)
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
        env.update(run_segment(jaxpr, pending, env, last_use, position))
        pending = []
        values = [read(v) for v in eqn.invars]
        with eqn.ctx.manager, scope(eqn), trace.inside(eqn):
            results = _apply(eqn, values, trace, functools.partial(make_dense, eqn=eqn), met)
        env.update(zip(eqn.outvars, results, strict=True))
    env.update(run_segment(jaxpr, pending, env, last_use, len(jaxpr.eqns)))
    return [read(v) for v in jaxpr.outvars]


class _Met:
    """The inputs of a jaxpr that several products meet (of query, key and value), as their factors meet them.

    Along an axis of tensor parallelism each product gives back its device's part of a whole `dx = g W^T`, and a whole
    `dz` of its factors. Added in the order of the products, no two parts meet before each has been summed over the
    devices; where the factors read an input of their own, the same for all of them, the parts of dx are added first,
    and XLA sums them once. Arrays whose types say where they lie are the ones that are known to be split.
    """

    def __init__(self, jaxpr: Any) -> None:
        operands = (
            v
            for eqn in jaxpr.eqns
            if eqn.primitive.name == "dot_general"
            for v in eqn.invars
            if not isinstance(v, jex.Literal)
        )
        self._often = {v for v, times in collections.Counter(operands).items() if times > 1}
        self._copies: dict[Any, jax.Array] = {}

    def __call__(self, variable: Any, x: Any) -> jax.Array | None:
        if variable not in self._often or not isinstance(x, jax.Array) or not is_placed(x):
            return None
        if variable not in self._copies:
            self._copies[variable] = jnp.copy(x)
        return self._copies[variable]


def _apply(
    eqn: Any, values: list[Any], trace: Trace, make_dense: Callable[..., jax.Array], met: _Met | None = None
) -> list[Any]:
    """One equation with at least one operand that was lazy when it was reached."""
    name, reason = eqn.primitive.name, ""
    lazy = [v for v in values if isinstance(v, Weight)]
    if not lazy:
        return bind(eqn, values)
    if name in HIGHER_ORDER:
        return HIGHER_ORDER[name](eqn, values, trace, make_dense)
    try:
        kept = rules.structural(eqn.primitive, values, eqn.params)
        if kept is not None:
            # Gathered here, the forward pass that is computed again and the backward pass share one gather. Outside a
            # checkpoint the gathered codes of every layer would be kept.
            early = name == "reshard" and trace.is_computed_again
            return [_with_gathered_codes(v) for v in kept] if early else list(kept)
        if name in rules.PRODUCTS:
            matrix = min(lazy, key=_is_rather_an_input)
            if not matrix.multiply.adds and name != "dot_general":
                raise NotSeparable("not a product of rows with a matrix")
            kept_at = max(i for i, v in enumerate(values) if v is matrix)
            values = [
                make_dense(v, reason="product of two adapted weights") if isinstance(v, Weight) and i != kept_at else v
                for i, v in enumerate(values)
            ]
            multiply = rules.PRODUCTS[name] if name == "dot_general" else functools.partial(_on_array, name)
            params = eqn.params
            if name == "dot_general" and met is not None and matrix.rank:
                params = params | {"met": met(eqn.invars[1 - kept_at], values[1 - kept_at])}
            product = multiply(matrix, values, params)
            if not isinstance(product.value, Weight):
                trace.note(matrix, name, product)
            return [product.value]
    except NotSeparable as error:
        reason = str(error)
    return _bind_dense(eqn, values, functools.partial(make_dense, reason=reason))


def _with_gathered_codes(value: Any) -> Any:
    """A weight with its codes gathered, where its view begins with a gather."""
    if isinstance(value, Weight) and isinstance(value.w, View):
        return value.replace(w=value.w.gathered())
    return value


def _on_array(name: str, weight: Weight, values: list[Any], params: dict[str, Any]) -> Product:
    """A product whose rule takes an array for the base. Of a stored one autodiff keeps the codes."""
    notes: list[Product] = []

    def run(w: Any, values: list[Any]) -> Any:
        opened = next(v for v in values if isinstance(v, Weight)).replace(w=w)
        values = [opened if isinstance(v, Weight) else v for v in values]
        notes.append(rules.PRODUCTS[name](opened, values, params))
        return notes[-1].value

    rest = [v.replace(w=None) if v is weight else v for v in values]
    value = on_arrays(run, weight.w, rest)
    return dataclasses.replace(notes[-1], value=value)


def _bind_dense(eqn: Any, values: list[Any], make_dense: Callable[..., jax.Array]) -> list[Any]:
    """An equation that takes arrays. Of a frozen stored weight autodiff keeps the codes, whatever the equation is."""
    dense = [make_dense(v) if isinstance(v, Weight) else v for v in values]
    if eqn.effects or not any(isinstance(v, Weight) and v.is_frozen_codes for v in values):
        return bind(eqn, dense)
    codes = [v.w if isinstance(v, Weight) and v.is_frozen_codes else None for v in values]
    rest = [None if w is not None else v for v, w in zip(dense, codes, strict=True)]

    def run(arrays: list[Any], rest: list[Any]) -> list[Any]:
        return bind(eqn, [x if x is not None else v for x, v in zip(arrays, rest, strict=True)])

    return list(on_arrays(run, codes, rest))


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

    def result(value: Any) -> Any:
        if not isinstance(value, Weight):
            return value
        return _dense(value, "return", UNTOUCHED if id(value) in untouched else "returned by the function", trace)

    return list(map(result, values))


# -- higher-order primitives: (equation, values, trace, make_dense) -> results -----------------------------------------


def _jit(eqn: Any, values: list[Any], trace: Trace, make_dense: Any) -> list[Any]:
    # Evaluated in place: XLA inlines nested jits in any case, and a lazy weight can pass in and out. The name stays.
    jaxpr, consts = open_jaxpr(eqn.params["jaxpr"])
    with jax.named_scope(eqn.params["name"]):
        return evaluate(jaxpr, consts, values, trace)


def _call(eqn: Any, values: list[Any], trace: Trace, make_dense: Any) -> list[Any]:
    jaxpr, consts = open_jaxpr(eqn.params["call_jaxpr"])
    return evaluate(jaxpr, consts, values, trace)


def _remat(eqn: Any, values: list[Any], trace: Trace, make_dense: Any) -> list[Any]:
    jaxpr, consts = open_jaxpr(eqn.params["jaxpr"])
    forwarded = _forwarded(jaxpr, values)

    def body(*args: Any) -> list[Any]:
        if eqn.params["prevent_cse"] and trace.is_computed_again:  # not in a scan, of which each turn waits anyway
            args = _held_back(args)
        results = evaluate(jaxpr, consts, args, trace)
        return [None if i in forwarded else r for i, r in enumerate(results)]

    results = jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])(*values)
    return [forwarded.get(i, r) for i, r in enumerate(results)]


def _held_back(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Codes that are there no sooner than the other inputs: XLA would gather those of all layers at the beginning.

    So that no more memory is taken than one layer's, the gather of a layer waits for the layer before.
    """
    sharded = lambda v: isinstance(v, Weight) and tree.is_stored(v.w) and explicit_mesh(v.w) is not None
    codes = [v.w if sharded(v) else None for v in args]
    if not any(w is not None for w in codes):
        return args
    inexact = lambda v: isinstance(v, jax.Array) and jnp.issubdtype(v.dtype, jnp.inexact)
    codes, inputs = jax.lax.optimization_barrier((codes, [v if inexact(v) else None for v in args]))
    codes = jax.tree.map(jax.lax.stop_gradient, codes)  # JAX 0.10 would go on with tangents of zero
    triples = zip(args, codes, inputs, strict=True)
    return tuple(v.replace(w=w) if w is not None else v if x is None else x for v, w, x in triples)


def _forwarded(jaxpr: Any, values: Sequence[Any]) -> dict[int, Weight]:
    """Results that are arguments passed through, as NNX threads parameters: they stay the weights that they were."""
    lazy = {var: value for var, value in zip(jaxpr.invars, values, strict=True) if isinstance(value, Weight)}
    return {i: lazy[v] for i, v in enumerate(jaxpr.outvars) if not isinstance(v, jex.Literal) and v in lazy}


def _scan(eqn: Any, values: list[Any], trace: Trace, make_dense: Any) -> list[Any]:
    params = eqn.params
    jaxpr, jaxpr_consts = open_jaxpr(params["jaxpr"])
    num_consts, num_carry = scan_counts(params)
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


def _while(eqn: Any, values: list[Any], trace: Trace, make_dense: Any) -> list[Any]:
    params = eqn.params
    cond, cond_closed = open_jaxpr(params["cond_jaxpr"])
    body, body_closed = open_jaxpr(params["body_jaxpr"])
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
        return bind(eqn, [make_dense(v, reason=reason) if isinstance(v, Weight) else v for v in values])
    index, *operands = values
    branches = [open_jaxpr(branch) for branch in eqn.params["branches"]]
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
    jaxpr, consts = open_jaxpr(params["jaxpr"])
    cut = [
        _in_parts(v, params["mesh"], spec) if isinstance(v, Weight) else (v, spec)
        for v, spec in zip(values, params["in_specs"], strict=True)
    ]
    leaves, structure = jax.tree.flatten([value for value, _ in cut])
    specs = jax.tree.leaves([spec for _, spec in cut], is_leaf=lambda s: isinstance(s, PartitionSpec))

    def body(*args: Any) -> tuple[Any, ...]:
        results = evaluate(jaxpr, consts, jax.tree.unflatten(structure, args), trace)
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
    if set(params[name]) != set(params["mesh"].axis_names):  # JAX 0.10.0 takes some of the axes under jit alone
        mapped = jax.jit(mapped)
    return list(mapped(*leaves))


def _in_parts(weight: Weight, mesh: Any, spec: PartitionSpec) -> tuple[Weight, Weight]:
    """A weight that `shard_map` can cut, and the partition of each part: that of the axes which it spans.

    Of a stored one the codes are cut. One that does not say how (a view that is turned or cut) is an array from here.
    """
    names = tuple(spec) + (None,) * (weight.ndim - len(spec))

    def part(x: jax.Array, extra: int) -> Any:
        mine = [name if n == m else None for name, n, m in zip(names, x.shape, weight.shape, strict=False)]
        return PartitionSpec(*mine, *[None] * extra)

    if not hasattr(weight.w, "in_parts"):
        weight = weight.opened()
        return weight, weight.map(part)
    codes, of_codes = weight.w.in_parts(mesh, PartitionSpec(*names), weight.path or "a weight in shard_map")
    return weight.replace(w=codes), weight.map(part, lambda _: of_codes)


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
