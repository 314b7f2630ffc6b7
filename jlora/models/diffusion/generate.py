"""Images from prompts: from noise, from an image, or in a mask, in one compiled program whose steps are a scan."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from jlora.models import bnb_tensors, placed
from jlora.models.diffusion import scheduler_config
from jlora.models.diffusion.noise import Noise
from jlora.models.diffusion.pipeline import TEXTS, Pipeline
from jlora.models.diffusion.prompts import Encoded, Long, encode, tokens_of
from jlora.models.diffusion.tables import Sampler
from jlora.models.resnet import nearest
from jlora.models.vae import sampled

Lift = Callable[[Callable[..., Any]], Callable[..., Any]]
Choice = str | Callable[[Noise, int], Sampler] | None
GUIDANCE = {False: 7.5, True: 5.0}  # of SD and of SDXL, as in diffusers from a text
STRENGTH = {False: 0.8, True: 0.3}  # the same, from an image


class Setting(NamedTuple):
    """Static arguments of the program."""

    modules: tuple[tuple[str, nn.Module], ...]
    noise: Noise
    sampler: str | Callable[[Noise, int], Sampler]
    steps: int
    first: int  # step to begin with
    guided: bool
    rescaled: bool
    clip_skip: int
    xl: bool
    lift: Lift | None
    sharding: jax.sharding.Sharding | None


class Inputs(NamedTuple):
    """Arrays of the program; None for what is not there. Rows are images."""

    tokens: tuple[jax.Array, ...]  # (rows, length) for each text encoder
    negative: tuple[jax.Array, ...] | None
    keys: jax.Array  # (rows,)
    eps: jax.Array  # the noise at the start, (rows, height, width, channels)
    sizes: jax.Array  # (rows, 6)
    guidance: jax.Array
    rescale: jax.Array
    image: jax.Array | None  # (rows, height, width, channels) in [0, 1], or its latents, scaled
    mask: jax.Array | None  # (rows, height, width, 1) of the image, 1 where to paint


def generate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    *,
    key: jax.Array,
    negative: Sequence[str] | None = None,
    steps: int = 50,
    guidance: float | None = None,
    sampler: Choice = None,
    height: int | None = None,
    width: int | None = None,
    latents: jax.Array | None = None,
    image: jax.Array | np.ndarray | None = None,
    mask: jax.Array | np.ndarray | None = None,
    strength: float | None = None,
    rescale: float = 0.0,
    sizes: jax.Array | np.ndarray | None = None,
    clip_skip: int | None = None,
    long: Long = "raise",
    lift: Lift | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> jax.Array:
    """Images of prompts, all at once; one program for each shape and setting.

    Classifier-free guidance with scale s: `e = e_negative + s (e_prompt - e_negative)`, both in one batch.

    Args:
      pipeline: as `load` gives it. Its parameters may be adapted or quantised, with `lift`.
      prompts: one for each image; say one several times for several images of it.
      key: of the random numbers, or (prompts,) keys, one for each image: which images are drawn beside it, an image
        does not see.
      negative: for each image what is not to be seen; None for nothing ("", or SDXL's zeros).
      steps: of the sampler.
      guidance: s; 7.5, and 5.0 of SDXL, when None. Up to 1 there is none, as in diffusers (Turbo models say 0):
        negative prompts and `rescale` are not looked at.
      sampler: a name in `samplers`, such as "dpmpp_2m"; a function of noise and steps, which is kept by the caller, for
        a new one compiles anew; or None for the pipeline's.
      height, width: of the images, in pixels: multiples of the autoencoder's factor, 8. When None those of `image`, or
        those that the UNet was trained with.
      latents: noise to start with, (images, height / 8, width / 8, channels), normal; drawn by `key` when None.
      image: to start from, (images, height, width, channels) in [0, 1]; or its latents as the UNet sees them.
      mask: where to paint in `image`, (images, height, width, 1), 1 there and 0 elsewhere, parted at 0.5. By a UNet of
        9 channels, or by any: it sees at each step the image, with its noise, where the mask is 0.
      strength: part of the steps that are made from `image`, in (0, 1]; when None 0.8, of SDXL
        0.3, and 1 with a mask.
      rescale: phi of Lin et al.: a share of the prediction is brought to the deviation that e_prompt has.
      sizes: SDXL's (images, 6), see `UNet`; when None those of a whole image of this height and width.
      clip_skip: blocks of the text encoders to leave out at the end, as in diffusers.
      long: a prompt of over 77 tokens is an error, "raise", or is "cut", or encoded in pieces, "chunk".
      lift: for adapted or quantised parameters: `jlora.lift`. Keep a partial of it: a new one compiles anew.
      sharding: of the images over devices, one axis. The parameters lie where the caller has them; where that is a
        mesh with Explicit axes and there is no sharding, each device makes all images.

    Returns:
      (images, height, width, channels), float32, in [0, 1].

    Raises:
      ValueError: for numbers of prompts, keys, images and masks that differ, sides that are no multiples of 8, shapes
        and values of other inputs, a strength outside (0, 1], an unknown sampler, a mask without an image, a UNet that
        paints in masks without one, adapted parameters without `lift`, a sharding that does not fit.
      TypeError: for a key that is none, one string in place of a list.
      FloatingPointError: if an image is NaN, as of a VAE in float16.

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance", arXiv 2207.12598, eq. 6; Lin et al., "Common
    Diffusion Noise Schedules and Sample Steps are Flawed", arXiv 2305.08891, eq. 14 to 16 (rescale).
    """
    _check_lifted(pipeline.params, lift)
    if isinstance(prompts, str):
        raise TypeError("prompts is a string, expected a list of them: pass [prompt]")
    if isinstance(sampler, Sampler):
        raise TypeError(
            "sampler= is a Sampler, expected its name or the function that makes it, such as diffusion.ddim"
        )
    rows, scale = len(prompts), GUIDANCE[pipeline.xl] if guidance is None else float(guidance)
    image, mask = (None if x is None else np.asarray(x, np.float32) for x in (image, mask))
    vae = _config(pipeline, "vae")
    high, wide = _sides(pipeline, image, height, width)
    shape = (rows, high // vae.factor, wide // vae.factor, vae.latents)
    _check_image(pipeline, image, mask, (rows, high, wide), shape, strength)
    keys = _keys(key, rows)
    guided = scale > 1
    tokens, others = _tokens(pipeline, prompts, negative, guided, long)
    if latents is not None and latents.shape != shape:
        raise ValueError(f"latents is {latents.shape}, expected {shape} for images of {high} x {wide}")
    sizes = _sizes(pipeline, sizes, (rows, high, wide))
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale={rescale} is not in [0, 1]")
    _check_sharding(sharding, rows)
    setting = Setting(
        tuple(sorted(pipeline.modules.items())), pipeline.noise, sampler or pipeline.sampler, steps,
        _first(steps, strength, image, mask, xl=pipeline.xl), guided, rescale > 0, clip_skip or 0, pipeline.xl, lift,
        sharding,
    )  # fmt: skip
    inputs = Inputs(
        tokens, others, keys, _noise(keys, shape) if latents is None else jnp.asarray(latents, jnp.float32),
        jnp.asarray(sizes, jnp.float32), jnp.float32(scale), jnp.float32(rescale),
        None if image is None else jnp.asarray(image),
        None if mask is None else jnp.asarray(mask >= 0.5, jnp.float32),
    )  # fmt: skip
    if sharding is not None:
        inputs = jax.tree.map(lambda x: _put(x, sharding) if x.ndim else x, inputs)
    images, broken = _program(setting, dict(pipeline.params), inputs)
    _check_numbers(broken)
    return images


# -- the program -------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _program(s: Setting, params: Mapping[str, Any], inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """The images, and which of them are not finite: (rows,), bool."""
    modules: dict[str, Any] = dict(s.modules)
    vae, unet = modules["vae"], modules["unet"]
    inputs = placed.on_one_mesh(inputs, params)
    call = lambda module: module.apply if s.lift is None else s.lift(module.apply)
    sampler = (
        s.sampler(s.noise, s.steps) if callable(s.sampler) else scheduler_config.sampler(s.sampler, s.noise, s.steps)
    )
    conditions = _conditions(s, modules, params, inputs)
    kept = _kept(s, call(vae), vae.config, params["vae"], inputs)

    def body(carry: Any, i: jax.Array) -> tuple[Any, None]:
        x, state = carry
        given = sampler.scale(i, x)
        if kept.beside is not None:
            given = jnp.concatenate([given, kept.beside], axis=-1)
        twice = (lambda y: _paired(y, y)) if s.guided else (lambda y: y)
        times = jnp.broadcast_to(jnp.asarray(sampler.timesteps)[i], (len(conditions.context),))
        added = {"pooled": conditions.pooled, "sizes": twice(inputs.sizes)} if s.xl else {}
        out = call(unet)({"params": params["unet"]}, twice(given), times, conditions.context, **added)["out"]
        prediction = _guided(s, out, inputs) if s.guided else out
        fresh = _noise(inputs.keys, x.shape, i) if sampler.random else None
        x, state = sampler.step(i, x, prediction, state, fresh)
        if kept.latents is not None and kept.beside is None and kept.mask is not None:
            x = kept.mask * x + (1 - kept.mask) * sampler.noised(i + 1, kept.latents, inputs.eps)
        return (x, state), None

    if kept.latents is None or (s.first == 0 and inputs.mask is not None):  # nothing of an image is seen at first
        x = sampler.start * inputs.eps
    else:
        x = sampler.noised(jnp.int32(s.first), kept.latents, inputs.eps)
    steps = jnp.arange(s.first, len(sampler.timesteps))
    (x, _), _ = jax.lax.scan(body, (x, sampler.init(x)), steps)
    images = call(vae)({"params": params["vae"]}, x / vae.config.scaling, method="decode")
    broken = _seen_by_all(s, ~jnp.isfinite(images).all(axis=(1, 2, 3)))
    return jnp.clip(images / 2 + 0.5, 0.0, 1.0), broken


def _put(x: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """`jax.device_put`, also of keys onto devices of several processes, each of which has the same array."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
    return jax.device_put(x if sharding.is_fully_addressable else np.asarray(x), sharding)


def _seen_by_all(s: Setting, x: jax.Array) -> jax.Array:
    """The array whole on each device of the images."""
    if not isinstance(s.sharding, NamedSharding) or s.sharding.mesh.explicit_axes:
        return placed.whole(x)
    return jax.lax.with_sharding_constraint(x, NamedSharding(s.sharding.mesh, PartitionSpec()))


def _conditions(s: Setting, modules: Mapping[str, Any], params: Mapping[str, Any], inputs: Inputs) -> Encoded:
    """Of each image's negative prompt and of its prompt, one after the other: both are on one device."""
    names = [name for name in TEXTS if name in modules]
    of = functools.partial(
        encode, [modules[name] for name in names], [params[name] for name in names], xl=s.xl, clip_skip=s.clip_skip,
        lift=s.lift,
    )  # fmt: skip
    own = of(tokens=inputs.tokens)
    if not s.guided:
        return own
    others = jax.tree.map(jnp.zeros_like, own) if inputs.negative is None else of(tokens=inputs.negative)
    return jax.tree.map(_paired, others, own)


def _paired(a: jax.Array, b: jax.Array) -> jax.Array:
    """Rows of both in turn: a_0, b_0, a_1, ..."""
    return jnp.stack([a, b], axis=1).reshape(2 * len(a), *a.shape[1:])


class _Kept(NamedTuple):
    latents: jax.Array | None  # of the image, scaled
    mask: jax.Array | None  # at the latents' resolution
    beside: (
        jax.Array | None
    )  # the UNet's inputs beside its latents: mask, and latents of the image without what it hides


def _kept(s: Setting, call: Callable[..., Any], config: Any, params: Any, inputs: Inputs) -> _Kept:
    """The image, as the UNet sees it."""
    if inputs.image is None:
        return _Kept(None, None, None)

    def latents_of(image: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, _ENCODED))(inputs.keys)
        encoded = call({"params": params}, 2 * image - 1, method="encode")
        return config.scaling * jax.vmap(sampled)(encoded, keys)

    encoded = inputs.image.shape == inputs.eps.shape
    latents = inputs.image if encoded else latents_of(inputs.image)
    if inputs.mask is None:
        return _Kept(latents, None, None)
    mask = nearest(inputs.mask, *inputs.eps.shape[1:3])
    if dict(s.modules)["unet"].config.channels == config.latents:
        return _Kept(latents, mask, None)
    hidden = latents_of(jnp.where(inputs.mask < 0.5, inputs.image, 0.5))  # grey
    return _Kept(latents, mask, jnp.concatenate([mask, hidden], axis=-1))


def _guided(s: Setting, out: jax.Array, inputs: Inputs) -> jax.Array:
    pairs = out.reshape(-1, 2, *out.shape[1:])
    negative, prompt = pairs[:, 0], pairs[:, 1]
    both = negative + inputs.guidance * (prompt - negative)
    if not s.rescaled:
        return both
    deviation = lambda x: jnp.std(x, axis=(1, 2, 3), keepdims=True, ddof=1)
    return inputs.rescale * both * (deviation(prompt) / deviation(both)) + (1 - inputs.rescale) * both


_START, _ENCODED, _STEP = 0, 1, 2  # what a key is folded with, for the three uses of it


def _noise(keys: jax.Array, shape: tuple[int, ...], step: jax.Array | None = None) -> jax.Array:
    """Normal noise of each image by its own key: at the start, or of a step."""
    number = _START if step is None else _STEP + step
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, number), shape[-3:], jnp.float32)
    return jax.vmap(draw)(keys)


# -- arguments ---------------------------------------------------------------------------------------------------------


def _config(pipeline: Pipeline, part: str) -> Any:
    module: Any = pipeline.modules[part]
    return module.config


def _keys(key: jax.Array, rows: int) -> jax.Array:
    """A key for each image."""
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        what = f"an array of {key.dtype}" if isinstance(key, jax.Array) else repr(key)
        raise TypeError(f"key is {what}, expected jax.random.key(seed), or one for each image")
    if key.ndim == 0:
        return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))
    if key.shape != (rows,):
        raise ValueError(f"key is {key.shape} keys for {rows} prompts: pass one, or one for each")
    return key


def _tokens(
    pipeline: Pipeline, prompts: Sequence[str], negative: Sequence[str] | None, guided: bool, long: Long
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...] | None]:
    """Of the prompts and of the negative ones; None for zeros, and where there is no guidance."""
    if negative is not None and (isinstance(negative, str) or len(negative) != len(prompts)):
        raise ValueError(f"negative={negative!r} has to be a list of {len(prompts)}, one for each prompt")
    if negative is None and not (pipeline.xl and pipeline.zeros):
        negative = [""] * len(prompts)
    texts = [prompts] if negative is None or not guided else [prompts, negative]
    readers = [
        (pipeline.tokenizers[part], _config(pipeline, part).context) for part in TEXTS if part in pipeline.modules
    ]

    def read(chunks: int) -> list[list[np.ndarray]]:
        return [[tokens_of(by, own, long=long, context=n, chunks=chunks) for by, n in readers] for own in texts]

    found = read(1)
    chunks = max(row.shape[1] // n for rows in found for row, (_, n) in zip(rows, readers, strict=True))
    found = read(chunks) if chunks > 1 else found  # as many pieces of all, also by another tokenizer
    own, *others = (tuple(map(jnp.asarray, rows)) for rows in found)
    return own, others[0] if others else None


def _sides(pipeline: Pipeline, image: Any, height: int | None, width: int | None) -> tuple[int, int]:
    vae, unet = _config(pipeline, "vae"), _config(pipeline, "unet")
    usual = (unet.size * vae.factor,) * 2
    if image is not None and image.ndim == 4:
        encoded = image.shape[-1] == vae.latents and vae.latents != vae.channels
        usual = (image.shape[1] * (vae.factor if encoded else 1), image.shape[2] * (vae.factor if encoded else 1))
    sides = (usual[0] if height is None else height, usual[1] if width is None else width)
    for name, side in zip(("height", "width"), sides, strict=True):
        if not isinstance(side, int) or side % vae.factor or side < vae.factor:
            near = max(round(side / vae.factor), 1) * vae.factor
            raise ValueError(f"{name}={side} is no multiple of {vae.factor}, as the autoencoder wants it: {near} is")
    return sides


def _sizes(pipeline: Pipeline, sizes: Any, shape: tuple[int, int, int]) -> Any:
    """SDXL's conditions of each image: those of a whole one where none are given."""
    rows, high, wide = shape
    if sizes is None:
        return np.tile(np.asarray([[high, wide, 0, 0, high, wide]], np.float32), (rows, 1))
    if not pipeline.xl:
        raise ValueError("sizes= are conditions of SDXL: this pipeline's UNet takes none")
    if np.shape(sizes) != (rows, 6):
        raise ValueError(f"sizes is {np.shape(sizes)}, expected {(rows, 6)}")
    return sizes


def _check_image(
    pipeline: Pipeline,
    image: Any,
    mask: Any,
    expected: tuple[int, int, int],
    shape: tuple[int, ...],
    strength: float | None,
) -> None:
    unet, vae = _config(pipeline, "unet"), _config(pipeline, "vae")
    if unet.channels != vae.latents and mask is None:
        raise ValueError(f"the UNet takes {unet.channels} channels, to paint in a mask: pass image= and mask=")
    if unet.channels not in (vae.latents, 2 * vae.latents + 1):
        raise ValueError(f"the UNet takes {unet.channels} channels, expected {vae.latents} or {2 * vae.latents + 1}")
    if mask is not None and image is None:
        raise ValueError("mask= says where to paint in an image: pass image=, too")
    if strength is not None and image is None:
        raise ValueError("strength= says how far to go from an image: pass image=, too")
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"strength={strength} is not in (0, 1]")
    pixels = (*expected, vae.channels)
    if image is not None and image.shape not in (pixels, shape):
        raise ValueError(f"image is {image.shape}, expected {pixels} in [0, 1], or latents of {shape}")
    if image is not None and image.shape == shape != pixels and unet.channels != vae.latents:
        raise ValueError("to paint in a mask this UNet has to see the image: pass its pixels, not its latents")
    if image is not None and not np.isfinite(image).all():
        raise ValueError("image has values that are not finite")
    if image is not None and image.shape == pixels and (image.min() < 0 or image.max() > 1):
        how = "divide by 255" if image.max() > 2 else "x / 2 + 0.5 of [-1, 1]"
        raise ValueError(f"image has values from {image.min():g} to {image.max():g}, expected [0, 1]: {how}")
    if mask is not None and mask.shape != (*expected, 1):
        raise ValueError(f"mask is {mask.shape}, expected {(*expected, 1)}, 1 where to paint")
    if mask is not None and not (np.isfinite(mask).all() and mask.min() >= 0 and mask.max() <= 1):
        raise ValueError(
            f"mask has values from {mask.min():g} to {mask.max():g}, expected 1 where to paint, 0 elsewhere"
        )


def _check_sharding(sharding: jax.sharding.Sharding | None, rows: int) -> None:
    """Raises a ValueError for images that do not lie evenly."""
    if sharding is None:
        return
    try:
        sharding.shard_shape((rows,))
    except (ValueError, IndexError) as error:  # the second for a spec of more axes
        raise ValueError(f"sharding= does not fit {rows} images, of which it says one axis: {error}") from error


def _first(steps: int, strength: float | None, image: Any, mask: Any, *, xl: bool) -> int:
    """The step to begin with."""
    if image is None:
        return 0
    part = (STRENGTH[xl] if mask is None else 1.0) if strength is None else strength
    first = steps - min(math.floor(steps * part), steps)
    if first >= steps:
        raise ValueError(f"strength={part} of steps={steps} leaves none: take a larger one of either")
    return first


def _check_lifted(params: Mapping[str, Any], lift: Lift | None) -> None:
    for part, own in params.items() if lift is None else ():
        plain = isinstance(own, Mapping)
        if not plain or any(map(bnb_tensors.is_quantised, traverse_util.flatten_dict(dict(own)).values())):
            raise ValueError(
                f"the parameters of the {part} are {'quantised' if plain else type(own).__name__}: "
                "pass lift=jlora.lift, or merge or dequantise them first"
            )


def _check_numbers(broken: jax.Array) -> None:
    """Raises a FloatingPointError for images that are not finite."""
    try:
        wrong = np.flatnonzero(np.asarray(jax.device_get(broken)))
    except jax.errors.TracerArrayConversionError:  # under jit the images say it
        return
    if len(wrong):
        raise FloatingPointError(
            f"images {', '.join(map(str, wrong))} are not finite: a part computed in float16 overflows; "
            "load with dtype='bfloat16' or 'float32'"
        )
