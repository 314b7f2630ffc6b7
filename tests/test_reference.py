"""The API reference: every public name and member has a docstring, and names in docstrings exist."""

import importlib.util
import types
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parent.parent / ".ci" / "reference.py"
SPEC = importlib.util.spec_from_file_location("reference", PATH)
reference = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(reference)


@pytest.mark.parametrize("package", [*reference.PACKAGES, *reference.MODULES], ids=lambda package: package.__name__)
def test_all_that_is_public_is_described(package):
    assert len(reference.public(package)) >= 2
    assert reference.faults(package) == []


def test_faults_are_seen():
    package = types.ModuleType("jlora.example")

    def silent():
        return None

    class Wrong:
        """See `jlora.models.nothing` and `jlora.lora`."""

        def method(self):
            return None

        @property
        def value(self):
            """See `jlora.nowhere`."""

    package.silent, package.Wrong = silent, Wrong
    silent.__module__ = Wrong.__module__ = "jlora.example"
    assert reference.faults(package) == [
        "jlora.example.silent has no docstring",
        "jlora.example.Wrong: its docstring has jlora.models.nothing, which does not exist",
        "jlora.example.Wrong.method has no docstring",
        "jlora.example.Wrong.value: its docstring has jlora.nowhere, which does not exist",
    ]
