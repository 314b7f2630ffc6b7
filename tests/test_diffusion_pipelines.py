"""Pipelines of Stable Diffusion: folders and single files both ways, and diffusers' own images from the same noise."""

import contextlib
import dataclasses
import functools
import json
import re
import shutil
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import jlora
from jlora.models import checkpoint, diffusion, reading
from jlora.models.catalogue import architecture_of
from jlora.models.diffusion import Noise, generate, scheduler_config, single_file
from jlora.models.tensors import to_tensors
from jlora.models.vae import sampled
from jlora.sharding import MODELS, put
from tests import hostile, small_pipelines
from tests.tiers import thorough

pytestmark = pytest.mark.once

SIDES = {"height": 16, "width": 24}
CLOSE = 1e-5  # of images in [0, 1]: diffusers' in float32, computed in another order
CASES = [f"{family}/{case}" for family in small_pipelines.FAMILIES for case in small_pipelines.cases(family)["cases"]]
QUICK = ["sd1/masked_weakly", "sdxl/sizes"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {family: small_pipelines.write(family, root / family) for family in small_pipelines.FAMILIES}


@pytest.fixture(scope="module")
def pipelines(folders):
    """Loaded once each, in float32: the text encoders' files are float16, which Flax's norms promote by themselves."""
    return functools.cache(lambda family, **options: diffusion.load(folders[family], param_dtype="float32", **options))


def arguments(family: str, name: str) -> dict:
    """Arguments of `generate` for a case of golden/pipelines."""
    arrays, case = small_pipelines.golden(family), small_pipelines.cases(family)["cases"][name]
    given = {"steps": case["num_inference_steps"], "latents": jnp.asarray(arrays[f"{name}/noise"])}
    given |= {"image": arrays["image"], "strength": case["strength"]} if "image" in case else SIDES
    given |= {"mask": arrays["mask"]} if "mask" in case else {}
    renamed = {"guidance_scale": "guidance", "negative_prompt": "negative", "guidance_rescale": "rescale"}
    given |= {own: case[theirs] for theirs, own in renamed.items() if theirs in case}
    if "original_size" in case:
        row = [*case["original_size"], *case["crops_coords_top_left"], *case["target_size"]]
        given["sizes"] = np.asarray([row, row], np.float32)
    return given


def with_scheduler(pipeline, case: dict):
    if "scheduler" not in case:
        return pipeline
    noise, sampler = scheduler_config.read(case["scheduler"])
    return dataclasses.replace(pipeline, noise=noise, sampler=sampler)


PROMPTS = small_pipelines.cases("sd1")["prompts"]
AUTO = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
EXPLICIT = (jax.sharding.AxisType.Explicit,) * 2
KEY = jax.random.key(0)


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", thorough(CASES, "test_a_key_draws_each_image_by_itself_and_nothing_compiles_again", QUICK)
)
def test_images_are_diffusers_own(pipelines, case):
    family, name = case.split("/")
    pipeline = with_scheduler(pipelines(family), small_pipelines.cases(family)["cases"][name])
    images = generate(pipeline, PROMPTS, key=KEY, **arguments(family, name))
    assert images.shape == (2, 16, 24, 3) and images.dtype == jnp.float32
    assert np.abs(images - small_pipelines.golden(family)[f"{name}/images"]).max() < CLOSE


def test_a_key_draws_each_image_by_itself_and_nothing_compiles_again(pipelines):
    pipeline = dataclasses.replace(pipelines("sd1", scan=True), sampler="euler_ancestral")
    run = functools.partial(generate, pipeline, steps=2, **SIDES)
    keys = jax.random.split(KEY, 2)
    before = generate_programs()
    both = run(PROMPTS, key=keys)
    assert generate_programs() == before + 1
    swapped = run(PROMPTS[::-1], key=keys[::-1], guidance=7.5)
    np.testing.assert_allclose(swapped, both[::-1], atol=1e-6)
    other = run([PROMPTS[0]] * 2, key=jnp.stack([keys[0]] * 2), guidance=3.0)  # another scale, the same program
    np.testing.assert_array_equal(other[0], other[1])
    assert np.abs(other[0] - both[0]).max() > 1e-3
    assert np.abs(run(PROMPTS, key=jax.random.key(1)) - both).max() > 1e-3
    assert generate_programs() == before + 1


def generate_programs() -> int:
    return sys.modules[generate.__module__]._program._cache_size()


def test_adapted_parts_are_lifted_merged_and_swapped_without_compiling(pipelines):
    pipeline = dataclasses.replace(pipelines("sd1"), sampler="ddim")
    run = functools.partial(generate, prompts=PROMPTS, key=KEY, steps=2, **SIDES)
    made = [adapted_of(pipeline, seed) for seed in (1, 2)]
    lifted = functools.partial(run, lift=jlora.lift)
    first = lifted(pipeline.with_params(**made[0]))
    merged = pipeline.with_params(**{part: jlora.merge(one) for part, one in made[0].items()})
    before = generate_programs()
    second = lifted(pipeline.with_params(**made[1]))  # another adapter: the same program
    held = len(jax.live_arrays())
    for i in range(100):
        lifted(pipeline.with_params(**made[i % 2]))
    assert generate_programs() == before and len(jax.live_arrays()) == held  # nothing is left of 100 swaps
    assert np.abs(first - second).max() > 1e-2
    plain = run(pipeline)
    assert generate_programs() == before + 1
    np.testing.assert_allclose(run(merged), first, atol=2e-5)
    assert generate_programs() == before + 1  # a merged pipeline runs the base's program
    assert lowered(run, merged) == lowered(run, pipeline) != lowered(lifted, pipeline.with_params(**made[0]))
    assert np.abs(plain - first).max() > 1e-2
    error = "the parameters of the unet are Adapted: pass lift=jlora.lift, or merge or dequantise them first"
    with pytest.raises(ValueError, match=re.escape(error)):
        run(pipeline.with_params(unet=made[0]["unet"]))


def lowered(run, pipeline) -> str:
    """The program's text, as XLA is given it."""
    module, texts = sys.modules[generate.__module__], []
    program = module._program

    def written(*arguments):
        texts.append(program.lower(*arguments).as_text())
        return program(*arguments)

    with mock.patch.object(module, "_program", written):
        run(pipeline)
    return texts[0]


def adapted_of(pipeline, seed: int) -> dict:
    """UNet and text encoder with factors that are not zero."""
    found = {}
    for part, params in pipeline.adaptable.items():
        adapted = jlora.apply(params, rank=2, targets=r"attn")
        leaves, structure = jax.tree.flatten(adapted.factors)
        rng = np.random.default_rng(seed)
        drawn = [jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
        found[part] = adapted.replace(factors=jax.tree.unflatten(structure, drawn))
    return found


def test_arguments_reach_the_program(pipelines):
    """Through `generate`: clip skip, zeros for no negative prompt, pieces of long prompts, no guidance up to 1."""
    pipeline = dataclasses.replace(pipelines("sdxl", scan=True), sampler="euler")
    run = functools.partial(generate, key=KEY, steps=1, **SIDES)
    plain = run(pipeline, PROMPTS)
    empty = run(dataclasses.replace(pipeline, zeros=False), PROMPTS)
    assert np.abs(plain - empty).max() > 1e-3
    np.testing.assert_allclose(run(pipeline, PROMPTS, negative=["", ""]), empty, atol=1e-6)
    before = generate_programs()
    assert np.abs(run(pipeline, PROMPTS, clip_skip=0) - plain).max() == 0
    swapped = dataclasses.replace(pipeline, tokenizers=dict(reversed(pipeline.tokenizers.items())))
    np.testing.assert_array_equal(run(swapped, PROMPTS), plain)
    assert generate_programs() == before
    alone = run(pipeline, PROMPTS, guidance=0.0)
    assert np.abs(alone - run(pipeline, PROMPTS[::-1], guidance=1.0)).max() > 1e-3
    assert generate_programs() == before + 1
    assert np.abs(run(pipeline, PROMPTS, clip_skip=1, guidance=0.0) - alone).max() > 1e-3
    long = [f"{PROMPTS[0]} {'a cat ' * 30}", PROMPTS[1]]
    assert np.abs(run(pipeline, long, long="chunk", guidance=0.0) - alone)[0].max() > 1e-3


def test_latents_are_drawn_from_the_autoencoders_gaussians():
    encoded = {"mean": jnp.full((4, 64), 3.0), "logvar": jnp.full((4, 64), 2 * np.log(0.5))}
    drawn = sampled(encoded, KEY)
    np.testing.assert_allclose((drawn - 3) / 0.5, jax.random.normal(KEY, (4, 64)), atol=1e-5)


ONTO_MESHES = {
    "ddim": ("sd2", {"sampler": "ddim", "guidance": 1.0}),
    "pndm": ("sd1", {"sampler": "pndm"}),  # with a state
    "in a mask": ("sdxl", {"sampler": "dpmpp_2m_sde", "masked": True}),  # with a state and fresh noise
}


@pytest.mark.thorough("test_a_key_draws_each_image_by_itself_and_nothing_compiles_again")
@pytest.mark.parametrize(
    ("types", "name"), [(AUTO.axis_types, "ddim"), *((EXPLICIT, name) for name in ONTO_MESHES)],
    ids=["auto-ddim", *(f"explicit-{name}" for name in ONTO_MESHES)],
)  # fmt: skip
def test_images_lie_over_devices(pipelines, types, name):
    """Parameters on one device (DDIM), and split over a mesh with Explicit axes: with images over it, and whole."""
    family, how = ONTO_MESHES[name]
    pipeline, how = pipelines(family, scan=True), dict(how)
    image, mask = np.linspace(0, 1, 2 * 16 * 24 * 3, dtype=np.float32), np.arange(2 * 16 * 24) % 2
    masked = {"image": image.reshape(2, 16, 24, 3), "mask": mask.reshape(2, 16, 24, 1), "strength": 1.0}
    how |= masked if how.pop("masked", False) else SIDES
    mesh = jax.make_mesh((2, 2), ("fsdp", "tp"), axis_types=types)
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    run = functools.partial(generate, prompts=PROMPTS, key=KEY, steps=3, **how)
    expected = run(pipeline)
    if name == "ddim":
        images = run(pipeline, sharding=rows)
        assert images.sharding.is_equivalent_to(rows, 4)
        np.testing.assert_allclose(images, expected, atol=1e-5)
    if types is EXPLICIT:
        split = {part: put(params, MODELS.shardings(params, mesh)) for part, params in pipeline.params.items()}
        with jax.set_mesh(mesh) if name == "pndm" else contextlib.nullcontext():
            images = run(pipeline.with_params(**split), sharding=rows)
        assert images.sharding.spec[0] == "fsdp"
        np.testing.assert_allclose(images, expected, atol=2e-5)
        if name == "in a mask":
            np.testing.assert_allclose(run(pipeline.with_params(**split)), expected, atol=2e-5)


def test_arguments_that_cannot_be(pipelines):
    pipeline, paint = pipelines("sd1"), pipelines("paint")
    image, mask = np.zeros((2, 16, 24, 3), np.float32), np.zeros((2, 16, 24, 1), np.float32)
    wrong = [
        ({"height": 15}, "height=15 is no multiple of 2, as the autoencoder wants it: 16 is"),
        ({"key": jax.random.split(KEY, 3)}, "key is (3,) keys for 2 prompts: pass one, or one for each"),
        ({"negative": ["a"]}, "negative=['a'] has to be a list of 2, one for each prompt"),
        ({"latents": jnp.zeros((2, 8, 8, 4))}, "latents is (2, 8, 8, 4), expected (2, 8, 12, 4) for images of 16 x 24"),
        ({"mask": mask}, "mask= says where to paint in an image: pass image=, too"),
        ({"strength": 0.5}, "strength= says how far to go from an image: pass image=, too"),
        ({"image": image, "strength": 0.0}, "strength=0.0 is not in (0, 1]"),
        (
            {"image": image, "strength": 0.1, "steps": 2},
            "strength=0.1 of steps=2 leaves none: take a larger one of either",
        ),
        ({"image": image + 200}, "image has values from 200 to 200, expected [0, 1]: divide by 255"),
        (
            {"image": image[:1]},
            "image is (1, 16, 24, 3), expected (2, 16, 24, 3) in [0, 1], or latents of (2, 8, 12, 4)",
        ),
        ({"image": image, "mask": image}, "mask is (2, 16, 24, 3), expected (2, 16, 24, 1), 1 where to paint"),
        ({"sampler": "eulr"}, "no sampler 'eulr'; the closest is 'euler'; there are ddim, ddpm, dpmpp_2m"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"height": 0}, "height=0 is no multiple of 2, as the autoencoder wants it: 2 is"),
        ({"rescale": -1}, "rescale=-1 is not in [0, 1]"),
        ({"sizes": np.zeros((2, 6))}, "sizes= are conditions of SDXL: this pipeline's UNet takes none"),
        ({"image": image, "mask": 255 + mask}, "mask has values from 255 to 255, expected 1 where to paint, 0 elsewhere"),
        ({"image": image - 1, "strength": 0.5}, "image has values from -1 to -1, expected [0, 1]: x / 2 + 0.5 of [-1, 1]"),
        ({"image": image + np.nan}, "image has values that are not finite"),
        ({"sharding": NamedSharding(AUTO, PartitionSpec("a", "b"))}, "sharding= does not fit 2 images, of which it says one"),
    ]  # fmt: skip
    for given, error in wrong:
        with pytest.raises(ValueError, match="^" + re.escape(error)):
            generate(pipeline, PROMPTS, **{"key": KEY, "steps": 2, **SIDES, **given})
    error = "the UNet takes 9 channels, to paint in a mask: pass image= and mask="
    with pytest.raises(ValueError, match=re.escape(error)):
        generate(paint, PROMPTS, key=KEY, **SIDES)
    error = "strength=0.3 of steps=2 leaves none: take a larger one of either"  # SDXL's own strength
    with pytest.raises(ValueError, match="^" + re.escape(error)):
        generate(pipelines("sdxl"), PROMPTS, key=KEY, steps=2, image=image)
    error = "sampler= is a Sampler, expected its name or the function that makes it, such as diffusion.ddim"
    with pytest.raises(TypeError, match=re.escape(error)):
        generate(pipeline, PROMPTS, key=KEY, sampler=diffusion.ddim(pipeline.noise, 2), **SIDES)
    with pytest.raises(TypeError, match=r"key is 3, expected jax.random.key\(seed\), or one for each image"):
        generate(pipeline, PROMPTS, key=3, **SIDES)
    with pytest.raises(TypeError, match=r"key is an array of uint32, expected jax.random.key\(seed\)"):
        generate(pipeline, PROMPTS, key=jax.random.PRNGKey(0), **SIDES)
    with pytest.raises(ValueError, match=r"prompts\[0\] has 92 tokens, and the text encoder takes 77"):
        generate(pipeline, ["a cat " * 30, "cat"], key=KEY, **SIDES)
    scanned = dataclasses.replace(pipelines("sd1", scan=True), sampler="euler_ancestral")
    moved = scanned.with_params(vae=jax.tree.map(lambda x: x * jnp.nan, scanned.params["vae"]))
    with pytest.raises(FloatingPointError, match="images 0, 1 are not finite: a part computed in float16 overflows"):
        generate(moved, PROMPTS, key=KEY, steps=2, **SIDES)
    with pytest.raises(ValueError, match=r"with_params: there is no 'unt'; the parts are unet, vae, text_encoder"):
        pipeline.with_params(unt={})


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_saved_folder_is_the_one_that_was_loaded(folders, pipelines, family, tmp_path):
    pipeline = pipelines(family)
    diffusion.save(tmp_path, pipeline, largest_shard=50_000)
    old, new = (json.loads((folder / "model_index.json").read_text()) for folder in (folders[family], tmp_path))
    assert {key: value for key, value in old.items() if key in new} | {"_diffusers_version": "0.42.1"} == new
    again = diffusion.load(tmp_path, param_dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, again.params, pipeline.params)
    assert again.modules == pipeline.modules and again.noise == pipeline.noise and again.sampler == pipeline.sampler
    assert (again.xl, again.zeros) == (pipeline.xl, pipeline.zeros)


@pytest.mark.loose_promotion  # of Flax's norms
def test_a_pipeline_of_float16_in_variants_of_several_files(folders, tmp_path):
    """Computed in float32: float16's gradients vanish, and its autoencoder overflows."""
    folder = shutil.copytree(folders["sd1"], tmp_path / "half")
    for file in (*folder.glob("*/diffusion_pytorch_model.safetensors"), *folder.glob("text_encoder/model.safetensors")):
        tensors = {key: x.astype(np.float16) if x.dtype == np.float32 else x for key, x in load_file(file).items()}
        keys, index = sorted(tensors), {}
        for number, own in enumerate((keys[::2], keys[1::2]), 1):
            name = f"{file.stem}.fp16-{number:05d}-of-00002.safetensors"
            save_file({key: tensors[key] for key in own}, file.parent / name, {"format": "pt"})
            index |= dict.fromkeys(own, name)
        record = {"metadata": {}, "weight_map": index}
        (file.parent / f"{file.stem}.safetensors.index.fp16.json").write_text(json.dumps(record))
        file.unlink()
    pipeline = diffusion.load(folder, variant="fp16", parts={"unet": {"scan": True}})
    dtypes = {str(x.dtype) for x in jax.tree.leaves(pipeline.params)}
    assert dtypes == {"float16"} and {m.config.dtype for m in pipeline.modules.values()} == {"float32"}
    assert pipeline.modules["unet"].config.scan and not pipeline.modules["text_encoder"].config.scan
    with pytest.raises(FileNotFoundError, match="there are others: pass variant='fp16'"):
        diffusion.load(folder)


PARTS = ("unet", "vae", "text_encoder", "scheduler")


@pytest.mark.parametrize("kind", [hostile.edited, hostile.fields])
@pytest.mark.parametrize("part", PARTS)
def test_spoilt_configs_of_parts_end_in_errors(part, kind, folders, tmp_path):
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    file = tmp_path / name
    shutil.copy(folders["sd1"] / part / name, file)
    loader = hostile.Loader(part, lambda folder: file, functools.partial(config_of_part, part))
    count, wrong = hostile.faults(loader, file, file, kind)
    assert wrong == [] and count > 40


def config_of_part(part: str, file: Path) -> dict:
    if part == "scheduler":
        return dataclasses.asdict(scheduler_config.read(reading.read_json(file))[0])
    _, config = checkpoint.described(file)
    return vars(config)


@pytest.mark.loose_promotion  # of Flax's norms, as the text encoders' files are float16
def test_folders_that_are_no_pipelines(folders, tmp_path):
    def changed(name: str, **entries) -> Path:
        folder = shutil.copytree(folders["sd1"], tmp_path / name)
        record = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(record | entries))
        return folder

    known = (
        "StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, "
        "StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline"
    )
    folder = changed("flux", _class_name="FluxPipeline")
    error = f"'{folder}/model_index.json' is of the class 'FluxPipeline'; supported are {known}"
    with pytest.raises(ValueError, match=re.escape(error)):
        diffusion.load(folder)
    folder = changed("xl", _class_name="StableDiffusionXLPipeline")
    with pytest.raises(FileNotFoundError, match="lacks its text_encoder_2: there is no folder of that name in it"):
        diffusion.load(folder)
    with pytest.raises(FileNotFoundError, match="is no pipeline: there is no model_index.json in it"):
        diffusion.load(folders["sd1"] / "unet")
    folder = changed("zeros", force_zeros_for_empty_prompt="false")
    error = f"'{folder}/model_index.json' has force_zeros_for_empty_prompt='false', expected true or false"
    with pytest.raises(ValueError, match=re.escape(error)):
        diffusion.load(folder)
    folder = changed("swapped")
    shutil.rmtree(folder / "vae")
    shutil.copytree(folder / "unet", folder / "vae")
    with pytest.raises(ValueError, match=re.escape(f"the vae of '{folder}' is a UNet, and its folder or file another")):
        diffusion.load(folder)
    folder = changed("linked")
    shutil.move(folder / "vae", tmp_path / "elsewhere")
    (folder / "vae").symlink_to(tmp_path / "elsewhere")
    error = f"'{folder}/vae' is a link that leads out of the pipeline's folder"
    with pytest.raises(ValueError, match=re.escape(error)):
        diffusion.load(folder)
    folder = shutil.copytree(folders["sdxl"], tmp_path / "bare")
    record = json.loads((folder / "text_encoder_2" / "config.json").read_text()) | {"architectures": ["CLIPTextModel"]}
    (folder / "text_encoder_2" / "config.json").write_text(json.dumps(record))
    file = folder / "text_encoder_2" / "model.safetensors"
    save_file({key: x for key, x in load_file(file).items() if "projection" not in key}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks the values of text_encoder_2/projection/kernel: its config.json is of"):
        diffusion.load(folder)
    with pytest.raises(
        ValueError, match=r"load: parts= speaks of 'unnet'; the parts of .* are unet, vae, text_encoder"
    ):
        diffusion.load(folders["sd1"], parts={"unnet": {}})
    folder = changed("mixed")
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(folders["sd2"] / "text_encoder", folder / "text_encoder")
    error = f"the parts of '{folder}' do not fit: the UNet's texts have 8 features, and the text encoders make 12"
    with pytest.raises(ValueError, match=re.escape(error)):
        diffusion.load(folder)


# -- single files ------------------------------------------------------------------------------------------------------

FAMILY = dict(zip(("sd1", "sd2", "sdxl"), single_file.FAMILIES, strict=True))


def single(family: str, pipeline, file: Path) -> dict[str, np.ndarray]:
    """A pipeline in the authors' layout, with the buffers that their files have."""
    configs = {part: module.config for part, module in pipeline.modules.items()}
    tensors = {"model_ema.decay": np.ones(()), "alphas_cumprod": np.ones(3)}
    for part, (_, config, prefix, table, _) in single_file._parts(FAMILY[family], {}, configs).items():
        flat = traverse_util.flatten_dict(pipeline.params[part], sep="/")
        own = to_tensors(table(config), {path: np.asarray(x) for path, x in flat.items()})
        tensors |= {prefix + key: x for key, x in own.items()}
        if "text" in part:
            name = "logit_scale" if table is single_file.open_clip_table else "text_model.embeddings.position_ids"
            tensors[prefix + name] = np.zeros((1, 2), np.float32)
    for key in [key for key in tensors if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key)]:
        tensors[key] = tensors[key][..., None, None]  # 1 x 1 convolutions there
    save_file(tensors, file)
    return tensors


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_single_file_is_the_pipeline(folders, pipelines, family, tmp_path):
    pipeline = pipelines(family)
    tensors = single(family, pipeline, tmp_path / "model.safetensors")
    given = {"tokenizer": folders[family] / "tokenizer", "noise": Noise(prediction=pipeline.noise.prediction)}
    configs = {part: module.config for part, module in pipeline.modules.items()}
    load = functools.partial(diffusion.load_file, tmp_path / "model.safetensors", configs=configs)
    again = load(**given)
    jax.tree.map(np.testing.assert_array_equal, again.params, pipeline.params)
    assert list(again.tokenizers) == list(pipeline.tokenizers) and again.xl == pipeline.xl
    for part, tokenizer in pipeline.tokenizers.items():
        assert again.tokenizers[part].pad == tokenizer.pad
    if family == "sd2":
        with pytest.raises(
            ValueError, match=r"Stable Diffusion 2.x, and no tensor says what its UNet predicts: pass noise="
        ):
            load(tokenizer=given["tokenizer"])
    if family == "sd1":
        error = r"load_file: configs= speaks of 'unnet'; the parts of .* are unet, vae, text_encoder"
        with pytest.raises(ValueError, match=error):
            diffusion.load_file(tmp_path / "model.safetensors", **given, configs={"unnet": 1})
        marks = {"v_pred": np.zeros(1), "ztsnr": np.zeros(1)}
        save_file(tensors | marks, tmp_path / "marked.safetensors")
        marked = diffusion.load_file(
            tmp_path / "marked.safetensors", tokenizer=given["tokenizer"], configs=configs, param_dtype=jnp.float32
        )
        assert marked.noise == Noise(prediction="v_prediction", zero_snr=True, spacing="trailing")
        assert marked.modules["unet"].config.param_dtype == "float32"
    lost = "model.diffusion_model.middle_block.1.norm.weight"
    save_file({key: x for key, x in tensors.items() if key != lost}, tmp_path / "model.safetensors")
    error = f"the unet in '{tmp_path}/model.safetensors' does not fit:\n  'middle_block.1.norm.weight' is missing, expected shape (16,)"
    with pytest.raises(ValueError, match=re.escape(error)):
        load(**given)


def test_the_authors_names():
    """Pairs that diffusers 0.42.1 converts into one another; tests/test_diffusers_live.py compares all of them."""
    xl = {config: architecture_of(config) for config in (FAMILY["sdxl"].unet, FAMILY["sdxl"].vae)}
    names: dict[str, str] = {}
    for (config, architecture), table in zip(xl.items(), (single_file.unet_table, single_file.vae_table), strict=True):
        theirs = {row.path: row.keys[0] for row in table(config)}
        names |= {row.keys[0]: theirs[row.path] for row in architecture.table(config)}
    pairs = {
        "conv_in.weight": "input_blocks.0.0.weight",
        "time_embedding.linear_2.bias": "time_embed.2.bias",
        "add_embedding.linear_1.weight": "label_emb.0.0.weight",
        "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
        "down_blocks.1.attentions.0.proj_in.weight": "input_blocks.4.1.proj_in.weight",
        "down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_out.0.bias":
            "input_blocks.8.1.transformer_blocks.9.attn1.to_out.0.bias",
        "mid_block.resnets.1.time_emb_proj.weight": "middle_block.2.emb_layers.1.weight",
        "up_blocks.0.attentions.2.transformer_blocks.0.ff.net.0.proj.weight":
            "output_blocks.2.1.transformer_blocks.0.ff.net.0.proj.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.2.conv.weight",
        "up_blocks.2.resnets.2.conv_shortcut.weight": "output_blocks.8.0.skip_connection.weight",
        "conv_norm_out.weight": "out.0.weight",
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": "encoder.down.1.block.0.nin_shortcut.weight",
        "encoder.down_blocks.0.downsamplers.0.conv.bias": "encoder.down.0.downsample.conv.bias",
        "decoder.up_blocks.0.resnets.2.norm1.weight": "decoder.up.3.block.2.norm1.weight",
        "decoder.up_blocks.2.upsamplers.0.conv.weight": "decoder.up.1.upsample.conv.weight",
        "decoder.mid_block.attentions.0.to_out.0.weight": "decoder.mid.attn_1.proj_out.weight",
        "encoder.mid_block.resnets.1.conv1.weight": "encoder.mid.block_2.conv1.weight",
        "decoder.conv_norm_out.bias": "decoder.norm_out.bias",
        "post_quant_conv.weight": "post_quant_conv.weight",
    }  # fmt: skip
    assert {name: names[name] for name in pairs} == pairs


def test_files_that_are_no_pipelines(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file '/nowhere/a.safetensors'"):
        diffusion.load_file("/nowhere/a.safetensors", tokenizer=folders["sd1"] / "tokenizer")
    file = folders["sd1"] / "unet" / "diffusion_pytorch_model.safetensors"
    error = f"'{file}' is no checkpoint of Stable Diffusion 1.x, Stable Diffusion 2.x, SDXL in one file"
    with pytest.raises(ValueError, match=re.escape(error)):
        diffusion.load_file(file, tokenizer=folders["sd1"] / "tokenizer")
