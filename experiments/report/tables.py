"""Tables: what a run will do, what it reached, what it cost; as text, for the terminal and as Markdown."""

import statistics
from collections.abc import Callable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from experiments import devices
from experiments.config import Experiment, Held
from experiments.held import in_bits
from experiments.loop import is_finite
from experiments.price import Plan, Price
from experiments.report.results import Outcome, Results
from experiments.tasks.task import Metric, Opened, Params
from experiments.trial import Trial
from jlora import tree

Cells = list[list[str]]
"""A table as text, its header first."""
Quantity = tuple[str, str, Callable[[Outcome], str]]
"""A name, the value of the base, and that of a run."""
_FEW = 3  # runs that stand side by side, a quantity a line
_SHORT = {  # over columns
    "trainable parameters": "trained",
    "percent of all": "%",
    "optimizer state": "optimizer",
    "peak temporary memory, step": "temporaries",
    "FLOPs, step": "FLOPs",
    "time, step": "step",
    "files (base: full checkpoint)": "file",
    "to the full checkpoint": "to base",
    "max |lifted - merged| logit": "lifted - merged",
    "learned (new: base - run)": "learned",
    "learned (new: run - base)": "learned",
    "forgotten (old: run - base)": "forgotten",
    "forgotten (old: base - run)": "forgotten",
}


def opening(experiment: Experiment, opened: Opened, steps: int) -> list[str]:
    """The first lines: data and schedule."""
    train = experiment.train
    dropout = getattr(opened.model.config, "dropout", 0.0)
    seeds = len(experiment.seeds)
    return [
        f"{experiment.name}: {experiment.task.label}",
        *(opened.understood or [f"data      {opened.new.examples:,} training rows; {opened.held_out}"]),
        f"schedule  {steps:,} steps of {train.batch} rows"
        + (f" ({train.steps})" if isinstance(train.steps, str) else "")
        + f", {seeds} seed{'s' if seeds > 1 else ''} a run, dropout {dropout:g} in the model",
        *([f"devices   {devices.current()}"] if devices.current().mesh is not None else []),
        *([f"devices   {devices.unused()}"] if devices.unused() else []),
    ]


def planned(opened: Opened, params: Params, trials: Sequence[Trial], plans: Mapping[str, Plan]) -> list[str]:
    """The model, and what each run trains and needs."""
    leaves = tree.leaves(params)[0].values()
    total, size = sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
    dtypes = "/".join(sorted({str(leaf.dtype) for leaf in leaves}))
    width = max(len(trial.run.label) for trial in trials)
    lines = [f"model     {type(opened.model).__name__}, {total:,} parameters, {dtypes}, {in_bytes(size)}"]
    lines += _held(params, trials, plans)
    for trial in trials:
        plan = plans[trial.run.name]
        lines.append(
            f"{trial.run.label.ljust(width)}  {plan.sites} weights; trains {plan.trainable:,} parameters "
            f"({plan.percent:.2f} %); beside the model {in_bytes(plan.factor_bytes)} trained, "
            f"{in_bytes(plan.optimizer_bytes)} optimizer, {in_bytes(plan.temporary_bytes)} activations"
        )
        if opened.understood:  # a user's own data: the method may come from the command line
            where = "" if trial.run.targets is None else f" on {trial.run.targets}"
            lines.append(f"method    {trial.run.label}: {trial.run.method!r}{where}")
    return lines


def _held(params: Params, trials: Sequence[Trial], plans: Mapping[str, Plan]) -> list[str]:
    """A line for each way in which runs hold the base otherwise than it is."""
    lines: dict[Held, str] = {}
    for trial in trials:
        run, shared = trial.run, trial.trainer.shared
        if run.held.plain or run.held in lines:
            continue
        number, bits = in_bits(trial.held(params), shared.sites, shared.kept(run))
        by = [other.run.label for other in trials if other.run.held == run.held]
        lines[run.held] = (
            f"held      {number:,} parameters in {run.held.in_words}, {bits:.3f} bits each; the base has "
            f"{in_bytes(plans[run.name].base_bytes)}" + ("" if len(by) == len(trials) else f": {', '.join(by)}")
        )
    return list(lines.values())


def tables(results: Results) -> list[Cells]:
    """All tables: scores and costs, with the quantities as lines where there are few runs; and the sweep's."""
    found: list[Cells] = []
    if results.tested:
        parts = (_scores(results), _costs(results))
        if results.old is not None and len(results.outcomes) <= _FEW:
            found.append(_side_by_side(results, [*parts[0], *parts[1]]))
        else:
            found += [_below_each_other(results, part) for part in parts]
    if any(outcome.sweep for outcome in results.outcomes):
        found.append(sweep(results))
    return found


def _side_by_side(results: Results, quantities: Sequence[Quantity]) -> Cells:
    header = ["test split", "base", *(_marked(outcome) for outcome in results.outcomes)]
    return [header] + [[name, of_base, *map(of_run, results.outcomes)] for name, of_base, of_run in quantities]


def _below_each_other(results: Results, quantities: Sequence[Quantity]) -> Cells:
    header = ["test split", *(_SHORT.get(name.strip(), name.strip()) for name, *_ in quantities)]
    base = [["base", *(of_base for _, of_base, _ in quantities)]] if any(value for _, value, _ in quantities) else []
    rows = [[_marked(outcome), *(of_run(outcome) for *_, of_run in quantities)] for outcome in results.outcomes]
    return [header, *base, *rows]


def _marked(outcome: Outcome) -> str:
    """The label; with what is said of runs whose result is what was kept before they diverged."""
    return outcome.label + (f" ({outcome.diverged} of {len(outcome.results)} diverged)" if outcome.diverged else "")


def _scores(results: Results) -> list[Quantity]:
    """Scores of each run on the test split, mean ± sample deviation over the seeds."""
    metric, start = results.headline_metric, results.start
    rates: list[Quantity] = [("learning rate", "", _rate)]
    if results.old is None or start.test is None or start.old is None:
        first = next(r.test for o in results.outcomes for r in o.results if r.test is not None)
        others = [Metric(name, "higher") for name in first if name != metric.name]
        swept = any(outcome.sweep for outcome in results.outcomes)
        return [_score(metric), *map(_score, others), *(rates if swept else [])]
    name = metric.name.replace(" per ", "/")
    new, old = metric.text(start.test[metric.name]), metric.text(start.old[metric.name])
    minus = ("base - run", "run - base") if metric.better == "lower" else ("run - base", "base - run")
    return [
        (f"{name} on {results.new} (new)", new, lambda o: spread(results.scores(o), metric)),
        (f"{name} on {results.old} (old)", old, lambda o: spread(results.old_scores(o), metric)),
        (f"  learned (new: {minus[0]})", "", lambda o: _mean(results.learned(o), metric)),
        (f"  forgotten (old: {minus[1]})", "", lambda o: _mean(results.forgotten(o), metric)),
        *rates,
    ]


def _score(metric: Metric) -> Quantity:
    def of_run(outcome: Outcome) -> str:
        return spread([result.test[metric.name] for result in outcome.results if result.test is not None], metric)

    return metric.name, "", of_run


def _rate(outcome: Outcome) -> str:
    rate = outcome.learning_rate
    return "all diverged" if rate is None else f"{rate:g}" + (" (edge)" if outcome.at_edge else "")


def _costs(results: Results) -> list[Quantity]:
    """Costs of each run."""
    two = results.old is not None
    found: list[Quantity] = [("trainable parameters" if two else "trained", "", lambda o: f"{o.plan.trainable:,}")]
    if two:
        found.append(("  percent of all", "", lambda o: f"{o.plan.percent:.3g} %"))
    if len({outcome.plan.base_bytes for outcome in results.outcomes}) > 1:
        found.append(("base as held", "", lambda o: in_bytes(o.plan.base_bytes)))
    found += [
        ("optimizer state" if two else "optimizer", "", lambda o: in_bytes(o.plan.optimizer_bytes)),
        ("peak temporary memory, step" if two else "activations", "", lambda o: in_bytes(o.plan.temporary_bytes)),
    ]
    if two:
        found.append(("FLOPs, step", "", lambda o: _flops(o.plan.flops)))
    else:
        found.append(("tokens/s", "", _speed))
    if any(outcome.price for outcome in results.outcomes):
        found += _prices(results) if two else [("time of a step", "", _relative(results.references[0]))]
    return found


def _prices(results: Results) -> list[Quantity]:
    whole = results.start.bytes
    found: list[Quantity] = [("time, step", "", _of_price(lambda p: f"{p.milliseconds:.0f} ms"))]
    found += [(f"  to {results.label_of(name)}", "", _relative(name)) for name in results.references]
    if any(outcome.price and outcome.price.forward is not None for outcome in results.outcomes):
        found += [
            ("forward", "", _of_price(lambda p: _number(p.forward, "{:.2f} ms"))),
            ("apart, to base", "", _of_price(lambda p: _number(p.apart, "{:.2f}"))),
            ("merged, to base", "", _of_price(lambda p: _number(p.merged, "{:.2f}"))),
        ]
    return [
        *found,
        ("files (base: full checkpoint)", in_bytes(whole), _of_price(lambda p: in_bytes(p.adapter_bytes))),
        ("  to the full checkpoint", "", _of_price(lambda p: f"{p.adapter_bytes / whole:.3g}")),
        ("max |lifted - merged| logit", "", _of_price(lambda p: _number(p.difference, "{:.1e}"))),
    ]


def _of_price(text: Callable[[Price], str]) -> Callable[[Outcome], str]:
    return lambda outcome: "" if outcome.price is None else text(outcome.price)


def _relative(name: str) -> Callable[[Outcome], str]:
    return _of_price(lambda price: f"{price.relative_time[name]:.2f}")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _speed(outcome: Outcome) -> str:
    speeds = [result.tokens_per_second for result in outcome.results]
    return f"{statistics.median(speeds):,.0f}" if speeds else ""


def _flops(count: float) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.0f} M"


def sweep(results: Results) -> Cells:
    """Each run's own grid, the best marked; one at the edge is said to be there."""
    metric = results.selection_metric
    most = max(len(outcome.sweep) for outcome in results.outcomes)
    table = [["validation split", *([""] * most), "best"]]
    for outcome in results.outcomes:
        cells = []
        for result in outcome.sweep:
            value = metric.text(result.kept.scores[metric.name]) if is_finite(result) else "diverged"
            cells.append(
                f"{result.learning_rate:g}: {value}" + (" *" if result.learning_rate == outcome.learning_rate else "")
            )
        edge = " (edge of the grid: widen it)" if outcome.at_edge else ""
        best = "all diverged" if outcome.learning_rate is None else f"{outcome.learning_rate:g}{edge}"
        table.append([outcome.label, *cells, *([""] * (most - len(cells))), best])
    return table


# -- text --------------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], metric: Metric) -> str:
    """Mean and sample standard deviation over the seeds."""
    if len(values) < 2:
        return _mean(values, metric)
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    return f"{mean:.{metric.decimals}f} ± {deviation:.{metric.decimals}f}{metric.unit}"


def _mean(values: Sequence[float], metric: Metric) -> str:
    return metric.text(statistics.fmean(values)) if values else "diverged"


def rich_table(table: Sequence[Sequence[str]], title: str) -> Table:
    """A table for the terminal."""
    header, *body = table
    out = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=SIMPLE_HEAD)
    for i, name in enumerate(header):
        out.add_column(name, justify="right" if i else "left", no_wrap=not i)
    for row in body:
        out.add_row(*row)
    return out


def markdown(found: Sequence[Cells], title: str, notes: Sequence[str], pictures: Sequence[str]) -> str:
    """The tables, what they were measured on, and the plots."""
    lines = [f"# {title}", ""]
    for table in found:
        lines += [*markdown_table(table), ""]
    lines += [f"- {note}" for note in notes] + [""]
    lines += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in pictures]
    return "\n".join(lines) + "\n"


def markdown_table(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose first row is the header."""
    header, *body = table
    return [_line(header), _line(["---", *("---:" for _ in header[1:])]), *map(_line, body)]


def _line(row: Sequence[str]) -> str:
    return "| " + " | ".join(cell.strip().replace("|", "\\|") for cell in row) + " |"


def in_bytes(count: float) -> str:
    """Bytes for people, in powers of 1000.

    >>> in_bytes(512), in_bytes(3_400_000)
    ('512 B', '3.4 MB')
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} GB"
