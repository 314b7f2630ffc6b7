"""The tiers themselves: whatever is left to the thorough one has a test of the same row in the default run."""

import collections
from pathlib import Path

import pytest

from tests import memory, tiers

ROOT = Path(__file__).parent.parent


def function(item: pytest.Item) -> tuple[str, str]:
    return item.nodeid.partition("::")[0], getattr(item, "originalname", item.name)


def row(item: pytest.Item) -> frozenset[str]:
    """The strings of an item's parameters: keys of tables."""
    callspec = getattr(item, "callspec", None)
    return frozenset(str(value) for value in callspec.params.values()) if callspec else frozenset()


def without_stand_in(items: list[pytest.Item]) -> list[str]:
    """The tests of the thorough tier that no test of the default run stands for."""
    default = collections.defaultdict(list)
    for item in items:
        if tiers.is_default(item):
            default[function(item)].append(row(item))
    missing, collected = [], {function(item)[0] for item in items}
    for item in items:
        for mark in item.iter_markers("thorough"):
            file, _, name = "".join(mark.args).rpartition("::")
            if file and file not in collected and (ROOT / file).is_file():
                continue  # a run of some files
            rows = default.get((file or function(item)[0], name), [])
            if not any(row(item) <= other or other <= row(item) for other in rows):
                missing.append(f"{item.nodeid}: {mark.args}")
    return missing


def test_what_is_thorough_has_a_stand_in(request: pytest.FixtureRequest):
    """Every thorough test that this run collected has a stand-in; a run without arguments collects all."""
    items = request.config.stash[tiers.COLLECTED]
    assert without_stand_in(items) == []
    if {Path(argument).name for argument in request.config.args} >= {"tests"}:
        assert len([item for item in items if not tiers.is_default(item)]) > 500


class Item:
    """What is asked of a collected test."""

    def __init__(self, nodeid: str, *marks: pytest.Mark, **params: str) -> None:
        self.nodeid, self.name, self.marks = nodeid, nodeid.partition("::")[2], marks
        self.originalname = self.name.partition("[")[0]
        self.callspec = type("Spec", (), {"params": params})()

    def iter_markers(self, name=None):
        return [mark for mark in self.marks if name in (None, mark.name)]

    def get_closest_marker(self, name):
        return next(iter(self.iter_markers(name)), None)


def long(stand_in: str) -> pytest.Mark:
    return pytest.mark.thorough(stand_in).mark


@pytest.mark.parametrize(
    ("items", "missing"),
    [
        ([Item("f.py::a[x]", row="x"), Item("f.py::b[x]", long("a"), row="x")], []),
        ([Item("f.py::a[x]", row="x"), Item("f.py::b[x-1]", long("a"), row="x", device="1")], []),
        ([Item("f.py::a[x]", row="x"), Item("f.py::b[y]", long("a"), row="y")], ["f.py::b[y]"]),
        ([Item("g.py::a[x]", row="x"), Item("f.py::b[x]", long("a"), row="x")], ["f.py::b[x]"]),
        ([Item("g.py::a[x]", row="x"), Item("f.py::b[x]", long("g.py::a"), row="x")], []),
        ([Item("f.py::b[x]", long("g.py::a"), row="x")], ["f.py::b[x]"]),  # there is no such file
        ([Item("f.py::b[x]", long("tests/test_axes.py::a"), row="x")], []),
        (
            [Item("f.py::a[x]", long("c"), row="x"), Item("f.py::b[x]", long("a"), row="x")],
            ["f.py::a[x]", "f.py::b[x]"],
        ),
    ],
)
def test_a_row_without_a_stand_in_is_seen(items, missing):
    assert [
        text.partition(":")[0] + "::" + text.split("::")[1].split(":")[0] for text in without_stand_in(items)
    ] == missing


def test_shares_part_the_thorough_tier():
    ids = [f"tests/test_x.py::test[{i}]" for i in range(200)]
    parts = [[i for i in ids if tiers.Share(part, 20).has(i)] for part in range(20)]
    assert sorted(name for part in parts for name in part) == sorted(ids) and all(parts)
    assert tiers.Share.parse("7/20") == (7, 20) and not any(map(tiers.Share.parse("none").has, ids))
    assert tiers.Share.parse(None) == tiers.Share.parse("20") and tiers.Share.parse(None).of == 20


@pytest.mark.parametrize("text", ["20/20", "0", "/4", "0/0", "-1/4", "all", ""])
def test_a_part_that_is_none_is_an_error(text):
    with pytest.raises(pytest.UsageError, match=f"--share must be 'none', .* counted from 0, not {text!r}"):
        tiers.Share.parse(text)


@pytest.mark.parametrize(("commit", "part"), [("6", 2), ("ffff", 3)])
def test_the_commit_chooses_the_part(commit, part, monkeypatch):
    monkeypatch.setattr(tiers, "commit", lambda: commit)
    assert tiers.Share.parse("4") == (part, 4)


def test_without_a_commit_no_part_is_asked_for(monkeypatch):
    """.ci/run would run the same quarter for ever."""
    monkeypatch.setattr(tiers, "commit", lambda: "")
    assert tiers.Share.parse(None) == (0, 20)
    with pytest.raises(pytest.UsageError, match="--share='4' lets the commit choose the part, and git names none here"):
        tiers.Share.parse("4")


@pytest.mark.parametrize(
    ("readings", "drops"),
    [
        ([600, 600, 1000, 990], ""),  # enough room
        ([600, 600, 1001, 700, 960, 1001, 640], "bb"),
        ([750, 640, 640, 900], "s"),
        # 1,100 cannot be dropped: it is tried again when much has come.
        ([600, 600, 1300, 1100, 1340, 1351, 900, 1140, 1160, 900], "bbb"),
    ],
)
def test_what_is_dropped_and_when(readings, drops, monkeypatch):
    """Readings of the memory in MB: before a file, after a drop there, at its start; between its tests, after a drop there."""
    assert dropped(memory.Bound(), readings, monkeypatch) == drops


def test_a_file_starts_anew_whatever_an_earlier_one_left(monkeypatch):
    """What an earlier file could not drop once raised the bound of all later ones: 1,501 MB were taken of 1,500."""
    bound = memory.Bound()
    assert dropped(bound, [600, 600, 1300, 1100], monkeypatch) == "b"
    assert dropped(bound, [1090, 650, 650, 1010, 640], monkeypatch) == "sb"
    assert dropped(bound, [700, 700, 1001, 700], monkeypatch) == "b"  # a start that would drop little drops nothing
    assert dropped(bound, [751, 660, 660], monkeypatch) == "s"
    assert dropped(bound, [1300, 1090, 1090, 1350, 500], monkeypatch) == "sb"  # what could not be dropped then can be
    assert dropped(bound, [1150, 600, 600], monkeypatch) == "s"


def dropped(bound: memory.Bound, readings: list[float], monkeypatch: pytest.MonkeyPatch) -> str:
    """An `s` for each drop at the start of a file, a `b` for each between its tests, which go on as long as the readings."""
    left, found, when = list(readings), [], "s"
    monkeypatch.setattr(memory, "megabytes", lambda field: left.pop(0))
    monkeypatch.setattr(memory, "forget_peak", lambda: None)
    monkeypatch.setattr(memory, "drop", lambda: found.append(when))
    bound.start()
    when = "b"
    while left:
        bound.between()
    return "".join(found)


def test_a_file_that_takes_too_much_memory_is_named():
    memory.forget_peak()
    memory.check("tests/test_x.py")
    if memory.megabytes("VmHWM"):
        with pytest.raises(AssertionError, match=r"^tests/test_x.py took its worker to \d+ MB; at most 1 are allowed"):
            memory.check("tests/test_x.py", 1)
