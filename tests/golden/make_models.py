"""Makes `models/`: tiny checkpoints in the format of the hub, with what Hugging Face transformers computes from them.

    pip install torch==2.13.0 transformers==5.23.0 numpy && python tests/golden/make_models.py [case ...]

Each case is a folder as `save_pretrained` writes it, and in it `golden.safetensors`. Every parameter is drawn anew, biases and
norm scales too, so that none has the value it starts with; everything is float32 on the CPU with eager attention. A case also
lists changes to its config that have to change its outputs, else the golden would not see the option that it is there for.

`golden.safetensors` holds calls. A call is a group `<call>/<name>`:

    inputs   tokens, mask, types, positions    (batch, length) int32; mask is 1 for real tokens, 0 for padding
             pixels                            (batch, channels, height, width) float32
    outputs  out                               logits, the last hidden state or embeddings; for CLIP, the logits per image
             pooled, hidden, text_embeds, image_embeds    where there is more than one

What is absent is not passed. Outputs at padded tokens are stored and mean nothing. The metadata's one key, `golden`, is JSON:
`class` (that of transformers) and the versions.

`generate_<name>.safetensors` holds `tokens` and `mask` (prompts padded on the left), `sequences` (prompts included) and, for beams,
`scores`; the metadata's one key, `settings`, is the JSON of what `generate` was told. The sequences stay the same when the
weights are multiplied by 1 + 1e-4 N(0, 1), so a difference is no matter of rounding.

`warpers.safetensors` holds `logits` (4, 32), `tied` (4, 32) with equal values in each row, and `<array>/<warper>` for what the
warpers of sampling make of them; the metadata's `settings` says what each is.

`tokenizers/<name>/` and `gpt2_causal_lm` hold the files of a hub repository and `golden.json`: `texts`, `pairs` (the second text of
each), `encode`, a list of calls `{paired, arguments, input_ids, attention_mask, token_type_ids}`, and `decode`, a list of
`{ids, skip_special_tokens, texts}`. AutoTokenizer and tokenizer.json read alone agree on all of it, but for texts that CLIP's
tokenizer decodes.
"""

import copy
import json
import shutil
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.numpy import save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = Path(__file__).with_name("models")
VOCAB = 48
Call = dict[str, np.ndarray]


# Inputs: the ids below 4 and the last one are special, and nothing draws them.


def tokens(rng: np.random.Generator, batch: int = 3, length: int = 9) -> np.ndarray:
    return rng.integers(4, VOCAB - 1, (batch, length)).astype(np.int32)


def right(batch: int, length: int) -> np.ndarray:
    return (np.arange(length) < length - 2 * np.arange(batch)[:, None]).astype(np.int32)  # row i ends in 2 i pads


def left(batch: int, length: int) -> np.ndarray:
    return right(batch, length)[:, ::-1].copy()


def padded(ids: np.ndarray, mask: np.ndarray, pad: int | None) -> np.ndarray:
    return np.where(mask == 1, ids, pad or 0).astype(np.int32)


def counted(mask: np.ndarray) -> np.ndarray:
    """Positions that count real tokens only, as `generate` has them."""
    return np.maximum(np.cumsum(mask, -1) - 1, 0).astype(np.int32)


def decoder(rng: np.random.Generator, pad: int | None = None) -> dict[str, Call]:
    ids = tokens(rng)
    after, before, whole = right(*ids.shape), left(*ids.shape), np.ones_like(ids)
    gaps = np.cumsum(rng.integers(1, 3, ids.shape), -1).astype(np.int32)
    return {
        "plain": {"tokens": ids},
        "masked": {"tokens": padded(ids, after, pad), "mask": after},
        "left": {"tokens": padded(ids, before, pad), "mask": before, "positions": counted(before)},
        # with a mask: without one transformers takes a jump in the positions for the start of another document
        "offset": {"tokens": ids, "mask": whole, "positions": gaps},
    }


def encoder(
    rng: np.random.Generator, pad: int = 0, types: int = 0, positions: bool = True, whole: bool = True
) -> dict[str, Call]:
    """`types`: how many there are; `positions`: whether they can be passed; `whole`: whether each token has its own output."""
    ids = tokens(rng)
    after, before = right(*ids.shape), left(*ids.shape)
    calls = {"plain": {"tokens": ids}, "masked": {"tokens": padded(ids, after, pad), "mask": after}}
    if whole:
        calls["left"] = {"tokens": padded(ids, before, pad), "mask": before}
    if types > 1:
        calls["types"] = calls["masked"] | {"types": rng.integers(0, types, ids.shape).astype(np.int32)}
    if positions:
        calls["offset"] = {"tokens": ids, "positions": np.cumsum(rng.integers(1, 3, ids.shape), -1).astype(np.int32)}
    return calls


def roberta(rng: np.random.Generator, pad: int = 1, types: int = 0) -> dict[str, Call]:
    """Positions come from the pads among the tokens, so pads without a mask are a case of their own."""
    calls = encoder(rng, pad, types)
    return calls | {"pads": {"tokens": calls["left"]["tokens"]}}


def images(rng: np.random.Generator) -> dict[str, Call]:
    return {"plain": {"pixels": rng.normal(size=(2, 3, 8, 8)).astype(np.float32)}}


def captions(rng: np.random.Generator, end: int) -> dict[str, Call]:
    """Rows close with `end` and are filled up with it, as CLIP's tokenizer does: the first one counts."""
    ids = tokens(rng)
    ids[ids == end] = 4
    after = right(*ids.shape)
    closed = padded(ids, after, end)
    closed[0, -1] = end
    last = after.sum(-1) - 1
    closed[np.arange(len(ids)), last] = end
    return {"plain": {"tokens": closed}, "masked": {"tokens": closed, "mask": after}}


def both(rng: np.random.Generator, end: int) -> dict[str, Call]:
    pixels = images(rng)["plain"]
    return {name: call | pixels for name, call in captions(rng, end).items()}


# Cases. The dimensions are as small as the variant allows; the epsilons are large, so that a wrong one shows.

GPT2 = {
    "vocab_size": VOCAB, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "layer_norm_epsilon": 1e-3, "bos_token_id": 47,
    "eos_token_id": 47,
}  # fmt: skip
BERT = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 24, "layer_norm_eps": 1e-3, "pad_token_id": 0,
}  # fmt: skip
ROBERTA = BERT | {"type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
DEBERTA = BERT | {
    "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p",
    "max_relative_positions": -1, "position_biased_input": False, "type_vocab_size": 0, "pooler_dropout": 0, "pooler_hidden_act": "gelu",
    "pooler_hidden_size": 16,
}  # fmt: skip
DEBERTA_CHANGES = ({"pos_att_type": ["c2p"]}, {"pos_att_type": ["p2c"]}, {"max_position_embeddings": 12})
XXL = {k: v for k, v in DEBERTA.items() if not k.startswith("pooler")}
XXL |= {"conv_kernel_size": 3, "conv_act": "gelu", "attention_head_size": 8}
LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 24, "max_position_embeddings": 64, "rms_norm_eps": 1e-3, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
VIT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 8, "patch_size": 4,
    "layer_norm_eps": 1e-3,
}  # fmt: skip
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "projection_dim": 12,
    "max_position_embeddings": 16, "layer_norm_eps": 1e-3, "bos_token_id": 46, "eos_token_id": 20, "pad_token_id": 1,
}  # fmt: skip
VISION = VIT | {"projection_dim": 12, "hidden_size": 24, "num_attention_heads": 3}
NAMES = ["contradiction", "neutral", "entailment"]
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}

LOGITS = {"out": "logits"}
HIDDEN = {"out": "last_hidden_state"}
POOLED = {"out": "last_hidden_state", "pooled": "pooler_output"}


class Case(NamedTuple):
    model: str
    config: dict
    calls: Callable[[np.random.Generator], dict[str, Call]]
    changes: tuple[dict, ...] = ()  # each has to change an output
    outputs: dict[str, str] = LOGITS


CASES = {
    "gpt2_causal_lm": Case("GPT2LMHeadModel", GPT2 | {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0},
        partial(decoder, pad=0), ({"activation_function": "gelu"}, {"layer_norm_epsilon": 1e-5})),
    "gpt2_base": Case("GPT2Model", GPT2, decoder, outputs=HIDDEN),
    "gpt2_sequence_classification": Case("GPT2ForSequenceClassification", GPT2 | LABELS | {"pad_token_id": 47},
        partial(decoder, pad=47), ({"pad_token_id": 3},)),
    "gpt2_token_classification": Case("GPT2ForTokenClassification", GPT2 | LABELS, decoder),
    "gpt2_sharded": Case("GPT2LMHeadModel", GPT2, decoder),

    "bert_base": Case("BertModel", BERT, partial(encoder, types=2), ({"hidden_act": "gelu_new"}, {"layer_norm_eps": 1e-12}), POOLED),
    "bert_masked_lm": Case("BertForMaskedLM", BERT, partial(encoder, types=2)),
    "bert_sequence_classification": Case("BertForSequenceClassification", BERT, partial(encoder, types=2, whole=False)),
    "bert_token_classification": Case("BertForTokenClassification", BERT | LABELS, partial(encoder, types=2)),

    "roberta_base": Case("RobertaModel", ROBERTA | {"type_vocab_size": 2}, partial(roberta, types=2), outputs=POOLED),
    "roberta_masked_lm": Case("RobertaForMaskedLM", ROBERTA, roberta),
    "roberta_sequence_classification": Case("RobertaForSequenceClassification", ROBERTA | LABELS, roberta),
    "roberta_token_classification": Case("RobertaForTokenClassification", ROBERTA | LABELS, roberta),

    "deberta_v3_base": Case("DebertaV2Model", DEBERTA, partial(encoder, positions=False), DEBERTA_CHANGES, HIDDEN),
    "deberta_v3_sequence_classification": Case("DebertaV2ForSequenceClassification", DEBERTA,
        partial(encoder, positions=False, whole=False), ({"pooler_hidden_act": "tanh"},)),
    "deberta_v3_token_classification": Case("DebertaV2ForTokenClassification", DEBERTA | LABELS,
        partial(encoder, positions=False)),
    "deberta_v3_masked_lm": Case("DebertaV2ForMaskedLM", DEBERTA | {"legacy": False}, partial(encoder, positions=False)),
    "deberta_v2_masked_lm": Case("DebertaV2ForMaskedLM", DEBERTA, partial(encoder, positions=False)),
    "deberta_v2_xxl_base": Case("DebertaV2Model", XXL, partial(encoder, positions=False),
        ({"conv_act": "tanh"}, {"conv_kernel_size": 0}), HIDDEN),
    "deberta_v2_xxl_sequence_classification": Case("DebertaV2ForSequenceClassification", XXL,
        partial(encoder, positions=False, whole=False), ({"conv_act": "tanh"}, *DEBERTA_CHANGES)),
    "deberta_v2_unshared": Case("DebertaV2Model", DEBERTA | {"share_att_key": False, "position_buckets": -1, "norm_rel_ebd": "none",
        "max_relative_positions": 5, "position_biased_input": True, "type_vocab_size": 2}, partial(encoder, types=2),
        ({"pos_att_type": ["c2p"]}, {"pos_att_type": ["p2c"]}), HIDDEN),

    "llama2_causal_lm": Case("LlamaForCausalLM", LLAMA | {"num_attention_heads": 2, "num_key_value_heads": 2},
        decoder, ({"rms_norm_eps": 1e-6},)),
    "llama3_causal_lm": Case("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
        decoder, (PLAIN_ROPE, {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}})),
    "llama_linear_rope": Case("LlamaForCausalLM", LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}},
        decoder, (PLAIN_ROPE,)),
    "llama_dynamic_rope": Case("LlamaForCausalLM", LLAMA | {"max_position_embeddings": 6,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}}, decoder, (PLAIN_ROPE,)),
    "llama_yarn_rope": Case("LlamaForCausalLM", LLAMA | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0,
        "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 0.5}}, decoder, (PLAIN_ROPE,)),
    "llama_bias": Case("LlamaForCausalLM", LLAMA | {"attention_bias": True, "mlp_bias": True}, decoder),
    "llama_sequence_classification": Case("LlamaForSequenceClassification", LLAMA | LABELS | {"pad_token_id": 0},
        partial(decoder, pad=0), ({"pad_token_id": 3},)),
    "llama_bf16": Case("LlamaForCausalLM", LLAMA, lambda rng: {"plain": {"tokens": tokens(rng)}}),
    "mistral_causal_lm": Case("MistralForCausalLM", LLAMA | {"sliding_window": 3}, decoder,
        ({"sliding_window": None}, {"sliding_window": 4})),
    "qwen2_causal_lm": Case("Qwen2ForCausalLM", {k: v for k, v in LLAMA.items() if k != "head_dim"} | {"tie_word_embeddings": True},
        decoder),
    "qwen2_sliding": Case("Qwen2ForCausalLM", {k: v for k, v in LLAMA.items() if k != "head_dim"} | {"num_hidden_layers": 3,
        "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}, decoder,
        ({"use_sliding_window": False}, {"max_window_layers": 0}, {"max_window_layers": 2})),
    "qwen3_causal_lm": Case("Qwen3ForCausalLM", LLAMA | {"tie_word_embeddings": True}, decoder),

    "vit_image_classification": Case("ViTForImageClassification", VIT | LABELS, images),
    "vit_base": Case("ViTModel", VIT, images, ({"hidden_act": "gelu_new"},), POOLED),

    "clip": Case("CLIPModel", {"text_config": TEXT, "vision_config": VISION, "projection_dim": 12}, partial(both, end=20),
        outputs={"out": "logits_per_image", "text_embeds": "text_embeds", "image_embeds": "image_embeds"}),
    "clip_text": Case("CLIPTextModel", TEXT | {"eos_token_id": 2}, partial(captions, end=47),
        ({"hidden_act": "gelu"}, {"eos_token_id": 20}), POOLED),
    "clip_text_eos": Case("CLIPTextModel", TEXT, partial(captions, end=20), ({"eos_token_id": 2},), POOLED),
    "clip_vision": Case("CLIPVisionModel", VISION, images, ({"hidden_act": "gelu"},), POOLED),
    "clip_text_projection": Case("CLIPTextModelWithProjection", TEXT, partial(captions, end=20),
        outputs={"out": "text_embeds", "hidden": "last_hidden_state"}),
    "clip_vision_projection": Case("CLIPVisionModelWithProjection", VISION, images,
        outputs={"out": "image_embeds", "hidden": "last_hidden_state"}),
}  # fmt: skip


def built(case: Case, seed: int, change: dict | None = None) -> torch.nn.Module:
    kind = getattr(transformers, case.model)
    config = kind.config_class(**copy.deepcopy(case.config | (change or {})), attn_implementation="eager")
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            scale = "Norm" in type(module).__name__ and name == "weight"
            centre = float(scale or value.ndim == 0)  # the only scalar is CLIP's temperature
            value.data = centre + 0.2 * torch.randn(value.shape, generator=generator)
    model.tie_weights()
    return model


def called(model: torch.nn.Module, call: Call, outputs: dict[str, str]) -> Call:
    names = {"tokens": "input_ids", "mask": "attention_mask", "types": "token_type_ids", "positions": "position_ids"}
    arrays = {names[k]: torch.tensor(v).long() for k, v in call.items() if k in names}
    if "pixels" in call:
        arrays["pixel_values"] = torch.tensor(call["pixels"])
    with torch.no_grad():
        result = model(**arrays)
    return {name: getattr(result, attribute).numpy() for name, attribute in outputs.items()}


def apart(a: Call, b: Call) -> float:
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def make(name: str) -> None:
    case, folder, seed = CASES[name], HERE / name, zlib.crc32(name.encode())
    shutil.rmtree(folder, ignore_errors=True)
    model = built(case, seed)
    if name == "llama_bf16":
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="12KB" if name == "gpt2_sharded" else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name == "llama_bf16":  # read again in float32: the cast above rounded the frequencies of RoPE too
        model = type(model).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    calls = case.calls(np.random.default_rng(seed))
    arrays, results = {}, {}
    for call, inputs in calls.items():
        results[call] = called(model, inputs, case.outputs)
        arrays |= {f"{call}/{key}": np.ascontiguousarray(value) for key, value in (inputs | results[call]).items()}
    read = type(model).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    for call, inputs in calls.items():
        assert apart(called(read, inputs, case.outputs), results[call]) == 0, (name, call, "differs when read")
    for change in case.changes:
        other = built(case, seed, change)
        missing, _ = other.load_state_dict(model.state_dict(), strict=False)
        assert not missing, (name, missing)
        changed = max(apart(called(other, inputs, case.outputs), results[call]) for call, inputs in calls.items())
        assert changed > 4e-4, (name, change, changed)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    save_file(arrays, folder / "golden.safetensors", {"golden": json.dumps({"class": case.model} | versions)})
    size = sum(file.stat().st_size for file in folder.iterdir())
    scale = {key: round(float(np.abs(value).max()), 2) for key, value in arrays.items() if key.endswith("out")}
    print(f"{name}: {size / 1000:.0f} kB, largest {scale}")
    if name in ("gpt2_causal_lm", "llama3_causal_lm", "mistral_causal_lm"):
        generate(model, folder, seed)


# Generation

PAD = 3  # not 0: beam search reads `pad_token_id or eos_token_id`, and fills up with the end instead


def continued(model: torch.nn.Module, ids: np.ndarray, mask: np.ndarray, settings: dict) -> Call:
    # the model's own generation config fills what is None: so it is replaced, not only passed over
    model.generation_config = transformers.GenerationConfig(**settings)
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask).long()}
        result = model.generate(**inputs, output_scores=True, return_dict_in_generate=True)
    record = {"tokens": ids, "mask": mask, "sequences": result.sequences.numpy().astype(np.int32)}
    return record | ({"scores": result.sequences_scores.numpy()} if settings["num_beams"] > 1 else {})


def steady(model: torch.nn.Module, record: Call, settings: dict) -> bool:
    """Whether the sequences stay when the weights change a little: else two right answers could differ."""
    for seed in range(3):
        other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
        for value in other.parameters():
            value.data *= 1 + 1e-4 * torch.randn(value.shape, generator=generator)
        again = continued(other, record["tokens"], record["mask"], settings)["sequences"]
        if not np.array_equal(again, record["sequences"]):
            return False
    return True


def generations(model: torch.nn.Module, rng: np.random.Generator) -> dict[str, tuple[dict, Call]] | None:
    """The settings and the records of every call, or None if a prompt leaves one of them without what it should show."""
    mask = left(3, 6)
    ids = padded(tokens(rng, 3, 6), mask, PAD)
    shared = {"max_new_tokens": 14, "do_sample": False, "num_beams": 1, "pad_token_id": PAD, "eos_token_id": None}
    beams = shared | {"num_beams": 4, "length_penalty": 0.8, "no_repeat_ngram_size": 3}
    settings = {"greedy": shared, "greedy_ngram2": shared | {"no_repeat_ngram_size": 2}, "beam_open": beams}
    records = {name: continued(model, ids, mask, one) for name, one in settings.items()}
    free = records["greedy"]["sequences"][:, 6:]
    if (free == records["greedy_ngram2"]["sequences"][:, 6:]).all() or min(len(set(row)) for row in free) < 2:
        return None
    for end in set(free.flatten()) - {PAD}:
        first = sorted(list(row).index(end) if end in row else 99 for row in free)
        if 2 <= first[0] < 9 and first[-1] == 99:  # one row stops early, another never
            settings["greedy_eos"] = shared | {"eos_token_id": int(end)}
            records["greedy_eos"] = continued(model, ids, mask, settings["greedy_eos"])
            break
    ends = np.bincount(records["beam_open"]["sequences"][:, 6:].flatten()).argsort()[::-1][:9]
    for end in (int(end) for end in ends if end != PAD):  # the frequent ones first: they end several beams of a row
        late, early = (
            beams | {"eos_token_id": end, "early_stopping": stop, "num_return_sequences": 4} for stop in (False, True)
        )
        a, b = (continued(model, ids, mask, one) for one in (late, early))
        if "beam_late" not in records and not np.array_equal(a["sequences"], b["sequences"]):
            settings |= {"beam_late": late, "beam_early": early}
            records |= {"beam_late": a, "beam_early": b}
        ended = [end in row[6:] for row in a["sequences"][::4]]
        if "beam" not in records and any(ended) and not all(ended):
            settings["beam"] = beams | {"eos_token_id": end}
            records["beam"] = continued(model, ids, mask, settings["beam"])
    if not {"greedy_eos", "beam", "beam_late"} <= set(records):
        return None
    if not all(steady(model, records[name], one) for name, one in settings.items()):
        return None
    return {name: (settings[name], records[name]) for name in settings}


def generate(model: torch.nn.Module, folder: Path, seed: int) -> None:
    tries = (generations(model, np.random.default_rng(seed + attempt)) for attempt in range(200))
    for name, (settings, record) in next(filter(None, tries)).items():
        arrays = {key: np.ascontiguousarray(value) for key, value in record.items()}
        save_file(arrays, folder / f"generate_{name}.safetensors", {"settings": json.dumps(settings)})
        print(f"  {name} {settings}\n{record['sequences'][:, 6:]}")


def warpers() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (4, 32)).astype(np.float32)
    tied = np.round(logits)
    kinds = {name: getattr(transformers, f"{name}LogitsWarper") for name in ("Temperature", "TopK", "TopP")}
    made = {f"temperature_{t}": [kinds["Temperature"](t)] for t in (0.7, 1.5)}
    made |= {f"top_k_{k}": [kinds["TopK"](k)] for k in (1, 5, 50)}
    made |= {f"top_p_{p}": [kinds["TopP"](p)] for p in (0.05, 0.5, 0.9)}
    made["temperature_0.8_top_k_10_top_p_0.9"] = [kinds["Temperature"](0.8), kinds["TopK"](10), kinds["TopP"](0.9)]
    arrays = {"logits": logits, "tied": tied}
    for name, chain in made.items():
        for key in ("logits", "tied"):
            if key == "tied" and "top_p" in name:
                continue  # which of equal tokens top-p keeps is left to the sort
            out = torch.tensor(arrays[key])
            for warper in chain:
                out = warper(None, out)
            arrays[f"{key}/{name}"] = out.numpy()
    settings = {name: [{type(w).__name__: vars(w)} for w in chain] for name, chain in made.items()}
    save_file(arrays, HERE / "warpers.safetensors", {"settings": json.dumps(settings, default=str)})


# Tokenizers

SENTENCES = [
    "The cat sat on the mat, and the dog sat on the log.",
    "A low-rank update is added to the weights; the weights themselves stay as they are.",
    "What is the rank of a matrix? It is the number of its independent rows.",
    "The restaurant by the river serves cheap Italian food and is not family friendly.",
    "In 1906 he counted 42 sheep, 17 goats and the cats on the mat.",
    "Café naïve über: the weights of the café.",
]
TEXTS = [
    "The cat sat on the mat.",
    "the  rank\tof a matrix\nis 42  ",
    "",
    "   ",
    "Café Über naïve — “quoted”",
    "日本語 and 🙂 on the mat",
    "It isn't low-rank, don't you think? 1,000 of 3.14!",
    "one {0} inside, and one at the end{0}",
    "xxxxxxxxxx",
]


def gpt2_tokenizer(size: int, alphabet: list[str]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def bert_tokenizer() -> tokenizers.Tokenizer:
    """The vocabulary is counted, not trained: the trainer of word pieces orders them differently in each run."""
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = [word for line in SENTENCES for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(line))]
    letters = sorted(set("".join(words)))
    pieces = letters + [f"##{piece}" for piece in [*letters, "nk", "ed", "ight"]]
    pieces += sorted({word for word in words if words.count(word) > 1 and len(word) > 1})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.add_special_tokens(vocabulary[:5])
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitter, decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def llama_tokenizer(legacy: bool) -> tokenizers.Tokenizer:
    """BPE over whole texts with spaces as U+2581, unknown characters as bytes.

    Two forms are on the hub: the legacy one, Llama 2's, puts a space before every piece between special tokens, the newer one
    before the text only.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)], show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    content["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.pre_tokenizer = None if legacy else pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s>:0 $A:0", pair="<s>:0 $A:0 <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def clip_tokenizer(size: int) -> tokenizers.Tokenizer:
    """The vocabulary in the order of OpenAI's: bytes, bytes that end a word, merges, the two around a text; normalizer and
    the rest are those of CLIPTokenizer, which writes tokenizer.json."""
    start, end, reader = "<|startoftext|>", "<|endoftext|>", transformers.CLIPTokenizer().backend_tokenizer
    trained = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = reader.normalizer, reader.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=120, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator(SENTENCES, trainer)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]][: size - 2 * len(letters) - 2]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), start, end]
    return transformers.CLIPTokenizer({piece: i for i, piece in enumerate(vocabulary)}, merges).backend_tokenizer


END = "<|endoftext|>"
GPT2_FILES = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
GPT2_SPECIALS = {"bos_token": END, "eos_token": END, "unk_token": END, "pad_token": END}
CLIP_SPECIALS = GPT2_SPECIALS | {"bos_token": "<|startoftext|>"}
BERT_SPECIALS = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "mask", "pad", "sep", "unk")}
LLAMA_SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
# what builds it, the special token put into texts, tokenizer_config.json without the special tokens, those
TOKENIZERS = {
    "gpt2_causal_lm": (partial(gpt2_tokenizer, 64, []), END, GPT2_FILES, GPT2_SPECIALS),
    "tokenizers/gpt2": (partial(gpt2_tokenizer, 320, pre_tokenizers.ByteLevel.alphabet()), END, GPT2_FILES, GPT2_SPECIALS),
    "tokenizers/bert": (bert_tokenizer, "[MASK]", {"tokenizer_class": "BertTokenizer", "do_lower_case": True}, BERT_SPECIALS),
    "tokenizers/clip": (partial(clip_tokenizer, 560), END, {"tokenizer_class": "CLIPTokenizer"}, CLIP_SPECIALS),
    "tokenizers/llama": (partial(llama_tokenizer, False), "</s>",
        {"tokenizer_class": "LlamaTokenizer", "legacy": False, "padding_side": "left"}, LLAMA_SPECIALS),
    "tokenizers/llama_legacy": (partial(llama_tokenizer, True), "</s>",  # LlamaTokenizer would put the newer form in its place
        {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}, LLAMA_SPECIALS),
}  # fmt: skip


def encoded(reader: Callable, texts: list[str], pairs: list[str] | None, arguments: dict) -> dict:
    given = {key: value for key, value in arguments.items() if key != "truncation_side"}
    reader.truncation_side = arguments.get("truncation_side", "right")
    return dict(reader(texts, pairs, return_token_type_ids=True, **given))


def tokenizer(name: str) -> None:
    build, special, config, specials = TOKENIZERS[name]
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    made = build()
    made.save(str(folder / "tokenizer.json"), pretty=False)
    made.model.save(str(folder))  # vocab.json and merges.txt, or vocab.txt
    config = config | {"clean_up_tokenization_spaces": False, "model_max_length": 32} | specials
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(specials, indent=2) + "\n")
    read = transformers.AutoTokenizer.from_pretrained(folder)
    alone = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **config)

    texts = [text.format(special) for text in TEXTS]
    pairs, short = texts[::-1], {"padding": True, "truncation": True, "max_length": 12}
    calls = [
        (False, {}),
        (False, {"add_special_tokens": False}),
        (False, {"padding": True, "padding_side": "right"}),
        (False, {"padding": True, "padding_side": "left"}),
        (False, {"padding": "max_length", "truncation": True, "max_length": 6}),
        (False, short | {"truncation_side": "left"}),
        (True, {}),
        (True, short),
        (True, short | {"truncation": "only_second", "max_length": 48}),
    ]
    encode, decode = [], []
    for paired, arguments in calls:
        result = encoded(read, texts, pairs if paired else None, arguments)
        assert result == encoded(alone, texts, pairs if paired else None, arguments), (name, arguments)
        encode.append({"paired": paired, "arguments": arguments} | result)
    for ids in (encode[3]["input_ids"], encode[6]["input_ids"]):
        for skip in (True, False):
            out = [read.decode(row, skip_special_tokens=skip) for row in ids]
            if name != "tokenizers/clip":  # CLIPTokenizer alone makes blanks of </w>
                assert out == [alone.decode(row, skip_special_tokens=skip) for row in ids], (name, ids)
            decode.append({"ids": ids, "skip_special_tokens": skip, "texts": out})
    versions = {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    golden = {"class": type(read).__name__} | versions
    golden |= {"texts": texts, "pairs": pairs, "encode": encode, "decode": decode}
    text = json.dumps(golden, ensure_ascii=False, separators=(",", ":")) + "\n"
    (folder / "golden.json").write_text(text, encoding="utf-8")
    print(f"{name}: {len(made.get_vocab())} tokens")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in sys.argv[1:] or [*CASES, *TOKENIZERS]:
        if name in CASES:
            make(name)
        if name in TOKENIZERS:
            tokenizer(name)
    warpers()
