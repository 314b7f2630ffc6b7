"""Generation beside transformers' `generate`, see golden/make_models.py; and that adapters cost nothing once merged."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import jlora
from jlora import models
from jlora.models import sampling
from jlora.models.catalogue import ARCHITECTURES
from jlora.models.generate import Decoder, Prompt, sample
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.models.llama import Llama, LlamaConfig
from jlora.models.llama.rope import Linear
from jlora.models.sampling import Sampling
from tests.conformance import filled, normal

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parent / "golden" / "models"
TYPES = {architecture.model_type for architecture in ARCHITECTURES}
FILES = sorted(
    f"{path.parent.name}/{path.stem}"
    for path in GOLDEN.glob("*/generate_*.safetensors")
    if json.loads((path.parent / "config.json").read_text())["model_type"] in TYPES
)


# GPT-2 does all of it by default; the others look for the likeliest text, and for that of beams.
STAND_INS = {
    "greedy_eos": "test_several_tokens_may_end_a_text",
    "greedy_ngram2": "test_ngrams_that_are_there_are_ruled_out",
    **dict.fromkeys(("beam_early", "beam_late", "beam_open"), "test_one_beam_is_greedy"),
}


def tiered(file):
    model, _, plan = file.partition("/generate_")
    if model == "gpt2_causal_lm" or plan not in STAND_INS:
        return file
    return pytest.param(file, marks=pytest.mark.thorough(STAND_INS[plan]))


@pytest.mark.parametrize("file", list(map(tiered, FILES)))
def test_sequences_are_those_of_transformers(file):
    path = GOLDEN / f"{file}.safetensors"
    record = load_file(path)
    with safe_open(path, framework="numpy") as opened:
        settings = json.loads(opened.metadata()["settings"])
    pretrained = models.load(path.parent, scan=settings["num_beams"] > 1 and "open" in file)
    shared = {
        "mask": jnp.asarray(record["mask"] == 1),
        "new_tokens": settings["max_new_tokens"],
        "eos": settings["eos_token_id"],
        "pad": settings["pad_token_id"],
    }
    ngram, tokens = settings.get("no_repeat_ngram_size", 0), jnp.asarray(record["tokens"])
    if settings["num_beams"] == 1:
        plan = Sampling(no_repeat_ngram=ngram)
        out = models.generate(pretrained.model, pretrained.params, tokens, sampling=plan, **shared)
    else:
        found = models.beam_search(
            pretrained.model, pretrained.params, tokens, beams=settings["num_beams"],
            returned=settings.get("num_return_sequences", 1), length_penalty=settings["length_penalty"],
            no_repeat_ngram=ngram, early_stopping=settings.get("early_stopping", False), **shared,
        )  # fmt: skip
        out = found.tokens.reshape(-1, found.tokens.shape[-1])
        np.testing.assert_allclose(found.scores.reshape(-1), record["scores"], rtol=1e-5, atol=1e-5)
    width = record["sequences"].shape[1]
    np.testing.assert_array_equal(out[:, :width], record["sequences"])
    assert (out[:, width:] == settings["pad_token_id"]).all()


# -- one token ---------------------------------------------------------------------------------------------------------

WARPERS = load_file(GOLDEN / "warpers.safetensors")


def warped(logits, name):
    parts = name.split("_")
    options = {"temperature": 1.0, "top_k": None, "top_p": 1.0}
    for i, part in enumerate(parts):
        if part == "temperature":
            options["temperature"] = float(parts[i + 1])
        elif part in ("k", "p"):
            options[f"top_{part}"] = int(parts[i + 1]) if part == "k" else float(parts[i + 1])
    logits = logits / options["temperature"]
    if options["top_k"]:
        logits = sampling.top_k(logits, options["top_k"])
    return sampling.top_p(logits, options["top_p"]) if options["top_p"] < 1 else logits


@pytest.mark.parametrize("name", sorted(key for key in WARPERS if "/" in key))
def test_warped_logits_are_those_of_transformers(name):
    array, warper = name.split("/")
    np.testing.assert_allclose(warped(jnp.asarray(WARPERS[array]), warper), WARPERS[name], rtol=1e-6)


def test_draws_follow_the_warped_probabilities():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    plan = Sampling(temperature=1.0, top_k=3, top_p=0.7)  # of 0.53, 0.32, 0.16: the nucleus has two tokens
    draws = jax.vmap(lambda key: sampling.chosen(logits, plan, key)[0])(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(np.bincount(draws, minlength=4) / 4000, [0.625, 0.375, 0, 0], atol=0.03)  # 4 sigma


def test_ngrams_that_are_there_are_ruled_out():
    tokens = jnp.asarray([[1, 2, 3, 1, 2, 0], [4, 4, 4, 4, 4, 0]])
    for n, expected in [
        (1, [{1, 2, 3}, {4}]),
        (2, [{3}, {4}]),
        (3, [{3}, {4}]),
        (6, [set(), set()]),
        (0, [set(), set()]),
    ]:
        out = sampling.without_repeats(jnp.zeros((2, 5)), tokens, jnp.asarray(5), n)
        assert [set(np.flatnonzero(row == -jnp.inf).tolist()) for row in out] == expected, n


# -- the program -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2():
    model = GPT2(GPT2Config(vocab_size=32, context=24, width=16, layers=2, heads=2))
    params = filled(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    return model, params


@pytest.fixture(scope="module")
def adapted(gpt2):
    factors, rest = jlora.partition(jlora.apply(gpt2[1], rank=2, targets=r"attn/(query|value)"))
    noise = lambda x: x + 1.25 * normal(*x.shape)
    return jlora.combine(jax.tree.map(noise, factors), rest)


PROMPT = jnp.asarray([[5, 6, 7, 8], [0, 0, 9, 10]])
MASK = jnp.asarray([[True] * 4, [False, False, True, True]])


def test_rows_do_not_see_each_other_nor_their_padding(gpt2):
    plan = {"new_tokens": 6, "sampling": Sampling(no_repeat_ngram=2)}
    both = models.generate(*gpt2, PROMPT, mask=MASK, **plan)
    alone = models.generate(*gpt2, PROMPT[1:, 2:], **plan)
    np.testing.assert_array_equal(both[1, 2:], alone[0])


def test_an_adapter_generates_what_its_merged_weights_do(gpt2, adapted):
    model, params = gpt2
    plan = {"new_tokens": 8, "mask": MASK}
    merged = models.generate(model, jlora.merge(adapted), PROMPT, **plan)
    np.testing.assert_array_equal(
        models.generate(model, adapted, PROMPT, apply=jlora.lift(model.apply), **plan), merged
    )
    assert (merged != models.generate(model, params, PROMPT, **plan)).any()


def test_merged_weights_run_the_program_of_the_base(gpt2, adapted):
    model, params = gpt2
    prompt = Prompt(PROMPT, MASK)
    texts = [
        sample.lower(Decoder(model, model.apply), 8, Sampling(), (), 0, p, prompt, jax.random.key(0)).as_text()
        for p in (params, jlora.merge(adapted))
    ]
    assert texts[0] == texts[1]


def test_a_second_call_compiles_nothing(gpt2):
    plan = {"new_tokens": 3, "mask": MASK, "sampling": Sampling(temperature=0.9, top_k=5), "pad": 1}
    first = models.generate(*gpt2, PROMPT, key=jax.random.key(1), **plan)
    size = sample._cache_size()
    again = models.generate(*gpt2, PROMPT, key=jax.random.key(1), **plan)
    assert sample._cache_size() == size
    np.testing.assert_array_equal(first, again)


def test_several_tokens_may_end_a_text(gpt2):
    free = models.generate(*gpt2, PROMPT, mask=MASK, new_tokens=6)
    eos = (free[0, 5], np.int64(free[1, 4]))  # integers of any kind
    out = models.generate(*gpt2, PROMPT, mask=MASK, new_tokens=6, eos=eos, pad=31)
    for row, full in zip(np.asarray(out)[:, 4:], np.asarray(free)[:, 4:], strict=True):
        stop = min(i for i, token in enumerate(full) if token in eos)
        np.testing.assert_array_equal(row, [*full[: stop + 1], *[31] * (5 - stop)])


def test_the_prompts_ngrams_count_or_not(gpt2):
    plan = {"mask": MASK, "beams": 3, "new_tokens": 8, "no_repeat_ngram": 1}
    texts = {of: models.beam_search(*gpt2, PROMPT, of_prompt=of, **plan).tokens[:, 0] for of in (True, False)}
    for of, rows in texts.items():
        for row, prompt in zip(np.asarray(rows), np.asarray(PROMPT), strict=True):
            new = row[4:].tolist()
            assert len(set(new)) == 8  # no token twice
            if of:
                assert not set(new) & set(prompt.tolist())
    assert (texts[True] != texts[False]).any()  # some text wants a token of its prompt


def test_one_beam_is_greedy(gpt2):
    found = models.beam_search(*gpt2, PROMPT, mask=MASK, beams=1, new_tokens=6)
    np.testing.assert_array_equal(found.tokens[:, 0], models.generate(*gpt2, PROMPT, mask=MASK, new_tokens=6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new_tokens": 21}, "4 tokens of the prompt and 21 new ones are more than the model's context, 24"),
        ({"new_tokens": 0}, "new_tokens must be at least 1, got 0"),
        ({"mask": ~MASK}, "a prompt is empty or padded on the right: pad on the left, so that each ends in a token"),
        ({"tokens": PROMPT[:, :0]}, "the prompts are empty: give each of them at least one token, such as the one that starts"),
        ({"mask": MASK[:, :3]}, "the mask is (2, 3), the tokens are (2, 4) (batch, length)"),
        ({"key": jax.random.key(0)}, "nothing is drawn at a temperature of 0: leave key= out, or give sampling= a temperature"),
        ({"sampling": Sampling(temperature=0.7)}, "a temperature of 0.7 draws tokens: pass key=jax.random.key(...)"),
    ],
)  # fmt: skip
def test_what_cannot_be_continued(gpt2, options, message):
    options = {"tokens": PROMPT, "new_tokens": 4} | options
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        models.generate(*gpt2, options.pop("tokens"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams must be at least 1 and returned between 1 and beams, got 0 and 1"),
        ({"returned": 3}, "beams must be at least 1 and returned between 1 and beams, got 2 and 3"),
        ({"early_stopping": "nevr"}, "early_stopping is True, False or 'never', got 'nevr'"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram must be at least 0, got -1"),
    ],
)
def test_searches_that_cannot_be(gpt2, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        models.beam_search(*gpt2, PROMPT, **{"beams": 2, "new_tokens": 2} | options)


def test_a_classifier_makes_no_tokens(gpt2):
    model = GPT2(GPT2Config(vocab_size=32, context=24, width=16, layers=2, heads=2, head="token_classification"))
    with pytest.raises(ValueError, match="GPT2 with head='token_classification' makes no tokens: a decoder with"):
        models.generate(model, gpt2[1], PROMPT, new_tokens=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"top_k": 5}, "top_k and top_p say what is drawn from: give a temperature above 0, such as 1.0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p is a probability in \(0, 1\], got 0.0"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram must be at least 0, got -1"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_a_rope_that_goes_beyond_the_context_is_asked():
    model = Llama(LlamaConfig(vocab_size=32, context=8, width=8, layers=1, heads=2, hidden=8, rope=Linear(2.0)))
    params = model.init(jax.random.key(0), PROMPT)["params"]
    assert models.generate(model, params, PROMPT, new_tokens=12).shape == (2, 16)  # twice 8
    with pytest.raises(
        ValueError, match="4 tokens of the prompt and 13 new ones are more than the model's context, 16"
    ):
        models.generate(model, params, PROMPT, new_tokens=13)
