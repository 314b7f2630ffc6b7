"""The table of what is exchanged with PEFT says what the tests of its golden folders show."""

import re
from pathlib import Path

import pytest

from tests.test_peft import READ, REFUSED

README = Path(__file__).resolve().parent.parent / "jlora" / "interop" / "README.md"
LINES = [
    line for line in README.read_text().splitlines() if re.fullmatch(r"\|.*\| (yes|no) \| (yes|no) \|.*\w.*\|", line)
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split("|")[1].strip())
def test_row_is_run_by_the_tests(line):
    _, _, read, written, folders, _ = (cell.strip() for cell in line.split("|"))
    names = folders.split(", ")
    assert read == written and all(name in (READ if read == "yes" else REFUSED) for name in names)


def test_no_refused_folder_is_left_out_unless_it_is_of_a_method_that_jlora_has_not():
    named = {name for line in LINES for name in line.split("|")[4].strip().split(", ")}
    others = {name for name in REFUSED if name not in named}
    assert all(REFUSED[name].startswith("peft_type=") for name in others - {"monteclora", "velora", "lora_pickled"})
