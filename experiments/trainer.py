"""The programs of a run, each compiled once: its start, its step, its evaluation; and what runs share."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from experiments import devices, held
from experiments.average import average, averaged
from experiments.config import ConfigError, Experiment, Held, Run, Schedule, in_steps
from experiments.tasks.task import Apply, Batch, Evaluate, Opened, Params, Scores, Side, Split
from jlora import host, tree
from jlora.methods.residual import is_taken_out
from jlora.quant import FORMATS
from jlora.state import TrainState
from jlora.train import Step, train_step


class Shared:
    """Common parts of all runs of an experiment: the task, its sites, the base, one evaluation of plain parameters.

    Attributes:
      opened: the task.
      sites: of its loss.
      statistics: training batches that data-driven methods start from.
      already: how the parameters are held that come, where all runs have them so; None for as they are.
      stored: whether some of those are held in few bits, as a checkpoint's may be by itself.
    """

    def __init__(
        self,
        opened: Opened,
        sites: tuple[jlora.Site, ...],
        statistics: int,
        already: Held | None = None,
        *,
        stored: bool = False,
    ) -> None:
        self.opened, self.sites, self.statistics, self.already, self.stored = opened, sites, statistics, already, stored
        self._held: dict[tuple[Held, str], tuple[Params, Params]] = {}

    @functools.cached_property
    def plain(self) -> Evaluate:
        """The scores of plain parameters."""
        return self.opened.evaluator(self.opened.model.apply)

    @property
    def apply(self) -> Apply:
        """The model's function of the base as it is kept."""
        return self.opened.model.apply if not self.stored else jlora.lift(self.opened.model.apply)

    @functools.cached_property
    def of_base(self) -> Evaluate:
        """The scores of the base as it is kept."""
        return self.plain if not self.stored else self.opened.evaluator(self.apply)

    def held(self, run: Run, params: Params) -> Params:
        """The base as a run holds it; runs that hold it alike share it. One that is held so already stays."""
        key = run.held, self.kept(run)
        if key not in self._held or self._held[key][0] is not params:
            self._held = {key: pair for key, pair in self._held.items() if pair[0] is params}  # another seed's go
            self._held[key] = params, self.hold(run, params)
        return self._held[key][1]

    def hold(self, run: Run, params: Params) -> Params:
        """The same, made anew; shapes of shapes."""
        if run.held == self.already:
            return params
        return held.hold(params, run.held, self.sites, self.kept(run))

    def kept(self, run: Run) -> str:
        """A pattern of what a run trains as it is."""
        return pattern_of(self.opened.head, run.extras)

    @functools.cached_property
    def merge(self) -> Callable[[jlora.Adapted], Params]:
        """Plain parameters again."""
        return jax.jit(jlora.merge)

    @classmethod
    def of(cls, experiment: Experiment, opened: Opened, params: Params) -> "Shared":
        """Shared parts of an experiment. Axes are read from the loss: no name says those of stacked layers."""
        already = experiment.held_by_all
        sites = sites_of(experiment, opened, params)
        stored = any(map(tree.is_stored, tree.leaves(params)[0].values()))
        return cls(opened, sites, experiment.statistics, None if already.plain else already, stored=stored)


def sites_of(experiment: Experiment, opened: Opened, params: Params) -> tuple[jlora.Site, ...]:
    """The sites of the loss, for parameters or their shapes, of which some may be held in few bits."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params, is_leaf=tree.is_stored)
    batch = opened.new.batches(experiment.train.batch, 0)(0)
    return jlora.sites(opened.loss, shapes, batch, jax.random.key(0))


def pattern_of(*patterns: str | None) -> str:
    """A pattern that fits what one of several fits; "" of none."""
    return "|".join(f"(?:{pattern})" for pattern in patterns if pattern)


@dataclass(frozen=True, eq=False)
class Trainer:
    """A run's programs: each is compiled once, for all seeds and learning rates.

    Attributes:
      run: what is trained.
      shared: with the other runs.
      schedule: how it is trained.
      first_rate: that the step is made at. The rate lies in the optimizer's state, so that it is another one's too.
      side: the domain that is learned.
    """

    run: Run
    shared: Shared
    schedule: Schedule
    first_rate: float
    side: Side = "new"

    @property
    def opened(self) -> Opened:
        """The task."""
        return self.shared.opened

    @property
    def steps(self) -> int:
        """Number of steps of the run."""
        return self.in_steps(self.schedule.steps)

    def in_steps(self, duration: int | str) -> int:
        """A duration in this run's steps."""
        return in_steps(duration, batch=self.schedule.batch, examples=self.opened.domain(self.side).examples)

    def is_evaluated(self, step: int) -> bool:
        """Whether the run is scored on the validation split after a step.

        Half a period before the last evaluation there is no other: 155 steps by 77 have two, not three.
        """
        every = self.in_steps(self.schedule.evaluate_every)
        return step == self.steps or (step > 0 and step % every == 0 and self.steps - step >= every / 2)

    def tokens(self, batch: Batch) -> int:
        """How many tokens a batch has that are no padding; of one of several processes, as its own rows have."""
        rows = max(len(x) for x in jax.tree.leaves(batch) if np.ndim(x))
        return self.opened.tokens(batch) * self.rows // rows

    def batches(self, seed: int) -> Callable[[int], Batch]:
        """Step -> the training batch, or the rows of it that are this process's."""
        return devices.current().own(self.whole_batches(seed), self.rows)

    def whole_batches(self, seed: int) -> Callable[[int], Batch]:
        """Step -> all rows of the training batch."""
        return self.opened.domain(self.side).batches(self.schedule.batch, seed)

    @functools.cached_property
    def rows(self) -> int:
        """Number of rows of a training batch: a task may add some to those of the schedule."""
        batch = self.whole_batches(0)(0)
        return max(len(x) for x in jax.tree.leaves(batch) if np.ndim(x))

    @functools.cached_property
    def step(self) -> Step:
        """The training step, for every learning rate."""
        here, tx = devices.current(), self.optimizer(self.first_rate)
        return train_step(
            self.opened.loss, tx, pass_key=True, accumulate=self.schedule.accumulate, mesh=here.mesh, layout=here.layout
        )

    def optimizer(self, learning_rate: float) -> optax.GradientTransformation:
        """The optimizer at a rate; its states are alike for all of them."""
        return optimizer(self.schedule, learning_rate, self.steps, self.run.slower)

    @functools.cached_property
    def apply(self) -> Apply:
        """The model's function for an evaluation: as it is with merged weights, lifted where there are none."""
        return self.opened.model.apply if self.merges else jlora.lift(self.opened.model.apply)

    @property
    def merges(self) -> bool:
        """Whether the method gives plain weights, and those of the base take the update without rounding it away."""
        takes = self.run.held.plain and not self.shared.stored and self.opened.model.config.param_dtype == "float32"
        return takes and not self.run.method.acts.unmergeable

    def held(self, params: Params, seed: int) -> Params:
        """The base as the run holds it: a run's own where it is less what the factors start from (LoftQ, QPiSSA)."""
        if not self.starts_from_base:
            return self.shared.held(self.run, params)
        return self._started(seed, params).base

    def _started(self, seed: int, params: Params) -> jlora.Adapted:
        """The start of a run whose base is its own, the last one kept: it takes singular values of every weight."""
        if self._own.get("of") != (id(params), seed):
            plain = self._beside(params, devices.current().beside(jax.random.key(seed))).replace(base=params)
            adapted = held.hold_adapted(plain, self.run.held, self.shared.sites, self.shared.kept(self.run))
            self._own.update(of=(id(params), seed), params=params, adapted=adapted)
        adapted = self._own["adapted"]
        # A training step gives its factors away.
        return jax.tree.map(jnp.copy, adapted.replace(base=None)).replace(base=adapted.base)

    @functools.cached_property
    def _own(self) -> dict[str, Any]:
        return {}

    @property
    def starts_from_base(self) -> bool:
        """Whether the factors' start is taken out of the base before it is quantised."""
        run = self.run
        return run.held.quantize in FORMATS and (run.held.loftq is not None or is_taken_out(run.method))

    def merged(self, adapted: jlora.Adapted) -> Params:
        """Parameters as `apply` takes them."""
        return self.shared.merge(adapted) if self.merges else adapted

    @functools.cached_property
    def _evaluator(self) -> Evaluate:
        return self.shared.plain if self.merges else self.opened.evaluator(self.apply)

    def evaluate(self, adapted: jlora.Adapted, split: Split) -> tuple[Scores, Scores | None]:
        """The scores of adapted parameters, of the new domain and of the old one."""
        params, old = self.merged(adapted), None
        new = self._evaluator(params, split, "new")
        if self.opened.old is not None:
            old = self._evaluator(params, split, "old")
        return new, old

    def adapted(self, seed: int, params: Params) -> jlora.Adapted:
        """The base, held as the run has it, with initial factors."""
        if self.starts_from_base:
            return self._started(seed, params)
        params = self.shared.held(self.run, params)
        run, opened, statistic = self.run, self.opened, self.run.method.acts.statistic
        if not statistic:
            return self._beside(params, devices.current().beside(jax.random.key(seed))).replace(base=params)
        batches, sites, here = self.whole_batches(seed), self.shared.sites, devices.current()
        loss = lambda params, batch: opened.loss(params, batch, jax.random.key(seed))
        some = [batches(i) if here.mesh is None else here.put(batches(i)) for i in range(self.shared.statistics)]
        found = jlora.measure(loss, params, some, sites, statistic, targets=run.targets)
        return self._apply(params, jax.random.key(seed), statistics=found)

    def _apply(self, params: Params, key: jax.Array, **statistics: Any) -> jlora.Adapted:
        run = self.run
        extras = self.shared.kept(run)
        options = statistics | ({"extras": extras} if extras else {})
        return jlora.apply(params, method=run.method, targets=run.targets, sites=self.shared.sites, key=key, **options)

    @functools.cached_property
    def _beside(self) -> Callable[[Params, jax.Array], jlora.Adapted]:
        """All of an adapter but its base, which is not copied. One program for all shapes of factors and all seeds."""
        return jax.jit(lambda params, key: self._apply(params, key).replace(base=None))

    def planned(self, params: Params) -> jlora.Adapted:
        """Shapes of the start: a base that is quantised with its factors has those of one that is quantised alone."""
        base = self.shared.hold(self.run, params)
        return self._apply(params, jax.random.key(0)).replace(base=base)

    def start(self, seed: int, params: Params, learning_rate: float | None = None) -> TrainState:
        """The state before the first step."""
        rate = self.first_rate if learning_rate is None else learning_rate
        kind = self.schedule.memory_kind
        state = TrainState.create(self.adapted(seed, params), self.optimizer(rate), key=seed, memory_kind=kind)
        return devices.current().beside(state)

    def result(self, state: TrainState) -> jlora.Adapted:
        """The adapter of a state as it is evaluated and kept: with averages of the factors, where there are some."""
        return state.adapted if self.schedule.ema is None else averaged(state, self.schedule.ema)

    def check(self, shapes: Params) -> None:
        """Finds a run that cannot be, on abstract parameters, before anything is trained.

        Raises:
          ConfigError: naming the run.
        """
        method, steps = self.run.method, self.steps
        total = dict(method.config).get("total_steps", steps)
        if total != steps:
            raise ConfigError(
                f"runs.{self.run.name}: {method.name} is made for total_steps={total}, and the run has {steps} steps"
            )
        run = self.run
        if method.acts.statistic:  # abstract parameters have no data to start from
            run = dataclasses.replace(run, method=jlora.lora(method.rank or 1))
        trainer = dataclasses.replace(self, run=run)
        try:
            self.optimizer(self.first_rate)
            found = jax.eval_shape(trainer.planned, shapes)
            _slowed(self.run.slower or {}).init(found.factors)
        except ValueError as error:
            raise ConfigError(f"runs.{self.run.name}: {error}") from error


def check_memory(name: str, schedule: Schedule) -> None:
    """Raises ConfigError where the optimizer's state cannot wait where the schedule called `name` has it."""
    try:
        host.check_programs(schedule.memory_kind)
    except ValueError as error:
        raise ConfigError(f"{name}.optimizer_memory={schedule.optimizer_memory}: {error}") from error


def optimizer(
    schedule: Schedule, learning_rate: float, steps: int, slower: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """AdamW with the schedule's warm-up and decay, its peak rate in the state.

    Args:
      schedule: of the rate.
      learning_rate: its peak.
      steps: of the run.
      slower: patterns of paths, and the part of the rate that these weights have: see `Run`.

    Raises:
      ConfigError: if no step is left after the warm-up.
    """
    warmup = round(schedule.warmup if schedule.warmup >= 1 else schedule.warmup * steps)
    if warmup >= steps:
        raise ConfigError(
            f"train.warmup={schedule.warmup:g} is {warmup} of the run's {steps} steps: none is left after it"
        )

    def adamw(peak: Any) -> optax.GradientTransformation:
        after: Any = {
            "linear": lambda: optax.linear_schedule(peak, 0.0, steps - warmup),
            "cosine": lambda: optax.cosine_decay_schedule(peak, steps - warmup),
            "constant": lambda: optax.constant_schedule(peak),
        }[schedule.decay]()
        rate = optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])
        rule = optax.adamw(
            rate, b1=schedule.b1, b2=schedule.b2, eps=schedule.epsilon, weight_decay=schedule.weight_decay
        )
        return rule if schedule.clip is None else optax.chain(optax.clip_by_global_norm(schedule.clip), rule)

    made: optax.GradientTransformation = optax.inject_hyperparams(adamw, hyperparam_dtype=jnp.float32)(
        peak=learning_rate
    )
    if slower:
        made = optax.chain(made, _slowed(slower))
    return made if schedule.ema is None else optax.chain(made, average(schedule.ema))


def _slowed(parts: Mapping[str, float]) -> optax.GradientTransformation:
    """Updates by path, each times the part of the first pattern that is found in its path."""

    def pattern_of(path: str) -> str | None:
        return next((pattern for pattern in parts if re.search(pattern, path)), None)

    def init(params: Params) -> optax.OptState:
        unused = [pattern for pattern in parts if pattern not in map(pattern_of, params)]
        if unused:
            raise ValueError(f"slower: {unused[0]!r} is the first found in no path of a weight that is trained")
        return optax.EmptyState()

    def update(updates: Params, state: optax.OptState, params: Params = None) -> tuple[Params, optax.OptState]:
        part = {path: parts.get(pattern_of(path) or "", 1.0) for path in updates}
        return {path: jax.tree.map(lambda x, p=part[path]: x * p, own) for path, own in updates.items()}, state

    return optax.GradientTransformation(init, update)
