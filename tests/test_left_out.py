"""Nothing is left out without a word: `apply` warns, `summary` lists, errors offer a site by hand."""

import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.conformance import normal

MIXTURE = {
    "router": {"kernel": normal(8, 4)},
    "experts": {"wi": normal(4, 8, 16), "wo": normal(4, 16, 8)},
    "norm": {"scale": normal(1, 8)},
    "out": {"kernel": normal(8, 8), "bias": normal(8)},
    "table": {"embedding": normal(10, 8)},
    "step": np.zeros((2, 2), np.int32),
}  # fmt: skip


def mixture(p: Any, x: Any) -> Any:
    h = x * p["norm"]["scale"]
    gates = jnp.tanh(h @ p["router"]["kernel"])
    h = jnp.einsum("be,bi,eio,eoj->bj", gates, h, *p["experts"].values())
    return h @ p["out"]["kernel"] + p["positions"][: len(h)]


def warned(*args: Any, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        jlora.apply(*args, **options)
    assert all(str(w.filename) == __file__ for w in found)  # the line that calls apply
    return [str(w.message) for w in found]


def test_names_that_are_not_known_are_named():
    (text,) = warned(MIXTURE, rank=2)
    assert text == (
        "apply: 2 weights of two axes or more stay as they are, since their names do not tell their axes. Pass "
        "sites=jlora.sites(fn, params, *args), or leave them out with targets=: 'experts/wi' (4, 8, 16), "
        "'experts/wo' (4, 16, 8)"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 2, "targets": "kernel"},
        {"rank": 2, "extras": "experts"},
        {"method": jlora.bitfit()},
        {"method": jlora.full()},
    ],
)
def test_what_a_rule_leaves_out_is_not(options: dict[str, Any]):
    assert warned(MIXTURE, **options) == []


@pytest.mark.parametrize("name", ["w", "weight", "recurrent_kernel", "wq"])
@pytest.mark.parametrize("shape", [(4, 3), (1, 3), (2, 4, 3)])
def test_whatever_its_name_and_shape(name: str, shape: tuple[int, ...]):
    (text,) = warned({"a": {"kernel": normal(4, 4)}, "b": {name: normal(*shape)}}, rank=1)
    assert f"'b/{name}' {shape}" in text


def test_a_program_tells_what_it_does_with_the_others():
    params = MIXTURE | {"positions": normal(16, 8), "unused": normal(3, 3)}
    sites = jlora.sites(mixture, params, normal(5, 8))
    (text,) = warned(params, rank=2, sites=sites)
    assert text.startswith(
        "apply: 3 weights of two axes or more stay as they are, since no product contracts them with an input"
    )
    assert text.endswith(
        "targets=: 'positions' (16, 8) (add), 'table/embedding' (10, 8) (never read), 'unused' (3, 3) (never read)"
    )
    assert "sites=[jlora.Site(path, shape, dtype, in_axes, out_axes, stack_axes, 'linear')]" in text
    adapted = jlora.apply(params, rank=2, sites=sites, targets="kernel|experts")
    assert [site.path for site in adapted.sites] == ["experts/wi", "experts/wo", "out/kernel", "router/kernel"]


def test_summary_lists_all_of_them_kernels_first():
    layers = {f"layer_{i:02}": {"a": normal(4, 4), "kernel": normal(4, 4), "bias": normal(4)} for i in range(12)}
    text = jlora.summary(jlora.apply(layers, rank=1, targets="layer_00/kernel"))
    (line,) = [line for line in text.splitlines() if line.startswith("frozen, of two axes or more: ")]
    kernels = [f"'layer_{i:02}/kernel' (4, 4)" for i in range(1, 12)]
    assert line.split(": ")[1] == ", ".join(kernels + [f"'layer_{i:02}/a' (4, 4)" for i in range(12)])


def test_summary_says_that_a_rank_is_above_the_weights_own():
    text = jlora.summary(jlora.apply({"a": {"kernel": normal(8, 3)}, "b": {"kernel": normal(8, 8)}}, rank=4))
    assert "rank 4 of 'a/kernel' is above its own: 8 inputs, 3 outputs" in text
    assert "of 'b/kernel'" not in text


def test_a_method_in_the_place_of_the_rank_is_told_its_name():
    with pytest.raises(TypeError, match=r"give the method by name: apply\(params, method=dora\(inner=lora\(rank=4"):
        jlora.apply(MIXTURE, jlora.dora(4))


@pytest.mark.parametrize("targets", ["norm", lambda site: site.path == "norm/scale"])
def test_a_weight_without_a_product_can_have_a_site_by_hand(targets: Any):
    params = MIXTURE | {"positions": normal(16, 8)}
    sites = jlora.sites(mixture, params, normal(5, 8))
    with pytest.raises(
        ValueError, match=r"train it .*extras=\. If one does, say along which axes: sites=\[jlora\.Site\("
    ):
        jlora.apply(params, rank=1, sites=sites, targets=targets)
    by_hand = jlora.Site("norm/scale", (1, 8), "float32", (0,), (1,), (), "linear")
    adapted = jlora.apply(params, rank=1, sites=[by_hand], targets=targets)
    assert [site.path for site in adapted.sites] == ["norm/scale"]


def test_a_start_from_inputs_needs_a_weight_that_meets_them():
    params = {"w": normal(8, 6), "kernel": normal(8, 6)}
    fn = lambda p, x: x @ jnp.exp(p["w"]) + x @ p["kernel"]
    sites = jlora.sites(fn, params, normal(5, 8))
    with pytest.raises(ValueError, match="measure: 'w' is materialised by `exp` before it meets its inputs"):
        jlora.measure(fn, params, [normal(5, 8)], sites, "covariance")
