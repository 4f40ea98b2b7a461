"""What differs on Windows and macOS. These tests run on Linux, with the answers of the other systems faked."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import compare
import sample
from humptygpt import files, machine, model
from humptygpt.generation import generator as generation
from humptygpt.models import attention

# a locale in which Python, like on Windows, writes few characters to a pipe
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def python(code: str, text: str = "", **environment: str) -> str:
    """Run code in the folder of the scripts, between pipes. Returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=text.encode(),
        stdout=subprocess.PIPE,
        env=os.environ | environment,
        cwd=ROOT,
        check=True,
    )
    return done.stdout.decode()


# --------------------------------------------------------------------------------------
# Streams and signals


def test_a_pipe_has_utf_8_whatever_the_encoding_of_the_system_is():
    code = (
        "import sys; from humptygpt import machine; machine.use_utf8(); x = input(); print(len(x), x, sys.stdin.errors)"
    )
    marked = "\ufeff± → 你好\n"  # by a byte order mark, as from PowerShell
    assert python(code, marked, **ASCII) == "6 ± → 你好 surrogateescape\n"


def test_a_program_without_a_console_has_no_streams_to_change(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    errors = io.TextIOWrapper(io.BytesIO(), "cp1252", errors="backslashreplace")
    monkeypatch.setattr(sys, "stderr", errors)
    machine.use_utf8()
    assert (sys.stdout.encoding, sys.stdout.errors) == ("utf-8", "strict")
    assert (errors.encoding, errors.errors) == ("utf-8", "backslashreplace")


def test_output_that_is_discarded_may_have_any_character():
    code = "from humptygpt import machine; machine.discard_output(); print(chr(8594))"
    assert python(code, **ASCII) == ""


def test_ctrl_break_stops_a_run_on_windows():
    code = """
import os, signal
signal.SIGBREAK = signal.SIGUSR1
from humptygpt.training.run import catch_signals
with catch_signals() as caught:
    os.kill(os.getpid(), signal.SIGBREAK)
print(len(caught))
"""
    assert python(code) == "1\n"


@pytest.mark.parametrize("windows", [True, False])
def test_the_key_that_ends_the_input_is_the_one_of_the_system(monkeypatch, capsys, windows):
    monkeypatch.setattr(machine, "ON_WINDOWS", windows)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert [*sample.typed_lines()] == []
    assert capsys.readouterr().err == f"Ctrl-{'Z' if windows else 'D'} quits\n"


# --------------------------------------------------------------------------------------
# Files


def test_a_pattern_that_no_shell_has_replaced_stands_for_the_runs_that_it_matches(capsys, monkeypatch):
    for name in ("out/b", "out/a", "out/c[1]"):
        Path(name).mkdir(parents=True)
    assert machine.expand(["out/*"]) == ["out/a", "out/b", "out/c[1]"]
    assert machine.expand(["out/c[1]", "out/b", "none*"]) == ["out/c[1]", "out/b", "none*"]
    with pytest.raises(compare.UserError, match="no runs"):
        compare.read_runs(("out/*",))
    skipped = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert skipped == [f"note: skipped out/{name}" for name in ("a", "b", "c[1]")]


@pytest.fixture
def refusals(monkeypatch):
    """Let Windows refuse to move a file so often. Returns the errors that are left, and the waits between."""
    left, waits, move = [], [], Path.replace

    def replace(path: Path, to: Path) -> None:
        if left:
            raise left.pop()
        move(path, to)

    monkeypatch.setattr(files.Path, "replace", replace)
    monkeypatch.setattr(files.time, "sleep", waits.append)
    return left, waits


def in_use() -> PermissionError:
    error = PermissionError(errno.EACCES, "used by another process")
    error.winerror = 32
    return error


def test_a_file_that_another_program_reads_is_replaced_when_it_is_closed(refusals):
    left, waits = refusals
    left += [in_use(), in_use()]
    Path("best.pt").write_text("old")
    files.write_text(Path("best.pt"), "new")
    assert Path("best.pt").read_text() == "new" and len(waits) == 2


def test_a_file_that_stays_open_is_reported_in_a_line_after_ten_seconds(refusals):
    left, waits = refusals
    left += [in_use() for _ in range(200)]
    with pytest.raises(files.UserError, match="used by another process"):
        files.write_text(Path("best.pt"), "new")
    assert 9 < sum(waits) < 11 and not [*Path().iterdir()]


def test_a_file_that_may_not_be_written_is_reported_at_once(refusals):
    left, waits = refusals
    left += [PermissionError(errno.EACCES, "Permission denied")]
    with pytest.raises(files.UserError, match="Permission denied"):
        files.write_text(Path("best.pt"), "new")
    assert not waits


# --------------------------------------------------------------------------------------
# Apple's GPU and processors


@pytest.mark.parametrize(("dtype", "used"), [(torch.bfloat16, "formula"), (torch.float32, "kernel")])
def test_in_half_precision_apples_gpu_computes_the_formula(monkeypatch, dtype, used):
    monkeypatch.setattr(model, "attend", lambda *args: "formula")
    monkeypatch.setattr(attention, "fused_attend", lambda *args: "kernel")
    x = SimpleNamespace(is_cpu=False, is_mps=True, shape=(1, 1, 70, 8), dtype=dtype)
    assert attention.faster_attend(x, x, x, None) == used


def test_int8_has_an_engine_on_processors_for_which_torch_chooses_none(monkeypatch):
    layer, x = torch.nn.Linear(64, 32), torch.randn(2, 64)
    expected = layer(x).detach()
    own = torch.backends.quantized.engine
    fake = SimpleNamespace(engine="none")
    monkeypatch.setattr(torch.backends, "quantized", fake)
    generation.int8_product(layer)
    assert fake.engine == "qnnpack"
    monkeypatch.undo()
    if "qnnpack" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "qnnpack"
        found = generation.int8_product(layer)(x)
        torch.backends.quantized.engine = own
        assert torch.allclose(found, expected, atol=0.1)
