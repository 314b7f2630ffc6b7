"""Adapters by strangers: each file that is spoilt ends soon, in little memory, in an error that names it, or is read whole.

A new loader is one row of `LOADERS`. The spoilt files are made by hostile.py, from what the row writes.
"""

import errno
import functools
import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st

import jlora
from jlora import models
from jlora.interop import loralib, shards, tensor_file, torch_file, unpickle
from jlora.interop.tensor_file import Header
from jlora.models.tensors import leaf, linear
from tests import hostile
from tests.hostile import Loader

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="files of POSIX systems"),
]

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "golden" / "loralib.bin"
hypothesis.settings.register_profile("few", derandomize=True, deadline=None, database=None, max_examples=25)
FEW = hypothesis.settings.get_profile("few")
MANY = 300  # examples of the thorough tier

# -- something good, and who reads it ----------------------------------------------------------------------------------


def numbers(*shape: int) -> np.ndarray:
    return np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)


PEFT = {
    f"base_model.model.transformer.h.{layer}.attn.c_attn.lora_{part}.weight": numbers(*shape)
    for layer in range(2)
    for part, shape in {"A": (2, 8), "B": (24, 2)}.items()
}
CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "gpt2", "r": 2, "lora_alpha": 4, "target_modules": ["c_attn"],
    "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": True, "use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
    "modules_to_save": None, "init_lora_weights": True, "layers_to_transform": None, "auto_mapping": None, "peft_version": "0.21.2",
}  # fmt: skip
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
DIFFUSERS = {
    f"unet.{ATTENTION}.{layer}.lora_{part}.weight": numbers(*shape)
    for layer in ("to_q", "to_out.0")
    for part, shape in {"A": (2, 8), "B": (8, 2)}.items()
}
KOHYA = {
    f"lora_unet_{ATTENTION.replace('.', '_')}_to_q.{name}": value
    for name, value in {
        "lora_down.weight": numbers(2, 8).astype(np.float16),
        "lora_up.weight": numbers(8, 2).astype(np.float16),
        "alpha": np.float16(1),
    }.items()
}


def written(name: str, tensors, **metadata: str):
    def make(folder: Path) -> Path:
        safetensors.numpy.save_file({k: np.asarray(v) for k, v in tensors.items()}, folder / name, metadata)
        return folder / name

    return make


def peft_folder(folder: Path) -> Path:
    (folder / "adapter").mkdir()
    written("adapter_model.safetensors", PEFT, format="pt")(folder / "adapter")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder / "adapter"


def config(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG, indent=2))
    return folder / "adapter_config.json"


def pickled(folder: Path) -> Path:
    (folder / "adapter_model.bin").write_bytes(hostile.torch_file(PEFT))
    return folder / "adapter_model.bin"


def tiny(folder: Path) -> Path:
    (folder / "loralib.bin").write_bytes(TINY.read_bytes())
    return folder / "loralib.bin"


def loaded(file: Path, pickled: bool = False) -> dict[str, np.ndarray]:
    return tensor_file.open(file, pickled=pickled).read_all()


def folder(path: Path):
    """What every reader of PEFT's folders begins with."""
    config = tensor_file.read_config(path / "adapter_config.json")
    tensors = loaded(path / "adapter_model.safetensors")
    tensor_file.check_finite(path / "adapter_model.safetensors", tensors)
    return {"config": config, **tensors}


def arrays(found) -> list:
    return [leaf for leaf in jax.tree.leaves(found) if isinstance(leaf, np.ndarray | jax.Array)]


@functools.cache
def roberta():
    pretrained = models.load(ROOT / "tests" / "golden" / "models" / "roberta_sequence_classification")
    return pretrained.model, jlora.apply(
        pretrained.params, rank=3, alpha=6, targets="attn/(query|value)", extras="classifier"
    )


def gpt2_of_peft(path: Path, pickled: bool = False):
    """`jlora.peft.load` onto the kernels that its goods adapt, one (8, 24) per layer as GPT-2 keeps them."""
    params = {f"h_{layer}": {"kernel": np.ones((8, 24), np.float32)} for layer in range(2)}
    names = [leaf(f"h_{layer}/kernel", f"transformer.h.{layer}.attn.c_attn.weight") for layer in range(2)]
    return jlora.peft.load(path, params, names=names, pickled=pickled).factors


def unet(load, layers: tuple[str, ...]):
    """A loader of diffusion's files onto the projections that its goods adapt."""
    rows = [row for name in layers for row in linear(name, f"{ATTENTION}.{name}", bias=False)]
    params = {name: {"kernel": np.ones((8, 8), np.float32)} for name in layers}
    return lambda file: load(file, {"unet": params}, {"unet": rows})["unet"].factors


def shard(file: Path) -> dict[str, np.ndarray]:
    """A base's file, as `jlora merge` reads it."""
    found = shards.open_shard(file)
    with file.open("rb") as opened:
        return {entry.key: shards.read(opened, entry) for entry in found.entries}


def pickled_folder(folder: Path) -> Path:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(CONFIG))
    pickled(folder / "adapter")
    return folder / "adapter"


LOADERS = {
    row.name: row
    for row in (
        Loader("PEFT's tensors", written("adapter_model.safetensors", PEFT, format="pt"), loaded),
        Loader("Diffusers' tensors", written("pytorch_lora_weights.safetensors", DIFFUSERS, format="pt"), loaded),
        Loader("kohya's tensors", written("kohya.safetensors", KOHYA, ss_network_dim="2"), loaded),
        Loader("pickle", pickled, lambda file: loaded(file, pickled=True)),
        Loader("config", config, tensor_file.read_config),
        Loader("PEFT's folder", peft_folder, folder),
        Loader("jlora.peft's folder", peft_folder, gpt2_of_peft),
        Loader("jlora.peft's folder with a pickle", pickled_folder, lambda path: gpt2_of_peft(path, pickled=True)),
        Loader(
            "jlora.kohya", written("kohya.safetensors", KOHYA, ss_network_dim="2"), unet(jlora.kohya.load, ("to_q",))
        ),
        Loader(
            "jlora.diffusers",
            written("pytorch_lora_weights.safetensors", DIFFUSERS, format="pt"),
            unet(jlora.diffusers.load, ("to_q", "to_out.0")),
        ),
        Loader("shard of a checkpoint", written("model.safetensors", PEFT, format="pt"), shard),
        Loader("loralib", tiny, lambda file: loralib.load(file, *roberta(), pickled=True).factors),
    )
}
FOLDERS = [name for name in LOADERS if "folder" in name]
LARGE = {  # seconds: for one loader of each format
    "PEFT's tensors": hostile.large_headers, "pickle": hostile.large_pickles, "config": hostile.large_configs,
}  # fmt: skip


def formats(row: Loader, tmp_path: Path) -> dict[Path, str]:
    """What a row writes, and the files of it with their formats."""
    made = row.make(tmp_path)
    return {file: hostile.format_of(file.read_bytes()) for file in hostile.parts(made)}


# -- the corpus --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOADERS)
def test_what_is_good_is_read(name, tmp_path):
    row = LOADERS[name]
    made = row.make(tmp_path)
    size = sum(part.stat().st_size for part in hostile.parts(made))
    assert hostile.badly_formed(row.load(made), size) is None


@pytest.mark.parametrize("kind", sorted({kind for kinds in hostile.CORPUS.values() for kind in kinds}))
@pytest.mark.parametrize("name", LOADERS)
def test_spoilt_files_end_in_errors(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a pickle that is run would leave something here
    row = LOADERS[name]
    made = row.make(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    row.load(made)  # what is imported and compiled once is not the file's
    wrong = []
    for file in hostile.parts(made):
        mutate = hostile.CORPUS[hostile.format_of(file.read_bytes())].get(kind)
        if mutate:
            count, found = hostile.faults(row, made, file, mutate)
            assert count > 10
            wrong += found
    assert wrong == []
    assert {path.name for path in tmp_path.iterdir()} == before
    row.load(made)  # nothing of the spoilt ones stays


@pytest.mark.thorough("test_the_process_stays_small")
@pytest.mark.parametrize("name", LARGE)
def test_megabytes_of_header_take_little_memory(name, tmp_path):
    row = LOADERS[name]
    made = row.make(tmp_path)
    count, wrong = hostile.faults(row, made, made, LARGE[name])
    assert wrong == [] and count > 2


def test_the_corpus_is_large(tmp_path):
    corpus = set()
    for row in LOADERS.values():
        (tmp_path / row.name).mkdir()
        for file, form in formats(row, tmp_path / row.name).items():
            for kind, mutate in hostile.CORPUS[form].items():
                corpus |= {(form, kind, case.name, case.content) for case in mutate(file.read_bytes())}
    assert len(corpus) > 1000 and len({content for *_, content in corpus}) > 1000
    assert len({(form, kind, name) for form, kind, name, _ in corpus}) > 300
    assert {form for form, *_ in corpus} == set(hostile.CORPUS)


SPECIAL = {
    "pipe": lambda file, _: os.mkfifo(file),
    "folder": lambda file, _: file.mkdir(),
    "socket": lambda file, _: os.mknod(file, 0o140600),
    "link to nothing": lambda file, _: file.symlink_to("nothing"),
    "link to itself": lambda file, _: file.symlink_to(file.name),
    "link to a device": lambda file, _: file.symlink_to("/dev/zero"),
    "link out of the folder": lambda file, good: file.symlink_to(good),
    "link to a pipe": lambda file, _: (os.mkfifo(f"{file}.pipe"), file.symlink_to(f"{file.name}.pipe")),
    "ten terabytes of nothing": lambda file, _: (file.touch(), os.truncate(file, 10 * 2**40)),
    "ten terabytes behind a header": lambda file, good: (
        file.write_bytes(good.read_bytes()),
        os.truncate(file, 10 * 2**40),
    ),
}


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("name", LOADERS)
def test_what_is_no_regular_file_is_refused(name, special, tmp_path):
    row = LOADERS[name]
    (tmp_path / "in").mkdir()
    made = row.make(tmp_path / "in")
    for file in hostile.parts(made):
        elsewhere = tmp_path / f"{file.name}.good"
        file.rename(elsewhere)
        try:
            SPECIAL[special](file, elsewhere)
        except OSError as error:
            pytest.skip(f"not on this disk: {error}")
        case = hostile.Case(special, b"")
        with hostile.little_memory(0):
            assert hostile.fault(row, made, file, case) is None
        file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()
        elsewhere.rename(file)


@pytest.mark.parametrize("name", LOADERS)
def test_a_link_within_the_folder_or_to_the_hubs_blobs_is_followed(name, tmp_path):
    row = LOADERS[name]
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    for parent in (snapshot, blobs):
        parent.mkdir(parents=True)
    made = row.make(snapshot)
    plain = jax.tree.leaves(row.load(made))
    for number, file in enumerate(hostile.parts(made)):
        file.rename(blobs / f"{number}")
        file.symlink_to(blobs / f"{number}")
    assert len(plain) > 1
    jax.tree.map(np.testing.assert_array_equal, plain, jax.tree.leaves(row.load(made)))
    for number, file in enumerate(hostile.parts(made)):
        file.unlink()
        (blobs / f"{number}").rename(file.with_name(f"own-{number}"))
        file.symlink_to(f"own-{number}")
    row.load(made)


@pytest.mark.parametrize("name", FOLDERS)
def test_nothing_else_of_a_folder_is_read(name, tmp_path):
    """Whoever opened one of these would wait for ever. A config that names code is as good as one that names none."""
    row = LOADERS[name]
    made = row.make(tmp_path)
    clean = arrays(row.load(made))
    for bait in (
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt",
        "chat_template.jinja", "chat_template.json", "generation_config.json", "config.json", "README.md", "adapter_model.bin", "modeling.py", "__init__.py",
        "pytorch_model.bin", "training_args.bin", "optimizer.pt", "setup.py", "requirements.txt",
    ):  # fmt: skip
        if not (made / bait).exists():
            os.mkfifo(made / bait)
    for file in hostile.parts(made):
        if file.suffix == ".json" and file.is_file():
            named = {"auto_mapping": {"base_model_class": "Popen", "parent_library": "subprocess"}}
            file.write_text(json.dumps({**json.loads(file.read_text()), **named}))
    with hostile.guarded():
        found = arrays(row.load(made))
    for ours, theirs in zip(found, clean, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_process_stays_small(tmp_path):
    """What tracemalloc does not see: the largest cases, in a process of their own, by its resident memory."""
    program = """
import resource, sys
from pathlib import Path
from tests import hostile
from tests.test_hostile_files import LARGE, LOADERS
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1 if sys.platform == "linux" else 1024)
for name, cases in LARGE.items():
    made = LOADERS[name].make(Path(sys.argv[1]))
    LOADERS[name].load(made)
    ready = peak()
    good = LOADERS[name].make(Path(sys.argv[1])).read_bytes()
    for case in cases(good):
        made.write_bytes(case.content)
        size = len(case.content)
        try:
            LOADERS[name].load(made)
        except ValueError:
            pass
        assert peak() - ready <= (size + hostile.MUCH) // 1024, (case.name, peak() - ready)
"""
    done = subprocess.run(
        (sys.executable, "-c", program, str(tmp_path)), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]


# -- at random ---------------------------------------------------------------------------------------------------------

SPLICES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), st.binary(max_size=12)), min_size=1, max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
SIZES = st.integers(-1, 5) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, -(2**63)])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*tensor_file.DTYPES, "X"]) | JSON,
        "shape": st.lists(SIZES, max_size=4) | JSON,
        "data_offsets": st.tuples(SIZES, SIZES) | st.tuples(st.just(0), st.integers(0, 64)) | JSON,
    }
)
STEPS = st.lists(
    st.sampled_from(
        [b"(", b"}", b")", b"t", b"u", b"s", b"\x85", b"\x86", b"\x87", b"N", b"\x88", b"R", b"Q", b"b", b"\x93", b"\x94", b"0", b"2", b"]", b"e", b".",
         hostile.text("x"), hostile.text("storage"), hostile.text("os"), hostile.text("system"), hostile.whole(4), hostile.whole(2**62), hostile.ORDERED,
         hostile.named("torch", "FloatStorage"), hostile.named("collections", "OrderedDict"), hostile.named("torch._utils", "_rebuild_tensor_v2"),
         hostile.named("torch._utils", "_rebuild_parameter"), hostile.storage(), hostile.tensor(hostile.storage()), b"h\0", b"q\0", b"h\1", b"r\xff\xff\xff\x7f"]
    )
    | st.binary(max_size=4),
    max_size=30,
)  # fmt: skip


def splices(name: str, tmp_path: Path, examples: int) -> None:
    row = LOADERS[name]
    made = row.make(tmp_path)
    good = {file: file.read_bytes() for file in hostile.parts(made)}
    row.load(made)

    @hypothesis.settings(FEW, max_examples=examples)
    @hypothesis.given(st.sampled_from(sorted(good)), SPLICES)
    def check(file, edits):
        content = good[file]
        for at, lost, added in edits:
            place = int(at * len(content))
            content = content[:place] + added + content[place + lost :]
        file.write_bytes(content)
        assert hostile.fault(row, made, file, hostile.Case("", content, wrong=False)) is None
        file.write_bytes(good[file])

    check()


@pytest.mark.parametrize("name", LOADERS)
def test_splices(name, tmp_path):
    splices(name, tmp_path, FEW.max_examples)


@pytest.mark.thorough("test_splices")
@pytest.mark.parametrize("name", LOADERS)
def test_many_splices(name, tmp_path):
    splices(name, tmp_path, MANY)


def headers(tmp_path: Path, examples: int) -> None:
    @hypothesis.settings(FEW, max_examples=examples)
    @hypothesis.given(st.dictionaries(st.text(max_size=8), ENTRY | JSON, max_size=3), JSON, st.binary(max_size=64))
    def check(entries, metadata, data):
        file = tmp_path / "x.safetensors"
        header = {**entries, "__metadata__": metadata} if metadata is not None else entries
        file.write_bytes(hostile.with_header(header, data))
        row = Loader("", lambda folder: file, loaded)
        assert hostile.fault(row, file, file, hostile.Case("", b"", wrong=False)) is None

    check()


def test_headers(tmp_path):
    headers(tmp_path, 2 * FEW.max_examples)


@pytest.mark.thorough("test_headers")
def test_many_headers(tmp_path):
    headers(tmp_path, 2 * MANY)


def pickles(tmp_path: Path, examples: int) -> None:
    @hypothesis.settings(FEW, max_examples=examples)
    @hypothesis.given(STEPS)
    def check(steps):
        content = b"\x80\2" + b"".join(steps) + b"."
        file = tmp_path / "x.bin"
        file.write_bytes(hostile.zip_of({"archive/data.pkl": content, "archive/data/0": bytes(16)}))
        row = Loader("", lambda folder: file, torch_file.read)
        assert hostile.fault(row, file, file, hostile.Case("", b"", wrong=False)) is None
        try:
            made = unpickle.load(content)
        except ValueError:
            return
        assert isinstance(made, dict | tuple | str | int | np.dtype | None)

    check()


def test_pickles(tmp_path):
    pickles(tmp_path, 4 * FEW.max_examples)


@pytest.mark.thorough("test_pickles")
def test_many_pickles(tmp_path):
    pickles(tmp_path, 4 * MANY)


DTYPES = sorted(tensor_file.DTYPES)
ARRAYS = st.builds(
    lambda dtype, shape, seed: np.random.default_rng(seed).integers(0, 2, shape).astype(tensor_file.DTYPES[dtype]),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=4),
    st.integers(0, 2**32 - 1),
)
NAMES = st.text(st.characters(categories=("L", "N"), include_characters="._-"), min_size=1, max_size=20)


def round_trips(tmp_path: Path, examples: int) -> None:
    @hypothesis.settings(FEW, max_examples=examples)
    @hypothesis.given(
        st.dictionaries(NAMES, ARRAYS, max_size=4),
        st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=2),
    )
    def check(tensors, metadata):
        tensor_file.write(tmp_path / "x.safetensors", tensors, metadata, force=True)
        with tensor_file.open(tmp_path / "x.safetensors") as opened:
            assert opened.metadata == metadata
            found = opened.read_all()
        assert set(found) == set(tensors)
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and found[name].flags.writeable
            np.testing.assert_array_equal(found[name], tensor)

    check()


def test_round_trips(tmp_path):
    round_trips(tmp_path, FEW.max_examples)


@pytest.mark.thorough("test_round_trips")
def test_many_round_trips(tmp_path):
    round_trips(tmp_path, MANY)


# -- tensor_file -------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path) -> Path:
    return written("x.safetensors", PEFT, format="pt", note="a")(tmp_path)


def test_the_header_is_known_before_a_tensor_is_read(tmp_path):
    big = tmp_path / "big.safetensors"
    entries = {
        name: {"dtype": "F32", "shape": [2**26], "data_offsets": [i * 2**28, (i + 1) * 2**28]}
        for i, name in enumerate("ab")
    } | {"c": {"dtype": "BF16", "shape": [3], "data_offsets": [2**29, 2**29 + 6]}}
    big.write_bytes(hostile.with_header(entries, b""))
    size = big.stat().st_size
    os.truncate(big, size + 2**29 + 6)
    with hostile.little_memory(-hostile.MUCH + 2**20), tensor_file.open(big) as opened:
        assert opened.headers == {"a": Header((2**26,), "F32"), "b": Header((2**26,), "F32"), "c": Header((3,), "BF16")}
        assert opened.read("c").dtype == jnp.bfloat16
        assert opened.file == big and opened.metadata == {}


def test_what_safetensors_writes_is_read_and_the_other_way_round(tmp_path):
    tensors = {
        "b": np.asarray(jnp.arange(3, dtype=jnp.bfloat16)), "a": numbers(2, 3).T, "e": np.zeros((0, 3), np.float16), "s": np.float64(2), "i": np.arange(3),
        "?": np.array([True, False]),
    }  # fmt: skip
    tensor_file.write(tmp_path / "ours", tensors, {"format": "pt"})
    theirs = safetensors.numpy.load_file(tmp_path / "ours")
    safetensors.numpy.save_file(theirs, tmp_path / "theirs", {"format": "pt"})
    with tensor_file.open(tmp_path / "theirs") as opened, safetensors.safe_open(tmp_path / "ours", "np") as other:
        assert opened.metadata == other.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(opened.read(name), tensor)
            np.testing.assert_array_equal(other.get_tensor(name), tensor)
            assert opened.headers[name].shape == np.shape(tensor)


def test_tensors_of_a_pickle(tmp_path):
    (tmp_path / "x.bin").write_bytes(TINY.read_bytes())
    with tensor_file.open(tmp_path / "x.bin", pickled=True) as opened:
        assert opened.metadata == {} and opened.headers["classifier.dense.bias"] == Header((16,), "BF16")
        tensors = opened.read_all()
    for name, tensor in torch_file.read(TINY).items():
        np.testing.assert_array_equal(tensors[name], tensor)
        assert tensors[name].flags.writeable


def test_a_pickle_is_read_only_when_asked_for(tmp_path):
    for content in (TINY.read_bytes(), torch_file.LEGACY, pickle.dumps({"a": 1}), pickle.dumps([b"x" * 99], 2)):
        (tmp_path / "x.bin").write_bytes(content)
        with pytest.raises(
            ValueError, match="x.bin' is a pickle, .*: pickled=True reads it, without running what it says"
        ):
            tensor_file.open(tmp_path / "x.bin")
        if not content.startswith(torch_file.ZIP):
            with pytest.raises(
                ValueError, match="x.bin' is no file of tensors by torch.save, or is damaged: it is (no zip|a pickle)"
            ):
                tensor_file.open(tmp_path / "x.bin", pickled=True)
    header = '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "x").write_bytes(hostile.with_header(header.ljust(0x280), b"\1"))  # its length looks like a pickle
    assert loaded(tmp_path / "x") == {"a": [1]}


def test_what_is_asked_of_a_file(file):
    with pytest.raises(FileNotFoundError):
        tensor_file.open(file.with_name("absent"))
    with pytest.raises(ValueError, match="'gs://a/b' is no local folder"):
        tensor_file.open("gs://a/b")
    name = next(iter(PEFT))
    with tensor_file.open(str(file), pickled=True) as opened:
        assert opened.metadata == {"format": "pt", "note": "a"}
        with pytest.raises(ValueError, match=f"holds no tensor '{name[:-1]}', among 4; the closest are '{name}'"):
            opened.read(name[:-1])
        opened.read(name)[:] = 3  # memory of its own
        np.testing.assert_array_equal(opened.read(name), PEFT[name])
        os.truncate(file, file.stat().st_size - 1)
        with pytest.raises(ValueError, match=r"x.safetensors' has fewer bytes than its header says"):
            opened.read_all()
    with pytest.raises(ValueError, match=r"x.safetensors' is closed: read its tensors within the with statement"):
        opened.read(name)


def test_descriptors_are_closed(file, tmp_path):
    descriptors = lambda: len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    before = descriptors()
    (tmp_path / "bad").write_bytes(b"\0" * 100)
    for _ in range(5):
        loaded(file)
        with tensor_file.open(file):
            pass
        with pytest.raises(ValueError, match="bad"):
            tensor_file.open(tmp_path / "bad")
    assert descriptors() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [2**40, 2**40]}, r"gives 'a' the shape \(1099511627776, 1099511627776\), which no tensor has"),
        ({"shape": [1] * 33}, "gives 'a' 33 axes, more than 32"),
        ({"shape": [3]}, r"gives 'a', F32 of shape \[3\], 8 bytes, expected 12"),
        ({"shape": [-2]}, r"gives 'a' the shape \(-2,\), which no tensor has"),
        ({"dtype": "F4"}, "gives 'a' the dtype 'F4', expected one of F64, F32"),
        ({"data_offsets": [0, 10**13]}, "places 'a' in bytes 0 to 10000000000000 of 16"),
        ({"data_offsets": [-8, 0]}, "places 'a' in bytes -8 to 0 of 16"),
        ({"data_offsets": [8, 16]}, "places '(a|b)' in bytes 8 to 16, which leaves bytes before it to no tensor"),
        ({"data_offsets": [4, 12]}, "places 'a' in bytes 4 to 12, which leaves bytes before it to no tensor"),
    ],
    ids=str,
)
def test_messages(changes, message, tmp_path):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = {"a": {**entry, **changes}, "b": {**entry, "data_offsets": [8, 16]}}
    (tmp_path / "x").write_bytes(hostile.with_header(header, bytes(16)))
    with pytest.raises(ValueError, match=f"x' is damaged or no safetensors file: its header {message}"):
        tensor_file.open(tmp_path / "x")


def test_values_that_are_not_finite_are_named(file):
    tensor_file.check_finite(file, PEFT)
    tensor_file.check_finite(
        file, {"i": np.arange(3), "?": np.array([True]), "e": np.zeros((0, 2)), "b": np.ones(2, jnp.bfloat16)}
    )
    wrong = {"a": np.float32("nan"), "b": np.array([1, np.inf], jnp.bfloat16), "c": np.ones(2)}
    with pytest.raises(ValueError, match=r"x.safetensors' has values that are not finite, in 'a', 'b'"):
        tensor_file.check_finite(file, wrong)
    with pytest.raises(ValueError, match=r"in '0', .*'5' and 3 more"):
        tensor_file.check_finite(file, {str(i): np.float32("inf") for i in range(9)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"r": NaN}', "has a NaN or an infinity, which JSON has not"),
        ('{"a": [{"r": -Infinity}]}', "has a NaN or an infinity, which JSON has not"),
        ('{"r": 1, "r": 2}', "has the key 'r' twice"),
        ('{"r": 1e999}', "has a number beyond the largest float"),
        ("[1]", "holds a list, expected an object"),
        ('{"r": ' + "[" * 65 + "]" * 65 + "}", "has lists or objects more than 64 deep"),
        ('{"r": "' + "x" * 2**20 + '"}', "has more than the 1048576 bytes"),
    ],
    ids=range(7),
)
def test_configs_that_are_refused(text, message, tmp_path):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=f"adapter_config.json' {message}"):
        tensor_file.read_config(tmp_path / "adapter_config.json")


def test_a_config_is_read(tmp_path):
    assert tensor_file.read_config(config(tmp_path)) == CONFIG


# -- writing -----------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_only_by_force(file):
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match=r"x.safetensors' is there already: force=True replaces it"):
        tensor_file.write(file, {"a": numbers(2)}, {})
    assert file.read_bytes() == before
    tensor_file.write(file, {"a": numbers(2)}, {}, force=True)
    assert list(loaded(file)) == ["a"] and os.listdir(file.parent) == [file.name]


def test_a_file_that_appears_in_the_meantime_stays(tmp_path, monkeypatch):
    file, sync = tmp_path / "x.safetensors", os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (file.write_bytes(b"mine"), sync(descriptor)))
    with pytest.raises(FileExistsError, match="is there already"):
        tensor_file.write(file, {"a": numbers(2)}, {})
    assert file.read_bytes() == b"mine" and os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_a_full_disk_leaves_what_was_there(there, tmp_path):
    file = tmp_path / "x.safetensors"
    if there:
        tensor_file.write(file, {"a": numbers(2)}, {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as error:
            tensor_file.write(file, {"a": numbers(2**16)}, {}, force=there)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == [file.name] * there
    assert not there or loaded(file)["a"].shape == (2,)


def test_tensors_are_written_contiguous_and_unaliased(tmp_path):
    whole = numbers(4, 4)
    tensors = {
        "rows": whole[:2],
        "columns": whole[:, 1::2],
        "turned": whole.T,
        "same": whole,
        "big": whole.astype(">f4"),
    }
    tensor_file.write(tmp_path / "x", tensors, {})
    found = safetensors.numpy.load_file(tmp_path / "x")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
        assert found[name].dtype == np.float32
    header, data = hostile.header_of((tmp_path / "x").read_bytes())
    assert len(data) == sum(tensor.nbytes for tensor in tensors.values())
    assert len({entry["data_offsets"][0] for entry in header.values()}) == len(tensors)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"../x": numbers(1)}, {}, "names a tensor '../x', a path that leads elsewhere"),
        ({"": numbers(1)}, {}, "names a tensor with 0 characters"),
        ({3: numbers(1)}, {}, "names a tensor 3, expected a text"),
        ({"__metadata__": numbers(1)}, {}, "has '__metadata__' of dtype float32"),
        ({"x": np.array(["a"])}, {}, "has 'x' of dtype <U1, expected one of float64"),
        ({"x": np.array([None])}, {}, "has 'x' of dtype object"),
        ({"x": numbers(1)}, {"format": 1}, "metadata that is not all text"),
        ({"x": numbers(1)}, {"a": "x" * 2**24}, "a header of 16777[0-9]* bytes and 1 tensors, more than can be read"),
    ],
    ids=range(8),
)
def test_what_could_not_be_read_is_not_written(tensors, metadata, message, tmp_path):
    with pytest.raises(ValueError, match=f"x.safetensors' is not written: it {message}"):
        tensor_file.write(tmp_path / "x.safetensors", tensors, metadata)
    assert os.listdir(tmp_path) == []
