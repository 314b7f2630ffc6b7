"""All methods and baselines on two tasks that need no network: a GPT-2 of bytes, and a ViT that reads digits.

Command:   python -m experiments.train configs/compare_methods.py
Hardware:  2 CPU cores; 39:45 minutes
Score:     bits per byte of Python, test: base 3.255, full 2.761, LoRA 2.850, DoRA 2.822, parallel adapter 2.850;
           turned digits, test: base 20.5 %, full 89.9 %, LoRA 84.7 %, DoRA 85.0 %, VeRA 93.2 %, Houlsby 77.7 %
"""

import dataclasses

import jlora
from experiments.config import Experiment, Measure, Pretrain, Run, Schedule, Study
from experiments.data import python_docs, python_source, turned_digits, upright_digits
from experiments.tasks.bytes import Bytes
from experiments.tasks.digits import Digits
from jlora.models.gpt2 import GPT2Config
from jlora.models.vit import ViTConfig

STEPS = 150  # of each run
LINEAR = "(attn|mlp)/"  # all linear layers of the blocks, in both models
LOW = (3e-4, 1e-3, 3e-3, 1e-2)
MIDDLE = (1e-3, 3e-3, 1e-2, 3e-2)
UPPER = (3e-3, 1e-2, 3e-2, 1e-1)
HIGH = (1e-2, 3e-2, 1e-1, 3e-1)
HIGHEST = (3e-2, 1e-1, 3e-1, 1.0)


def config() -> Study:
    """The comparison: both experiments."""
    return Study("compare_methods", (text(), digits()))


def text() -> Experiment:
    """A GPT-2 of bytes."""
    train = schedule(STEPS, batch=8)
    return Experiment(
        name="text",
        base=Pretrain(
            GPT2Config(vocab_size=256, context=80, width=128, layers=3, heads=4),
            dataclasses.replace(train, steps=800, batch=16, evaluate_every=800, weight_decay=0.1),
            learning_rate=3e-3,
        ),
        # The rest of the context is for prompts.
        task=Bytes("prose, then Python", python_docs, python_source, validation=64, test=256, length=64),
        runs=contenders(STEPS),
        train=train,
        seeds=(0, 1, 2),
        measure=measured(20, 60),
    )


def digits() -> Experiment:
    """A ViT that reads digits."""
    train = schedule(STEPS, batch=32)
    return Experiment(
        name="digits",
        base=Pretrain(
            ViTConfig(image_size=8, patch_size=2, channels=1, width=64, layers=3, heads=4, labels=10),
            dataclasses.replace(train, steps=600, evaluate_every=600, weight_decay=0.1),
            learning_rate=2e-3,
        ),
        task=Digits("digits, then turned digits", upright_digits, turned_digits),
        runs=tuple(run for run in contenders(STEPS) if run.name not in ("prompt", "p_tuning")),
        train=train,
        seeds=(0, 1, 2),
        measure=measured(20, 60),
    )


def schedule(steps: int, batch: int) -> Schedule:
    """Schedule of a run, which is evaluated at its end."""
    return Schedule(steps, batch, steps, warmup=0.05, decay="cosine", b2=0.98, clip=1.0, keep="last")


def measured(rounds: int, forward_rounds: int) -> Measure:
    """Measurements whose times are relative to LoRA's and to full fine-tuning's."""
    return Measure(rounds=rounds, relative_to=("lora", "full"), forward_rounds=forward_rounds)


def small() -> Study:
    """A run of each kind for a few steps, to see that it runs."""
    models = {
        "text": GPT2Config(vocab_size=256, context=24, width=32, layers=1, heads=2),
        "digits": ViTConfig(image_size=8, patch_size=4, channels=1, width=32, layers=1, heads=2, labels=10),
    }
    tried = {"text": ("full", "lora", "adalora"), "digits": ("full", "lora", "eva", "houlsby")}
    few = []
    for whole in (text(), digits()):
        assert isinstance(whole.base, Pretrain)
        quick = dataclasses.replace(whole.base.train, steps=20, evaluate_every=20)
        runs = [run for run in contenders(steps=4) if run.name in tried[whole.name]]
        few.append(
            dataclasses.replace(
                whole,
                base=dataclasses.replace(whole.base, model=models[whole.name], train=quick),
                task=_small(whole.task),
                runs=tuple(dataclasses.replace(run, rates=run.rates[1:3]) for run in runs),
                train=dataclasses.replace(whole.train, steps=4, evaluate_every=4),
                seeds=(0, 1),
                statistics=1,
                measure=measured(2, 2),
            )
        )
    return Study("compare_methods_small", tuple(few))


def _small(task: Bytes | Digits) -> Bytes | Digits:
    return dataclasses.replace(task, validation=4, test=8, length=8) if isinstance(task, Bytes) else task


def contenders(steps: int) -> tuple[Run, ...]:
    """The runs of an experiment, most of which train as many parameters as LoRA of rank 4 on all linear layers.

    Args:
      steps: of each run, which AdaLoRA's budget has to know.
    """
    lora = jlora.lora(4)
    baseline, low_rank, other_starts, other, activations = (
        "baselines", "LoRA and variants", "LoRA, other starts", "other weights", "activations",
    )  # fmt: skip
    return (
        Run("full", "full", jlora.full(), rates=LOW, family=baseline),
        Run("top_layer", "top layer", jlora.top_layers(1), rates=LOW, family=baseline),
        Run("bitfit", "BitFit", jlora.bitfit(), rates=UPPER, family=baseline),
        Run("norms", "norms", jlora.norms(), rates=HIGH, family=baseline),
        Run("lora", "LoRA r=4", lora, rates=MIDDLE, targets=LINEAR, family=low_rank),
        Run("lora_qv", "LoRA q,v r=16", jlora.lora(16), rates=MIDDLE, targets="attn/(query|value)", family=low_rank),
        Run("rslora", "rsLoRA r=4", jlora.rslora(4), rates=MIDDLE, targets=LINEAR, family=low_rank),
        Run("loraplus", "LoRA+ r=4", jlora.loraplus(4), rates=LOW, targets=LINEAR, family=low_rank),
        Run("lora_fa", "LoRA-FA r=8", jlora.lora_fa(8), rates=UPPER, targets=LINEAR, family=low_rank),
        Run("dora", "DoRA r=4", jlora.dora(lora), rates=MIDDLE, targets=LINEAR, family=low_rank),
        Run("dylora", "DyLoRA r=4", jlora.dylora(4), rates=MIDDLE, targets=LINEAR, family=low_rank),
        Run("adalora", "AdaLoRA r=6 to 4", _adalora(steps), rates=MIDDLE, targets=LINEAR, family=low_rank),
        Run("pissa", "PiSSA r=4", jlora.pissa(4), rates=MIDDLE, targets=LINEAR, family=other_starts),
        Run("olora", "OLoRA r=4", jlora.olora(4), rates=MIDDLE, targets=LINEAR, family=other_starts),
        Run("eva", "EVA r=4", jlora.eva(4), rates=MIDDLE, targets=LINEAR, family=other_starts),
        Run("lora_ga", "LoRA-GA r=4", jlora.lora_ga(4), rates=MIDDLE, targets=LINEAR, family=other_starts),
        Run("corda", "CorDA r=4", jlora.corda(4), rates=MIDDLE, targets=LINEAR, family=other_starts),
        Run("vera", "VeRA r=256", jlora.vera(256), rates=HIGH, targets=LINEAR, family=other),
        Run("loha", "LoHa r=2", jlora.loha(2), rates=MIDDLE, targets=LINEAR, family=other),
        Run("lokr", "LoKr r=16", jlora.lokr(16, factor=4), rates=UPPER, targets=LINEAR, family=other),
        Run("ia3", "(IA)³", jlora.ia3("mlp/proj"), rates=HIGH, targets="attn/(key|value)|mlp/proj", family=other),
        Run("oft", "OFT b=16", jlora.oft(16), rates=UPPER, targets=LINEAR, family=other),
        Run("houlsby", "Houlsby r=16", jlora.houlsby(16), rates=UPPER, family=activations),
        Run("pfeiffer", "Pfeiffer r=32", jlora.pfeiffer(32), rates=UPPER, family=activations),
        Run("parallel", "parallel r=32", jlora.parallel_adapter(32), rates=UPPER, family=activations),
        Run("prefix", "prefix n=16", jlora.prefix_tuning(16), rates=HIGHEST, family=activations),
        Run("prefix_mlp", "prefix n=16, MLP", jlora.prefix_tuning(16, hidden=64), rates=MIDDLE, family=activations),
        Run("prompt", "prompt n=16", jlora.prompt_tuning(16), rates=HIGHEST, family=activations),
        Run("p_tuning", "P-tuning n=16", jlora.p_tuning(16), rates=MIDDLE, family=activations),
    )


def _adalora(steps: int) -> jlora.Method:
    """Prunes from a tenth of the run on; the last third trains what is left."""
    return jlora.adalora(6, 4, total_steps=steps, warmup=steps // 10, final=steps // 3)
