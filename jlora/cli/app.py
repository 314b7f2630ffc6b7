"""The commands, and the help of all of them."""

import importlib
from collections.abc import Callable

import typer

from jlora.cli.card import card
from jlora.cli.combine import combine
from jlora.cli.convert import convert
from jlora.cli.count import count
from jlora.cli.extract import extract
from jlora.cli.hub import pull, push
from jlora.cli.inspect import inspect
from jlora.cli.merge import merge
from jlora.cli.plan import plan
from jlora.cli.verify import verify

app = typer.Typer(
    name="jlora",
    help="LoRA adapters as files: look at them, merge, convert and combine them.",
    epilog="Exit codes: 0 done, 1 verify says no, 2 bad input, 130 interrupted. `jlora COMMAND --help` has an example.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
COMMANDS: dict[Callable[..., None], str] = {
    inspect: "jlora inspect adapter/",
    merge: "jlora merge Llama-3.1-8B/ adapter/ merged/ --dtype bfloat16",
    convert: "jlora convert adapter/ adapter-kohya.safetensors --to kohya --base stable-diffusion/",
    combine: "jlora combine both/ one/ other/ --weights 0.7,0.3",
    extract: "jlora extract Llama-3.1-8B/ my-fine-tuned/ adapter/ --rank 32",
    count: 'jlora count llama-3.1-8b "dora(16)"',
    plan: "jlora plan llama-2-7b --method 'lora(16)' --batch 1x512 --device h100",
    verify: "jlora verify adapter/ Llama-3.1-8B/",
    card: "jlora card adapter/ --base-model meta-llama/Llama-3.1-8B",
    push: "jlora push adapter/ me/llama-3.1-8b-mine",
    pull: "jlora pull someone/llama-3.1-8b-lora adapter/",
}
for command, example in COMMANDS.items():
    app.command(name=command.__name__, epilog=f"Example: {example}")(command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(importlib.import_module("jlora").__version__)  # the package itself, which imports nothing of here
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass
