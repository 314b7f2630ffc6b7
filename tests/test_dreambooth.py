"""Training on pictures: the loss, preservation of the class, averages, scores, errors."""

import copy
import dataclasses
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from experiments.average import average, averaged
from experiments.configfile import ConfigError
from experiments.recipes import dreambooth, tiny
from experiments.tasks import judge as judging
from experiments.tasks.diffusion import Diffusion, Drawing, Prior
from experiments.tasks.judge import Judge
from experiments.tasks.task import Files
from experiments.tasks.text_to_image import FromNothing, parts_of
from jlora.models import diffusion
from jlora.models.diffusion.noise import abar
from jlora.models.unet import UNetConfig
from jlora.state import TrainState

ROOT = Path(__file__).resolve().parent.parent
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
    return found.replace(
        factors=jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), found.factors)
    )


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
    out = np.asarray(jax.jit(opened.model.apply)({"params": params}, noisy, times, batch["texts"]))
    errors = ((out - eps) ** 2).mean((1, 2, 3)) * np.minimum(1, 5 * (1 - alphas) / alphas)
    expected = errors[:2].mean() + 0.5 * errors[2:].mean()
    np.testing.assert_allclose(float(jax.jit(opened.loss)(params, batch, key)), expected, rtol=1e-5)


def test_offset_noise_moves_whole_pictures_and_v_is_another_target(opened):
    """With a model that predicts zeros the loss is the mean square of its target."""
    own, key = copy.copy(opened.loss.__self__), jax.random.key(0)
    own.model = types.SimpleNamespace(apply=lambda variables, x, *rest: jnp.zeros_like(x))
    own.task = dataclasses.replace(LIKE, min_snr=None, offset=0.5)
    batch = {
        "mean": np.full((2, 4, 4, 4), 2.0, np.float32),
        "weight": np.ones(2, np.float32),
        "texts": {},
        "sizes": None,
    }
    _, of_times, of_noise, of_offset = jax.random.split(key, 4)
    eps = np.asarray(jax.random.normal(of_noise, (2, 4, 4, 4)))
    eps = eps + 0.5 * np.asarray(jax.random.normal(of_offset, (2, 1, 1, 4)))
    np.testing.assert_allclose(float(own.loss({}, batch, key)), (eps**2).mean(), rtol=1e-5)
    own.pipeline = dataclasses.replace(own.pipeline, noise=diffusion.Noise(prediction="v_prediction"))
    alphas = abar(diffusion.Noise())[np.asarray(jax.random.randint(of_times, (2,), 0, 1000))].reshape(2, 1, 1, 1)
    v = np.sqrt(alphas) * eps - np.sqrt(1 - alphas) * 2.0
    np.testing.assert_allclose(float(own.loss({}, batch, key)), (v**2).mean(), rtol=1e-5)


def test_a_lifted_pipeline_draws_as_the_merged_one(opened, adapted):
    """Parts of one adapted tree, each with its own sites. 1e-4: two steps of a float32 model."""
    parts = parts_of(adapted)
    assert set(parts) == {"unet", "text_encoder"}
    assert {len(part.sites) for part in parts.values()} == {8, 32}
    lifted, merged, base = (opened.pictures(each).images for each in (adapted, jlora.merge(adapted), adapted.base))
    np.testing.assert_allclose(lifted, merged, atol=1e-4)
    assert np.abs(merged - base).max() > 0.05


def test_another_adapter_or_scale_compiles_nothing_and_leaves_nothing(opened, params, adapted):
    """Merged, they are the base's program; 20 swaps, the first of which compiles the merge."""
    merge, seen = jax.jit(lambda s: jlora.merge(jlora.scale(adapted, s))), []
    opened.pictures(merge(jnp.float32(0.5)))
    jax.monitoring.register_event_duration_secs_listener(listener := lambda event, *_, **__: seen.append(event))
    jax.jit(lambda x: x + 3)(1.0)
    assert [event for event in seen if "backend_compile" in event]  # so they are seen
    seen.clear()
    alive = len(jax.live_arrays())
    first, *_, last = (opened.pictures(merge(jnp.float32(s / 20))).images for s in range(20))
    jax.monitoring.unregister_event_duration_listener(listener)
    assert [event for event in seen if "backend_compile" in event] == []
    assert len(jax.live_arrays()) <= alive and np.abs(first - last).max() > 0.01


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
    unet = UNetConfig(
        size=8, channels=3, outputs=3, widths=(8,), depths=(0,), heads=(1,), layers=1, context_width=8, groups=4
    )
    task = dataclasses.replace(LIKE, old=lambda: (dreambooth.photos(),) * 3, size=8)
    with pytest.raises(ConfigError) as error:
        task.open(FromNothing(unet, ("a", "photo", "of", "red", "thing"), layers=1, heads=1), None, 8)
    assert (
        str(error.value)
        == "'sks' of the prompt 'a photo of sks thing' is none of the model's words: add it to base.words"
    )


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


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random CLIP with its tokenizer."""
    return tiny.clip(tmp_path_factory.mktemp("clip") / "clip")


def test_the_judge_sees_pictures_as_clip_does_and_is_one(clip):
    judge, rng = Judge.load(str(clip)), np.random.default_rng(0)
    side = judge.model.config.vision.image_size
    images = rng.integers(0, 256, (2, side, side, 3)).astype(np.float32) / np.float32(255)
    pixels = (images - np.float32(judging.MEAN)) / np.float32(judging.DEVIATION)
    tokens = np.zeros((1, 4), np.int32)
    expected = judge.model.apply({"params": judge.params}, tokens, pixels)["image_embeds"]
    found = judge.images(images)
    np.testing.assert_allclose(found / np.linalg.norm(found, axis=-1, keepdims=True), expected, atol=1e-5)
    with pytest.raises(ConfigError) as error:
        Judge.load(str(ROOT / "tests" / "golden" / "models" / "gpt2_base"))
    assert str(error.value).endswith("gpt2_base' is a GPT2, expected a CLIP")


def test_pictures_are_judged_on_the_test_split(opened, params, clip, monkeypatch):
    own = opened.loss.__self__
    monkeypatch.setattr(own, "judge", Judge.load(str(clip)))
    monkeypatch.setattr(type(own), "_drawn", lambda self, params, prompts, *rest: RED[: len(prompts)])
    scores = own._judged(params)
    assert list(scores) == ["CLIP-I", "CLIP-T", "diversity"] and all(-1 <= x <= 2 for x in scores.values())


RED = np.random.default_rng(0).random((4, 32, 32, 3)).astype(np.float32)
