"""Folders of models that nobody should believe: each ends soon, in little memory, in an error that names the file."""

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import struct
from contextlib import contextmanager
from pathlib import Path

import pytest

from jlora import models
from jlora.models import reading
from jlora.models.bert import BertConfig
from jlora.models.clip import CLIPConfig
from jlora.models.clip.modeling import CLIPTextConfig
from jlora.models.deberta import DebertaConfig
from jlora.models.gpt2 import GPT2Config
from jlora.models.llama import LlamaConfig, llama2c
from jlora.models.llama.rope import Dynamic, Linear, Llama3, Yarn
from jlora.models.roberta import RobertaConfig
from jlora.models.tokenizer import Tokenizer
from jlora.models.vit import ViTConfig

GOLDEN = Path(__file__).parent / "golden" / "models"
CASES = (
    "gpt2_causal_lm", "llama_yarn_rope", "llama3_causal_lm", "mistral_causal_lm", "qwen2_sliding", "bert_base",
    "roberta_base", "deberta_v2_unshared", "vit_base", "clip", "clip_text_eos", "clip_vision",
)  # fmt: skip
NAN = float("nan")
BAD = {  # by what a key of config.json holds
    "whole": ["2", [1], {"a": 1}, True, 1.5, -3, 10**12, 10**19, NAN],
    "real": ["x", [], {}, True, NAN, float("inf"), -1.0, 1e300],
    "flag": ["yes", 3, [], {}, None],
    "name": [3, [], {}, True, "mish", None],
    "names": [3, [3], "GPT2LMHeadModel", {"a": 1}, True],
}
KEYS = {
    "whole": "vocab_size n_positions n_embd n_layer n_head n_inner hidden_size num_hidden_layers num_attention_heads "
    "intermediate_size max_position_embeddings type_vocab_size num_key_value_heads head_dim sliding_window image_size "
    "patch_size num_channels projection_dim position_buckets max_relative_positions original_max_position_embeddings",
    "real": "layer_norm_epsilon layer_norm_eps rms_norm_eps rope_theta factor beta_fast "
    "beta_slow low_freq_factor high_freq_factor",
    "flag": "share_att_key position_biased_input legacy attention_bias mlp_bias use_sliding_window",
    "name": "activation_function hidden_act pooler_hidden_act model_type",
    "names": "architectures layer_types",
}
KIND = {key: kind for kind, names in KEYS.items() for key in names.split()}
ALSO = {"roberta_base": {"pad_token_id": "whole"}, "clip_text_eos": {"eos_token_id": "whole"}}
LONG = 20  # seconds, of a spoilt folder: a guard against hangs; they take milliseconds
MUCH = 400 * 2**10  # KiB that all of them may add to the process


@contextmanager
def guarded():
    """A hang is an error, so that the rest of the run is not lost."""

    def stop(*_):
        raise TimeoutError(f"no answer after {LONG} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(folder, call=models.build):
    """The error for a folder."""
    with guarded(), pytest.raises((ValueError, FileNotFoundError)) as found:
        call(folder)
    assert type(found.value) in (ValueError, FileNotFoundError)
    return str(found.value)


@pytest.fixture(autouse=True, scope="module")
def little_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MUCH


def copied(name, tmp_path):
    return Path(shutil.copytree(GOLDEN / name, tmp_path / "model"))


def entries(record, path=()):
    for key, value in record.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from entries(value, (*path, key))


def spoilt_configs(name):
    """(path of a key, value): three values of each key that the model reads; the same in every run."""
    record = json.loads((GOLDEN / name / "config.json").read_text())
    rng, kinds = random.Random(name), KIND | ALSO.get(name, {})
    for path in entries(record):
        if path[-1] in kinds:
            values = BAD[kinds[path[-1]]]
            yield from ((path, value) for value in rng.sample(values, 3))


SPOILT = [(name, path, value) for name in CASES for path, value in spoilt_configs(name)]


def test_there_are_many_spoilt_configs():
    assert len(SPOILT) >= 300
    assert len({(name, path) for name, path, _ in SPOILT}) >= 100
    assert {path[-1] for _, path, _ in SPOILT} == {*KIND, "pad_token_id", "eos_token_id"}  # each key is somewhere


@pytest.mark.parametrize("name", CASES)
def test_a_config_that_is_spoilt_names_its_file_and_the_key(name, tmp_path):
    folder = copied(name, tmp_path)
    good = (folder / "config.json").read_text()
    for _, path, value in (case for case in SPOILT if case[0] == name):
        record = at = json.loads(good)
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        (folder / "config.json").write_text(json.dumps(record))
        message = refused(folder)
        assert message.startswith(f"'{folder / 'config.json'}'") and path[-1] in message, (path, value, message)


# -- more of one model -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return copied("gpt2_causal_lm", tmp_path)


def says(folder, **values):
    record = json.loads((GOLDEN / folder_name(folder) / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(record))
    return refused(folder)


def folder_name(folder):
    return {"gpt2": "gpt2_causal_lm", "llama": "llama_yarn_rope", "qwen2": "qwen2_sliding"}[
        json.loads((folder / "config.json").read_text())["model_type"]
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_layer": 0}, "config.json has n_layer=0: layers must be at least 1, got 0"),
        ({"n_layer": 10**9}, "config.json has n_layer=1000000000: layers must be at most 4096, got 1000000000"),
        ({"n_layer": "2"}, "config.json has n_layer='2': layers must be a whole number, got '2'"),
        ({"n_head": 3}, "config.json has n_embd=16, n_head=3: width=16 is not a multiple of heads=3"),
        ({"layer_norm_epsilon": NAN}, "config.json has layer_norm_epsilon=nan: epsilon must be a finite number, got nan"),
        ({"n_inner": 0}, "config.json has n_inner=0: hidden must be at least 1, got 0"),
        ({"n_inner": 1.5}, "config.json has n_inner=1.5: hidden must be a whole number or None, got 1.5"),
        ({"id2label": 3}, "config.json has id2label=3, expected an object"),
        ({"id2label": {"a": "b"}}, "config.json has id2label={'a': 'b'}, expected the name of each number"),
        ({"id2label": {"1": "b", "01": "c"}}, "config.json has id2label={'01': 'c', '1': 'b'}, expected the name of each number"),
        ({"num_labels": 10**9}, "config.json: num_labels must be at most 1048576, got 1000000000"),
        ({"num_labels": "3"}, "config.json: num_labels must be a whole number, got '3'"),
        ({"architectures": "GPT2LMHeadModel"}, "config.json has architectures='GPT2LMHeadModel', expected a list of strings"),
        ({"scale_attn_weights": 1}, "config.json has scale_attn_weights=1; jlora's model has True"),
    ],
)  # fmt: skip
def test_what_a_config_is_told(values, message, folder):
    assert says(folder, **values) == f"'{folder / 'config.json'}': {message}"


def test_more_layers_than_tensors_are_refused_before_anything_is_built(folder, tmp_path):
    assert (
        says(folder, n_layer=4000) == f"'{folder / 'config.json'}' has n_layer=4000, and there are tensors of 2 layers"
    )
    clip = copied("clip", tmp_path / "other")
    record = json.loads((clip / "config.json").read_text())
    record["vision_config"]["num_hidden_layers"] = 3
    (clip / "config.json").write_text(json.dumps(record))
    assert refused(clip).endswith("has vision_config.num_hidden_layers=3, and there are tensors of 2 layers")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_types": ["full_attention"] * 2}, "layer_types of 2 layers, and num_hidden_layers=3"),
        ({"layer_types": None, "max_window_layers": -1}, "max_window_layers must be at least 0, got -1"),
        ({"sliding_window": "3", "use_sliding_window": False}, "sliding_window must be a whole number, got '3'"),
        ({"rope_scaling": 3}, "config.json has rope_scaling=3, expected an object"),
        ({"rope_scaling": {"rope_type": []}}, "config.json has rope_type=[]; jlora's model has 'default' or"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "has factor=0: factor must be at least 1.0, got 0"),
        ({"rope_scaling": {"type": "dynamic", "factor": NAN}}, "has factor=nan: factor must be a finite number, got nan"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}}, "has beta_fast=1, beta_slow=2: "),
        ({"rope_parameters": {"rope_theta": 1.0}}, "has rope_theta=1.0: rope_theta must be above 1.0, got 1.0"),
    ],
)  # fmt: skip
def test_windows_and_frequencies(values, message, tmp_path):
    assert message in says(copied("qwen2_sliding", tmp_path), **values)


TEXTS = {
    "": "is no JSON: ",
    "[1": "is no JSON: ",
    '{"n_layer": 2, "n_layer": 2}': "has the key 'n_layer' twice",
    '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}": "has lists or objects more than 64 deep",
    '{"x": ' + "[" * 70 + "]" * 70 + "}": "has lists or objects more than 64 deep",
    '{"x": ' + "1" * 5000 + "}": "has a whole number of 5000 digits, 11111111...",
    '{"x": 1e999}': "has a number beyond the largest float, 1e999",
    '{"x": "\\ud800"}': "has half of a character, a surrogate without its other half",
    "\ufeff{}": "is no JSON: ",
    '{"x": "' + "a" * 2**23 + '"}': "has more than the 8388608 bytes that are read of such a file",
}


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_config_that_is_no_json_of_ours(text, folder):
    (folder / "config.json").write_text(text)
    assert refused(folder).startswith(f"'{folder / 'config.json'}' {TEXTS[text]}")


# -- files that are no files -------------------------------------------------------------------------------------------


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def directory(path):
    path.unlink()
    path.mkdir()


def linked(target):
    def spoil(path):
        path.unlink()
        path.symlink_to(target)

    return spoil


def linked_out(path):
    shutil.move(path, path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


NO_FILES = {
    "pipe": (pipe, "is no regular file"),
    "directory": (directory, "is no regular file"),
    "device": (linked("/dev/zero"), "is a link to '/dev/zero', out of its folder"),
    "out": (linked_out, "out of its folder: put the file itself there"),
    "nothing": (linked("absent"), "is a link to a file that is not there"),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_only_regular_files_of_the_folder_are_opened(name, kind, folder):
    spoil, message = NO_FILES[kind]
    spoil(folder / name)
    error = refused(folder, Tokenizer.load if name.startswith("tokenizer") else models.build)
    assert error.startswith(f"'{folder / name}' ") and message in error


def test_a_link_to_itself(folder):
    linked("config.json")(folder / "config.json")
    assert refused(folder).startswith(f"'{folder / 'config.json'}' cannot be read: ")


def test_what_goes_along_with_a_model_is_no_link_out(folder, tmp_path):
    pretrained = models.load(folder)
    linked_out(folder / "tokenizer.json")
    with pytest.raises(ValueError, match="out of its folder"):
        models.save(tmp_path / "out", pretrained.model, pretrained.params, source=folder)


def test_a_snapshot_of_the_hub_has_links_to_its_own_blobs(folder, tmp_path):
    repository = tmp_path / "models--someone--model"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.move(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    assert models.build(snapshot).config.layers == 2
    assert Tokenizer.load(snapshot).encode("the")
    (tmp_path / "by_another_name").symlink_to(snapshot)
    assert models.build(tmp_path / "by_another_name").config.layers == 2
    shutil.move(blobs, tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")  # which would make any folder of the machine one of blobs
    assert "out of its folder" in refused(snapshot)


# -- tensors -----------------------------------------------------------------------------------------------------------

GOOD = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
HEADERS = {
    "huge": (2**60, b"{}", "its header is of 1152921504606846976 bytes, more than the 33554432 that are read"),
    "text": (None, b"\xff\xfe", "its header is no text"),
    "list": (None, b"[]", "its header holds a list, expected an object"),
    "deep": (None, b"[" * 10**5, "its header has lists or objects more than 64 deep"),
    "twice": (None, b'{"a": 1, "a": 2}', "its header has the key 'a' twice"),
    "axes": (None, {"a": GOOD | {"shape": [1] * 999 + [4]}}, "its header gives 'a' 1000 axes, more than 32"),
    "negative": (None, {"a": GOOD | {"shape": [-4]}}, ""),
    "large": (None, {"a": GOOD | {"shape": [2**62, 2**62]}}, ""),
    "dtype": (None, {"a": GOOD | {"dtype": "F31"}}, ""),
    "outside": (None, {"a": GOOD | {"shape": [400], "data_offsets": [0, 1600]}}, ""),
    "overlapping": (None, {"a": GOOD, "b": GOOD}, ""),
    "backwards": (None, {"a": GOOD | {"data_offsets": [16, 0]}}, ""),
    "entry": (None, {"a": 3}, ""),
    "metadata": (None, {"a": GOOD, "__metadata__": {"a": 3}}, ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_of_tensors(kind, folder):
    length, header, message = HEADERS[kind]
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + b"\0" * 16)
    assert refused(folder).startswith(f"'{path}' is damaged or no safetensors file: {message}")


INDICES = [
    [], {}, {"weight_map": 3}, {"weight_map": {"a": 3}}, {"weight_map": {"a": "../model.safetensors"}},
    {"weight_map": {"a": "/etc/passwd"}}, {"weight_map": {"a": "model.safetensors.index.json"}},
    {"weight_map": {"a": "a\0.safetensors"}}, {"weight_map": {"a": ".."}}, {"weight_map": {"a": ["x"]}},
    {"weight_map": {"a": "absent.safetensors"}},
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indices_of_shards(index, tmp_path):
    folder = copied("gpt2_sharded", tmp_path)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert refused(folder).startswith(f"'{path}' ")


def test_a_tensor_in_two_shards(tmp_path):
    folder = copied("gpt2_sharded", tmp_path)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"].values()))
    shutil.copy(folder / first, folder / "copy.safetensors")
    index["weight_map"] |= {"a": "copy.safetensors"}
    path.write_text(json.dumps(index))
    assert "twice, in 'copy.safetensors' and in 'model-0" in refused(folder)


# -- tokenizers --------------------------------------------------------------------------------------------------------

TOKENIZERS = [
    ("tokenizer_config.json", {"tokenizer_class": []}), ("tokenizer_config.json", {"padding_side": 3}),
    ("tokenizer_config.json", {"additional_special_tokens": "<x>"}), ("tokenizer_config.json", {"bos_token": {}}),
    ("tokenizer_config.json", {"bos_token": {"content": "a", "lstrip": 3}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: "a"}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"4294967296": "a"}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"1": 3}}), ("special_tokens_map.json", {"eos_token": [3]}),
    ("added_tokens.json", {"a": True}), ("added_tokens.json", {"a": -1}), ("config.json", {"eos_token_id": "x"}),
    ("config.json", {"eos_token_id": 2**40}), ("config.json", {"pad_token_id": True}),
    ("config.json", {"model_type": 3}), ("tokenizer.json", {"model": {"type": "BPE"}}), ("tokenizer.json", {"model": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content"), TOKENIZERS, ids=[f"{name}{i}" for i, (name, _) in enumerate(TOKENIZERS)])
def test_files_of_tokenizers(name, content, folder):
    (folder / name).write_text(json.dumps(content))
    assert refused(folder, Tokenizer.load).startswith(f"'{folder / name}'")


def test_ids_of_a_tokenizer(folder):
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    vocabulary = whole["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    for number, message in (
        (0, f"'{path}' is damaged: it gives 1 tokens the id of another"),
        (2**32 - 1, f"the id {2**32 - 1}"),
    ):
        whole["model"]["vocab"] = vocabulary | {last: number}
        path.write_text(json.dumps(whole))
        assert message in refused(folder, Tokenizer.load)
    template = {"Sequence": {"id": "A", "type_id": 0}}
    token = {"SpecialToken": {"id": "<a>", "type_id": 0}}
    whole["model"]["vocab"] = vocabulary
    whole["post_processor"] = {
        "type": "TemplateProcessing", "single": [token, template], "pair": [token, template],
        "special_tokens": {"<a>": {"id": "<a>", "ids": [10**9], "tokens": ["<a>"]}},
    }  # fmt: skip
    path.write_text(json.dumps(whole))
    assert refused(folder, Tokenizer.load).endswith("puts the id 1000000000 around texts, and no token has it")


@pytest.mark.parametrize(
    "settings", [{"do_lower_case": "no"}, {"strip_accents": 3}, {"tokenize_chinese_chars": []}], ids=str
)
def test_settings_of_a_tokenizer_that_is_built(settings, tmp_path):
    folder = copied("tokenizers/bert", tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    message = refused(folder, Tokenizer.load)
    assert str(folder) in message and next(iter(settings)) in message


# -- constructors, and other files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GPT2Config(layers=0), "layers must be at least 1, got 0"),
        (lambda: GPT2Config(epsilon=NAN), "epsilon must be a finite number, got nan"),
        (lambda: GPT2Config(width=10**5000), "width must be at most 16777216, got a number of over 20 digits"),
        (lambda: GPT2Config(scan=1), "scan must be of type bool, got 1"),
        (lambda: GPT2Config(dropout=1.0), "dropout must be below 1.0, got 1.0"),
        (lambda: GPT2Config(dtype="int32"), "dtype must be the name of a floating-point dtype, got 'int32'"),
        (lambda: GPT2Config(nonlinearity=[]), r"nonlinearity=\[\] is not one of gelu, gelu_new, "),
        (lambda: BertConfig(heads=7), "width=768 is not a multiple of heads=7"),
        (lambda: BertConfig(types=0), "types must be at least 1, got 0"),
        (lambda: RobertaConfig(pad=50265), "pad=50265 is no token of vocab_size=50265"),
        (lambda: DebertaConfig(buckets=1), "buckets=1 cannot share out distances up to 512"),
        (lambda: DebertaConfig(terms=["c2p"]), r"terms must be of type tuple, got \['c2p'\]"),
        (lambda: ViTConfig(patch_size=0), "patch_size must be at least 1, got 0"),
        (lambda: CLIPTextConfig(end=49408), "end=49408 is no token of vocab_size=49408"),
        (lambda: CLIPConfig(temperature=1e9), "temperature must be at most 80.0, got 1000000000.0"),
        (lambda: CLIPConfig(text=3), "text must be of type CLIPTextConfig, got 3"),
        (lambda: LlamaConfig(rope=3), "rope must be of type Default or Linear or Dynamic or Llama3 or Yarn, got 3"),
        (lambda: LlamaConfig(head_width=2, rope=Dynamic(2.0)), "head_width=2 is one pair"),
        (lambda: LlamaConfig(family="gpt"), "family='gpt' is not one of 'llama', 'mistral', 'qwen2', 'qwen3'"),
        (lambda: LlamaConfig(window=1, sliding=(1,) * 32), "is not True or False for each layer"),
        (lambda: Linear(-2.0), "factor must be at least 1.0, got -2.0"),
        (lambda: Llama3(8.0, 4.0, 4.0), "low_freq_factor=4.0 is not below high_freq_factor=4.0"),
        (lambda: Yarn(4.0, rope_theta=1.0), "rope_theta must be above 1.0, got 1.0"),
    ],
)
def test_constructors_check_what_they_are_given(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_configs_take():
    config = GPT2Config(dropout=0, epsilon=1, hidden=None)
    assert dataclasses.replace(config, layers=4096).layers == 4096
    assert Linear(2).factor == 2 and LlamaConfig(rope=Yarn(4, truncate=False)).rope.truncate is False


def test_files_of_llama2c(tmp_path):
    path = tmp_path / "model.bin"
    os.mkfifo(path)
    assert "is no regular file" in refused(path, llama2c.load)
    assert "is no regular file" in refused(path, llama2c.load_tokenizer)
    path.unlink()
    assert refused(path, llama2c.load) == f"there is no file '{path}'"
    path.write_bytes(llama2c.HEADER.pack(8, 8, 2**31 - 1, 2, 2, 8, 8))
    assert "layers must be at most 4096" in refused(path, llama2c.load)
    path.write_bytes(llama2c.HEADER.pack(2**20, 2**20, 4096, 2, 2, 2**30, 8))
    assert "it is cut off, or no checkpoint" in refused(path, llama2c.load)
    path.write_bytes(struct.pack("<ifi", 1, NAN, 0))
    assert refused(path, llama2c.load_tokenizer) == f"'{path}' gives token 0 the score nan"
    with pytest.raises(ValueError, match="is no regular file"):
        reading.read(tmp_path, 1)
