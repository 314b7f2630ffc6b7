"""`y = x W + (z A) B` for any contraction, with a backward pass that forms no gradient of W. z is x, or x dropped."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jlora import tree
from jlora.transform.axes import Labels, contract, expand
from jlora.transform.dequantised import on_arrays
from jlora.transform.explicit import on_auto_axes, spec_of


class Spec(NamedTuple):
    """The axes of one product, by label: static, so that it can be an argument of a `custom_vjp`."""

    x: Labels
    w: Labels
    y: Labels
    u: Labels  # of the factor that meets z first
    v: Labels  # of the factor that meets the result of that
    dimension_numbers: Any  # of the model's own `dot_general`
    weight_first: bool  # whether the weight is its left operand
    precision: Any
    result: str | None  # its preferred_element_type by name: NumPy 2.0 takes `np.dtype("float64") == None` for true
    sharding: NamedSharding | None = None  # where the model says that the product lies, on an explicit mesh

    @property
    def dtype(self) -> jnp.dtype | None:
        """The product's preferred_element_type."""
        return None if self.result is None else jnp.dtype(self.result)

    def of_dtype(self, dtype: Any) -> "Spec":
        """The same product with another preferred_element_type."""
        return self._replace(result=None if dtype is None else jnp.dtype(dtype).name)

    @property
    def inner(self) -> Labels:
        """The labels of `z u`: what z and u have and the rest of the product still needs."""
        needed = self.v + self.y
        from_x = tuple(label for label in self.x if label in needed)
        return from_x + tuple(label for label in self.u if label in needed and label not in from_x)

    def placed(self, labels: Labels) -> NamedSharding | None:
        """Sharding of an array with these labels: that of the product, on the axes that they share."""
        if self.sharding is None:
            return None
        names = dict(zip(self.y, self.sharding.spec, strict=False))
        return NamedSharding(self.sharding.mesh, PartitionSpec(*(names.get(label) for label in labels)))


def base_product(x: jax.Array, w: jax.Array, spec: Spec) -> jax.Array:
    """`x W` as the model's own program has it, operand for operand, so that the bits agree."""
    operands = (w, x) if spec.weight_first else (x, w)
    return lax.dot_general(
        *operands,
        spec.dimension_numbers,
        precision=spec.precision,
        preferred_element_type=spec.dtype,
        out_sharding=spec.sharding,
    )


def low_rank_product(z: jax.Array, u: jax.Array, v: jax.Array, spec: Spec) -> jax.Array:
    """`(z u) v`, never the product of u and v, in the label order of `spec.y`."""
    return _outer_product(_inner_product(z, u, spec), v, spec)


def _inner_product(z: jax.Array, u: jax.Array, spec: Spec) -> jax.Array:
    """`z u`, (..., rank)."""
    return contract(z, spec.x, u, spec.u, spec.inner, spec.precision, sharding=spec.placed(spec.inner))


def _outer_product(inner: jax.Array, v: jax.Array, spec: Spec) -> jax.Array:
    """`(z u) v` from `z u`, (..., rank)."""
    out = tuple(label for label in spec.y if label in spec.inner or label in spec.v)
    dtype = spec.dtype if keeps(spec.dtype, inner.dtype) else None
    y = contract(inner, spec.inner, v, spec.v, out, spec.precision, dtype, spec.placed(out))
    return expand(y, out, spec.y)  # a weight's axis of size 1 is in no factor


def compute_dtype(x: jax.Array, w: jax.Array) -> jnp.dtype:
    """The dtype in which an input meets the factors: the wider of its own and W's, complex where the input is.

    None of 8 bits, and float32 where float16 meets bfloat16, or where an integer of more than 8 bits meets 16.
    """
    inexact = [y.dtype for y in (x, w) if jnp.issubdtype(y.dtype, jnp.inexact)]
    bits = max(jnp.finfo(dtype).bits for dtype in inexact)
    if is_complex(x.dtype):
        return jnp.dtype(jnp.complex64 if bits <= 32 else jnp.complex128)
    widest = {dtype for dtype in inexact if jnp.finfo(dtype).bits == bits}
    narrow = len(inexact) == 1 and x.dtype.itemsize > 1 and bits < 32
    return jnp.dtype(jnp.float32) if bits <= 8 or len(widest) > 1 or narrow else widest.pop()


def is_complex(dtype: Any) -> bool:
    """Whether numbers of this dtype have an imaginary part."""
    return jnp.issubdtype(dtype, jnp.complexfloating)


def keeps(dtype: Any, operands: jnp.dtype) -> bool:
    """Whether a product in `dtype` (None: the operands' own) has all the bits that theirs has."""
    return dtype is None or jnp.finfo(dtype).bits >= jnp.finfo(operands).bits


def is_linear(x: jax.Array, dtype: Any) -> bool:
    """Whether a product of x in `dtype` is the sum of its terms: not in integers, nor without an imaginary part."""
    return dtype is None or (jnp.issubdtype(dtype, jnp.inexact) and is_complex(dtype) == is_complex(x.dtype))


def add(y: jax.Array, delta: jax.Array) -> jax.Array:
    """`y + delta` in the dtype of y; 8 bits are summed in those of delta, and rounded once."""
    if jnp.finfo(y.dtype).bits > 8:
        return y + delta.astype(y.dtype)
    return (y.astype(delta.dtype) + delta).astype(y.dtype)


class Multiply(NamedTuple):
    """Functions by which an input meets a weight.

    Attributes:
      product: (x, z, w, a, b, spec) -> y; the factors in broadcast form, that which meets the input first; z is None
        where it is x.
      base: (x, w, spec) -> y, for a weight without factors.
      adds: whether a and b are part of the weight, `w + a b`; those of an observer are not.
    """

    product: Callable[..., jax.Array]
    base: Callable[..., jax.Array]
    adds: bool = True


def is_placed(x: jax.Array) -> bool:
    """Whether the type of x says where it lies: on explicit axes of a mesh, or inside `shard_map`.

    There a backward pass by hand would have to say so of every product, too; autodiff does.
    """
    sharding = jax.typeof(x).sharding
    kinds = sharding.mesh.axis_types
    return AxisType.Manual in kinds or (AxisType.Explicit in kinds and any(sharding.spec))


def plain_product(x: jax.Array, z: jax.Array, w: jax.Array, u: jax.Array, v: jax.Array, spec: Spec) -> jax.Array:
    """`x W + (z u) v`, differentiable in both modes by autodiff."""
    return add(_plain_base(x, w, spec), low_rank_product(z, u, v, spec))


def placed_product(x: jax.Array, z: jax.Array, w: jax.Array, u: jax.Array, v: jax.Array, spec: Spec) -> jax.Array:
    """`x W + (z u) v` of arrays that say where they lie: by autodiff, but for the product with a stored W.

    Factors that are wider than z get a gradient in their own dtype: see `_wide_product`.
    """
    wide = all(map(functools.partial(_is_wide, z), (u, v)))
    if not wide or any(AxisType.Manual in jax.typeof(y).sharding.mesh.axis_types for y in (z, u, v)):
        return add(_placed_base(x, w, spec), low_rank_product(z, u.astype(z.dtype), v.astype(z.dtype), spec))
    out = tuple(label for label in spec.y if label in spec.inner or label in spec.v)
    dtype = spec.dtype if keeps(spec.dtype, z.dtype) else None
    inner = _wide_product(z, u, _Contraction(spec.x, spec.u, spec.inner, spec.precision, None, spec.placed(spec.inner)))
    y = _wide_product(inner, v, _Contraction(spec.inner, spec.v, out, spec.precision, dtype, spec.placed(out)))
    return add(_placed_base(x, w, spec), expand(y, out, spec.y))


def _is_wide(z: jax.Array, factor: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether a factor has more bits than the input that it meets, both real."""
    real = all(jnp.issubdtype(y.dtype, jnp.floating) for y in (z, factor))
    return real and jnp.finfo(factor.dtype).bits > jnp.finfo(z.dtype).bits


class _Contraction(NamedTuple):
    """Static arguments of `contract`."""

    x: Labels
    factor: Labels
    out: Labels
    precision: Any
    dtype: Any
    sharding: NamedSharding | None

    def __call__(self, x: jax.Array, factor: jax.Array) -> jax.Array:
        labels = self.x, self.factor
        factor = factor.astype(x.dtype)
        return contract(x, labels[0], factor, labels[1], self.out, self.precision, self.dtype, self.sharding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _wide_product(x: jax.Array, factor: jax.Array, by: _Contraction) -> jax.Array:
    """The product of an input and a wider factor, in the input's dtype; the factor's gradient in its own.

    Autodiff would round the parts of the gradient that several devices have to the input's dtype before it adds them.
    """
    return by(x, factor)


def _wide_forward(x: Any, factor: Any, by: _Contraction) -> tuple[jax.Array, Any]:
    of_x = _kept(x.value, factor.perturbed)
    return by(x.value, factor.value), (of_x, factor.value, _Type(jax.typeof(x.value)))


def _wide_backward(by: _Contraction, residuals: Any, g: Any) -> tuple[jax.Array | None, jax.Array | None]:
    kept, factor, known = residuals
    if isinstance(g, SymbolicZero):
        return None, None
    (dx,) = jax.linear_transpose(lambda x: by(x, factor), known.x)(g)
    x = _found(kept)
    if x is None:
        return dx, None
    place = NamedSharding(jax.typeof(factor).sharding.mesh, spec_of(factor)) if is_placed(x) or is_placed(g) else None
    return dx, _widened(x, by.x, g.astype(x.dtype), by.out, by.factor, by.precision, factor.dtype, place)


def _widened(
    x: jax.Array,
    x_labels: Labels,
    y: jax.Array,
    y_labels: Labels,
    out: Labels,
    precision: Any,
    dtype: Any,
    place: NamedSharding | None = None,
) -> jax.Array:
    """The product of narrow arrays in a wider dtype; on the CPU of wide ones, as its kernels of JAX 0.10 are."""

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return contract(x, x_labels, y, y_labels, out, precision, dtype, place)

    def of_wide(x: jax.Array, y: jax.Array) -> jax.Array:
        return product(x.astype(dtype), y.astype(dtype))

    found: jax.Array = lax.platform_dependent(x, y, cpu=of_wide, default=product)
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def adapted_product(x: jax.Array, z: jax.Array, w: jax.Array, u: jax.Array, v: jax.Array, spec: Spec) -> jax.Array:
    """`x W + (z u) v`, whose backward pass recomputes `z u` and shares `G = g v^T` between dz and du.

    z is x itself, or x after dropout. With the cotangent g:

        G = g v^T,  dx = g W^T,  dz = G u^T,  du = z^T G,  dv = (z u)^T g

    Autodiff of `plain_product` gives the same values. It keeps `z u` and, on the CPU, transposes the activations
    where transposing a factor would do (measured in experiments/bench/step.py). There is no forward mode.

    The gradient of W is formed where W itself is differentiated, and only there. A stored W is frozen. The factors are
    taken in the dtype of z, and du and dv are in their own: the parts of a sum over several devices are added in that.
    """
    return plain_product(x, z, w, u.astype(z.dtype), v.astype(z.dtype), spec)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Known:
    """The shapes and dtypes of x and z, known while tracing and carried from the forward to the backward pass."""

    x: jax.ShapeDtypeStruct
    z: jax.ShapeDtypeStruct


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Type:
    """The type of x, where it lies and all."""

    x: Any


def _forward(*arguments: Any) -> tuple[jax.Array, Any]:
    *operands, spec = arguments
    x, z, w, u, v = jax.tree.map(lambda operand: operand.value, tuple(operands))
    w_moves, u_moves = not tree.is_stored(w) and operands[2].perturbed, operands[3].perturbed
    base, x, z = _fresh_product(x, w, spec, z)
    inner = _inner_product(z, u.astype(z.dtype), spec)
    delta = _outer_product(inner, v.astype(z.dtype), spec)
    if v.size and jnp.finfo(base.dtype).bits > 8:
        some = lax.real(v[(0,) * v.ndim]) if is_complex(v.dtype) else v[(0,) * v.ndim]
        y = lax.platform_dependent(
            base, delta.astype(base.dtype), some, cpu=_fenced_sum, default=lambda x, y, _: x + y
        )  # fmt: skip
    else:
        y = add(base, delta)
    # The gradient of u needs the whole input; without it (LoRA-FA) r numbers per row do.
    kept = (_kept(x, w_moves), _kept(z, u_moves), _kept(inner, not u_moves))
    return y, (*kept, w, u, v, _Known(_like(x), _like(z)))


def _kept(x: jax.Array, needed: bool) -> jax.Array:
    """An operand that may be needed, behind a new axis, or an empty array.

    JAX remembers one structure of residuals, and which of them are operands, for all derivatives of a traced product,
    whatever is differentiated in each: these are the same for all.
    """
    return x[None] if needed else jnp.zeros((0,), jnp.bool_)


def _opened(w: Any, labels: Labels, *beside: jax.Array) -> tuple[Any, ...]:
    """The array of W, the labels of its axes, and what it meets.

    A stored one is dequantised no sooner than that is there: XLA would find the same in the forward and in the backward
    pass, and keep it from the one to the other. Its axes stay in the order in which it is held.
    """
    if not tree.is_stored(w):
        return w, labels, *beside
    w, beside = lax.optimization_barrier((w, beside))
    array, order = tree.as_held(w)
    return array, tuple(labels[i] for i in order), *beside


def _fresh_product(x: jax.Array, w: Any, spec: Spec, *others: jax.Array) -> tuple[jax.Array, ...]:
    """`x W` in a forward pass; x and others to go on with. Past the barrier they are one buffer: of an x that is not
    XLA would make a second one, and keep what it was made of (3.4 layers more, on the compiler of an H100).
    """
    array, labels, x, *rest = _opened(w, spec.w, x, *others)
    if labels == spec.w:
        return base_product(x, array, spec), x, *rest
    return contract(x, spec.x, array, labels, spec.y, spec.precision, spec.dtype), x, *rest


def _found(kept: jax.Array) -> jax.Array | None:
    return None if kept.shape == (0,) else lax.squeeze(kept, (0,))


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _fenced_sum(x: jax.Array, y: jax.Array, some: jax.Array) -> jax.Array:
    """`x + y` as one buffer. XLA's CPU backend recomputes a cheap sum in every fusion that reads it, and so keeps both
    terms until the backward pass: 443 MB of temporaries instead of 393 for a 6-layer GPT-2 of width 512. It drops
    optimization barriers; a branch that is decided at run time (never taken: nothing exceeds infinity) it keeps.
    """
    return lax.cond(some > jnp.inf, lax.sub, lax.add, x, y)


def _backward(spec: Spec, residuals: Any, g: Any) -> tuple[jax.Array | None, ...]:
    *kept, w, u, v, known = residuals
    x, z, inner = map(_found, kept)
    if isinstance(g, SymbolicZero):
        return None, None, None, None, None
    array, labels, g = _opened(w, spec.w, g.astype(known.z.dtype))
    of_u, of_v = _like(u), _like(v)
    u, v = u.astype(known.z.dtype), v.astype(known.z.dtype)
    if z is not None:
        inner = contract(z, spec.x, u, spec.u, spec.inner, spec.precision)  # (..., rank)
    assert inner is not None  # one of the two is kept
    into = functools.partial(_contract_into, precision=spec.precision)
    inner_g = into(inner, spec.inner, g, spec.y, v, spec.v)
    # An integer input has no gradient.
    dx = into(known.x, spec.x, g, spec.y, array, labels) if jnp.issubdtype(known.x.dtype, jnp.inexact) else None
    dz = into(known.z, spec.x, inner_g, spec.inner, u, spec.u)
    # The thin operand comes first: the CPU backend transposes its left operand to contract a leading axis, and a
    # transposed activation costs more than a transposed factor (0.89 against 0.76 of full fine-tuning's time).
    du = into(of_u, spec.u, inner_g, spec.inner, z, spec.x) if z is not None else None
    dv = into(of_v, spec.v, inner, spec.inner, g, spec.y)
    dw = into(array, spec.w, x, spec.x, g, spec.y) if x is not None else None
    return dx, dz, dw, du, dv


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def observed_product(
    x: jax.Array, w: jax.Array, total: jax.Array, one: jax.Array, spec: Spec, every_row: bool
) -> jax.Array:
    """`x W`, whose gradient with respect to `total` is the sum of x x^T over the rows that matter, or over every row.

    So a sum over all uses of a weight, in loops and branches too, is read off with `jax.grad`. A row matters if the
    cotangent of what the weight makes of it is not zero. That of x is `probe` on rows that matter and zero on the
    others: the product says which rows matter to it, whatever W is (a weight that starts at zero, an underflow in half
    precision). No other gradient is passed on. `total` has W's input axes and one for all of them together (spec.u);
    `one` (spec.v) is the identity between these. Real weights act on the two parts of a complex x apart: the sum
    is that of both.
    """
    return base_product(x, w, spec)


def _observed_forward(x: jax.Array, w: jax.Array, total: jax.Array, one: jax.Array, spec: Spec, every_row: bool) -> Any:
    return base_product(x, w, spec), (x, total, one)


def _observed_backward(spec: Spec, every_row: bool, residuals: Any, g: jax.Array) -> tuple[jax.Array | None, ...]:
    x, total, one = residuals
    rows = tuple(label for label in spec.x if label in spec.y)
    flat = tuple(label for label in spec.v if label not in spec.x)

    def of_rows(x: jax.Array, total: jax.Array, one: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_each = jnp.any(g != 0, axis=tuple(i for i, label in enumerate(spec.y) if label not in rows))
        matters = expand(of_each, tuple(label for label in spec.y if label in rows), spec.x)
        squares = jnp.zeros_like(total)
        for part in (lax.real(x), lax.imag(x)) if is_complex(x.dtype) else (x,):
            z = part.astype(total.dtype)
            z = z if every_row else jnp.where(matters, z, 0)
            inner = contract(z, spec.x, one, spec.v, (*rows, *flat), lax.Precision.HIGHEST)  # its input axes as one
            squares += _contract_into(total, spec.u, z, spec.x, inner, (*rows, *flat), lax.Precision.HIGHEST)
        dx = jnp.where(matters, probe(x.shape), 0)
        return squares, lax.complex(dx, dx) if is_complex(x.dtype) else dx

    place = lambda _: (spec_of(total), spec_of(x))
    squares, dx = on_auto_axes(of_rows, x, total, one, g, place=place)
    return dx.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else None, None, squares, None


def probe(shape: tuple[int, ...]) -> jax.Array:
    """Fixed numbers in no relation to anything: none is zero, and no mean, norm or difference cancels them. float32."""
    numbers = jnp.ones((1,) * len(shape), jnp.float32)
    for axis, n in enumerate(shape):
        wave = jnp.cos(lax.iota(jnp.float32, n) + jnp.float32(0.5 + axis))
        numbers = numbers * wave.reshape([n if i == axis else 1 for i in range(len(shape))])
    return numbers


observed_product.defvjp(_observed_forward, _observed_backward)


def _contract_into(
    target: jax.Array | jax.ShapeDtypeStruct,
    labels: Labels,
    x: jax.Array,
    x_labels: Labels,
    y: jax.Array,
    y_labels: Labels,
    precision: Any,
) -> jax.Array:
    """The product of x and y in the shape and dtype of `target`; axes that neither of them has are broadcast.

    Of a complex product, what is real takes the real part, as a cotangent does.
    """
    out = tuple(label for label in labels if label in x_labels or label in y_labels)
    if _is_wide(x, target) and _is_wide(y, target):
        product = _widened(x, x_labels, y, y_labels, out, precision, target.dtype)
    else:
        product = contract(x, x_labels, y, y_labels, out, precision)
    if is_complex(product.dtype) and not is_complex(target.dtype):
        product = lax.real(product)
    return jnp.broadcast_to(expand(product, out, labels), target.shape).astype(target.dtype)


adapted_product.defvjp(_forward, _backward, symbolic_zeros=True)
_wide_product.defvjp(_wide_forward, _wide_backward, symbolic_zeros=True)


# -- the ways in which an input meets a weight -------------------------------------------------------------------------


def _operands(
    x: jax.Array, z: jax.Array | None, w: jax.Array, a: jax.Array, b: jax.Array, spec: Spec
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Operands of the products: z is x if nothing was dropped, in the dtype of all that is of low rank.

    The factors are in their own, where that is the wider one: they are cast where they meet z.
    """
    dtype = compute_dtype(x, w)
    z = (x if z is None else z).astype(dtype)
    u, v = _spanned(a, spec.w, spec.u), _spanned(b, spec.w, spec.v)
    both = _is_wide(z, u) and _is_wide(z, v)
    return x, z, w, *((u, v) if both else (u.astype(dtype), v.astype(dtype)))


def _spanned(part: jax.Array, labels: Labels, kept: Labels) -> jax.Array:
    """A factor in broadcast form without the axes that it does not span; its last label is the rank's."""
    return lax.squeeze(part, [i for i, label in enumerate((*labels, kept[-1])) if label not in kept])


def _plain(x: jax.Array, z: jax.Array | None, w: jax.Array, a: jax.Array, b: jax.Array, spec: Spec) -> jax.Array:
    x, z, w, u, v = _operands(x, z, w, a, b, spec)
    return plain_product(x, z, w, u.astype(z.dtype), v.astype(z.dtype), spec)


@functools.partial(jax.jit, static_argnames=("spec",), inline=True)
def _by_hand(x: jax.Array, z: jax.Array | None, w: jax.Array, a: jax.Array, b: jax.Array, spec: Spec) -> jax.Array:
    """Layers of one shape share the trace of their product and that of its derivative; inlined, it is no call."""
    return adapted_product(*_operands(x, z, w, a, b, spec), spec)


def _adapted(x: jax.Array, z: jax.Array | None, w: jax.Array, a: jax.Array, b: jax.Array, spec: Spec) -> jax.Array:
    if _says_where(spec, x, w, a, b):
        return placed_product(*_operands(x, z, w, a, b, spec), spec)
    return _by_hand(x, z, w, a, b, spec)


def _says_where(spec: Spec, *operands: Any) -> bool:
    """Whether a product, or one of its operands, says where it lies: see `is_placed`."""
    return spec.sharding is not None or any(map(is_placed, jax.tree.leaves(operands)))


def _plain_base(x: jax.Array, w: jax.Array, spec: Spec) -> jax.Array:
    return on_arrays(lambda w, x: base_product(x, w, spec), w, x)


def _placed_base(x: jax.Array, w: Any, spec: Spec) -> jax.Array:
    return stored_product(x, w, spec) if tree.is_stored(w) else base_product(x, w, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def frozen_product(x: jax.Array, w: Any, spec: Spec) -> jax.Array:
    """`x W` for a stored W, which the backward pass dequantises anew: `dx = g W^T`."""
    return base_product(x, w.dequantise(), spec)


def _frozen_forward(x: jax.Array, w: Any, spec: Spec) -> tuple[jax.Array, Any]:
    return _fresh_product(x, w, spec)[0], (w, _Type(jax.typeof(x)))


def _frozen_backward(spec: Spec, residuals: Any, g: jax.Array) -> tuple[jax.Array | None, None]:
    w, known = residuals
    if not jnp.issubdtype(known.x.dtype, jnp.inexact):
        return None, None
    array, labels, g = _opened(w, spec.w, g.astype(compute_dtype(known.x, w)))
    return _contract_into(known.x, spec.x, g, spec.y, array, labels, spec.precision), None


frozen_product.defvjp(_frozen_forward, _frozen_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def stored_product(x: jax.Array, w: Any, spec: Spec) -> jax.Array:
    """`frozen_product` of arrays that say where they lie: its transpose is JAX's own, which says it of the result."""
    return base_product(x, w.dequantise(), spec)


def _stored_forward(x: jax.Array, w: Any, spec: Spec) -> tuple[jax.Array, Any]:
    w, x_then = lax.optimization_barrier((w, x))
    return base_product(x_then, w.dequantise(), spec), (w, _Type(jax.typeof(x)))


def _stored_backward(spec: Spec, residuals: Any, g: jax.Array) -> tuple[jax.Array | None, None]:
    w, known = residuals
    if not jnp.issubdtype(known.x.dtype, jnp.inexact):
        return None, None
    w, g = lax.optimization_barrier((w, g))
    return *jax.linear_transpose(lambda x: base_product(x, w.dequantise(), spec), known.x)(g), None


stored_product.defvjp(_stored_forward, _stored_backward)


def _base(x: jax.Array, w: Any, spec: Spec) -> jax.Array:
    if tree.is_stored(w) and not _says_where(spec, x, w):
        return frozen_product(x, w, spec)
    return _placed_base(x, w, spec)


def _observed(every_row: bool) -> Multiply:
    def product(x: jax.Array, z: jax.Array | None, w: jax.Array, a: jax.Array, b: jax.Array, spec: Spec) -> jax.Array:
        total, one = _spanned(a, spec.w, spec.u), _spanned(b, spec.w, spec.v)
        return observed_product(x, tree.dense(w), total, one, spec, every_row)

    return Multiply(product, _plain_base, adds=False)


ADAPTED = Multiply(_adapted, _base)
PLAIN = Multiply(_plain, _plain_base)
OBSERVED = {every_row: _observed(every_row) for every_row in (False, True)}
