"""Experiments on checkpoints from the command line to the plots: small forms, what they promise and what they refuse."""

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

import jlora
from experiments import bases, configfile, loop
from experiments.config import Decoding, Experiment
from experiments.configfile import ConfigError
from experiments.data import hub, sources
from experiments.data.files import DataError
from experiments.data.images import ImageFolder
from experiments.recipes import e2e, glue, gsm8k, stories, tiny
from experiments.tasks.images import Images
from experiments.tasks.images import Splits as ImageSplits
from experiments.tasks.task import Files
from experiments.tasks.texts import Splits, Texts
from experiments.train import main
from experiments.trainer import Shared, Trainer
from jlora import models
from jlora.models import bert, deberta, gpt2, llama, roberta, vit
from jlora.models.llama import llama2c
from tests.tiers import thorough

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
OTHER = ("compare_methods", "own_data", "qlora_quality", "quickstart", "quickstart_sweep")
DRAWING = ("dreambooth_lora_sd15", "dreambooth_lora_sdxl", "small_diffusion", "style_lora_sd15")  # in a file of theirs
TIMES = ("tokens_per_second", "seconds")
GSM8K = [f"llama2_7b_gsm8k_{name}" for name in ("lora", "rslora", "dora", "pissa", "loraplus")]
QLORA = {"qlora_llama2_7b": "llama-2-7b", "qlora_llama_65b": "llama-65b"}
# Config -> the task that JLORA_GLUE_TASK names (another each time), and of each run the adapted weights (both layers of
# a scanned model are one) and the trained parameters.
ROWS = {
    "gpt2_medium_e2e_lora": (None, {"lora": (2, 1_024)}),
    "gpt2_large_e2e_lora": (None, {"lora": (2, 1_024)}),
    "roberta_base_glue_lora": ("cola", {"lora": (2, 3_170)}),
    "roberta_large_glue_lora": ("stsb", {"lora": (2, 3_137)}),
    "deberta_xxl_glue_lora": ("mnli", {"lora": (2, 5_251)}),
    **{name: (None, {name.rsplit("_", 1)[1]: (7, 9_280 if name.endswith("dora") else 8_704)}) for name in GSM8K},
    "vit_base_lora": (None, {"lora": (2, 2_147)}),
    "minilm_sst2": (None, {"full": (0, 24_834), "lora_qv": (2, 3_170)}),
    "minilm_trec": (None, {"lora_qv": (2, 3_302)}),
    "stories_shakespeare": (None, {"lora_r4": (7, 2_048)}),
    "bert_base_conll2003_lora": (None, {"lora": (2, 2_213)}),
    **dict.fromkeys(QLORA, (None, {"qlora": (7, 69_632)})),
}  # fmt: skip


@contextlib.contextmanager
def environment(**values):
    """Environment variables; None for one that is not set."""
    before = {name: os.environ.get(name) for name in values}
    for change in (values, before):
        for name, value in change.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: str(value)})
        if change is values:
            try:
                yield
            except BaseException:
                for name, value in before.items():
                    os.environ.pop(name, None) if value is None else os.environ.update({name: value})
                raise


def called(name, *arguments, small=True):
    """The command on a config: its exit status, what it printed and what it complained of."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        path = name if isinstance(name, Path) else CONFIGS / f"{name}.py"
        status = main([str(path), *map(str, arguments), *(["--small"] if small else [])])
    return status, out.getvalue(), err.getvalue()


def numbers(folder):
    """What a folder's runs came to, without what a clock said."""
    runs = json.loads((folder / "results.json").read_text())["outcomes"]
    for run in runs:
        del run["price"]
        run["results"] = [{name: x for name, x in result.items() if name not in TIMES} for result in run["results"]]
    return {run["name"]: run for run in runs}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A config's name -> the folder that its small form filled, and what it printed. Each is run once."""

    @functools.cache
    def run(name):
        folder = tmp_path_factory.mktemp(name) / "run"
        with environment(JLORA_GLUE_TASK=ROWS[name][0], JLORA_DATA=None, JLORA_WEIGHTS=None):
            status, out, err = called(name, "--folder", folder)
        assert (status, err) == (0, "")
        return folder, out

    return run


ENDED = ("gpt2_medium_e2e_lora", "roberta_base_glue_lora", "minilm_trec", "stories_shakespeare")


@pytest.mark.loose_promotion  # Flax's norms promote DeBERTa's bfloat16
def test_every_small_form_trains_what_it_promises(tmp_path):
    """Every config is planned on abstract parameters; nothing is trained."""
    for name, (task, expected) in ROWS.items():
        with environment(JLORA_GLUE_TASK=task):
            experiment = loaded(name, small=True)
        opened = experiment.task.open(
            bases.source(experiment, tmp_path / name), experiment.train, experiment.evaluate_batch
        )
        shapes = jax.eval_shape(lambda params: params, opened.params(0))
        shared, found = Shared.of(experiment, opened, shapes), {}
        for run in experiment.runs:
            made = Trainer(run, shared, experiment.train, experiment.rates_of(run)[0])
            made.check(shapes)
            adapted = jax.eval_shape(functools.partial(made.adapted, 0), shapes)
            found[run.name] = (len(adapted.sites), jlora.count(adapted).trainable)
        assert found == expected, name


PLANNED = "test_every_small_form_trains_what_it_promises"
BY_DEFAULT = ("gpt2_medium_e2e_lora", "minilm_trec")  # a task with texts, one without


@pytest.fixture(scope="module", params=thorough(ENDED, PLANNED, BY_DEFAULT))
def ended(request, finished):
    """A config's name, the folder that its small form filled, and what it printed."""
    return request.param, *finished(request.param)


@pytest.mark.once
def test_a_small_form_ends_and_leaves_what_it_promises(ended):
    name, folder, out = ended
    runs = numbers(folder)
    assert {run: (found["plan"]["sites"], found["plan"]["trainable"]) for run, found in runs.items()} == ROWS[name][1]
    for run, found in runs.items():
        assert [result["seed"] for result in found["results"]] == ([0, 1] if name == "minilm_trec" else [0])
        for result in found["results"]:
            assert [point["step"] for point in result["points"]] == [0, 2, 4] and result["diverged"] is None
            for scores in (result["test"], *(point["scores"] for point in result["points"])):
                assert scores and all(math.isfinite(value) for value in scores.values())
            assert [point["loss"] is None for point in result["points"]] == [True, False, False]
            place = folder / run / f"seed_{result['seed']}"
            assert len(list((place / "events").glob("events.out.tfevents.*"))) == 1
            assert (place / "adapter" / "adapter.json").exists() and (place / "curve.json").exists()
    table = (folder / "results.md").read_text()
    for found in runs.values():
        for heading in ("trained", *found["results"][0]["test"]):
            assert heading in table and heading.split(" (")[0] in out
        assert f"{found['plan']['trainable']:,}" in table
    for picture in ("quality.png", "curves.png"):
        assert len(np.unique((255 * plt.imread(folder / picture)[..., :3]).astype(int) @ (65536, 256, 1))) > 50
        assert f"({picture})" in table
    _, *tables, last = out[out.rindex(f"{out.partition(chr(10))[0]}, test\n") :].splitlines()
    assert len(tables) > 8 and max(map(len, tables)) <= 80 and str(folder) in last


@pytest.mark.once
def test_the_first_lines_say_what_will_be_trained(ended):
    _, folder, out = ended
    record = json.loads((folder / "results.json").read_text())
    title, data, schedule, model, *lines = out.splitlines()
    assert title == f"{record['name']}: {record['label']}"
    assert re.fullmatch(r"data      \d+ training rows; .*(examples|images|prompts|windows).*", data)
    assert re.fullmatch(r"model     \w+, [\d,]+ parameters, (float32|bfloat16), [\d.]+ kB", model)
    assert re.match(r"schedule  4 steps of [46] rows, (1 seed|2 seeds) a run", schedule)
    for line, found in zip(lines, record["outcomes"], strict=False):
        plan = found["plan"]
        percent = 100 * plan["trainable"] / plan["total"]
        head, rest = line.split("; trains ")
        assert head.split() == [*found["label"].split(), str(plan["sites"]), "weights"]
        assert re.fullmatch(
            rf"{plan['trainable']:,} parameters \({percent:.2f} %\); beside the model \S+ k?B trained, "
            r"\S+ k?B optimizer, \S+ [kM]B activations", rest
        )  # fmt: skip


LEARNS = ("gpt2_medium_e2e_lora", "stories_shakespeare")  # enough in four steps for the loss to fall; both write texts
WITHOUT_TEXTS = [name for name in ENDED if name not in LEARNS]


@pytest.mark.once
@pytest.mark.parametrize("ended", ["minilm_trec"], indirect=True)
def test_a_seed_gives_other_numbers(ended):
    one, other = numbers(ended[1])["lora_qv"]["results"]
    losses = lambda result: [point["scores"]["loss"] for point in result["points"]]
    assert losses(one)[0] != losses(other)[0] and losses(one)[-1] != losses(other)[-1]


@pytest.mark.once
@pytest.mark.parametrize("ended", thorough(LEARNS, PLANNED, BY_DEFAULT[:1]), indirect=True)
def test_the_loss_falls(ended):
    for run in numbers(ended[1]).values():
        first, *_, last = (point["scores"]["loss"] for point in run["results"][0]["points"])
        assert last < first


@pytest.mark.once
@pytest.mark.parametrize("ended", thorough(WITHOUT_TEXTS, PLANNED, BY_DEFAULT[1:]), indirect=True)
def test_a_task_without_texts_leaves_no_samples(ended):
    assert not (ended[1] / "samples.txt").exists()


@pytest.mark.once
@pytest.mark.parametrize("ended", thorough(LEARNS, PLANNED, BY_DEFAULT[:1]), indirect=True)
def test_samples_are_shown_before_and_after(ended):
    _, folder, out = ended
    text = (folder / "samples.txt").read_text()
    labels = ["before", *(found["label"] for found in numbers(folder).values())]
    assert re.findall(r"^(\S.*):$", text, re.MULTILINE) == [*labels] and text.count(" -> ") == 3 * len(labels)
    assert text in out


@pytest.mark.once
@pytest.mark.thorough(
    "test_a_small_form_ends_and_leaves_what_it_promises"
)  # tests/test_experiment.py resumes by default
@pytest.mark.loose_promotion  # Optax's schedules divide an int by an int
def test_an_interrupted_run_resumed_gives_the_same_numbers(finished, tmp_path, monkeypatch):
    """Ended with the second seed, when its last evaluation was written down and its state was not yet.

    A damaged state that is newer than the one that was left is passed over.
    """
    whole, folder, calls, save = finished("minilm_trec")[0], tmp_path / "run", [], loop.Checkpoints.save

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 4:  # steps 2 and 4 of the first seed, step 2 of the second, step 4
            raise KeyboardInterrupt
        save(self, *arguments)

    monkeypatch.setattr(loop.Checkpoints, "save", interrupted)
    status, _, err = called("minilm_trec", "--folder", folder)
    assert (status, err) == (130, "interrupted; the same command with --resume continues\n")
    (left,) = folder.glob("*/seed_*/training")
    assert [path.name for path in left.iterdir() if path.is_dir()] == ["2"]
    damaged = shutil.copytree(left / "2", left / "3") / "record" / "metadata"
    damaged.write_bytes(damaged.read_bytes()[:100])
    status, out, _ = called("minilm_trec", "--folder", folder, "--resume")
    assert status == 0 and "LoRA q,v r=8, seed 0  done before" in out and len(calls) == 5  # step 4 alone was left
    assert f"warning: the checkpoint of step 3 in '{left}' is damaged: 'record/metadata' has 100 of " in out
    assert "; going on from step 2\n" in out
    assert numbers(folder) == numbers(whole)


def test_xla_is_told_to_hurry_in_small_forms_alone(optimized, monkeypatch):
    seen, read = [], lambda: jax.config.read("jax_disable_most_optimizations")
    monkeypatch.setattr("experiments.train.run", lambda *_, **__: seen.append(read()))
    for small in (True, False):
        called("vit_base_lora", small=small)
    assert seen == [True, False] and not read()


# -- the real forms ----------------------------------------------------------------------------------------------------

CLASSES = {"head": "sequence_classification", "labels": 3}
MODELS = {
    "gpt2_medium_e2e_lora": (gpt2.GPT2, gpt2.PRESETS["gpt2-medium"], {}),
    "gpt2_large_e2e_lora": (gpt2.GPT2, gpt2.PRESETS["gpt2-large"], {}),
    "roberta_base_glue_lora": (roberta.Roberta, roberta.PRESETS["roberta-base"], CLASSES),
    "roberta_large_glue_lora": (roberta.Roberta, roberta.PRESETS["roberta-large"], CLASSES),
    "deberta_xxl_glue_lora": (deberta.Deberta, deberta.PRESETS["deberta-v2-xxlarge"], CLASSES),
    "bert_base_conll2003_lora": (bert.Bert, bert.PRESETS["bert-base"], {"head": "token_classification", "labels": 9}),
    "vit_base_lora": (vit.ViT, vit.PRESETS["vit-base"], {"labels": 100}),
    **{name: (llama.Llama, llama.PRESETS["llama-2-7b"], {}) for name in GSM8K},
    **{name: (llama.Llama, llama.PRESETS[size], {}) for name, size in QLORA.items()},
}
# Trained parameters of the factors, and with the head, where there is one.
COUNTS = {
    "gpt2_medium_e2e_lora": (393_216, 393_216),
    "gpt2_large_e2e_lora": (737_280, 737_280),
    "roberta_base_glue_lora": (294_912, 887_811),
    "roberta_large_glue_lora": (786_432, 1_839_107),
    "deberta_xxl_glue_lora": (4_718_592, 7_084_035),
    "vit_base_lora": (294_912, 294_912 + 76_900),
    "bert_base_conll2003_lora": (294_912, 301_833),
    **{name: (21_348_352 if name.endswith("dora") else 19_988_480,) * 2 for name in GSM8K},
    "qlora_llama2_7b": (159_907_840, 159_907_840),
    "qlora_llama_65b": (799_539_200, 799_539_200),
}


def loaded(name, **options):
    return configfile.load(Experiment, CONFIGS / f"{name}.py", **options)


@pytest.mark.once
@pytest.mark.loose_promotion  # Flax's norms promote DeBERTa's bfloat16
@pytest.mark.parametrize("name", COUNTS)
def test_a_config_trains_as_many_parameters_as_its_docstring_says(name):
    experiment, (kind, preset, head) = loaded(name), MODELS[name]
    (run,) = experiment.runs
    shape = dataclasses.replace(preset, **head, **experiment.options)
    model = kind(shape)
    image = name.startswith("vit")
    inputs = jnp.zeros((1, shape.image_size, shape.image_size, 3)) if image else jnp.zeros((1, 4), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    sites = jlora.sites(lambda p, x: model.apply({"params": p}, x), params, inputs)
    extras = getattr(experiment.task, "head", None) or ()
    adapted = jax.eval_shape(
        lambda p: jlora.apply(p, method=run.method, targets=run.targets, sites=sites, extras=extras), params
    )
    factors = sum(leaf.size for site in adapted.sites for leaf in adapted.factors[site.path].values())
    assert (factors, jlora.count(adapted).trainable) == COUNTS[name]
    linear = {"query", "key", "value", "out", "gate", "up", "down"}
    assert {site.path.split("/")[-2] for site in adapted.sites} == (
        linear if name in (*GSM8K, *QLORA) else {"query", "value"}
    )
    assert f"{factors:,}" in (CONFIGS / f"{name}.py").read_text()


# Of each config: who published, some of the scores in the row that it aims at, and what there is to say about them.
SAID = {
    "gpt2_medium_e2e_lora": ("2106.09685v2", "70.4±.1 | 8.85±.02 | 46.8±.2 | 71.8±.1 | 2.53±.02", "BLEU 68.9 to 70.4", "0.35M"),
    "gpt2_large_e2e_lora": ("70.4±.1 | 8.89±.02 | 46.8±.2 | 72.0±.2 | 2.47±.02", "BLEU 68.9 to 70.4"),
    "roberta_base_glue_lora": ("Table 9", "87.5±.3 | 95.1±.2 | 89.7±.7 | 63.4±1.2 | 93.3±.3 | 90.8±.1 | 86.6±.7 | 91.5±.2 | 87.2", "alpha is 8 in Table 9 and 16 in the scripts"),
    "roberta_large_glue_lora": ("90.6±.2 | 96.2±.5 | 90.9±1.2 | 68.2±1.9 | 94.9±.3 | 91.6±.1 | 87.4±2.5 | 92.6±.2 | 89.0", "LoRA † | 0.8M | 90.6 | 96.2 | 90.2 | 68.2 | 94.8 | 91.6 | 85.2 | 92.3 | 88.6"),
    "deberta_xxl_glue_lora": ("Table 10", "91.9±.2 | 96.9±.2 | 92.6±.6 | 72.4±1.1 | 96.0±.1 | 92.9±.1 | 94.9±.4 | 93.0±.2 | 91.3"),
    **dict.fromkeys(GSM8K, ("2407.05000", "LoRA | 42.08±.04", "rsLoRA | 45.62±.10", "LoRA+ | 52.11±.62", "PiSSA | 44.54±.27", "DoRA | 53.07±.75", "disputed")),
    "vit_base_lora": ("2310.11454", "294.9K | 85.9 | 89.9 | 98.8 | 77.7", "not tried"),
    "minilm_sst2": ("80.5 %",),
    "minilm_trec": ("90.0 %",),
    "stories_shakespeare": ("karpathy/tinyllamas",),
    "bert_base_conll2003_lora": ("1810.04805", "base, fine-tuned | 96.4 | 92.4", "conll2003/"),
    "qlora_llama2_7b": ("2305.14314", "bfloat16 38.4, 45.6; FP4 37.2, 44.0; NF4 with double quantisation 39.0, 44.5", "OASST1"),
    "qlora_llama_65b": ("2305.14314", "bfloat16 61.8, 62.5; FP4 61.3, 63.3; NF4 with double quantisation 61.8, 63.9", "OASST1"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_a_docstring_holds_the_command_and_what_was_published(name):
    doc = " ".join((CONFIGS / f"{name}.py").read_text().split('"""')[1].split())
    for words in (f"Command: python -m experiments.train configs/{name}.py", "Data:", "Model:", *SAID[name]):
        assert words in doc, words
    if name in COUNTS:
        assert "Hardware: not run: needs a GPU" in doc and "Target:" in doc
    columns = {row.count("|") for row in (CONFIGS / f"{name}.py").read_text().splitlines() if row.startswith("| ")}
    assert len(columns) <= 1


def test_every_config_is_tested():
    there = {path.stem for path in CONFIGS.glob("*.py")} - {*OTHER, *DRAWING}
    assert there == set(ROWS) == set(SAID) and there - set(COUNTS) == {
        "minilm_sst2",
        "minilm_trec",
        "stories_shakespeare",
    }


@pytest.mark.parametrize(("name", "place"), [("qlora_llama2_7b", "device"), ("qlora_llama_65b", "pinned_host")])
def test_the_optimizer_of_65b_waits_on_the_host(name, place):
    small = configfile.load(Experiment, CONFIGS / f"{name}.py", small=True)
    assert loaded(name).train.optimizer_memory == place and small.train.optimizer_memory == "device"


def test_e2e_is_trained_and_decoded_as_in_the_paper():
    experiment = loaded("gpt2_medium_e2e_lora")
    run, train, decoding = experiment.runs[0], experiment.train, experiment.task.decoding
    assert repr(run.method) == "lora(rank=4, alpha=32, init='kaiming_uniform', dropout=0.1)"
    assert (run.learning_rate, train.steps, train.batch, train.warmup) == (2e-4, "5 epochs", 8, 500)
    assert (train.weight_decay, train.label_smoothing, train.clip, train.decay) == (0.01, 0.1, None, "linear")
    assert decoding == Decoding(64, beams=10, length_penalty=0.8, no_repeat_ngram=4, of_prompt=False)
    assert experiment.task.length == 512 and "dropout" not in experiment.options


@pytest.mark.parametrize(
    ("name", "task", "expected"),
    [
        ("roberta_base_glue_lora", None, (5e-4, 16, "30 epochs", 512, 0.06, 0.1)),
        ("roberta_base_glue_lora", "rte", (5e-4, 32, "80 epochs", 512, 0.06, 0.1)),
        ("roberta_large_glue_lora", "stsb", (3e-4, 4, "10 epochs", 128, 0.06, 0.1)),
        ("deberta_xxl_glue_lora", "qqp", (1e-4, 8, "11 epochs", 320, 10000, 0.01)),
        ("deberta_xxl_glue_lora", "rte", (2.6e-4, 4, "11 epochs", 320, 50, 0.01)),
    ],
)
def test_glue_has_a_recipe_for_each_task(name, task, expected):
    with environment(JLORA_GLUE_TASK=task):
        experiment = loaded(name)
    run, train = experiment.runs[0], experiment.train
    found = (run.learning_rate, train.batch, train.steps, experiment.task.length, train.warmup, train.weight_decay)
    assert found == expected and train.clip == 1.0 and experiment.name == f"{name}_{task or 'mnli'}"
    assert experiment.options["dropout"] == 0.1 and len(experiment.seeds) == 5
    if name.startswith("deberta"):
        assert experiment.options["head_dropout"] == 0.2 and run.method.rank == 16


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"])
def test_glue_is_read_from_the_download(task, tmp_path):
    tiny.glue(task, tmp_path / "glue")
    with environment(JLORA_DATA=tmp_path):
        splits = glue.read(task)
    assert (len(splits.train), len(splits.validation)) == (24, 12) and splits.test is splits.validation
    assert (splits.train[0].pair is None) == (task in ("cola", "sst2"))
    assert {example.label for example in splits.train} == set(
        {"mnli": (0, 1, 2), "stsb": (0, 0.5, 1.5, 2.5, 3.5, 4.5)}.get(task, (0, 1))
    )


def test_questions_that_are_empty_in_qqps_training_split_are_left_out(tmp_path):
    tiny.glue("qqp", tmp_path / "glue")
    file = next((tmp_path / "glue").rglob("train.tsv"))
    lines = file.read_text().splitlines()
    cells = lines[1].split("\t")
    cells[lines[0].split("\t").index("question2")] = ""
    file.write_text("\n".join([lines[0], "\t".join(cells), *lines[2:]]) + "\n")
    with environment(JLORA_DATA=tmp_path), pytest.warns(UserWarning, match="1 malformed lines were left out"):
        assert len(glue.read("qqp").train) == 23


def test_glue_comes_from_the_hub_where_there_is_no_folder(tmp_path, monkeypatch):
    asked = []

    def rows(*name, split):
        asked.append((*name, split))
        return [{"premise": "a b", "hypothesis": "c", "label": 2}]

    monkeypatch.setattr(hub, "from_hub", rows)
    with environment(JLORA_DATA=tmp_path):
        splits = glue.read("mnli")
    assert asked == [("nyu-mll/glue", "mnli", "train"), ("nyu-mll/glue", "mnli", "validation_matched")]
    assert splits.train[0] == ("a b", 2, "c")


def test_gsm8k_is_asked_after_the_rows_of_metamath_that_come_from_it(tmp_path):
    learned = gsm8k.read_metamath(tiny.metamath(tmp_path) / "MetaMathQA-395K.json")
    assert len(learned) == 24  # of 32, every fourth being of MATH
    assert learned[0] == ("Q: Tom has 3 films and buys 2 more. How many?\nA:", "3+2=<<3+2=5>>5\n#### 5")
    splits = gsm8k.few()
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (16, 8, 16)
    assert gsm8k.measure(["so 24\n#### 24", "it is 28"], splits.test[:2]) == {"exact match": 50.0, "last number": 100.0}


def test_a_row_of_e2e_is_the_prompt_an_end_the_text_and_an_end(tmp_path):
    experiment = loaded("gpt2_medium_e2e_lora", small=True)
    folder = tiny.gpt2(tmp_path)
    work = experiment.task.open(Files(folder, experiment.options), experiment.train, 8)
    batch = work.new.batches(32, 0)(0)
    tokenizer = models.Tokenizer.load(folder)
    rows = {
        tokenizer.decode(row[mask], skip_special=False)
        for row, mask in zip(batch["tokens"], batch["mask"], strict=True)
    }
    assert "name : The Mill | food : French<|endoftext|> The Mill serves French food .<|endoftext|>" in rows
    row, counted = batch["tokens"][0], batch["loss_mask"][0]
    assert tokenizer.decode(row[counted], skip_special=False).startswith((" The", " Aromi", " Loch", " There"))
    assert row[np.flatnonzero(counted)[0] - 1] == tokenizer.eos


@pytest.mark.parametrize("name", ["roberta", "bert", "vit", "llama2c", "images", "e2e", "metamath"])
def test_what_is_tiny_is_the_same_each_time(name, tmp_path):
    first, second = (
        getattr(tiny, name)(tmp_path / place) if (tmp_path / place).mkdir() is None else None for place in "ab"
    )
    files = [sorted(path for path in folder.rglob("*") if path.is_file()) for folder in (first, second)]
    assert [path.relative_to(first) for path in files[0]] == [path.relative_to(second) for path in files[1]] != []
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_what_is_temporary_is_there_until_the_end():
    folder = tiny.temporary(tiny.trec)
    assert (folder / "TREC.test.all").is_file()


TEXT = "First Citizen:\nSpeak, the best of the year.\n\n  A caf\u00e9 \u2014 t the  "


@pytest.mark.parametrize("real", [False, True])
def test_the_converted_tokenizer_gives_the_tokens_of_llama2c(real, tmp_path):
    place = Path(os.environ.get("JLORA_WEIGHTS", ".")) if real else tiny.llama2c(tmp_path)
    if not (place / "stories260K").is_dir():
        pytest.skip("JLORA_WEIGHTS names no folder in which stories260K/ lies")
    source = llama2c.load_tokenizer(place / "stories260K" / "tok512.bin")
    folder = stories.converted(place / "stories260K", tmp_path / "hub")
    tokenizer = models.Tokenizer.load(folder)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.unk) == (1, 2, 0)
    for text in (TEXT, "a", " \n\n", "there in the heat", *TEXT.split("\n")):
        if text:
            assert [tokenizer.bos, *tokenizer.encode(text, special=False)] == source.encode(text)
            assert tokenizer.decode(source.encode(text)) == text
    model, params = llama2c.load(place / "stories260K" / "stories260K.bin")
    again = models.load(folder)
    assert again.model.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


def test_bits_per_byte_are_the_loss_per_token_times_tokens_per_byte(tmp_path):
    folder = tiny.llama(tmp_path)
    texts = Splits("The film is good. " * 20, "The year is dull. " * 12, "A place that is new. " * 12)
    task = Texts("", lambda: texts, ("The",), Decoding(new_tokens=2), length=16)
    train = loaded("stories_shakespeare").train
    work = task.open(Files(folder, {}), train, 4)
    params = work.params(0)
    scores = work.evaluator(work.model.apply)(params, "test", "new")
    tokens = models.Tokenizer.load(folder).encode(texts.test, special=False)
    kept = tokens[: (len(tokens) - 1) // 15 * 15 + 1]
    total, forward = 0.0, jax.jit(work.model.apply)
    for start in range(0, len(kept) - 1, 15):
        window = jnp.asarray(kept[start : start + 16])[None]
        log_probs = jax.nn.log_softmax(forward({"params": params}, window)[0, :-1])
        total -= float(jnp.sum(jnp.take_along_axis(log_probs, window[0, 1:, None], axis=1)))
    mean = total / (len(kept) - 1)
    assert scores["loss"] == pytest.approx(mean, rel=1e-5)
    assert scores["bits per byte"] == pytest.approx(mean * len(tokens) / len(texts.test) / math.log(2), rel=1e-5)


def test_an_old_domain_is_scored_as_the_new_one_is(checkpoints):
    """What a checkpoint knew before is followed for every kind of task: here it is the same data."""
    for name, folder in (("minilm_trec", "bert"), ("stories_shakespeare", "llama"), ("vit_base_lora", "vit")):
        experiment = loaded(name, small=True)
        source, task = Files(checkpoints[folder], {}), experiment.task
        alone = task.open(source, experiment.train, 8)
        both = dataclasses.replace(task, old=task.data).open(source, experiment.train, 8)
        evaluate = both.evaluator(both.model.apply)
        new, old = (evaluate(both.params(0), "validation", side) for side in ("new", "old"))
        assert new == old and set(new) == {both.headline_metric.name, "loss"}
        assert alone.old is None and both.old.examples == both.new.examples and alone.digest != both.digest
        assert both.new.label.startswith("the new ") and both.old.label.startswith("the old ")


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Tiny checkpoints by name."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: getattr(tiny, name)(root / name) for name in ("gpt2", "roberta", "bert", "llama", "vit")}


@pytest.mark.loose_promotion  # Optax's schedules divide an int by an int
@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("minilm_trec", "train.batches=4", "there is no field 'train.batches'; the nearest is 'train.batch'"),
        ("minilm_trec", "train.batch=many", "train.batch is of type int, got 'many'"),
        ("minilm_trec", "train.batch=25", "24 rows do not fill a batch of 25: take a smaller batch, or last='pad'"),
        ("minilm_trec", "train.steps=2 weeks", "a duration is a positive number of steps, '2 epochs' or '5000 examples'; got '2 weeks'"),
        ("minilm_trec", "task.length=65", "task.length=65 is more than the model's context, 64"),
        ("minilm_trec", "task.classes=5", "example 5 has the label 5, expected 0 to 4 (5 classes)"),
        ("minilm_trec", "seeds=0,0", "seeds: at least one, and no seed twice; got (0, 0)"),
        ("minilm_trec", "seeds=0.5", "seeds is of type tuple, got '0.5'"),
        ("vit_base_lora", "runs.lora.targets=keys", "runs.lora: targets='keys' matches none of the 8 weights; the closest are 'h/attn/key/kernel', 'h/attn/query/kernel', 'h/attn/out/kernel'"),
        ("stories_shakespeare", "task.length=65", "task.length=65 is more than the model's context, 64"),
        ("gpt2_medium_e2e_lora", "task.length=65", "task.length=65 is more than the model's context, 64"),
        ("gpt2_medium_e2e_lora", "task.decoding.beams=0", "decoding: new_tokens=6, beams=0 and batch=4 are at least 1 each"),
        ("gpt2_medium_e2e_lora", "task.decoding.temperature=1", "decoding: temperature=1.0 and top_p=1.0 draw tokens, and beams=2 do not"),
        ("gpt2_medium_e2e_lora", ["task.decoding.beams=1", "task.decoding.top_p=2"], "decoding: top_p is a probability in (0, 1], got 2.0"),
        ("minilm_trec", "train.warmup=4", "runs.lora_qv: train.warmup=4 is 4 of the run's 4 steps: none is left after it"),
        ("minilm_trec", "train.evaluate_every=0.01 epochs", "'0.01 epochs' is no whole step: an epoch has 24 examples, a step 4"),
        ("stories_shakespeare", "task.decoding.new_tokens=60", "task.prompts: 16 tokens and decoding.new_tokens=60 are more than the model's context, 64"),
        ("stories_shakespeare", "task.prompts=()", "task.prompts: at least one, and none without tokens; got []"),
        ("gpt2_medium_e2e_lora", "task.decoding.new_tokens=60", "the longest test prompt has 24 tokens; with task.decoding.new_tokens=60 it has to fit into the model's context, 64"),
        ("roberta_base_glue_lora", ["task.truncate=False", "task.length=8"], "24 of 24 examples are longer than the context of 8 tokens; the longest, example 4, has 39. Pass truncate=True to cut them, or a longer context"),
    ],
)  # fmt: skip
def test_what_a_small_form_does_not_accept(name, override, message, tmp_path):
    overrides = [override] if isinstance(override, str) else override
    with environment(JLORA_GLUE_TASK=None):
        status, _, err = called(name, *overrides, "--folder", tmp_path / "run")
    assert (status, err) == (2, f"error: {message}\n")


@pytest.mark.parametrize(
    ("name", "checkpoint", "message"),
    [
        (
            "gpt2_medium_e2e_lora", "gpt2",
            "there is no folder '{}/e2e' with train.txt, valid.txt and test.txt of microsoft/LoRA, examples/NLG/data/e2e; "
            "JLORA_DATA names the folder that e2e/ lies in",
        ),
        (
            "roberta_base_glue_lora", "roberta",
            "there is no folder '{}/glue' (JLORA_DATA names the folder that glue/ lies in), and from the hub: no network",
        ),
        (
            "llama2_7b_gsm8k_dora", "llama",
            "there is no folder '{}/metamathqa' (JLORA_DATA names the folder that metamathqa/ lies in), and from the hub: "
            "no network",
        ),
        (
            "vit_base_lora", "vit",
            "there is no folder '{}/images' with train/, validation/ and test/, each with a folder for each class; "
            "JLORA_DATA names the folder that images/ lies in",
        ),
        (
            "minilm_trec", "bert",
            "there is no folder '{}/trec' with TREC.train.all and TREC.test.all of harvardnlp/sent-conv-torch; JLORA_DATA "
            "names the folder that trec/ lies in",
        ),
    ],
)  # fmt: skip
def test_data_that_is_not_there_is_named(name, checkpoint, message, checkpoints, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise DataError("no network")

    monkeypatch.setattr(hub, "from_hub", unreachable)
    lengths = {} if name.startswith("vit") else {"task.length": 48}
    overrides = [f"{field}={value}" for field, value in {"base": checkpoints[checkpoint], **lengths}.items()]
    with environment(JLORA_DATA=tmp_path, JLORA_GLUE_TASK=None):
        status, _, err = called(name, *overrides, "--folder", tmp_path / "run", small=False)
    assert (status, err) == (2, f"error: {message.format(tmp_path)}\n")


def test_a_label_outside_the_range_is_named_with_its_line(checkpoints, tmp_path):
    tiny.trec(tmp_path / "trec")
    file = tmp_path / "trec" / "TREC.test.all"
    file.write_text(file.read_text() + "6 What is it ?\n")
    with environment(JLORA_DATA=tmp_path):
        status, _, err = called("minilm_trec", f"base={checkpoints['bert']}", "--folder", tmp_path / "run", small=False)
    message = f"{file}, line 13: label 6, expected a number from 0 to 5 (6 classes)"
    assert (status, err) == (2, f"error: {message}\n")


def test_weights_that_are_not_there_are_named(tmp_path):
    with environment(JLORA_WEIGHTS=tmp_path):
        status, _, err = called("stories_shakespeare", "--folder", tmp_path / "run", small=False)
    message = (
        f"there is no folder '{tmp_path}/stories260K' with stories260K.bin and tok512.bin of karpathy/tinyllamas; "
        "JLORA_WEIGHTS names the folder that stories260K/ lies in"
    )
    assert (status, err) == (2, f"error: {message}\n")


@pytest.mark.loose_promotion  # Optax's schedules divide an int by an int
def test_a_mistake_in_the_code_keeps_its_traceback(tmp_path, monkeypatch):
    def mistaken(*_, **__):
        raise ValueError("shapes (2,) and (3,)")

    monkeypatch.setattr("experiments.trial.train", mistaken)
    with pytest.raises(ValueError, match="shapes"):
        called("vit_base_lora", "--folder", tmp_path / "run")


def test_a_checkpoint_that_is_none_is_named(tmp_path):
    for folder, message in (
        (tmp_path, f"'{tmp_path}' is no checkpoint: there is no config.json in it"),
        (tmp_path / "b", f"'{tmp_path / 'b'}' is no checkpoint: there is no such folder"),
    ):
        status, _, err = called("vit_base_lora", f"base={folder}", "--folder", tmp_path / "run", small=False)
        assert (status, err) == (2, f"error: {message}\n")


def test_a_tokenizer_that_does_not_fit_the_vocabulary_is_refused(checkpoints, tmp_path):
    folder = tiny.gpt2(tmp_path / "checkpoint")
    big = json.loads((checkpoints["llama"] / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(big))
    (folder / "tokenizer_config.json").write_text((checkpoints["llama"] / "tokenizer_config.json").read_text())
    status, _, err = called("gpt2_medium_e2e_lora", f"base={folder}", "--folder", tmp_path / "run")
    assert status == 2 and "vocabulary" in err


@pytest.mark.parametrize("task", ["wnli", "qnli"])
def test_a_task_without_a_recipe_is_refused(task):
    with environment(JLORA_GLUE_TASK=task):
        status, _, err = called("roberta_large_glue_lora")
    there = "mnli, sst2, mrpc, cola, qqp, rte, stsb"
    assert (status, err) == (2, f"error: JLORA_GLUE_TASK='{task}': this config has recipes for {there}\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "{}: not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        ("{}", "{}: a dict, expected a list of objects"),
        ("[]", "{}: no examples in this file"),
        ('[{"query": "a", "response": "b"}]', "{}, row 1: no text 'type'; there are 'query', 'response'"),
        ('[{"query": " ", "response": "b", "type": "GSM_SV"}]', "{}, row 1: empty query: remove the line or fill it"),
    ],
)
def test_metamath_says_what_is_wrong_with_its_file(content, message, tmp_path):
    file = tmp_path / "MetaMathQA-395K.json"
    file.write_text(content)
    with pytest.raises(DataError) as error:
        gsm8k.read_metamath(file)
    assert str(error.value) == message.replace("{}", str(file), 1)


def test_too_little_of_metamath_is_said(tmp_path):
    tiny.metamath(tmp_path)
    learned = gsm8k.read_metamath(tmp_path / "MetaMathQA-395K.json")
    with pytest.raises(DataError, match=r"^MetaMathQA: 24 rows, expected at least 101,000$"):
        gsm8k.splits(learned, [], gsm8k.TRAINING, gsm8k.VALIDATION)


def test_scores_that_need_java_say_so(monkeypatch):
    monkeypatch.setattr("experiments.metrics.java.shutil.which", lambda _: None)
    with pytest.raises(ConfigError, match="no java is on the PATH"):
        e2e.measure(["a b"], e2e.few().test[:1], java=True)


def test_an_empty_text_is_refused(checkpoints):
    task = Texts("", lambda: Splits("some words " * 20, "  \n", "more words"), ("a",), Decoding(2), length=8)
    with pytest.raises(DataError, match=r"^the validation text is empty$"):
        task.open(Files(checkpoints["llama"], {}), loaded("stories_shakespeare").train, 4)


def test_images_of_other_classes_are_refused(checkpoints):
    of = lambda *classes: ImageFolder((), (), classes, 8)
    task = Images("", lambda size: ImageSplits(of("cat", "dog"), of("dog"), of("cat", "dog")))
    message = "the validation images are of the classes dog, those to train on of cat, dog"
    with pytest.raises(ConfigError, match=f"^{message}$"):
        task.open(Files(checkpoints["vit"], {}), loaded("vit_base_lora").train, 4)


@pytest.mark.once
@pytest.mark.thorough("tests/test_compare.py::test_a_rate_that_diverges_is_noted_and_the_others_go_on")
@pytest.mark.loose_promotion  # Optax's schedules divide an int by an int
def test_a_run_that_diverges_does_not_take_the_report_along(tmp_path):
    overrides = ("runs.full.learning_rate=1e38", "train.evaluate_every=3")
    status, out, err = called("minilm_sst2", *overrides, "--folder", tmp_path / "run")
    assert (status, err) == (0, "") and "full (1 of 1 diverged)" in out
    full, lora = json.loads((tmp_path / "run" / "results.json").read_text())["outcomes"]
    assert full["results"][0]["diverged"] and full["price"] is None
    assert lora["results"][0]["diverged"] is None and lora["price"]["relative_time"] == {"lora_qv": 1}
    steps = [point["step"] for point in lora["results"][0]["points"]]
    assert steps == [0, 4]  # none at 3, a step before the last


def test_a_folder_of_another_config_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr("experiments.trainer.train_step", lambda *_, **__: pytest.fail("it began to train"))
    status, _, err = called("vit_base_lora", "--resume", "--folder", folder)
    assert (status, err) == (2, f"error: --resume: there is no run in '{folder}'; start it without --resume\n")
    folder.mkdir()
    (folder / "experiment.json").write_text(json.dumps({
        "config": configfile.describe(loaded("vit_base_lora", overrides=["train.steps=6"], small=True)), "data": "x"
    }))  # fmt: skip
    status, _, err = called("vit_base_lora", "--folder", folder)
    assert (
        status == 2
        and f"'{folder}' belongs to another config: config.train.steps is 6 there and 4 here; data is 'x' there" in err
    )


def test_the_folder_of_data_is_the_one_that_is_named(tmp_path):
    (tmp_path / "images").mkdir()
    with environment(JLORA_DATA=tmp_path):
        assert sources.folder("images", "images") == tmp_path / "images"
    with environment(JLORA_DATA=None), pytest.raises(DataError, match=r"^there is no folder 'data/none' with things; "):
        sources.folder("none", "things")
