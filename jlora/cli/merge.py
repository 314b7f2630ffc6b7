"""`jlora merge`: a checkpoint with an adapter in it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jlora.cli import show
from jlora.cli.convert import one_of
from jlora.cli.options import Adapter, Base, Component, DryRun, Force, Json, Pickled
from jlora.interop import formats
from jlora.interop.merge_folder import Merged, Report, merge_folder

WORTH_SAYING = 0.1  # of an update that a cast rounds away


def merge(
    base: Base,
    adapter: Adapter,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, bfloat16 or float16 of all tensors; the base's own by default."),
    ] = None,
    component: Component = None,
    tied: Annotated[
        bool,
        typer.Option(
            "--tied",
            help="Merge the head's factors into the embedding, where they are one tensor. Without it a head that "
            "was trained whole becomes a tensor of its own, and config.json gets tie_word_embeddings=false.",
        ),
    ] = False,
    pickled: Pickled = False,
    every: Annotated[bool, typer.Option("--all", help="A row for each tensor.")] = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Merges an adapter into a checkpoint's folder, of any architecture, and writes a new folder.

    The sum is taken in float32 and cast once; what the cast rounds away of each update is said. A large model needs no
    more memory than one file of it. An interrupted run goes on where it was: run it again. BASE is never written.
    """
    opened = formats.open_adapter(adapter, base, pickled=pickled, component=component)
    layers = one_of(opened, component)
    with show.bar("merging", as_json) as progress:
        report = merge_folder(
            base, layers, out, dtype=dtype, fan_in_fan_out=opened.fan_in_fan_out, tied=tied, force=force,
            dry_run=dry_run, progress=progress,
        )  # fmt: skip
    told = {
        "command": "merge",
        "method": opened.method,
        "dry_run": dry_run,
        "left_out": opened.left_out,
        **report.to_json(),
    }
    show.show(told, as_json, lambda console: _text(console, report, opened.left_out, dry_run, every))


def _text(console: Console, report: Report, left_out: int, dry_run: bool, every: bool) -> None:
    rows = sorted(report.merged, key=lambda row: -row.rounding)
    shown = rows if every else rows[:10]
    if not dry_run:
        show.table(
            console, ("tensor", "kind", "dtype", "update / base", "rounded away"),
            [(row.key, "+".join(row.kinds), row.dtype, row.change, row.rounding) for row in shown], left=3,
        )  # fmt: skip
        if len(rows) > len(shown):
            console.print(f"... and {len(rows) - len(shown)} tensors with less rounded away (--all shows them)")
        _warn(console, rows)
    verb = "would merge" if dry_run else "merged"
    files = f"{report.shards} file{'s' if report.shards > 1 else ''}, {show.size(report.size)}"
    resumed = f", {report.resumed} from an interrupted run" if report.resumed else ""
    added = f", {len(report.added)} added" if report.added else ""
    show.left_out(console, left_out)
    for note in report.notes:
        console.print(note, markup=False)
    tensors = f"{len(report.merged)} of {len(report.merged) + report.kept} tensors{added}"
    console.print(
        f"{verb} {tensors} into {report.out} ({files}{resumed})",
        markup=False,
    )


def _warn(console: Console, rows: list[Merged]) -> None:
    lossy = [row for row in rows if row.rounding > WORTH_SAYING]
    if lossy:
        console.print(
            f"{len(lossy)} updates lose over {WORTH_SAYING:.0%} to rounding: --dtype float32 keeps them, or serve the "
            "adapter apart",
            markup=False,
        )
