"""Which plots an experiment has."""

from collections.abc import Callable
from pathlib import Path

from experiments.report import curves, families, scores
from experiments.report.results import Results

Draw = Callable[[Path, Results], None]


def title_of(results: Results) -> str:
    """Title of the tables and of some plots."""
    return f"{results.name}: {results.label}" + (", test" if results.tested else ", validation")


def kinds(results: Results) -> dict[str, Draw]:
    """The plots that there are numbers for, by file name.

    A comparison of families has a point and a bar for each run; few runs have their curves and, where something can be
    forgotten, that beside what was learned.
    """
    title = f"{results.name}: {results.label}"
    if not results.tested:
        return {"sweep.png": curves.sweep}
    if results.compares_families and results.old is not None:
        found: dict[str, Draw] = {
            "quality.png": families.quality_against_parameters,
            "forgetting.png": families.forgotten_against_learned,
        }
        prices = [outcome.price for outcome in results.outcomes if outcome.price is not None]
        if prices:
            found["time.png"] = families.time_against_reference
        if any(price.apart is not None for price in prices):
            found["latency.png"] = families.latency
        return found
    if results.old is not None:
        found = {"learning_curves.png": curves.learning_curves, "learned_forgotten.png": scores.learned_forgotten}
    else:
        found = {
            "quality.png": lambda path, results: scores.quality(path, results, f"{title}, test"),
            "curves.png": lambda path, results: curves.training_curves(path, results, title),
        }
    return found | ({"sweep.png": curves.sweep} if any(outcome.sweep for outcome in results.outcomes) else {})


def names(results: Results) -> list[str]:
    """The file names."""
    return list(kinds(results))


def draw(folder: Path, results: Results) -> list[str]:
    """Draws all plots into a folder. Returns their file names."""
    for name, plot in kinds(results).items():
        plot(folder / name, results)
    return names(results)
