"""UNet, autoencoder and text encoders of Stable Diffusion: shapes, configs and key tables, and diffusers' own outputs."""

import dataclasses
import functools
import math
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

import jlora
from jlora import models
from jlora.interop import diffusers, kohya
from jlora.models import clip, resnet, unet, vae
from jlora.models.catalogue import architecture_of
from jlora.models.checkpoint import described
from jlora.models.fields import FieldError
from jlora.models.tensors import tensor_shape
from tests import pipelines, small_pipelines

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parent / "golden" / "diffusers"
OF_DIFFUSERS = ("attn_processor", "dora", "metadata", "plain", "up_down")
UNREAD = ("diag_oft", "glora", "ia3")  # which diffusers has no outputs of
FILES = sorted(
    f"{path.parent.name}/{path.stem}" for path in GOLDEN.glob("sd*/*.safetensors") if path.stem not in UNREAD
)
CLOSE = 2e-5  # of outputs of size 1 to 5: float32 in another order


def shapes_of(config) -> dict[str, tuple[int, ...]]:
    architecture = architecture_of(config)
    tree = jax.eval_shape(architecture.build(config).init, jax.random.key(0), *architecture.inputs(config))["params"]
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


# -- shapes, configs, keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),  # of diffusers' models
    [
        ("sd15", 859_520_964, 686),
        ("sd21", 865_910_724, 686),
        ("sdxl", 2_567_463_684, 1680),
        ("sd15-vae", 83_653_863, 248),
        ("sdxl-vae", 83_653_863, 248),
    ],
)
def test_published_sizes_have_their_parameters_tensors_and_config(name, parameters, tensors):
    config = {**unet.PRESETS, **vae.PRESETS}[name]
    architecture = architecture_of(config)
    assert architecture.read(architecture.write(config), "none") == config
    scanned = dataclasses.replace(config, scan=True)
    shapes, table = shapes_of(scanned), architecture.table(scanned)
    assert sorted(row.path for row in table) == sorted(shapes)
    assert sum(map(math.prod, shapes.values())) == parameters
    keys = {key: tensor_shape(row, shapes[row.path]) for row in table for key in row.keys}
    assert len(keys) == tensors and sorted(keys) == sorted(row.keys[0] for row in architecture.table(config))
    if name in unet.PRESETS:
        layers = {key: shape for key, shape in keys.items() if key in pipelines.shapes(f"unet_{name}")}
        assert layers == pipelines.shapes(f"unet_{name}")


@pytest.mark.parametrize(
    ("name", "golden"),
    [
        ("clip-vit-l-text", "text_vit_l"),
        ("openclip-vit-h-text", "text_vit_h"),
        ("openclip-vit-bigg-text", "text_big_g"),
    ],
)
def test_text_encoders_have_the_layers_that_files_of_adapters_name(name, golden):
    config = dataclasses.replace(clip.PRESETS[name], scan=True)
    shapes, table = shapes_of(config), architecture_of(config).table(config)
    keys = {key: tensor_shape(row, shapes[row.path]) for row in table for key in row.keys}
    bare = lambda shapes: {key.removeprefix("text_model."): shape for key, shape in shapes.items()}
    own, theirs = bare(keys), bare(pipelines.shapes(golden))
    assert {key: own.get(key) for key in theirs} == theirs


@pytest.mark.parametrize("style", ["sd1", "sdxl"])
def test_the_unrolled_models_parameters_are_those_of_the_table(style):
    """Of the small models; the published ones differ in numbers alone."""
    for part in ("unet", "text_encoder"):
        architecture, config = described(GOLDEN / style / part / "config.json")
        assert sorted(row.path for row in architecture.table(config)) == sorted(shapes_of(config))


def test_a_file_of_stable_diffusion_1_says_less_and_means_the_same():
    json = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    }
    architecture = architecture_of(unet.UNetConfig())
    assert architecture.read(json, "none") == unet.PRESETS["sd15"]
    json = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "sample_size": 512}
    architecture = architecture_of(vae.VAEConfig())
    assert architecture.read(json, "none") == vae.PRESETS["sd15-vae"]


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"class_embed_type": "timestep"}, "config.json has class_embed_type='timestep'; jlora's model has None"),
        ({"time_cond_proj_dim": 256}, "config.json has time_cond_proj_dim=256; jlora's model has None"),
        ({"block_out_channels": 320}, "config.json has block_out_channels=320, expected a list"),
        (
            {"down_block_types": ["DownBlock2D"] * 3},
            "config.json has down_block_types=['DownBlock2D', 'DownBlock2D', 'DownBlock2D'], expected 4 of "
            "CrossAttnDownBlock2D, DownBlock2D",
        ),
        (
            {"down_block_types": ["DownBlock2D"] * 4},
            "config.json has down_block_types=['DownBlock2D', 'DownBlock2D', 'DownBlock2D', 'DownBlock2D'] and "
            "up_block_types=None: attention at different resolutions",
        ),
        ({"attention_head_dim": [8, 8]}, "config.json has attention_head_dim=[8, 8], expected 4 of them, or one"),
        (
            {"attention_head_dim": 7},
            "config.json has block_out_channels=None, norm_num_groups=None, attention_head_dim=7: widths=(320, 640, 1280, "
            "1280) are not all multiples of groups=32 and heads=(7, 7, 7, 7)",
        ),
        ({"norm_num_groups": 0}, "config.json has norm_num_groups=0: groups must be at least 1, got 0"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 9,
            },
            "config.json has projection_class_embeddings_input_dim=9, addition_time_embed_dim=256: added=9 leaves no room "
            "for a text beside 6 sizes of added_time=256",
        ),
    ],
)
def test_a_config_that_is_no_unet_of_jlora(changed, error):
    with pytest.raises(ValueError, match=pipelines.exactly(error)):
        architecture_of(unet.UNetConfig()).read(changed, "none")


def test_fields_that_cannot_be():
    with pytest.raises(
        FieldError, match=r"depths=\(1, 1\) and widths=\(320, 640, 1280, 1280\) speak of different numbers"
    ):
        unet.UNetConfig(depths=(1, 1))
    with pytest.raises(FieldError, match=r"widths\[1\] must be a whole number, got 1.5"):
        unet.UNetConfig(widths=(320, 1.5))
    with pytest.raises(FieldError, match=r"widths must be a tuple of 1 to 8, got \[128\]"):
        vae.VAEConfig(widths=[128])
    with pytest.raises(FieldError, match=r"widths=\(100,\) are not all multiples of groups=32"):
        vae.VAEConfig(widths=(100,))
    with pytest.raises(
        FieldError, match=r"layers=16 and depths=\(64, 64, 64, 0\) make 6468 blocks, at most 1024 are built"
    ):
        unet.UNetConfig(layers=16, depths=(64, 64, 64, 0))
    with pytest.raises(ValueError, match="middle=2 and depths="):
        architecture_of(unet.UNetConfig()).write(unet.UNetConfig(depths=(1, 1, 1, 1), middle=2))


# -- outputs -----------------------------------------------------------------------------------------------------------


def base(component: str, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array of a checkpoint, by the rule of make_diffusion_files.py."""
    key = key.removeprefix("text_model.") if component == "text_encoder" else key
    values = 0.2 * np.random.RandomState(zlib.crc32(f"{component}.{key}".encode())).standard_normal(shape)
    return (values + (len(shape) == 1 and key.endswith(".weight"))).astype(np.float32)


class Style:
    """The parts of a style of golden/diffusers on jlora's own models, and programs that are compiled once."""

    def __init__(self, name: str, *, scan: bool = False) -> None:
        self.arrays = dict(np.load(GOLDEN / name / "outputs.npz"))
        self.models, self.params, self.tables = {}, {}, {}
        for folder in sorted(GOLDEN.glob(f"{name}/*/")):
            architecture, config = described(folder / "config.json")
            head = {"head": "projection"} if folder.name == "text_encoder_2" else {}
            config = dataclasses.replace(config, scan=scan, **head)
            shapes, table = shapes_of(config), architecture.table(config)
            flat = {}
            for row in table:
                tensors = [base(folder.name, key, tensor_shape(row, shapes[row.path])) for key in row.keys]
                tensors = [x.transpose(row.order) if row.order else x for x in tensors]
                flat[row.path] = jnp.asarray(np.stack(tensors) if row.stacked else tensors[0])
            self.models[folder.name] = architecture.build(config)
            self.params[folder.name] = traverse_util.unflatten_dict(flat, sep="/")
            self.tables[folder.name] = table
        self.plain = {part: jax.jit(functools.partial(self.run, part)) for part in self.models}

    def run(self, part: str, params, apply=None):
        """What a part puts out, in torch's layout."""
        apply = apply or self.models[part].apply
        given = {name: jnp.asarray(self.arrays[f"inputs/{name}"]) for name in self.inputs(part)}
        if part != "unet":
            return apply({"params": params}, given["tokens"].astype(jnp.int32))["out"]
        latents = given.pop("sample").transpose(0, 2, 3, 1)
        return apply({"params": params}, latents, *given.values())["out"].transpose(0, 3, 1, 2)

    def inputs(self, part: str) -> list[str]:
        known = ("sample", "timesteps", "context", "text_embeds", "time_ids") if part == "unet" else ("tokens",)
        return [name for name in known if f"inputs/{name}" in self.arrays]

    def adapted(self, file: str):
        """A file on the models: adapted, or merged where jlora does not train what it holds."""
        reader = diffusers if file in OF_DIFFUSERS else kohya
        path = GOLDEN / self.name / f"{file}.safetensors"
        return reader.load(path, self.params, self.tables)


@functools.cache
def style(name: str, scan: bool = False) -> Style:
    made = Style(name, scan=scan)
    made.name = name
    return made


def differences(own: Style, file: str, params, *, half: str = "") -> dict[str, float]:
    return {
        part: float(np.abs(own.plain[part](params[part]) - own.arrays[f"{file}/{half}{part}"]).max())
        for part in own.models
    }


@pytest.mark.parametrize("name", FILES)
def test_every_file_merged_onto_the_models_gives_diffusers_outputs(name):
    folder, file = name.split("/")
    own = style(folder)
    reader = diffusers if file in OF_DIFFUSERS else kohya
    merged = reader.merge(GOLDEN / f"{name}.safetensors", own.params, own.tables)
    assert max(differences(own, file, merged).values()) < CLOSE
    assert all(differences(own, file, own.params)[part] > 1e-3 for part in own.models)  # the file matters


@pytest.mark.parametrize("name", [name for name in FILES if "dora_" not in name])
def test_every_file_at_half_its_scale(name):
    """PEFT's DoRA halves the update within the norm. LyCORIS' has a rule of its own, which diffusers does not know."""
    folder, file = name.split("/")
    own = style(folder)
    half = {
        part: jlora.merge(halved(one) if file == "dora" else jlora.scale(one, 0.5))
        for part, one in own.adapted(file).items()
    }
    assert max(differences(own, file, {**own.params, **half}, half="half/").values()) < CLOSE


def halved(adapted):
    """DoRA's with half of B."""
    factors = {
        site: {name: x / 2 if name == "B" else x for name, x in own.items()} for site, own in adapted.factors.items()
    }
    return adapted.replace(factors=factors)


@pytest.mark.parametrize(("folder", "scan"), [("sd1", False), ("sd2", True), ("sdxl", True)])
def test_adapted_parts_are_lifted_and_every_site_stays_factored(folder, scan):
    own = style(folder, scan)
    for part, adapted in own.adapted("plain").items():
        lifted = jlora.lift(own.models[part].apply, strict=True)
        out = jax.jit(functools.partial(own.run, part, apply=lifted))(adapted)
        assert np.abs(out - own.arrays[f"plain/{part}"]).max() < CLOSE


@pytest.mark.loose_promotion  # of Flax's norms
def test_remat_and_bfloat16_are_the_same_model():
    config = unet.UNetConfig(widths=(8,), depths=(1,), heads=(2,), layers=1, context_width=6, groups=4)
    keys = iter(jax.random.split(jax.random.key(0), 3))
    inputs = (jax.random.normal(next(keys), (1, 4, 6, 4)), jnp.asarray([7]), jax.random.normal(next(keys), (1, 3, 6)))
    params = unet.UNet(config).init(next(keys), *inputs)["params"]

    def loss(params, config):
        return jnp.mean(unet.UNet(config).apply({"params": params}, *inputs)["out"] ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain = gradient(params, config)
    remat = jax.make_jaxpr(lambda params: jax.grad(loss)(params, dataclasses.replace(config, remat=True)))(params)
    assert str(remat).count("prevent_cse=True") >= 8  # 5 residual blocks, 4 transformers
    for options in ({"remat": True}, {"remat": True, "scan": True}):
        changed = dataclasses.replace(config, **options)
        given = stacked(params) if "scan" in options else params
        expected = stacked(plain) if "scan" in options else plain
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient(given, changed), expected)
    half = unet.UNet(dataclasses.replace(config, dtype="bfloat16")).apply({"params": params}, *inputs)["out"]
    whole = unet.UNet(config).apply({"params": params}, *inputs)["out"]
    assert half.dtype == jnp.float32 and 0 < np.abs(half - whole).max() < 0.1 * np.abs(whole).max()


def stacked(tree):
    """Parameters as scan=True has them, of transformers of one block."""
    if not isinstance(tree, dict):
        return tree
    name = "transformer_blocks_0"
    rest = {key: stacked(own) for key, own in tree.items() if key != name}
    return rest | ({name.removesuffix("_0"): jax.tree.map(lambda x: x[None], tree[name])} if name in tree else {})


def test_inputs_that_do_not_fit():
    config = unet.UNetConfig(widths=(8,), depths=(0,), heads=(2,), layers=1, context_width=6, groups=4)
    run = lambda config, *args: jax.eval_shape(unet.UNet(config).init, jax.random.key(0), *args)
    x, t, text = jnp.zeros((2, 4, 4, 4)), jnp.zeros((2,)), jnp.zeros((2, 3, 6))
    wrong = {
        "the latents are (2, 4, 4, 3), expected (batch, height, width, 4)": (config, x[..., :3], t, text),
        "the context is (2, 3, 5), expected (batch, length, 6)": (config, x, t, text[..., :5]),
        "pooled= is for a UNet with added conditions (SDXL) and for no other; this one has added=None": (
            config, x, t, text, jnp.zeros((2, 8)), jnp.zeros((2, 6))),
        "pooled= is for a UNet with added conditions (SDXL) and for no other; this one has added=32": (
            dataclasses.replace(config, added=32, added_time=4), x, t, text),
        "pooled is (2, 7), expected (2, 8)": (
            dataclasses.replace(config, added=32, added_time=4), x, t, text, jnp.zeros((2, 7)), jnp.zeros((2, 6))),
    }  # fmt: skip
    for error, args in wrong.items():
        with pytest.raises(ValueError, match="^" + re.escape(error)):
            run(*args)
    small = vae.VAEConfig(widths=(8, 16), layers=1, groups=4)
    with pytest.raises(ValueError, match=r"the images are \(1, 5, 4, 3\), expected .* multiples of 2"):
        jax.eval_shape(vae.VAE(small).init, jax.random.key(0), jnp.zeros((1, 5, 4, 3)))


def test_norms_of_groups_keep_a_small_variance_beside_a_large_mean():
    class Grouped(NamedTuple):
        groups: int = 2
        epsilon: float = 1e-6
        dtype: str = "float32"
        param_dtype: str = "float32"

    x = 100 + 0.1 * np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
    norm = resnet.group_norm(Grouped(), "norm")
    out = norm.apply(norm.init(jax.random.key(0), x), x)
    wide = x.astype(np.float64).reshape(1, 4, 4, 2, 2)
    expected = (wide - wide.mean((1, 2, 4), keepdims=True)) / np.sqrt(wide.var((1, 2, 4), keepdims=True) + 1e-6)
    assert np.abs(out - expected.reshape(x.shape)).max() < 2e-3


def test_nearest_is_torchs():
    x = jnp.arange(12.0).reshape(1, 3, 4, 1)
    assert resnet.nearest(x, 6, 8)[0, :, :, 0].tolist() == np.kron(x[0, :, :, 0], np.ones((2, 2))).tolist()
    assert resnet.nearest(x, 5, 7)[0, :, 0, 0].tolist() == [0, 0, 4, 4, 8]  # floor(i 3 / 5)
    assert resnet.nearest(x, 5, 7)[0, 0, :, 0].tolist() == [0, 0, 1, 1, 2, 2, 3]


# -- folders of one part -----------------------------------------------------------------------------------------------


def test_a_part_is_loaded_and_saved_in_diffusers_files(tmp_path):
    folder = small_pipelines.write("sd1", tmp_path / "pipeline")
    loaded = models.load(folder / "unet", scan=True)
    assert isinstance(loaded.model, unet.UNet) and loaded.model.config.scan
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(loaded.params, sep="/").items()}
    assert shapes == shapes_of(loaded.model.config)
    models.save(tmp_path / "saved", loaded.model, loaded.params, largest_shard=20_000)
    names = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert names[0] == "config.json" and names[1].startswith("diffusion_pytorch_model-00001-of-")
    assert names[-1] == "diffusion_pytorch_model.safetensors.index.json" and len(names) > 4
    again = models.load(tmp_path / "saved")
    plain = models.load(folder / "unet")
    jax.tree.map(np.testing.assert_array_equal, again.params, plain.params)
    assert again.model == plain.model

    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"there are others: pass variant='fp16'$"):
        models.load(folder / "unet")
    jax.tree.map(np.testing.assert_array_equal, models.load(folder / "unet", variant="fp16").params, plain.params)
    models.save(folder / "unet", plain.model, plain.params)
    tensors = load_file(file)
    changed = {key: x[..., 0, 0] if re.search("proj_(in|out).weight", key) else x for key, x in tensors.items()}
    assert sum(x.shape != tensors[key].shape for key, x in changed.items()) >= 4
    save_file(changed, file, {"format": "pt"})  # linear layers in the place of 1 x 1 convolutions
    jax.tree.map(np.testing.assert_array_equal, models.load(folder / "unet").params, plain.params)
    assert file.with_name("diffusion_pytorch_model.fp16.safetensors").exists()  # other variants stay
    with pytest.raises(FileNotFoundError, match=r"there are files without a variant: leave out variant='ema'$"):
        models.load(tmp_path / "saved", variant="ema")
    with pytest.raises(ValueError, match="variant='../x' is no word that files are named by"):
        models.load(folder / "unet", variant="../x")


def test_older_names_of_the_autoencoders_attention(tmp_path):
    """Files of Stable Diffusion 1.x say query, key, value and proj_attn."""
    folder = small_pipelines.write("sd1", tmp_path / "pipeline") / "vae"
    plain = models.load(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for new, name in old.items():
        tensors = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): x for key, x in tensors.items()}
    assert any("proj_attn" in key for key in tensors)
    save_file(tensors, file, {"format": "pt"})
    jax.tree.map(np.testing.assert_array_equal, models.load(folder).params, plain.params)
