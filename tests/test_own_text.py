"""One's own text, from a file to a model: the choice of a tokenizer, and commands that work as they are printed."""

import shlex
from pathlib import Path

import pytest
from conftest import TINY_RUN, make_text
from test_pairs import ROWS, write_multi30k, write_tsv

import prepare_data
import train

SMALL = [
    *("--n_layer=2", "--n_head=2", "--n_embd=32", "--device=cpu", "--dtype=float32"),
    *("--batch_size=4", "--max_iters=1", "--eval_iters=1", "--n_hidden=None"),
]
ADVISED = {
    "char": ["--input=own.txt"],
    "byte": ["--input=own.txt"],
    "bpe": ["--input=own.txt", "--vocab_size=320"],
    "sentencepiece": ["--input=pairs.tsv", "--vocab_size=320"],
    "char of pairs": ["--input=pairs.tsv", "--max_pair_tokens=200"],
    "char of a data set with a config": ["translate_de_en"],
    "out/run": ["--input=own.txt"],
    "out/run/ckpt.pt": ["--input=own.txt"],
}


@pytest.mark.parametrize("case", ADVISED)
def test_the_command_that_is_printed_after_preparing_trains(folder, capsys, case):
    Path("own.txt").write_text(make_text())
    rows = [(4 * f"{source} ", 4 * f"{target} ") for source, target in ROWS]
    write_tsv("pairs.tsv", rows)
    write_multi30k({"train": rows[:40], "val": rows[40:50], "test": rows[50:]})
    if case.startswith("out/run"):
        prepare_data.main(["--input=own.txt", "--name=tiny", "--tokenizer=byte"])
        assert train.main(TINY_RUN) == 0
    tokenizer = case.partition(" ")[0]
    named = [] if "translate_de_en" in ADVISED[case] else ["--name=my own"]
    prepare_data.main([*ADVISED[case], f"--tokenizer={tokenizer}", *named])
    advice = capsys.readouterr().out.rpartition("train on it: ")[2].strip()
    python, script, *arguments = shlex.split(advice)
    assert (python, script) == ("python", "train.py")
    assert train.main([*arguments, *SMALL]) == 0
    assert (f"--init_from={tokenizer}" in arguments) == case.startswith("out/run")
