"""A user's own data from the command line: what the first lines say, one run to its merged checkpoint, what is refused."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jlora
from experiments import train
from experiments.recipes import tiny
from jlora import models

# Optax's schedules divide an int by an int.
pytestmark = [pytest.mark.loose_promotion, pytest.mark.once]
CONFIG = str(Path(__file__).resolve().parent.parent / "configs" / "own_data.py")
SCANNED = "options={'scan': True}"  # fewer layers to trace


def jsonl(folder, name, rows):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def called(*arguments):
    """The exit status of the command, what it printed and what it complained of."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = train.main([CONFIG, *map(str, arguments)])
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {name: getattr(tiny, name)(tmp_path_factory.mktemp(name)) for name in ("gpt2", "roberta", "llama", "vit")}


@pytest.fixture
def planned(monkeypatch, tmp_path):
    """The first lines, as the command prints them before it compiles anything."""

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_plans", stop)

    def call(*arguments):
        status, out, err = called(SCANNED, "--folder", tmp_path / "run", *arguments)
        assert (status, err) == (130, "interrupted; the same command with --resume continues\n"), err
        return [line.rstrip() for line in out.splitlines()]

    return call


# -- one run to its end ------------------------------------------------------------------------------------------------


def test_prompts_and_completions_end_in_a_merged_checkpoint(bases, tmp_path, monkeypatch):
    data = jsonl(tmp_path, "mine.jsonl", [{"prompt": f"What is {i}?", "completion": f"{i} it is."} for i in range(24)])
    out, run = tmp_path / "out", tmp_path / "run"
    options = [
        f"base={bases['gpt2']}", f"task.data={data}", "runs.lora.method=rslora(2)", "train.steps=4", "train.batch=4",
        "runs.lora.learning_rate=1e-2", "task.new_tokens=2", f"save.merged={out}", SCANNED, "--folder", run,
        f"save.adapter={tmp_path / 'peft'}",
    ]  # fmt: skip
    status, printed, err = called(*options)
    assert (status, err) == (0, "")
    assert "method    adapted: rslora(rank=2" in printed and f"merged    adapted: {out}, " in printed
    assert f"adapter   adapted: {tmp_path / 'peft'}, " in printed
    base = models.load(bases["gpt2"], scan=True)
    adapted = jlora.load(run / "lora" / "seed_0" / "adapter", base.params)
    saved = models.load(out)
    tokens = jnp.asarray([models.Tokenizer.load(out).encode("What is 3?")])
    other = jlora.peft.load(tmp_path / "peft", base.params, model=base.model)
    chex.assert_trees_all_equal(jlora.merge(other), jlora.merge(adapted))
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        bases["gpt2"]
    )
    merged = base.model.apply({"params": jlora.merge(adapted)}, tokens)
    np.testing.assert_allclose(saved.model.apply({"params": saved.params}, tokens), merged, rtol=1e-5, atol=1e-5)
    apart = jlora.lift(base.model.apply)({"params": adapted}, tokens)
    np.testing.assert_allclose(merged, apart, rtol=1e-4, atol=1e-4)
    before = base.model.apply({"params": base.params}, tokens)
    assert float(jnp.abs(merged - before).max()) > 1e-2  # something was learned
    files = {path.name for path in out.iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "jlora_run.json"}
    before = (out / "model.safetensors").read_bytes()

    def killed(folder, *rest, **options):
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    shutil.rmtree(out)
    out.mkdir()
    (out / ".jlora_run.json.tmp").write_text("{")  # killed while the folder was claimed
    with monkeypatch.context() as patched:
        patched.setattr(models, "save", killed)
        assert called(*options, "--resume")[0] == 130
    assert called(*options, "--resume")[0] == 0  # nothing is trained, the same is saved
    assert (out / "model.safetensors").read_bytes() == before


# -- the first lines ---------------------------------------------------------------------------------------------------


def test_conversations_are_understood(planned, bases, tmp_path):
    rows = [
        {"conversations": [{"from": "human", "value": f"{i + 10}?"}, {"from": "gpt", "value": "Yes."}]}
        for i in range(40)
    ]
    data = jsonl(tmp_path, "mine.jsonl", rows)
    title, *lines = planned(f"base={bases['llama']}", f"task.data={data}", "task.length=25", "task.packed=True")
    assert title == "own_data: your own data"
    assert lines[:7] == [
        f"data      {data}: chat, inferred from the columns conversations",
        "splits    36 train, 2 validation, 2 test; 5 % for each of validation and test held out by the hash of the question",
        "turns     36 answers in 36 conversations; the loss counts them alone",
        "lengths   median 26, 95 % up to 26, longest 26 tokens; rows of 25: 37 of 40 (92.5 %) are cut",
        "template  plain, as the checkpoint has no chat template: System: ...\\nUser: ...\\nAssistant: ...<end>\\n",
        "example   <s>User: 10?\\nAssistant:» Yes.</s>«\\n",
        "schedule  14 steps of 8 rows (3 epochs), 1 seed a run, dropout 0 in the model",
    ]


def test_instructions_with_the_checkpoints_template(planned, bases, tmp_path):
    pytest.importorskip("jinja2", reason="the extra `chat` is not installed")
    base = tiny.llama(tmp_path / "llama")
    (base / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    rows = [{"instruction": f"Add {i}.", "input": "", "output": "Done."} for i in range(24)]
    lines = planned(f"base={base}", f"task.data={jsonl(tmp_path, 'mine.jsonl', rows)}", "task.kind=chat")
    assert lines[1].endswith(": chat, as told from the columns instruction, output, input")
    assert lines[5:7] == [
        "template  the checkpoint's own chat template",
        "example   [user]Add 0.</s>[assistant]»Done.</s>«",
    ]


def test_texts_with_classes_are_understood(planned, bases, tmp_path):
    data = tmp_path / "mine.csv"
    data.write_text(
        "body,stars\n" + "".join(f"the film is {'good' if i % 3 else 'dull'} {i},{i % 3}\n" for i in range(40))
    )
    lines = planned(
        f"base={bases['roberta']}",
        f"task.data={data}",
        "task.kind=classification",
        "task.columns=body,stars",
        "task.held_out=0.2",
    )
    assert lines[1:5] == [
        f"data      {data}: classification, from the columns body, stars, as told",
        "splits    32 train, 4 validation, 4 test; 10 % for each of validation and test held out by the hash of the text, of each class alike",
        "labels    3 classes: 0 11, 1 10, 2 11",
        "lengths   median 12, 95 % up to 16, longest 16 tokens; rows of 16: none is cut",
    ]


def test_texts_are_understood(planned, bases, tmp_path):
    data = tmp_path / "mine.txt"
    data.write_text("".join(f"The film {i} is good.\n" for i in range(150)))
    lines = planned(f"base={bases['gpt2']}", f"task.data={data}", "task.new_tokens=4")
    assert lines[1].endswith(": text, as the file is .txt")
    assert lines[3].startswith("lengths   1,") and lines[3].endswith(
        " tokens, in windows of 64; '<|endoftext|>' between texts"
    )


def test_images_are_understood(planned, bases, tmp_path):
    for i in range(24):
        path = tmp_path / "photos" / ("cat" if i % 2 else "dog") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 24), (10 * i, 0, 0)).save(path)
    base = tiny.vit(tmp_path / "vit")
    lines = planned(f"base={base}", f"task.data={tmp_path / 'photos'}")
    assert lines[1:5] == [
        f"data      {tmp_path / 'photos'}: images, as the folder holds images, a class each",
        "splits    22 train, 1 validation, 1 test; 5 % for each of validation and test held out by the hash of the file's name, of each class alike",
        "labels    2 classes: cat 11, dog 11",
        "images    16 x 16 pixels: the shorter side scaled, the centre cut out; mean 0.5, 0.5, 0.5 and deviation 0.5, 0.5, 0.5",
    ]
    (base / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}')
    lines = planned(f"base={base}", f"task.data={tmp_path / 'photos'}")
    assert lines[4].endswith("; mean 0.1, 0.2, 0.3 and deviation 1, 1, 1")


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_a_command_lacks(bases, tmp_path):
    assert called("task.data=mine.jsonl")[::2] == (
        2,
        "error: base=... names no checkpoint: a folder, or a repository such as openai-community/gpt2\n",
    )
    status, _, err = called(f"base={bases['gpt2']}")
    assert (status, err) == (2, "error: task.data=... names no data: a file, a folder or the name of a data set\n")
    data = jsonl(tmp_path, "mine.jsonl", [{"messages": [], "prompt": "a", "completion": "b"}] * 9)
    status, _, err = called(f"base={bases['gpt2']}", f"task.data={data}")
    assert status == 2 and err.endswith(
        "Write one of task.kind=chat (messages), task.kind=completion (prompt, completion)\n"
    )


def test_what_cannot_be_saved_is_found_before_the_training(bases, tmp_path):
    data = jsonl(tmp_path, "mine.jsonl", [{"prompt": f"{i}?", "completion": f"{i}."} for i in range(24)])
    options = [f"base={bases['gpt2']}", f"task.data={data}", SCANNED, "--folder", tmp_path / "run"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    status, _, err = called(*options, f"save.merged={tmp_path / 'full'}")
    assert (status, err) == (
        2,
        f"error: save.merged: '{tmp_path / 'full'}' is there already, and was not saved by this run: name another folder\n",
    )
    status, _, err = called(*options, f"save.merged={tmp_path / 'out'}", "runs.lora.method=houlsby(2)")
    assert status == 2 and err.startswith("error: save.merged: runs.lora: ") and "houlsby" in err
    status, _, err = called(
        *options, f"save.adapter={tmp_path / 'out'}", "runs.lora.method=full()", "runs.lora.targets=None"
    )
    assert (status, err) == (
        2,
        "error: save.adapter: full fine-tuning has no adapter; save.merged writes its checkpoint\n",
    )
    same = f"={tmp_path / 'out'}"
    status, _, err = called(*options, f"save.adapter{same}", f"save.merged{same}/")
    assert (status, err) == (
        2,
        "error: save.adapter: a folder of its own; beside the merged weights it would be added once more\n",
    )
    status, _, err = called(*options, "save.merged=gs://bucket/out")
    assert status == 2 and err.startswith("error: save.merged: 'gs://bucket/out'")


def test_classes_have_their_names_in_the_saved_checkpoint(bases, tmp_path):
    """Names of classes are written into the checkpoint's config.json; nothing is trained for this."""
    from experiments.exports import _name_classes

    model = models.build(bases["roberta"], head="sequence_classification", labels=2)
    params = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"],
    )
    models.save(tmp_path, model, params, source=bases["roberta"])
    _name_classes(tmp_path, ("bad", "good"))
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["id2label"] == {"0": "bad", "1": "good"} and record["label2id"] == {"bad": 0, "good": 1}
    assert models.build(tmp_path).config.labels == 2
