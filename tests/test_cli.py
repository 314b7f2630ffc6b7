"""The command `jlora`: each command's good path, its JSON, its dry run, and what it says of bad input, in one line."""

import errno
import hashlib
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jlora.cli import main, run
from jlora.interop import pipeline_files, shards
from tests.pipelines import normal, small

GOLDEN = Path(__file__).parent / "golden"
PEFT, GPT2, LLAMA = GOLDEN / "peft", GOLDEN / "models" / "gpt2_causal_lm", GOLDEN / "models" / "llama2_causal_lm"
LORA = PEFT / "lora"


@pytest.fixture
def jlora(capsys: pytest.CaptureFixture):
    """Runs the command: its status, what it printed, and its one line of error."""

    def call(*arguments: object, status: int = 0) -> str:
        found = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert found == status, (found, out, err)
        if status == 2:
            assert out == "" and err.count("\n") == 1 and err.endswith("\n"), err
            return err.rstrip("\n")
        return out

    return call


@pytest.fixture
def parsed(jlora):
    return lambda *arguments, status=0: json.loads(jlora(*arguments, "--json", status=status))


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion of 8 channels, attention and its convolutions alone."""
    folder = tmp_path_factory.mktemp("sd")
    (folder / "model_index.json").write_text("{}")
    models = small("sd15", lambda key: "down_blocks.0" in key or "encoder.layers.0." in key or "conv_in" in key)
    for component, shapes in models.items():
        (folder / component).mkdir()
        save_file({k: normal(s) for k, s in shapes.items()}, folder / component / "model.safetensors")
    return folder


Q = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TE = "text_model_encoder_layers_0_self_attn_q_proj"


@pytest.fixture
def kohya(pipeline: Path, tmp_path: Path) -> Path:
    width = load_file(pipeline / "text_encoder" / "model.safetensors")[
        "encoder.layers.0.self_attn.q_proj.weight"
    ].shape[0]
    tensors = {}
    for name, n in ((f"lora_unet_{Q}", 8), (f"lora_te_{TE}", width)):
        tensors |= {
            f"{name}.lora_down.weight": normal((2, n), 1),
            f"{name}.lora_up.weight": normal((n, 2), 2),
            f"{name}.alpha": np.float32(1),
        }
    save_file(
        {k: np.asarray(x) for k, x in tensors.items()},
        tmp_path / "style.safetensors",
        metadata={"ss_sd_model_name": "sd15"},
    )
    return tmp_path / "style.safetensors"


# -- help --------------------------------------------------------------------------------------------------------------

COMMANDS = ("inspect", "merge", "convert", "combine", "extract", "count", "plan", "verify", "card", "push", "pull")
WRITES = ("merge", "convert", "combine", "extract", "card", "push", "pull")


def test_help(jlora):
    text = jlora()
    assert all(f"\n  {name} " in text for name in COMMANDS) and "--install-completion" in text
    assert jlora("--help") == text == jlora("-h")
    assert jlora("--version").strip() == __import__("jlora").__version__


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each(jlora, name: str):
    text = jlora(name, "--help")
    assert f"Example: jlora {name} " in text and "--json" in text
    assert ("--dry-run" in text) == (name in WRITES)
    assert ("--force" in text) == (name in WRITES and name != "push")


def test_a_process_of_its_own():
    found = subprocess.run([sys.executable, "-m", "jlora.cli", "inspect", "nowhere"], capture_output=True, text=True)
    assert found.returncode == 2 and found.stderr.startswith("jlora inspect: there is no 'nowhere'")


# -- inspect -----------------------------------------------------------------------------------------------------------


def test_inspect_an_adapter(jlora, parsed):
    report = parsed("inspect", LORA)
    assert {name: report[name] for name in ("format", "method", "base", "layers", "parameters", "ranks", "finite")} == {
        "format": "peft", "method": "LoRA", "base": "tiny/gpt2_causal_lm", "layers": 2, "parameters": 384, "ranks": {"3": 2},
        "finite": True,
    }  # fmt: skip
    tensors = load_file(LORA / "adapter_model.safetensors")
    row = report["modules"][1]
    start = "base_model.model.transformer.h.1.attn.c_attn.lora_"
    update = 5 / 3 * tensors[f"{start}B.weight"] @ tensors[f"{start}A.weight"]
    singular = np.linalg.svd(update, compute_uv=False)[:3]
    assert row["module"] == "transformer.h.1.attn.c_attn" and row["scale"] == pytest.approx(5 / 3)
    np.testing.assert_allclose(row["singular"], singular, rtol=1e-4)
    assert row["norm"] == pytest.approx(np.linalg.norm(update), rel=1e-5) and row["largest"] == pytest.approx(
        singular[0], rel=1e-5
    )
    assert row["stable_rank"] == pytest.approx((np.linalg.norm(update) / singular[0]) ** 2, rel=1e-4)
    text = jlora("inspect", LORA)
    assert (
        text.startswith(f"{LORA}: LoRA, format peft\n384 parameters in 2 layers")
        and "transformer.h.*.attn.c_attn" in text
    )
    assert "transformer.h.1.attn.c_attn" in jlora("inspect", LORA, "--all")


@pytest.mark.parametrize(
    ("row", "method", "kind"),
    [
        ("dora", "LoRA + DoRA", "lora"), ("rslora", "rsLoRA", "lora"), ("ia3", "(IA)^3", "ia3"), ("loha", "LoHa", "loha"), ("lokr", "LoKr", "lokr"),
        ("vera", "VeRA", "vera"), ("adalora", "AdaLoRA", "adalora"), ("oft", "OFT", "oft"), ("embedding", "LoRA", "table"), ("pissa", "LoRA + pissa", "pissa"),
    ],
)  # fmt: skip
def test_inspect_each_method(parsed, row: str, method: str, kind: str):
    report = parsed("inspect", PEFT / row)
    assert report["method"] == method and kind in {module["kind"] for module in report["modules"]}


def test_inspect_other_things(jlora, parsed, kohya: Path, pipeline: Path):
    report = parsed("inspect", GPT2)
    assert (report["format"], report["model_type"], report["jlora"], report["files"]) == ("checkpoint", "gpt2", True, 1)
    assert report["parameters"] == sum(x.size for x in load_file(GPT2 / "model.safetensors").values()) and report[
        "dtypes"
    ].keys() == {"F32"}
    assert "transformer.h.*.attn.c_attn.weight  " in jlora("inspect", GPT2)
    report = parsed("inspect", kohya)
    assert (report["format"], report["method"], report["base"]) == ("kohya", "LoRA", "sd15")
    assert report["scales"] == {"0.5": 2} and report["ranks"] == {"2": 2}
    assert parsed("inspect", pipeline)["components"] == ["text_encoder", "unet"]
    assert parsed("inspect", GPT2 / "model.safetensors")["format"] == "tensors"
    assert parsed("inspect", GOLDEN / "loralib.bin")["format"] == "loralib"


def test_inspect_says_what_is_not_finite(jlora, tmp_path: Path):
    save_file(
        {
            "unet.q.lora_A.weight": np.full((2, 4), np.nan, np.float32),
            "unet.q.lora_B.weight": np.ones((4, 2), np.float32),
        },
        tmp_path / "a.safetensors",
    )
    assert "values that are not finite, the first in unet.q" in jlora("inspect", tmp_path / "a.safetensors")


# -- merge -------------------------------------------------------------------------------------------------------------


def test_merge(jlora, parsed, tmp_path: Path):
    before = hashes(GPT2)
    report = parsed("merge", GPT2, PEFT / "dora_gpt2", tmp_path / "out", "--dtype", "bfloat16")
    assert hashes(GPT2) == before
    assert (report["command"], report["method"], len(report["merged"]), report["dry_run"]) == (
        "merge",
        "LoRA + DoRA",
        6,
        False,
    )
    assert all(0 < row["rounding"] < 0.1 and row["dtype"] == "BF16" for row in report["merged"])
    merged = load_file(tmp_path / "out" / "model.safetensors")
    outputs = np.load(PEFT / "dora_gpt2" / "outputs.npz")
    for key in (name.removeprefix("merged/") for name in outputs.files if name.startswith("merged/")):
        np.testing.assert_allclose(merged[key].astype(np.float32), outputs[f"merged/{key}"], rtol=2**-8, atol=1e-6)
    text = jlora("merge", GPT2, LORA, tmp_path / "text")
    assert text.splitlines()[-1] == f"merged 2 of 28 tensors into {tmp_path / 'text'} (1 file, 32.5 kB)"


def test_merge_of_one_of_a_pipeline(parsed, kohya: Path, pipeline: Path, tmp_path: Path):
    report = parsed("merge", pipeline / "unet", kohya, tmp_path / "unet", "--component", "unet")
    assert report["left_out"] == 3 and len(report["merged"]) == 1
    start, merged = (load_file(folder / "model.safetensors") for folder in (pipeline / "unet", tmp_path / "unet"))
    changed = [key for key in start if not np.array_equal(start[key], merged[key])]
    assert changed == ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
    np.testing.assert_allclose(
        merged[changed[0]] - start[changed[0]], 0.5 * normal((8, 2), 2) @ normal((2, 8), 1), atol=1e-6
    )


def test_merge_of_a_trained_head_into_a_tied_base(jlora, parsed, tmp_path: Path):
    base = GOLDEN / "models" / "llama3_causal_lm"
    assert json.loads((base / "config.json").read_text())["tie_word_embeddings"] is True
    a = tmp_path / "a"
    shutil.copytree(PEFT / "head_tied", a)
    config = json.loads((a / "adapter_config.json").read_text())
    changed = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    (a / "adapter_config.json").write_text(json.dumps(config | changed))
    tensors = {k: x for k, x in load_file(a / "adapter_model.safetensors").items() if "q_proj" in k}
    head = 1 + load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    save_file(tensors | {"base_model.model.lm_head.weight": head}, a / "adapter_model.safetensors")
    said = jlora("merge", base, a, tmp_path / "out", "--tied", status=2)
    assert "leave --tied (tied=True) out, and the head becomes a tensor of its own" in said
    said = jlora("merge", base, a, tmp_path / "out")
    assert "'lm_head.weight' is a tensor of its own: config.json gets tie_word_embeddings=false\n" in said
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], head)
    notes = parsed("merge", base, a, tmp_path / "out", "--dry-run", "--force")["notes"]
    assert notes == ["'lm_head.weight' is a tensor of its own: config.json gets tie_word_embeddings=false"]


def test_merge_says_what_rounding_takes(jlora, tmp_path: Path):
    save_file({"q.weight": np.ones((4, 4), np.float16), "q.bias": np.ones(4, np.float16), "k.weight": np.ones((8, 4), np.float16), "k.bias": np.ones(8, np.float16)}, _made(tmp_path / "base") / "model.safetensors")  # fmt: skip
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"]}
    (_made(tmp_path / "a") / "adapter_config.json").write_text(json.dumps(config))
    factors = {
        "base_model.model.q.lora_A.weight": np.full((1, 4), 1e-4, np.float32),
        "base_model.model.q.lora_B.weight": np.ones((4, 1), np.float32),
    }
    save_file(factors, tmp_path / "a" / "adapter_model.safetensors")
    text = jlora("merge", tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert "1 updates lose over 10% to rounding: --dtype float32 keeps them, or serve the adapter apart" in text


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


# -- convert, combine, extract -----------------------------------------------------------------------------------------


def test_convert_to_jlora_and_back(jlora, parsed, tmp_path: Path):
    report = parsed("convert", PEFT / "lora_llama", tmp_path / "ours", "--to", "jlora", "--base", LLAMA)
    assert (report["from"], report["to"], report["dry_run"]) == ("peft", "jlora", False)
    assert "adapter.json" in {path.name for path in (tmp_path / "ours").iterdir()}
    jlora("convert", tmp_path / "ours", tmp_path / "theirs", "--to", "peft", "--base", LLAMA)
    start, back = (
        load_file(folder / "adapter_model.safetensors") for folder in (PEFT / "lora_llama", tmp_path / "theirs")
    )
    assert start.keys() == back.keys() and all(np.array_equal(start[key], back[key]) for key in start)
    jlora("merge", LLAMA, tmp_path / "ours", tmp_path / "one")
    jlora("merge", LLAMA, PEFT / "lora_llama", tmp_path / "other")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "other")
    assert (
        parsed("inspect", tmp_path / "ours")["modules"][0]["scale"]
        == parsed("inspect", PEFT / "lora_llama")["modules"][0]["scale"]
    )
    assert parsed("verify", tmp_path / "ours", LLAMA)["fits"] is True


def test_convert_between_files_of_pipelines(jlora, parsed, kohya: Path, pipeline: Path, tmp_path: Path):
    jlora("convert", kohya, tmp_path / "d.safetensors", "--to", "diffusers", "--base", pipeline)
    jlora("convert", tmp_path / "d.safetensors", tmp_path / "k.safetensors", "--to", "kohya", "--base", pipeline)
    start, back = load_file(kohya), load_file(tmp_path / "k.safetensors")
    assert start.keys() == back.keys() and all(np.array_equal(start[key], back[key]) for key in start)
    jlora("convert", kohya, tmp_path / "peft", "--to", "peft", "--base", pipeline / "unet", "--component", "unet")
    assert parsed("inspect", tmp_path / "peft")["modules"][0]["module"] == Q.replace("_", ".", 0).replace(
        Q, "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    )
    jlora("convert", tmp_path / "peft", tmp_path / "again.safetensors", "--to", "kohya", "--base", pipeline / "unet")
    unet = {key: x for key, x in start.items() if "unet" in key}
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == unet.keys() and all(np.array_equal(unet[key], again[key]) for key in unet)


@pytest.fixture
def commands(kohya: Path, pipeline: Path, tmp_path: Path) -> dict[str, tuple]:
    """Commands of a file of two models, and the folder of one of them."""
    out, unet = tmp_path / "out", pipeline / "unet"
    return {
        "merge": ("merge", unet, kohya, out), "verify": ("verify", kohya, unet), "inspect": ("inspect", kohya, "--base", unet),
        "combine": ("combine", out, kohya, kohya, "--base", unet),
        **{to: ("convert", kohya, out, "--to", to, "--base", unet) for to in ("peft", "jlora")},
        "diffusers": ("convert", kohya, tmp_path / "x.safetensors", "--to", "diffusers", "--base", unet),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["merge", "verify", "inspect", "combine", "peft", "jlora", "diffusers"])
def test_what_a_file_holds_of_other_models_is_not_left_out_in_silence(
    jlora, parsed, commands: dict[str, tuple], name: str, kohya: Path, pipeline: Path, tmp_path: Path
):
    command, before = commands[name], hashes(tmp_path)
    said = jlora(*command, status=2)
    assert said.endswith(
        f"'{pipeline / 'unet'}' holds the unet alone, and 3 tensors of '{kohya}' are of other models: name the pipeline's "
        "folder, or leave them out by --component unet (component='unet')"
    )
    assert "has no text_encoder_2, but unet" in jlora(*command, "--component", "text_encoder_2", status=2)
    assert hashes(tmp_path) == before
    if name == "jlora":
        return  # which has no UNet among its models
    report = parsed(*command, "--component", "unet")
    assert report["left_out"] == (6 if name == "combine" else 3) and report.get("layers", 1) == 1
    if name in ("merge", "combine", "peft", "diffusers", "verify"):
        more = () if name == "verify" else ("--force",)
        text = jlora(*command, "--component", "unet", *more)
        assert (
            f"{report['left_out']} tensors of the file are of other models than --component, and are left out" in text
        )


def test_embeddings_of_new_tokens_are_left_out_on_purpose_alone(kohya: Path, pipeline: Path, monkeypatch):
    found = pipeline_files.kohya.read(kohya, pipeline_files.models_of(pipeline))
    with_tokens = found._replace(tokens={"<s1>": np.ones(4)})
    monkeypatch.setattr(pipeline_files.kohya, "read", lambda *args, **kwargs: with_tokens)
    with pytest.raises(ValueError, match="has embeddings of the new tokens '<s1>', which are no adapter of a model"):
        pipeline_files.components("kohya", kohya, pipeline)
    before = pipeline_files.components("kohya", kohya, pipeline, "unet").left_out
    monkeypatch.setattr(pipeline_files.kohya, "read", lambda *args, **kwargs: found)
    assert pipeline_files.components("kohya", kohya, pipeline, "unet").left_out == before - 1


def test_one_component_of_a_whole_pipeline(parsed, kohya: Path, pipeline: Path, tmp_path: Path):
    """It wrote both, and counted both where it wrote one."""
    command = ("convert", kohya, tmp_path / "x.safetensors", "--to", "diffusers", "--base", pipeline)
    assert (report := parsed(*command, "--component", "unet"))["layers"] == 1 and report["left_out"] == 3
    assert all(key.startswith("unet.") for key in load_file(tmp_path / "x.safetensors"))
    assert (report := parsed(*command, "--force"))["layers"] == 2 and report["left_out"] == 0


def delta(folder: Path, tmp_path: Path, jlora, base: Path = GPT2) -> dict[str, np.ndarray]:
    jlora("merge", base, folder, tmp_path / "delta", "--force")
    start, merged = (load_file(f / "model.safetensors") for f in (base, tmp_path / "delta"))
    return {key: merged[key] - x for key, x in start.items() if not np.array_equal(merged[key], x)}


def test_combine(jlora, parsed, tmp_path: Path):
    one, two = delta(LORA, tmp_path, jlora), delta(PEFT / "lora_gaussian", tmp_path, jlora)
    report = parsed("combine", tmp_path / "both", LORA, PEFT / "lora_gaussian", "--weights", "0.5,-2")
    assert (report["weights"], report["how"]) == ([0.5, -2.0], "sum")
    both = delta(tmp_path / "both", tmp_path, jlora)
    assert both.keys() == one.keys() | two.keys()
    for key, value in both.items():
        np.testing.assert_allclose(value, 0.5 * one.get(key, 0) - 2 * two.get(key, 0), atol=1e-5)
    (tmp_path / "one").mkdir()
    shutil.copy(PEFT / "dora_gpt2" / "adapter_config.json", tmp_path / "one")
    tensors = load_file(PEFT / "dora_gpt2" / "adapter_model.safetensors")
    save_file(
        {key: x for key, x in tensors.items() if "h.1.attn.c_attn" in key},
        tmp_path / "one" / "adapter_model.safetensors",
    )
    jlora("combine", tmp_path / "dora", tmp_path / "one", "--weights", "0.5", "--base", GPT2)
    half, whole = delta(tmp_path / "dora", tmp_path, jlora), delta(tmp_path / "one", tmp_path, jlora)
    assert list(half) == ["transformer.h.1.attn.c_attn.weight"]
    for key, value in half.items():
        np.testing.assert_allclose(value, whole[key] / 2, atol=1e-5)


def test_extract(jlora, parsed, tmp_path: Path):
    jlora("merge", GPT2, LORA, tmp_path / "tuned")
    report = parsed("extract", GPT2, tmp_path / "tuned", tmp_path / "found", "--rank", "8")
    assert set(report["ranks"].values()) == {3} and all(error < 1e-5 for error in report["errors"].values())
    one, two = delta(LORA, tmp_path, jlora), delta(tmp_path / "found", tmp_path, jlora)
    for key, value in one.items():
        np.testing.assert_allclose(two[key], value, atol=1e-5)


# -- count, verify, card -----------------------------------------------------------------------------------------------


def test_count(jlora, parsed):
    report = parsed("count", "gpt2", "lora(8)", "--dtype", "float32")
    per_layer = 8 * ((768 + 768) * 4 + 2 * (768 + 4 * 768))  # query, key, value and out; up and down
    assert report["trainable"] == 12 * per_layer and report["total"] == 124_439_808 + report["trainable"]
    b = report["bytes"]
    assert (b["parameters"], b["factors"], b["adam"]) == (
        4 * 124_439_808,
        4 * report["trainable"],
        8 * report["trainable"],
    )
    assert b["all"] == b["parameters"] + 4 * b["factors"]
    same = parsed("count", LLAMA, "rslora(4)", "--targets", "q_proj|query", "--dtype", "bfloat16")
    assert same["trainable"] > 0 and same == parsed(
        "count", LLAMA / "config.json", "rslora(4)", "--targets", "q_proj|query"
    ) | {"model": str(LLAMA)}
    assert "parameters are trained" in jlora("count", "bert-base", "dora(4)", "--dtype", "float32")


@pytest.mark.once
@pytest.mark.loose_promotion  # Flax's norms of bfloat16
def test_count_of_a_unet(jlora, parsed):
    report = parsed("count", "sd15", "--method", "lora(4)")
    assert (report["targets"], report["trainable"], report["weights"]) == (["attention"], 797_184, 128)
    assert report["model_parameters"] == 859_520_964 and report["bytes"]["file"] == 4 * 797_184
    assert {name: own["trainable"] // 4 for name, own in report["sets"].items()} == {
        "attention": 199_296, "cross_attention": 99_456, "transformers": 423_936, "locon": 1_050_816, "all": 1_058_216,
    }  # fmt: skip
    scanned = parsed("count", "sdxl", "lora(4)", "--targets", "cross_attention", "--targets", "^conv_in")
    assert (scanned["sites"], scanned["weights"], scanned["sets"]) == (45, 281, {})
    assert scanned["trainable"] == 4 * (785_920 + 9 * 4 + 320)
    text = jlora("count", "clip-vit-l-text", "lora(4)")
    assert "123,060,480 parameters of the model, 294,912 of the adapter: 48 weights, of attention\n" in text
    assert text.rstrip().endswith("all             72  663,552")


@pytest.mark.loose_promotion
def test_count_of_a_quantised_base(jlora, parsed):
    """GPT-2's layers in NF4: half a byte, a byte for 64 of them, a float for 256 of those, another for each matrix."""
    n, rest = 12 * 12 * 768**2, 124_439_808 - 12 * 12 * 768**2
    report = parsed("count", "gpt2", "lora(8)", "--quantize", "nf4")
    scales = 12 * (4 * 768**2 // 64 + 2 * 4 * 768**2 // 64)
    codes = n // 2 + scales + 4 * scales // 256 + 4 * 12 * 6
    assert report["quantize"] == "nf4" and report["bytes"]["parameters"] == codes + 2 * rest
    assert report["bits"] == {"base": 8 * (codes + 2 * rest) / (n + rest), "quantised": 8 * codes / n}
    assert round(report["bits"]["quantised"], 3) == 4.127
    plain = parsed("count", "gpt2", "lora(8)")
    assert plain["bits"] == {"base": 16, "quantised": None} and plain["quantize"] is None
    assert plain["bytes"]["full_fine_tuning"] == report["bytes"]["full_fine_tuning"]
    assert plain["trainable"] == report["trainable"] and plain["total"] == report["total"]
    said = f"base, {report['bits']['base']:.4g} bits a parameter, 4.127 a quantised one (nf4)  "
    assert said in jlora("count", "gpt2", "lora(8)", "--quantize", "nf4")
    assert "base, 16 bits a parameter  " in jlora("count", "gpt2", "lora(8)")


def test_verify(jlora, parsed):
    assert jlora("verify", LORA, GPT2) == f"{LORA} (LoRA, 2 layers) fits {GPT2}\n"
    report = parsed("verify", LORA, LLAMA, status=1)
    assert report["fits"] is False and report["faults"][0].startswith(
        "2 of the adapter's 2 tensors are not in the base"
    )


def test_verify_says_no(jlora, tmp_path: Path):
    shutil.copytree(LORA, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"
    save_file(tensors | {key: tensors[key][:-1]}, file)
    text = jlora("verify", tmp_path / "a", GPT2, status=1)
    assert (
        "'transformer.h.1.attn.c_attn.weight' has shape (16, 48), and the adapter was made for 47 outputs and 16 inputs"
        in text
    )


def test_card(jlora, parsed, tmp_path: Path):
    shutil.copytree(LORA, tmp_path / "mine")
    args = ("card", tmp_path / "mine", "--base-model", "openai-community/gpt2", "--license", "mit", "--language", "no")
    dry = parsed(*args, "--dry-run")
    assert not (tmp_path / "mine" / "README.md").exists()
    jlora(*args)
    text = (tmp_path / "mine" / "README.md").read_text()
    assert text == dry["card"]
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(text.split("---\n")[1]) == {
        "base_model": "openai-community/gpt2", "library_name": "peft", "pipeline_tag": "text-generation", "license": "mit", "language": ["no"],
        "tags": ["base_model:adapter:openai-community/gpt2", "lora", "jlora"],
    }  # fmt: skip
    assert "384 parameters in 2 layers (2 of rank 3)" in text and "PeftModel.from_pretrained(" in text
    assert (
        jlora(*args, status=2)
        == f"jlora card: '{tmp_path / 'mine' / 'README.md'}' is there: name another one, or pass --force to replace it"
    )


def named(folder: Path, **fields: object) -> Path:
    """LORA with other fields in its config."""
    shutil.copytree(LORA, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    return folder


EVIL = [
    "a/b\nlicense: mit", 'a/b"); import os; os.system("x', "a/b'", "a/b](https://evil)", "a/b\\", "a/b/c", "a/b\n", "/b", "a b",
    "a/b`", "\u00e4/b", "a/",
]  # fmt: skip


@pytest.mark.parametrize("base", EVIL)
def test_a_name_cannot_leave_its_place_in_a_card(jlora, tmp_path: Path, base: str):
    a = named(tmp_path / "a", base_model_name_or_path=base)
    said = jlora("card", a, status=2)
    if base.startswith("/"):
        assert "names its base by the folder" in said
    else:
        shown = " ".join(repr(base).split())
        assert said == f"jlora card: the base of '{a}', {shown}, is no name on the hub: pass --base-model owner/name"
        assert "jlora card: --base-model, " in jlora("card", LORA, "--base-model", base, "--dry-run", status=2)
    assert not (a / "README.md").exists()
    jlora("card", a, "--base-model", "me/mine")


def test_a_method_and_a_license_cannot_leave_theirs(jlora, parsed, tmp_path: Path):
    said = jlora("card", named(tmp_path / "a", init_lora_weights="x\n## [free](https://evil)"), status=2)
    assert "calls its method" in said and said.endswith("which is no name")
    yaml = pytest.importorskip("yaml")
    text = parsed("card", LORA, "--license", 'x"\n---\n<b>', "--language", "de\nbase_model: c/d", "--dry-run")["card"]
    front = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert front["license"] == 'x"\n---\n<b>' and front["language"] == ["de\nbase_model: c/d"]
    assert front["base_model"] == "tiny/gpt2_causal_lm"


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("CAUSAL_LM", "AutoModelForCausalLM"), ("SEQ_CLS", "AutoModelForSequenceClassification"), ("TOKEN_CLS", "AutoModelForTokenClassification"),
        ("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"), ("QUESTION_ANS", "AutoModelForQuestionAnswering"), ("FEATURE_EXTRACTION", "AutoModel"),
        (None, "AutoModel"), ("?", "AutoModel"),
    ],
)  # fmt: skip
def test_the_class_in_a_card(parsed, tmp_path: Path, task: str | None, name: str):
    text = parsed("card", named(tmp_path / "a", task_type=task), "--dry-run")["card"]
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert (
        f"from transformers import {name}\n" in code
        and f"base = {name}.from_pretrained('tiny/gpt2_causal_lm')\n" in code
    )


def test_the_classes_of_a_classifier_in_a_card(parsed):
    text = parsed("card", PEFT / "sequence_classification_gpt2", "--base-model", "a/b", "--dry-run")["card"]
    tensors = load_file(PEFT / "sequence_classification_gpt2" / "adapter_model.safetensors")
    (count,) = {x.shape[0] for key, x in tensors.items() if key.endswith("score.weight")}
    assert f"AutoModelForSequenceClassification.from_pretrained('a/b', num_labels={count})" in text


# -- the hub -----------------------------------------------------------------------------------------------------------


class Hub:
    """What is asked of huggingface_hub."""

    files = (
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "evil.py",
        "tokenizer.json",
        "old/adapter.bin",
        "x.bin",
    )

    def __init__(self) -> None:
        self.calls = []

    def create_repo(self, repo, **options):
        self.calls.append(("create_repo", repo, options))

    def upload_folder(self, **options):
        self.calls.append(("upload_folder", options))
        return "https://hub/commit"

    def list_repo_files(self, repo, **options):
        if repo == "no/body":
            raise RuntimeError("404 Client Error\nRepository Not Found")
        return ["x.bin"] if repo == "a/pickle" else list(self.files)

    def hf_hub_download(self, repo, name, revision=None, local_dir=None):
        self.calls.append(("hf_hub_download", name))
        (Path(local_dir) / ".cache").mkdir(exist_ok=True)
        (Path(local_dir) / name).write_text(f"{repo} {revision}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=lambda: fake))
    return fake


def test_push(jlora, parsed, hub: Hub, tmp_path: Path):
    shutil.copytree(LORA, tmp_path / "a")
    assert parsed("push", tmp_path / "a", "me/it", "--dry-run")["files"] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert hub.calls == []
    report = parsed("push", tmp_path / "a", "me/it", "--private")
    assert report["url"] == "https://hub/commit"
    (_, repo, made), (_, sent) = hub.calls
    assert repo == "me/it" and made == {"private": True, "exist_ok": True, "repo_type": "model"}
    assert (
        sent["allow_patterns"] == ["adapter_config.json", "adapter_model.safetensors"] and sent["repo_id"] == "me/it"
    )  # not outputs.npz
    assert (
        jlora("push", GPT2, "me/it", status=2)
        == f"jlora push: '{GPT2}' is no folder of an adapter: push takes one of PEFT or jlora"
    )


def test_pull(jlora, parsed, hub: Hub, tmp_path: Path):
    wanted = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert parsed("pull", "some/one", tmp_path / "a", "--dry-run")["files"] == wanted and not (tmp_path / "a").exists()
    jlora("pull", "some/one", tmp_path / "a", "--revision", "v1")
    assert (
        sorted(path.name for path in (tmp_path / "a").iterdir()) == wanted
        and (tmp_path / "a" / "README.md").read_text() == "some/one v1"
    )
    assert "is there" in jlora("pull", "some/one", tmp_path / "a", status=2)
    jlora("pull", "some/one", tmp_path / "a", "--force")
    said = jlora("pull", "no/body", tmp_path / "b", status=2)
    assert said == "jlora pull: the hub said no: RuntimeError: 404 Client Error Repository Not Found"
    said = jlora("pull", "a/pickle", tmp_path / "b", status=2)
    assert (
        said
        == "jlora pull: 'a/pickle' holds no adapter: neither adapter_config.json nor adapter.json, and no *.safetensors"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# -- nothing is written, nothing is overwritten ------------------------------------------------------------------------


def writing(tmp_path: Path, kohya: Path, pipeline: Path) -> dict[str, tuple]:
    out = tmp_path / "out"
    return {
        "merge": ("merge", GPT2, LORA, out), "convert": ("convert", kohya, out / "x.safetensors", "--to", "diffusers", "--base", pipeline),
        "convert to a folder": ("convert", LORA, out, "--to", "jlora", "--base", GPT2),
        "combine": ("combine", out, LORA, PEFT / "lora_gaussian"), "extract": ("extract", GPT2, tmp_path / "tuned", out, "--rank", "4"),
        "card": ("card", LORA, "--base-model", "a/b", "--out", out / "README.md"),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["merge", "convert", "convert to a folder", "combine", "extract", "card"])
def test_dry_runs_and_force(jlora, name: str, kohya: Path, pipeline: Path, tmp_path: Path):
    command = writing(tmp_path, kohya, pipeline)[name]
    if name == "extract":
        jlora("merge", GPT2, LORA, tmp_path / "tuned")
    before = hashes(tmp_path)
    said = jlora(*command, "--dry-run")
    assert hashes(tmp_path) == before and ("would " in said or name == "card")
    jlora(*command)
    first = hashes(tmp_path)
    assert first != before
    assert "is there" in jlora(*command, status=2) and hashes(tmp_path) == first
    jlora(*command, "--force")
    assert hashes(tmp_path).keys() == {path for path in first if not path.startswith("out/factors")} | {
        path for path in hashes(tmp_path) if path.startswith("out/factors")
    }


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_usage(jlora):
    assert jlora("merge", status=2) == "jlora merge: Missing argument 'BASE'. (see jlora merge --help)"
    assert jlora("nonsense", status=2) == "jlora: No such command 'nonsense'. (see jlora --help)"
    assert "No such option" in jlora("inspect", LORA, "--colour", status=2)
    assert "--rank" in jlora("combine", "out", LORA, LORA, "--rank", "x", status=2)


def test_bad_paths(jlora, tmp_path: Path):
    say = lambda *arguments: jlora(*arguments, status=2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("?")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 20)
    out = tmp_path / "out"
    nowhere = tmp_path / "nowhere"
    beside = "; beside it lie bad.safetensors, empty, text.txt"
    assert say("inspect", nowhere) == f"jlora inspect: there is no '{nowhere}'{beside}"
    assert say("merge", nowhere, LORA, out) == f"jlora merge: there is no folder '{nowhere}'"
    assert say("merge", GPT2, nowhere, out) == f"jlora merge: there is no '{nowhere}'{beside}"
    empty = tmp_path / "empty"
    assert (
        say("inspect", empty)
        == f"jlora inspect: '{empty}' is neither an adapter nor a checkpoint: there is no *.safetensors in it"
    )
    assert say("merge", empty, LORA, out) == f"jlora merge: '{empty}' is no checkpoint: there is no *.safetensors in it"
    kinds = "peft, jlora, diffusers, kohya, loralib"
    assert (
        say("merge", GPT2, LLAMA, out) == f"jlora merge: '{LLAMA}' is a checkpoint, expected an adapter: one of {kinds}"
    )
    assert (
        say("merge", LORA, LORA, out)
        == f"jlora merge: '{LORA}' is an adapter of PEFT, expected the folder of a whole checkpoint"
    )
    assert say("merge", PEFT, LORA, out).startswith(
        f"jlora merge: '{PEFT}' is no checkpoint: there is no *.safetensors in it"
    )
    assert say("inspect", tmp_path / "text.txt") == (
        f"jlora inspect: '{tmp_path / 'text.txt'}' is of no format that jlora knows: an adapter is a folder of PEFT or jlora or a file "
        "of kohya or Diffusers (*.safetensors), a model a folder of *.safetensors"
    )
    assert say("inspect", tmp_path / "bad.safetensors").startswith(
        f"jlora inspect: '{tmp_path / 'bad.safetensors'}' is damaged or no safetensors file"
    )
    assert say("inspect", "gs://bucket/a").startswith("jlora inspect: 'gs:/bucket/a' is no local folder")
    assert say("inspect", PEFT).startswith(f"jlora inspect: '{PEFT}' is neither an adapter nor a checkpoint")
    assert not out.exists()


def test_a_base_that_does_not_fit(jlora, tmp_path: Path):
    assert jlora("merge", LLAMA, LORA, tmp_path / "out", status=2) == (
        "jlora merge: 2 of the adapter's 2 tensors are not in the base: 'transformer.h.0.attn.c_attn.weight' (the closest is "
        "'model.layers.0.self_attn.v_proj.weight'), 'transformer.h.1.attn.c_attn.weight' (the closest is "
        "'model.layers.1.self_attn.v_proj.weight'). Is it the base that the adapter was trained on?"
    )
    assert "lm_head.weight" in jlora(
        "merge", GOLDEN / "models" / "llama3_causal_lm", PEFT / "head_tied", tmp_path / "out", status=2
    )
    assert list(tmp_path.iterdir()) == []


def test_bad_options(jlora, tmp_path: Path, kohya: Path, pipeline: Path):
    say = lambda *arguments: jlora(*arguments, status=2)
    out = tmp_path / "out"
    assert (
        say("merge", GPT2, LORA, out, "--dtype", "int8")
        == "jlora merge: dtype='int8' is not one of float32, float16, bfloat16"
    )
    assert (
        say("convert", LORA, out, "--to", "onnx")
        == "jlora convert: --to onnx is not one of peft, jlora, kohya, diffusers"
    )
    assert (
        say("convert", LORA, out, "--to", "jlora")
        == "jlora convert: convert needs the adapter's base: pass --base FOLDER"
    )
    assert (
        say("convert", LORA, out, "--to", "peft", "--base", GPT2)
        == f"jlora convert: '{LORA}' is of format peft already"
    )
    assert "pass --component" in say("convert", kohya, out, "--to", "peft", "--base", pipeline)
    assert (
        say("combine", out, LORA, LORA, "--weights", "1")
        == "jlora combine: --weights 1 has 1 numbers, and there are 2 adapters"
    )
    assert (
        say("combine", out, LORA, LORA, "--weights", "a,b")
        == "jlora combine: --weights a,b: expected numbers with commas between them, 0.7,0.3"
    )
    assert say("combine", out, LORA, LORA, "--how", "linear").startswith(
        "jlora combine: --how linear is not one of sum, cat, svd"
    )
    assert "the update of 'transformer.h.0.attn.c_attn.weight' depends on the weight: pass --base" in say(
        "combine", out, LORA, PEFT / "dora_gpt2"
    )
    assert say("extract", GPT2, LLAMA, out) == "jlora extract: extract needs --rank or --energy"
    assert say("extract", GPT2, LLAMA, out, "--rank", "2").startswith(
        f"jlora extract: '{GPT2}' and '{LLAMA}' differ in "
    )
    assert say("extract", GPT2, GPT2, out, "--rank", "2").endswith("hold the same values: there is nothing to extract")
    assert (
        say("count", "gpt2", "lora8") == "jlora count: METHOD is a method, written as a call: 'lora(...)'; got 'lora8'"
    )
    assert (
        say("count", "gpt2")
        == "jlora count: count takes one method, as METHOD or by --method: jlora count sd15 'lora(4)'"
    )
    assert say("count", "gpt2", "lora(8)", "--method", "lora(8)") == say("count", "gpt2")
    assert (
        say("count", "gpt9", "lora(8)")
        == "jlora count: 'gpt9' is no published size, no folder and no config.json; the nearest size is 'gpt2'"
    )
    assert (
        say("count", "gpt2", "lora(8)", "--dtype", "int4")
        == "jlora count: --dtype int4 is not one of float32, bfloat16, float16"
    )
    assert (
        say("count", "gpt2", "lora(8)", "--quantize", "nf3")
        == "jlora count: unknown format 'nf3': it is one of nf4, fp4, int4, int8, fp8; the nearest is 'nf4'"
    )
    assert (
        say("card", PEFT / "conv")
        == f"jlora card: '{PEFT / 'conv'}' does not say what its base is: pass --base-model owner/name"
    )
    assert not out.exists()


@pytest.mark.parametrize("option", ["--targets", "--ignore"])
@pytest.mark.parametrize("pattern", ["(", "*", "[", r"(?P<x"])
def test_a_pattern_that_is_none(jlora, tmp_path: Path, option: str, pattern: str):
    said = jlora("extract", GPT2, GPT2, tmp_path / "out", "--rank", "2", option, pattern, status=2)
    assert said.startswith(f"jlora extract: {option}={pattern!r} is no regular expression: ")


def test_a_sum_that_is_zero(jlora, tmp_path: Path):
    for more in ((), ("--dry-run",)):
        assert jlora("combine", tmp_path / "out", LORA, LORA, "--weights", "1,-1", *more, status=2) == (
            "jlora combine: the sum is zero: these adapters and --weights leave nothing to write"
        )


def test_where_a_format_is_written(jlora, kohya: Path, pipeline: Path, tmp_path: Path):
    """By --to, and not by the name: a folder of a file's name, or a file of a folder's, is a mistake."""
    for to in ("kohya", "diffusers"):
        for name in ("out", "out.bin", "v1.5"):
            assert jlora("convert", kohya, tmp_path / name, "--to", to, "--base", pipeline, status=2) == (
                f"jlora convert: '{tmp_path / name}': --to {to} writes one file, name it *.safetensors"
            )
    for to in ("peft", "jlora"):
        assert jlora("convert", kohya, tmp_path / "x.safetensors", "--to", to, "--base", pipeline, status=2) == (
            f"jlora convert: '{tmp_path / 'x.safetensors'}': --to {to} writes a folder, name it without .safetensors"
        )
    (tmp_path / "folder.safetensors").mkdir()
    to_folder = ("convert", kohya, tmp_path / "folder.safetensors", "--to", "diffusers", "--base", pipeline, "--force")
    assert "writes one file" in jlora(*to_folder, status=2)
    assert {path.name for path in tmp_path.iterdir()} == {"style.safetensors", "folder.safetensors"}
    out = tmp_path / "v1.5"
    jlora("convert", kohya, out, "--to", "peft", "--base", pipeline / "unet", "--component", "unet")
    assert (out / "adapter_config.json").exists()


def test_the_dtype_of_jloras_own(jlora, tmp_path: Path):
    command = ("convert", PEFT / "lora_llama", tmp_path / "out", "--to", "jlora", "--base", LLAMA, "--dtype")
    for dtype in ("bfloat16", "float16"):
        assert jlora(*command, dtype, status=2) == (
            f"jlora convert: --dtype {dtype}: jlora's adapters are float32; leave --dtype out"
        )
    assert not (tmp_path / "out").exists()
    jlora(*command, "float32")


def test_a_dry_run_says_what_cannot_be_written(jlora, tmp_path: Path):
    start = {
        "h.q.weight": np.eye(6, 8, dtype=np.float32),
        "h.q.bias": np.ones(6, np.float32),
        "h.gamma": np.ones(8, np.float32),
    }
    save_file(start, _made(tmp_path / "base") / "model.safetensors")
    tuned = start | {"h.q.weight": start["h.q.weight"] + 1, "h.gamma": start["h.gamma"] + 1}
    save_file(tuned, _made(tmp_path / "tuned") / "model.safetensors")
    command = ("extract", tmp_path / "base", tmp_path / "tuned", tmp_path / "out", "--rank", "2")
    said = jlora(*command, status=2)
    assert "PEFT's config cannot name 1 leaves" in said and jlora(*command, "--dry-run", status=2) == said


@pytest.mark.parametrize("name", ["combine", "extract", "convert to a file", "convert to a folder", "convert to PEFT"])
def test_a_dry_run_runs_the_writing(
    jlora, name: str, kohya: Path, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refused(*arguments, **options):
        raise ValueError("no form for this")

    command = {
        **writing(tmp_path, kohya, pipeline),
        "convert to a file": ("convert", kohya, tmp_path / "x.safetensors", "--to", "diffusers", "--base", pipeline),
        "convert to PEFT": (
            "convert", kohya, tmp_path / "out", "--to", "peft", "--base", pipeline / "unet", "--component", "unet",
        ),
    }[name]  # fmt: skip
    jlora("merge", GPT2, LORA, tmp_path / "tuned")
    monkeypatch.setattr("jlora.interop.peft.save", refused)
    monkeypatch.setattr("jlora.interop.diffusers.write", refused)
    monkeypatch.setattr("jlora.cli.convert.save_jlora", refused)
    before = hashes(tmp_path)
    assert jlora(*command, "--dry-run", status=2).endswith(": no form for this")
    assert hashes(tmp_path) == before
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "inner").mkdir()
    if name in ("combine", "extract"):
        assert "is a file or holds folders" in jlora(*command, "--dry-run", "--force", status=2)


@pytest.mark.parametrize("name", ["merge", "convert", "convert to a folder", "combine"])
def test_a_full_disk(jlora, name: str, kohya: Path, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = hashes(tmp_path)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr(shards, "_write", full)
    monkeypatch.setattr("jlora.interop.tensor_file.os.fsync", full)
    said = jlora(*writing(tmp_path, kohya, pipeline)[name], status=2)
    assert "No space left on device" in said
    if name == "merge":
        assert (
            said
            == f"jlora merge: '{tmp_path / 'out'}': the disk is full (No space left on device); nothing was written: make room and run it again"
        )
    assert hashes(tmp_path) == before and not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_interrupted(jlora, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("jlora.interop.formats.recognise", stopped)
    assert main(["inspect", str(LORA)]) == run.STOPPED == 130
    assert capsys.readouterr().err == "jlora inspect: stopped\n"


def test_an_error_of_jlora_is_no_bad_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr("jlora.interop.formats.recognise", lambda path: 1 / 0)
    assert main(["inspect", str(LORA)]) == run.BUG == 70
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err and err.endswith(
        "jlora inspect: this is an error in jlora: report it, with the lines above\n"
    )


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setitem(sys.modules, "jlora.cli.app", None)
    for name in ("typer", "rich"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "jlora.cli.app")
    assert main(["inspect", str(LORA)]) == 2
    assert capsys.readouterr().err == 'the command line needs its extra: pip install "jlora[cli]"\n'
