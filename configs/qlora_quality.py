"""LoRA on bases in 4 and 8 bits beside LoRA on the same base in 16: two classifications, two language models.

Command:   python -m experiments.train configs/qlora_quality.py
Data:      SST-2 and TREC-6 of minilm_sst2.py and minilm_trec.py, Shakespeare of stories_shakespeare.py, Python's texts
Model:     all-MiniLM-L6-v2, stories260K, and the quickstart's base, which is pretrained here
Score:     experiments/LOG.md

Every run is LoRA r=8 (or PiSSA, from where QPiSSA starts) on all linear layers of the blocks, and they differ in how
these are held. Three learning rates each with seed 0 (and a lower one for QPiSSA, whose factors are not small at the
start), the best on the validation split with three seeds.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jlora
from experiments.config import Experiment, Held, Measure, Run, Schedule, Study
from experiments.configfile import load
from experiments.tasks.bytes import Bytes
from experiments.tasks.classification import Classification, Splits
from experiments.tasks.texts import Texts

HERE = Path(__file__).parent
LINEAR = r"(^|/)h(_\d+)?/(attn|mlp)/"  # all linear layers of the blocks
SEEDS = (0, 1, 2)
STEPS = 80


def config() -> Study:
    """The comparison: four bases or tasks."""
    return Study("qlora_quality", (shakespeare(), trec(), python(), sst2()))


def small() -> Study:
    """A few steps of two ways to hold two of the bases, tiny ones."""
    text, code = (load(Experiment, HERE / f"{name}.py", small=True) for name in ("stories_shakespeare", "quickstart"))
    return Study(
        "qlora_quality_small",
        tuple(
            dataclasses.replace(
                whole, name=name, runs=runs(1e-2, 2e-2)[3::2], seeds=(0, 1), measure=Measure(rounds=1),
                train=dataclasses.replace(whole.train, steps=4, evaluate_every=4, warmup=1),
            )
            for name, whole in (("shakespeare", text), ("python", code))
        ),
    )  # fmt: skip


def runs(*rates: float) -> tuple[Run, ...]:
    """Ways to hold the base, and to start on it."""
    lora, pissa = jlora.lora(8, alpha=16), jlora.pissa(8)
    return tuple(
        Run(name, label, method, None, LINEAR, rates=(rates[0] / 3, *rates) if method is pissa else rates, held=held)
        for name, label, method, held in (
            ("bf16", "bfloat16", lora, Held("bf16")),
            ("int8", "int8", lora, Held("int8")),
            ("nf4", "NF4", lora, Held("nf4", double=False)),
            ("nf4_dq", "NF4 + DQ", lora, Held("nf4")),
            ("fp4", "FP4", lora, Held("fp4", double=False)),
            ("int4", "int4", lora, Held("int4", double=False)),
            ("loftq", "NF4 + DQ, LoftQ", lora, Held("nf4", loftq=5)),
            ("qpissa", "NF4 + DQ, QPiSSA", pissa, Held("nf4")),
        )
    )


def trec() -> Experiment:
    """MiniLM on TREC-6."""
    return _minilm("trec", "minilm_trec", length=20, data=trec_fewer, rates=(1e-3, 3e-3, 6e-3))


def sst2() -> Experiment:
    """MiniLM on SST-2."""
    return _minilm("sst2", "minilm_sst2", length=24, data=sst2_fewer, rates=(3e-4, 1e-3, 3e-3))


def trec_fewer() -> Splits:
    """TREC-6 with every second example that is held out."""
    return _thinned("minilm_trec", validation=2, test=1)


def sst2_fewer() -> Splits:
    """SST-2 with every fourth example of its validation and every second of its test split."""
    return _thinned("minilm_sst2", validation=4, test=2)


def _thinned(of: str, *, validation: int, test: int) -> Splits:
    task = load(Experiment, HERE / f"{of}.py").task
    assert isinstance(task, Classification)
    whole = task.data()
    return Splits(whole.train, whole.validation[::validation], whole.test[::test])


def _minilm(name: str, of: str, *, length: int, data: Callable[[], Splits], rates: tuple[float, ...]) -> Experiment:
    whole = load(Experiment, HERE / f"{of}.py")
    assert isinstance(whole.task, Classification)
    return dataclasses.replace(
        whole,
        name=name,
        task=dataclasses.replace(whole.task, length=length, data=data),
        runs=runs(*rates),
        train=Schedule(STEPS, batch=8, evaluate_every=STEPS, weight_decay=0.01, keep="last"),
        seeds=SEEDS,
        options={**whole.options, "scan": True},
        measure=Measure(rounds=6),
    )


def shakespeare() -> Experiment:
    """stories260K on Shakespeare."""
    whole = load(Experiment, HERE / "stories_shakespeare.py")
    assert isinstance(whole.task, Texts)
    return dataclasses.replace(
        whole,
        name="shakespeare",
        task=dataclasses.replace(whole.task, length=128),
        runs=runs(3e-3, 1e-2, 3e-2),
        train=dataclasses.replace(whole.train, steps=60, batch=8, evaluate_every=60, keep="last"),
        seeds=SEEDS,
        measure=Measure(rounds=6),
    )


def python() -> Experiment:
    """The quickstart's base on Python."""
    whole = load(Experiment, HERE / "quickstart.py")
    assert isinstance(whole.task, Bytes)
    return dataclasses.replace(
        whole,
        name="python",
        task=dataclasses.replace(whole.task, validation=64, test=256, length=64),
        runs=runs(3e-3, 1e-2, 2e-2),
        train=dataclasses.replace(whole.train, steps=STEPS, evaluate_every=STEPS),
        seeds=SEEDS,
        measure=Measure(rounds=6),
    )
