"""Output: JSON or text, tables, bars, sizes."""

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

Report = Mapping[str, Any]


def show(report: Report, as_json: bool, text: Callable[[Console], None]) -> None:
    """Prints a command's result to stdout, as one JSON object or as text."""
    if as_json:
        print(json.dumps(plain(report), indent=1, ensure_ascii=False))
    else:
        wide = None if sys.stdout.isatty() else 1000  # a file's lines are not cut
        text(Console(file=sys.stdout, highlight=False, soft_wrap=True, width=wide))


def plain(value: Any) -> Any:
    """A value in JSON's types; numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def table(console: Console, header: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> None:
    """Prints a table; the columns after the first `left` are numbers."""
    made = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for i, name in enumerate(header):
        made.add_column(name, justify="left" if i < left else "right", no_wrap=i > 0, overflow="fold")
    for row in rows:
        made.add_row(*(_cell(value) for value in row))
    console.print(made)


def _cell(value: Any) -> str:
    return number(value) if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def number(value: float) -> str:
    """Three digits.

    >>> number(0.012345), number(12345.6), number(float("nan"))
    ('0.0123', '1.23e+04', '')
    """
    return "" if math.isnan(value) else f"{value:.3g}"


def size(count: float) -> str:
    """Bytes.

    >>> size(999), size(2_500_000), size(141e9)
    ('999 B', '2.50 MB', '141 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit == "B" or count >= 100 else f"{count:#.3g} {unit}"
        count /= 1000
    return f"{count:#.3g} TB"


def left_out(console: Console, count: int) -> None:
    """Says how many tensors of an adapter's file were not looked at."""
    if count:
        console.print(f"{count} tensors of the file are of other models than --component, and are left out")


@contextmanager
def bar(label: str, quiet: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """A bar on stderr, where that is a terminal: a function (done, whole, what is next)."""
    console = Console(file=sys.stderr)
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn(label),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=None, note="")
        yield lambda done, whole, note: progress.update(task, completed=done, total=whole, note=note[-60:])


def check_free(path: Path, force: bool) -> None:
    """Raises FileExistsError for a place to write that is taken."""
    if (path.exists() or path.is_symlink()) and not (path.is_dir() and not any(path.iterdir())) and not force:
        raise FileExistsError(f"'{path}' is there: name another one, or pass --force to replace it")


def write_text(path: Path, text: str) -> None:
    """Writes a file beside its place, and renames it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove(path: Path) -> None:
    """Deletes a folder or a file, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_folder(out: Path, force: bool) -> None:
    """Raises FileExistsError for a folder to write that is taken, or that is none."""
    check_free(out, force)
    if out.exists() and (not out.is_dir() or any(path.is_dir() for path in out.iterdir())):
        raise FileExistsError(f"'{out}' is a file or holds folders, which are not replaced: name another one")


@contextmanager
def staged(out: Path, force: bool, dry_run: bool = False) -> Iterator[Path]:
    """A folder beside `out` to write to, which takes its name at the end, or is deleted where that is not reached.

    Of a dry run it is one among the system's temporary files, so that all that writing checks is checked, and is
    deleted in any case.
    """
    check_folder(out, force)
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="jlora-dry-run-") as name:
            yield Path(name)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
