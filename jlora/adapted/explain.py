"""Two tables of what is adapted: `explain`, how a function uses each weight, and `summary`, what is trained."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding

from jlora import tree
from jlora.adapted.adapted import Adapted, check_adapted, count, size_of
from jlora.methods.acts import SHARED
from jlora.transform.activations import places_activations
from jlora.transform.axes import fan_in
from jlora.transform.explicit import names_of
from jlora.transform.jaxprs import open_jaxpr
from jlora.transform.lift import run
from jlora.transform.sites import Target
from jlora.transform.trace import Trace, Use


@dataclasses.dataclass(frozen=True)
class Explained(Use):
    """A use of a weight, the number of its trainable parameters, and how the weight is held ("nf4, 64, twice")."""

    parameters: int = 0
    stored: str = ""
    quantised: bool = False


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The uses in program order, and the extras that the function never reads; `str` gives a table.

    `unplaced` has a warning where the base is split over a mesh and nothing says where the activations lie.
    """

    rows: tuple[Explained, ...]
    unread: tuple[str, ...] = ()
    unplaced: str = ""

    @property
    def materialised(self) -> tuple[Explained, ...]:
        """The uses that build the weight: those that `strict=True` would refuse."""
        return tuple(row for row in self.rows if not row.factored)

    def __str__(self) -> str:
        head = ("weight", "operation", "in -> out (stack)", "how", "rank", "parameters", "extra FLOPs", "line")
        several = any(row.tree for row in self.rows)
        cells = [head, *(_cells(row, several) for row in self.rows)]
        if any(row.quantised for row in self.rows):
            column = ("stored", *(row.stored for row in self.rows))
            cells = [(row[0], what, *row[1:]) for row, what in zip(cells, column, strict=True)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        dense = len(self.materialised)
        lines.append(f"{len(self.rows) - dense} uses factored, {dense} materialised")
        if self.unread:
            lines.append(f"trained as they are, but never read: {', '.join(map(repr, self.unread))}")
        if self.unplaced:
            lines.append(f"warning: {self.unplaced}")
        return "\n".join(lines)


def explain(fn: Callable[..., Any], adapted: Adapted, *args: Any, **kwargs: Any) -> Explanation:
    """Shows how `lift(fn)(adapted, *args)` uses each adapted weight; nothing is computed.

    Args:
      fn: a function of parameters and further arguments.
      adapted: its parameters, from `apply`.
      *args, **kwargs: the further arguments; a `jax.ShapeDtypeStruct` stands for an array.

    Returns:
      An `Explanation`: per use the weight, the operation, the stored axes that it contracts and keeps, whether the
      low-rank part stays apart ("factored") or the weight is built ("materialised", with the reason), the rank, the
      trainable parameters, the FLOPs of the low-rank part in one forward pass, and the line of the model's code. With
      a quantised base a column says how each weight is held: a format, the size of its blocks, "twice" where the scales
      are quantised, too.

    Raises:
      ValueError: if the function never reads an adapted weight.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.apply({"kernel": jnp.ones((3, 2))}, rank=1)
      >>> explanation = jlora.explain(lambda params, x: x @ params["kernel"], adapted, jnp.ones((1, 3)))
      >>> [(row.path, row.op, row.in_axes, row.out_axes, row.factored) for row in explanation.rows]
      [('kernel', 'dot_general', (0,), (1,), True)]
    """
    if not isinstance(adapted, Adapted):
        raise TypeError(f"explain takes an Adapted (from jlora.apply) after the function, got {type(adapted).__name__}")
    trace = Trace()
    tree.on_shapes(lambda *args, **kwargs: run(fn, args, kwargs, trace), tree.shapes_of(adapted), *args, **kwargs)
    leaves = jax.tree.leaves((adapted, args, kwargs), is_leaf=lambda x: isinstance(x, Adapted))
    given = [x for x in leaves if isinstance(x, Adapted)]
    sites = {(number, site.path): site for number, part in enumerate(given) for site in part.sites}
    bases = [tree.leaves(part.base)[0] for part in given]
    rows = tuple(
        _explained(use, sites.get((use.tree, use.path)), given[use.tree], bases[use.tree]) for use in trace.uses
    )
    unread = tuple(path for (_, path), is_read in trace.extras.items() if not is_read)
    return Explanation(rows, unread, _unplaced(fn, adapted, args, kwargs))


def _unplaced(fn: Callable[..., Any], adapted: Adapted, args: Any, kwargs: Any) -> str:
    """The warning of activations that nothing places, beside weights that are split over the axes of the rows."""
    held = _automatic(adapted.base)
    over = {name for place in held for part in place.spec for name in names_of(part)}
    rows = {name for place in _automatic((args, kwargs)) if place.spec for name in names_of(place.spec[0])}
    axes = [name for name in held[0].mesh.axis_names if name in over and (not rows or name in rows)] if held else []
    if not axes:
        return ""
    opened = jax.tree.map(
        lambda x: x.base if isinstance(x, Adapted) else x,
        (adapted, args, kwargs),
        is_leaf=lambda x: isinstance(x, Adapted),
    )
    shapes = jax.tree.map(lambda x: tree.dense(tree.shapes_of(x)), opened, is_leaf=tree.is_stored)
    arrays, fill = tree.split(shapes)

    def traced(arrays: list[jax.Array]) -> list[jax.Array]:
        params, args, kwargs = fill(arrays)
        return [x for x in jax.tree.leaves(fn(params, *args, **kwargs)) if isinstance(x, jax.Array)]

    jaxpr, _ = open_jaxpr(jax.make_jaxpr(traced)(arrays))
    weights = len(tree.split(shapes[0])[0])
    if places_activations(jaxpr, [i >= weights for i in range(len(arrays))], axes):
        return ""
    named = ", ".join(map(repr, axes))
    return (
        f"the base is split over {named}, {'as the rows are' if rows else 'and perhaps the rows, too'}, and nothing in "
        "the function says where its activations lie: XLA may split them by their features, and send them at every "
        "layer. Say it, by jax.lax.with_sharding_constraint on a block's inputs, or take a mesh of Explicit axes, on "
        "which jlora.models do so themselves"
    )


def _automatic(arrays: Any) -> list[NamedSharding]:
    """Where the arrays of a tree lie that are on a mesh of several devices with Auto axes."""
    places = [tree.placement(x) for x in jax.tree.leaves(arrays)]
    return [
        place
        for place in places
        if isinstance(place, NamedSharding) and place.mesh.size > 1 and AxisType.Explicit not in place.mesh.axis_types
    ]


def _explained(use: Use, site: Target | None, adapted: Adapted, base: Mapping[str, Any]) -> Explained:
    axes = {}
    if site is not None and not (use.in_axes or use.out_axes):  # an adapter of activations: the axes of its weight
        axes = {"in_axes": site.in_axes, "out_axes": site.out_axes, "stack_axes": site.stack_axes}
    leaf = base[use.path]
    return Explained(
        **(vars(use) | axes),
        parameters=size_of(adapted.factors[use.path]),
        stored=tree.stored_as(leaf),
        quantised=tree.is_stored(leaf),
    )


def _cells(row: Explained, several: bool) -> tuple[str, ...]:
    weight = f"{row.path} (tree {row.tree + 1})" if several else row.path
    axes = f"{list(row.in_axes)} -> {list(row.out_axes)}" + (f" ({list(row.stack_axes)})" if row.stack_axes else "")
    how = "factored" if row.factored else f"materialised: {row.reason}"
    return (weight, row.op, axes, how, str(row.rank), f"{row.parameters:,}", f"{row.flops:,}", row.line)


def summary(adapted: Adapted) -> str:
    """A table of what is trained: path, shape, axes, rank, parameters; and all of two axes or more that is not.

    With a quantised base a column says how each weight is held, and the last line the bytes of all and
    the bits a parameter of the quantised weights.
    """
    check_adapted(adapted, "summary")
    named, _ = tree.leaves(adapted.base)
    rows: list[tuple[str, ...]] = [("weight", "shape", "in -> out (stack)", "rank", "parameters")]
    for site in adapted.sites:
        axes = f"{list(site.in_axes)} -> {list(site.out_axes)}" + (
            f" ({list(site.stack_axes)})" if site.stack_axes else ""
        )
        size = size_of(adapted.factors.get(site.path, {}))
        rows.append((site.path, str(site.shape), axes, str(site.rank), f"{size:,}"))
    for extra in adapted.extras:
        what = f"trained as it is: {'whole' if extra.rows is None else f'{len(extra.rows)} rows'}"
        what = what if extra.added is None else f"{extra.added:g} times what is trained is added to it"
        rows.append((extra.path, "", what, "", f"{size_of(adapted.factors.get(extra.path, {})):,}"))
    if SHARED in adapted.factors:
        rows.append((SHARED, "", "shared by all of them", "", f"{size_of(adapted.factors[SHARED]):,}"))
    quantised = any(tree.is_stored(leaf) for leaf in named.values())
    if quantised:
        column = ("stored", *(tree.stored_as(named[row[0]]) if row[0] in named else "" for row in rows[1:]))
        rows = [(row[0], what, *row[1:]) for row, what in zip(rows, column, strict=True)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    total = count(adapted)
    trained = {site.path for site in adapted.sites} | {extra.path for extra in adapted.extras}
    lines += [
        f"rank {site.rank} of {site.path!r} is above its own: {inputs} inputs, {outputs} outputs"
        for site in adapted.sites
        for inputs, outputs in [(fan_in(site.shape, site.in_axes), fan_in(site.shape, site.out_axes))]
        if not adapted.method.of(site).acts.unmergeable and site.rank > min(inputs, outputs)
    ]
    left = [path for path, leaf in named.items() if path not in trained and len(getattr(leaf, "shape", ())) > 1]
    left.sort(key=lambda path: path.rpartition("/")[2] != "kernel")
    if left:
        held = lambda leaf: f" {tree.stored_as(leaf)}" if tree.is_stored(leaf) else ""
        shown = ", ".join(f"{p!r} {named[p].shape}{held(named[p])}" for p in left)
        lines.append(f"frozen, of two axes or more: {shown}")
    lines.append(
        f"{adapted.method!r}: {total.trainable:,} of {total.total:,} parameters are trained ({total.percent:.4f} %)"
        + (f"; {total.bytes:,} bytes, {total.bits:.3f} bits a quantised weight" if quantised else "")
    )
    return "\n".join(lines)
