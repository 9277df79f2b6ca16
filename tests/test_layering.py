"""The shape of the code, checked on its syntax trees: arrows, sizes, docstrings, names, README and docs.

Each check is a function from sources to problems, so that the negative controls at the end can hand it
a source that breaks the rule.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from titan_moe.layer.dispatch import DISPATCHERS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "titan_moe"

# From the top down: a folder imports from the folders below its own, nothing else.
FOLDERS: tuple[set[str], ...] = (
    {"__main__"},
    {"bench"},
    {"plan", "override"},
    {"trainer"},
    {"numerics"},
    {"models"},
    {"parallel"},
    {"replay"},
    {"layer"},
)
# Inside these folders the files have an order of their own.
INSIDE: dict[str, tuple[set[str], ...]] = {
    "layer": (
        {"moe"},
        {"router", "border", "load_balance", "experts", "dispatch.<backend>"},
        {"dispatch.<part>"},
        {"dispatch.ops", "dispatch.collectives", "dispatch.uniform"},
        {"dispatch", "dispatch.base", "dispatch.ownership"},
        {"kernels", "layout", "grouped_mm", "recomputation", "names"},
    ),
    "parallel": ({"parallelize"}, {"limits"}, {"sharding", "initialization"}, {"blocks"}),
    "trainer": (
        {"train", "convert"},
        {"config"},
        {"metrics"},
        {"checkpoint", "console", "data", "launch", "load_report"},
        {"device"},
    ),
}
NOT_BACKENDS = {"base", "ops", "collectives", "uniform", "ownership"}
# What the order alone would let through.
NEVER = {
    ("replay", "layer.moe"): "replay reaches layers through the router, by key",
    ("numerics", "layer.moe"): "numerics works on any nn.Module",
}
MAX_ENTRIES = 12
BANNED_NAMES = {"utils.py", "common.py", "helpers.py"}
MARKS = re.compile(
    r"\b(TO" r"DO|FIX" r"ME|XX" r"X|raise NotImplemented" r"Error)\b"
)  # split: not found in here
# Every place that silences a message, and how often: each was read, and what it says is true and known there.
SILENCERS = re.compile(
    r"filterwarnings\(|simplefilter\(|\.setLevel\(|logging\.disable\(logging\.[WI]|disable\(before"
)
SILENCED = {
    "titan_moe/bench/step.py": 1,  # progress of two trainers on every rank
    "titan_moe/trainer/config/__main__.py": 1,  # torchtitan's dataclasses warn of their own defaults
    "titan_moe/trainer/config/sections.py": 2,  # the same, and back again
    "titan_moe/trainer/device.py": 1,  # torch says that we replace its bf16 matmuls, which we do
    "titan_moe/trainer/metrics.py": 2,  # torchtitan's line per step, ours takes its place; and back again
    "titan_moe/trainer/convert.py": 1,  # torchtitan's dataclasses again
    "titan_moe/models/hugging_face/export.py": 1,  # "torch.distributed is disabled": one process, as meant
    "titan_moe/plan/__main__.py": 1,  # progress; warnings are shown
    "titan_moe/trainer/train.py": 1,  # torchdata 0.11 calls what torch deprecates
}
MAX_FILE, MAX_FUNCTION, MAX_FORWARD = 350, 60, 25

Sources = dict[str, str]  # path relative to the repository -> text


def package_sources() -> Sources:
    """Every Python file of the package."""
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted((ROOT / PACKAGE).rglob("*.py"))
    }


def module_name(path: str) -> str:
    """``titan_moe/layer/moe.py`` -> ``titan_moe.layer.moe``; a package is named by its folder."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported_modules(path: str, text: str, modules: set[str]) -> Iterator[tuple[str, int]]:
    """The package's modules that a file imports anywhere in it, with the line."""
    folder = path.rsplit("/", 1)[0].split("/")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(folder[: len(folder) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module or "") if part)
            if source.split(".")[0] == PACKAGE:
                for alias in node.names:
                    inner = f"{source}.{alias.name}"  # `from titan_moe import dispatch` imports a module
                    yield (inner if inner in modules else source), node.lineno


def place(module: str) -> tuple[str, str]:
    """The folder and the name under which FOLDERS and INSIDE list a module."""
    folder, *inner = module.split(".")[1:]
    if folder not in INSIDE or not inner:
        return folder, ""
    if inner[0] == "dispatch" and len(inner) > 1:
        if owner(module):
            return folder, "dispatch.<part>"
        return folder, f"dispatch.{inner[1]}" if inner[1] in NOT_BACKENDS else "dispatch.<backend>"
    return folder, inner[0]


def owner(module: str) -> str | None:
    """The backend that a module is a part of: the files beside ``dispatcher`` in a backend's own folder."""
    _, _, *inner = module.split(".")[1:]
    return inner[0] if len(inner) == 2 and inner[0] in DISPATCHERS and inner[1] != "dispatcher" else None


def depth(order: tuple[set[str], ...], name: str) -> int | None:
    """How far down; None for a name that the order does not know."""
    return next((number for number, names in enumerate(order) if name in names), None)


def import_problems(sources: Sources) -> list[str]:
    """Imports that point up, sideways, or where NEVER says."""
    problems = []
    modules = {module_name(path) for path in sources}
    for path, text in sources.items():
        module = module_name(path)
        for target, line in imported_modules(path, text, modules):
            where = f"{path}:{line}: {module} imports {target}"
            if target == PACKAGE:
                continue
            if module == PACKAGE:  # its imports are for type checkers: tests/test_init.py
                continue
            problems += [f"{where}: {reason}" for reason in [forbidden(module, target)] if reason]
    return problems


def forbidden(module: str, target: str) -> str | None:
    """Why ``module`` must not import ``target``; None when it may."""
    (folder, own), (other_folder, other) = place(module), place(target)
    if other == "train" and folder != "bench":
        return "nothing but a bench imports train"
    if (reason := NEVER.get((folder, f"{other_folder}.{other}"))) is not None:
        return reason
    if folder != other_folder:
        return _not_above(FOLDERS, folder, other_folder, "FOLDERS")
    if not own:
        return None  # a folder's __init__ stands above its files
    if own == other:
        one_backend = module.split(".")[3:4] == target.split(".")[3:4]
        return None if own != "dispatch.<backend>" or one_backend else "a backend never imports another"
    if other == "dispatch.<part>" and owner(target) != module.split(".")[3]:
        return f"a part of {owner(target)} is nobody else's"
    return _not_above(INSIDE[folder], own, other, f"INSIDE[{folder!r}]")


def _not_above(order: tuple[set[str], ...], own: str, other: str, name: str) -> str | None:
    if depth(order, own) is None or depth(order, other) is None:
        return (
            f"tests/test_layering.py: {name} has no place for {own if depth(order, own) is None else other}"
        )
    above = depth(order, own) < depth(order, other)  # type: ignore[operator]
    return None if above else f"imports point downwards, and {own} is not above {other}"


def circle_problems(sources: Sources) -> list[str]:
    """Modules that import each other, directly or over others; imports inside functions count."""
    modules = {module_name(path) for path in sources}
    uses = {
        module_name(path): {target for target, _ in imported_modules(path, text, modules)} & modules
        for path, text in sources.items()
    }
    done: set[str] = set()
    problems: list[str] = []

    def visit(module: str, way: tuple[str, ...]) -> None:
        if module in way:
            problems.append(" imports ".join((*way[way.index(module) :], module)))
        elif module not in done:
            for target in sorted(uses[module]):
                visit(target, (*way, module))
            done.add(module)

    for module in sorted(uses):
        visit(module, ())
    return problems


def moe_names_backend_problems(moe: str, backends: dict[str, str]) -> list[str]:
    """Names of backends (``{name: class}``) in moe.py, as a string or an identifier."""
    problems = []
    for node in ast.walk(ast.parse(moe)):
        found = ""
        if isinstance(node, ast.Constant) and node.value in backends:
            found = str(node.value)
        elif isinstance(node, ast.Name | ast.Attribute | ast.alias):
            name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", getattr(node, "name", ""))
            found = name if name in backends.values() else ""
        if found:
            problems.append(f"{PACKAGE}/layer/moe.py:{node.lineno}: names the backend {found!r}")
    return problems


def length(node: ast.AST, *, docstring: bool) -> int:
    """Lines of a function from ``def`` on, its docstring counted or not."""
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if not docstring and ast.get_docstring(node) is not None:
        lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
    return lines


def size_problems(sources: Sources) -> list[str]:
    """Files, functions and forwards over budget."""
    problems = []
    for path, text in sources.items():
        if (lines := text.count("\n")) > MAX_FILE:
            problems.append(f"{path}: {lines} lines, budget {MAX_FILE}: look for the missing piece")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                short = node.name == "forward"
                budget, lines = MAX_FORWARD if short else MAX_FUNCTION, length(node, docstring=not short)
                if lines > budget:
                    problems.append(f"{path}:{node.lineno}: {node.name} has {lines} lines, budget {budget}")
    return problems


def docstring_problems(sources: Sources) -> list[str]:
    """Modules, public classes and public functions without a docstring. Methods answer to their class."""
    problems = []
    for path, text in sources.items():
        tree = ast.parse(text)
        if ast.get_docstring(tree) is None:
            problems.append(f"{path}: no module docstring")
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if not node.name.startswith("_") and ast.get_docstring(node) is None:
                    problems.append(f"{path}:{node.lineno}: {node.name} has no docstring")
    return problems


def name_and_mark_problems(sources: Sources) -> list[str]:
    """Files whose name says nothing, and work that was left for later."""
    problems = [f"{path}: name it for what it holds" for path in sources if Path(path).name in BANNED_NAMES]
    for path, text in sources.items():
        for number, line in enumerate(text.splitlines(), start=1):
            problems += [f"{path}:{number}: {mark}" for mark in MARKS.findall(line)]
    return problems


def readme_tree(readme: str) -> set[str]:
    """The first level under ``titan_moe/`` in README's tree: ``{"moe.py", "dispatch/", ...}``."""
    entries: dict[int, set[str]] = {}
    lines = re.sub(r"[│├└─]", " ", readme).splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip().startswith(f"{PACKAGE}/")), len(lines))
    for line in lines[start + 1 :]:
        indent = len(line) - len(line.lstrip())
        if not line.strip() or indent <= len(lines[start]) - len(lines[start].lstrip()):
            break
        for word in line.split():  # "data.py device.py" may share a line; prose ends the names
            if not re.fullmatch(r"\w+(\.py|/)", word):
                break
            entries.setdefault(indent, set()).add(word)
    return entries[min(entries)] if entries else set()


def readme_problems(readme: str, real: set[str]) -> list[str]:
    """Where README's tree and the package's first level differ."""
    told = readme_tree(readme)
    missing = [f"README.md: its tree lacks {PACKAGE}/{name}" for name in sorted(real - told)]
    return missing + [f"README.md: there is no {PACKAGE}/{name}" for name in sorted(told - real)]


def registered_dispatchers(source: str) -> dict[str, str]:
    """``{"local": "LocalDispatcher", ...}``, read off the registry without importing torch."""
    for node in ast.walk(ast.parse(source)):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "DISPATCHERS" for target in targets):
            registry = ast.literal_eval(node.value)
            return {name: place.split(":")[1] for name, place in registry.items()}
    raise AssertionError("titan_moe/layer/dispatch/__init__.py has no DISPATCHERS = {...} of plain strings")


def dispatcher_docs_problems(docs: str, names: set[str]) -> list[str]:
    """Registered dispatchers that the docs do not name in backquotes."""
    return [f"docs: no word on the dispatcher `{name}`" for name in sorted(names) if f"`{name}`" not in docs]


@pytest.fixture(scope="module")
def sources() -> Sources:
    """The package as it is."""
    return package_sources()


@pytest.fixture(scope="module")
def backends(sources: Sources) -> dict[str, str]:
    """The registry as it is."""
    return registered_dispatchers(sources["titan_moe/layer/dispatch/__init__.py"])


CHECKS = [import_problems, circle_problems, size_problems, docstring_problems, name_and_mark_problems]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_package(check, sources):
    assert "\n".join(check(sources)) == ""


def test_moe_names_no_backend(sources, backends):
    assert moe_names_backend_problems(sources["titan_moe/layer/moe.py"], backends) == []


def silenced(sources: Sources) -> dict[str, int]:
    """How many places of each file silence warnings or log records."""
    counts = {path: len(SILENCERS.findall(text)) for path, text in sources.items()}
    return {path: count for path, count in counts.items() if count}


def test_no_message_is_silenced_that_was_not_looked_at():
    assert silenced(package_sources()) == SILENCED


def test_a_new_filter_is_noticed():
    assert silenced({"titan_moe/new.py": 'warnings.filterwarnings("ignore")'}) == {"titan_moe/new.py": 1}


def test_the_package_is_a_table_of_contents():
    entries = [path.name for path in (ROOT / PACKAGE).iterdir() if path.name != "__pycache__"]
    assert len(entries) <= MAX_ENTRIES, entries


def test_functions_fit_on_a_screen(sources):
    """Half of them in 8 lines, nine of ten in 22; ``size_problems`` holds the longest."""
    lengths = sorted(
        length(node, docstring=False)
        for text in sources.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert lengths[len(lengths) // 2] <= 8
    assert lengths[len(lengths) * 9 // 10] <= 22


def test_the_layer_stays_small(sources):
    """Without its kernels and the DeepEP library's transport."""
    apart = ("titan_moe/layer/kernels/", "titan_moe/layer/dispatch/deepep/library.py")
    own = {p: t for p, t in sources.items() if p.startswith("titan_moe/layer/") and not p.startswith(apart)}
    assert sum(text.count("\n") for text in own.values()) <= 2000


def test_readme_tree_is_the_real_tree():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README.md yet")
    hidden = {"__init__.py", "__pycache__/", "py.typed"}
    real = {path.name + "/" * path.is_dir() for path in (ROOT / PACKAGE).iterdir()} - hidden
    assert readme_problems(readme.read_text(encoding="utf-8"), real) == []


def test_docs_list_every_dispatcher(backends):
    pages = [
        page for name in ("add_a_dispatcher.md", "architecture.md") if (page := ROOT / "docs" / name).exists()
    ]
    if not pages:
        pytest.skip("neither docs/add_a_dispatcher.md nor docs/architecture.md yet")
    assert (
        dispatcher_docs_problems("".join(page.read_text(encoding="utf-8") for page in pages), set(backends))
        == []
    )


# ---------------------------------------------------------------------------------------------------
# Negative controls: a source that breaks one rule, and the words that the check must find for it.

DOC = '"""D."""\n'
BROKEN_IMPORTS = {
    "up": ("layer/router.py", "from titan_moe.layer.moe import MoE", "router is not above moe"),
    "up, as a module": ("layer/moe.py", "from titan_moe import parallel", "layer is not above parallel"),
    "up, relative": ("layer/moe.py", "from ..models import swap", "layer is not above models"),
    "up, plain import": (
        "parallel/limits.py",
        "import titan_moe.parallel.parallelize",
        "limits is not above",
    ),
    "up, inside a function": (
        "parallel/parallelize.py",
        "def f():\n    from titan_moe.trainer.config import load",
        "parallel is not above trainer",
    ),
    "up, from a command": ("models/__main__.py", "import titan_moe.trainer.config", "not above trainer"),
    "sideways": ("plan/table.py", "from titan_moe.override import moe", "plan is not above override"),
    "a part to another backend": (
        "layer/dispatch/all_to_all.py",
        "from titan_moe.layer.dispatch.deepep.c10d import x",
        "a part of deepep is nobody else's",
    ),
    "backend to backend": ("layer/dispatch/local.py", "from .all_to_all import X", "never imports another"),
    "base to backend": (
        "layer/dispatch/base.py",
        "from titan_moe.layer.dispatch import local",
        "not above dispatch.<backend>",
    ),
    "replay to moe": ("replay/selectors.py", "import titan_moe.layer.moe", "through the router"),
    "numerics to moe": ("numerics/capture.py", "from titan_moe.layer.moe import MoE", "any nn.Module"),
    "numerics' command to moe": ("numerics/__main__.py", "import titan_moe.layer.moe", "any nn.Module"),
    "to train": ("plan/table.py", "from titan_moe.trainer.train import main", "but a bench imports train"),
    "to a newcomer": ("trainer/train.py", "from titan_moe.newcomer import x", "no place for newcomer"),
    "from a newcomer": ("newcomer.py", "from titan_moe.layer.router import x", "no place for newcomer"),
    "to a newcomer inside": ("trainer/train.py", "import titan_moe.trainer.new", "no place for new"),
}


@pytest.mark.parametrize(("file", "source", "words"), BROKEN_IMPORTS.values(), ids=BROKEN_IMPORTS)
def test_a_forbidden_import_is_found(file, source, words):
    names = ["layer/moe", "parallel/__init__", "models/__init__", "layer/dispatch/all_to_all", "newcomer"]
    names += ["layer/dispatch/local", "numerics/__init__", "layer/dispatch/deepep/c10d", "trainer/new"]
    tree = {f"titan_moe/{name}.py": "" for name in names} | {f"titan_moe/{file}": source}
    (problem,) = import_problems(tree)
    assert words in problem


def test_the_allowed_imports_pass():
    tree = {
        "titan_moe/__init__.py": "from titan_moe.layer.moe import MoE",
        "titan_moe/trainer/device.py": "import torch",
        "titan_moe/trainer/train.py": "import titan_moe.trainer.config\nfrom titan_moe import __version__",
        "titan_moe/layer/moe.py": "from titan_moe.layer.dispatch.base import Routing\nfrom .router import R",
        "titan_moe/layer/dispatch/local.py": "from .base import D\nfrom titan_moe.layer.dispatch import ops",
        "titan_moe/layer/dispatch/ops.py": "",
        "titan_moe/replay/selectors.py": "from titan_moe.replay.ids import f",
        "titan_moe/layer/dispatch/deepep/dispatcher.py": "from titan_moe.layer.dispatch.deepep import c10d",
    }
    assert import_problems(tree) == []


def test_a_circle_is_found():
    tree = {
        "titan_moe/a.py": "from titan_moe import b",
        "titan_moe/b.py": "def f():\n    import titan_moe.c",
        "titan_moe/c.py": "from titan_moe.a import x",
    }
    assert circle_problems(tree) == [" imports ".join(f"titan_moe.{name}" for name in "abca")]


@pytest.mark.parametrize(
    "source",
    [
        "d = 'local'",
        "from titan_moe.layer.dispatch.local import LocalDispatcher as L",
        "x = m.LocalDispatcher",
    ],
)
def test_a_backend_named_in_moe_is_found(source):
    assert "names the backend" in moe_names_backend_problems(source, {"local": "LocalDispatcher"})[0]


BROKEN_FILES = {
    "long file": (size_problems, "a.py", DOC + "x = 1\n" * MAX_FILE, "budget 350"),
    "long function": (size_problems, "a.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION, "budget 60"),
    "long method": (
        size_problems,
        "a.py",
        "class A:\n def f(s):\n" + "  x = 1\n" * MAX_FUNCTION,
        "budget 60",
    ),
    "long forward": (
        size_problems,
        "a.py",
        "class A:\n def forward(s):\n" + "  x = 1\n" * MAX_FORWARD,
        "budget 25",
    ),
    "no module docstring": (docstring_problems, "a.py", "x = 1", "no module docstring"),
    "no class docstring": (docstring_problems, "a.py", DOC + "class A:\n    x = 1", "A has no docstring"),
    "no function docstring": (docstring_problems, "a.py", DOC + "def f():\n    pass", "f has no docstring"),
    "name": (name_and_mark_problems, "dispatch/utils.py", DOC, "name it for what it holds"),
    "mark": (name_and_mark_problems, "a.py", "# TO" + "DO: later", "TO" + "DO"),
    "stub": (name_and_mark_problems, "a.py", "raise NotImplemented" + "Error", "raise"),
}


@pytest.mark.parametrize(("check", "file", "source", "words"), BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_a_broken_file_is_found(check, file, source, words):
    (problem,) = check({f"titan_moe/{file}": source})
    assert words in problem


def test_a_forward_is_measured_without_its_docstring():
    source = 'class A:\n def forward(s):\n  """D.\n' + "\n" * 30 + '  """\n' + "  x = 1\n" * (MAX_FORWARD - 1)
    assert size_problems({"titan_moe/a.py": source}) == []


README = """
titan_moe/
  moe.py       the layer, see router.py
  dispatch/    one file each
    base.py    the contract
  data.py device.py
tests/
  other.py
"""


@pytest.mark.parametrize(
    ("real", "words"),
    [
        ({"moe.py", "dispatch/", "data.py", "device.py", "new.py"}, "lacks titan_moe/new.py"),
        ({"moe.py", "dispatch/", "data.py"}, "no titan_moe/device.py"),
    ],
)
def test_a_wrong_readme_tree_is_found(real, words):
    (problem,) = readme_problems(README, real)
    assert words in problem


def test_a_readme_without_a_tree_is_found():
    assert readme_problems("# titan_moe\n", {"moe.py"}) == ["README.md: its tree lacks titan_moe/moe.py"]


def test_readme_tree_with_drawn_branches():
    drawn = "titan_moe/\n├── moe.py     x\n├── dispatch/  y\n│   └── base.py\n└── data.py\ntests/\n"
    assert readme_tree(drawn) == {"moe.py", "dispatch/", "data.py"}


def test_an_undocumented_dispatcher_is_found():
    assert dispatcher_docs_problems("`local` sorts.", {"local", "deepep"}) == [
        "docs: no word on the dispatcher `deepep`"
    ]
