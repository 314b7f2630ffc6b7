"""The table of memory: steps on shapes, what a bar is made of, what fits, and that nothing is planned twice."""

import jax
import matplotlib.pyplot as plt
import pytest

import jlora
from experiments.bench import memory_table
from experiments.bench.memory_table import Case, key
from jlora.models.sizes import model_of

pytestmark = pytest.mark.once

GB = 10**9


def plan(**other):
    """A plan of 30 GB, of which 2 wait in the host's memory."""
    figures = {
        "weights": 20 * GB,
        "factors": GB,
        "optimizer_state": 2 * GB,
        "batch": 0,
        "temporaries": 9 * GB,
        "unused": 0,
    }
    return {**figures, "peak": 28 * GB, "host": 0, "limit": 40 * GB, "fits": True, "trainable": 1, **other}


def test_the_parts_of_a_bar_are_what_the_step_needs():
    for made in (plan(), plan(host=2 * GB, peak=26 * GB), plan(unused=5 * GB, peak=33 * GB)):
        found = memory_table.parts(made)
        assert sum(found.values()) == memory_table.whole(made) and min(found.values()) >= 0
    assert memory_table.parts(plan())["temporaries"] == 5 * GB  # what the others leave of the peak
    assert memory_table.parts(plan(host=2 * GB, peak=26 * GB))["optimizer_state"] == 0


def test_the_table_has_a_line_for_each_step_and_what_fits_in_bold(tmp_path):
    qlora, lora = (Case("llama-7b", method) for method in ("QLoRA", "LoRA"))
    found = {key(qlora, "h100"): plan(), key(lora, "h100"): plan(fits=False, peak=90 * GB)}
    found[key(memory_table.GPT3[0], "h100")] = plan()  # not of this table
    assert memory_table.table(found) == [
        ["GB on each device", "h100 (40.0)"], ["llama-7b, LoRA", "90.0"], ["llama-7b, QLoRA", "**28.0**"],
    ]  # fmt: skip
    memory_table.draw(tmp_path / "memory.png", found)
    assert plt.imread(tmp_path / "memory.png").shape[0] > 300


def test_a_program_is_compiled_once_for_both_hoppers_and_goes_on_where_it_was(monkeypatch):
    compiled, kept = [], []
    monkeypatch.setattr(
        Case, "planned", lambda case, device: compiled.append(device) or plan(peak=100 * GB, fits=False)
    )
    case, found = Case("llama-7b", "QLoRA"), {}
    memory_table.fill(found, [(case, "h100"), (case, "h200"), (case, "h100")], lambda found: kept.append(len(found)))
    assert compiled == ["h100"] and kept == [1, 2]
    assert not found[key(case, "h100")]["fits"] and found[key(case, "h200")]["fits"]  # 151 GB


def test_every_step_is_one_row_to_a_chip():
    assert len(memory_table.cases("h100")) == 16 and len(memory_table.cases("v5e-16")) == 12
    assert {case.rows for case in memory_table.cases("v5e-16")} == {16}


@pytest.mark.loose_promotion  # Optax's AdamW multiplies a float by a counter
def test_a_step_is_planned_on_shapes(monkeypatch):
    """A tiny size: the counts of all three ways, the base in bits."""
    made = {}
    monkeypatch.setattr(memory_table, "model_of", lambda name, **options: tiny(**options))
    for method in memory_table.METHODS[:3]:
        made[method] = Case("llama-7b", method, 1, 16).planned("cpu")
    assert made["LoRA"]["trainable"] == made["QLoRA"]["trainable"] == 2 * 64 * (11 * 64 + 3 * 128)
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    saved = made["LoRA"]["weights"] - made["QLoRA"]["weights"]
    assert saved == pytest.approx(linear * (2 - 4.127 / 8), rel=0.01)
    assert made["full fine-tuning"]["unused"] == pytest.approx(made["LoRA"]["weights"], abs=64)  # and counters


@pytest.mark.loose_promotion  # Optax's AdamW multiplies a float by a counter
def test_codes_are_split_with_their_weight_over_a_mesh(monkeypatch):
    """The largest axis that keeps blocks whole; the scales of the second level, one to a layer's matrix, everywhere."""
    monkeypatch.setattr(memory_table, "model_of", lambda name, **options: tiny(**options))
    one, eight = (Case("llama-7b", "QLoRA", 8, 16).planned(device) for device in ("cpu", "8xcpu"))
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    whole = one["weights"] - 7 * 2 * (4 + 4)  # a scale of scales and an offset
    assert (eight["devices"], eight["weights"] - 7 * 2 * 8) == (8, pytest.approx(whole / 8, rel=0.02))
    assert eight["collectives"] and whole > linear / 2


def tiny(**options):
    return model_of("llama-7b", width=64, layers=2, heads=2, hidden=128, vocab_size=64, context=32, **options)


def test_gpt3_trains_as_many_parameters_as_the_paper_says():
    module, inputs = model_of("gpt3-175b")
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    sites = jlora.sites(lambda params, x: module.apply({"params": params}, x), params, *inputs)
    case = memory_table.GPT3[1]
    targets, method = memory_table.targets_of(case.method), memory_table.method_of(case.method)
    assert jlora.count(jlora.apply(params, method=method, targets=targets, sites=sites)).trainable == 18_874_368
