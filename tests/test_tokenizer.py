"""Tokenizers from a checkpoint's own files, beside those of transformers; see golden/make_models.py."""

import json
import pickle
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jlora.models import Tokenizer

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parent / "golden" / "models"
NAMES = (
    "tokenizers/gpt2",
    "tokenizers/bert",
    "tokenizers/clip",
    "tokenizers/llama",
    "tokenizers/llama_legacy",
    "gpt2_causal_lm",
)
FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json",
    "config.json",
)  # fmt: skip
END = "<|endoftext|>"
STRATEGIES = {True: True, "only_second": "second"}


def golden(name):
    return json.loads((GOLDEN / name / "golden.json").read_text(encoding="utf-8"))


def folder(tmp_path, name="tokenizers/gpt2", without=(), **written):
    """A copy of a tokenizer's files without some of them, and with others: bytes, a text, or JSON of what is given."""
    for file in FILES:
        if file not in without and (GOLDEN / name / file).is_file():
            shutil.copy(GOLDEN / name / file, tmp_path)
    for file, content in written.items():
        path = tmp_path / re.sub("_(json|txt|model|bpe)$", r".\1", file)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return tmp_path


def from_pieces(tmp_path, name):
    return folder(tmp_path, name, without=("tokenizer.json",))


def openai(tmp_path, name):
    """Nothing but the two files, by the names that OpenAI gave them."""
    shutil.copy(GOLDEN / name / "vocab.json", tmp_path / "encoder.json")
    shutil.copy(GOLDEN / name / "merges.txt", tmp_path / "vocab.bpe")
    return tmp_path


def vocabulary_alone(tmp_path, name):
    shutil.copy(GOLDEN / name / "vocab.txt", tmp_path)
    return tmp_path


SOURCES = (
    [(name, lambda tmp_path, name: GOLDEN / name) for name in NAMES]
    + [(name, from_pieces) for name in ("tokenizers/gpt2", "tokenizers/bert", "tokenizers/clip", "gpt2_causal_lm")]
    + [("tokenizers/gpt2", openai), ("tokenizers/clip", openai), ("tokenizers/bert", vocabulary_alone)]
)
IDS = [*NAMES, *(f"{name}, {build.__name__}" for name, build in SOURCES[len(NAMES) :])]


@pytest.fixture(params=SOURCES, ids=IDS)
def case(request, tmp_path):
    name, source = request.param
    pad = END if source is openai else None
    return Tokenizer.load(source(tmp_path, name), pad=pad), golden(name)


# -- transformers ------------------------------------------------------------------------------------------------------


def batched(tokenizer, call, texts, pairs):
    """What `batch` makes of a call to a tokenizer of transformers."""
    arguments = call["arguments"]
    return tokenizer.batch(
        texts,
        pairs if call["paired"] else None,
        length=arguments.get("max_length"),
        truncate=STRATEGIES[arguments.get("truncation", True)] if "max_length" in arguments else False,
        side=arguments.get("padding_side"),
        cut=arguments.get("truncation_side"),
        multiple_of=None if arguments["padding"] == "max_length" else 1,
    )


def test_encoding_is_that_of_transformers(case):
    tokenizer, expected = case
    compared = 0
    for call in expected["encode"]:
        pairs = expected["pairs"] if call["paired"] else [None] * len(expected["texts"])
        if "padding" not in call["arguments"]:
            special = call["arguments"].get("add_special_tokens", True)
            got = [tokenizer.encode(*texts, special=special) for texts in zip(expected["texts"], pairs, strict=True)]
            assert got == call["input_ids"], call["arguments"]
            compared += 1
    assert compared == 3


def test_batches_are_those_of_transformers(case):
    """Batches equal those of transformers; texts without tokens are left out, which it turns into rows of padding."""
    tokenizer, expected = case
    compared = 0
    for call in expected["encode"]:
        if "padding" not in call["arguments"]:
            continue
        rows = [i for i, mask in enumerate(call["attention_mask"]) if any(mask)]
        texts, pairs = ([expected[key][i] for i in rows] for key in ("texts", "pairs"))
        got = batched(tokenizer, call, texts, pairs)
        for mine, theirs in zip(got, ("input_ids", "attention_mask", "token_type_ids"), strict=True):
            np.testing.assert_array_equal(mine, np.array(call[theirs])[rows], err_msg=f"{call['arguments']} {theirs}")
        assert [array.dtype for array in got] == [np.int32, np.bool_, np.int32]
        compared += 1
        if len(rows) < len(expected["texts"]):
            with pytest.raises(ValueError, match="gives no tokens"):
                batched(tokenizer, call, expected["texts"], expected["pairs"])
    assert compared == 6


def test_types_of_pairs_are_those_of_transformers(case):
    tokenizer, expected = case
    (call,) = (call for call in expected["encode"] if call["paired"] and not call["arguments"])
    for text, pair, types in zip(expected["texts"], expected["pairs"], call["token_type_ids"], strict=True):
        assert tokenizer.batch([text], [pair]).types.tolist() == [types]


def test_decoding_is_that_of_transformers(case):
    tokenizer, expected = case
    for call in expected["decode"]:
        got = [tokenizer.decode(ids, skip_special=call["skip_special_tokens"]) for ids in call["ids"]]
        assert got == call["texts"]


# RoBERTa's files: the pieces of the golden GPT-2 after four special tokens, in the places of roberta-base.
def roberta(tmp_path, **settings):
    pieces = json.loads((GOLDEN / "tokenizers/gpt2/vocab.json").read_text())
    pieces = {piece: number + 3 for piece, number in pieces.items() if piece != END}
    pieces |= {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 323}
    without = ("tokenizer.json", "special_tokens_map.json")
    given = {"tokenizer_config_json": settings} if settings else {}
    return folder(tmp_path, without=(*without, "tokenizer_config.json"), vocab_json=pieces, **given)


@pytest.mark.parametrize("settings", [{}, {"tokenizer_class": "RobertaTokenizer"}], ids=["guessed", "named"])
def test_roberta_is_gpt2_between_its_own_special_tokens(settings, tmp_path):
    """`<s> A </s>`, and `<s> A </s></s> B </s>` for a pair, all of one type: fairseq's, and roberta-base's ids."""
    tokenizer = Tokenizer.load(roberta(tmp_path, **settings))
    expected = golden("tokenizers/gpt2")
    ids = [[i + 3 for i in row] for row in expected["encode"][0]["input_ids"]]
    texts = [text for text in expected["texts"] if END not in text]
    ids = [row for row, text in zip(ids, expected["texts"], strict=True) if END not in text]
    assert [tokenizer.encode(text) for text in texts] == [[0, *row, 2] for row in ids]
    assert tokenizer.encode(texts[0], texts[1]) == [0, *ids[0], 2, 2, *ids[1], 2]
    assert not tokenizer.batch(texts[:1], texts[1:2]).types.any()
    assert tokenizer.encode("<s></s><pad>", special=False) == [0, 2, 1]
    assert [tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk] == [0, 2, 1, 3]
    assert [tokenizer.cls, tokenizer.sep, tokenizer.mask] == [0, 2, 323]
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]


def test_robertas_mask_takes_the_blank_before_it(tmp_path):
    """In roberta-base's tokenizer.json <mask> stands for a word, and words begin with their blank."""
    tokenizer = Tokenizer.load(roberta(tmp_path))
    the = tokenizer.encode("the", special=False)
    assert tokenizer.encode("the <mask>", special=False) == [*the, 323]


def test_a_blank_may_come_before_the_first_word(tmp_path):
    plain = Tokenizer.load(GOLDEN / "tokenizers/gpt2")
    spaced = folder(tmp_path, without=("tokenizer.json",), tokenizer_config_json={"add_prefix_space": True})
    assert Tokenizer.load(spaced).encode("the cat") == plain.encode(" the cat") != plain.encode("the cat")


# -- CLIP --------------------------------------------------------------------------------------------------------------


def test_clip_composes_characters_and_lowers_them(tmp_path):
    """As CLIPTokenizer does: an accent of its own joins its letter, and capitals are those of the small ones."""
    tokenizer = Tokenizer.load(from_pieces(tmp_path, "tokenizers/clip"))
    assert (
        tokenizer.encode("CAFE\u0301\u00a0\n the") == tokenizer.encode("caf\u00e9 the") != tokenizer.encode("cafe the")
    )
    assert tokenizer.decode(tokenizer.encode(" CAFE\u0301  the")) == "caf\u00e9 the"
    assert tokenizer.decode([]) == ""


def test_clip_needs_the_two_tokens_around_a_text(tmp_path):
    pieces = json.loads((GOLDEN / "tokenizers/clip/vocab.json").read_text())
    pieces.pop("<|startoftext|>")
    source = folder(tmp_path, "tokenizers/clip", ("tokenizer.json",), vocab_json=pieces)
    message = (
        f"no tokenizer can be made of vocab.json and merges.txt in '{source}': the bos token, '<|startoftext|>', is not"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)} in the vocabulary$"):
        Tokenizer.load(source)


def test_merges_of_clip_that_are_cut_off(tmp_path):
    """Bytes that end a word come of no merge; the rest of what does not is what was cut off."""
    pieces = json.loads((GOLDEN / "tokenizers/clip/vocab.json").read_text())
    more = {f"{piece}xx": 560 + i for i, piece in enumerate(list(pieces)[:80])}
    source = folder(tmp_path, "tokenizers/clip", ("tokenizer.json",), vocab_json=pieces | more)
    with pytest.raises(ValueError, match="82 of 640 pieces, such as 'pxx', come of no merge"):
        Tokenizer.load(source)


# -- BERT's settings ---------------------------------------------------------------------------------------------------


WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "The", "cafe", "café", "日", "本", "日本")


@pytest.mark.parametrize(
    ("words", "settings", "pieces"),
    [
        (WORDS, {"do_lower_case": True}, "the cafe 日 本"),
        (WORDS, {"do_lower_case": False}, "The café 日 本"),
        (WORDS, {"do_lower_case": True, "strip_accents": False}, "the café 日 本"),
        (WORDS, {"do_lower_case": False, "strip_accents": True}, "The cafe 日 本"),
        (WORDS, {"do_lower_case": False, "tokenize_chinese_chars": False}, "The café 日本"),
        (WORDS, {}, "The café 日 本"),  # there is a word with a capital
        ([word for word in WORDS if word != "The"], {}, "the cafe 日 本"),  # there is none
    ],
)
def test_settings_of_word_pieces(words, settings, pieces, tmp_path):
    tokenizer = Tokenizer.load(folder(tmp_path, "", vocab_txt="\n".join(words), tokenizer_config_json=settings))
    ids = tokenizer.encode("The café 日本", special=False)
    assert [words[i] for i in ids] == pieces.split()


def test_words_may_be_odd_characters(tmp_path):
    """One line is one token, whatever else Python takes for the end of a line."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "\u2028", "\x85", "the"]
    assert Tokenizer.load(folder(tmp_path, "", vocab_txt="\n".join(words) + "\n")).encode("the") == [2, 6, 3]


# -- special tokens ----------------------------------------------------------------------------------------------------


def special(tokenizer):
    roles = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
    return {role: getattr(tokenizer, role) for role in roles if getattr(tokenizer, role) is not None}


def test_special_tokens_of_the_golden_files():
    loaded = {name.split("/")[-1]: special(Tokenizer.load(GOLDEN / name)) for name in NAMES}
    llama = {"bos": 1, "eos": 2, "pad": 2, "unk": 0}
    assert loaded == {
        "gpt2": {"bos": 0, "eos": 0, "pad": 0, "unk": 0},
        "gpt2_causal_lm": {"bos": 0, "eos": 0, "pad": 0, "unk": 0},
        "bert": {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4},
        "clip": {"bos": 558, "eos": 559, "pad": 559, "unk": 559},
        "llama": llama,
        "llama_legacy": llama,
    }


ADDED = {"content": "<x>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({}, {}),
        ({"tokenizer_config": {"eos_token": END}}, {"eos": 0}),
        ({"tokenizer_config": {"eos_token": ADDED | {"content": END}}}, {"eos": 0}),
        ({"special_tokens_map": {"eos_token": ADDED | {"content": END}}}, {"eos": 0}),
        ({"tokenizer_config": {"eos_token": "!"}, "special_tokens_map": {"eos_token": END}}, {"eos": 0}),
        (
            {
                "tokenizer_config": {"eos_token": "!", "added_tokens_decoder": {}},
                "special_tokens_map": {"eos_token": END, "pad_token": END},
            },
            {"eos": 1, "pad": 0},
        ),
        ({"config": {"eos_token_id": 0, "pad_token_id": 5}}, {"eos": 0, "pad": 5}),
        ({"config": {"eos_token_id": [3, 0]}}, {"eos": 3}),
        ({"config": {"eos_token_id": 50256, "pad_token_id": -1, "bos_token_id": None}}, {}),
        ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": 0}}, {}),
        ({"tokenizer_config": {"eos_token": END}, "config": {"eos_token_id": 3}}, {"eos": 0}),
        ({"config": {"model_type": "gpt2"}}, {"bos": 0, "eos": 0, "unk": 0}),
        ({"config": {"model_type": "gpt2"}, "tokenizer_config": {"tokenizer_class": "LlamaTokenizer"}}, {}),
        ({"tokenizer_config": {"tokenizer_class": "GPT2TokenizerFast"}}, {"bos": 0, "eos": 0, "unk": 0}),
        ({"tokenizer_config": {"pad_token": "<none>"}}, {}),
        ({"tokenizer_config": {"pad_token": "<x>", "added_tokens_decoder": {"320": ADDED}}}, {"pad": 320}),
        ({"added_tokens": {"<a>": 321, "<x>": 320}, "special_tokens_map": {"pad_token": "<x>"}}, {"pad": 320}),
    ],
)
def test_where_special_tokens_are_named(written, expected, tmp_path):
    shutil.copy(GOLDEN / "tokenizers/gpt2/tokenizer.json", tmp_path)
    tokenizer = Tokenizer.load(folder(tmp_path, "", **{f"{name}_json": content for name, content in written.items()}))
    assert special(tokenizer) == expected
    if "<x>" in str(written):
        assert tokenizer.encode("a<x>") == [*tokenizer.encode("a"), 320]
        assert tokenizer.decode([320]) == ""
        assert tokenizer.decode([320], skip_special=False) == "<x>"
    if "<a>" in str(written):
        assert tokenizer.encode("<a>") == [321]
        assert tokenizer.decode([321]) == "<a>", "not every added token is a special one"


def test_words_that_are_named_special_are_whole_in_texts_and_left_out(tmp_path):
    """tokenizer.json does not mark them; a file beside it does."""
    content = json.loads((GOLDEN / "tokenizers/gpt2/tokenizer.json").read_text())
    settings = {"pad_token": END, "additional_special_tokens": ["cat"]}
    content["model"]["vocab"]["cat"] = 320
    written = folder(tmp_path, tokenizer_json=content | {"added_tokens": []}, tokenizer_config_json=settings)
    tokenizer = Tokenizer.load(written)
    assert tokenizer.encode(f"{END}cat!") == [0, 320, *tokenizer.encode("!")]
    assert tokenizer.decode([0, 320, 1]) == "!"


def test_padding_and_truncation_of_tokenizer_json_are_off(tmp_path):
    """all-MiniLM-L6-v2 is one that has them; the token and the sides count where nothing else names them."""
    content = json.loads((GOLDEN / "tokenizers/gpt2/tokenizer.json").read_text())
    content["truncation"] = {"direction": "Left", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 8}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": END,
    }  # fmt: skip
    without = ("tokenizer_config.json", "special_tokens_map.json")
    tokenizer = Tokenizer.load(folder(tmp_path, without=without, tokenizer_json=content))
    plain = Tokenizer.load(GOLDEN / "tokenizers/gpt2")
    text = "The cat sat on the mat."
    assert tokenizer.encode("a") == plain.encode("a")
    assert tokenizer.encode(text) == plain.encode(text)
    assert (tokenizer.pad, tokenizer.side, tokenizer.cut) == (0, "left", "left")
    assert tokenizer.batch([text], length=4, truncate=True).tokens.tolist() == [plain.encode(text)[-4:]]


def test_no_limit_is_a_number_of_31_digits(tmp_path):
    """transformers writes it for a tokenizer that was given no model_max_length."""
    settings = {"model_max_length": int(1e30), "eos_token": END}
    assert Tokenizer.load(folder(tmp_path, tokenizer_config_json=settings)).eos == 0


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2():
    return Tokenizer.load(GOLDEN / "tokenizers/gpt2")


@pytest.fixture(scope="module")
def bert():
    return Tokenizer.load(GOLDEN / "tokenizers/bert")


@pytest.mark.parametrize(
    ("arguments", "width"),
    [
        ({}, 11),
        ({"length": 11}, 11),
        ({"length": 20}, 20),
        ({"multiple_of": 8}, 16),
        ({"multiple_of": 11}, 11),
        ({"multiple_of": 8, "length": 20}, 16),
        ({"multiple_of": 8, "length": 14}, 14),
        ({"multiple_of": 8, "length": 7, "truncate": True}, 7),
        ({"multiple_of": 4, "length": 7, "truncate": True}, 7),
    ],
)
def test_width(arguments, width, bert):
    batch = bert.batch(["the mat", "The cat sat on the mat."], **arguments)
    assert [array.shape for array in batch] == [(2, width)] * 3
    assert batch.mask.sum(1).tolist() == [4, min(width, 11)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_where_it_is_asked_for(side, bert):
    batch = bert.batch(["the", "the mat"], side=side)
    mask = [[True, True, True, False], [True] * 4]
    assert batch.mask.tolist() == [row if side == "right" else row[::-1] for row in mask]
    assert (batch.tokens[~batch.mask] == bert.pad).all()


def test_truncation_leaves_the_special_tokens(bert):
    cut = bert.batch(["the cat sat on the mat"], ["the mat"], length=7, truncate=True)
    assert cut.tokens[0].tolist() == bert.encode("the cat", "the mat")[:2] + [20] + bert.encode("x", "the mat")[-4:]
    assert cut.types.tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    first = bert.batch(["the cat sat on the mat"], ["the mat"], length=7, truncate="first", cut="left")
    assert first.tokens[0].tolist() == bert.encode("mat", "the mat")[:1] + bert.encode("the mat", "the mat")[1:]


def test_nothing_that_is_given_changes(bert):
    """In the tokenizers library padding and truncation are settings of the tokenizer, which threads would share."""
    texts = ["the mat", "The cat sat on the mat."]
    before = bert.backend.to_str()
    expected = bert.batch(texts).tokens.tolist()
    cut = bert.batch(texts, length=5, truncate=True).tokens.tolist()
    with ThreadPoolExecutor(4) as pool:
        whole = [pool.submit(lambda: bert.batch(texts).tokens.tolist()) for _ in range(40)]
        short = [pool.submit(lambda: bert.batch(texts, length=5, truncate=True).tokens.tolist()) for _ in range(40)]
        assert all(row.result() == expected for row in whole)
        assert all(row.result() == cut for row in short)
    assert bert.backend.to_str() == before
    assert texts == ["the mat", "The cat sat on the mat."]


def test_pickle(bert):
    """Tokenizers are pickled for the worker processes of a data pipeline."""
    other = pickle.loads(pickle.dumps(bert))
    assert other.batch(["the mat", "a"]).tokens.tolist() == bert.batch(["the mat", "a"]).tokens.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"texts": ["the", ""]},
            "texts[1]='' gives no tokens: leave it out, or put a text or a special token in its place",
        ),
        (
            {"texts": ["the", ""], "pairs": ["cat", ""]},
            "texts[1]='' with pairs[1] gives no tokens: leave it out, or put a text or a special token in its place",
        ),
        ({"texts": []}, "texts is empty: a batch has at least one row"),
        ({"texts": ["a", "b"], "pairs": ["a"]}, "2 texts and 1 pairs: each text needs the one that it goes with"),
        (
            {"texts": ["a", "the the the", "a"], "length": 2},
            "texts[1] has 4 tokens, and length=2: pass truncate=True to cut it, or a larger length",
        ),
        (
            {"texts": ["a", "the the the", "xxxxxx"], "length": 2},
            "texts[1] has 4 tokens, and length=2 (2 of the 3 texts are too long): pass truncate=True to cut it, or a "
            "larger length",
        ),
        ({"texts": ["a"], "length": 0}, "length must be at least 1, got 0"),
        ({"texts": ["a"], "multiple_of": -1}, "multiple_of must be at least 1, got -1"),
        ({"texts": ["a"], "side": "up"}, "side='up', expected 'left' or 'right'"),
        ({"texts": ["a"], "length": 1, "cut": "up"}, "cut='up', expected 'left' or 'right'"),
        (
            {"texts": ["the the the"], "pairs": ["a b"], "length": 3, "truncate": "second"},
            "texts[0] has 4 and 3 tokens, and length=3 has room for 3: to cut the second alone leaves nothing of it, "
            "truncate=True cuts both",
        ),
    ],
)
def test_batches_that_cannot_be(arguments, message, gpt2):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        gpt2.batch(**arguments)


def test_a_string_is_no_list(gpt2):
    message = "texts is a string, expected a list of them: pass [text], or call encode"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        gpt2.batch("the cat")
    with pytest.raises(TypeError, match="^pairs is a string"):
        gpt2.batch(["the cat"], "the mat")


def test_room_for_special_tokens_alone(bert):
    for length in (1, 2):
        message = f"length={length} leaves no room for text beside 2 special tokens"
        with pytest.raises(ValueError, match=f"^{message}$"):
            bert.batch(["the cat"], length=length, truncate=True)


def test_empty_texts_are_fine_where_special_tokens_stand_around_them(bert, gpt2):
    assert bert.batch([""]).tokens.tolist() == [[2, 3]]
    assert gpt2.encode("") == []
    assert gpt2.batch([""], ["a"]).mask.tolist() == [[True]]


def test_padding_takes_a_token(tmp_path):
    source = openai(tmp_path, "tokenizers/gpt2")
    tokenizer = Tokenizer.load(source)
    assert tokenizer.batch(["a", "b"]).tokens.shape == (2, 1), "nothing to pad"
    message = (
        f"texts[1] is to be padded from 1 to 4 tokens, and '{source}' has no pad token: pass one, "
        "Tokenizer.load(..., pad='<|endoftext|>')"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tokenizer.batch(["the the the", "a"])
    assert Tokenizer.load(source, pad=END).batch(["the the the", "a"]).tokens[1, 1:].tolist() == [0, 0, 0]
    message = f"pad='[PAD]' is no token of '{source}'; its special tokens are "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Tokenizer.load(source, pad="[PAD]")


def test_a_pad_token_that_the_vocabulary_lacks(tmp_path):
    source = folder(tmp_path, special_tokens_map_json={"pad_token": "[PAD]"})
    message = f"from 1 to 4 tokens, and '{source}' has not the '[PAD]' that it names: pass one, "
    with pytest.raises(ValueError, match=re.escape(message)):
        Tokenizer.load(source).batch(["the the the", "a"])


# -- decoding and the vocabulary ---------------------------------------------------------------------------------------


def test_decode_takes_arrays_and_ids_that_no_token_has(gpt2):
    ids = gpt2.encode("The cat")
    assert gpt2.decode(np.array(ids, np.int32)) == "The cat"
    assert gpt2.decode([]) == ""
    assert gpt2.decode([*ids, 320, 50000]) == "The cat", "the model's vocabulary may be rounded up"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2], [3, 4]], "decode takes one row of ids, got int64 of shape (2, 2)"),
        (np.ones(2, np.float32), "decode takes one row of ids, got float32 of shape (2,)"),
        ([1, -100], "there is -100 among the ids, and they start at 0: leave out what is no token"),
    ],
)
def test_what_cannot_be_decoded(ids, message, gpt2):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        gpt2.decode(ids)


def test_vocabulary(tmp_path):
    tokenizer = Tokenizer.load(folder(tmp_path, added_tokens_json={"<x>": 320}))
    assert tokenizer.vocab_size == 321
    tokenizer.check(321)
    tokenizer.check(512)
    message = (
        f"the tokenizer of '{tmp_path}' does not fit a vocabulary of 320: its largest id is 320 ('<x>'). It belongs to "
        "another model, or the embedding has to grow to 321 rows"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tokenizer.check(320)


# -- files -------------------------------------------------------------------------------------------------------------

CONVERT = "transformers makes a tokenizer.json of it, AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
BYTE_LEVEL = "vocab.json and merges.txt can be built GPT2Tokenizer, gpt2, RobertaTokenizer, roberta, CLIPTokenizer, clip, clip_text_model"
PIECES = ("tokenizer.json",)
BARE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@pytest.mark.parametrize(
    ("name", "without", "written", "message"),
    [
        ("", (), {"tokenizer_json": '{"version": "1.0", "added'}, "'{folder}/tokenizer.json' is no JSON: Unterminated string starting at: line 1 column 20 (char 19)"),
        ("", (), {"tokenizer_json": []}, "'{folder}/tokenizer.json' holds a list, expected an object"),
        ("", (), {"tokenizer_json": b"\xff\xfe"}, "'{folder}/tokenizer.json' is no JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        ("", (), {"tokenizer_json": {}}, "'{folder}/tokenizer.json' is damaged, or the tokenizers library too old: Model missing. at line 1 column 2"),
        ("tokenizers/gpt2", (), {"tokenizer_config_json": "{"}, "'{folder}/tokenizer_config.json' is no JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("tokenizers/gpt2", (), {"special_tokens_map_json": "["}, "'{folder}/special_tokens_map.json' is no JSON: Expecting value: line 1 column 2 (char 1)"),
        ("tokenizers/gpt2", (), {"config_json": "["}, "'{folder}/config.json' is no JSON: Expecting value: line 1 column 2 (char 1)"),
        ("tokenizers/gpt2", (), {"tokenizer_config_json": {"pad_token": 3}}, "'{folder}/tokenizer_config.json' has pad_token=3, expected a token"),
        ("tokenizers/gpt2", (), {"tokenizer_config_json": {"padding_side": "up"}}, "'{folder}/tokenizer_config.json' has padding_side='up', expected 'left' or 'right'"),
        ("tokenizers/gpt2", (), {"tokenizer_config_json": {"added_tokens_decoder": ["<x>"]}}, "'{folder}/tokenizer_config.json' has an added_tokens_decoder that is no object"),
        ("tokenizers/gpt2", (), {"added_tokens_json": {"<x>": "no"}}, "'{folder}/added_tokens.json' gives the token '<x>' the id 'no'"),
        ("tokenizers/gpt2", (), {"added_tokens_json": {"<x>": 400}}, "'{folder}/added_tokens.json' gives '<x>' the id 400, and the vocabulary 320"),
        ("tokenizers/gpt2", PIECES, {"vocab_json": '{"a": 0,'}, "'{folder}/vocab.json' is no JSON: Expecting property name enclosed in double quotes: line 1 column 9 (char 8)"),
        ("tokenizers/gpt2", PIECES, {"vocab_json": {"a": "b"}}, "'{folder}/vocab.json' is damaged: 'a' has the id 'b', expected a number of its own from 0"),
        ("tokenizers/gpt2", PIECES, {"vocab_json": {"a": 1, "b": 1}}, "'{folder}/vocab.json' is damaged: 'b' has the id 1, expected a number of its own from 0"),
        ("tokenizers/gpt2", PIECES, {"merges_txt": "#version: 0.2\nh e\nthe\n"}, "'{folder}/merges.txt' is damaged: line 3 is 'the', expected two pieces"),
        ("tokenizers/gpt2", PIECES, {"merges_txt": b"\xff"}, "'{folder}/merges.txt' is no text: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        ("tokenizers/gpt2", PIECES, {"merges_txt": "#version: 0.2\nh e\n"}, "no tokenizer can be made of vocab.json and merges.txt in '{folder}': 63 of 320 pieces, such as 'ed', come of no merge"),
        ("tokenizers/bert", PIECES, {"vocab_txt": b"\xff"}, "'{folder}/vocab.txt' is no text: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        ("tokenizers/bert", PIECES, {"vocab_txt": "[UNK]\nthe\n"}, "no tokenizer can be made of vocab.txt in '{folder}': the cls token, '[CLS]', is not in the vocabulary"),
        ("tokenizers/bert", PIECES, {"tokenizer_config_json": {"tokenizer_class": "BertJapaneseTokenizer"}}, "'{folder}' has no tokenizer.json, and of vocab.txt can be built BertTokenizer, bert, DistilBertTokenizer, distilbert, ElectraTokenizer, electra, not 'BertJapaneseTokenizer': " + CONVERT),
        ("tokenizers/llama", PIECES, {}, "'{folder}' has no tokenizer.json, and of " + BYTE_LEVEL + ", not 'LlamaTokenizer': " + CONVERT),
        ("tokenizers/gpt2", BARE, {"config_json": {"model_type": "xlm"}}, "'{folder}' has no tokenizer.json, and of " + BYTE_LEVEL + ", not 'xlm': " + CONVERT),
        ("tokenizers/llama", BARE, {}, "'{folder}/vocab.json' has no piece with 'Ġ', the blank of GPT-2 and RoBERTa, and nothing says what it is: " + CONVERT),
        ("tokenizers/gpt2", PIECES, {"tokenizer_config_json": {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}}, "'{folder}/tokenizer_config.json' has add_bos_token, which takes a tokenizer.json: " + CONVERT),
    ],
)  # fmt: skip
def test_damaged_and_contradicting_files(name, without, written, message, tmp_path):
    source = folder(tmp_path, name, without, **written)
    with pytest.raises(ValueError, match=f"^{re.escape(message.replace('{folder}', str(source)))}$"):
        Tokenizer.load(source)


@pytest.mark.parametrize(
    ("name", "without", "written", "message"),
    [
        ("", (), {}, "'{folder}' holds no tokenizer: no tokenizer.json, no vocab.json with merges.txt, no encoder.json with vocab.bpe, no vocab.txt"),
        ("tokenizers/gpt2", ("tokenizer.json", "merges.txt"), {}, "'{folder}' holds vocab.json and no merges.txt: it takes both, or tokenizer.json"),
        ("", (), {"spm_model": b""}, "the tokenizer of '{folder}' is spm.model, SentencePiece: with sentencepiece installed, " + CONVERT),
        ("", (), {"tokenizer_model": b"", "tokenizer_config_json": {}}, "the tokenizer of '{folder}' is tokenizer.model, SentencePiece: with sentencepiece installed, " + CONVERT),
    ],
)  # fmt: skip
def test_missing_files(name, without, written, message, tmp_path):
    source = folder(tmp_path, name, without, **written)
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message.replace('{folder}', str(source)))}$"):
        Tokenizer.load(source)


def test_a_folder_of_checkpoints(tmp_path):
    (tmp_path / "model").mkdir()
    folder(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"no vocab\.txt; its folders 'model' hold one$"):
        Tokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent' is no checkpoint: there is no such folder$"):
        Tokenizer.load(tmp_path / "absent")


def test_the_library_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    message = "to read a tokenizer needs the tokenizers library: pip install jlora[models]"
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        Tokenizer.load(GOLDEN / "tokenizers/gpt2")


def test_a_repository_of_the_hub(monkeypatch, tmp_path):
    """A snapshot needs no config.json either."""
    import huggingface_hub

    def download(name, revision, **patterns):
        assert (name, revision) == ("someone/gpt2", "main")
        return str(folder(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    tokenizer = Tokenizer.load("someone/gpt2", "main")
    assert tokenizer.source == "someone/gpt2"
    assert tokenizer.vocab_size == 320
