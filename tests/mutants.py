"""Mutants: ten lines of jlora, each made wrong in a copy of the tree, that the default run has to see.

    python -m tests.mutants            # all of them, in about two minutes on two cores
    python -m tests.mutants "scale"    # those whose name has "scale" in it

The tests that see a mutant have to pass in the copy without it, or their failure would say nothing. A line that is not
in its file, or is there twice, is an error: whoever rewrites it writes its mutant anew. Ends non-zero where a mutant lives.
"""

import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("jlora", "experiments", "configs", "tests", "pyproject.toml", "README.md")


class Mutant(NamedTuple):
    """One wrong line.

    Attributes:
      name: of the mistake.
      file: below `jlora/`.
      line: a piece of one line of it, there once.
      wrong: what stands in its place.
      tests: of the default run, as pytest takes them; one of them fails.
    """

    name: str
    file: str
    line: str
    wrong: str
    tests: tuple[str, ...]


def laws(*rows: str) -> tuple[str, ...]:
    """The law that compiles one program, for rows of the table of methods."""
    return tuple(
        f"tests/test_methods.py::test_start_merged_weights_and_gradients_in_one_program[{row}]" for row in rows
    )


def lifted(*rows: str, whole: bool = False) -> tuple[str, ...]:
    """The values of rows of the table of lifted functions, or the whole check of those that the default run checks so."""
    name = "test_agrees_with_the_merged_weights" if whole else "test_values_are_those_of_the_merged_weights"
    return tuple(f"tests/test_lift_functions.py::{name}[{row}]" for row in rows)


CONSTANTS = "tests/test_method_constants.py"
MUTANTS = (
    Mutant(
        "the scale upside down", "methods/lora.py", "lambda alpha, rank: alpha / rank", "lambda alpha, rank: rank / alpha",
        ("tests/test_methods.py::test_the_scale_is_the_papers",),
    ),
    Mutant(
        "B transposed", "methods/matrix.py", "return _form(jnp.swapaxes(b, -1, -2), site,", "return _form(b.reshape(b.shape[0], b.shape[2], b.shape[1]), site,",
        (f"{CONSTANTS}::test_pissa_takes_the_largest_singular_values_out",),
    ),
    Mutant(
        "a scan takes the last axis for the stack", "transform/follow.py", "t.moved(t.axes[1:], stack=t.stack | t.axes[0])", "t.moved(t.axes[:-1], stack=t.stack | t.axes[-1])",
        ("tests/test_layouts.py::test_sites_are_those_of_the_program[layers (in, L, out)]",),
    ),
    Mutant(
        "a gain that is dropped", "transform/weight.py", "value = value * self.gain.astype(wide)", "value = value * jnp.ones_like(self.gain, wide)",
        laws("dora"),
    ),
    Mutant(
        "min for max in AdaLoRA", "methods/adalora.py", "ascending[jnp.maximum(count - 1, 0)]", "ascending[jnp.minimum(count - 1, 0)]",
        (f"{CONSTANTS}::test_the_lowest_scores_are_pruned_and_none_without_need",),
    ),
    Mutant(
        "LoRA+ trains A faster", "methods/loraplus.py", '"A" if target.kind == "embedding" else "B"', '"B" if target.kind == "embedding" else "A"',
        (f"{CONSTANTS}::test_loraplus_trains_b_with_a_multiple_of_the_learning_rate",),
    ),
    Mutant(
        "no gradient of B", "transform/product.py", "dv = into(of_v, spec.v, inner, spec.inner, g, spec.y)", "dv = jnp.zeros(of_v.shape, of_v.dtype)",
        lifted("x @ w", whole=True),
    ),
    Mutant(
        "merge subtracts", "transform/weight.py", "value = value + self.delta(precision).astype(wide)", "value = value - self.delta(precision).astype(wide)",
        laws("lora"),
    ),
    Mutant(
        "a loss's weight is not read", "objective.py", "jnp.where(weight != 0, weight * x, ", "jnp.where(weight != 0, x, ",
        ("tests/test_train.py::test_weighted_parts_are_the_whole_batch",),
    ),
    Mutant(
        "dropout without its scale", "transform/weight.py", "x / jnp.asarray(1.0 - rate, x.dtype)", "x / jnp.ones((), x.dtype)",
        ("tests/test_weight.py::test_drop_keeps_or_zeroes_and_scales",),
    ),
)  # fmt: skip


def copied(folder: Path) -> Path:
    """A copy of the tree that pytest runs in, without what was built there."""
    for name in COPIED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(source, target)
    return folder


def mutated(mutant: Mutant, folder: Path) -> None:
    """Puts the wrong line in place of the right one. Raises ValueError where the right one is not there once."""
    file = folder / "jlora" / mutant.file
    text = file.read_text()
    if text.count(mutant.line) != 1:
        raise ValueError(
            f"{mutant.name}: {mutant.line!r} is {text.count(mutant.line)} times in jlora/{mutant.file}, not once"
        )
    file.write_text(text.replace(mutant.line, mutant.wrong))


def run(tests: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs tests of the default tier in a copy; the copy's jlora comes before one that is installed."""
    options = ("-x", "-q", "-n0", "--share=none", "-p", "no:cacheprovider")
    return subprocess.run(
        (sys.executable, "-m", "pytest", *options, *tests), cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(folder)},
    )  # fmt: skip


def verdict(mutant: Mutant) -> str:
    """`""` where the mutant dies, as it has to; else what is wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = copied(Path(name))
        mutated(mutant, folder)
        done = run(mutant.tests, folder)
    if done.returncode == 0:
        return f"{mutant.name}: LIVES: {' '.join(mutant.tests)} passed"
    if (
        done.returncode != 1 or "FAILED" not in done.stdout
    ):  # 1: tests failed; others: none was found, or none could run
        return f"{mutant.name}: pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return ""


def unspoilt(mutants: list[Mutant]) -> str:
    """`""` where all tests pass without a mutant."""
    tests = tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    with tempfile.TemporaryDirectory() as name:
        done = run(tests, copied(Path(name)))
    return "" if done.returncode == 0 else f"without a mutant:\n{done.stdout[-4000:]}{done.stderr[-2000:]}"


def main(words: list[str]) -> int:
    """Runs the mutants whose names have all `words` in them; the number of those that do not die."""
    chosen = [mutant for mutant in MUTANTS if all(word in mutant.name for word in words)]
    if not chosen:
        raise SystemExit(f"no mutant has {words} in its name: {', '.join(mutant.name for mutant in MUTANTS)}")
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        first = pool.submit(unspoilt, chosen)
        found = pool.map(verdict, chosen)
        wrong = [text for text in (first.result(), *found) if text]
    print(*wrong, sep="\n")
    print(f"{len(chosen)} mutants, {len(wrong)} faults, {time.monotonic() - started:.0f} s")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
