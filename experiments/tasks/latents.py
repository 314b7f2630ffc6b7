"""Latents of pictures and conditions of prompts, made once, and batches of them as a function of the step."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.pictures import Pictures, Sides, groups
from experiments.tasks.task import Batch
from jlora.models import diffusion
from jlora.models.diffusion import Pipeline, Pixels
from jlora.models.diffusion.pipeline import TEXTS

EMBEDDED = 16  # prompts at a time


class Rows(NamedTuple):
    """Pictures of one shape, as a UNet sees them, (pictures, views, ...) each.

    Attributes:
      mean: of the latents, scaled, float32; of a model that draws pixels, those, uint8.
      deviation: of the latents, scaled; None where there is none.
      sizes: six each, see `Views`.
      texts: (pictures,), numbers of their texts.
    """

    mean: np.ndarray
    deviation: np.ndarray | None
    sizes: np.ndarray
    texts: np.ndarray

    def batch(self, pictures: np.ndarray, views: np.ndarray) -> Batch:
        """Some of them: (rows, height, width, channels) and (rows, 6)."""
        mean = self.mean[pictures, views]
        if mean.dtype == np.uint8:
            mean = mean.astype(np.float32) / np.float32(127.5) - np.float32(1)
        found = {"mean": mean, "sizes": self.sizes[pictures, views]}
        return found if self.deviation is None else found | {"deviation": self.deviation[pictures, views]}


class Prompts:
    """Conditions of prompts by their numbers: embeddings, or tokens where the text encoders are trained.

    Attributes:
      texts: the prompts, each once; the first is "".
    """

    def __init__(self, pipeline: Pipeline, trained: bool, texts: Sequence[str]) -> None:
        self.texts = list(dict.fromkeys(["", *texts]))
        self._numbers = {text: number for number, text in enumerate(self.texts)}
        modules: dict[str, Any] = {name: pipeline.modules[name] for name in TEXTS if name in pipeline.modules}
        self._tokens = tuple(
            diffusion.tokens_of(pipeline.tokenizers[name], self.texts, context=module.config.context)
            for name, module in modules.items()
        )
        self._encoded: dict[str, np.ndarray] = {}
        if not trained:
            params = [pipeline.params[name] for name in modules]
            encode = jax.jit(functools.partial(diffusion.encode, list(modules.values()), xl=pipeline.xl))
            self._encoded = _in_parts(lambda tokens: encode(params, tokens)._asdict(), self._tokens, len(self.texts))

    def numbers(self, texts: Sequence[str]) -> np.ndarray:
        """Numbers of texts."""
        return np.asarray([self._numbers[text] for text in texts], np.int32)

    def __call__(self, numbers: np.ndarray) -> dict[str, Any]:
        """Conditions of the texts of some rows."""
        if self._encoded:
            return {name: array[numbers] for name, array in self._encoded.items()}
        return {"tokens": tuple(tokens[numbers] for tokens in self._tokens)}


def _in_parts(call: Callable[..., Any], tokens: tuple[np.ndarray, ...], count: int) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {}
    for start in range(0, count, EMBEDDED):
        places = np.minimum(np.arange(start, start + EMBEDDED), count - 1)
        for name, array in jax.device_get(call([rows[places] for rows in tokens])).items():
            if array is not None:
                found.setdefault(name, []).append(array)
    return {name: np.concatenate(parts)[:count] for name, parts in found.items()}


def encoder_of(pipeline: Pipeline) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]:
    """Pixels (views, height, width, channels) uint8 -> mean and deviation of their latents, scaled."""
    vae: Any = pipeline.modules["vae"]
    if isinstance(vae, Pixels):
        return lambda pixels: (pixels, None)

    @jax.jit
    def encode(params: Any, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = vae.apply({"params": params}, pixels.astype(jnp.float32) / 127.5 - 1, method="encode")
        return vae.config.scaling * found["mean"], vae.config.scaling * jnp.exp(found["logvar"] / 2)

    def encoded(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, deviation = jax.device_get(encode(pipeline.params["vae"], jax.device_put(pixels)))
        return mean, deviation

    return encoded


def rows_of(
    pictures: Pictures,
    shapes: Sequence[tuple[Sides, Sequence[int]]],
    encode: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]],
    prompts: Prompts,
    *,
    crops: int = 0,
    flips: bool = False,
    seed: int = 0,
) -> list[Rows]:
    """Latents of all views of pictures, by their shapes; one picture at a time is in memory as pixels.

    Args:
      pictures: to be read.
      shapes: see `groups`.
      encode: of `encoder_of`.
      prompts: with their texts.
      crops, flips, seed: of the views.
    """
    found = []
    for sides, numbers in shapes:
        means, deviations, sizes = [], [], []
        for number in numbers:
            views = pictures.view(number, sides, crops=crops, flips=flips, seed=seed)
            mean, deviation = encode(views.pixels)
            means.append(mean)
            sizes.append(views.sizes)
            if deviation is not None:
                deviations.append(deviation)
        texts = prompts.numbers([pictures.texts[number] for number in numbers])
        found.append(Rows(np.stack(means), np.stack(deviations) if deviations else None, np.stack(sizes), texts))
    return found


def whole(pictures: Pictures, sides: Sides) -> list[tuple[Sides, list[int]]]:
    """All pictures in one shape."""
    return groups(pictures, sides, buckets=False, multiple=1)


@dataclass(frozen=True, eq=False)
class Drawn:
    """Batches of pictures in random order, each once per epoch, a random view of each; a function of the step alone.

    Where there are several shapes, all rows of a batch have one, and shapes take turns at random, each as often as it
    fills batches.

    Attributes:
      rows: by shape.
      prompts: with their texts.
      batch: rows of a batch.
      seed: of order and views.
      empty: part of the rows whose text is "", in [0, 1).
    """

    rows: Sequence[Rows]
    prompts: Prompts
    batch: int
    seed: int
    empty: float = 0.0

    def __call__(self, step: int) -> Batch:
        """The batch of a step, with its conditions under "texts"."""
        shape, use = self._turn(step)
        rows = self.rows[shape]
        count = len(rows.texts)
        places = [
            _order(self.seed, shape, *divmod(example, count), count)
            for example in range(use * self.batch, (use + 1) * self.batch)
        ]
        pictures = np.asarray(places)
        rng = np.random.default_rng((self.seed, _VIEW, step))
        views = rng.integers(rows.mean.shape[1], size=self.batch)
        texts = np.where(rng.random(self.batch) < self.empty, 0, rows.texts[pictures])
        return rows.batch(pictures, views) | {"texts": self.prompts(texts)}

    def _turn(self, step: int) -> tuple[int, int]:
        """The shape of a step, and how many batches of that shape were before it."""
        if len(self.rows) == 1:
            return 0, step
        counts = [-(-len(rows.texts) // self.batch) for rows in self.rows]
        turns = np.repeat(np.arange(len(counts)), counts)
        around, place = divmod(step, len(turns))
        order = np.random.default_rng((self.seed, _TURN, around)).permutation(turns)
        shape = int(order[place])
        return shape, around * counts[shape] + int((order[:place] == shape).sum())


_ORDER, _VIEW, _TURN = 0, 1, 2


def _order(seed: int, shape: int, epoch: int, place: int, count: int) -> int:
    return int(_permutation(seed, shape, epoch, count)[place])


@functools.lru_cache(maxsize=16)
def _permutation(seed: int, shape: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, _ORDER, shape, epoch)).permutation(count)
