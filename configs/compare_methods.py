"""All methods and baselines on two tasks that need no network: a GPT-2 of bytes, and a ViT that reads digits.

Command:   python -m experiments.compare configs/compare_methods.py
Hardware:  2 CPU cores; 39:45 minutes
Score:     bits per byte of Python, test: base 3.255, full 2.761, LoRA 2.850, DoRA 2.822, parallel adapter 2.850;
           turned digits, test: base 20.5 %, full 89.9 %, LoRA 84.7 %, DoRA 85.0 %, VeRA 93.2 %, Houlsby 77.7 %
"""

import dataclasses

import jlora
from experiments.comparison import Comparison, Contender
from experiments.config import Data, Pretrain, Train
from experiments.data import python_docs, python_source, turned_digits, upright_digits
from experiments.tasks import ImageTask, TextTask
from jlora.models.gpt2 import GPT2Config
from jlora.models.vit import ViTConfig

STEPS = 150  # of each run
LINEAR = "(attn|mlp)/"  # all linear layers of the blocks, in both models
LOW = (3e-4, 1e-3, 3e-3, 1e-2)
MIDDLE = (1e-3, 3e-3, 1e-2, 3e-2)
UPPER = (3e-3, 1e-2, 3e-2, 1e-1)
HIGH = (1e-2, 3e-2, 1e-1, 3e-1)
HIGHEST = (3e-2, 1e-1, 3e-1, 1.0)


def config() -> Comparison:
    """The whole comparison."""
    return Comparison(
        name="compare_methods",
        tasks=(
            TextTask(
                "text",
                "prose, then Python",
                GPT2Config(vocab_size=256, context=80, width=128, layers=3, heads=4),
                Data(old=python_docs, new=python_source),
                pretrain=Pretrain(steps=800, batch=16, evaluate_every=800, weight_decay=0.1, learning_rate=3e-3),
                train=Train(steps=STEPS, batch=8, evaluate_every=STEPS),
                validation=64,
                test=256,
                length=64,  # the rest of the context is for prompts
            ),
            ImageTask(
                "digits",
                "digits, then turned digits",
                ViTConfig(image_size=8, patch_size=2, channels=1, width=64, layers=3, heads=4, labels=10),
                old=upright_digits,
                new=turned_digits,
                pretrain=Pretrain(steps=600, batch=32, evaluate_every=600, weight_decay=0.1, learning_rate=2e-3),
                train=Train(steps=STEPS, batch=32, evaluate_every=STEPS),
            ),
        ),
        contenders=contenders(STEPS),
        relative_to=("lora", "full"),
    )


def small() -> Comparison:
    """A contender of each kind for a few steps, to see that it runs."""
    whole = config()
    text, digits = whole.tasks
    text = dataclasses.replace(
        text,
        model=GPT2Config(vocab_size=256, context=24, width=32, layers=1, heads=2),
        pretrain=dataclasses.replace(text.pretrain, steps=20),
        train=dataclasses.replace(text.train, steps=4),
        validation=4,
        test=8,
        length=8,
    )
    digits = dataclasses.replace(
        digits,
        model=ViTConfig(image_size=8, patch_size=4, channels=1, width=32, layers=1, heads=2, labels=10),
        pretrain=dataclasses.replace(digits.pretrain, steps=20),
        train=dataclasses.replace(digits.train, steps=4),
    )
    tried = {"full": None, "lora": None, "adalora": ("text",), "prompt": ("text",)}
    tried |= dict.fromkeys(("eva", "ia3", "houlsby"), ("digits",))
    few = tuple(
        dataclasses.replace(c, learning_rates=c.learning_rates[1:3], tasks=tried[c.name])
        for c in contenders(steps=4)
        if c.name in tried
    )
    return dataclasses.replace(
        whole,
        name="compare_methods_small",
        tasks=(text, digits),
        contenders=few,
        seeds=2,
        statistics=1,
        rounds=2,
        inference_rounds=2,
    )


def contenders(steps: int) -> tuple[Contender, ...]:
    """All of them. Ranks are such that most train as many parameters as LoRA of rank 4 on all linear layers.

    Args:
      steps: of each run, which AdaLoRA's budget has to know.
    """
    lora = jlora.lora(4)
    baseline, low_rank, started, other, activations = (
        "baselines", "LoRA and variants", "LoRA, other starts", "other weights", "activations",
    )  # fmt: skip
    return (
        Contender("full", "full", baseline, jlora.full(), LOW),
        Contender("top_layer", "top layer", baseline, jlora.top_layers(1), LOW),
        Contender("bitfit", "BitFit", baseline, jlora.bitfit(), UPPER),
        Contender("norms", "norms", baseline, jlora.norms(), HIGH),
        Contender("lora", "LoRA r=4", low_rank, lora, MIDDLE, LINEAR),
        Contender("lora_qv", "LoRA q,v r=16", low_rank, jlora.lora(16), MIDDLE, "attn/(query|value)"),
        Contender("rslora", "rsLoRA r=4", low_rank, jlora.rslora(4), MIDDLE, LINEAR),
        Contender("loraplus", "LoRA+ r=4", low_rank, jlora.loraplus(4), LOW, LINEAR),
        Contender("lora_fa", "LoRA-FA r=8", low_rank, jlora.lora_fa(8), UPPER, LINEAR),
        Contender("dora", "DoRA r=4", low_rank, jlora.dora(lora), MIDDLE, LINEAR),
        Contender("dylora", "DyLoRA r=4", low_rank, jlora.dylora(4), MIDDLE, LINEAR),
        Contender("adalora", "AdaLoRA r=6 to 4", low_rank, _adalora(steps), MIDDLE, LINEAR),
        Contender("pissa", "PiSSA r=4", started, jlora.pissa(4), MIDDLE, LINEAR),
        Contender("olora", "OLoRA r=4", started, jlora.olora(4), MIDDLE, LINEAR),
        Contender("eva", "EVA r=4", started, jlora.eva(4), MIDDLE, LINEAR),
        Contender("lora_ga", "LoRA-GA r=4", started, jlora.lora_ga(4), MIDDLE, LINEAR),
        Contender("corda", "CorDA r=4", started, jlora.corda(4), MIDDLE, LINEAR),
        Contender("vera", "VeRA r=256", other, jlora.vera(256), HIGH, LINEAR),
        Contender("loha", "LoHa r=2", other, jlora.loha(2), MIDDLE, LINEAR),
        Contender("lokr", "LoKr r=16", other, jlora.lokr(16, factor=4), UPPER, LINEAR),
        Contender("ia3", "(IA)³", other, jlora.ia3("mlp/proj"), HIGH, "attn/(key|value)|mlp/proj"),
        Contender("oft", "OFT b=16", other, jlora.oft(16), UPPER, LINEAR),
        Contender("houlsby", "Houlsby r=16", activations, jlora.houlsby(16), UPPER),
        Contender("pfeiffer", "Pfeiffer r=32", activations, jlora.pfeiffer(32), UPPER),
        Contender("parallel", "parallel r=32", activations, jlora.parallel_adapter(32), UPPER),
        Contender("prefix", "prefix n=16", activations, jlora.prefix_tuning(16), HIGHEST),
        Contender("prefix_mlp", "prefix n=16, MLP", activations, jlora.prefix_tuning(16, hidden=64), MIDDLE),
        Contender("prompt", "prompt n=16", activations, jlora.prompt_tuning(16), HIGHEST, tasks=("text",)),
        Contender("p_tuning", "P-tuning n=16", activations, jlora.p_tuning(16), MIDDLE, tasks=("text",)),
    )


def _adalora(steps: int) -> jlora.Method:
    """Prunes from a tenth of the run on; the last third trains what is left."""
    return jlora.adalora(6, 4, total_steps=steps, warmup=steps // 10, final=steps // 3)
