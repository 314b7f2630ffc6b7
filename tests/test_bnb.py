"""Codes, scales and values against the real bitsandbytes, code for code: `golden/quant/make_bnb.py` says what it computes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (safetensors' bfloat16)
import numpy as np
import pytest
from safetensors.numpy import load_file

from jlora.quant import Nested, Quantised, encode, format_of, layout_of, nested
from jlora.quant.formats import FP4, NF4

pytestmark = pytest.mark.once

GOLDEN = load_file(Path(__file__).parent / "golden" / "quant" / "bnb.safetensors")
CASES = sorted(key.rsplit("/", 1)[0] for key in GOLDEN if key.count("/") == 3 and key.endswith("/codes"))
NESTED = sorted(key.removesuffix("/nested/codes") for key in GOLDEN if key.endswith("/nested/codes"))
INT8 = sorted(key.removesuffix("/int8/codes") for key in GOLDEN if key.endswith("/int8/codes"))
TINY = np.finfo(np.float32).tiny  # XLA takes what is smaller for 0


def matrix(w):
    return w.reshape(-1, w.shape[-1]) if w.ndim > 1 else w.reshape(1, -1)


def quantised(case, w):
    _, kind, block = case.split("/")
    number, rows = format_of(kind), matrix(w)
    layout = layout_of(rows.shape, (0,), (1,), (), number, int(block))
    return jax.jit(lambda w: encode(w, number, layout, 1, double=False))(rows)


def nibbles(codes, size):
    codes = np.asarray(codes).ravel()
    return np.stack([codes >> 4, codes & 15], 1).ravel()[:size]


def unit(case, w):
    """The numbers that have codes, |w| / scale, as NumPy has them."""
    scales = np.repeat(GOLDEN[f"{case}/absmax"], int(case.split("/")[2]))[: w.size]
    return np.abs(w.astype(np.float32).ravel()) / np.where(scales == 0, 1, scales)


@pytest.mark.parametrize("case", CASES)
def test_codes_and_scales_are_those_of_bitsandbytes(case):
    w = GOLDEN[case.split("/")[0]]
    found = quantised(case, w)
    sizes = np.abs(w.astype(np.float32).ravel())
    normal = ((unit(case, w) >= TINY) & (sizes >= TINY)) | (sizes == 0)
    scales = GOLDEN[f"{case}/absmax"]
    held = np.repeat((scales >= TINY) | (scales == 0), int(case.split("/")[2]))[: w.size]
    ours, theirs = (nibbles(codes, w.size) for codes in (found.codes, GOLDEN[f"{case}/codes"]))
    assert (normal & held).sum() > 0.15 * w.size
    np.testing.assert_array_equal(ours[normal & held], theirs[normal & held])
    np.testing.assert_array_equal(np.where(scales < TINY, 0, scales), np.asarray(found.scales).ravel())


@pytest.mark.parametrize("case", [case for case in CASES if f"{case}/dequantised" in GOLDEN])
def test_values_are_those_of_bitsandbytes(case):
    name, kind, block = case.split("/")
    w, number = GOLDEN[name], format_of(kind)
    layout = layout_of(matrix(w).shape, (0,), (1,), (), number, int(block))
    like = jax.eval_shape(lambda w: encode(w, number, layout, 1, double=False), matrix(w))
    codes = GOLDEN[f"{case}/codes"].reshape(like.codes.shape)
    of = Quantised(jnp.asarray(codes), jnp.asarray(GOLDEN[f"{case}/absmax"].reshape(like.scales.shape)), number,
                   layout, w.dtype)  # fmt: skip
    np.testing.assert_array_equal(np.asarray(of.dequantise()).reshape(w.shape), GOLDEN[f"{case}/dequantised"])


@pytest.mark.parametrize("case", NESTED)
def test_scales_in_8_bits_are_those_of_bitsandbytes(case):
    """With bitsandbytes' own mean: ours is summed in another order."""
    theirs = {key: GOLDEN[f"{case}/nested/{key}"] for key in ("nearest", "absmax", "offset", "codes", "dequantised")}
    scales = GOLDEN[f"{case}/absmax"]
    found = nested.encode(jnp.asarray(scales), 0)
    np.testing.assert_allclose(found.offset, theirs["offset"], rtol=2e-7)
    np.testing.assert_allclose(found.scales, theirs["absmax"], rtol=0, atol=4e-7 * np.abs(scales).max())
    centred = scales - theirs["offset"]
    exact = nested.nearest(jnp.asarray(unit_groups(centred)))
    np.testing.assert_array_equal(exact, theirs["nearest"])
    assert (np.asarray(found.codes) != theirs["nearest"]).mean() <= 0.005  # a scale beside a threshold, if at all
    # bitsandbytes' kernel of the CPU looks its codes up in a table that is too coarse for all of them
    table = nested.dynamic_map()
    span = np.repeat(theirs["absmax"], 256)[: scales.size]
    off = np.abs(table[theirs["codes"]] - table[theirs["nearest"]]) * span
    assert off.max() <= 2**-6 * span.max()
    own = Nested(*(jnp.asarray(theirs[key]) for key in ("codes", "absmax", "offset")))
    np.testing.assert_array_equal(own.decode(), theirs["dequantised"])


def unit_groups(centred):
    """Scales over the largest of their group, as bitsandbytes has them: the last group, if it is short, is divided."""
    groups = [centred[i : i + 256] for i in range(0, centred.size, 256)]
    largest = [np.maximum(np.abs(group).max(), np.float32(1e-38)) for group in groups]
    pairs = zip(groups, largest, strict=True)
    return np.concatenate([g * (np.float32(1) / m) if g.size == 256 else g / m for g, m in pairs])


def test_the_tables_are_those_of_bitsandbytes():
    np.testing.assert_array_equal(np.float32(NF4), GOLDEN["map/nf4"])
    np.testing.assert_array_equal(np.float32(FP4), GOLDEN["map/fp4"])
    np.testing.assert_array_equal(nested.dynamic_map(), GOLDEN["map/dynamic"])


@pytest.mark.parametrize("name", INT8)
def test_int8_codes_are_those_of_bitsandbytes(name):
    """But for those that lie half-way between two: bitsandbytes rounds 127 / scale, jlora 1 / scale."""
    w, number = GOLDEN[name], format_of("int8")
    layout = layout_of(w.shape, (0,), (1,), (), number, 0)
    found = jax.jit(lambda w: encode(w, number, layout, 1, double=False))(w)
    np.testing.assert_array_equal(np.asarray(found.scales).ravel(), GOLDEN[f"{name}/int8/scales"])
    off = np.abs(np.asarray(found.codes, int) - GOLDEN[f"{name}/int8/codes"])
    assert off.max() <= 1 and off.mean() < 0.002
    own = Quantised(jnp.asarray(GOLDEN[f"{name}/int8/codes"]), found.scales, number, layout, jnp.float32)
    theirs = GOLDEN[f"{name}/int8/dequantised"]
    held = np.isfinite(theirs)  # code * scale of 3e38 is beyond float32 before it is divided by 127
    assert held.mean() > 0.99
    np.testing.assert_allclose(np.asarray(own.dequantise())[held], theirs[held], rtol=4e-7)  # rounded thrice


def test_the_golden_files_have_what_they_are_for():
    assert len(CASES) > 60 and len(NESTED) == 6 and len(INT8) == 4
    types = {tuple(case.split("/")[1:]) for case in CASES if case.startswith("normal/")}
    assert len(types) == 16  # both formats, all blocks
