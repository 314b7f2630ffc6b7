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

import jlora
import jlora.interop.formats
import jlora.interop.loralib
import jlora.interop.merge_folder
import jlora.models.diffusion

PACKAGES = (jlora, jlora.methods, jlora.models, jlora.models.diffusion, jlora.checkpoint, jlora.planning)
MODULES = (
    jlora.peft, jlora.diffusers, jlora.kohya, jlora.interop.formats, jlora.interop.loralib, jlora.interop.merge_folder,
    jlora.sharding,
)  # fmt: skip


def public(package: types.ModuleType) -> list[str]:
    """The names of a package's `__init__`, modules and dunders aside."""
    named = {name: value for name, value in vars(package).items() if not name.startswith("_")}
    return [name for name, value in named.items() if not isinstance(value, types.ModuleType) and _is_own(value)]


def _is_own(value: object) -> bool:
    return getattr(value, "__module__", "jlora").partition(".")[0] == "jlora"


def members(value: object) -> dict[str, object]:
    """The public methods and properties that a class of jlora defines, by name."""
    if not isinstance(value, type):
        return {}
    fields = {*getattr(value, "__dataclass_fields__", ()), *getattr(value, "_fields", ())}
    kinds = (types.FunctionType, property, classmethod, staticmethod)
    own = {name: getattr(value, name) for name, member in vars(value).items() if isinstance(member, kinds)}
    return {name: member for name, member in own.items() if not name.startswith("_") and name not in fields}


def faults(package: types.ModuleType) -> list[str]:
    """Missing docstrings of a package's names and of their members, and names in them that do not exist."""
    found = []
    for name in public(package):
        value = getattr(package, name)
        said = {name: value, **{f"{name}.{member}": of for member, of in members(value).items()}}
        for path, described in said.items():
            text = inspect.getdoc(described) or ""
            if (callable(described) or isinstance(described, property)) and not text:
                found.append(f"{package.__name__}.{path} has no docstring")
            for cited in re.findall(r"\bjlora((?:\.[a-zA-Z_]\w*)+)", text):
                if not _exists(cited[1:].split(".")):
                    found.append(f"{package.__name__}.{path}: its docstring has jlora{cited}, which does not exist")
    return found


def _exists(parts: list[str]) -> bool:
    value: object = jlora
    for i, part in enumerate(parts):
        if not hasattr(value, part):
            # A field of a dataclass, or of a NamedTuple, without a default.
            return i > 0 and part in getattr(value, "__annotations__", {})
        value = getattr(value, part)
    return True


def main(folder: Path) -> int:
    """Writes the reference into `folder`. Returns the exit status."""
    wrong = [fault for package in (*PACKAGES, *MODULES) for fault in faults(package)]
    print("\n".join(wrong), file=sys.stderr)
    if wrong:
        return 1
    import pdoc  # of the extra `docs`

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
