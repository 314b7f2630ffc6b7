"""`Adapted` for `jax.export`: its static part as JSON, so that an exported function of one can be serialised."""

import contextlib
import contextvars
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from jax import export

from jlora.adapted.adapted import Adapted
from jlora.adapted.select import Extra
from jlora.methods import Constructor, Method, from_json, named_constructors, to_json
from jlora.transform.sites import Target

Static = tuple[Method, tuple[Target, ...], tuple[Extra, ...]]

# `jax.export.deserialize` hands its bytes on alone, so that what it may meet has to be said around it.
_METHODS: contextvars.ContextVar[tuple[Constructor, ...]] = contextvars.ContextVar("methods", default=())


@contextlib.contextmanager
def with_methods(*methods: Constructor) -> Iterator[None]:
    """Inside, `jax.export.deserialize` knows methods of your own, by their constructors.

    Raises:
      ValueError: if they are no constructors, or one of them has the name of a method of jlora.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> def mine(rank):
      ...     return jlora.lora(rank)._replace(config=(("name", mine), ("rank", rank)))
      >>> adapted = jlora.apply({"kernel": jnp.ones((3, 2))}, method=mine(1))
      >>> predict = jax.jit(jlora.lift(lambda params, x: x @ params["kernel"]))
      >>> content = jax.export.export(predict)(adapted, jnp.ones((1, 3))).serialize()
      >>> with with_methods(mine):
      ...     jax.export.deserialize(content).call(adapted, jnp.ones((1, 3))).shape
      (1, 2)
    """
    token = _METHODS.set(tuple(named_constructors(methods).values()))
    try:
        yield
    finally:
        _METHODS.reset(token)


def _written(static: Static) -> bytes:
    method, sites, extras = static
    record = {
        "method": to_json(method),
        "sites": [site.to_json() for site in sites],
        "extras": [dataclasses.asdict(extra) for extra in extras],
    }
    return json.dumps(record).encode()


def _read(content: bytes | bytearray) -> Static:
    record = json.loads(bytes(content))
    return (
        from_json(record["method"], _METHODS.get()),
        tuple(Target.from_json(_with_tuples(site)) for site in record["sites"]),
        tuple(Extra(**_with_tuples(extra)) for extra in record["extras"]),
    )


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


# What holds an Adapted (Flax's and Optax's types) has to be known there too.
export.register_pytree_node_serialization(
    Adapted, serialized_name="jlora.Adapted", serialize_auxdata=_written, deserialize_auxdata=_read
)
