"""The model of a task of pictures: a UNet and, where they learn too, its text encoders, one function of one tree.

The tree has a part for each, {"unet": ..., "text_encoder": ...}, so that `targets=` names weights of either:
"unet/.*attn.*", "text_encoder/.*". Text encoders that stay as they are, are no part of it: their embeddings are made
once.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import jlora
from experiments.config import ConfigError
from experiments.tasks.task import Files, Params
from jlora import tree
from jlora.models import diffusion
from jlora.models.clip import CLIPText, CLIPTextConfig
from jlora.models.diffusion import Noise, Pipeline, Pixels, PixelsConfig
from jlora.models.tokenizer import Tokenizer
from jlora.models.unet import UNet, UNetConfig

UNKNOWN, END, START = "<unknown>", "<end>", "<start>"
Texts = Mapping[str, Any]
"""What a UNet reads of prompts: {"context"} and, of SDXL, {"pooled"}; or {"tokens"}, an array for each text encoder."""


NOISE = Noise(prediction="v_prediction", betas="squaredcos_cap_v2", clip=1.0)  # of pixels


@dataclass(frozen=True)
class FromNothing:
    """The shape of a small model that draws pixels, to be pretrained here: base=Pretrain(FromNothing(...), ...).

    Attributes:
      unet: its `size` is the side of the images.
      words: that captions consist of. Others are an error, so a name for something new has to be among them.
      layers, heads: of the text encoder, whose width is the UNet's `context_width`.
      context: tokens of a text, the two around it included.
      noise: that it is trained with.
    """

    unet: UNetConfig
    words: tuple[str, ...]
    layers: int = 2
    heads: int = 4
    context: int = 8
    noise: Noise = NOISE

    def __post_init__(self) -> None:
        if len(set(self.words)) != len(self.words) or any(word != word.lower() or not word for word in self.words):
            raise ConfigError(f"words: each once and in small letters; got {', '.join(map(repr, self.words))}")

    @property
    def param_dtype(self) -> str:
        """Of the parameters."""
        return self.unet.param_dtype

    @property
    def text(self) -> CLIPTextConfig:
        """The shape of the text encoder."""
        width = self.unet.context_width
        return CLIPTextConfig(
            vocab_size=len(self.words) + 3, context=self.context, width=width, layers=self.layers, heads=self.heads,
            hidden=4 * width, end=1,
        )  # fmt: skip

    def pipeline(self) -> Pipeline:
        """The pipeline, without parameters but the autoencoder's, which has none."""
        pixels = Pixels(PixelsConfig(size=self.unet.size, channels=self.unet.channels))
        modules = {"unet": UNet(self.unet), "vae": pixels, "text_encoder": CLIPText(self.text)}
        return Pipeline(modules, {"vae": {}}, {"text_encoder": tokenizer_of(self.words)}, self.noise, "ddim")

    def params(self, seed: int) -> Params:
        """Random ones."""
        side, channels, width = self.unet.size, self.unet.channels, self.unet.context_width
        tokens, latents = jnp.zeros((1, self.context), jnp.int32), jnp.zeros((1, side, side, channels))
        times, context = jnp.zeros(1, jnp.int32), jnp.zeros((1, self.context, width))

        def draw(key: jax.Array) -> Params:
            of_unet, of_text = jax.random.split(key)
            return {
                "unet": UNet(self.unet).init(of_unet, latents, times, context)["params"],
                "text_encoder": CLIPText(self.text).init(of_text, tokens)["params"],
            }

        # Hundreds of draws, run once: with optimisations, and by threefry, they would take minutes to compile.
        before = jax.config.read("jax_disable_most_optimizations")
        jax.config.update("jax_disable_most_optimizations", True)
        try:
            return jax.jit(draw)(jax.random.key(seed, impl="rbg"))
        finally:
            jax.config.update("jax_disable_most_optimizations", before)


def tokenizer_of(words: Sequence[str]) -> Tokenizer:
    """A tokenizer whose tokens are words, with the two tokens around a text that CLIP's text encoders expect."""
    import tokenizers
    from tokenizers import normalizers, pre_tokenizers

    numbers = {piece: number for number, piece in enumerate((UNKNOWN, END, START, *words))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, {"bos": START, "eos": END, "pad": END, "unk": UNKNOWN}, "the words of the config")


def check_words(tokenizer: Tokenizer, prompts: Sequence[str]) -> None:
    """Raises a ConfigError for words that a tokenizer of words does not have."""
    unknown = tokenizer.unk
    if unknown is None or tokenizer.specials.get("unk") != UNKNOWN:
        return
    for prompt in prompts:
        odd = [word for word in prompt.split() if unknown in tokenizer.encode(word, special=False)]
        if odd:
            raise ConfigError(f"{odd[0]!r} of the prompt {prompt!r} is none of the model's words: add it to base.words")


@dataclass(frozen=True, eq=False)
class TextToImage:
    """Modules whose parameters are one tree; `apply` is their function.

    Attributes:
      modules: "unet", and the text encoders that are a part of the tree.
      config: of the experiment's base, or the UNet's.
      xl: of SDXL's kind.
    """

    modules: Mapping[str, nn.Module]
    config: Any
    xl: bool = False

    @property
    def encoders(self) -> list[str]:
        """Names of the text encoders in the tree."""
        return [name for name in self.modules if name != "unet"]

    def apply(
        self,
        variables: Mapping[str, Params],
        latents: jax.Array,
        times: jax.Array,
        texts: Texts,
        sizes: jax.Array | None = None,
    ) -> jax.Array:
        """The UNet's prediction.

        Args:
          variables: {"params": the tree}.
          latents: (batch, height, width, channels), noisy and scaled.
          times: (batch,), integers.
          texts: of each row.
          sizes: (batch, 6), SDXL's.

        Returns:
          (batch, height, width, channels), float32.
        """
        params = variables["params"]
        if "tokens" in texts:
            modules: list[Any] = [self.modules[name] for name in self.encoders]
            encoded = diffusion.encode(modules, [params[name] for name in self.encoders], texts["tokens"], xl=self.xl)
        else:
            encoded = diffusion.Encoded(texts["context"], texts.get("pooled"))
        added: dict[str, Any] = {"pooled": encoded.pooled, "sizes": sizes} if self.xl else {}
        unet: Any = self.modules["unet"]
        out: jax.Array = unet.apply({"params": params["unet"]}, latents, times, encoded.context, **added)["out"]
        return out


def pipeline_of(source: Files | FromNothing) -> Pipeline:
    """The pipeline of a base: of a folder of diffusers with its parameters, or of a shape.

    Raises:
      ConfigError: if it is neither, or the folder is no pipeline that can be trained.
    """
    if isinstance(source, FromNothing):
        return source.pipeline()
    if not isinstance(source, Files):
        raise ConfigError(
            "a task of pictures has a base that is a folder of diffusers, or one that is pretrained here: "
            "base=Pretrain(FromNothing(...), ...)"
        )
    pipeline = diffusion.load(source.folder, **source.options)
    unet: Any = pipeline.modules["unet"]
    if unet.config.channels != unet.config.outputs:
        raise ConfigError(
            f"the UNet of '{source.folder}' takes {unet.config.channels} channels, to paint in a mask: the training of "
            "such a one is not supported"
        )
    return pipeline


def parts_of(params: Params) -> dict[str, Params]:
    """The parts of a tree, plain or adapted, each by itself: as a `Pipeline` takes them."""
    if not isinstance(params, jlora.Adapted):
        return dict(params)
    return {name: _part(params, name) for name in params.base}


def _part(adapted: jlora.Adapted, name: str) -> Params:
    base, start = adapted.base[name], f"{name}/"
    inside = lambda path: path.startswith(start)
    sites = tuple(
        dataclasses.replace(target, site=dataclasses.replace(target.site, path=target.path.removeprefix(start)))
        for target in adapted.sites
        if inside(target.path)
    )
    extras = tuple(
        dataclasses.replace(extra, path=extra.path.removeprefix(start))
        for extra in adapted.extras
        if inside(extra.path)
    )
    if not sites and not extras:
        return base
    of = lambda found: {
        path.removeprefix(start): arrays for path, arrays in found.items() if inside(path) or "/" not in path
    }
    return dataclasses.replace(
        adapted, base=base, factors=of(adapted.factors), buffers=of(adapted.buffers), sites=sites, extras=extras
    )


def is_lifted(params: Params) -> bool:
    """Whether the modules have to be lifted to take parameters: adapted ones, or some held in few bits."""
    return isinstance(params, jlora.Adapted) or any(map(tree.is_stored, tree.leaves(params)[0].values()))
