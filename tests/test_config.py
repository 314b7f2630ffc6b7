"""Config files, overrides and run folders: what they accept, and what they say to the rest."""

import dataclasses
import json
from pathlib import Path

import pytest

import jlora
from experiments import compare, configfile, finetune, train
from experiments.config import Experiment, Run, Study
from experiments.configfile import ConfigError
from experiments.folder import is_run_folder, located, open_run_folder, size, write_text
from experiments.loop import read_curve, read_result
from experiments.train import main

QUICKSTART = Path(__file__).resolve().parent.parent / "configs" / "quickstart.py"

STUDY = QUICKSTART.with_name("small_diffusion.py")


def load(path: Path, **options) -> Experiment:
    return configfile.load(Experiment, path, **options)


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(QUICKSTART.parent.glob("*.py")), ids=lambda path: path.stem)
@pytest.mark.parametrize("small", [False, True])
def test_every_config_loads_in_both_forms(path, small):
    experiment = configfile.load((Experiment, Study), path, small=small)
    json.dumps(configfile.describe(experiment))
    assert experiment.name.startswith(path.stem.split("_")[0])


def test_the_quickstart_is_three_runs_side_by_side():
    runs = load(QUICKSTART).runs
    methods = [("full fine-tuning", jlora.full()), ("LoRA r=4", jlora.lora(4)), ("LoRA r=16", jlora.lora(16))]
    assert [(run.label, run.method) for run in runs] == methods


@pytest.mark.parametrize(
    ("item", "path", "value"),
    [
        ("train.steps=200", ("train", "steps"), 200),
        ("train.steps=2 epochs", ("train", "steps"), "2 epochs"),
        ("train.decay=linear", ("train", "decay"), "linear"),
        ("train.clip=None", ("train", "clip"), None),
        ("base.learning_rate=1", ("base", "learning_rate"), 1.0),
        ("base.train.steps=3", ("base", "train", "steps"), 3),
        ("base.model.scan=True", ("base", "model", "scan"), True),
        ("base.model.dtype=bfloat16", ("base", "model", "dtype"), "bfloat16"),
        ("task.test=3", ("task", "test"), 3),
        ("options={'dropout': 0.1}", ("options",), {"dropout": 0.1}),
        ("runs.lora_r4.method=lora(8, alpha=16)", ("runs", 1, "method"), jlora.lora(8, alpha=16)),
        ("runs.lora_r4.method= dora(lora(8)) ", ("runs", 1, "method"), jlora.dora(jlora.lora(8))),
        ("runs.lora_r4.method=dora(16)", ("runs", 1, "method"), jlora.dora(jlora.lora(16))),
        ("runs.lora_r4.rates=1e-3,1", ("runs", 1, "rates"), (1e-3, 1.0)),
        ("runs.full.targets=h_0/.*", ("runs", 0, "targets"), "h_0/.*"),
        ("rates=1e-3,1", ("rates",), (1e-3, 1.0)),
        ("measure.relative_to=full", ("measure", "relative_to"), ("full",)),
        ("measure.relative_to='full','lora_r4'", ("measure", "relative_to"), ("full", "lora_r4")),
    ],
)
def test_an_override_sets_one_field(item, path, value):
    before = load(QUICKSTART)
    after = configfile.override(before, item)
    for step in path:
        after = after[step] if isinstance(step, int) else getattr(after, step)
    assert after == value and type(after) is type(value)
    assert before == load(QUICKSTART)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("train.step=200", "there is no field 'train.step'; the nearest is 'train.steps'"),
        ("runs.lora_r5.rates=8", "there is no field 'runs.lora_r5.rates'; the nearest is 'runs.lora_r4.rates'"),
        ("steps=200", "there is no field 'steps'; the nearest is 'train.steps'"),
        ("train.steps", "an override has the form field=value (train.steps=200), got 'train.steps'"),
        ("train.batch=many", "train.batch is of type int, got 'many'"),
        ("train.batch=True", "train.batch is of type int, got 'True'"),
        ("train.batch=0", "batch=0 is not at least 1 and a multiple of accumulate=1"),
        ("train.steps=-3", "a duration is a positive number of steps, '2 epochs' or '5000 examples'; got -3"),
        (
            "train.steps=2 weeks",
            "a duration is a positive number of steps, '2 epochs' or '5000 examples'; got '2 weeks'",
        ),
        ("train.steps=inf", "a duration is a positive number of steps, '2 epochs' or '5000 examples'; got 'inf'"),
        ("train.decay=square", "train.decay is one of 'linear', 'cosine', 'constant', got 'square'"),
        ("runs.full.learning_rate=fast", "runs.full.learning_rate is of type float or None, got 'fast'"),
        ("runs.full.rates=1e-2,1e-3", "runs.full.rates: positive and ascending; got (0.01, 0.001)"),
        ("task.old=prose", "task.old is a function: set it in the config file"),
        ("measure.relative_to=fulll", "measure.relative_to: ['fulll'] are no runs of 'quickstart'"),
        ("base.model.heads=3", "width=256 is not a multiple of heads=3"),
        ("seeds=0,0", "seeds: at least one, and no seed twice; got (0, 0)"),
        ("runs.full.method=lora", "runs.full.method is a method, written as a call: 'lora(...)'; got 'lora'"),
        ("runs.full.method=lara(8)", "runs.full.method: there is no method 'lara'; the nearest is 'lora'"),
        ("runs.full.method=lora(8, alhpa=1)", "runs.full.method: lora has no argument 'alhpa'; the nearest is 'alpha'"),
        ("runs.full.method=lora(rank=0)", "runs.full.method: lora: rank must be at least 1, not 0"),
        ("runs.full.method=dora(lara(8))", "runs.full.method: there is no method 'lara'; the nearest is 'lora'"),
        ("runs.full.method=lora(x)", "runs.full.method: 'x' is no number, text or method: an argument is written out"),
        (
            "runs.full.method=lora(8).name",
            "runs.full.method is a method, written as 'lora(8, alpha=16)' or 'dora(lora(8))'; got 'lora(8).name'",
        ),
        (
            "runs.full.method=__import__('os').remove('x')",
            "runs.full.method is a method, written as 'lora(8, alpha=16)' or 'dora(lora(8))'; got \"__import__('os').remove('x')\"",
        ),
        (
            "runs.full.method=lora(",
            "runs.full.method is a method, written as 'lora(8, alpha=16)' or 'dora(lora(8))'; got 'lora('",
        ),
    ],
)
def test_a_wrong_override_is_explained(item, message):
    with pytest.raises(ConfigError) as caught:
        configfile.override(load(QUICKSTART), item)
    assert str(caught.value) == message


def test_an_override_of_several_experiments_sets_the_field_of_each():
    study = configfile.load(Study, STUDY, small=True)
    changed = configfile.override(configfile.override(study, "mesh=fsdp=2"), "experiments.style.train.steps=3")
    assert [experiment.mesh for experiment in changed.experiments] == ["fsdp=2", "fsdp=2"]
    assert [experiment.train.steps for experiment in changed.experiments] == [100, 3]
    with pytest.raises(
        ConfigError, match=r"^there is no field 'train\.step'; the nearest is 'experiments\.style\.train"
    ):
        configfile.override(study, "train.step=3")
    other = configfile.load(Study, QUICKSTART.with_name("compare_methods.py"))
    with pytest.raises(
        ConfigError, match=r"^there is no field 'experiments\.digits\.base\.model\.vocab_size': set it where"
    ):
        configfile.override(other, "base.model.vocab_size=300")
    with pytest.raises(ConfigError, match="^seeds: at least one, and no seed twice; got"):
        configfile.override(study, "seeds=0,0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "has no function config() -> Experiment"),
        ("config = 3\n", "has no function config() -> Experiment"),
        ("def config(): return {'train': 1}\n", "returns dict, expected Experiment"),
        ("def config(): pass\n", "returns NoneType, expected Experiment"),
    ],
)
def test_a_file_of_another_kind_is_refused(text, message, tmp_path):
    with pytest.raises(ConfigError, match=f"config\\(?\\)? ?.*mine.py' {message}".replace("()", r"\(\)")):
        load(written(tmp_path, text))


def test_a_file_that_does_not_exist(tmp_path):
    with pytest.raises(
        ConfigError, match=r"config file '.*quickstrat.py' does not exist; the nearest is '.*quickstart.py'$"
    ):
        load(QUICKSTART.with_name("quickstrat.py"))
    with pytest.raises(ConfigError, match=r"config file '.*x.py' does not exist, and '.*' has no .py files$"):
        load(tmp_path / "x.py")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match=r"config file '.*notes.txt' is not a Python file \(.py\)$"):
        load(tmp_path / "notes.txt")


def test_a_misspelt_field_in_a_config_is_a_type_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'ranks'"):
        Run("a", "A", jlora.lora(4), ranks=4)  # type: ignore[call-arg]


def test_two_runs_of_one_name_are_refused():
    experiment = load(QUICKSTART)
    with pytest.raises(ConfigError, match=r"each with a name of its own; got \['full', 'full'\]"):
        dataclasses.replace(experiment, runs=(experiment.runs[0], experiment.runs[0]))


def test_the_command_line_shows_no_traceback(capsys, tmp_path):
    assert main([str(QUICKSTART), "train.stpes=3", "--folder", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == "error: there is no field 'train.stpes'; the nearest is 'train.steps'\n"
    assert not (tmp_path / "run").exists()


def test_the_key_of_a_base_is_that_of_its_config_and_data():
    some = load(QUICKSTART)
    other = configfile.override(some, "train.steps=3")
    wider = configfile.override(some, "base.model.width=64")
    key = configfile.key(some.base, some.seed, "data")
    assert key == configfile.key(other.base, other.seed, "data")
    assert len({key, configfile.key(wider.base, 0, "data"), configfile.key(some.base, 0, "x")}) == 3


# -- run folders -------------------------------------------------------------------------------------------------------


def test_a_folder_belongs_to_one_config(tmp_path):
    mine = {"train": {"steps": 100}, "runs": [{"name": "a", "rank": 4}]}
    open_run_folder(tmp_path / "run", mine, resume=False)
    open_run_folder(tmp_path / "run", mine, resume=True)
    other = {"train": {"steps": 200}, "runs": [{"name": "a", "rank": 8}]}
    with pytest.raises(ConfigError) as caught:
        open_run_folder(tmp_path / "run", other, resume=True)
    assert str(caught.value) == (
        f"'{tmp_path}/run' belongs to another config: runs.a.rank is 4 there and 8 here; train.steps is 100 there and 200 "
        "here. Choose another --folder, or delete it"
    )


def test_a_fresh_start_deletes_the_earlier_run_and_resume_keeps_it(tmp_path):
    open_run_folder(tmp_path / "run", {"a": 1}, resume=False)
    write_text(tmp_path / "run" / "results.md", "old")
    (tmp_path / "run" / "full").mkdir()
    open_run_folder(tmp_path / "run", {"a": 1}, resume=True)
    assert size(tmp_path / "run" / "results.md") == 3
    open_run_folder(tmp_path / "run", {"a": 1}, resume=False)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["experiment.json"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"is not empty and no run folder \(it has no experiment.json\)"):
        open_run_folder(tmp_path, {"a": 1}, resume=False)
    assert (tmp_path / "thesis.tex").exists()


def test_a_folder_whose_run_was_killed_while_it_was_claimed_is_its_own(tmp_path, monkeypatch):
    def killed(*places):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            open_run_folder(tmp_path / "run", {"a": 1}, resume=False)
    assert list((tmp_path / "run").iterdir()) and not is_run_folder(tmp_path / "run")
    open_run_folder(tmp_path / "run", {"a": 1}, resume=False)
    assert is_run_folder(tmp_path / "run")


def test_there_is_nothing_to_resume(tmp_path):
    with pytest.raises(ConfigError, match="--resume: there is no run in '.*'; start it without --resume"):
        open_run_folder(tmp_path / "run", {"a": 1}, resume=True)


@pytest.mark.parametrize(
    ("option", "begun", "resumed"),
    [
        ("--resume", True, [True, False]), ("--resume", False, [True, True]),  # which says that there is nothing
        ("--resume-if-there", True, [True, False]), ("--resume-if-there", False, [False, False]),
    ],
)  # fmt: skip
def test_of_a_study_the_experiments_that_were_not_begun_begin(option, begun, resumed, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "run", lambda experiment, folder, *, resume, console: asked.append(resume))
    names = [experiment.name for experiment in configfile.load(Study, STUDY, small=True).experiments]
    if begun:
        (tmp_path / names[0]).mkdir()
        (tmp_path / names[0] / "experiment.json").write_text("{}")
    assert main([str(STUDY), "--small", "--folder", str(tmp_path), option]) == 0
    assert asked == resumed


def test_two_experiments_in_one_folder(tmp_path):
    """The second start, which would delete what the first one is writing, is refused; so is one that resumes."""
    with open_run_folder(tmp_path / "run", {"a": 1}, resume=False):
        write_text(tmp_path / "run" / "results.md", "new")
        for resume in (False, True):
            with pytest.raises(
                ConfigError, match=r"run' is in use by this process \(\d+\): two that write there would"
            ):
                open_run_folder(tmp_path / "run", {"a": 1}, resume=resume)
        assert size(tmp_path / "run" / "results.md") == 3
    with pytest.raises(ConfigError, match="belongs to another config"):
        open_run_folder(tmp_path / "run", {"a": 2}, resume=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["experiment.json", "results.md"]


@pytest.mark.parametrize("content", ["", '{"a": 1', "\x00\x01", "[" * 100_000])
def test_a_spoilt_file_of_a_run_is_named(content, tmp_path):
    open_run_folder(tmp_path / "run", {"a": 1}, resume=False)
    file = tmp_path / "run" / "experiment.json"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        open_run_folder(tmp_path / "run", {"a": 1}, resume=True)
    text = str(caught.value)
    assert text.startswith(f"'{file}' is damaged (") and "\n" not in text
    assert text.endswith(f"): delete '{file.parent}' to begin anew what lies there")


def test_a_spoilt_curve_is_named(tmp_path):
    for content in ('[{"step": 1}]', "{}7", '{"a": 1}'):
        (tmp_path / "curve.json").write_text(content)
        with pytest.raises(ConfigError, match=r"curve.json' is damaged \(.*\): delete"):
            read_curve(tmp_path)
        (tmp_path / "result.json").write_text(content)
        with pytest.raises(ConfigError, match=r"result.json' is damaged \(.*\): delete"):
            read_result(tmp_path)


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
        ("train.warmup=8", "runs.full: train.warmup=8 is 8 of the run's 8 steps: none is left after it"),
        (
            "runs.lora_r4.method=adalora(4, 2, total_steps=9, warmup=1, final=1)",
            "runs.lora_r4: adalora is made for total_steps=9, and the run has 8 steps",
        ),
        ("runs.lora_r4.targets=nothing", "runs.lora_r4: targets='nothing' matches none of the"),
    ):
        assert main(["configs/quickstart.py", "--small", "--folder", str(tmp_path / "run"), override]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "bases").exists()
