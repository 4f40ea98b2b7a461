"""The floors of the house, and what runs without torch.

A file imports from its own folder or from a lower floor only. Imports inside functions and names of modules that are
written as text count as well; those for annotations only (TYPE_CHECKING) do not.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# from the bottom; folders of one floor do not import each other. "" stands for the files of humptygpt/ itself.
FLOORS = [
    ["model"],
    [""],
    ["tokenizers", "models"],
    ["data"],
    ["formats"],
    ["generation"],
    ["training"],
    ["scoring", "page", "server"],
    ["scripts"],  # what one runs: the root's other files, and the built-in data sets
]
PLACES = {place: floor for floor, places in enumerate(FLOORS) for place in places}
TEXT = re.compile(r"humptygpt(\.\w+)+(?=:\w+$|$)")  # a module's name in a string


def module_name(path: Path) -> str:
    """humptygpt.model for model.py, humptygpt.train for train.py, data.wills for data/wills.py"""
    *folders, name = path.with_suffix("").parts
    return ".".join([*(folders or ["humptygpt"]), name]).removesuffix(".__init__")


def read_files(root: Path) -> dict[str, ast.Module]:
    """Parse model.py, the scripts, the library and the built-in data sets, {module: its tree}."""
    paths = [*root.glob("*.py"), *root.glob("data/*.py"), *root.glob("humptygpt/**/*.py")]
    return {module_name(path.relative_to(root)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def place(module: str) -> str:
    """The folder in humptygpt/ that a file is in, "", "model" or "scripts"."""
    top, *names = module.split(".")
    if module == "humptygpt.model":
        return "model"
    # humptygpt/__init__.py imports sample.py when it is asked to
    if top != "humptygpt" or not names or (ROOT / f"{names[0]}.py").exists():
        return "scripts"
    return names[0] if len(names) > 1 or (ROOT / top / names[0]).is_dir() else ""


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from nodes(node)


def imported(tree: ast.Module, modules: set[str]) -> set[str]:
    """Those of the modules that a file imports or names."""
    names = set()
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"from {'.' * node.level}{node.module} is relative"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= full & modules or {node.module}
        elif match := TEXT.match(str(getattr(node, "value", ""))):
            names.add(match[0])
    return names & modules


def find_problems(files: dict[str, ast.Module]) -> list[str]:
    """Imports of higher floors and of another folder of the same floor, and circles."""
    imports = {name: imported(tree, {*files}) - {name} for name, tree in files.items()}
    problems = []
    for name, others in imports.items():
        here = place(name)
        for other in others:
            there = place(other)
            lower = PLACES[there] < PLACES[here]
            if not lower and (there != here or here == "scripts") and name != "humptygpt":
                problems.append(f"{name} imports {other}")
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        problems.append(f"circle: {' -> '.join(error.args[1])}")
    return problems


def test_a_file_imports_only_from_its_own_folder_or_a_lower_floor_and_none_in_a_circle():
    assert not find_problems(read_files(ROOT))


@pytest.mark.parametrize(
    ("file", "line", "problem"),
    [
        ("formats/load.py", "from humptygpt.training import run", "imports humptygpt.training.run"),
        ("data/open.py", "def f(): import humptygpt.formats.load", "imports humptygpt.formats.load"),
        ("models/build.py", 'X = "humptygpt.training.step:train_step"', "imports humptygpt.training.step"),
        ("files.py", "from humptygpt.sources import fetch\nimport humptygpt.download", "circle"),
        ("page/html.py", "from humptygpt.server.api import Api", "imports humptygpt.server.api"),
    ],
)  # fmt: skip
def test_the_rule_notices_an_import(file, line, problem):
    files = read_files(ROOT)
    name = module_name(Path("humptygpt", file))
    files[name].body += ast.parse(line).body
    assert any(problem in found for found in find_problems(files))


def test_our_files_import_model_py_as_humptygpt_model():
    """A mixture with `import model` would have two classes of each name."""
    files = read_files(ROOT) | {
        str(path): ast.parse(path.read_text(encoding="utf-8"))
        for folder in ("tests", "benchmarks")
        for path in (ROOT / folder).glob("*.py")
    }
    assert not [name for name, tree in files.items() if imported(tree, {"model"})]


def test_model_py_imports_torch_and_the_standard_library_only():
    tree = read_files(ROOT)["humptygpt.model"]
    names = {alias.name for node in nodes(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= {"torch", *sys.stdlib_module_names}


# prepare_data.py imports the tokenizers and most of humptygpt/data.
@pytest.mark.parametrize(
    "module",
    ["explain", "export", "prepare_data", "humptygpt.formats.tokenizer_json", "humptygpt.tokenizers.huggingface"],
)  # fmt: skip
def test_what_runs_before_torch_is_needed_does_not_import_it(module):
    code = f"import sys, {module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
