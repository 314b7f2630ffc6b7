"""The mutants' lines are there. That each is seen takes two minutes: `python -m tests.mutants`, which `.ci/run` runs."""

import re

import pytest

from tests.mutants import MUTANTS, ROOT, main, mutated


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_line_is_in_its_file_once(mutant, tmp_path):
    file = tmp_path / "jlora" / mutant.file
    file.parent.mkdir(parents=True)
    right = (ROOT / "jlora" / mutant.file).read_text()
    file.write_text(right)
    mutated(mutant, tmp_path)
    wrong = file.read_text()
    assert len(right.splitlines()) == len(wrong.splitlines())
    assert sum(x != y for x, y in zip(right.splitlines(), wrong.splitlines(), strict=True)) == 1
    compile(wrong, file, "exec")
    for test in mutant.tests:
        path, _, name = test.partition("::")
        assert re.search(rf"^def {re.escape(name.partition('[')[0])}\(", (ROOT / path).read_text(), re.MULTILINE), test


def test_a_line_that_is_no_longer_there_is_an_error(tmp_path):
    mutant = MUTANTS[0]._replace(line="a line of another day")
    file = tmp_path / "jlora" / mutant.file
    file.parent.mkdir(parents=True)
    file.write_text((ROOT / "jlora" / mutant.file).read_text())
    with pytest.raises(ValueError, match="'a line of another day' is 0 times in jlora/methods/lora.py, not once$"):
        mutated(mutant, tmp_path)


def test_a_name_that_no_mutant_has_is_an_error():
    with pytest.raises(SystemExit, match=r"^no mutant has \['nothing of ours'\] in its name: the scale upside down, "):
        main(["nothing of ours"])
