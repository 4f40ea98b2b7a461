"""One's own text, from a file to a model: the choice of a tokenizer, and commands that work as they are printed."""

import json
import shlex
from pathlib import Path

import pytest
from conftest import TINY_RUN, with_constants
from prepared import meta, prepare, texts_of, tokenizer_of, write_own
from test_documents import write
from test_pairs import ROWS, write_multi30k, write_tsv
from texts import make_text

import train
from humptygpt.data import prepare as dataset
from humptygpt.data import vocabulary
from humptygpt.data.open import prepare_missing
from humptygpt.formats.tokenizer_json import tokenizer_files
from humptygpt.tokenizers.saved import from_state
from humptygpt.training import translation as task
from humptygpt.training.settings import TrainConfig
from humptygpt.training.start import data_name

SMALL = [
    *("--n_layer=2", "--n_head=2", "--n_embd=32", "--device=cpu", "--dtype=float32"),
    *("--batch_size=4", "--max_iters=1", "--eval_iters=1"),
]
ADVISED = {
    "char": "--input=own.txt --tokenizer=char '--name=my own'",
    "subwords": "--input=own.txt --vocab_size=320 --name=own",
    "pairs": "--input=pairs.tsv --vocab_size=320 --val_fraction=0.1 --name=own",
    "long pairs": "--input=pairs.tsv --tokenizer=char --max_pair_tokens=200 --val_fraction=0.1 --name=own",
    "long pairs of a data set with a config": "translate_de_en --tokenizer=char",
    "tokens of a run": "--input=own.txt --tokenizer=out/run --name=own",
    "tokens of a checkpoint": "--input=own.txt --tokenizer=out/run/ckpt.pt --name=own",
    "a tokenizer without its model": "--input=own.txt --tokenizer=theirs --name=own",
}


@pytest.mark.parametrize("case", ADVISED)
def test_the_command_that_is_printed_after_preparing_trains(folder, capsys, monkeypatch, case):
    monkeypatch.setattr(task, "translate_examples", lambda *args: "")
    monkeypatch.setattr(task, "score_translations", lambda *args: ("", {}))
    write_own(make_text())
    rows = [(4 * f"{source} ", 4 * f"{target} ") for source, target in ROWS]
    write_tsv("pairs.tsv", rows)
    write_multi30k({"train": rows[:40], "val": rows[40:50], "test": rows[50:]})
    if case == "a tokenizer without its model":
        prepare("--input=own.txt --name=tiny --vocab_size=300")
        theirs = tokenizer_files(from_state(meta("tiny")["tokenizer"]), block_size=64)
        Path("theirs").mkdir()
        Path("theirs/tokenizer.json").write_text(theirs["tokenizer.json"])
    if "tokens of" in case:
        prepare("--input=own.txt --name=tiny --tokenizer=byte")
        assert train.main(TINY_RUN) == 0
    prepare(ADVISED[case])
    advice = capsys.readouterr().out.rpartition("train on it: ")[2].strip()
    python, script, *arguments = shlex.split(advice)
    assert (python, script) == ("python", "train.py")
    assert train.main([*arguments, *SMALL]) == 0
    assert ("--init_from=out/run" in advice) == ("tokens of" in case)


# --------------------------------------------------------------------------------------
# tokenizer=auto


@pytest.fixture
def small_table(monkeypatch):
    monkeypatch.setattr(vocabulary, "AUTO", ((3000, 300), (6000, 320)))


ASCII = make_text(2000)
OTHERS = "".join(map(chr, range(0x4E00, 0x4E00 + 256 - len(set(ASCII)))))
FITTING = {
    "char": make_text(2999),
    "char of 256": ASCII + OTHERS,
    "byte": ASCII + OTHERS + "ä",
    "bpe of 300": make_text(3000),
    "bpe of 320": make_text(6000),
}


@pytest.mark.parametrize("name", ["own.txt.gz", "own.jsonl"])
@pytest.mark.parametrize("case", FITTING)
def test_the_size_of_the_text_and_not_of_its_file_decides_what_a_token_is(small_table, capsys, case, name):
    text = FITTING[case]
    write(name, [text[:1000], text[1000:]] if name == "own.jsonl" else [text])
    prepare(f"mine --input={name}")
    kind, _, vocab_size = case.partition(" of ")
    assert tokenizer_of("mine") == kind
    if kind == "bpe":
        assert meta("mine")["vocab_size"] == int(vocab_size)
    chosen = f"tokenizer={kind} is chosen for {len(text.encode()):,} bytes of text"
    assert chosen in capsys.readouterr().out


def test_a_vocab_size_without_a_tokenizer_is_for_byte_pair_encoding(folder, capsys):
    write_own(make_text())
    prepare("mine --input=own.txt --vocab_size=310")
    assert tokenizer_of("mine") == "bpe"
    assert meta("mine")["vocab_size"] == 310
    assert "is chosen for" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["wills", "mine --input=pairs.tsv --vocab_size=330"])
def test_pairs_and_data_sets_with_a_tokenizer_of_their_own_keep_it(folder, name, monkeypatch):
    with_constants(monkeypatch, "wills", WILLS=1000)
    write_tsv("pairs.tsv", ROWS)
    prepare(f"{name} --tokenizer=auto")
    assert tokenizer_of(name.split()[0]) == "sentencepiece"


# --------------------------------------------------------------------------------------
# train.py --input


TRAIN = [argument for argument in TINY_RUN if not argument.startswith("--dataset=")]


def files_of(name: str) -> dict[str, tuple[bytes, int]]:
    """Content and time of each file in the folder of a data set."""
    files = (path for path in Path("data", name).iterdir() if path.is_file())
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def trained_on() -> str:
    """The data set of the last run."""
    return json.loads(Path("out/run/config.json").read_text())["dataset"]


NAMES = {
    "my text.txt.gz": "my_text",
    "Grüße-1.md": "Grüße-1",
    "corpus/": "corpus",
    "corpus/**/*.jsonl.gz": "corpus",
    "corpus/../a.b/.x": "a",
    "/": "text",
}


@pytest.mark.parametrize("where", NAMES)
def test_data_is_named_after_its_file_or_folder(where):
    assert data_name(where) == NAMES[where]


def test_one_command_prepares_a_text_and_trains_on_it(folder, capsys):
    Path("my text.txt").write_text(make_text())
    assert train.main(["--input=my text.txt", *TRAIN]) == 0
    assert trained_on() == "my_text" and meta("my_text")["source"] == "my text.txt"
    before = files_of("my_text")
    capsys.readouterr()
    assert train.main([f"--input={folder}/my text.txt", *TRAIN]) == 0
    assert "it is left unchanged" in capsys.readouterr().err
    assert files_of("my_text") == before
    Path("my text.txt").unlink()
    resume = ["--init_from=resume", "--out_dir=out/run", "--max_iters=8"]
    assert train.main(resume) == 0 and train.main(resume) == 0
    assert trained_on() == "my_text"


def test_the_data_of_an_input_keeps_the_settings_that_it_was_prepared_with(folder, fails):
    write_own(make_text())
    prepare("own --input=own.txt --tokenizer=byte")
    before = files_of("own")
    assert train.main(["--input=own.txt", *TRAIN]) == 0
    assert files_of("own") == before
    write_own(make_text(5000))
    argv = [key for key in TRAIN if key != "--overwrite=True"] + ["--out_dir=out/b"]
    way = "python prepare_data.py own --input=own.txt --tokenizer=byte --overwrite=True"
    assert fails(train.main, "--input=own.txt", *argv) == (
        f"data/own already holds data from other files or settings; choose another name, or replace it: {way}\n"
    )
    assert train.main(["--input=own.txt", *TRAIN]) == 0  # overwrites the data, too
    assert tokenizer_of("own") == "byte"
    assert "".join(texts_of("own")) == make_text(5000)


def test_data_of_another_input_is_refused_and_another_name_taken(folder, fails):
    for name in "ab":
        Path(name).mkdir()
        Path(name, "own.txt").write_text(name + make_text())
    assert train.main(["--input=a/own.txt", *TRAIN]) == 0
    before = files_of("own")
    advice = "choose another name: --dataset=ANOTHER_NAME"
    assert fails(train.main, "--input=b/own.txt", *TRAIN) == (f"data/own was not made from input=b/own.txt; {advice}\n")
    assert files_of("own") == before
    assert train.main(["--input=b/own.txt", "--dataset=other", *TRAIN]) == 0
    assert trained_on() == "other" and "".join(texts_of("other"))[0] == "b"


def test_beside_a_config_file_the_input_names_the_data_and_a_model_its_tokens(folder, monkeypatch):
    Path("config.py").write_text("dataset = 'shakespeare_char'\n")
    write_own(make_text())
    assert train.main(["config.py", "--input=own.txt", *TRAIN]) == 0
    assert trained_on() == "own"
    prepare("tiny --input=own.txt --tokenizer=byte")
    assert train.main(TINY_RUN) == 0
    Path("more.txt").write_text(make_text(seed=1))
    tune = ["--init_from=~/out/run", "--input=more.txt", *TRAIN, "--out_dir=out/tuned"]
    monkeypatch.setenv("HOME", str(folder))
    assert train.main(tune) == 0
    assert tokenizer_of("more") == "byte"


def test_train_hands_on_the_key_that_a_complaint_about_its_input_names(folder, fails):
    lines = [{"body": make_text(2000)}, {"text": 5}, {"body": make_text(2000, 1)}]
    Path("own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = ["--input=own.jsonl", *TRAIN]
    assert "text_key" in fails(train.main, *argv)
    assert train.main([*argv, "--text_key=body"]) == 0
    assert meta("own")["documents"] == 2
    assert train.main(argv) == 0  # the data keeps its key
    other = [key for key in argv if key != "--overwrite=True"] + ["--text_key=text"]
    assert "data/own already holds data from other files or settings" in fails(train.main, *other, "--out_dir=out/b")


def test_a_run_takes_a_validation_text_of_ones_own_and_keeps_it(folder, fails):
    write_own(make_text())
    Path("val.txt").write_text(make_text(500, seed=1))
    argv = ["--input=own.txt", *TRAIN]
    assert train.main([*argv, "--val_input=val.txt"]) == 0
    assert texts_of("own") == (make_text(), make_text(500, seed=1))
    assert train.main(argv) == 0  # the data keeps it
    assert "val_input=val.txt has no effect with input=None" in fails(
        train.main, *TRAIN, "--dataset=own", "--val_input=val.txt"
    )


def test_data_that_was_prepared_with_a_setting_that_is_gone_is_refused_by_its_name(folder, fails):
    write_own(make_text())
    prepare("own --input=own.txt")
    command = Path("data/own/command.txt")
    command.write_text(f"{command.read_text().strip()} --encoding_errors=replace\n")
    assert fails(train.main, "--input=own.txt", *TRAIN) == (
        "data/own/command.txt: unknown key encoding_errors; --help lists all keys\n"
    )
    assert train.main(["--dataset=own", *TRAIN]) == 0


def test_a_data_set_whose_name_is_too_long_is_refused_in_one_line(tiny, fails):
    argv = [*TRAIN, f"--dataset={300 * 'n'}"]
    assert "File name too long" in fails(train.main, *argv)


def test_a_run_that_resumes_takes_no_input(fails):
    argv = ["--input=tiny.txt", "--init_from=resume", "--out_dir=out/run"]
    assert "input=tiny.txt is only for a new run" in fails(train.main, *argv)


def test_a_command_with_an_input_begins_and_resumes_with_auto(folder, capsys):
    Path("own.jsonl").write_text(json.dumps({"body": make_text()}))
    argv = ["--input=own.jsonl", "--text_key=body", *TRAIN, "--init_from=auto"]
    for steps in (2, 4, 6):
        assert train.main([*argv, f"--max_iters={steps}"]) == 0
    assert "; 4 are done" in capsys.readouterr().out


def test_only_the_first_of_several_processes_prepares_the_input(folder, monkeypatch):
    write_own(make_text())
    config = TrainConfig(dataset="own", input="own.txt")
    monkeypatch.setenv("RANK", "1")
    prepare_missing(config, None)  # the only process with this disk
    monkeypatch.setattr(dataset, "prepare", None)
    prepare_missing(config, None)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(TypeError):
        prepare_missing(config, None)
