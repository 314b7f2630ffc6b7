"""Builds the API reference from the docstrings, as HTML: `pip install -e ".[docs]" && python .ci/reference.py docs/`.

What is public is what the packages name in their `__init__`. A name without a docstring, or a `jlora.name` in one that
does not exist, ends the build, as every warning does.
"""

import inspect
import re
import sys
import types
import warnings
from pathlib import Path

import pdoc

import jlora
import jlora.interop.loralib

PACKAGES = (jlora, jlora.methods, jlora.models, jlora.checkpoint)
MODULES = (jlora.interop.loralib,)


def public(package: types.ModuleType) -> list[str]:
    """The names of a package's `__init__`, modules and dunders aside."""
    named = {name: value for name, value in vars(package).items() if not name.startswith("_")}
    return [name for name, value in named.items() if not isinstance(value, types.ModuleType) and _is_own(value)]


def _is_own(value: object) -> bool:
    return getattr(value, "__module__", "jlora").partition(".")[0] == "jlora"


def faults(package: types.ModuleType) -> list[str]:
    """What is wrong with the docstrings of a package's names."""
    found = []
    for name in public(package):
        value = getattr(package, name)
        text = inspect.getdoc(value) or ""
        if callable(value) and not text:
            found.append(f"{package.__name__}.{name} has no docstring")
        for cited in re.findall(r"\bjlora\.([a-zA-Z_]+)\b", text):
            if not hasattr(jlora, cited):
                found.append(f"{package.__name__}.{name}: its docstring has jlora.{cited}, which does not exist")
    return found


def main(folder: Path) -> int:
    """Writes the reference into `folder`. Returns the exit status."""
    wrong = [fault for package in (*PACKAGES, *MODULES) for fault in faults(package)]
    print("\n".join(wrong), file=sys.stderr)
    if wrong:
        return 1
    for package in PACKAGES:
        package.__all__ = public(package)
    warnings.simplefilter("error")
    pdoc.render.configure(docformat="google", math=True)
    pdoc.pdoc(*(module.__name__ for module in (*PACKAGES, *MODULES)), output_directory=folder)
    pages = len(list(folder.rglob("*.html")))
    print(f"{folder}: {pages} pages, {sum(len(public(package)) for package in PACKAGES)} names")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs")))
