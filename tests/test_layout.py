"""The layout of the code: allowed imports, and the files that run without torch.

The core is model.py and the files of humptygpt/ itself; a slice is a folder in humptygpt/; the other files in the root
are scripts. Imports inside functions count as well, but those for annotations only (TYPE_CHECKING) do not.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATHS = [*ROOT.glob("*.py"), *ROOT.glob("humptygpt/**/*.py")]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PATHS
}
# Slices that a file of the core imports, always inside a function, with the reasons. tasks.py also names objects of
# slices in its tables MODELS and TASKS.
FROM_CORE = {
    ("data", "prepare"): "a folder that nanoGPT prepared has no meta.json",
    ("loading", "convert"): "a source may be a model of another project",
    ("loading", "fast"): "a model is made ready to generate",
    ("loading", "finetune"): "a checkpoint may have LoRA",
    ("ranks", "parallel"): "a run may have several processes",
    ("run", "finetune"): "best.pt has LoRA merged",
    ("setup", "finetune"): "a run may start from a model",
    ("setup", "prepare"): "a run prepares its data if they are missing",
    ("tasks", "fast"): "attention has a faster kernel",
    ("tasks", "finetune"): "a model may have LoRA",
    ("tasks", "minutes"): "a model may be an ensemble",
    ("tokenizers", "chat"): "a tokenizer may have marks of turns",
    ("tokenizers", "convert"): "a tokenizer may come from another project",
}
# Imports of one slice by another, with their reasons.
BETWEEN_SLICES = {
    ("chat", "prepare"): "conversations are read and split like other documents",
    ("convert", "chat"): "an exported model carries how conversations are written",
    ("convert", "prepare"): "nanoGPT's checkpoints name its data folders",
    ("minutes", "convert"): "a plan says if its model can be exported",
    ("page", "convert"): "the page tokenizes as SentencePiece does",
    ("page", "prepare"): "the page trains models on texts of built-in data sets",
    ("prepare", "chat"): "conversations are one kind of data",
    ("prepare", "convert"): "a tokenizer may come from a model of any format",
    ("prepare", "translation"): "sentence pairs are one kind of data",
    ("scoring", "prepare"): "BLiMP is downloaded like a data set",
    ("translation", "prepare"): "files of pairs are read like other documents",
}
# prepare_data.py imports the tokenizers, the token files, and most of humptygpt/prepare.
TORCHLESS = [
    "explain",
    "export",
    "prepare_data",
    "humptygpt.convert.pretrained",
    "humptygpt.convert.read_huggingface",
    "humptygpt.convert.write_huggingface",
]


def nodes(tree: ast.AST, functions: bool) -> Iterator[ast.AST]:
    """The statements that are run, with or without those in functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if functions or not isinstance(node, ast.FunctionDef):
            yield node
            yield from nodes(node, functions)


def imported(module: str, functions: bool = True) -> set[str]:
    """The modules that a file imports. functions=False: without imports inside functions."""
    names = set()
    for node in nodes(ast.parse(FILES[module].read_text(encoding="utf-8")), functions):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= full & FILES.keys() or {node.module}
    return names


@pytest.fixture(scope="module")
def imports() -> set[tuple[str, str]]:
    """(file, file that it imports)"""
    return {(name, other) for name in FILES for other in imported(name) & FILES.keys()}


def place(module: str) -> str:
    """The slice of a file, "core" or "script"."""
    *folders, _ = FILES[module].relative_to(ROOT).parts
    if module == "model" or folders == ["humptygpt"]:
        return "core"
    return folders[1] if folders else "script"


def leaves_core(module: str, other: str) -> bool:
    return place(module) == "core" and place(other) != "core"


def test_the_core_imports_only_the_slices_of_the_table(imports):
    from_core = {(a.rpartition(".")[2], place(b)) for a, b in imports if leaves_core(a, b)}
    assert from_core == FROM_CORE.keys()


def test_the_core_imports_slices_inside_functions_only():
    at_once = {
        (name, other)
        for name in FILES
        for other in imported(name, functions=False) & FILES.keys()
        if leaves_core(name, other)
    }
    assert not at_once


def test_a_slice_imports_no_script_and_only_the_slices_of_the_table(imports):
    pairs = {(place(a), place(b)) for a, b in imports}
    between = {
        (a, b) for a, b in pairs if a not in ("core", "script") and b not in (a, "core")
    }
    assert between == BETWEEN_SLICES.keys()


def test_no_script_imports_another(imports):
    assert not {(a, b) for a, b in imports if place(a) == place(b) == "script"}


def test_model_py_imports_torch_and_the_standard_library_only():
    packages = {name.partition(".")[0] for name in imported("model")}
    assert packages <= {"torch", *sys.stdlib_module_names}


def test_no_files_import_each_other_in_a_circle(imports):
    graph = TopologicalSorter()
    for module, other in imports:
        if not leaves_core(module, other):
            graph.add(module, other)
    graph.prepare()  # raises a CycleError that names the circle


@pytest.mark.parametrize("module", TORCHLESS)
def test_what_runs_before_torch_is_needed_does_not_import_it(module):
    code = f"import sys, {module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
