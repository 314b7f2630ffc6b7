"""jlora's own adapters against a checkpoint's folder, on shapes alone: the base is not loaded."""

from pathlib import Path
from typing import Any

import jax
from flax import linen as nn

from jlora import tree
from jlora.adapted.adapted import Adapted
from jlora.checkpoint.adapter import load
from jlora.checkpoint.folder import NAME
from jlora.checkpoint.record import read_record
from jlora.interop import names, onto
from jlora.interop.layer import Layer
from jlora.models.sizes import model_of


def layers(folder: Path, base: Path) -> tuple[Layer, ...]:
    """The layers of an adapter under the names of the base's tensors.

    The base is one of `jlora.models`, as its config.json says; whether its numbers are those that the adapter was
    trained on is not looked at here: the fingerprint is of all of them.

    Raises:
      ValueError: for a base that jlora has no model of, or that has no such parameters.
    """
    adapted, model = opened(folder, base)
    return tuple(onto.layers_of(adapted, names.names_of(model, None, "interop").rows))


def opened(folder: Path, base: Path) -> tuple[Adapted, nn.Module]:
    """An adapter on the shapes of its base, and the model: with its layers stacked or not, as the adapter has them."""
    wanted = {site["path"] for site in read_record(folder / NAME)["sites"] if isinstance(site, dict)}
    found: list[tuple[Any, nn.Module]] = []
    for scan in (False, True):
        model, inputs = model_of(str(base), scan=scan)
        params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
        if wanted <= set(tree.leaves(params)[0]):
            return load(folder, params, any_base=True), model
        found.append((params, model))
    return load(folder, found[0][0], any_base=True), found[0][1]  # says what is missing
