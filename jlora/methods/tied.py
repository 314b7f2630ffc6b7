"""Factors that several weights share in training: for weights that are parts of one matrix elsewhere."""

from collections.abc import Sequence
from typing import Any

import jax
import optax

from jlora.methods.acts import Arrays, Factors, OnWeights
from jlora.methods.method import Config, Method, Training, Transformation
from jlora.transform.sites import Target


def tied(inner: Method, groups: Sequence[Sequence[str]], names: Sequence[str] = ("A",)) -> Method:
    """`inner`, with some of its factors shared by the weights of each group: one A for the query, key and value.

    A checkpoint of PyTorch's may have as one matrix what are several weights here, and an adapter of that matrix one A
    for all of them: `[W_q W_k W_v] + A [B_q B_k B_v]`. Every weight holds its own copy. The gradient of each copy is
    the sum over its group, which is the gradient of the one A, so that copies that start the same stay the same, bit
    for bit, under every optimizer that does not draw at random. A norm of all gradients counts a shared one once per
    copy.

    Args:
      inner: the method. Its start draws each copy apart: `jlora.peft.load` fills in the shared ones.
      groups: paths of the weights that share.
      names: of the factors that they share.

    Raises:
      ValueError: for a group of fewer than two paths, or a path in two groups; where an optimizer is made, for a path
        that is not adapted, or copies of several shapes.

    Example:
      >>> import jlora
      >>> jlora.tied(jlora.lora(4), [["query/kernel", "key/kernel"]]).name
      'tied'
    """
    if not isinstance(inner, Method):
        raise ValueError(f"tied(inner): inner must be a method, such as jlora.lora(8), not {inner!r:.200}")
    if not isinstance(groups, list | tuple) or not all(_are_texts(group) and len(group) > 1 for group in groups):
        raise ValueError(f"tied: groups are of two paths or more, each of which is in one of them, not {groups!r:.200}")
    if not _are_texts(names) or not names:
        raise ValueError(f"tied: names are those of the shared factors, such as ('A',), not {names!r:.200}")
    groups, names = tuple(map(tuple, groups)), tuple(names)
    paths = [path for group in groups for path in group]
    if len(set(paths)) != len(paths) or not groups:
        raise ValueError(f"tied: groups are of two paths or more, each of which is in one of them, not {groups!r:.200}")
    config: Config = (("name", "tied"), ("inner", inner), ("groups", groups), ("names", names))
    outer = inner.training

    def wrap(tx: Transformation, targets: Sequence[Target]) -> Transformation:
        known = {target.path for target in targets}
        absent = [path for path in paths if path not in known]
        if absent:
            raise ValueError(f"tied: {absent[0]!r} is in a group, and is not adapted")

        def summed(gradients: Factors) -> Factors:
            result = dict(gradients)
            for group in groups:
                total = _sum([gradients[path] for path in group], names)
                result |= {path: gradients[path] | total for path in group}
            return result

        shared = optax.stateless(lambda gradients, params: summed(gradients))
        return optax.chain(shared, tx if outer.wrap is None else outer.wrap(tx, targets))

    acts = inner.acts
    if isinstance(acts, OnWeights) and acts.residual is not None:
        acts = acts.replace(residual=lambda: tied(inner.acts.without_start(inner), groups, names))
    return inner._replace(config=config, acts=acts, training=Training(outer.sample, outer.regulariser, wrap))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


def _sum(copies: Sequence[Arrays], names: Sequence[str]) -> Arrays:
    def add(name: str) -> Any:
        shapes = {copy[name].shape for copy in copies}
        if len(shapes) > 1:
            raise ValueError(f"tied: the copies of {name!r} have the shapes {', '.join(map(str, sorted(shapes)))}")
        total: jax.Array = copies[0][name]
        for copy in copies[1:]:
            total = total + copy[name]
        return total

    return {name: add(name) for name in names if name in copies[0]}
