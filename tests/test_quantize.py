"""`quantize`: formats, blocks, layouts and places of codes, against NumPy; errors by text."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import quant, tree
from jlora.quant import formats, nested
from jlora.quant.quantised import decode_halves, decode_in_place, decode_repeated
from jlora.transform import view

KERNEL = np.random.default_rng(0).normal(size=(128, 48)).astype(np.float32)  # (in, out)


def quantised(w: Any, name: str = "nf4", axes: Any = ((1,), (0,), ()), block: int = 64, double: bool = False) -> Any:
    """One weight; `axes` are its outputs, inputs and stack."""
    number = quant.format_of(name)
    layout = quant.layout_of(w.shape, *axes, number, block)
    return quant.encode(jnp.asarray(w), number, layout, len(axes[1]), double)


def by_hand(w: np.ndarray, table: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and values of a (out, in) matrix in row-major blocks, each number to the nearest of the table."""
    flat = w.reshape(-1)
    padded = np.pad(flat, (0, -flat.size % block)).reshape(-1, block)
    scales = np.abs(padded).max(-1)
    unit = padded / scales[:, None]
    order = np.argsort(table)
    codes = order[np.abs(unit[..., None] - table[order]).argmin(-1)].astype(np.uint8)
    return codes.reshape(-1)[: flat.size], scales, (table[codes] * scales[:, None]).reshape(-1)[: flat.size]


TABLES = {"nf4": formats.NF4, "fp4": formats.FP4, "int4": [n / 7 for n in [*range(8), -8, *range(-7, 0)]]}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("shape", [(128, 48), (5, 7), (40, 24)], ids=str)
def test_codes_and_values_are_those_of_numpy(name: str, shape: tuple[int, int]) -> None:
    w = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    codes, scales, values = by_hand(w.T, np.asarray(TABLES[name], np.float32), 64)
    got = quantised(w, name)
    pairs = np.stack([np.ravel(got.codes) >> 4, np.ravel(got.codes) & 15], -1).reshape(-1)[: codes.size]
    plain = lambda codes: np.where(codes == 8, 0, codes) if name == "fp4" else codes  # 8 is a zero, too
    np.testing.assert_array_equal(plain(pairs), plain(codes))
    np.testing.assert_array_equal(np.ravel(got.scales), scales)
    np.testing.assert_allclose(got.dequantise(), values.reshape(w.T.shape).T, rtol=1e-6)
    assert got.shape == shape and got.dtype == jnp.float32


@pytest.mark.parametrize(("name", "most", "levels"), [("int8", 127, 127), ("fp8", 448, None)])
def test_eight_bits_have_a_scale_for_each_output(name: str, most: int, levels: int | None) -> None:
    got = quantised(KERNEL, name)
    np.testing.assert_array_equal(np.ravel(got.scales), np.abs(KERNEL).max(0))
    unit = KERNEL.T * (1 / np.abs(KERNEL).max(0)[:, None])
    codes = np.round(unit * 127).astype(np.int8) if levels else (unit * 448).astype(jnp.float8_e4m3fn)
    np.testing.assert_array_equal(got.codes, codes)
    expected = codes.astype(np.float32) / most * np.abs(KERNEL).max(0)[:, None]
    np.testing.assert_allclose(got.dequantise(), expected.T, rtol=1e-6)


# Mean absolute errors on N(0, 1); the first is bitsandbytes' own test's (0.072798 +- 0.000074), the others follow.
ERRORS = {
    ("nf4", 64): 0.07276,
    ("nf4", 32): 0.06771,
    ("nf4", 256): 0.08032,
    ("fp4", 64): 0.09653,
    ("int4", 64): 0.09128,
}


@pytest.mark.parametrize(("name", "block"), ERRORS, ids=str)
def test_errors_on_the_normal_distribution_are_the_published_ones(name: str, block: int) -> None:
    w = np.random.default_rng(2).normal(size=(4096, 512)).astype(np.float32)
    error = np.abs(np.asarray(jax.jit(lambda w: quantised(w, name, block=block).dequantise())(w)) - w).mean()
    assert error == pytest.approx(ERRORS[name, block], abs=2e-4)


def test_scales_in_eight_bits() -> None:
    w = np.random.default_rng(3).normal(size=(64, 600)).astype(np.float32)
    plain, double = quantised(w), quantised(w, double=True)
    np.testing.assert_array_equal(plain.codes, double.codes)
    scales = np.ravel(plain.scales)
    offset = scales.mean()
    groups = np.pad(scales - offset, (0, -scales.size % 256)).reshape(-1, 256)
    largest = np.abs(groups).max(-1)
    table = nested.dynamic_map()
    chosen = np.abs((groups / largest[:, None])[..., None] - table).argmin(-1)
    np.testing.assert_allclose(double.scales.scales, largest, rtol=1e-6)
    np.testing.assert_array_equal(np.ravel(double.scales.codes), chosen.reshape(-1)[: scales.size])
    expected = (table[chosen] * largest[:, None]).reshape(-1)[: scales.size] + offset
    np.testing.assert_allclose(np.ravel(double.scales.decode()), expected, rtol=1e-6)
    assert np.abs(expected / scales - 1).mean() < 3e-3


def test_the_dynamic_map() -> None:
    """Its ends, its smallest number, as many above zero as below and one more, as bitsandbytes has them."""
    table = nested.dynamic_map()
    assert table.shape == (256,) and (np.diff(table) > 0).all() and (table < 0).sum() == 127
    assert table[[0, -1]].tolist() == pytest.approx([-0.99296875, 1.0])
    assert table[128] == pytest.approx(5.5e-7) and table[127] == 0


def test_ways_of_decoding_give_the_same_numbers() -> None:
    """Which of them a backend takes is a matter of time and memory alone."""
    codes = jnp.arange(256, dtype=jnp.uint8).reshape(16, 16)
    np.testing.assert_array_equal(nested._selected(codes), nested.dynamic_map()[np.asarray(codes)])
    for number in quant.FORMATS.values():
        if number.blocks:
            halves, repeated, in_place = (
                decode(number, codes) for decode in (decode_halves, decode_repeated, decode_in_place)
            )
            np.testing.assert_array_equal(halves, repeated)
            np.testing.assert_array_equal(halves, in_place)


def test_bytes_are_as_counted() -> None:
    params = {"dense": {"kernel": jax.ShapeDtypeStruct((4096, 11008), jnp.bfloat16)}}
    size = 4096 * 11008
    held = lambda *args, **kwargs: jlora.quantize(params, *args, **kwargs)["dense"]["kernel"].nbytes
    assert held("nf4") == size // 2 + size // 64 + 4 * size // 64 // 256 + 4
    assert 8 * (held("nf4") - 4) / size == 4.126953125
    assert held("nf4", double=False) == size // 2 + 4 * size // 64
    assert held("int4", block=128, double=False) == size // 2 + 4 * size // 128
    assert held("int8") == held("fp8") == size + 4 * 11008


LAYOUTS = {
    "matrix": ((96, 40), ((1,), (0,), ()), ()),
    "in blocks": ((128, 40), ((1,), (0,), ()), (128,)),
    "heads out": ((64, 4, 32), ((1, 2), (0,), ()), (64,)),
    "heads in": ((4, 32, 64), ((2,), (0, 1), ()), (4, 32)),
    "stacked": ((3, 128, 40), ((2,), (1,), (0,)), (128,)),
    "stack in the middle": ((128, 3, 40), ((2,), (0,), (1,)), (128,)),
    "two stacks": ((2, 3, 64, 8), ((3,), (2,), (0, 1)), (64,)),
    "convolution": ((3, 3, 64, 8), ((3,), (0, 1, 2), ()), (64,)),
}


@pytest.mark.parametrize("name", ["nf4", "int8"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_layers_and_turned_weights_are_slices_of_codes(case: str, name: str) -> None:
    shape, axes, tail = LAYOUTS[case]
    w = np.random.default_rng(4).normal(size=shape).astype(np.float32)
    of = quantised(w, name, axes, double=name == "nf4")
    whole = np.asarray(of.dequantise())
    assert of.shape == shape and np.abs(whole - w).mean() < 0.08
    assert name == "int8" or not tail or of.layout.tail == tail
    turned = of.transpose(tuple(reversed(range(len(shape)))))
    np.testing.assert_array_equal(turned.dequantise(), whole.T)
    for axis in axes[2][:1]:
        layer = jax.tree.map(lambda x: x[1], of)
        np.testing.assert_array_equal(layer.dequantise(), np.take(whole, 1, axis))
        alone = quantised(np.take(w, 1, axis), name, _without(axes, axis), double=name == "nf4")
        jax.tree.map(np.testing.assert_array_equal, layer.codes, alone.codes)
    assert of.leading == (len(axes[2]) if axes[2][:1] == (0,) else 0)


def _without(axes: Any, gone: int) -> Any:
    return tuple(tuple(i - (i > gone) for i in part if i != gone) for part in axes)


def test_vmap_makes_a_stack() -> None:
    w = np.random.default_rng(5).normal(size=(3, 64, 8)).astype(np.float32)
    stacked = jax.vmap(quantised)(w)
    assert stacked.shape == (3, 64, 8) and stacked.leading == 1
    np.testing.assert_array_equal(stacked.dequantise()[2], quantised(w[2]).dequantise())


# -- views -------------------------------------------------------------------------------------------------------------

VIEWS = {
    "cast, turned, reshaped": lambda w: view.reshape(view.transpose(view.cast(w, jnp.bfloat16), (0, 2, 1)), (3, 10, 4, 64)),
    "cut": lambda w: view.cut(w, [(0, 3, 1), (0, 64, 2), (8, 40, 1)]),
    "layers cut": lambda w: view.cut(w, [(1, 3, 1), (0, 64, 1), (0, 8, 1)]),
    "stack turned in": lambda w: view.transpose(view.reshape(w, (3, 8, 8, 40)), (1, 0, 2, 3)),
    "stack merged": lambda w: view.reshape(view.cast(w, jnp.bfloat16), (192, 40)),
    "new axis": lambda w: view.reshape(w, (1, 3, 64, 40)),
}  # fmt: skip
SAME = {
    "cast, turned, reshaped": lambda w: w.astype(jnp.bfloat16).transpose(0, 2, 1).reshape(3, 10, 4, 64),
    "cut": lambda w: w[:, ::2, 8:],
    "layers cut": lambda w: w[1:, :, :8],
    "stack turned in": lambda w: w.reshape(3, 8, 8, 40).transpose(1, 0, 2, 3),
    "stack merged": lambda w: w.astype(jnp.bfloat16).reshape(192, 40),
    "new axis": lambda w: w[None],
}
STACKED = {"cast, turned, reshaped": 1, "cut": 1, "layers cut": 1}  # those that are cut along their first axis as codes


@pytest.mark.parametrize("case", VIEWS)
def test_a_view_is_the_weight_after_its_steps(case: str) -> None:
    of = quantised(np.random.default_rng(6).normal(size=(3, 64, 40)).astype(np.float32), axes=((2,), (1,), (0,)))
    seen, expected = VIEWS[case](of), SAME[case](of.dequantise())
    assert (seen.shape, seen.dtype) == (expected.shape, expected.dtype) and seen.leading == STACKED.get(case, 0)
    np.testing.assert_array_equal(seen.dequantise(), expected)
    row = view.leading(seen, lambda x: x[1]) if seen.shape[0] > 1 else None
    if row is not None:
        assert tree.is_stored(row) == bool(STACKED.get(case))
        np.testing.assert_array_equal(tree.dense(row), expected[1])


# -- trees -------------------------------------------------------------------------------------------------------------


def params_of(dtype: Any = jnp.float32) -> dict[str, Any]:
    w = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)
    return {
        "wte": {"embedding": w(7, 50, 64)},
        "fc": {"kernel": w(8, 64, 128), "bias": w(9, 128)},
        "norm": {"scale": jnp.ones(128, dtype)},
        "head": {"kernel": w(10, 128, 50)},
        "steps": jnp.zeros((3, 4), jnp.int32),
    }


def forward(params: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(params["wte"]["embedding"][x] @ params["fc"]["kernel"])
    return jnp.einsum("...i,i,ij->...j", h, params["norm"]["scale"], params["head"]["kernel"])


def close(x: Any, y: Any) -> None:
    """To two units in the last place: compiled, a division by 127 may be a product."""
    bits = jnp.finfo(x.dtype).nmant if jnp.issubdtype(x.dtype, jnp.floating) else 23
    np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=2.0 ** (1 - bits))


def held(params: Any) -> list[str]:
    return [path for path, leaf in tree.leaves(params)[0].items() if tree.is_stored(leaf)]


def test_which_weights_are_quantised() -> None:
    params, x = params_of(), jnp.zeros((2, 3), jnp.int32)
    sites = jlora.sites(forward, params, x)
    assert held(jlora.quantize(params)) == held(jlora.quantize(params, sites=sites)) == ["fc/kernel"]
    assert held(jlora.quantize(params, targets="kernel")) == ["fc/kernel", "head/kernel"]
    assert held(jlora.quantize(params, targets="embedding")) == ["wte/embedding"]
    assert held(jlora.quantize(params, targets=lambda site: site.kind == "linear")) == ["fc/kernel", "head/kernel"]
    table = jlora.quantize(params, targets="embedding")["wte"]["embedding"]
    np.testing.assert_array_equal(table.codes, quantised(params["wte"]["embedding"].T).codes)  # blocks along the width


@pytest.mark.parametrize("name", quant.FORMATS)
def test_shapes_and_jit_are_as_arrays(name: str) -> None:
    params = params_of(jnp.bfloat16)
    of = jlora.quantize(params, name)
    shapes = jax.eval_shape(lambda params: params, of)
    assert jax.tree.map(
        lambda x: (x.shape, x.dtype), jlora.quantize(jax.eval_shape(lambda: params_of(jnp.bfloat16)), name)
    ) == (jax.tree.map(lambda x: (x.shape, x.dtype), shapes))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda p: jlora.quantize(p, name))(params), of)
    back = jlora.dequantize(of)
    assert jax.tree.structure(back) == jax.tree.structure(params) and back["fc"]["kernel"].dtype == jnp.bfloat16
    jax.tree.map(close, jax.jit(jlora.dequantize)(of), back)
    np.testing.assert_allclose(
        jlora.lift(forward)(of, jnp.arange(3)), forward(back, jnp.arange(3)), rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_codes_lie_along_the_axes_of_their_weight(name: str, kind: AxisType) -> None:
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
    w = np.random.default_rng(11).normal(size=(128, 512)).astype(np.float32)
    put = jax.device_put(w, NamedSharding(mesh, P("x", "y")))
    of = jlora.quantize({"kernel": put}, name)["kernel"]
    assert of.codes.sharding.spec == P("y", "x") and of.codes.addressable_shards[0].data.shape[0] == 128
    scales = of.scales.codes if name == "nf4" else of.scales
    assert scales.sharding.spec == P("y", "x" if name == "nf4" else None)
    alone = jlora.quantize({"kernel": w}, name)["kernel"]
    jax.tree.map(np.testing.assert_array_equal, of, alone)
    back = jax.jit(lambda of: of.dequantise())(of)
    close(back, alone.dequantise())
    assert kind == AxisType.Auto or jax.typeof(back).sharding.spec == P("x", "y")
    traced = jax.jit(lambda w: jlora.quantize({"kernel": w}, name)["kernel"])(put)
    jax.tree.map(np.testing.assert_array_equal, traced, alone)
    assert kind == AxisType.Auto or traced.codes.sharding.spec == P("y", "x")
    shapes = jlora.quantize({"kernel": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=put.sharding)}, name)["kernel"]
    assert [x.sharding.spec for x in jax.tree.leaves(shapes)] == [x.sharding.spec for x in jax.tree.leaves(of)]


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_mesh_that_cuts_through_blocks() -> None:
    mesh = jax.make_mesh((4,), ("x",))
    put = jax.device_put(jnp.ones((128, 8)), NamedSharding(mesh, P("x")))
    text = (
        r"'fc/kernel' of shape \(128, 8\): axis 0 of size 128 lies along 'x' in 4 parts, which cut through its blocks of "
        r"64 weights along the axes \[0\]; what fits is 2 parts of this axis, or the mesh along the axes \[1\]"
    )
    with pytest.raises(ValueError, match=text):
        jlora.quantize({"fc": {"kernel": put}})
    assert jlora.quantize({"fc": {"kernel": put}}, block=32)["fc"]["kernel"].codes.sharding.spec == P(None, "x")


WRONG = {
    "an unknown format": ({"args": ["nf5"]}, r"unknown format 'nf5': it is one of nf4, fp4, int4, int8, fp8; the nearest is 'nf4'"),
    "a block that does not fit": ({"block": 48}, r"block=48 does not fit: it is a power of two from 32 to 4096"),
    "a block of 8 bits": ({"args": ["int8"], "block": 64}, r"int8 has one scale for each output channel: leave out block=64"),
    "double of 8 bits": ({"args": ["fp8"], "double": True}, r"fp8 has one scale for each output channel, too few to be quan"),
    "double of another kind": ({"double": 1}, r"double is True, False or None, not 1$"),
    "double of a list": ({"double": np.array([True, False])}, r"double is True, False or None, not array"),
    **{
        f"a block {block!r}": ({"block": block}, rf"^block={re.escape(repr(block))} does not fit: it is a power of two from 32")
        for block in ("64", 64.0, True, (64,))
    },
    "no pattern": ({"targets": []}, r"^quantize: targets=\[\] holds no pattern: leave it out for the linear weights$"),
    "integers": ({"targets": "steps"}, r"'steps' matches 'steps', whose dtype is int32: only floating-point weights can be q"),
    "a name of no weight": ({"targets": "kernal"}, r"targets='kernal' matches none"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests(case: str) -> None:
    kwargs, text = WRONG[case]
    kwargs = dict(kwargs)
    with pytest.raises(ValueError, match=text):
        jlora.quantize(params_of(), *kwargs.pop("args", []), **kwargs)


def _of_type(given: str) -> str:
    names = "nf4, fp4, int4, int8, fp8"
    return rf"^a format is one of the names {names}, or a jlora.quant.Format; got {given}$"


WRONG_TYPES: dict[str, tuple[dict[str, Any], str]] = {
    "a list of formats": ({"number_format": ["nf4"]}, _of_type(r"\['nf4'\], of type list")),
    "a format in bytes": ({"number_format": b"nf4"}, _of_type("b'nf4', of type bytes")),
    "no format": ({"number_format": None}, _of_type("None, of type NoneType")),
    **{
        f"targets {targets!r}": (
            {"targets": targets}, rf"^targets= is a pattern, a list of them or a predicate on Site, not {re.escape(repr(targets))}$"
        )
        for targets in (3, True, b"kernel", {"kernel": "nf4"})
    },
    "sites": ({"sites": "kernel"}, r"^sites= is what jlora.sites\(fn, params, \*args\) gives, a sequence of Site, not 'kernel'$"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_TYPES)
def test_requests_of_wrong_types(case: str) -> None:
    kwargs, text = WRONG_TYPES[case]
    with pytest.raises(TypeError, match=text):
        jlora.quantize(params_of(), **kwargs)


@pytest.mark.parametrize("name", quant.FORMATS)
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_a_weight_without_elements(name: str, shape: tuple[int, int]) -> None:
    of = jlora.quantize({"kernel": jnp.ones(shape)}, name)["kernel"]
    assert of.shape == of.dequantise().shape == shape


def test_wrong_weights() -> None:
    with pytest.raises(ValueError, match=r"'a/kernel' is not finite: a block with a NaN or an infinity has no scale"):
        jlora.quantize({"a": {"kernel": jnp.ones((64, 8)).at[3, 3].set(jnp.nan)}})
    site = jlora.Site("kernel", (64, 8), "complex64", (0,), (1,), (), "linear")
    with pytest.raises(ValueError, match=r"'kernel' has dtype complex64: only floating-point weights can be quantised"):
        jlora.quantize({"kernel": jnp.ones((64, 8), jnp.complex64)}, sites=[site])
    with pytest.raises(ValueError, match=r"'a/kernel' is quantised already \(Quantised\(nf4, blocks of 64 twice, flo"):
        jlora.quantize(jlora.quantize({"a": {"kernel": jnp.ones((64, 8))}}))
    with pytest.raises(
        ValueError, match=r"the linear weights are heads alone \(head/kernel\), which are no default targ"
    ):
        jlora.quantize({"head": {"kernel": jnp.ones((64, 8))}})


def test_weights_near_the_largest_number() -> None:
    """The sum of the scales is no number of float32; their mean is."""
    w = jnp.asarray(np.random.default_rng(12).normal(size=(1024, 512)) * 2e37, jnp.float32)
    values = jlora.quantize({"kernel": w})["kernel"].dequantise()
    np.testing.assert_allclose(values / 2e37, quantised(w / 2e37, double=True).dequantise(), rtol=1e-3, atol=2e-2)
    with pytest.raises(ValueError, match="'kernel' is not finite"):
        jlora.quantize({"kernel": np.full((64, 64), 1e300)})


def test_codes_and_scales_that_contradict_each_other() -> None:
    of = jlora.quantize({"kernel": jnp.ones((128, 8))}, double=False)["kernel"]
    wrong = quant.Quantised(of.codes, of.scales[:, :1], of.number, of.layout, of.dtype)
    text = (
        r"'kernel': codes and scales contradict each other: nf4 codes of a weight of shape \(128, 8\) in blocks of 64 are "
        r"uint8 \[8, 64\] with scales \[8, 2\], not uint8 \[8, 64\] with \[8, 1\]"
    )
    with pytest.raises(ValueError, match=text):
        jlora.dequantize({"kernel": wrong})
    eight = jlora.quantize({"kernel": jnp.ones((128, 8))}, "int8")["kernel"]
    wrong = quant.Quantised(eight.codes, eight.scales[:3], eight.number, eight.layout, eight.dtype)
    with pytest.raises(
        ValueError, match=r"int8 codes int8 \[8, 128\], scales \[3, 1\]: the codes are int8, and a scale's"
    ):
        jlora.lift(lambda w, x: x @ w)(wrong, jnp.ones((1, 128)))
    double = jlora.quantize({"kernel": jnp.ones((128, 8))})["kernel"]
    with pytest.raises(
        ValueError, match=r"the scales contradict each other: \(8, 2\) codes of scales want scales of the"
    ):
        nested.Nested(double.scales.codes, jnp.ones(3), double.scales.offset).decode()
