"""Random models of each family as Hugging Face checkpoints, each with a tokenizer of its kind."""

import json
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import linen as nn
from flax import traverse_util
from tokenizers import decoders, normalizers, pre_tokenizers, processors, trainers

from jlora import models
from jlora.models.bert import Bert, BertConfig
from jlora.models.deberta import Deberta, DebertaConfig
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.models.llama import Llama, LlamaConfig
from jlora.models.llama.llama2c import HEADER
from jlora.models.roberta import Roberta, RobertaConfig
from jlora.models.vit import ViT, ViTConfig

TEXTS = (
    "The film is a good one, and the best of the year is not far from it.",
    "name : The Mill | food : Italian | area : riverside | price range : cheap",
    "The Mill is a cheap Italian restaurant at the riverside.",
    "Tom has 12 apples and buys 30 more. How many apples does he have now?",
    "12 + 30 = <<12+30=42>>42 #### 42",
    "What is the name of the place where people were in that year?",
    "Speak, speak. We are accounted poor citizens, the patricians good.",
)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TINY: dict[str, Any] = {"context": 64, "width": 32, "layers": 2, "heads": 2}
Roles = Mapping[str, str]


def gpt2(folder: Path) -> Path:
    """GPT-2 with the head of a language model, as openai-community/gpt2."""
    end = "<|endoftext|>"
    backend = _byte_level([end])
    config = GPT2Config(vocab_size=backend.get_vocab_size(), **TINY)
    return _written(folder, GPT2(config), backend, "GPT2Tokenizer", {"bos": end, "eos": end, "unk": end})


def roberta(folder: Path) -> Path:
    """RoBERTa with the head of a masked language model, as FacebookAI/roberta-base."""
    roles = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>", "cls": "<s>", "sep": "</s>"}
    backend = _byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    config = RobertaConfig(vocab_size=backend.get_vocab_size(), hidden=64, **TINY)
    return _written(folder, Roberta(config), backend, "RobertaTokenizer", roles)


def bert(folder: Path) -> Path:
    """BERT without a head, as sentence-transformers/all-MiniLM-L6-v2."""
    roles = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    words = re.findall(r"\w+|[^\w\s]", " ".join(TEXTS).lower())
    letters = sorted({letter for word in words for letter in word} | set("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = [*roles.values(), *letters, *(f"##{letter}" for letter in letters)]
    vocabulary += sorted({word for word in words if len(word) > 1})  # a trained one is another each time
    pieces = {piece: number for number, piece in enumerate(vocabulary)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(pieces, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    config = BertConfig(vocab_size=backend.get_vocab_size(), hidden=64, head="none", **TINY)
    return _written(folder, Bert(config), backend, "BertTokenizer", roles)


def deberta(folder: Path) -> Path:
    """DeBERTa v2 with XXL's convolution and the head of a masked language model, as microsoft/deberta-v2-xxlarge."""
    roles = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]", "mask": "[MASK]"}
    backend = _byte_level([*roles.values()])
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    shape = {"hidden": 64, "buckets": 8, "convolution": 3, "legacy": False, **TINY}
    config = DebertaConfig(vocab_size=backend.get_vocab_size(), **shape)
    return _written(folder, Deberta(config), backend, "DebertaV2Tokenizer", roles)


def llama(folder: Path) -> Path:
    """A Llama whose head is not its embedding, as meta-llama/Llama-2-7b-hf, but for a tokenizer of bytes."""
    backend = _byte_level(["<unk>", "<s>", "</s>"])
    config = LlamaConfig(vocab_size=backend.get_vocab_size(), hidden=64, **(TINY | {"context": 128}))
    return _written(folder, Llama(config), backend, "LlamaTokenizer", {"unk": "<unk>", "bos": "<s>", "eos": "</s>"})


def vit(folder: Path) -> Path:
    """ViT without a head, as google/vit-base-patch16-224-in21k."""
    config = ViTConfig(image_size=16, patch_size=8, width=32, layers=2, heads=2, head="none", pooler=True)
    model = ViT(config)
    models.save(folder, model, random_params(model, jnp.zeros((1, 16, 16, 3))))
    return folder


def llama2c(folder: Path) -> Path:
    """The two files of llama2.c's stories260K in a folder of that name: its checkpoint and its tokenizer."""
    width, hidden, layers, heads, key_heads, context = 16, 32, 2, 4, 2, 64
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(f"<0x{byte:02X}>".encode() for byte in range(256))]
    letters = sorted({character for text in TEXTS for character in text} | {"\n", " "})
    merged = [b" t", b" s", b"he", b" the", b"er", b"in", b" a"]
    pieces += [*merged, *(letter.encode() for letter in letters)]
    few, angles = key_heads * width // heads, context * width // heads // 2
    sizes = (
        len(pieces) * width, layers * width, layers * width * width, layers * few * width, layers * few * width,
        layers * width * width, layers * width, layers * hidden * width, layers * width * hidden,
        layers * hidden * width, width, 2 * angles,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    place = folder / "stories260K"
    place.mkdir(parents=True, exist_ok=True)
    header = HEADER.pack(width, hidden, layers, heads, key_heads, len(pieces), context)
    content = b"".join(rng.normal(0, 0.3, size).astype("<f4").tobytes() for size in sizes)
    (place / "stories260K.bin").write_bytes(header + content)
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces) - 259)]
    rows = (struct.pack("<fi", score, len(piece)) + piece for score, piece in zip(scores, pieces, strict=True))
    (place / "tok512.bin").write_bytes(struct.pack("<i", max(map(len, pieces))) + b"".join(rows))
    return folder


def _byte_level(special: Sequence[str]) -> Any:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + 59, special_tokens=list(special), initial_alphabet=BYTES, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def _written(folder: Path, model: Any, backend: Any, kind: str, roles: Roles) -> Path:
    models.save(folder, model, random_params(model, jnp.zeros((1, 4), jnp.int32)))
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": kind, **{f"{role}_token": token for role, token in roles.items()}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def random_params(model: nn.Module, *inputs: jax.Array) -> Any:
    """Parameters drawn by NumPy: Flax's own initial values would be compiled first."""
    shapes = traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"], sep="/")
    rng = np.random.default_rng(0)

    def drawn(path: str, shape: tuple[int, ...]) -> jax.Array:
        name = path.rsplit("/", 1)[-1]
        return jnp.asarray(
            np.ones(shape) if name == "scale" else np.zeros(shape) if name == "bias" else rng.normal(0, 0.1, shape),
            jnp.float32,
        )

    flat = {path: drawn(path, leaf.shape) for path, leaf in sorted(shapes.items())}
    return traverse_util.unflatten_dict(flat, sep="/")
