"""A model that draws learns a subject or a style from a few pictures (DreamBooth), or from many with captions.

The loss is that of the noise, epsilon or v as the model has it. Latents of all pictures, and embeddings of all prompts
where the text encoders stay as they are, are made once.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from experiments import devices, hosts, metrics
from experiments.config import ConfigError, Schedule
from experiments.data.pictures import Pictures, Sides, groups, read_pictures
from experiments.sheet import as_image, write_png
from experiments.tasks.judge import Judge
from experiments.tasks.latents import Drawn, Prompts, Rows, encoder_of, rows_of, whole
from experiments.tasks.task import (
    Apply,
    Batch,
    Domain,
    Evaluate,
    Files,
    Metric,
    Opened,
    Params,
    Scores,
    Sheet,
    Side,
    Split,
    digest_of,
)
from experiments.tasks.text_to_image import FromNothing, TextToImage, check_words, is_lifted, parts_of, pipeline_of
from jlora.interop.formats import DIFFUSERS_FILE
from jlora.models import diffusion
from jlora.models.diffusion import Pipeline
from jlora.models.diffusion.noise import add, min_snr_weight, offset_noise, target

LOSS = Metric("loss", "lower", "", 4)


class Splits(NamedTuple):
    """Pictures of a domain that the base knows, or shall know."""

    train: Pictures
    validation: Pictures
    test: Pictures


@dataclass(frozen=True)
class Prior:
    """Preservation of what the base knows of a class: to each batch as many pictures of it, drawn by the base.

    `loss = mean over the subject's pictures + weight * mean over the class'.`

    Attributes:
      prompt: of the class, "a dog"; "" for no preservation.
      images: pictures of the class.
      weight: lambda.
      folder: of pictures of the class, in place of those that the base draws.
      seed, steps, guidance, batch: of what the base draws. Picture i is that of key i of the seed, whatever the batch.

    Source: Ruiz et al., "DreamBooth", arXiv 2208.12242, eq. 2.
    """

    prompt: str = ""
    images: int = 100
    weight: float = 1.0
    folder: str = ""
    seed: int = 0
    steps: int = 50
    guidance: float | None = None
    batch: int = 4

    def __post_init__(self) -> None:
        if min(self.images, self.steps, self.batch) < 1 or self.weight < 0:
            raise ConfigError("task.prior: images, steps and batch are at least 1 each, and weight is not below 0")
        if self.folder and not self.prompt:
            raise ConfigError(
                "task.prior.folder has pictures of a class: name it, task.prior.prompt='a photo of a dog'"
            )


@dataclass(frozen=True)
class Drawing:
    """Pictures to look at, of the same prompts and seeds each time.

    Attributes:
      prompts: one for each row of a sheet; none for no sheets.
      each: pictures of a prompt.
      steps, guidance, sampler: as in `jlora.models.diffusion.generate`.
      seed: of the noise.
      batch: pictures at a time.
      judge: a CLIP checkpoint that scores those of the test split: CLIP-I, CLIP-T and diversity; "" for none.
    """

    prompts: tuple[str, ...] = ()
    each: int = 4
    steps: int = 25
    guidance: float | None = None
    sampler: str | None = None
    seed: int = 0
    batch: int = 4
    judge: str = ""

    def __post_init__(self) -> None:
        if min(self.each, self.steps, self.batch) < 1:
            raise ConfigError("task.drawing: each, steps and batch are at least 1 each")


@dataclass(frozen=True)
class Diffusion:
    """A task of pictures.

    Attributes:
      label: in titles.
      images: a folder of pictures, see `read_pictures`.
      prompt: the text of those without a caption.
      data: reads the pictures, in place of `images`.
      old: reads what the base knows, to see what of it is forgotten; what a base is pretrained on.
      prior: preservation of the class.
      size: side of the pictures in pixels; None for that of the model.
      crops: parts cut out of each picture at random places; 0 for its centre alone.
      flips: pictures also left to right.
      buckets: each picture is cut to one of several shapes with about as many pixels, near to its own.
      text_encoder: the text encoders are a part of what may be trained, under "text_encoder/"; else their embeddings
        are made once.
      min_snr: gamma of the loss's weights, see `jlora.models.diffusion.noise.min_snr_weight`; None for none.
      offset: strength of offset noise.
      empty: part of the old domain's texts that are left out while learning, so that guidance works.
      held_out: pictures at the end that are for validation and test. With 0 these are those to learn from, with noises
        of their own.
      bins: of timesteps: the loss is given for each.
      draws: noises of a held-out picture in each bin.
      drawing: pictures to look at.
    """

    label: str
    images: str = ""
    prompt: str = ""
    data: Callable[[], Pictures] | None = None
    old: Callable[[], Splits] | None = None
    prior: Prior = Prior()
    size: int | None = None
    crops: int = 0
    flips: bool = False
    buckets: bool = False
    text_encoder: bool = False
    min_snr: float | None = None
    offset: float = 0.0
    empty: float = 0.0
    held_out: int = 0
    bins: int = 4
    draws: int = 4
    drawing: Drawing = Drawing()

    def __post_init__(self) -> None:
        if min(self.bins, self.draws) < 1 or min(self.crops, self.held_out) < 0:
            raise ConfigError("task: bins and draws are at least 1 each, crops and held_out at least 0")
        if not 0 <= self.empty < 1 or self.offset < 0 or (self.min_snr is not None and self.min_snr <= 0):
            raise ConfigError("task: empty is in [0, 1), offset at least 0, min_snr above 0")
        if self.buckets and self.prior.prompt:
            raise ConfigError(
                "task.buckets: pictures of several shapes do not stand in a batch beside those of the class: leave "
                "task.buckets or task.prior.prompt out"
            )

    def open(self, source: Files | FromNothing, train: Schedule, evaluate_batch: int) -> Opened:
        """Reads the pipeline and the pictures, and makes latents and embeddings."""
        if isinstance(source, FromNothing) and (self.old is None or not self.text_encoder):
            raise ConfigError(
                "a base that is pretrained here learns task.old, and its text encoder with it: task.text_encoder=True"
            )
        pictures = self._pictures(source)
        return _Opening(self, source, pictures).opened(evaluate_batch)

    def _pictures(self, source: Files | FromNothing) -> Pictures:
        if self.data is not None:
            return self.data()
        if not self.images:
            raise ConfigError("task.images=... names no pictures: a folder with some of a subject or in a style")
        channels = source.unet.channels if isinstance(source, FromNothing) else 3
        return read_pictures(self.images, self.prompt, channels=channels)


class _Opening:
    """Parts of an opened task, in the order in which they need each other."""

    def __init__(self, task: Diffusion, source: Files | FromNothing, pictures: Pictures) -> None:
        if task.held_out and task.held_out >= len(pictures):
            raise ConfigError(f"task.held_out={task.held_out} of {len(pictures)} pictures leaves none to learn from")
        self.task, self.source = task, source
        self.pipeline = pipeline_of(source)
        kept = len(pictures) - task.held_out
        self.new = Splits(pictures[:kept], *([pictures[kept:] if task.held_out else pictures] * 2))
        self.old = None if task.old is None else task.old()
        unet: Any = self.pipeline.modules["unet"]
        vae: Any = self.pipeline.modules["vae"]
        self.side = unet.config.size * vae.config.factor if task.size is None else task.size
        if self.side % vae.config.factor or self.side < vae.config.factor:
            near = max(1, round(self.side / vae.config.factor)) * vae.config.factor
            raise ConfigError(f"task.size={self.side} is no multiple of {vae.config.factor}: {near} is")
        self.multiple = vae.config.factor * 2 ** (len(unet.config.widths) - 1)
        trained = {name: module for name, module in self.pipeline.modules.items() if name != "vae"}
        if not task.text_encoder:
            trained = {"unet": unet}
        self.model = TextToImage(trained, source if isinstance(source, FromNothing) else unet.config, self.pipeline.xl)
        texts = [*pictures.texts, task.prior.prompt, *task.drawing.prompts]
        texts += [text for split in self.old or () for text in split.texts]
        for tokenizer in self.pipeline.tokenizers.values():
            check_words(tokenizer, list(dict.fromkeys(texts)))
        self.prompts = Prompts(self.pipeline, task.text_encoder, texts)
        self.encode = encoder_of(self.pipeline)
        self.tree = [{name: self.pipeline.params[name] for name in trained if name in self.pipeline.params}]
        self.pipeline = self.pipeline.with_params(**{name: {} for name in trained})
        self.judge = Judge.load(task.drawing.judge) if task.drawing.judge else None
        self.prior: list[Rows] = []  # filled by `prepare`
        if task.prior.folder:
            self.prior = self._class_rows(
                read_pictures(task.prior.folder, task.prior.prompt, channels=pictures.channels)
            )

    # -- what the task offers --

    def opened(self, evaluate_batch: int) -> Opened:
        """All of it."""
        task, old = self.task, self.old
        rows = self._rows(self.new.train, crops=task.crops, flips=task.flips, buckets=task.buckets)
        digests = [split.digest() for split in old or ()]
        return Opened(
            model=self.model,
            params=self.params,
            new=Domain(self.new.train.label, len(self.new.train), functools.partial(self._new_batches, rows)),
            old=None if old is None else self._old_domain(old),
            loss=self.loss,
            outputs=self.outputs,
            evaluator=functools.partial(self.evaluator, evaluate_batch),
            selection_metric=LOSS,
            headline_metric=LOSS,
            held_out=self._held_out(),
            tokens=lambda batch: batch["mean"].shape[0] * batch["mean"].shape[1] * batch["mean"].shape[2],
            digest=digest_of([self.new.train.digest(), self.new.test.digest(), *digests]),
            understood=self._understood(rows),
            prepare=None if not task.prior.prompt or task.prior.folder else self.prepare,
            pictures=self.pictures if task.drawing.prompts else None,
            save=None if isinstance(self.source, FromNothing) else self.save,
            save_adapter=None if isinstance(self.source, FromNothing) else self.save_adapter,
            old_digest=digest_of(digests) if digests else "",
        )

    def params(self, seed: int, **held: Any) -> Params:
        """The tree of parameters; what a checkpoint holds in few bits is read so from the file on."""
        if isinstance(self.source, FromNothing):
            return self.source.params(seed)
        if held:
            self.tree.clear()
        if self.tree:
            return self.tree.pop()
        wanted = held.pop("quantize", None)
        parts = {
            name: held | ({} if wanted is None else {"quantize": _below(name, wanted)}) for name in self.model.modules
        }
        pipeline = diffusion.load(
            self.source.folder, parts=parts if wanted is not None else None, **self.source.options
        )
        return {name: pipeline.params[name] for name in self.model.modules}

    def save(self, folder: Path, params: Params) -> None:
        """Writes the whole pipeline, with these parameters."""
        diffusion.save(folder, self.pipeline.with_params(**parts_of(params)))

    def save_adapter(self, folder: Path, adapted: jlora.Adapted) -> None:
        """Writes the adapter as diffusers does."""
        folder.mkdir(parents=True, exist_ok=True)
        adapters = {name: own for name, own in parts_of(adapted).items() if isinstance(own, jlora.Adapted)}
        names = {name: self.pipeline.tables[name] for name in adapters}
        jlora.diffusers.save(folder / DIFFUSERS_FILE, adapters, names, force=True)

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> jax.Array:
        """The mean of the rows' weights times their errors."""
        noise, (of_latents, of_times, of_noise, of_offset) = self.pipeline.noise, jax.random.split(key, 4)
        x0 = batch["mean"]
        if "deviation" in batch:
            x0 = x0 + batch["deviation"] * jax.random.normal(of_latents, x0.shape, x0.dtype)
        times = jax.random.randint(of_times, x0.shape[:1], 0, noise.steps)
        eps = jax.random.normal(of_noise, x0.shape, x0.dtype)
        if self.task.offset:
            eps = offset_noise(of_offset, eps, self.task.offset)
        errors = self._errors(self.model.apply, params, batch, x0, eps, times)
        if self.task.min_snr is not None:
            errors = errors * min_snr_weight(noise, times, self.task.min_snr)
        return jnp.mean(batch["weight"] * errors)

    def outputs(self, apply: Apply, params: Params, batch: Batch) -> jax.Array:
        """Predictions halfway to noise."""
        times = jnp.full(batch["mean"].shape[:1], self.pipeline.noise.steps // 2)
        out: jax.Array = apply({"params": params}, batch["mean"], times, batch["texts"], batch["sizes"])
        return out

    def _errors(
        self, apply: Apply, params: Params, batch: Batch, x0: jax.Array, eps: jax.Array, times: jax.Array
    ) -> jax.Array:
        """Mean squared error of each row: (rows,)."""
        noise = self.pipeline.noise
        noisy = add(noise, x0, eps, times)
        out = apply({"params": params}, noisy, times, batch["texts"], batch["sizes"])
        return jnp.mean(jnp.square(out - target(noise, x0, eps, times)), axis=(1, 2, 3))

    # -- data --

    def _rows(self, pictures: Pictures, *, crops: int = 0, flips: bool = False, buckets: bool = False) -> list[Rows]:
        shapes = groups(pictures, Sides(self.side, self.side), buckets=buckets, multiple=self.multiple)
        return rows_of(pictures, shapes, self.encode, self.prompts, crops=crops, flips=flips)

    def _class_rows(self, pictures: Pictures) -> list[Rows]:
        return rows_of(pictures, whole(pictures, Sides(self.side, self.side)), self.encode, self.prompts)

    def _new_batches(self, rows: Sequence[Rows], batch: int, seed: int) -> Callable[[int], Batch]:
        """The subject's pictures, then as many of the class, where it is preserved."""
        subject, prior = Drawn(rows, self.prompts, batch, seed), self.task.prior
        if not prior.prompt:
            return lambda step: _weighted(subject(step), 1.0)

        def both(step: int) -> Batch:
            known = self.prior or [_blank(rows[0], self.prompts.numbers([prior.prompt]))]
            others = Drawn(known, self.prompts, batch, seed + _CLASS)
            parts = _weighted(subject(step), 2.0), _weighted(others(step), 2.0 * prior.weight)
            return jax.tree.map(lambda a, b: np.concatenate([a, b]), *parts)

        return both

    def _old_domain(self, old: Splits) -> Domain:
        @functools.cache
        def rows() -> list[Rows]:  # a base that is there already needs none
            return self._rows(old.train, flips=self.task.flips)

        def batches(batch: int, seed: int) -> Callable[[int], Batch]:
            drawn = Drawn(rows(), self.prompts, batch, seed, self.task.empty)
            return lambda step: _weighted(drawn(step), 1.0)

        return Domain(old.train.label, len(old.train), batches)

    def prepare(self, params: Params, folder: Path, say: Callable[[str], None]) -> None:
        """Pictures of the class, drawn by the base and kept as PNG; those that are there are not drawn again."""
        prior, place = self.task.prior, folder / "class_images"
        missing = hosts.by_first(lambda: _missing(place, prior.images))
        if missing:
            say(f"class     {len(missing)} pictures of {prior.prompt!r} are drawn by the base, into {place}")
        batch = devices.current().fitting(prior.batch)
        how = Drawing(steps=prior.steps, guidance=prior.guidance, seed=prior.seed, batch=batch)
        for start in range(0, len(missing), batch):
            some = missing[start : start + batch]
            images = self._drawn(params, [prior.prompt] * len(some), some, how)
            for number, pixels in zip(some, images, strict=True):
                write_png(place / f"{number:05d}.png", as_image(pixels))
        hosts.wait_for_all("the pictures of the class are there")
        channels = self.new.train.channels
        self.prior = self._class_rows(read_pictures(place, prior.prompt, channels=channels)[: prior.images])

    # -- evaluation --

    def evaluator(self, evaluate_batch: int, apply: Apply) -> Evaluate:
        """Losses on fixed noises at fixed timesteps, of each bin and of all; scores of pictures on the test split."""
        edges = np.linspace(0, self.pipeline.noise.steps, self.task.bins + 1).round().astype(int)
        here = devices.current()

        @jax.jit
        def errors(params: Params, batch: Batch) -> jax.Array:
            x0 = batch["mean"]
            draw = lambda number: jax.random.normal(jax.random.fold_in(jax.random.key(_FIXED), number), x0.shape[1:])
            return self._errors(apply, params, batch, x0, jax.vmap(draw)(batch["number"]), batch["times"])

        def evaluate(params: Params, split: Split, side: Side) -> Scores:
            found: list[list[float]] = [[] for _ in range(self.task.bins)]
            draws = self.task.draws if side == "new" else 1
            for rows in self._held_rows(side, split):
                plan = _plan(len(rows.texts), edges, draws, (_FIXED, _SPLITS[split]))
                for start in range(0, len(plan), evaluate_batch):
                    part = plan[np.minimum(np.arange(start, start + evaluate_batch), len(plan) - 1)]
                    batch = rows.batch(part[:, 0], np.zeros_like(part[:, 0]))
                    texts = self.prompts(rows.texts[part[:, 0]])
                    batch |= {"texts": texts, "times": part[:, 2], "number": part[:, 3]}
                    values = here.fetched(errors(params, here.put(batch)))[: len(plan) - start]
                    for which, value in zip(part[:, 1], values, strict=False):
                        found[which].append(float(value))
            scores = {LOSS.name: float(np.mean([np.mean(each) for each in found]))}
            for number, each in enumerate(found if self.task.bins > 1 else []):
                scores[f"t<{edges[number + 1]}"] = float(np.mean(each))
            return scores | (self._judged(params) if (split, side) == ("test", "new") else {})

        return evaluate

    @functools.cache  # noqa: B019 - as long-lived as the task
    def _held_rows(self, side: Side, split: Split) -> list[Rows]:
        splits = self.new if side == "new" else self.old
        assert splits is not None
        return self._rows(getattr(splits, split), buckets=self.task.buckets and side == "new")

    def _judged(self, params: Params) -> Scores:
        how = self.task.drawing
        if not how.prompts or how.each < 2:
            return {}
        sheet = self.pictures(params)
        if self.judge is None:
            return {"pixel diversity": metrics.spread(sheet.images)}
        made = self.judge.images(sheet.images.reshape(-1, *sheet.images.shape[2:]))
        real = self.judge.images(_pixels(self.new.train, self.side))
        texts = np.repeat(self.judge.texts(sheet.prompts), how.each, axis=0)
        return {
            "CLIP-I": metrics.likeness(made, real),
            "CLIP-T": metrics.agreement(made, texts),
            "diversity": metrics.diversity(made.reshape(len(sheet.prompts), how.each, -1)),
        }

    # -- pictures --

    def pictures(self, params: Params) -> Sheet:
        """Pictures of the sheet's prompts."""
        how = self.task.drawing
        prompts = [prompt for prompt in how.prompts for _ in range(how.each)]
        images = self._drawn(params, prompts, range(len(prompts)), how)
        return Sheet(how.prompts, images.reshape(len(how.prompts), how.each, *images.shape[1:]))

    @functools.cached_property
    def _rest(self) -> Pipeline:
        """The pipeline, with the parts that nothing trains on all devices."""
        return self.pipeline.with_params(**devices.current().beside(dict(self.pipeline.params)))

    def _drawn(self, params: Params, prompts: Sequence[str], numbers: Sequence[int], how: Drawing) -> np.ndarray:
        """A picture of each prompt, by the key of its number."""
        pipeline: Pipeline = self._rest.with_params(**parts_of(params))
        lift = jlora.lift if is_lifted(params) or any(map(is_lifted, pipeline.params.values())) else None
        keys, found, here = jax.random.key(how.seed), [], devices.current()
        batch = here.fitting(how.batch)
        for start in range(0, len(prompts), batch):
            places = np.minimum(np.arange(start, start + batch), len(prompts) - 1)
            own = jax.vmap(functools.partial(jax.random.fold_in, keys))(jnp.asarray([numbers[i] for i in places]))
            images = diffusion.generate(
                pipeline, [prompts[i] for i in places], key=own, steps=how.steps, guidance=how.guidance,
                sampler=how.sampler, height=self.side, width=self.side, lift=lift, sharding=here.rows,
            )  # fmt: skip
            found.append(here.fetched(images))
        return np.concatenate(found)[: len(prompts)]

    # -- for people --

    def _held_out(self) -> str:
        if self.task.held_out:
            return f"{self.task.held_out} of {len(self.new.train) + self.task.held_out} pictures held out"
        return "none is held out: losses are those of the same pictures with other noises"

    def _understood(self, rows: Sequence[Rows]) -> list[str]:
        task, train = self.task, self.new.train
        shapes = ", ".join(f"{len(group.texts)} of {group.mean.shape[2]} x {group.mean.shape[3]}" for group in rows)
        views = rows[0].mean.shape[1]
        own = f"; {train.captioned} with captions of their own" if train.captioned else ""
        lines = [
            f"data      {train.label}: {len(train)} pictures{own}; {self._held_out()}",
            f"latents   {shapes}, {rows[0].mean.shape[4]} channels, {views} view{'s' if views > 1 else ''} of each",
            f"text      {train.texts[0]!r}"
            + (f" and {len(set(train.texts)) - 1} others" if len(set(train.texts)) > 1 else "")
            + ("; the text encoder may be trained" if task.text_encoder else "; embeddings are made once"),
        ]
        if task.prior.prompt:
            where = f"of {task.prior.folder}" if task.prior.folder else f"{task.prior.images}, drawn by the base"
            lines.append(f"prior     {task.prior.prompt!r}, weight {task.prior.weight:g}: pictures {where}")
        return lines


_FIXED, _CLASS = 2**31 - 1, 1_000_003  # apart from the seeds of runs
_SPLITS = {"validation": 0, "test": 1}


def _weighted(batch: Batch, weight: float) -> Batch:
    rows = len(batch["mean"])
    return batch | {"weight": np.full(rows, weight, np.float32)}


def _missing(place: Path, images: int) -> list[int]:
    """Numbers of the pictures that are not in a folder yet."""
    place.mkdir(exist_ok=True)
    return [i for i in range(images) if not (place / f"{i:05d}.png").exists()]


def _blank(like: Rows, texts: np.ndarray) -> Rows:
    """One picture of zeros in the place of those that are not drawn yet: shapes are all that is asked of it."""
    mean, deviation, sizes, _ = like
    first = lambda array: np.zeros_like(array[:1, :1])
    return Rows(first(mean), None if deviation is None else first(deviation), first(sizes), texts)


def _plan(pictures: int, edges: np.ndarray, draws: int, seed: tuple[int, int]) -> np.ndarray:
    """(picture, bin, timestep, number of the noise) of each row of an evaluation."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[int, int, int, int]] = []
    for picture in range(pictures):
        for which, (low, high) in enumerate(itertools.pairwise(edges)):
            for _ in range(draws):
                rows.append((picture, which, int(rng.integers(low, high)), seed[1] * 10**6 + len(rows)))
    return np.asarray(rows, np.int32)


def _pixels(pictures: Pictures, side: int) -> np.ndarray:
    views = [pictures.view(i, Sides(side, side), crops=0, flips=False, seed=0).pixels[0] for i in range(len(pictures))]
    return np.stack(views).astype(np.float32) / np.float32(255)


def _below(part: str, wanted: Callable[[str, Any], str | None]) -> Callable[[str, Any], str | None]:
    """The choice of a format for a part's own paths."""
    return lambda path, like: wanted(f"{part}/{path}", like)
