"""Stable Diffusion as diffusers keeps it: a folder of a UNet, an autoencoder, text encoders, tokenizers and a noise."""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flax import linen as nn

from jlora.models import checkpoint, files, place, reading, writing
from jlora.models.architecture import flag_of
from jlora.models.catalogue import architecture_of
from jlora.models.clip.modeling import CLIPTextConfig
from jlora.models.diffusion import scheduler_config
from jlora.models.diffusion.noise import Noise
from jlora.models.diffusion.prompts import with_tokenizer
from jlora.models.fields import shown
from jlora.models.tensors import Leaf
from jlora.models.tokenizer import Tokenizer
from jlora.models.unet.modeling import UNetConfig
from jlora.models.vae.modeling import VAEConfig

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
    params: Mapping[str, Any] = field(repr=False)
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
        """Parameters of the parts that files of adapters speak of: `jlora.diffusers.load(file, adaptable, tables)`."""
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
      variant: of the files: "fp16"; those without one when None. A part that has none in this variant is an error:
        parts={"vae": {"variant": None}} takes its others.
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
        if not (folder / part).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"'{folder / part}' is a link that leads out of the pipeline's folder")
    own = {part: {**options, **(parts or {}).get(part, {})} for part in names}
    if xl:
        own["text_encoder_2"] = {"head": "projection", **own["text_encoder_2"]}
    loaded = {part: checkpoint.load(folder / part, **{"variant": variant, **own[part]}) for part in names}
    fresh = [f"{part}/{path}" for part, pretrained in loaded.items() for path in pretrained.fresh]
    if fresh:
        raise ValueError(f"'{folder}' lacks the values of {', '.join(fresh)}: its config.json is of another class")
    tokenizers = {part: Tokenizer.load(folder / TEXTS[part]) for part in names if part in TEXTS}
    modules = {part: pretrained.model for part, pretrained in loaded.items()}
    for part, tokenizer in tokenizers.items():
        encoder: Any = modules[part]
        modules[part] = with_tokenizer(encoder, tokenizer)
    check_parts(modules, xl=xl, what=f"'{folder}'")
    noise, sampler = scheduler_config.read(reading.read_json(folder / "scheduler" / SCHEDULER))
    return Pipeline(
        modules, {part: pretrained.params for part, pretrained in loaded.items()}, tokenizers, noise, sampler, xl,
        _zeros(folder, record), folder,
    )  # fmt: skip


def save(folder: str | os.PathLike[str], pipeline: Pipeline, *, largest_shard: int = 10**10) -> None:
    """Writes a folder that `load`, and diffusers' `from_pretrained`, read.

    Args:
      folder: a local one, or its `file://` URL; made if absent.
      pipeline: its parameters are arrays: merge adapted parts first.
      largest_shard: in bytes; larger parts are cut into several files with an index.

    Raises:
      ValueError: if parameters are not those of their module, as `jlora.models.save` says, or the sampler has no name
        in diffusers. What is wrong with the parameters of a part is found before that part is written.
      FileNotFoundError: if a tokenizer's files are no longer where it was loaded from.
    """
    folder, source = place.folder_of(folder), pipeline.folder
    old = {} if source is None else reading.read_json(source / INDEX)
    scheduler = _scheduler(pipeline)
    origins = {part: Path(tokenizer.source) for part, tokenizer in pipeline.tokenizers.items()}
    for part, origin in origins.items():
        if not origin.is_dir():
            raise FileNotFoundError(f"save: the tokenizer of the {part} came from '{origin}', which is no folder here")
    for part, module in pipeline.modules.items():
        own = None if source is None else source / part
        checkpoint.save(folder / part, module, pipeline.params[part], source=own, largest_shard=largest_shard)
    for part, origin in origins.items():
        if origin.resolve() != (folder / TEXTS[part]).resolve():
            _copy_tokenizer(origin, folder / TEXTS[part])
    (folder / "scheduler").mkdir(exist_ok=True)
    writing.write_json(folder / "scheduler" / SCHEDULER, scheduler)
    writing.write_json(folder / INDEX, _index(pipeline, old, str(scheduler["_class_name"])))


def check_parts(modules: Mapping[str, Any], *, xl: bool, what: str) -> None:
    """Raises a ValueError for parts that do not fit each other.

    Args:
      modules: of the parts.
      xl: the pipeline is of SDXL's kind.
      what: they are, for the error.
    """
    kinds = {"unet": UNetConfig, "vae": VAEConfig, "text_encoder": CLIPTextConfig, "text_encoder_2": CLIPTextConfig}
    for part, module in modules.items():
        if not isinstance(module.config, kinds[part]):
            raise ValueError(
                f"the {part} of {what} is a {type(module).__name__}, and its folder or file another part's"
            )
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
    five = "[0-9]" * 5
    ends = (
        ("", f"-{five}-of-{five}")
        if variant is None
        else (f".{variant}", f".{variant}-{five}-of-{five}", f"-{five}-of-{five}.{variant}")
    )
    stems = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"} | dict.fromkeys(TEXTS, "model")
    small = [f"{part}/{pattern}" for part in (*stems, "scheduler", *TEXTS.values()) for pattern in files.SMALL]
    return (INDEX, *small, *(f"{part}/{stem}{end}.safetensors" for part, stem in stems.items() for end in ends))


def _kind(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether a pipeline is SDXL's. Raises a ValueError for one of another class."""
    name = record.get("_class_name")
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(f"'{folder / INDEX}' is of the class {shown(name)}; supported are {', '.join(CLASSES)}")
    return CLASSES[name]


def _zeros(folder: Path, record: Mapping[str, Any]) -> bool:
    try:
        return flag_of(record, "force_zeros_for_empty_prompt", default=True)
    except ValueError as error:
        raise ValueError(str(error).replace("config.json", f"'{folder / INDEX}'")) from error


def _scheduler(pipeline: Pipeline) -> dict[str, Any]:
    """Content of scheduler_config.json: as it was, where nothing of it is changed."""
    if pipeline.folder is not None:
        record = reading.read_json(pipeline.folder / "scheduler" / SCHEDULER)
        if scheduler_config.read(record) == (pipeline.noise, pipeline.sampler):
            return record
    return scheduler_config.write(pipeline.noise, pipeline.sampler)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in checkpoint.TOKENIZER:
        if reading.has(source / name):
            shutil.copyfile(reading.regular(source / name), folder / name)


def _index(pipeline: Pipeline, old: Mapping[str, Any], scheduler: str) -> dict[str, Any]:
    """Content of model_index.json: the parts that are there, and no others."""
    kept = {key: value for key, value in old.items() if not isinstance(value, list)}
    kinds = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    painting = pipeline.modules["unet"].config.channels != pipeline.modules["vae"].config.latents
    kind = XL if pipeline.xl else SD
    index: dict[str, Any] = {"_class_name": kind.replace("Pipeline", "InpaintPipeline") if painting else kind} | kept
    index |= {part: ["diffusers" if part in ("unet", "vae") else "transformers", kind] for part, kind in kinds.items()}
    index |= {tokenizer: ["transformers", "CLIPTokenizer"] for tokenizer in map(TEXTS.__getitem__, pipeline.tokenizers)}
    index |= {"scheduler": ["diffusers", scheduler], "feature_extractor": ABSENT}
    if pipeline.xl:
        more = {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "image_encoder": ABSENT}
        return index | more | {"force_zeros_for_empty_prompt": pipeline.zeros}
    return index | {"safety_checker": ABSENT, "image_encoder": ABSENT, "requires_safety_checker": False}
