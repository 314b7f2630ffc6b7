"""How a model is fine-tuned, whatever the task: the method, the schedule, and how texts are made in an evaluation."""

from dataclasses import dataclass
from typing import Literal

import jlora
from experiments.config import ConfigError, Duration, in_steps
from jlora import models


@dataclass(frozen=True)
class Run:
    """A way to fine-tune.

    Attributes:
      name: of its folder, and in overrides: `runs.lora.learning_rate=1e-3`.
      label: in tables and plots.
      method: with its rank and all else that it takes; dropout of the factors is `jlora.lora(..., dropout=)`.
      learning_rate: the peak.
      targets: which weights, as in `jlora.apply`.
      extras: leaves trained as they are; the new head always is.
    """

    name: str
    label: str
    method: jlora.Method
    learning_rate: float
    targets: str | None = None
    extras: str | None = None


@dataclass(frozen=True)
class Schedule:
    """How a run trains: AdamW, a linear warm-up, then a line or a cosine to zero, or a constant rate.

    Attributes:
      length: of a run: "3 epochs", "5000 examples" or a number of steps.
      batch: examples per step.
      evaluate_every: between evaluations on the validation split; each of them may become the run's result.
      warmup: steps, or below 1 a fraction of all steps.
      decay: of the rate after the warm-up.
      weight_decay, b1, b2, epsilon: of AdamW.
      clip: the largest norm of a gradient; None for no bound.
      label_smoothing: of the loss, in [0, 1).
      accumulate: micro-batches that a step is cut into.
    """

    length: Duration
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

    def __post_init__(self) -> None:
        if self.batch < 1 or self.accumulate < 1 or self.batch % self.accumulate:
            raise ConfigError(
                f"train.batch={self.batch} is not at least 1 and a multiple of accumulate={self.accumulate}"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"train.label_smoothing is in [0, 1), got {self.label_smoothing}")
        for duration in (self.length, self.evaluate_every):
            in_steps(duration, batch=1, examples=1000)


@dataclass(frozen=True)
class Decoding:
    """How texts are made from prompts when a language model is evaluated.

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
    def sampling(self) -> models.Sampling:
        """How a token is chosen without beams."""
        return models.Sampling(self.temperature, None, self.top_p, self.no_repeat_ngram)
