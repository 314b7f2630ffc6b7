"""Adapters of Hugging Face PEFT against what PEFT itself computed from them (golden/make_peft.py), read and written."""

import functools
import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import jlora
from jlora.interop import onto
from jlora.interop.layer import INITIAL, merged
from jlora.interop.names import modules_of, names_of
from jlora.interop.peft import patterns
from jlora.models.tensors import LINEAR, leaf
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
# PEFT's config names what no module has, and PEFT is silent: "query", where transformers 5 says "q_proj".
SILENT = ("conv_patch", "dora_conv_patch")
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
    adapted = jlora.peft.load(PEFT / row, own.params, model=own.model, tied=True, strict=row not in SILENT)
    return own.model, adapted


def outputs(row: str) -> dict[str, np.ndarray]:
    return dict(np.load(PEFT / row / "outputs.npz"))


def has(row: str, part: str) -> bool:
    file = PEFT / row / "outputs.npz"
    return file.exists() and any(part in name for name in np.load(file).files)


MERGED = [row for row in READ if has(row, "merged/")]


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
    if row in SILENT:  # its own config is refused
        return
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
    with pytest.raises(ValueError) as caught:
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
APART = ["ia3", "oft_neumann", "vera_gpt2", "lora_bias", "bias_all_modules_to_save", "older_clip_text"]
IN_DEFAULT = (*APART, "every_linear_gpt2", "every_linear_deberta", "prefix_grouped", "p_tuning_bert")


@pytest.mark.parametrize(
    "row",
    thorough([row for row in READ if has(row, "out")], "test_merged_weights_are_those_of_peft", default=IN_DEFAULT),
)
def test_outputs_are_those_of_peft(row):
    model, adapted = read(row)
    given = outputs(row)
    expected = given["merged_out"] if "tied" in row or row == "embedding_gpt2" else given["out"]
    out = called(model, adapted, given, row)
    if row in PROMPTS and expected.ndim == 3:
        expected = expected[:, -out.shape[1] :]  # PEFT gives the prompt's, too
    np.testing.assert_allclose(out, expected, atol=2e-5, rtol=2e-5)


