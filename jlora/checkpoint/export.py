"""`Adapted` for `jax.export`: its static part as JSON, so that an exported function of one can be serialised."""

import dataclasses
import json
from typing import Any

from jax import export

from jlora.adapted.adapted import Adapted
from jlora.adapted.select import Extra
from jlora.methods import Method, from_json, to_json
from jlora.transform.sites import Target

Static = tuple[Method, tuple[Target, ...], tuple[Extra, ...]]


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
        from_json(record["method"]),
        tuple(Target.from_json(_with_tuples(site)) for site in record["sites"]),
        tuple(Extra(**_with_tuples(extra)) for extra in record["extras"]),
    )


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


# What holds an Adapted (Flax's and Optax's types) has to be known there too.
export.register_pytree_node_serialization(
    Adapted, serialized_name="jlora.Adapted", serialize_auxdata=_written, deserialize_auxdata=_read
)
