"""Methods on activations against the same functions written out by hand, in any linen model, and what they refuse."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze

import jlora
from jlora.methods.houlsby import ATTENTION_OUT, MLP_OUT
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.models.vit import ViT, ViTConfig
from tests.conformance import close, normal, randomised
from tests.tiers import thorough

VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH = 11, 8, 2, 2, 5
CONFIG = GPT2Config(vocab_size=VOCABULARY, context=12, width=WIDTH, layers=LAYERS, heads=HEADS)
TOKENS = jnp.asarray([[1, 9, 0, 4, 3], [2, 2, 3, 7, 10]])
MODEL = GPT2(CONFIG)


def base() -> dict:
    params = MODEL.init(jax.random.key(0), TOKENS)["params"]
    return jax.tree.map(lambda x: x + 0.3 * normal(*x.shape), params)


def forward(params, tokens):
    return MODEL.apply({"params": params}, tokens)


# -- GPT-2 by hand, with a place for everything that a method adds -----------------------------------------------------


def norm(x, p):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + 1e-5) * p["scale"][None, None] + p["bias"][None, None]


def dense(x, p):
    return x @ p["kernel"] + p["bias"][None, None]


def attention(x, p, keys=None, values=None):
    """Causal; `keys` and `values` (n, width) come before those of x and are seen by all."""
    heads = lambda y: jnp.moveaxis(y.reshape(*y.shape[:2], HEADS, -1), 1, 2)  # (batch, heads, length, width)
    q, k, v = (dense(x, p[name]) for name in ("query", "key", "value"))
    before = 0 if keys is None else len(keys)
    if before:
        wide = lambda y: jnp.broadcast_to(y, (len(x), *y.shape))
        k, v = jnp.concatenate([wide(keys), k], 1), jnp.concatenate([wide(values), v], 1)
    q, k, v = heads(q), heads(k), heads(v)
    scores = q @ jnp.swapaxes(k, -1, -2) / math.sqrt(WIDTH / HEADS)
    length = x.shape[1]
    seen = jnp.arange(before + length)[None] <= before + jnp.arange(length)[:, None]
    weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf))
    return dense(jnp.moveaxis(weights @ v, 1, 2).reshape(x.shape), p["out"])


def by_hand(p, tokens, factors, *, after=None, beside=None, prefix=False, prompt=None):
    h = p["wte"]["embedding"][tokens]
    if prompt is not None:
        h = jnp.concatenate([jnp.broadcast_to(prompt, (len(h), *prompt.shape)), h], axis=1)
    h = h + p["wpe"]["embedding"][: h.shape[1]][None]
    after = after or (lambda h, factors: h)
    for i in range(LAYERS):
        layer, mine = p[f"h_{i}"], lambda path, i=i: factors.get(f"h_{i}/{path}/kernel")
        extra = [mine(f"attn/{name}")["prefix"] for name in ("key", "value")] if prefix else []
        h = h + after(attention(norm(h, layer["ln_1"]), layer["attn"], *extra), mine("attn/out"))
        x = norm(h, layer["ln_2"])
        y = after(dense(jax.nn.gelu(dense(x, layer["mlp"]["fc"])), layer["mlp"]["proj"]), mine("mlp/proj"))
        h = h + (y if beside is None else y + beside(x, mine("mlp/fc")))
    logits = norm(h, p["ln_f"]) @ p["wte"]["embedding"].T
    return logits if prompt is None else logits[:, len(prompt) :]


def bottleneck(x, f, nonlinearity):
    if "scale" in f:
        x = norm(x, {"scale": f["scale"], "bias": f["offset"]})
    h = nonlinearity(x @ f["down"] + f["down_bias"][None, None])
    return h @ f["up"] + f["up_bias"][None, None]


def in_series(nonlinearity) -> Callable:
    return lambda h, f: h if f is None else h + bottleneck(h, f, nonlinearity)


def network(shared, own):
    h = jnp.tanh(shared["embedding"] @ shared["weight"] + shared["bias"][None])
    return {"prefix": h @ own["weight"] + own["bias"][None]}


def mlp(f):
    h = jax.nn.relu(f["embedding"] @ f["weight_1"] + f["bias_1"][None])
    h = jax.nn.relu(h @ f["weight_2"] + f["bias_2"][None])
    return h @ f["weight_3"] + f["bias_3"][None]


def lstm(f):
    """An LSTM in NumPy, token by token and gate by gate."""

    def run(embeddings, way):
        hidden = f[f"{way}_state"].shape[0]
        h, c, out = jnp.zeros(hidden), jnp.zeros(hidden), []
        for x in embeddings:
            gates = x @ f[f"{way}_input"] + h @ f[f"{way}_state"] + f[f"{way}_gates"]
            i, forget, g, o = (gates[n * hidden : (n + 1) * hidden] for n in range(4))
            c = jax.nn.sigmoid(forget) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            out.append(h)
        return out

    forth, back = run(f["embedding"], "forward"), run(f["embedding"][::-1], "backward")[::-1]
    h = jnp.stack([jnp.concatenate(pair) for pair in zip(forth, back, strict=True)])
    return jax.nn.relu(h @ f["weight_1"] + f["bias_1"][None]) @ f["weight_2"] + f["bias_2"][None]


TABLE = "wte/embedding"
CASES: dict[str, tuple[jlora.Method, Callable[[Any, Any, Any], jax.Array]]] = {
    "houlsby": (jlora.houlsby(3), lambda p, t, f: by_hand(p, t, f, after=in_series(jax.nn.gelu))),
    "houlsby, with a norm": (
        jlora.houlsby(3, layer_norm=True, nonlinearity="silu"),
        lambda p, t, f: by_hand(p, t, f, after=in_series(jax.nn.silu)),
    ),
    "pfeiffer": (jlora.pfeiffer(3), lambda p, t, f: by_hand(p, t, f, after=in_series(jax.nn.relu))),
    "parallel_adapter": (
        jlora.parallel_adapter(3, scale=4.0, nonlinearity="tanh"),
        lambda p, t, f: by_hand(p, t, f, beside=lambda x, f: 4.0 * bottleneck(x, f, jnp.tanh)),
    ),
    "prefix_tuning": (jlora.prefix_tuning(3), lambda p, t, f: by_hand(p, t, f, prefix=True)),
    "prefix_tuning, hidden": (
        jlora.prefix_tuning(3, hidden=6),
        lambda p, t, f: by_hand(p, t, {k: network(f["*"], v) for k, v in f.items() if k != "*"}, prefix=True),
    ),
    "MAM": (
        jlora.together(jlora.prefix_tuning(3), jlora.parallel_adapter(3, scale=4.0)),
        lambda p, t, f: by_hand(p, t, f, prefix=True, beside=lambda x, f: 4.0 * bottleneck(x, f, jax.nn.relu)),
    ),
    "prompt_tuning": (jlora.prompt_tuning(3), lambda p, t, f: by_hand(p, t, f, prompt=f[TABLE]["prompt"])),
    "p_tuning": (jlora.p_tuning(3, hidden=6), lambda p, t, f: by_hand(p, t, f, prompt=mlp(f[TABLE]))),
    "p_tuning, lstm": (
        jlora.p_tuning(3, hidden=4, encoder="lstm"),
        lambda p, t, f: by_hand(p, t, f, prompt=lstm(f[TABLE])),
    ),
}


def test_gpt2_by_hand_is_gpt2():
    close(jax.jit(by_hand)(base(), TOKENS, {}), jax.jit(forward)(base(), TOKENS))


ONE_PROGRAM = "tests/test_methods.py::test_start_merged_weights_and_gradients_in_one_program"
# Rows that tests/test_methods.py has not.
OWN = ("houlsby, with a norm", "pfeiffer", "MAM", "p_tuning")


@pytest.mark.parametrize("name", thorough(CASES, ONE_PROGRAM, OWN))
def test_values_and_gradients_are_those_of_the_function_by_hand(name):
    method, reference = CASES[name]
    params = base()
    adapted = randomised(jlora.apply(params, method=method), 0.5)
    assert len(adapted.sites) == {
        "houlsby": 4,
        "pfeiffer": 2,
        "parallel_adapter": 2,
        "prefix_tuning": 4,
        "together": 6,
    }.get(method.name, 1)

    def lifted(factors):
        y = jlora.lift(forward)(adapted.replace(factors=factors), TOKENS)
        return jnp.vdot(normal(*y.shape), y), y

    def expected(factors):
        y = reference(params, TOKENS, factors)
        return jnp.vdot(normal(*y.shape), y), y

    gradient, y = jax.jit(jax.grad(lifted, has_aux=True))(adapted.factors)
    by_hand_gradient, by_hand_y = jax.jit(jax.grad(expected, has_aux=True))(adapted.factors)
    close(y, by_hand_y)
    close(gradient, by_hand_gradient, 5e-5)
    assert float(jnp.abs(y - forward(params, TOKENS)).max()) > 0.01


@pytest.mark.parametrize("method", [jlora.prefix_tuning(3, hidden=6), jlora.p_tuning(3, hidden=6)], ids=repr)
def test_without_the_network_it_is_the_same_function(method, tmp_path):
    adapted = randomised(jlora.apply(base(), method=method, extras="ln_f"), 0.5)
    plain = jlora.bake_prompt(adapted)
    assert plain.method.name == {"p_tuning": "prompt_tuning"}.get(method.name, method.name)
    close(jlora.lift(forward)(plain, TOKENS), jlora.lift(forward)(adapted, TOKENS))
    jlora.save(tmp_path, plain)
    close(jlora.lift(forward)(jlora.load(tmp_path, adapted.base), TOKENS), jlora.lift(forward)(adapted, TOKENS))
    with pytest.raises(ValueError, match=r"^bake_prompt: p\w+_tuning\(.*\) has no network that makes its factors$"):
        jlora.bake_prompt(plain)


# -- how they start ----------------------------------------------------------------------------------------------------


def test_adapters_start_as_their_papers_say():
    params = {"mlp": {"proj": {"kernel": jnp.ones((100, 300))}, "fc": {"kernel": jnp.ones((300, 100))}}}
    start = jlora.apply(params, method=jlora.houlsby(40, layer_norm=True), targets="proj").factors["mlp/proj/kernel"]
    for name in ("down", "up"):  # N(0, 0.01^2) cut off at two standard deviations, whose own is 0.88: section 3.6
        assert float(start[name].std()) == pytest.approx(0.0088, rel=0.05) and abs(float(start[name].mean())) < 5e-4
        assert 0.0195 < float(jnp.abs(start[name]).max()) <= 0.02
    assert not any(bool(start[name].any()) for name in ("down_bias", "up_bias", "offset"))
    assert bool((start["scale"] == 1).all())
    start = jlora.apply(params, method=jlora.parallel_adapter(40)).factors["mlp/fc/kernel"]
    bound = 1 / math.sqrt(300)  # as LoRA's A
    assert 0.95 * bound < float(jnp.abs(start["down"]).max()) <= bound
    assert not any(bool(start[name].any()) for name in ("up", "up_bias", "down_bias"))


def test_a_prompt_starts_as_rows_of_the_table():
    params = base()
    table = np.asarray(params["wte"]["embedding"])
    some = np.asarray(jlora.apply(params, method=jlora.prompt_tuning(4)).factors[TABLE]["prompt"])
    assert all(any((row == other).all() for other in table) for row in some)
    chosen = jlora.apply(params, method=jlora.prompt_tuning(2, tokens=[7, 1])).factors[TABLE]["prompt"]
    np.testing.assert_array_equal(chosen, table[[7, 1]])


# -- other linen models ------------------------------------------------------------------------------------------------


class FlaxAttention(nn.Module):
    """Flax's own attention, with a mask."""

    @nn.compact
    def __call__(self, x, mask=None):
        return nn.MultiHeadDotProductAttention(HEADS, name="attn")(x, mask=mask)


X = normal(2, LENGTH, WIDTH)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [nn.MultiHeadDotProductAttention, nn.SelfAttention, nn.MultiHeadAttention])
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_flax_attention_takes_a_prefix(kind, masked):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, mask=None):
            return kind(HEADS, name="attn")(x, mask=mask)

    mask = nn.make_causal_mask(jnp.ones((2, LENGTH))) if masked else None
    params = Model().init(jax.random.key(0), X, mask)["params"]
    adapted = randomised(jlora.apply(params, method=jlora.prefix_tuning(3)), 2.0)
    got = jlora.lift(lambda p: Model().apply({"params": p}, X, mask))(adapted)
    heads = {name: jnp.einsum("btd,dhk->bthk", X, p["kernel"]) + p["bias"][None, None]
             for name, p in params["attn"].items() if name != "out"}  # fmt: skip
    prefix = lambda name: jnp.broadcast_to(
        adapted.factors[f"attn/{name}/kernel"]["prefix"], (2, 3, HEADS, WIDTH // HEADS)
    )
    k, v = (jnp.concatenate([prefix(name), heads[name]], 1) for name in ("key", "value"))
    scores = jnp.einsum("bthk,bshk->bhts", heads["query"], k) / math.sqrt(WIDTH / HEADS)
    if masked:
        seen = jnp.arange(LENGTH + 3)[None] <= 3 + jnp.arange(LENGTH)[:, None]
        scores = jnp.where(seen[None, None], scores, -jnp.inf)
    y = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v)
    out = params["attn"]["out"]
    close(got, jnp.einsum("bthk,hkd->btd", y, out["kernel"]) + out["bias"][None, None])


class Scanned(nn.Module):
    """Two layers, scanned or not, over any axis of the parameters; the module of the weight may be remat'ed."""

    axis: int | None
    dense: Any = nn.Dense

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            dense: Any

            @nn.compact
            def __call__(self, x, _):
                return jnp.tanh(self.dense(WIDTH, name="proj")(x)), None

        if self.axis is None:
            for i in range(2):
                x, _ = Layer(self.dense, name=f"mlp_{i}")(x, None)
            return x
        scan = nn.scan(Layer, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=2)
        return scan(self.dense, name="mlp")(x, None)[0]


@pytest.mark.parametrize("dense", [nn.Dense, nn.remat(nn.Dense), nn.jit(nn.Dense)], ids=["plain", "remat", "jit"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_scanned_model_has_an_adapter_per_layer(axis, dense):
    loop, scan = Scanned(None), Scanned(axis, dense)
    params = loop.init(jax.random.key(0), X)["params"]
    stack = lambda *layers: jnp.stack(layers, axis)
    stacked = {"mlp": jax.tree.map(stack, params["mlp_0"], params["mlp_1"])}
    adapted = randomised(jlora.apply(params, method=jlora.pfeiffer(3, layer_norm=True)))
    fn = lambda p, x: scan.apply({"params": p}, x)
    start = jlora.apply(stacked, method=jlora.pfeiffer(3, layer_norm=True), sites=jlora.sites(fn, stacked, X))
    both = [adapted.factors[f"mlp_{i}/proj/kernel"] for i in range(2)]
    together = start.replace(factors={"mlp/proj/kernel": jax.tree.map(stack, *both)})
    expected = jlora.lift(lambda p, x: loop.apply({"params": p}, x))(adapted, X)
    close(jlora.lift(fn)(together, X), expected)
    close(jax.jit(jlora.lift(fn))(together, X), expected)
    assert not bool(
        (
            start.factors["mlp/proj/kernel"]["down"].take(0, axis)
            == start.factors["mlp/proj/kernel"]["down"].take(1, axis)
        ).any()
    )


def test_adapters_that_a_scan_drops_raise():
    """A scan over a collection of copies: the parameters that reach the layers are not those that were adapted."""

    class Dropping(nn.Module):
        @nn.compact
        def __call__(self, x):
            def keep(variables):
                params = jax.tree.map(lambda x: 2 * x / 2, variables)  # reads the adapter, for nothing
                layer = params.get("params", {}).get("proj", {})
                return {"params": {"proj": {name: layer[name] for name in ("kernel", "bias") if name in layer}}}

            class Layer(nn.Module):
                @nn.compact
                def __call__(self, x, _):
                    return nn.Dense(WIDTH, name="proj")(x), None

            mapped = nn.map_variables(Layer, "params", keep, init=self.is_initializing())
            scan = nn.scan(mapped, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return scan(name="mlp")(x, None)[0]

    model = Dropping()
    params = model.init(jax.random.key(0), X)["params"]
    fn = lambda p, x: model.apply({"params": p}, x)
    adapted = jlora.apply(params, method=jlora.pfeiffer(2), sites=jlora.sites(fn, params, X))
    with pytest.raises(ValueError, match=r"1 of 1 adapted weights are never read by '<lambda>': 'mlp/proj/kernel'"):
        jlora.lift(fn)(adapted, X)


def test_features_on_several_axes_and_whole_variables():
    """DenseGeneral's output (batch, length, 2, 4) is adapted as 8 features; `params` may be the dict of collections."""
    model = nn.DenseGeneral((2, 4))
    variables = model.init(jax.random.key(0), X)
    sites = jlora.sites(lambda v, x: model.apply(v, x), variables, X)
    adapted = randomised(jlora.apply({"net": variables["params"]}, method=jlora.houlsby(3), targets="net/kernel", sites=[
        jlora.Site("net/kernel", s.shape, s.dtype, s.in_axes, s.out_axes, s.stack_axes, s.kind) if s.path.endswith("kernel")
        else jlora.Site("net/bias", s.shape, s.dtype, s.in_axes, s.out_axes, s.stack_axes, s.kind) for s in sites
    ]))  # fmt: skip
    y = model.apply(variables, X)
    flat = y.reshape(2, LENGTH, 8)
    expected = (flat + bottleneck(flat, adapted.factors["net/kernel"], jax.nn.gelu)).reshape(y.shape)
    close(jlora.lift(lambda p: model.apply({"params": p["net"]}, X))(adapted), expected)
    whole = jlora.apply(variables, method=jlora.houlsby(3), sites=sites, targets="kernel")
    whole = whole.replace(factors={"params/kernel": adapted.factors["net/kernel"]})
    close(jlora.lift(model.apply)(whole, X), expected)
    frozen = jlora.apply(freeze(variables), method=jlora.houlsby(3), sites=sites, targets="kernel")
    close(jlora.lift(model.apply)(frozen.replace(factors=whole.factors), X), expected)


def test_the_vision_transformer_takes_all_but_prompts():
    config = ViTConfig(image_size=4, patch_size=2, channels=1, width=8, layers=1, heads=2, labels=3)
    model, images = ViT(config), normal(2, 4, 4, 1)
    params = model.init(jax.random.key(0), images)["params"]
    fn = lambda p, x: model.apply({"params": p}, x)
    for method in (jlora.houlsby(2), jlora.pfeiffer(2), jlora.parallel_adapter(2), jlora.prefix_tuning(2)):
        adapted = randomised(jlora.apply(params, method=method))
        assert float(jnp.abs(jlora.lift(fn)(adapted, images) - fn(params, images)).max()) > 1e-3
    with pytest.raises(
        ValueError, match="prompt_tuning goes by the names of layers, and none of these weights has one"
    ):
        jlora.apply(params, method=jlora.prompt_tuning(2))


class Encoder(nn.Module):
    """Tokens with a mask, positions and types, as BERT takes them; returns pieces with and without the tokens' axis."""

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, position_ids=None, token_type_ids=None, **more):
        length = input_ids.shape[1]
        positions = jnp.arange(length)[None] if position_ids is None else position_ids
        h = nn.Embed(VOCABULARY, WIDTH, name="word_embeddings")(input_ids) + nn.Embed(12, WIDTH, name="places")(
            positions
        )
        if token_type_ids is not None:
            h = h + nn.Embed(2, WIDTH, name="types")(token_type_ids)
        mask = None if attention_mask is None else nn.make_attention_mask(jnp.ones_like(attention_mask), attention_mask)
        h = nn.MultiHeadDotProductAttention(HEADS, name="attn")(h, mask=mask)
        return {"hidden": h, "pooled": h.mean(1), "pairs": h @ jnp.swapaxes(h, 1, 2), "length": length}


def test_a_prompt_lengthens_what_goes_along_with_the_tokens():
    model = Encoder()
    mask = jnp.asarray([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    places, types = jnp.arange(LENGTH)[None].repeat(2, 0), jnp.asarray([[0, 0, 1, 1, 1]] * 2)
    params = model.init(jax.random.key(0), TOKENS, mask, places, types)["params"]
    adapted = randomised(jlora.apply(params, method=jlora.prompt_tuning(3), targets="word_embeddings"), 2.0)
    fn = lambda p: model.apply({"params": p}, TOKENS, mask, position_ids=places, token_type_ids=types)
    got = jlora.lift(fn)(adapted)
    # By hand: three rows more in the table, and their numbers before the tokens.
    grown = jax.tree.map(lambda x: x, params)
    grown["word_embeddings"]["embedding"] = jnp.concatenate(
        [params["word_embeddings"]["embedding"], adapted.factors["word_embeddings/embedding"]["prompt"]]
    )
    front = lambda x, row: jnp.concatenate([jnp.asarray([row] * 2), x], 1)
    numbers = [VOCABULARY + i for i in range(3)]

    def grown_apply(p):
        table = nn.Embed(VOCABULARY + 3, WIDTH)

        def more_rows(proceed, args, kwargs, context):
            if context.module.name == "word_embeddings" and context.method_name == "__call__":
                return table.apply({"params": p["word_embeddings"]}, *args)
            return proceed(*args, **kwargs)

        with nn.intercept_methods(more_rows):
            return model.apply(
                {"params": params}, front(TOKENS, numbers), front(mask, [1] * 3),
                position_ids=front(places + 3, [0, 1, 2]), token_type_ids=front(types, [0] * 3),
            )  # fmt: skip

    expected = grown_apply(grown)
    assert got["hidden"].shape == (2, LENGTH, WIDTH) and got["pairs"].shape == (2, LENGTH, LENGTH)
    close(got["hidden"], expected["hidden"][:, 3:])
    close(got["pooled"], expected["pooled"])
    close(got["pairs"], expected["pairs"][:, 3:, 3:])


# -- explain -----------------------------------------------------------------------------------------------------------


def test_explain_has_a_row_per_adapter():
    explanation = jlora.explain(forward, jlora.apply(base(), method=jlora.houlsby(3)), TOKENS)
    rows = [(row.path, row.op, row.factored, row.rank, row.parameters, row.flops) for row in explanation.rows]
    flops = 2 * TOKENS.size * 2 * WIDTH * 3
    parameters = 2 * WIDTH * 3 + 3 + WIDTH
    paths = [f"h_{i}/{part}/kernel" for i in range(LAYERS) for part in ("attn/out", "mlp/proj")]
    assert rows == [(path, "houlsby", True, 3, parameters, flops) for path in paths]


def test_a_function_that_was_compiled_before_is_no_mistake():
    """The interceptor does not run again where JAX has the trace; the adapters are in it all the same."""
    compiled = jax.jit(forward)
    adapted = randomised(jlora.apply(base(), method=jlora.pfeiffer(3)))
    first = jlora.lift(compiled)(adapted, TOKENS)
    close(jlora.lift(compiled)(adapted, TOKENS), first)
    close(first, jlora.lift(forward)(adapted, TOKENS))
    assert len(jlora.explain(compiled, adapted, TOKENS).rows) == LAYERS
    other = randomised(jlora.apply(base(), method=jlora.pfeiffer(3, nonlinearity="gelu")))
    close(jlora.lift(compiled)(other, TOKENS), jlora.lift(forward)(other, TOKENS))  # of the same shapes


# -- what is refused ---------------------------------------------------------------------------------------------------


def apply(method: jlora.Method, **options: Any) -> jlora.Adapted:
    return jlora.apply(base(), method=method, **options)


def run(method: jlora.Method, fn: Callable = forward, params: Any = None, **options: Any) -> Any:
    return jlora.lift(fn)(jlora.apply(base() if params is None else params, method=method, **options), TOKENS)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH, name="wte")
        return embed(tokens) + embed(tokens[:, ::-1])


class Decoding(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(HEADS, decode=True, name="attn")(x)


def twice():
    return Twice().init(jax.random.key(0), TOKENS)["params"]


REFUSED = {
    "a rank of 0": (lambda: jlora.houlsby(0), "rank must be at least 1, not 0"),
    "an unknown nonlinearity": (
        lambda: jlora.pfeiffer(2, nonlinearity="swish"),
        "nonlinearity must be one of 'gelu', 'relu', 'silu', 'tanh', 'identity', not 'swish'",
    ),
    "a negative spread": (lambda: jlora.houlsby(2, std=-1.0), "std must be at least 0, not -1.0"),
    "a scale of 0": (
        lambda: jlora.parallel_adapter(2, scale=0.0),
        "scale must not be 0: the factors would have no effect and no gradient",
    ),
    "a length of 0": (lambda: jlora.prefix_tuning(0), "length must be at least 1, not 0"),
    "no hidden units": (lambda: jlora.prefix_tuning(2, hidden=0), "hidden must be at least 1, not 0"),
    "too few tokens": (lambda: jlora.prompt_tuning(3, tokens=[1]), "tokens must be as many as length=3, not 1"),
    "an unknown encoder": (
        lambda: jlora.p_tuning(3, encoder="gru"), "encoder must be one of 'mlp', 'lstm', not 'gru'"
    ),
    "tokens outside of the table": (
        lambda: apply(jlora.prompt_tuning(1, tokens=[11])),
        "prompt_tuning: tokens must be 1, as long as the prompt is, within the 11 rows of 'wte/embedding'",
    ),
    "two tables": (
        lambda: apply(jlora.prompt_tuning(2), targets="embedding"),
        "a prompt belongs to one table of embeddings, and 2 are adapted: 'wpe/embedding', 'wte/embedding'; choose the "
        "tokens' with targets=",
    ),
    "a prompt on a kernel": (
        lambda: apply(jlora.prompt_tuning(2), targets="h_0/mlp/fc"),
        "prompt_tuning belongs to a table of embeddings (vocabulary, width); 'h_0/mlp/fc/kernel' of shape (8, 32) is "
        "linear: choose the tokens' table with targets=",
    ),
    "a prefix of keys alone": (
        lambda: apply(jlora.prefix_tuning(2), targets="key"),
        "prefix_tuning: keys and values of 'h_0/attn' need prefixes of one length, got key: 2; choose both with targets=",
    ),
    "a prefix of two lengths": (
        lambda: apply(jlora.prefix_tuning(2), ranks={"h_0/attn/key": 3}),
        "prefix_tuning: keys and values of 'h_0/attn' need prefixes of one length, got key: 3, value: 2; choose both "
        "with targets=",
    ),
    "a prefix of queries": (
        lambda: apply(jlora.prefix_tuning(2), targets="query"),
        "prefix_tuning: 'h_0/attn/query/kernel' does not say whether it makes keys or values (kernels of modules named "
        "key and value, k and v, k_proj and v_proj, to_k and to_v do); choose those with targets=",
    ),
    "two adapters of one module": (
        lambda: apply(jlora.parallel_adapter(2), targets="h_0/mlp"),
        "parallel_adapter: 'h_0/mlp/proj/kernel' and 'h_0/mlp/fc/kernel' belong to one module, 'h_0/mlp', which has one "
        "adapter; choose one of them with targets=",
    ),
    "a module that is no sub-layer": (
        lambda: run(jlora.parallel_adapter(2), targets="h_0/mlp/proj"),
        "parallel_adapter: the adapter of 'h_0/mlp/proj/kernel' is 32 wide, and its module MLP returns an array of "
        "shape (2, 5, 8); choose another weight with targets=",
    ),
    "a table looked up twice": (
        lambda: run(jlora.prompt_tuning(2), lambda p, t: Twice().apply({"params": p}, t), twice()),
        "prompt_tuning: the table 'wte/embedding' is looked up twice in one call of the model, and not once for its "
        "tokens (batch, length): which of them the prompt belongs to is not known",
    ),
    "an argument of the tokens' length": (
        lambda: run(
            jlora.prompt_tuning(2), lambda p, t: Encoder().apply({"params": p}, t, spans=jnp.ones((2, LENGTH, 2))),
            Encoder().init(jax.random.key(0), TOKENS)["params"],
        ),
        "prompt_tuning: how the argument 'spans', float32 of shape (2, 5, 2), is lengthened is not known",
    ),
    "a model without tokens": (
        lambda: run(
            jlora.prompt_tuning(2), lambda p, t: Encoder().apply({"params": p}, t.astype(jnp.float32)),
            Encoder().init(jax.random.key(0), TOKENS)["params"],
        ),
        None,
    ),
    "a cache": (
        lambda: run(
            jlora.prefix_tuning(2), lambda p, t: Decoding().apply({"params": p}, X, mutable=["cache"]),
            Decoding().init(jax.random.key(0), X)["params"],
        ),
        "prefix_tuning: MultiHeadDotProductAttention with decode=True keeps keys in a cache of a fixed length, in which "
        "a prefix has no place",
    ),
    "no layer of a known name": (
        lambda: jlora.apply({"a": {"kernel": jnp.ones((2, 3))}}, method=jlora.pfeiffer(2)),
        None,
    ),
    "an alpha": (
        lambda: apply(jlora.houlsby(2), alphas={"mlp": 2.0}), "apply: houlsby has no alpha: leave alphas= out"
    ),
    "a kernel at the root": (
        lambda: jlora.apply({"kernel": normal(4, 4)}, method=jlora.parallel_adapter(2), targets="kernel"),
        "parallel_adapter: no module holds that of 'kernel'; choose a weight further down with targets=",
    ),
    "keys twice": (
        lambda: jlora.apply(
            {"attn": {name: {"kernel": normal(4, 4)} for name in ("k", "v", "to_k", "to_v")}},
            method=jlora.prefix_tuning(2),
        ),
        "prefix_tuning: 'attn' makes its keys twice; choose one of them with targets=",
    ),
    "an option of another method": (
        lambda: jlora.methods.from_json({"name": "houlsby", "rank": 2, "length": 3}),
        "method 'houlsby': houlsby() got an unexpected keyword argument 'length'",
    ),
}  # fmt: skip


# -- one adapter, one application --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["houlsby", "prefix_tuning", "p_tuning"])
def test_two_lifted_functions_in_one(name):
    """A teacher beside a student, or inside of its loss: each adapter acts once."""
    method, _ = CASES[name]
    one = randomised(jlora.apply(base(), method=method), 0.5)
    other = randomised(jlora.apply(base(), method=method, key=1), 0.7)
    lifted = jlora.lift(forward)
    expected = lifted(one, TOKENS), lifted(other, TOKENS)
    close(jlora.lift(lambda a, b, t: (forward(a, t), forward(b, t)))(one, other, TOKENS), expected)
    close(jlora.lift(lambda a, t: (forward(a, t), lifted(other, t)))(one, TOKENS), expected)
    close(jlora.lift(lambda a, t: (forward(a, t), forward(a, t)))(one, TOKENS), (expected[0], expected[0]))


def ones(adapted: jlora.Adapted) -> jlora.Adapted:
    """Each application of a bottleneck adds 1."""
    factors = {
        path: {name: jnp.full_like(x, name == "up_bias") for name, x in arrays.items()}
        for path, arrays in adapted.factors.items()
    }
    return adapted.replace(factors=factors)


class Subclass(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return super().__call__(x)


class Sharing(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(WIDTH)
        nn.share_scope(self, dense)
        return dense(x)


class Shared(nn.Module):
    """ALBERT: one layer at all depths."""

    @nn.compact
    def __call__(self, x):
        proj = nn.Dense(WIDTH, name="proj", kernel_init=nn.initializers.zeros)
        return proj(x) + proj(x) + proj(x)


def test_a_call_of_super_is_part_of_the_call():
    params = Subclass(WIDTH).init(jax.random.key(0), X)["params"]
    fn = lambda p: Subclass(WIDTH).apply({"params": p}, X)
    close(jlora.lift(fn)(ones(jlora.apply(params, method=jlora.houlsby(2), targets="kernel"))), fn(params) + 1.0)


def test_a_module_that_is_called_three_times_has_its_adapter_three_times():
    params = {"mlp": Shared().init(jax.random.key(0), X)["params"]}
    fn = lambda p: Shared().apply({"params": p["mlp"]}, X)
    adapted = ones(jlora.apply(params, method=jlora.pfeiffer(2)))
    close(jlora.lift(fn)(adapted), fn(params) + 3.0)
    rows = jlora.explain(fn, adapted).rows
    assert [(row.path, row.flops) for row in rows] == [("mlp/proj/kernel", 2 * 2 * 2 * LENGTH * WIDTH * 2)] * 3


def test_modules_of_one_scope_are_refused():
    params = Sharing().init(jax.random.key(0), X)["params"]
    adapted = jlora.apply(params, method=jlora.houlsby(2), targets="kernel")
    with pytest.raises(
        ValueError, match=r"^Sharing and Dense share one scope \(nn.share_scope\), and an adapter belongs"
    ):
        jlora.lift(lambda p: Sharing().apply({"params": p}, X))(adapted)


def test_a_derivative_of_its_own_is_refused():
    """A custom derivative's rule is traced after the interceptors are gone: gradients would be zeros, in silence."""

    @jax.custom_vjp
    def model(params, tokens):
        return forward(params, tokens)

    model.defvjp(lambda p, t: jax.vjp(lambda p: forward(p, t), p), lambda pullback, g: (*pullback(g), None))
    adapted = jlora.apply(base(), method=jlora.pfeiffer(2))
    with pytest.raises(
        ValueError, match=r"^the adapter of 'h_0/mlp/proj/kernel' is applied inside a function with a der"
    ):
        jlora.lift(model)(adapted, TOKENS)


def test_reading_the_arrays_of_an_adapter_is_no_application():
    plain = {"mlp": {"proj": {"kernel": normal(4, 4)}}}
    adapted = jlora.apply(plain, method=jlora.pfeiffer(2))

    def regularised(p, x):
        p = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), p)
        return (x @ p["mlp"]["proj"]["kernel"]).sum() + sum((w**2).sum() for w in jax.tree.leaves(p))

    with pytest.raises(ValueError, match=r"^1 of 1 adapted weights are never read by 'regularised': 'mlp/proj/kernel'"):
        jlora.lift(regularised)(adapted, normal(2, 4))


def test_features_are_not_mistaken_for_tokens():
    """A gated unit returns half as much as its kernel makes: two tokens of 8 are no 16 features."""

    class Gated(nn.Dense):
        @nn.compact
        def __call__(self, x):
            a, b = jnp.split(super().__call__(x), 2, -1)
            return a * nn.sigmoid(b)

    x = normal(3, 2, WIDTH)
    params = Gated(2 * WIDTH).init(jax.random.key(0), x)["params"]
    adapted = jlora.apply(params, method=jlora.houlsby(2), targets="kernel")
    with pytest.raises(ValueError, match=r"is 16 wide, and its module Gated returns an array of shape \(3, 2, 8\)"):
        jlora.lift(lambda p: Gated(2 * WIDTH).apply({"params": p}, x))(adapted)


# -- prompts -----------------------------------------------------------------------------------------------------------


class Setup(nn.Module):
    """Written with setup(), and called with a dict."""

    pick: Callable = lambda h: h

    def setup(self):
        self.wte = nn.Embed(VOCABULARY, WIDTH)
        self.head = nn.Dense(3)

    def __call__(self, batch):
        return self.pick(self.head(self.wte(batch["input_ids"])))


def setup_model(pick=lambda h: h):
    model = Setup(pick)
    batch = {"input_ids": TOKENS, "weights": jnp.ones(2)}
    params = Setup().init(jax.random.key(0), batch)["params"]
    return (lambda p, b: model.apply({"params": p}, b)), jlora.apply(params, method=jlora.prompt_tuning(4)), batch


@pytest.mark.parametrize("box", [dict, freeze])
def test_the_callers_batch_stays_as_it_is(box):
    fn, adapted, batch = setup_model()
    batch = box(batch)
    seen = []

    def twice(p, b):
        first = fn(p, b)
        seen.append(b["input_ids"].shape)
        return first, fn(p, b)

    first, second = jlora.lift(twice)(adapted, batch)
    assert seen == [TOKENS.shape] and first.shape == (2, LENGTH, 3)
    close(first, second)
    close(first, fn(adapted.base, batch))  # token by token: a prompt changes nothing here


@pytest.mark.parametrize(
    "pick",
    [lambda h: h[:, ::2], lambda h: h.reshape(-1, 3), lambda h: jnp.concatenate([h, h], 1)],
    ids=["every other", "flattened", "twice"],
)
def test_a_result_that_mixes_prompt_and_tokens_is_refused(pick):
    fn, adapted, batch = setup_model(pick)
    with pytest.raises(
        ValueError, match=r"^prompt_tuning: the model returns an array of shape .* which part of it bel"
    ):
        jlora.lift(fn)(adapted, batch)


def test_what_is_no_array_is_returned_as_without_a_prompt():
    fn, adapted, batch = setup_model(lambda h: {"h": h, "length": h.shape[1], "name": "logits", "none": None})
    out = jlora.lift(lambda p, b: fn(p, b)["h"] * fn(p, b)["length"])(adapted, batch)
    close(out, LENGTH * fn(adapted.base, batch)["h"])


def test_ranks_set_the_length():
    adapted = jlora.apply(base(), method=jlora.prompt_tuning(3), ranks={"wte": 5})
    assert adapted.factors[TABLE]["prompt"].shape == (5, WIDTH)
    adapted = randomised(jlora.apply(base(), method=jlora.prefix_tuning(3, hidden=4), ranks={"": 5}))
    assert adapted.factors["*"]["embedding"].shape == (5, WIDTH)
    plain = jlora.bake_prompt(adapted)
    assert plain.factors["h_0/attn/key/kernel"]["prefix"].shape == (5, WIDTH)
    close(jlora.lift(forward)(plain, TOKENS), jlora.lift(forward)(adapted, TOKENS))


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("h_0/attn/out", "attention"), ("encoder/MultiHeadDotProductAttention_0/out", "attention"),
        ("layers/3/self_attn/o_proj", "attention"), ("bert/layer/0/attention/output/dense", "attention"),
        ("h_0/mlp/proj", "mlp"), ("MlpBlock_0/Dense_1", "mlp"), ("layers/1/mlp/down_proj", "mlp"), ("ffn/wo", "mlp"),
        ("block/0/DenseReluDense/wo", "mlp"), ("h/0/mlp/fc_out", "mlp"), ("layers/0/fc2", "mlp"),
        ("bert/layer/0/output/dense", "mlp"), ("layers_1/feed_forward/w2", None), ("diffusion_head/proj", None),
        ("effect/down", None), ("buffer/proj", None), ("my_attention_pool_logits/proj", None), ("attn/query", None),
        ("h_0/mlp/fc", None),
    ],
)  # fmt: skip
def test_the_last_kernels_of_sub_layers_by_name(path, found):
    patterns = {"attention": ATTENTION_OUT, "mlp": MLP_OUT}
    assert [name for name, p in patterns.items() if re.search(p, f"{path}/kernel")] == ([found] if found else [])


def test_half_a_model_is_not_adapted_in_silence():
    params = {"self_attn": {"out_proj": {"kernel": normal(4, 4)}}, "moe": {"second": {"kernel": normal(4, 4)}}}
    with pytest.raises(
        ValueError, match=r"^apply: houlsby goes by the names of layers, and none of these weights has one"
    ):
        jlora.apply(params, method=jlora.houlsby(2))


# -- Flax's attention in its other forms -------------------------------------------------------------------------------


def prefixed(attention: nn.Module, size: float = 2.0) -> tuple[Callable, jlora.Adapted]:
    params = attention.init(jax.random.key(0), X)["params"]
    fn = lambda p: attention.apply({"params": p}, X)
    sites = jlora.sites(fn, params)
    return fn, randomised(jlora.apply(params, method=jlora.prefix_tuning(3), sites=sites), size)


def test_a_prefix_does_not_pass_through_the_norm_of_the_keys():
    fn, adapted = prefixed(nn.MultiHeadDotProductAttention(HEADS, normalize_qk=True), 0.05)
    scaled = jax.tree.map(lambda x: x, adapted.factors)
    scaled["key/kernel"]["prefix"] = 100.0 * scaled["key/kernel"]["prefix"]
    assert float(jnp.abs(jlora.lift(fn)(adapted.replace(factors=scaled)) - jlora.lift(fn)(adapted)).max()) > 0.02


def test_an_attention_function_of_ones_own_is_refused():
    attend = lambda query, key, value: jax.nn.dot_product_attention(query, key, value, is_causal=True)
    fn, adapted = prefixed(nn.MultiHeadDotProductAttention(HEADS, attention_fn=attend))
    with pytest.raises(
        ValueError, match=r"^prefix_tuning: MultiHeadDotProductAttention attends by a function of its own"
    ):
        jlora.lift(fn)(adapted)


# -- all of it is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name):
    make, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError)) as caught:
        make()
    expected = {
        "a model without tokens": "prompt_tuning: the model is called without tokens, integers (batch, length); it takes "
        "input_ids (2, 5) float32",
        "no layer of a known name": "apply: pfeiffer goes by the names of layers, and none of these weights has one",
    }
    assert str(caught.value).startswith(expected.get(name, message))
    if message is not None:
        assert str(caught.value) == message


def test_a_function_that_is_no_linen_model_is_refused():
    plain = {"mlp": {"proj": {"kernel": normal(4, 4)}}}
    adapted = jlora.apply(plain, method=jlora.pfeiffer(2))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        jlora.lift(lambda p, x: x @ p["mlp"]["proj"]["kernel"])(adapted, normal(2, 4))
    assert str(caught.value) == (
        "1 of 1 adapted weights are never read by '<lambda>': 'mlp/proj/kernel'. They would not be trained: leave them "
        "out with targets=, or lift the function that reads them. The method acts on the output of the Flax linen module "
        "that holds each weight, in its __call__"
    )
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError) as caught:
        jlora.apply(nnx.state(model), method=jlora.houlsby(2), targets="kernel")
    assert str(caught.value) == (
        "houlsby acts on the activations of Flax linen modules, whose parameters are dicts of dicts; these hold a "
        "State. For other libraries there are the methods on weights, such as jlora.lora"
    )


def test_attention_of_ones_own_has_to_say_that_it_takes_a_prefix():
    class Core(nn.Module):
        def __call__(self, query, key, value, mask=None):
            return jax.nn.dot_product_attention(query, key, value, mask=mask)

    class Taking(Core):
        takes_prefix = True

    class Model(nn.Module):
        core: Any

        @nn.compact
        def __call__(self, x):
            q, k, v = (nn.DenseGeneral((HEADS, 4), name=name)(x) for name in ("q", "k", "v"))
            return self.core()(q, k, v, jnp.ones((1, 1, LENGTH, LENGTH), bool))

    params = Model(Core).init(jax.random.key(0), X)["params"]
    sites = jlora.sites(lambda p: Model(Core).apply({"params": p}, X), params)
    adapted = randomised(jlora.apply(params, method=jlora.prefix_tuning(2), sites=sites))
    with pytest.raises(ValueError, match=r"The method acts on the attention modules of Flax linen \(MultiHeadDot"):
        jlora.lift(lambda p: Model(Core).apply({"params": p}, X))(adapted)
    got = jlora.lift(lambda p: Model(Taking).apply({"params": p}, X))(adapted)
    heads = {n: jnp.einsum("btd,dhk->bthk", X, p["kernel"]) + p["bias"][None, None] for n, p in params.items()}
    prefix = lambda n: jnp.broadcast_to(adapted.factors[f"{n}/kernel"]["prefix"], (2, 2, HEADS, 4))
    k, v = (jnp.concatenate([prefix(n), heads[n]], 1) for n in ("k", "v"))
    close(got, jax.nn.dot_product_attention(heads["q"], k, v))
