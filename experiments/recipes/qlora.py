r"""Llama learns the best replies of OASST1, held in 4 bits: QLoRA's recipe of the Guanaco models.

What is the paper's and what ours:

- Base: NF4 in blocks of 64 with double quantisation, all linear layers but the head; bfloat16 for the rest and for the
  computation (scripts/finetune_guanaco_*.sh; finetune_llama2_guanaco_7b.sh for Llama 2).
- Data: openassistant-guanaco, 9,846 conversations, each one text `### Human: ...### Assistant: ...` of which 512 tokens
  are learnt, the user's as well (qlora.py). Here the first `### Human:`, which all begin with, is the prompt, and not
  counted. 1,000 of the training file are for validation; theirs are drawn at random, ours are its last.
- Schedule: 1,875 steps of 16 rows, a constant rate, AdamW with b2 = 0.999, no weight decay, gradients clipped at 0.3
  (the scripts, which ask for 3 % of warm-up: transformers' constant schedule has none). Their rows are grouped by
  length, ours are drawn at random: the same rows in another order.
- LoRA r=64, alpha=16 on all linear layers; dropout 0.1 and 2e-4 for 7B and 13B, 0.05 and 1e-4 for 33B and 65B.
- Optimizer: theirs is paged, in 32 bits, for all sizes, and needed by 33B and 65B on one GPU. Ours waits in the host's
  memory between two steps for these, and lies on the device for 7B and 13B, which have room; the numbers are the same.
- Score: theirs is MMLU and GPT-4's opinion of answers, neither of which is here. Ours is ROUGE-L of the answers to the
  questions of the evaluation file, which is no aim of the paper, and the validation loss.

Sources: Dettmers et al., "QLoRA", arXiv 2305.14314; artidoro/qlora. The names of the data's files are written from
memory.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jlora
from experiments import metrics
from experiments.config import Decoding, Experiment, Held, Measure, Run, Schedule
from experiments.data import hub, sources
from experiments.data.examples import Prompted, References
from experiments.data.files import DataError, collect, read_lines
from experiments.recipes import tiny
from experiments.tasks.completion import Completion, Splits
from experiments.tasks.task import Scores

LINEAR = r"(attn|mlp)/"
HUMAN, ASSISTANT = "### Human:", "### Assistant:"
VALIDATION, ASKED = 1_000, 100  # rows
LONGEST = 2_000  # characters of a question that is asked


def experiment(
    name: str,
    label: str,
    base: str,
    learning_rate: float,
    dropout: float,
    accumulate: int,
    optimizer_memory: Literal["device", "pinned_host"] = "device",
) -> Experiment:
    """One size."""
    method = jlora.lora(64, alpha=16, init="kaiming_uniform", dropout=dropout)
    return Experiment(
        name=name,
        base=base,
        task=Completion(f"{label} on OASST1", read, measure, Decoding(new_tokens=256, batch=16), joiner=""),
        runs=(Run("qlora", "QLoRA r=64", method, learning_rate, LINEAR),),
        train=Schedule(
            1875,
            batch=16,
            evaluate_every=187,
            warmup=0,
            decay="constant",
            clip=0.3,
            accumulate=accumulate,
            keep="last",
            optimizer_memory=optimizer_memory,
        ),
        options={"dtype": "bfloat16", "param_dtype": "bfloat16", "scan": True, "remat": True},
        evaluate_batch=16,
        measure=Measure(rounds=0),
        held=Held("nf4", block=64, double=True),
    )


def small(whole: Experiment) -> Experiment:
    """A few steps of a tiny Llama, held in 4 bits as the large one.

    The optimizer's state lies on the device: JAX 0.10 has no programs for the CPU that return it to the host's memory.
    """
    assert isinstance(whole.task, Completion)
    decoding = dataclasses.replace(whole.task.decoding, new_tokens=8)
    return dataclasses.replace(
        whole,
        name=f"{whole.name}_small",
        base=tiny.llama,
        task=dataclasses.replace(whole.task, data=few, decoding=decoding, length=96),
        runs=(dataclasses.replace(whole.runs[0], learning_rate=1e-2),),
        train=dataclasses.replace(
            whole.train, steps=4, batch=4, evaluate_every=2, accumulate=2, optimizer_memory="device"
        ),
        evaluate_batch=8,
    )


def read() -> Splits:
    """The conversations, from files or from the hub."""
    train, asked = sources.folder_or_hub(
        "guanaco",
        lambda folder: tuple(read_guanaco(folder / f"openassistant_best_replies_{part}.jsonl") for part in PARTS),
        lambda: tuple(
            guanaco(part, hub.from_hub("timdettmers/openassistant-guanaco", split=part)) for part in ("train", "test")
        ),
    )
    return splits(train, asked, VALIDATION)


PARTS = ("train", "eval")


def few() -> Splits:
    """A tiny data set of the same form."""
    folder = tiny.temporary(tiny.guanaco)
    train, asked = (read_guanaco(folder / f"openassistant_best_replies_{part}.jsonl") for part in PARTS)
    return splits(train, asked, 4)


def splits(train: Sequence[str], asked: Sequence[str], validation: int) -> Splits:
    """The last rows to validate, the first questions to answer."""
    if len(train) <= validation:
        raise DataError(f"OASST1: {len(train):,} conversations, expected more than {validation:,}")
    rows = [Prompted(HUMAN, text.removeprefix(HUMAN)) for text in train]
    questions = [question(text) for text in asked if len(text.partition(ASSISTANT)[0]) <= LONGEST]
    return Splits(rows[:-validation], rows[-validation:], questions[:ASKED])


def question(text: str) -> References:
    """The first question of a conversation, and its answer."""
    asked, marker, rest = text.partition(ASSISTANT)
    return References(asked + marker, (rest.partition(HUMAN)[0].strip(),))


def read_guanaco(path: Path) -> list[str]:
    """Lines of JSON with a "text" each."""

    def parse(line: str) -> str:
        try:
            return _text(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"not JSON ({error})") from error

    return read_lines(path, parse)


def guanaco(name: str, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Rows of the hub."""
    return collect(name, enumerate(rows, 1), _text, unit="row")


def _text(row: Any) -> str:
    text = row.get("text") if isinstance(row, Mapping) else None
    if not isinstance(text, str) or not text.startswith(HUMAN) or ASSISTANT not in text:
        raise DataError(f"expected a text of the form '{HUMAN} ...{ASSISTANT} ...', got {str(row)[:60]!r}")
    return text


def measure(texts: Sequence[str], items: Sequence[References]) -> Scores:
    """ROUGE-L of the answers, in percent."""
    answers = [text.partition(HUMAN)[0].strip() for text in texts]
    return {"ROUGE-L": metrics.rouge_l(answers, [item.texts for item in items])}
