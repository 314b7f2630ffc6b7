"""The benchmark runs, refuses to compare programs that compute different things, and keeps what it printed."""

import json
import unittest.mock
from pathlib import Path

import pytest

from experiments.bench import generate, host, models, step
from experiments.bench.step import Variant
from jlora.models.gpt2 import GPT2Config

# As a user runs it: the optimizer and the model are under the promotion that they were written for.
pytestmark = [pytest.mark.once, pytest.mark.loose_promotion]


@pytest.mark.thorough("test_all_forms_are_steps_of_one_function")
def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--preset", "smoke", "--rank", "2", "--method", "lora", "dora", "--rounds", "2", "--layers", "1"]
    results = step.main([*options, "--form", "jlora", "--out", str(tmp_path)])
    assert [(r.form, r.method, r.rank) for r in results] == [
        ("full", None, None),
        ("jlora", "lora", 2),
        ("jlora", "dora", 2),
    ]
    full, lora, dora = results
    assert (full.time_ratio, full.flops_ratio, full.temporary_ratio) == (1.0, 1.0, 1.0)
    # kernels: query, key, value, out 32 x 32; fc 32 x 128; proj 128 x 32. DoRA adds one magnitude per output
    assert lora.trainable == 2 * (4 * (32 + 32) + 2 * (32 + 128))
    assert dora.trainable == lora.trainable + 5 * 32 + 128
    assert lora.over_lora is None and dora.over_lora is not None and dora.over_lora > 0.0
    record = json.loads((tmp_path / "step.json").read_text())
    assert [result["form"] for result in record["results"]] == ["full", "jlora", "jlora"]
    table = step.table(results)
    assert table.count("\n") == 4
    assert table in capsys.readouterr().out and table in (tmp_path / "step.md").read_text()


def test_all_forms_are_steps_of_one_function():
    preset = step.preset_of("smoke", step.parser().parse_args(["--layers", "1"]))
    variants = [Variant("full"), *(Variant(form, "lora", 2) for form in step.FORMS[1:])]
    results = step.measure("smoke", preset, "float32", variants, rounds=0)
    assert {r.milliseconds for r in results} == {r.time_ratio for r in results} == {None}
    assert [r.losses[0] for r in results] == pytest.approx([results[0].losses[0]] * 5, rel=1e-6)
    assert [r.losses[1] for r in results[1:]] == pytest.approx([results[1].losses[1]] * 4, rel=1e-4)
    assert results[0].losses[1] != pytest.approx(results[1].losses[1], rel=1e-3)


def test_another_function_is_seen():
    variants = [Variant("full"), Variant("merged", "lora", 2), Variant("jlora", "lora", 2)]
    step._check(variants, [(3.0, 2.0), (3.0, 2.5), (3.0, 2.5)], tolerance=1e-3)
    with pytest.raises(
        AssertionError, match=r"^jlora lora 2: losses of the first steps are 3.0, 2.6, expected 3.0, 2.5$"
    ):
        step._check(variants, [(3.0, 2.0), (3.0, 2.5), (3.0, 2.6)], tolerance=1e-3)
    with pytest.raises(AssertionError, match=r"^merged lora 2: "):
        step._check(variants, [(3.0, 2.0), (3.1, 2.5), (3.0, 2.5)], tolerance=1e-3)


def test_options_replace_the_presets_shape():
    options = step.parser().parse_args(["--batch", "4", "--length", "2048", "--vocab", "512", "--dtype", "float32"])
    preset = step.preset_of("gpt2-medium", options)
    assert (preset.batch, preset.length, preset.dtypes) == (4, 2048, ("float32",))
    assert (preset.model.vocab_size, preset.model.context, preset.model.width, preset.model.layers) == (
        512,
        2048,
        1024,
        24,
    )
    assert step.SIZES["gpt2-medium"].batch * step.SIZES["gpt2-medium"].length == 8192
    assert step.SIZES["gpt2-medium"].model.vocab_size == 50257


@pytest.mark.thorough("test_all_forms_are_steps_of_one_function")
def test_tokens_per_second_are_reported_for_each_form(capsys):
    options = {"layers": 1, "batch": 1, "prompt": 2, "new-tokens": 2, "rounds": 1, "rank": 1}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))] + ["--beams", "1", "2"]
    with unittest.mock.patch.dict(
        generate.PRESETS, {"gpt2": GPT2Config(vocab_size=16, context=8, width=8, layers=1, heads=2)}
    ):
        assert generate.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].count("to base") == 3 and [line.split("|")[2].strip() for line in lines[4:]] == ["1", "2"]
    assert all(float(cell.replace(",", "")) > 0 for line in lines[4:] for cell in line.strip("|").split("|"))


def test_where_torch_is_absent_the_comparison_with_peft_is_skipped(monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setattr(models, "NEEDED", ("torch_that_is_not_there", "peft_neither"))
    assert models.main(["--out", str(tmp_path)]) == []
    printed = capsys.readouterr().out
    assert printed.startswith("skipped: PEFT's side needs torch_that_is_not_there, peft_neither: pip install ")
    assert not list(tmp_path.iterdir())


def test_the_comparison_wants_an_even_rank(capsys):
    with pytest.raises(SystemExit):
        models.main(["--rank", "3"])
    assert (
        "--rank 3: PEFT's rank for GPT-2's c_attn is half as large again: give an even one" in capsys.readouterr().err
    )


def test_what_a_call_costs_the_host(capsys: pytest.CaptureFixture[str]):
    results = host.main(["--weights", "2", "3", "--rounds", "2"])
    assert [r.factors for r in results] == [4, 6]
    assert all(r.own > 0.0 and r.program > 0.0 for r in results)
    assert capsys.readouterr().out == host.table(results) + "\n"
