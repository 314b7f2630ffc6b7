"""Names of a model's parameters in torch: its key table, and the modules that the table says there are."""

import dataclasses
import functools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from flax import linen as nn

from jlora import tree
from jlora.interop.forms import form_of
from jlora.models.architecture import Architecture
from jlora.models.catalogue import ARCHITECTURES
from jlora.models.tensors import Leaf, tensor_shape


@dataclasses.dataclass(frozen=True)
class Names:
    """Names of these parameters in a torch model.

    Attributes:
      rows: the key table.
      prefix: that the class of a whole model has, and that of its body alone lacks: "transformer.".
      strip: the class of this model has no prefix.
      head: "causal_lm", "sequence_classification", ...; "" where it is not known.
      modules: (regex, replacement) from keys of checkpoints to names in memory.
      ignored: a regex: keys that are no parameters of their own.
    """

    rows: tuple[Leaf, ...]
    prefix: str = ""
    strip: bool = False
    head: str = ""
    modules: tuple[tuple[str, Any], ...] = ()
    ignored: str = r"(?!)"

    def written(self, key: str) -> str:
        """The name in memory, in this model's own torch class, of a key of the table."""
        for pattern, replacement in self.modules:
            key = re.sub(pattern, replacement, key)
        return key.removeprefix(self.prefix) if self.strip else key

    def read(self, name: str) -> str:
        """The key of the table that a file's name is, in any spelling; the name itself where there is none."""
        return self._keys.get(name, name)

    @functools.cached_property
    def _keys(self) -> dict[str, str]:
        keys = [key for row in self.rows for key in row.keys]
        spelt: dict[str, str] = {}
        for key in keys:
            renamed = dataclasses.replace(self, strip=False).written(key) if self.modules else key
            for name in (key.removeprefix(self.prefix), renamed.removeprefix(self.prefix), renamed):
                spelt.setdefault(name, key)
        return spelt | {key: key for key in keys}

    @functools.cached_property
    def tied(self) -> str:
        """The key of the embedding that is the head of a language model, too; "" where there is none."""
        keys = {key for row in self.rows for key in row.keys}
        if self.head != "causal_lm" or any(key.startswith(("lm_head.", "cls.")) for key in keys):
            return ""
        tables = [row.keys[0] for row in self.rows if row.path.endswith("/embedding")]
        return tables[0] if tables else ""


def names_of(model: nn.Module | None, names: Iterable[Leaf] | None, caller: str) -> Names:
    """Names of one of jlora's models, or those that are given.

    Raises:
      TypeError: for neither of them, or both.
      ValueError: for a model that is none of jlora's.
    """
    if (model is None) == (names is None):
        raise TypeError(
            f"{caller} takes model=, one of jlora.models, or names=, the key table of another: "
            "[jlora.models.tensors.leaf(path, key, order), ...]"
        )
    if names is not None:
        rows = tuple(names)
        wrong = [row for row in rows if not isinstance(row, Leaf)]
        if wrong:
            raise TypeError(f"{caller}: names= is a table of jlora.models.tensors.Leaf, not of {wrong[0]!r:.200}")
        return Names(rows)
    config: Any = getattr(model, "config", None)
    architecture = architecture_of(config)
    if architecture is None:
        raise ValueError(
            f"{caller}: {type(model).__name__} is none of jlora's models, and its layers have no names in torch: pass "
            "names=, a table of jlora.models.tensors.Leaf"
        )
    head = getattr(config, "head", "")
    strip = head == "none" and architecture.bare
    table = tuple(architecture.table(config))
    return Names(table, architecture.prefix, strip, head, architecture.modules, architecture.ignored)


def architecture_of(config: Any) -> Architecture | None:
    """The architecture of a config of jlora's models; None of others."""
    for architecture in ARCHITECTURES:
        if dataclasses.is_dataclass(config) and type(config) is architecture.config and architecture.fits(config):
            return architecture
    return None


class Module(NamedTuple):
    """A torch module with a weight.

    Attributes:
      name: its path.
      kind: "linear", "conv1d" (GPT-2's, whose weight is (in, out)), "conv", "embedding" or "other".
      shape: of the weight.
    """

    name: str
    kind: str
    shape: tuple[int, ...]


def modules_of(names: Names, params: Any) -> dict[str, Module]:
    """The modules of the key table that have a weight, by the name that this model's torch class has for them."""
    named, _ = tree.leaves(params)
    if not any(row.path in named for row in names.rows):
        some = [next(iter(named), "none"), next(iter(names.rows)).path if names.rows else "none"]
        raise ValueError(
            f"the parameters are not those of the key table: the first is {some[0]!r}, the table's {some[1]!r}. "
            'A model\'s are the tree under "params"'
        )
    found: dict[str, Module] = {}
    for row in names.rows:
        if row.path not in named:
            continue
        shape = tuple(named[row.path].shape)
        own = shape[1:] if row.stacked else shape
        for key in row.keys:
            module, _, parameter = names.written(key).rpartition(".")
            if parameter == "weight":
                found[module] = Module(module, *_of(row, own, shape))
    return found


_KINDS = {"out_in": "linear", "in_out": "conv1d", "table": "embedding"}


def _of(row: Leaf, own: tuple[int, ...], shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    if len(own) < 2:
        return "other", tensor_shape(row, shape)
    form = form_of(row, own)
    lengths = list(form.shape)
    if row.part:
        lengths[row.part.axis] *= row.part.parts
    return ("conv" if form.window else _KINDS[form.layout]), tuple(lengths)
