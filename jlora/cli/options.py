"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check all, say what would be written, and write nothing.")]
Adapter = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="A folder of PEFT or jlora, or a file of kohya or Diffusers.")
]
Base = Annotated[
    Path, typer.Argument(metavar="BASE", help="The folder of a checkpoint: safetensors, with or without index.")
]
BaseOption = Annotated[Path | None, typer.Option("--base", metavar="BASE", help="The folder of the base's checkpoint.")]
Pickled = Annotated[bool, typer.Option("--pickled", help="Read a pickle (.bin), without running what it says.")]
Component = Annotated[
    str | None,
    typer.Option(
        "--component",
        help="Of a pipeline's adapter: unet, text_encoder or text_encoder_2; what it holds of others is left out.",
    ),
]
