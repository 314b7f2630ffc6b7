"""Sets of weights of Stable Diffusion's UNets and text encoders, on the real shapes: numbers, files, and how they are used."""

import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

import jlora
from jlora.models import clip, unet
from jlora.models.catalogue import architecture_of
from jlora.models.clip import targets as text
from jlora.models.sizes import PRESETS, model_of
from jlora.models.unet import targets
from tests.tiers import thorough

FAMILIES = ("sd15", "sd21", "sdxl")
# Trained numbers for each of the rank, and weights: of PEFT and of kohya's and LyCORIS's programs on the same shapes.
UNETS = {
    "sd15": {"attention": (199_296, 128), "transformers": (423_936, 192), "locon": (1_050_816, 278), "all": (1_058_216, 282)},
    "sd21": {"attention": (207_488, 128), "transformers": (432_128, 192), "locon": (1_059_008, 278), "all": (1_066_408, 282)},
    "sdxl": {
        "attention": (1_451_520, 560), "transformers": (2_659_840, 722), "locon": (3_074_240, 788), "all": (3_088_296, 794),
    },
}  # fmt: skip
TEXTS = {
    "clip-vit-l-text": {"attention": (73_728, 48), "all": (165_888, 72)},
    "openclip-vit-h-text": {"attention": (188_416, 92), "all": (423_936, 138)},
    "openclip-vit-bigg-text": {"attention": (327_680, 128), "all": (737_280, 192)},
}
PARAMETERS = {
    "sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684, "clip-vit-l-text": 123_060_480,
    "openclip-vit-h-text": 340_387_840, "openclip-vit-bigg-text": 694_659_840,
}  # fmt: skip
# Bytes of the files that diffusers' training scripts write, in float32. One in float16 has half the data, and a header
# that is shorter by some digits of its offsets.
FILES = {
    ("sd15", 4): 3_225_672, ("sd15", 8): 6_414_480, ("sd15", 16): 12_792_440, ("sd15", 32): 25_547_552,
    ("sd15", 128): 102_077_640, ("sdxl", 4): 23_388_184, ("sdxl", 8): 46_613_032, ("sdxl", 16): 93_063_064,
    ("sdxl", 32): 185_961_528, ("sdxl", 128): 743_347_312,
}  # fmt: skip


@functools.cache
def model(name, scan):
    module, inputs = model_of(name, scan=scan)
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return module, params, jlora.sites(lambda params, *args: module.apply({"params": params}, *args), params, *inputs)


def adapted(name, scan, which, rank=1):
    _, params, sites = model(name, scan)
    return jlora.apply(params, rank, targets=which, sites=sites)


def weights(of):
    """Weights that are adapted, each of the scanned layers for itself."""
    return sum(math.prod(site.shape[axis] for axis in site.stack_axes) for site in of.sites)


ROWS = [(name, scan) for name in (*FAMILIES, *TEXTS) for scan in (True, False)]
UNET_ROWS = [(name, scan) for name in FAMILIES for scan in (True, False)]
DEFAULT = [("sd15", False), ("sdxl", True), ("clip-vit-l-text", False), ("openclip-vit-bigg-text", True)]


@pytest.mark.parametrize("row", thorough(ROWS, "test_a_file_that_is_written_has_the_published_size", DEFAULT))
def test_numbers_trained_are_the_published_ones(row):
    name, scan = row
    _, params, _ = model(name, scan)
    assert sum(x.size for x in jax.tree.leaves(params)) == PARAMETERS[name]
    sets = architecture_of(PRESETS[name]).targets
    assert next(iter(sets)) == "attention"
    for which, (per_rank, count) in (UNETS | TEXTS)[name].items():
        for rank in (1, 4) if which == "attention" else (1,):
            found = adapted(name, scan, sets[which], rank)
            assert (jlora.count(found).trainable, weights(found)) == (rank * per_rank, count), (which, rank)


def test_sets_lie_within_each_other_and_fit_a_tree_of_several_models():
    _, inputs = model_of("sd15")
    small = unet.UNet(unet.UNetConfig(widths=(8, 16), depths=(1, 0), heads=(2, 2), layers=1, context_width=8, groups=4))
    params = jax.eval_shape(small.init, jax.random.key(0), *inputs[:2], jax.ShapeDtypeStruct((1, 1, 8), jnp.float32))
    config = clip.CLIPTextConfig(vocab_size=8, context=4, width=8, layers=2, heads=2, hidden=16, end=7)
    words = jax.eval_shape(clip.CLIPText(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    whole = {"unet": params["params"], "text_encoder": words["params"]}
    chosen = {
        name: {site.path for site in jlora.apply(whole, 1, targets=pattern).sites}
        for name, pattern in {**targets.TARGETS, "text": text.ATTENTION, "text and mlp": text.ALL}.items()
    }
    order = ("cross_attention", "attention", "transformers", "locon", "all")
    assert all(chosen[one] < chosen[other] for one, other in itertools.pairwise(order))
    assert chosen["text"] < chosen["text and mlp"] and len(chosen["text and mlp"]) == 2 * 6
    assert all(path.startswith("unet/") for path in chosen["locon"])
    assert chosen["text"] == {
        f"text_encoder/h_{i}/attn/{x}/kernel" for i in (0, 1) for x in ("query", "key", "value", "out")
    }


def arguments(name):
    """Those of a real image: 512 pixels, of SDXL 1024."""
    config = PRESETS[name]
    side = 128 if name == "sdxl" else 64
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
    added = (shape(2, config.pooled), shape(2, 6)) if config.added else ()
    return (shape(2, side, side, 4), shape(2), shape(2, 77, config.context_width), *added)


@pytest.mark.parametrize(
    "row", thorough(UNET_ROWS, "test_each_use_of_a_weight_is_explained_as_factored", [("sd15", False), ("sdxl", True)])
)
def test_no_weight_is_built_on_the_real_shapes(row):
    name, scan = row
    module, params, sites = model(name, scan)
    found = jlora.apply(params, 4, targets=targets.ALL, sites=sites)
    call = lambda params, *args: module.apply({"params": params}, *args)["out"]
    out = jax.eval_shape(jlora.lift(call, strict=True), found, *arguments(name))
    assert out.shape == (2, *arguments(name)[0].shape[1:3], 4)


def test_each_use_of_a_weight_is_explained_as_factored():
    module, _, _ = model("sd15", False)
    explanation = jlora.explain(
        lambda params, *args: module.apply({"params": params}, *args),
        adapted("sd15", False, targets.ALL),
        *arguments("sd15"),
    )
    assert len(explanation.rows) == 282 and not explanation.materialised


# -- files -------------------------------------------------------------------------------------------------------------


def size_of_file(shapes, itemsize):
    """Bytes of a safetensors file that says of itself {"format": "pt"}, as PyTorch's programs write it."""
    dtype, at, header = {4: "F32", 2: "F16"}[itemsize], 0, {"__metadata__": {"format": "pt"}}
    for key, shape in sorted(shapes.items()):
        end = at + itemsize * math.prod(shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    said = len(json.dumps(header, separators=(",", ":")))
    return 8 + said + -said % 8 + at


def tensors(name, rank):
    """Shapes in a file of diffusers'."""
    config = PRESETS[name]
    table = architecture_of(config).table(config)
    sites = {site.path: site for site in adapted(name, False, targets.ATTENTION).sites}
    keys = {row.path: row.keys[0].removesuffix(".weight") for row in table if row.path in sites}
    found = {}
    for path, key in keys.items():
        inputs, outputs = sites[path].shape
        found |= {f"unet.{key}.lora_A.weight": (rank, inputs), f"unet.{key}.lora_B.weight": (outputs, rank)}
    return found


@pytest.mark.parametrize(
    "row",
    thorough(
        list(FILES), "test_a_file_that_is_written_has_the_published_size", [row for row in FILES if row[0] == "sd15"]
    ),
)
def test_files_have_the_published_sizes(row):
    name, rank = row
    assert size_of_file(tensors(name, rank), 4) == FILES[name, rank]


def test_a_file_that_is_written_has_the_published_size(tmp_path):
    config = PRESETS["sd15"]
    zero = lambda x: np.broadcast_to(np.zeros((), np.float32), x.shape)  # of any size in four bytes
    found = adapted("sd15", False, targets.ATTENTION, 4)
    found = found.replace(base=jax.tree.map(zero, found.base), factors=jax.tree.map(zero, found.factors))
    table = {"unet": architecture_of(config).table(config)}
    for dtype, size in ((jnp.float32, 3_225_672), (jnp.float16, 1_631_168)):
        file = tmp_path / f"{jnp.dtype(dtype)}.safetensors"
        jlora.diffusers.save(file, {"unet": found}, table, dtype=dtype)
        with safe_open(file, "numpy") as opened:
            assert set(opened.metadata()) == {"format", "lora_adapter_metadata"}
        written = safetensors.numpy.load_file(file)
        assert {key: x.shape for key, x in written.items()} == tensors("sd15", 4)
        assert size_of_file(tensors("sd15", 4), jnp.dtype(dtype).itemsize) == size
        assert len(safetensors.numpy.save(written, {"format": "pt"})) == size
        assert 0 < file.stat().st_size - size < 10_000  # PEFT's config: the names of all modules, ranks and alphas
