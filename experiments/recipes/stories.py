"""stories260K, the smallest model of llama2.c, as a checkpoint of Hugging Face's form with a tokenizer.json.

Source: https://huggingface.co/karpathy/tinyllamas; the pairs of pieces that are merged are found as transformers finds
them for Llama's SentencePiece tokenizers (`generate_merges` in convert_slow_tokenizer.py).
"""

import json
import os
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, normalizers

from experiments.config import ConfigError
from jlora import models
from jlora.models.llama import llama2c

SPACE = "\u2581"  # what SentencePiece writes for a blank


def stories(folder: Path) -> Path:
    """The checkpoint in a folder, from the files below the one that JLORA_WEIGHTS names.

    Raises:
      ConfigError: if they are not there.
    """
    place = Path(os.environ.get("JLORA_WEIGHTS", "weights")) / "stories260K"
    if not place.is_dir():
        raise ConfigError(
            f"there is no folder '{place}' with stories260K.bin and tok512.bin of karpathy/tinyllamas; JLORA_WEIGHTS "
            "names the folder that stories260K/ lies in"
        )
    return converted(place, folder)


def converted(place: Path, folder: Path) -> Path:
    """The files of a folder in Hugging Face's form, in another folder."""
    model, params = llama2c.load(place / "stories260K.bin")
    models.save(folder, model, params)
    backend = tokenizer(llama2c.load_tokenizer(place / "tok512.bin"))
    backend.save(str(folder / "tokenizer.json"))
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    settings = {"tokenizer_class": "LlamaTokenizer", **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def tokenizer(source: llama2c.Tokenizer) -> Any:
    """The same pieces under the same numbers; of two neighbours those are merged first whose union scores highest."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [piece.decode().replace(" ", SPACE) for piece in source.pieces[len(names) :]]
    number = {name: token for token, name in reversed(list(enumerate(names)))}
    pairs = [
        (-source.scores[token], number[name[:i]], number[name[i:]], (name[:i], name[i:]))
        for token, name in enumerate(names[259:], 259)
        for i in range(1, len(name))
        if name[:i] in number and name[i:] in number
    ]
    merges = [pair for *_, pair in sorted(pairs)]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(number, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence([
        decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend
