"""Prompts for Stable Diffusion beside diffusers and transformers; see golden/make_prompts.py."""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import load_file

import jlora
from jlora import models
from jlora.models import Tokenizer
from jlora.models.clip import PRESETS, CLIPText, CLIPTextConfig
from jlora.models.diffusion import encode, tokens_of, with_tokenizer
from tests.conformance import normal, randomised

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parent / "golden" / "prompts"
PIECES = Path(__file__).parent / "golden" / "models" / "tokenizers" / "clip"
FAMILIES = {"sd1": 1, "sd2": 1, "sdxl": 2}  # encoders
EVERY = 4  # positions that the golden files have
TOLERANCE = (
    1e-5  # float32 sums in another order, of values of size 1; the eps or nonlinearity of others moves them by 1e-3
)
START, END = 558, 559


@functools.cache
def golden(family):
    arrays = load_file(GOLDEN / family / "golden.safetensors")
    with safe_open(GOLDEN / family / "golden.safetensors", "numpy") as file:
        return arrays, json.loads(file.metadata()["golden"])["prompts"]


def names(family, part):
    return [f"{part}{suffix}" for suffix in ("", "_2")[: FAMILIES[family]]]


@functools.cache
def loaded(family, **options):
    """The modules and their parameters."""
    parts = [
        models.load(GOLDEN / family / name, dtype="float32", param_dtype="float32", **options)
        for name in names(family, "text_encoder")
    ]
    return tuple(part.model for part in parts), tuple(part.params for part in parts)


def tokens(family):
    return tuple(golden(family)[0][f"tokens/{n}"] for n in range(FAMILIES[family]))


def tokenizer_folder(tmp_path, family="sd1", name="tokenizer"):
    """The files of a published tokenizer: no tokenizer.json."""
    for file in (*(GOLDEN / family / name).iterdir(), PIECES / "vocab.json", PIECES / "merges.txt"):
        shutil.copy(file, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(tokenizer_folder(tmp_path_factory.mktemp("tokenizer")))


# -- diffusers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "number"), [(family, n) for family, count in FAMILIES.items() for n in range(count)]
)
def test_tokens_are_those_of_diffusers(family, number, tmp_path):
    """Padding is <|endoftext|> in 1.x, "!" in 2.x (whose files differ about it) and in SDXL's second tokenizer."""
    tokenizer = Tokenizer.load(tokenizer_folder(tmp_path, family, names(family, "tokenizer")[number]))
    arrays, prompts = golden(family)
    got = tokens_of(tokenizer, prompts, long="cut")
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, arrays[f"tokens/{number}"])
    assert tokenizer.pad == (END if (family, number) in (("sd1", 0), ("sdxl", 0)) else 0)


@pytest.mark.parametrize("skip", [None, 0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_conditions_are_those_of_diffusers(family, skip):
    (encoders, params), (arrays, _) = loaded(family), golden(family)
    got = encode(encoders, params, tokens(family), xl=family == "sdxl", clip_skip=skip)
    assert got.context.shape == (3, 77, sum(encoder.config.width for encoder in encoders))
    np.testing.assert_allclose(got.context[:, ::EVERY], arrays[f"context/{skip or 0}"], rtol=0, atol=TOLERANCE)
    if family == "sdxl":
        np.testing.assert_allclose(got.pooled, arrays["pooled"], rtol=0, atol=TOLERANCE)
    else:
        assert got.pooled is None


@pytest.mark.parametrize("scan", [False, True], ids=["", "scanned"])
@pytest.mark.parametrize(("family", "number"), [("sd1", 0), ("sdxl", 1)])
def test_hidden_states_are_those_of_transformers(family, number, scan):
    encoders, params = loaded(family, scan=scan)
    out = encoders[number].apply({"params": params[number]}, tokens(family)[number], states=True)
    expected = golden(family)[0][f"states/{number}"]
    assert out["states"].shape == (encoders[number].config.layers + 1, 3, 77, encoders[number].config.width)
    np.testing.assert_allclose(out["states"][:, :, ::EVERY], expected, rtol=0, atol=TOLERANCE)


def test_the_golden_folders_are_spelt_as_the_published_ones():
    spelt = {}
    for family in FAMILIES:
        for name in names(family, "text_encoder"):
            keys = load_file(GOLDEN / family / name / "model.safetensors").keys()
            spelt[f"{family}/{name}"] = (
                any(key.startswith("text_model.") for key in keys),
                "text_model.embeddings.position_ids" in keys,
                "text_projection.weight" in keys,
            )
    assert spelt == {
        "sd1/text_encoder": (True, True, False),
        "sd2/text_encoder": (False, False, False),
        "sdxl/text_encoder": (False, False, False),
        "sdxl/text_encoder_2": (True, False, True),
    }
    assert [encoder.config.head for encoder in loaded("sdxl")[0]] == ["none", "projection"]
    assert [encoder.config.nonlinearity for encoder in loaded("sdxl")[0]] == ["quick_gelu", "gelu"]
    assert {encoder.config.end for family in FAMILIES for encoder in loaded(family)[0]} == {2}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folders_are_written_again(family, tmp_path):
    encoders, params = loaded(family)
    for name, encoder, own in zip(names(family, "text_encoder"), encoders, params, strict=True):
        models.save(tmp_path / name, encoder, own, source=GOLDEN / family / name)
        original, written = (load_file(folder / name / "model.safetensors") for folder in (GOLDEN / family, tmp_path))
        spelt = {key if key.startswith("text_") else f"text_model.{key}": value for key, value in original.items()}
        spelt.pop("text_model.embeddings.position_ids", None)
        assert written.keys() == spelt.keys()
        for key, value in written.items():
            np.testing.assert_array_equal(value, spelt[key].astype(np.float32), key)
        before, after = (json.loads((f / name / "config.json").read_text()) for f in (GOLDEN / family, tmp_path))
        assert {key: after.get(key) for key in before if key != "dtype"} == {
            k: v for k, v in before.items() if k != "dtype"
        }


# -- long prompts ------------------------------------------------------------------------------------------------------


def test_pieces_of_a_long_prompt_by_hand(tokenizer):
    text = tokenizer.encode("the mat on the mat", special=False)
    assert len(text) == 5
    around = lambda *ids: [START, *ids, END] + [END] * (2 - len(ids))
    long = tokens_of(tokenizer, ["the", "the mat on the mat"], long="chunk", context=4)
    assert long.shape == (2, 3 * 4) and long.dtype == np.int32
    assert long[0].tolist() == [*around(text[0]), *around(), *around()]
    assert long[1].tolist() == [*around(*text[:2]), *around(*text[2:4]), *around(text[4])]
    assert tokens_of(tokenizer, ["the mat"], long="chunk", context=4).tolist() == [around(*text[:2])]
    assert tokens_of(tokenizer, [""], long="chunk", context=4, chunks=2).tolist() == [[*around(), *around()]]
    assert tokens_of(tokenizer, ["the mat on the mat"], long="cut", context=4).tolist() == [around(*text[:2])]


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_pieces_are_encoded_one_by_one_and_joined(family, tokenizer):
    """The first piece's vector is what is pooled."""
    (encoders, params), xl = loaded(family), family == "sdxl"
    both = tokens_of(tokenizer, golden(family)[1], long="chunk")
    assert both.shape == (3, 2 * 77)
    whole = encode(encoders, params, (both,) * len(encoders), xl=xl, clip_skip=1)
    parts = [
        encode(encoders, params, (part,) * len(encoders), xl=xl, clip_skip=1) for part in np.split(both, 2, axis=1)
    ]
    np.testing.assert_allclose(
        whole.context, np.concatenate([part.context for part in parts], 1), rtol=0, atol=TOLERANCE
    )
    if xl:
        np.testing.assert_allclose(whole.pooled, parts[0].pooled, rtol=0, atol=TOLERANCE)
        assert np.abs(whole.pooled - parts[1].pooled).max() > 1e-2


def test_pieces_on_a_mesh_of_explicit_axes():
    """Contexts lie as the prompts do; without types that say where arrays lie, a reshape moves nothing."""
    encoders, params = loaded("sdxl", scan=True)
    ids = np.random.default_rng(0).integers(0, END, (2, 2 * 77)).astype(np.int32)
    run = jax.jit(lambda params, tokens: encode(encoders, params, (tokens, tokens), xl=True))
    expected = run(params, ids)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])):
        rows, whole = NamedSharding(jax.sharding.get_mesh(), P("data")), NamedSharding(jax.sharding.get_mesh(), P())
        got = run(jax.device_put(params, whole), jax.device_put(ids, rows))
    for mine, reference in zip(got, expected, strict=True):
        assert mine.sharding.spec[0] == "data" and len(mine.sharding.device_set) == 2
        np.testing.assert_allclose(mine, reference, rtol=0, atol=TOLERANCE)


SENTENCE = "the mat on the mat "  # 5 tokens


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (
            ["a", "the mat on the mat"],
            {"context": 6},
            "prompts[1] has 7 tokens, and the text encoder takes 6: 'mat' would be lost. Shorten the prompt, or pass "
            "long='chunk' to encode it in pieces of 4, or long='cut' to drop the rest",
        ),
        (
            ["a", SENTENCE * 40, "x" * 90],
            {},
            "prompts[1] has 202 tokens, and the text encoder takes 77 (2 of the 3 prompts are too long): "
            f"'{(SENTENCE * 25)[:200]}...' would be lost",
        ),
        ([], {}, 'prompts is empty: give at least one, "" for a picture of anything'),
        (["a"], {"long": "wrap"}, "long='wrap', expected 'raise', 'cut' or 'chunk'"),
        (["a"], {"chunks": 0, "long": "chunk"}, "chunks=0: expected 1, or more with long='chunk'"),
        (["a"], {"chunks": 2}, "chunks=2: expected 1, or more with long='chunk'"),
        (["a"], {"context": 2}, "context=2 leaves no room for text beside the 2 tokens around it"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be(prompts, options, message, tokenizer):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        tokens_of(tokenizer, prompts, **options)


def test_one_string_is_no_list(tokenizer):
    with pytest.raises(TypeError, match=r"^prompts is a string, expected a list of them: pass \[prompt\]$"):
        tokens_of(tokenizer, "a cat")


def test_another_models_tokenizer():
    source = PIECES.parent / "bert"
    with pytest.raises(ValueError, match=f"^the tokenizer of '{source}' has no bos token, so it is not CLIP's$"):
        tokens_of(Tokenizer.load(source), ["a cat"])


# -- what is pooled ----------------------------------------------------------------------------------------------------


def test_added_tokens_are_not_pooled(tokenizer, tmp_path):
    """A token of textual inversion is larger than <|endoftext|>, which configs with eos_token_id=2 take for the largest."""
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<me>": 560}))
    longer = Tokenizer.load(tokenizer_folder(tmp_path))
    ids = tokens_of(longer, ["a <me> cat"])
    assert ids[0].tolist()[2] == 560 and ids[0].tolist().index(END) == 5
    encoder = CLIPText(CLIPTextConfig(561, 77, 8, 1, 2, 16, end=2))
    params = jax.tree.map(
        lambda leaf: normal(*leaf.shape), jax.eval_shape(encoder.init, jax.random.key(0), ids)["params"]
    )
    largest = encoder.apply({"params": params}, ids)
    first = with_tokenizer(encoder, longer).apply({"params": params}, ids)
    np.testing.assert_array_equal(largest["pooled"], largest["out"][:, 2])
    np.testing.assert_array_equal(first["pooled"], first["out"][:, 5])
    with pytest.raises(ValueError, match=r"does not fit a vocabulary of 560: its largest id is 560 \('<me>'\)"):
        with_tokenizer(loaded("sd1")[0][0], longer)


# -- adapters, dtypes, programs ----------------------------------------------------------------------------------------


def test_adapted_encoders_are_lifted():
    (encoders, params), ids = loaded("sdxl"), tokens("sdxl")
    adapted = tuple(randomised(jlora.apply(own, rank=2, targets="attn/"), 0.3) for own in params)
    lifted = encode(encoders, adapted, ids, xl=True, lift=functools.partial(jlora.lift, strict=True))
    merged = encode(encoders, [jlora.merge(own) for own in adapted], ids, xl=True)
    plain = encode(encoders, params, ids, xl=True)
    for got, expected, before in zip(lifted, merged, plain, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)
        assert np.abs(got - before).max() > 1e-2
    one = encode(encoders, (params[0], adapted[1]), ids, xl=True, lift=jlora.lift)
    np.testing.assert_allclose(one.context[..., :8], plain.context[..., :8], rtol=0, atol=TOLERANCE)


@pytest.mark.loose_promotion  # Flax's LayerNorm promotes to float32
def test_bfloat16_is_close_to_float32():
    (encoder,), (params,) = loaded("sd1")
    half = encoder.clone(config=dataclasses.replace(encoder.config, dtype="bfloat16", head="projection"))
    whole = encoder.clone(config=dataclasses.replace(encoder.config, head="projection"))
    params = params | {"projection": {"kernel": normal(8, 8)}}
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    expected = encode([whole], [params], tokens("sd1"), xl=True)
    for got, float32 in zip(encode([half], [small], tokens("sd1"), xl=True), expected, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, float32, atol=0.05)  # of size 3, at 8 bits, after 3 layers


def test_one_program_of_the_real_shapes():
    """SD 1.x, 2.x and SDXL, abstract: (batch, 77, 768), 1024, 2048 and 1280."""
    ids = jax.ShapeDtypeStruct((2, 77), jnp.int32)
    names = {
        "sd1": ["clip-vit-l-text"],
        "sd2": ["openclip-vit-h-text"],
        "sdxl": ["clip-vit-l-text", "openclip-vit-bigg-text"],
    }
    shapes = {}
    for family, presets in names.items():
        encoders = [CLIPText(dataclasses.replace(PRESETS[name], scan=True)) for name in presets]
        params = [jax.eval_shape(encoder.init, jax.random.key(0), ids)["params"] for encoder in encoders]
        run = lambda params, tokens, encoders=encoders, xl=family == "sdxl": encode(encoders, params, tokens, xl=xl)
        shapes[family] = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(run, params, [ids] * len(encoders)))]
    assert shapes == {"sd1": [(2, 77, 768)], "sd2": [(2, 77, 1024)], "sdxl": [(2, 77, 2048), (2, 1280)]}


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("sdxl", {"xl": False}, "2 encoders are SDXL's: pass xl=True"),
        ("sd1", {"xl": True}, "SDXL's pooled text comes of the last encoder's projection, and that has head='none': load it with head='projection', or pass the encoders in their order"),
        ("sd1", {"clip_skip": 4}, "clip_skip=4, and encoder 0 has 3 blocks: expected 0 to 3"),
        ("sdxl", {"clip_skip": 3}, "clip_skip=3, and encoder 0 has 3 blocks: expected 0 to 2"),
        ("sd1", {"clip_skip": -1}, "clip_skip=-1, and encoder 0 has 3 blocks: expected 0 to 3"),
        ("sd1", {"params": ()}, "1 encoders, 0 trees of parameters and 1 arrays of tokens: expected one of each for every encoder"),
        ("sd1", {"tokens": (np.ones((2, 76), np.int32),)}, "tokens[0] is (2, 76), expected (batch, 77) or a multiple of that for pieces: tokens_of(tokenizer, prompts) makes it"),
        ("sd1", {"tokens": (np.ones(77, np.int32),)}, "tokens[0] is (77,), expected (batch, 77) or a multiple of that for pieces: tokens_of(tokenizer, prompts) makes it"),
        ("sdxl", {"tokens": (np.ones((2, 77), np.int32), np.ones((2, 154), np.int32))}, "tokens are (2, 1) and (2, 2) (prompts, pieces) for encoders 0 and 1: encode the same prompts for both, with long='chunk', chunks=2 where they are long"),
    ],
)  # fmt: skip
def test_what_cannot_be_encoded(family, change, message):
    encoders, params = loaded(family)
    arguments = {"params": params, "tokens": tokens(family), "xl": family == "sdxl"} | change
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        encode(encoders, arguments.pop("params"), arguments.pop("tokens"), **arguments)
