"""The rooms of the package: imports lead down only, so that each can be read without those above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "core": "",
    "nn": "core",
    "tokenizer": "core",
    "model": "core nn",
    "data": "core tokenizer",
    "checkpoint": "core nn tokenizer model",
    "generation": "core nn tokenizer model data",
    "interchange": "core nn tokenizer model data checkpoint",
    "parallel": "core nn model data checkpoint",
    "training": "core nn tokenizer model data checkpoint generation interchange parallel",
    "page": "core nn tokenizer model data checkpoint generation interchange",
}
FILES = [ROOT / "model.py", *sorted(ROOT.glob("humptygpt/*/*.py"))]
TORCHLESS = [
    "core.settings core.files core.limits core.download",
    "tokenizer.tokenizers tokenizer.pretrained",
    "tokenizer.sentencepiece_model tokenizer.read_huggingface tokenizer.write_huggingface",
    "data.documents data.corpus data.encoding data.pairs data.token_files data.sources",
]
TORCHLESS = ["prepare_data", *(f"humptygpt.{name}" for name in " ".join(TORCHLESS).split())]


def room_of(module: str) -> str:
    """Name the room of a module, "model", a script, or "" for what is not ours."""
    names = module.split(".")
    if names[0] == "humptygpt":
        return names[1] if len(names) > 1 else "humptygpt"
    return names[0] if (ROOT / f"{names[0]}.py").exists() else ""


def imported_modules(path: Path) -> set[str]:
    """All that a file imports, also within its functions."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    return modules


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_room_imports_only_what_is_below_it(path):
    room = "model" if path.name == "model.py" else path.parent.name
    imported = {room_of(module) for module in imported_modules(path)}
    above = imported - {"", room, *MAY_IMPORT[room].split()}
    assert above == set()


@pytest.mark.parametrize("room", sorted(MAY_IMPORT.keys() - {"model"}))
def test_a_room_has_at_most_eight_files_and_says_what_it_is_for(room):
    files = list((ROOT / "humptygpt" / room).glob("*.py"))
    assert len(files) <= 9  # with __init__.py
    assert ast.get_docstring(
        ast.parse((ROOT / "humptygpt" / room / "__init__.py").read_text())
    )


@pytest.mark.parametrize("module", TORCHLESS)
def test_what_runs_before_torch_is_needed_does_not_import_it(module):
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
