"""The files of llama2.c, and stories260K: a real model that writes what its authors say it writes.

JLORA_WEIGHTS names a folder with stories260K/ in it, from https://huggingface.co/karpathy/tinyllamas.
"""

import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import models
from jlora.models.llama import llama2c

pytestmark = pytest.mark.once

STORIES = Path(os.environ.get("JLORA_WEIGHTS", "."), "stories260K")
needs_weights = pytest.mark.skipif(
    not STORIES.is_dir(), reason="JLORA_WEIGHTS names no folder in which stories260K/ lies"
)
SHAPE = (16, 24, 2, 4, 2, 20, 8)  # dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len


def sizes(header):
    dim, hidden, layers, heads, key_heads, vocab, length = header
    few = dim * key_heads // heads
    return {
        "token_embedding": (abs(vocab), dim), "rms_att": (layers, dim), "wq": (layers, dim, dim), "wk": (layers, few, dim),
        "wv": (layers, few, dim), "wo": (layers, dim, dim), "rms_ffn": (layers, dim), "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden), "w3": (layers, hidden, dim), "rms_final": (dim,), "freq_cis": (2, length, dim // heads // 2),
        "wcls": (max(-vocab, 0), dim),
    }  # fmt: skip


def written(path, header):
    """A checkpoint of random numbers, and these."""
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(0, 0.5, shape).astype("<f4") for name, shape in sizes(header).items()}
    path.write_bytes(llama2c.HEADER.pack(*header) + b"".join(tensor.tobytes() for tensor in tensors.values()))
    return tensors


def run_c(w, header, tokens):
    """`forward` of run.c, in NumPy: (length, vocab) logits. Neighbouring features are turned together."""
    dim, _, layers, heads, key_heads, vocab, _ = header
    size = dim // heads
    norm = lambda x, weight: weight * x / np.sqrt(np.mean(x * x) + 1e-5)
    keys, values, out = [[] for _ in range(layers)], [[] for _ in range(layers)], []

    def turned(x, position):
        x, angle = x.copy(), position / 10000 ** (np.arange(0, size, 2) / size)
        for i, a in [(i, a) for i in range(0, len(x), size) for a in range(size // 2)]:
            x0, x1 = x[i + 2 * a], x[i + 2 * a + 1]
            x[i + 2 * a] = x0 * np.cos(angle[a]) - x1 * np.sin(angle[a])
            x[i + 2 * a + 1] = x0 * np.sin(angle[a]) + x1 * np.cos(angle[a])
        return x

    for position, token in enumerate(tokens):
        x = w["token_embedding"][token].astype(float)
        for layer in range(layers):
            y = norm(x, w["rms_att"][layer])
            q = turned(w["wq"][layer] @ y, position)
            keys[layer].append(turned(w["wk"][layer] @ y, position))
            values[layer].append(w["wv"][layer] @ y)
            mixed = np.zeros(dim)
            for head in range(heads):
                mine, its = slice(head * size, (head + 1) * size), head // (heads // key_heads) * size
                scores = np.array([q[mine] @ k[its : its + size] for k in keys[layer]]) / np.sqrt(size)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                mixed[mine] = sum(p * v[its : its + size] for p, v in zip(weights, values[layer], strict=True))
            x = x + w["wo"][layer] @ mixed
            y = norm(x, w["rms_ffn"][layer])
            gate = w["w1"][layer] @ y
            x = x + w["w2"][layer] @ (gate / (1 + np.exp(-gate)) * (w["w3"][layer] @ y))
        out.append((w["wcls"] if vocab < 0 else w["token_embedding"]) @ norm(x, w["rms_final"]))
    return np.stack(out)


@pytest.mark.parametrize("vocab", [20, -20], ids=["shared", "unshared"])
def test_a_checkpoint_computes_what_run_c_computes(vocab, tmp_path):
    header = (*SHAPE[:5], vocab, SHAPE[6])
    tensors = written(tmp_path / "model.bin", header)
    model, params = llama2c.load(tmp_path / "model.bin")
    tokens = np.array([1, 7, 3, 19, 3, 0, 5])
    out = jax.jit(model.apply)({"params": params}, jnp.asarray(tokens)[None])[0]
    np.testing.assert_allclose(out, run_c(tensors, header, tokens), rtol=2e-5, atol=2e-5)
    models.save(tmp_path / "hub", model, params)
    again = models.load(tmp_path / "hub")
    assert again.model.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF", "has 4 bytes, fewer than a llama2.c checkpoint's header"),
        (llama2c.HEADER.pack(0x616B3432, 1, 64, 172, 5, 8, 4), "is of llama2.c's format version 1; version 0 is read"),
        (b"\0" * 64, "is no llama2.c checkpoint: it begins with"),
        (llama2c.HEADER.pack(*SHAPE) + b"\0" * 100, "has 128 bytes, its header says 17116: it is cut off"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        llama2c.load(tmp_path / "model.bin")


def test_the_best_neighbours_are_merged_first_and_the_rest_are_bytes():
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256))]
    scores = {b" ": 0.0, b"a": 0.0, b"b": 0.0, b" a": -3.0, b"ab": -2.0, b"ba": -1.0, b" ab": -4.0}
    tokenizer = llama2c.Tokenizer((*pieces, *scores), (*(0.0 for _ in pieces), *scores.values()))
    split = lambda text: [tokenizer.pieces[token] for token in tokenizer.encode(text)[1:]]
    assert split("ab") == [b" ab"] and split("aba") == [b" a", b"ba"] and split("") == []
    assert split("aé") == [b" a", b"<0xC3>", b"<0xA9>"]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in ("aé", " a", "a\0")] == ["aé", " a", "a\0"]
    assert tokenizer.decode([262, llama2c.BOS, 262, llama2c.EOS, 262]) == " aa a"


def test_a_tokenizer_that_is_cut_off_is_refused(tmp_path):
    (tmp_path / "tok.bin").write_bytes(b"\5\0\0\0" + b"\0\0\0\0\2\0\0\0ab" + b"\0\0\0\0\5\0\0\0abc")
    with pytest.raises(ValueError, match="ends within token 1: it is cut off, or no tokenizer.bin"):
        llama2c.load_tokenizer(tmp_path / "tok.bin")


# -- stories260K -------------------------------------------------------------------------------------------------------


def greedy(model, params, steps):
    """Greedy decoding as in run.c at temperature 0, each token from the whole text so far."""

    def step(carry, position):
        cache, token = carry
        out, cache = model.apply({"params": params}, token[None, None], positions=position[None, None], cache=cache)
        token = jnp.argmax(out[0, 0]).astype(jnp.int32)
        return (cache, token), token

    start = model.empty_cache(1, steps), jnp.int32(llama2c.BOS)
    return jax.lax.scan(step, start, jnp.arange(steps))[1]


@needs_weights
def test_stories260k_writes_the_story_in_its_description(tmp_path):
    model, params = llama2c.load(STORIES / "stories260K.bin")
    tokenizer = llama2c.load_tokenizer(STORIES / "tok512.bin")
    assert (model.config.layers, model.config.heads, model.config.key_heads, len(tokenizer.pieces)) == (5, 8, 4, 512)
    (story,) = re.findall(r"-t 0\.0\n(.*?)\n```", (STORIES / "stories260K.md").read_text(), re.DOTALL)
    assert len(story) > 500 and story.startswith("Once upon a time")
    tokens = jax.jit(greedy, static_argnums=(0, 2))(model, params, 256).tolist()
    assert tokenizer.decode([llama2c.BOS, *tokens]) == story
    models.save(tmp_path, model, params)
    hub = models.load(tmp_path, scan=True)
    assert jax.jit(greedy, static_argnums=(0, 2))(hub.model, hub.params, 256).tolist() == tokens


@needs_weights
def test_stories260k_expects_a_story(tmp_path):
    """Its authors state a validation loss of 1.2968 per token; of text of another kind it knows nothing."""
    model, params = llama2c.load(STORIES / "stories260K.bin")
    tokenizer = llama2c.load_tokenizer(STORIES / "tok512.bin")

    def loss(text):
        tokens = jnp.asarray(tokenizer.encode(text))
        scores = jax.nn.log_softmax(jax.jit(model.apply)({"params": params}, tokens[None, :-1])[0])
        return -float(jnp.take_along_axis(scores, tokens[1:, None], axis=1).mean())

    story = (
        "Once upon a time there was a boy named Tim. He had a red ball, and he liked to play with his dog in the park."
    )
    assert 0.5 < loss(story) < 1.5
    assert loss("Colourless green ideas: 17% of furious quanta (sic) jog §4.") > 4


@needs_weights
@pytest.mark.parametrize("text", ["", "Once upon a time", "  two  spaces\n", "Zoë said: naïve — 日本 🙂"])
def test_stories260k_reads_back_what_was_encoded(text):
    tokenizer = llama2c.load_tokenizer(STORIES / "tok512.bin")
    tokens = tokenizer.encode(text)
    assert tokens[0] == llama2c.BOS and tokenizer.decode(tokens) == text
    if text == "Once upon a time":
        assert tokens == [1, 403, 407, 261, 378]
