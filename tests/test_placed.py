"""jlora's models on meshes as `jax.make_mesh` makes them, whose types say where arrays lie, and on those of Auto axes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import models
from jlora.models import placed
from jlora.models.bert import Bert, BertConfig
from jlora.models.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from jlora.models.deberta import Deberta, DebertaConfig
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.models.llama import Llama, LlamaConfig
from jlora.models.roberta import Roberta, RobertaConfig
from jlora.models.unet import UNet, UNetConfig
from jlora.models.vae import VAE, VAEConfig
from jlora.models.vit import ViT, ViTConfig
from tests import memory
from tests.tiers import thorough

BATCH, LENGTH = 4, 6
SIZES = {"vocab_size": 16, "context": 16, "width": 8, "layers": 2, "heads": 2, "hidden": 12}
TEXT = CLIPTextConfig(**SIZES, end=15)
IMAGE = CLIPVisionConfig(image_size=4, patch_size=2, channels=1, width=8, layers=2, heads=2, hidden=12)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (BATCH, LENGTH)), jnp.int32)
IMAGES = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, 4, 4, 1)), jnp.float32)
DRAWN = (IMAGES, jnp.arange(BATCH), jnp.ones((BATCH, LENGTH, 8)), jnp.ones((BATCH, 8)), jnp.full((BATCH, 6), 4.0))
MASK = jnp.ones((BATCH, LENGTH), bool).at[1, 4:].set(False)


def build(name: str, **options):
    head = {"head": "sequence_classification"}
    kinds = {
        "gpt2": lambda: GPT2(GPT2Config(**SIZES | options)),
        "gpt2, a label": lambda: GPT2(GPT2Config(**SIZES, **head, **options)),
        "llama": lambda: Llama(
            LlamaConfig(**SIZES, key_heads=1, window=3, sliding=(True, False), qk_norm=True, **options)
        ),
        "bert": lambda: Bert(BertConfig(**SIZES, **options)),
        "bert, a label": lambda: Bert(BertConfig(**SIZES, **head, **options)),
        "roberta": lambda: Roberta(RobertaConfig(**SIZES, head="token_classification", **options)),
        "deberta": lambda: Deberta(DebertaConfig(**SIZES | options, buckets=4, convolution=3)),
        "vit": lambda: ViT(
            ViTConfig(image_size=4, patch_size=2, channels=1, width=8, layers=2, heads=2, labels=3, **options)
        ),
        "clip": lambda: CLIP(CLIPConfig(TEXT, IMAGE, projection=4, **options)),
        "unet": lambda: UNet(
            UNetConfig(
                channels=1, outputs=1, widths=(4, 8), depths=(1, 0), heads=(2, 2), groups=2, context_width=8,
                added=32, added_time=4, **{"layers": 1} | options,
            )
        ),
        "vae": lambda: VAE(VAEConfig(channels=1, widths=(4, 8), groups=2, **{"layers": 1} | options)),
    }  # fmt: skip
    model = kinds[name]()
    inputs = {"vit": (IMAGES,), "clip": (TOKENS, IMAGES), "unet": DRAWN, "vae": (IMAGES,)}.get(name, (TOKENS,))
    return model, inputs, {"mask": MASK} if "label" in name else {}


NAMES = ["gpt2", "gpt2, a label", "llama", "bert", "bert, a label", "roberta", "deberta", "vit", "clip", "unet", "vae"]


def shapes_of(model, inputs):
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def drawn(model, inputs):
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), shapes_of(model, inputs))


# -- layouts -----------------------------------------------------------------------------------------------------------


def replicated(path, shape):
    return P()


def fsdp(path, shape):
    """Every array split over the batch's axis, along its last axis that can be."""
    axes = [i for i, size in enumerate(shape) if size % 2 == 0]
    return P(*("data" if i == axes[-1] else None for i in range(len(shape)))) if axes else P()


def tensor(path, shape):
    """Heads and hidden features over one axis, what they are made of over that of the batch."""
    stack = (None,) * (len(shape) - 2)
    if path.endswith("embedding"):
        return P("model", "data") if shape[0] % 2 == 0 else P()
    if path.endswith("kernel") and len(shape) < 4 and shape[-1] % 2 == 0 and shape[-2] % 2 == 0:
        inner = path.split("/")[-2] in ("out", "proj", "down")
        return P(*stack, *(("model", "data") if inner else ("data", "model")))
    return P()


def columns(path, shape):
    """Last axes over an axis that is not the batch's: what comes out of every layer is split."""
    return P(*(None,) * (len(shape) - 1), "model") if shape and shape[-1] % 2 == 0 else P()


LAYOUTS = [replicated, fsdp, tensor, columns]


def make_mesh(explicit: bool = True) -> Mesh:
    types = None if explicit else (AxisType.Auto,) * 2
    return jax.make_mesh((2, 2), ("data", "model"), **({} if types is None else {"axis_types": types}))


def lay(tree, mesh, layout, put=jax.device_put):
    def one(path, x):
        return put(x, NamedSharding(mesh, layout(jax.tree_util.keystr(path, simple=True, separator="/"), x.shape)))

    return jax.tree_util.tree_map_with_path(one, tree)


def typed(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


rows = lambda path, shape: P("data")


DRAWS = ("unet", "vae")  # of whose layers the first two layouts say the same, and so do the last two
EACH = [(name, layout) for name in NAMES for layout in (LAYOUTS if name not in DRAWS else (fsdp, columns))]


@pytest.mark.parametrize(("name", "layout"), EACH, ids=lambda value: getattr(value, "__name__", value))
def test_every_model_is_differentiated_on_a_mesh_of_explicit_axes(name, layout):
    """The gradient is traced and not run: JAX raises while tracing where a sharding is missing."""
    scanned = layout is columns or name in ("llama", "bert")  # the layouts differ in each layer, not in how they follow
    model, inputs, options = build(name, scan=scanned, remat=scanned)
    mesh = make_mesh()
    types = {}

    def loss(params, inputs, options):
        out = model.apply({"params": params}, *inputs, **options)
        out = out["out"] if isinstance(out, dict) else out
        types["out"] = jax.typeof(out).sharding.spec
        return jnp.mean(out**2)

    params = lay(shapes_of(model, inputs), mesh, layout, typed)
    with jax.set_mesh(mesh):
        grad = jax.jit(jax.grad(loss)).trace(params, *lay((inputs, options), mesh, rows, typed))
    assert types["out"][0] == "data" and not any(types["out"][1:])
    where = lambda x: (*x.sharding.spec, *(None,) * (x.ndim - len(x.sharding.spec)))
    assert [tuple(x.sharding.spec) for x in grad.jaxpr.out_avals] == [where(x) for x in jax.tree.leaves(params)]


TEXTS = NAMES[:-4]


@pytest.mark.parametrize(
    "name",
    thorough(TEXTS, "test_every_model_is_differentiated_on_a_mesh_of_explicit_axes", ("gpt2, a label", "deberta")),
)
def test_models_of_text_take_tokens_on_several_devices(name):
    """Rows over one axis and their tokens over the other; the gradient is traced, and its numbers are one device's."""
    model, inputs, options = build(name, scan=True)
    mesh = make_mesh()
    tokens = lambda path, shape: P("data", "model")

    def value(params, inputs, options):
        return jnp.mean(model.apply({"params": params}, *inputs, **options) ** 2)

    types = lay((inputs, options), mesh, tokens, typed)
    with jax.set_mesh(mesh):
        jax.jit(jax.grad(value)).trace(lay(shapes_of(model, inputs), mesh, fsdp, typed), *types)
    params = drawn(model, inputs)
    found = jax.jit(value)(lay(params, mesh, fsdp), *lay((inputs, options), mesh, tokens))
    np.testing.assert_allclose(found, jax.jit(value)(params, inputs, options), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "layout", "explicit"),
    [
        ("gpt2", fsdp, True),
        ("gpt2", tensor, False),
        ("deberta", tensor, True),
        pytest.param("unet", fsdp, True, marks=pytest.mark.once),
    ],
)
def test_numbers_are_those_of_one_device(name, layout, explicit):
    if name == "unet":  # compiling it takes half of what a worker may take
        memory.drop()
    model, inputs, _ = build(name, layers=1)
    params, mesh = drawn(model, inputs), make_mesh(explicit)

    def loss(params, inputs):
        out = model.apply({"params": params}, *inputs)
        return jnp.mean((out["out"] if isinstance(out, dict) else out) ** 2)

    value = jax.jit(jax.value_and_grad(loss))
    expected = value(params, inputs)
    found = value(lay(params, mesh, layout), lay(inputs, mesh, rows))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), *jax.device_get((found, expected))
    )


@pytest.mark.parametrize(
    "method", [jlora.lora(2), jlora.prompt_tuning(2), jlora.prefix_tuning(2)], ids=lambda m: m.name
)
def test_a_step_of_a_sharded_batch_is_that_of_one_device(method):
    """The loss is differentiated without `jax.set_mesh` around it, which JAX 0.12 by itself cannot do."""
    model, inputs, _ = build("gpt2", layers=1)

    def loss_fn(params, tokens):
        logits = model.apply({"params": params}, tokens, mask=jnp.ones_like(tokens, bool))
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

    step = jlora.train_step(loss_fn, optax.sgd(0.1), donate=False)
    mesh = jax.make_mesh((4,), ("data",))
    params = drawn(model, inputs)
    start = lambda params: jlora.TrainState.create(jlora.apply(params, method=method), step.tx)
    state, metrics = step(start(params), TOKENS)
    sharded, their = step(start(lay(params, mesh, replicated)), jax.device_put(TOKENS, NamedSharding(mesh, P("data"))))
    np.testing.assert_allclose(their["loss"], metrics["loss"], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        *jax.device_get((sharded.adapted.factors, state.adapted.factors)),
    )


@pytest.mark.parametrize("layout", [replicated, tensor], ids=lambda layout: layout.__name__)
def test_texts_of_sharded_prompts_are_those_of_one_device(layout):
    model, inputs, _ = build("gpt2", layers=1)
    params, mesh = drawn(model, inputs), make_mesh()
    mask = jnp.ones((BATCH, LENGTH), bool).at[1, :2].set(False)
    expected = models.generate(model, params, TOKENS, new_tokens=3, mask=mask)
    params, (tokens, mask) = lay(params, mesh, layout), lay((TOKENS, mask), mesh, rows)
    found = models.generate(model, params, tokens, new_tokens=3, mask=mask)
    np.testing.assert_array_equal(jax.device_get(found), expected)
    assert found.sharding.spec == P("data", None)
    if layout is replicated:
        one = models.beam_search(model, params, tokens, new_tokens=3, mask=mask, beams=1)
        np.testing.assert_array_equal(jax.device_get(one.tokens)[:, 0], expected)


def test_a_cached_call_on_a_mesh_lies_as_its_tokens():
    model, inputs, _ = build("llama")
    mesh = make_mesh()
    params = lay(shapes_of(model, inputs), mesh, tensor, typed)

    def call(params, tokens, positions):
        _, cache = model.apply({"params": params}, tokens, positions=positions, cache=model.empty_cache(BATCH, 8))
        return model.apply({"params": params}, tokens[:, :1], positions=positions[:, -1:], cache=cache)[0]

    (out,) = jax.jit(call).trace(params, *lay((TOKENS, TOKENS), mesh, rows, typed)).jaxpr.out_avals
    assert out.sharding.spec[0] == "data"


# -- where no type says anything ---------------------------------------------------------------------------------------

PAIRS = {
    "dense": (placed.Dense, nn.Dense, (5,), jnp.ones((2, 3, 8))),
    "embed": (placed.Embed, nn.Embed, (7, 5), jnp.ones((2, 3), jnp.int32)),
    "one row": (placed.Embed, nn.Embed, (1, 5), jnp.ones((2, 3), jnp.int32)),
    "norm": (placed.LayerNorm, nn.LayerNorm, (1e-5,), jnp.ones((2, 3, 8))),
    "conv": (placed.Conv, nn.Conv, (5, (3,)), jnp.ones((2, 3, 8))),
}


@pytest.mark.parametrize("explicit", [None, False], ids=["one device", "auto"])
@pytest.mark.parametrize("name", PAIRS)
def test_layers_are_flaxs_own(name, explicit):
    ours, theirs, arguments, x = PAIRS[name]
    shapes = jax.eval_shape(theirs(*arguments).init, jax.random.key(0), x)
    if explicit is False:
        x, shapes = lay((x, shapes), make_mesh(explicit=False), fsdp, typed)
    texts = [str(jax.jit(kind(*arguments).apply).trace(shapes, x).jaxpr) for kind in (ours, theirs)]
    assert texts[0] == texts[1]


def test_rows_out_of_the_table_are_nan_on_a_mesh_too():
    table = placed.Embed(6, 4)
    params = {"params": {"embedding": jnp.arange(24.0).reshape(6, 4)}}
    ids = jnp.asarray([[0, -1], [5, 6]])
    mesh = make_mesh()
    found = jax.jit(table.apply)(lay(params, mesh, fsdp), lay(ids, mesh, rows))
    np.testing.assert_array_equal(jax.device_get(found), table.apply(params, ids))
    assert jnp.isnan(table.apply(params, ids)[1, 1]).all()


def test_heads_that_cannot_be_dealt_out_are_whole():
    mesh = jax.make_mesh((4,), ("model",))
    x = jax.ShapeDtypeStruct((2, 3, 8), jnp.float32, sharding=NamedSharding(mesh, P(None, None, "model")))
    split = lambda heads: jax.jit(lambda x: placed.in_heads(x, heads)).trace(x).jaxpr.out_avals[0].sharding.spec
    assert split(4) == P(None, None, "model", None)
    assert split(2) == P(None, None, None, None)
