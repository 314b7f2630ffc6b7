"""Draws the plots of finished runs again, from the numbers that they left.

    python -m experiments.redraw experiments/results/quickstart runs/compare_methods

Each folder is one that `experiments.train`, `experiments.compare` or `experiments.finetune` filled. Nothing in it but
its plots is written.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jlora
from experiments import plots
from experiments.comparison import plots as comparison_plots
from experiments.comparison.price import Price
from experiments.comparison.report import Entrant, TaskResults
from experiments.comparison.trial import Trial, Trials
from experiments.config import ConfigError, Run
from experiments.evaluate import Point
from experiments.evaluate import Scores as BitsPerByte
from experiments.finetuning import loop
from experiments.finetuning import plots as finetuning_plots
from experiments.finetuning.report import Plan
from experiments.finetuning.work import Metric as Deciding
from experiments.measure import Cost
from experiments.report import Base, Outcome, Results
from experiments.tasks import Metric, Score, Scores

Read = Mapping[str, Any]


class Written(str):
    """The `repr` of a method, which is all that is left of it."""

    def __repr__(self) -> str:
        return str(self)


class Named(NamedTuple):
    """What a report says of a contender."""

    name: str
    label: str
    family: str
    method: Written


class Shown(NamedTuple):
    """The scores that a fine-tuning experiment is told by."""

    decides: Deciding
    shows: Deciding


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
        read = json.loads(path.read_text())
        if "sweep" in read:
            plots.sweep(folder / "sweep.png", ends(read), new=_domains(read)[0])
            return ["sweep.png"]
        if "domains" in read:
            plots.learning_curves(folder / "learning_curves.png", results(read))
            plots.learned_forgotten(folder / "learned_forgotten.png", results(read))
            return ["learning_curves.png", "learned_forgotten.png"]
        if "tasks" in read:
            return [name for task in compared(read) for name in comparison_plots.draw(folder, task)]
        return _finetuned(folder, read)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is not what a run of this version writes: {error!r}") from error


# -- one kind of run each ----------------------------------------------------------------------------------------------


def results(read: Read) -> Results:
    """What `experiments.report.as_json` wrote."""
    outcomes, whole = [], read["base"]
    for run in read["runs"]:
        trainable = run["trainable_parameters"]
        outcomes.append(
            Outcome(
                run=Run(run["name"], run["label"], run["learning_rate"], rank=run["rank"]),
                curve=tuple(Point(**point) for point in run["curve"]),
                scores=BitsPerByte(**run["bits_per_byte"]),
                count=jlora.Count(trainable, round(100 * trainable / run["trainable_percent"])),
                cost=Cost(**run["step"]),
                adapter_bytes=run["adapter_bytes"],
                difference=run["largest_lifted_merged_difference"],
            )
        )
    base = Base(
        BitsPerByte(**whole["bits_per_byte"]),
        tuple(Point(**point) for point in whole["curve"]),
        whole["parameters"],
        whole["checkpoint_bytes"],
    )
    return Results(read["domains"]["new"], read["domains"]["old"], base, tuple(outcomes), read["reference"])


def ends(read: Read) -> list[tuple[Run, list[Point]]]:
    """The runs of a sweep, each with the last point of its curve alone."""
    return [
        (Run(row["label"], row["label"], row["learning_rate"]), [Point(0, None, row["new"], row["old"])])
        for row in read["sweep"]
    ]


def compared(read: Read) -> list[TaskResults]:
    """What `experiments.comparison.report.as_json` wrote, task by task."""
    labels = {task["name"]: task["label"] for task in read["config"]["tasks"]}
    return [
        TaskResults(
            name=name,
            label=labels[name],
            metric=Metric(**task["metric"]),
            old=task["domains"]["old"],
            new=task["domains"]["new"],
            base=_scores(task["base"]["test"]),
            parameters=task["base"]["parameters"],
            entrants=tuple(map(_entrant, task["contenders"])),
        )
        for name, task in read["tasks"].items()
    ]


def _entrant(read: Read) -> Entrant:
    trials = read["trials"]
    return Entrant(
        Named(read["name"], read["label"], read["family"], Written(read["method"])),
        Trials(tuple(map(_trial, trials["sweep"])), trials["best"], tuple(map(_trial, trials["finals"]))),
        Price(**read["price"]),
    )


def _trial(read: Read) -> Trial:
    scores = {split: read[split] and _scores(read[split]) for split in ("validation", "test")}
    return Trial(**{**read, **scores})


def _scores(read: Sequence[Sequence[float]]) -> Scores:
    return Scores(*(Score(*score) for score in read))


def _finetuned(folder: Path, read: Read) -> list[str]:
    plans = {
        name: Plan(**run["plan"] | {"count": jlora.Count(**run["plan"]["count"])}) for name, run in read["runs"].items()
    }
    found = {name: [loop.as_result(result) for result in run["results"]] for name, run in read["runs"].items()}
    shown = Shown(*(Deciding(*read["metrics"][field]) for field in Shown._fields))
    title = finetuning_plots.title_of(read["config"]["name"], read["config"]["task"]["label"])
    finetuning_plots.quality(folder / "quality.png", shown, plans, found, f"{title}, test")
    finetuning_plots.curves(folder / "curves.png", shown, plans, found, title)
    return ["quality.png", "curves.png"]


def _domains(read: Read) -> tuple[str, str]:
    return read["domains"]["new"], read["domains"]["old"]


if __name__ == "__main__":
    sys.exit(main())
