"""Entry of the command line: its exit codes, and every error in one line."""

import os
import sys
import traceback
from collections.abc import Sequence

DONE, NO, BAD, BUG, STOPPED = 0, 1, 2, 70, 130
EXTRA = 'the command line needs its extra: pip install "jlora[cli]"'


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      arguments: without the program's name; those of this process when None.

    Returns:
      0; 1 where `verify` says no; 2 for bad input, with one line on stderr that says what to do; 70 for an error in
      jlora, with its traceback; 130 where it was interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        from jlora.cli.app import app
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        return _fail(EXTRA)
    command = next((word for word in given if not word.startswith("-")), "")
    known = command in {row.name for row in app.registered_commands}
    prefix = f"jlora {command}: " if known else "jlora: "
    try:
        status = app(args=given, prog_name="jlora", standalone_mode=False)
    except KeyboardInterrupt:
        _fail(f"{prefix}stopped")
        return STOPPED
    except BrokenPipeError:  # whoever read stopped
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (OSError, ValueError, ImportError) as error:
        return _fail(prefix + told(error))
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of typer's, wherever its class is defined
            return _fail(f"{prefix}{_one_line(error.format_message())} (see {prefix[:-2]} --help)")
        if type(error).__name__ == "Abort":  # and others of its versions
            _fail(f"{prefix}stopped")
            return STOPPED
        traceback.print_exc()
        _fail(f"{prefix}this is an error in jlora: report it, with the lines above")
        return BUG
    if status == STOPPED:  # what typer makes of a KeyboardInterrupt
        _fail(f"{prefix}stopped")
    return status if isinstance(status, int) else DONE


def told(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        place = f"'{error.filename}': " if error.filename else ""
        return _one_line(f"{place}{error.strerror}")
    return _one_line(str(error) or type(error).__name__)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _fail(text: str) -> int:
    print(text, file=sys.stderr)
    return BAD
