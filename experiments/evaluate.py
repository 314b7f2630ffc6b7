"""The loss of a language model of bytes, and its mean over a text: bits per byte."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import jlora

Params = Any
LossFn = Callable[[Params, jax.Array], jax.Array]


@dataclass(frozen=True)
class Scores:
    """Bits per byte on the two domains; uniform guessing has 8."""

    new: float
    old: float


@dataclass(frozen=True)
class Point:
    """One point of a learning curve: bits per byte, `train` averaged over the steps since the point before."""

    step: int
    train: float | None
    new: float
    old: float


def window_losses(model: nn.Module) -> LossFn:
    """(params, windows (batch, length + 1)) -> the mean loss of each window in nats per byte: (batch,)."""

    def losses(params: Params, windows: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, windows[:, :-1])  # (batch, length, 256)
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean(axis=1)

    return losses


def mean_loss(model: nn.Module) -> LossFn:
    """The same, averaged over the batch: what is trained."""
    losses = window_losses(model)
    return lambda params, windows: losses(params, windows).mean()


def bits(nats: float) -> float:
    """Nats to bits."""
    return nats / math.log(2)


class Evaluator:
    """Bits per byte of parameters on fixed windows of both domains, by one program for all runs of a model."""

    def __init__(self, model: nn.Module, windows: dict[str, tuple[np.ndarray, np.ndarray]], batch: int) -> None:
        """`windows` are the new and the old domain's, (count, length + 1), by split; `batch` of them go at a time."""

        def logits(params: Params, tokens: jax.Array) -> Any:
            return model.apply({"params": params}, tokens)

        self._losses = jax.jit(window_losses(model))
        self._logits = jax.jit(logits)
        self._lifted = jax.jit(jlora.lift(logits))
        self._merge = jax.jit(jlora.merge)
        self._windows = windows
        self._batch = batch

    def __call__(self, params: Params, split: str) -> Scores:
        """Params are plain or an `Adapted`, which is merged first: one evaluation is cheaper so, and exact."""
        plain = self._merge(params) if isinstance(params, jlora.Adapted) else params
        new, old = self._windows[split]
        return Scores(new=self._bits_per_byte(plain, new), old=self._bits_per_byte(plain, old))

    def difference(self, adapted: jlora.Adapted) -> float:
        """The largest absolute difference between the logits of the lifted and of the merged model, on test windows."""
        new, _ = self._windows["test"]
        tokens = jnp.asarray(_filled(new, self._batch)[:, :-1])
        return float(jnp.abs(self._lifted(adapted, tokens) - self._logits(self._merge(adapted), tokens)).max())

    def _bits_per_byte(self, params: Params, windows: np.ndarray) -> float:
        parts: Sequence[jax.Array] = [
            self._losses(params, jax.device_put(_filled(windows[i : i + self._batch], self._batch)))
            for i in range(0, len(windows), self._batch)
        ]
        losses = np.concatenate(jax.device_get(parts))[: len(windows)]
        return bits(float(losses.mean(dtype=np.float64)))


def _filled(windows: np.ndarray, batch: int) -> np.ndarray:
    """A whole batch, the last window repeated: every call has the same shape and compiles once."""
    return windows[np.minimum(np.arange(batch), len(windows) - 1)]
