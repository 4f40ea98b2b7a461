"""The layout of the house: what a stranger finds in the root, and functions that fit on a screen."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = [*ROOT.glob("*.py"), *ROOT.glob("humptygpt/*.py")]
FUNCTIONS = [
    (path, node)
    for path in MODULES
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.FunctionDef)
]


def test_the_root_has_at_most_ten_scripts_and_the_package_no_packages():
    assert len(list(ROOT.glob("*.py"))) <= 10
    assert not [path for path in (ROOT / "humptygpt").iterdir() if path.is_dir() and path.name != "__pycache__"]


def test_no_function_is_longer_than_60_lines_or_main_than_40():
    lengths = {f"{path.name}: {node.name}": node.end_lineno - node.lineno + 1 for path, node in FUNCTIONS}
    assert {name: lines for name, lines in lengths.items() if lines > (40 if name.endswith(": main") else 60)} == {}


def test_no_function_takes_more_than_five_positional_parameters():
    found = {f"{path.name}: {node.name}": [arg.arg for arg in node.args.args] for path, node in FUNCTIONS}
    assert {name: args for name, args in found.items() if len([a for a in args if a not in ("self", "cls")]) > 5} == {}


TORCHLESS = "configurator files schema tokenizer documents corpus pairs token_files known_texts dictionary"
TORCHLESS += " download limits locks parts run_folder tokenizer_files hub"


@pytest.mark.parametrize("module", TORCHLESS.split(" "))
def test_what_runs_before_torch_is_needed_does_not_import_it(module):
    code = f"import sys, humptygpt.{module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
