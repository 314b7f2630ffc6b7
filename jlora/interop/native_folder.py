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
from jlora.models import checkpoint
from jlora.models.sizes import model_of


def layers(folder: Path, base: Path) -> tuple[tuple[Layer, ...], bool]:
    """The layers of an adapter under the names of the base's tensors, and whether matrices are (in, out) there.

    The base is one of `jlora.models`, as its config.json says; whether its numbers are those that the adapter was
    trained on is not looked at here: the fingerprint is of all of them.

    Raises:
      ValueError: for a base that jlora has no model of, or that has no such parameters.
    """
    adapted, model = opened(folder, base)
    rows = names.names_of(model, None, "interop").rows
    paths = {site.path for site in adapted.sites}
    turned = any(row.order is None and row.path.endswith("/kernel") for row in rows if row.path in paths)
    return tuple(onto.layers_of(adapted, rows)), turned


def opened(folder: Path, base: Path, *, concrete: bool = False) -> tuple[Adapted, nn.Module]:
    """An adapter on the shapes of its base, and the model: with its layers stacked or not, as the adapter has them.

    Args:
      folder: of the adapter.
      base: of the checkpoint.
      concrete: load the base, and check that it is the one that the adapter was trained on.
    """
    wanted = {site["path"] for site in read_record(folder / NAME)["sites"] if isinstance(site, dict)}
    found: list[tuple[Any, nn.Module]] = []
    for scan in (False, True):
        model, inputs = model_of(str(base), scan=scan)
        params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
        if wanted <= set(tree.leaves(params)[0]):
            if concrete:
                loaded = checkpoint.load(base, scan=scan)
                return load(folder, loaded.params), loaded.model
            return load(folder, params, any_base=True), model
        found.append((params, model))
    return load(folder, found[0][0], any_base=True), found[0][1]  # says what is missing
