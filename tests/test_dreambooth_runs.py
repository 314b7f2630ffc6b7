"""DreamBooth and styles from the command line: small forms, sheets, going on, and what the configs say."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import jlora
from experiments import configfile, trainer
from experiments.config import Experiment, Run, Schedule, Study
from experiments.loop import train
from experiments.recipes import dreambooth, tiny
from experiments.tasks.diffusion import Diffusion, Drawing, Splits
from experiments.tasks.text_to_image import FromNothing
from experiments.trainer import Shared, Trainer
from jlora.models import diffusion
from jlora.models.unet import UNetConfig

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ("dreambooth_lora_sd15", "dreambooth_lora_sdxl", "style_lora_sd15")


# -- runs --------------------------------------------------------------------------------------------------------------


def apart(name, *arguments, program=("-m", "experiments.train"), status=0):
    """A small form, in a process of its own: the programs of a run and its drawings take 1.3 to 1.8 GB. The output."""
    command = [sys.executable, *program, ROOT / "configs" / f"{name}.py", "--small", *arguments]
    done = subprocess.run(
        [str(word) for word in command], check=False, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return done.stdout


INTERRUPTED = """
import sys
from experiments import loop, train
save = loop.Checkpoints.save
def interrupted(self, *arguments):
    save(self, *arguments)
    raise KeyboardInterrupt
loop.Checkpoints.save = interrupted
sys.exit(train.main(sys.argv[1:]))
"""


def numbers(folder):
    runs = json.loads((folder / "results.json").read_text())["outcomes"]
    for result in (result for run in runs for result in run["results"]):
        del result["tokens_per_second"], result["seconds"]
    return [(run["name"], run["plan"]["trainable"], run["results"]) for run in runs]


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FASTER = ("runs.lora.learning_rate=1e-2", "train.ema=0.9", "task.drawing.each=1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    kept = [f"save.{name}={folder.parent / name}" for name in ("merged", "adapter")]
    apart(CONFIGS[0], "--folder", folder, *FASTER, *kept)
    return folder


def test_a_run_leaves_its_sheets_its_class_and_its_curve(whole):
    ((name, trainable, (result,)),) = numbers(whole)
    assert (name, trainable) == ("lora", 4_992)
    losses = [point["scores"]["loss"] for point in result["points"]]
    assert len(losses) == 3 and losses[2] < losses[0]
    sheets = sorted(path.name for path in (whole / "lora" / "seed_0" / "sheets").iterdir())
    assert sheets == ["step_000000.png", "step_000002.png", "step_000004.png"]
    first, last = (
        np.asarray(Image.open(whole / "lora" / "seed_0" / "sheets" / name)) for name in (sheets[0], sheets[2])
    )
    assert first.shape == last.shape and (first[30:] != last[30:]).any()
    assert len(list((whole / "class_images").iterdir())) == 2
    sheet = np.asarray(Image.open(whole / "sheet_lora.png"))
    blocks = [sheet[30 : 30 + 64, 128 + n * 72 : 128 + n * 72 + 64] for n in range(6)]  # before, after, merged, scales
    assert all(block.shape == (64, 64, 3) for block in blocks)
    np.testing.assert_array_equal(blocks[0], blocks[3])
    np.testing.assert_array_equal(blocks[2], blocks[5])
    assert np.abs(blocks[1].astype(int) - blocks[2]).max() <= 1  # lifted and merged, rounded to 8 bits


def test_the_merged_pipeline_is_a_folder_of_diffusers(whole):
    pipeline = diffusion.load(whole.parent / "merged")
    before = diffusion.load(tiny.stable_diffusion(whole.parent / "base"))
    assert set(pipeline.params) == {"unet", "vae", "text_encoder"}
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), dict(pipeline.params), dict(before.params))
    assert sum(jax.tree.leaves(changed["unet"])) == 32  # to_q, to_k, to_v and to_out of eight attentions
    assert not any(jax.tree.leaves([changed["vae"], changed["text_encoder"]]))
    file = whole.parent / "adapter" / "pytorch_lora_weights.safetensors"
    merged = jlora.diffusers.merge(file, before.adaptable, before.tables)
    chex.assert_trees_all_close(merged["unet"], pipeline.params["unet"], atol=1e-7)


@pytest.mark.thorough("test_a_training_that_goes_on_has_the_same_numbers_and_sheets")
@pytest.mark.parametrize("where", ["a mesh", "two processes"])
def test_a_run_on_several_devices_has_the_numbers_and_sheets_of_one(where, whole, tmp_path):
    """Pictures of the class are drawn, sheets and merged weights written, whatever the devices and the processes."""
    saved = f"save.merged={tmp_path / 'merged'}"
    if where == "a mesh":
        apart(CONFIGS[0], "--folder", tmp_path / "run", *FASTER, saved, "mesh=fsdp=2,tp=2")
    else:
        several = ("-m", "experiments.launch", "local", "--processes", "2")
        apart(CONFIGS[0], "--folder", tmp_path / "run", *FASTER, saved, program=several)
    ((_, _, (here,)),), ((_, _, (there,)),) = numbers(tmp_path / "run"), numbers(whole)
    losses = lambda result: [point["scores"]["loss"] for point in result["points"]]
    np.testing.assert_allclose(losses(here), losses(there), atol=1e-5)
    for name in ("sheet_lora.png", "class_images/00001.png"):
        sheets = [np.asarray(Image.open(folder / name), int) for folder in (tmp_path / "run", whole)]
        assert np.abs(sheets[0] - sheets[1]).max() <= 1, name
    written = [load_file(folder / "merged" / WEIGHTS) for folder in (tmp_path, whole.parent)]
    chex.assert_trees_all_close(*written, atol=1e-4)


@pytest.mark.thorough("test_a_training_that_goes_on_has_the_same_numbers_and_sheets")
def test_an_interrupted_run_resumed_gives_the_same_numbers(whole, tmp_path):
    """With an average of the factors and pictures of the class, one of which is missing."""
    folder = tmp_path / "run"
    apart(CONFIGS[0], "--folder", folder, *FASTER, program=("-c", INTERRUPTED), status=130)
    assert not (folder / "results.json").exists()
    (folder / "class_images" / "00001.png").unlink()
    said = apart(CONFIGS[0], "--folder", folder, *FASTER, "--resume")
    assert "step     2" not in said and "step     4" in said
    assert numbers(folder) == numbers(whole)
    for name in ("sheet_lora.png", "class_images/00001.png", "lora/seed_0/sheets/step_000004.png"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.thorough("test_a_run_leaves_its_sheets_its_class_and_its_curve")
@pytest.mark.parametrize("name", CONFIGS[1:])
def test_the_other_small_forms_end(name, tmp_path):
    apart(name, "--folder", tmp_path / "run")
    ((_, trainable, (result,)),) = numbers(tmp_path / "run")
    assert trainable == {"dreambooth_lora_sdxl": 8_192, "style_lora_sd15": 4_992}[name]
    assert [point["step"] for point in result["points"]] == [0, 2, 4]


@pytest.mark.thorough("test_a_run_leaves_its_sheets_its_class_and_its_curve")
def test_a_study_of_digits_pretrains_one_base_for_both_experiments(tmp_path):
    few = [f"experiments.{name}.{field}" for name in ("subject_prior", "style") for field in (
        "train.steps=4", "train.evaluate_every=2", "base.train.steps=4", "base.train.evaluate_every=2",
        "task.drawing.each=1", "task.drawing.steps=2",
    )]  # fmt: skip
    said = apart("small_diffusion", "--folder", tmp_path / "run", *few)
    assert len(list((tmp_path / "run" / "bases").iterdir())) == 1 and "reused from" in said
    for name in ("subject_prior", "style"):
        place = tmp_path / "run" / name
        assert [run for run, *_ in numbers(place)] == ["full", "lora_r8"]
        assert {path.name for path in place.glob("*.png")} == {
            "learned_forgotten.png", "learning_curves.png", "sheet_full.png", "sheet_lora_r8.png",
        }  # fmt: skip


# -- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.loose_promotion  # Optax's schedules divide an int by an int
def test_a_training_that_goes_on_has_the_same_numbers_and_sheets(tmp_path):
    """One program for both. An average of the factors is a part of the state; noises are those of the step."""
    unet = UNetConfig(
        size=8, channels=3, outputs=3, widths=(8,), depths=(0,), heads=(2,), layers=1, context_width=8, groups=4
    )
    drawing = Drawing(("a thing",), each=1, steps=1, batch=1, guidance=1.0)
    task = Diffusion(
        "a thing", data=dreambooth.photos, old=lambda: Splits(*[dreambooth.photos()] * 3), draws=1, bins=1, drawing=drawing,
        text_encoder=True,
    )  # fmt: skip
    shape = FromNothing(unet, ("a", "photo", "of", "sks", "red", "thing"), layers=1, heads=1)
    opened = task.open(shape, None, 4)
    params = opened.params(0)
    run = Run("lora", "LoRA", jlora.lora(2), 1e-2, dreambooth.ATTENTION)
    schedule = Schedule(4, 2, evaluate_every=2, warmup=0, decay="constant", keep="last", ema=0.9, pictures_every=2)
    sites = jlora.sites(opened.loss, jax.eval_shape(lambda: params), opened.new.batches(2, 0)(0), jax.random.key(0))
    own, seen = Trainer(run, Shared(opened, sites, 1), schedule, 1e-2), []
    phase = types.SimpleNamespace(
        begin=seen.append, note=str, advance=seen.append, line=lambda *_: None, say=str, title=""
    )
    trained = lambda folder: train(own, 0, 1e-2, params, folder, phase, test=False)
    whole = trained(tmp_path / "whole")

    def stop(step):
        raise KeyboardInterrupt

    phase.advance = lambda step: stop(step) if step == 3 else None
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run")
    phase.advance = seen.append
    seen.clear()
    resumed = trained(tmp_path / "run")
    assert seen == [2, 3, 4] and resumed.points == whole.points
    assert whole.points[-1].scores["loss"] < whole.points[0].scores["loss"]
    for name in ("step_000000.png", "step_000004.png"):
        one, other = (tmp_path / folder / "sheets" / name for folder in ("run", "whole"))
        assert one.read_bytes() == other.read_bytes()
    files = [next((tmp_path / folder / "adapter").glob("*.safetensors")) for folder in ("run", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


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
    for words in (
        f"Command: python -m experiments.train configs/{name}.py",
        "Data:",
        "Model:",
        "Hardware:",
        *SAID[name],
    ):
        assert words in doc, words


def load(name, **options):
    return configfile.load((Experiment, Study), ROOT / "configs" / f"{name}.py", **options)


def test_the_recipes_are_those_of_diffusers_scripts():
    found = {name: load(name) for name in CONFIGS}
    for experiment in found.values():
        (run,), train = experiment.runs, experiment.train
        assert (run.method, run.learning_rate, train.clip, train.keep) == (dreambooth.LORA, 1e-4, 1.0, "last")
        assert train.batch // train.accumulate == 1 and train.warmup == 0
    one, xl, style = found.values()
    assert (one.train.steps, one.train.decay, one.train.weight_decay, one.task.size) == (500, "constant", 1e-2, 512)
    assert (xl.train.accumulate, xl.train.weight_decay, xl.task.size) == (4, 1e-4, 1024)
    assert (style.train.decay, style.task.min_snr, style.task.flips, style.task.buckets) == ("cosine", 5.0, True, True)


@pytest.mark.loose_promotion  # Optax's schedules divide an int by an int
def test_some_weights_have_a_part_of_the_rate():
    found = load(CONFIGS[0], overrides=['runs.lora.slower={"text_encoder/": 0.25, "attn": 0.5}'])
    assert found.runs[0].slower == {"text_encoder/": 0.25, "attn": 0.5}
    schedule = Schedule(4, 1, evaluate_every=2, warmup=0, decay="constant", weight_decay=0.1)
    params = {
        path: {"A": jnp.ones((2, 2)), "B": jnp.zeros((2, 2))}
        for path in ("unet/attn/q", "unet/mlp", "text_encoder/attn/q")
    }
    steps = [
        tx.update(params, tx.init(params), params)[0]
        for tx in (trainer.optimizer(schedule, 1e-2, 4, slower) for slower in (None, found.runs[0].slower))
    ]
    for path, part in {"unet/attn/q": 0.5, "unet/mlp": 1.0, "text_encoder/attn/q": 0.25}.items():
        chex.assert_trees_all_close(steps[1][path], jax.tree.map(lambda x, part=part: part * x, steps[0][path]))
    tx = trainer.optimizer(schedule, 1e-2, 4, {"vae": 0.5})
    with pytest.raises(ValueError, match=r"^slower: 'vae' is the first found in no path of a weight that is trained$"):
        tx.init(params)


def test_prompts_are_set_by_an_override():
    found = load(CONFIGS[0], overrides=["task.drawing.prompts=a dog in a bucket"])
    assert found.task.drawing.prompts == ("a dog in a bucket",)
    found = load(CONFIGS[0], overrides=["task.drawing.prompts='a','b'"])
    assert found.task.drawing.prompts == ("a", "b")
