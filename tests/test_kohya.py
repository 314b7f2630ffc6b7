"""Files of kohya's scripts and of LyCORIS, by the formulas of their formats; what breaks in other loaders is a test here.

The two real files are read where the environment variable JLORA_WEIGHTS names a folder with real_loras/.
"""

import hashlib
import itertools
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora.interop import cloneofsimo, kohya, modules, pipeline
from jlora.interop.layer import Layer, merged
from jlora.interop.modules import Name
from jlora.models import clip, unet
from jlora.models.diffusion.pipeline import table_of
from jlora.models.unet.ldm import ldm_names
from tests.pipelines import exactly, low_rank, normal, placed, small, weights, whole

pytestmark = pytest.mark.once

REAL = Path(os.environ.get("JLORA_WEIGHTS", "")) / "real_loras"
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # (8, 8) in a small model
CONV = "down_blocks.1.resnets.0.conv1"  # (16, 8, 3, 3)
FF = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"  # (256, 32)


def stem(module: str, prefix: str = "lora_unet_") -> str:
    return prefix + module.replace(".", "_")


def of_lora(module: str, shape: tuple[int, ...], rank: int = 2, alpha: float | None = None, **options) -> dict:
    a, b = low_rank(shape, rank)
    name = stem(module, **options)
    found = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
    return found if alpha is None else found | {f"{name}.alpha": np.asarray(alpha, np.float32)}


def read(tensors, models, metadata=None):
    return kohya.layers_of(tensors, metadata or {}, models)


def only(tensors, models, component="unet") -> Layer:
    found = read(tensors, models).layers
    assert list(found) == [component]
    (layer,) = found[component]
    return layer


# -- names -------------------------------------------------------------------------------------------------------------


def in_transformer(module: str) -> bool:
    return "attentions" in module


def of_locon(module: str) -> bool:
    return "_blocks." in module or "mid_block." in module


@pytest.mark.parametrize(
    ("pipeline", "attention", "locon", "all_of_unet", "text"),
    [("sd15", 192, 278, 282, [72]), ("sd21", 192, 278, 282, [138]), ("sdxl", 722, 788, 794, [72, 192])],
)
def test_tables_have_every_module(pipeline, attention, locon, all_of_unet, text):
    """The numbers of modules that kohya's scripts make factors for, with their defaults and with convolutions."""
    models = whole(pipeline)
    names, own = kohya.names_of(models), weights(models)
    assert [sum(map(keep, own["unet"])) for keep in (in_transformer, of_locon, bool)] == [attention, locon, all_of_unet]
    encoders = [[m for m in own[c] if "layers." in m] for c in models if c != "unet"]
    assert [len(found) for found in encoders] == text
    for module in own["unet"]:
        assert names[stem(module)] == names[stem(module, "lycoris_")] == Name("unet", module)
    for component, prefix in {"text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}.items():
        for module in own.get(component, []):
            inner = module.removeprefix("text_model.")
            assert names[stem(inner, prefix)] == Name(component, module)
            if inner != "text_projection":
                assert names[stem(f"text_model.{inner}", prefix)] == Name(component, module)
    authors = ldm_names(modules.parameters(models["unet"]))
    assert len(set(authors.values())) == len(authors) == len(modules.parameters(models["unet"]))
    written = {name for c in models for name in kohya.written(c, models).values()}
    assert len(written) == sum(len(modules.parameters(shapes)) for shapes in models.values())


@pytest.mark.parametrize(
    ("pipeline", "theirs", "module"),
    [
        ("sdxl", "input_blocks_4_1_proj_in", "down_blocks.1.attentions.0.proj_in"),
        ("sdxl", "input_blocks_5_1_norm", "down_blocks.1.attentions.1.norm"),
        ("sdxl", "input_blocks_7_1_norm", "down_blocks.2.attentions.0.norm"),
        ("sdxl", "input_blocks_8_1_transformer_blocks_9_attn2_to_out_0",
         "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0"),
        ("sdxl", "input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("sdxl", "middle_block_0_in_layers_2", "mid_block.resnets.0.conv1"),
        ("sdxl", "middle_block_1_proj_out", "mid_block.attentions.0.proj_out"),
        ("sdxl", "middle_block_2_out_layers_3", "mid_block.resnets.1.conv2"),
        ("sdxl", "output_blocks_0_1_norm", "up_blocks.0.attentions.0.norm"),
        ("sdxl", "output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("sdxl", "output_blocks_5_1_norm", "up_blocks.1.attentions.2.norm"),
        ("sdxl", "output_blocks_8_0_skip_connection", "up_blocks.2.resnets.2.conv_shortcut"),
        ("sdxl", "output_blocks_8_0_emb_layers_1", "up_blocks.2.resnets.2.time_emb_proj"),
        ("sdxl", "label_emb_0_0", "add_embedding.linear_1"),
        ("sdxl", "label_emb_0_2", "add_embedding.linear_2"),
        ("sdxl", "time_embed_0", "time_embedding.linear_1"),
        ("sdxl", "out_0", "conv_norm_out"),
        ("sdxl", "out_2", "conv_out"),
        ("sd15", "input_blocks_0_0", "conv_in"),
        ("sd15", "input_blocks_8_1_norm", "down_blocks.2.attentions.1.norm"),
        ("sd15", "input_blocks_11_0_in_layers_0", "down_blocks.3.resnets.1.norm1"),
        ("sd15", "output_blocks_2_1_conv", "up_blocks.0.upsamplers.0.conv"),
        ("sd15", "output_blocks_5_2_conv", "up_blocks.1.upsamplers.0.conv"),
        ("sd15", "output_blocks_8_2_conv", "up_blocks.2.upsamplers.0.conv"),
        ("sd15", "output_blocks_11_1_norm", "up_blocks.3.attentions.2.norm"),
    ],
)  # fmt: skip
def test_names_of_the_authors_code(pipeline, theirs, module):
    names = kohya.names_of(whole(pipeline))
    assert names[f"lora_unet_{theirs}"] == names[stem(module)] == Name("unet", module)


def test_a_name_of_two_modules_is_an_error():
    models = {"unet": {"a.b_c.weight": (2, 2), "a.b.c.weight": (2, 2)}}
    with pytest.raises(ValueError, match=r"^'lora_unet_a_b_c' is a name of two modules, 'a.b_c' and 'a.b.c'$"):
        kohya.names_of(models)


def test_the_small_table_is_a_unets():
    models = small("sdxl")
    rows = modules.table(models["unet"])
    own = {key: row for row in rows for key in row.keys}
    assert set(own) == set(models["unet"])
    assert own["conv_norm_out.weight"].path == "conv_norm_out/scale"
    assert own[f"{Q.replace('0.attentions', '1.attentions')}.weight"].order == (1, 0)


# -- whole files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", ["sd15", "sd21", "sdxl"])
def test_files_of_all_modules_come_back_bit_for_bit(pipeline, tmp_path):
    """As kohya's scripts write them: SDXL by its authors' names, all else by diffusers'; a rank and an alpha of each."""
    models = small(pipeline)
    expected = {}
    for component, own in weights(models).items():
        names = kohya.written(component, models)
        for i, module in enumerate(own):
            a, b = low_rank(models[component][f"{module}.weight"], 1 + i % 3, seed=i)
            parts = {"lora_down.weight": a, "lora_up.weight": b, "alpha": np.asarray(0.5 + i % 7, np.float32)}
            expected |= {f"{names[module]}.{suffix}": x.astype(np.float16) for suffix, x in parts.items()}
    xl = pipeline == "sdxl"
    assert f"lora_unet_{'input_blocks_4_1' if xl else 'down_blocks_1_attentions_0'}_proj_in.alpha" in expected
    assert f"lora_te{'1' if xl else ''}_text_model_encoder_layers_0_mlp_fc1.alpha" in expected
    assert ("lora_te2_text_projection.alpha" in expected) == xl
    found = read(expected, models)
    assert {c: len(layers) for c, layers in found.layers.items()} == {c: len(own) for c, own in weights(models).items()}
    kohya.write(tmp_path / "file.safetensors", found.layers, models)
    assert_same(load_file(tmp_path / "file.safetensors"), expected)
    for layers in found.layers.values():
        for i, layer in enumerate(layers):
            assert layer.scale == (0.5 + i % 7) / (1 + i % 3)


def assert_same(found, expected):
    assert set(found) == set(expected)
    for key, x in expected.items():
        assert found[key].dtype == x.dtype and found[key].shape == x.shape, key
        np.testing.assert_array_equal(found[key], x, err_msg=key)


def test_sdxl_by_diffusers_names():
    """What OneTrainer writes; others drop some of it in silence, the added embedding among it."""
    models = small("sdxl")
    own = weights(models)["unet"]
    tensors = {k: x for module in own for k, x in of_lora(module, models["unet"][f"{module}.weight"]).items()}
    assert len(read(tensors, models).layers["unet"]) == 794
    for module in ("add_embedding.linear_1", "time_embedding.linear_2", "conv_in", "conv_out"):
        assert only(of_lora(module, models["unet"][f"{module}.weight"]), models).module == module


def test_text_encoders_with_and_without_text_model():
    models = small("sdxl")
    for name, module in [("text_model.encoder", "encoder"), ("encoder", "encoder")]:
        tensors = of_lora(f"{name}.layers.3.self_attn.q_proj", (19, 19), prefix="lora_te1_")
        assert only(tensors, models, "text_encoder").module == f"{module}.layers.3.self_attn.q_proj"
    tensors = of_lora("text_projection", (32, 32), prefix="lora_te2_")
    assert only(tensors, models, "text_encoder_2").module == "text_projection"
    within = {"text_encoder": {f"text_model.{key}": x for key, x in models["text_encoder"].items()}}
    tensors = of_lora("encoder.layers.0.mlp.fc1", (76, 19), prefix="lora_te_")
    assert only(tensors, within, "text_encoder").module == "text_model.encoder.layers.0.mlp.fc1"


# -- scales ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [
        (None, 1.0),
        (np.asarray(0, np.float32), 1.0),
        (np.asarray(1, np.float32), 0.25),
        (np.asarray([6], np.float16), 1.5),
        (np.asarray(2, ml_dtypes.bfloat16), 0.5),
        (np.asarray(8, np.int64), 2.0),
    ],
)
def test_alpha(alpha, scale):
    models = small("sd15")
    tensors = of_lora(Q, (8, 8), rank=4) | ({} if alpha is None else {f"{stem(Q)}.alpha": alpha})
    layer = only(tensors, models)
    assert layer.scale == scale
    w, (a, b) = normal((8, 8), 7), low_rank((8, 8), 4)
    np.testing.assert_allclose(merged(layer, w), w + scale * (b @ a), atol=1e-5)


def test_alphas_and_ranks_are_each_modules_own():
    models = small("sd15")
    others = [Q.replace("to_q", name) for name in ("to_k", "to_v", "to_out.0")]
    tensors = of_lora(Q, (8, 8), 4, 1) | of_lora(others[0], (8, 8), 4, 4) | of_lora(others[1], (8, 8), 2, 6)
    tensors |= of_lora(others[2], (8, 8), 3)
    found = {layer.module: (layer.rank, layer.scale) for layer in read(tensors, models).layers["unet"]}
    assert found == {Q: (4, 0.25), others[0]: (4, 1.0), others[1]: (2, 3.0), others[2]: (3, 1.0)}


@pytest.mark.parametrize("pipeline", ["sd15", "sd21"], ids=["convolution", "linear"])
@pytest.mark.parametrize("axes", [2, 4])
def test_windows_of_one_go_by_the_model(pipeline, axes):
    """proj_in is a convolution in SD 1.x and linear in SD 2.x; files of either have factors of two axes and of four."""
    models, name = small(pipeline), "mid_block.attentions.0.proj_in"
    shape = models["unet"][f"{name}.weight"]
    assert len(shape) == (4 if pipeline == "sd15" else 2)
    tail = (1,) * (axes - 2)
    a, b = normal((3, 32, *tail)), normal((32, 3, *tail), 1)
    layer = only({f"{stem(name)}.lora_down.weight": a, f"{stem(name)}.lora_up.weight": b}, models)
    w = normal(shape, 2)
    expected = w + (b.reshape(32, 3) @ a.reshape(3, 32)).reshape(shape)
    np.testing.assert_allclose(merged(layer, w), expected, rtol=1e-5, atol=1e-5)


# -- kinds -------------------------------------------------------------------------------------------------------------


def norm_of(v, axes):
    return np.sqrt((v**2).sum(axes, keepdims=True))


def kinds():
    """Rows (name, module, tensors by suffix, the merged weight from the weight)."""
    n = lambda *shape: normal(shape, sum(shape) + len(shape))
    scale = np.asarray(4, np.float32)
    down, up = n(2, 8), n(8, 2)
    yield "lora", Q, {"lora_down.weight": down, "lora_up.weight": up, "alpha": scale}, lambda w: w + 2 * up @ down
    kernel, point = n(2, 8, 3, 3), n(16, 2, 1, 1)
    yield (
        "locon", CONV, {"lora_down.weight": kernel, "lora_up.weight": point, "alpha": scale},
        lambda w: w + 2 * np.einsum("or,rikl->oikl", point[:, :, 0, 0], kernel),
    )  # fmt: skip
    small_, mid, large = n(2, 8, 1, 1), n(2, 2, 3, 3), n(16, 2, 1, 1)
    yield (
        "locon_tucker", CONV,
        {"lora_down.weight": small_, "lora_mid.weight": mid, "lora_up.weight": large, "alpha": scale},
        lambda w: w + 2 * np.einsum("or,rskl,si->oikl", large[..., 0, 0], mid, small_[..., 0, 0]),
    )  # fmt: skip
    a1, b1, a2, b2 = n(8, 2), n(2, 8), n(8, 2) + 1, n(2, 8) - 1
    hada = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": scale}
    yield "loha", Q, hada, lambda w: w + 2 * (a1 @ b1) * (a2 @ b2)
    c1, d1, c2, d2 = n(16, 2), n(2, 72), n(16, 2) + 1, n(2, 72) - 1
    hada = {"hada_w1_a": c1, "hada_w1_b": d1, "hada_w2_a": c2, "hada_w2_b": d2, "alpha": scale}
    yield "loha_conv", CONV, hada, lambda w: w + 2 * ((c1 @ d1) * (c2 @ d2)).reshape(w.shape)
    t1, e1, f1, t2, e2, f2 = n(2, 2, 3, 3), n(2, 16), n(2, 8), n(2, 2, 3, 3) + 1, n(2, 16) + 1, n(2, 8) + 1
    core = lambda t, a, b: np.einsum("pqkl,po,qi->oikl", t, a, b)
    hada = {
        "hada_w1_a": e1, "hada_w1_b": f1, "hada_t1": t1, "hada_w2_a": e2, "hada_w2_b": f2, "hada_t2": t2, "alpha": scale,
    }  # fmt: skip
    yield "loha_tucker", CONV, hada, lambda w: w + 2 * core(t1, e1, f1) * core(t2, e2, f2)
    one, two = n(2, 2), n(4, 4)
    yield "lokr_whole", Q, {"lokr_w1": one, "lokr_w2": two}, lambda w: w + np.kron(one, two)
    ra, rb = n(4, 2), n(2, 4)
    lokr = {"lokr_w1": one, "lokr_w2_a": ra, "lokr_w2_b": rb, "alpha": scale}
    yield "lokr", Q, lokr, lambda w: w + 2 * np.kron(one, ra @ rb)
    wide, la, lb = n(16, 4), n(16, 2), n(2, 8)
    lokr = {"lokr_w1": wide, "lokr_w2_a": la, "lokr_w2_b": lb, "alpha": scale}
    yield "lokr_low_rank", FF, lokr, lambda w: w + 2 * np.kron(wide, la @ lb)
    oa, ob = n(2, 2), n(2, 2) + 1
    lokr = {"lokr_w1_a": oa, "lokr_w1_b": ob, "lokr_w2": two, "alpha": scale}
    yield "lokr_factored", Q, lokr, lambda w: w + 2 * np.kron(oa @ ob, two)
    k1, ka, kb, kt = n(4, 2), n(2, 4), n(2, 4) + 1, n(2, 2, 3, 3)
    lokr = {"lokr_w1": k1, "lokr_w2_a": ka, "lokr_w2_b": kb, "lokr_t2": kt, "alpha": scale}
    yield "lokr_tucker", CONV, lokr, lambda w: w + 2 * np.kron(k1[:, :, None, None], core(kt, ka, kb))
    kc, kd = n(4, 2), n(2, 36)
    lokr = {"lokr_w1": k1, "lokr_w2_a": kc, "lokr_w2_b": kd, "alpha": scale}
    yield "lokr_conv", CONV, lokr, lambda w: w + 2 * np.kron(k1[:, :, None, None], (kc @ kd).reshape(4, 4, 3, 3))
    for side, axis in (("out", 1), ("in", 0)):
        m = np.abs(n(*((8, 1) if side == "out" else (1, 8)))) + 1
        parts = {"lora_down.weight": down, "lora_up.weight": up, "alpha": scale, "dora_scale": m}
        v = lambda w: w + 2 * up @ down
        yield f"dora_{side}", Q, parts, lambda w, v=v, m=m, axis=axis: m * v(w) / norm_of(v(w), axis)
        parts = {"lokr_w1": one, "lokr_w2_a": ra, "lokr_w2_b": rb, "alpha": scale, "dora_scale": m}
        v = lambda w: w + 2 * np.kron(one, ra @ rb)
        yield f"dora_lokr_{side}", Q, parts, lambda w, v=v, m=m, axis=axis: m * v(w) / norm_of(v(w), axis)
        m4 = np.abs(n(*((16, 1, 1, 1) if side == "out" else (1, 8, 1, 1)))) + 1
        parts = hada | {"dora_scale": m4}
        v = lambda w: w + 2 * core(t1, e1, f1) * core(t2, e2, f2)
        axes = (1, 2, 3) if side == "out" else (0, 2, 3)
        yield f"dora_loha_{side}", CONV, parts, lambda w, v=v, m=m4, axes=axes: m * v(w) / norm_of(v(w), axes)
    added = n(16, 8, 3, 3)
    yield "diff", CONV, {"diff": added}, lambda w: w + added
    factor = n(8)
    yield "ia3_in", Q, {"weight": factor, "on_input": np.asarray(1)}, lambda w: w * (1 + factor)
    yield "ia3_out", Q, {"weight": factor, "on_input": np.asarray(0)}, lambda w: w * (1 + factor)[:, None]
    four = n(1, 16, 1, 1)
    yield (
        "ia3_conv", CONV, {"weight": four, "on_input": np.asarray(0)},
        lambda w: w * (1 + four).reshape(-1, 1, 1, 1),
    )  # fmt: skip


KINDS = list(kinds())


@pytest.mark.parametrize(("name", "module", "parts", "expected"), KINDS, ids=lambda x: x if isinstance(x, str) else "")
def test_kinds_by_their_formulas_and_back_bit_for_bit(name, module, parts, expected):
    models = small("sd15")
    tensors = {f"{stem(module)}.{suffix}": x for suffix, x in parts.items()}
    layer = only(tensors, models)
    w = normal(models["unet"][f"{module}.weight"], 11)
    np.testing.assert_allclose(merged(layer, w), expected(w), rtol=2e-5, atol=2e-5)
    back = kohya.tensors_of({"unet": [layer]}, models)
    if layer.kind == "ia3":  # the file has l - 1
        np.testing.assert_allclose(back.pop(f"{stem(module)}.weight"), tensors.pop(f"{stem(module)}.weight"), atol=1e-6)
    assert_same(back, tensors)


def test_lokr_of_whole_matrices_has_no_scale():
    """The tensor of alpha in such files is a number that nobody reads."""
    tensors = {f"{stem(Q)}.lokr_w1": normal((2, 4)), f"{stem(Q)}.lokr_w2": normal((4, 2))}
    assert only(tensors | {f"{stem(Q)}.alpha": np.asarray(1e10, np.float32)}, small("sd15")).scale == 1


def test_the_scale_of_whole_matrices_is_multiplied_in():
    layer = Layer(Q, "lokr", {"w1": normal((2, 2)), "w2": normal((4, 4), 1)}, 3.0, declared=4)
    tensors = kohya.tensors_of({"unet": [layer]}, small("sd15"))
    assert set(tensors) == {f"{X}.lokr_w1", f"{X}.lokr_w2"}
    w = normal((8, 8), 2)
    np.testing.assert_allclose(merged(only(tensors, small("sd15")), w), merged(layer, w), rtol=1e-5, atol=1e-5)


def test_biases_and_norms_are_added_to():
    models = small("sd15")
    norm, linear = "mid_block.attentions.0.norm", "mid_block.attentions.0.proj_out"
    tensors = {
        f"{stem(norm)}.w_norm": normal((32,)), f"{stem(norm)}.b_norm": normal((32,), 1),
        f"{stem(linear)}.diff_b": normal((32,), 2),
    } | of_lora(linear, (32, 32, 1, 1), 2, 1)  # fmt: skip
    found = read(tensors, models).layers["unet"]
    assert {layer.key: (layer.kind, layer.scale) for layer in found} == {
        f"{norm}.weight": ("diff", 1), f"{norm}.bias": ("diff", 1), f"{linear}.weight": ("lora", 0.5),
        f"{linear}.bias": ("diff", 1),
    }  # fmt: skip
    w = normal((32,), 5)
    np.testing.assert_allclose(merged(found[1], w), w + normal((32,), 1))
    assert_same(kohya.tensors_of({"unet": found}, models), tensors)


def test_dora_of_a_square_weight_goes_by_the_axis_of_its_own():
    """(1, n) and (n, 1) have as many numbers: a loader that counts them takes one for the other."""
    models, w, m = small("sd15"), normal((8, 8), 3), np.linspace(1, 2, 8, dtype=np.float32)
    a, b = low_rank((8, 8), 2)
    for shape, axis in (((8, 1), 1), ((1, 8), 0)):
        layer = only(of_lora(Q, (8, 8)) | {f"{stem(Q)}.dora_scale": m.reshape(shape)}, models)
        v = w + b @ a
        np.testing.assert_allclose(merged(layer, w), m.reshape(shape) * v / norm_of(v, axis), rtol=1e-5)


# -- faults ------------------------------------------------------------------------------------------------------------

X = stem(Q)
GOOD = of_lora(Q, (8, 8))
N = "lora_unet_mid_block_attentions_0_norm"
FAULTS = {
    "unknown module": (
        {"lora_unet_mid_block_attentions_7_proj_in.alpha": np.ones(())},
        "'lora_unet_mid_block_attentions_7_proj_in.alpha' is of the unet, which has no such module",
    ),
    "unknown component": (
        {"lora_te2_text_projection.alpha": np.ones(())},
        "'lora_te2_text_projection.alpha' is of the text_encoder_2, which is not here: without= leaves out what is not wanted",
    ),
    "unknown prefix": (
        {"lora_te3_encoder_block_0.alpha": np.ones(())},
        "'lora_te3_encoder_block_0.alpha' is no key of a kohya file for a UNet or its text encoders",
    ),
    "unknown part": (
        {f"{X}.lora_left.weight": np.ones(2)},
        f"'{X}.lora_left.weight' is no part of an adapter that is known, of unet's '{Q}'",
    ),
    "oft": ({f"{X}.oft_blocks": np.ones((2, 4, 4))}, f"'{X}.oft_blocks' is of OFT, which jlora does not read"),
    "glora": ({f"{X}.a1.weight": np.ones((2, 4))}, f"'{X}.a1.weight' is of GLoRA, which jlora does not read"),
    "half": (
        {f"{X}.lora_down.weight": np.ones((2, 8))},
        f"'{X}.lora_down.weight' is a part of lora, whose B unet's '{Q}' lacks",
    ),
    "other half": (
        {f"{X}.lora_up.weight": np.ones((8, 2))}, f"'{X}.lora_up.weight' is a part of lora, whose A unet's '{Q}' lacks"
    ),
    "half of a tucker": (
        {f"{X}.hada_w1_a": np.ones((2, 8)), f"{X}.hada_w1_b": np.ones((2, 8)), f"{X}.hada_w2_a": np.ones((8, 2)),
         f"{X}.hada_w2_b": np.ones((2, 8)), f"{X}.hada_t1": np.ones((2, 2))},
        *[f"'{X}.hada_{part}' is a part of loha, whose t2 unet's '{Q}' lacks" for part in
          ("w1_a", "w1_b", "w2_a", "w2_b", "t1")],
    ),
    "half of lokr": (
        {f"{X}.lokr_w1": np.ones((2, 2))}, f"'{X}.lokr_w1' is a part of lokr, whose w2 or w2_a and w2 or w2_b unet's '{Q}' lacks"
    ),
    "lokr twice": (
        {f"{X}.lokr_w1": np.ones((2, 2)), f"{X}.lokr_w1_a": np.ones((2, 1)), f"{X}.lokr_w1_b": np.ones((1, 2)),
         f"{X}.lokr_w2": np.ones((4, 4))},
        f"'{X}.lokr_w1' is given twice for unet's '{Q}', as a matrix and as the factors of one",
    ),
    "lokr of other sides": (
        {f"{X}.lokr_w1": np.ones((3, 2)), f"{X}.lokr_w2": np.ones((4, 4))},
        f"'{X}.lokr_w1' has shape (3, 2), expected sides that divide the weight's for unet's '{Q}' of shape (8, 8)",
    ),
    "alpha alone": (
        {f"{X}.alpha": np.ones(())}, f"'{X}.alpha' belongs to no factors: there are none of unet's '{Q}'"
    ),
    "two kinds": (
        GOOD | {f"{X}.diff": np.ones((8, 8))},
        *[f"'{X}.{part}': unet's '{Q}' has tensors of lora and of diff" for part in
          ("lora_down.weight", "lora_up.weight", "diff")],
    ),
    "alpha of a difference": (
        {f"{X}.diff": np.ones((8, 8)), f"{X}.alpha": np.ones(())},
        f"'{X}.alpha' is for factors, and unet's '{Q}' has diff",
    ),
    "no bias": (GOOD | {f"{X}.diff_b": np.ones(8)}, f"'{X}.diff_b': unet's '{Q}' has no bias"),
    "bias of another size": (
        {"lora_unet_conv_in.diff_b": np.ones(4)},
        "'lora_unet_conv_in.diff_b' has shape (4,), expected (8,) for unet's 'conv_in'",
    ),
    "inputs": (
        GOOD | {f"{X}.lora_down.weight": np.ones((2, 9))},
        f"'{X}.lora_down.weight' has shape (2, 9), expected (2, 8) for unet's '{Q}' of shape (8, 8)",
    ),
    "rank": (
        GOOD | {f"{X}.lora_up.weight": np.ones((8, 3))},
        f"'{X}.lora_up.weight' has shape (8, 3), expected (8, 2) for unet's '{Q}' of shape (8, 8)",
    ),
    "magnitudes": (
        GOOD | {f"{X}.dora_scale": np.ones((4, 1))},
        f"'{X}.dora_scale' has shape (4, 1), expected (8, 1) or (1, 8) for unet's '{Q}' of shape (8, 8)",
    ),
    "factors of a vector": (
        {f"{N}.lora_down.weight": np.ones((2, 32)), f"{N}.lora_up.weight": np.ones((32, 2))},
        *[f"'{N}.{part}' has shape {shape}, expected none, the parameter being a vector, for unet's "
          "'mid_block.attentions.0.norm' of shape (32,)"
          for part, shape in (("lora_down.weight", (2, 32)), ("lora_up.weight", (32, 2)))],
    ),
    "several alphas": (
        GOOD | {f"{X}.alpha": np.ones(2)},
        f"'{X}.alpha' has shape (2,), expected () for unet's '{Q}' of shape (8, 8)",
    ),
    "nan": (GOOD | {f"{X}.alpha": np.asarray(np.nan)}, f"'{X}.alpha' is nan"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_named_and_nothing_is_read(name):
    tensors, *lines = FAULTS[name]
    everything = of_lora(CONV, (16, 8, 3, 3)) | tensors
    models = small("sd15")
    with pytest.raises(ValueError, match="tensors cannot be placed") as error:
        read(everything, models)
    head = f"the file: {len(lines)} of {len(everything)} tensors cannot be placed, so none is:"
    assert str(error.value) == "\n  ".join([head, *lines])


def test_the_same_tensor_under_two_names_is_an_error():
    models, module = small("sd15"), "mid_block.attentions.0.proj_in"
    shape = models["unet"][f"{module}.weight"]
    tensors = of_lora(module, shape) | of_lora("middle_block.1.proj_in", shape)
    one, two = "lora_unet_mid_block_attentions_0_proj_in", "lora_unet_middle_block_1_proj_in"
    expected = (
        "the file: 2 of 4 tensors cannot be placed, so none is:\n"
        f"  '{two}.lora_down.weight' and '{one}.lora_down.weight' are the same tensor of unet's '{module}'\n"
        f"  '{two}.lora_up.weight' and '{one}.lora_up.weight' are the same tensor of unet's '{module}'"
    )
    with pytest.raises(ValueError, match=exactly(expected)):
        read(tensors, models)


def test_twenty_faults_are_shown_and_all_are_counted():
    tensors = {f"lora_unet_nothing_{i}.alpha": np.ones(()) for i in range(27)}
    with pytest.raises(ValueError, match="27 of 27") as error:
        read(tensors, small("sd15"))
    lines = str(error.value).splitlines()
    assert lines[0] == "the file: 27 of 27 tensors cannot be placed, so none is:"
    assert len(lines) == 22 and lines[-1] == "  and 7 more"


@pytest.mark.parametrize(("theirs", "ours"), list(itertools.permutations(["sd15", "sd21", "sdxl"], 2)))
def test_a_file_of_another_base_says_so(theirs, ours):
    """By the widths of the texts: names of one family are names of another, and so the shapes alone are told elsewhere."""
    families = {"sd15": "768 (SD 1.x)", "sd21": "1024 (SD 2.x)", "sdxl": "2048 (SDXL)"}
    models = whole(theirs)
    names = kohya.written("unet", models)
    tensors = {}
    for module in [m for m in weights(models)["unet"] if m.endswith(("attn2.to_k", "attn2.to_v"))]:
        outputs, inputs = models["unet"][f"{module}.weight"]
        one = {"lora_down.weight": np.zeros((1, inputs)), "lora_up.weight": np.zeros((outputs, 1))}
        tensors |= {f"{names[module]}.{suffix}": x for suffix, x in one.items()}
    with pytest.raises(ValueError, match="for a base whose texts") as error:
        read(tensors, whole(ours))
    head = str(error.value).splitlines()[0]
    expected = rf"the file: \d+ of {len(tensors)} tensors cannot be placed, so none is; the file is for a base whose texts have "
    expected += re.escape(f"width {families[theirs]}, and the model's have {families[ours]}:")
    assert re.fullmatch(expected, head)


# -- metadata ----------------------------------------------------------------------------------------------------------


def test_what_a_file_says_of_itself(tmp_path):
    models = whole("sdxl")
    layer = Layer(
        Q.replace("blocks.0", "blocks.1", 1),
        "lora",
        {"A": np.ones((4, 640), np.float32), "B": np.ones((640, 4), np.float32)},
        0.5,
    )
    file = tmp_path / "file.safetensors"
    kohya.write(file, {"unet": [layer]}, models, metadata={"modelspec.title": "sks dog"})
    found = kohya.read(file, models)
    content = file.read_bytes()
    behind = content[8 + int.from_bytes(content[:8], "little") :]
    assert found.metadata == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "2",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": "sks dog",
        "sshs_model_hash": hashlib.sha256(behind).hexdigest(),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]
    with pytest.raises(FileExistsError, match="is there already: force=True replaces it"):
        kohya.write(file, {"unet": [layer]}, models)
    kohya.write(file, {"unet": [layer]}, models, force=True)


def test_what_files_of_lycoris_and_of_several_ranks_say():
    models = whole("sd21")
    lora = lambda rank: Layer("m", "lora", {"A": np.ones((rank, 3)), "B": np.ones((2, rank))})
    said = kohya.described({"unet": [lora(2), lora(4)]}, models)
    assert said["ss_network_dim"] == said["ss_network_alpha"] == "Dynamic" and said["ss_v2"] == "True"
    assert said["modelspec.architecture"] == "stable-diffusion-v2-512/lora"
    loha = Layer("m", "loha", {name: np.ones((2, 2)) for name in ("w1_a", "w1_b", "w2_a", "w2_b")})
    said = kohya.described({"unet": [loha]}, small("sd15"))
    assert said == {
        "ss_network_module": "lycoris.kohya", "ss_network_dim": "2", "ss_network_alpha": "2",
        "ss_network_args": '{"algo": "loha"}',
    }  # fmt: skip  # and of the base nothing: 19 is nobody's width


# -- writing -----------------------------------------------------------------------------------------------------------


def test_alpha_has_the_factors_dtype_where_that_has_the_number():
    models = small("sd15")
    a, b = low_rank((8, 8), 3)
    for scale, dtype, expected in [
        (2.0, np.float16, np.float16),
        (0.1, np.float16, np.float32),
        (0.1, np.float32, np.float32),
    ]:
        layer = Layer(Q, "lora", {"A": a.astype(dtype), "B": b.astype(dtype)}, scale)
        alpha = kohya.tensors_of({"unet": [layer]}, models)[f"{X}.alpha"]
        assert alpha.dtype == expected and alpha.shape == ()
        np.testing.assert_allclose(alpha, 3 * scale, rtol=1e-7)


def test_half_precision_that_does_not_hold_the_numbers_is_an_error(tmp_path):
    layer = Layer(Q, "lora", {"A": np.full((1, 8), 7e4, np.float32), "B": np.ones((8, 1), np.float32)})
    file = tmp_path / "file.safetensors"
    with pytest.raises(ValueError, match="'lora_unet_.*' reaches 70000, more than float16 holds: choose another dtype"):
        kohya.write(file, {"unet": [layer]}, small("sd15"), dtype="float16")
    assert not file.exists()
    kohya.write(file, {"unet": [layer]}, small("sd15"), dtype="bfloat16")


def test_what_a_file_cannot_hold_is_named():
    models = small("sd15")
    wrong = [
        Layer("nowhere", "lora", {}), Layer(Q, "vera", {}), Layer(Q, "diff", {"added": np.ones(8)}, parameter="bias"),
    ]  # fmt: skip
    expected = (
        "a kohya file cannot hold 3 of the layers:\n"
        "  unet's 'nowhere.weight' is no tensor of the model\n"
        f"  unet's '{Q}.weight' is of kind vera\n"
        f"  unet's '{Q}.bias' is no tensor of the model"
    )
    with pytest.raises(ValueError, match=exactly(expected)):
        kohya.tensors_of({"unet": wrong}, models)


# -- onto parameters ---------------------------------------------------------------------------------------------------

FEW = (Q, CONV, FF, "conv_in", "mid_block.attentions.0.norm", "encoder.layers.0.self_attn.q_proj")


def few():
    return placed(small("sd15", lambda key: key.rpartition(".")[0] in FEW))


def test_load_and_save(tmp_path):
    models, params, names = few()
    before = jax.tree.map(np.asarray, params)
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    norm = stem("mid_block.attentions.0.norm")
    tensors = of_lora(Q, (8, 8), 2, 1) | of_lora(CONV, (16, 8, 3, 3), 3, 6) | of_lora(FF, (256, 32), 2)
    tensors |= {f"{text}.lora_down.weight": normal((2, 19)), f"{text}.lora_up.weight": normal((19, 2), 1)}
    tensors |= {f"{norm}.w_norm": normal((32,)), f"{stem('conv_in')}.diff_b": normal((8,))}
    file = tmp_path / "file.safetensors"
    save_file(tensors, file, {"ss_tag_frequency": "{}"})
    found = kohya.load(file, params, names)
    assert {component: len(adapted.sites) for component, adapted in found.items()} == {"unet": 3, "text_encoder": 1}
    layers = kohya.read(file, models).layers
    for component, own in layers.items():
        whole = dict(zip([row.keys[0] for row in names[component]], names[component], strict=True))
        result = jlora.merge(found[component])
        for layer in own:
            row = whole[layer.key]
            leaf = result
            start = params[component]
            for part in row.path.split("/"):
                leaf, start = leaf[part], start[part]
            torch = np.argsort(row.order) if row.order else None
            w = np.transpose(start, torch) if torch is not None else np.asarray(start)
            got = np.transpose(leaf, torch) if torch is not None else np.asarray(leaf)
            assert np.abs(got - w).max() > 0.1
            np.testing.assert_allclose(got, merged(layer, w), rtol=1e-5, atol=1e-5)
    kohya.save(tmp_path / "again.safetensors", found, names)
    expected = tensors | {
        f"{name}.alpha": np.asarray(2, np.float32) for name in (text, stem(FF))
    }  # which the file had left out
    assert_same(load_file(tmp_path / "again.safetensors"), expected)
    jax.tree.map(np.testing.assert_array_equal, before, params)


def leaf_of(tree, module: str):
    for part in [*module.split("."), "kernel"]:
        tree = tree[part]
    return tree


@pytest.mark.parametrize(
    ("name", "module", "parts", "expected"),
    [row for row in KINDS if not row[0].endswith("_in") or row[0] == "ia3_in"],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_kinds_are_trained_as_what_they_are(name, module, parts, expected):
    models, params, names = few()
    tensors = {f"{stem(module)}.{suffix}": x for suffix, x in parts.items()}
    adapted = pipeline.placed(read(tensors, models), params, names, origin="the file")["unet"]
    order = (3, 2, 0, 1) if module == CONV else (1, 0)
    start, end = (np.asarray(leaf_of(tree, module)).transpose(order) for tree in (params["unet"], jlora.merge(adapted)))
    np.testing.assert_allclose(end, expected(start), rtol=2e-5, atol=2e-5)
    assert jlora.count(adapted).trainable > 0
    saved = kohya.tensors_of({"unet": pipeline.layers_of(adapted, names["unet"])}, models)
    (again,) = read(saved, models).layers["unet"]
    np.testing.assert_allclose(merged(again, start), expected(start), rtol=2e-5, atol=2e-5)


def test_magnitudes_of_inputs_are_refused_by_name():
    models, params, names = few()
    found = read(GOOD | {f"{X}.dora_scale": np.ones((1, 8))}, models)
    expected = (
        f"the file, unet, does not fit the model:\n  '{Q}.weight' has DoRA's magnitudes for its inputs (shape (1, 8)): "
        "jlora merges those, and trains magnitudes of outputs"
    )
    with pytest.raises(ValueError, match=exactly(expected)):
        pipeline.placed(found, params, names, origin="the file")


def test_new_tokens_are_no_adapter():
    models, params, names = few()
    found = read(GOOD, models)._replace(tokens={"<s1>": np.ones(19)})
    expected = (
        "the file has embeddings of the new tokens '<s1>', which are no adapter: take them from `read`, and leave them "
        "out here by `without`"
    )
    for use in (pipeline.placed, pipeline.merged):
        with pytest.raises(ValueError, match=exactly(expected)):
            use(found, params, names, origin="the file")


def test_load_leaves_out_what_it_is_told_to(tmp_path):
    _, params, names = few()
    file = tmp_path / "file.safetensors"
    save_file(GOOD | {"lora_te_nothing.alpha": np.ones((), np.float32)}, file)
    expected = (
        f"'{file}': 1 of 3 tensors cannot be placed, so none is:\n"
        "  'lora_te_nothing.alpha' is of the text_encoder, which is not here: without= leaves out what is not wanted"
    )
    with pytest.raises(ValueError, match=exactly(expected)):
        kohya.load(file, {"unet": params["unet"]}, {"unet": names["unet"]})
    found = kohya.load(file, {"unet": params["unet"]}, {"unet": names["unet"]}, without="^lora_te")
    assert list(found) == ["unet"]


@pytest.mark.parametrize(
    ("method", "alpha"), [(jlora.lora(2, 1), 1), (jlora.rslora(4, 2), 4), (jlora.dora(jlora.lora(2, 6)), 6)]
)
def test_alpha_holds_the_scale_of_the_method(method, alpha, tmp_path):
    models, params, names = few()
    adapted = jlora.apply(params["unet"], method=method, targets="attn1/to_q")
    factors = {path: {name: x + 1 for name, x in own.items()} for path, own in adapted.factors.items()}
    adapted = adapted.replace(factors=factors)
    file = tmp_path / "file.safetensors"
    kohya.save(file, {"unet": adapted}, {"unet": names["unet"]}, metadata={"modelspec.title": "t"})
    tensors = load_file(file)
    assert tensors[f"{X}.alpha"] == np.float32(alpha)
    (layer,) = kohya.read(file, models).layers["unet"]
    path = Q.replace(".", "/") + "/kernel"
    start, end = params["unet"], jlora.merge(adapted)
    for part in path.split("/"):
        start, end = start[part], end[part]
    np.testing.assert_allclose(merged(layer, np.asarray(start).T), np.asarray(end).T, rtol=1e-5, atol=1e-5)


def test_leaves_that_were_trained_whole_are_differences(tmp_path):
    _, params, names = few()
    adapted = jlora.apply(params["unet"], rank=1, targets="attn1/to_q", extras="conv_in/kernel")
    factors = dict(adapted.factors)
    factors["conv_in/kernel"] = {"value": factors["conv_in/kernel"]["value"] + 0.5}
    file = tmp_path / "file.safetensors"
    kohya.save(file, {"unet": adapted.replace(factors=factors)}, {"unet": names["unet"]})
    np.testing.assert_allclose(load_file(file)["lora_unet_conv_in.diff"], np.full((8, 4, 3, 3), 0.5), atol=1e-6)


def test_arguments():
    _, params, names = few()
    expected = "['vae'] are no components of a pipeline; expected of ['unet', 'text_encoder', 'text_encoder_2']"
    with pytest.raises(ValueError, match=exactly(expected)):
        kohya.load("file", {"vae": {}}, {"vae": []})
    expected = "params has the components ['unet'], and names ['text_encoder', 'unet']: expected the same"
    with pytest.raises(ValueError, match=exactly(expected)):
        kohya.load("file", {"unet": params["unet"]}, names)


# -- cloneofsimo's files -----------------------------------------------------------------------------------------------


def test_numbered_layers_are_in_torchs_order():
    models = whole("sd15")
    order = cloneofsimo.modules_of("unet", models["unet"], {"CrossAttention", "Attention", "GEGLU"})
    assert len(order) == 144
    block = "down_blocks.0.attentions.0.transformer_blocks.0."
    assert [name.removeprefix(block) for name in order[:9]] == [
        "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj",
        "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
    ]  # fmt: skip
    assert order[54].startswith("up_blocks.1.attentions.0.") and order[-1].startswith("mid_block.")
    text = cloneofsimo.modules_of("text_encoder", models["text_encoder"], {"CLIPAttention"})
    assert [name.rpartition(".")[2] for name in text[:4]] == ["k_proj", "v_proj", "q_proj", "out_proj"]
    assert text[-1] == "encoder.layers.11.self_attn.out_proj" and len(text) == 48


def test_numbered_layers_that_are_not_known():
    tensors = {
        "unet:0:down": np.ones((1, 8)),
        "unet:0:up": np.ones((8, 1)),
        "unet:144:up": np.ones((8, 1)),
        "<s>": np.ones(19),
    }
    expected = (
        "the file: 2 of 4 tensors cannot be placed, so none is:\n"
        "  'unet:144:up' is of the unet, whose layers of those classes are 144\n"
        "  '<s>' is neither of a numbered layer nor, by the metadata, a new token's"
    )
    with pytest.raises(ValueError, match=exactly(expected)):
        read(tensors, small("sd15"))
    expected = (
        'the file: its layers of the unet are those within ["ResnetBlock2D"]; jlora knows '
        "['Attention', 'CrossAttention', 'GEGLU']"
    )
    with pytest.raises(ValueError, match=exactly(expected)):
        read(tensors, small("sd15"), {"unet": '["ResnetBlock2D"]'})


@pytest.mark.skipif("JLORA_WEIGHTS" not in os.environ, reason="JLORA_WEIGHTS names no folder of weights")
@pytest.mark.parametrize(
    ("name", "rank", "tokens"),
    [("cloneofsimo_lora_disney", 1, ["<s1>", "<s2>"]), ("cloneofsimo_analog_svd_rank4", 4, [])],
)
def test_real_files_are_placed_whole(name, rank, tokens):
    file, models = REAL / f"{name}.safetensors", whole("sd15")
    tensors = load_file(file)
    found = kohya.read(file, models)
    assert {component: len(layers) for component, layers in found.layers.items()} == {"unet": 144, "text_encoder": 48}
    assert list(found.tokens) == tokens and all(x.shape == (768,) for x in found.tokens.values())
    assert found.metadata["text_encoder"] == '["CLIPAttention"]'
    layers = [layer for own in found.layers.values() for layer in own]
    assert {(layer.kind, layer.rank, layer.scale) for layer in layers} == {("lora", rank, 1.0)}
    seen = [x for layer in layers for x in layer.tensors.values()] + list(found.tokens.values())
    assert len(seen) == len(tensors) and sum(x.size for x in seen) == sum(x.size for x in tensors.values())
    again = kohya.layers_of(kohya.tensors_of(found.layers, models), {}, models)  # as a kohya file, and back
    for component, own in found.layers.items():
        back = {layer.module: layer for layer in again.layers[component]}
        for layer in own:
            for part, x in layer.tensors.items():
                np.testing.assert_array_equal(back[layer.module].tensors[part], x)
    first = next(layer for layer in found.layers["unet"] if layer.module == Q.replace("attn1.to_q", "attn2.to_k"))
    up, down = tensors["unet:6:up"].astype(np.float32), tensors["unet:6:down"].astype(np.float32)
    np.testing.assert_allclose(merged(first, np.zeros((320, 768), np.float32)), up @ down, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match=r"texts have width 768 \(SD 1.x\), and the model's have 1024 \(SD 2.x\)"):
        kohya.read(file, whole("sd21"))


@pytest.mark.skipif("JLORA_WEIGHTS" not in os.environ, reason="JLORA_WEIGHTS names no folder of weights")
def test_a_real_file_is_loaded_onto_the_whole_models():
    """On the models of Stable Diffusion 1.5, through which every site stays factored."""
    latents, context = jnp.zeros((1, 64, 64, 4)), jnp.zeros((1, 77, 768))
    inputs = {"unet": (latents, jnp.zeros(1), context), "text_encoder": (jnp.zeros((1, 77), jnp.int32),)}
    models = {
        "unet": unet.UNet(unet.PRESETS["sd15"]),
        "text_encoder": clip.CLIPText(clip.PRESETS["clip-vit-l-text"]),
    }
    params, names = {}, {}
    for component, model in models.items():
        shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs[component])["params"]
        # Pages that nobody touches cost nothing.
        params[component] = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        names[component] = table_of(model)
    found = kohya.load(REAL / "cloneofsimo_lora_disney.safetensors", params, names, without="^<s[12]>$")
    assert {component: len(adapted.sites) for component, adapted in found.items()} == {"unet": 144, "text_encoder": 48}
    for component, adapted in found.items():
        lifted = jlora.lift(models[component].apply, strict=True)
        jax.eval_shape(lifted, {"params": adapted}, *inputs[component])
    tensors = load_file(REAL / "cloneofsimo_lora_disney.safetensors")
    numbers = sum(x.size for key, x in tensors.items() if not key.startswith("<"))
    assert sum(jlora.count(adapted).trainable for adapted in found.values()) == numbers == 385_344


@pytest.mark.parametrize("module", [kohya, jlora.diffusers], ids=["kohya", "diffusers"])
@pytest.mark.parametrize("call", ["load", "merge"])
def test_a_pattern_that_is_none_is_named(module, call: str, tmp_path: Path):
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"^without='\(' is no regular expression: missing \)"):
        getattr(module, call)(tmp_path / "a.safetensors", {"unet": {}}, {"unet": []}, without="(")
