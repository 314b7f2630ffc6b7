"""`jlora plan`: configs, models, errors of one line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import jlora
from jlora.cli import main, workload
from jlora.planning import placing, targets
from tests.test_plan import BATCH, ROOT, TX, adapt, loss_fn, mlp, of_arrays_alone

pytestmark = pytest.mark.once

SMALL = ("configs/llama2_7b_gsm8k_lora.py", "--small", "--json")


@pytest.fixture
def command(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """Runs `jlora plan` in the repository: its output, or its one line of error."""
    monkeypatch.chdir(ROOT)

    def call(*arguments: str, status: int = 0, default: bool = False) -> str:
        device = () if "--device" in arguments or default else ("--device", "cpu")
        found = main(["plan", *arguments, *device])
        out, err = capsys.readouterr()
        assert found == status, (found, out, err)
        return out if status == 0 else err.removeprefix("jlora plan: ").rstrip("\n")

    return call


@pytest.mark.loose_promotion
def test_the_command_plans_a_config(command: Any):
    told = json.loads(command(*SMALL, "train.batch=2", "--accumulate", "2"))
    assert told["command"] == "plan" and told["model"] == "llama2_7b_gsm8k_lora_small" and told["fits"]
    assert told["batch_shapes"] == {"tokens": [2, 96], "mask": [2, 96], "loss_mask": [2, 96], "share": [2]}
    assert told["method"].startswith("lora(rank=8, alpha=16")
    assert told["batch"] == 2 * (96 * 6 + 4) and told["factors"] > 0


def gpt2(folder: Path) -> str:
    """The folder with a config.json of two layers of width 16."""
    config = {
        "model_type": "gpt2", "vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2,
        "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.loose_promotion
def test_the_command_plans_a_model(command: Any, tmp_path: Path):
    text = command(
        gpt2(tmp_path), "--method", "lora(2)", "--batch", "4x16", "--targets", "query", "--remat", "--mesh", "fsdp=4"
    )
    lines = text.splitlines()
    assert lines[0].endswith("inputs 4x16") and lines[1] == "A training step on cpu (4 devices, fsdp=4); per device:"
    assert lines[3] == f"  factors            {f'{2 * 2 * 32 * 4} B':>11}" and lines[-1] == "It fits."


@pytest.mark.loose_promotion
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("gpt2", "--batch", "512"), "--batch of 'gpt2' is rows x length, such as 1x512; got '512'"),
        (("gpt2", "--batch", "1x4096"), "--batch 1x4096: 4096 tokens are more than the context of 'gpt2', 1024"),
        (("gpt2", "--mesh", "8"), "--mesh is name=size, several with commas: fsdp=8,tp=2; got '8'"),
        (("gpt2", "train.batch=1"), "train.batch=1: for a config (.py), and 'gpt2' is a model"),
        (("gpt2", "--method", "lara(8)"), "--method: there is no method 'lara'; the nearest is 'lora'"),
        (("gpt2", "--optimizer-memory", "pinned"), "memory_kind='pinned' is not None or one of device, pinned_host; did you mean 'pinned_host'?"),
        ((*SMALL, "train.optimizer_memory=host"), "train.optimizer_memory is one of 'device', 'pinned_host', got 'host'"),
        (("gpt22",), "'gpt22' is no published size, no folder and no config.json; the nearest size is 'gpt2'"),
        ((*SMALL, "--batch", "1x8"), "--batch: of a model; a config has its own, and fields are set as in train.batch=4"),
        ((*SMALL, "--run", "lara"), "there is no run 'lara' in 'llama2_7b_gsm8k_lora_small': choose one with --run, lora"),
        (("configs/minilm_sst2.py",), "'configs/minilm_sst2.py' is no task of completions on a checkpoint: call jlora.plan with its loss, or name a model"),
    ],
)  # fmt: skip
def test_the_command_refuses(command: Any, arguments: tuple[str, ...], text: str):
    assert command(*arguments, status=2) == text


@of_arrays_alone
@pytest.mark.loose_promotion
def test_the_command_has_the_state_on_the_host(command: Any, tmp_path: Path):
    of = lambda *arguments: json.loads(command(*arguments, "--json"))
    model, place = (gpt2(tmp_path), "--method", "lora(2)", "--batch", "1x8"), ("--optimizer-memory", "pinned_host")
    here, there = of(*model), of(*model, *place)
    assert here["optimizer_state_on_host"] == here["host"] == 0 and here["optimizer_state"] == 2 * here["factors"] + 4
    assert there["optimizer_state_on_host"] == there["host"] == 2 * there["factors"] and there["optimizer_state"] == 4
    config = ("configs/qlora_llama_65b.py", "--small", "train.optimizer_memory=pinned_host")
    held, back = of(*config), of(*config, "--optimizer-memory", "device")
    assert held["optimizer_state_on_host"] == held["host"] == 2 * held["factors"] > 0
    assert back["host"] == 0 and back["optimizer_state"] == held["optimizer_state"] + held["host"]


@pytest.mark.loose_promotion
def test_the_command_holds_the_base_in_few_bits(command: Any, tmp_path: Path):
    model = gpt2(tmp_path)
    bytes_of = lambda *form: placing.bytes_of(
        workload.of_model(model, "lora(2)", "1x8", quantised=form[0]).adapted.base
    )
    kernels, outputs = 2 * 12 * 16 * 16, 2 * (16 + 16 + 16 + 16 + 64 + 16)  # of two layers
    assert bytes_of(None) - bytes_of("int8") == kernels * (2 - 1) - 4 * outputs
    said = "unknown format 'nf3': it is one of nf4, fp4, int4, int8, fp8; the nearest is 'nf4'"
    assert command(model, "--quantize", "nf3", "--batch", "1x8", status=2) == said


@pytest.mark.loose_promotion
def test_the_default_device_needs_its_compiler(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(targets, "has_compiler", lambda device: device.compiler == "cpu")
    text = (
        "a plan for 'v5e' is made by its own compiler, libtpu: pip install \"jlora[plan]\" (Linux on x86-64; no device "
        "and no driver is needed). device='cpu' needs nothing"
    )
    with pytest.raises(ImportError, match=f"^{re.escape(text)}$"):
        jlora.plan(loss_fn, adapt(mlp()), TX, BATCH)
    assert command(gpt2(tmp_path), "--method", "lora(2)", "--batch", "1x8", status=2, default=True) == text


def test_a_config_without_the_experiments(command: Any, monkeypatch: pytest.MonkeyPatch):
    found = workload.importlib.util.find_spec
    monkeypatch.setattr(
        workload.importlib.util, "find_spec", lambda name: None if "experiments" in name else found(name)
    )
    assert command(*SMALL, status=2).startswith(
        "a config is one of jlora's experiments, which are in its repository and not"
    )
