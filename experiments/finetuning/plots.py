"""The plots of a fine-tuning experiment."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.finetuning.loop import Result
from experiments.finetuning.report import Plan
from experiments.finetuning.work import Work
from experiments.plots import COLOURS, INK, figure_of


def quality(
    path: Path, work: Work, plans: Mapping[str, Plan], results: Mapping[str, Sequence[Result]], title: str
) -> None:
    """The score on the test split against the trained parameters: a ring for each seed, a dot for the mean."""
    score = work.shows.name
    with figure_of(path, (8.6, 5.2)) as (figure, (ax,)):
        for i, (name, found) in enumerate(results.items()):
            plan, colour = plans[name], COLOURS[i % len(COLOURS)]
            values, marker = [result.test[score] for result in found], "o" if i < len(COLOURS) else "s"
            x = [plan.count.trainable] * len(values)
            ax.plot(x, values, marker, color=colour, markerfacecolor="none", markersize=5, alpha=0.7)
            ax.plot(
                x[0], statistics.fmean(values), marker, color=colour, markersize=9, markeredgecolor="white",
                label=plan.label,
            )  # fmt: skip
        ax.set_xscale("log")
        ax.margins(0.14, 0.12)
        ax.set(title=title, xlabel="trained parameters", ylabel=f"{score} (test)")
        # Beside the axes: methods often have nearly the same number and score, and labels at the dots would collide.
        ax.legend(frameon=False, fontsize=9, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.subplots_adjust(left=0.09, right=0.76, bottom=0.12, top=0.9)


def curves(
    path: Path, work: Work, plans: Mapping[str, Plan], results: Mapping[str, Sequence[Result]], title: str
) -> None:
    """The loss in training and what decides on the validation split, of the first seed."""
    decides = work.decides.name
    with figure_of(path, (10.4, 4.4), columns=2) as (figure, (left, right)):
        for i, (name, found) in enumerate(results.items()):
            points, colour = found[0].points, COLOURS[i % len(COLOURS)]
            style = "-" if i < len(COLOURS) else "--"
            trained = [(p.step, p.loss) for p in points if p.loss is not None]
            left.plot(
                [step for step, _ in trained],
                [loss for _, loss in trained],
                style,
                color=colour,
                marker="o",
                markersize=3,
            )
            right.plot(
                [p.step for p in points], [p.scores[decides] for p in points], style, color=colour, marker="o",
                markersize=3, label=plans[name].label,
            )  # fmt: skip
        left.set(title=title, xlabel="step", ylabel="training loss in nats")
        right.set(xlabel="step", ylabel=f"{decides} (validation)")
        right.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="best")
        figure.subplots_adjust(left=0.07, right=0.98, bottom=0.13, top=0.88, wspace=0.22)
