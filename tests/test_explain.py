"""`explain`: the table, its FLOPs and its lines."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jlora
from tests.conformance import normal


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
