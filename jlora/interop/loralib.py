"""Adapters of loralib, the code of the LoRA paper, onto jlora's models: https://github.com/microsoft/LoRA.

A file holds `<layer>.lora_A` (r, in) and `<layer>.lora_B` (out, r) of the adapted layers, and what was trained whole,
such as a classifier, under its own name. Names are those of the base's checkpoint. Alpha is not in it.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jlora.adapted.adapted import Adapted
from jlora.interop import tensor_file
from jlora.models.catalogue import ARCHITECTURES
from jlora.models.tensors import LINEAR, Leaf, tensor_shape


def load(file: str | os.PathLike[str], model: nn.Module, adapted: Adapted, *, pickled: bool = False) -> Adapted:
    """`adapted` with the factors, and the leaves trained whole, of a file by `torch.save(lora_state_dict(model))`.

    Args:
      file: a pickle by torch, or the same tensors as safetensors; see `tensor_file`.
      model: one of jlora's; its key table says which layer is which weight.
      adapted: of the model's parameters, by the rank and alpha that the file was trained with.
      pickled: read a pickle, without running what it says.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a file that holds no tensors, or values that are not finite; for a pickle, where `pickled` is
        False; and for tensors that are missing, unexpected or misshaped: all of them in one error.

    Example:
      adapted = jlora.apply(params, rank=8, alpha=16, targets="attn/(query|value)", extras="classifier")
      adapted = load("roberta_base_lora_mnli.bin", model, adapted, pickled=True)
    """
    with tensor_file.open(file, pickled=pickled) as opened:
        tensors = opened.read_all()
    tensor_file.check_finite(file, tensors)
    try:
        return placed(tensors, model, adapted)
    except ValueError as error:
        raise ValueError(f"'{file}': {error}") from error


def placed(tensors: Mapping[str, np.ndarray], model: nn.Module, adapted: Adapted) -> Adapted:
    """`load`, of tensors that were read already."""
    slots = list(_slots(model, adapted))
    expected = {key: slot.shape for slot in slots for key in slot.keys}
    wrong = [f"{key!r} is missing, expected shape {shape}" for key, shape in expected.items() if key not in tensors]
    wrong += [f"{key!r} is unexpected, shape {x.shape}" for key, x in tensors.items() if key not in expected]
    wrong += [
        f"{key!r} has shape {tensors[key].shape}, expected {shape}"
        for key, shape in expected.items()
        if key in tensors and tensors[key].shape != shape
    ]
    if wrong:
        lines = "\n  ".join(wrong[:40] + ([f"and {len(wrong) - 40} more"] if len(wrong) > 40 else []))
        raise ValueError(
            f"the adapter does not fit; rank=, targets= and extras= of apply have to be its own:\n  {lines}"
        )
    factors: dict[str, dict[str, jnp.ndarray]] = {}
    for slot in slots:
        own = [slot.turn(tensors[key].astype(np.float32)) for key in slot.keys]
        factors.setdefault(slot.path, {})[slot.name] = jnp.asarray(np.stack(own) if slot.stacked else own[0])
    return adapted.replace(factors=factors)


class Slot(NamedTuple):
    """Trained part of a leaf, and the tensors that it comes from.

    Attributes:
      path, name: of the factor.
      keys: of the tensors; those of all layers, in order, for a parameter that is stacked.
      shape: of each tensor.
      turn: a tensor to the factor, or to its part of one layer.
      stacked: the factor has the layers on an axis before its own.
    """

    path: str
    name: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    turn: Callable[[np.ndarray], np.ndarray]
    stacked: bool


def _slots(model: nn.Module, adapted: Adapted) -> Iterator[Slot]:
    rows = _rows(model)
    for site in adapted.sites:
        row = rows.get(site.path)
        if row is None or row.order != LINEAR or row.part is not None or set(adapted.factors[site.path]) != {"A", "B"}:
            raise ValueError(f"loralib has no A and B of {site.path!r}: only linear layers with a kernel of their own")
        (inputs, outputs), rank = site.shape[-2:], site.rank
        names = [key.removesuffix(".weight") for key in row.keys]
        a, b = (tuple(f"{name}.{part}" for name in names) for part in ("lora_A", "lora_B"))
        yield Slot(site.path, "A", a, (rank, inputs), lambda x: x.T[:, None, :], row.stacked)  # (in, 1, r)
        yield Slot(site.path, "B", b, (outputs, rank), lambda x: x[None, :, :], row.stacked)  # (1, out, r)
    for extra in adapted.extras:
        row = rows.get(extra.path)
        if row is None or row.part is not None or extra.rows is not None:
            raise ValueError(f"loralib has no part of a leaf such as of {extra.path!r}: train all of it")
        shape = tensor_shape(row, adapted.factors[extra.path]["value"].shape)
        axes = row.order or tuple(range(len(shape)))
        yield Slot(extra.path, "value", row.keys, shape, partial(np.transpose, axes=axes), row.stacked)


def _rows(model: nn.Module) -> dict[str, Leaf]:
    for architecture in ARCHITECTURES:
        if type(model.config) is architecture.config:
            return {row.path: row for row in architecture.table(model.config)}
    raise ValueError(f"{type(model).__name__} is none of jlora's models: its layers have no names in checkpoints")
