"""The config of an experiment: a base, a task, the runs that adapt the one to the other, and measurements of them."""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jlora
from experiments.configfile import APART, EACH, UNSAID
from experiments.configfile import ConfigError as ConfigError
from experiments.tasks.task import Task
from jlora import host
from jlora.methods.residual import is_taken_out
from jlora.models.sampling import Sampling
from jlora.quant import FORMATS

Duration = int | str
"""How long: a number of steps, "2 epochs" or "5000 examples"."""


def in_steps(duration: Duration, *, batch: int, examples: int) -> int:
    """A duration in steps of `batch` examples, where an epoch has `examples`.

    >>> in_steps(300, batch=8, examples=80), in_steps("1.5 epochs", batch=8, examples=80)
    (300, 15)
    """
    count, _, unit = str(duration).strip().partition(" ")
    per_step = {"": 1.0, "steps": 1.0, "examples": 1 / batch, "epochs": examples / batch}.get(unit.strip())
    try:
        exact = float(count) * per_step if per_step else 0.0
    except ValueError:
        exact = 0.0
    if not 0 < exact < math.inf:
        raise ConfigError(f"a duration is a positive number of steps, '2 epochs' or '5000 examples'; got {duration!r}")
    if round(exact) < 1:
        raise ConfigError(f"{duration!r} is no whole step: an epoch has {examples} examples, a step {batch}")
    return round(exact)


@dataclass(frozen=True)
class Schedule:
    """Schedule of a training: AdamW, a linear warm-up, then a line or a cosine to zero, or a constant rate.

    Attributes:
      steps: how long: "3 epochs", "5000 examples" or a number of steps.
      batch: examples per step.
      evaluate_every: between evaluations on the validation split; the training state is kept at the same times.
      warmup: steps, or below 1 a fraction of all steps.
      decay: of the rate after the warm-up.
      weight_decay, b1, b2, epsilon: of AdamW.
      clip: the largest norm of a gradient; None for no bound.
      label_smoothing: of the loss, in [0, 1).
      accumulate: micro-batches that a step is cut into.
      keep: which evaluation is a run's result: the best on the validation split, or the last.
      optimizer_memory: where the optimizer's arrays wait between two steps: "device", or "pinned_host", the host's
        memory, as of QLoRA's paged optimizer. The same numbers, less memory and more time of a step; see
        `jlora.TrainState.create`.
      ema: the decay of a running average of what is trained, which is evaluated and kept in its place, 0.999 for a long
        training; None for none.
      pictures_every: between two sheets of pictures, where the task draws some; None for none while training.
    """

    steps: Duration
    batch: int
    evaluate_every: Duration = "1 epochs"
    warmup: float = 0.06
    decay: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    clip: float | None = None
    label_smoothing: float = 0.0
    accumulate: int = 1
    keep: Literal["best", "last"] = "best"
    optimizer_memory: Literal["device", "pinned_host"] = field(default="device", metadata=UNSAID)
    ema: float | None = field(default=None, metadata=UNSAID)
    pictures_every: Duration | None = field(default=None, metadata=UNSAID)

    def __post_init__(self) -> None:
        if self.batch < 1 or self.accumulate < 1 or self.batch % self.accumulate:
            raise ConfigError(f"batch={self.batch} is not at least 1 and a multiple of accumulate={self.accumulate}")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing is in [0, 1), got {self.label_smoothing}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ConfigError(f"ema is in [0, 1), got {self.ema}")
        for duration in (self.steps, self.evaluate_every, self.pictures_every):
            if duration is not None:
                in_steps(duration, batch=1, examples=1000)
        if self.optimizer_memory not in host.KINDS:
            near = difflib.get_close_matches(str(self.optimizer_memory), host.KINDS, 1, 0.0)[0]
            raise ConfigError(
                f"optimizer_memory={self.optimizer_memory!r} is one of {', '.join(host.KINDS)}; the nearest is {near!r}"
            )

    @property
    def memory_kind(self) -> str | None:
        """As `jlora.TrainState.create` takes it."""
        return None if self.optimizer_memory == "device" else self.optimizer_memory


@dataclass(frozen=True)
class Decoding:
    """Decoding of texts from prompts when a language model is evaluated.

    Attributes:
      new_tokens: at most.
      beams: 1 for one token after the other.
      length_penalty: of the beams; see `jlora.models.beam_search`.
      no_repeat_ngram: no n tokens in a row occur twice; 0 for no such rule.
      of_prompt: with beams, whether those of the prompt count, as in transformers; not so in the LoRA paper's code.
      temperature, top_p: how tokens are drawn where there is one beam, see `jlora.models.Sampling`; 0 for the best.
      batch: prompts at a time.
    """

    new_tokens: int
    beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0
    of_prompt: bool = True
    temperature: float = 0.0
    top_p: float = 1.0
    batch: int = 16

    def __post_init__(self) -> None:
        if min(self.new_tokens, self.beams, self.batch) < 1:
            raise ConfigError(
                f"decoding: new_tokens={self.new_tokens}, beams={self.beams} and batch={self.batch} are at least 1 each"
            )
        if self.beams > 1 and (self.temperature or self.top_p < 1):
            raise ConfigError(
                f"decoding: temperature={self.temperature} and top_p={self.top_p} draw tokens, and "
                f"beams={self.beams} do not"
            )
        try:
            self.sampling  # noqa: B018
        except ValueError as error:
            raise ConfigError(f"decoding: {error}") from error

    @property
    def sampling(self) -> Sampling:
        """Choice of a token without beams."""
        return Sampling(self.temperature, None, self.top_p, self.no_repeat_ngram)


@dataclass(frozen=True)
class Pretrain:
    """A base that is trained here, on the task's old domain, and kept for every experiment with the same one.

    Attributes:
      model: the shape of the model, such as a `GPT2Config`.
      train: how.
      learning_rate: the peak.
    """

    model: Any
    train: Schedule
    learning_rate: float


Base = str | Callable[[Path], Path] | Pretrain
"""A repository on the hub or a folder, a function that makes a checkpoint below a folder and returns where, or here."""


HOLDINGS = (*FORMATS, "bf16", "none")


@dataclass(frozen=True)
class Held:
    """How the base's linear weights but heads are held. By name: `base.quantize=nf4`, `runs.lora.base.quantize=int8`.

    Attributes:
      quantize: a format of `jlora.quantize`: "nf4", "fp4", "int4", "int8", "fp8"; "bf16" for a cast to bfloat16, "none"
        for no change. None: of an experiment no change, of a run what the experiment has.
      block, double: as in `jlora.quantize`.
      loftq: steps of `jlora.loftq`, which starts the factors from what quantising loses; None for no such start.
    """

    quantize: str | None = None
    block: int | None = None
    double: bool | None = None
    loftq: int | None = None

    def __post_init__(self) -> None:
        if self.quantize is not None and self.quantize not in HOLDINGS:
            near = difflib.get_close_matches(self.quantize.lower(), HOLDINGS, 1, 0.0)[0]
            raise ConfigError(
                f"base.quantize={self.quantize!r} is one of {', '.join(HOLDINGS)}; the nearest is {near!r}"
            )
        if self.quantize not in FORMATS and (self.block, self.double, self.loftq) != (None, None, None):
            raise ConfigError(
                f"base.block, base.double and base.loftq go with base.quantize={', '.join(FORMATS)}, which is "
                f"{self.quantize!r}"
            )

    @property
    def plain(self) -> bool:
        """Whether nothing is changed."""
        return self.quantize in (None, "none")

    @property
    def in_words(self) -> str:
        """For people: "nf4, blocks of 64, scales twice"."""
        if self.quantize not in FORMATS or not FORMATS[self.quantize].blocks:
            return str(self.quantize)
        twice = "" if self.double is False else ", scales in 8 bits"
        return f"{self.quantize}, blocks of {self.block or 64}{twice}"


UNDER_BASE = {"under": "base"}
"""Of a field that overrides know as a part of the base."""


@dataclass(frozen=True)
class Run:
    """A way to adapt the base. Full fine-tuning is a method like any other: `jlora.full()`.

    Attributes:
      name: of its folder, and in overrides: `runs.lora.method="dora(16)"`.
      label: in tables and plots.
      method: with its rank and all else that it takes.
      learning_rate: the peak; None for a sweep.
      rates: of a sweep with the first seed, ascending; the best on the validation split is used for all seeds. The
        experiment's where there is neither this nor a learning rate.
      targets: which weights, as in `jlora.apply`.
      extras: leaves trained as they are; a new head always is.
      family: runs of one family have one colour in the plots that compare many.
      held: how this run holds the base.
      slower: parts of the learning rate for some weights, {"text_encoder/": 0.1}, by patterns of their paths; the first
        that is found in a path holds.
    """

    name: str
    label: str
    method: jlora.Method
    learning_rate: float | None = None
    targets: str | None = None
    extras: str | None = None
    rates: tuple[float, ...] = ()
    family: str = ""
    held: Held = field(default=Held(), metadata=UNDER_BASE)
    slower: Mapping[str, float] | None = field(default=None, metadata=UNSAID)

    def __post_init__(self) -> None:
        if self.is_full and not self.held.plain:
            raise ConfigError(
                f"runs.{self.name}: full fine-tuning trains the weights themselves, which a base held in "
                f"{self.held.quantize} does not have: take a method with factors, such as lora(16), or leave "
                f"runs.{self.name}.base.quantize out"
            )
        if list(self.rates) != sorted(set(self.rates)) or any(rate <= 0 for rate in self.rates):
            raise ConfigError(f"runs.{self.name}.rates: positive and ascending; got {self.rates}")

    @property
    def is_full(self) -> bool:
        """Whether all weights are trained."""
        return any(part.name == "full" for part, _ in self.method.parts)


@dataclass(frozen=True)
class Measure:
    """Measurements of the runs beside their scores.

    Attributes:
      test: whether the runs are scored on the test split; without it the end is the sweep.
      rounds: how often the training steps are timed, in turn; 0 for not at all.
      relative_to: names of the runs that times are divided by; the first run when empty.
      forward_rounds: how often the forward passes are timed, the factors apart and merged; 0 for not at all.
      forward_batch: examples in such a pass.
    """

    test: bool = True
    rounds: int = 8
    relative_to: tuple[str, ...] = ()
    forward_rounds: int = 0
    forward_batch: int = 8


@dataclass(frozen=True)
class Save:
    """Files that are written at the end, beside the run's folder.

    Attributes:
      merged: a folder for the merged checkpoint of the run with its first seed; with several runs a folder in it for
        each. A local one, or its `file://` URL.
      adapter: the same for the adapter alone, in the format that other programs read: Hugging Face PEFT's, or that of
        diffusers for Stable Diffusion. Full fine-tuning has none.
    """

    merged: str | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class Experiment:
    """A base that is adapted to a task in several ways, side by side.

    Attributes:
      name: of the folder.
      base: a checkpoint, or how to pretrain one.
      task: the data, the loss and the scores.
      runs: each is trained with every seed.
      train: how.
      seeds: of a new head, the factors, dropout and the order of the examples.
      rates: for a sweep of the runs that have no rates of their own; they leave their learning rate aside.
      options: fields of a checkpoint's config: `{"dtype": "bfloat16", "remat": True, "dropout": 0.1}`.
      revision: of a repository.
      evaluate_batch: examples at a time in an evaluation.
      statistics: training batches that data-driven methods start from.
      measure: what else is measured.
      save: what is written beside the run's folder.
      held: how the base is held by all runs that say nothing else, full fine-tuning aside.
      mesh: the axes of the devices, {"fsdp": 8, "tp": 2} or "fsdp=8,tp=2", -1 for all that are left; see
        `jlora.sharding.MODELS`. None: one device, or "fsdp" over all of several processes. A run may go on with another
        mesh than it was begun with.
    """

    name: str
    base: Base
    task: Task
    runs: tuple[Run, ...]
    train: Schedule
    seeds: tuple[int, ...] = (0,)
    rates: tuple[float, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    revision: str | None = None
    evaluate_batch: int = 64
    statistics: int = 4
    measure: Measure = Measure()
    save: Save = Save()
    held: Held = field(default=Held(), metadata=UNDER_BASE)
    mesh: Mapping[str, int] | str | None = field(default=None, metadata=APART)

    def __post_init__(self) -> None:
        names = [run.name for run in self.runs]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"runs: at least one, and each with a name of its own; got {names}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"seeds: at least one, and no seed twice; got {self.seeds}")
        for name in ("evaluate_batch", "statistics"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is at least 1, got {getattr(self, name)}")
        absent = sorted(set(self.measure.relative_to) - set(names))
        if absent:
            raise ConfigError(f"measure.relative_to: {absent} are no runs of {self.name!r}")
        for run in self.runs:
            if not self.rates_of(run):
                raise ConfigError(f"runs.{run.name}: a learning_rate, or rates for a sweep")
        if not self.held.plain and all(run.is_full for run in self.runs):
            raise ConfigError(
                f"base.quantize={self.held.quantize}: full fine-tuning trains the weights themselves, and "
                f"{self.name!r} has no other runs: add one with a method such as lora(16)"
            )

    def held_by(self, run: Run) -> Held:
        """How a run holds the base."""
        return self.held if run.held.quantize is None and not run.is_full else run.held

    @property
    def held_by_all(self) -> Held:
        """How all runs hold the base, so that it need not be kept as it is; else as it is."""
        held = {(self.held_by(run), run.extras) for run in self.runs}
        own = any(self.held_by(run).loftq or is_taken_out(run.method) for run in self.runs)
        return next(iter(held))[0] if len(held) == 1 and not own else Held()

    def rates_of(self, run: Run) -> tuple[float, ...]:
        """The learning rates of a run: one, or those of a sweep."""
        return run.rates or self.rates or (() if run.learning_rate is None else (run.learning_rate,))

    @property
    def seed(self) -> int:
        """The first one: of a pretrained base, and of a sweep."""
        return self.seeds[0]


@dataclass(frozen=True)
class Study:
    """Several experiments by one command: `experiments.text.seeds=0` sets a field of one of them, `seeds=0` of all."""

    name: str
    experiments: tuple[Experiment, ...] = field(metadata=EACH)

    def __post_init__(self) -> None:
        names = [experiment.name for experiment in self.experiments]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"experiments: at least one, and each with a name of its own; got {names}")


def all_of(config: Experiment | Study) -> dict[str, Experiment]:
    """The experiments of a config, by the folder of each below the config's own."""
    if isinstance(config, Experiment):
        return {"": config}
    return {experiment.name: experiment for experiment in config.experiments}
