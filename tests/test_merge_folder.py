"""Adapters merged into checkpoint folders: numbers, names, layouts, memory, and all that can go wrong on the way."""

import errno
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jlora.interop import blocks, fit, formats, layer, merge_folder, shards
from jlora.interop.layer import Layer
from jlora.interop.merge_folder import merge_folder as merge

BF16 = np.dtype(jnp.bfloat16)
RNG = np.random.default_rng(0)


def values(*shape: int, dtype: np.dtype = np.float32) -> np.ndarray:
    return RNG.normal(size=shape).astype(dtype)


def lora(module: str, outputs: int, inputs: int, rank: int = 2, **more: np.ndarray) -> Layer:
    return Layer(module, "lora", {"A": values(rank, inputs), "B": values(outputs, rank), **more}, 0.5)


def write(folder: Path, *files: dict[str, np.ndarray], config: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    if len(files) == 1:
        save_file(files[0], folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        for name, tensors in zip(names, files, strict=True):
            save_file(tensors, folder / name, metadata={"format": "pt"})
        places = {key: name for name, tensors in zip(names, files, strict=True) for key in tensors}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": 1}, "weight_map": places})
        )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(folder: Path) -> dict[str, np.ndarray]:
    return {k: x for file in sorted(folder.glob("*.safetensors")) for k, x in load_file(file).items()}


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def model(blocks: int = 2, dtype: np.dtype = np.float32) -> dict[str, np.ndarray]:
    found = {"model.embed.weight": values(7, 4, dtype=dtype)}
    for i in range(blocks):
        found |= {
            f"model.layers.{i}.q.weight": values(6, 4, dtype=dtype),
            f"model.layers.{i}.o.weight": values(4, 6, dtype=dtype),
        }
    return found


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tensors = model()
    first = {k: x for k, x in tensors.items() if ".1." not in k}
    return write(
        tmp_path / "base", first, {k: x for k, x in tensors.items() if k not in first}, config={"dtype": "float32"}
    )


ADAPTER = [lora("model.layers.0.q", 6, 4), lora("model.layers.1.o", 4, 6)]


def expected(tensors: dict[str, np.ndarray], layers: list[Layer]) -> dict[str, np.ndarray]:
    """NumPy's own sum."""
    found = {k: x.astype(np.float64) for k, x in tensors.items()}
    for one in layers:
        found[one.key] = found[one.key] + one.scale * one.tensors["B"].astype(np.float64) @ one.tensors["A"]
    return found


# -- what is written ---------------------------------------------------------------------------------------------------


def test_a_sharded_folder(base: Path, tmp_path: Path):
    (base / "tokenizer.json").write_text("{}")
    (base / "adapter_config.json").write_text("{}")
    (base / "README.md").write_text("of the base")
    before, start = hashes(base), read(base)
    report = merge(base, ADAPTER, tmp_path / "out")
    assert hashes(base) == before
    merged = read(tmp_path / "out")
    assert list(merged) == list(start)
    for key, value in expected(start, ADAPTER).items():
        np.testing.assert_allclose(merged[key], value, rtol=1e-6, atol=1e-6)
    assert [(row.key, row.kinds, row.dtype, row.rounding) for row in report.merged] == [
        ("model.layers.0.q.weight", ("lora",), "F32", 0.0), ("model.layers.1.o.weight", ("lora",), "F32", 0.0),
    ]  # fmt: skip
    update = 0.5 * ADAPTER[0].tensors["B"] @ ADAPTER[0].tensors["A"]
    change = np.linalg.norm(update) / np.linalg.norm(start["model.layers.0.q.weight"])
    assert report.merged[0].change == pytest.approx(change, rel=1e-5)
    assert (report.kept, report.shards, report.resumed, report.added, report.size) == (3, 2, 0, (), 4 * (28 + 4 * 24))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.json",
    ]  # fmt: skip
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": report.size} and set(index["weight_map"]) == set(start)
    with safe_open(tmp_path / "out" / "model-00001-of-00002.safetensors", "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert [path.name for path in tmp_path.iterdir()] == ["base", "out"] or len(list(tmp_path.iterdir())) == 2
    assert json.loads(json.dumps(report.to_json()))["merged"][0]["kinds"] == ["lora"]


def test_a_single_file_needs_no_config_and_may_have_any_name(tmp_path: Path):
    start = model()
    (tmp_path / "base").mkdir()
    save_file(start, tmp_path / "base" / "diffusion_pytorch_model.safetensors")
    merge(tmp_path / "base", ADAPTER, tmp_path / "deep" / "out")
    assert [path.name for path in (tmp_path / "deep" / "out").iterdir()] == ["diffusion_pytorch_model.safetensors"]
    np.testing.assert_allclose(read(tmp_path / "deep" / "out")["model.layers.0.q.weight"], expected(start, ADAPTER)["model.layers.0.q.weight"], rtol=1e-6, atol=1e-6)  # fmt: skip


@pytest.mark.parametrize(("dtype", "name"), [(BF16, "BF16"), (np.dtype(np.float16), "F16")])
def test_one_cast_and_what_it_loses(tmp_path: Path, dtype: np.dtype, name: str):
    start = model(dtype=dtype) | {"ids": np.arange(3), "model.layers.0.scale": np.float32(2) * np.ones(3, np.float32)}
    report = merge(write(tmp_path / "base", start), ADAPTER, tmp_path / "out")
    merged = read(tmp_path / "out")
    row, key = report.merged[0], "model.layers.0.q.weight"
    exact = layer.merged(ADAPTER[0], start[key])
    assert merged[key].dtype == dtype and row.dtype == name
    np.testing.assert_array_equal(merged[key], exact.astype(dtype))
    lost = np.linalg.norm(merged[key].astype(np.float32) - exact) / np.linalg.norm(
        exact - start[key].astype(np.float32)
    )
    assert row.rounding == pytest.approx(lost, rel=1e-4) and row.rounding > 0
    for kept in ("ids", "model.layers.0.scale", "model.embed.weight"):
        assert merged[kept].tobytes() == start[kept].tobytes() and merged[kept].dtype == start[kept].dtype


def test_another_dtype_is_of_all_floats_and_in_the_config(base: Path, tmp_path: Path):
    start = read(base)
    report = merge(base, ADAPTER, tmp_path / "out", dtype="bfloat16")
    merged = read(tmp_path / "out")
    assert {x.dtype for x in merged.values()} == {BF16} and report.size == 2 * (28 + 4 * 24)
    np.testing.assert_array_equal(merged["model.embed.weight"], start["model.embed.weight"].astype(BF16))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"dtype": "bfloat16"}
    with pytest.raises(ValueError, match="dtype='int8' is not one of float32, float16, bfloat16"):
        merge(base, ADAPTER, tmp_path / "other", dtype="int8")


def test_several_layers_of_one_tensor_are_applied_in_order(tmp_path: Path):
    start = {"a.weight": values(4, 4), "b.weight": values(3, 4)}
    layers = [lora("a", 4, 4), Layer("a", "ia3", {"l": values(4, 1)}), lora("b", 3, 4)]
    merge(write(tmp_path / "base", start), layers, tmp_path / "out")
    exact = layer.merged(layers[1], layer.merged(layers[0], start["a.weight"]))
    np.testing.assert_array_equal(read(tmp_path / "out")["a.weight"], exact)


def kinds() -> dict[str, list[Layer]]:
    low = lora("w", 12, 8)
    m = values(12)
    return {
        "lora": [low], "dora": [low._replace(tensors={**low.tensors, "magnitude": m})],
        "dora of columns": [low._replace(tensors={**low.tensors, "magnitude": m[:, None]})],
        "adalora": [Layer("w", "adalora", {"A": values(3, 8), "B": values(12, 3), "E": values(3, 1)}, 0.5)],
        "vera": [Layer("w", "vera", {"A": values(3, 20), "B": values(30, 3), "d": values(3), "b": values(12)})],
        "table": [Layer("w", "table", {"A": values(2, 12), "B": values(8, 2)}, 2.0)],
        "ia3 of outputs": [Layer("w", "ia3", {"l": values(12, 1)})], "ia3 of inputs": [Layer("w", "ia3", {"l": values(1, 8)})],
        "oft": [Layer("w", "oft", {"R": values(2, 6)})], "full": [Layer("w", "full", {"value": values(12, 8)})],
        "together": [low, Layer("w", "ia3", {"l": values(12, 1)})],
    }  # fmt: skip


@pytest.mark.parametrize("name", kinds())
def test_rows_apart_are_the_whole(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    layers, start = kinds()[name], {"w.weight": values(12, 8, dtype=BF16)}
    whole = merge(write(tmp_path / "base", start), layers, tmp_path / "whole", dtype="float32")
    monkeypatch.setattr(merge_folder, "ELEMENTS", 5 * 8)
    assert blocks.divisible(layers, (12, 8), "table" if name == "table" else "out_in")
    parts = merge(tmp_path / "base", layers, tmp_path / "parts", dtype="float32")
    one, other = (read(tmp_path / folder)["w.weight"] for folder in ("whole", "parts"))
    assert not np.array_equal(one, start["w.weight"])
    np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
    assert parts.merged[0].change == pytest.approx(whole.merged[0].change, rel=1e-5)


def test_what_needs_all_rows_has_them():
    m = np.ones((1, 4), np.float32)
    assert not blocks.divisible([lora("w", 6, 4, magnitude=m)], (6, 4), "out_in")
    assert not blocks.divisible([lora("w", 6, 4)], (4, 6), "in_out")
    tensors = {"w1": values(2, 2), "w2": values(3, 2)}
    assert not blocks.divisible([lora("w", 6, 4), Layer("w", "lokr", tensors)], (6, 4), "out_in")


def test_a_new_head_is_added_and_a_bias_that_is_not_there_left_out(base: Path, tmp_path: Path):
    head = Layer("score", "full", {"value": values(3, 4)})
    bias = Layer("model.layers.0.q", "ia3", {"l": values(6)}, parameter="bias", optional=True)
    report = merge(base, [*ADAPTER, head, bias], tmp_path / "out", dtype="float16")
    assert report.added == ("score.weight",)
    np.testing.assert_array_equal(read(tmp_path / "out")["score.weight"], head.tensors["value"].astype(np.float16))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["score.weight"] == "model-00002-of-00002.safetensors"


# -- names and layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.layers.0.q", "model.layers.0.q"), ("layers.0.q", "model.layers.0.q"), ("transformer.h.0.c", "h.0.c"),
        ("model.layers.0.q", "model.language_model.layers.0.q"), ("text_model.encoder.0.q", "encoder.0.q"),
    ],
)  # fmt: skip
def test_a_prefix_that_one_of_them_has(theirs: str, ours: str):
    placed, _ = fit.fitted([lora(theirs, 6, 4)], {f"{ours}.weight": (6, 4), "other.0.x.weight": (6, 4)})
    assert list(placed) == [f"{ours}.weight"]


def test_all_layers_have_one_change_of_prefix():
    shapes = dict.fromkeys(["a.h.0.q.weight", "b.h.0.q.weight", "b.h.1.q.weight"], (6, 4))
    layers = [lora("h.0.q", 6, 4), lora("h.1.q", 6, 4)]
    assert list(fit.fitted(layers, shapes)[0]) == ["b.h.0.q.weight", "b.h.1.q.weight"]
    with pytest.raises(ValueError, match=r"^'h.0.q.weight' of the adapter may be 'a.h.0.q.weight' or 'b.h.0.q.weight'"):
        fit.fitted(layers[:1], shapes)
    with pytest.raises(ValueError, match="are not in the base") as caught:
        fit.fitted([*layers, lora("h.2.q", 6, 4)], shapes)
    assert str(caught.value) == (
        "3 of the adapter's 3 tensors are not in the base: 'h.0.q.weight' (the closest is 'b.h.0.q.weight'), "
        "'h.1.q.weight' (the closest is 'b.h.1.q.weight'), 'h.2.q.weight' (the closest is 'b.h.1.q.weight'). "
        "Is it the base that the adapter was trained on?"
    )
    with pytest.raises(ValueError, match="the adapter holds nothing to merge"):
        fit.fitted([], shapes)


GPT2 = {
    "h.0.attn.c_attn.weight": (4, 12), "h.0.attn.c_attn.bias": (12,), "h.0.attn.c_proj.weight": (4, 4),
    "lm_head.weight": (9, 4), "q.weight": (4, 4),
}  # fmt: skip


def layouts(*layers: Layer, flag: bool | None = None) -> dict[str, str]:
    return fit.layouts({one.key: [one] for one in layers}, GPT2, flag)


def test_the_layout_of_a_square():
    square, alone = lora("h.0.attn.c_proj", 4, 4), lora("q", 4, 4)
    turned, straight = lora("h.0.attn.c_attn", 12, 4), lora("lm_head", 9, 4)
    assert layouts(turned, square) == {"h.0.attn.c_attn.weight": "in_out", "h.0.attn.c_proj.weight": "in_out"}
    assert layouts(square, flag=False) == {"h.0.attn.c_proj.weight": "in_out"}  # the bias beside it says so
    assert layouts(turned, straight, square, flag=False)["h.0.attn.c_proj.weight"] == "in_out"
    assert layouts(turned, straight, alone, flag=False)["q.weight"] == "out_in"
    assert layouts(turned, straight, alone, flag=True)["q.weight"] == "in_out"
    with pytest.raises(ValueError, match=r"^'q.weight' is square, .* put fan_in_fan_out into adapter_config.json$"):
        layouts(turned, straight, alone)
    with pytest.raises(
        ValueError, match=r"'lm_head.weight' has shape \(9, 4\), and the adapter was made for 9 outputs and 5 inputs"
    ):
        layouts(lora("lm_head", 9, 5))


def test_conv1d_is_merged_as_it_lies(tmp_path: Path):
    start = {"c.weight": values(4, 6), "d.weight": values(4, 4)}
    layers = [lora("c", 6, 4), lora("d", 4, 4)]
    merge(write(tmp_path / "base", start), layers, tmp_path / "out")
    merged = read(tmp_path / "out")
    for one in layers:
        update = 0.5 * (one.tensors["B"] @ one.tensors["A"]).T
        np.testing.assert_allclose(merged[one.key], start[one.key] + update, rtol=1e-5, atol=1e-6)


# -- a head that is the embedding --------------------------------------------------------------------------------------

EMBEDDING = "model.embed_tokens.weight"


def tied_base(folder: Path, *, config: dict | None, **more: np.ndarray) -> Path:
    start = {EMBEDDING: values(9, 4), "model.layers.0.q.weight": values(6, 4), **more}
    return write(folder, start, config=config)


def head(value: np.ndarray) -> Layer:
    return Layer("lm_head", "full", {"value": value})


CONFIGS = [
    {"tie_word_embeddings": True},
    {},
    {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}},
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("inside", [False, True], ids=["absent", "in the file as well"])
def test_a_trained_head_is_tied_no_longer(tmp_path: Path, config: dict, inside: bool):
    """transformers ties by the config, true being what an absent field means, and would drop the head."""
    more = {"lm_head.weight": values(9, 4)} if inside else {}
    base, mine = tied_base(tmp_path / "base", config=config, **more), values(9, 4)
    before, layers = hashes(base), [*ADAPTER[:1], head(mine)]
    dry = merge(base, layers, tmp_path / "out", dry_run=True)
    report = merge(base, layers, tmp_path / "out")
    assert hashes(base) == before
    assert report.notes == dry.notes == (
        "'lm_head.weight' is a tensor of its own: config.json gets tie_word_embeddings=false",
    )  # fmt: skip
    np.testing.assert_array_equal(read(tmp_path / "out")["lm_head.weight"], mine)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == json.loads(json.dumps(config | {"tie_word_embeddings": False}).replace("true", "false"))


def test_a_head_of_its_own_leaves_the_config(tmp_path: Path):
    base = tied_base(tmp_path / "base", config={"tie_word_embeddings": False}, **{"lm_head.weight": values(9, 4)})
    report = merge(base, [head(values(9, 4))], tmp_path / "out")
    assert report.notes == () and (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    bare = tied_base(tmp_path / "bare", config=None)
    report = merge(bare, [*ADAPTER[:1], head(values(9, 4))], tmp_path / "other")
    assert report.notes == ("'lm_head.weight' is added: there is no config.json to say that it is not the embedding",)


def test_a_trained_head_is_refused_where_it_is_to_stay_tied(tmp_path: Path):
    base = tied_base(tmp_path / "base", config=CONFIGS[0])
    for layers in ([*ADAPTER[:1], head(values(9, 4))], [head(values(9, 4))], [*ADAPTER[:1], head(values(8, 4))]):
        with pytest.raises(
            ValueError, match=r"^'lm_head.weight' of the adapter differs from the embedding 'model.embed_"
        ):
            merge(base, layers, tmp_path / "out", tied=True)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("elements", [merge_folder.ELEMENTS, 12])
@pytest.mark.parametrize("case", ["of the base", "trained alike", "merged", "before the factors"])
def test_a_head_that_is_the_embedding_stays_one(
    tmp_path: Path, tied: bool, elements: int, case: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(merge_folder, "ELEMENTS", elements)
    base = tied_base(tmp_path / "base", config=CONFIGS[0])
    start, new = read(base)[EMBEDDING], values(9, 4)
    factors = Layer("model.embed_tokens", "table", {"A": values(2, 9), "B": values(4, 2)})
    whole = Layer("model.embed_tokens", "full", {"value": new})
    layers, value = {
        "of the base": ([], start), "trained alike": ([whole], new),
        "merged": ([factors], layer.merged(factors, start, "table")), "before the factors": ([factors, whole], new),
    }[case]  # fmt: skip
    report = merge(base, [*ADAPTER[:1], *layers, head(value)], tmp_path / "out", tied=tied)
    assert "lm_head.weight" not in read(tmp_path / "out") and report.added == ()
    assert f"'lm_head.weight' of the adapter is the embedding '{EMBEDDING}': they stay one tensor" in report.notes
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    for place in (0, -1):  # in the first rows alone, or the last
        wrong = value.copy()
        wrong[place, place] += 1
        report = merge(base, [*ADAPTER[:1], *layers, head(wrong)], tmp_path / f"wrong{place}")
        assert report.added == ("lm_head.weight",) and "both change" not in "".join(report.notes)


def test_a_head_that_is_half_of_each_is_no_embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(merge_folder, "ELEMENTS", 12)  # three rows at a time
    base = tied_base(tmp_path / "base", config=CONFIGS[0])
    factors = Layer("model.embed_tokens", "table", {"A": values(2, 9), "B": values(4, 2)})
    mixed = layer.merged(factors, read(base)[EMBEDDING], "table")
    mixed[6:] = read(base)[EMBEDDING][6:]
    report = merge(base, [*ADAPTER[:1], factors, head(mixed)], tmp_path / "out")
    assert report.added == ("lm_head.weight",)


# -- interrupted, refused ----------------------------------------------------------------------------------------------


class Stop(BaseException):
    """A kill."""


def stop_at(key: str):
    def progress(done: int, whole: int, name: str) -> None:
        if name == key:
            raise Stop

    return progress


def test_a_killed_run_goes_on(base: Path, tmp_path: Path):
    merge(base, ADAPTER, tmp_path / "whole")
    with pytest.raises(Stop):
        merge(base, ADAPTER, tmp_path / "out", progress=stop_at("model.layers.1.q.weight"))
    left = tmp_path / ".out.merging"
    assert not (tmp_path / "out").exists()
    assert sorted(p.name for p in left.iterdir()) == ["merging.json", "model-00001-of-00002.safetensors"]
    seen = []
    report = merge(base, ADAPTER, tmp_path / "out", progress=lambda done, whole, key: seen.append((done, whole, key)))
    assert report.resumed == 1 and [key for _, _, key in seen] == [
        "model.layers.1.o.weight",
        "model.layers.1.q.weight",
        "",
    ]
    assert seen[0][0] == 4 * (28 + 2 * 24) and seen[-1][0] == seen[-1][1] == report.size
    assert len(report.merged) == 2 and not left.exists()
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def change_adapter(base: Path, left: Path) -> list[Layer]:
    return [ADAPTER[0]._replace(scale=0.25), ADAPTER[1]]


def change_base(base: Path, left: Path) -> list[Layer]:
    file = base / "model-00002-of-00002.safetensors"
    save_file({key: x + 1 for key, x in load_file(file).items()}, file, metadata={"format": "pt"})
    return ADAPTER


def change_factors(base: Path, left: Path) -> list[Layer]:
    tensors = ADAPTER[1].tensors
    return [ADAPTER[0], ADAPTER[1]._replace(tensors={**tensors, "A": tensors["A"] + 1})]


def spoil(base: Path, left: Path) -> list[Layer]:
    file = left / "model-00001-of-00002.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return ADAPTER


def spoil_state(base: Path, left: Path) -> list[Layer]:
    (left / "merging.json").write_text("{")
    (left / "stray.safetensors").write_bytes(b"")
    return ADAPTER


@pytest.mark.parametrize("change", [change_adapter, change_factors, change_base, spoil, spoil_state])
def test_what_is_left_of_another_merge_is_not_used(base: Path, tmp_path: Path, change):
    with pytest.raises(Stop):
        merge(base, ADAPTER, tmp_path / "out", progress=stop_at("model.layers.1.q.weight"))
    layers = change(base, tmp_path / ".out.merging")
    assert merge(base, layers, tmp_path / "out").resumed == 0
    merge(base, layers, tmp_path / "whole")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_full_disk_leaves_what_was_there(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    merge(base, [ADAPTER[0]], tmp_path / "out")
    before = hashes(tmp_path / "out")
    count = 0

    def full(out, content):
        nonlocal count
        count += 1
        if count > limit:
            raise OSError(errno.ENOSPC, "No space left on device")
        out.write(content)

    monkeypatch.setattr(shards, "_write", full)
    limit = 2
    with pytest.raises(OSError, match="nothing was written: make room and run it again"):
        merge(base, ADAPTER, tmp_path / "out", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"] and hashes(tmp_path / "out") == before
    count, limit = 0, 5
    with pytest.raises(OSError, match=r"1 of 2 files are done and kept in '.*\.out\.merging': make room"):
        merge(base, ADAPTER, tmp_path / "out", force=True)
    assert hashes(tmp_path / "out") == before
    limit = 100
    assert merge(base, ADAPTER, tmp_path / "out", force=True).resumed == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"] and hashes(tmp_path / "out") != before


def test_the_room_is_known_before(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(merge_folder.shutil, "disk_usage", lambda path: type("U", (), {"free": 100})())
    with pytest.raises(OSError, match=r"the disk is full \(496 bytes are to be written, and 100 are free\)"):
        merge(base, ADAPTER, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_dry_run_writes_nothing(base: Path, tmp_path: Path):
    report = merge(base, ADAPTER, tmp_path / "out", dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert [row.key for row in report.merged] == ["model.layers.0.q.weight", "model.layers.1.o.weight"]


def test_nothing_is_replaced_without_force(base: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    merge(base, [ADAPTER[0]], out)  # an empty folder is none
    before = hashes(out)
    with pytest.raises(FileExistsError, match="'.*out' is there: name another folder, or pass --force"):
        merge(base, ADAPTER, out)
    assert hashes(out) == before
    merge(base, ADAPTER, out, force=True)
    assert hashes(out) != before and sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match=r"'.*home' is no checkpoint that could be replaced: it holds letter.txt"):
        merge(base, ADAPTER, tmp_path / "home", force=True)
    for path in (base, tmp_path):
        with pytest.raises(ValueError, match="is the base, or holds it: name another folder"):
            merge(base, ADAPTER, path, force=True)


def test_bad_bases(base: Path, tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*nowhere'"):
        merge(tmp_path / "nowhere", ADAPTER, out)
    with pytest.raises(ValueError, match=r"'.*config.json' is a file: name the folder of the checkpoint"):
        merge(base / "config.json", ADAPTER, out)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no \*.safetensors in it; pytorch_model.bin is a pickle"):
        merge(tmp_path / "pickled", ADAPTER, out)
    (base / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(ValueError, match=r"is quantised \(gptq\): merge into the model before it was quantised"):
        merge(base, ADAPTER, out)
    (base / "config.json").unlink()
    (base / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names files that are missing: model-00002-of-00002.safetensors"):
        merge(base, ADAPTER, out)
    (base / "model.safetensors.index.json").unlink()
    save_file({"x": np.ones(1, np.int8)}, base / "second.safetensors")
    with pytest.raises(ValueError, match=r"holds 2 files of tensors .* and no \*.safetensors.index.json"):
        merge(base, ADAPTER, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (lambda x: x[:-1], "its header places 'model.layers.0.q.weight' in bytes 208 to 304 of 303"),
        (lambda x: x + b"?", "its header leaves the last 1 bytes to no tensor"),
        (lambda x: x[:5], "it has 5 bytes"),
        (lambda x: b"\xff" * 8 + x[8:], "a header of 18446744073709551615 bytes in a file of 584"),
        (lambda x: x.replace(b'"F32"', b'"F33"'), "the dtype 'F33', expected one of F64, F32"),
        (lambda x: x.replace(b"[6,4]", b"[6,5]"), "F32 of shape [6, 5], 96 bytes, expected 120"),
        (lambda x: x[:9] + b"?" + x[10:], "its header is no JSON"),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path: Path, content, error: str):
    file = write(tmp_path / "base", model(1)) / "model.safetensors"
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(
        ValueError, match=re.escape(f"'{file}' is damaged or no safetensors file: ") + f".*{re.escape(error)}"
    ):
        merge(tmp_path / "base", ADAPTER[:1], tmp_path / "out")


def test_values_that_cannot_be(tmp_path: Path):
    start = {"w.weight": np.full((6, 4), 6e4, np.float16), "i.weight": np.ones((6, 4), np.int8)}
    base = write(tmp_path / "base", start)
    big = lora("w", 6, 4)._replace(scale=1e5)
    with pytest.raises(ValueError, match=r"'w.weight' reaches .*, beyond float16: pass dtype bfloat16 or float32"):
        merge(base, [big], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    with pytest.raises(ValueError, match="'i.weight' is of I8, and an adapter is merged into F64, F32, F16, BF16"):
        merge(base, [lora("i", 6, 4)], tmp_path / "out")
    big.tensors["A"][0, 0] = np.nan
    with pytest.raises(ValueError, match="'w.weight' of the adapter has values in 'A' that are not finite"):
        merge(base, [big], tmp_path / "out")


def test_two_at_once(base: Path, tmp_path: Path):
    def second(done: int, whole: int, key: str) -> None:
        with pytest.raises(ValueError, match=r"'.*\.out\.merging' is in use by this process"):
            merge(base, ADAPTER, tmp_path / "out")

    merge(base, ADAPTER, tmp_path / "out", progress=second)
    assert (tmp_path / "out").exists()


# -- memory ------------------------------------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
import numpy as np
from jlora.interop.layer import Layer
from jlora.interop.merge_folder import merge_folder
def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
base, out, count, rows = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
a, b = np.ones((4, 512), np.float32), np.ones((rows, 4), np.float32)
layers = [Layer(f"m.{i}.{j}", "lora", {"A": a, "B": b}) for i in range(count) for j in range(8)]
np.ones((64, 64)) @ np.ones((64, 64))
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
merge_folder(base, layers, out)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
def test_it_takes_the_memory_of_a_shard(tmp_path: Path):
    """10 files of 8 tensors and 8 MB, holes but for their headers."""
    count, rows = 10, 1024
    shard = 8 * 2 * rows * 512
    base = tmp_path / "base"
    base.mkdir()
    for i in range(count):
        head = shards.header([(f"m.{i}.{j}.weight", "BF16", (rows, 512)) for j in range(8)], {"format": "pt"})
        with (base / f"model-{i}.safetensors").open("wb") as file:
            file.write(head)
            file.truncate(len(head) + shard)
    places = {f"m.{i}.{j}.weight": f"model-{i}.safetensors" for i in range(count) for j in range(8)}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    command = [sys.executable, "-c", CHILD, str(base), str(tmp_path / "out"), str(count), str(rows)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 2 * shard, grown
    first = load_file(tmp_path / "out" / "model-3.safetensors")["m.3.7.weight"]
    assert first.dtype == BF16 and (first == 4).all()


# -- PEFT's numbers ----------------------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "golden"
REFUSED = {
    "oft_coft": "coft",
    "oft_shared": "block_share",
    "oft_embedding": "OFT turns",
    "vera_drawn": "VeRA without its projections",
}


def merged_rows() -> list[Path]:
    found = [file.parent for file in sorted((GOLDEN / "peft").glob("*/outputs.npz"))]
    return [row for row in found if any(name.startswith("merged/") for name in np.load(row / "outputs.npz").files)]


@pytest.mark.parametrize("row", merged_rows(), ids=lambda row: row.name)
def test_the_numbers_of_peft(row: Path, tmp_path: Path):
    """Every adapter that PEFT merged, against the arrays that it had afterwards; float32, so within some roundings."""
    name = (json.loads((row / "adapter_config.json").read_text()).get("base_model_name_or_path") or "net").split("/")[
        -1
    ]
    base = next(f for f in (GOLDEN / "peft" / "bases" / name, GOLDEN / "models" / name) if f.exists())
    if row.name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[row.name]):
            formats.open_adapter(row, base)
        return
    opened = formats.open_adapter(row, base, pickled=True)
    merge(base, opened.layers, tmp_path / "out", fan_in_fan_out=opened.fan_in_fan_out, tied=True)
    merged, outputs = read(tmp_path / "out"), np.load(row / "outputs.npz")
    aliases, table = fit.aliases(base, merged), fit.embedding_of({key: x.shape for key, x in merged.items()})
    for key in (name.removeprefix("merged/") for name in outputs.files if name.startswith("merged/")):
        names = {key, aliases.get(key, key), table if key == "lm_head.weight" else key}
        (found,) = [
            x
            for there, x in merged.items()
            if any(there == n or there.endswith(f".{n}") or n.endswith(f".{there}") for n in names)
        ]
        np.testing.assert_allclose(found, outputs[f"merged/{key}"], rtol=1e-5, atol=2e-5)


def test_there_are_many():
    assert len(merged_rows()) > 100
