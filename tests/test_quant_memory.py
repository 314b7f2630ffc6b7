"""Memory of a quantised base in training: what compiled steps hold, and what autodiff keeps."""

import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from tests.tiers import thorough

LAYERS, WIDTH, ROWS = 24, 256, 64
LAYER = 2 * WIDTH * 2 * WIDTH * 2  # bytes of one layer's two weights in bfloat16
FORMS = ("unrolled", "scanned")
UNROLLED = "test_forward_mode_and_places_in_types_cost_one_layer_too"
TARGETS = {"v5e": "libtpu", "h100": "jax_cuda12_plugin"}

# -- the compiled step -------------------------------------------------------------------------------------------------


def block(h: jax.Array, layer: Any) -> jax.Array:
    return h + jnp.tanh(h @ layer["up"]) @ layer["down"]


def loss_of(form: str, remat: bool) -> Any:
    each = jax.checkpoint(block) if remat else block

    def loss(params: Any, x: jax.Array) -> jax.Array:
        if form == "scanned":
            x, _ = lax.scan(lambda h, layer: (each(h, layer), None), x, params["layers"])
        else:
            for i in range(LAYERS):
                x = each(x, params[f"h_{i}"])
        return jnp.mean(jnp.square(x.astype(jnp.float32)))

    return loss


def temporaries(
    number: str | None, form: str, remat: bool, accumulate: int, width: int = WIDTH, device: Any = None
) -> int:
    """Bytes that a training step of LoRA holds at its peak beside arguments and results, as compiled."""
    loss = loss_of(form, remat)
    lead = (LAYERS,) if form == "scanned" else ()
    shape = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    layer = {"up": shape(*lead, width, 2 * width), "down": shape(*lead, 2 * width, width)}
    params = {"layers": layer} if lead else {f"h_{i}": layer for i in range(LAYERS)}
    sites = jlora.sites(loss, params, shape(ROWS, width))
    base = params if number is None else jlora.quantize(params, number, sites=sites)
    adapted, batch = jlora.apply(base, method=jlora.lora(4), sites=sites), shape(accumulate * ROWS, width)
    if device is not None:
        place = jax.sharding.SingleDeviceSharding(device)
        adapted, batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (adapted, batch)
        )  # fmt: skip
    step = jlora.train_step(loss, optax.sgd(0.1), accumulate=accumulate)
    compiled = step.lower(jlora.TrainState.create(adapted, step.tx), batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


plain_temporaries = functools.cache(functools.partial(temporaries, None))  # one compilation for all formats

ROWS_OF_STEPS = [
    (number, form, remat, accumulate)
    for number in ("nf4", "int8")
    for form in FORMS
    for remat in (False, True)
    for accumulate in (1, 2)
]
DEFAULT_STEPS = [("nf4", "scanned", False, 1), ("int8", "unrolled", False, 1)]


@pytest.mark.parametrize("row", thorough(ROWS_OF_STEPS, UNROLLED, DEFAULT_STEPS))
def test_a_step_holds_one_dequantised_layer(row: Any) -> None:
    number, *setting = row
    more = temporaries(number, *setting) - plain_temporaries(*setting)
    assert more <= LAYER, f"{more / LAYER:.2f} layers more than the bfloat16 base"


# What XLA needs to know of a device that is not there.
H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
  platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 8 }
  device_description_str: "NVIDIA H100 80GB HBM3" """


def compiled_for(target: str) -> None:
    """Prints the excess in layers of every form: in a process of its own, as compilers lock files and fill stderr."""
    from jax.experimental import topologies

    if target == "h100":
        options = {"platform": "cuda", "topology_name": "h100", "topology": "1x1x1", "target_config": H100}
        width, forms = WIDTH, FORMS
    else:
        # Of a smaller model codes and activations lie in the 128 MiB of its vector memory, which are not counted. The
        # unrolled one takes minutes.
        options = {"platform": "tpu", "topology_name": "v5e:1x1", "chips_per_host_bounds": (1, 1, 1)}
        width, forms = 8 * WIDTH, FORMS[1:]
    device = topologies.get_topology_desc(**options).devices[0]
    for form, remat in itertools.product(forms, (False, True)):
        plain = temporaries(None, form, remat, 1, width, device)
        for number in ("nf4", "int8"):
            more = temporaries(number, form, remat, 1, width, device) - plain
            print(json.dumps([form, remat, number, more / (LAYER * (width // WIDTH) ** 2)]))


@pytest.mark.parametrize("target", thorough(TARGETS, UNROLLED))
def test_a_step_compiled_for_a_device_holds_one_dequantised_layer(target: str) -> None:
    if importlib.util.find_spec(TARGETS[target]) is None:
        pytest.skip(f"{TARGETS[target]} is not installed")
    more = {
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_gpu_autotune_level=0" if target == "h100" else "",
        "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # fmt: skip
    command = (sys.executable, "-c", f"import {__name__} as of; of.compiled_for({target!r})")
    done = subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(found) == (8 if target == "h100" else 4)
    assert not [row for row in found if row[-1] > 1]


# -- what autodiff keeps -----------------------------------------------------------------------------------------------

IN, OUT, DEEP, BATCH = 128, 128, 3, 8
RNG = np.random.default_rng(0)
A, B, STACK, TAPS = (
    jnp.asarray(RNG.normal(size=shape) / 12, jnp.float32)
    for shape in ((IN, OUT), (OUT, IN), (DEEP, IN, OUT), (1, IN, OUT))
)
X = jnp.asarray(RNG.normal(size=(BATCH, IN)), jnp.float32)


@jax.custom_vjp
def own_derivative(x: jax.Array, w: jax.Array) -> jax.Array:
    """A function of the model's own, whose forward pass keeps the weight."""
    return jnp.tanh(x @ w)


def _own_forward(x: jax.Array, w: jax.Array) -> Any:
    y = jnp.tanh(x @ w)
    return y, (x, w, y)


def _own_backward(kept: Any, g: jax.Array) -> Any:
    x, w, y = kept
    g = g * (1 - y * y)
    return g @ w.T, x.T @ g


own_derivative.defvjp(_own_forward, _own_backward)


def in_parts(params: Any, x: jax.Array) -> jax.Array:
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    of = lambda w, x: jnp.tanh(x @ w)
    return jax.shard_map(of, mesh=mesh, in_specs=(P(None, "d"), P()), out_specs=P(None, "d"))(params["w"], x)


def constrained(params: Any, x: jax.Array) -> jax.Array:
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    return x @ lax.with_sharding_constraint(params["w"], NamedSharding(mesh, P(None, "d")))


def constrained_stack(params: Any, x: jax.Array) -> jax.Array:
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    stack = lax.with_sharding_constraint(params["w"], NamedSharding(mesh, P(None, None, "d")))
    return lax.scan(layer, x, stack)[0]


def in_parts_of_rows(params: Any, x: jax.Array) -> jax.Array:
    """The weight is the same in all parts, of which JAX says inside that it varies, as the rows do."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    of = lambda w, x: jnp.tanh(x @ w)
    return jax.shard_map(of, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))(params["w"], x)


def in_order(params: Any, x: jax.Array) -> jax.Array:
    """An einsum in an odd order, of a weight in heads."""
    return jnp.einsum("hdk,bd->khb", params["w"].reshape(IN, 4, OUT // 4).transpose(1, 0, 2), x)


def convolved(params: Any, x: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x[:, None], params["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def layer(h: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
    return jnp.tanh(h @ w), None


PROGRAMS: dict[str, tuple[Any, Any]] = {
    "product": ({"w": A}, lambda p, x: x @ p["w"]),
    "transposed": ({"w": B}, lambda p, x: x @ p["w"].T),
    "weight first": ({"w": B}, lambda p, x: p["w"] @ x.T),
    "odd order": ({"w": A}, in_order),
    "frozen": ({"w": A, "still": B}, lambda p, x: jnp.tanh(x @ p["w"]) @ p["still"]),
    "scan": ({"w": STACK}, lambda p, x: lax.scan(layer, x, p["w"])[0]),
    "scan and remat": ({"w": STACK}, lambda p, x: lax.scan(jax.checkpoint(layer), x, p["w"])[0]),
    "index": ({"w": STACK}, lambda p, x: jnp.tanh(x @ p["w"][0]) @ p["w"][2]),
    "index of a loop": ({"w": STACK}, lambda p, x: lax.fori_loop(0, DEEP, lambda i, h: layer(h, p["w"][i])[0], x)),
    "vmap": ({"w": STACK}, lambda p, x: jax.vmap(lambda w: x @ w)(p["w"])),
    "map": ({"w": STACK}, lambda p, x: lax.map(lambda w: x @ w, p["w"])),
    "cond": ({"w": A}, lambda p, x: lax.cond(x[0, 0] > 9, lambda: x @ p["w"], lambda: 2 * x @ p["w"])),
    "shard_map": ({"w": A}, in_parts),
    "shard_map of rows": ({"w": A}, in_parts_of_rows),
    "constraint": ({"w": A}, constrained),
    "constraint of a stack": ({"w": STACK}, constrained_stack),
    "stop_gradient": ({"w": A}, lambda p, x: x @ lax.stop_gradient(p["w"]) + x @ p["w"]),
    "convolution": ({"w": TAPS}, convolved),
    "own derivative": ({"w": A, "still": B}, lambda p, x: own_derivative(x @ p["w"], p["still"])),
}
METHODS = {"lora": jlora.lora(2), "dora": jlora.dora(2), "ia3": jlora.ia3()}
CASES = [
    *((name, "lora", forward) for name in PROGRAMS for forward in (False, True)),
    ("product", "dora", False),
    ("product", "ia3", False),
    ("scan", "dora", False),
]
DEFAULT_CASES = [
    ("scan", "lora", False),
    ("shard_map", "lora", False),
    ("shard_map of rows", "lora", False),
    ("constraint", "lora", False),
    ("constraint of a stack", "lora", False),
    ("stop_gradient", "lora", False),
    ("own derivative", "lora", True),
    ("product", "dora", False),
]


def both(case: Any, number: str) -> list[Any]:
    """Loss with its gradients, and what autodiff keeps, of a quantised base and of the same one dequantised."""
    name, method, forward = case
    params, fn = PROGRAMS[name]
    sites = jlora.sites(fn, params, X)
    codes = jlora.quantize(params, number, sites=sites, targets=[f"^{path}$" for path in params])
    lifted = jlora.lift(fn, forward_mode=forward)
    found = []
    for base in (codes, jlora.dequantize(codes)):
        adapted = jlora.apply(base, method=METHODS[method], sites=sites, targets="^w$")
        some = lambda x: x + jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) / 30
        factors, frozen = jlora.partition(adapted.replace(factors=jax.tree.map(some, adapted.factors)))

        def loss(factors: Any, x: jax.Array, frozen: Any = frozen) -> jax.Array:
            return jnp.mean(jnp.square(lifted(jlora.combine(factors, frozen), x)))

        back = jax.eval_shape(lambda *of, loss=loss: jax.vjp(loss, *of)[1], factors, X)
        found.append((jax.jit(jax.value_and_grad(loss, (0, 1)))(factors, X), jax.tree.leaves(back)))
    return found


@pytest.mark.parametrize("case", thorough(CASES, UNROLLED, DEFAULT_CASES))
def test_autodiff_keeps_the_codes(case: Any) -> None:
    """And the gradients are those of the dequantised base, held as a plain array."""
    (values, kept), (expected, of_plain) = both(case, "int8" if case[0] == "scan" else "nf4")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), values, expected)
    large = lambda leaves: [
        x.shape for x in leaves if hasattr(x, "dtype") and x.size >= IN * OUT // 2 and x.dtype.itemsize > 1
    ]
    assert large(of_plain)
    assert not large(kept)


def shapes_of_products(jaxpr: Any) -> set[tuple[int, ...]]:
    """Shapes of all the products that a program computes, in loops and calls too."""
    inner = [getattr(x, "jaxpr", x) for eqn in jaxpr.eqns for x in jax.tree.leaves(eqn.params)]
    own = {eqn.outvars[0].aval.shape for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"}
    return own.union(*(shapes_of_products(x) for x in inner if hasattr(x, "eqns")))


def test_no_gradient_of_the_base_is_formed() -> None:
    params = {"w": jnp.ones((IN, 192))}
    fn = lambda p, x: jnp.tanh(x @ p["w"])
    sites = jlora.sites(fn, params, X)

    def products(adapted: jlora.Adapted, of: str) -> set[tuple[int, ...]]:
        loss = lambda part: jnp.sum(jnp.square(jlora.lift(fn)(adapted.replace(**{of: part}), X)))
        return shapes_of_products(jax.make_jaxpr(jax.grad(loss))(getattr(adapted, of)).jaxpr)

    plain = jlora.apply(params, method=jlora.lora(2), sites=sites)
    assert (IN, 192) in products(plain, "base")
    codes = jlora.apply(jlora.quantize(params, "nf4", sites=sites), method=jlora.lora(2), sites=sites)
    found = products(codes, "factors")
    assert (BATCH, 192) in found
    assert not {(IN, 192), (192, IN)} & found


def test_forward_mode_and_places_in_types_cost_one_layer_too() -> None:
    """Products that autodiff differentiates dequantise a weight no sooner than its input is there.

    The compiler of JAX 0.10 keeps all six in spite of the barrier (6.1 layers more): there it is only said.
    """
    layers, width = 6, 256
    rng = np.random.default_rng(0)
    params = {
        f"l{i}": {"kernel": jnp.asarray(rng.normal(size=(width, width)) / 16, jnp.float32)} for i in range(layers)
    }

    def forward(params: Any, x: jax.Array) -> jax.Array:
        for i in range(layers):
            x = jnp.tanh(x @ params[f"l{i}"]["kernel"])
        return x.sum()

    def gradient(base: Any, forward_mode: bool) -> tuple[Any, Any]:
        adapted = jlora.apply(base, rank=4)
        lifted = jlora.lift(forward, forward_mode=forward_mode)
        loss = lambda factors, base, x: lifted(adapted.replace(base=base, factors=factors), x)
        return jax.grad(loss), adapted.factors

    def on_one(base: Any, forward_mode: bool) -> jax.stages.Lowered:
        step, factors = gradient(base, forward_mode)
        return jax.jit(step).lower(factors, base, x)

    def on_explicit_axes(base: Any) -> jax.stages.Lowered:
        mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
        put = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, P(*spec)))
        with jax.set_mesh(mesh):
            step, factors = gradient(put(base), False)
            return jax.jit(step).lower(put(factors), put(base), put(x, "d"))

    def in_shard_map(base: Any, checked: bool) -> jax.stages.Lowered:
        mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
        step, factors = gradient(base, False)
        summed = step if checked else lambda *of: jax.tree.map(lambda g: lax.psum(g, "d"), step(*of))
        specs = {"in_specs": (P(), P(), P("d")), "out_specs": P(), "check_vma": checked}
        return jax.jit(jax.shard_map(summed, mesh=mesh, **specs)).lower(factors, base, x)

    x = jnp.ones((8, width))
    codes = jlora.quantize(params)
    most = 1.1 if jax.__version_info__ >= (0, 12) else layers + 0.1
    forms: dict[str, Any] = {
        "forward mode": functools.partial(on_one, forward_mode=True),
        "explicit axes": on_explicit_axes,
        "shard_map": functools.partial(in_shard_map, checked=False),
        "shard_map that checks": functools.partial(in_shard_map, checked=True),
    }
    for name, lower in forms.items():
        of_codes, of_arrays = (lower(base).compile().memory_analysis().temp_size_in_bytes for base in (codes, params))
        more = (of_codes - of_arrays) / (4 * width * width)
        assert more < most, f"{name}: {more:.2f} layers more"
