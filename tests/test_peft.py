"""Adapters of Hugging Face PEFT against what PEFT itself computed from them (golden/make_peft.py), read and written."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora.interop import natives, onto
from jlora.interop.layer import merged
from jlora.interop.names import modules_of, names_of
from jlora.interop.peft import patterns
from jlora.interop.peft.config import completed
from jlora.interop.peft.read import parsed
from jlora.models.tensors import CONV, LINEAR, leaf
from tests.tiers import thorough

GOLDEN = Path(__file__).with_name("golden")
PEFT = GOLDEN / "peft"
ROWS = sorted(path.name for path in PEFT.iterdir() if (path / "adapter_config.json").exists())
CONFIGS = {row: json.loads((PEFT / row / "adapter_config.json").read_text()) for row in ROWS}
OURS = {path.name for path in (GOLDEN / "models").iterdir()} | {path.name for path in (PEFT / "bases").iterdir()}
OURS -= {"net", "mixtral"}  # which are no models of jlora's

# Rows that are refused, by the beginning of the reason.
REFUSED = {
    "adaption_prompt": "peft_type='ADAPTION_PROMPT' is none of those that jlora reads",
    "alora": "alora_invocation_tokens=[",
    "bdlora": "use_bdlora=",
    "head_tied": "the adapter changes the head alone of an embedding that is tied to the head",
    "kasa": "kasa_config=",
    "layer_replication": "layer_replication=[",
    "lora_bias_unmergeable": "does not fit the model:\n  'model.layers.0.self_attn.q_proj.bias' is no tensor of the model",
    "lora_ga": "init_lora_weights='lora_ga' (LoRA-GA) trains on a changed base",
    "lora_pickled": "adapter_model.bin",
    "modules_to_save_tied": "the adapter changes the embedding alone of an embedding that is tied to the head",
    "monteclora": "monteclora_config=",
    "oft_coft": "OFT with block_share or coft is none that jlora has",
    "oft_embedding": "'model.embed_tokens' is an embedding: jlora's OFT turns the inputs of linear layers alone",
    "oft_shared": "OFT with block_share or coft is none that jlora has",
    "pissa_niter": "init_lora_weights='pissa_niter_16' (PiSSA's randomised SVD) trains on a changed base",
    "qalora": "use_qalora=",
    "tokens_of_both": "does not fit the model:\n  'head/kernel': 'lm_head.weight' is trained in rows",
    "velora": "velora_config=",
    "vera_drawn": "VeRA without its projections",
}
REFUSED |= {
    row: f"peft_type={CONFIGS[row]['peft_type']!r} is none of those that jlora reads"
    for row in ROWS
    if CONFIGS[row]["peft_type"] in (
        "BOFT", "C3A", "CPT", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "HRA", "MISS", "MULTITASK_PROMPT_TUNING", "POLY",
        "RANDLORA", "ROAD", "SHIRA", "VBLORA", "WAVEFT", "XLORA",
    )
}  # fmt: skip


def base_of(row: str) -> str:
    return (CONFIGS[row]["base_model_name_or_path"] or "tiny/net").split("/")[1]


READ = [row for row in ROWS if row not in REFUSED and base_of(row) in OURS]
# What PEFT wrote for nobody: copies of biases beside modules_to_save, and heads that are the embedding again.
UNREAD = (".original_module.", ".modules_to_save.")
# Rows whose tensors are written in another form of the same function.
REWRITTEN = {
    "lokr_both": "both small factors in two parts: one of them is whole here",
    "older_clip_text": "names of transformers 4: those of transformers 5 are written",
    "older_vit": "names of transformers 4: those of transformers 5 are written",
}


@functools.cache
def base(name: str, **options):
    folder = GOLDEN / "models" / name
    return jlora.models.load(folder if folder.exists() else PEFT / "bases" / name, **options)


@functools.cache
def tensors_of(name: str) -> dict[str, np.ndarray]:
    folder = GOLDEN / "models" / name
    folder = folder if folder.exists() else PEFT / "bases" / name
    return load_file(folder / "model.safetensors")


def read(row: str, **options):
    own = base(base_of(row), **options)
    adapted = jlora.peft.load(PEFT / row, own.params, model=own.model, tied=True)
    return own.model, adapted


def outputs(row: str) -> dict[str, np.ndarray]:
    return dict(np.load(PEFT / row / "outputs.npz"))


def has(row: str, part: str) -> bool:
    file = PEFT / row / "outputs.npz"
    return file.exists() and any(part in name for name in np.load(file).files)


MERGED = [row for row in READ if has(row, "merged/")]


@pytest.mark.once
@pytest.mark.parametrize("row", MERGED)
def test_merged_weights_are_those_of_peft(row):
    """To 2e-5 of the largest entry: both sum in float32, in other orders; PiSSA's product is a difference of two."""
    model, adapted = read(row)
    whole, rows = jlora.merge(adapted), names_of(model, None, "").rows
    names = names_of(model, None, "")
    expected = {key.removeprefix("merged/"): value for key, value in outputs(row).items() if key.startswith("merged/")}
    compared = 0
    for name, value in expected.items():
        key = names.read(name)
        if key == "lm_head.weight" and names.tied:
            key = names.tied
        np.testing.assert_allclose(onto.base_tensor(whole, key, rows), value, atol=2e-5 * np.abs(value).max(), rtol=0)
        compared += 1
    assert compared == len(expected) > 0


@pytest.mark.parametrize("row", [row for row in READ if row not in REWRITTEN])
def test_written_again_it_is_the_same_bit_for_bit(row, tmp_path):
    """The tensors, and the config where it is given; without it, a config that means the same."""
    model, adapted = read(row)
    theirs = load_file(PEFT / row / "adapter_model.safetensors")
    saved = any(key.endswith(("lm_head.base_layer.weight", "embed_tokens.base_layer.weight")) for key in theirs)
    options = {"save_embedding_layers": saved or row.startswith("embedding_saved"), "tied": True}
    jlora.peft.save(tmp_path / "plain", adapted, model=model, **options)
    mine = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    same(mine, {key: x for key, x in theirs.items() if not any(part in key for part in UNREAD)} | tied_again(row, mine))
    mean_the_same(jlora.peft.read(PEFT / row), jlora.peft.read(tmp_path / "plain"))
    jlora.peft.save(tmp_path / "given", adapted, model=model, config=CONFIGS[row], **options)
    again = json.loads((tmp_path / "given" / "adapter_config.json").read_text())
    assert {k: in_order(v) for k, v in CONFIGS[row].items()} == {k: in_order(again[k]) for k in CONFIGS[row]}


def same(mine: dict, theirs: dict) -> None:
    assert mine.keys() == theirs.keys()
    for key, x in theirs.items():
        assert x.dtype == mine[key].dtype
        np.testing.assert_array_equal(x, mine[key], err_msg=key)


def tied_again(row: str, mine: dict) -> dict:
    """The head that is the embedding again, which PEFT writes with `ensure_weight_tying` in some cases."""
    return {key: x for key, x in mine.items() if row in ("modules_to_save_tied_ensured",) and "lm_head" in key}


def in_order(value):
    return sorted(value) if isinstance(value, list) and all(isinstance(x, str) for x in value) else value


def mean_the_same(one, other) -> None:
    """The same layers, with the same scales: what a config is for."""
    described = lambda found: {
        (layer.key, layer.kind): (layer.scale, layer.rank, sorted(layer.tensors)) for layer in found.layers
    }
    assert described(one) == described(other)
    prompts = {"PROMPT_TUNING", "P_TUNING"}
    kinds = one.config["peft_type"], other.config["peft_type"]
    assert kinds[0] == kinds[1] or set(kinds) == prompts  # P-tuning's network is not saved: a prompt is left


@pytest.mark.parametrize("row", sorted(REFUSED))
def test_what_jlora_has_not_is_refused_by_name(row):
    own = base(base_of(row)) if base_of(row) in OURS else base("llama2_causal_lm")
    with pytest.raises(ValueError, match=".") as caught:
        jlora.peft.load(PEFT / row, own.params, model=own.model, tied=True)
    assert REFUSED[row] in str(caught.value)
    assert str(PEFT / row) in str(caught.value)


# -- functions ---------------------------------------------------------------------------------------------------------


def called(model, adapted, given: dict, row: str):
    tokens = jnp.asarray(given["tokens"]) if "tokens" in given else None
    pixels = jnp.asarray(given["pixels"].transpose(0, 2, 3, 1)) if "pixels" in given else None
    inputs = [x for x in (tokens, pixels) if x is not None]
    options = {}
    if row.startswith("prefix"):  # PEFT counts positions from the prefix on
        places = jnp.arange(tokens.shape[1], dtype=jnp.int32) + adapted.method.rank
        options["positions"] = jnp.broadcast_to(places[None], tokens.shape)
    result = jlora.lift(lambda params, *x: model.apply({"params": params}, *x, **options))(adapted, *inputs)
    return result["out"] if isinstance(result, dict) else result


PROMPTS = [row for row in READ if CONFIGS[row]["peft_type"] in ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")]
BY_DEFAULT = ("ia3", "oft_neumann", "vera_gpt2", "lora_bias", "bias_all_modules_to_save", "older_clip_text",
    "every_linear_gpt2", "every_linear_deberta", "prefix_grouped", "p_tuning_bert")  # fmt: skip


LOGITS = [row for row in READ if has(row, "out")]


@pytest.mark.parametrize(
    "row",
    thorough(
        [row for row in LOGITS if row in MERGED],
        "test_merged_weights_are_those_of_peft",
        [row for row in BY_DEFAULT if row in MERGED],
    )
    + thorough(
        [row for row in LOGITS if row not in MERGED],
        "test_written_again_it_is_the_same_bit_for_bit",
        [row for row in BY_DEFAULT if row not in MERGED],
    ),
)
def test_outputs_are_those_of_peft(row):
    model, adapted = read(row)
    given = outputs(row)
    expected = given["merged_out"] if "tied" in row or row == "embedding_gpt2" else given["out"]
    out = called(model, adapted, given, row)
    if row in PROMPTS and expected.ndim == 3:
        expected = expected[:, -out.shape[1] :]  # PEFT gives the prompt's, too
    np.testing.assert_allclose(out, expected, atol=2e-5, rtol=2e-5)


# -- training goes on --------------------------------------------------------------------------------------------------

OPTIMIZERS = {"sgd": optax.sgd(0.1), "adamw": optax.adamw(0.01, weight_decay=0.01)}
# (IA)^3 of layers with biases is left out: PEFT scales them by the same l, and here they are leaves of their own.
TRAINED = [row for row in READ if has(row, "adamw") and row != "ia3"]


@pytest.mark.once
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "row", thorough(TRAINED, "test_merged_weights_are_those_of_peft", default=("lora", "bias_all"))
)
def test_the_next_losses_are_those_of_peft(row, name):
    """Of GPT-2's c_attn, too, whose A is one in PEFT and three here (`tied`)."""
    model, adapted = read(row)
    given = outputs(row)
    with jax.numpy_dtype_promotion("standard"):  # Optax's AdamW promotes its count
        losses, _ = trained(model, adapted, given, OPTIMIZERS[name])
    np.testing.assert_allclose(losses, given[name], atol=2e-5)


def trained(model, adapted, given, tx, steps=8):
    tokens = jnp.asarray(given["tokens"])
    factors, frozen = jlora.partition(adapted)
    tx = jlora.optimizer(tx, adapted)

    def loss_fn(factors):
        run = jlora.lift(lambda params, tokens: model.apply({"params": params}, tokens))
        logits = run(jlora.combine(factors, frozen), tokens)
        if "labels" in given:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(given["labels"]))
        else:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return losses.mean()

    @jax.jit
    def advance(factors, state):
        loss, gradients = jax.value_and_grad(loss_fn)(factors)
        updates, state = tx.update(gradients, state, factors)
        return loss, optax.apply_updates(factors, updates), state

    losses, state = [], tx.init(factors)
    for _ in range(steps):
        loss, factors, state = advance(factors, state)
        losses.append(float(loss))
    return losses, jlora.combine(factors, frozen)


def test_parts_of_one_matrix_that_were_trained_apart_are_written_exactly(tmp_path):
    model, adapted = read("lora")
    rng = np.random.default_rng(0)
    apart = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), adapted.factors)
    adapted = adapted.replace(factors=apart)
    jlora.peft.save(tmp_path, adapted, model=model)
    found = jlora.peft.read(tmp_path)
    assert {layer.rank for layer in found.layers} == {9} and found.config["r"] == 9
    again = jlora.peft.load(tmp_path, adapted.base, model=model)
    want, got = jlora.merge(adapted), jlora.merge(again)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), want, got)


# -- any architecture, from the tensors alone --------------------------------------------------------------------------

BY_NAME = [
    row for row in ROWS if has(row, "merged/") and row not in REFUSED and row not in ("older_vit", "older_clip_text")
]


def test_layers_merge_as_peft_does_on_any_checkpoint():
    """Convolutions, groups, experts, OFT of windows: all that PEFT merges, in NumPy, without a model of jlora's."""
    compared, wrong = 0, []
    for row in BY_NAME:
        expected = {k.removeprefix("merged/"): x for k, x in outputs(row).items() if k.startswith("merged/")}
        tensors = tensors_of(base_of(row))
        layers = jlora.peft.read(PEFT / row, shapes={key: x.shape for key, x in tensors.items()}).layers
        in_out = CONFIGS[row].get("fan_in_fan_out") or base_of(row).startswith("gpt2")
        for key, value in expected.items():
            stored = next(
                (k for k in (key, f"transformer.{key}", f"bert.{key}", key.removeprefix("model.")) if k in tensors),
                None,
            )
            if stored is None or base_of(row).startswith("vit"):
                continue  # ViT's names in memory are others than in its file: see the test of merged weights
            own = [layer for layer in layers if layer.key == key]
            weight = tensors[stored].astype(np.float32)
            for layer in own:
                layout = "stack" if layer.kind == "experts" else "table" if layer.kind == "table" else "out_in"
                if layout == "out_in" and weight.ndim == 2 and in_out and "c_" in key:
                    layout = "in_out"
                weight = merged(layer, weight, layout)
            if own:
                compared += 1
                if np.abs(weight - value).max() > 2e-5 * np.abs(value).max():
                    wrong.append((row, key, float(np.abs(weight - value).max())))
    assert not wrong and compared > 200, (wrong, compared)


def attention(params, x):
    """Kernels of three axes, as Flax's MultiHeadDotProductAttention has them."""
    q = jnp.einsum("td,dhw->thw", x, params["query"]["kernel"])
    return jnp.einsum("thw,hwd->td", jnp.tanh(q), params["out"]["kernel"])


def test_kernels_of_three_axes_by_a_table_of_names(tmp_path):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    params = {"query": {"kernel": normal(6, 2, 4)}, "out": {"kernel": normal(2, 4, 6)}}
    names = [leaf("query/kernel", "attn.q_proj.weight", LINEAR), leaf("out/kernel", "attn.o_proj.weight", LINEAR)]
    found = jlora.sites(attention, params, jnp.ones((3, 6)))
    adapted = jlora.apply(params, rank=2, alpha=6, sites=found)
    factors = jax.tree.map(lambda x: jnp.asarray(normal(*x.shape)), adapted.factors)
    adapted = jlora.combine(factors, adapted)
    jlora.peft.save(tmp_path, adapted, names=names)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, path, width in (("q_proj", "query", 8), ("o_proj", "out", 6)):
        a, b = (tensors[f"base_model.model.attn.{name}.lora_{x}.weight"] for x in "AB")
        delta = jnp.asarray(jlora.merge(adapted)[path]["kernel"]) - params[path]["kernel"]
        np.testing.assert_allclose(3.0 * b @ a, np.asarray(delta).reshape(-1, width).T, atol=2e-5)
    again = jlora.peft.load(tmp_path, params, names=names)
    jax.tree.map(np.testing.assert_array_equal, again.factors, adapted.factors)
    assert [(s.in_axes, s.out_axes, s.alpha) for s in again.sites] == [
        (s.in_axes, s.out_axes, s.alpha) for s in adapted.sites
    ]


def test_experts_by_a_table_of_names(tmp_path):
    row = "parameters_patterns"
    tensors = {key: x for key, x in tensors_of("mixtral").items() if ".experts." in key or "v_proj" in key}
    params = {key.replace(".", "/"): x for key, x in tensors.items()}
    in_order = sorted(tensors, key=lambda key: ("down_proj" in key, key))  # as the module has them
    names = [leaf(key.replace(".", "/"), key, LINEAR if "v_proj" in key else None) for key in in_order]
    params = {path: x.T if "v_proj" in path else x for path, x in params.items()}
    adapted = jlora.peft.load(PEFT / row, params, names=names)
    whole = jlora.merge(adapted)
    expected = {k.removeprefix("merged/"): x for k, x in outputs(row).items() if k.startswith("merged/")}
    assert len(expected) > 2
    for key, value in expected.items():
        mine = whole[key.replace(".", "/")]
        np.testing.assert_allclose(mine.T if "v_proj" in key else mine, value, atol=2e-5)
    jlora.peft.save(tmp_path, adapted, names=names)
    same(load_file(tmp_path / "adapter_model.safetensors"), load_file(PEFT / row / "adapter_model.safetensors"))
    mean_the_same(jlora.peft.read(PEFT / row), jlora.peft.read(tmp_path))


@pytest.mark.once
@pytest.mark.parametrize("row", ["lora", "dora", "loha", "lokr", "oft", "vera_shapes", "adalora", "bias_all"])
def test_stacked_layers_have_the_factors_of_all(row, tmp_path):
    model, adapted = read(row, scan=True)
    assert any(site.stack_axes for site in adapted.sites)
    _, flat = read(row)
    key = names_of(model, None, "").rows[5].keys[-1]
    for tree, other in ((jlora.merge(adapted), jlora.merge(flat)),):
        mine = onto.base_tensor(tree, key, names_of(model, None, "").rows)
        theirs = onto.base_tensor(other, key, names_of(base(base_of(row)).model, None, "").rows)
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    jlora.peft.save(tmp_path, adapted, model=model, config=CONFIGS[row])
    theirs = load_file(PEFT / row / "adapter_model.safetensors")
    same(
        load_file(tmp_path / "adapter_model.safetensors"),
        {k: x for k, x in theirs.items() if not any(p in k for p in UNREAD)},
    )


def test_stacked_layers_of_which_some_have_no_factors_are_refused():
    own = base(base_of("layers_one"), scan=True)
    with pytest.raises(ValueError, match=".") as caught:
        jlora.peft.load(PEFT / "layers_one", own.params, model=own.model)
    assert str(caught.value) == (
        f"'{PEFT / 'layers_one'}' does not fit the model:\n"
        + "\n".join(
            f"  'h/attn/{name}/kernel' stacks 2 layers, and the adapter has 1 of them: load the model with scan=False"
            for name in ("query", "key", "value")
        )
    )


# -- for the serving engines -------------------------------------------------------------------------------------------


def as_an_engine_reads(folder: Path) -> tuple[dict, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """vLLM's rules: `alpha / r` for all, other fields of the config unread, one rank, and no DoRA or modules_to_save."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["use_dora"] and not config["modules_to_save"] and config["bias"] == "none"
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    found = {}
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")]
            assert a.shape[0] == b.shape[1] == config["r"]
            found[key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = (a, scale * b)
    assert len(tensors) == 2 * len(found)
    return config, found


def packed(found: dict, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Several projections of one input as the engines run them: all A's below each other, B's on the diagonal."""
    pairs = [found[name] for name in names]
    a = np.concatenate([a for a, _ in pairs])
    b = np.zeros((sum(len(b) for _, b in pairs), len(a)), np.float32)
    row = column = 0
    for _, own in pairs:
        b[row : row + len(own), column : column + own.shape[1]] = own
        row, column = row + len(own), column + own.shape[1]
    return a, b


@pytest.mark.parametrize("row", ["patterns_regex", "rslora_patterns", "pissa", "loha", "adalora_cut", "lora"])
def test_what_the_engines_read_is_the_adapter(row, tmp_path):
    model, adapted = read(row)
    jlora.peft.save(tmp_path, adapted, model=model, for_engine=True)
    config, found = as_an_engine_reads(tmp_path)
    assert config["lora_alpha"] == config["r"] and not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    names = names_of(model, None, "").rows
    whole = jlora.merge(adapted)
    for module, (a, b) in found.items():
        key = f"{module}.weight"
        delta = onto.base_tensor(whole, key, names) - onto.base_tensor(adapted.base, key, names)
        delta = delta.T if base_of(row).startswith("gpt2") else delta
        np.testing.assert_allclose(b @ a, delta, atol=2e-5)
    groups = [[m for m in found if m.endswith(ends)] for ends in (("0.self_attn.q_proj", "0.self_attn.v_proj"),)]
    for group in groups:
        if len(group) == 2:
            a, b = packed(found, tuple(group))
            np.testing.assert_allclose(b @ a, np.concatenate([y @ x for x, y in (found[m] for m in group)]), atol=1e-5)


def test_dora_is_for_engines_at_a_stated_error_alone(tmp_path):
    model, adapted = read("dora")
    with pytest.raises(ValueError, match=r"for_engine: to_lora: dora is not W plus a low-rank product at .*or merge"):
        jlora.peft.save(tmp_path, adapted, model=model, for_engine=True)
    assert not list(tmp_path.iterdir())
    jlora.peft.save(tmp_path, adapted, model=model, for_engine=0.05)
    _, found = as_an_engine_reads(tmp_path)
    names, whole = names_of(model, None, "").rows, jlora.merge(adapted)
    for module, (a, b) in found.items():
        key = f"{module}.weight"
        delta = onto.base_tensor(whole, key, names) - onto.base_tensor(adapted.base, key, names)
        assert np.linalg.norm(b @ a - delta) <= 0.05 * np.linalg.norm(delta) + 1e-6


def test_leaves_trained_as_they_are_are_no_engines_business(tmp_path):
    model, adapted = read("modules_to_save")
    with pytest.raises(
        ValueError, match="leaves are trained as they are, first 'bert/pooler|merge the adapter instead"
    ):
        jlora.peft.save(tmp_path, adapted, model=model, for_engine=True)


# -- names of modules --------------------------------------------------------------------------------------------------


def modules(row: str) -> dict:
    own = base(base_of(row))
    return modules_of(names_of(own.model, None, ""), own.params)


@pytest.mark.parametrize("row", [row for row in READ if CONFIGS[row].get("target_modules") and row not in ("older_vit", "older_clip_text") and CONFIGS[row]["peft_type"] == "LORA"])  # fmt: skip
def test_targets_are_found_as_peft_finds_them(row):
    found = patterns.targeted(CONFIGS[row], modules(row))
    layers = jlora.peft.read(PEFT / row).layers
    assert sorted(found) == sorted({layer.module for layer in layers if layer.kind not in onto.AS_THEY_ARE})


def test_what_names_nothing_is_an_error_where_peft_is_silent():
    known = modules("lora_llama")
    find = lambda **config: patterns.targeted(config, known)
    last = "down_proj, embed_tokens, gate_proj, input_layernorm, k_proj, lm_head, norm, o_proj, post_attention_layernorm, q_proj, up_proj, v_proj"
    for config, text in (
        ({"target_modules": ["q_proj", "NOPE"]}, f"target_modules: no module is called 'NOPE'; the model has {last}"),
        ({"target_modules": "q_proj"}, "target_modules='q_proj' names none of the 21 modules"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [7]},
            "target_modules=['q_proj'] names none of the 21 modules",
        ),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["mlp"]},
            "exclude_modules=['mlp'] excludes none of the 2 targets",
        ),
    ):
        with pytest.raises(ValueError, match=".") as caught:
            find(**config)
        assert str(caught.value) == text
    assert find(target_modules="all-linear", task_type=None)[-1] == "model.layers.1.mlp.down_proj"
    assert find(target_modules=["q_proj"], layers_to_transform=1) == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize(
    "text",
    [
        "a?" * 30 + "a" * 30,
        "(a|a)" * 30 + "b",
        "(a?){30}a{30}",
        "(a+)+$",
        "(a|aa)*b",
        "(.*a){9}",
        ".*.*.*.*.*.*.*x",
        r"(a)\1",
        "(" * 40 + "a" + ")*" * 40,
        "x" * 3000,
        "(",
    ],
)
def test_an_expression_that_could_take_forever_is_refused(text):
    with pytest.raises(
        ValueError, match="could take forever on some names|at most 2000 characters|is no regular expression"
    ):
        patterns.check_expression(text, "alpha_pattern")


@pytest.mark.parametrize(
    "text", [r".*\.(q|v)_proj", r"^model\.layers\.[0-9]+\.mlp", r"(?:.*?(?:language|text).*?(?:attn|mlp).*?(?:k_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:(?:up_proj)))"]
)  # fmt: skip
def test_expressions_that_people_write_are_taken(text):
    assert patterns.check_expression(text, "target_modules") == text


# -- refusals of load and save -----------------------------------------------------------------------------------------


def test_a_config_that_says_otherwise_is_refused(tmp_path):
    model, adapted = read("lora_llama")
    with pytest.raises(ValueError, match=".") as caught:
        jlora.peft.save(tmp_path, adapted, model=model, config=CONFIGS["lora_llama"] | {"lora_alpha": 7})
    assert str(caught.value).startswith(
        "config= says otherwise than the adapter in lora_alpha of 'model.layers.0.self_attn.q_proj'"
    )
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_is_there_is_not_replaced_by_chance(tmp_path):
    model, adapted = read("lora_llama")
    jlora.peft.save(tmp_path, adapted, model=model)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="holds an adapter; force=True replaces it"):
        jlora.peft.save(tmp_path, jlora.scale(adapted, 2.0), model=model)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    jlora.peft.save(tmp_path, jlora.scale(adapted, 2.0), model=model, force=True)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() != before


def test_what_peft_has_not_is_refused_by_name(tmp_path):
    own = base("gpt2_causal_lm")
    for method, text in (
        (jlora.pfeiffer(4), "pfeiffer has no form of its own in torch files"),
        (
            jlora.together((jlora.lora(2), "attn"), (jlora.ia3(), "mlp")),
            "a folder of PEFT's holds one method, and this adapter has IA3, LORA",
        ),
        (jlora.bitfit("h_0/mlp/fc/bias$"), "PEFT's config cannot name 1 leaves that are trained as they are"),
    ):
        adapted = jlora.apply(own.params, method=method)
        with pytest.raises(ValueError, match=text):
            jlora.peft.save(tmp_path, adapted, model=own.model)


def test_a_tied_embedding_asks_first(tmp_path):
    own = base("llama3_causal_lm")
    with pytest.raises(
        ValueError, match="the adapter changes the embedding alone of an embedding that is tied to the head.*tied=True"
    ):
        jlora.peft.load(PEFT / "embedding_tied", own.params, model=own.model)
    adapted = jlora.apply(own.params, rank=2, targets="wte/embedding")
    with pytest.raises(ValueError, match="is the head, too, and PEFT applies its factors to the embedding alone"):
        jlora.peft.save(tmp_path, adapted, model=own.model)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ("NOPE", "target_modules: no module is called 'NOPE'; the model has "),
        (
            "k_proj",
            "the config's target_modules name 2 modules that the file has nothing of, first 'model.layers.0.self_attn.k_proj'",
        ),
    ],
)
def test_modules_without_tensors_are_an_error_or_a_warning(more, text, tmp_path):
    """PEFT says nothing, and leaves them untrained."""
    shutil.copytree(PEFT / "lora_llama", tmp_path / "adapter")
    config = CONFIGS["lora_llama"] | {"target_modules": ["q_proj", "v_proj", more]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    own = base(base_of("lora_llama"))
    with pytest.raises(ValueError, match=".") as caught:
        jlora.peft.load(tmp_path / "adapter", own.params, model=own.model)
    assert text in str(caught.value) and str(caught.value).endswith("Pass strict=False to load what is there")
    with pytest.warns(UserWarning, match=text.split(";")[0]):
        jlora.peft.load(tmp_path / "adapter", own.params, model=own.model, strict=False)


def test_neither_or_both_of_model_and_names_is_an_error():
    with pytest.raises(
        TypeError, match="peft.load takes model=, one of jlora.models, or names=, the key table of another"
    ):
        jlora.peft.load(PEFT / "lora", {})


def test_a_pickle_is_read_when_it_is_asked_for_alone():
    own = base(base_of("lora_pickled"))
    with pytest.raises(ValueError, match="pickled=True reads it"):
        jlora.peft.load(PEFT / "lora_pickled", own.params, model=own.model)
    adapted = jlora.peft.load(PEFT / "lora_pickled", own.params, model=own.model, pickled=True)
    assert adapted.method.name in ("lora", "tied")


# -- other cases of kinds that a review found --------------------------------------------------------------------------

rng = np.random.default_rng(0)
NORMAL = lambda *shape: rng.normal(size=shape).astype(np.float32)


def moved(adapted):
    return jlora.combine(jax.tree.map(lambda x: x + 0.3 * NORMAL(*x.shape), adapted.factors), adapted)


def there_and_back(adapted, folder: Path, names):
    """The merged weights of what is read from what was written."""
    jlora.peft.save(folder, adapted, names=names)
    again = jlora.peft.load(folder, adapted.base, names=names)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=3e-5), jlora.merge(adapted), jlora.merge(again))


TABLE = {"wte": {"embedding": NORMAL(9, 6)}}, [leaf("wte/embedding", "embed.weight")]
CONVOLUTION = {"c": {"kernel": NORMAL(3, 3, 4, 8)}}, [leaf("c/kernel", "c.weight", CONV)]
SQUARE = {"q": {"weight": NORMAL(5, 5)}}, [leaf("q/weight", "q.weight")]  # as torch keeps it
NUMBERED = {f"layers/{i}/q/kernel": NORMAL(4, 3) for i in range(12)}
SITES = {
    "table": [jlora.Site("wte/embedding", (9, 6), "float32", (0,), (1,), (), "embedding")],
    "convolution": [jlora.Site("c/kernel", (3, 3, 4, 8), "float32", (0, 1, 2), (3,), (), "conv")],
    "square": [jlora.Site("q/weight", (5, 5), "float32", (1,), (0,), (), "linear")],
}
PLACES = {"table": TABLE, "convolution": CONVOLUTION, "square": SQUARE}


@pytest.mark.once
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "method", [jlora.lora(2, 3.0), jlora.dora(2), jlora.pissa(2), jlora.olora(2)], ids=lambda m: m.name
)
def test_tables_convolutions_and_torchs_own_order_return(method, place, tmp_path):
    base, names = PLACES[place]
    there_and_back(moved(jlora.apply(base, method=method, sites=SITES[place], targets=".*")), tmp_path, names)


@pytest.mark.parametrize(
    ("place", "method", "text"),
    [
        ("table", jlora.adalora(3, 2, total_steps=9), "torch files have no AdaLoRA of tables"),
        ("table", jlora.vera(3), "PEFT has no VERA of embedding layers"),
        ("table", jlora.loha(2), "PEFT has no LOHA of embedding layers"),
        ("convolution", jlora.lokr(2), "lokr here folds a convolution's window in another order"),
        ("convolution", jlora.oft(2), "oft here folds a convolution's window in another order"),
        ("convolution", jlora.vera(3), "PEFT has no VERA of conv layers"),
    ],
)
def test_what_peft_would_read_as_something_else_is_refused(place, method, text, tmp_path):
    base, names = PLACES[place]
    with pytest.raises(ValueError, match=text):
        jlora.peft.save(tmp_path, jlora.apply(base, method=method, sites=SITES[place], targets=".*"), names=names)
    assert not list(tmp_path.iterdir())


def test_ia3_beside_a_bias_is_refused_unless_the_bias_is_scaled(tmp_path):
    base = {"up": {"kernel": NORMAL(4, 3), "bias": NORMAL(3)}}
    names = [leaf("up/kernel", "up.weight", LINEAR), leaf("up/bias", "up.bias")]
    adapted = moved(jlora.apply(base, method=jlora.ia3(), targets="kernel"))
    with pytest.raises(
        ValueError, match="'up' has a bias, which PEFT's \\(IA\\)\\^3 scales, too, and jlora's does not"
    ):
        jlora.peft.save(tmp_path, adapted, names=names)
    base["up"]["bias"] = np.zeros(3, np.float32)
    there_and_back(adapted.replace(base=base), tmp_path, names)


@pytest.mark.parametrize(
    ("row", "change", "field"),
    [
        ("pissa", {"init_lora_weights": True}, "init_lora_weights"),
        ("lora_llama", {"init_lora_weights": "pissa"}, "init_lora_weights"),
        ("oft_neumann", {"use_cayley_neumann": False}, "use_cayley_neumann"),
        ("oft_neumann", {"num_cayley_neumann_terms": 3}, "num_cayley_neumann_terms"),
        ("adalora", {"lora_alpha": 32}, "lora_alpha"),
        ("ia3_feedforward", {"feedforward_modules": []}, "feedforward_modules"),
        ("tokens", {"trainable_token_indices": [1, 2, 3]}, "trainable_token_indices"),
        ("modules_to_save", {"modules_to_save": ["classifier"]}, "modules_to_save"),
        ("rslora", {"use_rslora": False}, "use_rslora"),
        ("dora", {"use_dora": False}, "use_dora"),
        ("lora_llama", {"target_modules": ["q_proj"]}, "target_modules"),
    ],
)
def test_every_field_that_decides_the_function_has_to_agree(row, change, field, tmp_path):
    model, adapted = read(row)
    with pytest.raises(ValueError, match=f"config= says otherwise than the adapter in .*{field}"):
        jlora.peft.save(tmp_path, adapted, model=model, config=CONFIGS[row] | change)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"use_dora": True}, "the config says use_dora, and the file has no magnitudes"),
        ({"lora_bias": True}, "the config says lora_bias, and the file has no biases"),
        ({"bias": "all"}, "the config says bias='all', and the file has no biases"),
        ({"trainable_token_indices": [3]}, "the config names trained tokens, and the file has no rows"),
        (
            {"modules_to_save": ["lm_head"]},
            "the config's modules_to_save name 'lm_head', of which the file has nothing",
        ),
        ({"use_new_feature": True}, "the config has use_new_feature=True, which jlora does not know"),
    ],
)
def test_what_the_config_says_and_the_file_has_not_is_an_error(change, text, tmp_path):
    folder = changed("lora_llama", tmp_path, change)
    own = base(base_of("lora_llama"))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        jlora.peft.load(folder, own.params, model=own.model)
    assert str(caught.value) == f"'{folder}': {text}. Pass strict=False to load what is there"
    with pytest.warns(UserWarning, match=text):
        jlora.peft.load(folder, own.params, model=own.model, strict=False)


def changed(row: str, tmp_path: Path, change: dict, tensors: dict | None = None) -> Path:
    folder = tmp_path / "adapter"
    shutil.copytree(PEFT / row, folder)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIGS[row] | change))
    if tensors:
        whole = load_file(folder / "adapter_model.safetensors") | tensors
        save_file(whole, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("row", "tensors", "text"),
    [
        ("lora_llama", {f"{Q}.lora_A.weight": NORMAL(3, 7)}, "the adapter's A has shape (3, 7), expected (3, 16)"),
        ("lora_llama", {f"{Q}.lora_B.weight": NORMAL(7, 3)}, "the adapter's B has shape (7, 3), expected (16, 3)"),
        ("adalora", {f"{Q}.lora_E": NORMAL(3, 1)}, "the adapter's E has shape (3, 1), expected (4, 1)"),
        ("loha", {f"{Q}.hada_w2_a": NORMAL(16, 3)}, "the adapter's w2_a has shape (16, 3), expected (16, 2)"),
        ("lokr", {f"{Q}.lokr_w1": NORMAL(3, 3)}, "the adapter's matrices make (12, 12)"),
        ("oft", {f"{Q}.oft_R.weight": NORMAL(3, 6)}, "which turns 12 inputs and not 16"),
        ("tokens", {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": NORMAL(3, 9)}, "the adapter's values has shape (3, 9)"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(row, tensors, text, tmp_path):
    folder = changed(row, tmp_path, {}, tensors)
    own = base(base_of(row))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        jlora.peft.load(folder, own.params, model=own.model)
    key = next(iter(tensors)).removeprefix("base_model.model.").split(".lora")[0].split(".hada")[0].split(".lokr")[0]
    assert text in str(caught.value) and key.split(".oft")[0].split(".token_adapter")[0] in str(caught.value)


def test_layers_are_in_the_order_of_their_numbers():
    assert [natives.layer_number(path) for path in ("h_11/attn", "layers/10/q", "2/k", "wte")] == [11, 10, 2, 0]


def test_a_feedforward_name_is_any_end_of_a_path():
    """PEFT has no dot before it; and of matrices the shape says it anyway."""
    tensors = {"base_model.model.h.0.c_fc.ia3_l": NORMAL(1, 4)}
    config = {"peft_type": "IA3", "feedforward_modules": ["fc"], "target_modules": ["c_fc"]}
    (layer,) = parsed(completed(config, ""), tensors).layers
    assert layer.tensors["l"].shape == (1, 4) and layer.parameter == "weight"


def test_an_adapter_that_changes_nothing_is_not_for_engines(tmp_path):
    own = base("llama2_causal_lm")
    adapted = jlora.apply(own.params, method=jlora.loha(2), targets="query")
    with pytest.raises(ValueError, match="for_engine: the adapter changes nothing"):
        jlora.peft.save(tmp_path, adapted, model=own.model, for_engine=True)


@pytest.mark.parametrize("dtype", ["int8", "bool"])
def test_only_floating_point_numbers_are_written(dtype, tmp_path):
    model, adapted = read("lora_llama")
    with pytest.raises(ValueError, match="peft.save: dtype must be of floating-point numbers"):
        jlora.peft.save(tmp_path, adapted, model=model, dtype=dtype)
    jlora.peft.save(tmp_path, adapted, model=model, dtype="bfloat16")
    again = jlora.peft.load(tmp_path, adapted.base, model=model)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), adapted.factors)
    jax.tree.map(np.testing.assert_array_equal, again.factors, rounded)


def test_a_number_too_large_for_the_dtype_is_an_error(tmp_path):
    model, adapted = read("lora_llama")
    large = adapted.replace(factors=jax.tree.map(lambda x: x * 1e6, adapted.factors))
    with pytest.raises(ValueError, match="more than float16 holds: choose another dtype"):
        jlora.peft.save(tmp_path, large, model=model, dtype="float16")
    assert not list(tmp_path.iterdir())


def test_shapes_take_an_adapter_that_does_not_start_from_the_base():
    for row in ("lora_llama", "bias_all", "tokens", "modules_to_save_head", "lora_bias"):
        own = base(base_of(row))
        shapes = jax.eval_shape(lambda params=own.params: params)
        adapted = jlora.peft.load(PEFT / row, shapes, model=own.model)
        jax.tree.map(np.testing.assert_array_equal, adapted.factors, read(row)[1].factors)
    own = base(base_of("pissa"))
    with pytest.raises(TypeError, match="by what the base has there, and these parameters are shapes"):
        jlora.peft.load(PEFT / "pissa", jax.eval_shape(lambda: own.params), model=own.model)


def test_a_tree_that_is_not_the_models_is_an_error_that_says_how():
    own = base(base_of("lora_llama"))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        jlora.peft.load(PEFT / "lora_llama", {"params": own.params}, model=own.model)
    assert str(caught.value) == (
        "the parameters are not those of the key table: the first is 'params/h_0/attn/key/kernel', the table's "
        "'wte/embedding'. A model's are the tree under \"params\""
    )
    with pytest.raises(FileNotFoundError, match="'/nowhere/adapter' is no adapter of PEFT's: there is no such folder"):
        jlora.peft.load("/nowhere/adapter", own.params, model=own.model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("row", ["dora", "pissa", "lora_bias", "tokens"])
def test_a_base_of_another_dtype_changes_nothing_of_the_factors(row, dtype, tmp_path):
    own = base(base_of(row))
    params = jax.tree.map(lambda x: x.astype(dtype), own.params)
    adapted = jlora.peft.load(PEFT / row, params, model=own.model)
    assert {str(x.dtype) for x in jax.tree.leaves(jlora.merge(adapted))} == {dtype}
    jlora.peft.save(tmp_path, adapted, model=own.model)
    same(load_file(tmp_path / "adapter_model.safetensors"), load_file(PEFT / row / "adapter_model.safetensors"))


def test_a_base_spread_over_devices_gives_the_same_logits():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    own, given = base(base_of("pissa")), outputs("pissa")
    spread = lambda x: jax.sharding.PartitionSpec("model" if x.shape[0] % 8 == 0 else None)
    params = jax.tree.map(lambda x: jax.device_put(x, jax.sharding.NamedSharding(mesh, spread(x))), own.params)
    adapted = jlora.peft.load(PEFT / "pissa", params, model=own.model)
    np.testing.assert_allclose(called(own.model, adapted, given, "pissa"), given["out"], atol=2e-5, rtol=2e-5)


def test_stacked_parts_of_one_matrix_train_as_peft_does():
    model, adapted = read("lora", scan=True)
    given = outputs("lora")
    losses, _ = trained(model, adapted, given, OPTIMIZERS["sgd"])
    np.testing.assert_allclose(losses, given["sgd"], atol=2e-5)
