"""Training on pictures: the loss, preservation of the class, averages, sheets, and runs from the command line."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import jlora
from experiments import configfile, trainer
from experiments.average import average, averaged
from experiments.config import Experiment, Study
from experiments.configfile import ConfigError
from experiments.recipes import dreambooth, tiny
from experiments.tasks.diffusion import Diffusion, Drawing, Prior
from experiments.tasks.judge import Judge
from experiments.tasks.task import Files
from experiments.tasks.text_to_image import FromNothing, parts_of
from experiments.train import main
from jlora.models import diffusion
from jlora.models.diffusion.noise import abar
from jlora.models.unet import UNetConfig
from jlora.state import TrainState
from tests.tiers import thorough

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ("dreambooth_lora_sd15", "dreambooth_lora_sdxl", "style_lora_sd15")
FEW = Drawing(("a thing", "a red thing"), each=2, steps=2, batch=4, guidance=2.0)
LIKE = Diffusion(
    "a thing", data=dreambooth.photos, size=32, min_snr=5.0, draws=1, drawing=FEW, text_encoder=True,
    prior=Prior("a thing", images=3, weight=0.5, steps=2, batch=2, seed=7),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Stable Diffusion 1.x."""
    return tiny.stable_diffusion(tmp_path_factory.mktemp("sd") / "pipeline")


@pytest.fixture(scope="module")
def opened(folder):
    return LIKE.open(Files(folder, {}), None, 8)


@pytest.fixture(scope="module")
def params(opened):
    return opened.params(0)


@pytest.fixture(scope="module")
def adapted(opened, params):
    """Factors on both parts that change something."""
    sites = jlora.sites(opened.loss, jax.eval_shape(lambda: params), opened.new.batches(2, 0)(0), jax.random.key(0))
    found = jlora.apply(
        params, method=jlora.lora(2), targets=f"{dreambooth.ATTENTION}|{dreambooth.TEXT}", sites=sites,
        key=jax.random.key(1),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    return found.replace(factors=jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), found.factors))


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_noise_with_min_snr_in_each_half(opened, params):
    """Against a transcription in NumPy: subject mean + lambda * class mean, each row weighed by its own timestep.

    The model's forward pass is its own; 1e-5 is float32's rounding of sums.
    """
    batch, key = opened.new.batches(2, 3)(5), jax.random.key(4)
    assert [len(x) for x in jax.tree.leaves(batch)] == [4] * 5 and list(batch["weight"]) == [2, 2, 1, 1]
    of_latents, of_times, of_noise, _ = jax.random.split(key, 4)
    shape = batch["mean"].shape
    x0 = batch["mean"] + batch["deviation"] * np.asarray(jax.random.normal(of_latents, shape))
    times = np.asarray(jax.random.randint(of_times, (4,), 0, 1000))
    eps = np.asarray(jax.random.normal(of_noise, shape))
    alphas = abar(diffusion.Noise())[times]
    scale = lambda x: np.sqrt(x).reshape(-1, 1, 1, 1)
    noisy = scale(alphas) * x0 + scale(1 - alphas) * eps
    out = np.asarray(opened.model.apply({"params": params}, noisy, times, batch["texts"]))
    errors = ((out - eps) ** 2).mean((1, 2, 3)) * np.minimum(1, 5 * (1 - alphas) / alphas)
    expected = errors[:2].mean() + 0.5 * errors[2:].mean()
    np.testing.assert_allclose(float(opened.loss(params, batch, key)), expected, rtol=1e-5)


def test_offset_noise_moves_whole_pictures_and_v_is_another_target(folder, opened, params):
    batch, key = opened.new.batches(1, 0)(0), jax.random.key(0)
    task = dataclasses.replace(LIKE, min_snr=None, offset=0.5)
    plain, shifted = (
        float(dataclasses.replace(task, offset=o).open(Files(folder, {}), None, 8).loss(params, batch, key))
        for o in (0.0, 0.5)
    )
    assert plain != shifted


def test_a_lifted_pipeline_draws_as_the_merged_one(opened, adapted):
    """Parts of one adapted tree, each with its own sites. 1e-4: two steps of a float32 model."""
    parts = parts_of(adapted)
    assert set(parts) == {"unet", "text_encoder"}
    assert {len(part.sites) for part in parts.values()} == {8, 32}
    lifted, merged, base = (
        opened.pictures(each).images for each in (adapted, jlora.merge(adapted), adapted.base)
    )
    np.testing.assert_allclose(lifted, merged, atol=1e-4)
    assert np.abs(merged - base).max() > 0.05


def test_evaluations_are_of_fixed_noises_by_bins(opened, params):
    evaluate = opened.evaluator(opened.model.apply)
    one, again, test = (evaluate(params, split, "new") for split in ("validation", "validation", "test"))
    assert one == again and one["loss"] != test["loss"]
    assert list(one) == ["loss", "t<250", "t<500", "t<750", "t<1000"] and "pixel diversity" in test
    assert one["loss"] == pytest.approx(np.mean([value for name, value in one.items() if name != "loss"]))


def test_the_class_is_drawn_by_the_base_and_kept(opened, params, tmp_path):
    blank = opened.new.batches(2, 0)(0)
    opened.prepare(params, tmp_path, lambda line: None)
    files = sorted((tmp_path / "class_images").iterdir())
    assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png"]
    content = [file.read_bytes() for file in files]
    ready = opened.new.batches(2, 0)(0)
    assert jax.tree.map(np.shape, blank) == jax.tree.map(np.shape, ready)
    np.testing.assert_array_equal(blank["mean"][:2], ready["mean"][:2])
    assert (blank["mean"][2:] == 0).all() and (ready["mean"][2:] != 0).any()
    files[1].unlink()  # an interrupted start
    said = []
    opened.prepare(params, tmp_path, said.append)
    assert [file.read_bytes() for file in files] == content
    assert said == [f"class     1 pictures of 'a thing' are drawn by the base, into {tmp_path / 'class_images'}"]


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "task.images=... names no pictures: a folder with some of a subject or in a style"),
        ({"size": 33}, "task.size=33 is no multiple of 2: 32 is"),
        ({"held_out": 5}, "task.held_out=5 of 5 pictures leaves none to learn from"),
        (
            {"buckets": True},
            "task.buckets: pictures of several shapes do not stand in a batch beside those of the class: leave "
            "task.buckets or task.prior.prompt out",
        ),
    ],
)
def test_what_cannot_be_is_said(folder, changes, message):
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(LIKE, **changes).open(Files(folder, {}), None, 8)
    assert str(error.value) == message


def test_words_that_a_small_model_does_not_have_are_said():
    unet = UNetConfig(size=8, channels=3, outputs=3, widths=(8,), depths=(0,), heads=(1,), layers=1, context_width=8, groups=4)
    task = dataclasses.replace(LIKE, old=lambda: (dreambooth.photos(),) * 3, size=8)
    with pytest.raises(ConfigError) as error:
        task.open(FromNothing(unet, ("a", "photo", "of", "red", "thing"), layers=1, heads=1), None, 8)
    assert str(error.value) == "'sks' of the prompt 'a photo of sks thing' is none of the model's words: add it to base.words"


# -- averages ----------------------------------------------------------------------------------------------------------


def test_an_average_is_that_of_the_factors_after_each_step():
    adapted = jlora.apply({"kernel": jnp.ones((3, 2))}, rank=1)
    tx = optax.chain(optax.sgd(0.1), average(0.5))
    step = jlora.train_step(lambda params, batch: jnp.sum(params["kernel"] ** 2) * batch.mean(), tx)
    state, expected = TrainState.create(adapted, step.tx), None
    for n in range(1, 6):
        state, _ = step(state, np.ones(1, np.float32))
        now = np.asarray(state.adapted.factors["kernel"]["B"])
        decay = 0.0 if n == 1 else min(0.5, n / (9 + n))
        expected = now if expected is None else decay * expected + (1 - decay) * now
        np.testing.assert_allclose(averaged(state, 0.5).factors["kernel"]["B"], expected, rtol=1e-6)
    assert not np.array_equal(expected, now)


# -- CLIP as a judge ---------------------------------------------------------------------------------------------------


def test_the_judge_is_a_clip(folder):
    with pytest.raises(ConfigError) as error:
        Judge.load(str(ROOT / "tests" / "golden" / "models" / "vit"))
    assert str(error.value).endswith("is a ViT, expected a CLIP")


# -- runs --------------------------------------------------------------------------------------------------------------


def called(name, *arguments):
    return main([str(ROOT / "configs" / f"{name}.py"), "--small", *map(str, arguments)])


def numbers(folder):
    runs = json.loads((folder / "results.json").read_text())["outcomes"]
    for result in (result for run in runs for result in run["results"]):
        del result["tokens_per_second"], result["seconds"]
    return [(run["name"], run["plan"]["trainable"], run["results"]) for run in runs]


FASTER = ("runs.lora.learning_rate=1e-2", "train.ema=0.9", "task.drawing.each=1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert called(CONFIGS[0], "--folder", folder, *FASTER) == 0
    return folder


def test_a_run_leaves_its_sheets_its_class_and_its_curve(whole):
    ((name, trainable, (result,)),) = numbers(whole)
    assert (name, trainable) == ("lora", 4_992)
    losses = [point["scores"]["loss"] for point in result["points"]]
    assert len(losses) == 3 and losses[2] < losses[0]
    sheets = sorted(path.name for path in (whole / "lora" / "seed_0" / "sheets").iterdir())
    assert sheets == ["step_000000.png", "step_000002.png", "step_000004.png"]
    first, last = (np.asarray(Image.open(whole / "lora" / "seed_0" / "sheets" / name)) for name in (sheets[0], sheets[2]))
    assert first.shape == last.shape and (first[30:] != last[30:]).any()
    assert len(list((whole / "class_images").iterdir())) == 2
    sheet = np.asarray(Image.open(whole / "sheet_lora.png"))
    blocks = [sheet[30 : 30 + 64, 128 + n * 72 : 128 + n * 72 + 64] for n in range(6)]  # before, after, merged, scales
    assert all(block.shape == (64, 64, 3) for block in blocks)
    np.testing.assert_array_equal(blocks[0], blocks[3])
    np.testing.assert_array_equal(blocks[2], blocks[5])
    assert np.abs(blocks[1].astype(int) - blocks[2]).max() <= 1  # lifted and merged, rounded to 8 bits


@pytest.mark.loose_promotion  # Optax's schedules divide an int by an int
def test_an_interrupted_run_resumed_gives_the_same_numbers(whole, tmp_path, monkeypatch):
    """With an average of the factors and pictures of the class, one of which is missing."""
    folder, save, calls = tmp_path / "run", trainer.Checkpoints.save, []

    def interrupted(self, *arguments):
        calls.append(arguments)
        save(self, *arguments)
        if len(calls) == 1:  # step 2
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Checkpoints, "save", interrupted)
    assert called(CONFIGS[0], "--folder", folder, *FASTER) == 130
    (folder / "class_images" / "00001.png").unlink()
    assert called(CONFIGS[0], "--folder", folder, *FASTER, "--resume") == 0 and len(calls) == 2
    assert numbers(folder) == numbers(whole)
    for name in ("sheet_lora.png", "class_images/00001.png", "lora/seed_0/sheets/step_000004.png"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.thorough("test_a_run_leaves_its_sheets_its_class_and_its_curve")
@pytest.mark.parametrize("name", CONFIGS[1:])
def test_the_other_small_forms_end(name, tmp_path):
    assert called(name, "--folder", tmp_path / "run") == 0
    ((_, trainable, (result,)),) = numbers(tmp_path / "run")
    assert trainable == {"dreambooth_lora_sdxl": 8_192, "style_lora_sd15": 4_992}[name]
    assert [point["step"] for point in result["points"]] == [0, 2, 4]


@pytest.mark.thorough("test_a_run_leaves_its_sheets_its_class_and_its_curve")
def test_a_study_of_digits_pretrains_one_base_for_both_experiments(tmp_path, capsys):
    few = [f"experiments.{name}.{field}" for name in ("subject_prior", "style") for field in (
        "train.steps=4", "train.evaluate_every=2", "base.train.steps=4", "base.train.evaluate_every=2",
        "task.drawing.each=1", "task.drawing.steps=2",
    )]  # fmt: skip
    assert called("small_diffusion", "--folder", tmp_path / "run", *few) == 0
    assert len(list((tmp_path / "run" / "bases").iterdir())) == 1 and "reused from" in capsys.readouterr().out
    for name in ("subject_prior", "style"):
        place = tmp_path / "run" / name
        assert [run for run, *_ in numbers(place)] == ["full", "lora_r8"]
        assert {path.name for path in place.glob("*.png")} == {
            "learned_forgotten.png", "learning_curves.png", "sheet_full.png", "sheet_lora_r8.png",
        }  # fmt: skip


# -- the configs -------------------------------------------------------------------------------------------------------

SAID = {
    "dreambooth_lora_sd15": ("2208.12242", "DreamBooth, Stable Diffusion | .668 | .803 | .305", "797,184", "Target:", "not run"),
    "dreambooth_lora_sdxl": ("DreamBooth LoRA, SDXL | .598 | .865 | .517", "5,806,080", "Target:", "not run"),
    "style_lora_sd15": ("2303.09556", "15,000", "Target:", "not run"),
    "small_diffusion": ("CIFAR-10", "sks"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_a_docstring_holds_the_command_and_what_was_published(name):
    doc = " ".join((ROOT / "configs" / f"{name}.py").read_text().split('"""')[1].split())
    for words in (f"Command: python -m experiments.train configs/{name}.py", "Data:", "Model:", "Hardware:", *SAID[name]):
        assert words in doc, words


def load(name, **options):
    return configfile.load((Experiment, Study), ROOT / "configs" / f"{name}.py", **options)


def test_the_recipes_are_those_of_diffusers_scripts():
    found = {name: load(name) for name in CONFIGS}
    for experiment in found.values():
        (run,), train = experiment.runs, experiment.train
        assert (run.method, run.learning_rate, train.clip, train.keep) == (jlora.lora(4), 1e-4, 1.0, "last")
        assert train.batch // train.accumulate == 1 and train.warmup == 0
    one, xl, style = found.values()
    assert (one.train.steps, one.train.decay, one.train.weight_decay, one.task.size) == (500, "constant", 1e-2, 512)
    assert (xl.train.accumulate, xl.train.weight_decay, xl.task.size) == (4, 1e-4, 1024)
    assert (style.train.decay, style.task.min_snr, style.task.flips, style.task.buckets) == ("cosine", 5.0, True, True)


def test_prompts_are_set_by_an_override():
    found = load(CONFIGS[0], overrides=["task.drawing.prompts=a dog in a bucket"])
    assert found.task.drawing.prompts == ("a dog in a bucket",)
    found = load(CONFIGS[0], overrides=["task.drawing.prompts='a','b'"])
    assert found.task.drawing.prompts == ("a", "b")
