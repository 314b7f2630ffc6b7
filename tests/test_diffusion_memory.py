"""The table of Stable Diffusion's memory: its steps as shapes, and what is printed of their plans."""

import jax
import pytest

from experiments.bench import diffusion_memory
from experiments.bench.diffusion_memory import METHODS, MODELS, PIXELS, ROWS, Case, key
from tests.test_memory_table import GB, plan


def test_all_steps_are_named_apart():
    found = diffusion_memory.cases(MODELS, PIXELS, METHODS, ROWS)
    assert len({case.name for case in found}) == len(found) == 2 * 2 * 4 * 2 + 2
    assert found[-1].name == "SDXL, 1024, LoRA r=16, batch 1, images and words"


@pytest.mark.loose_promotion  # Flax's norms of bfloat16
@pytest.mark.parametrize("cached", [True, False])
def test_a_step_is_a_loss_of_shapes(cached):
    params, loss, batch = diffusion_memory.step_of(Case("sdxl", 512, "16", 2, cached))
    assert jax.eval_shape(loss, params, batch, jax.random.key(0)).shape == ()
    names = {"latents", "context", "pooled", "sizes"} if cached else {"images", "tokens", "sizes"}
    assert set(batch) == names and len(params) == (1 if cached else 4)


def test_the_table_has_what_was_planned():
    case = Case("sd15", 512, "16", 1)
    found = {key(case, "h100"): plan(flops=2e12), key(case, "v5e"): plan(peak=10 * GB, flops=2e12)}
    head, row = diffusion_memory.table(found, [case, Case("sd15", 1024, "16", 1)])
    assert head[-3:] == ["rtx4090 (25.3)", "h100 (84.9)", "v5e (16.9)"]
    assert row[0] == case.name and row[2] == "2.00" and row[-3:] == ["28.00", "**28.00**", "**10.00**"]
