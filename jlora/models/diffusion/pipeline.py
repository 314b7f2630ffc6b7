"""Stable Diffusion as diffusers keeps it: a folder of a UNet, an autoencoder, text encoders, tokenizers and a noise."""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import linen as nn

from jlora.models import checkpoint, files, place, reading, writing
from jlora.models.catalogue import architecture_of
from jlora.models.diffusion import scheduler_config
from jlora.models.diffusion.noise import Noise
from jlora.models.diffusion.prompts import with_tokenizer
from jlora.models.fields import shown
from jlora.models.tensors import Leaf
from jlora.models.tokenizer import Tokenizer

INDEX, SCHEDULER = "model_index.json", "scheduler_config.json"
SD, XL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
CLASSES = {
    SD: False, "StableDiffusionImg2ImgPipeline": False, "StableDiffusionInpaintPipeline": False,
    XL: True, "StableDiffusionXLImg2ImgPipeline": True, "StableDiffusionXLInpaintPipeline": True,
}  # fmt: skip
"""Classes of diffusers' pipelines -> whether they are SDXL's."""
TEXTS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
ABSENT = [None, None]


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A text to image model: modules, their parameters, and all else that images take.

    Attributes:
      modules: "unet", "vae", "text_encoder" and for SDXL "text_encoder_2" -> the linen module.
      params: the same names -> a nested dict, or an adapted one in its place, see `with_params`.
      tokenizers: the text encoders' names -> the tokenizer.
      noise: that the UNet was trained with.
      sampler: name of the sampler that the folder names; a key of `samplers.SAMPLERS`.
      xl: of SDXL's kind: two text encoders, a pooled text and sizes.
      zeros: SDXL's: no negative prompt is a condition of zeros, not that of an empty text.
      folder: where it was loaded from; None of one that was put together.
    """

    modules: Mapping[str, nn.Module]
    params: Mapping[str, Any]
    tokenizers: Mapping[str, Tokenizer]
    noise: Noise
    sampler: str = "pndm"
    xl: bool = False
    zeros: bool = True
    folder: Path | None = None

    def with_params(self, **params: Any) -> "Pipeline":
        """The pipeline with other parameters of some parts: `pipeline.with_params(unet=adapted)`.

        Raises:
          ValueError: for a part that it does not have.
        """
        unknown = sorted(set(params) - set(self.modules))
        if unknown:
            raise ValueError(f"with_params: there is no {unknown[0]!r}; the parts are {', '.join(self.modules)}")
        return dataclasses.replace(self, params={**self.params, **params})

    @property
    def adaptable(self) -> dict[str, Any]:
        """Parameters of the parts that files of adapters speak of, for `jlora.diffusers.load(file, adaptable, tables)`."""
        return {name: own for name, own in self.params.items() if name != "vae"}

    @property
    def tables(self) -> dict[str, list[Leaf]]:
        """Key tables of the parts that files of adapters speak of, by part."""
        return {name: table_of(self.modules[name]) for name in self.adaptable}


def table_of(model: nn.Module) -> list[Leaf]:
    """The key table of one of jlora's models: which tensor of its checkpoint is which parameter."""
    architecture = architecture_of(model.config)
    assert architecture is not None
    return architecture.table(model.config)


def load(
    name: str | os.PathLike[str],
    *,
    variant: str | None = None,
    revision: str | None = None,
    parts: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> Pipeline:
    """A pipeline from a folder of diffusers, or by the name of its repository on the Hugging Face hub.

    Args:
      name: a folder with model_index.json, or "stabilityai/stable-diffusion-xl-base-1.0".
      variant: of the files: "fp16"; those without one when None. A part that has none in this variant is an error.
      revision: of the repository: a branch, tag or commit.
      parts: part -> further options of that part alone: {"text_encoder": {"quantize": "nf4"}}.
      options: of every part, as of `jlora.models.load`: `dtype`, `param_dtype`, `scan`, `remat`, `attention`,
        `sharding`, `quantize`.

    Raises:
      FileNotFoundError: if there is no such folder, or a part or its files are missing.
      ValueError: for another class of pipeline (naming those that there are), a part of another class than it should
        be, parts that do not fit each other, and all that `jlora.models.load` raises for a part.
    """
    folder = files.folder_of(name, revision, _wanted(variant), config=INDEX, what="pipeline", below=True)
    record = reading.read_json(folder / INDEX)
    xl = _kind(folder, record)
    names = ("unet", "vae", *TEXTS) if xl else ("unet", "vae", "text_encoder")
    unknown = sorted(set(parts or {}) - set(names))
    if unknown:
        raise ValueError(f"load: parts= speaks of {unknown[0]!r}; the parts of '{folder}' are {', '.join(names)}")
    for part in (*names, "scheduler", *(TEXTS[part] for part in names if part in TEXTS)):
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"'{folder}' lacks its {part}: there is no folder of that name in it")
    own = {part: {**options, **(parts or {}).get(part, {})} for part in names}
    if xl:
        own["text_encoder_2"] = {"head": "projection", **own["text_encoder_2"]}
    loaded = {part: checkpoint.load(folder / part, variant=variant, **own[part]) for part in names}
    tokenizers = {part: Tokenizer.load(folder / TEXTS[part]) for part in names if part in TEXTS}
    modules = {part: pretrained.model for part, pretrained in loaded.items()}
    for part, tokenizer in tokenizers.items():
        encoder: Any = modules[part]
        modules[part] = with_tokenizer(encoder, tokenizer)
    check_parts(modules, xl=xl, what=f"'{folder}'")
    noise, sampler = scheduler_config.read(reading.read_json(folder / "scheduler" / SCHEDULER))
    return Pipeline(
        modules, {part: pretrained.params for part, pretrained in loaded.items()}, tokenizers, noise, sampler, xl,
        record.get("force_zeros_for_empty_prompt", True) is not False, folder,
    )  # fmt: skip


def save(folder: str | os.PathLike[str], pipeline: Pipeline, *, largest_shard: int = 10**10) -> None:
    """Writes a folder that `load`, and diffusers' `from_pretrained`, read.

    Args:
      folder: a local one, or its `file://` URL; made if absent.
      pipeline: its parameters are arrays: merge adapted parts first.
      largest_shard: in bytes; larger parts are cut into several files with an index.

    Raises:
      ValueError: if parameters are not those of their module, as `jlora.models.save` says; if the pipeline was not
        loaded from a folder that its tokenizers can be copied from, and the new folder has none.
    """
    folder, source = place.folder_of(folder), pipeline.folder
    for part in pipeline.tokenizers:
        if source is None and not (folder / TEXTS[part]).is_dir():
            raise ValueError(
                f"save: the pipeline has no folder to copy its tokenizers from: put {TEXTS[part]!r} into '{folder}' "
                "first, or set folder= to one that has it"
            )
    for part, module in pipeline.modules.items():
        own = None if source is None else source / part
        checkpoint.save(folder / part, module, pipeline.params[part], source=own, largest_shard=largest_shard)
    if source is not None and source.resolve() != folder.resolve():
        for part in pipeline.tokenizers:
            _copy_tokenizer(source / TEXTS[part], folder / TEXTS[part])
    (folder / "scheduler").mkdir(exist_ok=True)
    written = scheduler_config.write(pipeline.noise, pipeline.sampler)
    writing.write_json(folder / "scheduler" / SCHEDULER, written)
    old = {} if source is None else reading.read_json(source / INDEX)
    writing.write_json(folder / INDEX, _index(pipeline, old, str(written["_class_name"])))


def check_parts(modules: Mapping[str, Any], *, xl: bool, what: str) -> None:
    """Raises a ValueError for parts that do not fit each other.

    Args:
      modules: of the parts.
      xl: the pipeline is of SDXL's kind.
      what: they are, for the error.
    """
    unet, vae = modules["unet"].config, modules["vae"].config
    texts = [modules[part].config for part in TEXTS if part in modules]
    width, made = unet.context_width, sum(c.width for c in texts)
    wrong = [] if width == made else [f"the UNet's texts have {width} features, and the text encoders make {made}"]
    if unet.outputs != vae.latents:
        wrong.append(f"the UNet's latents have {unet.outputs} channels, and the autoencoder's {vae.latents}")
    if (unet.added is not None) != xl:
        wrong.append(f"the UNet takes {'no' if xl else 'a'} pooled text")
    elif xl and unet.pooled != texts[-1].projection:
        wrong.append(
            f"the UNet's pooled texts have {unet.pooled} features, and text_encoder_2's {texts[-1].projection}"
        )
    if wrong:
        raise ValueError(f"the parts of {what} do not fit: {'; '.join(wrong)}")


def _wanted(variant: str | None) -> tuple[str, ...]:
    """Patterns of files to fetch from the hub: of one variant alone."""
    small = (INDEX, *(f"*/{pattern}" for pattern in files.SMALL))
    stems = tuple(files.STEMS.values())
    if variant is None:
        return (*small, *(f"*/{stem}{end}.safetensors" for stem in stems for end in ("", "-[0-9]*-of-[0-9]*[0-9]")))
    return (*small, *(f"*/{stem}{end}.safetensors" for stem in stems for end in (f".{variant}*", f"-*.{variant}")))


def _kind(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether a pipeline is SDXL's. Raises a ValueError for one of another class."""
    name = record.get("_class_name")
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(f"'{folder / INDEX}' is of the class {shown(name)}; supported are {', '.join(CLASSES)}")
    return CLASSES[name]


def _copy_tokenizer(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in checkpoint.TOKENIZER:
        if reading.has(source / name):
            shutil.copyfile(reading.regular(source / name), folder / name)


def _index(pipeline: Pipeline, old: Mapping[str, Any], scheduler: str) -> dict[str, Any]:
    """Content of model_index.json: the parts that are there, and no others."""
    kept = {key: value for key, value in old.items() if not isinstance(value, list)}
    kinds = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    index: dict[str, Any] = {"_class_name": XL if pipeline.xl else SD} | kept
    index |= {part: ["diffusers" if part in ("unet", "vae") else "transformers", kind] for part, kind in kinds.items()}
    index |= {tokenizer: ["transformers", "CLIPTokenizer"] for tokenizer in map(TEXTS.__getitem__, pipeline.tokenizers)}
    index |= {"scheduler": ["diffusers", scheduler], "feature_extractor": ABSENT}
    if pipeline.xl:
        more = {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "image_encoder": ABSENT}
        return index | more | {"force_zeros_for_empty_prompt": pipeline.zeros}
    return index | {"safety_checker": ABSENT, "image_encoder": ABSENT, "requires_safety_checker": False}
