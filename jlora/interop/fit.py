"""An adapter's layers against a checkpoint's tensors: under which keys they lie there, and in which layout."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jlora.interop.layer import Layer, Layout
from jlora.models import reading
from jlora.models.catalogue import ARCHITECTURES

Shapes = Mapping[str, tuple[int, ...]]
CONFIG = "config.json"
TABLES = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared")
SHOWN = 5  # names in an error


class Renaming(NamedTuple):
    """Change of the keys' beginning that takes an adapter's names to a base's: "model." dropped, or added."""

    drop: str = ""
    add: str = ""

    def __call__(self, key: str) -> str:
        """The base's key."""
        return self.add + key.removeprefix(self.drop) if key.startswith(self.drop) else key

    def __bool__(self) -> bool:
        return bool(self.drop or self.add)


def fitted(
    layers: Sequence[Layer], shapes: Shapes, aliases: Mapping[str, str] | None = None, *, tied: bool = False
) -> tuple[dict[str, list[Layer]], list[Layer]]:
    """The layers by the key of the tensor that they change, and those that bring a tensor that the base does not have.

    A whole head for a base whose head is its embedding is among the latter: `merge_folder` compares the two.

    The path of a module depends on the class that the adapter was trained on: one prefix may be dropped or added, or
    the first name be replaced, the same for all layers.

    Args:
      layers: of the adapter.
      shapes: of the base's tensors.
      aliases: other names of theirs, see `aliases`.
      tied: whether a layer of the head may change the embedding, where they are one tensor.

    Raises:
      ValueError: if a layer has no tensor under any such change, or two changes lead to different tensors.
    """
    if not layers:
        raise ValueError("the adapter holds nothing to merge")
    aliases = aliases or {}
    names = {alias: shapes[key] for alias, key in aliases.items()} | dict(shapes)
    layers = _of_one_table(layers, names, tied)
    needed = sorted({layer.key for layer in layers if not (layer.optional or layer.kind == "full")})
    table = embedding_of(shapes)
    needed = needed or sorted({layer.key for layer in layers if not (layer.optional or (table and is_head(layer.key)))})
    renaming = _renaming(needed, names)
    placed: dict[str, list[Layer]] = {}
    added: list[Layer] = []
    for layer in layers:
        key = renaming(layer.key)
        key = aliases.get(key, key) if key not in shapes else key
        if key in shapes:
            placed.setdefault(key, []).append(layer)
            placed[key].sort(key=lambda own: own.kind != "full")  # PEFT writes the embedding that is adapted beside it
        elif layer.kind == "full":
            added.append(layer)
    return placed, added


def aliases(folder: Path, keys: Iterable[str]) -> dict[str, str]:
    """The names that transformers has for tensors in memory, where they are not those in its files, with the latter.

    Only of architectures that jlora has, as config.json says; that is not needed otherwise.
    """
    record = reading.read_json(folder / CONFIG) if reading.has(folder / CONFIG) else {}
    found: dict[str, str] = {}
    for architecture in ARCHITECTURES:
        if architecture.model_type == record.get("model_type"):
            for key in keys:
                name = key
                for pattern, replacement in architecture.modules:
                    name = re.sub(pattern, replacement, name)
                if name != key:
                    found[name] = key
    return found


def is_head(key: str) -> bool:
    """Whether a key is that of a language model's head, which transformers may tie to the embedding.

    >>> is_head("lm_head.weight"), is_head("cls.predictions.decoder.weight"), is_head("model.decoder.weight")
    (True, True, False)
    """
    names = key.split(".")
    return names[-2:] in (["lm_head", "weight"], ["embed_out", "weight"]) or names[-3:] in (
        ["predictions", "decoder", "weight"], ["lm_head", "decoder", "weight"],
    )  # fmt: skip


def embedding_of(shapes: Shapes) -> str:
    """The table of tokens of a language model whose file has no head: its head, too. "" of others."""
    tables = [
        key for key in shapes if key.split(".")[-2:-1] and key.split(".")[-2] in TABLES and key.endswith("weight")
    ]
    has_head = any(key.split(".")[-2:] in (["lm_head", "weight"], ["embed_out", "weight"]) for key in shapes)
    return tables[0] if len(tables) == 1 and not has_head else ""


def _of_one_table(layers: Sequence[Layer], shapes: Shapes, tied: bool) -> list[Layer]:
    """The layers, those of a head that is the embedding being the embedding's."""
    table = embedding_of(shapes)
    found = []
    for layer in layers:
        if layer.key == "lm_head.weight" and table and layer.kind != "full":
            if not tied:
                raise ValueError(
                    f"'lm_head.weight' is not in the base, whose head is its embedding {table!r}: --tied (tied=True) "
                    "merges into that, and changes both, as PEFT's merge does"
                )
            layer = layer._replace(module=table.rpartition(".")[0])
        found.append(layer)
    return found


def _renaming(keys: Sequence[str], shapes: Shapes) -> Renaming:
    """The one change of prefix under which all keys are there."""
    if all(key in shapes for key in keys):
        return Renaming()
    probe = max(keys, key=lambda key: (key.count("."), len(key)))
    found: dict[tuple[str, ...], Renaming] = {}
    names: tuple[str, ...]
    for change in _changes(probe, shapes):
        names = tuple(change(key) for key in keys)
        if all(name in shapes for name in names):
            found.setdefault(names, change)
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        ways = " or ".join(repr(change(probe)) for change in list(found.values())[:SHOWN])
        raise ValueError(f"{probe!r} of the adapter may be {ways} of the base: rename the adapter's tensors")
    absent = [key for key in keys if key not in shapes]
    raise ValueError(
        f"{len(absent)} of the adapter's {len(keys)} tensors are not in the base: {', '.join(_near(absent, shapes))}. "
        "Is it the base that the adapter was trained on?"
    )


def _changes(key: str, shapes: Shapes) -> Iterable[Renaming]:
    """The changes of prefix that take a key to one of the base's; the module and the parameter keep their names."""
    names = key.split(".")
    for dropped in range(len(names) - 1):
        drop = "".join(f"{name}." for name in names[:dropped])
        rest = key[len(drop) :]
        if rest in shapes:
            yield Renaming(drop)
        if dropped <= 1:
            for there in shapes:
                if there.endswith(f".{rest}"):
                    yield Renaming(drop, there[: -len(rest)])


def _near(keys: Sequence[str], shapes: Shapes) -> list[str]:
    lines = []
    for key in keys[:SHOWN]:
        near = difflib.get_close_matches(key, shapes, n=1, cutoff=0.0)
        lines.append(f"{key!r} (the closest is {near[0]!r})" if near else repr(key))
    return lines + ([f"and {len(keys) - SHOWN} more"] if len(keys) > SHOWN else [])


# -- layouts -----------------------------------------------------------------------------------------------------------


def sides(layer: Layer) -> tuple[int | None, int | None]:
    """Outputs and inputs of the matrix that a layer is made for; None where its tensors do not say."""
    t = {name: x.shape for name, x in layer.tensors.items()}
    match layer.kind:
        case "lora" | "adalora" | "pissa" | "olora":
            return t["B"][0], math.prod(t["A"][1:])
        case "vera":
            return t["b"][0], None
        case "loha":
            return (t["w1_a"][1], t["w1_b"][1]) if "t1" in t else (t["w1_a"][0], t["w1_b"][1])
        case "lokr":
            one = t["w1"] if "w1" in t else (t["w1_a"][0], t["w1_b"][1])
            two = t["w2"] if "w2" in t else (t["w2_a"][0], t["w2_b"][1])
            return one[0] * two[0], one[1] * two[1]
        case "ia3":
            return (t["l"][0], None) if len(t["l"]) > 1 and t["l"][0] > 1 else (None, math.prod(t["l"]))
        case "oft":
            blocks, entries = t["R"]
            return None, blocks * round((1 + math.sqrt(1 + 8 * entries)) / 2) if blocks > 1 else None
    return None, None


def _told(layer: Layer, shape: Sequence[int]) -> Layout | None:
    """The layout that the shapes tell; None for squares."""
    outputs, inputs = sides(layer)
    fits = lambda pair: all(mine in (None, theirs) for mine, theirs in zip((outputs, inputs), pair, strict=True))
    straight, turned = fits((shape[0], shape[1])), fits((shape[1], shape[0]))
    if not straight and not turned:
        made = " and ".join(f"{n} {what}" for n, what in ((outputs, "outputs"), (inputs, "inputs")) if n is not None)
        raise ValueError(f"{layer.key!r} has shape {tuple(shape)}, and the adapter was made for {made}")
    return None if straight and turned else "out_in" if straight else "in_out"


def layouts(
    placed: Mapping[str, Sequence[Layer]], shapes: Shapes, fan_in_fan_out: bool | None = None
) -> dict[str, Layout]:
    """The layout of each tensor that is changed.

    A Linear is (out, in) and GPT-2's Conv1D (in, out). Of a square the shapes do not tell it. Then the nearest others
    do, by the names of their modules: matrices that the adapter changes and that are not square, and matrices of the
    base with a bias, which is as long as the outputs. Where these disagree or there are none, the adapter's config.

    Args:
      placed: layers by the base's key, see `fitted`.
      shapes: of the base's tensors.
      fan_in_fan_out: what the adapter's config says of its matrices; None if it says nothing.

    Raises:
      ValueError: if a layer does not fit its tensor, or the layout of a square cannot be told.
    """
    found: dict[str, Layout] = {}
    squares: list[str] = []
    for key, layers in placed.items():
        kinds, shape = {layer.kind for layer in layers}, shapes[key]
        if "table" in kinds or "experts" in kinds:
            found[key] = "table" if "table" in kinds else "stack"
        elif len(shape) != 2 or kinds <= {"full", "diff", "rows"}:
            found[key] = "out_in"
        else:
            told = [
                layout
                for layer in layers
                if layer.kind not in ("full", "diff", "rows")
                if (layout := _told(layer, shape))
            ]
            if told:
                found[key] = told[0]
            else:
                squares.append(key)
    if squares:
        own = {key: layout for key, layout in found.items() if len(shapes[key]) == 2 and layout in ("out_in", "in_out")}
        evidence = _of_biases(shapes) | {key: layout for key, layout in own.items() if shapes[key][0] != shapes[key][1]}
        for key in squares:
            found[key] = _of_square(key, evidence, fan_in_fan_out)
    return found


def layouts_of(shapes: Shapes) -> dict[str, Layout]:
    """The layouts of a base's matrices by its biases alone; those that none tells are (out, in)."""
    evidence = _of_biases(shapes)
    matrices = [key for key, shape in shapes.items() if len(shape) == 2 and key.endswith(".weight")]
    found: dict[str, Layout] = {}
    for key in matrices:
        told = evidence.get(key) or _of_square(key, evidence, False)
        bias = shapes.get(f"{key.removesuffix('.weight')}.bias")
        found[key] = told if bias is not None or told == "out_in" else "out_in"
    return found


def _of_biases(shapes: Shapes) -> dict[str, Layout]:
    found: dict[str, Layout] = {}
    for key, shape in shapes.items():
        bias = shapes.get(f"{key.removesuffix('.weight')}.bias") if key.endswith(".weight") else None
        if bias is not None and len(shape) == 2 and shape[0] != shape[1] and bias in ((shape[0],), (shape[1],)):
            found[key] = "out_in" if bias == (shape[0],) else "in_out"
    return found


def _of_square(key: str, evidence: Mapping[str, Layout], fan_in_fan_out: bool | None) -> Layout:
    names = key.split(".")
    shared = {other: _shared(names, other.split(".")) for other in evidence}
    most = max(shared.values(), default=0)
    layouts = {evidence[other] for other, n in shared.items() if n == most}
    if len(layouts) == 1:
        return layouts.pop()
    if fan_in_fan_out is not None:
        return "in_out" if fan_in_fan_out else "out_in"
    raise ValueError(
        f"{key!r} is square, and neither its neighbours nor the adapter's config tell whether it is (out, in), as of a "
        "Linear, or (in, out), as of GPT-2's Conv1D: put fan_in_fan_out into adapter_config.json"
    )


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    n = 0
    while n < min(len(one), len(other)) and one[n] == other[n]:
        n += 1
    return n
