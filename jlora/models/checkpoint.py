"""Hugging Face checkpoints to jlora's models, and back."""

import dataclasses
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jlora.models import bnb, bnb_tensors, files, place, quantised, reading, writing
from jlora.models.architecture import Architecture, Head, names_of, number_of, object_of
from jlora.models.catalogue import ARCHITECTURES, architecture_of
from jlora.models.fields import LABELS, shown
from jlora.models.tensors import Leaf, Shape, differences, tensor_shape, tensor_slices, to_tensor
from jlora.quant.formats import Format

Params = Any
Sharding = jax.sharding.Sharding
Place = Sharding | Callable[[str, jax.ShapeDtypeStruct], Sharding]
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float32"}
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "encoder.json", "vocab.bpe", "vocab.txt", "tokenizer.model", "spm.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "preprocessor_config.json", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Pretrained:
    """A model and its parameters.

    Attributes:
      model: the linen module; its `config` is the shape.
      params: a nested dict, as `model.apply({"params": params}, ...)` takes it.
      folder: where the checkpoint lies, with its tokenizer.
      fresh: the paths of parameters that the checkpoint does not have: a new head's, at random values.
      unused: the keys of another head of the checkpoint.
    """

    model: nn.Module
    params: Params
    folder: Path
    fresh: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def load(
    name: str | os.PathLike[str],
    *,
    head: Head | None = None,
    labels: int | None = None,
    sharding: Place | None = None,
    revision: str | None = None,
    seed: int = 0,
    quantize: str | Format | Callable[[str, jax.ShapeDtypeStruct], str | None] | None = None,
    block: int | None = None,
    double: bool | None = None,
    variant: str | None = None,
    **options: Any,
) -> Pretrained:
    """A pretrained model from a folder, or by the name of its repository on the Hugging Face hub.

    Each tensor goes from the file to its dtype and devices before the next is read, the largest first, and of a sharded
    parameter each process reads its own slices: no second copy of the parameters is ever held. What is quantised on the
    way is so some rows at a time: its 16 bits are never held.

    A checkpoint that transformers saved in bitsandbytes' 4 bits is read as it is, code for code: its weights are
    `jlora.quant.Quantised`, and the model is called through `jlora.lift`.

    Args:
      name: a folder with config.json and model.safetensors (or its shards and index), or "openai-community/gpt2".
      head: what comes out of the model; what the checkpoint was saved with when None. A head that the checkpoint does
        not have gets random values, see `Pretrained.fresh`.
      labels: of a classification; those of the checkpoint when None.
      sharding: where parameters go: one for all, or a function of path and `jax.ShapeDtypeStruct`. The default device
        when None.
      revision: of the repository: a branch, tag or commit.
      seed: of a new head's values.
      quantize: the format in which linear weights are held ("nf4", "fp4", "int4", "int8", "fp8"; see `jlora.quantize`):
        one for all but those of the head, or a function of path and `jax.ShapeDtypeStruct`, None for as they are.
      block, double: as of `jlora.quantize`.
      variant: of the files, as diffusers names them: "fp16"; those without one when None.
      options: fields of the model's config, such as `scan=True`, `remat=True`, `dropout=0.1`, `dtype="bfloat16"` and
        `param_dtype`. Both dtypes are the checkpoint's by default; but with float16, whose gradients vanish, the
        computation is in float32. Dropout is 0 whatever config.json says.

    Raises:
      FileNotFoundError: if there is no such checkpoint, or it lacks files.
      ValueError: for an architecture, a head or a setting that is not supported; a number in config.json that cannot
        be, or more layers than there are tensors of; a damaged file, or one that is no regular file of the folder (the
        hub's own links are followed); an address that is no local folder (`gs://`); and keys that are missing,
        unexpected or misshaped: all of them in one error. For a checkpoint of another quantiser than bitsandbytes' 4
        bits, or whose codes and scales contradict each other; an unknown format to quantise to, naming the nearest, a
        weight that is quantised already or not finite, and a mesh that cuts through a block.
      TypeError: for an option that the model's config does not have.

    Example:
      >>> import tempfile, jax, jlora.models
      >>> from jlora.models.gpt2 import GPT2, GPT2Config
      >>> model = GPT2(GPT2Config(vocab_size=64, context=16, width=8, layers=1, heads=2))
      >>> params = model.init(jax.random.key(0), jax.numpy.zeros((1, 1), int))["params"]
      >>> folder = tempfile.mkdtemp()
      >>> jlora.models.save(folder, model, params)
      >>> jlora.models.load(folder, scan=True).params["h"]["attn"]["query"]["kernel"].shape
      (1, 8, 8)
    """
    choose = quantised.choice(quantize, block, double)
    folder, architecture, asked, found, unused, model = _opened(name, head, labels, revision, options, variant)
    config: Any = model.config
    table = architecture.table(config)
    shapes = shapes_of(model, architecture.inputs(config))
    new = _new_head(table, found, shapes, architecture, config) if asked else []
    fresh = [row.path for row in new]
    start = _initial(model, architecture.inputs(config), fresh, seed, shapes, sharding)
    rows = [row for row in table if row not in new]
    what = f"'{folder}' is not the {architecture.model_type} of its config.json"
    known = [*unused, *(key for row in new for key in row.keys)]
    read = parameters(rows, shapes, found, what=what, optional=known, sharding=sharding, choose=choose)
    tree = traverse_util.unflatten_dict({path: {**start, **read}[path] for path in shapes}, sep="/")
    return Pretrained(model, tree, folder, tuple(fresh), tuple(sorted(unused)))


def parameters(
    table: Sequence[Leaf],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    found: Mapping[str, files.Tensor],
    *,
    what: str,
    optional: Iterable[str] = (),
    sharding: Place | None = None,
    choose: quantised.Choose = lambda path, like: None,
) -> dict[str, Any]:
    """Parameters by path: those that the table has rows of, read from their tensors, the largest first.

    Args:
      table: rows of parameters.
      shapes: of all parameters, by path; their dtypes are those that are read to.
      found: the tensors by the table's keys.
      what: the beginning of the error where they do not fit.
      optional: keys that may be there and are not read.
      sharding, choose: as in `load`; the format of a weight by path and shape, None for as it is.

    Raises:
      ValueError: for keys that are missing, unexpected, misshaped or of another dtype: all of them in one error.
    """
    own = {path: leaf.shape for path, leaf in shapes.items()}
    found = _fitted(found, {key: tensor_shape(row, own[row.path]) for row in table for key in row.keys})
    wrong = differences(table, own, {key: tensor.shape for key, tensor in found.items()}, optional=optional)
    for key in (key for row in table for key in row.keys if key in found):
        if found[key].dtype not in DTYPES:
            wrong.append(f"{key!r} is of {found[key].dtype}, expected one of {', '.join(DTYPES)}")
    if wrong:
        lines = "\n  ".join(wrong[:40] + ([f"and {len(wrong) - 40} more"] if len(wrong) > 40 else []))
        raise ValueError(f"{what}:\n  {lines}")
    return {
        row.path: _read(row, [found[key] for key in row.keys], shapes[row.path], sharding, choose)
        for row in sorted(table, key=lambda row: -shapes[row.path].size)
    }


def save(
    folder: str | os.PathLike[str],
    model: nn.Module,
    params: Params,
    *,
    source: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    largest_shard: int = 5 * 10**9,
) -> None:
    """Writes a checkpoint that `load`, and transformers' `from_pretrained`, read.

    Args:
      folder: a local one, or its `file://` URL; made if absent.
      model: one of jlora's.
      params: parameters, such as `jlora.merge(adapted)`. Those quantised to "nf4" or "fp4" are written as bitsandbytes
        has them, code for code.
      source: the checkpoint that the model was loaded from, a folder or a repository's name as in `load`: its tokenizer
        is copied, and what else its config.json says.
      revision: of that repository.
      largest_shard: in bytes; larger checkpoints are cut into several files with an index.

    Raises:
      ValueError: if the parameters are not the model's: all differences in one error; if they are spread over several
        processes; if they are quantised as bitsandbytes' files cannot hold them; if the config cannot be written as its
        family's; or for an address that is no local folder (`gs://`). What was in the folder then stays.
    """
    folder, config = place.folder_of(folder), model.config
    architecture = architecture_of(config)
    if architecture is None:
        raise ValueError(f"{type(model).__name__} is none of jlora's models: {_names()}")
    flat = traverse_util.flatten_dict(params, sep="/")
    expected = {path: leaf.shape for path, leaf in shapes_of(model, architecture.inputs(config)).items()}
    writing.check_params(flat, expected)
    origin = None if source is None else files.folder_of(source, revision, files.SMALL)
    record = _record(architecture, config, str(next(iter(flat.values())).dtype), origin)
    strip = config.head == "none" and architecture.bare
    table = architecture.table(config)
    bnb_tensors.check(table, flat)
    named = {key: key.removeprefix(architecture.prefix) if strip else key for row in table for key in row.keys}
    record.pop("quantization_config", None)  # of the checkpoint that it comes from
    if small := bnb_tensors.config(table, flat, named):
        record["quantization_config"] = small
    folder.mkdir(parents=True, exist_ok=True)
    writing.write_tensors(folder, table, flat, named, library=architecture.library, largest=largest_shard)
    writing.write_json(folder / files.CONFIG, record)
    if origin is not None and origin.resolve() != folder.resolve():
        for name in TOKENIZER:
            if reading.has(origin / name):
                shutil.copyfile(reading.regular(origin / name), folder / name)


def build(
    name: str | os.PathLike[str],
    *,
    head: Head | None = None,
    labels: int | None = None,
    revision: str | None = None,
    **options: Any,
) -> nn.Module:
    """The model of a checkpoint without its parameters; arguments and errors are those of `load`."""
    return _opened(name, head, labels, revision, options).model


def described(file: Path) -> tuple[Architecture, Any]:
    """The architecture and the config that a config.json describes, with no tensors to compare it with."""
    record = reading.read_json(file)
    architecture = _architecture(file.parent, record)
    head = _saved_head(file.parent, record, architecture, None)
    with _naming(file.parent):
        config = architecture.read(record, head)
    stored = {"param_dtype": record.get("dtype") or record.get("torch_dtype"), "labels": _labels(file.parent, record)}
    known = [field.name for field in dataclasses.fields(config)]
    with _naming(file.parent):
        return architecture, dataclasses.replace(config, **{k: v for k, v in stored.items() if v and k in known})


# -- what a checkpoint says it is --------------------------------------------------------------------------------------


class _Opened(NamedTuple):
    folder: Path
    architecture: Architecture
    asked: bool  # for a head that the checkpoint does not have, or of another size
    found: dict[str, files.Tensor]  # under the keys that the table has
    unused: list[str]  # the keys that belong to other heads
    model: nn.Module


def _opened(
    name: str | os.PathLike[str],
    head: Head | None,
    labels: int | None,
    revision: str | None,
    options: dict[str, Any],
    variant: str | None = None,
) -> _Opened:
    """A checkpoint of which the config and the tensors' headers are read."""
    folder = files.folder_of(name, revision)
    record = reading.read_json(folder / files.CONFIG)
    architecture = _architecture(folder, record)
    saved = _saved_head(folder, record, architecture, head)
    found = bnb.weights(folder, record, files.tensors(folder, architecture.library, variant))
    if labels is not None and not (head or saved).endswith("classification"):
        raise ValueError(f"load: labels={labels} are of a classification, and the head is {head or saved!r}")
    config = _config(folder, record, architecture, head or saved, labels, found, options)
    found, unused = _canonical(found, architecture, config)
    found = _turned(found, architecture, config) if architecture.library == "transformers" else found
    _check_layers(folder, architecture, config, found)
    asked = head not in (None, saved) or labels not in (None, _labels(folder, record))
    return _Opened(folder, architecture, asked, found, unused, architecture.build(config))


def _names() -> str:
    return ", ".join(architecture.model_type for architecture in ARCHITECTURES)


def _architecture(folder: Path, record: Mapping[str, Any]) -> Architecture:
    name = record.get("model_type", record.get("_class_name"))
    found = [architecture for architecture in ARCHITECTURES if architecture.model_type == name]
    if not found:
        problem = "has no model_type" if name is None else f"is of model_type {shown(name)}"
        raise ValueError(f"'{folder / files.CONFIG}' {problem}; supported are {_names()}")
    return found[0]


def _saved_head(folder: Path, record: Mapping[str, Any], architecture: Architecture, asked: Head | None) -> Head:
    """The head that the checkpoint was saved with; none for a class that is not known, if another head is asked for."""
    with _naming(folder):
        names = names_of(record, "architectures") or [architecture.classes["none"]]
    for head, name in architecture.classes.items():
        if name in names:
            return head
    if asked is not None:
        return "none"
    raise ValueError(
        f"'{folder / files.CONFIG}' is of {', '.join(names)}; supported are "
        f"{', '.join(architecture.classes.values())}. Pass head= to put one of {', '.join(architecture.classes)} on "
        "its body"
    )


def _config(
    folder: Path,
    record: Mapping[str, Any],
    architecture: Architecture,
    head: Head,
    labels: int | None,
    found: Mapping[str, files.Tensor],
    options: Mapping[str, Any],
) -> Any:
    """The model's config from the checkpoint's and the caller's."""
    with _naming(folder):
        config = architecture.read(record, head)
    own_labels = _labels(folder, record)
    given = {"labels": own_labels if labels is None else labels}
    return configured_for(config, found, options, what=f"'{folder}'", call="load", **given)


def configured_for(
    config: Any, found: Mapping[str, files.Tensor], options: Mapping[str, Any], *, what: str, call: str, **given: Any
) -> Any:
    """A config with the options of a caller, and else with the dtypes of a checkpoint's tensors.

    Args:
      config: of the model.
      found: its tensors.
      options: fields, as the caller gives them.
      what: the tensors are of, for errors.
      call: the function that was called, for errors.
      given: further fields, which some configs do not have.

    Raises:
      ValueError: if there are no tensors of numbers.
      TypeError: for an option that the config does not have.
    """
    sizes = dict.fromkeys(DTYPES, 0)
    for tensor in found.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    if not any(sizes[name] for name in DTYPES):
        raise ValueError(f"{what} holds no tensors of {', '.join(DTYPES)}")
    options = {k: jnp.dtype(v).name if k in ("dtype", "param_dtype") else v for k, v in options.items()}
    param_dtype = options.get("param_dtype", DTYPES[max(DTYPES, key=lambda name: sizes[name])])
    known = [field.name for field in dataclasses.fields(config)]
    wrong = [name for name in options if name not in known]
    if wrong:
        raise TypeError(f"{call}: {type(config).__name__} has no field {wrong[0]!r}; it has {', '.join(known)}")
    given |= {"param_dtype": param_dtype, "dtype": "float32" if param_dtype == "float16" else param_dtype, **options}
    return dataclasses.replace(config, **{name: value for name, value in given.items() if name in known})


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Errors of what config.json says name it."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"'{folder / files.CONFIG}' lacks {error}") from error
    except ValueError as error:
        raise ValueError(f"'{folder / files.CONFIG}': {error}") from error


def _labels(folder: Path, record: Mapping[str, Any]) -> int:
    """Number of labels of a checkpoint's classification."""
    names = _names_of_labels(folder, record)
    with _naming(folder):
        return len(names) or number_of({"num_labels": 2} | {**record}, "num_labels", LABELS)


def _names_of_labels(folder: Path, record: Mapping[str, Any]) -> Mapping[str, Any]:
    with _naming(folder):
        names = object_of(record, "id2label")
        numbers = {int(number) for number in names if re.fullmatch("[0-9]{1,9}", number)}
        if len(numbers) < len(names) or not all(isinstance(name, str | int | float) for name in names.values()):
            raise ValueError(f"config.json has id2label={shown(names)}, expected the name of each number")
        if wrong := LABELS.wrong("labels", len(names) or 1):
            raise ValueError(f"config.json has id2label={shown(names)}: {wrong}")
    return names


def _check_layers(folder: Path, architecture: Architecture, config: Any, found: Mapping[str, files.Tensor]) -> None:
    """Raises a ValueError for more layers than have tensors, before modules are built for all of them."""
    rows = [row for row in architecture.table(dataclasses.replace(config, scan=True)) if row.stacked]
    for before, name in architecture.layers:
        stacks = [row.keys for row in rows if row.path.startswith(f"{before}h/")]
        layers = len(stacks[0])
        there = sum(any(key in found for key in keys) for keys in zip(*stacks, strict=True))
        if there < layers:
            raise ValueError(f"'{folder / files.CONFIG}' has {name}={layers}, and there are tensors of {there} layers")


def shapes_of(model: nn.Module, inputs: tuple[jax.ShapeDtypeStruct, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a model's parameters, by path."""
    tree = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return traverse_util.flatten_dict(tree, sep="/")


def _canonical(
    found: Mapping[str, files.Tensor], architecture: Architecture, config: Any
) -> tuple[dict[str, files.Tensor], list[str]]:
    """The tensors under the keys that the table has, and which of them belong to other heads."""
    config = dataclasses.replace(config, scan=True)  # the same keys in fewer rows
    mine = {key for row in architecture.table(config) for key in row.keys}
    heads = [dataclasses.replace(config, head=head) for head in architecture.classes]
    known = mine | {key for other in heads for row in architecture.table(other) for key in row.keys}
    tensors: dict[str, files.Tensor] = {}
    for key, tensor in found.items():
        for pattern, replacement in architecture.renamed:
            key = re.sub(pattern, replacement, key)
        if re.search(architecture.ignored, key) and key not in known:
            continue
        tensors[architecture.prefix + key if key not in known and architecture.prefix + key in known else key] = tensor
    return tensors, [key for key in tensors if key in known - mine]


def _turned(found: dict[str, files.Tensor], architecture: Architecture, config: Any) -> dict[str, files.Tensor]:
    """The tensors, those in 4 bits with the shape that they had before: they are (out, in) whatever they were."""
    rows = architecture.table(dataclasses.replace(config, scan=True))
    same = {key for row in rows if row.order is None for key in row.keys if key in found and found[key].packed}
    return {key: t._replace(shape=t.shape[::-1]) if key in same else t for key, t in found.items()}


def _new_head(
    table: list[Leaf],
    found: Mapping[str, files.Tensor],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    architecture: Architecture,
    config: Any,
) -> list[Leaf]:
    """The rows of the head that the checkpoint does not have, or has for another number of labels."""
    body = {row.path for row in architecture.table(dataclasses.replace(config, head="none"))}
    return [
        row
        for row in table
        if row.path not in body
        and any(key not in found or found[key].shape != tensor_shape(row, shapes[row.path].shape) for key in row.keys)
    ]


# -- parameters --------------------------------------------------------------------------------------------------------


def _fitted(found: Mapping[str, files.Tensor], expected: Mapping[str, Shape]) -> dict[str, files.Tensor]:
    """The tensors with the shapes that are expected, where a linear layer is a 1 x 1 convolution in the file, or so."""
    result = {}
    for key, tensor in found.items():
        shape = expected.get(key, tensor.shape)
        same = {len(shape), len(tensor.shape)} == {2, 4} and (*shape, 1, 1)[:4] == (*tensor.shape, 1, 1)[:4]
        result[key] = tensor._replace(shape=shape, stored=tensor.shape) if same else tensor
    return result


def _read(
    row: Leaf, tensors: list[files.Tensor], like: jax.ShapeDtypeStruct, place: Place | None, choose: quantised.Choose
) -> Any:
    """A parameter: as it is, in 4 bits as the checkpoint has it, or quantised."""
    packed = any(tensor.packed for tensor in tensors)
    scheme = choose(row.path, like) if quantised.is_matrix(row, like) else None
    if not packed and scheme is None:
        return _placed(row, tensors, like, place)
    if packed and scheme is not None:
        raise ValueError(f"load: {row.path!r} is quantised already ({row.keys[0]!r}): leave out quantize=")
    where = None if place is None else _sharding(row.path, like, place)
    if scheme is None:
        return quantised.read(row, tensors, like, where)
    return quantised.quantise(row, tensors, like, scheme, where)


def _placed(row: Leaf, tensors: list[files.Tensor], like: jax.ShapeDtypeStruct, place: Place | None) -> jax.Array:
    """A parameter, on its devices: each of them is given its own slice alone."""
    read: dict[tuple[tuple[int, int], ...], np.ndarray] = {}  # devices may hold the same slices

    def part(given: tuple[slice, ...] | None) -> np.ndarray:
        index = tuple(slice(*i.indices(n)) for i, n in zip(given or (), like.shape, strict=True))
        place = tuple((i.start, i.stop) for i in index)
        if place not in read:
            read[place] = fresh(index)
        return read[place]

    def fresh(index: tuple[slice, ...]) -> np.ndarray:
        out = files.aligned(tuple(i.stop - i.start for i in index), like.dtype)
        slices = tensor_slices(row, like.shape, index)
        for layer, tensor in zip(out, tensors[index[0]], strict=True) if row.stacked else [(out, tensors[0])]:
            files.read_into(to_tensor(row, layer), tensor, slices)
        return out

    whole = tuple(slice(0, n) for n in like.shape)
    if place is None:
        return jax.device_put(part(whole))
    return jax.make_array_from_callback(like.shape, _sharding(row.path, like, place), part)


def _sharding(path: str, like: jax.ShapeDtypeStruct, place: Place) -> Sharding:
    return place if isinstance(place, Sharding) else place(path, like)


def _initial(
    model: nn.Module,
    inputs: tuple[jax.ShapeDtypeStruct, ...],
    paths: list[str],
    seed: int,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    place: Place | None,
) -> dict[str, jax.Array]:
    """Initial values of a few parameters. Under jit nothing of the others is computed."""
    if not paths:
        return {}

    def some(key: jax.Array) -> dict[str, jax.Array]:
        zeros = [jnp.zeros(like.shape, like.dtype) for like in inputs]
        flat = traverse_util.flatten_dict(model.init(key, *zeros)["params"], sep="/")
        return {path: flat[path] for path in paths}

    where = None if place is None else {path: _sharding(path, shapes[path], place) for path in paths}
    found: dict[str, jax.Array] = jax.jit(some, out_shardings=where)(jax.random.key(seed))
    return found


# -- saving ------------------------------------------------------------------------------------------------------------


def _record(architecture: Architecture, config: Any, dtype: str, origin: Path | None) -> dict[str, Any]:
    """The config.json of a model, over that of the checkpoint which it comes from."""
    old = {} if origin is None else reading.read_json(origin / files.CONFIG)
    with _naming(origin or Path()):
        record = _merged(old, {"model_type": architecture.model_type, **architecture.write(config)})
    if architecture.library == "diffusers":
        return {"_class_name": record.pop("model_type"), **record}
    record |= {"architectures": [architecture.classes[config.head]], "dtype": dtype}
    record.pop("torch_dtype", None)
    names = {} if origin is None else _names_of_labels(origin, old)
    if config.head.endswith("classification") and len(names) != config.labels:
        record["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.labels)}
        record["label2id"] = {name: int(i) for i, name in record["id2label"].items()}
    return record


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`old` updated by `new`, and so the configs within, such as those of CLIP's towers."""
    parts = [k for k, v in new.items() if isinstance(v, Mapping) and "model_type" in v]
    return {**old, **new, **{k: _merged(object_of(old, k), new[k]) for k in parts}}
