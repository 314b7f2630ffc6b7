"""The quickstart in its small form, from the command line to the plots; killed and resumed; the base used again."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
TIMED = ("tokens_per_second", "seconds")


def start(*arguments: str, config: str = "quickstart.py") -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-u", "-m", "experiments.train", str(CONFIGS / config), "--small", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def results(folder: Path) -> dict:
    """The numbers of a run, without what a clock said."""
    runs = json.loads((folder / "results.json").read_text())["outcomes"]
    for run in runs:
        run["price"] = run["price"] and {name: run["price"][name] for name in ("difference", "adapter_bytes")}
        for result in [*run["results"], *run["sweep"]]:
            for name in TIMED:
                del result[name]
    return {run["name"]: run for run in runs}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """A run from an empty folder, and what it printed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, finish(start("--folder", str(folder)))


def test_the_table_holds_what_was_measured(whole):
    folder, out = whole
    runs, base = results(folder), json.loads((folder / "results.json").read_text())["start"]
    assert list(runs) == ["full", "lora_r4", "lora_r16"]
    for run in runs.values():
        (result,) = run["results"]
        new, old = result["test"]["bits per byte"], result["old"]["bits per byte"]
        assert 0 < new < 8 and 0 < old < 8
        assert run["learned"] == [pytest.approx(base["test"]["bits per byte"] - new)]
        assert run["forgotten"] == [pytest.approx(old - base["old"]["bits per byte"])]
        assert run["price"]["difference"] < 1e-4
        assert [point["step"] for point in result["points"]] == [0, 4, 8] and result["best"] == 8
        assert run["plan"]["optimizer_bytes"] >= 8 * run["plan"]["trainable"]  # two float32 moments of AdamW
        assert run["price"]["adapter_bytes"] > 4 * run["plan"]["trainable"]
        assert len(list((folder / run["name"] / "seed_0" / "events").glob("events.out.tfevents.*"))) == 1
    # width 32, one layer: query, key, value, out are 32 x 32, fc 32 x 128, proj 128 x 32
    assert runs["lora_r4"]["plan"]["trainable"] == 4 * (4 * 64 + 2 * 160)
    assert runs["full"]["plan"]["trainable"] == base["parameters"]
    assert runs["lora_r4"]["plan"]["flops"] < runs["full"]["plan"]["flops"]
    assert runs["lora_r16"]["price"]["adapter_bytes"] < runs["full"]["price"]["adapter_bytes"]
    for text in ("bits/byte on Python (new)", "LoRA r=16", "optimizer state", "max |lifted - merged| logit"):
        assert text in out and text in (folder / "results.md").read_text().replace("\\|", "|")


def test_the_base_is_where_all_runs_start(whole):
    curves = [run["results"][0]["points"][0] for run in results(whole[0]).values()]
    assert curves[0] == curves[1] == curves[2]
    assert curves[0]["loss"] is None and math.isfinite(curves[0]["scores"]["loss"])


@pytest.mark.parametrize("name", ["learning_curves.png", "learned_forgotten.png"])
def test_the_plots_are_drawn(whole, name):
    image = plt.imread(whole[0] / name)
    colours = np.unique((image[..., :3] * 255).astype(np.uint8).reshape(-1, 3), axis=0)
    assert image.shape[0] > 500 and image.shape[1] > 900 and len(colours) > 100


@pytest.mark.thorough("test_a_killed_run_resumed_gives_the_same_numbers")
def test_a_second_start_uses_the_base_again_and_gives_the_same_numbers(whole):
    folder, _ = whole
    (base,) = (folder.parent / "bases").glob("*/base.safetensors")
    written, before = base.stat().st_mtime_ns, results(folder)
    out = finish(start("--folder", str(folder)))
    assert f"reused from {base.parent}" in out
    assert base.stat().st_mtime_ns == written and results(folder) == before


def test_a_killed_run_resumed_gives_the_same_numbers(whole, tmp_path):
    """Killed once in the pretraining and once in a run."""
    folder = tmp_path / "run"
    for line, *resume in (("pretraining       step    10",), ("LoRA r=4          step     4", "--resume")):
        with start("--folder", str(folder), *resume) as run:
            assert run.stdout is not None
            for printed in run.stdout:
                if line in printed:
                    run.send_signal(signal.SIGKILL)
                    break
            run.wait(timeout=60)
            assert run.returncode == -signal.SIGKILL
    out = finish(start("--folder", str(folder), "--resume"))
    assert "full fine-tuning  done before" in out and "reused from" in out
    assert results(folder) == results(whole[0])


def test_a_folder_of_another_config_is_refused(whole):
    process = start("--folder", str(whole[0]), "train.steps=9", "--resume")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "belongs to another config: config.train.steps is 8 there and 9 here" in " ".join(out.split())


@pytest.mark.thorough("test_the_table_holds_what_was_measured")
def test_the_sweep_names_the_best_learning_rate(whole):
    folder = whole[0].parent / "sweep"
    out = finish(
        start("--folder", str(folder), "train.steps=4", "train.evaluate_every=4", config="quickstart_sweep.py")
    )
    for run in results(folder).values():
        ends = {end["learning_rate"]: end["points"][-1]["scores"]["bits per byte"] for end in run["sweep"]}
        ((best, test),) = ((result["learning_rate"], result["test"]) for result in run["results"])
        assert len(ends) == 2 and ends[best] == min(ends.values()) and test is None
    assert "reused from" in out and (folder / "sweep.png").exists() and "(edge of the grid: widen it)" in out
