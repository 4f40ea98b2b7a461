"""The packages of humptygpt/: what runs before torch is needed does not import it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TORCHLESS = [
    "config files machine token_files tokenizers",
    "prepare.download prepare.documents prepare.corpus prepare.encoding prepare.sources",
    "convert.pretrained convert.sentencepiece_model convert.read_huggingface convert.write_huggingface",
    "translation.pairs",
]
TORCHLESS = ["prepare_data", *(f"humptygpt.{name}" for name in " ".join(TORCHLESS).split())]


@pytest.mark.parametrize("module", TORCHLESS)
def test_what_runs_before_torch_is_needed_does_not_import_it(module):
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
