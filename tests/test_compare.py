"""The comparison of methods in its small form, from the command line to the plots; resumed; and what it refuses."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

import jlora
from experiments import config
from experiments.compare import main
from experiments.comparison import Comparison, Contender
from experiments.comparison.report import Entrant, rates
from experiments.comparison.trial import Bench, Entry, Trial, Trials, applied, best_rate, compete, earlier
from experiments.config import ConfigError, Train
from experiments.data import Labelled, Shuffled, turned_digits, upright_digits
from experiments.tasks import Batches, Metric, Score, Scorer, Scores, Task, at_rate, train
from experiments.tasks.task import Outcome
from jlora.state import TrainState
from jlora.train import train_step

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "compare_methods.py"
TEXT = ["full", "lora", "adalora", "prompt"]
DIGITS = ["full", "lora", "eva", "ia3", "houlsby"]


def start(*arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-u", "-m", "experiments.compare", str(CONFIG), "--small", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """A run from an empty folder, and what it printed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, start("--folder", str(folder))


def tasks(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())["tasks"]


def test_the_tables_hold_what_was_measured(whole):
    folder, out = whole
    found = tasks(folder)
    for name, contenders in (("text", TEXT), ("digits", DIGITS)):
        task = found[name]
        assert [contender["name"] for contender in task["contenders"]] == contenders
        sign = -1 if task["metric"]["better"] == "lower" else 1
        (base_new, _), (base_old, _) = task["base"]["test"]
        for contender in task["contenders"]:
            trials, price = contender["trials"], contender["price"]
            assert len(trials["sweep"]) == 2 and [trial["seed"] for trial in trials["finals"]] == [0, 1]
            assert all(trial["learning_rate"] == trials["best"] for trial in trials["finals"])
            for trial, learned, forgotten in zip(
                trials["finals"], contender["learned"], contender["forgotten"], strict=True
            ):
                (new, _), (old, _) = trial["test"]
                assert learned == pytest.approx(sign * (new - base_new))
                assert forgotten == pytest.approx(sign * (base_old - old))
            assert price["optimizer_bytes"] >= 8 * price["trainable"]  # two float32 moments of AdamW
            assert price["adapter_bytes"] > 4 * price["trainable"] and price["flops"] > 0 and price["milliseconds"] > 0
            assert (price["merged"] is None) == (contender["name"] in ("prompt", "houlsby"))
            assert set(price["relative_time"]) == {"lora", "full"}
        price = {contender["name"]: contender["price"] for contender in task["contenders"]}
        assert price["full"]["trainable"] == task["base"]["parameters"]
        assert price["lora"]["trainable"] == 4 * (4 * 64 + 2 * 160)  # width 32, one layer, rank 4
        assert price["lora"]["relative_time"]["lora"] == price["full"]["relative_time"]["full"] == 1
        assert price["lora"]["flops"] < price["full"]["flops"]
    report = (folder / "results.md").read_text()
    for text in ("LoRA r=4", "forgotten", "merged, to base", "(edge of the grid: widen it)", "prompt n=16"):
        assert text in out and text in report
    assert "| Houlsby r=16 |" in report and "standard deviation over 2 seeds" in report


def test_the_best_rate_is_that_of_the_validation_split(whole):
    for task in tasks(whole[0]).values():
        sign = -1 if task["metric"]["better"] == "lower" else 1
        for contender in task["contenders"]:
            sweep = contender["trials"]["sweep"]
            best = max(sweep, key=lambda trial: (sign * trial["validation"][0][0], -trial["validation"][0][1]))
            assert contender["trials"]["best"] == best["learning_rate"]
            assert all(trial["test"] is None for trial in sweep)


def test_the_plots_are_drawn(whole):
    names = [
        f"{task}_{kind}.png" for task in ("text", "digits") for kind in ("quality", "time", "forgetting", "latency")
    ]
    for name in names:
        image = plt.imread(whole[0] / name)
        colours = np.unique((image[::3, ::3, :3] * 255).astype(np.uint8).reshape(-1, 3), axis=0)
        assert min(image.shape[:2]) > 350 and len(colours) > 50
        assert f"({name})" in (whole[0] / "results.md").read_text()


def test_resume_repeats_what_is_missing_alone_and_gives_the_same_numbers(whole):
    folder, _ = whole
    before = tasks(folder)
    kept = (folder / "digits" / "eva" / "trials.json").stat().st_mtime_ns
    (folder / "digits" / "lora" / "trials.json").unlink()
    out = start("--folder", str(folder), "--resume")
    assert out.count("(done before)") == len(TEXT) + len(DIGITS) - 1
    assert out.count("reused from") == 2
    assert (folder / "digits" / "eva" / "trials.json").stat().st_mtime_ns == kept
    assert tasks(folder) == before  # the costs were kept, and the scores came out alike


# -- configs -----------------------------------------------------------------------------------------------------------


def test_every_contender_of_the_whole_comparison_can_be():
    comparison = config.load_as(Comparison, CONFIG)
    names = {contender.method.name for contender in comparison.contenders}
    assert len(comparison.contenders) >= 28 and {"full", "lora", "dora", "houlsby", "p_tuning"} <= names
    for spec in comparison.tasks:
        task = dataclasses.replace(spec, old=turned_digits) if spec.name == "digits" else spec
        model = task.open()
        for contender in comparison.of(spec):
            if not contender.method.acts.statistic:
                shapes = jax.eval_shape(lambda: model.initial(0))
                count = jlora.count(jax.eval_shape(lambda params, c=contender: applied(c, params), shapes))
                assert 0 < count.trainable <= count.total
            assert dict(contender.method.config).get("total_steps", spec.train.steps) == spec.train.steps


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("contenders.lora.method=dora", "contenders.lora.method is of type Method, got 'dora'"),
        ("contenders.laro.targets=attn", "there is no field 'contenders.laro.targets'; the nearest is 'contenders.lora.targets'"),
        ("tasks.text.train.step=3", "there is no field 'tasks.text.train.step'; the nearest is 'tasks.text.train.steps'"),
        ("tasks.digits.model.heads=3", "width=32 is not a multiple of heads=3"),
        ("seeds=0", "seeds is at least 1, got 0"),
        ("contenders.lora.learning_rates=1e-2,1e-3", "contenders.lora.learning_rates: at least one, positive and ascending; got (0.01, 0.001)"),
        ("tasks.text.train.steps=5", "contenders.adalora: adalora is made for total_steps=4, and a run of task 'text' has 5 steps"),
        ("contenders.lora.targets=nothing", "contenders.lora: targets='nothing' matches none of the"),
    ],
)  # fmt: skip
def test_a_mistake_is_explained_without_a_traceback(item, message, tmp_path, capsys):
    assert main([str(CONFIG), "--small", "--folder", str(tmp_path / "run"), item]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and not (tmp_path / "bases").exists()


def test_a_config_of_the_other_kind_is_refused(capsys):
    assert main(["configs/quickstart.py"]) == 2
    assert "returns a Experiment, expected an experiments.comparison.config.Comparison" in capsys.readouterr().err


def test_names_are_told_apart_and_references_take_part():
    comparison = config.load_as(Comparison, CONFIG, small=True)
    with pytest.raises(ConfigError, match="contenders: at least one, and each with a name of its own"):
        dataclasses.replace(comparison, contenders=comparison.contenders[:1] * 2)
    with pytest.raises(ConfigError, match=r"relative_to: \['prompt'\] are no contenders of task 'digits'"):
        dataclasses.replace(comparison, relative_to=("prompt",))


# -- tasks -------------------------------------------------------------------------------------------------------------


def test_no_digit_is_in_two_splits_not_even_turned():
    upright, turned = upright_digits(), turned_digits()
    splits = ("train", "validation", "test")
    assert [len(getattr(upright, split).labels) for split in splits] == [897, 300, 600]
    turns = lambda image: min(np.rot90(image, k).tobytes() for k in range(4))
    seen = [
        {turns(image) for domain in (upright, turned) for image in getattr(domain, split).images} for split in splits
    ]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 1797
    assert np.array_equal(np.rot90(upright.test.images[5], 1), turned.test.images[5])
    assert upright.digest() == upright_digits().digest() != turned.digest()


def test_an_epoch_of_digits_shows_every_image_once():
    data = Labelled(np.arange(10, dtype=np.float32).reshape(10, 1, 1, 1), np.arange(10, dtype=np.int32))
    batches = Shuffled(data, batch=4, seed=1)
    labels = np.concatenate([batches(step).labels for step in range(5)])
    assert sorted(labels[:10]) == sorted(labels[10:]) == list(range(10)) and list(labels[:10]) != list(labels[10:])
    assert np.array_equal(batches(3).labels, Shuffled(data, 4, 1)(3).labels)
    assert np.array_equal(batches(0).images[:, 0, 0, 0], batches(0).labels.astype(np.float32))


class Repeated:
    """The same batch at every step."""

    examples = 8

    def __call__(self, step: int) -> np.ndarray:
        return np.linspace(-1, 1, 8, dtype=np.float32)[:, None]


def line() -> Task:
    """y = 2 x, to be learned by one weight."""

    def outcome(predicted, x):
        losses = jnp.square(predicted - 2 * x)[:, 0]
        return Outcome(losses, losses)

    batches: Batches = Repeated()
    return Task(
        name="line", label="a line", metric=Metric("error", "", "lower", 3), old="old", new="new", model=None,
        initial=lambda seed: {"kernel": jnp.ones((1, 1))}, forward=lambda params, x: x @ params["kernel"], outcome=outcome,
        batches=lambda domain, batch, seed: batches, held_out=lambda domain, split: batches(0)[:5], digest="",
    )  # type: ignore[arg-type]  # fmt: skip


def bench(rate: tuple[float, ...]) -> tuple[Bench, Entry]:
    spec = dataclasses.replace(config.load_as(Comparison, CONFIG, small=True).tasks[0], train=Train(4, 8, 4, clip=1e9))
    contender = Contender("full", "full", "baselines", jlora.full(), rate)
    comparison = Comparison("line", (spec,), (contender,), ("full",), seeds=2, batch=2)
    task = line()
    shared = Bench(comparison, spec, task, task.initial(0), Scorer(task, 2))
    return shared, Entry(contender, shared)


@pytest.mark.loose_promotion  # Optax's bias correction
def test_one_compiled_step_trains_at_every_rate():
    task, how = line(), Train(5, 8, 5)
    step = train_step(task.loss, at_rate(how, 1e-3, 5))
    adapted = jlora.apply(task.initial(0), method=jlora.full())
    ends = {}
    for rate in (0.0, 1e-3, 1e-1):
        state = TrainState.create(adapted, at_rate(how, rate, 5))
        ends[rate] = float(train(step, state, task.batches("new", 8, 0), 5).adapted.factors["kernel"]["value"][0, 0])
    # AdamW moves a weight by its rate; a step of warm-up from zero, then the cosine's 1, 0.854, 0.5, 0.146 of it
    assert ends[0.0] == 1
    for rate in (1e-3, 1e-1):
        assert ends[rate] == pytest.approx(1 + 2.5 * rate, abs=0.05 * rate)
    program = step.compiled(step.arguments(state, Repeated()(0)))
    assert program._cache_size() == 1


def test_a_score_is_the_mean_of_a_split_whatever_the_batch():
    task = line()
    whole = float(np.mean(np.square(Repeated()(0)[:5])))
    for batch in (1, 2, 5, 8):
        assert Scorer(task, batch)(task.initial(0), "test").new == pytest.approx((whole, whole))


@pytest.mark.loose_promotion  # Optax's bias correction
def test_a_rate_that_diverges_is_noted_and_the_others_go_on(tmp_path):
    shared, entry = bench((1e-1, 1e30))
    trials, _ = compete(entry, tmp_path / "full", lambda step: None)
    assert [trial.diverged is None for trial in trials.sweep] == [True, False]
    assert "loss is" in str(trials.sweep[1].diverged) and trials.best == 1e-1 and len(trials.finals) == 2
    assert earlier(tmp_path / "full", shared.base)[0] == trials  # type: ignore[index]
    entrant = Entrant(entry.contender, trials, None)  # type: ignore[arg-type]
    table = rates(dataclasses.make_dataclass("Results", ["entrants", "metric"])((entrant,), shared.task.metric))
    assert table[1][2] == "1e+30: diverged" and table[1][1].startswith("0.1: ") and table[1][1].endswith(" *")


@pytest.mark.loose_promotion  # Optax's bias correction
def test_all_rates_diverged(tmp_path):
    shared, entry = bench((1e30,))
    trials, adapted = compete(entry, tmp_path / "full", lambda step: None)
    assert trials.best is None and trials.finals == () and float(adapted.factors["kernel"]["value"][0, 0]) == 1
    assert earlier(tmp_path / "full", shared.base)[0] == trials  # type: ignore[index]


def test_the_best_rate_by_the_metric_and_then_by_the_loss():
    task = dataclasses.replace(line(), metric=Metric("accuracy", " %", "higher", 1))
    trial = lambda rate, value, loss: Trial(0, rate, Scores(Score(value, loss), Score(0, 0)))
    sweep = [trial(1e-3, 80.0, 0.7), trial(1e-2, 90.0, 0.9), trial(3e-2, 90.0, 0.8), Trial(0, 1e-1, None, diverged="")]
    assert best_rate(sweep, task) == 3e-2
    assert best_rate(sweep, line()) == 1e-3
    assert Trials(tuple(sweep), 3e-2, ()).at_edge is False
    assert Trials(tuple(sweep), 1e-3, ()).at_edge is True
