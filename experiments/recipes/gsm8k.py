r"""Llama 2 7B learns MetaMathQA and is asked GSM8K's questions, as in LoRA-GA's comparison of methods (its Table 2).

Shared by the five configs. What is the papers' and what is ours:

- Training data: the first 100,000 rows of MetaMathQA whose type has "GSM" in it, each up to "The answer is", after the
  prompt `Q: ...\nA: `; the loss counts the answer alone (LoRA-GA's reproduce/data.py). 512 tokens: longer rows are cut
  here and left out there.
- Weights: all linear layers of the blocks, r=8, alpha=16, A uniform (reproduce/conf/peft/all.yaml, conf/init).
- Schedule: one epoch of 32 rows (conf/model/llama.yaml), 3 % of warm-up, a cosine to zero, no weight decay, gradients
  clipped at 1 (examples/float_llama2-7b_metamath.py).
- Learning rate: 2e-5, of that example and of PiSSA's scripts/run_*.sh. What Table 2's baselines had is in neither.
- Validation: the next 1,000 such rows, by their loss. Ours; there is one evaluation, at the end.
- Score: the number after `####`, to the letter, as the data's authors compare; `last number` takes the text's last
  one. LoRA-GA's reproduce/eval_gsm8k.py takes the digits after `####`.

Sources: Wang et al., "LoRA-GA", arXiv 2407.05000, and Outsider565/LoRA-GA; Meng et al., "PiSSA", arXiv 2404.02948, and
GraphPKU/PiSSA; Yu et al., "MetaMath", arXiv 2309.12284; Cobbe et al., arXiv 2110.14168 (GSM8K).
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import metrics
from experiments.config import Decoding, Experiment, Measure, Run, Schedule
from experiments.data import hub, sources
from experiments.data.examples import Prompted, References
from experiments.data.files import DataError, collect, existing, filled
from experiments.data.instructions import read_gsm8k
from experiments.recipes import tiny
from experiments.tasks.completion import Completion, Splits
from experiments.tasks.task import Scores

LINEAR = r"(attn|mlp)/"
PROMPT = "Q: {}\nA:"
TRAINING, VALIDATION = 100_000, 1_000  # rows


def experiment(run: Run) -> Experiment:
    """One method, with three seeds."""
    return Experiment(
        name=f"llama2_7b_gsm8k_{run.name}",
        base="meta-llama/Llama-2-7b-hf",
        task=Completion(
            "Llama 2 7B on GSM8K", read, measure, Decoding(new_tokens=512, batch=32), length=512, joiner="",
        ),
        runs=(dataclasses.replace(run, targets=LINEAR),),
        train=Schedule("1 epochs", batch=32, warmup=0.03, decay="cosine", clip=1.0),
        seeds=(0, 1, 2),
        options={"dtype": "bfloat16", "param_dtype": "bfloat16", "scan": True, "remat": True},
        evaluate_batch=16,
        measure=Measure(rounds=0),
    )  # fmt: skip


def small(whole: Experiment, **options: Any) -> Experiment:
    """A few steps of a tiny Llama."""
    assert isinstance(whole.task, Completion)
    decoding = dataclasses.replace(whole.task.decoding, new_tokens=8, batch=16)
    return dataclasses.replace(
        whole,
        name=f"{whole.name}_small",
        base=tiny.llama,
        task=dataclasses.replace(whole.task, data=few, decoding=decoding, length=96, joiner=" "),
        runs=tuple(dataclasses.replace(run, learning_rate=1e-2) for run in whole.runs),
        train=dataclasses.replace(whole.train, steps=4, batch=4, evaluate_every=2),
        seeds=(0,),
        options={"scan": True, **options},
        evaluate_batch=8,
    )


def read() -> Splits:
    """MetaMathQA to learn, GSM8K's test split to be asked."""
    learned = sources.folder_or_hub(
        "metamathqa",
        lambda folder: read_metamath(folder / "MetaMathQA-395K.json"),
        lambda: metamath("MetaMathQA", hub.from_hub("meta-math/MetaMathQA", split="train")),
    )
    asked = sources.folder_or_hub(
        "gsm8k",
        lambda folder: read_gsm8k(folder / "test.jsonl", PROMPT),
        lambda: hub.prompted(hub.from_hub("openai/gsm8k", "main", split="test"), template=PROMPT),
    )
    return splits(learned, asked, TRAINING, VALIDATION)


def few() -> Splits:
    """A tiny data set of the same form."""
    learned = read_metamath(tiny.temporary(tiny.metamath) / "MetaMathQA-395K.json")
    return splits(learned, read_gsm8k(tiny.temporary(tiny.gsm8k) / "test.jsonl", PROMPT), 16, 8)


def splits(learned: Sequence[Prompted], asked: Sequence[Prompted], training: int, validation: int) -> Splits:
    """The first rows to learn, the next ones to validate."""
    if len(learned) < training + validation:
        raise DataError(f"MetaMathQA: {len(learned):,} rows, expected at least {training + validation:,}")
    questions = [References(item.prompt, (item.completion,)) for item in asked]
    return Splits(learned[:training], learned[training : training + validation], questions)


def read_metamath(path: str | Path) -> list[Prompted]:
    """The file of MetaMathQA: a list of objects.

    Raises:
      DataError: with the file and the row.
    """
    try:
        rows = json.loads(existing(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: a {type(rows).__name__}, expected a list of objects")
    return metamath(str(path), rows)


def metamath(name: str, rows: Iterable[Mapping[str, Any]]) -> list[Prompted]:
    """Questions and answers of the rows that were made from GSM8K's training split."""

    def read(row: Mapping[str, Any]) -> Prompted | None:
        if missing := [field for field in ("query", "response", "type") if not isinstance(row.get(field), str)]:
            raise DataError(f"no text {missing[0]!r}; there are {', '.join(map(repr, row))}")
        if "GSM" not in row["type"]:
            return None
        answer = row["response"].split("\nThe answer is:")[0]
        return Prompted(PROMPT.replace("{}", filled(row["query"], "query"), 1), filled(answer, "response"))

    return [item for item in collect(name, enumerate(rows, 1), read, unit="row") if item is not None]


def measure(texts: Sequence[str], items: Sequence[References]) -> Scores:
    """Share of right answers, in percent: as the data's authors compare them, and by the last number."""
    solutions = [item.texts[0] for item in items]
    strict, flexible = (metrics.exact_match(texts, solutions, flexible=flag) for flag in (False, True))
    return {"exact match": strict, "last number": flexible}
