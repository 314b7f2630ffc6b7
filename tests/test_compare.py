"""The comparison of methods in its small form, from the command line to the plots; resumed; trials; what it refuses."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from rich.console import Console

import jlora
from experiments import bases, configfile, report
from experiments.config import Experiment, Measure, Run, Schedule, Study
from experiments.configfile import ConfigError
from experiments.data import Labelled, Shuffled, turned_digits, upright_digits
from experiments.loop import Point, Result
from experiments.progress import Progress
from experiments.report.results import outcome_of
from experiments.report.tables import sweep
from experiments.tasks.digits import Digits
from experiments.tasks.task import Domain, Metric, Opened
from experiments.train import main
from experiments.trainer import Shared, Trainer, optimizer
from experiments.trial import Trial, best_rate

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "compare_methods.py"
RUNS = {"text": ["full", "lora", "adalora"], "digits": ["full", "lora", "eva", "houlsby"]}


def start(*arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-u", "-m", "experiments.compare", str(CONFIG), "--small", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.startswith(
        "experiments.compare is deprecated and goes with the next release: use experiments.train"
    )
    return done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """A run from an empty folder, and what it printed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, start("--folder", str(folder))


def tasks(folder: Path) -> dict:
    """The results of both experiments, without what a clock said."""
    found = {name: json.loads((folder / name / "results.json").read_text()) for name in RUNS}
    for task in found.values():
        for outcome in task["outcomes"]:
            for result in [*outcome["sweep"], *outcome["results"]]:
                del result["tokens_per_second"], result["seconds"]
        task.pop("seconds")
    return found


# tests/test_experiment.py ends a study by default.
@pytest.mark.thorough("test_every_run_of_the_whole_comparison_can_be")
def test_the_tables_hold_what_was_measured(whole):
    folder, out = whole
    found = tasks(folder)
    for name, runs in RUNS.items():
        task = found[name]
        assert [outcome["name"] for outcome in task["outcomes"]] == runs
        metric, better, *_ = task["headline_metric"]
        sign = -1 if better == "lower" else 1
        for outcome in task["outcomes"]:
            results, plan, price = outcome["results"], outcome["plan"], outcome["price"]
            assert len(outcome["sweep"]) == 2 and [result["seed"] for result in results] == [0, 1]
            assert len({result["learning_rate"] for result in results}) == 1
            for result, learned, forgotten in zip(results, outcome["learned"], outcome["forgotten"], strict=True):
                assert learned == pytest.approx(sign * (result["test"][metric] - task["start"]["test"][metric]))
                assert forgotten == pytest.approx(sign * (task["start"]["old"][metric] - result["old"][metric]))
            assert plan["optimizer_bytes"] >= 8 * plan["trainable"]  # two float32 moments of AdamW
            assert price["adapter_bytes"] > 4 * plan["trainable"] and plan["flops"] > 0 and price["milliseconds"] > 0
            assert (price["merged"] is None) == (outcome["name"] == "houlsby")
            assert set(price["relative_time"]) == {"lora", "full"}
        of = {outcome["name"]: outcome for outcome in task["outcomes"]}
        assert of["full"]["plan"]["trainable"] == task["start"]["parameters"]
        assert of["lora"]["plan"]["trainable"] == 4 * (4 * 64 + 2 * 160)  # width 32, one layer, rank 4
        assert of["lora"]["price"]["relative_time"]["lora"] == of["full"]["price"]["relative_time"]["full"] == 1
        assert of["lora"]["plan"]["flops"] < of["full"]["plan"]["flops"]
        written = (folder / name / "results.md").read_text()
        for text in ("LoRA r=4", "forgotten", "(edge of the grid: widen it)"):
            assert text in out and text in written
        assert "standard deviation" in written and "merged, to base" in written
        for kind in ("quality", "time", "forgetting", "latency"):
            image = plt.imread(folder / name / f"{kind}.png")
            assert min(image.shape[:2]) > 350 and f"({kind}.png)" in written


@pytest.mark.thorough("test_the_best_rate_by_the_metric_and_then_by_the_loss")
def test_the_best_rate_is_that_of_the_validation_split(whole):
    for task in tasks(whole[0]).values():
        metric, better, *_ = task["selection_metric"]
        sign = -1 if better == "lower" else 1
        for outcome in task["outcomes"]:
            last = lambda result: result["points"][-1]["scores"]
            best = max(outcome["sweep"], key=lambda end: (sign * last(end)[metric], -last(end)["loss"]))
            assert outcome["results"][0]["learning_rate"] == best["learning_rate"]
            assert all(result["test"] is None for result in outcome["sweep"])


@pytest.mark.thorough("test_every_run_of_the_whole_comparison_can_be")  # tests/test_experiment.py resumes by default
def test_resume_repeats_what_is_missing_alone_and_gives_the_same_numbers(whole):
    folder, _ = whole
    before = tasks(folder)
    rates = {path.name: path / "result.json" for path in (folder / "digits" / "lora").iterdir()}
    kept = (folder / "digits" / "eva" / "seed_1" / "result.json").stat().st_mtime_ns
    for result in rates.values():
        result.unlink()
    out = start("--folder", str(folder), "--resume")
    assert out.count("done before") == 3 * (len(RUNS["text"]) + len(RUNS["digits"]) - 1) and len(rates) == 3
    assert out.count("reused from") == 2
    assert (folder / "digits" / "eva" / "seed_1" / "result.json").stat().st_mtime_ns == kept
    assert tasks(folder) == before  # the costs were kept, and the scores came out alike


# -- configs -----------------------------------------------------------------------------------------------------------


def test_every_run_of_the_whole_comparison_can_be():
    """Every run is planned on abstract parameters; nothing is pretrained."""
    study = configfile.load(Study, CONFIG)
    text, digits = study.experiments
    names = {run.method.name for run in text.runs}
    assert len(text.runs) >= 28 and {"full", "lora", "dora", "houlsby", "p_tuning"} <= names
    assert len(digits.runs) == len(text.runs) - 2
    for experiment in study.experiments:
        opened = experiment.task.open(bases.source(experiment, Path("none")), experiment.train, 64)
        shapes = jax.eval_shape(lambda opened=opened: opened.params(0))
        shared = Shared.of(experiment, opened, shapes)
        for run in experiment.runs:
            trainer = Trainer(run, shared, experiment.train, experiment.rates_of(run)[0])
            trainer.check(shapes)
            if not run.method.acts.statistic:
                count = jlora.count(jax.eval_shape(lambda params, t=trainer: t.adapted(0, params), shapes))
                assert 0 < count.trainable <= count.total


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("experiments.text.runs.laro.targets=attn", "there is no field 'experiments.text.runs.laro.targets'; the nearest is 'experiments.text.runs.lora.targets'"),
        ("experiments.digits.base.model.heads=3", "width=32 is not a multiple of heads=3"),
        ("experiments.text.train.steps=5", "runs.adalora: adalora is made for total_steps=4, and the run has 5 steps"),
        ("experiments.text.runs.lora.targets=nothing", "runs.lora: targets='nothing' matches none of the"),
    ],
)  # fmt: skip
def test_a_mistake_is_explained_without_a_traceback(item, message, tmp_path, capsys):
    assert main([str(CONFIG), "--small", "--folder", str(tmp_path / "run"), item]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and not (tmp_path / "bases").exists()


def test_names_are_told_apart_and_references_take_part():
    study = configfile.load(Study, CONFIG, small=True)
    _, digits = study.experiments
    with pytest.raises(ConfigError, match="runs: at least one, and each with a name of its own"):
        dataclasses.replace(digits, runs=digits.runs[:1] * 2)
    with pytest.raises(ConfigError, match="experiments: at least one, and each with a name of its own"):
        dataclasses.replace(study, experiments=(digits, digits))
    with pytest.raises(ConfigError, match=r"measure.relative_to: \['prompt'\] are no runs of 'digits'"):
        dataclasses.replace(digits, measure=Measure(relative_to=("prompt",)))
    with pytest.raises(ConfigError, match=r"runs.a: a learning_rate, or rates for a sweep"):
        dataclasses.replace(digits, runs=(Run("a", "A", jlora.full()),), measure=Measure())


def test_a_task_wants_a_base_of_its_kind():
    _, digits = configfile.load(Study, CONFIG, small=True).experiments
    for task, kind in ((digits.task, "ViTConfig"), (configfile.load(Study, CONFIG).experiments[0].task, "GPT2Config")):
        with pytest.raises(ConfigError, match=rf"has a base that is pretrained here: base=Pretrain\({kind}"):
            task.open("somewhere", digits.train, 4)


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

    def __call__(self, step: int) -> np.ndarray:
        return np.linspace(-1, 1, 8, dtype=np.float32)[:, None]


ERROR = Metric("error", "lower", decimals=3)


def line(old: bool = False) -> Opened:
    """y = 2 x, to be learned by one weight; and y = x, which it knows."""
    apply = lambda variables, x: x @ variables["params"]["kernel"]
    losses = lambda params, x, slope: jnp.mean(jnp.square(apply({"params": params}, x) - slope * x))

    def evaluator(apply):
        def evaluate(params, split, side):
            value = float(losses(params, Repeated()(0)[:5], 2.0 if side == "new" else 1.0))
            return {"error": value, "loss": value}

        return evaluate

    domain = Domain("line", 8, lambda batch, seed: Repeated())
    return Opened(
        model=SimpleNamespace(apply=apply, config=SimpleNamespace(param_dtype="float32")),
        params=lambda seed: {"kernel": jnp.ones((1, 1))}, new=domain, old=domain if old else None,
        loss=lambda params, x, key: losses(params, x, 2.0), outputs=lambda apply, params, x: apply({"params": params}, x),
        evaluator=evaluator, selection_metric=ERROR, headline_metric=ERROR, held_out="", tokens=len, digest="",
    )  # fmt: skip


HOW = Schedule(4, 8, 4, warmup=0.05, decay="cosine", b2=0.98, clip=1e9, keep="last")


def trial(rates: tuple[float, ...], folder: Path, **schedule) -> tuple[Trial, jlora.Adapted]:
    opened = line()
    how = dataclasses.replace(HOW, **schedule)
    run = Run("full", "full", jlora.full(), rates=rates)
    params = opened.params(0)
    sites = jlora.sites(opened.loss, params, Repeated()(0), jax.random.key(0))
    trainer = Trainer(run, Shared(opened, sites, 1), how, rates[0])
    found = Trial(trainer, rates, (0, 1), folder, True)
    with Progress(Console(file=io.StringIO()), {"full": how.steps * found.trainings}) as progress:
        for seed in found.seeds:
            found.train(seed, params, progress)
    return found, params


def slope(adapted: jlora.Adapted) -> float:
    return float(jlora.merge(adapted)["kernel"][0, 0])


@pytest.mark.loose_promotion  # Optax's bias correction
def test_one_compiled_step_trains_at_every_rate():
    opened = line()
    how = dataclasses.replace(HOW, steps=5)
    params = opened.params(0)
    sites = jlora.sites(opened.loss, params, Repeated()(0), jax.random.key(0))
    trainer = Trainer(Run("full", "full", jlora.full(), 1e-3), Shared(opened, sites, 1), how, 1e-3)
    ends = {}
    for rate in (0.0, 1e-3, 1e-1):
        state = trainer.start(0, params, rate)
        for i in range(5):
            state, _ = trainer.step(state, Repeated()(i))
        ends[rate] = slope(state.adapted)
    # AdamW moves a weight by its rate; no warm-up (5 % of 5 steps), then the cosine's 1, 0.905, 0.655, 0.345, 0.095 of it
    assert ends[0.0] == 1
    for rate in (1e-3, 1e-1):
        assert ends[rate] == pytest.approx(1 + 3 * rate, abs=0.05 * rate)
    assert trainer.step.compiled(trainer.step.arguments(state, Repeated()(0)))._cache_size() == 1


def test_one_program_draws_the_factors_of_every_seed_beside_the_base():
    opened = line()
    params = opened.params(0)
    sites = jlora.sites(opened.loss, params, Repeated()(0), jax.random.key(0))
    trainer = Trainer(Run("lora", "LoRA", jlora.lora(1), 1e-3), Shared(opened, sites, 1), HOW, 1e-3)
    drawn = jax.jit(lambda params: jlora.apply(params, 1, sites=sites, key=1).factors)(params)  # the results' bits
    one, other = trainer.adapted(1, params), trainer.adapted(2, params)
    jax.tree.map(np.testing.assert_array_equal, one.factors, drawn)
    assert np.any(one.factors["kernel"]["A"] != other.factors["kernel"]["A"])
    assert one.base["kernel"] is other.base["kernel"] is params["kernel"]
    assert trainer._beside._cache_size() == 1


@pytest.mark.loose_promotion  # Optax's bias correction
def test_a_rate_that_diverges_is_noted_and_the_others_go_on(tmp_path):
    found, params = trial((1e-1, 1e30), tmp_path / "full")
    assert [result.diverged is None for result in found.sweep] == [True, False]
    assert "loss is" in str(found.sweep[1].diverged) and found.best == 1e-1 and len(found.results) == 2
    again, _ = trial((1e-1, 1e30), tmp_path / "full")  # as an earlier start left it
    assert (again.sweep, again.results, again.best) == (found.sweep, found.results, found.best)
    assert slope(jlora.load(found.place / "adapter", params)) > 1
    outcome = outcome_of(found, SimpleNamespace(trainable=1, total=1, percent=100.0), None)  # type: ignore[arg-type]
    results = report.Results("", "", ERROR, ERROR, "line", None, report.Start(1, 4), (outcome,))
    table = sweep(results)
    assert table[1][2] == "1e+30: diverged" and table[1][1].startswith("0.1: ") and table[1][1].endswith(" *")
    assert table[1][3] == "0.1 (edge of the grid: widen it)"


@pytest.mark.loose_promotion  # Optax's bias correction
def test_all_rates_diverged(tmp_path):
    found, params = trial((1e29, 1e30), tmp_path / "full")
    assert found.best is None and found.results == [] and [result.test for result in found.sweep] == [None, None]
    assert slope(jlora.load(tmp_path / "full" / "rate_1e+29" / "adapter", params)) == 1


@pytest.mark.loose_promotion  # Optax's bias correction
def test_the_best_point_is_kept_or_the_last(tmp_path):
    """At a learning rate of 30 the weight jumps over its aim and does not come back."""
    for keep, kept in (("best", 0), ("last", 4)):
        found, params = trial((30.0,), tmp_path / keep, keep=keep, evaluate_every=2)
        first = found.results[0]
        assert [point.step for point in first.points] == [0, 2, 4] and first.best == kept
        assert first.kept.scores["error"] == first.test["error"]
        assert (slope(jlora.load(found.place / "adapter", params)) == 1) == (keep == "best")


@pytest.mark.loose_promotion  # Optax's bias correction
def test_forgetting_is_followed_where_there_is_an_old_domain(tmp_path):
    opened = line(old=True)
    params = opened.params(0)
    shared = Shared(opened, jlora.sites(opened.loss, params, Repeated()(0), jax.random.key(0)), 1)
    trainer = Trainer(Run("full", "full", jlora.full(), 1e-1), shared, HOW, 1e-1)
    found = Trial(trainer, (1e-1,), (0,), tmp_path / "full", True)
    with Progress(Console(file=io.StringIO()), {"full": 4}) as progress:
        found.train(0, params, progress)
    (result,) = found.results
    first, last = result.points
    assert first.old["error"] == 0 and last.old["error"] > 0 and last.scores["error"] < first.scores["error"]
    assert (result.test, result.old) == (last.scores, last.old)


def test_the_best_rate_by_the_metric_and_then_by_the_loss():
    def result(rate, value, loss, diverged=None):
        return Result(
            0,
            rate,
            (Point(4, None, {"accuracy": value, "error": value, "loss": loss}),),
            4,
            1.0,
            1.0,
            diverged=diverged,
        )

    sweep = [result(1e-3, 80.0, 0.7), result(1e-2, 90.0, 0.9), result(3e-2, 90.0, 0.8), result(1e-1, 99.0, 0.1, "nan")]
    assert best_rate(sweep, Metric("accuracy", "higher")) == 3e-2
    assert best_rate(sweep, ERROR) == 1e-3
    assert best_rate([result(1e-3, 1.0, float("nan"))], ERROR) is None


@pytest.mark.loose_promotion  # Optax's schedules divide an int by an int
@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_the_rate_rises_and_decays(decay):
    """A gradient of constant sign moves AdamW's weight by the rate, so that the steps are the schedule."""
    schedule = Schedule(10, 1, warmup=2, decay=decay)
    tx = optimizer(schedule, 0.5, 10)
    state, weight, rates = tx.init(jnp.zeros(())), jnp.zeros(()), []
    for _ in range(10):
        update, state = tx.update(jnp.ones(()), state, weight)
        rates.append(-float(update))
    t = np.arange(8) / 8
    after = {"linear": 1 - t, "cosine": (1 + np.cos(np.pi * t)) / 2, "constant": np.ones(8)}[decay]
    np.testing.assert_allclose(rates, 0.5 * np.array([0.0, 0.5, *after]), rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigError, match=r"train.warmup=2 is 2 of the run's 2 steps: none is left after it"):
        optimizer(schedule, 0.5, 2)


def test_digits_are_scored_as_a_whole_whatever_the_batch():
    _, digits = configfile.load(Study, CONFIG, small=True).experiments
    assert isinstance(digits.task, Digits) and isinstance(digits, Experiment)
    found = []
    for batch in (7, 300):
        opened = digits.task.open(digits.base.model, digits.train, batch)
        found.append(opened.evaluator(opened.model.apply)(opened.params(0), "validation", "new"))
    assert found[0]["accuracy"] == found[1]["accuracy"] and found[0]["loss"] == pytest.approx(
        found[1]["loss"], rel=1e-6
    )
