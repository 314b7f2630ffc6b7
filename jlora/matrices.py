"""Factors as the matrices that they are, for optimizers that treat matrices in a way of their own (Muon, Shampoo).

A factor in broadcast form has an axis for each of the weight's, so that A and B of a dense layer are (in, 1, r) and
(1, out, r). As matrices they map rows: A is (inputs, r), B is (r, outputs), one for each stacked weight.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jlora.adapted.adapted import Adapted
from jlora.methods.acts import Factors
from jlora.methods.method import Transformation
from jlora.transform.axes import inverse
from jlora.transform.sites import Target

PyTree = Any
Matrices = dict[str, dict[str, Any]]  # an array, or a tuple with one for each stacked weight


class SlowState(NamedTuple):
    """State of `optax.lookahead`, whose parameters are pairs: the slow ones are kept here."""

    slow: PyTree
    inner: PyTree


# Factors in a state that are not the optimizer's alone: one evaluates with them, and so they keep their shapes.
READ = {SlowState: "slow", optax.contrib.ScheduleFreeState: "z"}


class Form(NamedTuple):
    """Form of one factor as a matrix, or a tuple of them.

    Attributes:
      shape: of the factor.
      order: its axes, those of the stack first.
      part: the shape of one stacked weight's matrix (or vector).
      stacked: whether there is a stack.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    part: tuple[int, ...]
    stacked: bool

    def split(self, x: jax.Array) -> Any:
        """The factor as a matrix, or as a tuple of matrices."""
        parts = jnp.transpose(x, self.order).reshape(-1, *self.part)
        return tuple(parts) if self.stacked else parts[0]

    def join(self, matrices: Any) -> jax.Array:
        """The inverse of `split`."""
        parts = jnp.stack(matrices) if self.stacked else matrices
        return jnp.transpose(parts.reshape([self.shape[i] for i in self.order]), inverse(self.order))


def form_of(shape: tuple[int, ...], site: Target) -> Form:
    """The form of a site's factor of that shape."""
    ndim, stack = len(site.shape), site.stack_axes
    if len(shape) in (ndim, ndim + 1) and all(n in (1, whole) for n, whole in zip(shape, site.shape, strict=False)):
        rank = tuple(range(ndim, len(shape)))
        spans = [axes for axes in (site.in_axes, site.out_axes) if any(shape[i] > 1 for i in axes)]
        before, after = site.in_axes, (*site.out_axes, *rank)
        if rank and spans == [site.out_axes]:  # B: (r, outputs)
            before, after = rank, (*site.in_axes, *site.out_axes)
        sizes = [math.prod(shape[i] for i in axes) for axes in (before, after)]
        is_vector = not rank or not spans
        return Form(shape, (*stack, *before, *after), (math.prod(sizes),) if is_vector else tuple(sizes), bool(stack))
    if shape and shape[0] == math.prod(site.shape[i] for i in stack):  # (stack, ...): LoKr, OFT
        return Form(shape, tuple(range(len(shape))), shape[1:], bool(stack))
    cut = tuple(i for i in stack if i < len(shape) and shape[i] == site.shape[i])  # an adapter of activations
    if stack and len(cut) == len(stack):
        rest = tuple(i for i in range(len(shape)) if i not in cut)
        return Form(shape, (*cut, *rest), tuple(shape[i] for i in rest), True)
    return Form(shape, tuple(range(len(shape))), shape, False)


def forms_of(factors: Factors, sites: Sequence[Target]) -> dict[str, dict[str, Form]]:
    """Forms by path and name; what belongs to no site (extras) is not among them."""
    return {
        site.path: {name: form_of(tuple(x.shape), site) for name, x in factors[site.path].items()}
        for site in sites
        if site.path in factors
    }


def tells_matrices(tx: Transformation, factors: Factors, sites: Sequence[Target]) -> bool:
    """Whether `tx` keeps another state for matrices than for the same numbers in broadcast form."""
    forms = forms_of(factors, sites)
    one = {
        path: {
            name: jax.ShapeDtypeStruct(forms[path][name].part, x.dtype) if path in forms else x
            for name, x in arrays.items()
        }
        for path, arrays in factors.items()
    }
    return is_state_different(tx, factors, one)


def is_state_different(tx: Transformation, some: PyTree, others: PyTree) -> bool:
    """Whether `tx` keeps another state for `others`, the leaves of `some` in other shapes; not if it takes one alone.

    States differ in structure, or in how many numbers an array has: GaLore's projectors are empty for all but matrices.
    Arrays that hold a number for each of a leaf, as moments do, are the same state, whatever their shape. So is one
    for each weight of a stack where `others` has one weight of it.
    """
    structure_of: Callable[[PyTree], Any] = jax.tree.structure
    try:
        states = [jax.eval_shape(tx.init, x) for x in (some, others)]
    except (TypeError, ValueError, AttributeError, IndexError, KeyError):
        return False
    if structure_of(states[0]) != structure_of(states[1]):
        return True
    sizes = lambda of: [math.prod(x.shape) for x in jax.tree.leaves(of)]
    pairs = lambda of, other: zip(sizes(of), sizes(other), strict=True)
    stacks = {1} | {n // one for n, one in pairs(some, others) if one}
    return any(all(n != one * stack for stack in stacks) for n, one in pairs(*states))


def on_matrices(tx: Transformation, adapted: Adapted) -> Transformation:
    """`tx`, which is shown matrices: its state is theirs but for what is READ; updates come back in broadcast form."""
    inner = optax.with_extra_args_support(tx)
    forms = forms_of(adapted.factors, adapted.sites)

    def split(factors: Factors) -> Matrices:
        return _in_form(lambda form, x: form.split(x), forms, factors)

    def join(matrices: Matrices) -> Factors:
        return _in_form(lambda form, x: form.join(x), forms, matrices)

    def of_matrices(fn: Any) -> Any:
        return lambda matrices, *args: fn(join(matrices), *args)

    def update(gradients: Factors, state: PyTree, factors: Factors | None = None, **extra: Any) -> Any:
        if "grad" in extra:
            extra["grad"] = split(extra["grad"])
        extra |= {name: of_matrices(extra[name]) for name in ("value_fn", "obj_fn") if name in extra}
        if "grad_fn" in extra:
            grad_fn = extra["grad_fn"]
            extra["grad_fn"] = lambda matrices, *args: split(grad_fn(join(matrices), *args))
        shown = None if factors is None else split(factors)
        updates, state = inner.update(split(gradients), _with_read(split, state), shown, **extra)
        return join(updates), _with_read(join, state)

    def init(factors: Factors) -> PyTree:
        return _with_read(join, inner.init(split(factors)))

    return optax.GradientTransformationExtraArgs(init, update)


def _in_form(turn: Callable[[Form, Any], Any], forms: dict[str, dict[str, Form]], tree: dict[str, Any]) -> Any:
    """`tree` with `turn` of each factor that has a form; what `optax.masked` left out of it stays so."""
    of = lambda path, name, x: turn(forms[path][name], x) if path in forms and jax.tree.leaves(x) else x
    return {
        path: {name: of(path, name, x) for name, x in arrays.items()} if jax.tree.leaves(arrays) else arrays
        for path, arrays in tree.items()
    }


def _with_read(turn: Callable[[PyTree], PyTree], state: PyTree) -> PyTree:
    """`state` with `turn` of the factors in it that are READ."""

    def of(node: Any) -> Any:
        name = READ.get(type(node))
        if name is None:
            return node
        fields = node._asdict().items()
        return type(node)(**{field: turn(x) if field == name else _with_read(turn, x) for field, x in fields})

    return jax.tree.map(of, state, is_leaf=lambda node: type(node) in READ)
