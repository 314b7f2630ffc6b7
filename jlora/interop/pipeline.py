"""Adapters of a pipeline's components: from a file's layers to parameters and back, and the file on disk."""

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora import tree
from jlora.adapted.adapted import Adapted
from jlora.interop import layer as layer_module
from jlora.interop import modules, onto, tensor_file
from jlora.interop.layer import Layer
from jlora.methods.checks import check_pattern
from jlora.models.tensors import Leaf, tensor_slices, to_tensors
from jlora.quant.quantised import Quantised

SHOWN = 20  # lines of an error


class File(NamedTuple):
    """A file of adapters.

    Attributes:
      layers: of each component that the file adapts, "unet", "text_encoder", "text_encoder_2".
      metadata: what the file says of itself, all strings: `ss_tag_frequency`, `modelspec.title`.
      tokens: embeddings of new tokens by their text, (width,) or (tokens, width).
    """

    layers: dict[str, list[Layer]]
    metadata: dict[str, str]
    tokens: dict[str, np.ndarray]


# -- the file ----------------------------------------------------------------------------------------------------------


def read_tensors(
    file: str | os.PathLike[str], *, without: str | None = None, pickled: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors whose keys `without` does not match, and the metadata.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a damaged file, a pickle that is not asked for, numbers that are not finite, a `without` that
        is no regular expression.
    """
    pattern = None if without is None else re.compile(check_pattern(without, "without"))
    with tensor_file.open(file, pickled=pickled) as opened:
        keys = [key for key in opened.headers if pattern is None or not pattern.search(key)]
        found = {key: opened.read(key) for key in keys}
        tensor_file.check_finite(file, found)
        return found, dict(opened.metadata)


def cast(tensors: Mapping[str, np.ndarray], dtype: Any) -> dict[str, np.ndarray]:
    """Contiguous tensors, the floating-point ones in a dtype; in their own where it is None.

    Raises:
      ValueError: if a number is too large for the dtype.
    """
    found = {key: np.asarray(x, order="C") for key, x in tensors.items()}
    if dtype is None:
        return found
    for key, x in found.items():
        if np.issubdtype(x.dtype, np.integer):
            continue
        with np.errstate(over="ignore"):
            found[key] = x.astype(dtype)
        if not np.isfinite(found[key].astype(np.float32)).all() and np.isfinite(x.astype(np.float32)).all():
            raise ValueError(
                f"{key!r} reaches {np.abs(x).max():g}, more than {np.dtype(dtype)} holds: choose another dtype"
            )
    return found


def raise_all(wrong: Sequence[str], head: str) -> None:
    """One ValueError of all lines, if there are any."""
    if wrong:
        more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        raise ValueError("\n  ".join([f"{head} {len(wrong)} of the layers:", *wrong[:SHOWN], *more]))


# -- the parameters ----------------------------------------------------------------------------------------------------


def models_of(params: Mapping[str, Any], names: Mapping[str, Sequence[Leaf]]) -> dict[str, dict[str, modules.Shape]]:
    """The shapes of each component's tensors.

    Raises:
      ValueError: if the two do not have the same components, or others than a pipeline has.
    """
    modules.check_components(params)
    if set(params) != set(names):
        raise ValueError(f"params has the components {sorted(params)}, and names {sorted(names)}: expected the same")
    return {component: modules.shapes_of(params[component], names[component]) for component in params}


def check_tokens(found: File, origin: str) -> None:
    """Raises a ValueError if the file has embeddings of new tokens."""
    if found.tokens:
        raise ValueError(
            f"{origin} has embeddings of the new tokens {', '.join(map(repr, found.tokens))}, which are no adapter: "
            "take them from `read`, and leave them out here by `without`"
        )


def placed(
    found: File, params: Mapping[str, Any], names: Mapping[str, Sequence[Leaf]], *, origin: str
) -> dict[str, Adapted]:
    """The layers of each component on its parameters.

    Raises:
      ValueError: for embeddings of new tokens, and layers that jlora does not train.
    """
    check_tokens(found, origin)
    result, wrong = {}, []
    for component, layers in found.layers.items():
        try:
            result[component] = onto.place(
                layers, params[component], names[component], origin=f"{origin}, {component},"
            )
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("\n".join(wrong))
    return result


def merged(
    found: File, params: Mapping[str, Any], names: Mapping[str, Sequence[Leaf]], *, origin: str
) -> dict[str, Any]:
    """The parameters of each component with the file's layers in them, in their own dtypes; `params` stays as it is.

    Raises:
      ValueError: for embeddings of new tokens.
    """
    check_tokens(found, origin)
    result = dict(params)
    for component, layers in found.layers.items():
        named, structure = tree.leaves(params[component])
        leaves = dict(named)
        by_key: dict[str, list[Leaf]] = {}
        for row in names[component]:
            for key in row.keys:
                by_key.setdefault(key, []).append(row)
        for layer in layers:
            rows = by_key[layer.key]
            own = {row.path: np.asarray(jax.device_get(tree.dense(leaves[row.path]))) for row in rows}
            tensor = layer_module.merged(layer, to_tensors(rows, own)[layer.key])
            for row in rows:
                leaves[row.path] = _with_tensor(row, own[row.path], row.keys.index(layer.key), tensor)
        result[component] = jax.tree.unflatten(structure, leaves.values())
    return result


def _with_tensor(row: Leaf, leaf: np.ndarray, number: int, tensor: np.ndarray) -> jax.Array:
    """A parameter with what one of its tensors says, in the place of what it was."""
    inner = leaf.shape[1:] if row.stacked else leaf.shape
    whole = [slice(None)] * leaf.ndim
    part = tensor[tensor_slices(row, leaf.shape, whole)].transpose(row.order or tuple(range(len(inner))))
    value = leaf.copy()
    value[number if row.stacked else ...] = part.astype(leaf.dtype)
    return jnp.asarray(value)


def layers_of(adapted: Adapted, names: Sequence[Leaf]) -> list[Layer]:
    """The layers of an adapter; of a leaf that was trained whole, what was added to the base."""
    return [
        _difference(layer, adapted, names) if layer.kind == "full" else layer
        for layer in onto.layers_of(adapted, names)
    ]


def _difference(layer: Layer, adapted: Adapted, names: Sequence[Leaf]) -> Layer:
    leaves, _ = tree.leaves(adapted.base)
    rows = [row for row in names if layer.key in row.keys]
    base = to_tensors(rows, {row.path: np.asarray(jax.device_get(tree.dense(leaves[row.path]))) for row in rows})
    added = np.asarray(layer.tensors["value"], np.float32) - np.asarray(base[layer.key], np.float32)
    return layer._replace(kind="diff", tensors={"added": added})


def warn_of_residual(bases: Iterable[Any], file: str | os.PathLike[str]) -> None:
    """Warns of starts that changed a base (LoftQ, QPiSSA): the adapter fits that alone, which no such file can say."""
    leaves = [leaf for base in bases for leaf in tree.leaves(base)[0].items()]
    changed = [path for path, leaf in leaves if isinstance(leaf, Quantised) and leaf.remark.residual]
    if changed:
        warnings.warn(
            f"'{os.fspath(file)}' fits this base alone, not the model that it was made from: the start (LoftQ, QPiSSA) "
            f"changed {len(changed)} weights, first {changed[0]!r}. Either save the base beside it and load the "
            "adapter onto that one: jlora.models.save(folder, model, adapted.base). Or save what was learned, of twice "
            "the rank, which fits the original weights: jlora.combine_adapters([adapted, start], [1, -1], 'cat')"
            ".replace(base=params), `start` being the adapter before training",
            stacklevel=3,
        )
