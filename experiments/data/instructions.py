"""Prompts and completions from JSON lines: GSM8K, and instruction data in general.

Source: Cobbe et al., "Training Verifiers to Solve Math Word Problems", arXiv 2110.14168; openai/grade-school-math.
"""

import json
from pathlib import Path

from experiments.data.examples import Prompted
from experiments.data.files import DataError, filled, read_lines, shown

GSM8K_PROMPT = "Question: {}\nAnswer:"
INSTRUCTION_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)
"""Alpaca's prompt without an input, in which PiSSA and others train on mathematics."""


def read_gsm8k(path: str | Path, prompt: str = GSM8K_PROMPT) -> list[Prompted]:
    """GSM8K's questions in a prompt, and the answers: a solution in steps, then `#### ` and the number.

    Args:
      path: a `.jsonl` with "question" and "answer".
      prompt: with `{}` for the question; `INSTRUCTION_PROMPT` is another.

    Raises:
      DataError: with the file and the line, also for an answer without `####`.
    """

    def check(example: Prompted) -> Prompted:
        if "#### " not in example.completion:
            raise DataError(f"no '#### ' and number at the end of the answer: {shown(example.completion[-40:])}")
        return example

    return read_lines(path, lambda line: check(_read(line, "question", "answer", prompt)))


def read_instructions(
    path: str | Path, prompt: str = "prompt", completion: str = "completion", template: str = "{}"
) -> list[Prompted]:
    """JSON lines, each an object with a prompt and a completion.

    Args:
      path: of the file.
      prompt, completion: the names of the two fields.
      template: with `{}` for the prompt.

    Raises:
      DataError: with the file and the line.
    """
    return read_lines(path, lambda line: _read(line, prompt, completion, template))


def _read(line: str, prompt: str, completion: str, template: str) -> Prompted:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"not JSON ({error}): {shown(line)}") from error
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in (prompt, completion)):
        there = ", ".join(map(repr, row)) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(f"expected an object with texts {prompt!r} and {completion!r}, got {there}")
    return Prompted(template.replace("{}", filled(row[prompt], prompt), 1), filled(row[completion], completion))
