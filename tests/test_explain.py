"""`explain`: the table, its FLOPs and its lines."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jlora
from jlora.sharding import MODELS, put_rows
from tests import test_sharding as whole
from tests.conformance import normal
from tests.test_sharding import mesh_of


def params() -> dict:
    return {"stack": normal(3, 6, 6), "norm": normal(6, 4), "table": normal(9, 6)}


def predict(params, ids):
    h = params["table"][ids]
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["stack"])  # the line of the stack
    w = params["norm"]
    return h @ (w / jnp.sqrt(jnp.sum(w * w)))


IDS = jnp.asarray([0, 8, 3, 3, 1])


@pytest.fixture
def adapted() -> jlora.Adapted:
    sites = [
        jlora.Site("stack", (3, 6, 6), "float32", (1,), (2,), (0,), "linear"),
        jlora.Site("norm", (6, 4), "float32", (0,), (1,), (), "linear"),
        jlora.Site("table", (9, 6), "float32", (0,), (1,), (), "embedding"),
    ]
    return jlora.apply(params(), rank=2, sites=sites, targets=["stack", "norm", "table"])


def test_each_use_has_a_row(adapted):
    explanation = jlora.explain(predict, adapted, IDS)
    rows = {row.path: row for row in explanation.rows}
    assert [row.path for row in explanation.rows] == ["table", "stack", "norm"]
    assert {p: (r.op, r.in_axes, r.out_axes, r.stack_axes, r.factored) for p, r in rows.items()} == {
        "table": ("gather", (0,), (1,), (), True),
        "stack": ("dot_general", (1,), (2,), (0,), True),
        "norm": ("mul", (), (0, 1), (), False),
    }
    assert explanation.materialised == (rows["norm"],)
    assert {p: r.parameters for p, r in rows.items()} == {"table": 30, "stack": 3 * 24, "norm": 20}


def test_flops_are_counted_by_hand(adapted):
    flops = {row.path: row.flops for row in jlora.explain(predict, adapted, IDS).rows}
    assert flops == {
        "table": 2 * 2 * 5 * 6,  # rows of A times B
        "stack": 3 * 2 * 2 * (5 * 6 + 5 * 6),  # three layers: x A, then times B
        "norm": 2 * 2 * 6 * 4,  # A B, once
    }


def test_lines_are_the_models_own(adapted):
    lines = Path(__file__).read_text().splitlines()
    rows = jlora.explain(predict, adapted, IDS).rows
    assert {row.path for row in rows} == {"table", "stack", "norm"}
    for row in rows:
        file, _, number = row.line.rpartition(":")
        assert file == Path(__file__).name
        assert {"table": "table", "stack": "stack", "norm": "w * w"}[row.path] in lines[int(number) - 1]


def test_the_table_is_text(adapted):
    head, *rows, last = str(jlora.explain(predict, adapted, IDS)).splitlines()
    assert head.split() == [
        "weight",
        "operation",
        "in",
        "->",
        "out",
        "(stack)",
        "how",
        "rank",
        "parameters",
        "extra",
        "FLOPs",
        "line",
    ]
    assert rows[1].startswith("stack   dot_general  [1] -> [2] ([0])   factored")
    assert "materialised: " in rows[2]
    assert last == "2 uses factored, 1 materialised"


def test_strict_names_weight_operation_and_line(adapted):
    message = (
        r"strict: 'norm' would be materialised by `mul` at test_explain.py:\d+.*; leave it out with targets=, or lift"
    )
    with pytest.raises(jlora.MaterialisedError, match=message):
        jlora.lift(predict, strict=True)(adapted, IDS)


def test_a_tied_embedding_has_two_rows():
    fn = lambda p, ids: p["table"][ids] @ p["table"].T
    base = {"table": normal(9, 6)}
    adapted = jlora.apply(base, rank=2, sites=jlora.sites(fn, base, IDS), targets="table")
    rows = jlora.explain(fn, adapted, IDS).rows
    assert [(row.op, row.in_axes, row.out_axes) for row in rows] == [
        ("gather", (0,), (1,)),
        ("dot_general", (1,), (0,)),
    ]


def test_nothing_is_computed(adapted):
    abstract = jax.eval_shape(lambda: adapted)
    rows = jlora.explain(predict, abstract, jax.ShapeDtypeStruct((5,), jnp.int32)).rows
    assert len(rows) == 3


# -- on a mesh ---------------------------------------------------------------------------------------------------------

SPLIT = {"up": PartitionSpec(None, "fsdp", "tp"), "down": PartitionSpec(None, "tp", "fsdp")}


def blocks(params, x, place=lambda h: h, of_weight=lambda w: w):
    """Two scanned blocks with a residual, whose activations and weights are placed, or not."""

    def block(h, layer):
        up, down = of_weight(layer["up"]), of_weight(layer["down"])
        return place(h + jnp.tanh(h @ up) @ down), None

    return jax.lax.scan(jax.remat(block), x, params)[0]


def explained(rows=("fsdp",), kind=AxisType.Auto, **places):
    """The warning for `blocks` on a mesh, with rows of the batch over some of its axes."""
    mesh = mesh_of(kind, fsdp=2, tp=2)
    lies = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    base = {name: lies(normal(2, 8, 8), *SPLIT[name]) for name in SPLIT}
    x = normal(4, 8) if rows is None else lies(normal(4, 8), rows or None)
    on_mesh = {
        name: lambda h, spec=spec: jax.lax.with_sharding_constraint(h, NamedSharding(mesh, PartitionSpec(*spec)))
        for name, spec in places.items()
    }
    fn = functools.partial(blocks, **on_mesh)
    one = {name: normal(2, 8, 8) for name in SPLIT}
    adapted = jlora.apply(base, rank=2, sites=jlora.sites(blocks, one, normal(4, 8)), targets="up|down")
    return jlora.explain(fn, adapted, x)


def test_activations_that_nothing_places_beside_a_base_that_is_split():
    found = explained()
    assert found.unplaced == (
        "the base is split over 'fsdp', as the rows are, and nothing in the function says where its activations lie: XLA "
        "may split them by their features, and send them at every layer. Say it, by jax.lax.with_sharding_constraint on "
        "a block's inputs, or take a mesh of Explicit axes, on which jlora.models do so themselves"
    )
    assert str(found).splitlines()[-1] == f"warning: {found.unplaced}"
    assert "split over 'fsdp', 'tp', and perhaps the rows, too, and" in explained(rows=None).unplaced
    assert explained(of_weight=("fsdp",)).unplaced == found.unplaced  # a weight is placed, no activation
    assert explained(place=()).unplaced == found.unplaced  # over no axis


def test_activations_that_are_placed():
    assert explained(place=("fsdp", None)).unplaced == ""
    assert explained(rows=()).unplaced != ""  # on the mesh, whole: perhaps not all batches are
    assert explained(rows=("tp",)).unplaced != "" and "'tp', as" in explained(rows=("tp",)).unplaced
    assert "warning" not in str(explained(place=("fsdp", None)))


def test_no_mesh_says_nothing(adapted):
    assert jlora.explain(predict, adapted, IDS).unplaced == ""


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_models_place_their_activations_on_explicit_axes(kind):
    mesh = mesh_of(kind, fsdp=2, tp=2)
    adapted = jlora.apply(whole.placed(mesh), rank=2, targets="attn", sites=whole.sites())
    batch = put_rows(whole.TOKENS, MODELS.rows(mesh))
    assert bool(jlora.explain(whole.loss, adapted, batch).unplaced) == (kind is AxisType.Auto)
