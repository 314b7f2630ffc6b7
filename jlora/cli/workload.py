"""Steps to plan on the command line: of a config of `experiments`, or of a model, a method and a batch."""

import importlib
import importlib.util
import inspect
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jlora.adapted.adapted import Adapted
from jlora.adapted.apply import apply
from jlora.adapted.quantize import quantize
from jlora.methods import Method, expression
from jlora.models.sizes import PRESETS, model_of
from jlora.transform.sites import sites

RATE = 1e-4  # no number of a plan depends on it


@dataclass(frozen=True)
class Workload:
    """A training step: what `jlora.plan` takes.

    Attributes:
      name: of the model.
      method: that adapts it.
      loss: of parameters and a batch (and a key, with `pass_key` among the options).
      adapted: the model's shapes with the method's.
      tx: the optimizer.
      batch: shapes.
      options: of the train step.
      memory_kind: where the optimizer's state waits between two steps.
      heads: numbers of heads, of queries and of keys, that tensor parallelism has to divide.
    """

    name: str
    method: Method
    loss: Callable[..., Any]
    adapted: Adapted
    tx: optax.GradientTransformation
    batch: dict[str, jax.ShapeDtypeStruct]
    options: dict[str, Any] = field(default_factory=dict)
    memory_kind: str | None = None
    heads: tuple[int, ...] = ()


def of_model(
    name: str,
    method: str,
    batch: str,
    *,
    targets: Sequence[str] | None = None,
    dtype: str = "bfloat16",
    remat: bool = False,
    quantised: str | None = None,
    accumulate: int = 1,
    memory_kind: str | None = None,
) -> Workload:
    """A step of AdamW on a published size, a folder or a config.json, its layers scanned.

    Args:
      name: as `jlora.models.sizes.model_of` takes it.
      method: "lora(16)".
      batch: rows x length, "1x512"; of a model of images "8".
      targets: patterns of weights.
      dtype: of the base and of the computation.
      remat: compute activations again.
      quantised: a format of `jlora.quantize`, for the base.
      accumulate: micro-batches.
      memory_kind: where the optimizer's state waits, as in `jlora.plan`.

    Raises:
      ValueError: for a batch that the model does not take, or a model without logits.
      FileNotFoundError: if there is no such model.
    """
    made = expression.parse(method, "--method")
    module, inputs = model_of(name, scan=True, dtype=dtype, param_dtype=dtype, remat=remat)
    shapes = _inputs(name, module, inputs[0], batch)
    params = params_shapes(module, inputs)
    out = jax.eval_shape(lambda params, x: module.apply({"params": params}, x), params, shapes)
    if not hasattr(out, "shape") or len(out.shape) < 2:
        raise ValueError(f"{name!r} has no logits, of which the command makes a loss: call jlora.plan with your own")
    causal = getattr(module.config, "head", "") == "causal_lm"
    labels = jax.ShapeDtypeStruct(out.shape[:-1], jnp.int32)
    data = {"inputs": shapes} if causal else {"inputs": shapes, "labels": labels}

    def loss(params: Any, batch: Any) -> jax.Array:
        if causal and "labels" in inspect.signature(type(module).__call__).parameters:
            following = jnp.roll(batch["inputs"], -1, axis=1)  # the last of a row has none, and is left out
            return jnp.asarray(module.apply({"params": params}, batch["inputs"], labels=following))[:, :-1].mean()
        logits = jnp.asarray(module.apply({"params": params}, batch["inputs"])).astype(jnp.float32)
        labels = batch["inputs"][:, 1:] if causal else batch["labels"]
        return cross_entropy(logits[:, :-1] if causal else logits, labels).mean()

    hold = lambda params, places: params if quantised is None else quantize(params, quantised, sites=places)
    adapted = _adapted(loss, params, data, hold=hold, method=made, targets=targets or None)
    options = {"accumulate": accumulate} if accumulate > 1 else {}
    return Workload(name, made, loss, adapted, optax.adamw(RATE), data, options, memory_kind, heads_of(module))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Losses in nats: (..., classes), (...) -> (...)."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def params_shapes(module: Any, inputs: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    """The shapes of a model's parameters."""
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def heads_of(module: Any) -> tuple[int, ...]:
    """The numbers of a model's heads: of queries, and of keys where those are others."""
    found = (getattr(module.config, name, None) for name in ("heads", "key_heads"))
    return tuple(n for n in found if isinstance(n, int))


def _adapted(
    loss: Callable[..., Any], params: Any, batch: Any, *key: jax.Array, hold: Callable[[Any, Any], Any], **choice: Any
) -> Adapted:
    """The shapes with the method's; held in another form after the axes of each weight were read from the loss."""
    places = sites(loss, params, batch, *key)
    return apply(hold(params, places), sites=places, **choice)


def _inputs(name: str, module: Any, like: jax.ShapeDtypeStruct, batch: str) -> jax.ShapeDtypeStruct:
    parts = batch.lower().split("x")
    tokens = jnp.issubdtype(like.dtype, jnp.integer)
    if not all(part.isdigit() and int(part) for part in parts) or len(parts) != 1 + tokens:
        form = "rows x length, such as 1x512" if tokens else "a number of rows, such as 8"
        raise ValueError(f"--batch of {name!r} is {form}; got {batch!r}")
    sizes = tuple(map(int, parts))
    context = getattr(module.config, "context", None)
    if tokens and context and sizes[1] > context:
        raise ValueError(f"--batch {batch}: {sizes[1]} tokens are more than the context of {name!r}, {context}")
    return like.update(shape=sizes if tokens else (sizes[0], *like.shape[1:]))


# -- a config of experiments -------------------------------------------------------------------------------------------


def of_config(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    run: str | None = None,
    small: bool = False,
    remat: bool = False,
    quantised: str | None = None,
    accumulate: int | None = None,
    memory_kind: str | None = None,
) -> Workload:
    """The training step of an experiment on a checkpoint whose data are prompts and completions. No data are read.

    Args:
      path: of the config.
      overrides: of its fields, "train.batch=4".
      run: which of its runs, by name, where there are several.
      small: its small form.
      remat: compute activations again, though the config does not.
      quantised: a format of `jlora.quantize`, in place of the config's.
      accumulate: micro-batches, in place of the config's.
      memory_kind: where the optimizer's state waits, in place of the config's `train.optimizer_memory`.

    Raises:
      ImportError: if `experiments`, which is not in the wheel, is not there.
      ValueError: for another kind of experiment, or a run that it has not.
    """
    configfile, config, completion, trainer, held = _experiments()
    experiment = configfile.load(config.Experiment, path, overrides, small=small)
    task, train = experiment.task, experiment.train
    if not isinstance(task, completion.Completion) or isinstance(experiment.base, config.Pretrain):
        raise ValueError(
            f"'{path}' is no task of completions on a checkpoint: call jlora.plan with its loss, or name a model"
        )
    chosen = _run(experiment, run)
    with tempfile.TemporaryDirectory() as folder:
        name = str(experiment.base(Path(folder))) if callable(experiment.base) else _size_of(experiment.base)
        module, inputs = model_of(name, **{**experiment.options, **({"remat": True} if remat else {})})
    rows = (train.batch, task.length)
    shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)
    batch = {
        "tokens": shape(jnp.int32, *rows), "mask": shape(jnp.bool, *rows), "loss_mask": shape(jnp.bool, *rows),
        "share": shape(jnp.float32, train.batch),
    }  # fmt: skip
    if task.packed:
        batch |= {"segments": shape(jnp.int32, *rows), "positions": shape(jnp.int32, *rows)}
    loss = completion.token_loss(module, train.label_smoothing)
    params = params_shapes(module, inputs)
    extras = {"extras": chosen.extras} if chosen.extras else {}
    key = jax.random.key(0)
    choice = {"method": chosen.method, "targets": chosen.targets, **extras}
    how = experiment.held_by(chosen) if quantised is None else config.Held(quantised)
    hold = lambda params, places: held.hold(params, how, places, chosen.extras or "")
    adapted = _adapted(loss, params, batch, key, hold=hold, **choice)
    tx = trainer.optimizer(train, RATE, 10**9)
    options = {"pass_key": True, "accumulate": accumulate or train.accumulate}
    return Workload(
        experiment.name if callable(experiment.base) else name, chosen.method, loss, adapted, tx, batch, options,
        train.memory_kind if memory_kind is None else memory_kind, heads_of(module),
    )  # fmt: skip


def _experiments() -> list[Any]:
    """The modules of `experiments`, of the repository that one stands in or that is installed in editable form."""
    names = ("configfile", "config", "tasks.completion", "trainer", "held")
    here = str(Path.cwd())
    beside = here not in sys.path
    if beside:
        sys.path.insert(0, here)
    try:
        if importlib.util.find_spec("experiments.configfile") is None:
            raise ModuleNotFoundError(name="experiments")
        return [importlib.import_module(f"experiments.{name}") for name in names]
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] != "experiments":
            raise ImportError(f'{error.name} is not here: pip install "jlora[experiments]"') from error
        raise ImportError(
            "a config is one of jlora's experiments, which are in its repository and not in the wheel: call this in "
            "the repository's folder, or name a model: jlora plan llama-2-7b --method 'lora(16)' --batch 1x512"
        ) from error
    finally:
        if beside:
            sys.path.remove(here)


def _run(experiment: Any, name: str | None) -> Any:
    names = [run.name for run in experiment.runs]
    if name is None and len(names) == 1:
        return experiment.runs[0]
    if name not in names:
        what = f"there is no run {name!r}" if name else f"there are {len(names)} runs"
        raise ValueError(f"{what} in {experiment.name!r}: choose one with --run, {', '.join(names)}")
    return experiment.runs[names.index(name)]


def _size_of(base: str) -> str:
    """The published size of a repository's name, "meta-llama/Llama-2-7b-hf", whose config.json is not needed then."""
    size = base.rpartition("/")[2].lower().removesuffix("-hf")
    return size if size in PRESETS and not Path(base).exists() else base
