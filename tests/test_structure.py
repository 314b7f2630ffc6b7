"""Who may import whom, what nothing may reach into, and where things may lie. Reads the source; imports none of it."""

import ast
import graphlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module imports from the rows below its own (and, being in a folder that has one row, from its own folder); never from
# its own row. The rows of `transform` and `adapted` are ordered within.
TRANSFORM = (
    ("axes", "explicit", "view"),
    ("dequantised",),
    ("product",),
    ("weight", "jaxprs"),
    ("trace",),
    ("marks", "convolution", "reach", "activations"),
    ("rules", "mean"),
    ("interpret", "follow"),
    ("lift",),
    ("sites",),
    ("intercept",),
)
ADAPTED = (
    ("select",),
    ("statistics", "adapted"),
    ("compress",),
    ("apply", "convert", "explain", "differences", "thin", "quantize"),
    ("merge", "loftq"),
    ("arithmetic", "extract"),
)
LAYERS = (
    ("tree",),
    tuple(f"transform.{name}" for name in TRANSFORM[0]),
    ("quant",),
    *(tuple(f"transform.{name}" for name in row) for row in TRANSFORM[1:]),
    ("methods",),
    *(tuple(f"adapted.{name}" for name in row) for row in ADAPTED),
    ("matrices", "deprecated", "host"),
    ("optim", "serve", "analysis", "search"),
    ("state",),
    ("sharding",),
    ("checkpoint",),
    ("objective", "arguments"),
    ("train",),
    ("planning",),
    ("interop",),
    ("cli",),
)
ROW = {name: row for row, names in enumerate(LAYERS) for name in names}
APART = "models"  # imports nothing of the core but what a leaf may be (quant), and the core nothing of it
BETWEEN = ("interop", "cli")  # they see both
KNOWS_JAXPRS = tuple(f"transform.{name}" for name in ("follow", "interpret", "jaxprs", "mean", "reach", "rules"))
OUTER = ("experiments", "configs", "notebooks", "tests")
VAGUE = ("utils", "util", "helpers", "helper", "common", "base", "misc")
LONGEST = 600  # lines


def modules(folder: str) -> dict[str, Path]:
    """Dotted names of the modules below a folder of the repository, with their files."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


CORE = modules("jlora")
WRITTEN = {name: path for folder in ("jlora", "experiments", "configs") for name, path in modules(folder).items()}


def imports(module: str, source: str, *, package: bool = False) -> Iterator[str]:
    """Everything that a module imports, at its top or inside a function, as dotted names: "jlora.transform.axes.contract"."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: len(module.split(".")) - node.level + package] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def reached(source: str) -> Iterator[str]:
    """Dotted names that the code spells out, "jax.lax.scan", imports aside."""
    for node in ast.walk(ast.parse(source)):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name) and parts:
            yield ".".join([node.id, *reversed(parts)])


def wrong_arrow(module: str, target: str) -> str | None:
    """Why a module of jlora may not import a dotted name, or None."""
    origin = target.split(".")[0]
    if origin in OUTER:
        return f"{module} imports {target}: nothing imports {origin}"
    if origin != "jlora" or module == "jlora":
        return None
    mine, theirs = _room(module), _room(target)
    if theirs == mine:
        return None
    if mine == APART and theirs == "quant":
        return None
    if APART in (mine, theirs) and not (theirs == APART and mine in BETWEEN):
        return f"{module} imports {target}: jlora.{APART} and the core know nothing of each other"
    if theirs not in ROW and theirs != APART:
        return f"{module} imports {target} from jlora itself: name the module that defines it"
    if theirs != APART and ROW[theirs] >= ROW[mine]:
        return f"{module} imports {target}: {theirs} is not below {mine} in LAYERS"
    return None


def private(module: str, source: str) -> list[str]:
    """What a module reaches in other packages' private parts, or in JAX's tracing machinery without being allowed to."""
    found = []
    for name in {*imports(module, source), *reached(source)}:
        if re.match(r"jax\.(core|interpreters)\b|(jax|jaxlib|flax|optax|orbax|numpy)\.(\w+\.)*_[a-z]", name):
            found.append(f"{module}: {name} is private")
        if name.startswith("jax.extend") and module not in {f"jlora.{name}" for name in KNOWS_JAXPRS}:
            found.append(f"{module}: {name} is for {' and '.join(KNOWS_JAXPRS)} alone")
    return found


def asked_of_a_method(source: str) -> list[str]:
    """Places that ask whether a field of a method is None: `method.acts.data is not None`, and the like."""
    module = ast.parse(source)
    arguments = [
        a for node in ast.walk(module) if isinstance(node, ast.arguments) for a in (*node.args, *node.kwonlyargs)
    ]
    methods = {a.arg for a in arguments if a.annotation is not None and "Method" in ast.unparse(a.annotation)}
    names = {"method", "part", "acts", "training", *methods}
    return [
        ast.unparse(node)
        for node in ast.walk(module)
        if isinstance(node, ast.Compare) and any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops)
        for side in (node.left, *node.comparators)
        if isinstance(side, ast.Attribute) and names & set(ast.unparse(side).split(".")[:-1])
    ]


def test_every_module_of_jlora_has_a_place():
    names = {_room(module) for module in CORE} - {""}
    allowed = {*ROW, APART, "transform", "adapted"}
    assert names <= allowed, f"{sorted(names - allowed)} are not in design: give them a row in LAYERS"
    assert {"transform.axes", "transform.sites", "methods", "adapted.adapted", "models"} <= names


def test_imports_point_down():
    arrows = [(module, target) for module, path in CORE.items() for target in _imports(module, path)]
    assert len([target for _, target in arrows if target.startswith("jlora.")]) > 50  # the walk saw the imports
    assert [wrong for arrow in arrows if (wrong := wrong_arrow(*arrow))] == []


def test_no_import_is_circular():
    graph = {
        module: {_defining(target) for target in _imports(module, path)} - {module} for module, path in CORE.items()
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("jlora.transform.weight") < order.index("jlora.transform.lift") < order.index("jlora")


def test_no_code_outside_methods_asks_what_a_method_has():
    outside = {name: path for name, path in WRITTEN.items() if _room(name) != "methods"}
    assert {name: asked for name, path in outside.items() if (asked := asked_of_a_method(path.read_text()))} == {}


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("if adapted.method.acts.data is not None: pass", 1),
        ("x = None if run.method.activation is None else 1", 1),
        ("def f(mine: Method): return mine.rank is None", 1),
        ("def f(mine: jlora.Method | None): return [m for m in mine.parts if part.rank is not None]", 1),
        ("if method is None and rank is None: pass", 0),
        ("if site.rank is None or adapted.method.has_rank: pass", 0),
    ],
)
def test_a_question_of_a_method_is_seen(source: str, count: int):
    assert len(asked_of_a_method(source)) == count


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("jlora.transform.weight", "jlora.transform.lift.lift"),
        ("jlora.transform.rules", "jlora.adapted.adapted"),
        ("jlora.transform.sites", "jlora.methods.lora"),
        ("jlora.optim", "jlora.checkpoint.save"),  # not each other
        ("jlora.adapted.adapted", "jlora.apply"),  # the names of __init__
        ("jlora.adapted.adapted", "jlora"),
        ("jlora.models.gpt2.modeling", "jlora.transform.weight.Weight"),
        ("jlora.transform.lift", "jlora.models.gpt2.GPT2"),
        ("jlora.train", "experiments.config"),
        ("jlora", "experiments"),
    ],
)
def test_a_wrong_arrow_is_seen(module: str, target: str):
    assert wrong_arrow(module, target)


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("jlora.transform.lift", "jlora.transform.rules"),
        ("jlora.methods.dora", "jlora.methods.lora.lora"),
        ("jlora.models.gpt2.params", "jlora.models.gpt2.modeling.GPT2Config"),
        ("jlora", "jlora.train.train_step"),
        ("jlora.train", "jax.numpy"),
    ],
)
def test_a_right_arrow_is_let_through(module: str, target: str):
    assert wrong_arrow(module, target) is None


def test_only_declared_dependencies_are_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = lambda lines: {re.split(r"[^\w-]", line)[0].split("-")[0] for line in lines}
    allowed = names(project["dependencies"]) | set(sys.stdlib_module_names) | {"jlora"}
    extra = names(project["optional-dependencies"]["models"])  # for jlora.models and jlora.cli, inside a function
    command = names(project["optional-dependencies"]["cli"])  # for jlora.cli alone
    remote = {("jlora.checkpoint.store", name) for name in names(project["optional-dependencies"]["remote"])}
    used = {(module, target.split(".")[0]) for module, path in CORE.items() for target in _imports(module, path)}
    wrong = {(module, origin) for module, origin in used if origin.split("_")[0] not in allowed}
    wrong -= {
        pair for pair in wrong if pair[0].startswith(("jlora.models.", "jlora.cli.")) and pair[1].split("_")[0] in extra
    }
    wrong -= remote
    assert {pair for pair in wrong if not (pair[0].startswith("jlora.cli.") and pair[1] in command)} == set()


def test_nothing_private_is_reached():
    assert [found for module, path in WRITTEN.items() for found in private(module, path.read_text())] == []


@pytest.mark.parametrize(
    ("module", "source", "seen"),
    [
        ("jlora.transform.lift", "from jax._src import core", True),
        ("jlora.transform.lift", "from jax import core", True),
        ("jlora.transform.lift", "import jax.core as c", True),
        ("jlora.adapted.adapted", "import jax\ndef f(x):\n    return isinstance(x, jax.core.Tracer)", True),
        ("jlora.adapted.adapted", "import jax._src.api", True),
        ("jlora.adapted.adapted", "from jax.interpreters import ad", True),
        ("jlora.adapted.adapted", "def f():\n    from jax.extend import core", True),
        ("jlora.transform.weight", "import jax\njax.extend.core.Primitive('p')", True),
        ("jlora.optim", "from optax._src import base", True),
        ("jlora.transform.interpret", "from jax.extend import core as jex\njex.Jaxpr", False),
        ("jlora.transform.rules", "import jax.extend.core", False),
        (
            "jlora.adapted.adapted",
            "import jax\nfrom jax.custom_derivatives import SymbolicZero\njax.__version__",
            False,
        ),
    ],
)
def test_what_is_private(module: str, source: str, seen: bool):
    assert bool(private(module, source)) == seen


def test_relative_imports_are_read():
    assert list(imports("jlora.methods.dora", "from .lora import lora\nfrom ..transform.weight import Weight\nfrom . import eva")) == [
        "jlora.methods.lora.lora", "jlora.transform.weight.Weight", "jlora.methods.eva",
    ]  # fmt: skip
    assert list(imports("jlora.methods", "from .lora import lora", package=True)) == ["jlora.methods.lora.lora"]


def test_names_say_something():
    vague = [str(path) for folder in ("jlora", *OUTER) for path in (ROOT / folder).rglob("*") if path.stem in VAGUE]
    assert vague == []


def test_modules_are_small():
    lines = {name: path.read_text().count("\n") for name, path in WRITTEN.items()}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}


def test_docstrings_begin_with_what_they_name():
    """A noun phrase or a verb, which stands without the name above it; not "What this returns"."""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    openings = [
        f"{name}: {text.splitlines()[0]}"
        for name, path in WRITTEN.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, nodes) and (text := ast.get_docstring(node))
    ]
    assert len(openings) > 1000
    assert [opening for opening in openings if opening.partition(": ")[2].startswith("What ")] == []


def test_python_lies_in_its_folders():
    """No module beside the five folders. Virtual environments, and what begins with a dot, are nobody's business."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))]
    mine = {path.name for path in folders if not (path / "pyvenv.cfg").exists() and any(path.rglob("*.py"))}
    assert mine <= {"jlora", *OUTER, "build"}
    assert list(ROOT.glob("*.py")) == []


def test_the_wheel_is_typed():
    assert (ROOT / "jlora" / "py.typed").exists()


def _imports(module: str, path: Path) -> list[str]:
    return list(imports(module, path.read_text(), package=path.stem == "__init__"))


def _defining(target: str) -> str:
    """The module of jlora that an imported name comes from; other packages are one node."""
    while target and target not in CORE:
        target = target.rpartition(".")[0]
    return target or "elsewhere"


def _room(name: str) -> str:
    """The part of a dotted name that has a row: the file or folder below jlora, in the ordered folders the file."""
    parts = name.split(".")[1:]
    ordered = parts[:1] in (["transform"], ["adapted"])
    return ".".join(parts[: 2 if ordered else 1])
