"""Draws the plots of finished runs again, from the numbers that they left.

    python -m experiments.redraw experiments/results/quickstart runs/minilm_sst2

Each folder is one that `experiments.train` filled. Nothing in it but its plots is written.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.configfile import ConfigError
from experiments.report import plots
from experiments.report.results import from_json


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser("python -m experiments.redraw", description="Draw the plots of runs again.")
    parser.add_argument("folders", nargs="+", type=Path, help="each with the results.json of a run")
    try:
        for folder in parser.parse_args(arguments).folders:
            print(f"{folder}: {', '.join(redraw(folder))}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def redraw(folder: Path) -> list[str]:
    """Draws the plots of one folder. Returns their file names.

    Raises:
      ConfigError: if there is no results.json, or it is of another form.
    """
    path = folder / "results.json"
    try:
        return plots.draw(folder, from_json(json.loads(path.read_text())))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is not what a run of this version writes: {error!r}") from error


if __name__ == "__main__":
    sys.exit(main())
