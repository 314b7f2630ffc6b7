"""Experiments on a base in few bits: how it is named, what each run sees of it, what is saved, and what is refused."""

import contextlib
import dataclasses
import io
import json
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from experiments import bases, configfile, held, loop
from experiments.config import ConfigError, Experiment, Held, Run, Schedule
from experiments.data.files import DataError
from experiments.recipes import qlora, tiny
from experiments.resume import loaded
from experiments.train import main
from experiments.trainer import Shared, Trainer
from jlora import models, tree

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
HERE = ("base.quantize=nf4", "runs.lora_r4.targets=attn/(query|value)")  # some quantised weights have no factors
LINEAR = {"query", "key", "value", "out", "gate", "up", "down"}
# Optax's schedules divide an int by an int.
pytestmark = [pytest.mark.loose_promotion, pytest.mark.once]


def small(name: str, *overrides: str) -> Experiment:
    return configfile.load(Experiment, CONFIGS / f"{name}.py", overrides, small=True)


def called(name: str, *arguments: object) -> tuple[int, str, str]:
    """The command on a small form: its exit status, what it printed and what it complained of."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(CONFIGS / f"{name}.py"), *map(str, arguments), "--small"])
    return status, out.getvalue(), err.getvalue()


def numbers(folder: Path) -> dict:
    """What a folder's runs came to, without what a clock said."""
    runs = json.loads((folder / "results.json").read_text())["outcomes"]
    for run in runs:
        for result in run["results"]:
            del result["seconds"], result["tokens_per_second"]
    return {run["name"]: (run["plan"], run["results"]) for run in runs}


# -- names -------------------------------------------------------------------------------------------------------------


def test_a_base_and_how_it_is_held_are_named_side_by_side():
    items = ("base=out/", "base.quantize=nf4", "base.block=128", "base.double=False", "runs.lora.base.quantize=int8")
    experiment = small("own_data", *items)
    assert experiment.base == "out/" and experiment.held == Held("nf4", 128, False)
    assert experiment.runs[0].held == Held("int8") == experiment.held_by(experiment.runs[0])
    pretrained = small("quickstart", "base.quantize=fp8", "base.model.heads=4")
    assert pretrained.held == Held("fp8") and pretrained.base.model.heads == 4


def test_full_fine_tuning_keeps_the_base_as_it_is():
    experiment = small("minilm_sst2", "base.quantize=nf4")
    assert [experiment.held_by(run) for run in experiment.runs] == [Held(), Held("nf4")]
    assert experiment.held_by_all == Held()
    assert dataclasses.replace(experiment, runs=experiment.runs[1:]).held_by_all == Held("nf4")
    out_of = small("minilm_sst2", "runs.lora_qv.base.quantize=none", "base.quantize=nf4")
    assert out_of.held_by(out_of.runs[1]).plain


@pytest.mark.parametrize(
    ("name", "item", "message"),
    [
        ("minilm_trec", "base.quantize=nf5", "base.quantize='nf5' is one of nf4, fp4, int4, int8, fp8, bf16, none; the nearest is 'nf4'"),
        ("minilm_trec", "base.block=64", "base.block, base.double and base.loftq go with base.quantize=nf4, fp4, int4, int8, fp8, which is None"),
        ("minilm_trec", "base.quantise=nf4", "there is no field 'base.quantise'; the nearest is 'base.quantize'"),
        ("minilm_sst2", "runs.full.base.quantize=nf4", "runs.full: full fine-tuning trains the weights themselves, which a base held in nf4 does not have: take a method with factors, such as lora(16), or leave runs.full.base.quantize out"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_said(name, item, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        small(name, item)


def test_full_fine_tuning_alone_on_a_quantised_base_is_refused():
    message = (
        "base.quantize=nf4: full fine-tuning trains the weights themselves, and 'minilm_sst2_small' has no other runs"
    )
    whole = small("minilm_sst2")
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(whole, runs=whole.runs[:1], held=Held("nf4"))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (("base.quantize=nf4", "base.block=48"), "error: runs.lora_qv: block=48 does not fit"),
        (("base.quantize=int8", "base.block=64"), "error: runs.lora_qv: int8 has one scale for each output channel"),
    ],
)
def test_a_block_that_does_not_fit_is_found_before_the_training(items, message, tmp_path):
    status, _, err = called("minilm_sst2", "--folder", tmp_path / "run", *items)
    assert status == 2 and err.startswith(message) and not (tmp_path / "run").exists()


# -- the base that a run sees ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama of float32 with the task of the small form of QLoRA's recipe: the task, its parameters, its sites."""
    experiment = dataclasses.replace(small("qlora_llama2_7b"), options={"scan": True}, held=Held())
    folder = tmp_path_factory.mktemp("llama") / "run"
    opened = experiment.task.open(bases.source(experiment, folder), experiment.train, 4)
    params = opened.params(0)
    return experiment, opened, params, Shared.of(experiment, opened, params)


@pytest.mark.parametrize("way", ["nf4", "int8", "bf16"])
def test_all_linear_layers_but_the_head_are_held(llama, way):
    _, _, params, shared = llama
    found, plain = (tree.leaves(x)[0] for x in (held.hold(params, Held(way), shared.sites), params))
    changed = {path for path in plain if found[path] is not plain[path]}
    assert {path.split("/")[-2] for path in changed} == LINEAR and len(changed) == 7
    for path in changed:
        assert found[path].shape == plain[path].shape
        near = np.asarray(tree.dense(found[path]), np.float32)
        assert (
            0
            < np.abs(near - plain[path]).max()
            < {"nf4": 0.16, "int8": 0.01, "bf16": 0.01}[way] * np.abs(plain[path]).max()
        )
    number, bits = held.in_bits(held.hold(params, Held(way), shared.sites), shared.sites)
    assert number == 20_480  # two layers of four 32 x 32 and three 32 x 64
    channels = 2 * (4 * 32 + 2 * 64 + 32)
    nested = 4.125 + 8 * (14 * 4 * 2) / number  # codes, a byte to 64; of each of 14 matrices one scale and one offset
    assert bits == pytest.approx({"nf4": nested, "int8": 8 + 32 * channels / number, "bf16": 16}[way])


def test_what_is_trained_as_it_is_stays(llama):
    _, _, params, shared = llama
    found = tree.leaves(held.hold(params, Held("nf4"), shared.sites, "mlp/up"))[0]
    assert {path.split("/")[-2] for path, leaf in found.items() if tree.is_stored(leaf)} == LINEAR - {"up"}


def test_a_checkpoint_is_held_so_from_the_file_on(llama):
    """Reading in 4 bits gives what quantising the read parameters gives, and no other leaves."""
    _, opened, params, shared = llama
    how = Held("nf4")
    chex.assert_trees_all_equal(
        opened.params(0, **held.while_loading(how)), held.hold(params, how, shared.sites)
    )  # codes, scales and their layout


def test_runs_that_hold_the_base_alike_share_it(llama):
    experiment, _, params, shared = llama
    make = lambda name, how: Trainer(Run(name, name, jlora.lora(2), 1e-3, held=how), shared, experiment.train, 1e-3)
    one, same, other, plain = (
        make(*x) for x in zip("abcd", (Held("nf4"), Held("nf4"), Held("int8"), Held()), strict=True)
    )
    assert one.held(params, 0) is same.held(params, 1) and one.held(params, 0) is not other.held(params, 0)
    assert plain.held(params, 0) is params and plain.merges and not one.merges
    assert one.adapted(3, params).base is one.held(params, 0)


@pytest.mark.parametrize(
    ("method", "how"), [(jlora.lora(8), Held("nf4", loftq=2)), (jlora.pissa(8), Held("nf4"))], ids=["loftq", "qpissa"]
)
def test_what_quantising_loses_is_where_the_factors_start(llama, method, how, tmp_path):
    experiment, _, params, shared = llama
    made = Trainer(Run("a", "A", method, 1e-3, held=how), shared, experiment.train, 1e-3)
    adapted = made.adapted(0, params)
    error = lambda quantised: float(np.mean(list(jlora.quantization_error(params, quantised).values())))
    assert error(adapted) < 0.9 * error(held.hold(params, Held("nf4"), shared.sites))
    other = made.adapted(0, params)  # a step gives the factors away, and the next rate starts anew
    assert all(a is not b for a, b in zip(*map(jax.tree.leaves, (adapted.factors, other.factors)), strict=True))
    assert other.base is made.held(params, 0)
    jlora.save(tmp_path / "adapter", adapted)
    again = Trainer(made.run, shared, experiment.train, 1e-3)  # after an interruption: the base is made anew
    chex.assert_trees_all_equal(loaded(tmp_path, again.held(params, 0)), adapted)


# -- a run to its end --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[Path, Path, str]:
    """A run on a tiny stories260K in 4 bits: its folder, the merged checkpoint and what it printed."""
    folder = tmp_path_factory.mktemp("stories")
    status, out, err = called("stories_shakespeare", "--folder", folder / "run", *HERE, f"save.merged={folder / 'out'}")
    assert (status, err) == (0, "")
    return folder / "run", folder / "out", out


def test_the_first_lines_say_how_the_base_is_held(ended):
    _, _, out = ended
    lines = out.splitlines()
    # Of each layer 16 x 16 twice, 16 x 8 twice, 16 x 32 three times: a block of 64 straddles their rows.
    assert re.fullmatch(r"model     Llama, [\d,]+ parameters, float32, [\d.]+ kB", lines[3])
    assert (
        lines[4]
        == "held      4,608 parameters in nf4, blocks of 64, scales in 8 bits, 4.319 bits each; the base has 22.8 kB"
    )
    assert lines[5].startswith("LoRA r=4  2 weights; trains 448 parameters")


def test_the_price_is_that_of_the_base_in_few_bits(ended):
    plan, (result,) = numbers(ended[0])["lora_r4"]
    assert plan["base_bytes"] == 22_776 and plan["trainable"] == 448
    assert [point["step"] for point in result["points"]] == [0, 2, 4]
    assert result["points"][-1]["scores"]["loss"] < result["points"][0]["scores"]["loss"]


def test_the_merged_checkpoint_is_the_base_as_it_was_held_with_the_update(ended):
    folder, out, _ = ended
    base = models.load(folder.parent / "checkpoints" / "stories_shakespeare_small" / "hub", scan=True)
    merged = models.load(out, scan=True)
    adapted = loaded(folder / "lora_r4" / "seed_0", bases_of(base))
    expected = tree.leaves(jlora.dequantize(jlora.merge(adapted)))[0]
    plain = tree.leaves(base.params)[0]
    for path, leaf in tree.leaves(merged.params)[0].items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-6, atol=1e-7)
        assert (np.abs(np.asarray(leaf) - plain[path]).max() > 1e-3) == (path.split("/")[-2] in LINEAR)


def bases_of(base: models.Pretrained) -> object:
    tokens = jnp.zeros((1, 4), jnp.int32)
    sites = jlora.sites(lambda params, x: base.model.apply({"params": params}, x), base.params, tokens)
    return held.hold(base.params, Held("nf4"), sites)


def test_an_interrupted_run_on_a_quantised_base_gives_the_same_numbers(ended, tmp_path, monkeypatch):
    calls, save = [], loop.Checkpoints.save

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(self, *arguments)

    monkeypatch.setattr(loop.Checkpoints, "save", interrupted)
    command = (
        "stories_shakespeare",
        "--folder",
        tmp_path / "run",
        *HERE,
        f"save.merged={tmp_path / 'out'}",
    )
    assert called(*command)[0] == 130
    assert called(*command, "--resume")[0] == 0 and len(calls) == 3
    assert numbers(tmp_path / "run") == numbers(ended[0])


HOSTED = (*HERE, "train.optimizer_memory=pinned_host")
OLD = tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11)


@pytest.mark.skipif(OLD, reason="JAX 0.10's CPU has no programs that return host memory")
def test_an_interrupted_run_whose_optimizer_waits_on_the_host_gives_the_numbers_of_the_device(
    ended, tmp_path, monkeypatch
):
    places, save, restore = [], loop.Checkpoints.save, loop.Checkpoints.restore
    place = lambda state: places.append({x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state) if x.ndim})

    def interrupted(self, state, *arguments):
        place(state)
        if len(places) == 2:
            raise KeyboardInterrupt
        save(self, state, *arguments)

    def again(self, *arguments):
        found = restore(self, *arguments)
        place(found[0])
        return found

    monkeypatch.setattr(loop.Checkpoints, "save", interrupted)
    monkeypatch.setattr(loop.Checkpoints, "restore", again)
    command = ("stories_shakespeare", "--folder", tmp_path / "run", *HOSTED, f"save.merged={tmp_path / 'out'}")
    assert called(*command)[0] == 130
    assert called(*command, "--resume")[0] == 0
    assert places == [{"pinned_host"}] * 4  # saved, interrupted, restored, saved
    found, expected = numbers(tmp_path / "run"), numbers(ended[0])
    assert {name: results for name, (_, results) in found.items()} == {
        n: results for n, (_, results) in expected.items()
    }


@pytest.mark.skipif(not OLD, reason="what JAX 0.10's CPU has not")
def test_where_no_program_returns_to_the_host_it_is_said_before_the_training(tmp_path):
    status, _, err = called("stories_shakespeare", "--folder", tmp_path / "run", *HOSTED)
    assert status == 2 and re.fullmatch(
        r"error: train\.optimizer_memory=pinned_host: memory_kind='pinned_host': JAX 0\.10\.\d has no programs for cpu that "
        r"return arrays to this memory \(.*\): take JAX 0\.11 or later, or leave the state on the device\n",
        err,
    )


def test_what_was_described_before_there_was_a_memory_to_choose_is_described_so_still():
    schedule = Schedule(300, batch=8)
    assert configfile.key(schedule) == "47bab1d95f72"  # that of 7297062, before the field
    hosted = dataclasses.replace(schedule, optimizer_memory="pinned_host")
    assert configfile.key(hosted) != configfile.key(schedule)
    assert configfile.describe(hosted) == configfile.describe(schedule) | {"optimizer_memory": "pinned_host"}


def test_a_run_whose_optimizer_lies_elsewhere_is_another(ended):
    folder, out, _ = ended
    status, _, err = called("stories_shakespeare", "--folder", folder, *HOSTED, f"save.merged={out}", "--resume")
    what = "config.train.optimizer_memory is None there and 'pinned_host' here"
    assert status == 2 and (OLD or f"belongs to another config: {what}" in err)


def test_a_memory_that_is_not_there_is_refused():
    text = "^optimizer_memory='pinned-host' is one of device, pinned_host; the nearest is 'pinned_host'$"
    with pytest.raises(ConfigError, match=text):
        Schedule(300, batch=8, optimizer_memory="pinned-host")


def test_a_run_on_a_base_held_otherwise_is_another(ended, tmp_path):
    folder, out, _ = ended
    status, _, err = called(
        "stories_shakespeare", "--folder", folder, "base.quantize=fp4", HERE[1], f"save.merged={out}", "--resume"
    )
    assert status == 2 and "belongs to another config: config.held.quantize is 'nf4' there and 'fp4' here" in err


# -- the recipe's data -------------------------------------------------------------------------------------------------


def test_guanaco_is_learnt_whole_and_asked_its_first_question(tmp_path):
    folder = tiny.guanaco(tmp_path)
    texts = qlora.read_guanaco(folder / "openassistant_best_replies_train.jsonl")
    train, validation, test = qlora.splits(texts, texts[:2], 3)
    assert (len(train), len(validation), len(test)) == (17, 3, 2)
    assert all(row.prompt + row.completion == text for row, text in zip([*train, *validation], texts, strict=True))
    assert test[0].source == texts[0].partition("### Assistant:")[0] + "### Assistant:"
    (answer,) = test[0].texts
    assert texts[0] == f"{test[0].source} {answer}### Human: Thanks"
    scores = qlora.measure([f" {answer}### Human: more"], test[:1])
    assert scores == {"ROUGE-L": pytest.approx(100.0)}


@pytest.mark.parametrize("line", ['{"text": "What is this?"}', '{"prompt": "x"}', "[1]", "not JSON"])
def test_guanaco_names_the_line_of_another_form(line, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"text": "### Human: a### Assistant: b"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"mine.jsonl.*2: (expected a text of the form|not JSON)"):
        qlora.read_guanaco(file)
