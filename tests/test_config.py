"""Config files, overrides and run folders: what they accept, and what they say to the rest."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments import compare, config, finetune, train
from experiments.comparison import Comparison
from experiments.config import ConfigError, Experiment, Run
from experiments.finetuning import Finetune
from experiments.fit import read_curve
from experiments.folder import claim, located, size, write_text
from experiments.train import main

QUICKSTART = Path(__file__).resolve().parent.parent / "configs" / "quickstart.py"


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(QUICKSTART.parent.glob("*.py")), ids=lambda path: path.stem)
@pytest.mark.parametrize("small", [False, True])
def test_every_config_loads_in_both_forms(path, small):
    kind = {"compare": Comparison, "quickstart": Experiment}.get(path.stem.split("_")[0], Finetune)
    experiment = config.load_as(kind, path, small=small)
    json.dumps(config.describe(experiment))
    assert experiment.name.startswith(path.stem.split("_")[0])


def test_the_quickstart_is_three_runs_side_by_side():
    runs = config.load(QUICKSTART).runs
    assert [(run.label, run.rank) for run in runs] == [("full fine-tuning", None), ("LoRA r=4", 4), ("LoRA r=16", 16)]


@pytest.mark.parametrize(
    ("item", "path", "value"),
    [
        ("train.steps=200", ("train", "steps"), 200),
        ("train.steps=2 epochs", ("train", "steps"), "2 epochs"),
        ("pretrain.learning_rate=1", ("pretrain", "learning_rate"), 1.0),
        ("model.scan=True", ("model", "scan"), True),
        ("model.dtype=bfloat16", ("model", "dtype"), "bfloat16"),
        ("runs.lora_r4.rank=8", ("runs", 1, "rank"), 8),
        ("runs.lora_r4.rank=None", ("runs", 1, "rank"), None),
        ("runs.full.targets=h_0/.*", ("runs", 0, "targets"), "h_0/.*"),
        ("learning_rates=1e-3,1", ("learning_rates",), (1e-3, 1.0)),
    ],
)
def test_an_override_sets_one_field(item, path, value):
    before = config.load(QUICKSTART)
    after = config.override(before, item)
    for step in path:
        after = after[step] if isinstance(step, int) else getattr(after, step)
    assert after == value and type(after) is type(value)
    assert before == config.load(QUICKSTART)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("train.step=200", "there is no field 'train.step'; the nearest is 'train.steps'"),
        ("runs.lora_r5.rank=8", "there is no field 'runs.lora_r5.rank'; the nearest is 'runs.lora_r4.rank'"),
        ("steps=200", "there is no field 'steps'; the nearest is 'train.steps'"),
        ("train.steps", "an override has the form field=value (train.steps=200), got 'train.steps'"),
        ("train.batch=many", "train.batch is of type int, got 'many'"),
        ("train.batch=True", "train.batch is of type int, got 'True'"),
        ("train.batch=0", "train.batch is at least 1, got 0"),
        ("train.steps=-3", "a duration is a positive number of steps, '2 epochs' or '5000 examples'; got -3"),
        (
            "train.steps=2 weeks",
            "a duration is a positive number of steps, '2 epochs' or '5000 examples'; got '2 weeks'",
        ),
        ("train.steps=inf", "a duration is a positive number of steps, '2 epochs' or '5000 examples'; got 'inf'"),
        ("runs.full.learning_rate=fast", "runs.full.learning_rate is of type float, got 'fast'"),
        ("runs.full.method=lora", "runs.full.method is a function: set it in the config file"),
        ("model.heads=3", "width=256 is not a multiple of heads=3"),
    ],
)
def test_a_wrong_override_is_explained(item, message):
    with pytest.raises(ConfigError) as caught:
        config.override(config.load(QUICKSTART), item)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "has no function config() -> Experiment"),
        ("config = 3\n", "has no function config() -> Experiment"),
        ("def config(): return {'train': 1}\n", "returns a dict, expected an experiments.config.Experiment"),
        ("def config(): pass\n", "returns a NoneType, expected an experiments.config.Experiment"),
    ],
)
def test_a_file_of_another_kind_is_refused(text, message, tmp_path):
    with pytest.raises(ConfigError, match=f"config\\(?\\)? ?.*mine.py' {message}".replace("()", r"\(\)")):
        config.load(written(tmp_path, text))


def test_a_file_that_does_not_exist(tmp_path):
    with pytest.raises(
        ConfigError, match=r"config file '.*quickstrat.py' does not exist; the nearest is '.*quickstart.py'$"
    ):
        config.load(QUICKSTART.with_name("quickstrat.py"))
    with pytest.raises(ConfigError, match=r"config file '.*x.py' does not exist, and '.*' has no .py files$"):
        config.load(tmp_path / "x.py")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match=r"config file '.*notes.txt' is not a Python file \(.py\)$"):
        config.load(tmp_path / "notes.txt")


def test_a_misspelt_field_in_a_config_is_a_type_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'ranks'"):
        Run("a", "A", 1e-3, ranks=4)  # type: ignore[call-arg]


def test_two_runs_of_one_name_are_refused():
    experiment = config.load(QUICKSTART)
    with pytest.raises(ConfigError, match=r"each with a name of its own; got \['full', 'full'\]"):
        dataclasses.replace(experiment, runs=(experiment.runs[0], experiment.runs[0]))


def test_the_command_line_shows_no_traceback(capsys, tmp_path):
    assert main([str(QUICKSTART), "train.stpes=3", "--folder", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == "error: there is no field 'train.stpes'; the nearest is 'train.steps'\n"
    assert not (tmp_path / "run").exists()


def test_the_key_of_a_base_is_that_of_its_config_and_data():
    some = config.load(QUICKSTART)
    other = config.override(some, "train.steps=3")
    wider = config.override(some, "model.width=64")
    key = config.key(some.model, some.pretrain, some.seed, "data")
    assert key == config.key(other.model, other.pretrain, other.seed, "data")
    assert (
        len({key, config.key(wider.model, some.pretrain, 0, "data"), config.key(some.model, some.pretrain, 0, "x")})
        == 3
    )


# -- run folders -------------------------------------------------------------------------------------------------------


def test_a_folder_belongs_to_one_config(tmp_path):
    mine = {"train": {"steps": 100}, "runs": [{"name": "a", "rank": 4}]}
    claim(tmp_path / "run", mine, resume=False)
    claim(tmp_path / "run", mine, resume=True)
    other = {"train": {"steps": 200}, "runs": [{"name": "a", "rank": 8}]}
    with pytest.raises(ConfigError) as caught:
        claim(tmp_path / "run", other, resume=True)
    assert str(caught.value) == (
        f"'{tmp_path}/run' belongs to another config: runs.a.rank is 4 there and 8 here; train.steps is 100 there and 200 "
        "here. Choose another --folder, or delete it"
    )


def test_a_fresh_start_deletes_the_earlier_run_and_resume_keeps_it(tmp_path):
    claim(tmp_path / "run", {"a": 1}, resume=False)
    write_text(tmp_path / "run" / "results.md", "old")
    (tmp_path / "run" / "full").mkdir()
    claim(tmp_path / "run", {"a": 1}, resume=True)
    assert size(tmp_path / "run" / "results.md") == 3
    claim(tmp_path / "run", {"a": 1}, resume=False)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["experiment.json"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"is not empty and no run folder \(it has no experiment.json\)"):
        claim(tmp_path, {"a": 1}, resume=False)
    assert (tmp_path / "thesis.tex").exists()


def test_there_is_nothing_to_resume(tmp_path):
    with pytest.raises(ConfigError, match="--resume: there is no run in '.*'; start it without --resume"):
        claim(tmp_path / "run", {"a": 1}, resume=True)


def test_two_experiments_in_one_folder(tmp_path):
    """The second start, which would delete what the first one is writing, is refused; so is one that resumes."""
    with claim(tmp_path / "run", {"a": 1}, resume=False):
        write_text(tmp_path / "run" / "results.md", "new")
        for resume in (False, True):
            with pytest.raises(
                ConfigError, match=r"run' is in use by this process \(\d+\): two that write there would"
            ):
                claim(tmp_path / "run", {"a": 1}, resume=resume)
        assert size(tmp_path / "run" / "results.md") == 3
    with pytest.raises(ConfigError, match="belongs to another config"):
        claim(tmp_path / "run", {"a": 2}, resume=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["experiment.json", "results.md"]


@pytest.mark.parametrize("content", ["", '{"a": 1', "\x00\x01", "[" * 100_000])
def test_a_spoilt_file_of_a_run_is_named(content, tmp_path):
    claim(tmp_path / "run", {"a": 1}, resume=False)
    file = tmp_path / "run" / "experiment.json"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        claim(tmp_path / "run", {"a": 1}, resume=True)
    text = str(caught.value)
    assert text.startswith(f"'{file}' is damaged (") and "\n" not in text
    assert text.endswith(f"): delete '{file.parent}' to begin anew what lies there")


def test_a_spoilt_curve_is_named(tmp_path):
    for content in ('[{"step": 1}]', "{}7", '{"a": 1}'):
        (tmp_path / "curve.json").write_text(content)
        with pytest.raises(ConfigError, match=r"curve.json' is damaged \(.*\): delete"):
            read_curve(tmp_path)


def test_a_folder_is_a_local_one(tmp_path, capsys):
    assert located(None, "quickstart") == Path("runs/quickstart")
    assert located("runs/a", "quickstart") == Path("runs/a")
    assert located((tmp_path / "my run").as_uri(), "quickstart") == tmp_path / "my run"
    for module, arguments in (
        (train, [str(QUICKSTART)]),
        (compare, [str(QUICKSTART.parent / "compare_methods.py")]),
        (finetune, [str(QUICKSTART.parent / "minilm_sst2.py")]),
    ):
        for address in ("gs://bucket/run", "s3://bucket/run"):
            assert module.main([*arguments, "--small", "--folder", address]) == 2
            assert capsys.readouterr().err.startswith(f"error: --folder: '{address}' is no local folder: ")
    assert not Path("gs:").exists()


def test_a_run_that_cannot_be_is_found_before_the_base_is_pretrained(tmp_path, capsys):
    for override, message in (
        ("runs.lora_r4.rank=0", "runs.lora_r4: rank must be at least 1, not 0"),
        ("runs.lora_r4.targets=nothing", "runs.lora_r4: targets='nothing' matches none of the"),
    ):
        assert main(["configs/quickstart.py", "--small", "--folder", str(tmp_path / "run"), override]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "bases").exists()
