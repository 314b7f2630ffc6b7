"""`jlora card`: the README.md that the hub shows of an adapter."""

import json
import os
import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from jlora.cli import show
from jlora.cli.inspect import adapter_report
from jlora.cli.options import Adapter, DryRun, Force, Json
from jlora.interop import formats

TASKS = {
    "CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification",
    "SEQ_2_SEQ_LM": "text2text-generation", "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}  # fmt: skip
CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}  # fmt: skip
HEADS = ("score", "classifier", "out_proj")  # of classifiers; the last is RoBERTa's
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)  # of a model on the hub
METHOD = re.compile(r"[\w .+()^,-]+", re.ASCII)


def card(
    adapter: Adapter,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="The base's name on the hub; the adapter's own by default.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="README.md beside the adapter by default.")] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="As the hub names it: apache-2.0, mit, llama3.1.")
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option("--language", help="en, de, ...; several times for several.")
    ] = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Writes the model card of an adapter, with the metadata that the hub and PEFT expect."""
    opened = formats.open_adapter(adapter)
    named = base_model or opened.base
    if not named:
        raise ValueError(f"'{adapter}' does not say what its base is: pass --base-model owner/name")
    if os.path.isabs(named) or (os.path.exists(named) and base_model is None):
        raise ValueError(f"'{adapter}' names its base by the folder '{named}': pass --base-model owner/name")
    if not NAME.fullmatch(named):
        whose = "--base-model" if base_model is not None else f"the base of '{adapter}'"
        raise ValueError(f"{whose}, {named!r:.200}, is no name on the hub: pass --base-model owner/name")
    text = card_text(opened, named, licence, language or [])
    target = out or (opened.path if opened.path.is_dir() else opened.path.parent) / "README.md"
    show.check_free(target, force)
    if not dry_run:
        show.write_text(target, text)
    report = {"command": "card", "out": str(target), "dry_run": dry_run, "card": text}
    show.show(report, as_json, lambda console: console.print(text if dry_run else f"wrote {target}", markup=False))


def card_text(opened: formats.Opened, base: str, licence: str | None, languages: list[str]) -> str:
    """The card: YAML in front, then what the adapter is and how it is loaded.

    What a stranger's config says goes into YAML, Markdown and code that people run: names that could leave their place
    are refused, by `card` the base's, and here the method's.
    """
    if not METHOD.fullmatch(opened.method):
        raise ValueError(f"'{opened.path}' calls its method {opened.method!r:.200}, which is no name")
    report = adapter_report(opened)
    library = {"peft": "peft", "jlora": "jlora"}.get(opened.format, "diffusers")
    pipeline = TASKS.get(str(opened.config.get("task_type"))) or ("text-to-image" if library == "diffusers" else None)
    front: dict[str, Any] = {"base_model": base, "library_name": library}
    front |= {"pipeline_tag": pipeline} if pipeline else {}
    front |= {"license": licence} if licence else {}
    front |= {"language": languages} if languages else {}
    front |= {"tags": [f"base_model:adapter:{base}", "lora", *(["peft"] if library != "peft" else []), "jlora"]}
    ranks = ", ".join(f"{n} of rank {r}" for r, n in report["ranks"].items()) or "none has a rank"
    name = opened.path.name if opened.path.is_dir() else opened.path.stem
    return "\n".join([
        "---", *_yaml(front), "---", "", f"# {' '.join(name.split())}", "",
        f"{opened.method} of [{base}](https://huggingface.co/{base}): {report['parameters']:,} parameters in "
        f"{report['layers']} layers ({ranks}), {show.size(report['bytes'])}.", "",
        "## Use", "", "```python", *_use(opened, base), "```", "",
        "Merged into the base, for serving without any of these:", "", "```bash",
        f"jlora merge BASE {shlex.quote(' '.join(name.split()))} merged/", "```", "",
    ])  # fmt: skip


def _use(opened: formats.Opened, base: str) -> list[str]:
    folder = "owner/this-adapter"
    loads = ["import jlora, jlora.models", "", f"base = jlora.models.load({base!r})"]
    jlora = {
        "jlora": [*loads, 'adapted = jlora.load("this-adapter/", base.params)'],
        "peft": [*loads, f"adapted = jlora.peft.load({folder!r}, base.params, model=base.model)"],
    }
    name, labels = _class_of(opened), _labels(opened)
    more = f", num_labels={labels}" if labels else ""
    theirs = {
        "peft": [
            "from peft import PeftModel", f"from transformers import {name}", "",
            f"base = {name}.from_pretrained({base!r}{more})", f"model = PeftModel.from_pretrained(base, {folder!r})",
        ],
    }  # fmt: skip
    diffusers = [
        "from diffusers import DiffusionPipeline", "", f"pipeline = DiffusionPipeline.from_pretrained({base!r})",
        f"pipeline.load_lora_weights({folder!r})",
    ]  # fmt: skip
    if opened.format not in jlora:
        return diffusers
    kind = opened.format
    return [*(["# PEFT", *theirs[kind], "", "# jlora"] if kind in theirs else []), *jlora[kind]]


def _class_of(opened: formats.Opened) -> str:
    """The class of transformers that has the modules which the adapter names: AutoModel has no heads."""
    return CLASSES.get(str(opened.config.get("task_type")), "AutoModel")


def _labels(opened: formats.Opened) -> int | None:
    """Number of classes of a classifier's head that the adapter holds; transformers makes two of them by itself."""
    if opened.config.get("task_type") not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    heads = [own for own in opened.layers if own.kind == "full" and own.module.rpartition(".")[2] in HEADS]
    counts = {own.tensors["value"].shape[0] for own in heads if own.parameter == "weight"}
    return counts.pop() if len(counts) == 1 else None


def _yaml(front: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, value in front.items():
        if isinstance(value, list):
            lines += [f"{name}:", *(f"- {_scalar(item)}" for item in value)]
        else:
            lines.append(f"{name}: {_scalar(value)}")
    return lines


def _scalar(text: str) -> str:
    plain = text.replace("-", "").replace("/", "").replace(".", "").replace("_", "").replace(":", "")
    words = ("no", "yes", "on", "off", "true", "false", "null", "n", "y")
    if (
        plain.isalnum()
        and not plain.isdigit()
        and text.lower() not in words
        and ": " not in text
        and text[0] not in "-:"
    ):
        return text
    return json.dumps(text, ensure_ascii=False)  # which is YAML, line ends and all
