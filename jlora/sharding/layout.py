"""`Layout`: over which axes of a mesh the axes of weights are split, and the rows of a batch."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora import tree
from jlora.quant.place import shardings_of
from jlora.quant.quantised import Quantised
from jlora.sharding.annotations import Rules, axes_of
from jlora.transform.explicit import names_of

PyTree = Any
Axes = Sequence[str | tuple[str, ...] | None]
Place = Callable[[str, Any], NamedSharding]


@dataclass(frozen=True)
class Layout:
    """Over which axes of a mesh the axes of weights are split, and the rows of a batch.

    Attributes:
      rules: (pattern, axes): the first pattern that is found in a path, as by `re.search`, says how the last axes of
        the array are split: `("fsdp", "tp")` those of a matrix, whether it stands alone or in a stack of scanned layers
        or experts, whose leading axes stay whole. An axis is the name of one of the mesh, several of them, or None.
      batch: the axes of the mesh over which the rows of a batch are split, the outermost first.
      lenient: pattern of the paths whose axes stay whole where the mesh does not divide them, as GPT-2's vocabulary of
        50,257 does not divide by 2; of all others that is an error.
      sequence: the axes of the mesh over which the second axis of a batch's arrays is split, the tokens of a row. Only
        attention sees more than one token of a row: for it keys and values are gathered, and nothing else is.

    Axes that are named here and not on a mesh have one device: a layout with "fsdp" and "tp" is good for data parallel
    training on a mesh of "data" alone, for either of the two, and for all three.
    """

    rules: tuple[tuple[str, Axes], ...]
    batch: tuple[str, ...] = ("dcn", "data", "fsdp")
    lenient: str = r"(?!)"
    sequence: tuple[str, ...] = ("sequence",)

    @classmethod
    def of(cls, annotated: PyTree, rules: Rules | None = None, rest: "Layout | None" = None) -> "Layout":
        """The layout that a model's own annotations say, Flax's of linen or NNX.

            shapes = jax.eval_shape(model.init, key, x)["params"]            # with their boxes; arrays do as well
            layout = jlora.sharding.Layout.of(shapes, (("embed", "fsdp"), ("mlp", "tp"), ("layers", None)))

        It names the leaves by their paths, and so is good for the same weights without their boxes, too.

        Args:
          annotated: parameters of linen, with the boxes of `nn.with_logical_partitioning` and `nn.with_partitioning`;
            or of NNX, `nnx.split(model, nnx.Param, ...)[1]`, with the metadata of `nnx.with_partitioning`.
          rules: (logical axis, axis of the mesh, several or None), as `nn.logical_axis_rules` takes them and with the
            same precedence: the first rule of an array's axis whose axes of the mesh no rule before it has taken. Rules
            that an annotation brings along come first. Without any, annotations name the mesh's own axes.
          rest: says how the leaves without an annotation lie, and which axes split the rows of a batch. Without it such
            leaves are an error, which lists them, when the layout is used: `Layout((("", ()),))` leaves them whole.

        Raises:
          ValueError: if nothing is annotated, or no rule knows one of the logical axes.
        """
        paths: dict[Any, list[str]] = {}
        for path, axes in axes_of(annotated, rules).items():
            paths.setdefault(axes, []).append(re.escape(path))
        said = tuple((rf"^({'|'.join(paths[axes])})$", axes) for axes in paths)
        rest = cls(()) if rest is None else rest
        return replace(rest, rules=(*said, *rest.rules))

    @property
    def axes(self) -> list[str]:
        """The axes that it knows, in the order in which it names them."""
        named = [name for _, axes in self.rules for part in axes for name in names_of(part)]
        return list(dict.fromkeys([*self.batch, *self.sequence, *named]))

    def on(self, mesh: Mesh) -> Place:
        """(path, array or shape) -> where it lies on a mesh.

        This is what `jlora.models.load(sharding=)` takes. The function raises a ValueError for a path that no rule
        covers, and for an axis that the mesh does not divide, with the sizes that would.

        Raises:
          ValueError: for a mesh with an axis that the layout does not know.
        """
        unknown = [name for name in mesh.axis_names if name not in self.axes]
        if unknown:
            raise ValueError(
                f"the mesh has the axis {unknown[0]!r}, and the layout knows {', '.join(map(repr, self.axes))}: rename "
                "it, or name it in the layout's rules or its batch="
            )

        def place(path: str, x: Any) -> NamedSharding:
            axes = self._axes_of(path)
            if axes is None:
                raise ValueError(f"no rule of the layout covers {path!r}")
            return NamedSharding(mesh, self._spec(path, x, axes, mesh))

        return place

    def shardings(self, params: PyTree, mesh: Mesh) -> PyTree:
        """The tree of `NamedSharding` of a tree of arrays or shapes; that of a quantised leaf has one for each array.

        A leaf that is no array (a module's function) stands for itself.

        Raises:
          ValueError: for all leaves that no rule covers, and as `on`.
        """
        leaves, structure = tree.leaves(params)
        place = self.on(mesh)
        bare = [path for path, leaf in leaves.items() if hasattr(leaf, "dtype") and self._axes_of(path) is None]
        if bare:
            raise ValueError(
                f"no rule of the layout covers {len(bare)} of {len(leaves)} leaves: {', '.join(bare[:10])}"
                f"{', ...' if len(bare) > 10 else ''}. A last rule of ('', ()) leaves all others whole"
            )
        places = [
            _of_leaf(path, leaf, place(path, leaf)) if hasattr(leaf, "dtype") else leaf for path, leaf in leaves.items()
        ]
        return jax.tree.unflatten(structure, places)

    def rows(self, mesh: Mesh) -> NamedSharding:
        """Where a batch lies: its rows split over the axes of `batch` that the mesh has, their tokens over `sequence`.

        An array with rows alone (labels of texts) has no use for the second entry: `put_rows` leaves it out.
        """
        split = [tuple(name for name in names if name in mesh.axis_names) for names in (self.batch, self.sequence)]
        entries = [names or None for names in split]
        return NamedSharding(mesh, PartitionSpec(*entries[: 2 if split[1] else 1 if split[0] else 0]))

    def _axes_of(self, path: str) -> Axes | None:
        return next((axes for pattern, axes in self.rules if re.search(pattern, path)), None)

    def _spec(self, path: str, x: Any, axes: Axes, mesh: Mesh) -> PartitionSpec:
        if len(axes) > len(x.shape):
            raise ValueError(f"{path!r} has shape {x.shape}, and its rule {tuple(axes)} has more axes")
        of = [tuple(name for name in names_of(part) if name in mesh.axis_names) for part in axes]
        entries: list[Any] = [None] * (len(x.shape) - len(axes))
        for axis, names in enumerate(of, len(entries)):
            fits = x.shape[axis] % math.prod(mesh.shape[name] for name in names) == 0
            if not fits and not re.search(self.lenient, path):
                raise ValueError(indivisible(path, x.shape, axis, names, mesh))
            entries.append((names if len(names) > 1 else names[0]) if names and fits else None)
        return PartitionSpec(*entries)


def indivisible(path: str, shape: Sequence[int], axis: int, names: Sequence[str], mesh: Any) -> str:
    """The error of an axis of an array that axes of a mesh do not divide: it says what would."""
    size, parts = shape[axis], math.prod(mesh.shape[name] for name in names)
    nearest = max(n for n in range(1, parts) if size % n == 0)
    return (
        f"{path!r} has shape {tuple(shape)}, and its axis {axis} of {size} is not a multiple of {parts}, the devices "
        f"of {' x '.join(names)}: the nearest that fits is {nearest}"
    )


_COLUMNS = r"(attn\w*/(query|key|value|to_q|to_k|to_v)|mlp/(fc|gate|up))"
_ROWS = r"(attn\w*/(out|to_out)|mlp/(proj|down))"

MODELS = Layout(
    (
        (rf"{_COLUMNS}/kernel$", ("fsdp", "tp")),
        (rf"{_COLUMNS}/bias$", ("tp",)),
        (rf"{_ROWS}/kernel$", ("tp", "fsdp")),
        (r"wte/embedding$", ("tp", "fsdp")),
        (r"head/kernel$", ("fsdp", "tp")),
        (r"(patch|conv_in)/kernel$", ("fsdp",)),
        (r"(kernel|embedding)$", ("fsdp", None)),
        (r"", ()),
    ),
    lenient=r"embedding|head|conv|patch|classifier|projection|pooler|dense|ff/|proj_|emb",
)
"""The layout of all of jlora.models: fully sharded over "fsdp", tensor parallel over "tp", rows over "data" and "fsdp".

A block's first products are split by columns over "tp" and its last by rows, so that one all-reduce ends each of
attention and MLP (Shoeybi et al., arXiv 1909.08053); everything with two axes lies over "fsdp" along one of them (Zhao
et al., arXiv 2304.11277). "tp" has to divide the heads, those of keys and values as well.
"""


def _of_leaf(path: str, leaf: Any, place: NamedSharding) -> Any:
    return shardings_of(leaf, place, path) if isinstance(leaf, Quantised) else place
