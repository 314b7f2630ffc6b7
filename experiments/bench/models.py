"""A training step of jlora beside one of PEFT on PyTorch, for models of published shapes, on the same machine.

    python -m experiments.bench.models                                      # two CPU cores: 8 x 128 tokens in float32
    python -m experiments.bench.models --device gpu                         # GPT-2 medium, 8 x 1,024 tokens in bfloat16
    python -m experiments.bench.models --model gpt2 --method dora --targets all --form eager compiled

Both sides read the same random weights, from one folder in the Hugging Face format that `jlora.models.save` writes, and
take their steps in one process, on the same tokens, in turn; a ratio is the median over the rounds of a step's time
over that of jlora's in the same round. Before anything is timed, their losses must agree, and their numbers of trained
parameters. A step is loss, gradient and AdamW; neither side has dropout.

  jlora          `jlora.train_step(loss, optax.adamw(...))`, as a user runs it.
  PEFT           `get_peft_model` on the model of transformers; gradients, then torch's AdamW in its fused form.
  PEFT compiled  the same with `torch.compile` around model and loss.

What is trained, with rank r:
  qv   BERT: query and value, both sides. GPT-2: jlora query and value; PEFT c_attn, the one kernel that transformers
       has for query, key and value, which is as many parameters (with DoRA PEFT has one magnitude more for each key).
  all  every linear layer of the blocks. For c_attn PEFT has rank 3r/2, which is as many parameters as jlora's three.

BERT is a classifier of its first token. jlora's computes no other in the last block (a twelfth of the work), that of
transformers all of them.

In bfloat16 the base is bfloat16 and the adapters are float32, as both libraries have it; PEFT then runs under autocast.
Memory is measured on each side alone, in a process of its own: on a CPU by how much the process grows from before its
weights are read to its peak in a step, on a GPU the peak that its allocator tells. "XLA MB" is what the compiler says
of jlora's step: arguments and temporaries.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from experiments.bench.step import MEGA, machine
from experiments.price import interleaved, ratio
from experiments.report.tables import markdown_table
from jlora import models
from jlora.models.bert import PRESETS as BERT
from jlora.models.bert import Bert, BertConfig
from jlora.models.gpt2 import GPT2, GPT2Config
from jlora.models.gpt2 import PRESETS as GPT2S

Batch = tuple[np.ndarray, np.ndarray]  # tokens (batch, length), and what the loss compares with
Shape = GPT2Config | BertConfig

NEEDED = ("torch", "peft", "transformers")
METHODS: Mapping[str, Callable[[int], jlora.Method]] = {"lora": jlora.lora, "dora": jlora.dora}
FORMS = {"eager": "PEFT", "compiled": "PEFT compiled"}
SMOKE: Mapping[str, Any] = {"vocab_size": 64, "context": 16, "width": 32, "layers": 2, "heads": 2}
SIZES: Mapping[str, Shape] = {
    "smoke-gpt2": GPT2Config(**SMOKE),
    "smoke-bert": BertConfig(**SMOKE, hidden=64, head="sequence_classification"),
    **GPT2S,
    **{name: dataclasses.replace(c, head="sequence_classification") for name, c in BERT.items()},
}
LEARNING_RATE, DECAY = 1e-3, 0.01


@dataclass(frozen=True)
class Targets:
    """Weights that are trained, in the words of both libraries.

    Attributes:
      jlora: a pattern of paths.
      peft: names of modules; a pattern of whole names as a str.
      ranks: by which the rank of a module of PEFT's is multiplied.
      keys: PEFT adapts the keys of attention, too, and has a magnitude for each of them.
    """

    jlora: str
    peft: tuple[str, ...] | str
    ranks: Mapping[str, float] = dataclasses.field(default_factory=dict)
    keys: bool = False


TARGETS: Mapping[tuple[type, str], Targets] = {
    (GPT2Config, "qv"): Targets("attn/(query|value)/kernel$", ("c_attn",), keys=True),
    (GPT2Config, "all"): Targets(r"^h_\d+/.*kernel$", ("c_attn", "c_proj", "c_fc"), {"c_attn": 1.5}),
    (BertConfig, "qv"): Targets("attn/(query|value)/kernel$", ("query", "value")),
    (BertConfig, "all"): Targets(r"^h_\d+/.*kernel$", r".*\.layer\.\d+\..*\.(query|key|value|dense)"),
}


@dataclass(frozen=True)
class Case:
    """One training to compare.

    Attributes:
      folder: the checkpoint that both sides read.
      model: a name in `SIZES`.
      config: its shape.
      targets, method, rank: what is trained.
      batch, length, dtype, device: how.
    """

    folder: str
    model: str
    config: Shape
    targets: str
    method: str
    rank: int
    batch: int
    length: int
    dtype: str
    device: str

    @property
    def tolerance(self) -> float:
        """Largest relative difference between losses of the same function."""
        return 1e-4 if self.dtype == "float32" else 2e-2

    def data(self) -> Batch:
        """Random tokens: the next ones are asked of a GPT-2, one of two labels of a BERT."""
        random = np.random.default_rng(0)
        tokens = random.integers(0, self.config.vocab_size, (self.batch, self.length + 1)).astype(np.int32)
        if isinstance(self.config, GPT2Config):
            return tokens[:, :-1], tokens[:, 1:]
        return tokens[:, :-1], random.integers(0, self.config.labels, self.batch).astype(np.int32)


@dataclass(frozen=True)
class Side:
    """A library's training, ready to go on.

    Attributes:
      name: as in the docstring of this file.
      trainable: number of trained parameters.
      advance: takes a step, finished when it returns, and gives the loss before it.
      compiled_bytes: what XLA says that its step holds; None for torch.
      peak: bytes of a GPU at the most so far; None on a CPU.
    """

    name: str
    trainable: int
    advance: Callable[[], float]
    compiled_bytes: int | None
    peak: Callable[[], int | None]


@dataclass(frozen=True)
class Result:
    """Costs of one side of one case.

    Attributes:
      model, dtype, batch, length, targets, method, rank, side: what was measured.
      trainable: number of trained parameters.
      milliseconds: of a step, the median over the rounds; None with `--rounds 0`.
      over_jlora: median over the rounds of a step's time divided by that of jlora's step in the same round.
      tokens_per_second: of such a step.
      peak_mb: measured, alone in a process; None with `--no-memory`.
      compiled_mb: what XLA says; None for torch.
      losses: of the first two steps.
    """

    model: str
    dtype: str
    batch: int
    length: int
    targets: str
    method: str
    rank: int
    side: str
    trainable: int
    milliseconds: float | None
    over_jlora: float | None
    tokens_per_second: float | None
    peak_mb: float | None
    compiled_mb: float | None
    losses: tuple[float, float]


# -- the two sides -----------------------------------------------------------------------------------------------------


def side(case: Case, form: str) -> Side:
    """The side of jlora, or that of a form of PEFT."""
    return _jlora(case) if form == "jlora" else _peft(case, form)


def _jlora(case: Case) -> Side:
    loaded = models.load(case.folder, dtype=case.dtype, param_dtype=case.dtype)
    method, targets = METHODS[case.method](case.rank), TARGETS[type(case.config), case.targets].jlora
    adapted = jlora.apply(loaded.params, method=method, targets=targets)
    batch = tuple(map(jnp.asarray, case.data()))

    def loss(params: Any, batch: Any) -> jax.Array:
        tokens, wanted = batch
        logits = loaded.model.apply({"params": params}, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()

    step = jlora.train_step(loss, optax.adamw(LEARNING_RATE, weight_decay=DECAY))
    state = jlora.TrainState.create(adapted, step.tx)
    memory: Any = step.lower(state, batch).compile().memory_analysis()

    def advance() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    def peak() -> int | None:
        stats = jax.local_devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use")

    held = int(memory.argument_size_in_bytes + memory.temp_size_in_bytes)  # the new state takes the old one's place
    return Side("jlora", jlora.count(adapted).trainable, advance, held, peak)


def _peft(case: Case, form: str) -> Side:
    torch, peft, transformers = (_imported(name) for name in NEEDED)
    where = "cuda" if case.device == "gpu" else "cpu"
    torch.set_num_threads(_cores())  # as many as XLA takes
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = _adapted_by_peft(case, peft, transformers, getattr(torch, case.dtype)).to(where).train()
    tokens, wanted = (torch.from_numpy(x.astype(np.int64)).to(where) for x in case.data())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=DECAY, fused=True)
    half = case.dtype != "float32"

    def loss_of(tokens: Any, wanted: Any) -> Any:
        logits = model(input_ids=tokens).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, -2), wanted.flatten())

    objective = torch.compile(loss_of) if form == "compiled" else loss_of

    def advance() -> float:
        with torch.autocast(where, torch.bfloat16) if half else contextlib.nullcontext():
            loss = objective(tokens, wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if where == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    def peak() -> int | None:
        return int(torch.cuda.max_memory_allocated()) if where == "cuda" else None

    return Side(FORMS[form], sum(p.numel() for p in trained), advance, None, peak)


def _adapted_by_peft(case: Case, peft: Any, transformers: Any, dtype: Any) -> Any:
    """The model that the folder's config.json names, adapted; its dropout is off."""
    targets = TARGETS[type(case.config), case.targets]
    record = json.loads((Path(case.folder) / "config.json").read_text())
    off = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob")
    config = transformers.AutoConfig.from_pretrained(case.folder)
    for name in off:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    config.use_cache = False
    model = getattr(transformers, record["architectures"][0]).from_pretrained(case.folder, config=config, dtype=dtype)
    ranks = {name: round(case.rank * factor) for name, factor in targets.ranks.items()}
    adapters = peft.LoraConfig(
        r=case.rank,
        lora_alpha=case.rank,
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=targets.peft if isinstance(targets.peft, str) else list(targets.peft),
        fan_in_fan_out=isinstance(case.config, GPT2Config),
        use_dora=case.method == "dora",
    )
    return peft.get_peft_model(model, adapters)


def _imported(name: str) -> Any:
    return importlib.import_module(name)  # no dependency of the project: not known to the type checker


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(case: Case, forms: Sequence[str], rounds: int, memory: bool) -> list[Result]:
    """All sides of a case, in turn; jlora's is the first."""
    print(f"{case.model}, {case.targets}, {case.method}", file=sys.stderr)
    names = ["jlora", *forms]
    peaks = [alone(case, form) if memory else None for form in names]
    sides = [side(case, form) for form in names]
    _check_trainable(case, sides)
    losses = [(one.advance(), one.advance()) for one in sides]  # and warm
    _check_losses(case, [one.name for one in sides], losses)
    seconds = interleaved({one.name: one.advance for one in sides}, rounds) if rounds else {}
    results = []
    for one, peak, first_two in zip(sides, peaks, losses, strict=True):
        mine = seconds.get(one.name)
        middle = median(mine) if mine else None
        results.append(
            Result(
                model=case.model,
                dtype=case.dtype,
                batch=case.batch,
                length=case.length,
                targets=case.targets,
                method=case.method,
                rank=case.rank,
                side=one.name,
                trainable=one.trainable,
                milliseconds=middle and 1e3 * middle,
                over_jlora=ratio(mine, seconds["jlora"]) if mine else None,
                tokens_per_second=middle and case.batch * case.length / middle,
                peak_mb=peak and peak / MEGA,
                compiled_mb=one.compiled_bytes and one.compiled_bytes / MEGA,
                losses=first_two,
            )
        )
    return results


def alone(case: Case, form: str) -> int | None:
    """Bytes at the peak of a step, in a process of its own; None where nothing tells them."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, case, form).result()


def _peak(case: Case, form: str) -> int | None:
    with jax.default_device(jax.devices(case.device)[0]):
        if form == "jlora":
            jax.block_until_ready(jnp.zeros(8) + 1)
        else:
            for name in NEEDED:
                _imported(name)
        before = _resident("VmRSS")
        one = side(case, form)
        one.advance()  # compiles
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        one.advance()
        reported, after = one.peak(), _resident("VmHWM")
    if case.device == "gpu" or before is None or after is None:
        return reported
    return after - before


def _resident(name: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))


def _check_trainable(case: Case, sides: Sequence[Side]) -> None:
    """Checks that all sides train as many parameters."""
    more = TARGETS[type(case.config), case.targets].keys and case.method == "dora"
    magnitudes = case.config.layers * case.config.width if more else 0
    expected = sides[0].trainable + magnitudes
    for one in sides[1:]:
        if one.trainable != expected:
            raise AssertionError(f"{one.name} trains {one.trainable} parameters, expected {expected}")


def _check_losses(case: Case, names: Sequence[str], losses: Sequence[tuple[float, float]]) -> None:
    """Checks that all sides start from one function, and learn: other steps' times would say nothing."""
    start, _ = losses[0]
    for name, (first, second) in zip(names, losses, strict=True):
        if not abs(first - start) <= case.tolerance * start:
            raise AssertionError(f"{name}: the first loss is {first}, jlora's {start}")
        if not second < first:
            raise AssertionError(f"{name}: the loss went from {first} to {second} in a step on the same tokens")


# -- what is printed and kept ------------------------------------------------------------------------------------------


def table(results: Sequence[Result]) -> str:
    """The results as a Markdown table."""
    costs = ("trainable", "ms", "÷ jlora", "tokens/s", "peak MB", "XLA MB")
    head = ("model", "dtype", "tokens", "targets", "method", "rank", "side", *costs)
    return "\n".join(markdown_table([head, *map(_cells, results)]))


def _cells(r: Result) -> tuple[str, ...]:
    costs = ((r.milliseconds, 1), (r.over_jlora, 3), (r.tokens_per_second, 0), (r.peak_mb, 0), (r.compiled_mb, 0))
    cells = ("" if value is None else f"{value:,.{places}f}" for value, places in costs)
    tokens = f"{r.batch} x {r.length}"
    return (r.model, r.dtype, tokens, r.targets, r.method, str(r.rank), r.side, f"{r.trainable:,}", *cells)


def write(folder: Path, name: str, shown: str, record: Mapping[str, Any]) -> None:
    """Prints a table and what it was measured on, and keeps both, with the record as JSON."""
    caption = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / f"{name}.md").write_text(f"{shown}\n\n{caption}\n")
    print(f"{shown}\n\n{caption}\n{folder}/{name}.json, {folder}/{name}.md")


# -- the command -------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(
        "python -m experiments.bench.models", None, summary, rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    p.add_argument("--model", nargs="+", choices=SIZES, help="gpt2 bert-base, on a GPU gpt2-medium")
    p.add_argument("--targets", nargs="+", choices=("qv", "all"), default=["qv", "all"])
    p.add_argument("--method", nargs="+", choices=METHODS, default=["lora", "dora"])
    p.add_argument("--rank", type=int, default=8, metavar="R", help="an even one, for c_attn's")
    p.add_argument("--form", nargs="+", choices=FORMS, help="of PEFT's side: eager, on a GPU compiled")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32, on a GPU bfloat16")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--length", type=int, help="tokens per example: 128, on a GPU 1,024, or the model's context")
    p.add_argument("--rounds", type=int, default=10, help="timed steps of each side; 0: memory alone")
    p.add_argument("--no-memory", action="store_true", help="measure no memory: saves a process for each side")
    p.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for models.json and models.md")
    return p


def cases(folder: Path, name: str, options: argparse.Namespace) -> list[Case]:
    """The trainings of one model, whose checkpoint is written to `folder`."""
    gpu, config = options.device == "gpu", SIZES[name]
    dtype = options.dtype or ("bfloat16" if gpu else "float32")
    length = min(options.length or (1024 if gpu else 128), config.context)
    model = (GPT2 if isinstance(config, GPT2Config) else Bert)(config)  # type: ignore[arg-type]
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    models.save(folder, model, params)
    return [
        Case(str(folder), name, config, targets, method, options.rank, options.batch, length, dtype, options.device)
        for targets in options.targets
        for method in options.method
    ]


def missing(device: str) -> str | None:
    """The reason that nothing can be compared on this machine, or None."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        return f"PEFT's side needs {', '.join(absent)}: pip install {' '.join(absent)}"
    if device == "gpu":
        try:
            jax.devices("gpu")
        except RuntimeError as error:
            return f"JAX finds no GPU ({error}): pip install 'jax[cuda12]', or --device cpu"
        if not _imported("torch").cuda.is_available():
            return "torch finds no GPU: install its build for CUDA, or --device cpu"
    return None


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Measures, prints the table, writes it beside the JSON. Nothing is measured where one side cannot run."""
    command = parser()
    options = command.parse_args(arguments)
    if options.rank % 2:
        command.error(f"--rank {options.rank}: PEFT's rank for GPT-2's c_attn is half as large again: give an even one")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two libraries share the GPU
    if reason := missing(options.device):
        print(f"skipped: {reason}")
        return []
    gpu = options.device == "gpu"
    results: list[Result] = []
    with jax.default_device(jax.devices(options.device)[0]):
        for name in options.model or (["gpt2-medium"] if gpu else ["gpt2", "bert-base"]):
            with tempfile.TemporaryDirectory() as folder:
                for case in cases(Path(folder), name, options):
                    forms = options.form or ["compiled" if gpu else "eager"]
                    results += measure(case, forms, options.rounds, not options.no_memory)
        here = machine() | {"threads": _cores(), **{name: version(name) for name in NEEDED}}
    record = {
        "machine": here,
        "options": {**vars(options), "out": str(options.out)},
        "results": [dataclasses.asdict(result) for result in results],
    }
    write(options.out, "models", table(results), record)
    return results


if __name__ == "__main__":
    main()
